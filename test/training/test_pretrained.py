"""Pretrained weights in a network: used tensors equal the file's, and misfits are named."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import to_onnx
from model.network import TransUNetConfig, UNetConfig, build_network
from model.network.resnet import ResNet50
from model.network.vit import Block, ViTBottleneck
from test.phantom import phantom
from test.support.beit_file import beit_tensors
from test.training.test_fit import TINY
from training import fit, pretrain
from training.data.case_table import Case, write_cases
from training.learning.checkpoint import CheckpointError
from training.learning.mae import load_mae, resize_positions
from training.learning.pretrained import (
    load_imagenet_into_encoder,
    load_mae_into_bottleneck,
    load_pretrained_parts,
    load_usfm_into_bottleneck,
    read_beit,
)
from training.learning.teachers import Beit

WIDTH, DEPTH, HEADS = 16, 2, 2
SIZES = ["--width", "16", "--depth", "2", "--heads", "2", "--image_size", "32", "--patch", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """8 phantoms with a case table, and a pretraining run on them."""
    root = tmp_path_factory.mktemp("phantoms")
    (root / "images").mkdir()
    cases = []
    for seed in range(8):
        made = phantom(seed, 64, 64)
        cv2.imwrite(str(root / "images" / f"{seed}.png"), made.image)
        split = "train" if seed > 1 else "val"
        cases.append(Case(f"{seed}.png", made.landmarks_px, made.aop_deg, split))
    write_cases(root / "cases.csv", cases)
    made = ["--images", str(root / "images"), "--output", str(root / "run"), "--epochs", "1"]
    made += ["--decoder_width", "12", "--decoder_heads", "1", "--batch", "4", "--workers", "0"]
    assert pretrain.main([*made, *SIZES, "--device", "cpu"]) == 0
    return root


def bottleneck(rows: int, columns: int, **other: object) -> ViTBottleneck:
    torch.manual_seed(rows)
    sizes = {"width": WIDTH, "depth": DEPTH, "heads": HEADS} | other
    return ViTBottleneck(rows, columns, **sizes)


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 5)])
def test_every_tensor_of_the_bottleneck_is_the_runs(folder, rows, columns):
    network = bottleneck(rows, columns)
    report = load_mae_into_bottleneck(folder / "run", network)
    encoder = load_mae(folder / "run")[0].encoder.state_dict()
    for key, value in network.state_dict().items():
        expected = encoder[key]
        if key == "position_embedding":
            expected = resize_positions(expected, rows, columns)
        assert torch.equal(value, expected), key
    equal = (rows, columns) == (4, 4)
    of_blocks = DEPTH * 12 + 2
    assert len(report.used) == of_blocks + equal and len(report.resized) == (not equal)
    left = [key for key in report.left_out if not key.startswith("decoder.")]
    assert left == ["encoder.patch_embed.weight", "encoder.patch_embed.bias"]
    sentence = f"mae.safetensors: {of_blocks + equal} tensors used, {int(not equal)} resized, "
    assert str(report).startswith(sentence + f"{len(report.left_out)} left out (encoder.patch_emb")


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"heads": 4}, "2 attention heads, the bottleneck has 4"),
        ({"depth": 3}, "missing blocks.2."),
        ({"depth": 1}, "unexpected blocks.1."),
        ({"width": 32}, "expected (32,)"),
        ({"positions": "relative"}, "missing bias_tables"),
    ],
)
def test_another_size_is_refused_and_the_right_one_named(folder, other, told):
    network = bottleneck(4, 4, **other)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(CheckpointError) as refused:
        load_mae_into_bottleneck(folder / "run", network)
    assert told in str(refused.value)
    assert "--network.vit_width 16 --network.vit_depth 2 --network.vit_heads 2" in str(
        refused.value
    )
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_usfm_stands_in_the_bottlenecks_place(tmp_path):
    torch.save(beit_tensors(), tmp_path / "usfm.pth")
    teacher = Beit(read_beit(tmp_path / "usfm.pth"), 5).state_dict()
    network = bottleneck(6, 3, width=24, heads=3, depth=2)
    own = network.position_embedding.clone()
    network.blocks = nn.ModuleList(Block(24, 3, 40 / 24) for _ in range(2))
    report = load_usfm_into_bottleneck(tmp_path / "usfm.pth", network)
    for key, value in network.state_dict().items():
        assert torch.equal(value, own if key == "position_embedding" else teacher[key])
    assert len(report.used) == 2 + 2 * 15 and len(report.left_out) == 3 + 2 * 2 + 1
    with pytest.raises(CheckpointError, match="3 attention heads, the bottleneck has 4"):
        load_usfm_into_bottleneck(tmp_path / "usfm.pth", bottleneck(6, 3, width=24, heads=4))


def test_relative_bottleneck_computes_what_usfm_does(tmp_path):
    """Only the cls token is missing; its column of the tables gives it no weight here."""
    tensors = beit_tensors(hidden=96)
    for k in range(2):
        tensors[f"blocks.{k}.attn.relative_position_bias_table"][-2] = -1e4  # token to cls
    torch.save(tensors, tmp_path / "usfm.pth")
    network = bottleneck(5, 5, width=24, heads=3, positions="relative").eval()
    report = load_usfm_into_bottleneck(tmp_path / "usfm.pth", network)
    assert len(report.used) == 2 + 2 * 16 and not report.resized
    teacher = Beit(read_beit(tmp_path / "usfm.pth"), 5).eval()
    image = torch.rand(2, 1, 20, 20)
    patches = teacher.patch_embed((image - teacher.mean) / teacher.std)
    found = network(patches).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, teacher(image).tokens, atol=1e-4, rtol=1e-4)
    resized = bottleneck(4, 7, width=24, heads=3, positions="relative")
    assert len(load_usfm_into_bottleneck(tmp_path / "usfm.pth", resized).resized) == 2
    assert resized(torch.rand(1, 24, 4, 7)).shape == (1, 24, 4, 7)


@pytest.fixture(scope="module")
def resnet() -> dict[str, Tensor]:
    """The keys and shapes of torchvision's ResNet-50."""
    with torch.device("meta"):
        shapes = ResNet50(3).state_dict()
    tensors = {
        key: torch.rand(1).expand(value.shape) if value.ndim else torch.tensor(7)
        for key, value in shapes.items()
    }
    tensors["conv1.weight"] = torch.randn(64, 3, 7, 7)
    return tensors | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}


@pytest.mark.parametrize(("channels", "counters"), [(1, 0), (3, 53)])
def test_imagenet_weights_fill_the_encoder(resnet, tmp_path, channels, counters):
    given = {key: value for key, value in resnet.items() if counters or "num_batches" not in key}
    torch.save(given, tmp_path / "resnet50.pth")
    encoder = ResNet50(channels)
    report = load_imagenet_into_encoder(tmp_path / "resnet50.pth", encoder)
    state = encoder.state_dict()
    for key in given.keys() & state.keys() - {"conv1.weight"}:
        assert torch.equal(state[key], given[key]), key
    assert len(given.keys() & state.keys()) == 265 + counters == len(state) - 53 + counters
    rgb = torch.rand(1, 1, 9, 9).expand(-1, 3, -1, -1)
    expected = nn.functional.conv2d(rgb, given["conv1.weight"])
    found = nn.functional.conv2d(rgb[:, :channels], state["conv1.weight"])
    torch.testing.assert_close(found, expected)
    assert len(report.used) == 264 + counters + (channels == 3)
    assert len(report.resized) == (channels == 1)
    assert report.left_out == ["fc.weight", "fc.bias"]


def test_imagenet_weights_that_do_not_fit_are_refused(resnet, tmp_path):
    wrong = resnet | {"layer5.0.conv1.weight": torch.zeros(1)}
    wrong["layer3.2.bn1.weight"] = torch.zeros(3)
    del wrong["layer1.0.conv2.weight"]
    torch.save(wrong, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError) as refused:
        load_imagenet_into_encoder(tmp_path / "wrong.pth", ResNet50(3))
    for told in ("unexpected layer5", "missing layer1.0.conv2", "layer3.2.bn1.weight is (3,)"):
        assert told in str(refused.value)
    compact = TransUNetConfig(
        input_size=64, channels=1, encoder="compact", encoder_widths=(4, 6, 8, 10, 12),
        vit_width=16, vit_depth=2, vit_heads=2, up_widths=(10, 8, 6),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="encoder is another"):
        load_pretrained_parts(build_network(compact), None, tmp_path / "wrong.pth")
    unet = build_network(UNetConfig(input_size=64, channels=1, widths=(4, 6)))
    with pytest.raises(CheckpointError, match="for a transunet"):
        load_pretrained_parts(unet, "anything", None)
    assert load_pretrained_parts(unet, None, None) == []


def run_fit(folder: Path, output: Path, *more: str) -> int:
    small = [*TINY, "--network.vit_depth", "2", "--batch", "2", "--epochs", "1"]
    data = ["--data", str(folder / "cases.csv"), "--images", str(folder / "images")]
    return fit.main([*data, "--output", str(output), "--device", "cpu", *small, *more])


@pytest.mark.slow
def test_fit_starts_from_a_pretrained_run(folder, tmp_path, capsys):
    still = ["--learning_rate", "0", "--weight_decay", "0", "--ema_decay", "0"]
    run = ["--pretrained", str(folder / "run")]
    assert run_fit(folder, tmp_path / "a", *run, *still) == 0
    shown = capsys.readouterr().out
    assert shown.count("26 tensors used, 1 resized") == 1
    encoder = load_mae(folder / "run")[0].encoder
    trained = torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["network"]
    blocks = {k: v for k, v in trained.items() if k.startswith("bottleneck.blocks.")}
    assert len(blocks) == 24
    for key, value in blocks.items():
        assert torch.equal(value, encoder.state_dict()[key.removeprefix("bottleneck.")])
    positions = resize_positions(encoder.position_embedding, 2, 2)
    assert torch.equal(trained["bottleneck.position_embedding"], positions)
    assert run_fit(folder, tmp_path / "b", *still) == 0
    random = torch.load(tmp_path / "b" / "checkpoint.pt", weights_only=True)["network"]
    key = "bottleneck.blocks.0.attn.qkv.weight"
    assert not torch.equal(random[key], trained[key])
    assert torch.equal(random["project.weight"], trained["project.weight"])  # not of the run


def test_fit_names_what_does_not_fit(folder, tmp_path, capsys):
    run = ["--pretrained", str(folder / "run")]
    assert run_fit(folder, tmp_path / "a", *run, "--network.vit_heads", "4") == 2
    assert "--network.vit_heads 2" in capsys.readouterr().err
    assert run_fit(folder, tmp_path / "b", "--pretrained", str(tmp_path)) == 2
    assert "mae.safetensors" in capsys.readouterr().err
    init = ["--init", str(tmp_path / "best.safetensors")]
    assert run_fit(folder, tmp_path / "c", *run, *init) == 2
    assert "--init fills the whole network" in capsys.readouterr().err
    assert run_fit(folder, tmp_path / "d", "--encoder-weights", str(tmp_path / "none.pth")) == 2
    assert "encoder is another" in capsys.readouterr().err
    assert not np.any([(tmp_path / name / "checkpoint.pt").exists() for name in "abcd"])


@pytest.mark.slow
def test_a_network_with_usfms_own_tables(folder, tmp_path, capsys):
    torch.save(beit_tensors(hidden=96), tmp_path / "usfm.pth")
    usfm = ["--pretrained", f"usfm:{tmp_path / 'usfm.pth'}", "--network.vit_positions", "relative"]
    usfm += ["--network.vit_width", "24", "--network.vit_heads", "3"]
    assert run_fit(folder, tmp_path / "run", *usfm) == 0
    assert "32 tensors used, 2 resized" in capsys.readouterr().out
    weights = ["--run", str(tmp_path / "run"), "--output", str(tmp_path / "aop.onnx")]
    assert to_onnx.main(weights) == 0  # with parity
