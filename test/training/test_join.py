"""Several networks as one: the mean of their maps, what trains, what is refused."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.network import TransUNetConfig, build_network
from test.model.test_network import SMALL
from training import join
from training.data.case_table import Case, write_cases
from training.learning.checkpoint import Checkpoint, load_folds, load_weights, save_weights
from training.learning.losses import heatmap_cross_entropy, mask_loss, total_loss
from training.recipes import COMPACT

OTHER = replace(SMALL, encoder_widths=(8, 8, 10, 12, 14), up_widths=(12, 10, 8))
ALL = replace(SMALL, members=(OTHER, SMALL))


def written(path: Path, config: TransUNetConfig, masks: int = 2, **changes: object) -> Path:
    recipe = COMPACT.model_copy(update={"network": config, "sigma_cells": 1.5})
    spec = recipe.spec(masks).model_copy(update={"metrics": {"val_mre_px": 7.0}, **changes})
    network = build_network(config, masks)
    save_weights(path, network.state_dict(), Checkpoint(network=config, masks=masks, spec=spec))
    return path


@pytest.mark.slow
def test_the_maps_are_the_mean_of_all(tmp_path: Path) -> None:
    with_view = replace(SMALL, view_channels=4)
    files = [written(tmp_path / "a.safetensors", with_view)]
    files += [written(tmp_path / "b.safetensors", OTHER, val_trained=True)]
    files += [written(tmp_path / "c.safetensors", SMALL)]
    output = tmp_path / "all.safetensors"
    assert join.main([*map(str, files), "--output", str(output)]) == 0
    network, described = load_weights(output)
    assert described.spec.val_trained and described.spec.metrics == {}
    assert described.network == ALL
    image = torch.randn(2, 1, 64, 64)
    first, *others = (load_weights(file)[0](image) for file in files)
    torch.testing.assert_close(network(image), (first[0] + sum(others)) / 3)
    assert described.spec.recipe["network"] == json.loads(json.dumps(asdict(ALL)))  # gives the cost
    both = tmp_path / "both.safetensors"  # what is joined already counts each of its networks
    for order in ((0, 1, 2), (2, 1, 0)):
        assert join.main([*(str(files[k]) for k in order[:2]), "--output", str(both)]) == 0
        pair = [str(both), str(files[order[2]])]
        for given in (pair, pair[::-1]):
            assert join.main([*given, "--output", str(output)]) == 0
            torch.testing.assert_close(load_weights(output)[0](image), (first[0] + sum(others)) / 3)


def test_every_network_learns_by_its_own_maps() -> None:
    network = build_network(ALL, masks=2).train()
    raw = network(torch.randn(2, 1, 64, 64))
    assert raw.heatmaps.shape == (2, 9, 16, 16) and raw.masks.shape == (2, 6, 16, 16)
    heatmaps, masks = torch.rand(2, 3, 16, 16), torch.rand(2, 2, 16, 16)
    visible = torch.tensor([[1.0, 1, 0], [1, 0, 1]])
    batch = {"heatmaps": heatmaps, "visible": visible, "masks": masks, "has_mask": torch.ones(2)}
    loss = total_loss(raw.heatmaps, raw.masks, batch, "cross_entropy", 2.0, 3.0)
    of_heatmaps = sum(heatmap_cross_entropy(m, heatmaps, visible) for m in raw.heatmaps.split(3, 1))
    of_masks = sum(mask_loss(m, masks) for m in raw.masks.split(2, 1))
    assert loss.item() == pytest.approx((2 * of_heatmaps + 3 * of_masks).item(), rel=1e-5)
    loss.backward()
    for one in (network, *network.members):
        assert one.head.masks.weight.grad.any() and one.head.heatmaps.weight.grad.any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_size": 32}, r"same input_size, got \(64, 32\)"),
        ({"up_widths": (8, 6)}, r"same stride, got \(4, 8\)"),
        ({"softmax_sigma_cells": None}, r"same softmax_sigma_cells, got \(1.5, None\)"),
        ({"view_channels": 4}, "without a view head"),
        ({"members": (SMALL,)}, "without members of their own"),
    ],
)
def test_members_of_another_grid_or_with_parts_are_refused(changes: dict, words: str) -> None:
    member = replace(OTHER, **changes)
    with pytest.raises(ValueError, match=words):
        build_network(replace(SMALL, members=(member,)), masks=2)


def folds(root: Path, config: TransUNetConfig, name: str) -> Path:
    for k in range(2):
        run = root / name / f"fold-{k}"
        run.mkdir(parents=True)
        written(run / "best.safetensors", config)
        splits = ["test" if j == k else "train" for j in range(2)]
        cases = [Case(f"{j}.png", np.eye(3, 2) * 9, 45.0, split) for j, split in enumerate(splits)]
        write_cases(run / "cases.csv", cases)
        (run / "done").touch()
    return root / name


def test_folds_are_joined_one_by_one(tmp_path: Path, capsys) -> None:
    first, second = folds(tmp_path, SMALL, "a"), folds(tmp_path, OTHER, "b")
    assert join.main([str(first), str(second), "--output", str(tmp_path / "both")]) == 0
    for k, (network, described, cases) in enumerate(load_folds(tmp_path / "both")):
        assert described.network.members == (OTHER,) and [case.file for case in cases] == [
            f"{k}.png"
        ]
        heads = [load_weights(f / f"fold-{k}" / "best.safetensors")[0] for f in (first, second)]
        assert torch.equal(network.head.heatmaps.weight, heads[0].head.heatmaps.weight)
        assert torch.equal(network.members[0].head.masks.weight, heads[1].head.masks.weight)
    for one, other in (("fold-0", "fold-1"), ("fold-1", "fold-0")):
        (second / one / "cases.csv").write_bytes((first / other / "cases.csv").read_bytes())
    assert join.main([str(first), str(second), "--output", str(tmp_path / "c")]) == 2
    assert "keep out different cases" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    (second / "fold-1" / "done").unlink()
    assert join.main([str(first), str(second), "--output", str(tmp_path / "c")]) == 2
    assert "expected finished folds" in capsys.readouterr().err
    shutil.rmtree(second / "fold-1")
    assert join.main([str(first), str(second), "--output", str(tmp_path / "c")]) == 2
    assert "keep out different cases" in capsys.readouterr().err


def test_networks_that_do_not_fit_are_refused(tmp_path: Path, capsys) -> None:
    first = written(tmp_path / "a.safetensors", SMALL)
    other = replace(OTHER, input_size=32)
    seconds = [
        (written(tmp_path / "b.safetensors", OTHER, mean=99.0), "take grey values alike"),
        (written(tmp_path / "c.safetensors", OTHER, masks=0), "give the same masks"),
        (written(tmp_path / "d.safetensors", other), "their maps differ"),
        (written(tmp_path / "e.safetensors", OTHER, sigma_cells=9.0), "heatmaps of one width"),
    ]
    for second, sentence in seconds:
        output = tmp_path / "both.safetensors"
        assert join.main([str(first), str(second), "--output", str(output)]) == 2
        assert sentence in capsys.readouterr().err and not output.exists()
    with pytest.raises(SystemExit):
        join.main([str(first), "--output", str(output)])
    assert "two networks or more" in capsys.readouterr().err
