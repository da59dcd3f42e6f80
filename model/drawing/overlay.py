"""The overlay, the picture that a person checks: thin lines on the image, and text below it.

The head's contour stays visible: the tangent has a gap at FH1, and a tick and a name mark FH1 on
the side away from the head. The frame of a doubtful case surrounds the image and covers none of it.
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
    draw_rows,
    draw_scale_bar,
    is_doubtful,
    put_text,
    text_rows,
    text_width,
)
from model.images.source import GreyFrame
from model.results.schemas import CaseEntry

Stroke = tuple[Floats, Colour, int]  # points (n, 2) in shown px, colour, thickness in px

SHORTEST, LONGEST = 640, 1280  # px; limits of the longer side, text excluded
NARROWEST, LOWEST = 420, 160  # px; a smaller image gets a black margin, so that text has room
FAR = 20_000  # px; OpenCV draws nothing further away
COLOURS: dict[str, Colour] = {"PS1": (90, 220, 255), "PS2": (120, 255, 120), "FH1": (255, 160, 255)}
BEYOND = 1.25  # end of the tangent, as a multiple of the distance from PS1 to FH1

# Lengths in px of a picture whose longer side is SHORTEST; they grow with it.
FRAME = 6  # width of the frame of doubt
RING = 6  # radius around PS1 and PS2, and distance of the tick from FH1
GAP = 11  # half of the tangent's gap at FH1
TICK_LENGTH = 10  # at FH1
PAST = 40  # least length of the tangent past FH1
ARROW = 12  # length of an arrow at the border
ARC = 40  # radius of the angle's arc at most
NAME, ANGLE, TEXT = 13, 17, 15  # letters of names, of the angle, and below the image
# A label may stand in these directions from the best one, near or further away.
TURNS_DEG = np.tile([0, 25, -25, 50, -50, 75, -75, 110, -110, 150, -150], 2)
REACH = np.repeat([9, 24], 11)


class _Layout(NamedTuple):
    """Sizes in px, as (width, height): the picture without its text, and the image as shown.

    margin: width of the frame of doubt around the image; 0 without doubt.
    """

    canvas: tuple[int, int]
    image: tuple[int, int]
    margin: int

    @property
    def unit(self) -> float:
        """Factor for the lengths above."""
        return max(self.canvas) / SHORTEST

    @property
    def letters(self) -> int:
        """Height in px of the letters below the image."""
        return max(10, round(TEXT * min(self.unit, self.canvas[0] / NARROWEST)))


class _Label(NamedTuple):
    """Text near a point of the image, in shown px.

    size: height of the letters. away: the best direction from the point, of any length.
    """

    text: str
    colour: Colour
    size: int
    point: Floats
    away: Floats


def overlay_picture(frame: GreyFrame, entry: CaseEntry) -> Picture:
    """The overlay of an answered case, (height, width, 3) BGR.

    The image is scaled so that its pixels are square and text is legible; without the text, the
    longer side has SHORTEST to LONGEST px. A landmark outside the image becomes an arrow at the
    border and the word "outside". A doubtful case gets an orange frame, and the reasons below.
    """
    assert entry.landmarks_px and entry.aop_deg is not None  # it is answered
    layout = _fit_layout(entry)
    unit, m, (width, height) = layout.unit, layout.margin, layout.canvas
    rows = text_rows(entry, layout.letters, width)
    picture: Picture = np.zeros((height + sum(row.height for row in rows), width, 3), np.uint8)
    draw_rows(picture[height:], rows, layout.letters)
    if entry.spacing_mm and entry.width:
        banner = sum(row.height for row in rows if row.ground == DOUBT)
        px_per_mm = layout.image[0] / entry.width / entry.spacing_mm[0]
        draw_scale_bar(picture[height + banner :], px_per_mm, layout.letters)
    for edge in (picture[:m], picture[height - m : height], picture[:height, :m]):
        edge[:] = DOUBT
    picture[:height, width - m :] = DOUBT
    canvas = picture[m : height - m, m : width - m]
    landmarks = np.array([entry.landmarks_px[name] for name in LANDMARKS])
    points = _to_shown_px(landmarks, frame.pixels.shape, layout)
    marks, labels = _landmark_marks(points, np.array(layout.image, float), unit)
    strokes = [*_measurement_lines(points, unit), *marks]
    _draw_image(canvas[: layout.image[1], : layout.image[0]], frame.pixels, strokes)
    vertex = labels[Landmark.PS1]
    if vertex.text == "PS1":  # it lies inside the image
        angle, letters = f"{entry.aop_deg:.0f}°", round(ANGLE * unit)
        labels.append(_Label(angle, WHITE, letters, vertex.point, vertex.away))
    _draw_labels(canvas, labels, points, strokes)
    return picture


def crop_text_strip(picture: Picture, entry: CaseEntry) -> Picture:
    """The overlay of a case without the text below the image."""
    return picture[: _fit_layout(entry).canvas[1]]


def encode_png(picture: Picture) -> bytes:
    """The bytes of a PNG file."""
    # One filter and the lowest level: four times as fast as the defaults, for a fifth more bytes.
    fast = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_SUB]
    return cv2.imencode(".png", picture, fast)[1].tobytes()


def _fit_layout(entry: CaseEntry) -> _Layout:
    assert entry.width and entry.height  # it is answered
    size = np.array([entry.width, entry.height])
    extent = size * np.array(entry.pixel_shape)
    longer = float(np.clip(size.max(), SHORTEST, LONGEST))
    image = np.maximum(1, np.rint(extent * longer / extent.max()))
    canvas = np.maximum(image, (NARROWEST, LOWEST))
    margin = round(FRAME * canvas.max() / SHORTEST) if is_doubtful(entry) else 0
    shown = np.maximum(1, np.rint(image * min(1, ((canvas - 2 * margin) / image).min())))
    (width, height), (shown_width, shown_height) = (
        sides.astype(int).tolist() for sides in (canvas, shown)
    )
    return _Layout((width, height), (shown_width, shown_height), margin)


def _to_shown_px(landmarks_px: Floats, shape: tuple[int, ...], layout: _Layout) -> Floats:
    """(3, 2) px of the image, of shape (height, width), -> (3, 2) px of the image as shown.

    A point further than FAR from the image's centre is moved towards it.
    """
    size, centre = np.array(layout.image), np.array(layout.image) / 2
    way = (landmarks_px + 0.5) * (size / np.array(shape[::-1])) - 0.5 - centre
    return np.asarray(centre + way * (FAR / np.maximum(np.abs(way).max(1, keepdims=True), FAR)))


def _measurement_lines(points: Floats, unit: float) -> list[Stroke]:
    """Symphysis, tangent and arc for (3, 2) points in shown px; they leave the points free."""
    ps1, ps2, fh1 = points
    bone, tangent = _unit_vector(ps2 - ps1), _unit_vector(fh1 - ps1)
    past = max((BEYOND - 1) * math.dist(ps1, fh1), PAST * unit)
    lines = [
        np.array([ps1 + RING * unit * bone, ps2 - RING * unit * bone]),
        np.array([ps1 + RING * unit * tangent, fh1 - GAP * unit * tangent]),
        np.array([fh1 + GAP * unit * tangent, fh1 + past * tangent]),
        *_angle_arc(points, unit),
    ]
    return [(line, WHITE, max(1, round(unit))) for line in lines]


def _landmark_marks(points: Floats, size: Floats, unit: float) -> tuple[list[Stroke], list[_Label]]:
    """The mark and the name of each landmark.

    PS1 and PS2 get a ring and FH1 a tick, away from the head; a landmark outside gets an arrow.

    Args:
        points: (3, 2) in shown px.
        size: (2,) width and height of the image as shown.
    """
    ps1, ps2, fh1 = points
    bone, tangent = _unit_vector(ps2 - ps1), _unit_vector(fh1 - ps1)
    out = np.array([tangent[1], -tangent[0]])
    out = -out if out @ bone > 0 else out  # away from the head, which lies on the side of PS2
    tick = fh1 + np.outer([RING * unit, (RING + TICK_LENGTH) * unit], out)
    ring = RING * unit * _circle_points(0, 2 * np.pi, 25)
    directions = _unit_vector(-bone - tangent), _unit_vector(bone - tangent), out
    start = ps1 if _is_inside(size, ps1) else size / 2
    marks, labels = [], []
    for k, (name, colour) in enumerate(COLOURS.items()):
        mark, point, away, text = points[k] + ring, points[k], directions[k], name
        if not _is_inside(size, point):
            away, text = start - point, f"{name} outside"
            point = _border_crossing(start, point, size)
            mark = _arrow_points(point, -_unit_vector(away), ARROW * unit)
        elif k == Landmark.FH1:
            mark, point = tick, tick[1]
        marks.append((mark, colour, max(1, round(1.6 * unit))))
        labels.append(_Label(text, colour, round(NAME * unit), point, away))
    return marks, labels


def _is_inside(size: Floats, point: Floats) -> bool:
    """Whether an image of this width and height has a pixel at the point."""
    return bool(np.all((point >= -0.5) & (point <= size - 0.5)))


def _unit_vector(way: Floats) -> Floats:
    """The direction of a vector; for a vector of length 0, up."""
    length = float(np.hypot(*way))
    return way / length if length > 1e-9 else np.array([0.0, -1.0])


def _circle_points(start: float, end: float, count: int) -> Floats:
    """(count, 2) points of the unit circle, between two angles in radians."""
    turns = np.linspace(start, end, count)
    return np.column_stack([np.cos(turns), np.sin(turns)])


def _angle_arc(points: Floats, unit: float) -> list[Floats]:
    """The arc about PS1, the short way from PS2 to FH1; [] if two points coincide."""
    arms = points[[Landmark.PS2, Landmark.FH1]] - points[Landmark.PS1]
    shorter = float(np.hypot(*arms.T).min())
    if shorter < 1:
        return []
    start, end = np.arctan2(arms[:, 1], arms[:, 0])
    turn = (end - start + np.pi) % (2 * np.pi) - np.pi
    arc = _circle_points(start, start + turn, 49)
    return [points[Landmark.PS1] + min(0.4 * shorter, ARC * unit) * arc]


def _border_crossing(start: Floats, point: Floats, size: Floats) -> Floats:
    """Where the line from `start`, inside an image of this size, to a point outside leaves it."""
    way = point - start
    room = np.where(way > 0, size - 1 - start, start) / np.maximum(np.abs(way), 1e-9)
    return np.asarray(start + way * np.clip(room.min(), 0, 1))


def _arrow_points(tip: Floats, direction: Floats, length: float) -> Floats:
    aside = np.array([direction[1], -direction[0]]) * 0.6
    return tip - length * np.array([direction - aside, 0 * direction, direction + aside])


def _draw_image(shown: Picture, grey: Any, strokes: Sequence[Stroke]) -> None:
    """Draw an image and its lines, with a faint shadow, into a part of the picture.

    Args:
        shown: that part, as large as the image is shown.
        grey: (height, width) of any type, 0 to 255.
    """
    height, width = shown.shape[:2]
    smooth = cv2.INTER_AREA if width < grey.shape[1] else cv2.INTER_CUBIC
    byte = grey if grey.dtype == np.uint8 else np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    plain = cv2.resize(byte, (width, height), interpolation=smooth)
    # OpenCV takes integers, here in 1/16 px
    lines = [(np.rint(line * 16).astype(np.int32), hue, thick) for line, hue, thick in strokes]
    shadow = plain.copy()
    for line, _, thick in lines:
        cv2.polylines(shadow, [line], False, BLACK, thick + 2, cv2.LINE_AA, 4)
    plain = cv2.addWeighted(plain, 0.4, shadow, 0.6, 0)
    cv2.cvtColor(plain, cv2.COLOR_GRAY2BGR, shown)
    for line, hue, thick in lines:
        cv2.polylines(shown, [line], False, hue, thick, cv2.LINE_AA, 4)


def _draw_labels(
    canvas: Picture, labels: Iterable[_Label], points: Floats, strokes: Iterable[Stroke]
) -> None:
    """Draw each label where it covers no line, no other label, and little that is bright."""
    unit = max(canvas.shape) / SHORTEST
    distance, busy = round(4 * unit), np.zeros(canvas.shape[:2], np.uint8)
    for x, y in np.rint(points).astype(int).tolist():
        cv2.circle(busy, (x, y), round(GAP * unit), 255, -1)
    for line, _, thick in strokes:
        whole_px = np.rint(line).astype(np.int32)
        cv2.polylines(busy, [whole_px], False, 255, thick + 2 * distance)
    for label in labels:
        width, height = box = text_width(label.text, label.size) + 2, label.size
        turns = np.radians(TURNS_DEG) + math.atan2(label.away[1], label.away[0])
        directions = np.column_stack([np.cos(turns), np.sin(turns)])
        reach = REACH * unit + np.abs(directions) @ np.array(box) / 2
        corners = label.point + directions * reach[:, None] - np.array(box) / 2
        corners = np.rint(np.clip(corners, 3, np.subtract(canvas.shape[1::-1], box) - 3))
        cost = np.abs(TURNS_DEG) * 0.5 + REACH
        for k, (x, y) in enumerate(corners.astype(int).tolist()):
            place = slice(y, y + height), slice(x, x + width)
            mean, spread = cv2.meanStdDev(canvas[place])
            cost[k] += mean[0, 0] + spread[0, 0] + 20 * cv2.mean(busy[place])[0]
        x, y = corners[cost.argmin()].astype(int).tolist()
        baseline = (x + 1, y + 0.86 * height)
        put_text(canvas, label.text, baseline, height, label.colour, shadow=True)
        end = (x + width + distance, y + height + distance)
        cv2.rectangle(busy, (x - distance, y - distance), end, 255, -1)
