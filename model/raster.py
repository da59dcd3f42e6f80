"""PNG, JPEG, BMP and TIFF, through OpenCV; what they say about resolution is not trusted.

OpenCV makes up what is missing at the end of a file, and makes room for whatever a header claims:
size and end are looked at here, before it reads.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from model.reading import (
    MAX_BYTES,
    MAX_FRAMES,
    ImageError,
    ImageFile,
    Raw,
    bounded_memory,
    check_bytes,
    check_channels,
    check_size,
    damaged,
)

_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG markers
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _SAMPLES = 254, 256, 257, 258, 277  # TIFF tags


def open_picture(path: Path, kind: str) -> ImageFile:
    """A PNG, JPEG or BMP file."""
    if path.stat().st_size > 1.1 * MAX_BYTES:
        raise damaged(kind)  # no image within the limits takes so many bytes
    data = path.read_bytes()
    try:
        size = _picture_size(data, kind)
    except (struct.error, IndexError) as error:
        raise damaged(kind) from error
    check_size(*size)
    if not _has_end(data, kind):
        raise ImageError(f"the {kind} data is truncated: its end mark is missing")

    def read(_: int) -> Raw:
        with _opencv(
            kind, 8 * size[0] * size[1]
        ):  # as stored: an orientation in EXIF is left alone
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if image is None:
            raise damaged(kind)
        return _rgb(image)

    return ImageFile(1, size, lambda: read)


def open_tiff(path: Path) -> ImageFile:
    """A TIFF file; its pages may differ in size."""
    try:
        pages = list(_tiff_pages(path))
        size = pages[0][1]
    except (struct.error, IndexError, ValueError) as error:
        raise damaged("TIFF") from error

    def read(k: int) -> Raw:
        number, (width, height), pixel_bits = pages[k]
        check_size(width, height)
        needed = width * height * pixel_bits // 8
        check_bytes(needed)
        with _opencv("TIFF", needed):
            done, images = cv2.imreadmulti(str(path), number, 1, flags=cv2.IMREAD_UNCHANGED)
        if not done:
            raise damaged("TIFF")
        return _rgb(images[0])

    return ImageFile(len(pages), size, lambda: read, along_z=True)


@contextmanager
def _opencv(kind: str, needed: int) -> Iterator[None]:
    """What OpenCV refuses becomes an ImageError, and is not printed as well."""
    before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        with bounded_memory(needed):
            yield
    except cv2.error as error:
        raise damaged(kind) from error
    finally:
        cv2.utils.logging.setLogLevel(before)


def _rgb(image: Raw) -> Raw:
    """OpenCV's grey, BGR or BGRA -> grey or RGB."""
    if image.ndim == 2:
        return image
    check_channels(image.shape[2])
    return image[..., 2::-1] if image.shape[2] > 1 else image


def _picture_size(data: bytes, kind: str) -> tuple[int, int]:
    """(width, height) from the header; struct.error or IndexError where it is cut off."""
    if kind == "PNG":
        width, height = struct.unpack_from(">II", data, 16)
    elif kind == "BMP":
        width, height = struct.unpack_from("<ii", data, 18)
        height = abs(height)  # negative where the rows run downwards
    else:
        at = 2
        while data[at + 1] not in _START_OF_FRAME:
            at += 1 if data[at + 1] == 0xFF else 2 + struct.unpack_from(">H", data, at + 2)[0]
        height, width = struct.unpack_from(">HH", data, at + 5)
    return width, height


def _has_end(data: bytes, kind: str) -> bool:
    """Whether the data goes to its end mark."""
    if kind == "JPEG":  # neither mark can occur within the compressed pixels
        return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
    if kind == "PNG":
        at = 8
        while at + 12 <= len(data):
            if data[at + 4 : at + 8] == b"IEND":
                return True
            at += 12 + int.from_bytes(data[at : at + 4], "big")
        return False
    return True  # BMP: OpenCV refuses


def _tiff_pages(path: Path) -> Iterator[tuple[int, tuple[int, int], int]]:
    """Number, (width, height) and bits a pixel of each page but the smaller copies in a pyramid."""
    with path.open("rb") as file:
        head = file.read(16)
        order = "<" if head.startswith(b"II") else ">"
        big = b"+" in head[2:4]  # BigTIFF
        codes = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
        counter, entry, pointer = (struct.Struct(order + code) for code in codes)
        (offset,) = pointer.unpack_from(head, 8 if big else 4)
        seen: set[int] = set()
        while offset and offset not in seen and len(seen) <= MAX_FRAMES:
            seen.add(offset)
            file.seek(offset)
            (count,) = counter.unpack(file.read(counter.size))
            tags = {_SUBFILE: 0, _WIDTH: 0, _HEIGHT: 0, _BITS: 1, _SAMPLES: 1}
            for _ in range(count):
                tag, kind, number, value = entry.unpack(file.read(entry.size))
                if tag not in tags:
                    continue
                code = struct.Struct(order + {4: "I", 16: "Q"}.get(kind, "H"))
                if number * code.size > len(value):  # what stands here is where the values stand
                    back = file.tell()
                    file.seek(*pointer.unpack(value))
                    value = file.read(code.size)
                    file.seek(back)
                (tags[tag],) = code.unpack_from(value)
            if not tags[_SUBFILE] & 1:
                yield len(seen) - 1, (tags[_WIDTH], tags[_HEIGHT]), tags[_BITS] * tags[_SAMPLES]
            (offset,) = pointer.unpack(file.read(pointer.size))
