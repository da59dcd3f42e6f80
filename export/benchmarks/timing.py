"""What a benchmark measures: images shown to models in turn, their footprint, and CUDA's variants.

Models take turns, so that a machine which drifts is fair to all.
"""

import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from export.conversion import RANDOM_IMAGES, network_input, random_image
from model.anatomy import Floats
from model.frame import Pair
from model.heatmap import Heatmaps
from model.images.source import is_supported_name
from model.predictor import (
    CUDA_OPTIONS,
    ORT_PROVIDERS,
    EngineError,
    ModelError,
    Predictor,
    decode_output,
)
from model.spec import METADATA_KEY, ModelSpec, parse_spec
from training.data.case_table import Case, CaseError, read_cases
from training.data.dataset import read_frame
from training.recipes import UNET

STAGES = ("preprocess", "inference", "decode")  # of Prediction.milliseconds
INFERENCE = STAGES.index("inference")
BATCHES = (1, 2, 4, 8)
MOST_SECONDS = 2.0  # of a batch; a bigger one is not tried after it
REPEATS = 3  # runs of a batch that count, after a first one that does not
QUICK_MS = 100.0  # an image; quicker models go on alone
QUICK_ROUNDS = 8  # further rounds of these for each one that all share
REST_S = 0.15  # before each image: a session's threads stay awake for some 0.1 s after a run
BOOTSTRAPS = 2000
SEARCHES = ("HEURISTIC", "EXHAUSTIVE", "DEFAULT")  # cudnn_conv_algo_search
CUDA_RUNS = 200
SIDE_PX = 512  # of random images
ROOT = Path(__file__).resolve().parent.parent.parent

Runner = Callable[[Heatmaps], Heatmaps]  # network input -> maps
CudaFigures = dict[str, float | str]  # of one variant, or the reason why there are none
T = TypeVar("T")


class Interval(BaseModel):
    """A figure with its 95 % interval."""

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


@dataclass(frozen=True)
class Images:
    """Images of a benchmark.

    pictures: those that are timed. words: what they are. cases, folder: all those with labels.
    """

    pictures: Sequence[Picture]
    words: str
    cases: Sequence[Case] = ()
    folder: Path = Path()


@dataclass(frozen=True)
class ImageChoice:
    """Which images a command line names: a table's, a folder's, or else smooth random ones.

    table, folder, split: case table, the folder of its images (None: images/ beside it) and its
    split (None: val). input: any folder of images. count: at most so many, drawn at random.
    """

    table: Path | None = None
    folder: Path | None = None
    split: str | None = None
    input: Path | None = None
    count: int | None = None


def read_images(choice: ImageChoice, rounds: int) -> Images:
    """The chosen images, in a fixed random order, so that any share of them is fair.

    Raises:
        CaseError, ImageError: the table, the folder or an image cannot be used.
    """
    timed = rounds * (1 + QUICK_ROUNDS)
    if choice.table:
        folder = choice.folder or choice.table.parent / "images"
        split = choice.split or "val"
        cases = [case for case in read_cases(choice.table) if split in ("all", case.split)]
        if not cases:
            raise CaseError(
                f"{choice.table}: no case has split '{split}': pass another --split, or all"
            )
        cases = [cases[k] for k in _draw(len(cases), choice.count)]
        pictures = [Picture(*read_frame(folder / case.file, case.frame)) for case in cases[:timed]]
        words = f"{len(cases)} images of {choice.table.name}, split {split}"
        return Images(pictures, words, cases, folder)
    if choice.input:
        paths = sorted(path for path in choice.input.rglob("*") if is_supported_name(path))
        if not paths:
            raise CaseError(f"--input: no image below {choice.input}")
        paths = [paths[k] for k in _draw(len(paths), choice.count)][:timed]
        pictures = [Picture(*read_frame(path)) for path in paths]
        return Images(pictures, f"{len(paths)} images of the folder {choice.input.name}")
    count = min(choice.count or RANDOM_IMAGES, timed)
    plain = UNET.spec().model_copy(
        update={"input_size": SIDE_PX, "channels": 1, "mean": 0, "std": 1}
    )
    random = [random_image(plain, seed)[0].astype(np.uint8) for seed in range(count)]
    words = f"{count} smooth random images of {SIDE_PX} px"
    return Images([Picture(grey, (1.0, 1.0)) for grey in random], words)


def _draw(count: int, most: int | None) -> list[int]:
    """Numbers of `count` images in their random order, `most` of them at most."""
    order: list[int] = np.random.default_rng(0).permutation(count).tolist()
    return order[:most]


def progress(items: Iterable[T], words: str) -> Iterable[T]:
    """The items, with a progress bar on a terminal."""
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
                seconds = _batch_seconds(
                    predictor, network_input(predictor.spec, *picture)[None], batch
                )
            except EngineError:  # a fixed batch size, or too little memory
                del going[name]
                continue
            found[name][batch] = batch / seconds
            if seconds > MOST_SECONDS:
                del going[name]
    return found


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


class Footprint(BaseModel):
    """What one model takes of a process of its own, as export.footprint measures it.

    start_ms: from the file to a session that answers, the median of several starts.
    peak_memory_mb: the process's largest resident size for one load and two images; None if the
    system does not tell. device_memory_mb: by how much the GPU's memory in use grew. MB are 10^6
    bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start_ms: float
    peak_memory_mb: float | None
    device_memory_mb: float | None = None


def measure_footprint(model: Path, provider: str, threads: int | None) -> Footprint:
    """The footprint of a model; export.footprint measures it in a process of its own.

    Raises:
        ModelError: that process failed; says how.
    """
    settings = [str(model.resolve()), provider, str(threads or 0)]
    command = [sys.executable, "-m", "export.footprint", *settings]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ModelError(f"{model.name} failed in a process of its own ({ran.returncode}): {last}")
    return Footprint.model_validate_json(ran.stdout)


def processor_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*: *(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.machine()


def measure_cuda(ort: Any, model: Path, inputs: Sequence[Heatmaps]) -> dict[str, CudaFigures]:
    """What only a GPU has: IO binding, CUDA graphs, fp16 and the convolution searches.

    This has not yet run on hardware. The tests hold the options and calls to ONNX Runtime's:
    binding on its CPU provider, the rest on a stand-in.

    Args:
        ort: the module onnxruntime, which has a CUDA provider.
        inputs: (1, channels, size, size) each.

    Returns:
        Variant -> its figures, or the reason why there are none. p50_ms and p95_ms are of the
        network alone at batch 1, with its input and output in the computer's memory; first_run_ms
        of a fresh session; largest_shift_px of landmarks against the plain run.
    """

    def bound(**options: str) -> CudaFigures:
        made = cuda_session(ort, model, **options)
        return time_runs(bound_runner(ort, made, inputs[0]), inputs)

    def searched(name: str) -> CudaFigures:
        made = cuda_session(ort, model, cudnn_conv_algo_search=name)
        return time_runs(plain_runner(made), inputs)

    with tempfile.TemporaryDirectory() as folder:
        half = Path(folder) / "fp16.onnx"
        variants: dict[str, Callable[[], CudaFigures]] = {
            "plain": lambda: time_runs(plain_runner(cuda_session(ort, model)), inputs),
            "IO binding": bound,
            "IO binding, CUDA graph": lambda: bound(enable_cuda_graph="1"),
            "fp16": lambda: _time_fp16(ort, model, half, inputs),
        }
        for name in SEARCHES:
            variants[f"convolution search {name}"] = partial(searched, name)
        return {name: figures_or_reason(variant) for name, variant in variants.items()}


def cuda_session(ort: Any, model: Path, **options: str) -> Any:
    """A session on CUDA with model.predictor's options, but for these."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    wanted = [(ORT_PROVIDERS["cuda"], CUDA_OPTIONS | options), ORT_PROVIDERS["cpu"]]
    made = ort.InferenceSession(model, settings, providers=wanted, enable_fallback=0)
    if made.get_providers()[0] != ORT_PROVIDERS["cuda"]:
        raise RuntimeError("the session runs on another provider than CUDA")
    return made


def plain_runner(made: Any) -> Runner:
    """A session that takes and gives arrays; ONNX Runtime copies them."""
    name = made.get_inputs()[0].name
    return lambda image: made.run(None, {name: image})[0]


def bound_runner(ort: Any, made: Any, example: Heatmaps, device: str = "cuda") -> Runner:
    """A session whose input and outputs have fixed addresses on the device, as a CUDA graph wants.

    Args:
        example: an input of the one shape that the runner then takes. The size that the file leaves
            free is its batch.
    """
    value = ort.OrtValue.ortvalue_from_numpy(example, device, 0)
    binding = made.io_binding()
    binding.bind_ortvalue_input(made.get_inputs()[0].name, value)
    found = []
    for output in made.get_outputs():
        shape = [size if isinstance(size, int) else len(example) for size in output.shape]
        found.append(ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, device, 0))
        binding.bind_ortvalue_output(output.name, found[-1])

    def run(image: Heatmaps) -> Heatmaps:
        value.update_inplace(image)
        made.run_with_iobinding(binding)
        maps: Heatmaps = found[0].numpy()
        return maps

    return run


def time_runs(runner: Runner, inputs: Sequence[Heatmaps]) -> CudaFigures:
    """The first run, which also captures a graph, and percentiles of those after the second."""
    spent = []
    for k in range(CUDA_RUNS + 2):
        start = time.perf_counter()
        runner(inputs[k % len(inputs)])
        spent.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.percentile(spent[2:], [50, 95]).tolist()
    return {"first_run_ms": spent[0], "p50_ms": p50, "p95_ms": p95}


def _time_fp16(ort: Any, model: Path, half: Path, inputs: Sequence[Heatmaps]) -> CudaFigures:
    """Figures of the model in fp16, and how far its landmarks are from fp32's, network input px."""
    spec = write_fp16(model, half)
    exact, rough = (plain_runner(cuda_session(ort, file)) for file in (model, half))
    pairs = [[decode_output(spec, run(image)[0]) for run in (exact, rough)] for image in inputs]
    shifts = [np.linalg.norm(a.landmarks_px - b.landmarks_px, axis=1).max() for a, b in pairs]
    return {**time_runs(rough, inputs), "largest_shift_px": float(max(shifts))}


def write_fp16(model: Path, half: Path) -> ModelSpec:
    """Write a model with fp16 weights and activations; its inputs and outputs stay fp32."""
    loaded = onnx.load(model)
    onnx.save(convert_float_to_float16(loaded, keep_io_types=True), half)
    return parse_spec({entry.key: entry.value for entry in loaded.metadata_props}[METADATA_KEY])


def figures_or_reason(variant: Callable[[], CudaFigures]) -> CudaFigures:
    """The figures of a variant, or the first line of what it failed with."""
    try:
        return variant()
    except Exception as error:  # ONNX Runtime's own exceptions share no narrower base class
        return {"reason": next(iter(str(error).splitlines()), type(error).__name__)}
