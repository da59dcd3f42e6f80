"""ModelSpec: everything that inference must know of a model, stored as JSON inside the ONNX file.

Preprocessing and decoding follow it alone.
"""

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from model.anatomy import LANDMARKS
from model.frame import Pixels
from model.heatmap import Decode, HeatmapCodec, Heatmaps
from model.uncertainty import Calibration

SCHEMA_VERSION: Literal[1] = 1
METADATA_KEY = "aop.model_spec"


class SpecError(ValueError):
    """A model file without a usable ModelSpec; the message says what to do."""


def _repeat_single(share: Any) -> Any:
    return [share] * len(LANDMARKS) if isinstance(share, int | float) else share


Share = Annotated[float, Field(ge=0, le=1)]
MaskShares = Annotated[tuple[Share, Share, Share], BeforeValidator(_repeat_single)]
"""A share for each of LANDMARKS; a single number stands for all three."""


class ModelSpec(BaseModel):
    """What a network expects and returns, and where it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str = Field("aop", description="the model's name, written into results.json")
    landmarks: tuple[str, ...] = Field(LANDMARKS, description="order of the heatmaps")
    input_size: int = Field(gt=0, description="side of the square network input, px")
    channels: Literal[1, 3] = Field(1, description="1: grey; 3: grey repeated")
    mean: float = Field(description="subtracted from grey values 0..255")
    std: float = Field(gt=0, description="divides grey values after the subtraction")
    stride: int = Field(gt=0, description="input px per heatmap cell")
    sigma_cells: float = Field(gt=0, description="standard deviation of a target, in cells")
    masks: Literal[0, 2] = Field(
        0, description="channels after the heatmaps: the share of each cell that PS and FH cover"
    )
    mask_share: MaskShares = Field(
        (0.0, 0.0, 0.0), description="weight of the masks' own landmarks in the answer"
    )
    decode: Decode = Field("subpixel", description="decoder with which `metrics` were measured")
    doubt_below: float = Field(
        0.0, ge=0, le=1, description="a landmark's confidence below this makes a case doubtful"
    )
    calibration: Calibration | None = Field(
        None, description="expected errors and thresholds of doubt, which replace doubt_below"
    )
    training_data: str = Field("", description="data sets, and how their landmarks were made")
    licence: str = ""
    recipe: dict[str, object] = Field(default_factory=dict, description="settings of the training")
    val_trained: bool = Field(False, description="whether split val is among the training data")
    metrics: dict[str, float] = Field(
        default_factory=dict, description="figures on split val, or on folds if val_trained"
    )

    def normalise(self, grey: Pixels) -> Heatmaps:
        """(size, size) grey values 0..255 -> (channels, size, size) network input."""
        scaled = (grey.astype(np.float32) - np.float32(self.mean)) / np.float32(self.std)
        return np.repeat(scaled[None], self.channels, axis=0)

    @property
    def codec(self) -> HeatmapCodec:
        """The codec for this model's heatmaps."""
        cells = self.input_size // self.stride
        return HeatmapCodec(cells, cells, self.sigma_cells)


def parse_spec(text: str | None) -> ModelSpec:
    """The ModelSpec in an ONNX file's metadata entry.

    Raises:
        SpecError: there is no entry, it has another schema version or landmark order, or a field
            is wrong.
    """
    if not text:
        raise SpecError(
            f"the model file has no ModelSpec (metadata entry '{METADATA_KEY}'); "
            "export it with python -m export.to_onnx"
        )
    try:
        spec = ModelSpec.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the JSON"
        raise SpecError(
            f"the model file's ModelSpec is not of schema version {SCHEMA_VERSION}: "
            f"{where}: {first['msg']}; export it again with python -m export.to_onnx"
        ) from error
    if spec.landmarks != LANDMARKS:
        raise SpecError(f"the model's landmarks are {spec.landmarks}, expected {LANDMARKS}")
    return spec
