"""The picture that a person checks: the measurement in thin lines, and in words below the image.

The head's contour stays free: the tangent has a gap at FH1, which a tick and a name mark on
the side away from the head. Doubt surrounds the image and covers nothing of it.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from model.anatomy import LANDMARKS, Floats, Landmark
from model.drawing.text import (
    BLACK,
    DOUBT,
    WHITE,
    Colour,
    Picture,
    is_doubtful,
    put_text,
    rows_of,
    scale_bar,
    text_width,
    write_rows,
)
from model.images.source import GreyFrame
from model.results.schemas import CaseEntry

Stroke = tuple[Floats, Colour, int]  # (n, 2) px of the image as shown; the last is the thickness

SHORTEST, LONGEST = 640, 1280  # px of the picture's longer side
NARROWEST, LOWEST = 420, 160  # px; a smaller image gets black beside or below it, for the words
FAR = 20_000  # px; OpenCV draws nothing further away
COLOURS: dict[str, Colour] = {"PS1": (90, 220, 255), "PS2": (120, 255, 120), "FH1": (255, 160, 255)}
BEYOND = 1.25  # the tangent is drawn on past FH1

# Lengths in px of a picture of 640 px; they grow with it.
FRAME = 6  # of doubt
RING, GAP, TICK, PAST, ARROW = 6, 11, 10, 40, 12  # around landmarks, at FH1, beyond it, at a border
ARC = 40  # radius
NAME, ANGLE, TEXT = 13, 17, 15  # letters
# Where a name may stand: in directions from the best one, close or further.
TURNS_DEG = np.tile([0, 25, -25, 50, -50, 75, -75, 110, -110, 150, -150], 2)
REACH = np.repeat([9, 24], 11)


class _Layout(NamedTuple):
    """Sizes in px, as (width, height): the picture without its words, and the image in it."""

    canvas: tuple[int, int]
    image: tuple[int, int]
    margin: int  # the frame of doubt, around the image and not over it

    @property
    def unit(self) -> float:
        return max(self.canvas) / 640

    @property
    def letters(self) -> int:
        """Size in px of those below the image."""
        return max(10, round(TEXT * min(self.unit, self.canvas[0] / NARROWEST)))


class _Label(NamedTuple):
    """Words that stand near a point, best in a direction."""

    words: str
    colour: Colour
    size: int
    at: Floats
    away: Floats


def overlay_picture(frame: GreyFrame, entry: CaseEntry) -> Picture:
    """The picture of an answered case: (H, W, 3) BGR, H and W within LONGEST without the words.

    The image is scaled so that text is legible and pixels are square. A landmark outside it is an
    arrow at the border and the word "outside". Doubt is a frame, and words that say why.
    """
    assert entry.landmarks_px and entry.aop_deg is not None  # it is answered
    layout = _layout(entry)
    unit, m, (width, height) = layout.unit, layout.margin, layout.canvas
    rows = rows_of(entry, layout.letters, width)
    picture: Picture = np.zeros((height + sum(row.height for row in rows), width, 3), np.uint8)
    write_rows(picture[height:], rows, layout.letters)
    if entry.spacing_mm and entry.width:
        banner = sum(row.height for row in rows if row.ground == DOUBT)
        px_per_mm = layout.image[0] / entry.width / entry.spacing_mm[0]
        scale_bar(picture[height + banner :], px_per_mm, layout.letters)
    for edge in (picture[:m], picture[height - m : height], picture[:height, :m]):
        edge[:] = DOUBT
    picture[:height, width - m :] = DOUBT
    canvas = picture[m : height - m, m : width - m]
    landmarks = np.array([entry.landmarks_px[name] for name in LANDMARKS])
    points = _placed(landmarks, frame.pixels.shape, layout)
    marks, labels = _marks(points, np.array(layout.image, float), unit)
    strokes = [*_lines(points, unit), *marks]
    _draw(canvas[: layout.image[1], : layout.image[0]], frame.pixels, strokes)
    vertex = labels[Landmark.PS1]
    if vertex.words == "PS1":  # inside
        words, letters = f"{entry.aop_deg:.0f}°", round(ANGLE * unit)
        labels.append(_Label(words, WHITE, letters, vertex.at, vertex.away))
    _write_labels(canvas, labels, points, strokes)
    return picture


def without_words(picture: Picture, entry: CaseEntry) -> Picture:
    """The picture of a case without the strip below the image."""
    return picture[: _layout(entry).canvas[1]]


def png(picture: Picture) -> bytes:
    """The picture as a PNG file."""
    # one filter and the lowest level: four times as fast as the defaults, the file a fifth larger
    fast = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_SUB]
    return cv2.imencode(".png", picture, fast)[1].tobytes()


def _layout(entry: CaseEntry) -> _Layout:
    assert entry.width and entry.height  # it is answered
    size = np.array([entry.width, entry.height])
    extent = size * np.array(entry.spacing_mm or (1.0, 1.0))
    longer = float(np.clip(size.max(), SHORTEST, LONGEST))
    image = np.maximum(1, np.rint(extent * longer / extent.max()))
    canvas = np.maximum(image, (NARROWEST, LOWEST))
    margin = round(FRAME * canvas.max() / 640) if is_doubtful(entry) else 0
    fitted = np.maximum(1, np.rint(image * min(1, ((canvas - 2 * margin) / image).min())))
    (width, height), (wide, high) = canvas.astype(int).tolist(), fitted.astype(int).tolist()
    return _Layout((width, height), (wide, high), margin)


def _placed(landmarks_px: Floats, shape: tuple[int, ...], layout: _Layout) -> Floats:
    """(3, 2) px of an image of that (height, width) -> px of the image as shown.

    What lies further than FAR is brought nearer in its own direction from the image's centre.
    """
    size, centre = np.array(layout.image), np.array(layout.image) / 2
    way = (landmarks_px + 0.5) * (size / np.array(shape[::-1])) - 0.5 - centre
    return np.asarray(centre + way * (FAR / np.maximum(np.abs(way).max(1, keepdims=True), FAR)))


def _lines(points: Floats, unit: float) -> list[Stroke]:
    """Symphysis, tangent and arc between (3, 2) points; they leave the points themselves free."""
    ps1, ps2, fh1 = points
    bone, tangent = _direction(ps2 - ps1), _direction(fh1 - ps1)
    past = max((BEYOND - 1) * math.dist(ps1, fh1), PAST * unit)
    lines = [
        np.array([ps1 + RING * unit * bone, ps2 - RING * unit * bone]),
        np.array([ps1 + RING * unit * tangent, fh1 - GAP * unit * tangent]),
        np.array([fh1 + GAP * unit * tangent, fh1 + past * tangent]),
        *_arc(points, unit),
    ]
    return [(line, WHITE, max(1, round(unit))) for line in lines]


def _marks(points: Floats, size: Floats, unit: float) -> tuple[list[Stroke], list[_Label]]:
    """Rings around PS1 and PS2, a tick outside FH1, an arrow for what is outside, and the names.

    Args:
        points: (3, 2) px of the image as shown.
        size: (2,) its width and height.
    """
    ps1, ps2, fh1 = points
    bone, tangent = _direction(ps2 - ps1), _direction(fh1 - ps1)
    out = np.array([tangent[1], -tangent[0]])
    out = -out if out @ bone > 0 else out  # away from the head, which lies on the side of PS2
    tick = fh1 + np.outer([RING * unit, (RING + TICK) * unit], out)
    ring = RING * unit * _circle(0, 2 * np.pi, 25)
    ways = _direction(-bone - tangent), _direction(bone - tangent), out
    start = ps1 if _holds(size, ps1) else size / 2
    marks, labels = [], []
    for k, (name, colour) in enumerate(COLOURS.items()):
        mark, at, way, words = points[k] + ring, points[k], ways[k], name
        if not _holds(size, at):
            at, way, words = _border(start, at, size), start - at, f"{name} outside"
            mark = _arrow(at, -_direction(way), ARROW * unit)
        elif k == Landmark.FH1:
            mark, at = tick, tick[1]
        marks.append((mark, colour, max(1, round(1.6 * unit))))
        labels.append(_Label(words, colour, round(NAME * unit), at, way))
    return marks, labels


def _holds(size: Floats, point: Floats) -> bool:
    """Whether an image of that size has a pixel there."""
    return bool(np.all((point >= -0.5) & (point <= size - 0.5)))


def _direction(way: Floats) -> Floats:
    """Of length 1; up where there is none."""
    length = float(np.hypot(*way))
    return way / length if length > 1e-9 else np.array([0.0, -1.0])


def _circle(start: float, end: float, count: int) -> Floats:
    turns = np.linspace(start, end, count)
    return np.column_stack([np.cos(turns), np.sin(turns)])


def _arc(points: Floats, unit: float) -> list[Floats]:
    """On the short way from PS2 to FH1 about PS1; nothing where two points coincide."""
    arms = points[[Landmark.PS2, Landmark.FH1]] - points[Landmark.PS1]
    shorter = float(np.hypot(*arms.T).min())
    if shorter < 1:
        return []
    start, end = np.arctan2(arms[:, 1], arms[:, 0])
    turn = (end - start + np.pi) % (2 * np.pi) - np.pi
    circle = _circle(start, start + turn, 49)
    return [points[Landmark.PS1] + min(0.4 * shorter, ARC * unit) * circle]


def _border(start: Floats, point: Floats, size: Floats) -> Floats:
    """Where the way from a point inside an image of that size to one outside leaves it."""
    way = point - start
    room = np.where(way > 0, size - 1 - start, start) / np.maximum(np.abs(way), 1e-9)
    return np.asarray(start + way * np.clip(room.min(), 0, 1))


def _arrow(tip: Floats, way: Floats, length: float) -> Floats:
    aside = np.array([way[1], -way[0]]) * 0.6
    return tip - length * np.array([way - aside, 0 * way, way + aside])


def _draw(shown: Picture, grey: Any, strokes: Sequence[Stroke]) -> None:
    """Put an image and its lines, with a faint shadow, into a part of the picture."""
    height, width = shown.shape[:2]
    smooth = cv2.INTER_AREA if width < grey.shape[1] else cv2.INTER_CUBIC
    byte = grey if grey.dtype == np.uint8 else np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    plain = cv2.resize(byte, (width, height), interpolation=smooth)
    # OpenCV takes whole numbers: here of 1/16 px
    lines = [(np.rint(line * 16).astype(np.int32), hue, thick) for line, hue, thick in strokes]
    shadow = plain.copy()
    for line, _, thick in lines:
        cv2.polylines(shadow, [line], False, BLACK, thick + 2, cv2.LINE_AA, 4)
    plain = cv2.addWeighted(plain, 0.4, shadow, 0.6, 0)
    cv2.cvtColor(plain, cv2.COLOR_GRAY2BGR, shown)
    for line, hue, thick in lines:
        cv2.polylines(shown, [line], False, hue, thick, cv2.LINE_AA, 4)


def _write_labels(
    canvas: Picture, labels: Iterable[_Label], points: Floats, strokes: Iterable[Stroke]
) -> None:
    """Write each label where it covers no line, no other label, and the least that is bright."""
    unit = max(canvas.shape) / 640
    far, busy = round(4 * unit), np.zeros(canvas.shape[:2], np.uint8)
    for x, y in np.rint(points).astype(int).tolist():
        cv2.circle(busy, (x, y), round(GAP * unit), 255, -1)
    for line, _, thick in strokes:
        cv2.polylines(busy, [np.rint(line).astype(np.int32)], False, 255, thick + 2 * far)
    for label in labels:
        wide, high = box = text_width(label.words, label.size) + 2, label.size
        turns = np.radians(TURNS_DEG) + math.atan2(label.away[1], label.away[0])
        ways = np.column_stack([np.cos(turns), np.sin(turns)])
        reach = REACH * unit + np.abs(ways) @ np.array(box) / 2
        corners = label.at + ways * reach[:, None] - np.array(box) / 2
        corners = np.rint(np.clip(corners, 3, np.subtract(canvas.shape[1::-1], box) - 3))
        cost = np.abs(TURNS_DEG) * 0.5 + REACH
        for k, (x, y) in enumerate(corners.astype(int).tolist()):
            place = slice(y, y + high), slice(x, x + wide)
            mean, spread = cv2.meanStdDev(canvas[place])
            cost[k] += mean[0, 0] + spread[0, 0] + 20 * cv2.mean(busy[place])[0]
        x, y = corners[cost.argmin()].astype(int).tolist()
        put_text(canvas, label.words, (x + 1, y + 0.86 * high), high, label.colour, shadow=True)
        cv2.rectangle(busy, (x - far, y - far), (x + wide + far, y + high + far), 255, -1)
