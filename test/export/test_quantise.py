"""The int8 model: smaller, as accurate, described; not written if its error grows too much."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import process
from export import quantise, rewrites
from export.conversion import convert_network
from export.rewrites import widen_weights
from model.network import UNetConfig, build_network
from model.predictor import load_predictor
from test.phantom import phantom
from training.data.case_table import Case, write_cases
from training.recipes import UNET

pytestmark = pytest.mark.slow  # they quantise the shipped model


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of the command: the shipped model, and some phantoms as split val."""
    folder = tmp_path_factory.mktemp("phantoms")
    cases = []
    for seed in range(8):
        found = phantom(seed)
        cv2.imwrite(str(folder / f"{seed}.png"), found.image)
        cases.append(Case(f"{seed}.png", found.landmarks_px, found.aop_deg, split="val"))
    write_cases(folder / "cases.csv", cases)
    flags = ["--model", str(process.SHIPPED_MODEL), "--images", str(folder)]
    return [*flags, "--data", str(folder / "cases.csv")]


def test_int8_is_smaller_and_finds_the_same(arguments: list[str], tmp_path: Path) -> None:
    output = tmp_path / "aop.int8.onnx"
    assert (
        quantise.main([*arguments, "--output", str(output), "--most-px", "2", "--most-deg", "2"])
        == 0
    )
    assert output.stat().st_size < 0.6 * process.SHIPPED_MODEL.stat().st_size
    for path in (output, process.SHIPPED_FOR_CPU):  # stored as optimised, but not for one CPU alone
        kinds = {(node.domain, node.op_type) for node in onnx.load(path).graph.node}
        assert ("com.microsoft", "QLinearConv") in kinds and ("", "Conv") in kinds
        assert "com.microsoft.nchwc" not in {domain for domain, _ in kinds}
    before, after = (load_predictor(p, "cpu") for p in (process.SHIPPED_MODEL, output))
    assert after.spec.name == f"{before.spec.name}-int8"
    assert before.spec.val_trained  # trained on val, so its own metrics stay
    same = {"name"}
    assert after.spec.model_dump(exclude=same) == before.spec.model_dump(exclude=same)
    found = [predictor.predict(phantom(20).image).landmarks_px for predictor in (before, after)]
    assert 0 < np.linalg.norm(found[0] - found[1], axis=1).max() < 4


@pytest.mark.parametrize(
    ("rewrite", "places", "gone"),
    [
        (rewrites.rewrite_stem, 2, set()),
        (rewrites.rewrite_transposed, 6, {"ConvTranspose"}),
        (rewrites.rewrite_heads, 4, set()),
        (rewrites.fuse_attention, 12, {"Squeeze", "Slice", "Shape"}),
    ],
)
def test_rewrites_change_no_value(
    rewrite: Callable[[rewrites.Graph], None], places: int, gone: set[str], tmp_path: Path
) -> None:
    before = widen_weights(onnx.load(process.SHIPPED_MODEL))
    graph = rewrites.Graph(before)
    rewrite(graph)
    assert len(graph.replaced) == places  # of two networks
    after = graph.build_model()
    kinds = [{node.op_type for node in model.graph.node} for model in (before, after)]
    assert gone <= kinds[0] - kinds[1]
    onnx.save(after, tmp_path / "after.onnx")
    found = [
        load_predictor(path, "cpu").predict(phantom(3).image)
        for path in (process.SHIPPED_MODEL, tmp_path / "after.onnx")
    ]
    np.testing.assert_allclose(found[0].heatmaps, found[1].heatmaps, atol=1e-4)


def test_other_networks_and_several_images_are_rewritten_too() -> None:
    small = UNET.model_copy(update={"network": UNetConfig(input_size=64, widths=(4, 8, 16))})
    before = convert_network(build_network(small.network).eval(), small.spec())
    images = np.random.default_rng(0).normal(size=(3, 3, 64, 64)).astype(np.float32)
    found = [
        ort.InferenceSession(model.SerializeToString()).run(None, {"image": images})[0]
        for model in (before, rewrites.rewrite_for_int8(before))
    ]
    assert found[0].shape == (3, 3, 8, 8) and np.ptp(found[0]) > 0.01
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_nothing_is_written_where_it_errs_more(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*arguments, "--output", str(tmp_path / "aop.int8.onnx"), "--most-px", "-50"]
    assert quantise.main(flags) == 2
    assert "deg more on val" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_shipped_one_is_of_the_shipped_model() -> None:
    before, after = (
        load_predictor(path, "cpu") for path in (process.SHIPPED_MODEL, process.SHIPPED_FOR_CPU)
    )
    assert after.spec.calibration == before.spec.calibration
    assert after.spec.recipe == before.spec.recipe
    graph = onnx.load(process.SHIPPED_FOR_CPU).graph
    in_float = [n.input[1] for n in graph.node if n.op_type in ("Conv", "FusedConv")]
    assert in_float == ["view.narrow.weight"]
    weights = [one for one in graph.initializer if one.data_type == onnx.TensorProto.INT8]
    largest = max(np.abs(numpy_helper.to_array(one).astype(int)).max() for one in weights)
    assert 2 * 255 * largest < 2**15  # two products of a byte and a weight fit 16 bits: no VNNI
    for seed in range(4):
        image = phantom(seed).image
        one, other = (predictor.predict(image).landmarks_px for predictor in (before, after))
        assert np.linalg.norm(one - other, axis=1).max() < 4
