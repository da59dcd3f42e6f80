"""The figures of an evaluation's report, and the pictures of its cases.

Colours come from classes (`STYLE`), so that they follow light and dark. Legends are HTML below the
figure, where no data can run into them.
"""

import base64
import math
from collections.abc import Sequence

import cv2
import numpy as np

from model.anatomy import Floats, Landmark
from model.drawing.overlay import BEYOND
from model.drawing.page import escape
from model.frame import Letterbox, Pair, Pixels
from training.evaluation.chart import (
    CIRCLE,
    LEFT,
    RIGHT,
    SQUARE,
    TEXT,
    WIDTH,
    Axis,
    Chart,
    axis_of,
    colour,
    interval,
    short,
    signed,
    symbol,
)
from training.evaluation.statistics import BlandAltman, Estimate, risk_coverage

LONGEST = 512  # px of an embedded picture
JPEG = [cv2.IMWRITE_JPEG_QUALITY, 85]
FIRST_SHARE = 0.05  # of the cases: fewer say little of an error when answering
# Label and answer have the colours of training.evaluation.pictures.
STYLE = """\
:root { --s0: #0060a8; --s1: #c44f00; --s2: #007a55; --s3: #8d4a8f; }
@media (prefers-color-scheme: dark) { :root { --s0: #63b8f2; --s1: #f09a4a; --s2: #48cfa0;
  --s3: #dca0dd; } }
.charts { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); }
.chart { display: block; width: 100%; }
.chart text { font: 12px system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  fill: var(--ink); }
.chart .small { fill: var(--dim); }
.chart path, .key path { fill: none; stroke-width: 1.5; }
.chart .axis { stroke: var(--dim); stroke-width: 1; } .chart .grid { stroke: var(--line);
  stroke-width: 1; }
.chart .band { fill: var(--s0); fill-opacity: .13; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); } .s2 { stroke: var(--s2); }
.s3 { stroke: var(--s3); } .plain { stroke: var(--ink); } .faint { stroke: var(--dim); }
.dash1 { stroke-dasharray: 6 3; } .dash2 { stroke-dasharray: 1.5 3; }
.dash3 { stroke-dasharray: 8 3 2 3; }
.chart .dot, .key .dot { fill: var(--card); fill-opacity: .55; stroke-width: 1.4; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 16px; color: var(--ink); }
.key { display: inline-flex; align-items: center; gap: 6px; }
.key svg { width: 28px; height: 14px; flex: none; }
.picture { position: relative; background: #000; } .picture img { width: 100%; }
.picture svg { position: absolute; left: 0; top: 0; width: 100%; height: 100%; }
.picture path, .key .mark { fill: none; stroke-width: 1.4; vector-effect: non-scaling-stroke; }
.picture .under { stroke: #000; stroke-width: 3; stroke-opacity: .55; }
.truth { stroke: rgb(80, 220, 80); } .answer { stroke: rgb(255, 80, 255); }
.picture path.dashed, .key .dashed { stroke-dasharray: 6 4; }
.onblack { background: #000; border-radius: 3px; }
"""


def difference_chart(
    mean: Floats,
    difference: Floats,
    series: Sequence[int],
    words: Sequence[str],
    found: BlandAltman,
) -> Chart:
    """Bland and Altman's: the difference of each case over the mean of its two readings."""
    reach = [*difference, found.lower.low, found.upper.high, 0]
    chart = Chart(
        axis_of(mean, "mean of answer and label, deg"),
        axis_of(reach, "answer − label, deg"),
        "Difference of answer and label over their mean",
        right=44,
    )
    chart.level(0, "faint dash2")
    middle = chart.at(0, found.bias.value)[1]
    for k, limit in enumerate((found.upper, found.bias, found.lower)):
        left, bottom = chart.at(chart.x.low, limit.low)
        right, top = chart.at(chart.x.high, limit.high)
        band = f"M{left} {bottom}H{right}V{top}H{left}z"
        chart.parts.append(f'<path class="band" d="{band}"/>')
        chart.level(limit.value, "plain" if k == 1 else "plain dash1")
        away = max(TEXT, abs(chart.at(0, limit.value)[1] - middle)) * (k - 1)
        chart.text(right + 4, middle + away + 4, signed(limit.value))
    for point in zip(mean, difference, series, words, strict=True):
        chart.dot(*point)
    return chart


def cumulative_chart(radial_px: Floats, last_px: float) -> Chart:
    """Of each landmark (columns): the share of cases within an error, up to a last one."""
    chart = Chart(
        Axis(0, last_px, "radial error at 512 px, px"),
        Axis(0, 100, "cases within it, %"),
        "Share of cases within a radial error, by landmark",
    )
    share = 100 * np.arange(1, len(radial_px) + 1) / len(radial_px)
    for k, column in enumerate(radial_px.T):
        seen = np.sort(column)[np.sort(column) <= last_px]
        x = [0, *np.repeat(seen, 2), last_px]  # up at each error
        chart.line(x, np.repeat([0, *share[: len(seen)]], 2), f"s{k} dash{k}")
    return chart


def groups_chart(
    groups: Sequence[str], series: Sequence[Sequence[Estimate]], label: str, name: str
) -> Chart:
    """Of each series a figure with its interval in each group, side by side."""
    letters = int((WIDTH - LEFT - RIGHT) / len(groups) / 7)
    names = {
        float(k): "\n".join(short(row, letters) for row in group.split("\n"))
        for k, group in enumerate(groups)
    }
    ends = [one.high for row in series for one in row]
    chart = Chart(
        Axis(-0.5, len(groups) - 0.5, "", names),
        axis_of(ends, label, 0),
        name,
    )
    for s, row in enumerate(series):
        for k, one in enumerate(row):
            x = k + 0.22 * (s - (len(series) - 1) / 2)
            chart.line((x, x), (one.low, one.high), colour(s))
            chart.dot(x, one.value, s, interval(one), 4)
    return chart


def calibration_chart(
    series: Sequence[Sequence[tuple[float, Estimate]]], unit: str, name: str
) -> Chart:
    """Of each series groups of cases: the error observed in them over the error expected."""
    ends = [value for row in series for expected, seen in row for value in (expected, seen.high)]
    chart = Chart(
        axis_of(ends, f"expected error, {unit}", 0),
        axis_of(ends, f"observed error, {unit}", 0),
        name,
    )
    chart.line((0, chart.x.high), (0, chart.y.high), "faint dash2")
    for k, row in enumerate(series):
        for expected, seen in row:
            chart.line((expected, expected), (seen.low, seen.high), f"s{k}")
            chart.dot(expected, seen.value, k, f"expected {expected:.1f}, seen {interval(seen)}", 4)
    return chart


def risk_chart(error: Floats, risk: Floats) -> Chart:
    """Mean error of those answered over their share: as sorted, best possible, random."""
    curves = [risk_coverage(error, by) for by in (risk, error, np.zeros(len(error)))]
    start = min(math.ceil(FIRST_SHARE * len(error)), len(error)) - 1
    top = [float(value) for _, curve in curves for value in curve[start:]]
    chart = Chart(
        Axis(0, 100, "cases answered, %"),
        axis_of(top, "their mean AoP error, deg", 0),
        "Mean error of the angle over the share of cases answered",
    )
    for k, (share, curve) in enumerate(curves):
        chart.line(100 * share[start:], curve[start:], f"s{k} dash{k}")
    return chart


def drawn_case(grey: Pixels, pixel_shape: Pair, label: Floats, answer: Floats, words: str) -> str:
    """A picture with both readings: the label's squares and full lines, the answer's circles and
    dashed ones; as lines above the picture, so that they stay thin at any size.

    Args:
        grey: (H, W), 0..255. label, answer: (3, 2) px. words: of what is seen, in plain text.
    """
    height, width = grey.shape
    box = Letterbox(width, height, min(LONGEST, max(width, height)), pixel_shape)
    small = cv2.resize(np.float32(grey), box.resized, interpolation=cv2.INTER_AREA)
    byte = np.clip(np.rint(small), 0, 255).astype(np.uint8)
    data = base64.b64encode(cv2.imencode(".jpg", byte, JPEG)[1].tobytes()).decode()
    wide, high = box.resized
    paths = []
    for points, kind, series in ((label, "truth", SQUARE), (answer, "answer", CIRCLE)):
        ps1, ps2, fh1 = placed = (points + 0.5) * box.scale
        beyond = ps1 + (fh1 - ps1) * BEYOND
        lines = "M{:.2f} {:.2f}L{:.2f} {:.2f}L{:.2f} {:.2f}".format(*ps2, *ps1, *beyond)
        marks = "".join(symbol(*placed[k], series, 0.016 * max(wide, high)) for k in Landmark)
        dashed = " dashed" if kind == "answer" else ""
        for under in (True, False):
            shown = f"{kind} under" if under else kind
            paths.append(f'<path class="{shown}{dashed}" d="{lines}"/>')
            paths.append(f'<path class="{shown}" d="{marks}"/>')
    return (
        f'<div class="picture"><img width="{wide}" height="{high}" alt="{escape(words)}" '
        f'src="data:image/jpeg;base64,{data}"><svg viewBox="0 0 {wide} {high}" '
        f'aria-hidden="true">{"".join(paths)}</svg></div>'
    )


def switch(kind: str, words: str) -> str:
    """A box that shows or hides a reading in all pictures, with a sample of how it is drawn."""
    dashed, series = ("", SQUARE) if kind == "truth" else (" dashed", CIRCLE)
    return (
        f'<label class="key"><input type="checkbox" id="show-{kind}" checked>'
        '<svg class="onblack" viewBox="0 0 28 14" aria-hidden="true">'
        f'<path class="mark {kind}{dashed}" d="M1 7h26"/>'
        f'<path class="mark {kind}" d="{symbol(14, 7, series, 4)}"/></svg>{words}</label>'
    )
