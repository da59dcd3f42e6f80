"""Pseudo-labels: the pool of images, which labels are accepted, and rounds of training on them."""

import argparse
import csv
import functools
import json
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from model.anatomy import angle_of_progression
from model.heatmap import HeatmapCodec
from model.network import build_network
from model.predictor import Predictor
from test.phantom import phantom
from test.training.test_fit import TINY
from test.training.test_test_time_augmentation import SPEC, dots, find_dots
from training import fit, pseudo_label
from training.data.case_table import Case, read_cases, write_cases
from training.data.dataset import LandmarkDataset, further_cases
from training.evaluation.test_time_augmentation import AugmentedPrediction
from training.learning.checkpoint import Checkpoint, load_weights, save_weights
from training.learning.losses import mask_loss
from training.pseudo_labels import labelling
from training.pseudo_labels.criteria import (
    CriteriaError,
    Evidence,
    Thresholds,
    gather_evidence,
    peak_sharpness,
    thresholds_by_precision,
    thresholds_by_share,
)
from training.pseudo_labels.pool import (
    exclusions_of_training_table,
    find_pool,
    parse_exclusion,
    read_candidates,
)
from training.recipes import RECIPES, add_recipe_arguments, recipe_from_arguments

CODEC = HeatmapCodec(48, 64, 4.0)
PEAK = CODEC.encode([30.3, 20.6])


def published_sharpness(heatmap: np.ndarray) -> float:
    """The measure of the method's published code, from the 11x11 cells around the peak."""
    row, column = np.unravel_index(heatmap.argmax(), heatmap.shape)
    around = heatmap[row - 5 : row + 6, column - 5 : column + 6]
    return 1 - around.mean() / heatmap.max()


# ---- sharpness and thresholds ----


def test_a_perfect_peak_is_as_sharp_as_can_be_unlike_in_the_published_measure():
    assert published_sharpness(PEAK) == pytest.approx(0.425, abs=0.005)  # its threshold is 0.8
    everywhere = CODEC.encode([[30.3, 20.6], [0.0, 47.0], [63.4, 1.2], [2.5, 2.5]])
    assert peak_sharpness(everywhere, CODEC) == pytest.approx(1.0, abs=1e-3)
    assert peak_sharpness(0.2 * everywhere, CODEC) == pytest.approx(1.0, abs=1e-3)
    assert peak_sharpness(everywhere[0], CODEC).shape == ()


def test_sharpness_falls_with_width_and_with_a_second_peak_but_not_with_noise():
    wide = HeatmapCodec(48, 64, 8.0).encode([30.3, 22.0])
    assert peak_sharpness(wide, CODEC) == pytest.approx(0.55, abs=0.06)
    two = np.maximum(PEAK, 0.7 * CODEC.encode([50.0, 20.6]))
    assert peak_sharpness(two, CODEC) < 0.5
    noise = np.random.default_rng(0).normal(0, 0.02, PEAK.shape)
    assert peak_sharpness(PEAK + noise, CODEC) == pytest.approx(1.0, abs=0.05)
    flat = np.stack([np.full_like(PEAK, 0.3), -PEAK, np.full_like(PEAK, np.nan)])
    assert peak_sharpness(flat[0], CODEC) < 0.25 and (peak_sharpness(flat[1:], CODEC) == 0).all()


def evidence(sharp: float, spread: float, *faults: str) -> Evidence:
    return Evidence(np.zeros((3, 2)), 90.0, np.full(3, sharp), np.full(3, spread), faults)


# The sharpness falls from case to case; the order of the spreads is another.
CASES = [evidence(0.9 - 0.1 * k, spread) for k, spread in enumerate([2.0, 1.0, 5.0, 3.0, 9.0])]


@pytest.mark.parametrize(
    ("share", "sharp", "spread", "accepted"),
    [(0.2, 0.8, 2.0, [0, 1]), (0.6, 0.6, 5.0, [0, 1, 2, 3]), (1.0, 0.5, 9.0, [0, 1, 2, 3, 4])],
)
def test_thresholds_by_share_are_met_by_that_share(share, sharp, spread, accepted):
    found = thresholds_by_share(CASES, share)
    assert (found.sharpness, found.spread_px) == pytest.approx((sharp, spread))
    assert [k for k, case in enumerate(CASES) if not found.objections(case)] == accepted


def test_perfect_cases_pass_at_every_share():
    sharp = float(peak_sharpness(PEAK, CODEC))
    for share in (0.01, 0.5, 1.0):
        found = thresholds_by_share([evidence(sharp, 0.0), *CASES], share)
        assert found.sharpness <= 1 and not found.objections(evidence(sharp, 0.0))


def test_implausible_cases_are_refused_however_sharp():
    best = evidence(1.0, 0.0, "the angle is 20 deg")
    found = thresholds_by_share([best, *CASES], 1.0)
    assert found.objections(best) == [("anatomy", "the angle is 20 deg")]
    assert not any(found.objections(case) for case in CASES)
    with pytest.raises(CriteriaError, match="none of the 1 images"):
        thresholds_by_share([best], 0.5)


def test_objections_name_criterion_value_and_landmark():
    case = Evidence(np.zeros((3, 2)), 90.0, np.array([0.9, 0.3, 0.9]), np.array([1.0, 1.0, 10.0]))
    (a, sharp), (b, spread) = Thresholds(0.8, 3.0).objections(case)
    assert (a, b) == ("sharpness", "agreement")
    assert "0.700" in sharp and "0.800" in sharp and "PS2 0.30" in sharp
    assert "4.00 px" in spread and "above 3.0" in spread and "FH1 10.0" in spread


def test_precision_takes_the_loosest_thresholds_that_reach_it():
    cases = [evidence(0.99 - 0.01 * k, 1.0 + k) for k in range(20)]
    errors_px = np.where(np.arange(20) % 5 == 4, 30.0, 5.0)  # every fifth is far off
    errors_px[15:] = 30.0
    # Within 10 px: 12 of the first 14 cases, 12 of the first 15, 12 of the first 16.
    assert thresholds_by_precision(cases, errors_px, 10.0, 0.8).spread_px == pytest.approx(15.0)
    assert thresholds_by_precision(cases, errors_px, 10.0, 0.75).spread_px == pytest.approx(16.0)
    assert thresholds_by_precision(cases, errors_px, 10.0, 0.85).spread_px == pytest.approx(14.0)
    assert thresholds_by_precision(cases, errors_px, 30.0, 1.0).spread_px == pytest.approx(20.0)
    with pytest.raises(CriteriaError, match=r"the best is 0\.86, with 14 of 20"):
        thresholds_by_precision(cases, errors_px, 10.0, 0.9)
    with pytest.raises(CriteriaError, match="needs 10 val cases"):
        thresholds_by_precision(cases[:9], errors_px[:9], 10.0, 0.5)


@pytest.mark.parametrize(("angle_deg", "plausible"), [(160.0, True), (30.0, False)])
def test_the_gate_takes_the_true_angle_not_its_supplement(angle_deg, plausible):
    turned = np.radians(180 + angle_deg)  # PS2 lies to the left; down is positive
    ps1, arm = np.array([128.0, 80.0]), np.array([-np.cos(turned - np.pi), np.sin(turned - np.pi)])
    points = np.array([ps1, ps1 - [60.0, 0.0], ps1 + 70 * arm])
    assert float(angle_of_progression(points)) == pytest.approx(angle_deg)
    heatmaps = np.stack([PEAK] * 3)[None]
    found = gather_evidence(
        AugmentedPrediction(points[None], np.ones((1, 3)), heatmaps), CODEC, (256, 256), (1, 1)
    )
    assert (not found.faults) == plausible and found.aop_deg == pytest.approx(angle_deg)
    if not plausible:
        assert any("the angle is 30 deg" in fault for fault in found.faults)


def test_evidence_is_measured_at_512_px_and_survives_coinciding_landmarks():
    points = np.array([[100.0, 90.0], [40.0, 90.0], [130.0, 150.0]])
    each = np.stack([points, points + [0.0, 6.0]])
    heatmaps = np.stack([np.stack([PEAK] * 3)] * 2)
    found = gather_evidence(
        AugmentedPrediction(each, np.ones((2, 3)), heatmaps), CODEC, (200, 256), (1, 1)
    )
    assert found.spread_px == pytest.approx([6.0] * 3)  # 3 px of 256
    same = AugmentedPrediction(np.zeros((1, 3, 2)), np.ones((1, 3)), heatmaps[:1], ("no outlines",))
    found = gather_evidence(same, CODEC, (200, 256), (1, 1))
    assert np.isnan(found.aop_deg) and found.faults[-1] == "no outlines in some variant"


# ---- which images ----


@functools.cache
def made(seed: int) -> np.ndarray:
    return phantom(seed, 96, 80).image


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """10 labelled phantoms with masks and a split; 6 unlabelled ones, 3 copies, a broken file."""
    root = tmp_path_factory.mktemp("pseudo")
    for name in ("images", "masks", "new/a", "new/b"):
        (root / name).mkdir(parents=True)
    cases = []
    for seed in range(10):
        one, file = phantom(seed, 96, 80), f"{seed:02d}.png"
        cv2.imwrite(str(root / "images" / file), one.image)
        cv2.imwrite(str(root / "masks" / file), one.mask)
        split = {0: "val", 1: "test"}.get(seed % 8, "train")
        cases.append(Case(file, one.landmarks_px, one.aop_deg, split, group=f"g{seed}"))
    write_cases(root / "cases.csv", cases)
    for seed in range(20, 26):
        cv2.imwrite(str(root / f"new/a/n{seed}.png"), made(seed))
    darker = (made(8) * 0.8).astype(np.uint8)  # of a val case
    cv2.imwrite(str(root / "new/b/again.png"), darker)
    cv2.imwrite(str(root / "new/b/large.bmp"), cv2.resize(made(9), (240, 200)))  # of a test case
    cv2.imwrite(str(root / "new/b/train.png"), made(3))  # looks like a case of train
    cv2.imwrite(str(root / "new/b/04.jpg"), made(30))  # has the name of a case of train
    (root / "new/b/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return root


def pool_of(folder: Path, *names: str, **more):
    apart = exclusions_of_training_table(folder / "cases.csv", folder / "images")
    return find_pool([folder / name for name in names], [*apart, *more.get("apart", [])], 0.92)


def test_val_and_test_and_their_look_alikes_are_never_labelled(folder):
    pool = pool_of(folder, "new/b", "images")
    assert [candidate.file for candidate in pool.candidates] == ["new/b/train.png"]
    why = {candidate.file: objection for candidate, objection in pool.rejected}
    assert why["new/b/again.png"] == ("left out", "looks like 08.png (cases.csv, split val)")
    assert why["new/b/large.bmp"] == ("left out", "looks like 09.png (cases.csv, split test)")
    assert why["new/b/04.jpg"][0] == "left out"
    assert why["new/b/broken.png"][0] == "unreadable"
    assert {f"images/{k:02d}.png" for k in range(10)} <= why.keys()  # these are labelled


def test_names_are_compared_below_their_own_folder(folder):
    why = {c.name: objection for c, objection in pool_of(folder, "new/b").rejected}
    assert why["04"] == ("left out", "has the name of a labelled image in cases.csv")
    pool = pool_of(folder, "new")  # its name is b/04 there
    assert pool.root == folder / "new" and "b/04.jpg" in [c.file for c in pool.candidates]


def test_a_chain_of_look_alikes_is_left_out(tmp_path, folder):
    first, last = made(0).astype(float), made(40).astype(float)
    for k in range(1, 9):  # from the val image to another, in small steps
        mixed = np.rint(first + (last - first) * k / 8).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f"step{k}.png"), mixed)
    cv2.imwrite(str(tmp_path / "other.png"), made(41))
    apart = exclusions_of_training_table(folder / "cases.csv", folder / "images")
    pool = find_pool([tmp_path], apart, 0.92)
    assert [candidate.file for candidate in pool.candidates] == ["other.png"]
    assert len(pool.rejected) == 8


def test_exclude_takes_tables_and_splits(folder):
    table = str(folder / "cases.csv")
    assert len(parse_exclusion(table, folder / "images").cases) == 10
    assert {c.split for c in parse_exclusion(f"{table}:test,val", folder / "images").cases} == {
        "test", "val",
    }  # fmt: skip
    pool = pool_of(folder, "new/b", apart=[parse_exclusion(f"{table}:test", folder / "images")])
    assert len(pool.candidates) == 1
    with pytest.raises(ValueError, match="may be pseudo-labelled"):
        pool_of(folder, "new/b", apart=[parse_exclusion(f"{table}:train", folder / "images")])
    with pytest.raises(ValueError, match=r"elsewhere/00\.png: .* could not be left out"):
        pool_of(folder, "new/b", apart=[parse_exclusion(f"{table}:val", folder / "elsewhere")])
    with pytest.raises(ValueError, match="no_such"):
        parse_exclusion(f"{table}:no_such", folder / "images")


def test_each_frame_of_a_stack_is_a_candidate(folder, tmp_path):
    frames = [made(seed) for seed in (50, 8, 51)]
    cv2.imwritemulti(str(tmp_path / "loop.tif"), frames)
    pool = find_pool(
        [tmp_path, tmp_path],
        exclusions_of_training_table(folder / "cases.csv", folder / "images"),
        0.92,
    )
    assert [(c.file, c.frame) for c in pool.candidates] == [("loop.tif", 0), ("loop.tif", 2)]
    read = [(c.frame, frame.pixels) for c, frame in read_candidates(pool.candidates)]
    assert [k for k, _ in read] == [0, 2]
    assert np.array_equal(read[1][1], frames[2])


# ---- training on them ----


def test_further_cases_train_without_masks(folder, tmp_path):
    extra = [Case("a/n20.png", np.array([[50.0, 20], [20, 25], [60, 50]]), 120.0)]
    write_cases(tmp_path / "more.csv", extra)
    more = further_cases(
        [(tmp_path / "more.csv", folder / "new")], folder / "cases.csv", folder / "images"
    )
    cases = [c for c in read_cases(folder / "cases.csv") if c.split == "train"]
    recipe = RECIPES["compact"]
    data = LandmarkDataset(cases, folder / "images", folder / "masks", recipe, True, more)
    assert len(data) == len(cases) + 1 == 7
    with_mask, without = data[0, 5], data[0, 6]
    assert with_mask["has_mask"] == 1 and with_mask["masks"].sum() > 0
    assert without["has_mask"] == 0 and without["masks"].sum() == 0
    assert without["masks"].shape == with_mask["masks"].shape
    plain = LandmarkDataset(cases, folder / "images", folder / "masks", recipe, False, more)
    found = recipe.spec().codec.decode(plain[0, 6]["heatmaps"].numpy())[0]
    box_scale = 256 / 96 / 4
    assert np.abs(np.diff(found, axis=0) - np.diff(extra[0].landmarks_px, axis=0) * box_scale).max(
    ) < 0.05  # fmt: skip


def test_the_masks_loss_counts_only_cases_that_have_masks():
    logits, target = torch.randn(4, 2, 5, 7), (torch.rand(4, 2, 5, 7) > 0.5).float()
    some = torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert mask_loss(logits, target, some) == pytest.approx(mask_loss(logits[::2], target[::2]))
    assert mask_loss(logits, target, torch.ones(4)) == pytest.approx(mask_loss(logits, target))
    logits.requires_grad_()
    none = mask_loss(logits, target, torch.zeros(4))
    none.backward()
    assert none == 0 and (logits.grad == 0).all()


def run_fit(folder: Path, output: Path, *more: str) -> int:
    given = ["--data", folder / "cases.csv", "--images", folder / "images", "--device", "cpu"]
    given += ["--output", output, *more]
    return fit.main([*map(str, given), *TINY, "--epochs", "1"])


def test_fit_takes_more_tables_and_refuses_what_would_leak(folder, tmp_path, capsys):
    landmarks = np.array([[50.0, 20], [20, 25], [60, 50]])
    table, leak = tmp_path / "more.csv", tmp_path / "leak.csv"
    write_cases(table, [Case(f"n{k}.png", landmarks, 120.0) for k in (20, 21, 22)])
    more = ["--more", table, folder / "new" / "a"]
    assert run_fit(folder, tmp_path / "run", *more, "--masks", folder / "masks") == 0
    assert "9 images train, 2 choose" in capsys.readouterr().out

    write_cases(leak, [Case("08.png", landmarks, 120.0)])
    assert run_fit(folder, tmp_path / "no", "--more", leak, folder / "images") == 2
    assert "split val or test" in capsys.readouterr().err
    assert run_fit(folder, tmp_path / "no", "--more", table, folder / "images") == 2
    assert "3 images of" in capsys.readouterr().err
    splitless = tmp_path / "splitless.csv"
    write_cases(splitless, [Case("08.png", landmarks, 120.0, group="g1")])
    assert run_fit(folder, tmp_path / "no", *more, "--data", splitless) == 2
    assert "--more needs a split column" in capsys.readouterr().err


# ---- labelling ----


@pytest.fixture
def dotted(tmp_path, monkeypatch) -> Path:
    """Images with dots at their landmarks, and a teacher that finds the dots."""
    rng = np.random.default_rng(5)
    usual = np.array([[96.0, 40.0], [52.0, 46.0], [104.0, 84.0]])
    for name in ("images", "new"):
        (tmp_path / name).mkdir()
    cases = []
    for k in range(21):
        points = usual + rng.uniform(-14, 14, (3, 2))
        cv2.imwrite(str(tmp_path / "images" / f"l{k}.png"), dots(points, background=k))
        label = points + [
            40.0 if k > 16 else 0.0,
            0.0,
        ]  # the label is wrong where the peaks are least sharp
        cases.append(Case(f"l{k}.png", label, 90.0, "val" if k else "train"))
    write_cases(tmp_path / "cases.csv", cases)
    for k in range(8):
        points = usual + rng.uniform(-14, 14, (3, 2))
        points = points[[1, 0, 2]] if k == 3 else points  # PS1 and PS2 exchanged: implausible
        cv2.imwrite(str(tmp_path / "new" / f"n{k}.png"), dots(points, background=2 * k))
    monkeypatch.setattr(
        labelling, "load_any_predictor", lambda *_: Predictor(SPEC, find_dots, "cpu")
    )
    return tmp_path


def run(folder: Path, *more: object) -> int:
    given = ["--data", folder / "cases.csv", "--images", folder / "images"]
    given += ["--teacher", folder / "aop.onnx", "--unlabelled", folder / "new"]
    given += ["--device", "cpu", "--output", folder / "out", *more]
    return pseudo_label.main([str(word) for word in given])


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8")))


def test_accepted_and_rejected_are_written_with_reasons(dotted, capsys):
    assert run(dotted, "--accept", "0.5") == 0
    out = dotted / "out"
    accepted, rejected = rows(out / "pseudo.csv"), rows(out / "rejected.csv")
    assert {row["Filename"] for row in accepted + rejected} == {f"n{k}.png" for k in range(8)}
    assert 4 <= len(accepted) < 8 and len(accepted) + len(rejected) == 8
    figures = json.loads((out / "thresholds.json").read_text())
    for row in accepted:
        assert row["source"].endswith("aop.onnx")
        assert float(row["sharpness"]) >= round(figures["sharpness"], 3)
        assert float(row["spread_px"]) <= round(figures["spread_px"], 2)
    reasons = {row["Filename"]: row for row in rejected}
    assert reasons["n3.png"]["criterion"] == "anatomy" and "PS1" in reasons["n3.png"]["reason"]
    assert any("as sharp as a target's" in row["reason"] for row in rejected)
    assert figures["accepted"] == len(accepted) and figures["rule"]["accept"] == 0.5
    assert sum(figures["rejected"].values()) == len(rejected)
    assert figures["val"]["cases"] == 20 and figures["images"] == str(dotted / "new")
    sheet = cv2.imread(str(out / "sheet.png"))
    assert sheet.shape[1] >= 3 * 240 and sheet.std() > 0
    assert f"{len(accepted)} of 8 accepted" in capsys.readouterr().out

    cases = read_cases(out / "pseudo.csv")  # as fit --more reads them
    assert [case.file for case in cases] == [row["Filename"] for row in accepted]
    for case in cases:
        assert case.aop_deg == pytest.approx(
            float(angle_of_progression(case.landmarks_px)), abs=0.01
        )


def test_precision_holds_on_val(dotted):
    assert run(dotted, "--precision", "0.9", "--precision-px", "10") == 0
    figures = json.loads((dotted / "out" / "thresholds.json").read_text())
    val = figures["val"]  # 4 of the 20 are wrong, the least sharp ones
    assert 12 <= val["accepted"] < 20 and 0.9 <= val["precision"] <= 1
    assert val["mre_px_accepted"] < 1 and val["mre_px_rejected"] > 50


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--precision", "0.9", "--precision-px", "0.001"], "the best is 0."),
        (["--accept", "0.5", "--rounds", "1"], "ONNX"),
        (["--accept", "0.5", "--unlabelled", "nowhere"], "nowhere is not a folder"),
        (["--accept", "0.5", "--rounds", "1", "--scratch", "--epochs", "many"], "epochs"),
        (["--accept", "0.5", "--exclude", "none.csv", "."], "none.csv"),
    ],
)
def test_errors_are_a_sentence_and_nothing_is_labelled(dotted, capsys, more, told):
    assert run(dotted, *more) == 2
    assert told in capsys.readouterr().err
    assert not (dotted / "out" / "pseudo.csv").exists()


def test_a_table_without_the_teachers_split_is_refused(dotted, capsys):
    cases = [Case(c.file, c.landmarks_px, c.aop_deg) for c in read_cases(dotted / "cases.csv")]
    write_cases(dotted / "cases.csv", cases)
    assert run(dotted, "--accept", "0.5") == 2
    assert "split column with train and val" in capsys.readouterr().err


def test_an_output_is_resumed_only_with_the_settings_it_began_with(dotted, capsys):
    assert run(dotted, "--accept", "0.5") == 0
    before = (dotted / "out" / "pseudo.csv").stat().st_mtime_ns
    assert run(dotted, "--accept", "0.5") == 2 and "--resume" in capsys.readouterr().err
    assert run(dotted, "--accept", "0.6", "--resume") == 2
    assert "other settings (accept)" in capsys.readouterr().err
    assert run(dotted, "--accept", "0.5", "--resume") == 0
    assert (dotted / "out" / "pseudo.csv").stat().st_mtime_ns == before


def test_help_explains_and_shares_are_shares(capsys):
    with pytest.raises(SystemExit):
        pseudo_label.main(["--help"])
    shown = capsys.readouterr().out
    for word in ("--accept", "--precision-px", "--exclude", "--rounds", "rejected.csv", "fit"):
        assert word in shown
    with pytest.raises(SystemExit):
        pseudo_label.main(["--accept", "60"])
    assert "above 0 and up to 1" in capsys.readouterr().err


# ---- rounds ----


@pytest.fixture
def teacher(tmp_path, monkeypatch) -> Path:
    """Random weights, whose landmarks count as plausible so that the rounds can be tested."""
    monkeypatch.setattr("training.pseudo_labels.criteria.implausibilities", lambda *_: [])
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser, RECIPES)
    recipe = recipe_from_arguments(parser.parse_args(TINY), RECIPES)
    torch.manual_seed(3)
    network = build_network(recipe.network, 0)
    described = Checkpoint(network=recipe.network, masks=0, spec=recipe.spec())
    save_weights(tmp_path / "best.safetensors", network.state_dict(), described)
    return tmp_path


def run_rounds(folder: Path, teacher: Path, rounds: int, *more: object) -> int:
    given = ["--data", folder / "cases.csv", "--images", folder / "images", "--device", "cpu"]
    given += ["--teacher", teacher, "--unlabelled", folder / "new", "--accept", "0.7"]
    given += ["--output", teacher / "out", "--rounds", rounds, *TINY, *more]
    return pseudo_label.main([str(word) for word in given])


@pytest.mark.slow
def test_two_rounds_from_end_to_end(folder, teacher, monkeypatch):
    more = ["--scratch", "--epochs", "4", "--learning_rate", "0.003"]
    assert run_rounds(folder, teacher, 2, *more) == 0
    out = teacher / "out"
    history = rows(out / "rounds.csv")
    assert [row["round"] for row in history] == ["0", "1", "2"]
    assert float(history[1]["val_mre_px"]) < float(history[0]["val_mre_px"])
    kept_apart = {"b/again.png", "b/large.bmp"}
    for number in (1, 2):
        place = out / f"round-{number}"
        files = [row["Filename"] for row in rows(place / "pseudo.csv")]
        # 8 images may be labelled: 6 new ones, the look-alike of a train case, and b/04.jpg.
        assert len(files) >= 6 and not kept_apart & set(files)
        assert not (place / "student" / "cases.csv").exists()  # no new split was drawn
        _, described = load_weights(place / "student" / "best.safetensors")
        errors = float(history[number]["val_mre_px"])
        assert described.spec.metrics["val_mre_px"] == pytest.approx(errors, abs=0.002)
    sources = [rows(out / f"round-{k}" / "pseudo.csv")[0]["source"] for k in (1, 2)]
    assert sources == [
        str(teacher / "best.safetensors"),
        str(out / "round-1" / "student" / "best.safetensors"),
    ]
    errors = [float(row["val_mre_px"]) for row in history]
    best = out / f"round-{errors.index(min(errors))}" / "student" / "best.safetensors"
    assert (out / "best.safetensors").read_bytes() == best.read_bytes()

    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a round is done again"))
    before = {path: path.stat().st_mtime_ns for path in out.glob("round-*/**/*") if path.is_file()}
    assert run_rounds(folder, teacher, 2, *more, "--resume") == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def copy_teacher_as_student(options, root, folder, teacher):
    """Instead of a training, copy the teacher as the student."""
    (folder / "student").mkdir()
    for suffix in (".json", ".safetensors"):
        shutil.copyfile(teacher.with_suffix(suffix), folder / "student" / f"best{suffix}")


@pytest.mark.slow
def test_rounds_stop_where_val_no_longer_improves(folder, teacher, monkeypatch, capsys):
    monkeypatch.setattr(pseudo_label, "train_student", copy_teacher_as_student)
    assert run_rounds(folder, teacher, 5) == 0
    assert "stopped after round 1: val no longer improves" in capsys.readouterr().out
    assert len(rows(teacher / "out" / "rounds.csv")) == 2
    assert not (teacher / "out" / "best.safetensors").exists()  # no student is better

    shutil.rmtree(teacher / "out")
    errors_px = iter([9.0, 7.0, 7.5])
    monkeypatch.setattr(pseudo_label, "mean_errors", lambda *_: (next(errors_px), 1.0))
    assert run_rounds(folder, teacher, 5) == 0
    said = capsys.readouterr().out
    assert "stopped after round 2: val no longer improves, 7.50 px instead of 7.00" in said
    assert "round-1/student/best.safetensors" in said.splitlines()[-1]
    assert (teacher / "out" / "best.safetensors").exists()
    assert not (teacher / "out" / "round-3").exists()


def test_a_student_that_cannot_start_from_the_teacher_is_refused_first(folder, teacher, capsys):
    assert run_rounds(folder, teacher, 1, "--network.vit_depth", "2") == 2
    assert "has another network than --recipe compact" in capsys.readouterr().err
    assert run_rounds(folder, teacher, 1, "--masks", folder / "masks") == 2
    assert "no mask outputs" in capsys.readouterr().err
    assert not (teacher / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("scratch", [True, False])
def test_an_interrupted_training_is_resumed_with_the_same_flags(
    folder, teacher, monkeypatch, capsys, scratch
):
    asked = []

    def interrupted(command, **_):
        asked.append([str(word) for word in command])
        run = Path(command[command.index("--output") + 1])
        run.mkdir(exist_ok=True)
        (run / "checkpoint.pt").touch()
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", interrupted)
    more = ["--scratch", "--masks", folder / "masks"] if scratch else []
    assert run_rounds(folder, teacher, 1, *more) == 2
    assert "training.fit ended with status 3" in capsys.readouterr().err
    assert run_rounds(folder, teacher, 1, *more, "--resume") == 2
    first, again = asked
    assert first[1:3] == ["-m", "training.fit"] and again == [*first, "--resume"]
    assert ("--init" in first) != scratch
    assert ("--masks" in first) == scratch
    assert {"--epochs=4", "--network.input_size=64"} <= set(first)
    more_table = first[first.index("--more") + 1 :][:2]
    assert more_table == [str(teacher / "out/round-1/pseudo.csv"), str(folder / "new")]
