"""Recipes: full training configurations as frozen pydantic models, and their command-line flags.

`RECIPES` are those of training.fit: `paper` holds the paper's settings with the corrections that
model/ documents, and `unet` the same for the baseline's network. `compact` trained the shipped
weights. `finish` trains on from such weights (--init) on images that are changed only a little, as
the model will see them. `PRETRAIN_RECIPES` are those of training.pretrain.

Every field is a flag, those of the network too (`--network.vit_depth 4`).
"""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from model.network import NetworkConfig, TransUNetConfig, UNetConfig
from model.spec import MaskShares, ModelSpec

Range = tuple[float, float]
AnyModel = TypeVar("AnyModel", bound=BaseModel)


class TrainingRecipe(Protocol):
    """What a trainer needs from a recipe, be it of the main training or of the pretraining."""

    @property
    def optimiser(self) -> str:
        """adam, adamw or muon."""

    @property
    def learning_rate(self) -> float:
        """The highest rate of the schedule."""

    @property
    def weight_decay(self) -> float:
        """An L2 penalty for adam, decoupled for the others."""

    @property
    def clip_norm(self) -> float:
        """Largest gradient norm; 0 does not clip."""

    @property
    def epochs(self) -> int:
        """Passes over the images."""

    @property
    def ema_decay(self) -> float:
        """Decay of the averaged weights in each step; 0 does not average."""

    def rate_factor(self, step: int, steps_an_epoch: int) -> float:
        """Learning rate at a step (from 0), as a share of the highest."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """The fields by name (pydantic)."""

    def model_dump_json(self) -> str:
        """The fields as JSON (pydantic)."""


class Augmentation(BaseModel):
    """Random changes of a training image; lengths are fractions of the network input's side."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rotation_deg: float = Field(15.0, description="largest rotation, either way")
    scale: Range = Field((0.9, 1.1), description="range of the zoom factor")
    shift: float = Field(0.0, description="largest shift on each axis, either way")
    stretch: float = Field(0.0, description="largest stretch along a random axis, either way")
    elastic: float = Field(
        0.0, description="smooth bending: standard deviation by which its 4 x 4 nodes move"
    )
    gamma: Range = Field((0.8, 1.2), description="range of the exponent on grey values")
    contrast: Range = Field(
        (0.8, 1.2), description="range of the contrast factor, about the mean grey"
    )
    gain: float = Field(0.0, description="largest change of gain along a random direction")
    blur_sigma_px: float = Field(0.0, description="largest Gaussian blur, for half of the images")
    speckle: float = Field(0.0, description="largest multiplicative noise, for half of the images")
    erase: float = Field(0.0, description="largest side of a black box, for half of the images")
    style: float = Field(
        0.0, description="share of images that take the look of an unlabelled one (needs --styles)"
    )
    style_band: float = Field(
        0.05, description="width of the frequencies that make the look, as a share of the side"
    )


class Recipe(BaseModel):
    """Configuration of a main training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("paper", description="name, which the weights carry along")
    network: NetworkConfig = Field(
        TransUNetConfig(), discriminator="kind", description="sizes of the network"
    )
    mean: float = Field(114.5, description="grey value that is subtracted from the input")
    std: float = Field(57.6, description="grey value that the input is divided by")
    sigma_cells: float = Field(4.0, description="sigma of the target Gaussians, in heatmap cells")
    loss: Literal["mse", "cross_entropy"] = Field(
        "mse",
        description="loss of the heatmaps: mse, or cross_entropy (needs "
        "network.softmax_sigma_cells)",
    )
    heatmap_weight: float = Field(1.0, description="weight of the loss of the heatmaps")
    mask_weight: float = Field(0.3, description="weight of the loss of the masks (needs --masks)")
    mask_share: MaskShares = Field(
        (0.0, 0.0, 0.0),
        description="share of the masks' landmarks in the answer, for all or as three for PS1, PS2 "
        "and FH1; 0 takes the heatmaps alone",
    )
    teacher_share: float = Field(
        0.0, ge=0, le=1, description="share of the maps of --teachers in the targets"
    )
    landmark_noise_px: float = Field(
        2.0, description="sigma of the noise on the labelled landmarks, px at 512"
    )
    optimiser: Literal["adam", "adamw", "muon"] = Field(
        "adam",
        description="optimiser: adam, adamw, or muon (matrices by Muon, the rest by adamw)",
    )
    learning_rate: float = Field(3e-5, description="highest learning rate")
    weight_decay: float = Field(1e-4, description="weight decay: L2 for adam, else decoupled")
    schedule: Literal["step", "one_cycle"] = Field(
        "step",
        description="learning rate over time: step (times step_factor every step_epochs), or "
        "one_cycle (up in a line, then down in a cosine)",
    )
    step_epochs: int = Field(50, description="epochs between two steps of schedule step")
    step_factor: float = Field(0.5, description="factor at each step of schedule step")
    warm_up: float = Field(0.1, description="share of the training in which one_cycle climbs")
    clip_norm: float = Field(0.0, description="largest gradient norm; 0 does not clip")
    epochs: int = Field(100, description="passes over the training images")
    batch: int = Field(4, description="images in a step, over all processes")
    ema_decay: float = Field(
        0.0, description="decay of the averaged weights in each step; 0 does not average"
    )
    balance: float = Field(
        0.0, description="exponent b: an image is drawn in proportion to (size of its group)^-b"
    )
    augmentation: Augmentation = Field(
        Augmentation(), description="random changes of a training image"
    )
    seed: int = Field(1, description="random seed for first weights, order and augmentation")
    workers: int = Field(1, description="processes that load images; 0 loads in the training's own")

    def rate_factor(self, step: int, steps_an_epoch: int) -> float:
        """Learning rate at a step (from 0), as a share of `learning_rate`."""
        if self.schedule == "step":
            return float(self.step_factor ** (step // steps_an_epoch // self.step_epochs))
        return one_cycle_factor(step / max(1, self.epochs * steps_an_epoch), self.warm_up)

    def spec(self, masks: int = 0) -> ModelSpec:
        """The description that inference needs of a network that this recipe trained.

        Args:
            masks: number of masks that the network outputs; 0 without --masks.
        """
        network = self.network
        return ModelSpec(
            name=f"aop-{self.name}",
            input_size=network.input_size,
            channels=network.channels,
            mean=self.mean,
            std=self.std,
            stride=network.stride,
            sigma_cells=self.sigma_cells,
            masks=masks,
            mask_share=self.mask_share,
            recipe=self.model_dump(mode="json"),
        )


class PretrainRecipe(BaseModel):
    """Configuration of a pretraining: a masked autoencoder (MAE), perhaps taught by a larger model.

    The defaults are the paper's, and MAE's where the paper is silent. Width, depth and heads of the
    encoder must be those of the bottleneck that its blocks go into.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimiser: ClassVar[str] = "adamw"

    image_size: int = Field(224, description="side of a crop, px")
    patch: int = Field(16, description="side of a patch, px")
    width: int = Field(192, description="width of the encoder, equal to the bottleneck's")
    depth: int = Field(12, description="blocks of the encoder, as many as the bottleneck's")
    heads: int = Field(
        12, description="attention heads of the encoder, as many as the bottleneck's"
    )
    decoder_width: int = Field(96, description="width of the decoder")
    decoder_depth: int = Field(1, description="blocks of the decoder")
    decoder_heads: int = Field(3, description="attention heads of the decoder")
    name: str = Field("paper", description="name, which the run carries along")
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that is masked")
    variance_floor: float = Field(
        1e-6, gt=0, description="constant added to a patch's variance (grey 0..1) to normalise it"
    )
    teacher: str = Field(
        "none",
        description="teacher: usfm:FILE (BEiT-style weights), mae:RUN (an earlier run) or none "
        "(plain MAE)",
    )
    target: Literal["features", "attention", "features+attention"] = Field(
        "features",
        description="what of the teacher is matched: features, attention or features+attention",
    )
    teacher_sees: Literal["image", "kept"] = Field(
        "image", description="input of the teacher: image (the whole one, Eq. 1), or kept patches"
    )
    mae_weight: float = Field(
        1.0, ge=0, description="weight of the loss of the MAE: lambda of Eq. 1"
    )
    attention_weight: float = Field(1.0, ge=0, description="weight of the loss of attention maps")
    crop_area: Range = Field((0.2, 1.0), description="range of a crop's share of the area")
    rotation_deg: float = Field(10.0, description="largest rotation, either way")
    gamma: Range = Field((0.8, 1.2), description="range of the exponent on grey values")
    contrast: Range = Field((0.8, 1.2), description="range of the contrast factor, about the mean")
    learning_rate: float = Field(1e-4, description="highest learning rate of AdamW")
    weight_decay: float = Field(0.05, description="weight decay, decoupled")
    warm_up: float = Field(0.1, description="share of the training in which the rate climbs")
    clip_norm: float = Field(0.0, description="largest gradient norm; 0 does not clip")
    epochs: int = Field(400, description="passes over the images")
    batch: int = Field(1024, description="images in a step, over all processes")
    ema_decay: float = Field(
        0.0, description="decay of the averaged weights in each step; 0 does not average"
    )
    val_share: float = Field(0.05, gt=0, lt=1, description="share of the images kept for val")
    seed: int = Field(1, description="random seed for first weights, order, crops and masks")
    workers: int = Field(1, description="processes that cut crops; 0 cuts in the training's own")

    @model_validator(mode="after")
    def _check_sizes(self) -> "PretrainRecipe":
        if self.image_size % self.patch:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch {self.patch}"
            )
        for part in ("", "decoder_"):
            width, heads = getattr(self, f"{part}width"), getattr(self, f"{part}heads")
            if width % heads or width % 4:
                raise ValueError(f"{part}width {width} is not a multiple of 4 and of {heads} heads")
        return self

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch

    def rate_factor(self, step: int, steps_an_epoch: int) -> float:
        """Learning rate at a step (from 0), as a share of `learning_rate`."""
        return one_cycle_factor(step / max(1, self.epochs * steps_an_epoch), self.warm_up)


def one_cycle_factor(done: float, warm_up: float) -> float:
    """Share of the highest learning rate: a line up from 0.04 to 1, then a cosine down to 0.

    Args:
        done: share of the training's steps that are over.
        warm_up: share of the steps in which the rate climbs.
    """
    if done < warm_up:
        return 0.04 + 0.96 * done / warm_up
    return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))


PAPER = Recipe()
UNET = Recipe(name="unet", network=UNetConfig())
COMPACT = Recipe(
    name="compact",
    network=TransUNetConfig(
        input_size=256,
        channels=1,
        encoder="compact",
        encoder_widths=(32, 64, 128, 192, 256),
        vit_depth=6,
        up_widths=(192, 128, 64),
        softmax_sigma_cells=2.0,
    ),
    mean=30.0,
    std=46.4,
    sigma_cells=2.0,
    loss="cross_entropy",
    landmark_noise_px=0.0,
    optimiser="muon",
    learning_rate=3e-3,
    weight_decay=0.1,
    schedule="one_cycle",
    clip_norm=1.0,
    mask_weight=1.0,
    mask_share=(0.5, 0.5, 0.75),
    epochs=30,
    batch=8,
    ema_decay=0.998,
    balance=0.5,
    augmentation=Augmentation(
        rotation_deg=30,
        scale=(0.75, 1.3),
        shift=0.1,
        stretch=0.15,
        elastic=0.025,
        gamma=(0.6, 1.6),
        contrast=(0.6, 1.4),
        gain=0.4,
        blur_sigma_px=1.5,
        speckle=0.25,
        erase=0.25,
    ),
)
FINISH = COMPACT.model_copy(
    update={
        "learning_rate": 2e-3,
        "epochs": 12,
        "mask_weight": 3.0,
        "augmentation": Augmentation(
            rotation_deg=8,
            scale=(0.92, 1.09),
            shift=0.03,
            stretch=0.04,
            elastic=0.006,
            gamma=(0.85, 1.2),
            contrast=(0.85, 1.15),
            gain=0.2,
            blur_sigma_px=0.7,
            speckle=0.1,
            erase=0.1,
        ),
    }
)
RECIPES = {"paper": PAPER, "compact": COMPACT, "finish": FINISH, "unet": UNET}

PRETRAIN_PAPER = PretrainRecipe()
PRETRAIN_COMPACT = PretrainRecipe(
    name="compact",
    image_size=128,
    depth=6,
    variance_floor=1e-3,
    crop_area=(0.4, 1.0),
    learning_rate=5e-4,
    clip_norm=1.0,
    epochs=200,
    batch=16,  # few images need many steps: batches of 64 explained 0.10 of the variance, 16 0.16
)
PRETRAIN_RECIPES = {"paper": PRETRAIN_PAPER, "compact": PRETRAIN_COMPACT}
PURPOSES = {
    "paper": "the paper's settings, corrected",
    "compact": "the small network of the shipped weights",
    "finish": "the second training of compact, from --init",
    "unet": "the paper's settings for the baseline's network",
}


# ---- The command line


def add_recipe_arguments(parser: argparse.ArgumentParser, recipes: Mapping[str, BaseModel]) -> None:
    """Add `--recipe` and one flag for every field of the recipes, nested ones with a dot."""
    about = "; ".join(f"{name}: {PURPOSES[name]}" for name in recipes)
    parser.add_argument(
        "--recipe",
        choices=sorted(recipes),
        default="compact",
        help=f"recipe whose values the fields below start from (%(default)s): {about}",
    )
    group = parser.add_argument_group(
        "recipe fields",
        "A flag replaces a value of the recipe. Lists are written 1,2,3.\n"
        f"Brackets show the values of {' | '.join(recipes)}.",
    )
    for path, description in _describe_fields(recipes).items():
        values = [_value_at(recipe, path) for recipe in recipes.values()]
        shown = " | ".join("-" if value is None else json.dumps(value) for value in values)
        group.add_argument(
            f"--{path}",
            metavar="V",
            help=f"{description} ({shown})".replace("%", "%%"),
            default=argparse.SUPPRESS,
        )


def recipe_from_arguments(args: argparse.Namespace, recipes: Mapping[str, AnyModel]) -> AnyModel:
    """The chosen recipe with the fields that the command line sets.

    Raises:
        ValueError: (pydantic's ValidationError) a field does not take its value.
    """
    recipe = recipes[args.recipe]
    values = recipe.model_dump(mode="json")
    for path in _describe_fields(recipes):
        if path in args:
            *parents, leaf = path.split(".")
            target = values
            for parent in parents:
                target = target[parent]
            text = getattr(args, path)
            target[leaf] = text if isinstance(target.get(leaf), str) else _parse_value(text)
    return type(recipe).model_validate(values)


def parse_mask_shares(text: str) -> MaskShares:
    """Shares of the masks from a command line: one for all landmarks, or three with commas between.

    Raises:
        argparse.ArgumentTypeError: the text holds anything else.
    """
    parts = text.split(",")
    try:
        return TypeAdapter(MaskShares).validate_python(parts * 3 if len(parts) == 1 else parts)
    except ValidationError as error:
        expected = "one share from 0 to 1, or three as 0.3,0.1,0.6 for PS1, PS2 and FH1"
        raise argparse.ArgumentTypeError(f"expected {expected}; got {text!r}") from error


def _describe_fields(recipes: Mapping[str, BaseModel]) -> dict[str, str]:
    """Path -> description of every field that is a flag, in the order of the recipes."""
    return {
        path: text for recipe in recipes.values() for path, text in _describe_model(recipe).items()
    }


def _describe_model(model: BaseModel | NetworkConfig, prefix: str = "") -> dict[str, str]:
    """The same for one recipe, or for a part of it whose paths start with the prefix."""
    texts: dict[str, str | None]
    if isinstance(model, BaseModel):
        texts = {name: field.description for name, field in type(model).model_fields.items()}
    else:
        texts = {field.name: field.metadata.get("description") for field in fields(model)}
    described: dict[str, str] = {}
    for name, text in texts.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel | NetworkConfig):
            described |= _describe_model(value, f"{prefix}{name}.")
        elif name != "kind":
            described[prefix + name] = text or ""
    return described


def _value_at(recipe: BaseModel, path: str) -> Any:
    """The value of a field; None if the recipe's network lacks the field."""
    value: Any = recipe.model_dump(mode="json")
    for name in path.split("."):
        value = value.get(name)
    return value


def _parse_value(text: str) -> Any:
    """JSON, or a list without its brackets; anything else as it stands, for pydantic to judge."""
    try:
        return json.loads(f"[{text}]" if "," in text and text[0] not in "[{" else text)
    except json.JSONDecodeError:
        return text.split(",") if "," in text else text
