"""Agreement of two readers, and whether stated uncertainty is true: plain functions of numbers.

All intervals are 95 % intervals. They treat the cases as independent.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from model.anatomy import Floats

LEVEL = 0.95  # of every interval
TAIL = (1 - LEVEL) / 2  # probability beyond either end of an interval
LIMITS = 1.96  # standard deviations on either side that hold 95 % of a normal distribution
BOOTSTRAPS = 2000


class Estimate(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class BlandAltman:
    """Bias (mean difference), standard deviation and limits of agreement, in the input's unit."""

    cases: int
    bias: Estimate
    deviation: float
    lower: Estimate
    upper: Estimate


class Areas(NamedTuple):
    """Area under the risk-coverage curve: in the stated order, the best order, a random order."""

    own: float
    best: float
    random: float


def icc_2_1(ratings: npt.ArrayLike) -> Estimate:
    """ICC(2,1): two-way random effects, absolute agreement, single reading.

    Source: Shrout & Fleiss, Psychol Bull 1979; 86: 420-428. The interval is that of ICC(A,1) in
    McGraw & Wong, Psychol Methods 1996; 1: 30-46, table 7.

    Args:
        ratings: (cases, readers), at least two of each, finite.

    Raises:
        ValueError: another shape, a reading that is not finite, or cases that do not differ.
    """
    table = np.asarray(ratings, np.float64)
    if table.ndim != 2 or min(table.shape) < 2 or not np.isfinite(table).all():
        raise ValueError(
            f"expected finite readings of two or more cases by two or more readers, "
            f"got an array of shape {table.shape}"
        )
    n, k = table.shape
    cases = table.mean(axis=1, keepdims=True) - table.mean()
    readers = table.mean(axis=0, keepdims=True) - table.mean()
    rest = table - table.mean() - cases - readers
    of_cases = k * float((cases**2).sum()) / (n - 1)  # mean squares
    of_readers = n * float((readers**2).sum()) / (k - 1)
    of_rest = float((rest**2).sum()) / ((n - 1) * (k - 1))
    if of_cases <= 1e-12 * float((table**2).sum()):
        raise ValueError("the cases have one mean: agreement has no scale to be measured on")
    value = (of_cases - of_rest) / (of_cases + (k - 1) * of_rest + k * (of_readers - of_rest) / n)
    if value > 1 - 1e-12:
        return Estimate(1.0, 1.0, 1.0)

    a = k * value / (n * (1 - value))
    b = 1 + a * (n - 1)
    weights = (a * of_readers) ** 2 / (k - 1) + (b * of_rest) ** 2 / ((n - 1) * (k - 1))
    freedom = (a * of_readers + b * of_rest) ** 2 / weights
    both = k * of_readers + (k * n - k - n) * of_rest
    low, high = (
        n * (f * of_cases - of_rest) / (both + n * f * of_cases)
        for f in special.fdtri(freedom, n - 1, (TAIL, 1 - TAIL))
    )
    return Estimate(value, float(low), float(high))


def bland_altman(difference: npt.ArrayLike) -> BlandAltman:
    """Bias and limits of agreement (bias +- 1.96 standard deviations) of paired differences.

    Source: Bland & Altman, Lancet 1986; 1: 307-310. The intervals of the limits are those of Stat
    Methods Med Res 1999; 8: 135-160, section 2.2.

    Args:
        difference: (n,) one reader minus the other, n >= 2, finite.

    Raises:
        ValueError: fewer than two differences, or one that is not finite.
    """
    values = _finite(difference, 2)
    n, bias, deviation = len(values), float(values.mean()), float(values.std(ddof=1))
    t = float(special.stdtrit(n - 1, 1 - TAIL))  # quantile of Student's distribution
    reach = t * deviation / math.sqrt(n)
    far = t * deviation * math.sqrt(1 / n + LIMITS**2 / (2 * (n - 1)))
    lower, upper = bias - LIMITS * deviation, bias + LIMITS * deviation
    return BlandAltman(
        n,
        Estimate(bias, bias - reach, bias + reach),
        deviation,
        Estimate(lower, lower - far, lower + far),
        Estimate(upper, upper - far, upper + far),
    )


def risk_coverage(error: npt.ArrayLike, risk: npt.ArrayLike) -> tuple[Floats, Floats]:
    """(n,) shares of cases answered, 1/n to 1, and (n,) the mean error of the answered cases.

    The cases with the least risk are answered first. Cases of equal risk count as answered in any
    order: the curve is the mean over all orders.

    Args:
        error: (n,) finite. risk: (n,) finite; the riskiest cases are left out first.
    """
    errors, risks = _finite(error, 1), _finite(risk, 1)
    _, tie, size = np.unique(risks, return_inverse=True, return_counts=True)
    in_order = np.repeat(np.bincount(tie, errors) / size, size)
    answered = np.arange(1, len(errors) + 1)
    return answered / len(errors), np.cumsum(in_order) / answered


def area_under_risk_coverage(error: npt.ArrayLike, risk: npt.ArrayLike) -> Areas:
    """Mean of the risk-coverage curve over all shares (Geifman et al., ICLR 2019).

    In a random order the expected error is the mean of all cases, whatever the share.
    """
    own, best = (float(risk_coverage(error, by)[1].mean()) for by in (risk, error))
    return Areas(own, best, float(np.asarray(error, np.float64).mean()))


def error_when_answering(
    error: npt.ArrayLike, risk: npt.ArrayLike, share: float, seed: int = 0
) -> tuple[Estimate, Estimate]:
    """Mean error of the surest share (0 to 1) of cases, and its reduction against all cases.

    The reduction is a fraction of the mean error of all cases. Intervals: bootstrap over cases
    (percentile method).
    """
    errors, risks = _finite(error, 1), _finite(risk, 1)
    last = math.ceil(share * len(errors) - 1e-9) - 1

    def measure(chosen: npt.NDArray[np.int_] | slice) -> tuple[float, float]:
        curve = risk_coverage(errors[chosen], risks[chosen])[1]
        return float(curve[last]), float(1 - curve[last] / curve[-1]) if curve[-1] else 0.0

    rng = np.random.default_rng(seed)
    drawn = [measure(rng.integers(0, len(errors), len(errors))) for _ in range(BOOTSTRAPS)]
    low, high = np.quantile(drawn, [TAIL, 1 - TAIL], axis=0)
    mean, reduction = (
        Estimate(value, float(a), float(b))
        for value, a, b in zip(measure(slice(None)), low, high, strict=True)
    )
    return mean, reduction


def coverage_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (0 to 1), given `hits` in `n` cases (Clopper & Pearson, 1934)."""
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"expected 0 to n hits in n cases, got {hits} in {n}")
    low = special.betaincinv(hits, n - hits + 1, TAIL) if hits else 0.0
    high = special.betaincinv(hits + 1, n - hits, 1 - TAIL) if hits < n else 1.0
    return float(low), float(high)


def _finite(values: npt.ArrayLike, least: int) -> Floats:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) < least or not np.isfinite(array).all():
        raise ValueError(
            f"expected a row of {least} or more finite numbers, got an array of shape {array.shape}"
        )
    return array
