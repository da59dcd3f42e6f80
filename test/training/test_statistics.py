"""Statistics against worked examples of their papers, tables, and sums that a hand can check."""

import math

import numpy as np
import pytest

from training.evaluation.statistics import (
    area_under_risk_coverage,
    bland_altman,
    coverage_interval,
    error_when_answering,
    icc_2_1,
    risk_coverage,
)

# Shrout & Fleiss 1979, table 2: six targets (rows) and four judges
SHROUT_FLEISS = [
    [9, 2, 5, 8],
    [6, 1, 3, 2],
    [8, 4, 6, 8],
    [7, 1, 2, 6],
    [10, 5, 6, 9],
    [6, 2, 4, 7],
]
# Bland & Altman 1986, table 1: peak flow in l/min by a large and by a mini meter, first readings
LARGE = [494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427]
MINI = [512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451]


def test_icc_of_shrout_and_fleiss():
    value, low, high = icc_2_1(SHROUT_FLEISS)
    assert value == pytest.approx(0.290, abs=5e-4)
    # as R's psych::ICC prints for the same table
    assert (low, high) == pytest.approx((0.019, 0.761), abs=5e-4)


def test_icc_of_equal_and_of_shifted_readings():
    readings = np.array([80.0, 95.0, 120.0, 133.0])
    assert icc_2_1(np.column_stack([readings, readings])) == (1, 1, 1)
    shifted = icc_2_1(np.column_stack([readings, readings + 10]))
    # by hand: the cases' mean square over itself and 2 * that of the readers / 4
    cases, readers = 2 * readings.var(ddof=1), 4 * 2 * 5.0**2
    assert shifted.value == pytest.approx(cases / (cases + readers / 2))
    assert shifted.low < shifted.value < shifted.high < 1


def test_icc_does_not_depend_on_order_of_cases_or_readers():
    table = np.array(SHROUT_FLEISS, float)
    assert icc_2_1(table[::-1, ::-1]) == pytest.approx(icc_2_1(table))


@pytest.mark.parametrize(
    ("n", "k", "f", "inverse_f"),  # F of the tables at 0.975: n - 1 and (n - 1)(k - 1) degrees
    [(6, 4, 3.576, 6.428), (31, 5, 1.690, 1.866)],  # of freedom, then the other way round
)
def test_icc_interval_from_a_table_of_f(n, k, f, inverse_f):
    """If all readers have one mean, the degrees of freedom are whole numbers, as in a table."""
    rng = np.random.default_rng(n)
    table = rng.normal(0, 3, (n, 1)) + rng.normal(0, 1, (n, k))
    table -= table.mean(axis=0)
    of_cases = k * table.mean(axis=1).var(ddof=1)
    of_rest = ((table - table.mean(axis=1, keepdims=True)) ** 2).sum() / ((n - 1) * (k - 1))
    spread = k * n - k - n
    found = icc_2_1(table)
    low = n * (of_cases - f * of_rest) / (f * spread * of_rest + n * of_cases)
    high = n * (inverse_f * of_cases - of_rest) / (spread * of_rest + n * inverse_f * of_cases)
    assert found.low == pytest.approx(low, abs=3e-4)
    assert found.high == pytest.approx(high, abs=3e-4)


@pytest.mark.parametrize(
    ("ratings", "words"),
    [
        ([[1.0, 2.0]], "two or more cases"),
        ([1.0, 2.0], "two or more cases"),
        ([[1.0, math.nan], [2.0, 3.0]], "finite"),
        ([[100.1, 101.1], [100.1, 101.1], [100.1, 101.1]], "the same mean for all"),
    ],
)
def test_icc_refuses_what_has_none(ratings, words):
    with pytest.raises(ValueError, match=words):
        icc_2_1(ratings)


def test_bland_altman_of_1986():
    found = bland_altman(np.subtract(LARGE, MINI))
    assert found.cases == 17
    assert found.bias.value == pytest.approx(-2.1, abs=0.05)
    assert found.deviation == pytest.approx(38.8, abs=0.05)
    assert found.bias[1:] == pytest.approx((-22.0, 17.8), abs=0.1)
    assert found.lower.value == pytest.approx(found.bias.value - 1.96 * found.deviation)
    assert found.upper.value == pytest.approx(found.bias.value + 1.96 * found.deviation)


def test_bland_altman_intervals_of_limits_of_1999():
    """Systolic pressure in 85 people, of whose differences mean and deviation are published.

    The paper rounds on its way (1.71 s / sqrt(n) for the limits' standard error).
    """
    shape = np.sin(np.arange(85.0))
    difference = -16.29 + 19.61 * (shape - shape.mean()) / shape.std(ddof=1)
    found = bland_altman(difference)
    assert found.lower == pytest.approx((-54.7, -61.9, -47.5), abs=0.15)
    assert found.upper == pytest.approx((22.1, 14.9, 29.3), abs=0.15)


@pytest.mark.parametrize(("n", "t"), [(11, 2.228), (17, 2.120)])
def test_interval_of_the_bias_from_a_table_of_student(n, t):
    found = bland_altman(np.arange(float(n)))
    reach = t * found.deviation / math.sqrt(n)
    assert found.bias.high - found.bias.value == pytest.approx(reach, rel=5e-4)


def test_bland_altman_refuses_one_case_and_undefined_angles():
    for difference in ([1.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match="finite numbers"):
            bland_altman(difference)


def test_risk_coverage_by_hand():
    share, mean = risk_coverage([4.0, 1.0, 7.0], [0.2, 0.1, 0.3])
    np.testing.assert_allclose(share, [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(mean, [1, 2.5, 4])


def test_equal_risks_count_as_in_any_order():
    """The mean over both orders of the tie: 1, (1 + 4) / 2 or (1 + 7) / 2, 4."""
    for error in ([1.0, 4.0, 7.0], [1.0, 7.0, 4.0]):
        np.testing.assert_allclose(risk_coverage(error, [0, 5, 5])[1], [1, 3.25, 4])


def test_areas_under_risk_coverage():
    error = [4.0, 1.0, 7.0]
    own, best, random = area_under_risk_coverage(error, [0.1, 0.2, 0.3])
    assert own == pytest.approx((4 + 2.5 + 4) / 3)
    assert best == pytest.approx((1 + 2.5 + 4) / 3)
    assert random == pytest.approx(4)
    assert area_under_risk_coverage(error, [1, 1, 1]).own == pytest.approx(random)
    worst = area_under_risk_coverage(error, [-4, -1, -7]).own
    assert worst == pytest.approx((7 + 5.5 + 4) / 3)


def test_error_when_answering_by_hand_and_its_interval():
    error = np.array([1.0, 2.0, 3.0, 4.0, 10.0])
    mean, part = error_when_answering(error, error, 0.8)
    assert mean.value == pytest.approx(2.5) and part.value == pytest.approx(1 - 2.5 / 4)
    assert mean.low < 2.5 < mean.high
    whole, none = error_when_answering(error, error, 1.0)
    assert whole.value == pytest.approx(4) and none == (0, 0, 0)
    assert error_when_answering(np.zeros(3), np.arange(3.0), 0.5)[1] == (0, 0, 0)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (1, 1), (5, 10), (30, 33), (193, 214)])
def test_coverage_interval_is_the_binomial_one(hits, n):
    """At either end as many or more, as few or fewer, have a chance of 2.5 %: the definition."""

    def chance(share, counts):
        return sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in counts)

    low, high = coverage_interval(hits, n)
    if hits:
        assert chance(low, range(hits, n + 1)) == pytest.approx(0.025, rel=1e-6)
    else:
        assert low == 0
    if hits < n:
        assert chance(high, range(hits + 1)) == pytest.approx(0.025, rel=1e-6)
    else:
        assert high == 1


def test_coverage_interval_of_a_known_table_and_refusals():
    assert coverage_interval(0, 10) == pytest.approx((0, 0.3085), abs=5e-5)
    assert coverage_interval(5, 10) == pytest.approx((0.1871, 0.8129), abs=5e-5)
    low, high = coverage_interval(4500, 5000)
    assert 0.89 < low < 0.9 < high < 0.91
    for hits, n in ((0, 0), (-1, 4), (5, 4)):
        with pytest.raises(ValueError, match="hits in"):
            coverage_interval(hits, n)
