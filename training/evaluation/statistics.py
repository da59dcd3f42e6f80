"""How well two readers agree, and whether a stated doubt is true: plain functions of numbers.

Intervals are of 95 %, and take the cases as independent of each other.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.anatomy import Floats

LEVEL = 0.95  # of every interval
LIMITS = 1.96  # standard deviations on either side that hold 95 % of a normal distribution
BOOTSTRAPS = 2000


class Estimate(NamedTuple):
    """A figure and its 95 % interval."""

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
    """Area under the risk-coverage curve in the stated order, the best possible, and at random."""

    own: float
    best: float
    random: float


def icc_2_1(ratings: npt.ArrayLike) -> Estimate:
    """ICC(2,1): two-way random effects, absolute agreement, of a single reading.

    Shrout & Fleiss, Psychol Bull 1979; 86: 420-428. The interval is that of ICC(A,1) in McGraw &
    Wong, Psychol Methods 1996; 1: 30-46, table 7.

    Args:
        ratings: (cases, readers), two or more of each, finite.

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
    tail = (1 + LEVEL) / 2
    f = f_quantile(tail, n - 1, freedom)
    low = n * (of_cases - f * of_rest) / (f * both + n * of_cases)
    f = f_quantile(tail, freedom, n - 1)
    high = n * (f * of_cases - of_rest) / (both + n * f * of_cases)
    return Estimate(value, low, high)


def bland_altman(difference: npt.ArrayLike) -> BlandAltman:
    """Bias and limits of agreement (bias -+ 1.96 standard deviations) of paired differences.

    Bland & Altman, Lancet 1986; 1: 307-310; the limits' intervals as in Stat Methods Med Res 1999;
    8: 135-160, section 2.2.

    Args:
        difference: (n,) one reader minus the other, two or more, finite.
    """
    values = _finite(difference, 2)
    n, bias, deviation = len(values), float(values.mean()), float(values.std(ddof=1))
    t = math.sqrt(f_quantile(LEVEL, 1, n - 1))  # Student's, two-sided
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
    """(n,) shares of the cases that are answered, 1/n to 1, and (n,) the mean error of those.

    The cases of least risk are answered first; among equal risks every order is as likely, and the
    mean over all of them is given.

    Args:
        error: (n,) what is to be small. risk: (n,) the doubt by which cases are left out.
    """
    errors, risks = _finite(error, 1), _finite(risk, 1)
    _, tie, size = np.unique(risks, return_inverse=True, return_counts=True)
    in_order = np.repeat(np.bincount(tie, errors) / size, size)
    answered = np.arange(1, len(errors) + 1)
    return answered / len(errors), np.cumsum(in_order) / answered


def area_under_risk_coverage(error: npt.ArrayLike, risk: npt.ArrayLike) -> Areas:
    """Mean over all shares answered of the mean error of those answered (Geifman et al., 2019).

    In random order the error to expect is the mean of all, whatever the share.
    """
    own, best = (float(risk_coverage(error, by)[1].mean()) for by in (risk, error))
    return Areas(own, best, float(np.mean(error)))


def error_when_answering(
    error: npt.ArrayLike, risk: npt.ArrayLike, share: float, seed: int = 0
) -> tuple[Estimate, Estimate]:
    """Mean error of the surest share of cases, and by what part it is below that of all.

    Bootstrap intervals over cases (percentile method).
    """
    errors, risks = _finite(error, 1), _finite(risk, 1)
    last = math.ceil(share * len(errors) - 1e-9) - 1

    def figures(chosen: npt.NDArray[np.int_] | slice) -> tuple[float, float]:
        curve = risk_coverage(errors[chosen], risks[chosen])[1]
        return float(curve[last]), float(1 - curve[last] / curve[-1]) if curve[-1] else 0.0

    rng = np.random.default_rng(seed)
    drawn = [figures(rng.integers(0, len(errors), len(errors))) for _ in range(BOOTSTRAPS)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    mean, part = (
        Estimate(value, float(a), float(b))
        for value, a, b in zip(figures(slice(None)), low, high, strict=True)
    )
    return mean, part


def coverage_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of which `hits` in `n` were seen (Clopper & Pearson, 1934)."""
    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"expected 0 to n hits in n cases, got {hits} in {n}")
    tail = (1 - LEVEL) / 2
    low = beta_quantile(tail, hits, n - hits + 1) if hits else 0.0
    high = beta_quantile(1 - tail, hits + 1, n - hits) if hits < n else 1.0
    return low, high


def f_quantile(share: float, above: float, below: float) -> float:
    """Value that an F variable with these degrees of freedom stays below with a probability."""
    x = beta_quantile(1 - share, below / 2, above / 2)  # of 1 / F: exact where F is large
    return below * (1 - x) / (above * x)


def beta_quantile(share: float, a: float, b: float) -> float:
    """Value that a beta variable stays below with a probability, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = beta_share(middle, a, b) < share
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


def beta_share(x: float, a: float, b: float) -> float:
    """Probability that a beta variable stays below x: the regularised incomplete beta function.

    The continued fraction 8.17.22 of dlmf.nist.gov, from its end.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction converges slowly
        return 1 - beta_share(1 - x, b, a)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(scale + a * math.log(x) + b * math.log1p(-x))
    fraction = 1.0
    for term in range(100 + 5 * math.isqrt(math.ceil(a + b)), 0, -1):
        m = term // 2
        top = -(a + m) * (a + b + m) if term % 2 else m * (b - m)
        fraction = 1 + top * x / ((a + term - 1) * (a + term)) / fraction
    return front / (a * fraction)


def _finite(values: npt.ArrayLike, least: int) -> Floats:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) < least or not np.isfinite(array).all():
        raise ValueError(
            f"expected a row of {least} or more finite numbers, got an array of shape {array.shape}"
        )
    return array
