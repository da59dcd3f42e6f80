"""Agreement of two readers, and the value of stated uncertainty: plain functions of numbers.

All intervals are 95 % intervals. They treat the cases as independent.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from model.anatomy import Floats

CONFIDENCE_LEVEL = 0.95
TAIL = (1 - CONFIDENCE_LEVEL) / 2  # probability beyond either end of an interval
LIMITS_SD = 1.96  # a normal distribution has 95 % within this many standard deviations
RESAMPLES = 2000  # of the cases, for a bootstrap interval


class Estimate(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class BlandAltman:
    """Bias (mean difference), standard deviation, and lower and upper limit of agreement.

    All but `cases` are in the unit of the differences.
    """

    cases: int
    bias: Estimate
    deviation: float
    lower: Estimate
    upper: Estimate


class RiskCoverageAreas(NamedTuple):
    """Areas under risk-coverage curves: in the order of risk, the best order, a random order."""

    own: float
    best: float
    random: float


def icc_2_1(ratings: npt.ArrayLike) -> Estimate:
    """ICC(2,1): intraclass correlation, two-way random effects, absolute agreement, one reading.

    Source: Shrout & Fleiss, Psychol Bull 1979; 86: 420-428. The interval is that of ICC(A,1) in
    McGraw & Wong, Psychol Methods 1996; 1: 30-46, table 7.

    Args:
        ratings: (cases, readers), at least two of each, finite.

    Raises:
        ValueError: the shape differs, a reading is not finite, or the cases do not differ.
    """
    table = np.asarray(ratings, np.float64)
    if table.ndim != 2 or min(table.shape) < 2 or not np.isfinite(table).all():
        raise ValueError(
            "expected finite readings of two or more cases by two or more readers, "
            f"got an array of shape {table.shape}"
        )
    n, k = table.shape
    cases = table.mean(axis=1, keepdims=True) - table.mean()
    readers = table.mean(axis=0, keepdims=True) - table.mean()
    residual = table - table.mean() - cases - readers
    ms_cases = k * float((cases**2).sum()) / (n - 1)  # ms: mean square
    ms_readers = n * float((readers**2).sum()) / (k - 1)
    ms_residual = float((residual**2).sum()) / ((n - 1) * (k - 1))
    if ms_cases <= 1e-12 * float((table**2).sum()):
        raise ValueError(
            "expected cases that differ, got the same mean for all: agreement has no scale to be "
            "measured on"
        )
    total = ms_cases + (k - 1) * ms_residual + k * (ms_readers - ms_residual) / n
    value = (ms_cases - ms_residual) / total
    if value > 1 - 1e-12:
        return Estimate(1.0, 1.0, 1.0)

    # a, b and the degrees of freedom as in McGraw & Wong's table 7
    a = k * value / (n * (1 - value))
    b = 1 + a * (n - 1)
    weights = (a * ms_readers) ** 2 / (k - 1) + (b * ms_residual) ** 2 / ((n - 1) * (k - 1))
    freedom = (a * ms_readers + b * ms_residual) ** 2 / weights
    both = k * ms_readers + (k * n - k - n) * ms_residual
    low, high = (
        n * (f * ms_cases - ms_residual) / (both + n * f * ms_cases)
        for f in special.fdtri(freedom, n - 1, (TAIL, 1 - TAIL))
    )
    return Estimate(value, float(low), float(high))


def bland_altman(difference: npt.ArrayLike) -> BlandAltman:
    """Bias and limits of agreement (bias +- 1.96 standard deviations) of paired differences.

    Source: Bland & Altman, Lancet 1986; 1: 307-310. The intervals of the limits are those of Stat
    Methods Med Res 1999; 8: 135-160, section 2.2.

    Args:
        difference: (n,) one reader minus the other, n >= 2, finite, in any unit.

    Raises:
        ValueError: there are fewer than two differences, or one is not finite.
    """
    values = _finite_row(difference, 2)
    n, bias, deviation = len(values), float(values.mean()), float(values.std(ddof=1))
    t = float(special.stdtrit(n - 1, 1 - TAIL))  # quantile of Student's distribution
    bias_margin = t * deviation / math.sqrt(n)
    limit_margin = t * deviation * math.sqrt(1 / n + LIMITS_SD**2 / (2 * (n - 1)))
    lower, upper = bias - LIMITS_SD * deviation, bias + LIMITS_SD * deviation
    return BlandAltman(
        n,
        Estimate(bias, bias - bias_margin, bias + bias_margin),
        deviation,
        Estimate(lower, lower - limit_margin, lower + limit_margin),
        Estimate(upper, upper - limit_margin, upper + limit_margin),
    )


def risk_coverage(error: npt.ArrayLike, risk: npt.ArrayLike) -> tuple[Floats, Floats]:
    """(n,) shares of cases answered, 1/n to 1, and (n,) mean errors of the answered cases.

    The cases of least risk are answered first. Among cases of equal risk the curve is the mean over
    all orders.

    Args:
        error: (n,) finite, in any unit.
        risk: (n,) finite, of any scale.

    Raises:
        ValueError: there is no case, or a number is not finite.
    """
    errors, risks = _finite_row(error, 1), _finite_row(risk, 1)
    _, tie, size = np.unique(risks, return_inverse=True, return_counts=True)
    in_order = np.repeat(np.bincount(tie, errors) / size, size)
    answered = np.arange(1, len(errors) + 1)
    return answered / len(errors), np.cumsum(in_order) / answered


def area_under_risk_coverage(error: npt.ArrayLike, risk: npt.ArrayLike) -> RiskCoverageAreas:
    """Mean of the risk-coverage curve over all shares (Geifman et al., ICLR 2019).

    Arguments and errors are those of `risk_coverage`. In a random order the expected error is the
    mean of all cases, whatever the share.
    """
    own, best = (float(risk_coverage(error, by)[1].mean()) for by in (risk, error))
    return RiskCoverageAreas(own, best, float(np.asarray(error, np.float64).mean()))


def error_when_answering(
    error: npt.ArrayLike, risk: npt.ArrayLike, share: float, seed: int = 0
) -> tuple[Estimate, Estimate]:
    """Mean error if only the surest cases are answered, and its reduction against all cases.

    The reduction is a fraction of the mean error of all cases. Both intervals come from a bootstrap
    over cases (percentile method).

    Args:
        error, risk: as in `risk_coverage`.
        share: of the cases, above 0 and at most 1; the cases of least risk.
        seed: of the bootstrap.
    """
    errors, risks = _finite_row(error, 1), _finite_row(risk, 1)
    last = math.ceil(share * len(errors) - 1e-9) - 1  # 1e-9 for rounding: 0.07 * 100 > 7

    def measure(chosen: npt.NDArray[np.int_] | slice) -> tuple[float, float]:
        curve = risk_coverage(errors[chosen], risks[chosen])[1]
        return float(curve[last]), float(1 - curve[last] / curve[-1]) if curve[-1] else 0.0

    rng = np.random.default_rng(seed)
    drawn = [measure(rng.integers(0, len(errors), len(errors))) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [TAIL, 1 - TAIL], axis=0)
    mean, reduction = (
        Estimate(value, float(a), float(b))
        for value, a, b in zip(measure(slice(None)), low, high, strict=True)
    )
    return mean, reduction


def coverage_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (0 to 1) from `hits` in `n` cases.

    Source: Clopper & Pearson, Biometrika 1934; 26: 404-413.

    Raises:
        ValueError: there is no case, or `hits` is not within 0 to n.
    """
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"expected 0 to n hits in n >= 1 cases, got {hits} hits in {n} cases")
    low = special.betaincinv(hits, n - hits + 1, TAIL) if hits else 0.0
    high = special.betaincinv(hits + 1, n - hits, 1 - TAIL) if hits < n else 1.0
    return float(low), float(high)


def _finite_row(values: npt.ArrayLike, least: int) -> Floats:
    """The values as a row; ValueError unless `least` or more came and all are finite."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) < least or not np.isfinite(array).all():
        raise ValueError(
            f"expected a row of {least} or more finite numbers, got an array of shape {array.shape}"
        )
    return array
