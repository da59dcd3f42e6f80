"""Text on pictures: drawing and measuring it, and the rows below the image of an overlay."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from model.anatomy import LANDMARKS
from model.results.schemas import CaseEntry

Picture = npt.NDArray[np.uint8]  # (height, width, 3) in BGR, or (height, width) in grey
Colour = tuple[int, int, int]  # BGR

WHITE, BLACK, DOUBT = (255, 255, 255), (0, 0, 0), (40, 150, 255)
PALE = (190, 190, 190)
RESEARCH_NOTE = "research use only"
WEIGHT = 500  # of the font: medium


# ---- Text at a place


@cache
def _font() -> Any:
    return cv2.FontFace("sans")


def put_text(
    picture: Picture,
    text: str,
    at: npt.ArrayLike,
    size: int,
    colour: Colour,
    shadow: bool = False,
) -> None:
    """Draw a line of text.

    Args:
        at: (x, y) in px, where the baseline starts.
        size: height of the letters in px.
        shadow: a dark rim, for text on an image.
    """
    (x, y), printable = np.rint(at).astype(int).tolist(), _printable_text(text)
    if shadow:
        for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1), (1, 1)):
            cv2.putText(picture, printable, (x + dx, y + dy), BLACK, _font(), size, WEIGHT)
    cv2.putText(picture, printable, (x, y), colour, _font(), size, WEIGHT)


def text_width(text: str, size: int) -> int:
    """Width in px of a line of text whose letters are `size` px high."""
    printable = _printable_text(text)
    return int(cv2.getTextSize((size, size), printable, (0, 0), _font(), size, WEIGHT)[2])


def shorten_text(text: str, width: int, size: int) -> str:
    """The text, with "…" for its middle if it is wider than `width` px."""

    def keep_ends(length: int) -> str:
        return f"{text[:length]}…{text[len(text) - length :]}"

    if text_width(text, size) <= width:
        return text
    fits = bisect_right(range(len(text) // 2), width, key=lambda k: text_width(keep_ends(k), size))
    return keep_ends(max(0, fits - 1))


def _wrap_text(pieces: Iterable[str], gap: str, width: int, size: int) -> list[str]:
    """Pieces joined by `gap` into lines of at most `width` px; a wider piece is shortened."""
    lines: list[str] = []
    for piece in pieces:
        longer = f"{lines[-1]}{gap}{piece}" if lines else ""
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(shorten_text(piece, width, size))
    return lines


def _printable_text(text: str) -> str:
    """The text with "?" for unprintable characters: OpenCV breaks lines, or crashes, at some."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


# ---- Rows below the image


class StyledText(NamedTuple):
    """A piece of text; `size` is the height of its letters in px."""

    text: str
    colour: Colour
    size: int


class TextRow(NamedTuple):
    """Pieces of text side by side, and one at the right end; `height` in px."""

    pieces: Sequence[StyledText]
    ground: Colour
    height: int
    right: str = ""


def is_doubtful(entry: CaseEntry) -> bool:
    return bool(entry.doubtful or entry.reasons)


def text_rows(entry: CaseEntry, size: int, width: int) -> list[TextRow]:
    """What an overlay says about a case: doubt with reasons, angle, confidence, errors and file.

    Args:
        size: height of most letters in px.
        width: of the rows in px.
    """
    assert entry.confidence and entry.aop_deg is not None  # it is answered
    room, large, line, end = width - size, size * 3 // 2, round(1.6 * size), size * 2 // 3
    rows = []
    if is_doubtful(entry):
        title = StyledText("NOT SURE", BLACK, large)
        rows.append(TextRow([title], DOUBT, round(1.6 * large)))
        for reason in entry.reasons:
            for text in _wrap_text(f"– {reason}".split(), " ", room, size):
                rows.append(TextRow([StyledText(text, BLACK, size)], DOUBT, line))
        rows.append(TextRow([], DOUBT, end))
    angle = [StyledText(f"AoP {entry.aop_deg:.0f}°", WHITE, large)]
    if entry.aop_interval_deg:
        low, high = entry.aop_interval_deg
        angle.append(StyledText(f"(90 %: {low:.0f}–{high:.0f}°)", WHITE, size))
    rows.append(TextRow(angle, BLACK, round(1.6 * large)))
    confidence = [
        "confidence",
        *(f"{name} {confidence_text(entry.confidence[name])}" for name in LANDMARKS),
    ]
    for pieces in (confidence, _expected_error_pieces(entry)):
        for text in _wrap_text(pieces, "   ", room, size):
            rows.append(TextRow([StyledText(text, WHITE, size)], BLACK, line))
    frame = "" if entry.frame is None else f"   frame {entry.frame}"
    left = room - text_width(frame + RESEARCH_NOTE, size) - 2 * size
    file = StyledText(shorten_text(entry.file, left, size) + frame, PALE, size)
    return [*rows, TextRow([file], BLACK, line, RESEARCH_NOTE), TextRow([], BLACK, end)]


def draw_rows(strip: Picture, rows: Iterable[TextRow], size: int) -> None:
    """Draw rows below each other into a black strip; `size` as for `text_rows`."""
    top = 0
    for row in rows:
        if row.ground != BLACK:
            strip[top : top + row.height] = row.ground
        top += row.height
        x = size // 2
        for text, colour, letters in row.pieces:
            put_text(strip, text, (x, top - size // 3), letters, colour)
            x += text_width(text, letters) + size // 2
        if row.right:
            x = strip.shape[1] - size // 2 - text_width(row.right, size)
            put_text(strip, row.right, (x, top - size // 3), size, PALE)


def draw_scale_bar(strip: Picture, px_per_mm: float, size: int) -> None:
    """Draw a scale bar at the right of the strip's first row.

    Its length is the longest of ..., 1, 2, 5, 10, ... mm that fits a sixth of the strip's width.
    """
    right, middle = strip.shape[1] - size // 2, round(1.5 * size)
    longest, tick, thick = strip.shape[1] / 6 / px_per_mm, size // 3, max(1, size // 10)
    power = 10.0 ** math.floor(math.log10(longest))
    mm = power * max(k for k in (1, 2, 5) if k == 1 or k * power <= longest)
    left = round(right - mm * px_per_mm)
    strip[middle : middle + thick, left:right] = WHITE
    for x in (left, right - thick):
        strip[middle - tick : middle + thick + tick, x : x + thick] = WHITE
    text = f"{mm:g} mm"
    put_text(strip, text, (left - size // 2 - text_width(text, size), middle + tick), size, WHITE)


def confidence_text(confidence: float) -> str:
    """A confidence with two decimals; only 1 itself becomes 1.00."""
    return f"{confidence if confidence == 1 else min(confidence, 0.99):.2f}"


def _expected_error_pieces(entry: CaseEntry) -> list[str]:
    """The mean errors to expect, in mm if they are known in mm; [] without calibration."""
    errors, unit = entry.expected_error_mm, "mm"
    if errors is None:
        errors, unit = entry.expected_error_px, "px"
    pieces = [f"{name} {value:.1f} {unit}" for name, value in (errors or {}).items()]
    if entry.expected_aop_error_deg is not None:
        pieces.append(f"AoP {entry.expected_aop_error_deg:.1f}°")
    return ["expected error", *pieces] if pieces else []
