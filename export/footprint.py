"""Measure the start and the memory of one model.

    python -m export.footprint model/weights/aop.onnx cpu 2

The command prints JSON: start_ms, peak_memory_mb and
device_memory_mb, as in the benchmark's Footprint. Its process imports what process.py imports, and
no torch, so that its peak memory is what a user sees.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.predictor import Provider, load_predictor

NOISE_SIDE_PX = 512  # side of the image of noise that the model answers
IMAGES, STARTS = 2, 3
ENOUGH_MS = 2000.0  # after so long, a slow model is not started again


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure in this process and print the result; returns the exit status."""
    parser = argparse.ArgumentParser(
        "export.footprint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="the ONNX file")
    parser.add_argument("provider", choices=("cuda", "cpu"), help="processor")
    parser.add_argument("threads", type=int, help="threads on the CPU; 0: all it may use")
    args = parser.parse_args(arguments)
    import onnxruntime  # noqa: F401, PLC0415  so that its import is not part of the start

    path, threads = args.model, args.threads or None
    provider: Provider = args.provider
    before = used_device_mb() if provider == "cuda" else None
    grey = np.random.default_rng(0).integers(0, 256, (NOISE_SIDE_PX, NOISE_SIDE_PX), np.uint8)
    starts, peak, after = [], None, None
    for k in range(STARTS):
        start = time.perf_counter()
        predictor = load_predictor(path, provider, threads)
        starts.append(1000 * (time.perf_counter() - start))
        if k == 0:  # a later predictor would add to the first one's memory
            for _ in range(IMAGES):
                predictor.predict(grey)
            peak, after = peak_memory_mb(), used_device_mb() if before is not None else None
        if sum(starts) > ENOUGH_MS:
            break
    on_device = None if before is None or after is None else after - before
    footprint = {
        "start_ms": statistics.median(starts),
        "peak_memory_mb": peak,
        "device_memory_mb": on_device,
    }
    print(json.dumps(footprint))
    return 0


def peak_memory_mb() -> float | None:
    """This process's largest resident size on Linux; None elsewhere.

    It is not ru_maxrss, which begins with the peak of the process that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    except (OSError, IndexError, ValueError):
        return None


def used_device_mb() -> float | None:
    """Memory that all processes use on the first GPU; None without an answer from nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    ran = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = ran.stdout.split()
    return float(lines[0]) * 2**20 / 1e6 if ran.returncode == 0 and lines else None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
