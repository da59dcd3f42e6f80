"""Measure where the time goes from the start of process.py to its first answer.

    python -m export.cold_start [--runs 15] [--model FILE.onnx]

Each run is a new Python process that answers one image as process.py does. The command prints the
medians. The byte code of all modules is compiled before, as in the container.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import cv2
import numpy as np

from export.conversion import random_image
from model.predictor import load_predictor

ROOT = Path(__file__).resolve().parent.parent
# A program of its own, because the imports are measured. It prints a JSON list: seconds for each of
# START_STAGES.
CHILD_PROGRAM = """
import sys, time
marks = [time.perf_counter()]
def mark(): marks.append(time.perf_counter())
import numpy, cv2, pydantic; mark()
import process; mark()
import onnxruntime; mark()
from model.images.reader_pool import Readers
from model.pipeline import batch, options
settings = options.parse_options(sys.argv[1:], None)
cases = batch.select_cases(settings)
model = process.load_model(settings, settings.threads); mark()
batch.run_batch(model, settings, cases, process.StopRequest(), Readers()); mark()
import json, os
print(json.dumps([b - a for a, b in zip(marks, marks[1:])]), flush=True)
os._exit(0)  # as process.py ends
"""
START_STAGES = (
    "numpy, OpenCV, pydantic",
    "our modules",
    "onnxruntime",
    "finding the image, loading the model",
    "read, network, decode, overlay, write",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        "export.cold_start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--runs", type=int, default=15, metavar="N", help="number of runs (%(default)s)"
    )
    parser.add_argument("--model", type=Path, help="ONNX file (default: the shipped one)")
    args = parser.parse_args(arguments)
    model = ["--model", str(args.model)] if args.model else []
    with tempfile.TemporaryDirectory() as folder:
        image, output = Path(folder, "in", "image.png"), Path(folder, "out")
        image.parent.mkdir()
        _write_image(image)
        options = ["--input", str(image.parent), "--output", str(output), *model]
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(folder, "bytecode"))
        _time_process(options)  # compiles the byte code
        runs = [_time_stages(options) for _ in range(args.runs)]
        whole = [_time_process(options) for _ in range(args.runs)]
    rows = zip(("Python itself", *START_STAGES), zip(*runs, strict=True), strict=True)
    for name, seconds in rows:
        print(f"{name:40}{1000 * median(seconds):7.0f} ms")
    print(f"{'process.py, from start to exit':40}{1000 * median(whole):7.0f} ms")
    return 0


def _write_image(path: Path) -> None:
    """A smooth random image as PNG, of the shipped model's input size."""
    spec = load_predictor(ROOT / "model" / "weights" / "aop.onnx", "cpu").spec
    grey = random_image(spec, 0)[0] * spec.std + spec.mean
    cv2.imwrite(str(path), grey.astype(np.uint8))


def _time_stages(options: Sequence[str]) -> list[float]:
    """Seconds for the start of Python and for each of START_STAGES in one new process."""
    start = time.perf_counter()
    command = [sys.executable, "-c", CHILD_PROGRAM, *options]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    spent: list[float] = json.loads(ran.stdout.splitlines()[-1])
    return [time.perf_counter() - start - sum(spent), *spent]


def _time_process(options: Sequence[str]) -> float:
    """Seconds from start to exit of one run of process.py."""
    start = time.perf_counter()
    command = [sys.executable, "process.py", *options]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
