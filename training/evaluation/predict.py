"""Predictions for the cases of a table, by torch weights or by an ONNX file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from model.anatomy import Floats, angle_of_progression, implausibilities
from model.frame import Pair
from model.heatmap import Decode, Heatmaps
from model.measure import aop_interval, reasons_for_doubt
from model.predictor import Output, Prediction, Predictor
from model.spec import ModelSpec
from training.data.case_table import Case
from training.data.dataset import read_frame


@dataclass(frozen=True)
class CasePrediction:
    """The answer for one case, by a model or by a human reader.

    landmarks_px: (3, 2) in image px. longer_side_px: of the image. aop_deg: NaN if two landmarks
    coincide. confidence: (3,) and heatmaps: (3, rows, columns) are empty for a reader. The other
    fields are those of `CaseEntry`: None for a reader, or for a model without calibration.
    """

    landmarks_px: Floats
    longer_side_px: int
    aop_deg: float
    confidence: Floats = field(default_factory=lambda: np.empty(0))
    heatmaps: Heatmaps = field(default_factory=lambda: np.empty(0, np.float32))
    aop_interval_deg: Pair | None = None
    expected_error_px: Floats | None = None  # (3,) image px
    expected_aop_error_deg: float | None = None
    reasons: tuple[str, ...] = ()  # why the answer is doubtful; empty if it is not


def torch_predictor(network: nn.Module, spec: ModelSpec, device: torch.device) -> Predictor:
    """A predictor that runs a torch network; its outputs are float32."""

    def run(network_input: Heatmaps) -> Output:
        with torch.inference_mode():
            output = network(torch.from_numpy(network_input).to(device))
        parts = output if isinstance(output, tuple) else (output,)
        return Output(*(part.float().cpu().numpy() for part in parts))

    network.eval()
    return Predictor(spec, run, device.type)


def predict_cases(
    predictor: Predictor, cases: Sequence[Case], images: Path, decode: Decode | None = None
) -> list[CasePrediction]:
    """Predictions in the order of the cases, whose files lie in the folder `images`."""
    predictions = []
    for case in tqdm(cases, "predict", leave=False):
        grey, pixel_shape = read_frame(images / case.file, case.frame)
        prediction = predictor.predict(grey, pixel_shape, decode)
        predictions.append(case_prediction(prediction, grey.shape, pixel_shape, predictor.spec))
    return predictions


def case_prediction(
    prediction: Prediction, shape: tuple[int, int], pixel_shape: Pair, spec: ModelSpec
) -> CasePrediction:
    """The answer that a prediction gives for an image of (height, width), with angle and doubt."""
    reasons = implausibilities(prediction.landmarks_px, shape[::-1], pixel_shape)
    try:
        angle = float(angle_of_progression(prediction.landmarks_px, pixel_shape))
    except ValueError:
        angle = math.nan
    answer = CasePrediction(
        prediction.landmarks_px,
        max(shape),
        angle,
        prediction.confidence,
        prediction.heatmaps,
        reasons=(*reasons, *reasons_for_doubt(prediction, spec)),
    )
    if prediction.expected is None or spec.calibration is None:
        return answer
    return replace(
        answer,
        aop_interval_deg=aop_interval(prediction, angle, spec),
        expected_error_px=prediction.expected.landmarks_px,
        expected_aop_error_deg=prediction.expected.aop_deg,
    )
