"""Image files made from synthetic arrays with W != H, and what open_image makes of them."""

import struct
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import SimpleITK as sitk

from model.image import BadFrame, GreyFrame, open_image

H, W = 40, 60
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (H, W), dtype=np.uint8)
RGB = cv2.GaussianBlur(RNG.integers(0, 256, (H, W, 3), dtype=np.uint8), (0, 0), 3)
STACK = RNG.integers(0, 256, (5, H, W), dtype=np.uint8)
VOLUMES = (".mha", ".mhd", ".nii", ".nii.gz", ".nrrd")


def save(
    path: Path, array: np.ndarray, vector: bool = False, packed: bool = False, **world
) -> Path:
    """Write by SimpleITK; `world` names its setters: Spacing, Origin, Direction."""
    image = sitk.GetImageFromArray(array, isVector=vector)
    for name, value in world.items():
        getattr(image, f"Set{name}")(value)
    sitk.WriteImage(image, str(path), packed)
    return path


def write(path: Path, array: np.ndarray, *options: int) -> Path:
    assert cv2.imwrite(str(path), array, options)
    return path


def edit(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    return path


def single(path: Path) -> GreyFrame:
    source = open_image(path)
    assert not source.is_stack and source.frame_count == 1
    (frame,) = source.frames()
    assert frame.index is None and frame.slice_index == 0
    assert frame.pixels.shape == (source.height, source.width)
    assert frame.pixels.flags.c_contiguous
    return frame


def frames(path: Path) -> list[GreyFrame | BadFrame]:
    source = open_image(path)
    assert source.is_stack
    items = list(source.frames())
    assert len(items) == source.frame_count
    assert [item.index for item in items] == list(range(len(items)))
    return items


def assert_stack(path: Path, expected: np.ndarray) -> None:
    items = frames(path)
    assert len(items) == len(expected)
    for item, plane in zip(items, expected, strict=True):
        np.testing.assert_array_equal(item.pixels, plane)


def stretched(array: np.ndarray) -> np.ndarray:
    values = array.astype(np.float64)
    return (values - values.min()) / np.ptp(values) * 255


def makers() -> dict[str, Callable[[Path], Path]]:
    return {
        **{
            name: lambda path, s=name: write(path / f"a{s}", GREY)
            for name in (".png", ".bmp", ".tif")
        },
        **{name: lambda path, s=name: save(path / f"a{s}", GREY) for name in VOLUMES},
        ".dcm": lambda path: dicom(path / "a.dcm", GREY[None]),
    }


# ---- DICOM, by hand: SimpleITK writes neither YBR nor the sequences of an ultrasound machine


def element(tag: int, kind: str, value: str | bytes | int) -> bytes:
    if isinstance(value, int):
        value = struct.pack("<H", value)
    value = value.encode() if isinstance(value, str) else value
    value += b"\0" * (len(value) % 2) if kind == "UI" else b" " * (len(value) % 2)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + kind.encode()
    long = kind in ("OB", "OW", "SQ")
    return (
        head + (struct.pack("<2xI", len(value)) if long else struct.pack("<H", len(value))) + value
    )


def item(value: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(value)) + value


def region(x_cm: float, y_cm: float, unit: int = 3) -> bytes:
    """One item of the Sequence of Ultrasound Regions."""
    return item(
        element(0x00186024, "US", unit)
        + element(0x00186026, "US", 3)
        + element(0x00186028, "FD", struct.pack("<d", 0))
        + element(0x0018602C, "FD", struct.pack("<d", x_cm))
        + element(0x0018602E, "FD", struct.pack("<d", y_cm))
    )


def dicom(
    path: Path,
    pixels: np.ndarray,
    colours: str = "MONOCHROME2",
    spacing: str = "",
    regions: bytes = b"",
    number: int | None = None,
    jpeg: list[bytes] | None = None,
    preamble: bool = True,
) -> Path:
    """A multi-frame ultrasound file of (frames, H, W[, 3]) pixels, or of frames packed as JPEG."""
    kind = "1.2.840.10008.5.1.4.1.1.3.1"
    syntax = "1.2.840.10008.1.2.4.50" if jpeg else "1.2.840.10008.1.2.1"
    meta = element(0x00020001, "OB", b"\0\1") + element(0x00020002, "UI", kind)
    meta += element(0x00020003, "UI", "1.2.3") + element(0x00020010, "UI", syntax)
    meta = element(0x00020000, "UL", struct.pack("<I", len(meta))) + meta
    bits = 8 * pixels.dtype.itemsize
    data = element(0x00080016, "UI", kind) + element(0x00080018, "UI", "1.2.3")
    data += element(0x00186011, "SQ", regions) if regions else b""
    data += element(0x00200013, "IS", str(number)) if number is not None else b""
    data += element(0x00280002, "US", 3 if pixels.ndim == 4 else 1)
    data += element(0x00280004, "CS", colours)
    data += element(0x00280006, "US", 0) if pixels.ndim == 4 else b""
    data += element(0x00280008, "IS", str(len(pixels))) + element(0x00280010, "US", pixels.shape[1])
    data += element(0x00280011, "US", pixels.shape[2])
    data += element(0x00280030, "DS", spacing) if spacing else b""
    for tag, value in ((0x100, bits), (0x101, bits), (0x102, bits - 1), (0x103, 0)):
        data += element(0x00280000 + tag, "US", value)
    if jpeg:
        data += struct.pack("<HH2s2xI", 0x7FE0, 0x10, b"OB", 0xFFFFFFFF) + item(b"")
        data += b"".join(item(part + b"\0" * (len(part) % 2)) for part in jpeg)
        data += struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    else:
        data += element(0x7FE00010, "OW" if bits == 16 else "OB", pixels.tobytes())
    path.write_bytes((b"\0" * 128 + b"DICM" + meta if preamble else b"") + data)
    return path
