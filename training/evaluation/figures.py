"""Charts and pictures of an evaluation's report, as inline SVG and HTML.

matplotlib draws the charts, and `to_inline_svg` fits them into the page. Colours are CSS variables
of the page, so they follow its light and dark mode. Series also differ in symbol or dash. A legend
is HTML below the chart, where no data can run into it.
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

LONGEST_PX = 512  # longer side of an embedded picture, at most
JPEG_OPTIONS = [cv2.IMWRITE_JPEG_QUALITY, 85]
LEAST_SHARE = 0.05  # risk curves start here: the mean error of fewer cases says little
CIRCLE, SQUARE = 0, 1  # series whose symbols these are

# Sizes in a chart's own unit, which is about one px on a phone
WIDTH, HEIGHT = 340, 250
FONT_SIZE, LETTER_WIDTH, LINE_HEIGHT = 12, 7, 14
PLOT_SHARE = 0.8  # about the share of width and height that the axes leave to the plot
# matplotlib draws in the page's light colours. `to_inline_svg` replaces them by the variables.
CSS_VARIABLES = {
    "#0060a8": "var(--s0)",
    "#c44f00": "var(--s1)",
    "#007a55": "var(--s2)",
    "#8d4a8f": "var(--s3)",
    "#1b2128": "var(--ink)",
    "#59626d": "var(--dim)",
    "#d5d9df": "var(--line)",
    "#ffffff": "var(--card)",
}
*SERIES, INK, DIM, LINE, CARD = CSS_VARIABLES
# Cut from matplotlib's SVG: what HTML does not need, and a style sheet, which the page forbids
UNWANTED = (
    r'<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>| xmlns(:\w+)?="[^"]*"|(?<= )xlink:'
    r"|(?<=>)\s+(?=<)"
)
TOOLTIP = "title:"  # prefix of an element's id; the rest of the id is its tooltip
MARKERS = "os^D"  # of the series, as `symbol_path` draws them
DOTTED = (0, (1, 2))  # lengths in widths of the line
DASHES = ("-", (0, (4, 2)), DOTTED)  # of the series, as the .dash classes
CHART_SETTINGS: dict[Any, Any] = {
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
    "font.size": FONT_SIZE,
    "grid.color": LINE,
    "svg.fonttype": "none",  # text stays text
    **{f"{axis}tick.labelcolor": INK for axis in "xy"},
    **{f"{axis}tick.major.size": 0 for axis in "xy"},
    **{f"{axis}tick.major.pad": 6 for axis in "xy"},
}
# Style sheet of all that this module makes. Label and answer have the colours of
# training.evaluation.pictures.
FIGURES_STYLE = """\
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
    tooltips: Sequence[str],
    agreement: BlandAltman,
) -> str:
    """Bland-Altman plot: answer minus label over their mean, both in degrees, for each case."""
    figure, axes = new_chart("mean of answer and label, deg", "answer − label, deg")
    axes.axhline(0, color=DIM, linestyle=DOTTED)
    lines = agreement.lower, agreement.bias, agreement.upper
    for one, dash in zip(lines, ("dashed", "solid", "dashed"), strict=True):
        axes.axhspan(one.low, one.high, color=to_rgba(SERIES[0], 0.13), linewidth=0)
        axes.axhline(one.value, color=INK, linestyle=DASHES[dash == "dashed"])
    for case in zip(mean, difference, series, tooltips, strict=True):
        draw_symbol(axes, *case)
    # The texts stand beside the lines, further apart where they would touch.
    least_deg = np.ptp(axes.get_ylim()) * LINE_HEIGHT / (PLOT_SHARE * HEIGHT)
    apart_deg = max(least_deg, agreement.upper.value - agreement.bias.value)
    for one, side in zip(lines, (-1, 0, 1), strict=True):
        axes.text(
            1.02,
            agreement.bias.value + side * apart_deg,
            signed_text(one.value),
            color=INK,
            fontsize=FONT_SIZE,
            va="center",
            transform=axes.get_yaxis_transform(),
        )
    return to_inline_svg(figure, "Difference of answer and label over their mean")


def cumulative_chart(radial_px: Floats, last_px: float) -> str:
    """Share of cases within a radial error, for each landmark (column), up to `last_px`."""
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
    """Estimates with intervals: for each group one of each series, side by side.

    Args:
        groups: names below the axis, of one or more lines. A line without room is cut.
        series: for each series its estimates, in the order of the groups.
        label: quantity and unit of the vertical axis.
        name: what the chart shows, in words.
    """
    figure, axes = new_chart("", label)
    for s, row in enumerate(series):
        for k, one in enumerate(row):
            x = k + 0.22 * (s - (len(series) - 1) / 2)
            draw_interval(axes, x, one, s, interval_text(one))
    letters = int(PLOT_SHARE * WIDTH / len(groups) / LETTER_WIDTH)
    lines = [[shorten(line, letters) for line in group.split("\n")] for group in groups]
    labels = ["\n".join(map(visible_text, group)) for group in lines]
    axes.set_xticks(range(len(groups)), labels, parse_math=False)  # a name may hold "$"
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(bottom=0)
    return to_inline_svg(figure, name)


def calibration_chart(
    series: Sequence[Sequence[tuple[float, Estimate]]], unit: str, name: str
) -> str:
    """Observed over expected error in bins of cases, for each series.

    Args:
        series: for each series its bins: mean expected error, and observed error.
        unit: of both errors.
        name: what the chart shows, in words.
    """
    figure, axes = new_chart(f"expected error, {unit}", f"observed error, {unit}")
    axes.axline((0, 0), slope=1, color=DIM, linestyle=DOTTED)
    for k, row in enumerate(series):
        for expected, observed in row:
            tooltip = f"expected {expected:.1f}, observed {interval_text(observed)}"
            draw_interval(axes, expected, observed, k, tooltip)
    last = max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.set(xlim=(0, last), ylim=(0, last))
    return to_inline_svg(figure, name)


def risk_chart(error: Floats, risk: Floats) -> str:
    """Mean AoP error of the answered cases over their share, for three orders of answering.

    The orders are that of `risk`, that of the error (the best possible), and a random one.
    """
    figure, axes = new_chart("cases answered, %", "their mean AoP error, deg")
    start = min(math.ceil(LEAST_SHARE * len(error)), len(error)) - 1
    for k, by in enumerate((risk, error, np.zeros(len(error)))):
        share, curve = risk_coverage(error, by)
        axes.plot(100 * share[start:], curve[start:], color=SERIES[k], linestyle=DASHES[k])
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    return to_inline_svg(figure, "Mean error of the angle over the share of cases answered")


def new_chart(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """An empty chart and its axes."""
    with rc_context(CHART_SETTINGS):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    return figure, axes


def draw_symbol(
    axes: Axes, x: float, y: float, series: int, tooltip: str, radius: float = 3
) -> None:
    """Draw the symbol of a series at a point, with a tooltip."""
    (symbol,) = axes.plot(x, y, MARKERS[series % 4], markersize=2 * radius, clip_on=False)
    symbol.set(markerfacecolor=to_rgba(CARD, 0.55), markeredgecolor=SERIES[colour_index(series)])
    symbol.set(markeredgewidth=1.4, gid=TOOLTIP + visible_text(tooltip))


def draw_interval(axes: Axes, x: float, one: Estimate, series: int, tooltip: str) -> None:
    """Draw an estimate as a symbol, on a line from end to end of its interval."""
    axes.plot((x, x), (one.low, one.high), color=SERIES[colour_index(series)])
    draw_symbol(axes, x, one.value, series, tooltip, radius=4)


def to_inline_svg(figure: Figure, name: str) -> str:
    """The chart as inline SVG; `name` says in words what it shows.

    matplotlib writes `style` attributes, which the page's policy forbids. They become presentation
    attributes. An id stays only if something refers to it. Ids are digests salted with the name, so
    two charts of one page must differ in name.
    """
    drawn = io.StringIO()
    with (
        rc_context(CHART_SETTINGS | {"svg.hashsalt": visible_text(name)}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has more fonts
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    source = re.sub(UNWANTED, "", drawn.getvalue(), flags=re.DOTALL)
    svg = ElementTree.fromstring(source)
    for element in svg.iter():
        attributes = dict(element.attrib)
        style = attributes.pop("style", "")
        declarations = (one.split(": ", 1) for one in style.split("; ") if one)
        attributes |= {key: value for key, value in declarations if not key.startswith("font")}
        identity = attributes.pop("id", "")
        element.attrib = {
            key: short_value(CSS_VARIABLES.get(value, value)) for key, value in attributes.items()
        }
        if identity.startswith(TOOLTIP):
            title = ElementTree.Element("title")
            title.text = identity.removeprefix(TOOLTIP)
            element.insert(0, title)
        elif identity and f"#{identity}" in source:
            element.set("id", identity)
    svg.attrib = {"class": "chart", "viewBox": svg.get("viewBox", ""), "role": "img"}
    svg.set("aria-label", visible_text(name))
    return ElementTree.tostring(svg, encoding="unicode")


def short_value(value: str) -> str:
    """An attribute's value on one line, its numbers cut to two decimals."""
    return re.sub(r"(\.\d\d)\d+", r"\1", " ".join(value.split()))


def visible_text(text: str) -> str:
    """Text whose control characters, which XML forbids, are replaced as `escape` does it."""
    return html.unescape(escape(text))


# ---- Around a chart: legend, caption, numbers as text


def legend(names: Sequence[str], line: bool = False) -> str:
    """HTML that names each series beside its symbol, or beside its line."""
    keys = []
    for k, name in enumerate(names):
        stroke = f'<path class="s{colour_index(k)} dash{k}" d="M1 7h26"/>'
        dot = f'<path class="dot s{colour_index(k)}" d="{symbol_path(14, 7, k, 4)}"/>'
        drawn = f'<svg viewBox="0 0 28 14" aria-hidden="true">{stroke if line else dot}</svg>'
        keys.append(f'<span class="key">{drawn}{escape(name)}</span>')
    return f'<p class="keys">{"".join(keys)}</p>'


def figure_html(svg: str, keys: str, caption: str) -> str:
    """HTML of a chart with its legend and caption; all three are HTML."""
    return f'<figure class="card">{svg}{keys}<figcaption>{caption}</figcaption></figure>'


def symbol_path(x: float, y: float, series: int, r: float) -> str:
    """SVG path of a series' symbol around (x, y): circle, square, triangle or diamond."""
    shapes = (
        ((x - r, y), f"a{r:.2f} {r:.2f} 0 1 0 {2 * r:.2f} 0a{r:.2f} {r:.2f} 0 1 0 {-2 * r:.2f} 0"),
        ((x - r, y - r), f"h{2 * r:.2f}v{2 * r:.2f}h{-2 * r:.2f}"),
        ((x, y - 1.3 * r), f"l{1.2 * r:.2f} {2.2 * r:.2f}h{-2.4 * r:.2f}"),
        ((x, y - 1.4 * r), "l{0} {0}l-{0} {0}l-{0} -{0}".format(f"{1.4 * r:.2f}")),
    )
    (left, top), outline = shapes[series % 4]
    return f"M{left:.2f} {top:.2f}{outline}z"


def colour_index(series: int) -> int:
    """Index of a series' colour. Colour and symbol together tell sixteen series apart."""
    return (series + series // 4) % 4


def interval_text(one: Estimate, places: int = 1, unit: str = "") -> str:
    """An estimate and its interval as text: 9.03 (8.35 to 9.70)."""
    rounded = (round(number, places) + 0.0 for number in one)  # + 0.0 turns -0.0 into 0.0
    value, low, high = (f"{number:.{places}f}".replace("-", "−") for number in rounded)
    return f"{value}{unit} ({low} to {high})"


def signed_text(value: float) -> str:
    """A number with one decimal and its sign."""
    return f"{value:+.1f}".replace("-", "−")


def shorten(text: str, letters: int) -> str:
    """Text of at most this many letters; an ellipsis stands for the rest."""
    return text if len(text) <= letters else text[: max(1, letters - 1)] + "…"


# ---- Pictures of cases


def picture_of_case(
    grey: Pixels, pixel_shape: Pair, label: Floats, answer: Floats, description: str
) -> str:
    """HTML of an image with both readings drawn over it.

    The label has squares and full lines, the answer circles and dashed lines. They are SVG above
    the picture, so that they stay thin at any size.

    Args:
        grey: (H, W), 0..255.
        pixel_shape: (width, height) of a pixel, in any unit.
        label, answer: (3, 2) landmarks in px of `grey`.
        description: what the picture shows, in plain text.
    """
    height, width = grey.shape
    box = Letterbox(width, height, min(LONGEST_PX, max(width, height)), pixel_shape)
    small = cv2.resize(grey.astype(np.float32), box.resized, interpolation=cv2.INTER_AREA)
    byte = np.clip(np.rint(small), 0, 255).astype(np.uint8)
    data = base64.b64encode(cv2.imencode(".jpg", byte, JPEG_OPTIONS)[1].tobytes()).decode()
    wide, high = box.resized
    paths = []
    for points, kind, series in ((label, "truth", SQUARE), (answer, "answer", CIRCLE)):
        ps1, ps2, fh1 = corners = (points + 0.5) * box.scale  # SVG has 0 at a pixel's corner
        beyond = ps1 + (fh1 - ps1) * BEYOND
        lines = "M{:.2f} {:.2f}L{:.2f} {:.2f}L{:.2f} {:.2f}".format(*ps2, *ps1, *beyond)
        radius = 0.016 * max(wide, high)
        marks = "".join(symbol_path(corners[k, 0], corners[k, 1], series, radius) for k in Landmark)
        dashed = " dashed" if kind == "answer" else ""
        for under in (True, False):
            classes = f"{kind} under" if under else kind
            paths.append(f'<path class="{classes}{dashed}" d="{lines}"/>')
            paths.append(f'<path class="{classes}" d="{marks}"/>')
    return (
        f'<div class="picture"><img width="{wide}" height="{high}" alt="{escape(description)}" '
        f'src="data:image/jpeg;base64,{data}"><svg viewBox="0 0 {wide} {high}" '
        f'aria-hidden="true">{"".join(paths)}</svg></div>'
    )


def reading_switch(kind: str, text: str) -> str:
    """HTML of a check box that shows or hides a reading in all pictures.

    kind: "truth" or "answer". text: HTML beside the box and a sample of the reading's lines.
    """
    dashed, series = ("", SQUARE) if kind == "truth" else (" dashed", CIRCLE)
    return (
        f'<label class="key"><input type="checkbox" id="show-{kind}" checked>'
        '<svg class="onblack" viewBox="0 0 28 14" aria-hidden="true">'
        f'<path class="mark {kind}{dashed}" d="M1 7h26"/>'
        f'<path class="mark {kind}" d="{symbol_path(14, 7, series, 4)}"/></svg>{text}</label>'
    )
