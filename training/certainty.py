"""Is a model's stated uncertainty true and useful: the figures of one group of cases."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from model.anatomy import Floats
from training.agreement import (
    Estimate,
    area_under_risk_coverage,
    coverage_interval,
    error_when_answering,
)
from training.cases import Case

if TYPE_CHECKING:  # torch, which figures can do without
    from training.predict import CasePrediction

SUREST = 0.8  # share of the cases

LABELS = {
    "interval_holds": "90 % interval holds the label",
    "interval_width_deg": "  its width, deg",
    "aop_error_surest_deg": "AoP error of the surest 80 %",
    "aop_error_surest_less": "  below that of all by",
    "risk_coverage_deg": "area under risk-coverage",
    "risk_coverage_best_deg": "  the best possible",
    "doubtful": "doubtful, share",
}


def certainty(
    cases: Sequence[Case], predictions: "Sequence[CasePrediction]", aop_error_deg: Floats
) -> dict[str, object]:
    """Name -> {"value", "low", "high"}, in deg or shares; empty where any case has no interval.

    The area in random order is the mean AoP error. Areas and width have no interval of their own.
    """
    intervals = [found.aop_interval_deg for found in predictions]
    expected = [found.expected_aop_error_deg for found in predictions]
    if not cases or None in intervals or None in expected:
        return {}
    low, high = np.array(intervals).T
    label = np.array([case.aop_deg for case in cases])
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
