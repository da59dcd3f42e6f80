"""One image in, three landmarks out: preprocess -> run -> decode -> back to image px.

`Predictor` is the same for every engine; `load_predictor` runs an ONNX file in ONNX Runtime.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from model.anatomy import LANDMARKS, Floats
from model.frame import Letterbox, Pair, Pixels, cells_to_input
from model.heatmap import Decode, Heatmaps
from model.images.grey import to_grey
from model.images.limits import ImageError, check_size
from model.masks import MaskError, landmarks_from_shares
from model.spec import METADATA_KEY, ModelSpec, SpecError, parse_spec
from model.uncertainty import REFERENCE_PX, ExpectedErrors, error_terms, expected_errors

MOST_THREADS = 64  # a container may not start many more, and would then wait for ever
PIL_MODES = ("L", "I", "I;16", "I;16B", "F", "RGB", "RGBA")  # whose values are grey levels or RGB
EXPECTED_PIXELS = (
    "expected (height, width) or (height, width, 3) pixels in uint8, uint16 or float, with values "
    "from 0 to 255 or from 0 to 1"
)
Provider = Literal["auto", "cuda", "cpu"]

ORT_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
CUDA_OPTIONS = {
    # EXHAUSTIVE takes seconds at every new shape; DEFAULT runs tens of times slower
    "cudnn_conv_algo_search": "HEURISTIC",
    # TF32 would move landmarks away from the CPU's
    "use_tf32": "0",
}


class EngineError(RuntimeError):
    """The engine failed on one image, for instance because memory ran out; the message says why."""


class ModelError(ValueError):
    """A model file or a provider that cannot be used; the message says what to do."""


class Output(NamedTuple):
    """What a network returns for n images.

    Args:
        maps: (n, 3 + masks, rows, columns) heatmaps, then the masks' shares of each cell.
        view: (n,) 0..1, how much an image looks like the view that the model is for; None if the
            network does not judge that.
    """

    maps: Heatmaps
    view: npt.NDArray[np.float32] | None = None


Engine = Callable[[Heatmaps], Output]  # (n, channels, size, size) network input -> output


@dataclass(frozen=True)
class Prediction:
    """One image's landmarks.

    Args:
        landmarks_px: (3, 2) as (x, y) in image px.
        confidence: (3,) 0 to 1.
        heatmaps: (3, rows, columns).
        milliseconds: time by stage.
        doubts: what speaks against the answer, in words.
        terms: (4, 2) as `model.uncertainty.error_terms` returns them.
        view_score: as `Output.view`.
        expected: errors to expect, in image px for the landmarks; None without calibration.
    """

    landmarks_px: Floats
    confidence: Floats
    heatmaps: Heatmaps
    milliseconds: dict[str, float]
    doubts: tuple[str, ...]
    terms: Floats
    view_score: float | None
    expected: ExpectedErrors | None


@dataclass(frozen=True)
class DecodedOutput:
    """An output's landmarks in network input px; fields as in `Prediction`."""

    landmarks_px: Floats
    confidence: Floats
    terms: Floats
    doubts: tuple[str, ...] = ()


class Predictor:
    """Predicts landmarks with any engine that maps inputs to heatmaps and masks.

    Args:
        spec: what the network expects and returns.
        run: the engine. Several threads may call it at once if it is ONNX Runtime.
        provider: the processor that really runs, for the record.
        file: the file that was loaded, for the record.
    """

    def __init__(
        self, spec: ModelSpec, run: Engine, provider: str, file: Path | None = None
    ) -> None:
        self.spec, self.run, self.provider, self.file = spec, run, provider, file

    def predict(
        self,
        image: npt.ArrayLike,
        pixel_shape: Pair = (1.0, 1.0),
        decode: Decode | None = None,
    ) -> Prediction:
        """Landmarks in an image, which `grey_levels` takes to 0..255.

        Args:
            image: (height, width), or (height, width, 1, 3 or 4) as RGB or RGBA; a numpy array, or
                what numpy makes one of, such as a PIL image or a torch tensor on the CPU.
            pixel_shape: size of a pixel along x and y; only its ratio matters.
            decode: the decoder; by default the one of the model's spec.

        Raises:
            EngineError: the engine failed on this image.
            ValueError, TypeError: the image or the pixel shape cannot be used.
        """
        times = [time.perf_counter()]
        grey = grey_levels(image)
        if not (len(pixel_shape) == 2 and all(0 < side < math.inf for side in pixel_shape)):
            raise ValueError(
                "expected pixel_shape as two positive numbers, the size of a pixel along x and y, "
                f"got {pixel_shape!r}"
            )
        box = Letterbox(grey.shape[1], grey.shape[0], self.spec.input_size, pixel_shape)
        network_input = self.spec.normalise(box.apply(grey))[None]
        times.append(time.perf_counter())
        output = self.run(network_input)
        times.append(time.perf_counter())
        decoded = decode_output(self.spec, output.maps[0], decode)
        landmarks = box.to_image(decoded.landmarks_px)
        expected = self._expected_errors(decoded.terms, box)
        times.append(time.perf_counter())
        spent = np.diff(times) * 1000
        return Prediction(
            landmarks,
            decoded.confidence,
            output.maps[0, : len(LANDMARKS)],
            dict(zip(("preprocess", "inference", "decode"), spent.tolist(), strict=True)),
            decoded.doubts,
            decoded.terms,
            None if output.view is None else float(output.view[0]),
            expected,
        )

    def _expected_errors(self, terms: Floats, box: Letterbox) -> ExpectedErrors | None:
        """The errors to expect, in px of the letterbox's image."""
        if self.spec.calibration is None:
            return None
        at_512 = expected_errors(self.spec.calibration, terms)
        image_px = self.spec.input_size / REFERENCE_PX / float(np.sqrt(box.scale.prod()))
        return ExpectedErrors(at_512.landmarks_px * image_px, at_512.aop_deg)


def grey_levels(image: npt.ArrayLike) -> Pixels:
    """(height, width) grey levels 0..255 of an image that a caller of `Predictor.predict` has.

    uint8 stays as it is, and so do other integers and floats that lie within 0..255. Floats that
    all lie within 0..1 are taken for an image of that range, as scikit-image and torch have it, and
    multiplied by 255. Any other range is stretched to 0..255, as in a file. Colour becomes
    luminance.

    Raises:
        ValueError: the shape or the values cannot be an image's.
        TypeError: these are not numbers, or a PIL image of other values than grey levels and RGB.
    """
    pixels = _check_pixels(image)
    try:
        if hasattr(pixels, "mask"):  # padding, as in a file
            return to_grey(pixels)
        if pixels.dtype != np.uint8:
            low, high = pixels.min(), pixels.max()
            if not (low >= 0 and high <= 255):  # NaN is neither
                return to_grey(pixels)
            if pixels.dtype.kind == "f":
                pixels = pixels.astype(np.float32, copy=False)
                pixels = pixels * np.float32(255) if high <= 1 else pixels
            if pixels.dtype.kind != "f" or pixels.ndim == 3:
                pixels = np.rint(pixels).astype(np.uint8)
        return np.ascontiguousarray(pixels) if pixels.ndim == 2 else to_grey(pixels)
    except ImageError as error:
        got = f"{pixels.dtype} of shape {pixels.shape}"
        raise ValueError(f"{EXPECTED_PIXELS}, got {got}: {error}") from error


def _check_pixels(image: npt.ArrayLike) -> npt.NDArray[Any]:
    """(height, width), or (height, width, 3) in RGB, of some real number type."""
    if isinstance(image, (str, bytes, os.PathLike)):
        raise TypeError(
            f"{EXPECTED_PIXELS}, got the path {os.fspath(image)!r}: "
            "model.images.source.open_image(path).frames() yields the images of a file"
        )
    mode = getattr(image, "mode", "RGB")
    if isinstance(mode, str) and mode not in PIL_MODES:
        raise TypeError(
            f"{EXPECTED_PIXELS}, got a PIL image of mode {mode}: pass image.convert('RGB')"
        )
    pixels = image if isinstance(image, np.ndarray) else np.asarray(image)
    shape = pixels.shape
    expected = f"{EXPECTED_PIXELS}, got {pixels.dtype} of shape {shape}"
    if pixels.dtype.kind not in "uif":
        raise TypeError(f"{expected}: convert the values")
    channels = shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or channels not in (1, 3, 4) or not pixels.size:
        is_first = pixels.ndim == 3 and shape[0] in (1, 3, 4) and pixels.size
        raise ValueError(
            f"{expected}: {'move the channels last' if is_first else 'pass one image'}"
        )
    check_size(shape[1], shape[0])
    if channels == 4 and pixels[..., 3].min() != pixels[..., 3].max():
        raise ValueError(f"{expected}, partly transparent: compose it over black")
    return pixels if pixels.ndim == 2 else pixels[..., 0] if channels == 1 else pixels[..., :3]


def decode_output(spec: ModelSpec, output: Heatmaps, decode: Decode | None = None) -> DecodedOutput:
    """(3 + masks, rows, columns) output -> landmarks of the heatmaps, fused with the masks' own.

    The masks' own landmarks follow from their outlines, as in labelled masks (model.masks);
    `spec.mask_share` are their weights. If the masks yield none, the heatmaps answer alone, and
    `doubts` says so.
    """
    count = len(LANDMARKS)
    cells, confidence = spec.codec.decode(output[:count], decode or spec.decode)
    landmarks = cells_to_input(cells, spec.stride)
    px_at_512 = REFERENCE_PX / spec.input_size

    def terms(second: Floats | None) -> Floats:
        second = None if second is None else second * px_at_512
        return error_terms(output[:count], landmarks * px_at_512, second, spec.stride * px_at_512)

    if not (spec.masks and any(spec.mask_share)):
        return DecodedOutput(landmarks, confidence, terms(landmarks))
    try:
        second = landmarks_from_shares(output[count:], spec.input_size)
    except MaskError:
        doubts = ("no outlines of symphysis and head were found",)
        return DecodedOutput(landmarks, confidence, terms(None), doubts)
    share = np.array(spec.mask_share)[:, None]
    fused = (1 - share) * landmarks + share * second
    return DecodedOutput(fused, confidence, terms(second))


def load_predictor(
    path: str | os.PathLike[str],
    provider: Provider = "auto",
    threads: int | None = None,
    on_cpu: str | os.PathLike[str] | None = None,
) -> Predictor:
    """A predictor that runs an ONNX file with its ModelSpec in ONNX Runtime; warmed up on CUDA.

    Args:
        threads: threads for one run on the CPU; by default as many as this process has CPUs.
        on_cpu: another file, used instead if the CPU runs.

    Raises:
        ModelError: the file is missing, is not an ONNX model, has no usable ModelSpec or other
            shapes than its spec says, or `provider` cannot run.
    """
    import onnxruntime as ort  # noqa: PLC0415  slow to import

    path, on_cpu = Path(path), Path(on_cpu or path)
    for file in (path, on_cpu):
        if not file.is_file():
            raise ModelError(f"no model file at {file}; pass --model FILE.onnx")
    ort.set_default_logger_severity(4)
    threads = threads or min(usable_cpus(), MOST_THREADS)
    session = _cuda_session(ort, path, provider, threads)
    if session is None:
        path = on_cpu
        session = _create_session(ort, path, [ORT_PROVIDERS["cpu"]], threads)
    # The session knows what runs. The list of available providers names CUDA even if it cannot be
    # loaded.
    active = session.get_providers()[0]
    try:
        spec = parse_spec(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY))
    except SpecError as error:
        raise ModelError(f"{path}: {error}") from error
    name = session.get_inputs()[0].name

    def run(network_input: Heatmaps) -> Output:
        try:
            return Output(*session.run(None, {name: network_input}))
        except Exception as error:  # as in _create_session
            raise EngineError(f"the network could not be run: {_first_line(error)}") from error

    on_cuda = active == ORT_PROVIDERS["cuda"]
    shapes = [node.shape[1:] for node in (*session.get_inputs(), *session.get_outputs())]
    if on_cuda or not _are_shapes_of(spec, shapes):  # on the CPU a warm-up only takes time
        _check_shapes(run, spec, path)
    return Predictor(spec, run, "cuda" if on_cuda else "cpu", path)


def _cuda_session(ort: Any, path: Path, provider: Provider, threads: int) -> Any | None:
    """A session on CUDA, or None if the CPU has to run.

    Raises:
        ModelError: CUDA was asked for and cannot run.
    """
    if provider == "cpu":
        return None
    reason = "this ONNX Runtime has no CUDA provider: install onnxruntime-gpu"
    if ORT_PROVIDERS["cuda"] in ort.get_available_providers():
        ort.preload_dlls()
        wanted = [(ORT_PROVIDERS["cuda"], CUDA_OPTIONS), ORT_PROVIDERS["cpu"]]
        try:
            session = _create_session(ort, path, wanted, threads)
            if session.get_providers()[0] == ORT_PROVIDERS["cuda"]:
                return session
        except ModelError:
            pass  # the CPU is tried next; if the file is wrong, it says so
        reason = "CUDA could not be loaded (no GPU or driver, or another CUDA): run with --gpus all"
    if provider == "cuda":
        raise ModelError(f"--provider cuda: {reason}, or pass --provider auto")
    return None


def _create_session(ort: Any, path: Path, providers: list[Any], threads: int) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        # ONNX Runtime's own fallback prints a page and hides which provider runs.
        return ort.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's own exceptions share no narrower base class
        raise ModelError(
            f"{path} cannot be loaded as an ONNX model ({_first_line(error)}); "
            "export it again with python -m export.to_onnx"
        ) from error


def _are_shapes_of(spec: ModelSpec, shapes: Sequence[Sequence[int | str]]) -> bool:
    """Whether these are the shapes of the spec's input and outputs, without the batch."""
    codec, side = spec.codec, spec.input_size
    maps = [len(spec.landmarks) + spec.masks, codec.rows, codec.columns]
    expected = [[spec.channels, side, side], maps, *([[]] if _needs_view(spec) else [])]
    return [list(shape) for shape in shapes] == expected


def _needs_view(spec: ModelSpec) -> bool:
    return spec.calibration is not None and spec.calibration.view_below is not None


def _check_shapes(run: Engine, spec: ModelSpec, path: Path) -> None:
    """Run once on a black image, which warms the session up, and compare the output to the spec."""
    codec = spec.codec
    expected = (1, len(spec.landmarks) + spec.masks, codec.rows, codec.columns)
    try:
        output = run(np.zeros((1, spec.channels, spec.input_size, spec.input_size), np.float32))
    except EngineError as error:
        raise ModelError(f"{path} does not run on its spec's input: {error}") from error
    if output.maps.shape != expected:
        raise ModelError(f"{path} returns shape {output.maps.shape}, its spec says {expected}")
    if _needs_view(spec) and (output.view is None or output.view.shape != (1,)):
        raise ModelError(f"{path} returns no view score, its spec has a threshold for one")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def usable_cpus() -> int:
    """Number of CPUs that this process may use: its affinity, bounded by its cgroup's quota."""
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
