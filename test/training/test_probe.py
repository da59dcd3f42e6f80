"""The linear probe: its arithmetic, and what the command prints."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from test.phantom import phantom
from training import pretrain, probe
from training.data.case_table import Case, write_cases


def test_ridge_is_the_textbooks_with_the_strength_of_least_error_left_out() -> None:
    draw = np.random.default_rng(3)
    x, other = draw.normal(size=(12, 30)), draw.normal(size=(5, 30))
    y = x[:, :2] * 3 + draw.normal(size=(12, 2)) + 7

    def primal(x: np.ndarray, y: np.ndarray, at: np.ndarray, strength: float) -> np.ndarray:
        gram = x.T @ x + strength * np.eye(x.shape[1])
        return y.mean(axis=0) + at @ np.linalg.solve(gram, x.T @ (y - y.mean(axis=0)))

    centre = x.mean(axis=0)
    strengths = probe.STRENGTHS * np.linalg.eigvalsh((x - centre) @ (x - centre).T).mean()
    found = probe.predict_by_ridge(x, y, other)
    candidates = [primal(x - centre, y, other - centre, strength) for strength in strengths]
    distances = [np.abs(found - candidate).max() for candidate in candidates]
    assert min(distances) < 1e-6
    chosen = strengths[int(np.argmin(distances))]

    def left_out(strength: float) -> float:
        """With the centre kept, as the closed form has it."""
        x0, y0 = x - centre, y - y.mean(axis=0)
        gram = x0.T @ x0 + strength * np.eye(30)
        hat = np.diag(x0 @ np.linalg.solve(gram, x0.T))
        residual = y0 - x0 @ np.linalg.solve(gram, x0.T @ y0)
        return float(((residual / (1 - hat)[:, None]) ** 2).mean())

    assert chosen == min(strengths, key=left_out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 phantoms with a case table, and a pretraining run on them."""
    root = tmp_path_factory.mktemp("probe")
    (root / "images").mkdir()
    cases = []
    for seed in range(12):
        made = phantom(seed, 64, 48)
        cv2.imwrite(str(root / "images" / f"{seed}.png"), made.image)
        split = "val" if seed < 3 else "train"
        cases.append(Case(f"{seed}.png", made.landmarks_px, made.aop_deg, split))
    write_cases(root / "cases.csv", cases)
    small = ["--width", "16", "--depth", "1", "--heads", "2", "--image_size", "32", "--patch", "8"]
    small += ["--decoder_width", "12", "--decoder_heads", "1", "--batch", "4", "--workers", "0"]
    run = ["--images", str(root / "images"), "--output", str(root / "run"), "--epochs", "1"]
    assert pretrain.main([*run, *small, "--device", "cpu"]) == 0
    return root


@pytest.mark.slow
def test_what_the_command_tells(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(folder / "cases.csv"), "--images", str(folder / "images")]
    assert probe.main(["--run", str(folder / "run"), *data]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(None, 2)[0] for line in lines] == [
        "pretrained, 1 epochs", "random", "mean landmarks of train",
    ]  # fmt: skip
    figures = [float(line.split()[-2]) for line in lines]
    truth = probe.input_landmarks(
        [case for case in probe.read_cases(folder / "cases.csv") if case.split == "val"],
        folder / "images", 32,
    )  # fmt: skip
    assert truth.shape == (3, 6) and truth.min() >= 0 and truth.max() <= 32
    assert figures[0] != figures[1] and all(0 < figure < 512 for figure in figures)
    assert probe.main(["--run", str(folder), *data]) == 2
    assert "mae.safetensors" in capsys.readouterr().err
