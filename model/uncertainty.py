"""How far off a prediction may be: two signs of an error, and the calibration that weighs them.

The signs are the disagreement of the model's two answers (heatmaps and masks), and the spread of
the heatmaps. The expected error of each landmark, and of the angle, is
exp(b0 + b1 log(1 + disagreement) + b2 log(spread)). training.calibrate fits it on images that did
not train the network. The interval of the angle is the prediction +- a factor times the expected
error (conformal prediction with normalised residuals: Papadopoulos et al., ICTAI 2008).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from model.anatomy import LANDMARKS, Floats, Landmark, angle_of_progression
from model.heatmap import Heatmaps

QUANTITIES = (*LANDMARKS, "AoP")
REFERENCE_PX = 512  # errors are those in an image whose longer side has this length
MIN_SPREAD = 1e-3  # px or deg
Bounds = tuple[float, float]  # (low, high)


class ErrorModel(BaseModel):
    """The expected error of one quantity, in px at 512 or in deg.

    Args:
        weights: b0, b1, b2.
        limits: ranges of the two terms in the cases of the fit. Terms beyond them are clipped,
            because nothing is known there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: tuple[float, float, float]
    limits: tuple[Bounds, Bounds]

    def expected(self, terms: npt.ArrayLike) -> Floats:
        """(..., 2) terms of `error_terms` -> (...) expected errors."""
        low, high = np.transpose(self.limits)
        inside = np.clip(np.asarray(terms, np.float64), low, high)
        return np.asarray(np.exp(self.weights[0] + inside @ np.array(self.weights[1:])))


class Calibration(BaseModel):
    """The result of training.calibrate; part of the ModelSpec."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    errors: dict[str, ErrorModel] = Field(description="by name: PS1, PS2, FH1 and AoP")
    interval: float = Field(gt=0, description="half the 90 % interval, in expected AoP errors")
    error_above_deg: float = Field(gt=0, description="an expected AoP error above this is doubtful")
    view_below: float | None = Field(None, description="a view score below this is doubtful")
    cases: int = Field(gt=0, description="number of cases in the fit")


class ExpectedErrors(NamedTuple):
    """The errors to expect in one image.

    Args:
        landmarks_px: (3,) mean radial errors in px at 512.
        aop_deg: mean AoP error.
    """

    landmarks_px: Floats
    aop_deg: float


def expected_errors(calibration: Calibration, terms: Floats) -> ExpectedErrors:
    """(4, 2) terms of `error_terms` -> the errors to expect."""
    models = [calibration.errors[name] for name in QUANTITIES]
    values = [float(model.expected(row)) for model, row in zip(models, terms, strict=True)]
    return ExpectedErrors(np.array(values[:3]), values[3])


def interval_deg(calibration: Calibration, aop_deg: float, expected_deg: float) -> Bounds:
    """The 90 % interval of an angle in deg, within 0 to 180."""
    reach = calibration.interval * expected_deg
    return max(0.0, aop_deg - reach), min(180.0, aop_deg + reach)


def error_terms(heatmaps: Heatmaps, first: Floats, second: Floats | None, cell_px: float) -> Floats:
    """(4, 2): log(1 + disagreement) and log(spread) of PS1, PS2, FH1 (px at 512) and AoP (deg).

    Args:
        heatmaps: (3, rows, columns), with peaks of any height.
        first: (3, 2) landmarks of the heatmaps in px at 512.
        second: (3, 2) landmarks of the masks in px at 512. Without them the disagreement is
            infinite.
        cell_px: side of a cell in px at 512.
    """
    spreads = covariances(heatmaps) * cell_px**2
    variances = [*np.trace(spreads, axis1=1, axis2=2), _angle_variance(first, spreads)]
    widths = np.sqrt(variances)
    distances = np.full(4, np.inf)
    if second is not None:
        distances[:3] = np.linalg.norm(first - second, axis=1)
        distances[3] = abs(_angle_or_zero(first) - _angle_or_zero(second))
    return np.column_stack([np.log1p(distances), np.log(np.maximum(widths, MIN_SPREAD))])


def covariances(heatmaps: Heatmaps) -> Floats:
    """(k, rows, columns) -> (k, 2, 2) covariance of x and y in cells^2, heatmaps as distributions.

    Negative values count as 0. A heatmap without positive values spreads evenly.
    """
    maps = np.nan_to_num(np.maximum(heatmaps, 0).astype(np.float64), posinf=0.0)
    maps[maps.sum(axis=(1, 2)) <= 0] = 1.0
    maps /= maps.sum(axis=(1, 2), keepdims=True)
    _, rows, columns = maps.shape
    x, y = np.arange(columns), np.arange(rows)
    over_x, over_y = maps.sum(axis=1), maps.sum(axis=2)
    mean_x, mean_y = over_x @ x, over_y @ y
    xx = over_x @ (x * x) - mean_x**2
    yy = over_y @ (y * y) - mean_y**2
    xy = np.einsum("kyx,y,x->k", maps, y, x, optimize=True) - mean_x * mean_y
    return np.stack([np.stack([xx, xy], -1), np.stack([xy, yy], -1)], -2)


def _angle_or_zero(points: Floats) -> float:
    """The angle of progression in deg; 0 if there is none because two points coincide."""
    try:
        return float(angle_of_progression(points))
    except ValueError:
        return 0.0


def _angle_variance(points: Floats, spreads: Floats) -> float:
    """The angle's variance in deg^2, to first order, if the points vary independently.

    Args:
        points: (3, 2) landmarks.
        spreads: (3, 2, 2) their covariances.
    """
    ps1 = points[Landmark.PS1]
    arms = points[[Landmark.PS2, Landmark.FH1]] - ps1
    squared = np.maximum((arms**2).sum(axis=1, keepdims=True), 1.0)
    rotations = np.column_stack([-arms[:, 1], arms[:, 0]]) / squared  # rad per px of each end
    side = np.sign(arms[0, 0] * arms[1, 1] - arms[0, 1] * arms[1, 0])
    by_ps2, by_fh1 = -side * rotations[0], side * rotations[1]
    gradients = np.array([-by_ps2 - by_fh1, by_ps2, by_fh1])
    variance = np.einsum("ki,kij,kj->", gradients, spreads, gradients)
    return float(np.degrees(np.sqrt(max(variance, 0.0))) ** 2)
