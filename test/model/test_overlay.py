"""The overlay: what must be visible in it, whatever the image and the entry are."""

import csv
import subprocess
import sys
from ast import literal_eval
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from model.anatomy import LANDMARKS, angle_of_progression
from model.drawing.overlay import (
    ARC,
    BEYOND,
    COLOURS,
    FRAME,
    GAP,
    LONGEST,
    LOWEST,
    NARROWEST,
    RING,
    SHORTEST,
    crop_text_strip,
    encode_png,
    overlay_picture,
)
from model.drawing.text import DOUBT, PALE, WHITE, put_text, shorten_text, text_width
from model.frame import Geometry
from model.images.source import GreyFrame
from model.masks import HEAD, outer_contour
from model.measure import failed_entry
from model.results.schemas import CaseEntry, points_by_name
from test.phantom import phantom

SURE = (0.9, 0.8, 0.7)
REASONS = ["PS1 is not on the right of PS2: the image may be mirrored", "FH1 is uncertain"]
LANDMARKS_PX = np.array([[140.0, 40.0], [60.0, 60.0], [170.0, 130.0]])
GROUND = 60  # grey of a blank image
CALIBRATED = {
    "aop_interval_deg": (94.0, 108.0),
    "expected_error_px": {"PS1": 2.5, "PS2": 3.0, "FH1": 4.0},
    "expected_error_mm": {"PS1": 1.5, "PS2": 2.0, "FH1": 3.0},
    "expected_aop_error_deg": 4.1,
}


def blank(height: int = 256, width: int = 256) -> np.ndarray:
    return np.full((height, width), GROUND, np.uint8)


def answered(grey: np.ndarray, points: np.ndarray = LANDMARKS_PX, **more) -> tuple:
    """A frame and its entry."""
    known = {"case": "a", "file": "a.png", "status": "ok", "aop_deg": 86.2}
    known |= {"height": grey.shape[0], "width": grey.shape[1]}
    known |= {"landmarks_px": points_by_name(np.array(points, float))}
    known |= {"confidence": dict(zip(LANDMARKS, SURE, strict=True))}
    entry = CaseEntry(**known | more)
    return GreyFrame(grey, entry.frame, 0, Geometry(entry.spacing_mm)), entry


def draw(grey: np.ndarray | None = None, points: np.ndarray = LANDMARKS_PX, **more) -> np.ndarray:
    picture = overlay_picture(*answered(blank() if grey is None else grey, points, **more))
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    return picture


def strip(height: int = SHORTEST, **more) -> np.ndarray:
    """The text below a blank image."""
    return draw(**more)[height:]


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """The pixels that have exactly this colour."""
    return (picture == np.array(colour)).all(axis=-1)


def near(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """The pixels that have nearly this colour."""
    return (np.abs(picture.astype(int) - colour) < 40).all(axis=-1)


def ring(picture: np.ndarray, name: str, point: np.ndarray) -> np.ndarray:
    """(x, y) of the centre of a landmark's ring, which is searched near a point."""
    reach = round((RING + 3) * picture.shape[1] / 640)
    left, top = np.maximum(np.rint(point).astype(int) - reach, 0)
    part = picture[top : top + 2 * reach + 1, left : left + 2 * reach + 1]
    y, x = np.nonzero(near(part, COLOURS[name]))
    assert len(x) > 20
    return np.array([left + (x.min() + x.max()) / 2, top + (y.min() + y.max()) / 2])


def in_picture(points: np.ndarray, scale: float = SHORTEST / 256) -> np.ndarray:
    return (np.array(points) + 0.5) * scale - 0.5


def outward(points: np.ndarray) -> np.ndarray:
    """Unit vector at FH1, perpendicular to the tangent and away from PS2 and so from the head."""
    ps1, ps2, fh1 = points
    x, y = (fh1 - ps1) / np.linalg.norm(fh1 - ps1)
    return np.array([y, -x]) * -np.sign(np.array([y, -x]) @ (ps2 - ps1))


# ---- The measurement


@pytest.mark.parametrize("side", [256, 1024])
def test_rings_lie_on_the_symphysis_ends_and_leave_them_free(side: int) -> None:
    points = LANDMARKS_PX * side / 256
    picture = draw(blank(side, side), points)
    scale = max(side, SHORTEST) / side
    assert picture.shape[1] == side * scale and picture.shape[0] > side * scale
    for name, point in zip(LANDMARKS[:2], in_picture(points[:2], scale), strict=True):
        assert np.abs(ring(picture, name, point) - point).max() <= 1
        x, y = np.rint(point).astype(int)
        assert (picture[y - 1 : y + 2, x - 1 : x + 2] == GROUND).all()


@pytest.mark.parametrize("points", [LANDMARKS_PX, [[60, 60], [140, 40], [70, 150]]])
def test_the_head_is_free_at_fh1(points: np.ndarray) -> None:
    picture, (ps1, ps2, fh1) = draw(points=points), in_picture(points)
    rows, columns = np.indices((SHORTEST, SHORTEST))
    from_fh1 = np.stack([columns, rows], axis=-1) - fh1
    changed = (np.abs(picture[:SHORTEST].astype(int) - GROUND) > 12).any(axis=-1)
    distance, out = np.linalg.norm(from_fh1, axis=-1), outward(np.array([ps1, ps2, fh1]))
    assert not changed[distance < RING - 2.5].any()
    on_the_head = from_fh1 @ out < -3
    assert not changed[on_the_head & (distance < 60)].any()
    tick = near(picture[:SHORTEST], COLOURS["FH1"]) & (distance < 25)
    across = np.abs(from_fh1[tick] @ np.array([-out[1], out[0]]))
    assert tick.sum() > 10 and across.max() < 2 and distance[tick].min() < RING + 2


def test_lines_join_the_vertex_with_both_other_landmarks() -> None:
    picture, (ps1, ps2, fh1) = draw(), in_picture(LANDMARKS_PX)
    for start, end in ((ps1, ps2), (ps1, fh1)):
        for x, y in np.rint(start + (end - start) * np.linspace(0.1, 0.9, 30)[:, None]).astype(int):
            assert picture[y - 1 : y + 2, x - 1 : x + 2].max() > 180
    x, y = np.rint((ps2 + fh1) / 2).astype(int)
    assert (picture[y - 2 : y + 3, x - 2 : x + 3] == GROUND).all()


@pytest.mark.parametrize("length", [20.0, 90.0])
def test_the_tangent_goes_on_past_fh1(length: float) -> None:
    points = np.array([[140, 40], [60, 40], [140, 40 + length]])
    picture, fh1 = draw(points=points), in_picture(points)[2]
    x, y = np.rint(fh1).astype(int)
    beyond = picture[y + GAP + 2 : y + 200, x - 1 : x + 2].max(axis=(1, 2)) > 180
    end = np.flatnonzero(beyond)[-1] + GAP + 2
    assert beyond[: end - GAP - 2].all()
    assert end == pytest.approx(max(40, (BEYOND - 1) * length * SHORTEST / 256), abs=3)


@pytest.mark.parametrize("side", [256, 2000])
def test_lines_are_thin(side: int) -> None:
    """Across a horizontal line there are a few bright pixels, and darkened ones beside them."""
    points = np.array([[0.7, 0.3], [0.2, 0.3], [0.7, 0.8]]) * side
    picture = draw(blank(side, side), points)
    scale = picture.shape[1] / 640
    x, y = np.rint(in_picture([[0.35 * side, 0.3 * side]], 640 * scale / side)[0]).astype(int)
    column = picture[y - 20 : y + 21, x, 0].astype(int)
    assert 1 <= (column > GROUND + 20).sum() <= 2 * scale
    assert (np.abs(column - GROUND) > 5).sum() <= 6 * scale and column.min() >= GROUND * 0.35


def test_arc_goes_the_short_way_and_the_angle_stands_on_the_other_side() -> None:
    vertex = np.array([128.0, 60.0])
    for fh1 in ([70.0, 110.0], [190.0, 90.0], [100.0, 20.0]):
        points = np.array([vertex, [60.0, 60.0], fh1])
        picture, (ps1, ps2, end) = draw(points=points), in_picture(points)
        u, v = ((p - ps1) / np.linalg.norm(p - ps1) for p in (ps2, end))
        middle = (u + v) / np.linalg.norm(u + v)
        x, y = np.rint(ps1 + ARC * middle).astype(int)
        assert picture[y - 1 : y + 2, x - 1 : x + 2].max() > 180
        y, x = np.nonzero(picture[:SHORTEST].min(axis=2) > 200)
        from_vertex = np.column_stack([x, y]) - ps1
        there = (np.linalg.norm(from_vertex, axis=1) < 80) & (from_vertex @ middle < -5)
        assert there.sum() > 30  # the angle in degrees
        assert np.array_equal(picture, draw(points=points, aop_deg=86.4))  # to whole degrees
        assert not np.array_equal(picture, draw(points=points, aop_deg=87.4))


def name_at(picture: np.ndarray, name: str, points: np.ndarray) -> np.ndarray:
    """(n, 2) positions of px in a landmark's colour, without those of its mark."""
    y, x = np.nonzero(near(picture[:SHORTEST], COLOURS[name]))
    found = np.column_stack([x, y])
    at = in_picture(points)[LANDMARKS.index(name)]
    return found[np.linalg.norm(found - at, axis=1) > 19]


def test_names_stand_beside_their_landmarks_and_off_the_head() -> None:
    picture, points = draw(), in_picture(LANDMARKS_PX)
    for name, point in zip(LANDMARKS, points, strict=True):
        letters = name_at(picture, name, LANDMARKS_PX)
        assert len(letters) > 30 and np.linalg.norm(letters - point, axis=1).max() < 80
    assert ((name_at(picture, "FH1", LANDMARKS_PX) - points[2]) @ outward(points)).min() > 5


@pytest.mark.parametrize("name", LANDMARKS)
def test_names_leave_the_marks_of_the_image_free(name: str) -> None:
    grey = blank() * 0
    before = name_at(draw(grey), name, LANDMARKS_PX)
    left, top = ((before.min(axis=0) + 0.5) * 256 / SHORTEST).astype(int) - 1
    right, bottom = ((before.max(axis=0) + 0.5) * 256 / SHORTEST).astype(int) + 1
    grey[top : bottom + 1 : 2, left : right + 1] = 230  # such as a caliper's text
    after = name_at(draw(grey), name, LANDMARKS_PX)
    inside = (after >= before.min(axis=0)) & (after <= before.max(axis=0))
    assert len(after) > 30 and not inside.all(axis=1).any()


def test_names_do_not_overlap_each_other_near_a_border() -> None:
    for points in ([[115, 3], [40, 5], [250, 130]], [[252, 30], [170, 36], [240, 130]]):
        picture = draw(points=np.array(points))
        for name in LANDMARKS:
            assert len(name_at(picture, name, points)) > 30


# ---- Landmarks outside the image


@pytest.mark.parametrize(
    ("name", "point", "tip"),
    [
        ("FH1", [300, 180], [255, 140.6]),
        ("FH1", [140, 4000], [140, 255]),
        ("FH1", [1e9, 4e8 + 40], [255, 86]),
        ("PS2", [-20, 60], [0, 57.5]),
        ("PS1", [128, -30], [128, 0]),
    ],
)
def test_what_is_outside_is_an_arrow_at_the_border(name: str, point: list, tip: list) -> None:
    points = LANDMARKS_PX.copy()
    points[LANDMARKS.index(name)] = point
    picture = draw(points=points)
    at = in_picture([tip])[0]
    y, x = np.nonzero(near(picture[:SHORTEST], COLOURS[name]))
    mark = np.linalg.norm(np.column_stack([x, y]) - at, axis=1)
    assert (mark < 16).sum() > 20 and mark.min() < 3
    assert (mark > 16).sum() > 150  # its name and "outside"
    inside = draw(points=np.clip(points, 2, 253))
    assert near(inside, COLOURS[name]).sum() < 0.75 * len(x)  # the name alone


def test_lines_do_not_leave_the_image() -> None:
    points = np.array([[30, 60], [10, 60], [200, 100]])
    picture = draw(blank(256, 64), points)
    assert picture.shape[1] == NARROWEST
    beside = picture[:SHORTEST, 160:]
    assert not has(beside, WHITE).any()  # but for the names
    assert near(beside, COLOURS["FH1"]).sum() > 100


# ---- Doubt


def framed(picture: np.ndarray, height: int) -> bool:
    edges = picture[0], picture[height - 1], picture[:height, 0], picture[:height, -1]
    return all(has(edge, DOUBT).all() for edge in edges)


@pytest.mark.parametrize("more", [{"reasons": REASONS}, {"doubtful": True}])
def test_only_doubt_puts_a_frame_and_words(more: dict) -> None:
    sure, doubtful = draw(), draw(**more)
    assert not has(sure, DOUBT).any() and framed(doubtful, SHORTEST)
    banner = doubtful[SHORTEST : SHORTEST + len(doubtful) - len(sure)]
    assert has(banner, DOUBT).mean() > 0.75
    assert has(banner, (0, 0, 0)).sum() > 300  # black on orange, readable without colours
    assert np.array_equal(doubtful[SHORTEST + len(banner) :], sure[SHORTEST:])


def test_every_reason_is_written() -> None:
    heights = [len(strip(reasons=REASONS[:1] * k)) for k in (1, 2, 3, 4)]
    assert len({b - a for a, b in pairwise(heights)}) == 1 and heights[0] < heights[1]
    assert not np.array_equal(strip(reasons=["PS1 is here"]), strip(reasons=["PS2 is here"]))


@pytest.mark.parametrize("size", [(256, 256), (300, 200), (64, 300), (900, 500), (4000, 200)])
def test_the_frame_covers_nothing_of_the_image(size: tuple) -> None:
    """A white edge all around the image is still there, at equal widths."""
    width, height = size
    grey = blank(height, width)
    edge = max(2, max(size) // 100)
    grey[:edge] = grey[-edge:] = grey[:, :edge] = grey[:, -edge:] = 255
    frame, entry = answered(grey, np.array([width, height]) * LANDMARKS_PX / 256, doubtful=True)
    part = crop_text_strip(overlay_picture(frame, entry), entry)
    margin = round(FRAME * max(part.shape) / 640)
    assert framed(part, len(part))
    inner = part[margin:-margin, margin:-margin]
    assert (inner[0, : max(5, inner.shape[1] // 10)] > 200).all()
    rows = np.flatnonzero((inner[:, 1] > 200).all(axis=-1))
    columns = np.flatnonzero((inner[1] > 200).all(axis=-1))
    shown = columns[-1] + 1, rows[-1] + 1
    assert shown[0] / shown[1] == pytest.approx(width / height, rel=0.02)


# ---- Words below the image


@pytest.mark.parametrize("size", [(256, 256), (1024, 1024), (40, 60), (4000, 3000), (40, 900)])
def test_words_are_large_enough_and_inside(size: tuple) -> None:
    width, height = size
    more = {"reasons": ["word " * 60, "w" * 300], "spacing_mm": (0.2, 0.2), "frame": 12345}
    points = LANDMARKS_PX * np.array(size) / 256
    frame, entry = answered(blank(height, width), points, **more, **CALIBRATED, file="ab/" * 99)
    picture = overlay_picture(frame, entry)
    words = picture[len(crop_text_strip(picture, entry)) :]
    lit = np.abs(words.astype(int) - words[:, :1]).max(axis=2) > 100
    assert not lit[:, :4].any() and not lit[:, -4:].any() and not lit[-2:].any()  # none is cut off
    lines = np.flatnonzero(np.diff(np.r_[0, lit.any(axis=1), 0])).reshape(-1, 2)
    lines = lines[np.diff(lines)[:, 0] > 2]
    assert len(lines) > 9
    least = max(0.014 * picture.shape[1], 9)
    assert np.median(np.diff(lines)) >= least


def test_what_is_said_of_a_case() -> None:
    base = strip(**CALIBRATED)
    for other in (
        {"aop_deg": 87.2},
        {"aop_interval_deg": (95.0, 108.0)},
        {"aop_interval_deg": (94.0, 109.0)},
        {"aop_interval_deg": None},
        {"expected_error_mm": CALIBRATED["expected_error_mm"] | {"FH1": 3.1}},
        {"expected_error_mm": None},  # then in px
        {"expected_aop_error_deg": 4.3},
        {"confidence": {"PS1": 0.9, "PS2": 0.8, "FH1": 0.6}},
        {"file": "b.png"},
        {"frame": 0},
    ):
        assert not np.array_equal(base, strip(**CALIBRATED | other)), other
    assert np.array_equal(base, strip(**CALIBRATED | {"expected_error_px": None}))
    bare = strip()
    assert len(bare) < len(base) and len(strip(expected_aop_error_deg=4.0)) == len(base)
    assert not np.array_equal(strip(frame=1), strip(frame=2))


def test_confidence_is_not_rounded_to_certainty() -> None:
    def said(confidence: float) -> np.ndarray:
        return strip(confidence=dict.fromkeys(LANDMARKS, confidence))

    assert np.array_equal(said(0.997), said(0.99)) and np.array_equal(said(0.999999), said(0.99))
    assert not np.array_equal(said(1.0), said(0.99))
    assert np.array_equal(said(0.629), said(0.63))


def test_research_use_is_said_at_the_right_end_whatever_the_file() -> None:
    wide = text_width("research use only", 15)
    corners = []
    for name in ("a.png", "long/" * 60):
        last = strip(file=name)[-30:]
        assert has(last[:, -wide - 8 :], PALE).sum() > 150
        assert not last[:, -wide - 18 : -wide - 10].any()  # clear of the name
        corners.append(last[:, -wide - 8 :])
    assert np.array_equal(*corners)


def test_long_names_are_shortened_in_the_middle() -> None:
    name = "study/" * 30 + "0007.mha"
    short = shorten_text(name, 200, 15)
    first, last = short.split("…")
    assert name.startswith(first) and name.endswith(last) and min(len(first), len(last)) > 7
    assert text_width(short, 15) <= 200
    assert text_width(f"{name[: len(first) + 1]}…{name[-len(last) - 1 :]}", 15) > 200
    assert shorten_text("a.png", 200, 15) == "a.png" and shorten_text("w" * 50, 5, 15) == "…"


@pytest.mark.parametrize(
    "name", ["日本語" * 40, "a\nb\tc\r\x00\u202e\u200b", "lone \udcff\ud800", "😀ع" * 50, " ", ""]
)
def test_odd_names_stay_in_their_line(name: str) -> None:
    plain, odd = strip(), strip(file=name)
    assert odd.shape == plain.shape and np.array_equal(odd[:-30], plain[:-30])
    assert np.array_equal(odd[:, -140:], plain[:, -140:])


def scale_bar(picture: np.ndarray) -> int:
    """The length in px of the scale bar: the longest white run in a row."""
    longest = 0
    for row in has(picture, WHITE):
        ends = np.flatnonzero(np.diff(np.r_[0, row, 0])).reshape(-1, 2)
        longest = max([longest, *(end - start for start, end in ends.tolist())])
    return longest


@pytest.mark.parametrize("doubtful", [False, True])
@pytest.mark.parametrize(
    ("size", "spacing", "mm"),
    [
        ((256, 256), (0.5, 0.5), 20),
        ((256, 256), (0.03, 0.03), 1),
        ((500, 400), (0.4, 0.4), 20),
        ((500, 200), (0.1, 0.35), 5),
        ((4000, 3000), (0.05, 0.05), 20),
        ((40, 60), (300.0, 300.0), 2000),
        ((40, 200), (1.0, 1.0), 20),
        ((256, 256), (3e-7, 3e-7), 1e-5),
    ],
)
def test_scale_bar(size: tuple, spacing: tuple, mm: float, doubtful: bool) -> None:
    grey = blank(size[1], size[0]) * 0
    edge = max(1, size[0] // 60)
    grey[:, :edge] = grey[:, -edge:] = 255  # shows how wide the image is drawn
    frame, entry = answered(grey, spacing_mm=spacing, doubtful=doubtful)
    picture = overlay_picture(frame, entry)
    part = crop_text_strip(picture, entry)
    lit = np.flatnonzero((part[-round(20 * max(part.shape) / 640)] > 200).all(axis=-1))
    width = lit[-1] - lit[0] + 1
    expected = mm / spacing[0] / size[0] * width
    assert scale_bar(picture[len(part) :]) == pytest.approx(expected, rel=0.03, abs=2.5)
    assert picture.shape[1] / 16 < expected < picture.shape[1] / 5.9
    without = overlay_picture(*answered(grey, doubtful=doubtful))
    assert scale_bar(without[len(crop_text_strip(without, entry)) :]) < picture.shape[1] / 30


# ---- Sizes


@pytest.mark.parametrize(
    ("size", "spacing", "expected"),
    [
        ((256, 256), None, (640, 640)),
        ((700, 500), None, (700, 500)),
        ((1024, 768), None, (1024, 768)),
        ((2000, 1000), None, (LONGEST, 640)),
        ((512, 256), (0.1, 0.2), (640, 640)),
        ((256, 512), (0.1, 0.2), (NARROWEST, 640)),
        ((64, 512), None, (NARROWEST, 640)),
        ((512, 40), None, (640, LOWEST)),
        ((300, 200), (0.2, 0.3), (640, 640)),
    ],
)
@pytest.mark.parametrize("doubtful", [False, True])
def test_sizes_and_square_pixels(
    size: tuple, spacing: tuple | None, expected: tuple, doubtful: bool
) -> None:
    frame, entry = answered(blank(size[1], size[0]), spacing_mm=spacing, doubtful=doubtful)
    picture = overlay_picture(frame, entry)
    part = crop_text_strip(picture, entry)
    assert part.shape[1::-1] == expected and np.array_equal(part, picture[: len(part)])
    assert framed(part, len(part)) == doubtful and len(picture) > len(part) + 50


def test_unequal_spacing_shows_the_angle_that_is_measured() -> None:
    shape, points = (0.1, 0.25), LANDMARKS_PX * [2, 1]
    picture = draw(blank(200, 500), points, spacing_mm=shape)
    assert picture.shape[1] == 640
    expected = (points + 0.5) * [640 / 500, 640 / 200] - 0.5
    found = [ring(picture, name, at) for name, at in zip(LANDMARKS[:2], expected[:2], strict=True)]
    tick = np.column_stack(np.nonzero(near(picture[:640], COLOURS["FH1"]))[::-1])
    close = tick[np.linalg.norm(tick - expected[2], axis=1) < RING + 3]
    fh1 = close.mean(axis=0) - (RING + 1) * outward(expected)
    measured = angle_of_progression(points, shape)
    assert angle_of_progression([*found, fh1]) == pytest.approx(measured, abs=1.5)
    assert abs(measured - angle_of_progression(points)) > 10


@pytest.mark.parametrize(
    "points",
    [
        [[30, 20], [30, 20], [30, 20]],
        [[30, 20], [30, 20], [90, 100]],
        [[30.2, 20], [30, 20], [30, 20.1]],
        [[128, 60], [60, 60], [200, 60]],
        [[-300, -200], [400, 900], [128, 128]],
        [[1e12, -1e12], [-1e15, 3], [1e300, 1e300]],
        [[255.5, 255.5], [-0.5, -0.5], [255.5, -0.5]],
    ],
)
@pytest.mark.parametrize("spacing", [None, (1e-6, 1e6), (3e5, 1e-5)])
def test_landmarks_anywhere(points: list, spacing: tuple | None) -> None:
    picture = draw(points=np.array(points, float), reasons=REASONS, spacing_mm=spacing)
    assert NARROWEST <= picture.shape[1] <= SHORTEST and has(picture, DOUBT).any()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 40_000), (40_000, 32), (33, 1300)])
def test_any_aspect_ratio(height: int, width: int) -> None:
    picture = draw(blank(height, width), reasons=REASONS)
    assert NARROWEST <= picture.shape[1] <= LONGEST and len(picture) > LOWEST


def test_grey_values_of_either_type_look_the_same() -> None:
    grey = phantom(1, 300, 200).image
    assert np.array_equal(draw(grey), draw(grey.astype(np.float32)))
    dark, bright = draw(np.full((256, 256), -9.0, np.float32)), draw(blank() * np.float32(0) + 300)
    assert dark[600, 5].max() == 0 and bright[600, 5].min() == 255


def test_png_loses_nothing() -> None:
    for picture in (draw(phantom(2).image, reasons=REASONS), phantom(2).image):
        decoded = cv2.imdecode(np.frombuffer(encode_png(picture), np.uint8), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(decoded, picture)


def test_a_failed_case_has_no_picture() -> None:
    frame, entry = answered(blank())
    with pytest.raises(AssertionError):
        overlay_picture(frame, failed_entry(entry, "no"))


def test_width_of_a_text_is_that_of_its_pixels() -> None:
    picture = blank(60, 400)[..., None].repeat(3, axis=2) * 0
    put_text(picture, "AoP 121.3°", np.array([20, 40]), 26, WHITE)
    columns = np.flatnonzero(picture.any(axis=(0, 2)))
    assert text_width("AoP 121.3°", 26) == pytest.approx(np.ptp(columns), abs=4)
    assert 20 <= columns[0] <= 23 and text_width("AoP 121.3°", 13) < 0.6 * np.ptp(columns)


@pytest.mark.real
def test_real_heads_keep_their_contour(psfhs: Path) -> None:
    """With the labelled landmarks. The picture has 2.5 px for each px of the image."""
    with (psfhs / "cases.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "val"][::3]
    at_fh1, along = [], []
    for row in rows:
        grey = cv2.imread(str(psfhs / "images" / row["Filename"]), cv2.IMREAD_GRAYSCALE)
        mask = cv2.imread(str(psfhs / "masks" / row["Filename"]), cv2.IMREAD_GRAYSCALE)
        points = np.array([literal_eval(row[name]) for name in LANDMARKS])
        plain = cv2.resize(grey, (640, 640), interpolation=cv2.INTER_CUBIC)[..., None]
        changed = (np.abs(draw(grey, points)[:640].astype(int) - plain) > 20).any(axis=-1)
        contour = in_picture(outer_contour(mask, HEAD).reshape(-1, 2))
        x, y = np.clip(np.rint(contour), 0, 639).astype(int).T
        close = np.linalg.norm(contour - in_picture(points)[2], axis=1) < RING - 2
        at_fh1 += changed[y, x][close].tolist()
        along.append(changed[y, x].mean())
    assert len(rows) > 40 and len(at_fh1) > 50
    assert np.mean(at_fh1) < 0.03 and np.mean(along) < 0.035 and max(along) < 0.1


def test_drawing_needs_no_simpleitk_and_no_torch() -> None:
    code = "import sys, model.drawing.overlay; print({'torch', 'SimpleITK'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "set()\n"
