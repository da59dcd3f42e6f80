"""Pretraining recipes: full configurations as frozen pydantic models, and their flags.

`paper` holds the paper's settings, `compact` smaller ones that a CPU manages, whose encoder fits
into the bottleneck of `training.fit --recipe compact`.
"""

import argparse
import json
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Range = tuple[float, float]


class PretrainRecipe(BaseModel):
    """One pretraining; the defaults are the paper's, and MAE's where it is silent."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    optimiser: ClassVar[str] = "adamw"
    schedule: ClassVar[str] = "one_cycle"  # linear warm-up, then cosine to zero

    name: str = Field("paper", description="the recipe's name")
    image_size: int = Field(224, description="side of a crop, px")
    patch: int = Field(16, description="side of a patch, px")
    width: int = Field(192, description="the encoder's width: the bottleneck's, to fit into it")
    depth: int = Field(12, description="its blocks, likewise")
    heads: int = Field(12, description="its attention heads, likewise")
    decoder_width: int = Field(96, description="the decoder's width")
    decoder_depth: int = Field(1, description="its blocks")
    decoder_heads: int = Field(3, description="its attention heads")
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that is masked")
    variance_floor: float = Field(
        1e-6, gt=0, description="added to a patch's variance (grey 0..1) before it is normalised"
    )
    teacher: str = Field(
        "none", description="usfm:FILE (BEiT-style weights), mae:RUN (our own), none (plain MAE)"
    )
    target: Literal["features", "attention", "features+attention"] = Field(
        "features", description="what of the teacher is matched: features, attention, or both"
    )
    teacher_sees: Literal["image", "kept"] = Field(
        "image", description="image: features of the whole image are matched (Eq. 1); kept: patches"
    )
    mae_weight: float = Field(1.0, ge=0, description="lambda of Eq. 1, weight of the MAE's loss")
    attention_weight: float = Field(1.0, ge=0, description="weight of the attention maps' loss")
    crop_area: Range = Field((0.2, 1.0), description="range of a crop's share of the area")
    rotation_deg: float = Field(10.0, description="rotation by up to +- this")
    gamma: Range = Field((0.8, 1.2), description="range of the greys' exponent")
    contrast: Range = Field((0.8, 1.2), description="factor about the mean grey")
    learning_rate: float = Field(1e-4, description="the highest learning rate of AdamW")
    weight_decay: float = Field(0.05, description="weight decay")
    warm_up: float = Field(0.1, description="share of the training in which the rate climbs")
    clip_norm: float = Field(0.0, description="largest gradient norm; 0: not clipped")
    epochs: int = Field(400, description="passes over the images")
    batch: int = Field(1024, description="images a step, over all processes")
    ema_decay: float = Field(0.0, description="decay of the averaged weights a step; 0: none")
    val_share: float = Field(0.05, gt=0, lt=1, description="share of the images kept for val")
    seed: int = Field(1, description="seed of weights, order, crops and masks")
    workers: int = Field(1, description="processes that cut crops; 0: none")

    @model_validator(mode="after")
    def _fits(self) -> "PretrainRecipe":
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch {self.patch}")
        for part in ("", "decoder_"):
            width, heads = getattr(self, f"{part}width"), getattr(self, f"{part}heads")
            if width % heads or width % 4:
                raise ValueError(f"{part}width {width} is no multiple of 4 and of {heads} heads")
        return self

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch

    @property
    def kept(self) -> int:
        """Patches that the encoder sees of an image."""
        return max(1, round(self.grid**2 * (1 - self.mask_ratio)))


PAPER = PretrainRecipe()
COMPACT = PretrainRecipe(
    name="compact",
    image_size=128,
    depth=6,
    variance_floor=1e-3,
    crop_area=(0.4, 1.0),
    learning_rate=5e-4,
    clip_norm=1.0,
    epochs=200,
    batch=16,  # of few images many steps: with 64 it had explained 0.10 where this explains 0.16
)
RECIPES = {"paper": PAPER, "compact": COMPACT}


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """`--recipe` and one flag for every field."""
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="compact")
    group = parser.add_argument_group(
        "recipe fields", "override the recipe; pairs as 1,2; defaults below are paper | compact"
    )
    for name, field in PretrainRecipe.model_fields.items():
        shown = " | ".join(json.dumps(getattr(recipe, name)) for recipe in RECIPES.values())
        text = f"{field.description} ({shown})".replace("%", "%%")
        group.add_argument(f"--{name}", metavar="V", default=argparse.SUPPRESS, help=text)


def recipe_from_arguments(args: argparse.Namespace) -> PretrainRecipe:
    """The chosen recipe with the fields that the command line sets.

    Raises:
        ValueError: (pydantic's ValidationError) a value that its field does not take.
    """
    values: dict[str, Any] = RECIPES[args.recipe].model_dump()
    for name in PretrainRecipe.model_fields.keys() & vars(args).keys():
        text = getattr(args, name)
        values[name] = text.split(",") if isinstance(values[name], tuple) else text
    return PretrainRecipe.model_validate(values)
