"""What the benchmark measures on a single model: its memory, and its variants on CUDA."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from export.benchmarks import timing
from export.benchmarks.summary import cuda_text
from export.conversion import network_input
from model.predictor import load_predictor
from test.model.test_predictor import SPEC, write_model
from test.phantom import phantom


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A model that averages its input."""
    return write_model(tmp_path_factory.mktemp("cuda") / "tiny.onnx", SPEC.model_dump_json())


@pytest.mark.slow
def test_memory_is_the_models_own(tiny):
    ballast = np.ones(
        600_000_000, np.uint8
    )  # a process inherits the peak of the one that starts it
    found = timing.measure_footprint(tiny, "cpu", 1)
    assert ballast[0] and found.start_ms > 0 and found.device_memory_mb is None
    if found.peak_memory_mb is not None:
        assert 20 < found.peak_memory_mb < 500


def inputs_of(path: Path) -> list:
    spec = load_predictor(path, "cpu").spec
    return [network_input(spec, phantom(k, 80, 64).image)[None] for k in range(3)]


def test_io_binding_gives_the_same_maps(tiny):
    session = onnxruntime.InferenceSession(tiny, providers=["CPUExecutionProvider"])
    inputs = inputs_of(tiny)
    bound = timing.bound_runner(onnxruntime, session, inputs[0], "cpu")
    for image in [*inputs, inputs[0]]:
        np.testing.assert_array_equal(bound(image), timing.plain_runner(session)(image))


class OnCuda:
    """A session on the CPU that claims to run on CUDA."""

    def __init__(self, *args, **kwargs) -> None:
        kwargs["providers"] = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(*args, **kwargs)

    def get_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def __getattr__(self, name):
        return getattr(self.session, name)


def test_cuda_variants(tiny, monkeypatch):
    """On a stand-in for CUDA: which sessions are made, and that a failure is reported."""
    monkeypatch.setattr(timing, "CUDA_RUNS", 3)
    made = []

    def session(path, settings, providers, enable_fallback):
        (name, options), _ = providers
        assert name == "CUDAExecutionProvider" and not enable_fallback
        made.append((Path(path).name, options))
        if options["cudnn_conv_algo_search"] == "EXHAUSTIVE":
            raise RuntimeError("no workspace\nand more")
        return OnCuda(path, settings)

    value = onnxruntime.OrtValue
    ort = SimpleNamespace(
        SessionOptions=onnxruntime.SessionOptions,
        InferenceSession=session,
        OrtValue=SimpleNamespace(
            ortvalue_from_numpy=lambda array, _, k: value.ortvalue_from_numpy(array, "cpu", k),
            ortvalue_from_shape_and_type=lambda shape, kind, _, k: (
                value.ortvalue_from_shape_and_type(shape, kind, "cpu", k)
            ),
        ),
    )
    found = timing.measure_cuda(ort, tiny, inputs_of(tiny))
    assert found["convolution search EXHAUSTIVE"] == {"reason": "no workspace"}
    for name in ("plain", "IO binding", "IO binding, CUDA graph", "convolution search DEFAULT"):
        assert found[name]["first_run_ms"] > 0 and found[name]["p50_ms"] > 0
    assert found["fp16"]["largest_shift_px"] < 2
    graphs = [name for name, options in made if options.get("enable_cuda_graph") == "1"]
    assert graphs == [tiny.name] and ("fp16.onnx" in {name for name, _ in made})
    assert all(options["use_tf32"] == "0" for _, options in made)
    text = cuda_text(found)
    assert "reason no workspace" in text and "largest_shift_px" in text


def test_a_session_that_is_not_on_cuda_is_refused(tiny):
    ort = SimpleNamespace(
        SessionOptions=onnxruntime.SessionOptions,
        InferenceSession=lambda path, settings, providers, enable_fallback: (
            onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        ),
    )
    with pytest.raises(RuntimeError, match="another provider than CUDA"):
        timing.cuda_session(ort, tiny)
    assert timing.figures_or_reason(lambda: timing.cuda_session(ort, tiny).run()) == {
        "reason": "the session runs on another provider than CUDA"
    }
