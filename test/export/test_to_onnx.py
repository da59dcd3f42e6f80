"""Export: parity on landmarks, the spec inside the file, and nothing written without parity."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import to_array

from export import conversion, to_onnx
from export.rewrites import widen_weights
from model.network import build_network
from model.predictor import load_predictor
from model.spec import METADATA_KEY
from test.model.test_network import SMALL
from training.learning.checkpoint import Checkpoint, load_weights, save_weights
from training.recipes import COMPACT


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small network with random weights, as fit writes it."""
    torch.manual_seed(0)
    network = build_network(SMALL, masks=2)
    recipe = COMPACT.model_copy(update={"network": SMALL, "sigma_cells": 1.5})
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    checkpoint = Checkpoint(network=SMALL, masks=2, spec=recipe.spec(2))
    save_weights(path, network.state_dict(), checkpoint)
    return path


@pytest.mark.slow
def test_export_is_whole_and_self_describing(weights, tmp_path):
    output = tmp_path / "aop.onnx"
    arguments = ["--run", str(weights.parent), "--output", str(output), "--bundle"]
    assert to_onnx.main([*arguments, "--training-data", "phantoms", "--licence", "CC BY 4.0"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "aop.json", "aop.onnx", "aop.safetensors",
    ]  # fmt: skip
    model = onnx.load(output)
    assert model.ir_version == 10 and model.opset_import[0].version == 20
    assert [entry.key for entry in model.metadata_props] == [METADATA_KEY]
    assert str(weights.parent) not in str(model)
    predictor = load_predictor(output, "cpu")
    assert predictor.spec.training_data == "phantoms" and predictor.spec.licence == "CC BY 4.0"
    batch = np.random.default_rng(0).normal(size=(5, 1, 64, 64)).astype(np.float32)
    alone = np.concatenate([predictor.run(image[None]).maps for image in batch])
    np.testing.assert_allclose(predictor.run(batch).maps, alone, atol=1e-5)


@pytest.mark.slow
def test_nothing_is_written_without_parity(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(to_onnx, "parity_error_px", lambda *_: 0.051)
    output = tmp_path / "aop.onnx"
    assert to_onnx.main(["--weights", str(weights), "--output", str(output)]) == 2
    assert "differ by 0.051 px" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_parity_sees_another_networks_weights(weights, tmp_path):
    network, checkpoint = load_weights(weights)
    spec, output = checkpoint.spec, tmp_path / "aop.onnx"
    conversion.save_onnx(conversion.convert_network(network, spec), spec, output)
    torch.manual_seed(1)
    other = build_network(SMALL, masks=2).eval()
    inputs = [conversion.random_image(spec, seed) for seed in range(4)]
    assert conversion.parity_error_px(other, output, inputs) > 1


@pytest.mark.slow
def test_weights_that_are_not_numbers_are_not_written(weights, tmp_path, capsys):
    network, checkpoint = load_weights(weights)
    network.head.heatmaps.weight.data[:] = torch.nan
    save_weights(tmp_path / "nan.safetensors", network.state_dict(), checkpoint)
    output = tmp_path / "aop.onnx"
    flags = ["--weights", str(tmp_path / "nan.safetensors"), "--output", str(output)]
    assert to_onnx.main(flags) == 2
    assert "not finite" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.slow
def test_parity_sees_another_view_score(weights, tmp_path):
    config = replace(SMALL, view_channels=2)
    network, spec = build_network(config, masks=2).eval(), load_weights(weights)[1].spec
    inputs = [conversion.random_image(spec, seed) for seed in range(2)]
    conversion.save_onnx(conversion.convert_network(network, spec), spec, tmp_path / "aop.onnx")
    assert conversion.parity_error_px(network, tmp_path / "aop.onnx", inputs) < 0.01
    with torch.no_grad():
        network.view.judge[4].bias += 0.1
    with pytest.raises(conversion.ParityError, match=r"view scores differ by 0\.02"):
        conversion.parity_error_px(network, tmp_path / "aop.onnx", inputs)


def test_missing_weights_are_named(tmp_path, capsys):
    missing, output = str(tmp_path / "no.safetensors"), str(tmp_path / "a.onnx")
    assert to_onnx.main(["--weights", missing, "--output", output]) == 2
    assert "no.safetensors" in capsys.readouterr().err


@pytest.mark.slow
def test_half_is_smaller_and_widens_again(weights, tmp_path):
    files = [tmp_path / "whole.onnx", tmp_path / "half.onnx"]
    for file, flags in zip(files, ([], ["--half"]), strict=True):
        assert to_onnx.main(["--weights", str(weights), "--output", str(file), *flags]) == 0
    whole, half = (onnx.load(file) for file in files)
    assert files[1].stat().st_size < files[0].stat().st_size
    wide = widen_weights(half)
    assert [node.name for node in wide.graph.node] == [node.name for node in whole.graph.node]
    onnx.checker.check_model(wide)
    pairs = zip(wide.graph.initializer, whole.graph.initializer, strict=True)
    for one, other in pairs:
        assert one.name == other.name
        np.testing.assert_allclose(to_array(one), to_array(other), rtol=1e-3, atol=1e-6)
    image = np.random.default_rng(0).normal(size=(1, 1, 64, 64)).astype(np.float32)
    maps = [load_predictor(file, "cpu").run(image).maps for file in files]
    assert 0 < np.abs(maps[0] - maps[1]).max() < 0.05
