"""The same input gives the same bytes, for any number of threads, order and other files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import process
from model.predictor import load_predictor
from test.support.runs import Run, made, png, run, shipped, tree, volume

pytestmark = pytest.mark.slow  # each runs process.py several times


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("same")
    for seed in range(4):
        png(root / f"{seed}.png", made(seed))
    volume(root / "cine.mha", np.stack([made(5), made(6)]), Spacing=(0.3, 0.2, 1))
    return root


@pytest.fixture(scope="module")
def first(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(folder, tmp_path_factory.mktemp("first") / "out")


def content(folder: Path, names: list[str] | None = None) -> dict[str, bytes]:
    """Name -> bytes of every file, without the times in results.json."""
    found = {}
    for name in names or tree(folder):
        data = (folder / name).read_bytes()
        if name == "results.json":
            results = json.loads(data)
            for entry in results["cases"]:
                del entry["milliseconds"]
            data = json.dumps(results).encode()
        found[name] = data
    return found


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads(folder: Path, first: Run, tmp_path: Path, threads: int) -> None:
    predictor = load_predictor(process.SHIPPED_FOR_CPU, "cpu", threads)
    if shipped().provider != "cpu":
        pytest.skip("a GPU runs the other tests")
    again = run(folder, tmp_path / "out", "--threads", str(threads), predictor=predictor)
    assert content(again.folder) == content(first.folder)


def test_order_in_which_files_are_listed(folder: Path, first: Run, tmp_path: Path) -> None:
    for path in sorted(folder.iterdir(), reverse=True):  # another order on most file systems
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "in" / path.name)
    again = run(tmp_path / "in", tmp_path / "out")
    assert content(again.folder) == content(first.folder)


def test_what_a_case_is_among(folder: Path, first: Run, tmp_path: Path) -> None:
    """A case's answer is the same after other cases and in a run of its own."""
    png(tmp_path / "in" / "2.png", made(2))
    alone = run(tmp_path / "in", tmp_path / "out")
    names = [name for name in tree(alone.folder) if name.startswith("2/")]
    assert len(names) == 3
    assert content(alone.folder, names) == content(first.folder, names)
    assert alone.entry("2.png")["confidence"] == first.entry("2.png")["confidence"]
