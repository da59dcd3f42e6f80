"""Strange inputs of every kind: the program answers, or says in a sentence why not, and goes on.

    AOP_FUZZ=10000 python -m pytest test/model/test_odd_files.py

tries 10,000 inputs, new ones each time. Without AOP_FUZZ there are a few hundred, always the same.
An input that ends the process itself (a crash or a hang in a library) stays in pytest's folder, as
fuzz*/in.
"""

import contextlib
import csv
import faulthandler
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.images import reader_pool
from model.images.formats import SUFFIXES
from model.images.reader_pool import Readers
from model.results.schemas import MultiplePoints, Results
from test.support import runs
from test.support.faulty_decoder import CONTENT, FAULTY_PROGRAM
from test.support.runs import ANGLE, POINTS, job, load, png, predictor_at, run, tree
from test.support.strange_files import (
    DAMAGES,
    RAW,
    TYPES,
    bits_flipped,
    by_library,
    changed_inside,
    valid,
    with_a_hole,
)

pytestmark = pytest.mark.slow  # hundreds of files each

COUNT = int(os.environ.get("AOP_FUZZ", "300"))
LONGEST_S, HANGS_S, MOST_BYTES = 5, 60, 3 << 30  # the container has 4 GiB
FAULTS = ["crash", "crash-at-frame", "exit", "hang", "hang-at-frame", "memory", "raises"]
PREDICTOR = predictor_at([(40, 20), (20, 22), (45, 40)])


def tried(share: float) -> settings:
    """Hypothesis' settings for a share of all inputs."""
    return settings(
        max_examples=max(1, round(COUNT * share)),
        derandomize="AOP_FUZZ" not in os.environ,
        database=None,
        deadline=None,  # `check` has its own, which forgives a pause of the machine
        suppress_health_check=[HealthCheck.too_slow],
    )


# ---- What must hold


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def stderr(request: pytest.FixtureRequest) -> Iterator[int]:
    """The real stderr, where Python reports a process that hangs."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        copy = os.dup(2)
    yield copy
    os.close(copy)


@pytest.fixture(scope="module")
def faulty() -> Iterator[None]:
    """Reader processes with a decoder that does what a file's name says."""
    with mock.patch.multiple(reader_pool, PROGRAM=FAULTY_PROGRAM, LONGEST_S=2):
        readers = runs.SharedReaders()
        with mock.patch.object(runs, "SHARED_READERS", readers):
            yield
        Readers.end(readers)


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def peak_bytes() -> int:
    """The most memory that the process had since the last call; 0 if the system does not tell."""
    if sys.platform != "linux":
        return 0
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@contextlib.contextmanager
def bounded(stderr: int) -> Iterator[None]:
    """The block may take some time and memory. If it hangs, the process ends and says so."""
    faulthandler.dump_traceback_later(HANGS_S, exit=True, file=stderr)
    peak_bytes()
    before = peak_bytes(), time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    spent = time.perf_counter() - before[1], time.process_time() - before[2]
    assert min(spent) < LONGEST_S
    assert peak_bytes() - before[0] < MOST_BYTES


def check(place: Path, stderr: int) -> int:
    """Run on place/in, compare all that is written to the contract; returns the exit status."""
    with bounded(stderr):
        result = run(place / "in", emptied(place / "out"), "--no-overlay", predictor=PREDICTOR)
    assert result.status in (0, 1, 2)
    assert len(result.sentence) > 20 if result.status else not result.err
    files = tree(result.folder)
    assert not any(name.endswith(".partial") for name in files)
    written = {name for name in files if "/" in name or name in (POINTS, ANGLE)}
    if result.status == 2:
        assert not written
        return 2
    text = (result.folder / "results.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    results = Results.model_validate_json(text)
    angles: dict[str, list[float | None]] = {}  # of the answered frames in a folder
    is_job = (place / "in" / "inputs.json").is_file()
    for entry in results.cases:
        assert (entry.status == "ok") == (entry.error is None) == (entry.aop_deg is not None)
        if entry.status == "ok":
            frame = "" if entry.frame is None else f"frame-{entry.frame:04d}/"
            angles.setdefault("" if is_job else f"{entry.case}/{frame}", []).append(entry.aop_deg)
    for folder, found in angles.items():
        points = MultiplePoints.model_validate_json((result.folder / folder / POINTS).read_bytes())
        assert len(points.points) == 3 * len(found)
        angle = load(result.folder / folder / ANGLE)
        assert isinstance(angle, float) and 0 <= angle <= 180 and angle in found
    assert written == {f"{folder}{name}" for folder in angles for name in (POINTS, ANGLE)}
    answered = sum(map(len, angles.values()))
    assert result.status == (answered < len(results.cases))
    with (result.folder / "landmarks.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.reader(file))) == answered + 1
    return result.status


# ---- Damaged files


NAME = st.deferred(lambda: st.sampled_from(sorted(valid())))
PLACE = st.integers(0, 400) | st.integers(0, 2**14)
DAMAGE = st.tuples(st.sampled_from(sorted(DAMAGES)), PLACE, st.integers(0, 2**10))


@tried(0.6)
@given(NAME, st.booleans(), st.lists(DAMAGE, min_size=1, max_size=3))
def test_damaged_files(
    place: Path, stderr: int, name: str, inside: bool, damages: list[tuple[str, int, int]]
) -> None:
    def change(data: bytes) -> bytes:
        for how, at, n in damages:
            data = DAMAGES[how](data, at % len(data), n) or b"\0"
        return data

    folder = emptied(place / "in")
    for other, data in valid().items():
        if Path(other).stem == Path(name).stem:
            (folder / other).write_bytes(data)
    data = valid()[name]
    (folder / name).write_bytes(changed_inside(name, data, change) if inside else change(data))
    assert check(place, stderr) < 2


@tried(0.3)
@given(NAME, st.lists(st.tuples(PLACE, st.integers(0, 2**14)), min_size=1, max_size=3))
def test_damage_within_a_valid_structure(
    place: Path, stderr: int, name: str, changes: list[tuple[int, int]]
) -> None:
    """A healthy file beside the damaged one is answered, whatever happens to that one."""
    folder = emptied(place / "in")
    for other, data in valid().items():
        if Path(other).stem == Path(name).stem:
            (folder / other).write_bytes(data)

    def change(data: bytes) -> bytes:
        for which, n in changes:
            data = bits_flipped(name, data, which, n)
        return data

    (folder / name).write_bytes(changed_inside(name, valid()[name], change))
    (folder / "healthy.dcm").write_bytes(valid()["jpeg-2000.dcm"])
    assert check(place, stderr) < 2
    entries = load(place / "out" / "results.json")["cases"]
    assert [entry["status"] for entry in entries if entry["file"] == "healthy.dcm"] == ["ok"]


@tried(0.2)
@given(
    NAME.filter(lambda name: not name.endswith(".mhd")), st.floats(0.3, 0.8), st.floats(0.1, 0.2)
)
def test_a_file_with_a_hole_is_not_answered(
    place: Path, stderr: int, name: str, start: float, share: float
) -> None:
    """Half a picture is never answered as if it were whole."""
    folder = emptied(place / "in")
    for other, data in valid().items():
        if Path(other).stem == Path(name).stem:
            (folder / other).write_bytes(data)
    (folder / name).write_bytes(with_a_hole(valid()[name], start, share))
    assert check(place, stderr) == 1


@tried(0.02)
@given(st.lists(st.sampled_from(FAULTS), min_size=1, max_size=4), st.integers(1, 8))
def test_decoders_that_crash_hang_or_eat_memory(
    place: Path, faulty: None, faults: list[str], threads: int
) -> None:
    """Each costs its own file, and no healthy one beside it, with any number of threads."""
    folder = emptied(place / "in")
    for k, fault in enumerate(faults):
        (folder / f"{fault}.{k}.dcm").write_bytes(CONTENT)
    healthy = ["grey.tif", "jpeg-2000.dcm", "stack-of-mha.mha", "grey.png"]
    for name in healthy:
        (folder / name).write_bytes(valid()[name])
    options = ("--no-overlay", "--threads", str(threads))
    result = run(place / "in", emptied(place / "out"), *options, predictor=PREDICTOR)
    assert result.status == 1
    failed = {entry["file"] for entry in result.results["cases"] if entry["status"] == "failed"}
    assert failed == {f"{fault}.{k}.dcm" for k, fault in enumerate(faults)}


# ---- Valid images that nobody expects

SIDES = st.integers(30, 90) | st.sampled_from([1, 31, 32, 8192, 8193, 20_000, 65_536])
REALS = st.sampled_from([1.0, 0.2, 0.0, -1.0, 1e-7, 1e7, -1e300, math.nan, math.inf]) | st.floats()


@tried(0.2)
@given(st.data())
def test_strange_images(place: Path, stderr: int, data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from([*RAW, ".dcm", ".png", ".bmp", ".jpg", ".tif"]), "suffix")
    kind = data.draw(st.sampled_from(sorted(TYPES)), "kind")
    width, height = data.draw(st.tuples(SIDES, SIDES), "sides")
    frames = data.draw(st.lists(st.sampled_from([1, 1, 2, 3, 5]), max_size=2), "frames")
    channels = data.draw(st.sampled_from([1, 1, 3, 3, 2, 4, 5]), "channels")
    values = data.draw(st.lists(st.integers(0, 9) | REALS, min_size=1, max_size=9), "values")
    world = data.draw(st.lists(REALS, min_size=8, max_size=8), "world")
    if min(width, height) > 99:  # large images take seconds as it is
        kind, frames, channels = "u1", [], 1
    path = emptied(place / "in") / f"a{suffix}"
    with np.errstate(all="ignore"):
        pixels = np.array(values).astype(f"<{kind}")
        if suffix in RAW:
            count = math.prod([width, height, *frames, channels])
            content = np.resize(pixels, count).tobytes() if count < 2**22 else b""
            head = RAW[suffix](kind, [width, height, *frames], channels, world)
            path.write_bytes(head + content)
            os.truncate(path, len(head) + count * pixels.itemsize)  # zeros, but not on the disk
        else:
            first = math.prod(frames) if max(width, height) < 99 else 1
            shape = first, min(height, 20_000), min(width, 90), 1 if channels == 1 else 3
            by_library(path, np.resize(pixels, shape), world)
    assert check(place, stderr) < 2


# ---- Jobs and names

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
PATHS = [
    *("images/us", "images/us/a.png", "images", ".", "./images//us", "images/none", "inputs.json"),
    *("..", "/etc", "images/../images/us", "images/us/a.png/b", "loop", "loop/x", "pipe", "zero"),
    *("a" * 300, "a/" * 3000),
]
CHANGES = {
    "slug": st.text() | JSON,
    "relative_path": st.sampled_from(PATHS) | st.text() | JSON,
    "super_kind": st.sampled_from(["Image", "image", "Value"]) | JSON,
}
SOCKET = st.fixed_dictionaries({}, optional=CHANGES).map(
    lambda changes: {"slug": "us", "relative_path": "images/us", "super_kind": "Image", **changes}
)
VALUE = st.dictionaries(
    st.sampled_from(["socket", "interface", "value"]), SOCKET | JSON, min_size=1
)


@tried(0.1)
@given(SOCKET.map(lambda socket: [{"socket": socket}]) | st.lists(VALUE) | JSON | st.binary())
def test_strange_jobs(place: Path, stderr: int, content: object) -> None:
    folder = emptied(place / "in")
    png(job(folder) / "a.png")
    (folder / "loop").symlink_to("loop")
    (folder / "zero").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "inputs.json").write_bytes(data)
    check(place, stderr)


def put(path: Path, what: str) -> None:
    if what == "image":
        path.write_bytes(valid()["grey.png"])
    elif what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(what.replace("beside", path.name))


NAMES = st.builds(
    lambda stem, suffix: stem.translate(None, b"/\0")[: 255 - len(suffix)] + suffix,
    st.binary(min_size=1, max_size=255),
    st.sampled_from([b"", *map(str.encode, SUFFIXES)]),
).filter(lambda name: name not in (b"", b".", b".."))
THINGS = [
    "image",
    "image",
    "folder",
    "pipe",
    "beside",
    "..",
    "/dev/zero",
    "beside" * 50,
    "x" * 300,
]


@tried(0.1)
@given(st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=3), st.sampled_from(THINGS))))
def test_strange_names(place: Path, stderr: int, files: list[tuple[list[bytes], str]]) -> None:
    folder = emptied(place / "in")
    for names, what in files:
        path = folder.joinpath(*map(os.fsdecode, names))
        with contextlib.suppress(OSError):  # an earlier file may be in the way
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(path):
                put(path, what)
    check(place, stderr)
