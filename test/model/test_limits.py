"""A header's claims are checked before pixels are read, so that no file fills the memory."""

import struct
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from model.images import limits, source
from model.images.reader_pool import LARGE_BYTES, Readers
from model.images.source import ImageError, open_image
from test.support.image_files import (
    GREY,
    RGB,
    STACK,
    H,
    W,
    assert_stack,
    dicom,
    edit,
    element,
    item,
    save,
    single,
    write,
)

if sys.platform == "linux":
    pass


def too_large() -> dict[str, Callable[[Path], Path]]:
    """Small files whose headers claim 70000 x 1000 px."""
    new = {code: struct.pack(code, 70000, 1000) for code in (">II", "<ii")}

    def picture(path: Path, at: int, code: str) -> Path:
        data = bytearray(write(path, GREY).read_bytes())
        data[at : at + 8] = new[code]
        if path.suffix == ".png":
            data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        path.write_bytes(data)
        return path

    def tiff(path: Path) -> Path:
        data = write(path, GREY).read_bytes()
        for tag, old, value in ((256, W, 70000), (257, H, 1000)):
            entry = next(
                entry
                for kind in (3, 4)
                if (entry := struct.pack("<HHII", tag, kind, 1, old)) in data
            )
            data = data.replace(entry, struct.pack("<HHII", tag, 4, 1, value))
        path.write_bytes(data)
        return path

    def header(path: Path, old: bytes, claim: bytes) -> Path:
        return edit(save(path, GREY), old, claim)

    return {
        "png": lambda path: picture(path / "a.png", 16, ">II"),
        "bmp": lambda path: picture(path / "a.bmp", 18, "<ii"),
        "tif": lambda path: tiff(path / "a.tif"),
        "mha": lambda path: header(path / "a.mha", b"DimSize = 60 40", b"DimSize = 70000 1000"),
        "nrrd": lambda path: header(path / "a.nrrd", b"sizes: 60 40", b"sizes: 70000 1000"),
    }


@pytest.mark.parametrize("name", too_large())
def test_too_large_is_refused_from_the_header(tmp_path: Path, name: str) -> None:
    path = too_large()[name](tmp_path)
    with pytest.raises(ImageError, match="70000 x 1000 px is larger than 64 Mpx"):
        open_image(path)


def test_jpeg_too_large(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", GREY)
    edit(path, struct.pack(">BHH", 8, H, W), struct.pack(">BHH", 8, 60000, 60000))
    with pytest.raises(ImageError, match="60000 x 60000 px is larger"):
        open_image(path)


def test_limits_of_a_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_BYTES", STACK.nbytes - 1)
    with pytest.raises(ImageError, match=r"save them as \.mha"):
        open_image(save(tmp_path / "a.nrrd", STACK))
    assert_stack(save(tmp_path / "a.mha", STACK), STACK)
    monkeypatch.setattr(source, "MAX_FRAMES", 4)
    with pytest.raises(ImageError, match="has 5 frames, more than 4"):
        open_image(tmp_path / "a.mha")


JPEG = cv2.imencode(".jpg", RGB)[1].tobytes()
COLOURS = np.stack([RGB, RGB[::-1]])


def claim_text(path: Path, packed: bool = False, array: np.ndarray = STACK) -> Path:
    save(path, array, vector=array.ndim == 4, packed=packed)
    return edit(path, f" {W} {H} {len(array)}\n".encode(), b" 8000 8000 9\n")


def claim_nifti(path: Path) -> Path:
    save(path, COLOURS, vector=True)
    return edit(path, struct.pack("<3h", W, H, 2), struct.pack("<3h", 8000, 8000, 9))


def claim_dicom(path: Path, jpeg: list[bytes] | None = None) -> Path:
    dicom(path, COLOURS, colours="RGB", jpeg=jpeg)
    return edit(path, *(element(0x00280008, "IS", count) for count in ("2", "9000000")))


def claim_tiff(path: Path) -> Path:
    write(path, RGB.astype(np.float64))
    for tag, old in ((256, W), (257, H)):
        edit(path, *(struct.pack("<HHIHH", tag, 3, 1, side, 0) for side in (old, 8000)))
    return path


def growth(action: Callable[[], object]) -> int:
    """The most bytes by which the process grows during the action."""

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak()
    action()
    return peak() - before


def refuse(path: Path, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        open_image(path)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="bounded and measured on Linux only")


@on_linux
@pytest.mark.parametrize(
    ("name", "claim", "reason"),
    [
        ("a.nrrd", claim_text, r"save them as \.mha"),
        ("b.nrrd", partial(claim_text, packed=True), r"save them as \.mha"),
        ("a.mha", partial(claim_text, packed=True), "without compression"),
        ("b.mha", partial(claim_text, array=COLOURS.astype(np.float64)), "fewer bytes per pixel"),
        ("a.nii", claim_nifti, "without compression"),
        ("a.dcm", claim_dicom, "is damaged"),
        ("b.dcm", partial(claim_dicom, jpeg=[JPEG] * 2), "is damaged"),
        ("a.tif", claim_tiff, "fewer bytes per pixel"),
    ],
)
def test_gigabytes_are_refused_from_the_header(
    tmp_path: Path, name: str, claim: Callable[[Path], Path], reason: str
) -> None:
    """Each frame has a valid size, but there are too many frames, or values in a pixel."""
    path = claim(tmp_path / name)
    assert path.stat().st_size < 2**17
    refuse(path, reason)  # imports what is imported late
    assert growth(lambda: refuse(path, reason)) < 2**24


def test_what_is_too_much_is_told_as_more_than_the_limit() -> None:
    with pytest.raises(ImageError, match=r"pixels take 0\.51 GiB, more than 0\.5 GiB: save"):
        limits.check_bytes(limits.MAX_BYTES + 1)


@on_linux
@pytest.mark.parametrize(
    "old", [struct.pack("<HH2s2xI", 2, 1, b"OB", 2), item(JPEG)[:8]], ids=["header", "pixels"]
)
def test_dicom_elements_longer_than_their_file(tmp_path: Path, old: bytes) -> None:
    """GDCM allocates them before it reads."""
    path = dicom(tmp_path / "a.dcm", RGB[None], colours="YBR_FULL_422", jpeg=[JPEG])
    assert single(path).pixels.shape == (H, W)
    edit(path, old, old[:-4] + struct.pack("<I", 2**30))
    assert growth(lambda: refuse(path, "DICOM data is damaged")) < 2**28


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mha", ".nii", ".tif"])
def test_frames_are_lazy(tmp_path: Path, suffix: str) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (200, 4 * H, 3 * W), dtype=np.uint8)
    path = tmp_path / f"a{suffix}"
    if suffix == ".tif":
        assert cv2.imwritemulti(str(path), list(stack))
    else:
        save(path, stack)
    open_image(path)  # imports what is imported late
    tracemalloc.start()
    for k, frame in enumerate(open_image(path).frames()):
        assert np.array_equal(frame.pixels, stack[k])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert k == 199
    assert peak < 15 * stack[0].nbytes


@pytest.mark.slow
def test_small_files_of_large_images_are_answered_one_at_a_time(tmp_path: Path) -> None:
    """A file of some kB may unpack to more than LARGE_BYTES, held until it is answered."""
    side = 4096
    large = tmp_path / "large.png"
    cv2.imwrite(str(large), np.eye(side, dtype=np.uint8))
    assert large.stat().st_size < LARGE_BYTES // 100
    small = write(tmp_path / "small.png", GREY)
    readers = Readers()
    held, most = [], []
    both = threading.Barrier(2, timeout=30)

    def answer(path: Path, wait: bool) -> None:
        with readers.admit(path.stat().st_size) as admitted:
            frame = next(open_image(path, admitted).frames())
            held.append(frame)
            most.append(len(held))
            if wait:
                both.wait()  # both threads are in their blocks
            time.sleep(1)
            held.remove(frame)

    def together(wait: bool, *paths: Path) -> int:
        most.clear()
        with ThreadPoolExecutor(len(paths)) as pool:
            list(pool.map(partial(answer, wait=wait), paths))
        return max(most)

    assert together(False, large, large) == 1
    assert together(True, small, small) == 2
