"""Distillation: the teachers' share of the targets; clusters of scans that look alike."""

import numpy as np
import pytest
import torch

from export import to_onnx
from test.training.test_fit import TINY, folder, run_fit  # noqa: F401
from training.data.case_table import read_cases
from training.data.dataset import LandmarkDataset
from training.data.near_duplicates import cluster_groups
from training.learning.checkpoint import load_weights
from training.learning.teachers import Ensemble
from training.recipes import Recipe


@pytest.fixture(scope="module")
def taught(folder, tmp_path_factory):  # noqa: F811
    """Two ONNX files, the recipe of their training, and a batch."""
    root = tmp_path_factory.mktemp("teachers")
    for seed in ("1", "2"):
        assert run_fit(folder, root / seed, "--epochs", "1", "--seed", seed) == 0
        flags = ["--run", str(root / seed), "--output", str(root / f"{seed}.onnx")]
        assert to_onnx.main(flags) == 0
    recipe = Recipe.model_validate(load_weights(root / "1" / "best.safetensors")[1].spec.recipe)
    cases = read_cases(folder / "cases.csv")
    data = LandmarkDataset(cases, folder / "images", folder / "masks", recipe, train=True)
    batch = torch.utils.data.default_collate([data[0, k] for k in range(4)])
    return root / "1.onnx", root / "2.onnx", recipe, batch


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_teachers_have_their_share_of_the_targets(taught, share):
    onnx, other, recipe, batch = taught
    recipe = recipe.model_copy(update={"teacher_share": share})
    ensemble = Ensemble([onnx, other], recipe, masks=2, device=torch.device("cpu"))
    found = ensemble.teach(batch)
    first, second = (model.run(batch["image"].numpy()).maps for model in ensemble.models)
    assert np.abs(first - second).max() > 0.01
    said = (first + second) / 2
    for name, theirs in (("heatmaps", said[:, :3]), ("masks", said[:, 3:])):
        expected = (1 - share) * batch[name].numpy() + share * theirs
        np.testing.assert_allclose(found[name], expected, atol=1e-6)
    assert found.keys() == batch.keys() and found["image"] is batch["image"]


@pytest.mark.slow
def test_the_training_aims_at_what_teachers_say(folder, taught, tmp_path, capsys):  # noqa: F811
    """Two trainings that differ by their teacher alone have different losses."""
    own, other = taught[:2]
    start = str(own.parent / "1" / "best.safetensors")
    flags = ["--init", start, "--teacher_share", "1", "--epochs", "1", "--learning_rate", "0"]
    losses = []
    for teacher in (own, other):
        output = tmp_path / teacher.stem
        assert run_fit(folder, output, *flags, "--teachers", str(teacher)) == 0
        losses.append(float((output / "log.csv").read_text().splitlines()[1].split(",")[1]))
    assert losses[0] != losses[1]
    resumed = ["--resume", *flags, "--teachers", str(own)]
    assert run_fit(folder, tmp_path / "2", *resumed) == 2
    assert "other --teachers" in capsys.readouterr().err
    assert run_fit(folder, tmp_path / "no share", "--teachers", str(own)) == 2
    assert run_fit(folder, tmp_path / "no teacher", "--teacher_share", "1") == 2
    assert "must be given together" in capsys.readouterr().err


@pytest.mark.slow
def test_a_teacher_of_another_kind_is_refused(folder, taught, tmp_path, capsys):  # noqa: F811
    share = ["--teacher_share", "0.5"]
    flags = ["--teachers", str(taught[0]), *share, "--mean", "31"]
    assert run_fit(folder, tmp_path / "run", *flags) == 2
    assert "its mean is 30.0, the network's is 31.0" in capsys.readouterr().err
    assert run_fit(folder, tmp_path / "run", *share, "--teachers", str(tmp_path / "no.onnx")) == 2
    assert "no model file" in capsys.readouterr().err


def test_groups_that_look_alike_share_a_cluster():
    rng = np.random.default_rng(0)
    scenes = [np.kron(rng.integers(0, 255, (4, 4)), np.ones((16, 16))) for _ in range(3)]
    images = [
        np.clip(scene + rng.normal(0, 10, scene.shape), 0, 255).astype(np.uint8)
        for scene in (*scenes, *scenes)
    ]
    groups = ["a", "b", "c", "d", "e", "c"]
    assert cluster_groups(images, groups, 0.9) == [0, 1, 2, 0, 1, 2]
    assert len(set(cluster_groups(images, groups, 1.1))) == 5
    assert len(set(cluster_groups(images, groups, -1.0))) == 1
