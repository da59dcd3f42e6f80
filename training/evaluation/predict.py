"""Predictions for a case table, by any predictor: torch weights or an ONNX file.

Those of a cross-validation (training.folds) are each of a network that has not seen the case.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from model.anatomy import Floats, angle_of_progression, implausibilities
from model.frame import Pair
from model.heatmap import Decode, Heatmaps
from model.measure import doubts, interval_of
from model.predictor import Output, Prediction, Predictor
from model.spec import ModelSpec
from training.data.case_table import Case, CaseError, read_cases
from training.data.dataset import read_grey
from training.learning.checkpoint import Checkpoint, load_weights

KEPT_OUT = "test"  # the split of the cases that a fold keeps out: training.fit never reads it


@dataclass(frozen=True)
class CasePrediction:
    """One case's answer.

    landmarks_px: (3, 2) in image px. longer_side_px: the image's. aop_deg: NaN where two landmarks
    coincide. confidence: (3,), heatmaps: (3, rows, columns); both empty for a reader's answer. The
    rest is as in `CaseEntry`: None or empty where the model is not calibrated, or a reader answers.
    """

    landmarks_px: Floats
    longer_side_px: int
    aop_deg: float
    confidence: Floats = field(default_factory=lambda: np.empty(0))
    heatmaps: Heatmaps = field(default_factory=lambda: np.empty(0, np.float32))
    aop_interval_deg: Pair | None = None
    expected_error_px: Floats | None = None  # (3,) image px
    expected_aop_error_deg: float | None = None
    reasons: tuple[str, ...] = ()  # of doubt; none: not doubtful


def torch_predictor(network: nn.Module, spec: ModelSpec, device: torch.device) -> Predictor:
    """A predictor that runs a torch network, in float32."""

    def run(network_input: Heatmaps) -> Output:
        with torch.inference_mode():
            found = network(torch.from_numpy(network_input).to(device))
        parts = found if isinstance(found, tuple) else (found,)
        return Output(*(part.float().cpu().numpy() for part in parts))

    network.eval()
    return Predictor(spec, run, device.type)


def predict_cases(
    predictor: Predictor, cases: Sequence[Case], images: Path, decode: Decode | None = None
) -> list[CasePrediction]:
    """Predictions in the order of the cases."""
    answers = []
    for case in tqdm(cases, "predict", leave=False):
        grey, pixel_shape = read_grey(images / case.file, case.frame)
        found = predictor.predict(grey, pixel_shape, decode)
        answers.append(answer_of(found, grey.shape, pixel_shape, predictor.spec))
    return answers


def answer_of(
    found: Prediction, shape: tuple[int, int], pixel_shape: Pair, spec: ModelSpec
) -> CasePrediction:
    """What a prediction for an image of (height, width) says, doubt included."""
    reasons = implausibilities(found.landmarks_px, shape[::-1], pixel_shape)
    try:
        angle = float(angle_of_progression(found.landmarks_px, pixel_shape))
    except ValueError:
        angle = math.nan
    answer = CasePrediction(
        found.landmarks_px,
        max(shape),
        angle,
        found.confidence,
        found.heatmaps,
        reasons=(*reasons, *doubts(found, spec)),
    )
    if found.expected is None or spec.calibration is None:
        return answer
    return replace(
        answer,
        aop_interval_deg=interval_of(found, angle, spec),
        expected_error_px=found.expected.landmarks_px,
        expected_aop_error_deg=found.expected.aop_deg,
    )


def finished_folds(folds: Path) -> list[Path]:
    """The folders of a cross-validation's trainings.

    Raises:
        CaseError: no fold is there, or one is not done.
    """
    runs = sorted(folds.glob("fold-*"))
    if not runs or not all((run / "done").exists() for run in runs):
        raise CaseError(f"{folds} holds no finished folds: run training.folds --output {folds}")
    return runs


def splits_of_fold(run: Path) -> list[tuple[str, str | None]]:
    """Each case's file and split in a fold's folder: two folds with equal ones fit together."""
    return [(case.file, case.split) for case in read_cases(run / "cases.csv")]


def kept_out(folds: Path) -> Iterator[tuple[nn.Module, Checkpoint, list[Case]]]:
    """Each fold's network, and the cases that it has not seen; CaseError as `finished_folds`."""
    for run in finished_folds(folds):
        cases = [case for case in read_cases(run / "cases.csv") if case.split == KEPT_OUT]
        yield *load_weights(run / "best.safetensors"), cases
