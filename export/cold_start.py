"""Where the time goes from the start of process.py to its first answer, in fresh processes.

    python -m export.cold_start [--runs 15] [--model FILE.onnx]

Each run is a new Python that answers one image as process.py does; printed are the medians. The
byte code of all modules is written before, as in the container.
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
# a program of its own: the imports are what is measured
CHILD = """
import sys, time
marks = [time.perf_counter()]
def mark(): marks.append(time.perf_counter())
import numpy, cv2, pydantic; mark()
import process; mark()
import onnxruntime; mark()
from model.pipeline import batch, options
given = options.parse_options(sys.argv[1:], None)
cases = batch.select_cases(given)
model = process.load_model(given, given.threads); mark()
batch.run_batch(model, given, cases, process.StopRequest()); mark()
import json, os
print(json.dumps([b - a for a, b in zip(marks, marks[1:])]), flush=True)
os._exit(0)  # as process.py ends
"""
STAGES = (
    "numpy, OpenCV, pydantic",
    "our modules",
    "onnxruntime",
    "finding the image, loading the model",
    "read, network, decode, overlay, write",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        "export.cold_start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=15, metavar="N", help="(%(default)s)")
    parser.add_argument("--model", type=Path, help="ONNX file (the shipped one)")
    args = parser.parse_args(arguments)
    chosen = ["--model", str(args.model)] if args.model else []
    with tempfile.TemporaryDirectory() as folder:
        image, output = Path(folder, "in", "image.png"), Path(folder, "out")
        image.parent.mkdir()
        _picture(image)
        given = ["--input", str(image.parent), "--output", str(output), *chosen]
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(folder, "bytecode"))
        _seconds(given)  # compiles
        runs = [_stages(given) for _ in range(args.runs)]
        whole = [_seconds(given) for _ in range(args.runs)]
    rows = zip(("Python itself", *STAGES), zip(*runs, strict=True), strict=True)
    for name, seconds in rows:
        print(f"{name:40}{1000 * median(seconds):7.0f} ms")
    print(f"{'process.py, from start to exit':40}{1000 * median(whole):7.0f} ms")
    return 0


def _picture(path: Path) -> None:
    spec = load_predictor(ROOT / "model" / "weights" / "aop.onnx", "cpu").spec
    grey = random_image(spec, 0)[0] * spec.std + spec.mean
    cv2.imwrite(str(path), grey.astype(np.uint8))


def _stages(given: Sequence[str]) -> list[float]:
    """Seconds that Python itself and each of STAGES took in one new process."""
    start = time.perf_counter()
    command = [sys.executable, "-c", CHILD, *given]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    spent: list[float] = json.loads(ran.stdout.splitlines()[-1])
    return [time.perf_counter() - start - sum(spent), *spent]


def _seconds(given: Sequence[str]) -> float:
    start = time.perf_counter()
    command = [sys.executable, "process.py", *given]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
