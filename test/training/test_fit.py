"""Training: losses, samples, resuming, several processes, and that it learns."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from model.anatomy import angle_of_progression
from test.phantom import phantom
from training import fit
from training.data.augment import augment
from training.data.case_table import Case, read_cases, write_cases
from training.data.dataset import EpochSampler, LandmarkDataset, sampling_probabilities
from training.learning.checkpoint import CheckpointError, load_weights
from training.learning.losses import heatmap_cross_entropy, heatmap_mse, mask_loss
from training.learning.trainer import number_format, running_average
from training.recipes import COMPACT, PAPER, Augmentation, Recipe

# of fewer than 8 channels, a 1x1 convolution in float32 may never end on AVX2 (torch 2.13)
TINY = [
    "--network.input_size", "64", "--network.encoder_widths", "8,8,12,16,16",
    "--network.vit_width", "16", "--network.vit_depth", "1", "--network.vit_heads", "2",
    "--network.up_widths", "16,12,8", "--batch", "4", "--epochs", "4", "--workers", "0",
    "--ema_decay", "0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """12 phantoms with masks and a case table without a split."""
    root = tmp_path_factory.mktemp("phantoms")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    cases = []
    for seed in range(12):
        made = phantom(seed, 96, 80)
        cv2.imwrite(str(root / "images" / f"{seed:02d}.png"), made.image)
        cv2.imwrite(str(root / "masks" / f"{seed:02d}.png"), made.mask)
        angle = float(angle_of_progression(made.landmarks_px))
        split = "val" if seed % 4 == 0 else "train"
        cases.append(Case(f"{seed:02d}.png", made.landmarks_px, angle, split, "A", f"g{seed}"))
    write_cases(root / "cases.csv", cases)
    return root


def run_fit(folder: Path, output: Path, *more: str) -> int:
    return fit.main(
        ["--recipe", "compact", "--data", str(folder / "cases.csv"), "--device", "cpu"]
        + ["--images", str(folder / "images"), "--masks", str(folder / "masks")]
        + ["--output", str(output), *TINY, *more]
    )


def weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "checkpoint.pt", weights_only=True)["network"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--optimiser", "adamw")])
def test_resume_continues_exactly(folder, tmp_path, more):
    assert run_fit(folder, tmp_path / "whole", *more) == 0
    assert run_fit(folder, tmp_path / "parts", "--max-minutes", "0", *more) == 0
    first = list(csv.DictReader((tmp_path / "parts" / "log.csv").open()))
    assert len(first) == 1
    assert run_fit(folder, tmp_path / "parts", "--resume", "--max-minutes", "0", *more) == 0
    assert run_fit(folder, tmp_path / "parts", "--resume", *more) == 0
    logs = [list(csv.DictReader((tmp_path / n / "log.csv").open())) for n in ("whole", "parts")]
    for a, b in zip(*logs, strict=True):
        assert (a["loss"], a["val_mre_px"]) == (b["loss"], b["val_mre_px"])
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    _, checkpoint = load_weights(tmp_path / "parts" / "best.safetensors")
    assert checkpoint.masks == 2 and checkpoint.spec.input_size == 64
    assert (tmp_path / "parts" / "samples" / "epoch-004.png").is_file()
    assert list((tmp_path / "parts" / "tensorboard").iterdir())


@pytest.mark.slow
def test_resume_refuses_another_recipe(folder, tmp_path, capsys):
    assert run_fit(folder, tmp_path, "--max-minutes", "0") == 0
    assert run_fit(folder, tmp_path, "--resume", "--learning_rate", "0.1") == 2
    assert "differs in learning_rate" in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_is_not_overwritten(folder, tmp_path, capsys):
    assert run_fit(folder, tmp_path, "--resume") == 2
    assert "to resume" in capsys.readouterr().err
    assert run_fit(folder, tmp_path, "--max-minutes", "0") == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert run_fit(folder, tmp_path) == 2
    assert "holds a training" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.slow
def test_init_starts_from_weights_and_refuses_others(folder, tmp_path, capsys):
    assert run_fit(folder, tmp_path / "a", "--max-minutes", "0") == 0
    init = ["--init", str(tmp_path / "a" / "best.safetensors")]
    assert run_fit(folder, tmp_path / "b", *init, "--max-minutes", "0") == 0
    assert run_fit(folder, tmp_path / "c", *init, "--network.vit_depth", "2") == 2
    assert "missing bottleneck.blocks.1" in capsys.readouterr().err
    assert run_fit(folder, tmp_path / "b", *init, "--resume", "--max-minutes", "0") == 0
    clicks = ["--recipe", "compact", "--data", str(folder / "cases.csv"), "--device", "cpu", *TINY]
    clicks += ["--images", str(folder / "images"), "--output", str(tmp_path / "d"), *init]
    assert fit.main([*clicks, "--max-minutes", "0"]) == 0
    assert "best.safetensors: these parts are left out: head.masks" in capsys.readouterr().out


def test_averaged_weights_start_as_the_mean_and_then_decay():
    network = torch.nn.BatchNorm1d(2)
    average = AveragedModel(network, multi_avg_fn=running_average(0.5), use_buffers=True)
    for value in (1.0, 3.0, 7.0):
        torch.nn.init.constant_(network.weight, value)
        network(torch.full((4, 2), value))
        average.update_parameters(network)
    assert average.module.weight.tolist() == [4.5, 4.5]  # of 1, 2 and 7
    assert int(average.module.num_batches_tracked) == 3


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("AVX512", torch.bfloat16), ("AVX2", torch.float32), ("DEFAULT", torch.float32)],
)
def test_processors_that_are_slow_in_bfloat16_train_in_float32(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert number_format(torch.device("cpu")) is expected


@pytest.mark.parametrize(("quick", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_gpus_without_bfloat16_train_in_fp16(quick, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: quick)
    assert number_format(torch.device("cuda")) is expected


@pytest.mark.slow
def test_init_takes_the_members_along(folder, tmp_path, capsys):
    members = (
        '[{"kind": "transunet", "input_size": 64, "channels": 1, "encoder": "compact", '
        '"encoder_widths": [8, 8, 8, 8, 8], "vit_width": 16, "vit_depth": 1, "vit_heads": 2, '
        '"up_widths": [8, 8, 8], "softmax_sigma_cells": 2.0}]'
    )
    stop = ("--max-minutes", "0")
    assert run_fit(folder, tmp_path / "a", "--network.members", members, *stop) == 0
    init = ["--init", str(tmp_path / "a" / "best.safetensors")]
    assert run_fit(folder, tmp_path / "b", *init, *stop) == 0
    before, after = (weights(tmp_path / name) for name in "ab")
    name = "members.0.head.masks.weight"
    assert before.keys() == after.keys() and not torch.equal(before[name], after[name])
    assert run_fit(folder, tmp_path / "b", "--resume", *stop) == 0
    clicks = ["--recipe", "compact", "--data", str(folder / "cases.csv"), "--device", "cpu", *TINY]
    clicks += ["--images", str(folder / "images"), "--output", str(tmp_path / "c"), *init, *stop]
    capsys.readouterr()
    assert fit.main(clicks) == 0
    assert "are left out: head.masks, members.0.head.masks\n" in capsys.readouterr().out
    found = weights(tmp_path / "c")
    assert "members.0.head.heatmaps.weight" in found and name not in found


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [True, False])
def test_split_is_drawn_by_group_and_written(folder, tmp_path, grouped):
    cases = [
        Case(case.file, case.landmarks_px, case.aop_deg, group=case.group if grouped else None)
        for case in read_cases(folder / "cases.csv")
    ]
    table = tmp_path / "nosplit.csv"
    write_cases(table, cases)
    assert run_fit(folder, tmp_path / "run", "--data", str(table), "--max-minutes", "0") == 0
    written = read_cases(tmp_path / "run" / "cases.csv")
    splits = [case.split for case in written]
    assert all(case.group for case in written)
    assert set(splits) == {"train", "val"} and 1 <= splits.count("val") <= 4


@pytest.mark.slow
def test_torchrun_on_two_processes(folder, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "29611", "-m", "training.fit", "--data", str(folder / "cases.csv")]
    command += ["--images", str(folder / "images"), "--output", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(
        [*command, *TINY, "--epochs", "1"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("9 images train") == 1  # one process speaks
    load_weights(tmp_path / "best.safetensors")


def test_processes_share_an_epoch_without_overlap():
    whole = {key for key in EpochSampler(12, 1)}
    shares = [set(EpochSampler(12, 1, rank, 3)) for rank in range(3)]
    assert set.union(*shares) == whole and sum(map(len, shares)) == 12


def test_many_frames_of_one_scan_need_not_count_as_many_scans():
    cases = [
        Case(f"{k}.png", np.zeros((3, 2)), 0.0, group="loop" if k < 9 else None) for k in range(12)
    ]
    shares = []
    for balance in (0.0, 0.5, 1.0):
        recipe = COMPACT.model_copy(update={"balance": balance})
        weights = sampling_probabilities(LandmarkDataset(cases, Path(), None, recipe, train=True))
        drawn = [
            k
            for e in range(200)
            for _, k in epoch_of(EpochSampler(12, 1, probabilities=weights), e)
        ]
        shares.append(np.mean(np.array(drawn) < 9))
    np.testing.assert_allclose(shares, [9 / 12, 3 / 6, 1 / 4], atol=0.03)
    assert shares[0] == 9 / 12


def epoch_of(sampler, epoch):
    sampler.epoch = epoch
    return list(sampler)


@pytest.mark.slow
def test_it_learns_phantoms(folder, tmp_path):
    mild = ["--augmentation.scale", "1,1", "--augmentation.shift", "0", "--augmentation.erase", "0"]
    mild += ["--mask_weight", "0.3", "--epochs", "25", "--learning_rate", "0.01"]
    assert run_fit(folder, tmp_path, *mild) == 0
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])


@pytest.mark.parametrize("name", ["missing.csv", "cases.csv"])
def test_wrong_paths_are_named(folder, tmp_path, capsys, name):
    images = folder / ("images" if name == "missing.csv" else "nowhere")
    more = ["--data", str(folder / name), "--images", str(images)]
    assert run_fit(folder, tmp_path, *more) == 2
    assert ("missing.csv" if name == "missing.csv" else "nowhere") in capsys.readouterr().err


def test_a_table_of_clicks_says_what_it_lacks(folder, tmp_path, capsys):
    cases = read_cases(folder / "cases.csv")
    table = tmp_path / "clicks.csv"
    write_cases(table, [replace(c, file=Path(c.file).stem, split=None, group=None) for c in cases])
    assert run_fit(folder, tmp_path / "run", "--data", str(table)) == 2
    told = capsys.readouterr().err
    assert f"{len(cases)} of the {len(cases)} images of {table} are not in" in told
    assert f"which has {cases[0].file}; the first is {Path(cases[0].file).stem} (" in told
    write_cases(table, [replace(case, split="train") for case in cases])
    assert run_fit(folder, tmp_path / "run", "--data", str(table)) == 2
    told = capsys.readouterr().err
    assert f"expected cases of split train and val, the table has {len(cases)} of train" in told


def test_missing_masks_and_devices_are_named(folder, tmp_path, capsys):
    (tmp_path / "masks").mkdir()
    assert run_fit(folder, tmp_path / "run", "--masks", str(tmp_path / "masks")) == 2
    assert "9 images without a mask" in capsys.readouterr().err
    assert run_fit(folder, tmp_path / "run", "--masks", str(tmp_path / "none")) == 2
    assert "none is not a folder; expected the folder of the masks" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run_fit(folder, tmp_path / "run", "--device", "cuda") == 2
        assert "--device cuda" in capsys.readouterr().err


def test_paper_recipe_is_the_papers():
    assert (PAPER.network.input_size, PAPER.network.stride, PAPER.sigma_cells) == (512, 8, 4)
    assert (PAPER.optimiser, PAPER.learning_rate, PAPER.weight_decay) == ("adam", 3e-5, 1e-4)
    assert (PAPER.schedule, PAPER.step_epochs, PAPER.step_factor) == ("step", 50, 0.5)
    assert (PAPER.epochs, PAPER.batch, PAPER.loss) == (100, 4, "mse")
    assert PAPER.augmentation.rotation_deg == 15 and PAPER.augmentation.scale == (0.9, 1.1)
    assert PAPER.augmentation.gamma == PAPER.augmentation.contrast == (0.8, 1.2)


def test_every_field_is_a_flag_and_help_explains_it(capsys):
    with pytest.raises(SystemExit):
        fit.main(["--help"])
    shown = capsys.readouterr().out
    for name, field in Recipe.model_fields.items():
        if name not in ("network", "augmentation"):
            assert f"--{name} " in shown
            assert " ".join(field.description.split()[:3]) in " ".join(shown.split())
    assert "--network.vit_depth" in shown and "--augmentation.rotation_deg" in shown


def test_recipe_values_are_checked(folder, tmp_path, capsys):
    assert run_fit(folder, tmp_path, "--epochs", "many") == 2
    assert "epochs" in capsys.readouterr().err


def test_landmarks_turned_out_of_the_frame_are_dropped(folder):
    far = Augmentation(shift=0.6, rotation_deg=0)
    recipe = COMPACT.model_copy(update={"augmentation": far})
    data = LandmarkDataset(
        read_cases(folder / "cases.csv"), folder / "images", None, recipe, train=True
    )
    samples = [data[epoch, 0] for epoch in range(30)]
    visible = torch.stack([sample["visible"] for sample in samples])
    assert 0 < visible.sum() < visible.numel()
    for sample in samples:
        peaks = sample["heatmaps"].amax(dim=(1, 2))
        # an encoded landmark has its peak within the grid; a clamped one would have it on the edge
        assert (peaks[sample["visible"] == 1] > 0.9).all()


def test_augmentation_moves_image_mask_and_landmarks_alike():
    size, spot = 128, np.array([[40.0, 70.0], [90.0, 30.0], [64.0, 100.0]])
    image = np.zeros((size, size), np.float32)
    mask = np.zeros((size, size), np.uint8)
    for x, y in spot:
        cv2.circle(image, (int(x), int(y)), 3, 255, -1)
    cv2.circle(mask, (40, 70), 6, 1, -1)
    settings = Augmentation(
        rotation_deg=25, scale=(0.8, 1.2), shift=0.1, gamma=(1, 1), contrast=(1, 1)
    )
    moved, moved_mask, points = augment(image, mask, spot, settings, np.random.default_rng(4))
    for x, y in points:
        around = moved[int(y) - 8 : int(y) + 9, int(x) - 8 : int(x) + 9]
        rows, columns = np.indices(around.shape)
        found = [(columns * around).sum(), (rows * around).sum()] / around.sum()
        assert np.abs(found + [int(x) - 8, int(y) - 8] - [x, y]).max() < 0.3
    rows, columns = np.nonzero(moved_mask)
    assert np.abs([columns.mean(), rows.mean()] - points[0]).max() < 0.5


def test_label_noise_is_fresh_each_time_and_of_the_asked_size(folder):
    still = Augmentation(rotation_deg=0, scale=(1, 1), gamma=(1, 1), contrast=(1, 1))
    recipe = COMPACT.model_copy(update={"augmentation": still, "landmark_noise_px": 8.0})
    cases = read_cases(folder / "cases.csv")
    noisy = LandmarkDataset(cases, folder / "images", None, recipe, train=True)
    plain = LandmarkDataset(cases, folder / "images", None, recipe, train=False)
    codec = recipe.spec().codec
    truth = codec.decode(plain[0, 0]["heatmaps"].numpy())[0]
    draws = np.stack([codec.decode(noisy[e, 0]["heatmaps"].numpy())[0] for e in range(200)]) - truth
    # 8 px at 512 is 1 cell of 4 px at 256
    assert draws.std() == pytest.approx(1.0, abs=0.1) and abs(draws.mean()) < 0.1


def test_losses_are_zero_for_the_perfect_answer_and_ignore_what_is_dropped():
    target = torch.rand(2, 3, 5, 7) + 0.01
    visible = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    assert heatmap_mse(target, target, visible) == 0
    assert heatmap_cross_entropy(target.log(), target, visible).abs() < 1e-5
    wrong = target.clone()
    wrong[0, 2] += 5
    assert heatmap_mse(wrong, target, visible) == 0
    wrong[0, 0] += 3
    assert heatmap_mse(wrong, target, visible) == pytest.approx(9 / 4)
    masks = (torch.rand(2, 2, 5, 7) > 0.5).float()
    assert mask_loss((masks - 0.5) * 40, masks) < 1e-3 < mask_loss((0.5 - masks) * 40, masks)


def test_weights_that_do_not_fit_are_refused(folder, tmp_path):
    assert run_fit(folder, tmp_path, "--max-minutes", "0") == 0
    path = tmp_path / "best.json"
    described = json.loads(path.read_text())
    described["network"]["vit_width"] = 32
    path.write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="does not fit the network"):
        load_weights(tmp_path / "best.safetensors")
    path.unlink()
    expected = (
        r"expected weights best\.safetensors and best\.json in .*, as training\.fit writes them"
    )
    with pytest.raises(CheckpointError, match=rf"^{expected}; missing: best\.json$"):
        load_weights(tmp_path / "best.safetensors")
    (tmp_path / "best.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing: best\.safetensors and best\.json$"):
        load_weights(tmp_path / "best.safetensors")
