"""Times of several models that take turns, so that a drifting machine is fair to all."""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm  # type: ignore[import-untyped]  # it has no types

from model.anatomy import Floats
from model.frame import Letterbox, Pair
from model.heatmap import Heatmaps
from model.predictor import EngineError, Predictor
from model.spec import ModelSpec

STAGES = ("preprocess", "inference", "decode")  # of Prediction.milliseconds
INFERENCE = STAGES.index("inference")
BATCHES = (1, 2, 4, 8)
MOST_SECONDS = 2.0  # of a batch; a bigger one is not tried after it
REPEATS = 3  # runs of a batch that count, after a first one that does not
QUICK_MS = 100.0  # an image; quicker models go on alone
QUICK_ROUNDS = 8  # further rounds of these for each one that all share
REST_S = 0.15  # before each image: a session's threads stay awake for some 0.1 s after a run
BOOTSTRAPS = 2000
T = TypeVar("T")


class Interval(BaseModel):
    """A figure and its 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float


class Spread(BaseModel):
    """Percentiles of times, ms."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50: float
    p95: float
    max: float


class Picture(NamedTuple):
    """An image in memory: (H, W) grey values 0..255, and its pixels' size along x and y."""

    grey: npt.NDArray[np.uint8] | npt.NDArray[np.float32]
    pixel_shape: Pair


def progress(items: Iterable[T], words: str) -> Iterable[T]:
    """The items, with a bar for whoever watches."""
    bar: Iterable[T] = tqdm(items, words, leave=False, disable=None)
    return bar


def take_turns(
    predictors: Mapping[str, Predictor], pictures: Sequence[Picture], rounds: int, words: str
) -> dict[str, Floats]:
    """Name -> (rounds, 3) ms of `STAGES`: in each round every model gets the same one image.

    The order is rotated by one each round, and reversed once all have been first, so that no model
    runs first more often, or always after the same other one. Each starts on a machine at rest: the
    threads that another session keeps awake, in case more work comes, would share its cores.
    """
    names = list(predictors)
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    for k in progress(range(rounds), words):
        cycle, turn = divmod(k, len(names))
        order = names[turn:] + names[:turn]
        picture = pictures[k % len(pictures)]
        for name in order if cycle % 2 == 0 else order[::-1]:
            time.sleep(REST_S)
            spent = predictors[name].predict(*picture).milliseconds
            times[name].append([spent[stage] for stage in STAGES])
    return {name: np.array(rows) for name, rows in times.items()}


def time_images(
    predictors: Mapping[str, Predictor], pictures: Sequence[Picture], rounds: int
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Times of the rounds that all models share, and of all rounds that each has run.

    Quick models then take turns among themselves for further rounds: a 95th percentile wants more
    images than slow models can be waited for. A first round, of all, does not count.
    """
    take_turns(predictors, pictures, 1, "warm up")
    shared = take_turns(predictors, pictures, rounds, "rounds of all models")
    quick = {
        name: predictors[name]
        for name, times in shared.items()
        if np.median(times.sum(axis=1)) < QUICK_MS
    }
    if not quick:
        return shared, shared
    further = take_turns(quick, pictures, QUICK_ROUNDS * rounds, "rounds of the quick ones")
    every = {
        name: np.concatenate([times, further[name]]) if name in quick else times
        for name, times in shared.items()
    }
    return shared, every


def spreads(times: Floats) -> dict[str, Spread]:
    """Percentiles of (n, 3) ms: of an image as a whole, and of each stage."""
    columns = {"image": times.sum(axis=1), **dict(zip(STAGES, times.T, strict=True))}
    found = {}
    for name, column in columns.items():
        p50, p95, most = np.percentile(column, [50, 95, 100]).tolist()
        found[name] = Spread(p50=p50, p95=p95, max=most)
    return found


def ratio_of_medians(other_ms: Floats, own_ms: Floats, seed: int = 0) -> Interval:
    """How many times longer another model takes; (rounds,) times of the same rounds.

    The interval is a percentile bootstrap over rounds: both models' times of a round are drawn
    together, since what slows the machine slows both.
    """
    draws = np.random.default_rng(seed).integers(0, len(own_ms), (BOOTSTRAPS, len(own_ms)))
    drawn = np.median(other_ms[draws], axis=1) / np.median(own_ms[draws], axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist()
    value = float(np.median(other_ms) / np.median(own_ms))
    return Interval(value=value, low=low, high=high)


def throughput(
    predictors: Mapping[str, Predictor], picture: Picture
) -> dict[str, dict[int, float]]:
    """Name -> batch size -> images a second of the network alone; at each size all take turns.

    Sizes that a file does not take, or that come after one of more than MOST_SECONDS, are left out.
    """
    found: dict[str, dict[int, float]] = {name: {} for name in predictors}
    going = dict(predictors)
    for batch in progress(BATCHES, "batches"):
        for name, predictor in list(going.items()):
            try:
                seconds = _batch_seconds(predictor, network_input(predictor.spec, picture), batch)
            except EngineError:  # a fixed batch size, or too little memory
                del going[name]
                continue
            found[name][batch] = batch / seconds
            if seconds > MOST_SECONDS:
                del going[name]
    return found


def network_input(spec: ModelSpec, picture: Picture) -> Heatmaps:
    """(1, channels, size, size) of a picture."""
    height, width = picture.grey.shape
    box = Letterbox(width, height, spec.input_size, picture.pixel_shape)
    return spec.normalise(box.apply(picture.grey))[None]


def _batch_seconds(predictor: Predictor, image: Heatmaps, batch: int) -> float:
    """Median time of a batch; of a slow one the first and only run."""
    images = np.repeat(image, batch, axis=0)
    seconds = []
    time.sleep(REST_S)
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        predictor.run(images)
        seconds.append(time.perf_counter() - start)
        if seconds[0] > MOST_SECONDS / REPEATS:
            return seconds[0]
    return statistics.median(seconds[1:])
