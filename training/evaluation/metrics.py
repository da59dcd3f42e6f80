"""Errors of landmarks and of the angle of progression, and whether stated uncertainty is true."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from model.anatomy import LANDMARKS, Floats
from model.frame import Pair
from training.data.case_table import Case
from training.evaluation.statistics import (
    Estimate,
    area_under_risk_coverage,
    coverage_interval,
    error_when_answering,
)

if TYPE_CHECKING:  # torch, which an evaluation container does without
    from training.evaluation.predict import CasePrediction

# Name of a figure -> {"value", "low", "high"}; and "cases": of how many.
Summary = dict[str, Any]

REFERENCE_PX = 512  # errors are quoted as on an image of this longer side
SDR_PX = (4, 8, 16, 24)
BOOTSTRAPS, BLOCK = 2000, 50
SUREST = 0.8  # share of the cases
CERTAINTY_LABELS = {
    "interval_holds": "90 % interval holds the label",
    "interval_width_deg": "  its width, deg",
    "aop_error_surest_deg": "AoP error, surest 80 %, deg",
    "aop_error_surest_less": "  below that of all, share",
    "risk_coverage_deg": "area, risk-coverage, deg",
    "risk_coverage_best_deg": "  the best possible, deg",
    "doubtful": "doubtful, share",
}
LABELS = {
    "mre_px": "mean radial error, px",
    "median_re_px": "median radial error, px",
    "mre_PS1_px": "  PS1, px",
    "mre_PS2_px": "  PS2, px",
    "mre_FH1_px": "  FH1, px",
    "sdr_4px": "within 4 px",
    "sdr_8px": "within 8 px",
    "sdr_16px": "within 16 px",
    "sdr_24px": "within 24 px",
    "aop_error_deg": "AoP error, deg",
    "aop_error_median_deg": "  median, deg",
    "aop_error_p95_deg": "  95th percentile, deg",
    **CERTAINTY_LABELS,
}


def radial_errors_px(
    predicted: npt.ArrayLike, truth: npt.ArrayLike, longer_side_px: npt.ArrayLike
) -> Floats:
    """(n, 3) distances at 512 px of (n, 3, 2) landmarks on images with (n,) longer sides."""
    difference = np.asarray(predicted, np.float64) - np.asarray(truth, np.float64)
    scale = REFERENCE_PX / np.asarray(longer_side_px, np.float64)
    return np.asarray(np.linalg.norm(difference, axis=-1) * scale[:, None])


def mean_errors(predictions: "Sequence[CasePrediction]", cases: Sequence[Case]) -> Pair:
    """(MRE in px at 512, AoP error in deg); an angle that is not defined counts as 180 deg off."""
    radial, aop = case_errors(predictions, cases)
    return float(radial.mean()), float(aop.mean())


def case_errors(
    predictions: "Sequence[CasePrediction]", cases: Sequence[Case]
) -> tuple[Floats, Floats]:
    """(n, 3) radial errors in px at 512 and (n,) AoP errors in deg of predictions for cases."""
    radial = radial_errors_px(
        [found.landmarks_px for found in predictions],
        [case.landmarks_px for case in cases],
        [found.longer_side_px for found in predictions],
    )
    pairs = zip(predictions, cases, strict=True)
    aop = np.array([abs(found.aop_deg - case.aop_deg) for found, case in pairs])
    return radial, np.nan_to_num(aop, nan=180.0)


def summarise(radial_px: Floats, aop_error_deg: Floats, seed: int = 0) -> Summary:
    """The figures of one group of cases.

    Args:
        radial_px: (n, 3) radial errors at 512 px.
        aop_error_deg: (n,) absolute angle errors.

    Returns:
        Each figure with its 95 % bootstrap interval over cases (percentile method, 2,000
        resamples), and "cases": n.
    """
    # each maps (..., n, 3) radial errors and (..., n) angle errors to (...)
    figures: dict[str, Callable[[Floats, Floats], Floats]] = {
        "mre_px": lambda r, a: r.mean(axis=(-2, -1)),
        "median_re_px": lambda r, a: np.median(r, axis=(-2, -1)),
        "aop_error_deg": lambda r, a: a.mean(axis=-1),
        "aop_error_median_deg": lambda r, a: np.median(a, axis=-1),
        "aop_error_p95_deg": lambda r, a: np.percentile(a, 95, axis=-1),
    }
    for k, name in enumerate(LANDMARKS):
        figures[f"mre_{name}_px"] = partial(_mean_of_landmark, k)
    for limit in SDR_PX:
        figures[f"sdr_{limit}px"] = partial(_share_within, limit)
    cases = len(radial_px)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[Floats]] = {name: [] for name in figures}
    for _ in range(BOOTSTRAPS // BLOCK):  # in blocks, so that many cases fit in memory
        draws = rng.integers(0, cases, (BLOCK, cases))
        radial, aop = radial_px[draws], aop_error_deg[draws]
        for name, figure in figures.items():
            drawn[name].append(figure(radial, aop))
    result: Summary = {"cases": cases}
    for name, figure in figures.items():
        low, high = np.percentile(np.concatenate(drawn[name]), [2.5, 97.5])
        value = float(figure(radial_px, aop_error_deg))
        result[name] = {"value": value, "low": float(low), "high": float(high)}
    return result


def _mean_of_landmark(k: int, radial_px: Floats, _aop_error_deg: Floats) -> Floats:
    return np.asarray(radial_px[..., k].mean(axis=-1))


def _share_within(limit_px: float, radial_px: Floats, _aop_error_deg: Floats) -> Floats:
    return np.asarray((radial_px <= limit_px).mean(axis=(-2, -1)))


def certainty(
    cases: Sequence[Case], predictions: "Sequence[CasePrediction]", aop_error_deg: Floats
) -> Summary:
    """Is a model's stated uncertainty true and useful? Empty for a model that is not calibrated.

    Values are in deg or shares. Coverage and width are of the cases that have an interval. The area
    in random order is the mean AoP error. Areas and width have no interval of their own.
    """
    expected = [found.expected_aop_error_deg for found in predictions]
    pairs = zip(predictions, cases, strict=True)
    intervals = [
        (*found.aop_interval_deg, case.aop_deg)
        for found, case in pairs
        if found.aop_interval_deg is not None
    ]
    if not intervals or None in expected:
        return {}
    low, high, label = np.array(intervals).T
    risk = np.array(expected, np.float64)
    surest, less = error_when_answering(aop_error_deg, risk, SUREST)
    areas = area_under_risk_coverage(aop_error_deg, risk)
    width = float((high - low).mean())
    found = {
        "interval_holds": _share((low <= label) & (label <= high)),
        "interval_width_deg": Estimate(width, width, width),
        "aop_error_surest_deg": surest,
        "aop_error_surest_less": less,
        "risk_coverage_deg": Estimate(areas.own, areas.own, areas.own),
        "risk_coverage_best_deg": Estimate(areas.best, areas.best, areas.best),
        "doubtful": _share(np.array([bool(one.reasons) for one in predictions])),
    }
    return {name: value._asdict() for name, value in found.items()}


def _share(hits: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> Estimate:
    return Estimate(float(hits.mean()), *coverage_interval(int(hits.sum()), len(hits)))


def evaluate(cases: Sequence[Case], predictions: "Sequence[CasePrediction]") -> dict[str, Summary]:
    """The figures of all cases, and of each device if there are several."""
    radial, aop = case_errors(predictions, cases)
    groups = {"all": list(range(len(cases)))}
    devices = sorted({case.device for case in cases if case.device})
    for device in devices if len(devices) > 1 else []:
        groups[f"device {device}"] = [k for k, one in enumerate(cases) if one.device == device]
    return {
        name: summarise(radial[chosen], aop[chosen])
        | certainty([cases[k] for k in chosen], [predictions[k] for k in chosen], aop[chosen])
        for name, chosen in groups.items()
    }


def as_text(groups: Mapping[str, Summary], missing: Sequence[str], fate: str) -> str:
    """The figures of each group as a table for a terminal.

    Args:
        missing: cases without an answer. fate: what becomes of them, in words.
    """
    width = max(map(len, LABELS.values())) + 2
    heads = [f"{name} (n={figures['cases']})" for name, figures in groups.items()]
    lines = [
        "errors at 512 px, with 95 % intervals",
        " " * width + "".join(f"{h:>26}" for h in heads),
    ]
    for key, label in LABELS.items():
        cells = []
        if key not in groups["all"]:  # of a model that is not calibrated
            continue
        for figures in groups.values():
            figure = figures[key]
            cells.append(f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})")
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>26}" for cell in cells))
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        lines.append(f"{len(missing)} cases {fate}: {shown}")
    return "\n".join(lines)
