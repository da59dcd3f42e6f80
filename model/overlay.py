"""The picture that a person checks: image, landmarks, lines, angle, confidence, and any doubt."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from model.anatomy import LANDMARKS, Floats, Landmark
from model.frame import Pair
from model.image import GreyFrame
from model.outputs import CaseEntry

Picture = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

SHORTEST, LONGEST = 640, 1280  # px of the picture's longer side
NARROWEST = 420  # px, for the words; a narrower image gets black beside it
FAR = 20_000  # px; OpenCV draws nothing further away
COLOURS: dict[str, Colour] = {"PS1": (90, 220, 255), "PS2": (120, 255, 120), "FH1": (255, 160, 255)}
WHITE, BLACK, DOUBT = (255, 255, 255), (0, 0, 0), (40, 150, 255)  # BGR
BEYOND = 1.25  # the tangent is drawn on past FH1


def draw_overlay(
    grey: npt.NDArray[np.uint8] | npt.NDArray[np.float32],
    landmarks_px: Floats,
    aop_deg: float,
    confidence: Sequence[float],
    reasons: Sequence[str] = (),
    pixel_shape: Pair = (1.0, 1.0),
) -> Picture:
    """(height, width) grey 0..255 -> (H, W, 3) BGR picture with the measurement drawn in.

    The image is scaled so that text stays legible and pixels become square; what is written stands
    in a strip below it. `reasons` mark the picture as doubtful: an orange frame and the words.
    """
    picture, points = _scaled(grey, landmarks_px, pixel_shape)
    missing = max(0, NARROWEST - picture.shape[1])
    picture = np.pad(picture, ((0, 0), (0, missing), (0, 0)))
    unit = max(picture.shape) / 640
    _lines(picture, points, unit)
    _arc(picture, points, aop_deg, unit)
    for name, point in zip(LANDMARKS, points, strict=True):
        _mark(picture, name, point, unit)
    if reasons:
        height, width = picture.shape[:2]
        cv2.rectangle(picture, (0, 0), (width - 1, height - 1), DOUBT, round(8 * unit))
    return np.vstack([picture, _strip(picture.shape[1], unit, aop_deg, confidence, reasons)])


def _size(width: int, height: int, pixel_shape: Pair) -> npt.NDArray[np.int_]:
    """(2,) width and height in px of an image of that size as the picture shows it."""
    extent = np.array([width, height]) * np.array(pixel_shape)
    longer = float(np.clip(max(width, height), SHORTEST, LONGEST))
    return np.asarray(np.maximum(1, np.rint(extent * longer / extent.max())), int)


def _scaled(grey: Any, landmarks_px: Floats, pixel_shape: Pair) -> tuple[Picture, Floats]:
    height, width = grey.shape
    size = _size(width, height, pixel_shape)
    smooth = cv2.INTER_AREA if size[0] < width else cv2.INTER_CUBIC
    byte = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    picture = cv2.cvtColor(
        cv2.resize(byte, size.tolist(), interpolation=smooth), cv2.COLOR_GRAY2BGR
    )
    points = (landmarks_px + 0.5) * (size / np.array([width, height])) - 0.5
    return np.asarray(picture, np.uint8), np.clip(points, -FAR, FAR)


def _pixel(point: Floats) -> tuple[int, int]:
    x, y = np.rint(point).astype(int).tolist()
    return x, y


def _line(picture: Picture, start: Floats, end: Floats, unit: float) -> None:
    thick = max(1, round(unit))
    cv2.line(picture, _pixel(start), _pixel(end), BLACK, thick + 2, cv2.LINE_AA)
    cv2.line(picture, _pixel(start), _pixel(end), WHITE, thick, cv2.LINE_AA)


def _lines(picture: Picture, points: Floats, unit: float) -> None:
    ps1, ps2, fh1 = points
    _line(picture, ps1, ps2, unit)
    _line(picture, ps1, ps1 + (fh1 - ps1) * BEYOND, unit)


def _arc(picture: Picture, points: Floats, aop_deg: float, unit: float) -> None:
    """The arc on the short way from PS2 to FH1 about PS1, and the angle beside its middle."""
    ps1 = points[Landmark.PS1]
    arms = points[[Landmark.PS2, Landmark.FH1]] - ps1
    lengths = np.linalg.norm(arms, axis=1)
    if lengths.min() < 1:
        return
    start, end = np.arctan2(arms[:, 1], arms[:, 0])
    turn = (end - start + np.pi) % (2 * np.pi) - np.pi
    radius = min(0.4 * lengths.min(), 60 * unit)
    angles = start + turn * np.linspace(0, 1, 48)
    circle = np.column_stack([np.cos(angles), np.sin(angles)])
    curve = np.rint(ps1 + radius * circle).astype(np.int32)
    cv2.polylines(picture, [curve], False, WHITE, max(1, round(unit)), cv2.LINE_AA)
    beside = ps1 + (radius + 30 * unit) * circle[24] + np.array([-24, 6]) * unit
    put_text(picture, f"{aop_deg:.0f}°", beside, round(18 * unit), WHITE, shadow=True)


def _mark(picture: Picture, name: str, point: Floats, unit: float) -> None:
    """A ring that leaves the landmark itself free, and its name away from the head."""
    colour = COLOURS[name]
    cv2.circle(picture, _pixel(point), round(6 * unit), BLACK, max(1, round(3 * unit)), cv2.LINE_AA)
    cv2.circle(
        picture, _pixel(point), round(6 * unit), colour, max(1, round(1.5 * unit)), cv2.LINE_AA
    )
    shift = {"PS1": (10, -10), "PS2": (-46, -10), "FH1": (12, 5)}[name]
    height, width = picture.shape[:2]
    corner = point + np.array(shift) * unit
    corner = np.clip(corner, [4, 20 * unit], [width - 40 * unit, height - 6])
    put_text(picture, name, corner, round(15 * unit), colour, shadow=True)


def overlay_picture(frame: GreyFrame, entry: CaseEntry) -> Picture:
    """The picture of an answered case."""
    assert entry.landmarks_px and entry.confidence and entry.aop_deg is not None  # it is answered
    return draw_overlay(
        frame.pixels,
        np.array([entry.landmarks_px[name] for name in LANDMARKS]),
        entry.aop_deg,
        [entry.confidence[name] for name in LANDMARKS],
        entry.reasons,
        frame.geometry.pixel_shape,
    )


def without_words(picture: Picture, entry: CaseEntry) -> Picture:
    """The picture of a case without the strip below the image."""
    assert entry.width and entry.height  # it is answered
    return picture[: _size(entry.width, entry.height, entry.spacing_mm or (1.0, 1.0))[1]]


def png(picture: Picture) -> bytes:
    """The picture as a PNG file."""
    # twice as fast as the default level, and the file a tenth larger
    return cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


@cache
def _font() -> Any:
    return cv2.FontFace("sans")


def put_text(
    picture: Picture, text: str, at: Floats, size: int, colour: Colour, shadow: bool = False
) -> None:
    """Text whose baseline starts at a pixel; with a shadow where it stands on the image."""
    x, y = _pixel(at)
    if shadow:
        for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1), (1, 1)):
            cv2.putText(picture, text, (x + dx, y + dy), BLACK, _font(), size, 500)
    cv2.putText(picture, text, (x, y), colour, _font(), size, 500)


def _strip(
    width: int, unit: float, aop_deg: float, confidence: Sequence[float], reasons: Sequence[str]
) -> Picture:
    """(rows, width, 3): the angle, the confidences, and a line for each reason to doubt."""
    size = max(10, round(15 * min(unit, width / NARROWEST)))
    sure = "   ".join(
        f"{name} {value:.2f}" for name, value in zip(LANDMARKS, confidence, strict=True)
    )
    lines = [(f"AoP {aop_deg:.1f}°", WHITE, size * 3 // 2), (f"confidence   {sure}", WHITE, size)]
    for k, reason in enumerate(reasons):
        words = f"NOT SURE: {reason}" if k == 0 else reason
        lines += [(line, DOUBT, size) for line in _wrapped(words, width - size, size)]
    strip: Picture = np.zeros(
        (sum(round(1.6 * h) for *_, h in lines) + size // 2, width, 3), np.uint8
    )
    baseline = 0
    for text, colour, height in lines:
        baseline += round(1.6 * height)
        put_text(strip, text, np.array([size // 2, baseline - height // 3]), height, colour)
    return strip


def text_width(text: str, size: int) -> int:
    """In px."""
    return int(cv2.getTextSize((size, size), text, (0, 0), _font(), size, 500)[2])


def _wrapped(text: str, width: int, size: int) -> list[str]:
    """Words in lines that fit a width in px."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        fits = text_width(longer, size) <= width or not lines[-1]
        lines = [*lines[:-1], longer] if fits else [*lines, word]
    return lines
