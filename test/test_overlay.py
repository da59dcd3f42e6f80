"""The picture that a person checks: what must be seen in it, and that nothing breaks it."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from model.anatomy import LANDMARKS, angle_of_progression
from model.frame import Geometry
from model.image import GreyFrame
from model.measure import failed_entry
from model.outputs import CaseEntry, named
from model.overlay import (
    COLOURS,
    DOUBT,
    LONGEST,
    NARROWEST,
    SHORTEST,
    WHITE,
    draw_overlay,
    overlay_picture,
    png,
    put_text,
    text_width,
    without_words,
)
from test.phantom import phantom

SURE = (0.9, 0.8, 0.7)
REASONS = ("PS1 is not on the right of PS2: the image may be mirrored", "FH1 is uncertain")
LANDMARKS_PX = np.array([[140.0, 40.0], [60.0, 60.0], [170.0, 130.0]])


def blank(height: int = 256, width: int = 256) -> np.ndarray:
    return np.full((height, width), 60, np.uint8)


def draw(grey: np.ndarray, points: np.ndarray = LANDMARKS_PX, *more, **named_more) -> np.ndarray:
    picture = draw_overlay(grey, points, 86.2, SURE, *more, **named_more)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    return picture


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a colour is, exactly."""
    return (picture == np.array(colour)).all(axis=-1)


def ring(picture: np.ndarray, name: str, near: np.ndarray) -> np.ndarray:
    """(x, y) of the middle of a landmark's ring, which is looked for near a point."""
    reach = round(8 * max(SHORTEST, picture.shape[1]) / 640)
    left, top = np.maximum(np.rint(near).astype(int) - reach, 0)
    part = picture[top : top + 2 * reach + 1, left : left + 2 * reach + 1]
    y, x = np.nonzero(has(part, COLOURS[name]))
    assert len(x) > 20
    return np.array([left + (x.min() + x.max()) / 2, top + (y.min() + y.max()) / 2])


@pytest.mark.parametrize("side", [256, 1024])
def test_rings_lie_on_the_landmarks_and_leave_them_free(side: int) -> None:
    points = LANDMARKS_PX * side / 256
    picture = draw(blank(side, side), points)
    scale = max(side, SHORTEST) / side
    assert picture.shape[1] == side * scale and picture.shape[0] > side * scale
    for name, point in zip(LANDMARKS, (points + 0.5) * scale - 0.5, strict=True):
        assert np.abs(ring(picture, name, point) - point).max() <= 1
        x, y = np.rint(point).astype(int)
        assert not has(picture[y - 1 : y + 2, x - 1 : x + 2], COLOURS[name]).any()


def test_lines_join_the_vertex_with_both_other_landmarks() -> None:
    picture = draw(blank())
    scale = SHORTEST / 256
    ps1, ps2, fh1 = (LANDMARKS_PX + 0.5) * scale - 0.5
    for start, end in ((ps1, ps2), (ps1, fh1)):
        on_line = start + (end - start) * np.linspace(0.15, 0.85, 30)[:, None]
        for x, y in np.rint(on_line).astype(int):
            assert picture[y - 2 : y + 3, x - 2 : x + 3].max() > 200
    middle = (ps2 + fh1) / 2
    x, y = np.rint(middle).astype(int)
    assert (picture[y - 2 : y + 3, x - 2 : x + 3] == 60).all()


def test_arc_goes_the_short_way_and_the_angle_stands_beside_it() -> None:
    narrow, wide = (
        draw_overlay(blank(), np.array([[128.0, 60.0], [60.0, 60.0], fh1]), 20.0, SURE)
        for fh1 in ([70.0, 110.0], [190.0, 90.0])
    )
    x, y = round(128.5 * 2.5), round(60.5 * 2.5)
    below = slice(y + 40, y + 110), slice(x - 25, x + 26)
    above = slice(y - 110, y - 40), slice(x - 25, x + 26)
    assert not (narrow[below] > 200).any() and (wide[below] > 200).any()
    assert not (narrow[above] > 200).any() and not (wide[above] > 200).any()


def test_only_doubt_puts_a_frame_and_words() -> None:
    sure, doubtful = draw(blank()), draw(blank(), reasons=REASONS)
    assert not has(sure, DOUBT).any()
    edges = doubtful[: SHORTEST - 1]
    for edge in (edges[0], edges[:, 0], edges[:, -1], doubtful[SHORTEST - 1]):
        assert has(edge, DOUBT).all()
    assert has(doubtful[SHORTEST:], DOUBT).sum() > 500  # the words below the image
    assert len(doubtful) > len(sure)
    assert len(draw(blank(), reasons=REASONS * 4)) > len(doubtful)


@pytest.mark.parametrize("side", [256, 1024])
def test_words_are_large_enough_and_inside(side: int) -> None:
    picture = draw(blank(side, side), LANDMARKS_PX * side / 256, reasons=["word " * 60])
    strip = picture[max(side, SHORTEST) :]
    lit = strip.max(axis=2) > 128
    assert not lit[:, -4:].any() and not lit[-2:].any()  # no line is cut off
    lines = np.flatnonzero(np.diff(np.r_[0, lit.any(axis=1), 0])).reshape(-1, 2)
    assert len(lines) > 3
    assert min(end - start for start, end in lines) >= 0.014 * picture.shape[1]


def test_confidences_and_angle_are_written_below() -> None:
    strips = [
        draw_overlay(blank(), LANDMARKS_PX, angle, confidence)[SHORTEST:]
        for angle, confidence in ((86.2, SURE), (86.3, SURE), (86.2, (0.9, 0.8, 0.6)))
    ]
    assert strips[0].shape == strips[1].shape == strips[2].shape
    assert not np.array_equal(strips[0], strips[1]) and not np.array_equal(strips[0], strips[2])


@pytest.mark.parametrize(
    ("size", "pixel_shape", "expected"),
    [
        ((256, 256), (1, 1), (640, 640)),
        ((700, 500), (1, 1), (700, 500)),
        ((1024, 768), (1, 1), (1024, 768)),
        ((2000, 1000), (1, 1), (LONGEST, 640)),
        ((512, 256), (0.1, 0.2), (640, 640)),
        ((256, 512), (0.1, 0.2), (NARROWEST, 640)),
        ((64, 512), (1, 1), (NARROWEST, 640)),
    ],
)
def test_sizes_and_square_pixels(size: tuple, pixel_shape: tuple, expected: tuple) -> None:
    picture = draw(blank(size[1], size[0]), pixel_shape=pixel_shape)
    assert picture.shape[1] == expected[0]
    strip = draw(blank(256, expected[0]))[-1:]
    image_rows = np.flatnonzero((picture[:, 0] == 60).all(axis=-1))
    assert len(image_rows) == expected[1] and strip.max() == 0


def test_unequal_spacing_shows_the_angle_that_is_measured() -> None:
    shape = (0.1, 0.25)
    picture = draw_overlay(blank(200, 500), LANDMARKS_PX * [2, 1], 80.0, SURE, (), shape)
    assert picture.shape[1] == 640
    expected = (LANDMARKS_PX * [2, 1] + 0.5) * [640 / 500, 640 / 200] - 0.5
    found = [ring(picture, name, at) for name, at in zip(LANDMARKS, expected, strict=True)]
    measured = angle_of_progression(LANDMARKS_PX * [2, 1], shape)
    assert angle_of_progression(found) == pytest.approx(measured, abs=1.5)
    assert abs(measured - angle_of_progression(LANDMARKS_PX * [2, 1])) > 10


@pytest.mark.parametrize(
    "points",
    [
        [[30, 20], [30, 20], [30, 20]],
        [[30, 20], [30, 20], [90, 100]],
        [[30.2, 20], [30, 20], [30, 20.1]],
        [[-300, -200], [400, 900], [128, 128]],
        [[1e12, -1e12], [-1e15, 3], [1e300, 1e300]],
        [[255.5, 255.5], [-0.5, -0.5], [255.5, -0.5]],
    ],
)
@pytest.mark.parametrize("shape", [(1.0, 1.0), (1e-6, 1e6), (3e5, 1e-5)])
def test_landmarks_anywhere(points: list, shape: tuple) -> None:
    picture = draw(blank(), np.array(points, float), REASONS, shape)
    assert NARROWEST <= picture.shape[1] <= SHORTEST and has(picture, DOUBT).any()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 40_000), (40_000, 32), (33, 1300)])
def test_any_aspect_ratio(height: int, width: int) -> None:
    picture = draw(blank(height, width), reasons=REASONS)
    assert NARROWEST <= picture.shape[1] <= LONGEST
    assert not (picture[-40:, -4:] > 128).any()


def test_grey_values_of_either_type_look_the_same() -> None:
    grey = phantom(1, 300, 200).image
    assert np.array_equal(draw(grey), draw(grey.astype(np.float32)))
    dark, bright = draw(np.full((256, 256), -9.0, np.float32)), draw(blank() * 0.0 + 300)
    assert dark[600, 5].max() == 0 and bright[600, 5].min() == 255


def answered(spacing: tuple[float, float] | None, width: int, height: int) -> tuple:
    """A frame and its doubtful entry."""
    made = phantom(2, width, height)
    known = {"case": "a", "file": "a.png", "status": "ok", "aop_deg": 86.2, "reasons": REASONS[:1]}
    known |= {"width": width, "height": height, "spacing_mm": spacing}
    confidence = dict(zip(LANDMARKS, SURE, strict=True))
    entry = CaseEntry(**known, landmarks_px=named(made.landmarks_px), confidence=confidence)
    return GreyFrame(made.image, None, 0, Geometry(spacing)), entry


def test_picture_of_an_entry_and_its_png() -> None:
    frame, entry = answered((0.2, 0.3), 300, 200)
    picture = overlay_picture(frame, entry)
    points = np.array(list(entry.landmarks_px.values()))
    assert np.array_equal(picture, draw(frame.pixels, points, REASONS[:1], (0.2, 0.3)))
    decoded = cv2.imdecode(np.frombuffer(png(picture), np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(decoded, picture)
    with pytest.raises(AssertionError):
        overlay_picture(frame, failed_entry(entry, "no"))


@pytest.mark.parametrize(
    ("size", "spacing", "expected"),
    [
        ((300, 200), None, (640, 427)),
        ((300, 200), (0.2, 0.3), (640, 640)),
        ((900, 700), None, (900, 700)),
        ((100, 400), (0.1, 0.1), (NARROWEST, 640)),
    ],
)
def test_picture_without_words(size: tuple, spacing: tuple | None, expected: tuple) -> None:
    frame, entry = answered(spacing, *size)
    picture = overlay_picture(frame, entry)
    part = without_words(picture, entry)
    assert part.shape[1::-1] == expected and np.array_equal(part, picture[: len(part)])
    assert has(part[-1], DOUBT).all()  # the frame closes it
    assert len(picture) > len(part) + 30 and not has(picture[len(part) + 5], DOUBT).any()


def test_width_of_a_text_is_that_of_its_pixels() -> None:
    picture = blank(60, 400)[..., None].repeat(3, axis=2) * 0
    put_text(picture, "AoP 121.3°", np.array([20, 40]), 26, WHITE)
    columns = np.flatnonzero(picture.any(axis=(0, 2)))
    assert text_width("AoP 121.3°", 26) == pytest.approx(np.ptp(columns), abs=4)
    assert 20 <= columns[0] <= 23 and text_width("AoP 121.3°", 13) < 0.6 * np.ptp(columns)


def test_drawing_needs_no_simpleitk_and_no_torch() -> None:
    code = "import sys, model.overlay; print({'torch', 'SimpleITK'} & set(sys.modules))"
    root = Path(__file__).resolve().parent.parent
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "set()\n"
