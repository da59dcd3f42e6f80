"""Reader processes: a decoder that crashes, hangs or eats memory costs one file."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from model.images import reader_pool
from model.images.limits import ImageError
from model.images.reader_pool import Readers
from test.support.faulty_decoder import CONTENT, FAULTY_PROGRAM

pytestmark = pytest.mark.slow  # each starts processes

PIXELS = np.arange(20 * 30, dtype=np.uint8).reshape(20, 30)
DIED = "DICOM data is damaged or of a variant that cannot be read: it ended the process"


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Readers]:
    monkeypatch.setattr(reader_pool, "PROGRAM", FAULTY_PROGRAM)
    monkeypatch.setattr(reader_pool, "LONGEST_S", 3)
    made = Readers()
    yield made
    made.end()


def named(folder: Path, name: str) -> Path:
    """A file by whose name the faulty decoder knows what to do."""
    path = folder / name
    path.write_bytes(CONTENT)
    return path


def read(readers: Readers, path: Path) -> np.ndarray:
    return readers.open(path, "DICOM").read(0)


def process_ids(readers: Readers, path: Path) -> int:
    return int(readers.open(path, "DICOM").instance_number)


def test_header_pixels_and_padding(readers: Readers, tmp_path: Path) -> None:
    file = readers.open(named(tmp_path, "padded"), "DICOM")
    assert (file.count, file.size, file.warnings) == (2, (30, 20), ("odd",))
    assert file.geometry.spacing_mm == (0.5, 0.25) and file.geometry.aspect is None
    np.testing.assert_array_equal(file.read(1).data, PIXELS + 1)
    assert np.ma.getmaskarray(file.read(1))[0].all() and not file.read(1).mask[1:].any()
    assert not isinstance(read(readers, named(tmp_path, "healthy")), np.ma.MaskedArray)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crash", DIED),
        ("crash-at-frame", DIED),
        ("exit", DIED),
        ("hang", "reading took longer than 3 s"),
        ("hang-at-frame", "reading took longer than 3 s"),
        ("memory", "DICOM data is damaged"),
        ("raises", "DICOM data is damaged, truncated"),
        ("refuses", "a sentence about the file"),
        ("gone", "cannot be read: No such file"),
    ],
)
def test_a_fault_costs_its_file_alone(
    readers: Readers, tmp_path: Path, name: str, reason: str
) -> None:
    healthy = named(tmp_path, "healthy")
    if name != "gone":
        named(tmp_path, name)
    for _ in range(2):
        np.testing.assert_array_equal(read(readers, healthy), PIXELS)
        with pytest.raises(ImageError, match=reason) as caught:
            read(readers, tmp_path / name)
        assert str(tmp_path) not in str(caught.value)
    np.testing.assert_array_equal(read(readers, healthy), PIXELS)


def test_a_decoder_that_waits_takes_no_processor_time(
    readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(readers, named(tmp_path, "healthy"))
    monkeypatch.setattr(reader_pool, "LONGEST_WAIT", 1)
    with pytest.raises(ImageError, match="reading took longer than 3 s"):
        read(readers, named(tmp_path, "waits"))
    np.testing.assert_array_equal(read(readers, tmp_path / "healthy"), PIXELS)


def test_what_a_library_prints_is_no_answer(readers: Readers, tmp_path: Path) -> None:
    np.testing.assert_array_equal(read(readers, named(tmp_path, "prints")), PIXELS)


def test_a_reader_is_reused_and_one_that_an_earlier_file_harmed_is_replaced(
    readers: Readers, tmp_path: Path
) -> None:
    healthy = named(tmp_path, "healthy")
    first = process_ids(readers, healthy)
    assert process_ids(readers, named(tmp_path, "other")) == first
    assert process_ids(readers, named(tmp_path, "harms")) == first
    late = named(tmp_path, "dies-if-harmed")
    np.testing.assert_array_equal(read(readers, late), PIXELS)
    assert process_ids(readers, late) != first


def test_many_threads_share_few_readers(readers: Readers, tmp_path: Path) -> None:
    paths = [named(tmp_path, f"{kind}-{k}") for k in range(16) for kind in ("healthy", "crash")]
    ids = set()

    def answer(path: Path) -> bool:
        try:
            ids.add(process_ids(readers, path))
            return bool(np.array_equal(read(readers, path), PIXELS))
        except ImageError:
            return False

    with ThreadPoolExecutor(64) as pool:
        healthy = list(pool.map(answer, paths * 2))
    assert healthy == ["healthy" in path.name for path in paths * 2]
    assert len(readers._pool._idle) <= reader_pool.MOST_READERS


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_nothing_is_left_behind(readers: Readers, tmp_path: Path) -> None:
    number = process_ids(readers, named(tmp_path, "healthy"))
    temporary = next(
        line.removeprefix("TMPDIR=")
        for line in Path(f"/proc/{number}/environ").read_text().split("\0")
        if line.startswith("TMPDIR=")
    )
    assert Path(temporary).is_dir()
    readers.end()
    assert not Path(temporary).exists() and not Path(f"/proc/{number}").exists()


def test_a_reader_that_cannot_be_started(
    readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(reader_pool.subprocess, "Popen", refuse)
    with pytest.raises(ImageError, match=r"no process could be started .*temporarily unavailable"):
        readers.open(named(tmp_path, "healthy"), "DICOM")


def test_large_images_take_turns(readers: Readers, tmp_path: Path) -> None:
    """A small file may unpack to more than LARGE_BYTES, held until it is answered."""
    held, most = [], []
    both = threading.Barrier(2, timeout=30)

    def answer(path: Path, wait: bool) -> None:
        with readers.admit(0) as admitted:
            admitted.wait_for_turn(admitted.open(path, "DICOM")).read(0)
            held.append(path)
            most.append(len(held))
            if wait:
                both.wait()  # both threads are in their blocks
            time.sleep(0.3)
            held.remove(path)

    def together(wait: bool, path: Path) -> int:
        most.clear()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(partial(answer, wait=wait), [path, path]))
        return max(most)

    assert together(False, named(tmp_path, "large")) == 1
    assert together(True, named(tmp_path, "healthy")) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
def test_a_reader_may_start_before_its_file_is_read(readers: Readers, tmp_path: Path) -> None:
    readers.start_early([tmp_path / "a.png", tmp_path / "b.JPG"])
    assert readers._pool._idle == []
    for name in ("a.dcm", "healthy"):
        readers.start_early([tmp_path / "a.png", tmp_path / name])
    started = {reader._process.pid for reader in readers._pool._idle}
    assert process_ids(readers, named(tmp_path, "healthy")) in started and len(started) == 2


def test_odd_paths(readers: Readers, tmp_path: Path) -> None:
    for name in (b"healthy-\xff\xfe.dcm", "healthy \n\u2028 \u00e4".encode()):
        path = tmp_path / os.fsdecode(name)
        path.write_bytes(CONTENT)
        np.testing.assert_array_equal(read(readers, path), PIXELS)
