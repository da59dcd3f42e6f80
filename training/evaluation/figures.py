"""Charts and pictures of an evaluation's report, as inline SVG and HTML.

matplotlib draws the charts; `to_inline_svg` fits them into the page. Colours are the page's CSS
variables, so that they follow light and dark. Series also differ in symbol or dash. Legends are
HTML below the chart, where no data can run into them.
"""

import base64
import html
import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from model.anatomy import Floats, Landmark
from model.drawing.overlay import BEYOND
from model.drawing.page import escape
from model.frame import Letterbox, Pair, Pixels
from training.evaluation.statistics import BlandAltman, Estimate, risk_coverage

LONGEST = 512  # px of an embedded picture
JPEG = [cv2.IMWRITE_JPEG_QUALITY, 85]
FIRST_SHARE = 0.05  # of the cases: the mean error of fewer says little
CIRCLE, SQUARE = 0, 1  # the series with these symbols

WIDTH, HEIGHT = 340, 250  # of a chart, in its own units: about px on a phone
LETTER, LINE_OF_TEXT = 7, 14  # width and height that a letter needs
# Charts are drawn in the page's light colours, which become its CSS variables.
VARIABLES = {
    "#0060a8": "var(--s0)",
    "#c44f00": "var(--s1)",
    "#007a55": "var(--s2)",
    "#8d4a8f": "var(--s3)",
    "#1b2128": "var(--ink)",
    "#59626d": "var(--dim)",
    "#d5d9df": "var(--line)",
    "#ffffff": "var(--card)",
}
*SERIES, INK, DIM, LINE, CARD = VARIABLES
# What HTML does without, and the style sheet, which the page forbids
UNUSED = (
    r'<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>| xmlns(:\w+)?="[^"]*"|(?<= )xlink:'
    r"|(?<=>)\s+(?=<)"
)
TITLE = "title:"  # before the words in the id of what has a tooltip
MARKERS = "os^D"
DOTTED = (0, (1, 2))
DASHES = ("-", (0, (4, 2)), DOTTED)  # in widths of the line; as the .dash classes
SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": DIM,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.h_pad": 6 / 72,
    "figure.constrained_layout.w_pad": 6 / 72,
    "figure.facecolor": "none",
    "font.size": 12,
    "grid.color": LINE,
    "svg.fonttype": "none",  # text stays text
    **{f"{axis}tick.labelcolor": INK for axis in "xy"},
    **{f"{axis}tick.major.size": 0 for axis in "xy"},
    **{f"{axis}tick.major.pad": 6 for axis in "xy"},
}
# Label and answer have the colours of training.evaluation.pictures.
STYLE = """\
:root { --s0: #0060a8; --s1: #c44f00; --s2: #007a55; --s3: #8d4a8f; }
@media (prefers-color-scheme: dark) { :root { --s0: #63b8f2; --s1: #f09a4a; --s2: #48cfa0;
  --s3: #dca0dd; } }
.charts { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); }
.chart { display: block; width: 100%; }
.chart text { font: 12px system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); } .s2 { stroke: var(--s2); }
.s3 { stroke: var(--s3); }
.dash1 { stroke-dasharray: 6 3; } .dash2 { stroke-dasharray: 1.5 3; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 16px; color: var(--ink); }
.key { display: inline-flex; align-items: center; gap: 6px; }
.key svg { width: 28px; height: 14px; flex: none; }
.key path { fill: none; stroke-width: 1.5; }
.key .dot { fill: var(--card); fill-opacity: .55; stroke-width: 1.4; }
.picture { position: relative; background: #000; } .picture img { width: 100%; }
.picture svg { position: absolute; left: 0; top: 0; width: 100%; height: 100%; }
.picture path, .key .mark { fill: none; stroke-width: 1.4; vector-effect: non-scaling-stroke; }
.picture .under { stroke: #000; stroke-width: 3; stroke-opacity: .55; }
.truth { stroke: rgb(80, 220, 80); } .answer { stroke: rgb(255, 80, 255); }
.picture path.dashed, .key .dashed { stroke-dasharray: 6 4; }
.onblack { background: #000; border-radius: 3px; }
"""


# ---- Charts: each function returns an inline SVG


def difference_chart(
    mean: Floats,
    difference: Floats,
    series: Sequence[int],
    words: Sequence[str],
    agreement: BlandAltman,
) -> str:
    """Bland-Altman plot: each case's difference of answer and label over their mean."""
    figure, axes = new_chart("mean of answer and label, deg", "answer − label, deg")
    axes.axhline(0, color=DIM, linestyle=DOTTED)
    lines = agreement.lower, agreement.bias, agreement.upper
    for one, dash in zip(lines, ("dashed", "solid", "dashed"), strict=True):
        axes.axhspan(one.low, one.high, color=to_rgba(SERIES[0], 0.13), linewidth=0)
        axes.axhline(one.value, color=INK, linestyle=DASHES[dash == "dashed"])
    for case in zip(mean, difference, series, words, strict=True):
        draw_symbol(axes, *case)
    least = np.ptp(axes.get_ylim()) * LINE_OF_TEXT / (0.8 * HEIGHT)  # 0.8: the plot's share
    apart = max(least, agreement.upper.value - agreement.bias.value)
    for one, side in zip(lines, (-1, 0, 1), strict=True):
        at = agreement.bias.value + side * apart
        axes.text(
            1.02,
            at,
            signed_text(one.value),
            color=INK,
            fontsize=SETTINGS["font.size"],
            va="center",
            transform=axes.get_yaxis_transform(),
        )
    return to_inline_svg(figure, "Difference of answer and label over their mean")


def cumulative_chart(radial_px: Floats, last_px: float) -> str:
    """Share of cases within an error, for each landmark (column), up to `last_px`."""
    figure, axes = new_chart("radial error at 512 px, px", "cases within it, %")
    share = 100 * np.arange(len(radial_px) + 1) / len(radial_px)
    for k, column in enumerate(radial_px.T):
        x = [0, *np.sort(column), np.inf]
        axes.stairs(share, x, baseline=None, color=SERIES[k], linestyle=DASHES[k], lw=1.5)
    axes.set(xlim=(0, last_px), ylim=(0, 100))
    return to_inline_svg(figure, "Share of cases within a radial error, by landmark")


def groups_chart(
    groups: Sequence[str], series: Sequence[Sequence[Estimate]], label: str, name: str
) -> str:
    """For each group (lines of a name) one estimate of each series, side by side."""
    figure, axes = new_chart("", label)
    for s, row in enumerate(series):
        for k, one in enumerate(row):
            x = k + 0.22 * (s - (len(series) - 1) / 2)
            draw_interval(axes, x, one, s, interval_text(one))
    letters = int(0.8 * WIDTH / len(groups) / LETTER)
    names = [[shorten(line, letters) for line in group.split("\n")] for group in groups]
    labels = ["\n".join(map(printable, lines)) for lines in names]
    axes.set_xticks(range(len(groups)), labels, parse_math=False)  # a name may hold "$"
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(bottom=0)
    return to_inline_svg(figure, name)


def calibration_chart(
    series: Sequence[Sequence[tuple[float, Estimate]]], unit: str, name: str
) -> str:
    """For each series the observed error of groups of cases over their expected error."""
    figure, axes = new_chart(f"expected error, {unit}", f"observed error, {unit}")
    axes.axline((0, 0), slope=1, color=DIM, linestyle=DOTTED)
    for k, row in enumerate(series):
        for expected, seen in row:
            words = f"expected {expected:.1f}, seen {interval_text(seen)}"
            draw_interval(axes, expected, seen, k, words)
    last = max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.set(xlim=(0, last), ylim=(0, last))
    return to_inline_svg(figure, name)


def risk_chart(error: Floats, risk: Floats) -> str:
    """Mean AoP error of the answered cases over their share: in order of risk, of error, random."""
    figure, axes = new_chart("cases answered, %", "their mean AoP error, deg")
    start = min(math.ceil(FIRST_SHARE * len(error)), len(error)) - 1
    for k, by in enumerate((risk, error, np.zeros(len(error)))):
        share, curve = risk_coverage(error, by)
        axes.plot(100 * share[start:], curve[start:], color=SERIES[k], linestyle=DASHES[k])
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    return to_inline_svg(figure, "Mean error of the angle over the share of cases answered")


def new_chart(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """An empty chart and its axes."""
    with rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    return figure, axes


def draw_symbol(axes: Axes, x: float, y: float, series: int, words: str, radius: float = 3) -> None:
    """Draw the symbol of a series at a point; a pointer over it shows the words."""
    (drawn,) = axes.plot(x, y, MARKERS[series % 4], color=SERIES[hue(series)], clip_on=False)
    drawn.set(markersize=2 * radius, markeredgewidth=1.4, markerfacecolor=to_rgba(CARD, 0.55))
    drawn.set_markeredgecolor(SERIES[hue(series)])  # else as transparent as the face
    drawn.set_gid(TITLE + printable(words))


def draw_interval(axes: Axes, x: float, one: Estimate, series: int, words: str) -> None:
    """Draw an estimate: its symbol on a line from one end of the interval to the other."""
    axes.plot((x, x), (one.low, one.high), color=SERIES[hue(series)])
    draw_symbol(axes, x, one.value, series, words, radius=4)


def to_inline_svg(figure: Figure, name: str) -> str:
    """The chart as inline SVG; `name` says in words what it shows.

    The page's policy forbids the `style` attributes and the style sheet that matplotlib writes, so
    they become presentation attributes. Ids stay only where something refers to them. They are
    digests salted with the name: charts of different names share none.
    """
    drawn = io.StringIO()
    with rc_context(SETTINGS | {"svg.hashsalt": printable(name)}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has more fonts
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    source = re.sub(UNUSED, "", drawn.getvalue(), flags=re.DOTALL)
    svg = ElementTree.fromstring(source)
    for element in svg.iter():
        found = dict(element.attrib)
        declarations = (one.split(": ", 1) for one in found.pop("style", "").split("; ") if one)
        found |= {key: value for key, value in declarations if not key.startswith("font")}
        identity = found.pop("id", "")
        element.attrib = {key: compact(VARIABLES.get(value, value)) for key, value in found.items()}
        if identity.startswith(TITLE):
            title = ElementTree.Element("title")
            title.text = identity.removeprefix(TITLE)
            element.insert(0, title)
        elif identity and f"#{identity}" in source:
            element.set("id", identity)
    svg.attrib = {"class": "chart", "viewBox": svg.get("viewBox", ""), "role": "img"}
    svg.set("aria-label", printable(name))
    return ElementTree.tostring(svg, encoding="unicode")


def compact(value: str) -> str:
    """An attribute's value on one line, with at most two decimals."""
    return re.sub(r"(\.\d\d)\d+", r"\1", " ".join(value.split()))


def printable(words: str) -> str:
    """Words without control characters, which XML forbids: as `escape` writes them."""
    return html.unescape(escape(words))


# ---- Parts of the page around a chart


def legend(names: Sequence[str], line: bool = False) -> str:
    """HTML that names the series, beside their symbols or their lines."""
    keys = []
    for k, name in enumerate(names):
        stroke = f'<path class="s{hue(k)} dash{k % 4}" d="M1 7h26"/>'
        dot = f'<path class="dot s{hue(k)}" d="{symbol_path(14, 7, k, 4)}"/>'
        drawn = f'<svg viewBox="0 0 28 14" aria-hidden="true">{stroke if line else dot}</svg>'
        keys.append(f'<span class="key">{drawn}{escape(name)}</span>')
    return f'<p class="keys">{"".join(keys)}</p>'


def captioned(svg: str, keys: str, caption: str) -> str:
    """HTML of a chart with its legend and caption."""
    return f'<figure class="card">{svg}{keys}<figcaption>{caption}</figcaption></figure>'


def symbol_path(x: float, y: float, series: int, r: float) -> str:
    """SVG path of a series' symbol: circle, square, triangle or diamond."""
    shapes = (
        ((x - r, y), f"a{r:.2f} {r:.2f} 0 1 0 {2 * r:.2f} 0a{r:.2f} {r:.2f} 0 1 0 {-2 * r:.2f} 0"),
        ((x - r, y - r), f"h{2 * r:.2f}v{2 * r:.2f}h{-2 * r:.2f}"),
        ((x, y - 1.3 * r), f"l{1.2 * r:.2f} {2.2 * r:.2f}h{-2.4 * r:.2f}"),
        ((x, y - 1.4 * r), "l{0} {0}l-{0} {0}l-{0} -{0}".format(f"{1.4 * r:.2f}")),
    )
    (left, top), outline = shapes[series % 4]
    return f"M{left:.2f} {top:.2f}{outline}z"


def hue(series: int) -> int:
    """Number of a series' colour: colour and symbol together tell sixteen series apart."""
    return (series + series // 4) % 4


def interval_text(one: Estimate, places: int = 1, unit: str = "") -> str:
    """An estimate with its interval: 9.03 (8.35 to 9.70)."""
    rounded = (round(number, places) + 0.0 for number in one)  # + 0.0 turns -0.0 into 0.0
    value, low, high = (f"{number:.{places}f}".replace("-", "−") for number in rounded)
    return f"{value}{unit} ({low} to {high})"


def signed_text(value: float) -> str:
    """A number with one decimal and its sign."""
    return f"{value:+.1f}".replace("-", "−")


def shorten(words: str, letters: int) -> str:
    """Words cut to a number of letters."""
    return words if len(words) <= letters else words[: max(1, letters - 1)] + "…"


# ---- Pictures of cases


def picture_of_case(
    grey: Pixels, pixel_shape: Pair, label: Floats, answer: Floats, words: str
) -> str:
    """HTML of an image with both readings drawn over it.

    The label has squares and full lines, the answer circles and dashed lines. They are SVG above
    the picture, so that they stay thin at any size.

    Args:
        grey: (H, W), 0..255.
        pixel_shape: (width, height) of a pixel, in any unit.
        label, answer: (3, 2) px.
        words: what the picture shows, in plain text.
    """
    height, width = grey.shape
    box = Letterbox(width, height, min(LONGEST, max(width, height)), pixel_shape)
    small = cv2.resize(grey.astype(np.float32), box.resized, interpolation=cv2.INTER_AREA)
    byte = np.clip(np.rint(small), 0, 255).astype(np.uint8)
    data = base64.b64encode(cv2.imencode(".jpg", byte, JPEG)[1].tobytes()).decode()
    wide, high = box.resized
    paths = []
    for points, kind, series in ((label, "truth", SQUARE), (answer, "answer", CIRCLE)):
        ps1, ps2, fh1 = placed = (points + 0.5) * box.scale
        beyond = ps1 + (fh1 - ps1) * BEYOND
        lines = "M{:.2f} {:.2f}L{:.2f} {:.2f}L{:.2f} {:.2f}".format(*ps2, *ps1, *beyond)
        radius = 0.016 * max(wide, high)
        marks = "".join(symbol_path(placed[k, 0], placed[k, 1], series, radius) for k in Landmark)
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


def reading_switch(kind: str, words: str) -> str:
    """HTML of a box that shows or hides a reading in all pictures, with a sample of its lines."""
    dashed, series = ("", SQUARE) if kind == "truth" else (" dashed", CIRCLE)
    return (
        f'<label class="key"><input type="checkbox" id="show-{kind}" checked>'
        '<svg class="onblack" viewBox="0 0 28 14" aria-hidden="true">'
        f'<path class="mark {kind}{dashed}" d="M1 7h26"/>'
        f'<path class="mark {kind}" d="{symbol_path(14, 7, series, 4)}"/></svg>{words}</label>'
    )
