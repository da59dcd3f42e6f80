"""What the overlay says below the image, and letters on any picture."""

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

Picture = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Words = tuple[str, Colour, int]  # the last is the letters' size in px

WHITE, BLACK, DOUBT = (255, 255, 255), (0, 0, 0), (40, 150, 255)  # BGR
PALE = (190, 190, 190)
RESEARCH = "research use only"


class Row(NamedTuple):
    """Words beside each other below the image, and some at the right end."""

    words: Sequence[Words]
    ground: Colour
    height: int
    right: str = ""


def is_doubtful(entry: CaseEntry) -> bool:
    return bool(entry.doubtful or entry.reasons)


def rows_of(entry: CaseEntry, size: int, width: int) -> list[Row]:
    """Doubt with its reasons, the angle, what is sure, and the file; in letters of a size in px."""
    assert entry.confidence and entry.aop_deg is not None  # it is answered
    room, large, line, end = width - size, size * 3 // 2, round(1.6 * size), size * 2 // 3
    rows = []
    if is_doubtful(entry):
        rows.append(Row([("NOT SURE", BLACK, large)], DOUBT, round(1.6 * large)))
        for reason in entry.reasons:
            for text in _wrapped(f"– {reason}".split(), " ", room, size):
                rows.append(Row([(text, BLACK, size)], DOUBT, line))
        rows.append(Row([], DOUBT, end))
    angle = [(f"AoP {entry.aop_deg:.0f}°", WHITE, large)]
    if entry.aop_interval_deg:
        low, high = entry.aop_interval_deg
        angle.append((f"(90 %: {low:.0f}–{high:.0f}°)", WHITE, size))
    rows.append(Row(angle, BLACK, round(1.6 * large)))
    sure = [
        "confidence",
        *(f"{name} {shown_confidence(entry.confidence[name])}" for name in LANDMARKS),
    ]
    for pieces in (sure, _expected(entry)):
        for text in _wrapped(pieces, "   ", room, size):
            rows.append(Row([(text, WHITE, size)], BLACK, line))
    frame = "" if entry.frame is None else f"   frame {entry.frame}"
    left = room - text_width(frame + RESEARCH, size) - 2 * size
    file = shortened(entry.file, left, size) + frame
    return [*rows, Row([(file, PALE, size)], BLACK, line, RESEARCH), Row([], BLACK, end)]


def write_rows(strip: Picture, rows: Iterable[Row], size: int) -> None:
    """Write words of about a size below each other."""
    top = 0
    for row in rows:
        if row.ground != BLACK:
            strip[top : top + row.height] = row.ground
        top += row.height
        x = size // 2
        for words, colour, letters in row.words:
            put_text(strip, words, (x, top - size // 3), letters, colour)
            x += text_width(words, letters) + size // 2
        if row.right:
            x = strip.shape[1] - size // 2 - text_width(row.right, size)
            put_text(strip, row.right, (x, top - size // 3), size, PALE)


def shown_confidence(confidence: float) -> str:
    """Two decimals; only what is 1 is shown as 1.00."""
    return f"{confidence if confidence == 1 else min(confidence, 0.99):.2f}"


def _expected(entry: CaseEntry) -> list[str]:
    """The mean errors to expect, in mm where these are known; empty where none are."""
    errors, unit = entry.expected_error_mm, "mm"
    if errors is None:
        errors, unit = entry.expected_error_px, "px"
    words = [f"{name} {value:.1f} {unit}" for name, value in (errors or {}).items()]
    if entry.expected_aop_error_deg is not None:
        words.append(f"AoP {entry.expected_aop_error_deg:.1f}°")
    return ["expected error", *words] if words else []


def scale_bar(strip: Picture, px_per_mm: float, size: int) -> None:
    """At the right of the first row: the longest of 1, 2, 5, 10... mm that fits a sixth of it."""
    right, middle = strip.shape[1] - size // 2, round(1.5 * size)
    longest, tick, thick = strip.shape[1] / 6 / px_per_mm, size // 3, max(1, size // 10)
    power = 10.0 ** math.floor(math.log10(longest))
    mm = power * max(k for k in (1, 2, 5) if k == 1 or k * power <= longest)
    left = round(right - mm * px_per_mm)
    strip[middle : middle + thick, left:right] = WHITE
    for x in (left, right - thick):
        strip[middle - tick : middle + thick + tick, x : x + thick] = WHITE
    words = f"{mm:g} mm"
    put_text(strip, words, (left - size // 2 - text_width(words, size), middle + tick), size, WHITE)


@cache
def _font() -> Any:
    return cv2.FontFace("sans")


def _drawable(text: str) -> str:
    """What cannot be seen as a question mark; OpenCV breaks lines, and crashes at surrogates."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def put_text(
    picture: Picture,
    text: str,
    at: npt.ArrayLike,
    size: int,
    colour: Colour,
    shadow: bool = False,
) -> None:
    """Text whose baseline starts at a pixel; with a shadow where it stands on the image."""
    (x, y), words = np.rint(at).astype(int).tolist(), _drawable(text)
    if shadow:
        for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1), (1, 1)):
            cv2.putText(picture, words, (x + dx, y + dy), BLACK, _font(), size, 500)
    cv2.putText(picture, words, (x, y), colour, _font(), size, 500)


def text_width(text: str, size: int) -> int:
    """In px."""
    return int(cv2.getTextSize((size, size), _drawable(text), (0, 0), _font(), size, 500)[2])


def shortened(text: str, width: int, size: int) -> str:
    """The text, its middle left out where it is wider than so many px."""

    def kept(ends: int) -> str:
        return f"{text[:ends]}…{text[len(text) - ends :]}"

    if text_width(text, size) <= width:
        return text
    fits = bisect_right(range(len(text) // 2), width, key=lambda k: text_width(kept(k), size))
    return kept(max(0, fits - 1))


def _wrapped(pieces: Iterable[str], gap: str, width: int, size: int) -> list[str]:
    """Pieces in lines that fit a width in px; one that is wider is shortened."""
    lines: list[str] = []
    for piece in pieces:
        longer = f"{lines[-1]}{gap}{piece}" if lines else ""
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(shortened(piece, width, size))
    return lines
