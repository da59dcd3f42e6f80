"""A second network for the masks: whose answer is whose, what trains, what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.network import TransUNetConfig, build_network
from test.test_network import SMALL
from training import join
from training.cases import Case, write_cases
from training.checkpoint import Checkpoint, load_weights, save_weights
from training.folds import kept_out
from training.losses import mask_loss, total_loss
from training.recipes import COMPACT

SECOND = SMALL.model_copy(update={"encoder_widths": (2, 4, 6, 8, 10), "up_widths": (8, 6, 4)})
BOTH = SMALL.model_copy(update={"second": SECOND})


def written(path: Path, config: TransUNetConfig, **changes: object) -> Path:
    recipe = COMPACT.model_copy(update={"network": config, "sigma_cells": 1.5})
    spec = recipe.spec(2).model_copy(update={"metrics": {"val_mre_px": 7.0}, **changes})
    network = build_network(config, masks=2)
    save_weights(path, network.state_dict(), Checkpoint(network=config, masks=2, spec=spec))
    return path


def test_heatmaps_are_the_firsts_and_masks_the_seconds(tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"view_channels": 4})
    files = [written(tmp_path / "a.safetensors", config)]
    files += [written(tmp_path / "b.safetensors", SECOND, val_trained=True)]
    output = tmp_path / "both.safetensors"
    assert join.main([*map(str, files), "--output", str(output)]) == 0
    network, described = load_weights(output)
    assert described.spec.val_trained and described.spec.metrics == {}
    assert described.network == BOTH
    image = torch.randn(2, 1, 64, 64)
    first, second = (load_weights(file)[0](image) for file in files)
    found = network(image)
    assert torch.equal(found[:, :3], first[0][:, :3]) and torch.equal(found[:, 3:], second[:, 3:])


def test_both_networks_learn_masks_and_the_first_heatmaps() -> None:
    network = build_network(BOTH, masks=2).train()
    raw = network(torch.randn(2, 1, 64, 64))
    assert raw.heatmaps.shape == (2, 3, 16, 16) and raw.masks.shape == (2, 4, 16, 16)
    heatmaps, masks = torch.rand(2, 3, 16, 16), torch.rand(2, 2, 16, 16)
    batch = {"heatmaps": heatmaps, "visible": torch.ones(2, 3), "masks": masks}
    batch["has_mask"] = torch.ones(2)
    loss = total_loss(raw.heatmaps, raw.masks, batch, "cross_entropy", 0.0, 3.0)
    parts = [mask_loss(raw.masks[:, k : k + 2], masks) for k in (0, 2)]
    assert loss.item() == pytest.approx(3 * sum(parts).item(), rel=1e-5)
    loss.backward()
    assert network.head.masks.weight.grad.any() and network.second.head.masks.weight.grad.any()


@pytest.mark.parametrize(
    "changes", [{"input_size": 32}, {"up_widths": (8, 6)}, {"view_channels": 4}, {"second": SMALL}]
)
def test_a_second_network_on_another_grid_or_with_parts_is_refused(changes: dict) -> None:
    second = SECOND.model_copy(update=changes)
    with pytest.raises(ValueError, match="a second network gives masks on the first one's grid"):
        build_network(SMALL.model_copy(update={"second": second}), masks=2)
    with pytest.raises(ValueError, match="it needs masks"):
        build_network(BOTH)


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
    first, second = folds(tmp_path, SMALL, "a"), folds(tmp_path, SECOND, "b")
    assert join.main([str(first), str(second), "--output", str(tmp_path / "both")]) == 0
    for k, (network, described, cases) in enumerate(kept_out(tmp_path / "both")):
        assert described.network == BOTH and [case.file for case in cases] == [f"{k}.png"]
        heads = [load_weights(f / f"fold-{k}" / "best.safetensors")[0] for f in (first, second)]
        assert torch.equal(network.head.heatmaps.weight, heads[0].head.heatmaps.weight)
        assert torch.equal(network.second.head.masks.weight, heads[1].head.masks.weight)
    for one, other in (("fold-0", "fold-1"), ("fold-1", "fold-0")):
        (second / one / "cases.csv").write_bytes((first / other / "cases.csv").read_bytes())
    assert join.main([str(first), str(second), "--output", str(tmp_path / "c")]) == 2
    assert "keep out different cases" in capsys.readouterr().err
    (second / "fold-1" / "done").unlink()
    assert join.main([str(first), str(second), "--output", str(tmp_path / "c")]) == 2
    assert "no finished folds" in capsys.readouterr().err


def test_networks_that_do_not_fit_are_refused(tmp_path: Path, capsys) -> None:
    first = written(tmp_path / "a.safetensors", SMALL)
    other = SECOND.model_copy(update={"input_size": 32})
    seconds = [
        written(tmp_path / "b.safetensors", SECOND, mean=99.0),
        written(tmp_path / "c.safetensors", other),
    ]
    for second, sentence in zip(seconds, ("grey values", "first one's grid"), strict=True):
        output = tmp_path / "both.safetensors"
        assert join.main([str(first), str(second), "--output", str(output)]) == 2
        assert sentence in capsys.readouterr().err and not output.exists()
