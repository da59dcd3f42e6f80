"""Pretraining: masks, losses against formulas, images, resuming, and that it learns."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from test.phantom import phantom
from test.support.beit_file import beit_tensors
from training import pretrain, recipes
from training.data.case_table import Case, write_cases
from training.data.unlabelled import UnlabelledDataset, cut_crop, split_indices
from training.learning.checkpoint import CheckpointError
from training.learning.mae import (
    Features,
    MaskedAutoencoder,
    load_mae,
    mae_loss,
    patchify,
    resize_positions,
    take_tokens,
    unpatchify,
)
from training.learning.trainer import Processes, Trainer
from training.pretrain import (
    PretrainLoss,
    Student,
    attention_divergence,
    crop_settings,
    distillation_loss,
    measure_val,
)
from training.recipes import PRETRAIN_COMPACT as COMPACT
from training.recipes import PRETRAIN_PAPER as PAPER
from training.recipes import PretrainRecipe

SMALL = [
    "--image_size", "32", "--patch", "8", "--width", "16", "--depth", "2", "--heads", "2",
    "--decoder_width", "12", "--decoder_heads", "1", "--batch", "4", "--epochs", "4",
    "--workers", "0", "--val_share", "0.2",
]  # fmt: skip
TINY = PretrainRecipe(
    image_size=24, patch=4, width=16, depth=2, heads=2, decoder_width=12, decoder_heads=1
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """12 phantoms in two folders and formats, three of them named test_*."""
    root = tmp_path_factory.mktemp("unlabelled")
    for seed in range(12):
        name = f"{'test' if seed >= 9 else 'image'}_{seed:02d}"
        path = root / ("a" if seed % 2 else "b") / f"{name}.{'png' if seed % 3 else 'bmp'}"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), phantom(seed, 60, 48).image)
    return root


def run(folder: Path, output: Path, *more: str) -> int:
    images = ["--images", str(folder / "a"), str(folder / "b"), "--device", "cpu"]
    return pretrain.main([*images, "--output", str(output), *SMALL, *more])


def log_of(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((output / "log.csv").open()))


def names_in(output: Path) -> set[str]:
    return {row["Filename"] for row in csv.DictReader((output / "images.csv").open())}


def test_patches_and_back():
    image = torch.arange(2 * 12 * 20.0).reshape(2, 1, 12, 20)
    patches = patchify(image, 4)
    assert patches.shape == (2, 15, 16)
    assert torch.equal(patches[1, 7].reshape(4, 4), image[1, 0, 4:8, 8:12])  # row 1, column 2
    assert torch.equal(unpatchify(patches, 3), image)


def test_loss_is_that_of_the_masked_normalised_patches():
    rng = np.random.default_rng(3)
    image = rng.random((2, 1, 12, 20)).astype(np.float32)
    prediction = rng.normal(size=(2, 15, 16)).astype(np.float32)
    kept = np.array([[3, 0, 14, 7], [2, 11, 5, 6]])
    errors = []
    for n in range(2):
        for token in set(range(15)) - set(kept[n].tolist()):
            row, column = divmod(token, 5)
            patch = image[n, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].astype(float)
            target = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-3)
            errors.append(((prediction[n, token] - target.ravel()) ** 2).mean())
    given = [torch.from_numpy(a) for a in (prediction, image, kept)]
    assert mae_loss(*given, 1e-3).item() == pytest.approx(np.mean(errors), rel=1e-5)
    at_kept = given[0].clone()
    at_kept[0, 3] += 100
    at_kept[1, 11] -= 100
    assert torch.equal(mae_loss(at_kept, *given[1:], 1e-3), mae_loss(*given, 1e-3))


def test_what_is_masked_is_not_seen():
    torch.manual_seed(0)
    mae = MaskedAutoencoder(TINY).eval()
    image, kept = torch.rand(2, 1, 24, 24), torch.tensor([[0, 7, 35], [20, 4, 11]])
    other = patchify(torch.rand(2, 1, 24, 24), 4)
    index = kept[..., None].expand(-1, -1, 16)
    other = unpatchify(other.scatter(1, index, patchify(image, 4).gather(1, index)), 6)
    assert torch.equal(mae(image, kept), mae(other, kept))
    order = kept[:, [2, 0, 1]]
    torch.testing.assert_close(mae(image, order), mae(image, kept))
    whole = torch.arange(36).expand(2, -1)
    torch.testing.assert_close(
        mae.encoder(image, whole.flip(1)).tokens.flip(1), mae.encoder(image).tokens
    )


def test_mask_ratio_and_draws():
    squares = [np.full((40, 40), 90, np.uint8), phantom(1, 40, 40).image]
    assert (PAPER.grid, crop_settings(PAPER).kept) == (14, 49)
    data = UnlabelledDataset(squares, crop_settings(COMPACT))
    first, again, later, other = data[0, 1], data[0, 1], data[1, 1], data[0, 0]
    assert first["image"].shape == (1, 128, 128) and len(first["kept"].unique()) == 16
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["kept"], later["kept"])
    assert not torch.equal(first["image"], later["image"])
    assert not torch.equal(first["kept"], other["kept"])
    val = UnlabelledDataset(squares, crop_settings(COMPACT), train=False)
    assert torch.equal(val[0, 1]["kept"], val[5, 1]["kept"])


def test_whole_crop_is_the_image_and_crops_turn_no_sides():
    square = cv2.GaussianBlur(phantom(2, 64, 64).image, (0, 0), 2)
    recipe = COMPACT.model_copy(update={"image_size": 64})
    assert np.abs(cut_crop(square, crop_settings(recipe), None) * 255 - square).max() < 1e-3
    half = COMPACT.model_copy(update={"image_size": 32})
    mean = square.reshape(32, 2, 32, 2).mean(axis=(1, 3))
    assert np.abs(cut_crop(square, crop_settings(half), None) * 255 - mean).max() < 0.51
    marked = np.zeros((64, 64), np.uint8)
    marked[20:30, 8:20], marked[34:44, 40:60] = 120, 240  # darker spot above and left
    mild = recipe.model_copy(update={"crop_area": (0.8, 1.0)})
    for seed in range(20):
        view = cut_crop(marked, crop_settings(mild), np.random.default_rng(seed))
        dark, bright = (view > 0.1) & (view < 0.6), view > 0.75
        (y1, x1), (y2, x2) = (np.argwhere(spot).mean(axis=0) for spot in (dark, bright))
        assert x1 < x2 and y1 < y2


def test_distillation_maps_widths_and_heads_that_differ():
    torch.manual_seed(1)
    both = TINY.model_copy(update={"target": "features+attention", "attention_weight": 2.0})
    image, kept = torch.rand(3, 1, 24, 24), torch.stack([torch.randperm(36)[:9] for _ in range(3)])
    student = Student(both, teacher_width=20)
    features = student(image, kept)[1]
    assert features.tokens.shape == (3, 36, 20) and features.attention.shape == (3, 2, 36, 36)
    truth = Features(torch.rand(3, 36, 20), torch.rand(3, 5, 36, 36).softmax(-1))
    squared = ((features.tokens - truth.tokens) ** 2).mean()
    ours, its = features.attention.mean(1), truth.attention.mean(1)
    divergence = (its * (its / ours).log()).sum(-1).mean()
    loss = distillation_loss(features, truth, both)
    torch.testing.assert_close(loss, squared + 2 * divergence)
    assert attention_divergence(truth.attention, truth.attention) == 0
    loss.backward()
    assert student.match.weight.grad.abs().sum() > 0
    kept_alone = both.model_copy(update={"teacher_sees": "kept"})
    features = Student(kept_alone, teacher_width=16)(image, kept)[1]
    assert features.tokens.shape == (3, 9, 16) and features.attention.shape == (3, 2, 9, 9)
    assert Student(both, teacher_width=None)(image, kept)[1] is None


def test_positions_resized_edge_to_edge():
    recipe = TINY.model_copy(update={"image_size": 28})
    embedding = MaskedAutoencoder(recipe).encoder.position_embedding
    assert resize_positions(embedding, 7, 7) is embedding
    ramp = torch.arange(7.0).repeat(7)[None, :, None].expand(1, 49, 16)  # each cell's column
    resized = resize_positions(ramp, 5, 14)
    assert resized.shape == (1, 70, 16)
    columns = resized.reshape(5, 14, 16)[2, 3:-3, 0]
    centres = (torch.arange(14.0)[3:-3] + 0.5) / 2 - 0.5
    assert (columns - centres).abs().max() < 0.06  # torch's bicubic bends a ramp by 3/64


@pytest.mark.slow
def test_resume_continues_exactly(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "whole", "--ema_decay", "0.5") == 0
    parts = [tmp_path / "parts", "--ema_decay", "0.5"]
    assert run(folder, *parts, "--max-minutes", "0") == 0
    assert len(log_of(tmp_path / "parts")) == 1
    assert run(folder, *parts, "--resume", "--max-minutes", "0") == 0
    assert run(folder, *parts, "--resume") == 0
    whole, again = log_of(tmp_path / "whole"), log_of(tmp_path / "parts")
    for a, b in zip(whole, again, strict=True):
        assert {**a, "minutes": 0} == {**b, "minutes": 0}
    one, other = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["network"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    average = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["average"]
    for key, value in load_mae(tmp_path / "parts")[0].state_dict().items():
        assert torch.equal(value, average[f"module.mae.{key}"])
    capsys.readouterr()
    assert run(folder, *parts, "--resume", "--pattern", "*.png") == 2
    assert "images are not those of" in capsys.readouterr().err
    assert run(folder, *parts, "--resume", "--mask_ratio", "0.5") == 2
    assert "differs in mask_ratio" in capsys.readouterr().err
    assert run(folder, *parts) == 2
    assert "holds a training" in capsys.readouterr().err


@pytest.mark.slow
def test_run_holds_weights_and_pictures(folder, tmp_path):
    assert run(folder, tmp_path, "--epochs", "1") == 0
    mae, described = load_mae(tmp_path)
    assert described.epoch == 1 and described.recipe.width == 16
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["network"]
    assert all(torch.equal(saved[f"mae.{key}"], value) for key, value in mae.state_dict().items())
    sheet = cv2.imread(str(tmp_path / "samples" / "epoch-001.png"), cv2.IMREAD_GRAYSCALE)
    val = [row for row in csv.DictReader((tmp_path / "images.csv").open()) if row["split"] == "val"]
    assert len(val) == 2 and sheet.shape == (18 + 2 * 32, 4 * 32)
    picture, seen, means = (sheet[18:, 32 * k : 32 * k + 32].astype(float) for k in range(3))
    tiles = seen.reshape(8, 8, 4, 8).max(axis=(1, 3)) > 0
    assert tiles.sum() <= 2 * 4  # of 16 patches an image 4 are shown
    blocks = [part.reshape(8, 8, 4, 8).mean(axis=(1, 3)) for part in (picture, means)]
    assert np.abs(blocks[0] - blocks[1]).max() < 1.1
    assert list((tmp_path / "tensorboard").iterdir())
    text = json.loads((tmp_path / "mae.json").read_text())
    text["recipe"]["depth"] = 3
    (tmp_path / "mae.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=r"missing encoder\.blocks\.2"):
        load_mae(tmp_path)
    text["recipe"]["decoder_mlp"] = 2
    (tmp_path / "mae.json").write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=r"recipe\.decoder_mlp\n.*not permitted"):
        load_mae(tmp_path)


@pytest.mark.slow
def test_which_images_are_taken(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "a", "--leave-out", "test_*", "--epochs", "1") == 0
    assert len(names_in(tmp_path / "a")) == 9
    (tmp_path / "names.txt").write_text("a/image_01.png\n\ntest_*\n")
    listed = ["--leave-out", str(tmp_path / "names.txt"), "image_02.png", "--epochs", "1"]
    assert run(folder, tmp_path / "b", *listed) == 0
    assert names_in(tmp_path / "a") - names_in(tmp_path / "b") == {"image_01.png", "image_02.png"}
    points = np.array([[30.0, 9.0], [15.0, 12.0], [40.0, 30.0]])
    splits = {"image_01.tif": "test", "image_02.png": "val", "image_04.png": "train"}
    write_cases(tmp_path / "t.csv", [Case(n, points, 90.0, s) for n, s in splits.items()])
    table = ["--data", str(tmp_path / "t.csv"), "--epochs", "1"]
    assert run(folder, tmp_path / "c", *table) == 0
    assert len(names_in(tmp_path / "c")) == 10
    assert not {"image_01.png", "image_02.png"} & names_in(tmp_path / "c")
    assert run(folder, tmp_path / "d", *table, "--splits", "train", "val") == 0
    assert names_in(tmp_path / "d") - names_in(tmp_path / "c") == {"image_02.png"}
    assert run(folder, tmp_path / "e", *table, "--pattern", "test_*") == 2
    assert "names no image" in capsys.readouterr().err
    assert run(folder, tmp_path / "e", "--pattern", "*.gif") == 2
    assert "no image is left" in capsys.readouterr().err


@pytest.mark.slow
def test_unreadable_images_are_named_and_left(folder, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for k in range(3):
        cv2.imwrite(str(tmp_path / "images" / f"{k}.png"), phantom(k, 48, 48).image)
    stack = list(np.random.default_rng(0).integers(0, 255, (20, 40, 40), np.uint8))
    cv2.imwritemulti(str(tmp_path / "images" / "loop.tif"), stack)
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    more = ["--images", str(tmp_path / "images"), "--epochs", "1"]
    assert run(folder, tmp_path / "run", *more) == 0
    assert "skipped broken.png" in "".join(capsys.readouterr())
    names = names_in(tmp_path / "run")
    assert {"0.png", "loop.tif#0", "loop.tif#19"} <= names and len(names) == 3 + 16


@pytest.mark.slow
@pytest.mark.parametrize("target", ["features", "attention", "features+attention"])
@pytest.mark.parametrize("sees", ["image", "kept"])
def test_a_larger_model_of_our_own_teaches(folder, tmp_path, target, sees, capsys):
    large = ["--width", "24", "--heads", "4", "--image_size", "40", "--epochs", "1"]
    assert run(folder, tmp_path / "large", *large) == 0
    more = ["--teacher", f"mae:{tmp_path / 'large'}", "--target", target, "--teacher_sees", sees]
    assert run(folder, tmp_path / "small", *more, "--epochs", "6") == 0
    rows = log_of(tmp_path / "small")
    assert float(rows[-1]["distillation"]) < float(rows[0]["distillation"])
    assert float(rows[-1]["val_distillation"]) > 0
    assert "24 wide" in capsys.readouterr().out


@pytest.mark.slow
def test_usfm_teaches_on_another_grid(folder, tmp_path, capsys):
    torch.save({"model": beit_tensors()}, tmp_path / "usfm.pth")
    more = ["--teacher", f"usfm:{tmp_path / 'usfm.pth'}", "--target", "features+attention"]
    assert run(folder, tmp_path / "run", *more, "--mae_weight", "0", "--epochs", "2") == 0
    assert "usfm.pth: 35 tensors used, 2 resized, 3 left out" in capsys.readouterr().out
    first, last = log_of(tmp_path / "run")
    assert float(first["loss"]) == float(first["distillation"]) > float(last["distillation"])
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["network"]
    assert {key.split(".")[0] for key in saved} == {"mae", "match"}
    assert saved["match.weight"].shape == (24, 16)


@pytest.mark.slow
def test_it_learns_an_image(folder, tmp_path):
    (tmp_path / "images").mkdir()
    for k in range(12):
        cv2.imwrite(str(tmp_path / "images" / f"{k}.png"), phantom(3, 64, 64).image)
    more = ["--images", str(tmp_path / "images"), "--epochs", "18", "--learning_rate", "0.01"]
    more += ["--variance_floor", "0.001", "--crop_area", "1,1", "--rotation_deg", "0"]
    assert run(folder, tmp_path / "run", *more, "--decoder_width", "32") == 0
    explained = [float(row["val_explained"]) for row in log_of(tmp_path / "run")]
    assert explained[0] < 0.05 and explained[-1] > 0.2


def test_explained_is_0_for_a_network_that_knows_each_patchs_mean_alone():
    data = UnlabelledDataset(
        [phantom(k, 40, 40).image for k in range(3)], crop_settings(TINY), train=False
    )
    place, student = Processes(0, 1, torch.device("cpu")), Student(TINY, None)
    nn.init.zeros_(student.mae.decoder.predict.weight)
    averaging = TINY.model_copy(update={"ema_decay": 0.9})
    for recipe in (averaging, TINY):
        network = Trainer(student, recipe, 1, place).evaluated_network
        loss = PretrainLoss(recipe, None)
        mae, explained, distillation = measure_val(network, loss, data, place.device)
        assert 0.5 < mae <= 1 and (explained, distillation) == (0, 0)
        nn.init.normal_(student.mae.decoder.predict.weight)
        changed = measure_val(network, loss, data, place.device)[1]
        assert changed == 0 if recipe is averaging else changed < 0  # the average has not moved
        nn.init.zeros_(student.mae.decoder.predict.weight)


def test_split_is_a_draw_that_keeps_some_of_both():
    train, val = split_indices(40, 0.05, 1)
    assert len(val) == 2 and sorted(train + val) == list(range(40))
    assert split_indices(2, 0.9, 1)[0]


def test_paper_recipe_is_the_papers():
    assert (PAPER.image_size, PAPER.patch, PAPER.mask_ratio) == (224, 16, 0.75)
    assert (PAPER.width, PAPER.depth, PAPER.heads) == (192, 12, 12)
    assert (PAPER.decoder_width, PAPER.decoder_depth) == (96, 1)
    assert (PAPER.learning_rate, PAPER.epochs, PAPER.batch) == (1e-4, 400, 1024)
    assert (PAPER.target, PAPER.teacher_sees) == ("features", "image")


@pytest.mark.parametrize(("ours", "fits"), [(PAPER, recipes.PAPER), (COMPACT, recipes.COMPACT)])
def test_recipes_fit_the_bottlenecks_of_their_namesakes(ours, fits):
    sizes = fits.network.vit_width, fits.network.vit_depth, fits.network.vit_heads
    assert ours.name == fits.name and (ours.width, ours.depth, ours.heads) == sizes


def test_every_field_is_a_flag_and_values_are_checked(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in PretrainRecipe.model_fields.items():
        assert f"--{name} " in shown
        assert " ".join(field.description.split()[:3]).replace("%", "") in shown
    for flag, value, told in (
        ("--epochs", "many", "epochs"),
        ("--patch", "7", "not a multiple of patch"),
        ("--heads", "3", "not a multiple of 4 and of 3 heads"),
        ("--teacher", "usfm", "expected the teacher"),
        ("--target", "logits", "target"),
    ):
        assert run(folder, tmp_path, flag, value) == 2
        assert told in capsys.readouterr().err


def test_take_picks_tokens():
    tokens = torch.arange(24.0).reshape(2, 4, 3)
    assert torch.equal(take_tokens(tokens, torch.tensor([[3, 0], [1, 1]]))[1], tokens[1, [1, 1]])
