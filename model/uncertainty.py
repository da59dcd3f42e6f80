"""How far a prediction may be off: what speaks of an error, and the calibration that weighs it.

Two things speak: how far the two answers of one model lie apart (heatmaps and masks), and how
widely the heatmaps spread. For each landmark, and for the angle, the expected error is
exp(b0 + b1 log(1 + disagreement) + b2 log(spread)), fitted by training.calibrate on images that
did not train the network. The interval of the angle is the prediction +- a factor times the
expected error (conformal prediction with normalised residuals: Papadopoulos et al., ICTAI 2008).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from model.anatomy import LANDMARKS, Floats, Landmark, angle_of_progression
from model.heatmap import Heatmaps

QUANTITIES = (*LANDMARKS, "AoP")
REFERENCE_PX = 512  # errors are of images of this longer side
SMALLEST = 1e-3  # px or deg; a spread is at least that
Pair = tuple[float, float]


class ErrorModel(BaseModel):
    """The expected error of one quantity, in px at 512 or in deg.

    weights: b0, b1, b2. limits: range of the two terms on the cases it was fitted on; beyond it
    nothing is known, and the nearest end is taken.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: tuple[float, float, float]
    limits: tuple[Pair, Pair]

    def expected(self, terms: npt.ArrayLike) -> Floats:
        """(..., 2) terms as of `evidence` -> (...) expected errors."""
        low, high = np.transpose(self.limits)
        inside = np.clip(np.asarray(terms, np.float64), low, high)
        return np.asarray(np.exp(self.weights[0] + inside @ np.array(self.weights[1:])))


class Calibration(BaseModel):
    """What training.calibrate found; part of the ModelSpec."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    errors: dict[str, ErrorModel] = Field(description="of PS1, PS2, FH1 and AoP")
    interval: float = Field(gt=0, description="half the 90 % interval, in expected AoP errors")
    error_above_deg: float = Field(gt=0, description="an expected AoP error above is doubtful")
    view_below: float | None = Field(default=None, description="a view score below is doubtful")
    cases: int = Field(gt=0, description="cases it was fitted on")


class Expected(NamedTuple):
    """landmarks_px: (3,) mean radial errors in px at 512; aop_deg: mean AoP error."""

    landmarks_px: Floats
    aop_deg: float


def expected_errors(calibration: Calibration, terms: Floats) -> Expected:
    """(4, 2) terms of `evidence` -> the errors to expect."""
    values = [float(calibration.errors[name].expected(terms[k])) for k, name in
              enumerate(QUANTITIES)]  # fmt: skip
    return Expected(np.array(values[:3]), values[3])


def interval_deg(calibration: Calibration, aop_deg: float, expected_deg: float) -> Pair:
    """The 90 % interval of an angle, within 0 to 180 deg."""
    reach = calibration.interval * expected_deg
    return max(0.0, aop_deg - reach), min(180.0, aop_deg + reach)


def evidence(heatmaps: Heatmaps, first: Floats, second: Floats | None, cell_px: float) -> Floats:
    """(4, 2): log(1 + disagreement) and log(spread) of PS1, PS2, FH1 (px at 512) and AoP (deg).

    Args:
        heatmaps: (3, rows, columns), of any height.
        first, second: (3, 2) landmarks of heatmaps and masks in px at 512; without the second, the
            disagreement is infinite.
        cell_px: a cell's side in px at 512.
    """
    spreads = covariances(heatmaps) * cell_px**2
    of_angle = _angle_variance(first, spreads)
    widths = np.sqrt([*np.trace(spreads, axis1=1, axis2=2), of_angle])
    apart = np.full(4, np.inf)
    if second is not None:
        apart[:3] = np.linalg.norm(first - second, axis=1)
        apart[3] = abs(_angle(first) - _angle(second))
    return np.column_stack([np.log1p(apart), np.log(np.maximum(widths, SMALLEST))])


def covariances(heatmaps: Heatmaps) -> Floats:
    """(k, rows, columns) -> (k, 2, 2) covariance in x and y of each as a distribution, cells^2.

    What is negative counts as 0; a heatmap without anything spreads evenly.
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


def _angle(points: Floats) -> float:
    """The angle of progression; 0 where two points coincide."""
    try:
        return float(angle_of_progression(points))
    except ValueError:
        return 0.0


def _angle_variance(points: Floats, spreads: Floats) -> float:
    """deg^2: to first order, the variance of the angle of points that vary independently."""
    ps1 = points[Landmark.PS1]
    arms = points[[Landmark.PS2, Landmark.FH1]] - ps1
    squared = np.maximum((arms**2).sum(axis=1, keepdims=True), 1.0)
    turned = np.column_stack([-arms[:, 1], arms[:, 0]]) / squared
    side = np.sign(arms[0, 0] * arms[1, 1] - arms[0, 1] * arms[1, 0])
    of_ps2, of_fh1 = -side * turned[0], side * turned[1]
    gradients = np.array([-of_ps2 - of_fh1, of_ps2, of_fh1])
    variance = np.einsum("ki,kij,kj->", gradients, spreads, gradients)
    return float(np.degrees(np.sqrt(max(variance, 0.0))) ** 2)
