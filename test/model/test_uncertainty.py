"""The signs of an error, and the calibration that weighs them."""

import numpy as np
import pytest

from model.anatomy import angle_of_progression
from model.heatmap import HeatmapCodec
from model.uncertainty import (
    QUANTITIES,
    Calibration,
    ErrorModel,
    covariances,
    error_terms,
    expected_errors,
    interval_deg,
)
from training.calibrate import RIDGE, conformal_quantile, cross_fit_errors, fit_error_model

POINTS = np.array([[250.0, 100.0], [120.0, 160.0], [330.0, 310.0]])  # px at 512
CODEC = HeatmapCodec(48, 64, 2.0)


def test_covariance_is_that_of_the_gaussian() -> None:
    maps = CODEC.encode([[20.0, 18.0], [40.5, 30.25]])
    np.testing.assert_allclose(covariances(maps), [np.eye(2) * 4] * 2, atol=1e-3)
    line = np.zeros((1, 48, 64), np.float32)
    line[0, 10, 3:6] = line[0, 20, 13:16] = 1  # x and y rise together
    ((xx, xy), (_, yy)) = covariances(line)[0]
    assert (xx, yy) == pytest.approx((25 + 2 / 3, 25)) and xy == pytest.approx(25)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_a_broken_heatmap_spreads_evenly(value: float) -> None:
    ((xx, _), (_, yy)) = covariances(np.full((1, 5, 7), value, np.float32))[0]
    assert (xx, yy) == (pytest.approx(4), pytest.approx(2))


def test_disagreement_and_spread_in_px_at_512_and_deg() -> None:
    second = POINTS + [[3, 4], [0, 0], [-5, 12]]
    terms = error_terms(CODEC.encode(POINTS / 8), POINTS, second, 8.0)
    apart = np.expm1(terms[:, 0])
    np.testing.assert_allclose(apart[:3], [5, 0, 13], atol=1e-9)
    angles = angle_of_progression(np.array([POINTS, second]))
    assert apart[3] == pytest.approx(abs(angles[0] - angles[1]))
    np.testing.assert_allclose(np.exp(terms[:3, 1]), 8 * 2 * np.sqrt(2), rtol=1e-3)
    assert np.isinf(error_terms(CODEC.encode(POINTS / 8), POINTS, None, 8.0)[:, 0]).all()


def test_the_angles_spread_is_that_of_draws() -> None:
    rng = np.random.default_rng(1)
    draws = POINTS + rng.normal(0, 2.0 * 1.5, (40_000, 3, 2))  # sigma 2 cells of 1.5 px
    wanted = np.std(angle_of_progression(draws))
    terms = error_terms(HeatmapCodec(256, 256, 2.0).encode(POINTS / 1.5), POINTS, POINTS, 1.5)
    assert np.exp(terms[3, 1]) == pytest.approx(wanted, rel=0.02)


def test_coinciding_landmarks_give_numbers() -> None:
    same = np.array([POINTS[0]] * 3)
    assert np.isfinite(error_terms(CODEC.encode(same / 8), same, same, 8.0)).all()


def model_of(b0: float, b1: float, b2: float) -> ErrorModel:
    return ErrorModel(weights=(b0, b1, b2), limits=((0.0, 3.0), (1.0, 4.0)))


def test_nothing_is_extrapolated() -> None:
    model = model_of(-1.0, 0.5, 0.25)
    assert model.expected([1.0, 2.0]) == pytest.approx(np.exp(-1 + 0.5 + 0.5))
    assert model.expected([np.inf, 9.0]) == model.expected([3.0, 4.0])
    assert model.expected([-1.0, -9.0]) == model.expected([0.0, 1.0])


def test_expected_errors_and_interval() -> None:
    models = {name: model_of(k, 0.0, 0.0) for k, name in enumerate(QUANTITIES)}
    calibration = Calibration(errors=models, interval=2.0, error_above_deg=9.0, cases=100)
    found = expected_errors(calibration, np.ones((4, 2)))
    np.testing.assert_allclose(found.landmarks_px, np.exp([0, 1, 2]))
    assert found.aop_deg == pytest.approx(np.exp(3))
    assert interval_deg(calibration, 90.0, 4.0) == (82.0, 98.0)
    assert interval_deg(calibration, 5.0, 4.0) == (0.0, 13.0)
    assert interval_deg(calibration, 175.0, 4.0) == (167.0, 180.0)


def drawn(cases: int, slopes: tuple[float, float], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Terms, and errors whose mean follows them."""
    rng = np.random.default_rng(seed)
    terms = rng.uniform([0, 1], [3, 4], (cases, 2))
    return terms, np.exp(-1 + terms @ slopes) * rng.exponential(1, cases)


def test_the_regression_finds_the_law_and_keeps_the_mean() -> None:
    terms, errors = drawn(20_000, (0.4, 0.7))
    model = fit_error_model(terms, errors)
    np.testing.assert_allclose(model.weights, [-1, 0.4, 0.7], atol=0.1)
    assert model.expected(terms).mean() == pytest.approx(errors.mean(), rel=0.02)
    few, of_few = drawn(60, (0.4, 0.7))
    flatter = fit_error_model(few, of_few).weights[1:]
    scaled = fit_error_model(np.tile(few, (50, 1)), np.tile(of_few, 50)).weights[1:]
    assert RIDGE > 0 and np.sum(flatter) < np.sum(scaled)


def test_a_term_that_says_the_opposite_says_nothing() -> None:
    terms, errors = drawn(5000, (0.5, -0.5))
    weights = fit_error_model(terms, errors).weights
    assert weights[1] == pytest.approx(0.5, abs=0.1) and weights[2] == 0
    terms[:, 0] = 0  # a model without masks
    model = fit_error_model(terms, errors)
    assert model.weights[1:] == (0, 0) and model.expected([np.inf, 2]) == model.expected([0, 2])


def test_no_case_judges_itself_nor_its_group() -> None:
    terms, errors = drawn(200, (0.4, 0.7))
    groups = [str(k // 4) for k in range(200)]
    before = cross_fit_errors(terms, errors, groups)
    errors[8:12] *= 1e6
    after = cross_fit_errors(terms, errors, groups)
    np.testing.assert_array_equal(before[8:12], after[8:12])
    assert (before != after).sum() > 100


def test_intervals_hold_the_share_that_they_promise() -> None:
    held = []
    for seed in range(20):
        terms, errors = drawn(600, (0.4, 0.7), seed)
        groups = [str(k) for k in range(600)]
        half = slice(0, 300)
        ratios = errors[half] / cross_fit_errors(terms[half], errors[half], groups[half])
        model = fit_error_model(terms[half], errors[half])
        reach = conformal_quantile(ratios, 0.9) * model.expected(terms[300:])
        held.append((errors[300:] <= reach).mean())
    assert np.mean(held) == pytest.approx(0.9, abs=0.02)
    assert conformal_quantile(np.arange(1.0, 10.0), 0.9) == 9.0
    with pytest.raises(ValueError, match="8 cases are too few"):
        conformal_quantile(np.arange(8.0), 0.9)
