"""Errors of the landmarks and the angle of progression (AoP), and tests of stated uncertainty.

All errors in px are at 512 px.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from model import uncertainty
from model.anatomy import LANDMARKS, Floats
from model.frame import Pair
from training.data.case_table import Case
from training.evaluation.statistics import (
    RESAMPLES,
    Estimate,
    area_under_risk_coverage,
    coverage_interval,
    error_when_answering,
)

if TYPE_CHECKING:  # imports torch, which an evaluation container does not have
    from training.evaluation.predict import CasePrediction

# Name of a metric -> {"value", "low", "high"}; and "cases" -> the number of cases.
Summary = dict[str, Any]

REFERENCE_PX = uncertainty.REFERENCE_PX  # errors are scaled to this longer side, 512 px
SDR_PX = (4, 8, 16, 24)  # success detection rates: share of landmarks within each
RESAMPLES_PER_BLOCK = 50  # at a time, so that many cases fit in memory
SUREST_SHARE = 0.8  # of the cases, those with the smallest expected error
WORST_AOP_ERROR_DEG = 180.0  # counts where no angle is given or defined

# Metric -> how a table for a terminal calls it.
CERTAINTY_LABELS = {
    "interval_holds": "90 % interval holds the label",
    "interval_width_deg": "  its width, deg",
    "aop_error_surest_deg": "AoP error, surest 80 %, deg",
    "aop_error_surest_less": "  below that of all, share",
    "risk_coverage_deg": "area, risk-coverage, deg",
    "risk_coverage_best_deg": "  the best possible, deg",
    "doubtful": "doubtful, share",
}
METRIC_LABELS = {
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
    """(n, 3) distances in px at 512 between (n, 3, 2) landmarks; (n,) longer sides in image px."""
    difference = np.asarray(predicted, np.float64) - np.asarray(truth, np.float64)
    scale = REFERENCE_PX / np.asarray(longer_side_px, np.float64)
    return np.asarray(np.linalg.norm(difference, axis=-1) * scale[:, None])


def mean_errors(predictions: "Sequence[CasePrediction]", cases: Sequence[Case]) -> Pair:
    """(MRE in px at 512, mean AoP error in deg), from `case_errors`."""
    radial, aop = case_errors(predictions, cases)
    return float(radial.mean()), float(aop.mean())


def case_errors(
    predictions: "Sequence[CasePrediction]", cases: Sequence[Case]
) -> tuple[Floats, Floats]:
    """(n, 3) radial errors in px at 512 and (n,) AoP errors in deg; 180 if no angle is defined."""
    radial = radial_errors_px(
        [prediction.landmarks_px for prediction in predictions],
        [case.landmarks_px for case in cases],
        [prediction.longer_side_px for prediction in predictions],
    )
    pairs = zip(predictions, cases, strict=True)
    aop = np.array([abs(prediction.aop_deg - case.aop_deg) for prediction, case in pairs])
    return radial, np.nan_to_num(aop, nan=WORST_AOP_ERROR_DEG)


def summarise(radial_px: Floats, aop_error_deg: Floats, seed: int = 0) -> Summary:
    """The error metrics of one group of cases.

    Args:
        radial_px: (n, 3) radial errors at 512 px.
        aop_error_deg: (n,) absolute angle errors.

    Returns:
        Each metric with its 95 % bootstrap interval over cases (percentile method, 2,000
        resamples), and "cases": n.
    """
    # Each function maps (..., n, 3) radial errors and (..., n) angle errors to (...).
    metrics: dict[str, Callable[[Floats, Floats], Floats]] = {
        "mre_px": lambda r, a: r.mean(axis=(-2, -1)),
        "median_re_px": lambda r, a: np.median(r, axis=(-2, -1)),
        "aop_error_deg": lambda r, a: a.mean(axis=-1),
        "aop_error_median_deg": lambda r, a: np.median(a, axis=-1),
        "aop_error_p95_deg": lambda r, a: np.percentile(a, 95, axis=-1),
    }
    for k, name in enumerate(LANDMARKS):
        metrics[f"mre_{name}_px"] = partial(_mean_of_landmark, k)
    for limit in SDR_PX:
        metrics[f"sdr_{limit}px"] = partial(_share_within, limit)
    cases = len(radial_px)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[Floats]] = {name: [] for name in metrics}
    for _ in range(RESAMPLES // RESAMPLES_PER_BLOCK):
        draws = rng.integers(0, cases, (RESAMPLES_PER_BLOCK, cases))
        radial, aop = radial_px[draws], aop_error_deg[draws]
        for name, metric in metrics.items():
            drawn[name].append(metric(radial, aop))
    result: Summary = {"cases": cases}
    for name, metric in metrics.items():
        low, high = np.percentile(np.concatenate(drawn[name]), [2.5, 97.5])
        value = float(metric(radial_px, aop_error_deg))
        result[name] = {"value": value, "low": float(low), "high": float(high)}
    return result


def _mean_of_landmark(k: int, radial_px: Floats, _aop_error_deg: Floats) -> Floats:
    return np.asarray(radial_px[..., k].mean(axis=-1))


def _share_within(limit_px: float, radial_px: Floats, _aop_error_deg: Floats) -> Floats:
    return np.asarray((radial_px <= limit_px).mean(axis=(-2, -1)))


def summarise_certainty(
    cases: Sequence[Case], predictions: "Sequence[CasePrediction]", aop_error_deg: Floats
) -> Summary:
    """Metrics that tell whether a model's stated uncertainty is true and useful.

    Values are in deg, or shares of the cases. Interval coverage and width use only the cases that
    have an interval. A ranking in random order would have the mean AoP error as its area under the
    risk-coverage curve. Areas and width have no confidence interval: "low" and "high" repeat the
    value. Empty for a model without calibration.
    """
    expected = [prediction.expected_aop_error_deg for prediction in predictions]
    pairs = zip(predictions, cases, strict=True)
    intervals = [
        (*prediction.aop_interval_deg, case.aop_deg)
        for prediction, case in pairs
        if prediction.aop_interval_deg is not None
    ]
    if not intervals or None in expected:
        return {}
    low, high, label = np.array(intervals).T
    risk = np.array(expected, np.float64)
    surest, less = error_when_answering(aop_error_deg, risk, SUREST_SHARE)
    areas = area_under_risk_coverage(aop_error_deg, risk)
    width = float((high - low).mean())
    metrics = {
        "interval_holds": _share_with_interval((low <= label) & (label <= high)),
        "interval_width_deg": Estimate(width, width, width),
        "aop_error_surest_deg": surest,
        "aop_error_surest_less": less,
        "risk_coverage_deg": Estimate(areas.own, areas.own, areas.own),
        "risk_coverage_best_deg": Estimate(areas.best, areas.best, areas.best),
        "doubtful": _share_with_interval(
            np.array([bool(prediction.reasons) for prediction in predictions])
        ),
    }
    return {name: estimate._asdict() for name, estimate in metrics.items()}


def _share_with_interval(hits: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> Estimate:
    return Estimate(float(hits.mean()), *coverage_interval(int(hits.sum()), len(hits)))


def summarise_by_device(
    cases: Sequence[Case], predictions: "Sequence[CasePrediction]"
) -> dict[str, Summary]:
    """The metrics of "all" cases, and of each "device ..." if there are several."""
    radial, aop = case_errors(predictions, cases)
    groups = {"all": list(range(len(cases)))}
    devices = sorted({case.device for case in cases if case.device})
    for device in devices if len(devices) > 1 else []:
        groups[f"device {device}"] = [k for k, case in enumerate(cases) if case.device == device]
    return {
        name: summarise(radial[chosen], aop[chosen])
        | summarise_certainty(
            [cases[k] for k in chosen], [predictions[k] for k in chosen], aop[chosen]
        )
        for name, chosen in groups.items()
    }


def format_metrics(groups: Mapping[str, Summary], missing: Sequence[str], fate: str) -> str:
    """A table for a terminal: a row for each metric, a column for each group.

    Args:
        missing: names of the cases without an answer.
        fate: what happens to these cases, to complete the sentence "3 cases ...".
    """
    width = max(map(len, METRIC_LABELS.values())) + 2
    heads = [f"{name} (n={metrics['cases']})" for name, metrics in groups.items()]
    lines = [
        "errors at 512 px, with 95 % intervals",
        " " * width + "".join(f"{head:>26}" for head in heads),
    ]
    for key, label in METRIC_LABELS.items():
        if key not in groups["all"]:  # a model without calibration states no uncertainty
            continue
        cells = []
        for metrics in groups.values():
            metric = metrics[key]
            cells.append(f"{metric['value']:.2f} ({metric['low']:.2f} to {metric['high']:.2f})")
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>26}" for cell in cells))
    if missing:
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        lines.append(f"{len(missing)} cases {fate}: {names}")
    return "\n".join(lines)
