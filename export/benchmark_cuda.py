"""What only a GPU has: IO binding, CUDA graphs, fp16, and the first run by convolution search.

Not yet run on hardware: what is tested is that the options and calls are ONNX Runtime's (binding
on its CPU provider, the rest on a stand-in). What fails is reported in its place, with the reason.
"""

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from model.heatmap import Heatmaps
from model.predictor import CUDA_OPTIONS, ORT_PROVIDERS, decode_output
from model.spec import METADATA_KEY, ModelSpec, parse_spec

SEARCHES = ("HEURISTIC", "EXHAUSTIVE", "DEFAULT")  # cudnn_conv_algo_search
RUNS = 200
Runner = Callable[[Heatmaps], Heatmaps]  # network input -> maps
Figures = dict[str, float | str]


def measure(ort: Any, model: Path, inputs: Sequence[Heatmaps]) -> dict[str, Figures]:
    """Variant -> its figures, or why there are none.

    p50_ms and p95_ms are of the network alone at batch 1, its input and output in the computer's
    memory; first_run_ms of a fresh session; largest_shift_px of landmarks against the plain run.

    Args:
        ort: the module onnxruntime, which has a CUDA provider.
        inputs: (1, channels, size, size) each.
    """
    with tempfile.TemporaryDirectory() as folder:
        half = Path(folder) / "fp16.onnx"
        variants: dict[str, Callable[[], Figures]] = {
            "plain": lambda: timed(plain(session(ort, model)), inputs),
            "IO binding": lambda: timed(bound(ort, session(ort, model), inputs[0]), inputs),
            "IO binding, CUDA graph": lambda: timed(
                bound(ort, session(ort, model, enable_cuda_graph="1"), inputs[0]), inputs
            ),
            "fp16": lambda: _of_half(ort, model, half, inputs),
        }
        for name in SEARCHES:
            variants[f"convolution search {name}"] = partial(_searched, ort, model, name, inputs)
        return {name: _or_reason(variant) for name, variant in variants.items()}


def _searched(ort: Any, model: Path, name: str, inputs: Sequence[Heatmaps]) -> Figures:
    return timed(plain(session(ort, model, cudnn_conv_algo_search=name)), inputs)


def session(ort: Any, model: Path, **options: str) -> Any:
    """A session on CUDA, as model.predictor has it but for these options."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    wanted = [(ORT_PROVIDERS["cuda"], CUDA_OPTIONS | options), ORT_PROVIDERS["cpu"]]
    made = ort.InferenceSession(model, settings, providers=wanted, enable_fallback=0)
    if made.get_providers()[0] != ORT_PROVIDERS["cuda"]:
        raise RuntimeError("the session runs on another provider than CUDA")
    return made


def plain(made: Any) -> Runner:
    """Arrays in and out; ONNX Runtime copies them."""
    name = made.get_inputs()[0].name
    return lambda image: made.run(None, {name: image})[0]


def bound(ort: Any, made: Any, example: Heatmaps, device: str = "cuda") -> Runner:
    """Input and outputs at fixed addresses on the device, as a CUDA graph wants them.

    Args:
        example: of the one shape that the runner then takes; the file's free size is its batch.
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


def timed(runner: Runner, inputs: Sequence[Heatmaps]) -> Figures:
    """The first run, which also captures a graph, and percentiles of those after the second."""
    spent = []
    for k in range(RUNS + 2):
        start = time.perf_counter()
        runner(inputs[k % len(inputs)])
        spent.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.percentile(spent[2:], [50, 95]).tolist()
    return {"first_run_ms": spent[0], "p50_ms": p50, "p95_ms": p95}


def _of_half(ort: Any, model: Path, half: Path, inputs: Sequence[Heatmaps]) -> Figures:
    """Figures of the model in fp16, and how far its landmarks are from fp32's, network input px."""
    spec = write_half(model, half)
    exact, rough = plain(session(ort, model)), plain(session(ort, half))
    pairs = [[decode_output(spec, run(image)[0]) for run in (exact, rough)] for image in inputs]
    shifts = [np.linalg.norm(a.landmarks_px - b.landmarks_px, axis=1).max() for a, b in pairs]
    return {**timed(rough, inputs), "largest_shift_px": float(max(shifts))}


def write_half(model: Path, half: Path) -> ModelSpec:
    """Write a model with fp16 weights and activations; its inputs and outputs stay fp32."""
    import onnx  # noqa: PLC0415  not in export.footprint
    from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415

    loaded = onnx.load(model)
    onnx.save(convert_float_to_float16(loaded, keep_io_types=True), half)
    return parse_spec({entry.key: entry.value for entry in loaded.metadata_props}[METADATA_KEY])


def _or_reason(variant: Callable[[], Figures]) -> Figures:
    try:
        return variant()
    except Exception as error:  # ONNX Runtime's own exceptions share no narrower base class
        return {"reason": next(iter(str(error).splitlines()), type(error).__name__)}


def used_device_mb() -> float | None:
    """What the first GPU has in use, all processes together, by nvidia-smi; or None."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    ran = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = ran.stdout.split()
    return float(lines[0]) * 2**20 / 1e6 if ran.returncode == 0 and lines else None


def as_text(figures: Mapping[str, Figures]) -> str:
    """The figures, a line a variant."""
    lines = ["CUDA, the first model's network alone"]
    for name, found in figures.items():
        cells = [f"{k} {v}" if isinstance(v, str) else f"{k} {v:.2f}" for k, v in found.items()]
        lines.append(f"  {name:<30}" + ", ".join(cells))
    return "\n".join(lines)
