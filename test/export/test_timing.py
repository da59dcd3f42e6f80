"""The benchmark's turns, percentiles, ratios, gates, text and plot, on made-up models."""

from types import SimpleNamespace

import numpy as np
import pytest

from export.benchmarks import summary, timing
from export.benchmarks.summary import (
    BenchmarkSummary,
    Demands,
    MeanErrors,
    ModelFigures,
    check_gates,
    summary_text,
)
from export.benchmarks.timing import Footprint, Interval, Spread, TimedImage
from model.predictor import EngineError, Output
from model.spec import ModelSpec


@pytest.fixture(autouse=True)
def rests(monkeypatch):
    """Seconds of every rest that the benchmark asked for; no test really rests."""
    rested: list = []
    monkeypatch.setattr(timing.time, "sleep", rested.append)
    return rested


class Fake:
    """A predictor that claims given times and logs the images and batch sizes it was shown."""

    spec = ModelSpec(input_size=64, mean=0, std=1, stride=8, sigma_cells=1)

    def __init__(self, name: str, log: list, ms: float = 1.0, most: int = 8) -> None:
        self.name, self.log, self.ms, self.most = name, log, ms, most

    def predict(self, grey, pixel_shape):
        self.log.append((self.name, int(grey[0, 0])))
        return SimpleNamespace(
            milliseconds={"preprocess": 1.0, "inference": self.ms, "decode": 2.0}
        )

    def run(self, images):
        if len(images) > self.most:
            raise EngineError("too many")
        self.log.append((self.name, len(images)))
        return Output(np.zeros((len(images), 3, 8, 8), np.float32))


IMAGES = [TimedImage(np.full((8, 8), k, np.uint8), (1.0, 1.0)) for k in range(3)]


def test_models_take_turns(rests):
    log: list = []
    names, rounds = "abcd", 8
    times = timing.take_turns({n: Fake(n, log) for n in names}, IMAGES, rounds, "")
    assert times["a"].tolist() == [[1.0, 1.0, 2.0]] * rounds
    assert rests == [timing.REST_S] * rounds * len(names)  # before each model
    turns = [log[4 * k : 4 * k + 4] for k in range(rounds)]
    for k, turn in enumerate(turns):
        assert sorted(name for name, _ in turn) == list(names)
        assert {shown for _, shown in turn} == {k % 3}  # the same image
    first = [turn[0][0] for turn in turns]
    assert all(first.count(name) == rounds / 4 for name in names)
    before = {turn[i - 1][0] for turn in turns for i in range(1, 4) if turn[i][0] == "a"}
    assert len(before) > 1


def test_quick_models_go_on_without_the_slow_ones():
    log: list = []
    fakes = {"slow": Fake("slow", log, 500.0), "quick": Fake("quick", log)}
    shared, every = timing.time_images(fakes, IMAGES, 3)
    assert {name: len(times) for name, times in shared.items()} == {"slow": 3, "quick": 3}
    assert len(every["slow"]) == 3 and len(every["quick"]) == 3 * (1 + timing.QUICK_ROUNDS)
    assert len(log) == 2 + 6 + 3 * timing.QUICK_ROUNDS  # the first round does not count


def test_percentiles_are_of_the_image_and_of_each_stage():
    times = np.column_stack([np.arange(101.0), np.full(101, 5.0), np.zeros(101)])
    found = timing.stage_spreads(times)
    assert found["preprocess"] == Spread(p50=50, p95=95, max=100)
    assert found["image"] == Spread(p50=55, p95=100, max=105)


def test_a_drifting_machine_leaves_the_ratio():
    own = np.geomspace(1, 20, 12)  # the machine slows down twentyfold
    found = timing.ratio_of_medians(3 * own, own)
    assert (found.value, found.low, found.high) == pytest.approx((3, 3, 3))


def test_the_ratios_interval_widens_with_noise():
    rng = np.random.default_rng(0)
    own, other = 1 + 0.1 * rng.random((2, 12))
    found = timing.ratio_of_medians(60 * other, own)
    assert 55 < found.low < found.value < found.high < 65


def test_batches_end_where_they_cannot_be_run_or_take_too_long(monkeypatch, rests):
    log: list = []
    fakes = {"free": Fake("free", log), "small": Fake("small", log, most=2)}
    found = timing.measure_throughput(fakes, IMAGES[0])
    assert list(found["free"]) == [1, 2, 4, 8] and list(found["small"]) == [1, 2]
    assert len(rests) == 7  # a batch each, and one that could not be run
    monkeypatch.setattr(timing, "MOST_SECONDS", 0.0)
    log.clear()
    assert list(timing.measure_throughput(fakes, IMAGES[0])["free"]) == [1]
    assert log == [("free", 1), ("small", 1)]  # a slow batch runs once


def figures(name: str, slower: float | None, mre: float | None = None) -> ModelFigures:
    spread = Spread(p50=20, p95=30, max=40)
    around = [
        None if v is None else Interval(value=v, low=v - 1, high=v + 1) for v in (slower, mre)
    ]
    return ModelFigures(
        name=name,
        trained=mre is not None,
        parameters=6_510_053,
        gmac=2.1,
        file_mb=26.4,
        footprint=Footprint(start_ms=200, peak_memory_mb=180),
        images=12,
        milliseconds=dict.fromkeys(("image", *timing.STAGES), spread),
        images_per_second={1: 40.0, 2: 55.0},
        slower=around[0],
        errors=MeanErrors(mre_px=around[1], aop_error_deg=around[1]) if mre else None,
    )


MODELS = [figures("shipped", None, 9.0), figures("unet", 60.4)]


@pytest.mark.parametrize(
    ("demands", "passed"),
    [
        ({"budget_ms": 30}, True),
        ({"budget_ms": 29.9}, False),  # the 95th percentile, not the median
        ({"least_ratio": [("unet", 60)]}, True),  # the value, though the interval begins at 59.4
        ({"least_ratio": [("unet", 60.5)]}, False),
        ({"most_mre_px": 9}, True),
        ({"most_mre_px": 8.9}, False),
        ({"most_aop_deg": 8.9}, False),
    ],
)
def test_gates(demands, passed):
    (gate,) = check_gates(MODELS, Demands(**demands))
    assert gate.passed is passed
    if "least_ratio" in demands:
        assert "60.4 times as long as shipped's (95 % 59.4 to 61.4)" in gate.words


def summary_of(models=MODELS, **others) -> BenchmarkSummary:
    values = {"provider": "cpu", "processor": "P", "threads": 2, "onnxruntime": "1", "load": 0.1}
    return BenchmarkSummary(**values | others, images="4 images", rounds=12, models=models)


def test_the_text_says_what_is_known_and_what_is_not():
    text = summary_text(summary_of())
    assert "60.4 (59.4 to 61.4)" in text and "55.0 (2)" in text  # the best batch
    assert "random weights: time does not depend" in text
    rows = [line for line in text.splitlines() if line.startswith(("model", "shipped", "unet"))]
    sizes = [row for row in rows if row.endswith(("memory, MB", "180"))]
    assert len({len(row) for row in sizes}) == 1 and len(sizes) == 3  # columns stand straight
    assert "FAILED" not in text and "other programs" not in text
    assert "times are rough" in summary_text(summary_of(load=2.0))


def test_models_without_accuracy_are_ticks(monkeypatch):
    drawn: list = []
    for drawing in (summary._plot_errors, summary._plot_tick):

        def put(axis, one, *rest, drawing=drawing):
            drawn.append((drawing.__name__, one.name, *rest[:1]))
            drawing(axis, one, *rest)

        monkeypatch.setattr(summary, drawing.__name__, put)
    summary.plot_summary(summary_of())
    error = MODELS[0].errors.mre_px
    assert drawn == [("_plot_errors", "shipped", error), ("_plot_tick", "unet")] * 2
    drawn.clear()
    summary.plot_summary(summary_of([figures("shipped", None), MODELS[1]]))
    assert drawn == [("_plot_tick", "shipped"), ("_plot_tick", "unet")]
