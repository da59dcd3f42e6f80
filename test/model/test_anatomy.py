"""The one angle, and which anatomies count as plausible."""

import csv
import math

import numpy as np
import pytest

from model.anatomy import LANDMARKS, angle_of_progression, implausibilities
from training.data.case_table import read_cases

RIGHT = np.array([[10.0, 10.0], [0.0, 10.0], [10.0, 30.0]])  # PS1, PS2, FH1: 90 deg at PS1


def test_order_of_landmarks():
    assert LANDMARKS == ("PS1", "PS2", "FH1")


def test_known_angles():
    assert angle_of_progression(RIGHT) == pytest.approx(90)
    straight = [[10, 10], [0, 10], [25, 10]]
    assert angle_of_progression(straight) == pytest.approx(180)
    assert angle_of_progression([[10, 10], [0, 10], [3, 10]]) == pytest.approx(0, abs=1e-6)


def test_vertex_is_ps1_and_not_the_supplement():
    # the arms point to 153.435 and 65.556 deg; the supplement would be 92.121 deg
    points = [[100, 40], [40, 70], [150, 150]]
    assert angle_of_progression(points) == pytest.approx(87.879, abs=1e-3)


def test_many_at_once_and_unequal_spacing():
    pair = np.stack([RIGHT, RIGHT + 5.0])
    assert angle_of_progression(pair).shape == (2,)
    slanted = [[0, 0], [-10, 0], [10, 10]]
    assert angle_of_progression(slanted) == pytest.approx(135)
    assert angle_of_progression(slanted, (1.0, 2.0)) == pytest.approx(
        180 - math.degrees(math.atan2(2, 1))
    )


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([[1, 1], [1, 1], [2, 2]], "no angle"),
        ([[1, 1], [0, 1], [1, 1]], "no angle"),
        ([[1, np.nan], [0, 1], [1, 3]], "not finite"),
        ([[1, 1], [0, 1]], "shape"),
    ],
)
def test_undefined_angles_are_errors(points, message):
    with pytest.raises(ValueError, match=message):
        angle_of_progression(points)


def test_implausible_in_words():
    fine = np.array([[130.0, 40.0], [70.0, 60.0], [190.0, 90.0]])
    assert implausibilities(fine, (256, 240)) == []
    mirrored = fine * [-1, 1] + [255, 0]
    assert any("mirrored" in reason for reason in implausibilities(mirrored, (256, 240)))
    tiny = np.array([[130.0, 40.0], [128.0, 41.0], [190.0, 90.0]])
    assert any("symphysis" in reason for reason in implausibilities(tiny, (256, 240)))
    outside = fine + [100, 0]
    assert any("outside the image" in reason for reason in implausibilities(outside, (256, 240)))
    equal = fine[[0, 0, 2]]
    assert any("coincide" in reason for reason in implausibilities(equal, (256, 240)))
    assert implausibilities(fine * np.nan, (256, 240)) == ["a landmark has no finite position"]


@pytest.mark.real
def test_limits_pass_real_cases(psfhs):
    cases = read_cases(psfhs / "cases.csv")
    passed = [not implausibilities(case.landmarks_px, (256, 256)) for case in cases]
    assert np.mean(passed) >= 0.995


@pytest.mark.real
def test_angle_reproduces_the_labels(psfhs):
    with (psfhs / "cases.csv").open() as file:
        written = [float(row["AoP"]) for row in csv.DictReader(file)]
    points = np.stack([case.landmarks_px for case in read_cases(psfhs / "cases.csv")])
    # the table's points are rounded to 0.01 px, its angles are not
    assert np.abs(angle_of_progression(points) - written).max() < 0.05
