"""benchmark.png: accuracy against latency, and ticks for models whose accuracy is not known."""

import io
from typing import TYPE_CHECKING

import numpy as np

from export.benchmark_report import ModelFigures, Report
from export.timing import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SYMBOLS = ("#0060a8", "#c44f00", "#007a55", "#8d4a8f"), "osD^v"  # of models with accuracy
FAINT = "#707070"
TICK = 0.08  # height of a tick, of the panel


def plot(report: Report) -> bytes:
    """A PNG: MRE and AoP error over the time an image takes; without either, ticks alone."""
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
