"""A stack or cine loop as a whole: its summary for results.json, and its contact sheet."""

import statistics
from array import array
from collections.abc import Callable
from math import ceil, inf, nan
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from model.anatomy import Floats
from model.drawing import overlay
from model.drawing.text import BLACK, DOUBT, WHITE, Colour, Picture, put_text, text_width
from model.results.schemas import CaseEntry, Loop

MOST_TILES, MOST_COLUMNS = 20, 5  # on one sheet
# Sizes in px.
WIDEST_SHEET, WIDEST_TILE = 1600, 490
TILE_GAP, TILE_LABEL = 10, 44  # between tiles; height of the two lines of text below each picture
TITLE_HEIGHT, CURVE_HEIGHT = 74, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 70, 20, 40  # margins around the curve
LETTERS, LARGE_LETTERS = 14, 26
DARK, DIM, GREY = (40, 40, 40), (60, 60, 60), (170, 170, 170)  # BGR


class LoopSummary:
    """Collects the frames of a loop in turn, in memory that hardly grows with their number.

    It keeps a few numbers of each frame, and the pictures of those that the contact sheet shows.
    If several frames could be the median or the most confident one, the first of them is.

    Args:
        frames: number of frames in the file. A frame that is never added counts as failed.
    """

    def __init__(self, case: str, file: str, frames: int) -> None:
        self._case, self._file, self._frames = case, file, frames
        self._angles, self._doubtful = array("d", [nan]) * frames, bytearray(frames)
        self._heights = array("H", [0]) * frames  # px of the overlays without their text
        self._added = 0
        self._surest, self._confidence = -1, -inf
        # In a longer loop, two tiles stay free for the most confident and the median frame, which
        # are known only at the end.
        regular = np.linspace(0, frames - 1, frames if frames <= MOST_TILES else MOST_TILES - 2)
        self._regular = frozenset(regular.round().astype(int).tolist())
        tiles = min(frames, MOST_TILES)
        self._columns = ceil(tiles / ceil(tiles / MOST_COLUMNS))
        self._side = min(WIDEST_TILE, WIDEST_SHEET // self._columns) - TILE_GAP
        self._pictures: dict[int, Picture] = {}

    def add(self, entry: CaseEntry, picture: Picture | None) -> None:
        """Add the next frame's entry, and its overlay if there is one."""
        frame = self._added
        self._added += 1
        if entry.aop_deg is None:
            return
        assert entry.confidence  # it is answered
        self._angles[frame], self._doubtful[frame] = entry.aop_deg, bool(entry.doubtful)
        confidence = min(entry.confidence.values())
        is_surest = confidence > self._confidence
        if is_surest:
            if self._surest not in self._regular:
                self._pictures.pop(self._surest, None)
            self._surest, self._confidence = frame, confidence
        if picture is not None:
            image = overlay.crop_text_strip(picture, entry)
            self._heights[frame] = len(image)
            if is_surest or frame in self._regular:
                self._pictures[frame] = _shrink_to_fit(image, self._side)

    def summary(self) -> Loop:
        """The loop's entry for results.json."""
        angles = [None if np.isnan(angle) else angle for angle in self._angles]
        answered = [angle for angle in angles if angle is not None]
        median = statistics.median_low(answered) if answered else None
        return Loop(
            case=self._case,
            file=self._file,
            frames=self._frames,
            answered=len(answered),
            aop_deg=angles,
            median_aop_deg=median,
            median_frame=angles.index(median) if answered else None,
            most_confident_frame=self._surest if answered else None,
            doubtful_frames=sum(self._doubtful),
        )

    def contact_sheet(self, overlay_file: Callable[[int], Path] | None = None) -> bytes | None:
        """The contact sheet as a PNG file; None if no picture was added.

        It shows the counts, frames spread over the loop with the median and the most confident
        frame among them, and the curve of AoP over frames.

        Args:
            overlay_file: returns the path of a frame's overlay. Which frame is the median is known
                only at the end, so its picture is read from there; otherwise it may have no tile.
        """
        if not self._pictures:
            return None
        loop, pictures = self.summary(), dict(self._pictures)
        median = loop.median_frame
        assert median is not None  # there is a picture
        if median not in pictures and overlay_file is not None:
            picture = self._read_overlay(median, overlay_file(median))
            pictures |= {} if picture is None else {median: picture}
        shown = sorted(self._regular | {self._surest} | ({median} & set(pictures)))
        height = max(self._side // 3, *(len(picture) for picture in pictures.values()))
        tiles = [self._tile(frame, pictures.get(frame), height, loop) for frame in shown]
        tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % self._columns)
        starts = range(0, len(tiles), self._columns)
        rows = [np.hstack(tiles[k : k + self._columns]) for k in starts]
        width = rows[0].shape[1]
        curve = _draw_curve(loop, np.flatnonzero(np.array(self._doubtful)), width)
        return overlay.encode_png(np.vstack([_draw_title(loop, width), *rows, curve]))

    def _read_overlay(self, frame: int, path: Path) -> Picture | None:
        """A frame's picture from its overlay's file; None if that cannot be read."""
        try:
            data = np.frombuffer(path.read_bytes(), np.uint8)
        except OSError:  # it was removed meanwhile; the sheet goes without it
            return None
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
        if picture is None or not self._heights[frame]:
            return None
        return _shrink_to_fit(np.asarray(picture, np.uint8)[: self._heights[frame]], self._side)

    def _tile(self, frame: int, picture: Picture | None, height: int, loop: Loop) -> Picture:
        """A frame's picture, or a dark field without one, above its number, angle and remarks."""
        tile = _black_picture(height + TILE_LABEL + TILE_GAP, self._side + TILE_GAP)
        place = tile[TILE_GAP // 2 : TILE_GAP // 2 + height, TILE_GAP // 2 : -TILE_GAP // 2]
        picture = np.full_like(place, DARK) if picture is None else picture
        y, x = (height - len(picture)) // 2, (self._side - picture.shape[1]) // 2
        place[y : y + len(picture), x : x + picture.shape[1]] = picture
        middle, baseline = tile.shape[1] // 2, len(tile) - 31
        if np.isnan(self._angles[frame]):
            _put_centred_text(tile, f"frame {frame}: failed", middle, height // 2, GREY)
            return tile
        corner, remarks = (tile.shape[1] - 2, len(tile) - 2), []
        if frame == loop.median_frame:
            remarks.append("median")
            cv2.rectangle(tile, (1, 1), corner, GREY, 2)
        if frame == self._surest:
            remarks.append("most confident")
            cv2.rectangle(tile, (1, 1), corner, WHITE, 2)
        if self._doubtful[frame]:
            remarks.append("NOT SURE")
        colour = DOUBT if self._doubtful[frame] else WHITE
        _put_centred_text(
            tile, f"frame {frame}  AoP {self._angles[frame]:.1f}°", middle, baseline, colour
        )
        _put_centred_text(tile, ", ".join(remarks), middle, baseline + 18, colour)
        return tile


def _black_picture(height: int, width: int) -> Picture:
    return np.zeros((height, width, 3), np.uint8)


def _shrink_to_fit(picture: Picture, side: int) -> Picture:
    """The picture, resized so that its longer side has `side` px."""
    width, height = picture.shape[1::-1]
    scale = side / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def _put_centred_text(picture: Picture, text: str, x: int, y: int, colour: Colour) -> None:
    put_text(picture, text, np.array([x - text_width(text, LETTERS) / 2, y]), LETTERS, colour)


def _draw_title(loop: Loop, width: int) -> Picture:
    """(TITLE_HEIGHT, width, 3): the median, and the counts below it."""
    title = _black_picture(TITLE_HEIGHT, width)
    median = f"Median AoP {loop.median_aop_deg:.1f}° (frame {loop.median_frame}, framed grey)"
    counts = (
        f"{loop.frames} frames: {loop.answered} answered, {loop.frames - loop.answered} failed, "
        f"{loop.doubtful_frames} doubtful (orange); "
        f"most confident: frame {loop.most_confident_frame} (framed white, ringed)"
    )
    put_text(title, median, np.array([TILE_GAP, 38]), LARGE_LETTERS, WHITE)
    put_text(title, counts, np.array([TILE_GAP, 62]), LETTERS, WHITE)
    return title


def _axis_ticks(low: float, high: float, most: int) -> range:
    """The finest multiples of 1, 2, 5, 10, ... of which at most `most` enclose a range."""
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    step = next(step for step in steps if ceil(high / step) - low // step < most)
    return range(int(low // step) * step, ceil(high / step) * step + 1, step)


def _draw_curve(loop: Loop, doubtful: npt.NDArray[np.int_], width: int) -> Picture:
    """(CURVE_HEIGHT, width, 3): AoP over frames, with a gap at failed ones.

    Args:
        doubtful: indices of the doubtful frames.
    """
    median, surest = loop.median_aop_deg, loop.most_confident_frame
    assert median is not None and surest is not None  # there is a picture
    picture = _black_picture(CURVE_HEIGHT, width)
    angles = np.array(loop.aop_deg, float)
    low, high = min(np.nanmin(angles), median - 5), max(np.nanmax(angles), median + 5)
    degrees = _axis_ticks(max(low, 0), min(high, 180), 7)
    x = np.linspace(LEFT + 12, width - RIGHT - 12, loop.frames)
    points = np.rint(np.column_stack([x, _curve_y(np.nan_to_num(angles), degrees)])).astype(
        np.int32
    )
    _draw_axes(picture, degrees, median, points[:, 0].tolist())
    answered = np.flatnonzero(~np.isnan(angles))
    for run in np.split(answered, np.flatnonzero(np.diff(answered) > 1) + 1):
        cv2.polylines(picture, [points[run]], False, WHITE, 1, cv2.LINE_AA)
        if len(run) == 1:  # too short for a line
            cv2.circle(picture, points[run[0]].tolist(), 2, WHITE, -1)
    cv2.circle(picture, points[surest].tolist(), 9, BLACK, 5, cv2.LINE_AA)  # a dark rim
    cv2.circle(picture, points[surest].tolist(), 9, WHITE, 2, cv2.LINE_AA)
    for point in points[doubtful].tolist():
        cv2.circle(picture, point, 3, DOUBT, -1, cv2.LINE_AA)
    return picture


def _curve_y(angles_deg: Floats | float, degrees: range) -> Floats:
    """Rows, in px of the curve's picture, at which angles lie."""
    return np.asarray(
        np.interp(angles_deg, (degrees[0], degrees[-1]), (CURVE_HEIGHT - BOTTOM, TOP))
    )


def _draw_axes(picture: Picture, degrees: range, median: float, columns: list[int]) -> None:
    """Draw lines at whole degrees and at the median, and number the frames.

    Args:
        columns: x in px of each frame.
    """
    right, bottom = picture.shape[1] - RIGHT, CURVE_HEIGHT - BOTTOM
    rows = [(degree, f"{degree}°", LEFT - 27, DIM) for degree in degrees]
    for angle, text, x, colour in [*rows, (median, "median", right + 35, GREY)]:
        y = round(float(_curve_y(angle, degrees)))
        cv2.line(picture, (LEFT, y), (right, y), colour)
        _put_centred_text(picture, text, x, y + 5, GREY)
    step = _axis_ticks(0, len(columns) - 1, right // 100).step
    for frame in range(0, len(columns), step):
        cv2.line(picture, (columns[frame], bottom), (columns[frame], bottom + 5), GREY)
        _put_centred_text(picture, f"{frame}", columns[frame], bottom + 22, GREY)
    _put_centred_text(picture, "frame", LEFT - 34, bottom + 22, GREY)
