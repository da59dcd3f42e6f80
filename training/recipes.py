"""Recipes: full training configurations as frozen pydantic models, and their command-line flags.

`paper` holds the paper's settings with the corrections that model/ documents, `unet` the same for
the baseline's network, `compact` those of the shipped weights, which `finish` then trains on
(--init) with images changed but little, more like those that the model will see. Every field,
those of the network too (`--network.vit_depth 4`), is a flag.
"""

import argparse
import json
import math
from dataclasses import fields
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from model.network import NetworkConfig, TransUNetConfig, UNetConfig
from model.spec import MaskShares, ModelSpec

Range = tuple[float, float]


class TrainingRecipe(Protocol):
    """What a trainer asks of a recipe: the main training's, or the pretraining's."""

    @property
    def optimiser(self) -> str:
        """adam, adamw or muon."""

    @property
    def learning_rate(self) -> float:
        """The highest one."""

    @property
    def weight_decay(self) -> float:
        """L2 for adam, else decoupled."""

    @property
    def clip_norm(self) -> float:
        """The largest gradient norm; 0: not clipped."""

    @property
    def epochs(self) -> int:
        """Passes over the images."""

    @property
    def ema_decay(self) -> float:
        """Decay of the averaged weights a step; 0: they are not averaged."""

    def rate_factor(self, step: int, steps_an_epoch: int) -> float:
        """The learning rate at a step, counted from 0, as a share of the highest."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """The fields by name, as pydantic gives them."""

    def model_dump_json(self) -> str:
        """The same as JSON."""


class Augmentation(BaseModel):
    """Random changes of a training image; lengths are fractions of the network input's side."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rotation_deg: float = Field(15.0, description="rotation by up to +- this")
    scale: Range = Field((0.9, 1.1), description="range of the scale")
    shift: float = Field(0.0, description="shift on each axis by up to +- this")
    stretch: float = Field(0.0, description="stretch along a random axis by up to +- this")
    elastic: float = Field(
        0.0, description="smooth bending, standard deviation of its 4 x 4 nodes' displacements"
    )
    gamma: Range = Field((0.8, 1.2), description="range of the grey values' exponent")
    contrast: Range = Field((0.8, 1.2), description="range of the factor about the mean grey")
    gain: float = Field(
        0.0, description="gain that changes along a random direction by up to +- this"
    )
    blur_sigma_px: float = Field(0.0, description="Gaussian blur of up to this, half of the time")
    speckle: float = Field(0.0, description="multiplicative noise of up to this, half of the time")
    erase: float = Field(0.0, description="a black box of up to this side, half of the time")
    style: float = Field(
        0.0, description="share of images that take an unlabelled image's style, with --styles"
    )
    style_band: float = Field(0.05, description="frequencies that are style, share of the side")


class Recipe(BaseModel):
    """One training configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("paper", description="the recipe's name")
    network: NetworkConfig = Field(
        TransUNetConfig(), discriminator="kind", description="the network's sizes"
    )
    mean: float = Field(114.5, description="grey value subtracted from the input")
    std: float = Field(57.6, description="grey value that divides the input")
    sigma_cells: float = Field(4.0, description="sigma of the target Gaussians, heatmap cells")
    loss: Literal["mse", "cross_entropy"] = Field(
        "mse", description="mse on the heatmaps; cross_entropy needs network.softmax_sigma_cells"
    )
    heatmap_weight: float = Field(1.0, description="weight of the heatmaps' loss")
    mask_weight: float = Field(0.3, description="weight of the auxiliary masks' loss, with --masks")
    mask_share: MaskShares = Field(
        (0.0, 0.0, 0.0),
        description="share of the masks' own landmarks in the answer, for all or each of PS1, PS2 "
        "and FH1; 0: heatmaps alone",
    )
    teacher_share: float = Field(
        0.0, ge=0, le=1, description="share of the --teachers' maps in the targets"
    )
    landmark_noise_px: float = Field(
        2.0, description="label perturbation: sigma of the noise on landmarks, px at 512"
    )
    optimiser: Literal["adam", "adamw", "muon"] = Field(
        "adam", description="adam: L2; adamw: decoupled; muon: the matrices by Muon, the rest adamw"
    )
    learning_rate: float = Field(3e-5, description="the (highest) learning rate")
    weight_decay: float = Field(1e-4, description="weight decay")
    schedule: Literal["step", "one_cycle"] = Field(
        "step", description="step: times step_factor every step_epochs; one_cycle: up, then cosine"
    )
    step_epochs: int = Field(50, description="epochs between two steps")
    step_factor: float = Field(0.5, description="factor of a step")
    warm_up: float = Field(0.1, description="share of one_cycle that climbs")
    clip_norm: float = Field(0.0, description="largest gradient norm; 0: not clipped")
    epochs: int = Field(100, description="passes over the training images")
    batch: int = Field(4, description="images a step, over all processes")
    ema_decay: float = Field(0.0, description="decay of the averaged weights a step; 0: none")
    balance: float = Field(
        0.0, description="an image is drawn by the size of its group to the power of minus this"
    )
    augmentation: Augmentation = Field(Augmentation(), description="random changes of the images")
    seed: int = Field(1, description="seed of weights, order and augmentation")
    workers: int = Field(1, description="processes that load images; 0: none")

    def rate_factor(self, step: int, steps_an_epoch: int) -> float:
        """The learning rate at a step, counted from 0, as a share of `learning_rate`."""
        if self.schedule == "step":
            return float(self.step_factor ** (step // steps_an_epoch // self.step_epochs))
        return one_cycle_factor(step / max(1, self.epochs * steps_an_epoch), self.warm_up)

    def spec(self, masks: int = 0) -> ModelSpec:
        """What inference will have to know of a network of so many masks trained by this recipe."""
        cells = self.network
        return ModelSpec(
            name=f"aop-{self.name}",
            input_size=cells.input_size,
            channels=cells.channels,
            mean=self.mean,
            std=self.std,
            stride=cells.stride,
            sigma_cells=self.sigma_cells,
            masks=masks,
            mask_share=self.mask_share,
            recipe=self.model_dump(mode="json"),
        )


def one_cycle_factor(done: float, warm_up: float) -> float:
    """Share of the highest learning rate: up in a line from 0.04, then down in a cosine to 0.

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


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """`--recipe` and one flag for every field of a recipe, nested ones with a dot."""
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="compact")
    group = parser.add_argument_group(
        "recipe fields", "override the recipe; lists as 1,2,3; in brackets: " + " | ".join(RECIPES)
    )
    for path, description in FIELDS.items():
        values = [_get(recipe, path) for recipe in RECIPES.values()]
        shown = " | ".join("-" if value is None else json.dumps(value) for value in values)
        group.add_argument(
            f"--{path}",
            metavar="V",
            help=f"{description} ({shown})".replace("%", "%%"),
            default=argparse.SUPPRESS,
        )


def recipe_from_arguments(args: argparse.Namespace) -> Recipe:
    """The chosen recipe with the fields that the command line sets.

    Raises:
        ValueError: (pydantic's ValidationError) a value that its field does not take.
    """
    values = RECIPES[args.recipe].model_dump(mode="json")
    for path in FIELDS:
        if path in args:
            *parents, leaf = path.split(".")
            target = values
            for parent in parents:
                target = target[parent]
            target[leaf] = _parse(getattr(args, path))
    return Recipe.model_validate(values)


def mask_shares(text: str) -> MaskShares:
    """A command line's share of the masks: one for all landmarks, or three with commas between."""
    parts = text.split(",")
    try:
        return TypeAdapter(MaskShares).validate_python(parts * 3 if len(parts) == 1 else parts)
    except ValidationError as error:
        expected = "a share of 0 to 1, or three as 0.3,0.1,0.6 for PS1, PS2 and FH1"
        raise argparse.ArgumentTypeError(f"expected {expected}; got {text!r}") from error


def _fields(model: BaseModel | NetworkConfig, prefix: str = "") -> list[tuple[str, str]]:
    """(path, description) of every field that is a flag."""
    if isinstance(model, BaseModel):
        texts = {name: field.description for name, field in type(model).model_fields.items()}
    else:
        texts = {field.name: field.metadata.get("description") for field in fields(model)}
    found = []
    for name, text in texts.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel | NetworkConfig):
            found += _fields(value, f"{prefix}{name}.")
        elif name != "kind":
            found.append((prefix + name, text or ""))
    return found


FIELDS = dict(field for recipe in RECIPES.values() for field in _fields(recipe))


def _get(recipe: Recipe, path: str) -> Any:
    """A field's value; None where the recipe's network has no such field."""
    value: Any = recipe.model_dump(mode="json")
    for name in path.split("."):
        value = value.get(name)
    return value


def _parse(text: str) -> Any:
    try:
        return json.loads(f"[{text}]" if "," in text and text[0] not in "[{" else text)
    except json.JSONDecodeError:
        return text
