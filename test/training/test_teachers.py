"""Teachers: the BEiT-style forward pass against its formula; every key of a file accounted for."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from test.support.beit_file import USFM, beit_tensors
from training.learning.checkpoint import CheckpointError
from training.learning.pretrained import read_beit, resize_tables
from training.learning.teachers import Beit, load_teacher

GRID, PATCH, HEADS, WIDTH = 5, 4, 3, 24


def saved(path: Path, tensors: object) -> Path:
    torch.save(tensors, path)
    return path


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def bias_of(table: np.ndarray, grid: int) -> np.ndarray:
    """(tokens, tokens, heads) with the cls token first, offset by offset as BEiT numbers them."""
    tokens, span = grid**2 + 1, 2 * grid - 1
    bias = np.empty((tokens, tokens, table.shape[1]))
    for i in range(tokens):
        for j in range(tokens):
            if i and j:
                (row, column), (to_row, to_column) = divmod(i - 1, grid), divmod(j - 1, grid)
                place = (row - to_row + grid - 1) * span + column - to_column + grid - 1
            else:
                place = span**2 + {(0, 1): 0, (1, 0): 1, (0, 0): 2}[min(i, 1), min(j, 1)]
            bias[i, j] = table[place]
    return bias


def formula(tensors: dict[str, torch.Tensor], image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Patch features and the last block's attention of one (side, side) grey image, in float64."""
    t = {key: value.double().numpy() for key, value in tensors.items()}
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    rgb = (image[None] - mean[:, None, None]) / std[:, None, None]
    x = [t["cls_token"][0, 0]]
    for row in range(0, GRID * PATCH, PATCH):
        for column in range(0, GRID * PATCH, PATCH):
            part = rgb[:, row : row + PATCH, column : column + PATCH]
            x.append(
                (t["patch_embed.proj.weight"] * part).sum((1, 2, 3)) + t["patch_embed.proj.bias"]
            )
    x = np.array(x)
    depth, size = sum(key.endswith("gamma_1") for key in t), WIDTH // HEADS
    for k in range(depth):
        b = {key.removeprefix(f"blocks.{k}."): v for key, v in t.items() if f"blocks.{k}." in key}
        table = b.get("attn.relative_position_bias_table")
        bias = bias_of(
            t["rel_pos_bias.relative_position_bias_table"] if table is None else table, GRID
        )
        y = layer_norm(x, b["norm1.weight"], b["norm1.bias"]) @ b["attn.qkv.weight"].T
        query, key, value = np.split(y, 3, axis=1)
        query, value = query + b["attn.q_bias"], value + b["attn.v_bias"]
        attended, maps = [], []
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            scores = query[:, part] @ key[:, part].T / math.sqrt(size) + bias[..., h]
            share = np.exp(scores - scores.max(1, keepdims=True))
            maps.append(share / share.sum(1, keepdims=True))
            attended.append(maps[-1] @ value[:, part])
        y = np.hstack(attended) @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        x = x + b["gamma_1"] * y
        y = layer_norm(x, b["norm2.weight"], b["norm2.bias"])
        y = gelu(y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"])
        x = x + b["gamma_2"] * (y @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"])
    maps = np.array(maps)[:, 1:, 1:]
    return (
        layer_norm(x, t["norm.weight"], t["norm.bias"])[1:],
        maps / maps.sum(-1, keepdims=True),
    )


@pytest.mark.parametrize("shared", [False, True])
def test_forward_is_the_formulas(tmp_path, shared):
    tensors = beit_tensors(shared=shared)
    teacher = Beit(read_beit(saved(tmp_path / "usfm.pth", tensors)), GRID).double()
    image = torch.rand(2, 1, GRID * PATCH, GRID * PATCH, dtype=torch.float64)
    found = teacher(image, attention=True)
    assert found.tokens.shape == (2, 25, WIDTH) and found.attention.shape == (2, HEADS, 25, 25)
    for n in range(2):
        features, maps = formula(tensors, image[n, 0].numpy())
        np.testing.assert_allclose(found.tokens[n].detach(), features, atol=2e-6)  # of float32
        np.testing.assert_allclose(found.attention[n].detach(), maps, atol=1e-6)


def test_kept_patches_keep_their_places(tmp_path):
    teacher = Beit(read_beit(saved(tmp_path / "usfm.pth", beit_tensors())), GRID).double()
    image = torch.rand(2, 1, GRID * PATCH, GRID * PATCH, dtype=torch.float64)
    order = torch.stack([torch.randperm(25) for _ in range(2)])
    whole, mixed = teacher(image, attention=True), teacher(image, order, attention=True)
    for n in range(2):
        torch.testing.assert_close(mixed.tokens[n], whole.tokens[n, order[n]])
        expected = whole.attention[n][:, order[n]][:, :, order[n]]
        torch.testing.assert_close(mixed.attention[n], expected)
    few = teacher(image, order[:, :6], attention=True)
    assert few.tokens.shape == (2, 6, WIDTH) and few.attention.shape == (2, HEADS, 6, 6)
    torch.testing.assert_close(few.attention.sum(-1), torch.ones(2, HEADS, 6, dtype=torch.float64))


def usfm_file(folder: Path, shared: bool) -> Path:
    """A file of USFM's keys and shapes, nested as its pretraining nests them."""
    made = beit_tensors(**USFM, shared=shared, flat=True)
    tensors = {f"encoder.{key}": value for key, value in made.items()}
    tensors |= {"decoder.0.weight": torch.zeros(3, 768, 1, 1), "decoder.0.bias": torch.zeros(3)}
    return saved(folder / "USFM_latest.pth", {"model": tensors, "epoch": 399})


@pytest.mark.slow
def test_usfms_keys_and_shapes_are_all_accounted_for(tmp_path):
    teacher, line = load_teacher(f"usfm:{usfm_file(tmp_path, shared=True)}", 8)
    assert (teacher.width, teacher.heads, len(teacher.blocks)) == (768, 12, 12)
    assert teacher.tables.shape == (12, 15 * 15 + 3, 12)
    assert f"{5 + 12 * 15} tensors used, 1 resized, 5 left out" in line
    for key in ("epoch", "encoder.mask_token", "decoder.*.weight", "relative_position_index"):
        assert key in line
    assert teacher(torch.rand(1, 1, 128, 128)).tokens.shape == (1, 64, 768)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_usfms_tables_may_be_one_a_block(tmp_path):
    weights = read_beit(usfm_file(tmp_path, shared=False))
    assert weights.tables_on_grid(14, 14).shape == (12, 27 * 27 + 3, 12)
    assert str(weights.report).startswith("USFM_latest.pth: 197 tensors used, 0 resized, 16 left")
    weights.tables_on_grid(8, 8)
    assert "185 tensors used, 12 resized, 16 left out" in str(weights.report)


@pytest.mark.parametrize("wrap", ["model", "state_dict", "module", ""])
@pytest.mark.parametrize("prefix", ["", "module.", "net.backbone."])
def test_nothing_of_a_loaded_teacher_is_random(tmp_path, wrap, prefix):
    """Published code loads with strict=False: no key of its file fits, and its teacher is noise."""
    tensors = beit_tensors()
    named = {prefix + key: value for key, value in tensors.items()}
    path = saved(tmp_path / "usfm.pth", {wrap: named} if wrap else named)
    torch.manual_seed(1)
    teacher = load_teacher(f"usfm:{path}", GRID)[0].state_dict()
    torch.manual_seed(2)
    again = load_teacher(f"usfm:{path}", GRID)[0].state_dict()
    assert all(torch.equal(teacher[key], again[key]) for key in teacher)
    gamma, weight = tensors["blocks.1.gamma_2"], tensors["blocks.1.mlp.fc2.weight"]
    assert torch.equal(teacher["blocks.1.mlp.2.weight"], gamma[:, None] * weight)
    bias = teacher["blocks.0.attn.qkv.bias"].reshape(3, WIDTH)
    parts = [tensors[f"blocks.0.attn.{name}_bias"] for name in "qv"]
    assert torch.equal(bias, torch.stack([parts[0], torch.zeros(WIDTH), parts[1]]))


def without(key: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in beit_tensors().items() if name != key}


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (without("blocks.1.attn.q_bias"), "missing blocks.1.attn.q_bias"),
        (without("norm.weight"), "missing norm.weight"),
        (without("blocks.0.attn.relative_position_bias_table"), "relative_position_bias_table"),
        (without("patch_embed.proj.weight"), "0 patch_embed.proj.weight among"),
        (beit_tensors() | {"pos_embed": torch.zeros(1, 26, 24)}, "unexpected pos_embed"),
        (beit_tensors() | {"blocks.4.gamma_1": torch.zeros(24)}, "unexpected blocks.4.gamma_1"),
        (beit_tensors() | {"blocks.0.gamma_2": torch.zeros(7)}, "gamma_2 is (7,), expected (24,)"),
        ({f"net.{k}": v for k, v in beit_tensors().items()} | {"other": torch.zeros(1)}, "other"),
        (beit_tensors() | {f"ema.{k}": v for k, v in beit_tensors().items()}, "2 patch_embed"),
        ({"a": 1}, "among its 0 keys"),
        ([1, 2], "expected tensors by name"),
    ],
)
def test_wrong_files_are_refused_with_what_did_not_fit(tmp_path, tensors, told):
    with pytest.raises(CheckpointError) as refused:
        load_teacher(f"usfm:{saved(tmp_path / 'wrong.pth', tensors)}", GRID)
    assert told in str(refused.value) and "wrong.pth" in str(refused.value)


def test_files_that_are_no_weights_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(CheckpointError, match="not a file of plain tensors"):
        load_teacher(f"usfm:{tmp_path / 'text.pth'}", GRID)
    code = saved(tmp_path / "code.pth", {"model": beit_tensors(), "config": Path("run.yaml")})
    with pytest.raises(CheckpointError, match="save only its state dict"):
        load_teacher(f"usfm:{code}", GRID)
    with pytest.raises(CheckpointError, match="expected a file"):
        load_teacher(f"usfm:{tmp_path / 'none.pth'}", GRID)
    with pytest.raises(CheckpointError, match=r"mae\.safetensors"):
        load_teacher(f"mae:{tmp_path}", GRID)
    for text in ("usfm", "sam:file", "usfm:"):
        with pytest.raises(ValueError, match="expected the teacher"):
            load_teacher(text, GRID)
    assert load_teacher("none", GRID)[0] is None


def test_safetensors_and_fc_norm(tmp_path):
    tensors = beit_tensors()
    for kind in ("weight", "bias"):
        tensors[f"fc_norm.{kind}"] = tensors.pop(f"norm.{kind}")
    save_file(tensors, tmp_path / "usfm.safetensors")
    weights = read_beit(tmp_path / "usfm.safetensors")
    assert torch.equal(weights.state["norm.weight"], tensors["fc_norm.weight"])
    assert "fc_norm.weight" in weights.report.used


def test_tables_are_resized_about_the_same_centre():
    tables = torch.randn(2, 9 * 9 + 3, 4)
    assert resize_tables(tables, 5, 5) is tables
    row = torch.arange(-4.0, 5.0)[:, None].expand(9, 9)
    planes = torch.stack([row, row.T, row.abs() * 0 + 3], dim=-1).reshape(1, 81, 3)
    resized = resize_tables(torch.cat([planes, torch.full((1, 3, 3), 99.0)], dim=1), 4, 7)
    assert resized.shape == (1, 7 * 13 + 3, 3) and (resized[:, -3:] == 99).all()
    grid = resized[0, :-3].reshape(7, 13, 3)
    assert grid[3, 6].tolist() == pytest.approx([0, 0, 3], abs=1e-5)  # no offset stays none
    assert grid[6, 0, 0] == pytest.approx(3 * 9 / 7, abs=0.06)  # to the rim of the frame, not 4
    torch.testing.assert_close(grid.flip(0)[..., 0], -grid[..., 0], atol=1e-5, rtol=0)
    assert (grid[1:, :, 0] > grid[:-1, :, 0]).all() and (grid[:, 1:, 1] > grid[:, :-1, 1]).all()
