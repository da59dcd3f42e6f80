"""Distillation: what teachers say takes its share of the targets; parts of alike scans."""

import numpy as np
import pytest
import torch

from export import to_onnx
from test.test_fit import TINY, folder, run_fit  # noqa: F401
from training.cases import read_cases
from training.checkpoint import load_weights
from training.data import LandmarkDataset
from training.ensemble import Ensemble
from training.groups import clusters
from training.recipes import Recipe


@pytest.fixture(scope="module")
def taught(folder, tmp_path_factory):  # noqa: F811
    """An ONNX file, the recipe it was trained by, and a batch."""
    run = tmp_path_factory.mktemp("teacher")
    assert run_fit(folder, run / "run", "--epochs", "1") == 0
    onnx = run / "aop.onnx"
    assert to_onnx.main(["--run", str(run / "run"), "--output", str(onnx)]) == 0
    recipe = Recipe.model_validate(load_weights(run / "run" / "best.safetensors")[1].spec.recipe)
    cases = read_cases(folder / "cases.csv")
    data = LandmarkDataset(cases, folder / "images", folder / "masks", recipe, train=True)
    batch = torch.utils.data.default_collate([data[0, k] for k in range(4)])
    return onnx, recipe, batch


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_teachers_have_their_share_of_the_targets(taught, share):
    onnx, recipe, batch = taught
    recipe = recipe.model_copy(update={"teacher_share": share})
    ensemble = Ensemble([onnx, onnx], recipe, masks=2)
    found = ensemble.teach(batch)
    said = ensemble.models[0].run(batch["image"].numpy()).maps
    for name, theirs in (("heatmaps", said[:, :3]), ("masks", said[:, 3:])):
        expected = (1 - share) * batch[name].numpy() + share * theirs
        np.testing.assert_allclose(found[name], expected, atol=1e-6)
    assert found.keys() == batch.keys() and found["image"] is batch["image"]


def test_the_training_aims_at_what_teachers_say(folder, taught, tmp_path, capsys):  # noqa: F811
    still = ["--seed", "5", "--epochs", "1", "--learning_rate", "0"]
    taught_by = ["--teachers", str(taught[0])]
    losses = []
    for name, flags in (("alone", []), ("taught", [*taught_by, "--teacher_share", "1"])):
        assert run_fit(folder, tmp_path / name, *still, *flags) == 0
        losses.append((tmp_path / name / "log.csv").read_text().splitlines()[1].split(",")[1])
    assert losses[0] != losses[1]
    assert run_fit(folder, tmp_path / "no share", *taught_by) == 2
    assert run_fit(folder, tmp_path / "no teacher", "--teacher_share", "1") == 2
    assert "given together" in capsys.readouterr().err


def test_a_teacher_of_another_kind_is_refused(folder, taught, tmp_path, capsys):  # noqa: F811
    share = ["--teacher_share", "0.5"]
    flags = ["--teachers", str(taught[0]), *share, "--mean", "31"]
    assert run_fit(folder, tmp_path / "run", *flags) == 2
    assert "its mean is 30.0, here 31.0" in capsys.readouterr().err
    assert run_fit(folder, tmp_path / "run", *share, "--teachers", str(tmp_path / "no.onnx")) == 2
    assert "no model file" in capsys.readouterr().err


def test_groups_that_look_alike_are_dealt_together():
    rng = np.random.default_rng(0)
    scenes = [np.kron(rng.integers(0, 255, (4, 4)), np.ones((16, 16))) for _ in range(3)]
    images = [
        np.clip(scene + rng.normal(0, 10, scene.shape), 0, 255).astype(np.uint8)
        for scene in (*scenes, *scenes)
    ]
    groups = ["a", "b", "c", "d", "e", "c"]
    assert clusters(images, groups, 0.9) == [0, 1, 2, 0, 1, 2]
    assert len(set(clusters(images, groups, 1.1))) == 5
    assert len(set(clusters(images, groups, -1.0))) == 1
