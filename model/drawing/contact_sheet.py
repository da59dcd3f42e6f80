"""A stack or cine loop as a whole: its summary, and the contact sheet a person checks."""

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

SHOWN, COLUMNS = 20, 5  # tiles at most: of a sheet, beside each other
WIDEST, LARGEST = 1600, 490  # px of the sheet and of a tile
GAP, LABEL = 10, 44  # px between tiles, and of the two lines of words below one
TITLE, CURVE = 74, 300  # px of the sheet's height
LEFT, RIGHT, TOP, BOTTOM = 62, 70, 20, 40  # px around the curve
WORDS, LARGE = 14, 26  # px of letters
DARK, DIM, GREY = (40, 40, 40), (60, 60, 60), (170, 170, 170)


class LoopSummary:
    """Is told of the frames in turn; keeps two numbers of each, and the pictures of a few.

    Of frames alike, the first is the median or the most confident one.

    Args:
        frames: how many the file has; one that it is never told of counts as failed.
    """

    def __init__(self, case: str, file: str, frames: int) -> None:
        self._case, self._file, self._frames = case, file, frames
        self._angles, self._doubtful = array("d", [nan]) * frames, bytearray(frames)
        self._heights = array("H", [0]) * frames  # px of the overlays without their words
        self._told = 0
        self._surest, self._confidence = -1, -inf
        # of a longer loop, two tiles are for the most confident and the median frame, known only
        # at the end
        regular = np.linspace(0, frames - 1, frames if frames <= SHOWN else SHOWN - 2)
        self._regular = frozenset(regular.round().astype(int).tolist())
        tiles = min(frames, SHOWN)
        self._columns = ceil(tiles / ceil(tiles / COLUMNS))
        self._side = min(LARGEST, WIDEST // self._columns) - GAP
        self._pictures: dict[int, Picture] = {}

    def add(self, entry: CaseEntry, picture: Picture | None) -> None:
        """The next frame's entry, and its overlay where there is one."""
        at = self._told
        self._told += 1
        if entry.aop_deg is None:
            return
        assert entry.confidence  # it is answered
        self._angles[at], self._doubtful[at] = entry.aop_deg, bool(entry.doubtful)
        confidence = min(entry.confidence.values())
        surest = confidence > self._confidence
        if surest:
            if self._surest not in self._regular:
                self._pictures.pop(self._surest, None)
            self._surest, self._confidence = at, confidence
        if picture is not None:
            shown = overlay.without_words(picture, entry)
            self._heights[at] = len(shown)
            if surest or at in self._regular:
                self._pictures[at] = _fitted(shown, self._side)

    def summary(self) -> Loop:
        """The loop in numbers."""
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
        """A PNG: the counts, frames from all over the loop, the median and the most confident one
        among them, and the curve.

        Args:
            overlay_file: where the overlay of a frame was written. Which frame is the median is
                known only at the end; without its overlay it may have no tile.

        Returns:
            None where no picture was given.
        """
        if not self._pictures:
            return None
        loop, pictures = self.summary(), dict(self._pictures)
        median = loop.median_frame
        assert median is not None  # there is a picture
        if median not in pictures and overlay_file is not None:
            picture = self._read(median, overlay_file(median))
            pictures |= {} if picture is None else {median: picture}
        shown = sorted(self._regular | {self._surest} | ({median} & set(pictures)))
        height = max(self._side // 3, *(len(picture) for picture in pictures.values()))
        tiles = [self._tile(frame, pictures.get(frame), height, loop) for frame in shown]
        tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % self._columns)
        starts = range(0, len(tiles), self._columns)
        rows = [np.hstack(tiles[k : k + self._columns]) for k in starts]
        width = rows[0].shape[1]
        curve = _curve(loop, np.flatnonzero(np.array(self._doubtful)), width)
        return overlay.png(np.vstack([_title(loop, width), *rows, curve]))

    def _read(self, frame: int, path: Path) -> Picture | None:
        """A frame's picture from its overlay; None where that cannot be read."""
        try:
            data = np.frombuffer(path.read_bytes(), np.uint8)
        except OSError:  # gone since: the sheet can do without
            return None
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
        if picture is None or not self._heights[frame]:
            return None
        return _fitted(np.asarray(picture, np.uint8)[: self._heights[frame]], self._side)

    def _tile(self, frame: int, picture: Picture | None, height: int, loop: Loop) -> Picture:
        """A frame's overlay above what it says and is; dark where there is none."""
        tile = _empty(height + LABEL + GAP, self._side + GAP)
        place = tile[GAP // 2 : GAP // 2 + height, GAP // 2 : -GAP // 2]
        picture = np.full_like(place, DARK) if picture is None else picture
        y, x = (height - len(picture)) // 2, (self._side - picture.shape[1]) // 2
        place[y : y + len(picture), x : x + picture.shape[1]] = picture
        middle, baseline = tile.shape[1] // 2, len(tile) - 31
        if np.isnan(self._angles[frame]):
            _centred(tile, f"frame {frame}: failed", middle, height // 2, GREY)
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
        _centred(tile, f"frame {frame}  AoP {self._angles[frame]:.1f}°", middle, baseline, colour)
        _centred(tile, ", ".join(remarks), middle, baseline + 18, colour)
        return tile


def _empty(height: int, width: int) -> Picture:
    return np.zeros((height, width, 3), np.uint8)


def _fitted(picture: Picture, side: int) -> Picture:
    """The picture made smaller, until it fits a square."""
    width, height = picture.shape[1::-1]
    scale = side / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)


def _centred(picture: Picture, text: str, x: int, y: int, colour: Colour) -> None:
    put_text(picture, text, np.array([x - text_width(text, WORDS) / 2, y]), WORDS, colour)


def _title(loop: Loop, width: int) -> Picture:
    """(TITLE, width, 3): the median, and the counts below it."""
    title = _empty(TITLE, width)
    median = f"Median AoP {loop.median_aop_deg:.1f}° (frame {loop.median_frame}, framed grey)"
    counts = (
        f"{loop.frames} frames: {loop.answered} answered, {loop.frames - loop.answered} failed, "
        f"{loop.doubtful_frames} doubtful (orange); "
        f"most confident: frame {loop.most_confident_frame} (framed white, ringed)"
    )
    put_text(title, median, np.array([GAP, 38]), LARGE, WHITE)
    put_text(title, counts, np.array([GAP, 62]), WORDS, WHITE)
    return title


def _ticks(low: float, high: float, most: int) -> range:
    """The multiples of 1, 2, 5, 10... that enclose a range: the finest that are not too many."""
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    step = next(step for step in steps if ceil(high / step) - low // step < most)
    return range(int(low // step) * step, ceil(high / step) * step + 1, step)


def _curve(loop: Loop, doubtful: npt.NDArray[np.int_], width: int) -> Picture:
    """(CURVE, width, 3) of AoP over frames, with a gap where one failed."""
    median, surest = loop.median_aop_deg, loop.most_confident_frame
    assert median is not None and surest is not None  # there is a picture
    picture = _empty(CURVE, width)
    angles = np.array(loop.aop_deg, float)
    low, high = min(np.nanmin(angles), median - 5), max(np.nanmax(angles), median + 5)
    degrees = _ticks(max(low, 0), min(high, 180), 7)
    x = np.linspace(LEFT + 12, width - RIGHT - 12, loop.frames)
    points = np.rint(np.column_stack([x, _row(np.nan_to_num(angles), degrees)])).astype(np.int32)
    _axes(picture, degrees, median, points[:, 0].tolist())
    answered = np.flatnonzero(~np.isnan(angles))
    for run in np.split(answered, np.flatnonzero(np.diff(answered) > 1) + 1):
        cv2.polylines(picture, [points[run]], False, WHITE, 1, cv2.LINE_AA)
        if len(run) == 1:  # no line
            cv2.circle(picture, points[run[0]].tolist(), 2, WHITE, -1)
    cv2.circle(picture, points[surest].tolist(), 9, BLACK, 5, cv2.LINE_AA)  # it may lie in a tangle
    cv2.circle(picture, points[surest].tolist(), 9, WHITE, 2, cv2.LINE_AA)
    for point in points[doubtful].tolist():
        cv2.circle(picture, point, 3, DOUBT, -1, cv2.LINE_AA)
    return picture


def _row(angles_deg: Floats | float, degrees: range) -> Floats:
    """Where angles lie in the curve's picture."""
    return np.asarray(np.interp(angles_deg, (degrees[0], degrees[-1]), (CURVE - BOTTOM, TOP)))


def _axes(picture: Picture, degrees: range, median: float, columns: list[int]) -> None:
    """Lines at whole degrees and at the median, and numbers of frames; each frame has a column."""
    right, bottom = picture.shape[1] - RIGHT, CURVE - BOTTOM
    rows = [(degree, f"{degree}°", LEFT - 27, DIM) for degree in degrees]
    for angle, words, x, colour in [*rows, (median, "median", right + 35, GREY)]:
        y = round(float(_row(angle, degrees)))
        cv2.line(picture, (LEFT, y), (right, y), colour)
        _centred(picture, words, x, y + 5, GREY)
    step = _ticks(0, len(columns) - 1, right // 100).step
    for frame in range(0, len(columns), step):
        cv2.line(picture, (columns[frame], bottom), (columns[frame], bottom + 5), GREY)
        _centred(picture, f"{frame}", columns[frame], bottom + 22, GREY)
    _centred(picture, "frame", LEFT - 34, bottom + 22, GREY)
