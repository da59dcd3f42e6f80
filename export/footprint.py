"""What one model takes of a process: `python -m export.footprint MODEL PROVIDER THREADS`.

Prints JSON. The process imports what process.py imports, and no torch, so that its peak memory is a
user's; nothing else runs beside it.
"""

import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from export.benchmark_cuda import used_device_mb
from model.predictor import ModelError, Provider, load_predictor

ROOT = Path(__file__).resolve().parent.parent
SIDE_PX = 512
IMAGES, STARTS = 2, 3
ENOUGH_MS = 2000.0  # spent on starts: a slow model starts less often


class Footprint(BaseModel):
    """start_ms: from the file to a session that answers, the median of up to STARTS.

    peak_memory_mb: the process' largest resident size for one load and IMAGES images, None where
    the system does not tell. device_memory_mb: what the GPU has in use more than before. MB are
    10^6 bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start_ms: float
    peak_memory_mb: float | None
    device_memory_mb: float | None = None


def footprint(model: Path, provider: str, threads: int | None) -> Footprint:
    """The footprint of a model, measured in a process of its own.

    Raises:
        ModelError: that process failed; says how.
    """
    settings = [str(model.resolve()), provider, str(threads or 0)]
    command = [sys.executable, "-m", "export.footprint", *settings]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ModelError(f"{model.name} failed in a process of its own ({ran.returncode}): {last}")
    return Footprint.model_validate_json(ran.stdout)


def main(arguments: Sequence[str]) -> int:
    """Measure in this process and print."""
    import onnxruntime  # noqa: F401, PLC0415  not part of a session's start

    path, threads = Path(arguments[0]), int(arguments[2]) or None
    provider: Provider = "cuda" if arguments[1] == "cuda" else "cpu"
    before = used_device_mb() if provider == "cuda" else None
    grey = np.random.default_rng(0).integers(0, 256, (SIDE_PX, SIDE_PX), np.uint8)
    starts, peak, after = [], None, None
    for k in range(STARTS):
        start = time.perf_counter()
        predictor = load_predictor(path, provider, threads)
        starts.append(1000 * (time.perf_counter() - start))
        if k == 0:  # later loads would stand beside the first in memory
            for _ in range(IMAGES):
                predictor.predict(grey)
            peak, after = peak_memory_mb(), used_device_mb() if before is not None else None
        if sum(starts) > ENOUGH_MS:
            break
    on_device = None if before is None or after is None else after - before
    found = {"start_ms": statistics.median(starts), "peak_memory_mb": peak}
    print(json.dumps({**found, "device_memory_mb": on_device}))
    return 0


def peak_memory_mb() -> float | None:
    """This process' largest resident size (Linux; None elsewhere).

    Not ru_maxrss: a process that another one starts inherits that one's peak there.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    except (OSError, IndexError, ValueError):
        return None


def processor_name() -> str:
    """The processor's name, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*: *(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.machine()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
