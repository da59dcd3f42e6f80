"""The summary of a loop, and what must be visible on its contact sheet."""

import subprocess
import sys
import tracemalloc
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from model.anatomy import LANDMARKS
from model.drawing.contact_sheet import (
    CURVE_HEIGHT,
    DARK,
    GREY,
    MOST_TILES,
    TILE_LABEL,
    TITLE_HEIGHT,
    WIDEST_SHEET,
    LoopSummary,
)
from model.drawing.overlay import COLOURS, encode_png, overlay_picture
from model.drawing.text import DOUBT, WHITE, Picture
from model.frame import Geometry
from model.images.source import GreyFrame
from model.results.schemas import CaseEntry, Loop, points_by_name
from test.model.test_overlay import has
from test.phantom import phantom

WIDTH, HEIGHT = 64, 48  # px of a frame; its overlay has 640 x 480 px and text below
FOOT = TILE_LABEL + 5  # px of a tile below its picture


def failed(frame: int) -> CaseEntry:
    return CaseEntry(case="a", file="a.mha", frame=frame, status="failed", error="no")


def entry(
    frame: int, aop_deg: float = 120.0, sure: float = 0.5, doubtful: bool = False, **more
) -> CaseEntry:
    """`sure` is the lowest of the three confidences."""
    confidence = {"PS1": 0.99, "PS2": sure, "FH1": (1 + sure) / 2}
    known = {"case": "a", "file": "a.mha", "frame": frame, "status": "ok", "aop_deg": aop_deg}
    known |= {"width": WIDTH, "height": HEIGHT, "confidence": confidence, "doubtful": doubtful}
    return CaseEntry(**known | more)


def colour_of(frame: int) -> tuple[int, int, int]:
    return frame % 200 + 20, frame // 200 + 20, 77


def flat(frame: int) -> Picture:
    """An overlay in the frame's own colour, above white words."""
    picture = np.full((520, 640, 3), 255, np.uint8)
    picture[:480] = colour_of(frame)
    return picture


def told(
    entries: Iterable[CaseEntry], frames: int, drawn: Sequence[int] = range(99)
) -> LoopSummary:
    """Their summary. Drawing takes time, so only the `drawn` frames get an overlay of their own."""
    summary, other = LoopSummary("a", "a.mha", frames), flat(-1)
    for k, one in enumerate(entries):
        summary.add(one, None if one.status == "failed" else flat(k) if k in drawn else other)
    return summary


def sheet_of(summary: LoopSummary) -> Picture:
    data = summary.contact_sheet()
    assert data is not None
    sheet = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert sheet.shape[1] <= WIDEST_SHEET and sheet.shape[0] <= 2200 and sheet.shape[2] == 3
    return sheet


def tiles(sheet: Picture, columns: int, rows: int) -> list[Picture]:
    """In reading order."""
    middle = sheet[TITLE_HEIGHT:-CURVE_HEIGHT]
    assert len(middle) % rows == 0 and middle.shape[1] % columns == 0
    return [tile for row in np.split(middle, rows) for tile in np.split(row, columns, axis=1)]


def centre(tile: Picture) -> tuple[int, ...]:
    return tuple(tile[len(tile) // 2 - 50, tile.shape[1] // 2].tolist())


def column(frame: int, frames: int, width: int) -> int:
    """The x at which a frame lies on the curve."""
    return round(74 + (width - 156) * frame / (frames - 1))


def test_numbers() -> None:
    angles = [None, 121.5, 99.25, None, 130.0, 121.5, 140.0, 99.25]
    sure = [0, 0.5, 0.7, 0, 0.9, 0.9, 0.1, 0.8]
    summary = LoopSummary("a", "b.mha", len(angles))
    for k, (angle, lowest) in enumerate(zip(angles, sure, strict=True)):
        summary.add(failed(k) if angle is None else entry(k, angle, lowest, k in (2, 6, 7)), None)
    assert summary.summary() == Loop(
        case="a",
        file="b.mha",
        frames=8,
        answered=6,
        aop_deg=angles,
        median_aop_deg=121.5,
        median_frame=1,
        most_confident_frame=4,
        doubtful_frames=3,
    )
    assert summary.contact_sheet() is None  # without pictures


def test_median_is_the_angle_of_a_frame() -> None:
    loop = told([entry(0, 130.0), entry(1, 100.0), entry(2, 110.0), entry(3, 120.0)], 4).summary()
    assert (loop.median_aop_deg, loop.median_frame) == (110.0, 2)


def test_the_lowest_confidence_counts() -> None:
    high = {"confidence": {"PS1": 1.0, "PS2": 1.0, "FH1": 0.3}}
    assert told([entry(0, sure=0.4), entry(1, **high)], 2).summary().most_confident_frame == 0


@pytest.mark.parametrize("entries", [[], [failed(0), failed(1), failed(2)]])
def test_loops_that_failed(entries: list) -> None:
    summary = told(entries, 3)
    loop = summary.summary()
    assert loop.aop_deg == [None] * 3 and (loop.answered, loop.doubtful_frames) == (0, 0)
    assert {loop.median_aop_deg, loop.median_frame, loop.most_confident_frame} == {None}
    assert summary.contact_sheet() is None


def test_frames_that_were_never_told_of_failed() -> None:
    summary = told([entry(0, 100.0)], 3)
    assert summary.summary().aop_deg == [100.0, None, None]
    assert [centre(tile) for tile in tiles(sheet_of(summary), 3, 1)] == [colour_of(0), DARK, DARK]
    summary = told([entry(0), entry(1)], 2)
    with pytest.raises(IndexError):
        summary.add(entry(2), None)


def test_schema_is_strict() -> None:
    known = told([entry(0, 100.0), failed(1)], 2).summary()
    assert Loop.model_validate_json(known.model_dump_json()) == known
    for wrong in ({"aop_deg": [float("nan"), None]}, {"median_aop_deg": float("inf")}, {"x": 1}):
        with pytest.raises(ValidationError):
            Loop(**known.model_dump() | wrong)
    with pytest.raises(ValidationError):
        known.frames = 3


@pytest.mark.parametrize(
    ("frames", "surest", "columns", "rows", "expected"),
    [
        (2, 1, 2, 1, [0, 1]),
        (3, 0, 3, 1, [0, 1, 2]),
        (6, 5, 3, 2, range(6)),
        (7, 2, 4, 2, range(7)),
        (20, 3, 5, 4, range(20)),
        (21, 5, 5, 4, [0, 1, 2, 4, *range(5, 10), 11, 12, 13, 14, 15, 16, 18, 19, 20]),
        (35, 1, 5, 4, [0, 1, *range(2, 35, 2)]),
        (35, 34, 5, 4, range(0, 35, 2)),
        (341, 170, 5, 4, [*range(0, 161, 20), 170, *range(180, 341, 20)]),
        (10_000, 9998, 5, 4, [*(round(9999 * k / 17) for k in range(17)), 9998, 9999]),
    ],
)
def test_frames_from_all_over_the_loop_and_the_most_confident(
    frames: int, surest: int, columns: int, rows: int, expected: Iterable[int]
) -> None:
    sure = [0.9 if k == surest else 0.3 + k % 9 / 20 for k in range(frames)]
    shown = list(expected)
    told_all = told((entry(k, sure=sure[k]) for k in range(frames)), frames, shown)
    cells = tiles(sheet_of(told_all), columns, rows)
    assert len(shown) <= MOST_TILES
    empty = [(0, 0, 0)] * (len(cells) - len(shown))
    assert [centre(tile) for tile in cells] == [*map(colour_of, shown), *empty]
    framed = [has(tile[1], WHITE)[1:-1].all() for tile in cells]
    assert np.flatnonzero(framed).tolist() == [shown.index(surest)]
    ends = [tuple(tile[-FOOT - 1, tile.shape[1] // 2].tolist()) for tile in cells[: len(shown)]]
    assert ends == [*map(colour_of, shown)]  # the words of the overlay are cut off


@pytest.mark.slow
def test_memory_does_not_grow_with_the_frames() -> None:
    picture = flat(0)

    def peak(frames: int) -> int:
        tracemalloc.start()
        summary = LoopSummary("a", "a.mha", frames)
        for k in range(frames):  # every fourth is the most confident yet
            summary.add(entry(k, 90 + k % 70, k / frames if k % 4 == 0 else 0), picture)
        kept = tracemalloc.get_traced_memory()[1]
        assert summary.contact_sheet() and summary.summary().answered == frames
        sheet = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return np.array([kept, sheet])

    peak(2)  # what is made once
    short, long = peak(50), peak(2000)
    assert (long - short < [64 * 2000, 512 * 2000]).all()


def test_tile_of_a_failed_frame() -> None:
    for gone in ({7}, {0, 1, 7}):
        sheet = sheet_of(told((failed(k) if k in gone else entry(k) for k in range(20)), 20))
        for k, tile in enumerate(tiles(sheet, 5, 4)):
            assert (tuple(tile[5, 5].tolist()) == DARK) == (k in gone)
            dark = has(tile[5:-FOOT], DARK)
            if k in gone:
                y, x = np.nonzero(tile.max(axis=2) > 100)
                assert 40 < np.ptp(x) < 150 and 8 < np.ptp(y) < 20
                assert abs((x.min() + x.max()) / 2 - tile.shape[1] / 2) < 5
                assert dark.sum() > 0.95 * 310 * 232
            else:
                assert not dark.any()


def label(tile: Picture) -> Picture:
    """The two lines of text below a tile's picture, within the tile's border."""
    return tile[1 - FOOT : -4, 4:-4]


def test_words_are_orange_where_the_frame_is_doubtful() -> None:
    sheet = sheet_of(told((entry(k, sure=1 - k / 10, doubtful=k % 2 == 1) for k in range(6)), 6))
    for k, tile in enumerate(tiles(sheet, 3, 2)):
        orange, white = (has(label(tile), colour).sum() for colour in (DOUBT, WHITE))
        assert orange > 100 and white == 0 if k % 2 else white > 100 and orange == 0


def test_words_say_frame_and_angle() -> None:
    one, other = (
        tiles(sheet_of(told([entry(0, 100.0), entry(1, aop), entry(2)], 3)), 3, 1)
        for aop in (121.3, 121.4)
    )
    same = [np.array_equal(a, b) for a, b in zip(one, other, strict=True)]
    assert same == [True, False, True]
    labels = [label(tile) for tile in one]
    assert not np.array_equal(labels[1], labels[2])  # the number of the frame


def remarks(tile: Picture) -> np.ndarray:
    """The pixels of letters in the second line."""
    return label(tile)[label(tile).shape[0] // 2 + 1 :].max(axis=2) > 100


def angles_of(frames: int, median: int) -> list[float]:
    """Angles whose median is that of one frame; exactly one of `frames` and `median` is odd."""
    angles = [90.0 if k % 2 else 150.0 for k in range(frames)]
    angles[median] = 120.0
    return angles


def test_tiles_name_the_median_the_most_confident_and_the_doubtful() -> None:
    angles = angles_of(7, 2)
    entries = [entry(k, a, 0.9 if k == 4 else 0.1, k in (1, 4)) for k, a in enumerate(angles)]
    cells = tiles(sheet_of(told(entries, 7)), 4, 2)[:7]
    assert [remarks(cell).any() for cell in cells] == [k in (1, 2, 4) for k in range(7)]
    widths = [np.ptp(np.nonzero(remarks(cells[k]))[1]) for k in (1, 2, 4)]
    assert widths[1] < widths[0] < widths[2]  # median; NOT SURE; most confident, NOT SURE
    for frame, colour in ((2, GREY), (4, WHITE)):
        framed = [has(cell[1], colour)[1:-1].all() for cell in cells]
        assert np.flatnonzero(framed).tolist() == [frame]


@pytest.mark.parametrize("surest", [30, 31, 60])
def test_the_median_frame_has_a_tile(tmp_path: Path, surest: int) -> None:
    frames, median = 98, 31

    def written(frame: int) -> Path:
        return tmp_path / f"{frame}.png"

    angles = angles_of(frames, median)
    summary = told((entry(k, a, k == surest) for k, a in enumerate(angles)), frames)
    assert summary.summary().median_frame == median
    regular = {round(97 * k / 17) for k in range(18)} | {surest}
    for content in (None, b"", b"no picture", encode_png(flat(median))):
        if content is not None:
            written(median).write_bytes(content)
        is_there = surest == median or (content or b"")[1:4] == b"PNG"
        shown = sorted(regular | {median} if is_there else regular)
        data = summary.contact_sheet(written)
        cells = tiles(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), 5, 4)
        assert [centre(cell) for cell in cells[: len(shown)]] == [*map(colour_of, shown)]
        if is_there:
            tile = cells[shown.index(median)]
            assert tuple(tile[-FOOT - 1, tile.shape[1] // 2].tolist()) == colour_of(median)
            assert has(tile[1], WHITE if surest == median else GREY)[1:-1].all()
    assert summary.contact_sheet() is not None


@pytest.mark.slow
@pytest.mark.parametrize("frames", [2, 20, 16_384])
def test_longest_words_fit(frames: int) -> None:
    last = frames - 1
    entries = (entry(k, 179.9, 0.9 if k == last - 1 else 0.1, True) for k in range(frames))
    sheet = sheet_of(told(entries, frames))
    shown = min(frames, 19)  # the median frame, of frames alike, is the first
    for cell in tiles(sheet, 2 if frames == 2 else 5, 1 if frames == 2 else 4)[:shown]:
        assert has(label(cell), DOUBT).any()
        assert not label(cell)[:, [0, 1, 2, -3, -2, -1]].any()
    title, curve = sheet[:TITLE_HEIGHT], sheet[-CURVE_HEIGHT:]
    assert title.any() and not title[:, -4:].any() and not title[-4:].any()
    assert not curve[:, :3].any() and not curve[:, -3:].any() and not curve[-8:].any()


def test_title_counts() -> None:
    def title(*entries: CaseEntry) -> Picture:
        return sheet_of(told(entries, 3))[:TITLE_HEIGHT]

    base = title(entry(0), entry(1), entry(2))
    others = [
        title(entry(0), entry(1), entry(2, doubtful=True)),
        title(entry(0), entry(1), failed(2)),
        title(entry(0), entry(1, sure=0.6), entry(2)),
        title(entry(0), entry(1, 119.0), entry(2, 119.0)),
    ]
    assert not any(np.array_equal(base, other) for other in others)
    assert np.array_equal(base, title(entry(0), entry(1), entry(2, 121.0)))


def test_curve_has_a_gap_where_frames_failed() -> None:
    gone = {0, 1, 12, 13, 14, 15, 25}
    entries = (failed(k) if k in gone else entry(k, sure=0.1 + k / 40) for k in range(30))
    sheet = sheet_of(told(entries, 30))
    width = sheet.shape[1]
    line = (sheet[-CURVE_HEIGHT:] > GREY[0] + 30).all(axis=2).any(axis=0)  # brighter than the axes
    for first, last in ((2, 11), (16, 24)):
        assert line[column(first, 30, width) : column(last, 30, width) + 1].all()
    for first, last in ((0, 2), (11, 16), (24, 26)):
        assert not line[column(first, 30, width) + 3 : column(last, 30, width) - 2].any()


def test_a_lone_frame_between_failed_ones_is_a_dot() -> None:
    entries = (
        entry(k, 90.0 + k, 0.9 if k == 0 else 0.1) if k % 4 == 0 else failed(k) for k in count()
    )
    sheet = sheet_of(told((one for _, one in zip(range(9), entries, strict=False)), 9))
    white = has(sheet[-CURVE_HEIGHT:], WHITE)
    for k in (4, 8):
        x = column(k, 9, sheet.shape[1])
        assert 9 <= white[:, x - 6 : x + 7].sum() <= 25


def test_points_of_the_curve_stand_for_their_angles() -> None:
    angles = [100.0, 131.0, 108.0, 117.0, 100.0]
    sheet = sheet_of(told((entry(k, a, 0.5, 0 < k < 4) for k, a in enumerate(angles)), 5))
    curve = sheet[-CURVE_HEIGHT:]
    parts = cv2.connectedComponentsWithStats(has(curve, DOUBT).astype(np.uint8))[3][1:]
    x, y = parts[np.argsort(parts[:, 0])].T
    assert np.abs(x - [column(k, 5, sheet.shape[1]) for k in (1, 2, 3)]).max() < 0.6
    assert (y[0] - y[1]) / (y[0] - y[2]) == pytest.approx(23 / 14, abs=0.02) and y[0] < y[1]
    lines = np.flatnonzero(has(curve, GREY).sum(axis=1) > 0.8 * sheet.shape[1])
    assert lines.tolist() == [round(y[1])]  # the median is that of frame 2


def test_the_most_confident_frame_is_ringed() -> None:
    sheets = [
        sheet_of(told((entry(k, 120.0 + k, 0.9 if k == best else 0.1) for k in range(9)), 9))
        for best in (2, 6)
    ]
    first, second = (has(sheet[-CURVE_HEIGHT:], WHITE).sum(axis=0) for sheet in sheets)
    for best, more, less in ((2, first, second), (6, second, first)):
        x = column(best, 9, sheets[0].shape[1])
        assert more[x - 12 : x + 13].sum() > less[x - 12 : x + 13].sum() + 60


@pytest.mark.parametrize("angles", [[0.0, 0.0], [180.0, 180.0], [0.0, 180.0], [57.1, 57.1]])
def test_axis_encloses_any_angles(angles: list) -> None:
    sheet = sheet_of(told((entry(k, a, doubtful=True) for k, a in enumerate(angles)), 2))
    curve = has(sheet[-CURVE_HEIGHT:], DOUBT)
    for k in range(2):
        x = column(k, 2, sheet.shape[1])
        rows = np.flatnonzero(curve[:, x])
        assert len(rows) == 7 and 15 < rows[0] < rows[-1] < CURVE_HEIGHT - 35
        if angles[0] == angles[1] != 57.1:  # the axis ends there
            assert rows[3] == (CURVE_HEIGHT - 40 if angles[0] == 0 else 20)


def real(frame: int, width: int, height: int, doubtful: bool = False) -> tuple:
    """A frame's entry and its true overlay."""
    made = phantom(frame, width, height)
    confidence = dict.fromkeys(LANDMARKS, 0.8)
    one = entry(
        frame,
        made.aop_deg,
        doubtful=doubtful,
        width=width,
        height=height,
        landmarks_px=points_by_name(made.landmarks_px),
        confidence=confidence,
        reasons=["the head is a word " * 20] * doubtful,
    )
    return one, overlay_picture(GreyFrame(made.image, frame, frame, Geometry()), one)


@pytest.mark.parametrize(
    ("size", "height"),
    [((256, 256), 480), ((320, 240), 360), ((2000, 50), 160), ((50, 2000), 480), ((40, 60), 480)],
)
def test_overlays_of_any_shape(size: tuple, height: int) -> None:
    summary = LoopSummary("a", "a.mha", 3)
    for k in range(3):
        summary.add(*real(k, *size, doubtful=k == 1))
    sheet = sheet_of(summary)
    assert sheet.shape == (TITLE_HEIGHT + height + TILE_LABEL + 10 + CURVE_HEIGHT, 3 * 490, 3)
    for k, tile in enumerate(tiles(sheet, 3, 1)):
        picture = tile[5 : 5 + height].astype(int)
        orange = (np.abs(picture - DOUBT).max(axis=2) < 30).sum()
        assert orange > 300 if k == 1 else orange == 0  # the overlay's own frame
        if size[0] == 256:
            for colour in COLOURS.values():
                assert (np.abs(picture - colour).max(axis=2) < 40).sum() > 10


def test_pages_of_several_sizes() -> None:
    summary = LoopSummary("a", "a.tif", 4)
    for k, size in enumerate([(256, 256), (300, 100), (100, 300), (700, 500)]):
        summary.add(*real(k, *size, doubtful=True))  # the orange frame shows its size
    heights = []
    for tile in tiles(sheet_of(summary), 4, 1):
        assert tile.shape[:2] == (390 + TILE_LABEL + 10, 400)
        rows = np.flatnonzero(tile[5:-FOOT, 5:-5].any(axis=(1, 2)))
        heights.append(int(np.ptp(rows)) + 1)
        assert abs(rows[0] + rows[-1] - 389) <= 1
    assert heights == [390, 130, 390, 279]


def test_a_sheet_needs_no_simpleitk_and_no_torch() -> None:
    code = (
        "import sys, model.drawing.contact_sheet; print({'torch', 'SimpleITK'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "set()\n"
