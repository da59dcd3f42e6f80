"""What a benchmark found: the schema of benchmark.json, gates, text and plot."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict

from export.benchmarks.timing import STAGES, CudaFigures, Footprint, Interval, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNMEASURED = "CUDA: unmeasured (no CUDA provider)"
BUSY = 0.5  # with a higher load before the run, other programs disturb the times
INK, SYMBOLS = ("#0060a8", "#c44f00", "#007a55", "#8d4a8f"), "osD^v"  # of models with accuracy
FAINT = "#707070"
TICK = 0.08  # height of a tick, as a share of the panel


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Errors(_Frozen):
    """Mean errors at 512 px over all cases with labels."""

    mre_px: Interval
    aop_error_deg: Interval


class ModelFigures(_Frozen):
    """One model's figures.

    trained: False means random weights, and so no accuracy. images: how many were timed.
    milliseconds: of an image as a whole and by stage, at batch 1. images_per_second: batch size ->
    rate of the network alone. slower: time of its network over that of the first model's; None for
    the first.
    """

    name: str
    trained: bool
    parameters: int
    gmac: float | None
    file_mb: float
    footprint: Footprint
    images: int
    milliseconds: dict[str, Spread]
    images_per_second: dict[int, float]
    slower: Interval | None
    errors: Errors | None


@dataclass(frozen=True)
class Demands:
    """What the command line demands; None or nothing demands nothing.

    Of the first model: budget_ms for 95 % of images, most_mre_px at 512 px and most_aop_deg.
    least_ratio: (name, how many times the first model's network time that model's must be).
    """

    budget_ms: float | None = None
    least_ratio: Sequence[tuple[str, float]] = ()
    most_mre_px: float | None = None
    most_aop_deg: float | None = None


class Gate(_Frozen):
    """One demand, in words that hold what was measured."""

    words: str
    passed: bool


class Report(_Frozen):
    """benchmark.json.

    load: mean number of processes that wanted the processor in the minute before the run. rounds:
    those that all models share. cuda: the first model's, by variant; None if unmeasured.
    """

    provider: str
    processor: str
    threads: int
    onnxruntime: str
    load: float | None
    images: str
    rounds: int
    models: list[ModelFigures]
    gates: list[Gate] = []
    cuda: dict[str, CudaFigures] | None = None


def check_gates(models: Sequence[ModelFigures], demands: Demands) -> list[Gate]:
    """A gate for each demand. A ratio or an error counts by its value, not by its interval."""
    first, gates = models[0], []
    if demands.budget_ms is not None:
        p95 = first.milliseconds["image"].p95
        words = f"{first.name}: 95 % of images within {p95:.1f} ms, budget {demands.budget_ms:g} ms"
        gates.append(Gate(words=words, passed=p95 <= demands.budget_ms))
    for name, least in demands.least_ratio:
        found = next(one.slower for one in models if one.name == name)
        assert found is not None  # it is not the first
        words = (
            f"{name}: its network takes {found.value:.1f} times as long as {first.name}'s "
            f"(95 % {found.low:.1f} to {found.high:.1f}), at least {least:g} wanted"
        )
        gates.append(Gate(words=words, passed=found.value >= least))
    for field, most, unit in (
        ("mre_px", demands.most_mre_px, "px MRE at 512 px"),
        ("aop_error_deg", demands.most_aop_deg, "deg AoP error"),
    ):
        if most is not None:
            error: Interval = getattr(first.errors, field)  # which --data has given
            words = f"{first.name}: {_interval(error)} {unit}, at most {most:g} wanted"
            gates.append(Gate(words=words, passed=error.value <= most))
    return gates


def as_text(report: Report) -> str:
    """The report as tables, with what the figures mean, and the gates."""
    first = report.models[0].name
    load = "" if report.load is None else f"; load before the run {report.load:.1f}"
    parts = [
        f"{report.provider}, {report.threads} threads, {report.processor}, "
        f"ONNX Runtime {report.onnxruntime}{load}\n"
        f"{report.images}; {report.rounds} rounds, in each every model gets the same one image",
        _table(
            ["model", "weights", "parameters, M", "GMAC", "file, MB", "start, ms", "memory, MB"],
            [_sizes(one) for one in report.models],
        ),
        _table(
            ["ms: p50 / p95 / max", "images", "image", *STAGES],
            [
                [one.name, str(one.images), *map(_spread, one.milliseconds.values())]
                for one in report.models
            ],
        ),
        _table(
            ["model", f"network / {first}'s", "images/s (batch)", "MRE, px", "AoP error, deg"],
            [_results(one) for one in report.models],
        ),
        _notes(report),
    ]
    parts.append(UNMEASURED if report.cuda is None else cuda_text(report.cuda))
    if report.gates:
        parts.append(
            "\n".join(f"{'ok    ' if g.passed else 'FAILED'} {g.words}" for g in report.gates)
        )
    return "\n\n".join(parts)


def cuda_text(figures: Mapping[str, CudaFigures]) -> str:
    """A line a variant."""
    lines = ["CUDA, the first model's network alone"]
    for name, found in figures.items():
        cells = [f"{k} {v}" if isinstance(v, str) else f"{k} {v:.2f}" for k, v in found.items()]
        lines.append(f"  {name:<30}" + ", ".join(cells))
    return "\n".join(lines)


def _notes(report: Report) -> str:
    lines = [
        "image: preprocess, inference (the network alone) and decode; no reading, no writing.",
        f"network / {report.models[0].name}'s: ratio of the median inference times in the shared "
        "rounds,\n  with a 95 % bootstrap interval over rounds, both times of a round together.",
        "start: from the file to a session that answers; memory: peak of a process of its own.",
        "images/s: of the network alone, at the best of several batch sizes (in brackets).",
    ]
    if any(not one.trained for one in report.models):
        lines.append("random weights: time does not depend on their values; there is no accuracy.")
    if report.load is not None and report.load > BUSY:
        lines.append("the processor was busy with other programs before the run: times are rough.")
    if any(one.errors for one in report.models):
        lines.append("MRE and AoP error: of all these images, at 512 px, with 95 % intervals.")
    return "\n".join(lines)


def _sizes(one: ModelFigures) -> list[str]:
    memory = [one.footprint.peak_memory_mb, one.footprint.device_memory_mb]
    shown = [number(mb) for mb in memory if mb is not None]
    return [
        one.name,
        "trained" if one.trained else "random",
        f"{one.parameters / 1e6:.2f}",
        "-" if one.gmac is None else f"{one.gmac:.2f}",
        f"{one.file_mb:.1f}",
        number(one.footprint.start_ms),
        " + GPU ".join(shown) or "-",
    ]


def _results(one: ModelFigures) -> list[str]:
    rates = [(rate, batch) for batch, rate in one.images_per_second.items()]
    errors = [one.errors.mre_px, one.errors.aop_error_deg] if one.errors else [None, None]
    return [
        one.name,
        "1" if one.slower is None else _interval(one.slower),
        f"{number(max(rates)[0])} ({max(rates)[1]})" if rates else "-",
        *("-" if error is None else _interval(error) for error in errors),
    ]


def _spread(one: Spread) -> str:
    return f"{number(one.p50)} / {number(one.p95)} / {number(one.max)}"


def _interval(one: Interval) -> str:
    return f"{number(one.value)} ({number(one.low)} to {number(one.high)})"


def number(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, *rows]:
        first, *cells = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([first.strip().ljust(widths[0]), *cells]))
    return "\n".join(lines)


def plot(report: Report) -> bytes:
    """A PNG: MRE and AoP error over the time an image takes. Models without accuracy are ticks."""
    import matplotlib  # noqa: PLC0415  slow, and only for this

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    known = any(one.errors for one in report.models)
    labels = ("MRE, px at 512", "AoP error, deg") if known else ("",)
    size = (5.5 * len(labels), 4.2) if known else (7.5, 2.4)
    figure, axes = plt.subplots(
        1, len(labels), figsize=size, constrained_layout=True, squeeze=False
    )
    for axis, label in zip(axes[0], labels, strict=True):
        for k, one in enumerate(report.models):
            if one.errors is None:
                _tick(axis, one)
            else:
                of_mre = label.startswith("MRE")
                error = one.errors.mre_px if of_mre else one.errors.aop_error_deg
                _point(axis, one, error, k)
        _frame(axis, report, label)
    figure.suptitle(
        f"{report.provider}, {report.threads} threads, {report.processor}; {report.images}",
        fontsize=9,
    )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
    return file.getvalue()


def _point(axis: "Axes", one: ModelFigures, error: Interval, k: int) -> None:
    """A model at its median time and its error, lines to the 95th percentile and the interval."""
    time, colour = one.milliseconds["image"], INK[k % len(INK)]
    axis.errorbar(
        [time.p50],
        [error.value],
        xerr=np.array([[0.0], [time.p95 - time.p50]]),
        yerr=np.array([[error.value - error.low], [error.high - error.value]]),
        fmt=SYMBOLS[k % len(SYMBOLS)], color=colour, ecolor=colour, elinewidth=1, label=one.name,
    )  # fmt: skip


def _tick(axis: "Axes", one: ModelFigures) -> None:
    time, place = one.milliseconds["image"], axis.get_xaxis_transform()
    axis.plot([time.p50] * 2, [0, TICK], color=FAINT, transform=place, linewidth=2)
    axis.plot([time.p50, time.p95], [TICK / 2] * 2, color=FAINT, transform=place, linewidth=1)
    words = one.name if not one.trained else f"{one.name} (no labels)"
    axis.text(
        time.p50, TICK + 0.02, words, color=FAINT, rotation=90, transform=place, ha="center",
        va="bottom", fontsize=9,
    )  # fmt: skip


def _frame(axis: "Axes", report: Report, label: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter  # noqa: PLC0415

    times = [one.milliseconds["image"] for one in report.models]
    axis.set_xscale("log")
    low, high = min(t.p50 for t in times) / 1.6, max(t.p95 for t in times) * 1.6
    axis.set_xlim(low, high)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("ms an image: median, line to the 95th percentile")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    if label:
        axis.set_ylim(0, axis.get_ylim()[1] * 1.08)
        axis.legend()
    else:
        axis.set_yticks([])
