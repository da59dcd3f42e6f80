"""Calibration from end to end on phantoms: what it adds, and that the landmarks stay."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from export import to_onnx
from model.network import build_network
from model.network.blocks import ViewHead
from model.predictor import load_predictor
from model.uncertainty import QUANTITIES
from test.model.test_network import SMALL
from test.phantom import phantom
from training import calibrate, doubt, fit
from training.data.case_table import Case, read_cases, write_cases
from training.data.dataset import read_frame
from training.evaluation.metrics import case_errors
from training.evaluation.predict import predict_cases, torch_predictor
from training.learning import view_head
from training.learning.checkpoint import Checkpoint, load_weights, save_weights
from training.recipes import COMPACT

IMAGES, VAL = 34, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms with a case table, others of them flipped, and weights of a small random network."""
    root = tmp_path_factory.mktemp("calibrate")
    for name in ("images", "others"):
        (root / name).mkdir()
    cases = []
    for seed in range(IMAGES):
        made = phantom(seed, 64, 64)
        cv2.imwrite(str(root / "images" / f"{seed}.png"), made.image)
        split = "val" if seed < VAL else "train"
        cases.append(Case(f"{seed}.png", made.landmarks_px, made.aop_deg, split))
    for seed in range(6):
        cv2.imwrite(str(root / "others" / f"a_{seed}.png"), phantom(99 + seed, 64, 64).image[::-1])
    write_cases(root / "cases.csv", cases)
    torch.manual_seed(0)
    recipe = COMPACT.model_copy(update={"network": SMALL, "sigma_cells": 1.5})
    network = build_network(SMALL, masks=2)
    described = Checkpoint(network=SMALL, masks=2, spec=recipe.spec(2))
    save_weights(root / "plain.safetensors", network.state_dict(), described)
    return root


def run(folder: Path, output: str, *more: str, weights: str = "plain.safetensors") -> int:
    return calibrate.main([
        *("--weights", str(folder / weights), "--data", str(folder / "cases.csv")),
        *("--images", str(folder / "images"), "--output", str(folder / output), *more),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def calibrated(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view_head, "EPOCHS", 2)
        others = ("--others", str(folder / "others"), "a_*")
        assert run(folder, "out/aop.safetensors", *others, "--doubted", "0.1") == 0
    return folder / "out" / "aop.safetensors"


def answers(folder: Path, weights: Path, split: str = "val") -> list:
    network, described = load_weights(weights)
    cases = [case for case in read_cases(folder / "cases.csv") if case.split == split]
    predictor = torch_predictor(network, described.spec, torch.device("cpu"))
    return predict_cases(predictor, cases, folder / "images")


@pytest.mark.slow
def test_landmarks_stay_and_errors_and_intervals_come(folder: Path, calibrated: Path) -> None:
    before, after = (answers(folder, w) for w in (folder / "plain.safetensors", calibrated))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.landmarks_px, other.landmarks_px)
        assert one.aop_interval_deg is None and one.expected_error_px is None
        if other.aop_interval_deg is None:  # no angle, no outlines, or a doubted view
            assert other.reasons
        else:
            low, high = other.aop_interval_deg
            assert 0 <= low <= other.aop_deg <= high <= 180
        assert other.expected_error_px.shape == (3,) and other.expected_aop_error_deg > 0
    calibration = load_weights(calibrated)[1].spec.calibration
    assert [*calibration.errors] == [*QUANTITIES] and calibration.cases == VAL
    truth = [case for case in read_cases(folder / "cases.csv") if case.split == "val"]
    error = case_errors(after, truth)[1]
    expected = [a.expected_aop_error_deg for a in after]
    assert np.mean(expected) == pytest.approx(np.mean(error), rel=0.05)


@pytest.mark.slow
def test_no_more_of_val_is_doubted_than_asked(folder: Path, calibrated: Path) -> None:
    odd = {k for k, one in enumerate(answers(folder, folder / "plain.safetensors")) if one.reasons}
    after = {k for k, one in enumerate(answers(folder, calibrated)) if one.reasons}
    assert odd <= after and len(after) <= max(len(odd), int(0.1 * VAL))
    assert load_weights(calibrated)[1].spec.calibration.view_below == 0.5


@pytest.mark.slow
def test_a_view_head_learns_where_things_are() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(600, 5, 4, 4, generator=draw)
    right = torch.rand(600, generator=draw) < 0.3
    x[right, 2, 1, 0] += 5  # on the left
    x[~right, 2, 1, 3] += 5  # on the right
    torch.manual_seed(0)
    head = ViewHead(5, 4, 6)
    view_head.train_head(head, x[:500], right[:500].float(), torch.ones(500))
    found = head(x[500:]).detach() > 0.5
    assert not head.training and (found == right[500:]).float().mean() > 0.95


@pytest.mark.slow
def test_samples_are_right_as_they_are_and_wrong_distorted_drawn_or_other(folder: Path) -> None:
    cases = read_cases(folder / "cases.csv")[:3]
    others = sorted((folder / "others").iterdir())[:2]
    rng = np.random.default_rng(0)
    found = list(view_head.draw_samples(cases, folder / "images", others, 64, rng))
    right = [image for image, is_right in found if is_right]
    assert len(right) == 3 * view_head.RIGHT_DRAWS
    assert len(found) == 3 * len(right) + 2 * view_head.OTHER_DRAWS
    for k, case in enumerate(cases):
        grey = read_frame(folder / "images" / case.file)[0]
        np.testing.assert_array_equal(right[k * view_head.RIGHT_DRAWS], grey)
    seen = [view_head.change_image(right[0], rng) for _ in range(20)]
    without_marks = [bool((one[: round(64 * view_head.MARK_HEIGHT)] == 0).all()) for one in seen]
    assert 0 < sum(without_marks) < 20 and len({one.tobytes() for one in seen}) == 20


@pytest.mark.slow
def test_the_exported_model_tells_the_same(folder: Path, calibrated: Path) -> None:
    output = folder / "aop.onnx"
    data = ["--data", str(folder / "cases.csv"), "--images", str(folder / "images")]
    assert to_onnx.main(["--weights", str(calibrated), "--output", str(output), *data]) == 0
    predictor = load_predictor(output, "cpu")
    network, described = load_weights(calibrated)
    torch_one = torch_predictor(network, described.spec, torch.device("cpu"))
    assert predictor.spec.calibration == described.spec.calibration
    image = phantom(3, 64, 64).image
    here, there = predictor.predict(image), torch_one.predict(image)
    assert here.view_score == pytest.approx(there.view_score, abs=1e-4)
    assert here.expected.aop_deg == pytest.approx(there.expected.aop_deg, rel=1e-3)
    arguments = ["--model", str(output), *data, "--split", "val", "--scenes", "3"]
    counts = folder / "counts.json"
    others = ["--others", str(folder / "others"), "--output", str(counts)]
    assert doubt.main([*arguments, *others]) == 0
    found = json.loads(counts.read_text())
    assert found["other views"][1] == 6 and found["mirrored"][1] == VAL and found["noise"][1] == 3
    after = sum(bool(one.reasons) for one in answers(folder, calibrated))
    assert found["as they are"] == [after, VAL]


@pytest.mark.slow
def test_a_calibrated_model_is_calibrated_anew_and_trained_further(
    folder: Path, calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "again.safetensors", weights="out/aop.safetensors") == 0
    old, new = (load_weights(path)[1].spec.calibration for path in
                (calibrated, folder / "again.safetensors"))  # fmt: skip
    assert new.errors["AoP"].weights == pytest.approx(old.errors["AoP"].weights)
    small = ["--network.input_size", "64", "--network.encoder_widths", "8,10,12,14,16"]
    small += ["--network.vit_width", "16", "--network.vit_depth", "2", "--network.vit_heads", "2"]
    small += ["--network.up_widths", "14,12,10", "--network.softmax_sigma_cells", "1.5"]
    data = ["--data", str(folder / "cases.csv"), "--images", str(folder / "images")]
    data += ["--output", str(folder / "fit"), "--init", str(calibrated), "--device", "cpu"]
    assert fit.main([*data, *small, "--workers", "0", "--batch", "4", "--epochs", "1"]) == 0
    assert "left out: head.masks, view.judge, view.narrow" in capsys.readouterr().out


@pytest.mark.slow
def test_what_cannot_be_calibrated_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = read_cases(folder / "cases.csv")
    write_cases(tmp_path / "cases.csv", cases[:5])
    assert run(folder, "no.safetensors", "--data", str(tmp_path / "cases.csv")) == 2
    told = capsys.readouterr().err
    assert "expected at least 20 cases of split val, the table has 5 of val" in told
    assert "--folds" in told and "export the weights as they are" in told
    assert run(folder, "no.safetensors", "--others", str(tmp_path), "*.gif") == 2
    assert "no image file's name matches '*.gif'" in capsys.readouterr().err
    write_cases(tmp_path / "cases.csv", [replace(case, group="p1") for case in cases[:VAL]])
    assert run(folder, "no.safetensors", "--data", str(tmp_path / "cases.csv")) == 2
    assert "all cases are of group p1" in capsys.readouterr().err
    assert run(folder, "no.safetensors", "--images", str(folder / "others")) == 2
    assert f"{VAL} of the {VAL} images of" in capsys.readouterr().err
    assert not (folder / "no.safetensors").exists()
