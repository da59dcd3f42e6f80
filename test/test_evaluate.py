"""Figures of hand-made errors, matching of tables, and two readers."""

import json
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest

from model.anatomy import angle_of_progression
from training import evaluate
from training.cases import Case, read_cases, write_cases
from training.metrics import radial_errors_px, summarise

POINTS = np.array([[60.0, 20.0], [20.0, 30.0], [90.0, 60.0]])


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four 128 x 96 images of two devices; so 4 px at 512 is 1 px."""
    cases = []
    for k in range(4):
        image = np.random.default_rng(k).integers(0, 255, (96, 128), np.uint8)
        cv2.imwrite(str(tmp_path / f"{k}.png"), image)
        points = POINTS + k
        angle = float(angle_of_progression(points))
        cases.append(Case(f"{k}.png", points, angle, "test" if k else "train", "AB"[k % 2], None))
    write_cases(tmp_path / "cases.csv", cases)
    return tmp_path


def run(folder: Path, predictions: Path, *more: str) -> dict:
    output = folder / "figures.json"
    arguments = ["--data", str(folder / "cases.csv"), "--images", str(folder)]
    arguments += ["--predictions", str(predictions), "--output", str(output), *more]
    assert evaluate.main(arguments) == 0
    return json.loads(output.read_text())


def test_figures_of_known_errors(folder, capsys):
    truth = read_cases(folder / "cases.csv")
    moved = []
    for k, case in enumerate(truth):
        points = case.landmarks_px + np.array([[3.0, 4.0], [0, 0], [0, k]])
        angle = float(angle_of_progression(points))
        moved.append(Case(case.file.replace(".png", ".mha"), points, angle))
    write_cases(folder / "reader.csv", moved)
    figures = run(folder, folder / "reader.csv")
    everyone = figures["all"]
    assert everyone["cases"] == 4
    assert everyone["mre_PS1_px"]["value"] == pytest.approx(20)  # 5 px of 128 are 20 of 512
    assert everyone["mre_PS2_px"]["value"] == 0
    assert everyone["mre_FH1_px"]["value"] == pytest.approx(4 * (0 + 1 + 2 + 3) / 4)
    assert everyone["mre_px"]["value"] == pytest.approx((20 + 0 + 6) / 3)
    assert everyone["sdr_4px"]["value"] == pytest.approx((4 + 2) / 12)
    assert everyone["sdr_24px"]["value"] == 1
    expected = [abs(a.aop_deg - b.aop_deg) for a, b in zip(truth, moved, strict=True)]
    assert everyone["aop_error_deg"]["value"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert figures["device A"]["cases"] == figures["device B"]["cases"] == 2
    assert "mean radial error" in capsys.readouterr().out


def test_split_and_missing_cases(folder, capsys):
    write_cases(folder / "some.csv", read_cases(folder / "cases.csv")[:3])
    figures = run(folder, folder / "some.csv", "--split", "test")
    assert figures["all"]["cases"] == 2 and figures["all"]["missing"] == ["3.png"]
    assert "3.png" in capsys.readouterr().out


def test_no_match_and_no_split_are_errors(folder, capsys):
    other = Case("else.png", POINTS, 100.0)
    write_cases(folder / "other.csv", [other])
    base = ["--data", str(folder / "cases.csv"), "--images", str(folder)]
    assert evaluate.main([*base, "--predictions", str(folder / "other.csv")]) == 2
    assert "none of the 4 cases" in capsys.readouterr().err
    again = [*base, "--predictions", str(folder / "other.csv"), "--split", "val"]
    assert evaluate.main(again) == 2
    assert "split 'val'" in capsys.readouterr().err


def test_errors_are_scaled_to_512():
    truth = np.zeros((2, 3, 2))
    moved = truth + [3.0, 4.0]
    np.testing.assert_allclose(radial_errors_px(moved, truth, [256, 1024]), [[10] * 3, [2.5] * 3])


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    """95 % intervals of the mean of 40 exponential errors hold the true mean in about 95 %."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(100):
        errors = rng.exponential(10.0, (40, 3))
        figure = summarise(errors, errors[:, 0])["mre_px"]
        held += figure["low"] <= 10.0 <= figure["high"]
    assert 88 <= held <= 99


@pytest.mark.real
def test_images_labelled_twice_show_the_noise_of_the_labels(psfhs):
    """The figures that README and the model card quote: 4.6 px at 512 px and 1.9 deg."""
    by_pixels: dict[bytes, list[Case]] = {}
    for case in read_cases(psfhs / "cases.csv"):
        pixels = cv2.imread(str(psfhs / "images" / case.file), cv2.IMREAD_GRAYSCALE)
        by_pixels.setdefault(pixels.tobytes(), []).append(case)
    pairs = [pair for cases in by_pixels.values() for pair in combinations(cases, 2)]
    assert len(pairs) == 3
    first, second = zip(*pairs, strict=True)
    points = [np.stack([case.landmarks_px for case in cases]) for cases in (first, second)]
    assert radial_errors_px(*points, [256] * 3).mean() == pytest.approx(4.6, abs=0.05)
    angles = [np.array([case.aop_deg for case in cases]) for cases in (first, second)]
    assert np.abs(angles[0] - angles[1]).mean() == pytest.approx(1.9, abs=0.05)
