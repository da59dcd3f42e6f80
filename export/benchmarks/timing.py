"""What a benchmark measures: times of models in turn, their footprints, and CUDA's variants.

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

STAGES = ("preprocess", "inference", "decode")  # the keys of Prediction.milliseconds
INFERENCE = STAGES.index("inference")
BATCHES = (1, 2, 4, 8)  # images
MOST_SECONDS = 2.0  # after a batch that took longer, no bigger one is tried
REPEATS = 3  # counted runs of a batch, after one that does not count
QUICK_MS = 100.0  # models that need less for an image run further rounds
QUICK_ROUNDS = 8  # further rounds for each shared one
REST_S = 0.15  # before each image: a session's threads stay awake for some 0.1 s after a run
RATIO_BOOTSTRAPS = 2000
CUDA_SEARCHES = ("HEURISTIC", "EXHAUSTIVE", "DEFAULT")  # values of cudnn_conv_algo_search
CUDA_RUNS = 200  # counted runs of a variant
RANDOM_SIDE_PX = 512  # side of the random images
ROOT = Path(__file__).resolve().parent.parent.parent

Runner = Callable[[Heatmaps], Heatmaps]  # network input -> maps
CudaFigures = dict[str, float | str]  # one variant's figures, or the reason why there are none
Item = TypeVar("Item")


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


class TimedImage(NamedTuple):
    """An image in memory: (H, W) grey values 0..255, and the size of its pixels along x and y."""

    grey: npt.NDArray[np.uint8] | npt.NDArray[np.float32]
    pixel_shape: Pair


@dataclass(frozen=True)
class BenchmarkImages:
    """The images of a benchmark.

    description: number and origin of the images, for the summary. cases, folder: all images with
    labels, on which errors are measured; `timed` holds the first of them.
    """

    timed: Sequence[TimedImage]
    description: str
    cases: Sequence[Case] = ()
    folder: Path = Path()


@dataclass(frozen=True)
class ImageSelection:
    """The images that a command line names: a table's, a folder's, or else smooth random ones.

    table, folder, split: case table, the folder of its images (None: images/ beside it) and its
    split (None: val). input: any folder of images. count: largest number, drawn at random.
    """

    table: Path | None = None
    folder: Path | None = None
    split: str | None = None
    input: Path | None = None
    count: int | None = None


def read_images(choice: ImageSelection, rounds: int) -> BenchmarkImages:
    """The chosen images in a fixed random order, so that the first of them stand for all.

    Raises:
        CaseError, ImageError: the table, the folder or an image cannot be used.
    """
    most_timed = rounds * (1 + QUICK_ROUNDS)
    if choice.table:
        folder = choice.folder or choice.table.parent / "images"
        split = choice.split or "val"
        cases = [case for case in read_cases(choice.table) if split in ("all", case.split)]
        if not cases:
            raise CaseError(
                f"{choice.table}: no case has split '{split}': pass another --split, or all"
            )
        cases = [cases[k] for k in _random_order(len(cases), choice.count)]
        timed = [
            TimedImage(*read_frame(folder / case.file, case.frame)) for case in cases[:most_timed]
        ]
        description = f"{len(cases)} images of {choice.table.name}, split {split}"
        return BenchmarkImages(timed, description, cases, folder)
    if choice.input:
        paths = sorted(path for path in choice.input.rglob("*") if is_supported_name(path))
        if not paths:
            raise CaseError(f"--input: no image below {choice.input}")
        paths = [paths[k] for k in _random_order(len(paths), choice.count)][:most_timed]
        timed = [TimedImage(*read_frame(path)) for path in paths]
        return BenchmarkImages(timed, f"{len(paths)} images of the folder {choice.input.name}")
    count = min(choice.count or RANDOM_IMAGES, most_timed)
    plain = UNET.spec().model_copy(
        update={"input_size": RANDOM_SIDE_PX, "channels": 1, "mean": 0, "std": 1}
    )
    random = [random_image(plain, seed)[0].astype(np.uint8) for seed in range(count)]
    description = f"{count} smooth random images of {RANDOM_SIDE_PX} px"
    return BenchmarkImages([TimedImage(grey, (1.0, 1.0)) for grey in random], description)


def _random_order(count: int, most: int | None) -> list[int]:
    """The numbers 0 to count - 1 in a fixed random order; only the first `most` of them if set."""
    order: list[int] = np.random.default_rng(0).permutation(count).tolist()
    return order[:most]


def show_progress(items: Iterable[Item], title: str) -> Iterable[Item]:
    """The items; on a terminal a progress bar shows how many were taken."""
    bar: Iterable[Item] = tqdm(items, title, leave=False, disable=None)
    return bar


def take_turns(
    predictors: Mapping[str, Predictor], images: Sequence[TimedImage], rounds: int, title: str
) -> dict[str, Floats]:
    """Name -> (rounds, 3) ms of `STAGES`; in each round every model gets the same image.

    The order rotates by one each round and is reversed once every model has been first. So no model
    runs first more often, or always after the same other one. Each model starts on a machine at
    rest: another session keeps its threads awake for a while, and they would share the cores.
    """
    names = list(predictors)
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    for k in show_progress(range(rounds), title):
        cycle, turn = divmod(k, len(names))
        order = names[turn:] + names[:turn]
        image = images[k % len(images)]
        for name in order if cycle % 2 == 0 else order[::-1]:
            time.sleep(REST_S)
            spent = predictors[name].predict(*image).milliseconds
            times[name].append([spent[stage] for stage in STAGES])
    return {name: np.array(rows) for name, rows in times.items()}


def time_images(
    predictors: Mapping[str, Predictor], images: Sequence[TimedImage], rounds: int
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Two tables as of `take_turns`: of the rounds that all models share, and of all rounds.

    After the shared rounds the quick models run further ones among themselves, because a 95th
    percentile needs more images than slow models have time for. A first round does not count.
    """
    take_turns(predictors, images, 1, "warm up")
    shared = take_turns(predictors, images, rounds, "rounds of all models")
    quick = {
        name: predictors[name]
        for name, times in shared.items()
        if np.median(times.sum(axis=1)) < QUICK_MS
    }
    if not quick:
        return shared, shared
    further = take_turns(quick, images, QUICK_ROUNDS * rounds, "rounds of quick models")
    every = {
        name: np.concatenate([times, further[name]]) if name in quick else times
        for name, times in shared.items()
    }
    return shared, every


def stage_spreads(times: Floats) -> dict[str, Spread]:
    """(n, 3) ms of `STAGES` -> percentiles of their sum ("image") and of each stage."""
    columns = {"image": times.sum(axis=1), **dict(zip(STAGES, times.T, strict=True))}
    spreads = {}
    for name, column in columns.items():
        p50, p95, most = np.percentile(column, [50, 95, 100]).tolist()
        spreads[name] = Spread(p50=p50, p95=p95, max=most)
    return spreads


def ratio_of_medians(other_ms: Floats, own_ms: Floats, seed: int = 0) -> Interval:
    """Median time of another model divided by the own; both (rounds,) ms of the same rounds.

    The interval is a percentile bootstrap over rounds. It draws both times of a round together,
    because what slows the machine slows both models.
    """
    draws = np.random.default_rng(seed).integers(0, len(own_ms), (RATIO_BOOTSTRAPS, len(own_ms)))
    drawn = np.median(other_ms[draws], axis=1) / np.median(own_ms[draws], axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist()
    value = float(np.median(other_ms) / np.median(own_ms))
    return Interval(value=value, low=low, high=high)


def measure_throughput(
    predictors: Mapping[str, Predictor], image: TimedImage
) -> dict[str, dict[int, float]]:
    """Name -> batch size -> images per second of the network alone.

    At each size all models take turns. A model leaves after a size that it cannot run, and after
    one that took more than MOST_SECONDS.
    """
    rates: dict[str, dict[int, float]] = {name: {} for name in predictors}
    remaining = dict(predictors)
    for batch in show_progress(BATCHES, "batches"):
        for name, predictor in list(remaining.items()):
            try:
                seconds = _batch_seconds(
                    predictor, network_input(predictor.spec, *image)[None], batch
                )
            except EngineError:  # a fixed batch size, or too little memory
                del remaining[name]
                continue
            rates[name][batch] = batch / seconds
            if seconds > MOST_SECONDS:
                del remaining[name]
    return rates


def _batch_seconds(predictor: Predictor, image: Heatmaps, batch: int) -> float:
    """Median time of a batch, s; a slow batch runs only once."""
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
    """Start time and memory of one model, which export.footprint measures in its own process.

    start_ms: from the file to a session that answers, the median of several starts.
    peak_memory_mb: the process's largest resident size for one load and two images; None if the
    system does not tell. device_memory_mb: growth of the GPU's memory in use; None on the CPU. MB
    are 10^6 bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start_ms: float
    peak_memory_mb: float | None
    device_memory_mb: float | None = None


def measure_footprint(model: Path, provider: str, threads: int | None) -> Footprint:
    """The footprint of a model; threads None means all that the process may use.

    Raises:
        ModelError: the measuring process failed; holds its last line.
    """
    settings = [str(model.resolve()), provider, str(threads or 0)]
    command = [sys.executable, "-m", "export.footprint", *settings]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["it printed no message"])[-1]
        raise ModelError(
            f"{model.name}: export.footprint ended with status {ran.returncode}: {last}"
        )
    return Footprint.model_validate_json(ran.stdout)


def processor_name() -> str:
    """The processor's model name on Linux, else its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    line = re.search(r"^model name\s*: *(.+)$", text, re.MULTILINE)
    return line[1].strip() if line else platform.machine()


def measure_cuda(ort: Any, model: Path, inputs: Sequence[Heatmaps]) -> dict[str, CudaFigures]:
    """Figures of IO binding, CUDA graphs, fp16 and the convolution searches.

    This has not yet run on hardware. The tests check the options and calls: IO binding on ONNX
    Runtime's CPU provider, the rest on a stand-in for CUDA.

    Args:
        ort: the module onnxruntime, which has a CUDA provider.
        inputs: (1, channels, size, size) each.

    Returns:
        Variant -> its figures, or the reason why there are none. p50_ms and p95_ms time the network
        alone at batch 1, with input and output in the computer's memory. first_run_ms is the first
        run of a fresh session. largest_shift_px is the largest distance of a landmark from the
        plain run's, network input px.
    """

    def bound(**options: str) -> CudaFigures:
        session = cuda_session(ort, model, **options)
        return time_runs(bound_runner(ort, session, inputs[0]), inputs)

    def searched(name: str) -> CudaFigures:
        session = cuda_session(ort, model, cudnn_conv_algo_search=name)
        return time_runs(plain_runner(session), inputs)

    with tempfile.TemporaryDirectory() as folder:
        half = Path(folder) / "fp16.onnx"
        variants: dict[str, Callable[[], CudaFigures]] = {
            "plain": lambda: time_runs(plain_runner(cuda_session(ort, model)), inputs),
            "IO binding": bound,
            "IO binding, CUDA graph": lambda: bound(enable_cuda_graph="1"),
            "fp16": lambda: _time_fp16(ort, model, half, inputs),
        }
        for name in CUDA_SEARCHES:
            variants[f"convolution search {name}"] = partial(searched, name)
        return {name: figures_or_reason(variant) for name, variant in variants.items()}


def cuda_session(ort: Any, model: Path, **options: str) -> Any:
    """A session on CUDA with model.predictor's options; `options` replace single ones.

    Raises:
        RuntimeError: the session runs on another provider.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    wanted = [(ORT_PROVIDERS["cuda"], CUDA_OPTIONS | options), ORT_PROVIDERS["cpu"]]
    session = ort.InferenceSession(model, settings, providers=wanted, enable_fallback=0)
    if session.get_providers()[0] != ORT_PROVIDERS["cuda"]:
        raise RuntimeError("the session runs on another provider than CUDA")
    return session


def plain_runner(session: Any) -> Runner:
    """A session that takes and returns arrays; ONNX Runtime copies them."""
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})[0]


def bound_runner(ort: Any, session: Any, example: Heatmaps, device: str = "cuda") -> Runner:
    """A session whose input and outputs keep their addresses on the device, as CUDA graphs need.

    Args:
        example: an input of the only shape that the runner takes. Its length fills the sizes that
            the file leaves open.
    """
    value = ort.OrtValue.ortvalue_from_numpy(example, device, 0)
    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, value)
    values = []
    for output in session.get_outputs():
        shape = [size if isinstance(size, int) else len(example) for size in output.shape]
        values.append(ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, device, 0))
        binding.bind_ortvalue_output(output.name, values[-1])

    def run(image: Heatmaps) -> Heatmaps:
        value.update_inplace(image)
        session.run_with_iobinding(binding)
        maps: Heatmaps = values[0].numpy()
        return maps

    return run


def time_runs(runner: Runner, inputs: Sequence[Heatmaps]) -> CudaFigures:
    """Time of the first run, which also captures a CUDA graph, and percentiles after the second."""
    spent = []
    for k in range(CUDA_RUNS + 2):
        start = time.perf_counter()
        runner(inputs[k % len(inputs)])
        spent.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.percentile(spent[2:], [50, 95]).tolist()
    return {"first_run_ms": spent[0], "p50_ms": p50, "p95_ms": p95}


def _time_fp16(ort: Any, model: Path, half: Path, inputs: Sequence[Heatmaps]) -> CudaFigures:
    """Figures of the model in fp16, with the largest distance of its landmarks from fp32's."""
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
    """The figures of a variant, or the first line of its error as the reason."""
    try:
        return variant()
    except Exception as error:  # ONNX Runtime's own exceptions share no narrower base class
        return {"reason": next(iter(str(error).splitlines()), type(error).__name__)}
