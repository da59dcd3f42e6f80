"""Metrics of stated uncertainty on cases whose errors are known."""

import numpy as np
import pytest

from training.data.case_table import Case
from training.evaluation.metrics import (
    CERTAINTY_LABELS,
    format_metrics,
    summarise_by_device,
    summarise_certainty,
)
from training.evaluation.predict import CasePrediction

POINTS = np.array([[40.0, 12.0], [15.0, 16.0], [48.0, 40.0]])


def made(errors: list[float], expected: list[float | None], doubt: tuple[str, ...] = ()) -> tuple:
    cases = [Case(f"{k}.png", POINTS, 90.0, device="AB"[k % 2]) for k in range(len(errors))]
    predictions = [
        CasePrediction(
            POINTS, 512, 90.0 + error,
            aop_interval_deg=None if e is None else (90 + error - 2 * e, 90 + error + 2 * e),
            expected_aop_error_deg=e,
            reasons=doubt if k == 0 else (),
        )
        for k, (error, e) in enumerate(zip(errors, expected, strict=True))
    ]  # fmt: skip
    return cases, predictions


def test_certainty_metrics_of_known_errors() -> None:
    errors = [1.0, -2.0, 3.0, 4.0, -20.0]
    cases, predictions = made(errors, [1.0, 2.0, 1.0, 4.0, 8.0], ("odd",))
    found = summarise_certainty(cases, predictions, np.abs(errors))
    values = {name: figure["value"] for name, figure in found.items()}
    assert [*values] == [*CERTAINTY_LABELS]
    assert values["interval_holds"] == pytest.approx(3 / 5)  # all but the third and the last
    assert values["interval_width_deg"] == pytest.approx(4 * 16 / 5)
    assert values["aop_error_surest_deg"] == pytest.approx(2.5)
    assert values["aop_error_surest_less"] == pytest.approx(1 - 2.5 / 6)
    best = np.mean(np.cumsum([1, 2, 3, 4, 20]) / [1, 2, 3, 4, 5])
    assert values["risk_coverage_best_deg"] == pytest.approx(best)
    assert best < values["risk_coverage_deg"] < 6
    assert values["doubtful"] == pytest.approx(0.2)
    assert found["interval_holds"]["low"] < 0.2 and found["interval_holds"]["high"] > 0.9


def test_a_model_without_calibration_has_no_certainty_metrics() -> None:
    cases, predictions = made([1.0, 2.0], [1.0, None])
    assert summarise_certainty(cases, predictions, np.array([1.0, 2.0])) == {}
    assert summarise_certainty([], [], np.array([])) == {}


def test_certainty_metrics_are_given_for_each_device() -> None:
    cases, predictions = made([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 4.0])
    report = summarise_by_device(cases, predictions)
    assert report["device A"]["interval_holds"]["value"] == 0.5
    assert report["device B"]["interval_holds"]["value"] == 1.0
    text = format_metrics(report, [], "")
    assert all(label in text for label in CERTAINTY_LABELS.values())
    plain = format_metrics(summarise_by_device(*made([1.0, 2.0], [None, None])), [], "")
    assert not any(label in plain for label in CERTAINTY_LABELS.values())
