"""Large folders, long loops and several containers at once: memory, and the cost of a kill.

The tests are short by default. AOP_SCALE=5000 pytest test/container/test_scale.py makes them long.
If AOP_IMAGE names an image, they run in its container; memory is always that of a plain process.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from test.container import strict
from test.container.strict import IMAGE, ROOT
from test.container.test_decoders import deflated, jpeg_2000
from test.support.runs import ANGLE, load, made, png, tree, volume

pytestmark = pytest.mark.slow  # they answer folders of images

COUNT = int(os.environ.get("AOP_SCALE", "160"))
FEW = min(100, COUNT // 4)
GROWTH = 1.3


def images(folder: Path, count: int) -> Path:
    for k in range(count):
        png(folder / f"{k % 7}" / f"{k:05d}.png", np.roll(made(k % 5), k // 5, axis=1))
    return folder


# A process begins with the peak of the one that starts it: a small process does, not pytest.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak(source: Path, output: Path, *options: str) -> int:
    """The largest resident size of a run, bytes."""
    line = [sys.executable, str(ROOT / "process.py"), f"--input={source}", f"--output={output}"]
    command = [sys.executable, "-c", PEAK, *line, *options]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(ran.stdout) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_does_not_grow_with_the_folder(tmp_path: Path) -> None:
    few = peak(images(tmp_path / "few", FEW), tmp_path / "few-out")
    start = time.monotonic()
    many = peak(images(tmp_path / "many", COUNT), tmp_path / "many-out")
    seconds = time.monotonic() - start
    print(f"{FEW} images: {few >> 20} MiB; {COUNT}: {many >> 20} MiB in {seconds:.0f} s")
    assert load(tmp_path / "many-out" / "results.json")["answered"] == COUNT
    assert many <= GROWTH * few


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("suffix", [".mha", ".tif"])
def test_memory_does_not_grow_with_a_loop(tmp_path: Path, suffix: str) -> None:
    import cv2

    found = []
    for frames in (15, 120):
        stack = np.stack([np.roll(made(k % 5), k, axis=1) for k in range(frames)])
        path = tmp_path / str(frames) / f"a{suffix}"
        path.parent.mkdir()
        if suffix == ".tif":
            assert cv2.imwritemulti(str(path), list(stack))
        else:
            volume(path, stack)
        found.append(peak(path.parent, tmp_path / f"{frames}-out"))
    (loop,) = load(tmp_path / "120-out" / "results.json")["loops"]
    assert loop["answered"] == len(loop["aop_deg"]) == 120
    assert found[1] <= 1.1 * found[0], [size >> 20 for size in found]


def proportional_bytes(process: int) -> int:
    """Resident memory of a process and its children; what they share counts once."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
        threads = Path(f"/proc/{process}/task").glob("*/children")
        children = " ".join(path.read_text(encoding="ascii") for path in threads).split()
    except OSError:  # it has ended
        return 0
    own = int(text.partition("\nPss:")[2].split()[0]) * 1024
    return own + sum(proportional_bytes(int(child)) for child in children)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_of_a_folder_of_dicom_files(tmp_path: Path) -> None:
    """Reader processes included, with few threads and with many."""
    source = tmp_path / "in"
    source.mkdir()
    for k in range(200):
        write = (jpeg_2000, deflated)[k % 2]
        write(source / f"{k:03d}.dcm", made(k % 5))
    found = []
    for threads in (2, 64):
        output = tmp_path / str(threads)
        line = [sys.executable, str(ROOT / "process.py"), f"--input={source}", f"--output={output}"]
        child = subprocess.Popen(
            [*line, "--no-overlay", f"--threads={threads}"], stdout=subprocess.DEVNULL
        )
        peak_bytes = 0
        while child.poll() is None:
            peak_bytes = max(peak_bytes, proportional_bytes(child.pid))
            time.sleep(0.05)
        assert load(output / "results.json")["answered"] == 200
        found.append(peak_bytes)
    print(f"200 DICOM files: {found[0] >> 20} MiB with 2 threads, {found[1] >> 20} with 64")
    assert found[0] < 2**29 and found[1] < 2**30


def test_a_killed_run_is_resumed_without_redoing_the_first(tmp_path: Path) -> None:
    source, output = images(tmp_path / "in", COUNT), tmp_path / "out"
    name = f"aop-kill-{os.getpid()}"
    line = strict.command(source, output, "--no-overlay", name=name)
    child = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    while len(tree(output) if output.exists() else []) < COUNT:  # about half: two files a case
        assert child.poll() is None
        time.sleep(0.05)
    kill(child, name)
    first = {path: path.stat().st_mtime_ns for path in output.glob(f"*/{ANGLE}")}
    assert COUNT / 4 < len(first) < COUNT
    found = strict.run(source, output, "--no-overlay", "--resume")
    assert found.status == 0 and found.results["answered"] == COUNT
    again = [path for path, time_ns in first.items() if path.stat().st_mtime_ns != time_ns]
    assert len(again) <= 1  # the kill may have hit one that was being written


def kill(child: subprocess.Popen, name: str) -> None:
    if IMAGE:
        subprocess.run(["docker", "kill", name], check=True, capture_output=True)
    else:
        child.send_signal(signal.SIGKILL)
    child.wait()


def test_eight_at_once_one_of_them_killed(tmp_path: Path) -> None:
    """Together they give the answers of a single run."""
    source, output = images(tmp_path / "in", 64), tmp_path / "out"
    output.mkdir()

    def part(k: int, *options: str) -> list[str]:
        options = ("--no-overlay", "--threads", "1", "--shard", f"{k}/8", *options)
        return strict.command(source, output, *options, name=f"aop-part-{k}-{os.getpid()}")

    children = {
        k: subprocess.Popen(part(k), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for k in range(1, 9)
    }
    while not (output / ".results-5-of-8.json.journal").exists():
        assert children[5].poll() is None
        time.sleep(0.01)
    kill(children.pop(5), f"aop-part-5-{os.getpid()}")
    assert [child.wait() for child in children.values()] == [0] * 7
    merged = strict.run(source, output, "--merge")
    assert merged.status == 1 and merged.results["missing"][0] == "part 5/8"
    assert len(merged.results["missing"]) - 1 + merged.results["answered"] == 64
    assert subprocess.run(part(5, "--resume"), capture_output=True, check=False).returncode == 0
    merged = strict.run(source, output, "--merge")
    assert merged.status == 0 and merged.results["missing"] == []
    whole = strict.run(source, tmp_path / "whole", "--no-overlay", "--threads", "1")
    assert (output / "landmarks.csv").read_bytes() == (
        tmp_path / "whole" / "landmarks.csv"
    ).read_bytes()
    assert [e["file"] for e in merged.results["cases"]] == [
        e["file"] for e in whole.results["cases"]
    ]
    shutil.rmtree(output)
