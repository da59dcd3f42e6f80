"""Which pseudo-labels to believe: sharp peaks, views that agree, a plausible anatomy.

Sharpness and agreement have a threshold each. Both come from one dial: at its step k stand the
k-th sharpest peaks and the k-th smallest spread that were measured, so that no threshold lies
beyond what cases reach. The dial is set by the accepted share, or by the precision on labelled
cases. Both count as means over the three landmarks, as the error does that they speak of: on split
val of PSFHS (140 cases, the shipped weights) the step at which a case is accepted ranks its mean
radial error better (Spearman 0.38) than sharpness (0.33) or spread (0.33) alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.anatomy import LANDMARKS, Floats, angle_of_progression, implausibilities
from model.frame import Pair
from model.heatmap import HeatmapCodec, Heatmaps
from training.evaluation.metrics import REFERENCE_PX
from training.evaluation.test_time_augmentation import ViewPrediction

PEAK_FLOOR = 0.1  # of the peak's height; lower cells are background
FEWEST = 10  # cases; a precision over fewer says nothing

Objection = tuple[str, str]  # criterion, sentence


class CriteriaError(ValueError):
    """No thresholds do what was asked; the message says what could be had."""


@dataclass(frozen=True)
class Evidence:
    """What speaks for and against one case's predicted landmarks.

    landmarks_px: (3, 2) in image px. aop_deg: NaN where two landmarks coincide. sharpness: (3,)
    mean over the views. spread_px: (3,) of the views, px at 512. faults: why it cannot be right.
    """

    landmarks_px: Floats
    aop_deg: float
    sharpness: Floats
    spread_px: Floats
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Thresholds:
    """The least mean sharpness and the largest mean spread (px at 512) to accept."""

    sharpness: float
    spread_px: float

    def objections(self, case: Evidence) -> list[Objection]:
        """Every reason not to accept a case; none: it is accepted."""
        found = [("anatomy", fault) for fault in case.faults]
        sharp, spread = case.sharpness.mean(), case.spread_px.mean()
        if sharp < self.sharpness:
            least = int(case.sharpness.argmin())
            words = f"the peaks are {sharp:.3f} as sharp as a target's, below {self.sharpness:.3f}"
            words += f" ({LANDMARKS[least]} {case.sharpness[least]:.2f})"
            found.append(("sharpness", words))
        if spread > self.spread_px:
            most = int(case.spread_px.argmax())
            words = f"the views differ by {spread:.2f} px, above {self.spread_px:.2f}"
            words += f" ({LANDMARKS[most]} {case.spread_px[most]:.1f})"
            found.append(("agreement", words))
        return found


def sharpness(heatmaps: Heatmaps, codec: HeatmapCodec) -> Floats:
    """(..., rows, columns) heatmaps -> (...) radius of a target's peak over that of theirs, 0 to 1.

    A perfect target peak has 1, wherever it lies and however high it is; one twice as wide, or two
    peaks apart, less; what is no peak 0. (The published measure, 1 - (mean of the 11x11 cells
    around the peak) / peak, is 0.425 for a perfect peak of sigma 4: out of reach of its 0.8.)

    On split val of PSFHS, with the shipped weights, its mean over the landmarks tells cases of more
    than 10 px mean error from others (area under the curve 0.71) as well as the peak's height does
    (0.70) and the published measure over a target's (0.70). But a network trained by MSE is free
    in its peaks' height, and the latter sees no second peak far away. The radius of the whole
    heatmap ranks errors hardly better (Spearman 0.37 instead of 0.34), and noise of 0.02 in its
    background takes a perfect peak from 1 to 0.14.
    """
    flat = np.asarray(heatmaps, np.float64).reshape(-1, codec.rows, codec.columns)
    values = np.zeros(len(flat))
    for k, heatmap in enumerate(flat):
        if np.isfinite(heatmap).all() and heatmap.max() > 0:
            target = codec.encode(codec.decode(heatmap)[0])
            values[k] = _radius(target) / max(_radius(heatmap), _radius(target))
    return values.reshape(heatmaps.shape[:-2])


def _radius(heatmap: Heatmaps | Floats) -> float:
    """Root mean square distance, in cells, of what rises above the background from its centre."""
    weight = np.where(heatmap > PEAK_FLOOR * heatmap.max(), heatmap, 0.0)
    weight = weight / weight.sum()
    mean_square = 0.0
    for along, share in enumerate((weight.sum(axis=1), weight.sum(axis=0))):
        cells = np.arange(heatmap.shape[along])
        mean_square += float(share @ (cells - share @ cells) ** 2)
    return math.sqrt(mean_square)


def judge(
    found: ViewPrediction, codec: HeatmapCodec, image_size: tuple[int, int], pixel_shape: Pair
) -> Evidence:
    """The evidence about a prediction on an image of (width, height) px."""
    landmarks = found.landmarks_px
    faults = (
        *implausibilities(landmarks, image_size, pixel_shape),
        *(f"{doubt} in some view" for doubt in found.doubts),
    )
    try:
        angle = float(angle_of_progression(landmarks, pixel_shape))
    except ValueError:  # two landmarks coincide, which is a fault already
        angle = math.nan
    spread = found.spread_px * REFERENCE_PX / max(image_size)
    return Evidence(landmarks, angle, sharpness(found.heatmaps, codec).mean(axis=0), spread, faults)


def by_share(cases: Sequence[Evidence], share: float) -> Thresholds:
    """The strictest thresholds that accept at least this share of the cases.

    Implausible cases are never accepted: where too few others are there, all of them are.
    """
    steps = np.sort(_steps(cases)[_plausible(cases)])
    if not len(steps):
        raise CriteriaError(f"none of the {len(cases)} images has plausible landmarks: no step")
    wanted = max(1, math.ceil(share * len(cases) - 1e-9))
    return _at_step(cases, int(steps[min(wanted, len(steps)) - 1]))


def by_precision(
    cases: Sequence[Evidence], errors_px: Floats, within_px: float, precision: float
) -> Thresholds:
    """The loosest thresholds at which this share of the accepted cases has an error within a bound.

    Args:
        errors_px: each case's mean radial error against its label.
    """
    plausible = _plausible(cases)
    steps, good = _steps(cases)[plausible], (errors_px <= within_px)[plausible]
    best = (0.0, 0)
    for step in np.unique(steps)[::-1]:
        accepted = int((steps <= step).sum())
        if accepted < FEWEST:
            break
        share = float(good[steps <= step].mean())
        if share >= precision:
            return _at_step(cases, int(step))
        best = max(best, (share, accepted))
    if not best[1]:
        raise CriteriaError(
            f"a precision needs {FEWEST} val cases with plausible landmarks, there are "
            f"{int(plausible.sum())}; give --accept instead"
        )
    raise CriteriaError(
        f"no thresholds reach a precision of {precision:g} within {within_px:g} px on val: the "
        f"best is {best[0]:.2f}, with {best[1]} of {len(cases)} cases accepted; lower --precision "
        "or raise --precision-px"
    )


def _plausible(cases: Sequence[Evidence]) -> np.ndarray:
    return np.array([not case.faults for case in cases], bool)


def _measured(cases: Sequence[Evidence]) -> tuple[Floats, Floats]:
    """(n,) mean sharpness and (n,) mean spread."""
    sharp = np.array([case.sharpness.mean() for case in cases])
    return sharp, np.array([case.spread_px.mean() for case in cases])


def _steps(cases: Sequence[Evidence]) -> np.ndarray:
    """(n,) the first step of the dial, from 1, whose thresholds accept the case."""
    sharp, spread = _measured(cases)
    # how many do better, so that equal values come in at one step
    ranks = [np.searchsorted(np.sort(values), values) for values in (-sharp, spread)]
    return np.maximum(*ranks) + 1


def _at_step(cases: Sequence[Evidence], step: int) -> Thresholds:
    sharp, spread = _measured(cases)
    return Thresholds(float(np.sort(sharp)[::-1][step - 1]), float(np.sort(spread)[step - 1]))
