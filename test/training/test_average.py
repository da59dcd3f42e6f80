"""Means of weights: what is averaged, what is left to calibrate anew, what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.network import build_network
from test.model.test_network import SMALL
from training import average
from training.learning.checkpoint import Checkpoint, load_weights, save_weights
from training.recipes import COMPACT


def written(path: Path, seed: int, **changes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    config = replace(SMALL, **changes)
    network = build_network(config, masks=2)
    recipe = COMPACT.model_copy(update={"network": config, "sigma_cells": 1.5})
    spec = recipe.spec(2).model_copy(update={"metrics": {"val_mre_px": 7.0}})
    save_weights(path, network.state_dict(), Checkpoint(network=config, masks=2, spec=spec))
    return network.state_dict()


def test_the_mean_of_three_and_no_view_head(tmp_path: Path) -> None:
    files = [tmp_path / f"{k}.safetensors" for k in range(3)]
    states = [written(file, k, view_channels=4 * (k == 0)) for k, file in enumerate(files)]
    output = tmp_path / "mean.safetensors"
    assert average.main([*map(str, files), "--output", str(output)]) == 0
    network, described = load_weights(output)
    assert described.network.view_channels == 0 and described.spec.metrics == {}
    for name, found in network.state_dict().items():
        wanted = sum(state[name].double() for state in states) / 3
        torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)


def test_another_network_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "a.safetensors", 0)
    written(tmp_path / "b.safetensors", 0, vit_depth=SMALL.vit_depth + 1)
    files = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    assert average.main([*files, "--output", str(tmp_path / "mean.safetensors")]) == 2
    assert "b.safetensors is of another network" in capsys.readouterr().err
    assert not (tmp_path / "mean.safetensors").exists()
