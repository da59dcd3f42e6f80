"""Runs of process.py in the test's own process, and inputs for them."""

import contextlib
import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import SimpleITK as sitk

import process
from model.frame import input_to_cells
from model.images.reader_pool import Readers
from model.pipeline.case_runner import StopRequest
from model.predictor import Output, Predictor, load_predictor
from model.spec import ModelSpec
from test.phantom import phantom

POINTS, ANGLE, THREE = "aop-landmarks.json", "angle-of-progression.json", "aop-angle.json"
ANSWERS = sorted([POINTS, ANGLE, "overlay.png"])
HEIGHT, WIDTH = 192, 240
load_once = functools.cache(load_predictor)


class SharedReaders(Readers):
    """Readers whose processes go on from run to run, since each takes half a second to start."""

    def end(self) -> None:
        """Leave them to the next run; they end with the tests."""


SHARED_READERS = SharedReaders()


def shipped() -> Predictor:
    """The model that process.py takes by default on this machine."""
    return load_once(process.SHIPPED_MODEL, on_cpu=process.SHIPPED_FOR_CPU)


@functools.cache
def made(seed: int) -> np.ndarray:
    """One synthetic image, (HEIGHT, WIDTH)."""
    return phantom(seed, WIDTH, HEIGHT).image


@dataclass
class Run:
    """The outcome of one call."""

    status: int
    out: str
    err: str
    folder: Path
    results: dict

    def entry(self, file: str, frame: int | None = None) -> dict:
        (found,) = [e for e in self.results["cases"] if (e["file"], e["frame"]) == (file, frame)]
        return found

    @property
    def sentence(self) -> str:
        """The sentence for the user; stderr must hold nothing else."""
        assert self.err.endswith("\n") and self.err.count("\n") == 1
        assert "Traceback" not in self.err and "Error(" not in self.err
        return self.err[:-1]


def run(
    source: Path,
    folder: Path,
    *options: str,
    predictor: Predictor | None = None,
    models: Path = Path("no/such/folder"),
    stop: StopRequest | None = None,
) -> Run:
    """Run process.py in this process, with the shipped model or with `predictor`.

    Args:
        models: folder that stands for the mounted one, /opt/ml/model.
        stop: lets a test ask the run to stop.
    """
    loader = (lambda *_: predictor) if predictor else load_once
    out, err = io.StringIO(), io.StringIO()
    patch = mock.patch.multiple(
        process, load_predictor=loader, MOUNTED_MODELS=models, Readers=lambda: SHARED_READERS
    )
    with patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            arguments = ["--input", str(source), "--output", str(folder), *options]
            status = process.main(arguments, stop)
        except SystemExit as ended:  # argparse
            status = int(ended.code or 0)
    written = folder / "results.json"
    results = load(written) if status < 2 and written.is_file() else {}
    return Run(status, out.getvalue(), err.getvalue(), folder, results)


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def png(path: Path, image: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), made(1) if image is None else image)
    return path


def volume(path: Path, array: np.ndarray, **world) -> Path:
    image = sitk.GetImageFromArray(array)
    for name, value in world.items():
        getattr(image, f"Set{name}")(value)
    sitk.WriteImage(image, str(path))
    return path


def job(root: Path, relative: str = "images/us") -> Path:
    (root / relative).mkdir(parents=True)
    socket = {"slug": "us", "relative_path": relative, "super_kind": "Image"}
    (root / "inputs.json").write_text(json.dumps([{"socket": socket}]))
    return root / relative


def predictor_at(points: list, height: float = 1.0) -> Predictor:
    """A predictor that finds the same landmarks in every image: (x, y) in px of a 64 px input."""
    spec = ModelSpec(input_size=64, mean=0, std=1, stride=4, sigma_cells=1.5, doubt_below=0.5)
    heatmaps = height * spec.codec.encode(input_to_cells(points, 4))
    output = Output(heatmaps[None].astype(np.float32))
    return Predictor(spec, lambda _: output, "cpu", process.SHIPPED_MODEL)
