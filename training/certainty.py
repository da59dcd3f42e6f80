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
    "aop_error_surest_deg": "AoP error, surest 80 %, deg",
    "aop_error_surest_less": "  below that of all, share",
    "risk_coverage_deg": "area, risk-coverage, deg",
    "risk_coverage_best_deg": "  the best possible, deg",
    "doubtful": "doubtful, share",
}


def certainty(
    cases: Sequence[Case], predictions: "Sequence[CasePrediction]", aop_error_deg: Floats
) -> dict[str, object]:
    """Name -> {"value", "low", "high"}, in deg or shares; empty where the model is not calibrated.

    Coverage and width are of the cases that have an interval. The area in random order is the mean
    AoP error. Areas and width have no interval of their own.
    """
    expected = [found.expected_aop_error_deg for found in predictions]
    pairs = zip(predictions, cases, strict=True)
    given = [(*found.aop_interval_deg, case.aop_deg) for found, case in pairs
             if found.aop_interval_deg is not None]  # fmt: skip
    if not given or None in expected:
        return {}
    low, high, label = np.array(given).T
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
