"""The result of a benchmark: the schema of benchmark.json, the gates, the text and the plot."""

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
BUSY_LOAD = 0.5  # processes; with a higher load before the run other programs disturb the times
INK, SYMBOLS = ("#0060a8", "#c44f00", "#007a55", "#8d4a8f"), "osD^v"  # for models with accuracy
FAINT = "#707070"  # for models without
TICK_HEIGHT = 0.08  # share of the panel


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MeanErrors(_Frozen):
    """Mean errors over all cases with labels; the MRE at 512 px."""

    mre_px: Interval
    aop_error_deg: Interval


class ModelFigures(_Frozen):
    """One model's figures.

    trained: False means random weights, which have no accuracy. images: number of timed images.
    milliseconds: "image" (the whole) and each stage -> time for one image. images_per_second: batch
    size -> rate of the network alone. slower: the network's time divided by the time of the first
    model's network; None for the first model. errors: None without labels.
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
    errors: MeanErrors | None


@dataclass(frozen=True)
class Demands:
    """The limits that the command line sets; None or an empty sequence sets none.

    For the first model: budget_ms for 95 % of images, most_mre_px at 512 px and most_aop_deg.
    least_ratio: (another model's name, smallest ratio of its network time to the first model's).
    """

    budget_ms: float | None = None
    least_ratio: Sequence[tuple[str, float]] = ()
    most_mre_px: float | None = None
    most_aop_deg: float | None = None


class Gate(_Frozen):
    """One limit: a sentence with the measured value and the limit, and whether it was kept."""

    words: str
    passed: bool


class BenchmarkSummary(_Frozen):
    """benchmark.json.

    load: mean number of processes that wanted the processor in the minute before the run. rounds:
    number that all models share. cuda: variant -> the first model's figures; None if unmeasured.
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
    """A gate for each limit. A ratio or an error is compared by its value, not by its interval."""
    first, gates = models[0], []
    if demands.budget_ms is not None:
        p95 = first.milliseconds["image"].p95
        words = f"{first.name}: 95 % of images within {p95:.1f} ms, budget {demands.budget_ms:g} ms"
        gates.append(Gate(words=words, passed=p95 <= demands.budget_ms))
    for name, least in demands.least_ratio:
        ratio = next(one.slower for one in models if one.name == name)
        assert ratio is not None  # the options do not allow the first model here
        words = (
            f"{name}: its network takes {ratio.value:.1f} times as long as {first.name}'s "
            f"(95 % {ratio.low:.1f} to {ratio.high:.1f}), expected at least {least:g}"
        )
        gates.append(Gate(words=words, passed=ratio.value >= least))
    for field, most, unit in (
        ("mre_px", demands.most_mre_px, "px MRE at 512 px"),
        ("aop_error_deg", demands.most_aop_deg, "deg AoP error"),
    ):
        if most is not None:
            error: Interval = getattr(first.errors, field)  # the options want --data for these
            words = f"{first.name}: {_interval_text(error)} {unit}, expected at most {most:g}"
            gates.append(Gate(words=words, passed=error.value <= most))
    return gates


def summary_text(summary: BenchmarkSummary) -> str:
    """Tables, the meaning of their columns, CUDA's variants and the gates."""
    first = summary.models[0].name
    load = "" if summary.load is None else f"; load before the run {summary.load:.1f}"
    parts = [
        f"{summary.provider}, {summary.threads} threads, {summary.processor}, "
        f"ONNX Runtime {summary.onnxruntime}{load}\n"
        f"{summary.images}; {summary.rounds} rounds; in each, every model gets the same image",
        _table_text(
            ["model", "weights", "parameters, M", "GMAC", "file, MB", "start, ms", "memory, MB"],
            [_size_cells(one) for one in summary.models],
        ),
        _table_text(
            ["ms: p50 / p95 / max", "images", "image", *STAGES],
            [
                [one.name, str(one.images), *map(_spread_text, one.milliseconds.values())]
                for one in summary.models
            ],
        ),
        _table_text(
            ["model", f"network / {first}'s", "images/s (batch)", "MRE, px", "AoP error, deg"],
            [_result_cells(one) for one in summary.models],
        ),
        _notes_text(summary),
    ]
    parts.append(UNMEASURED if summary.cuda is None else cuda_text(summary.cuda))
    if summary.gates:
        parts.append(
            "\n".join(f"{'ok    ' if g.passed else 'FAILED'} {g.words}" for g in summary.gates)
        )
    return "\n\n".join(parts)


def cuda_text(figures: Mapping[str, CudaFigures]) -> str:
    """A line for each variant with its figures, or with the reason why there are none."""
    lines = ["CUDA, the first model's network alone"]
    for name, variant in figures.items():
        cells = [f"{k} {v}" if isinstance(v, str) else f"{k} {v:.2f}" for k, v in variant.items()]
        lines.append(f"  {name:<30}" + ", ".join(cells))
    return "\n".join(lines)


def _notes_text(summary: BenchmarkSummary) -> str:
    lines = [
        "image: preprocess, inference (the network alone) and decode, without reading and writing.",
        f"network / {summary.models[0].name}'s: ratio of the median inference times in the shared "
        "rounds,\n  with a 95 % bootstrap interval over rounds.",
        "start: from the file to a session that answers; memory: peak of a process of its own.",
        "images/s: rate of the network alone at the best of several batch sizes (in brackets).",
    ]
    if any(not one.trained for one in summary.models):
        lines.append("random weights: time does not depend on their values; they have no accuracy.")
    if summary.load is not None and summary.load > BUSY_LOAD:
        lines.append("the processor was busy with other programs before the run: times are rough.")
    if any(one.errors for one in summary.models):
        lines.append("MRE (px at 512) and AoP error: means over all images, with 95 % intervals.")
    return "\n".join(lines)


def _size_cells(one: ModelFigures) -> list[str]:
    memory = [one.footprint.peak_memory_mb, one.footprint.device_memory_mb]
    known = [three_digits(mb) for mb in memory if mb is not None]
    return [
        one.name,
        "trained" if one.trained else "random",
        f"{one.parameters / 1e6:.2f}",
        "-" if one.gmac is None else f"{one.gmac:.2f}",
        f"{one.file_mb:.1f}",
        three_digits(one.footprint.start_ms),
        " + GPU ".join(known) or "-",
    ]


def _result_cells(one: ModelFigures) -> list[str]:
    rates = [(rate, batch) for batch, rate in one.images_per_second.items()]
    errors = [one.errors.mre_px, one.errors.aop_error_deg] if one.errors else [None, None]
    return [
        one.name,
        "1" if one.slower is None else _interval_text(one.slower),
        f"{three_digits(max(rates)[0])} ({max(rates)[1]})" if rates else "-",
        *("-" if error is None else _interval_text(error) for error in errors),
    ]


def _spread_text(one: Spread) -> str:
    return f"{three_digits(one.p50)} / {three_digits(one.p95)} / {three_digits(one.max)}"


def _interval_text(one: Interval) -> str:
    return f"{three_digits(one.value)} ({three_digits(one.low)} to {three_digits(one.high)})"


def three_digits(value: float) -> str:
    """A positive number with at least three significant digits, from 100 on as a whole number."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _table_text(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, *rows]:
        first, *cells = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([first.strip().ljust(widths[0]), *cells]))
    return "\n".join(lines)


def plot_summary(summary: BenchmarkSummary) -> bytes:
    """A PNG of MRE and AoP error over the time for an image; models without accuracy are ticks."""
    import matplotlib  # noqa: PLC0415  slow, and used here alone

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    known = any(one.errors for one in summary.models)
    labels = ("MRE, px at 512", "AoP error, deg") if known else ("",)
    size = (5.5 * len(labels), 4.2) if known else (7.5, 2.4)
    figure, axes = plt.subplots(
        1, len(labels), figsize=size, constrained_layout=True, squeeze=False
    )
    for axis, label in zip(axes[0], labels, strict=True):
        for k, one in enumerate(summary.models):
            if one.errors is None:
                _plot_tick(axis, one)
            else:
                is_mre = label.startswith("MRE")
                error = one.errors.mre_px if is_mre else one.errors.aop_error_deg
                _plot_errors(axis, one, error, k)
        _label_axes(axis, summary, label)
    figure.suptitle(
        f"{summary.provider}, {summary.threads} threads, {summary.processor}; {summary.images}",
        fontsize=9,
    )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
    return file.getvalue()


def _plot_errors(axis: "Axes", one: ModelFigures, error: Interval, k: int) -> None:
    """A symbol at the median time and the error; lines to the 95th percentile and the interval."""
    time, colour = one.milliseconds["image"], INK[k % len(INK)]
    axis.errorbar(
        [time.p50],
        [error.value],
        xerr=np.array([[0.0], [time.p95 - time.p50]]),
        yerr=np.array([[error.value - error.low], [error.high - error.value]]),
        fmt=SYMBOLS[k % len(SYMBOLS)], color=colour, ecolor=colour, elinewidth=1, label=one.name,
    )  # fmt: skip


def _plot_tick(axis: "Axes", one: ModelFigures) -> None:
    """A tick at the median time, with a line to the 95th percentile and the model's name."""
    time, place = one.milliseconds["image"], axis.get_xaxis_transform()
    axis.plot([time.p50] * 2, [0, TICK_HEIGHT], color=FAINT, transform=place, linewidth=2)
    middle = [TICK_HEIGHT / 2] * 2
    axis.plot([time.p50, time.p95], middle, color=FAINT, transform=place, linewidth=1)
    label = one.name if not one.trained else f"{one.name} (no labels)"
    axis.text(
        time.p50, TICK_HEIGHT + 0.02, label, color=FAINT, rotation=90, transform=place, ha="center",
        va="bottom", fontsize=9,
    )  # fmt: skip


def _label_axes(axis: "Axes", summary: BenchmarkSummary, label: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter  # noqa: PLC0415

    times = [one.milliseconds["image"] for one in summary.models]
    axis.set_xscale("log")
    low, high = min(t.p50 for t in times) / 1.6, max(t.p95 for t in times) * 1.6
    axis.set_xlim(low, high)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("ms for an image: median, line to the 95th percentile")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    if label:
        axis.set_ylim(0, axis.get_ylim()[1] * 1.08)
        axis.legend()
    else:
        axis.set_yticks([])
