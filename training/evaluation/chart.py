"""A chart: inline SVG, drawn at the width of a phone, part by part.

Colours come from classes (`figures.STYLE`); series differ in shape or dash as well.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from model.drawing.page import escape
from training.evaluation.statistics import Estimate

WIDTH, HEIGHT = 340, 250  # of a figure, in its own units: about px on a phone
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 12, 42  # around its plot
TEXT = 14  # least distance of two lines of text
CIRCLE, SQUARE = 0, 1  # the series with these symbols


@dataclass(frozen=True)
class Axis:
    """A range of values, what they are, and where names stand instead of numbers, those."""

    low: float
    high: float
    label: str
    names: Mapping[float, str] | None = None

    @property
    def ticks(self) -> dict[float, str]:
        """Value -> words: up to six round numbers, or the names."""
        if self.names is not None:
            return dict(self.names)
        rough = (self.high - self.low) / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return {k * step: f"{k * step:g}".replace("-", "−") for k in range(first, last + 1)}


def axis_of(values: Iterable[float], label: str, low: float | None = None) -> Axis:
    """An axis with a little room around the values, or from a fixed low end."""
    known = [float(value) for value in values]
    start = min(known) if low is None else low
    room = 0.06 * (max(known) - start) or 1.0
    return Axis(start - (room if low is None else 0), max(known) + room, label)


@dataclass
class Chart:
    """A figure that is drawn part by part; `name` says in words what it shows."""

    x: Axis
    y: Axis
    name: str
    right: int = RIGHT
    parts: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Data -> the figure's own units, y down."""
        across = (x - self.x.low) / (self.x.high - self.x.low) * (WIDTH - LEFT - self.right)
        up = (y - self.y.low) / (self.y.high - self.y.low) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    def line(self, x: Iterable[float], y: Iterable[float], kind: str) -> None:
        """A line through points."""
        points = " ".join("{},{}".format(*self.at(*point)) for point in zip(x, y, strict=True))
        self.parts.append(f'<path class="{kind}" d="M{points}"/>')

    def level(self, y: float, kind: str) -> None:
        """A line from left to right."""
        self.line((self.x.low, self.x.high), (y, y), kind)

    def dot(self, x: float, y: float, series: int, words: str = "", radius: float = 3) -> None:
        """The symbol of a series, with words that a pointer over it shows."""
        path = symbol(*self.at(x, y), series, radius)
        title = f"<title>{escape(words)}</title>" if words else ""
        self.parts.append(f'<path class="dot {colour(series)}" d="{path}">{title}</path>')

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        """Words at a place in the figure's own units."""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">'
            f"{escape(words)}</text>"
        )

    def svg(self) -> str:
        """The figure with its axes."""
        axes = Chart(self.x, self.y, self.name, self.right)
        for value, words in self.x.ticks.items():
            axes.line((value, value), (self.y.low, self.y.high), "grid")
            for k, row in enumerate(words.split("\n")):
                at = HEIGHT - BOTTOM + TEXT * (k + 1)
                axes.text(self.at(value, 0)[0], at, row, "small" if k else "", "middle")
        for value, words in self.y.ticks.items():
            axes.level(value, "grid")
            axes.text(LEFT - 6, self.at(0, value)[1] + 4, words, anchor="end")
        axes.line([self.x.low, self.x.low, self.x.high], [self.y.high, *[self.y.low] * 2], "axis")
        if self.x.label:
            below, middle = HEIGHT - BOTTOM + 33, (LEFT + WIDTH - self.right) / 2
            axes.text(middle, below, self.x.label, anchor="middle")
        middle = (HEIGHT - BOTTOM + TOP) / 2
        turned = f'transform="translate(12 {middle}) rotate(-90)" text-anchor="middle"'
        axes.parts.append(f"<text {turned}>{escape(self.y.label)}</text>")
        return (
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(self.name)}">{"".join([*axes.parts, *self.parts])}</svg>'
        )


def symbol(x: float, y: float, series: int, r: float) -> str:
    """Path of a circle, square, triangle or diamond."""
    shapes = (
        ((x - r, y), f"a{r:.2f} {r:.2f} 0 1 0 {2 * r:.2f} 0a{r:.2f} {r:.2f} 0 1 0 {-2 * r:.2f} 0"),
        ((x - r, y - r), f"h{2 * r:.2f}v{2 * r:.2f}h{-2 * r:.2f}"),
        ((x, y - 1.3 * r), f"l{1.2 * r:.2f} {2.2 * r:.2f}h{-2.4 * r:.2f}"),
        ((x, y - 1.4 * r), "l{0} {0}l-{0} {0}l-{0} -{0}".format(f"{1.4 * r:.2f}")),
    )
    (left, top), outline = shapes[series % 4]
    return f"M{left:.2f} {top:.2f}{outline}z"


def colour(series: int) -> str:
    """Class of a series' colour: with its symbol it tells sixteen series apart."""
    return f"s{(series + series // 4) % 4}"


def legend(names: Sequence[str], line: bool = False) -> str:
    """What each series' symbol, or line, means."""
    keys = []
    for k, name in enumerate(names):
        stroke = f'<path class="{colour(k)} dash{k % 4}" d="M1 7h26"/>'
        dot = f'<path class="dot {colour(k)}" d="{symbol(14, 7, k, 4)}"/>'
        drawn = f'<svg viewBox="0 0 28 14" aria-hidden="true">{stroke if line else dot}</svg>'
        keys.append(f'<span class="key">{drawn}{escape(name)}</span>')
    return f'<p class="keys">{"".join(keys)}</p>'


def figure(chart: Chart, keys: str, caption: str) -> str:
    """A chart with its legend and its caption (HTML)."""
    return f'<figure class="card">{chart.svg()}{keys}<figcaption>{caption}</figcaption></figure>'


def interval(one: Estimate, places: int = 1, unit: str = "") -> str:
    """A figure with its interval in words."""
    rounded = (round(number, places) + 0.0 for number in one)  # + 0.0: of -0.0
    value, low, high = (f"{number:.{places}f}".replace("-", "−") for number in rounded)
    return f"{value}{unit} ({low} to {high})"


def signed(value: float) -> str:
    """A number with one decimal and its sign."""
    return f"{value:+.1f}".replace("-", "−")


def short(words: str, letters: int) -> str:
    """Words cut to so many letters."""
    return words if len(words) <= letters else words[: max(1, letters - 1)] + "…"
