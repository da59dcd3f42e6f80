"""What a benchmark found: benchmark.json's schema, its text, and its gates."""

import argparse
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from export import benchmark_cuda
from export.footprint import Footprint
from export.timing import STAGES, Interval, Spread

UNMEASURED = "CUDA: unmeasured (no CUDA provider)"


BUSY = 0.5  # a load from which on other programs are felt


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Errors(_Frozen):
    """Mean errors at 512 px over all cases with labels."""

    mre_px: Interval
    aop_error_deg: Interval


class ModelFigures(_Frozen):
    """One model's figures.

    trained: False has random weights, and no accuracy. images: so many were timed. milliseconds:
    of an image as a whole and by stage, at batch 1. images_per_second: batch size -> those of the
    network alone. slower: how many times the first model's network time its own is (None: it is
    the first).
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


class Gate(_Frozen):
    """One demand of the command line, in words that hold what was measured."""

    words: str
    passed: bool


class Report(_Frozen):
    """benchmark.json. load: processes that wanted the processor before the run, a minute's mean.

    rounds: those that all models share. cuda: by variant, of the first model; None: unmeasured.
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
    cuda: dict[str, benchmark_cuda.Figures] | None = None


def gates_of(models: Sequence[ModelFigures], args: argparse.Namespace) -> list[Gate]:
    """The gates that the command line asks for; those of time and accuracy are the first model's.

    A ratio counts by its value, not by its interval's end.
    """
    first, gates = models[0], []
    if args.budget_ms is not None:
        p95 = first.milliseconds["image"].p95
        words = f"{first.name}: 95 % of images within {p95:.1f} ms, budget {args.budget_ms:g} ms"
        gates.append(Gate(words=words, passed=p95 <= args.budget_ms))
    for name, least in args.least_ratio:
        found = next(one.slower for one in models if one.name == name)
        assert found is not None  # it is not the first
        words = (
            f"{name}: its network takes {found.value:.1f} times as long as {first.name}'s "
            f"(95 % {found.low:.1f} to {found.high:.1f}), at least {least:g} wanted"
        )
        gates.append(Gate(words=words, passed=found.value >= least))
    for field, most, unit in (
        ("mre_px", args.most_mre_px, "px MRE at 512 px"),
        ("aop_error_deg", args.most_aop_deg, "deg AoP error"),
    ):
        if most is not None:
            error: Interval = getattr(first.errors, field)  # which --data has given
            words = f"{first.name}: {_interval(error)} {unit}, at most {most:g} wanted"
            gates.append(Gate(words=words, passed=error.value <= most))
    return gates


def as_text(report: Report) -> str:
    """The report as tables, what the figures mean, and the gates."""
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
    parts.append(UNMEASURED if report.cuda is None else benchmark_cuda.as_text(report.cuda))
    if report.gates:
        parts.append(
            "\n".join(f"{'ok    ' if g.passed else 'FAILED'} {g.words}" for g in report.gates)
        )
    return "\n\n".join(parts)


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
    """Three digits, or all of those before the point."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, *rows]:
        first, *cells = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([first.strip().ljust(widths[0]), *cells]))
    return "\n".join(lines)
