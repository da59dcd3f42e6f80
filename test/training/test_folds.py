"""Cross-validation: who trains, who answers, and the calibration that it gives."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export import to_onnx
from model.uncertainty import QUANTITIES
from test.training.test_fit import TINY, folder, run_fit  # noqa: F401
from training import calibrate, evaluate, folds, join
from training.data.case_table import read_cases, write_cases
from training.evaluation.predict import predict_cases, torch_predictor
from training.learning import teachers
from training.learning import trainer as loop
from training.learning.checkpoint import HELD_OUT_SPLIT, finished_folds, load_folds, load_weights

pytestmark = pytest.mark.slow  # they train networks

ONE_EPOCH = [*TINY, "--epochs", "1", "--device", "cpu"]


def run(data: Path, output: Path, *more: str) -> int:
    return folds.main([
        *("--data", str(data / "cases.csv"), "--images", str(data / "images")),
        *("--masks", str(data / "masks"), "--output", str(output), *more),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The phantoms of the training's tests, two in each group, the last two of split test."""
    root = tmp_path_factory.mktemp("folds")
    for name in ("images", "masks"):
        (root / name).symlink_to(folder / name)
    cases = read_cases(folder / "cases.csv")
    grouped = [
        replace(case, group=f"g{k // 2}", split="val" if k < 4 else "train")
        for k, case in enumerate(cases)
    ]
    write_cases(
        root / "cases.csv", [*grouped[:10], *(replace(c, split="test") for c in grouped[10:])]
    )
    return root


@pytest.fixture(scope="module")
def finished(data: Path) -> Path:
    shares = ("--mask-shares", "0", "0.5,0.5,1")
    assert run(data, data / "folds", "--folds", "2", *shares, *ONE_EPOCH) == 0
    return data / "folds"


def test_each_case_is_kept_out_once_with_its_group_and_test_is_not_there(finished, data):
    known = read_cases(data / "cases.csv")
    kept, groups = Counter(), {}
    for k, (_, checkpoint, cases) in enumerate(load_folds(finished)):
        assert checkpoint.network.input_size == 64
        table = read_cases(finished / f"fold-{k}" / "cases.csv")
        assert {case.split for case in table} == {"train", HELD_OUT_SPLIT}
        assert not {c.group for c in table if c.split == "train"} & {c.group for c in cases}
        kept.update(case.file for case in cases)
        groups[k] = len(cases)
    assert kept == {case.file: 1 for case in known if case.split != "test"}
    assert abs(groups[0] - groups[1]) <= 2


def test_other_networks_of_the_same_parts_can_be_joined(finished, data, tmp_path, capsys):
    others = ("--folds", "2", "--training-seed", "2", *ONE_EPOCH)
    assert run(data, tmp_path / "others", *others) == 0
    networks = [str(finished), str(tmp_path / "others"), "--output", str(tmp_path / "both")]
    assert join.main(networks) == 0
    (network, _, cases), _ = load_folds(tmp_path / "both")
    assert [c.file for c in cases] == [c.file for c in next(load_folds(finished))[2]]
    weights = [one.head.heatmaps.weight for one in (network, network.members[0])]
    assert not torch.equal(*weights)
    assert run(data, tmp_path / "others", "--folds", "2", *ONE_EPOCH) == 2
    assert "was trained with seed 2" in capsys.readouterr().err


def test_each_fold_trains_on_from_the_network_that_kept_out_the_same_cases(
    finished, data, tmp_path, capsys
):
    flags = ("--folds", "2", "--start", str(finished), *ONE_EPOCH, "--learning_rate", "0")
    assert run(data, tmp_path / "on", *flags) == 0
    before, after = (
        [network.head.heatmaps.weight for network, _, _ in load_folds(place)]
        for place in (finished, tmp_path / "on")
    )
    torch.testing.assert_close(after, before)
    assert not torch.equal(*after)
    assert run(data, tmp_path / "on", "--folds", "2", *ONE_EPOCH) == 2
    assert "other --start or --teachers" in capsys.readouterr().err
    other = ("--folds", "3", "--start", str(finished), *ONE_EPOCH)
    assert run(data, tmp_path / "other", *other) == 2
    assert "keeps out other cases" in capsys.readouterr().err


def test_each_fold_is_taught_by_networks_that_kept_out_the_same_cases(
    finished, data, tmp_path, monkeypatch, capsys
):
    for fold in finished_folds(finished):
        assert to_onnx.main(["--run", str(fold), "--output", str(fold / folds.TEACHER)]) == 0
    taught, original = [], teachers.load_ensemble
    monkeypatch.setattr(
        loop, "load_ensemble", lambda files, *rest: taught.append(files) or original(files, *rest)
    )
    flags = ("--teachers", str(finished), *ONE_EPOCH, "--teacher_share", "0.5")
    assert run(data, tmp_path / "on", "--folds", "2", "--only", "1", *flags) == 0
    assert taught == [(finished / "fold-1" / "aop.onnx",)]
    assert run(data, tmp_path / "other", "--folds", "3", *flags) == 2
    assert "keeps out other cases" in capsys.readouterr().err
    os.utime(finished / "fold-1" / "aop.onnx", (0, 0))
    assert run(data, tmp_path / "third", "--folds", "2", *flags) == 2
    assert "older than best.safetensors: make it" in capsys.readouterr().err
    (finished / "fold-1" / "aop.onnx").unlink()
    assert run(data, tmp_path / "third", "--folds", "2", *flags) == 2
    assert "export.to_onnx" in capsys.readouterr().err


def test_groups_that_look_alike_are_dealt_together(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folds, "train_fold", lambda *_: None)
    assert run(data, tmp_path, "--folds", "2", "--alike", "-1") == 0  # all are alike
    first, second = (read_cases(tmp_path / f"fold-{k}" / "cases.csv") for k in (0, 1))
    assert {case.split for case in first} != {case.split for case in second}
    assert all(len({case.split for case in table}) == 1 for table in (first, second))
    known = {case.file: case.group for case in read_cases(data / "cases.csv")}
    assert all(known[case.file] == case.group for case in first)
    assert run(data, tmp_path, "--folds", "2") == 2 and "another way" in capsys.readouterr().err


def test_the_answers_are_of_networks_that_have_not_seen_the_case(finished, data, capsys):
    answers = {case.file: case for case in read_cases(finished / "landmarks.csv")}
    assert len(answers) == 10
    for network, checkpoint, cases in load_folds(finished):
        predictor = torch_predictor(network, checkpoint.spec, next(network.parameters()).device)
        for case, found in zip(
            cases, predict_cases(predictor, cases, data / "images"), strict=True
        ):
            written = answers[case.file].landmarks_px
            np.testing.assert_allclose(written, found.landmarks_px, atol=1e-3)
    table = str(finished / "landmarks.csv")
    assert evaluate.main(["--data", str(data / "cases.csv"), "--predictions", table]) == 0
    assert "all (n=10)" in capsys.readouterr().out


def test_what_is_done_is_not_trained_again_and_only_shares_the_work(
    data, tmp_path, monkeypatch, capsys
):
    trained = []
    original = loop.fit

    def counted(settings, *rest):
        trained.append(settings.output.name)
        return original(settings, *rest)

    monkeypatch.setattr(folds, "fit", counted)
    flags = ("--folds", "2", *ONE_EPOCH)
    assert run(data, tmp_path, "--only", "1", *flags) == 0
    assert trained == ["fold-1"] and "fold-0 remain" in capsys.readouterr().out
    assert not (tmp_path / "landmarks.csv").exists()
    assert len([*load_folds(tmp_path)]) == 1  # calibrate can do with some parts
    assert run(data, tmp_path, *flags) == 0
    assert trained == ["fold-1", "fold-0"] and (tmp_path / "landmarks.csv").exists()
    assert run(data, tmp_path, "--folds", "3", *ONE_EPOCH) == 2
    assert "another way" in capsys.readouterr().err


def test_a_fold_that_stopped_goes_on(data, tmp_path, monkeypatch, capsys):
    flags = ("--folds", "2", "--only", "0", *TINY, "--device", "cpu")
    epoch, stop = loop.Trainer.train_epoch, "stopped in the second epoch"

    def until_the_second(self, loader, loss):
        if self.epoch == 1:
            raise OSError(stop)
        return epoch(self, loader, loss)

    monkeypatch.setattr(loop.Trainer, "train_epoch", until_the_second)
    assert run(data, tmp_path, *flags) == 2 and stop in capsys.readouterr().err
    monkeypatch.setattr(loop.Trainer, "train_epoch", epoch)
    assert run(data, tmp_path, *flags) == 0 and "epoch 1 of 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--init=w",), "--init is not for cross-validation"),
        (("--ini", "w"), "--init is not for cross-validation"),
        (("--max-minutes", "1"), "--max-minutes is not for cross-validation"),
        (("--folds", "1"), "expected 2 or more"),
        (("--only", "4"), "expected numbers from 0 to 3"),
        (("--no-such-flag",), "training.fit: error: unrecognized arguments: --no-such-flag"),
    ],
)
def test_what_would_spoil_it_is_refused(data, tmp_path, flags, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(data, tmp_path, *flags)
    assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_flags_of_the_training_reach_every_fold(data, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(folds, "fit", lambda *given: seen.append(given))
    flags = ("--folds", "2", "--training-seed", "7", "--only", "0", "1", "--steps", "9")
    more = ("--more", "a.csv", "b", "--more", "c.csv", "d", "--epochs", "3", "--device", "cpu")
    assert run(data, tmp_path, *flags, *more, "--recipe", "finish") == 2  # it leaves no weights
    assert [settings.output.name for settings, _, _ in seen] == ["fold-0", "fold-1"]
    for settings, recipe, place in seen:
        assert settings.data == settings.output / "cases.csv" and settings.all
        assert settings.masks == data / "masks" and settings.init is None and settings.steps == 9
        assert settings.more == ((Path("a.csv"), Path("b")), (Path("c.csv"), Path("d")))
        assert (recipe.seed, recipe.epochs, recipe.mask_weight) == (7, 3, 3.0)
        assert place.device.type == "cpu" and not settings.resume
    capsys.readouterr()
    assert run(data, tmp_path / "other", "--epochs", "many") == 2
    assert "epochs" in capsys.readouterr().err


def test_a_table_without_groups_is_refused(folder, data, tmp_path, capsys):  # noqa: F811
    cases = [replace(case, group=None) for case in read_cases(folder / "cases.csv")]
    write_cases(tmp_path / "cases.csv", cases)
    assert run(tmp_path, tmp_path / "out") == 2 and "each with a group" in capsys.readouterr().err


def test_all_trains_on_val_too_and_keeps_the_last_epoch(data, tmp_path, capsys):
    assert run_fit(data, tmp_path / "all", "--all") == 0
    assert "10 images train, none choose" in capsys.readouterr().out
    assert run_fit(data, data / "half", "--max-minutes", "0") == 0
    network, described = load_weights(tmp_path / "all" / "best.safetensors")
    last = torch.load(tmp_path / "all" / "checkpoint.pt", weights_only=True)["average"]
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, last[f"module.{name}"])
    assert described.spec.metrics == {} and described.spec.val_trained
    assert not load_weights(data / "half" / "best.safetensors")[1].spec.val_trained


def test_errors_are_fitted_on_the_answers_of_the_folds(finished, data, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "PARTS", 2)
    weights, output = finished / "fold-0" / "best.safetensors", data / "aop.safetensors"
    flags = ["--weights", str(weights), "--data", str(data / "cases.csv")]
    flags += ["--images", str(data / "images"), "--output", str(output)]
    assert calibrate.main([*flags, "--folds", str(finished), "--mask-share", "0.5,0.25,1"]) == 0
    found = load_weights(output)[1].spec.calibration
    assert load_weights(output)[1].spec.mask_share == (0.5, 0.25, 1.0)
    metrics = load_weights(output)[1].spec.metrics
    assert set(metrics) == {"folds_mre_px", "folds_aop_error_deg"}
    assert calibrate.main(flags) == 2 and "split val trained" in capsys.readouterr().err
    monkeypatch.setattr(calibrate, "PARTS", 5)  # more than val has: train counts too
    assert calibrate.main([*flags, "--folds", str(finished)]) == 0
    monkeypatch.setattr(calibrate, "PARTS", 6)
    assert calibrate.main([*flags, "--folds", str(finished)]) == 2
    assert "at least 12 cases of split train and val" in capsys.readouterr().err
    monkeypatch.setattr(calibrate, "PARTS", 2)
    assert found.cases == 10 and [*found.errors] == [*QUANTITIES]
    assert calibrate.main([*flags, "--folds", str(data)]) == 2
    assert "expected finished folds" in capsys.readouterr().err
    assert run_fit(data, data / "other", "--all", "--network.vit_depth", "2") == 0
    flags[1] = str(data / "other" / "best.safetensors")
    assert calibrate.main([*flags, "--folds", str(finished)]) == 2
    assert "another network" in capsys.readouterr().err
