"""Image files made from synthetic arrays with W != H, and checks of how open_image reads them."""

import struct
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import SimpleITK as sitk

from model.images.source import BadFrame, GreyFrame, open_image

H, W = 40, 60
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (H, W), dtype=np.uint8)
RGB = cv2.GaussianBlur(RNG.integers(0, 256, (H, W, 3), dtype=np.uint8), (0, 0), 3)
STACK = RNG.integers(0, 256, (5, H, W), dtype=np.uint8)
VOLUMES = (".mha", ".mhd", ".nii", ".nii.gz", ".nrrd")


def save(
    path: Path, array: np.ndarray, vector: bool = False, packed: bool = False, **world
) -> Path:
    """Write a file by SimpleITK.

    Args:
        world: values for SimpleITK's setters: Spacing, Origin, Direction.
    """
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


# ---- DICOM, written here: SimpleITK writes neither YBR nor the sequences of an ultrasound machine

LITTLE, IMPLICIT, BIG = ("<", True), ("<", False), (">", True)  # byte order, explicit VR
ROOT = "1.2.840.10008.1.2"
SYNTAXES = {LITTLE: ROOT + ".1", IMPLICIT: ROOT, BIG: ROOT + ".2"}
OPEN = 0xFFFFFFFF  # the length of a sequence or item that ends with a mark


def element(
    tag: int, kind: str, value: str | bytes | int | float, code: tuple[str, bool] = LITTLE
) -> bytes:
    """One data element; a number is written as US, SS or FD."""
    order, explicit = code
    if isinstance(value, str):
        value = value.encode()
    elif not isinstance(value, bytes):
        value = struct.pack(order + {"SS": "h", "FD": "d"}.get(kind, "H"), value)
    value += b"\0" * (len(value) % 2) if kind == "UI" else b" " * (len(value) % 2)
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
    if not explicit:
        return head + struct.pack(order + "I", len(value)) + value
    if kind in ("OB", "OW", "SQ", "UN", "UT"):
        return head + kind.encode() + struct.pack(order + "2xI", len(value)) + value
    return head + kind.encode() + struct.pack(order + "H", len(value)) + value


def item(value: bytes, order: str = "<") -> bytes:
    return struct.pack(order + "HHI", 0xFFFE, 0xE000, len(value)) + value


def region(
    x_cm: float, y_cm: float, unit: int = 3, code: tuple[str, bool] = LITTLE, y_unit: int = 0
) -> bytes:
    """One item of the Sequence of Ultrasound Regions; `unit` 3 means cm per pixel."""
    return item(
        element(0x00186024, "US", unit, code)
        + element(0x00186026, "US", y_unit or unit, code)
        + element(0x00186028, "FD", 0.0, code)
        + element(0x0018602C, "FD", x_cm, code)
        + element(0x0018602E, "FD", y_cm, code),
        code[0],
    )


def left_open(tag: int, items: list[bytes], code: tuple[str, bool] = LITTLE) -> bytes:
    """A sequence whose items have no length: marks end them."""
    order, explicit = code
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF) + b"SQ\0\0" * explicit
    marks = [struct.pack(order + "HHI", 0xFFFE, mark, 0) for mark in (0xE00D, 0xE0DD)]
    start = struct.pack(order + "HHI", 0xFFFE, 0xE000, OPEN)
    inside = b"".join(start + item[8:] + marks[0] for item in items)
    return head + struct.pack(order + "I", OPEN) + inside + marks[1]


def dicom(
    path: Path,
    pixels: np.ndarray,
    colours: str = "MONOCHROME2",
    spacing: str = "",
    regions: bytes = b"",
    number: int | None = None,
    jpeg: list[bytes] | None = None,
    preamble: bool = True,
    code: tuple[str, bool] = LITTLE,
    syntax: str = "",
    table: bytes = b"",
    more: dict[int, bytes] | None = None,
) -> Path:
    """Write a multi-frame ultrasound file.

    Args:
        pixels: (frames, H, W) or (frames, H, W, 3).
        jpeg: the frames as they are packed; `pixels` then gives only their size and type.
        syntax: the end of the transfer syntax's UID.
        table: the table of the packed frames' offsets.
        more: tag -> whole element, which is added or replaces the one of that tag.
    """
    shape, bits = pixels.shape, 8 * pixels.dtype.itemsize
    values = {
        0x00080016: ("UI", "1.2.840.10008.5.1.4.1.1.3.1"),
        0x00080018: ("UI", "1.2.3"),
        0x00186011: ("SQ", regions),
        0x00200013: ("IS", "" if number is None else str(number)),
        0x00280002: ("US", 3 if len(shape) == 4 else 1),
        0x00280004: ("CS", colours),
        0x00280006: ("US", 0 if len(shape) == 4 else ""),
        0x00280008: ("IS", str(shape[0])),
        0x00280010: ("US", shape[1]),
        0x00280011: ("US", shape[2]),
        0x00280030: ("DS", spacing),
        0x00280100: ("US", bits),
        0x00280101: ("US", bits),
        0x00280102: ("US", bits - 1),
        0x00280103: ("US", int(pixels.dtype.kind == "i")),
        0x7FE00010: (
            "OW" if bits == 16 else "OB",
            pixels.astype(pixels.dtype.newbyteorder(code[0])).tobytes(),
        ),
    }
    data = {tag: element(tag, *at, code) for tag, at in values.items() if at[1] not in ("", b"")}
    if jpeg is not None:
        items = b"".join(item(part + b"\0" * (len(part) % 2)) for part in [table, *jpeg])
        head = struct.pack("<HH2s2xI", 0x7FE0, 0x10, b"OB", OPEN)
        data[0x7FE00010] = head + items + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    data |= more or {}
    uid = ROOT + syntax if syntax else SYNTAXES[code] if jpeg is None else ROOT + ".4.50"
    meta = element(0x00020001, "OB", b"\0\1") + element(0x00020010, "UI", uid)
    meta = element(0x00020000, "UL", struct.pack("<I", len(meta))) + meta
    body = b"".join(data[tag] for tag in sorted(data))
    path.write_bytes((bytes(128) + b"DICM" + meta if preamble else b"") + body)
    return path
