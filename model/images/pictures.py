"""PNG, JPEG, BMP and TIFF, through OpenCV. Their resolution is not trusted.

OpenCV fills in what is missing at the end of a file, and allocates whatever a header claims. So the
size and the end of the data are checked here before OpenCV reads.
"""

import mmap
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from model.images.formats import find_jpeg_frame
from model.images.limits import (
    MAX_BYTES,
    MAX_FRAMES,
    ImageError,
    ImageFile,
    MemoryBudget,
    Raw,
    check_bytes,
    check_channels,
    check_size,
    damaged_error,
)

_MAX_TIFF_ENTRIES = 2**12  # in a directory; the same limit as libtiff's
_MAX_ARRAY_BYTES = 2**31 - 1  # the largest array that OpenCV accepts
_SUBFILE_TYPE, _WIDTH, _HEIGHT, _BITS_PER_SAMPLE, _SAMPLES = 254, 256, 257, 258, 277  # TIFF tags


def open_picture(path: Path, kind: str, budget: MemoryBudget) -> ImageFile:
    """A PNG, JPEG or BMP file."""
    if path.stat().st_size > 1.1 * MAX_BYTES:
        raise damaged_error(kind)  # no image within the limits takes that much
    data = path.read_bytes()
    size = _picture_size(data, kind)
    check_size(*size)
    if not _has_end(data, kind):
        raise ImageError(f"the {kind} data is truncated: its end mark is missing")

    def read(_: int) -> Raw:
        with _guard_opencv(kind, 8 * size[0] * size[1], budget):
            # UNCHANGED: pixels as stored, whatever orientation EXIF claims
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
            if image is None:
                raise damaged_error(kind)
            return _to_rgb(image)

    return ImageFile(1, size, lambda: read)


def open_tiff(path: Path, budget: MemoryBudget) -> ImageFile:
    """A TIFF file; its pages may differ in size."""
    try:
        pages = list(_tiff_pages(path))
        size = pages[0].size
    except (struct.error, IndexError, ValueError) as error:
        raise damaged_error("TIFF") from error

    def read(k: int) -> Raw:
        page = pages[k]
        check_size(*page.size)
        needed = page.size[0] * page.size[1] * page.pixel_bits // 8
        check_bytes(needed)
        decode = _page_decoder(path, page)
        with _guard_opencv("TIFF", needed, budget):
            images = decode()
            if not images:
                raise damaged_error("TIFF")
            return _to_rgb(images[0])

    return ImageFile(len(pages), size, lambda: read, along_z=True)


@contextmanager
def _guard_opencv(kind: str, needed: int, budget: MemoryBudget) -> Iterator[None]:
    """Limit the memory of the block. OpenCV's errors become ImageErrors, and are not printed.

    Args:
        needed: bytes of the pixels.
    """
    with budget.limit_growth(needed):
        before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            yield
        except (cv2.error, MemoryError) as error:
            raise damaged_error(kind) from error
        finally:
            cv2.utils.logging.setLogLevel(before)


def _to_rgb(image: Raw) -> Raw:
    """OpenCV's grey, BGR or BGRA -> grey or RGB."""
    if image.ndim == 2:
        return image
    check_channels(image.shape[2])
    if image.shape[2] == 1:
        return image
    rgb = np.empty((*image.shape[:2], 3), image.dtype)
    cv2.mixChannels([image], [rgb], [0, 2, 1, 1, 2, 0])  # 8 times as fast as image[..., 2::-1]
    return rgb


# ---- Headers of PNG, JPEG and BMP


def _picture_size(data: bytes, kind: str) -> tuple[int, int]:
    """(width, height) in px from the header.

    Raises:
        ImageError: the data ends within the header.
    """
    try:
        if kind == "PNG":
            width, height = struct.unpack_from(">II", data, 16)
        elif kind == "BMP":
            width, height = struct.unpack_from("<ii", data, 18)
            height = abs(height)  # negative where the rows run downwards
        else:
            at = find_jpeg_frame(data)
            if at is None:
                raise damaged_error(kind)
            height, width = struct.unpack_from(">HH", data, at + 5)
    except struct.error as error:
        raise damaged_error(kind) from error
    return width, height


def _has_end(data: bytes, kind: str) -> bool:
    """Whether the data includes its end mark."""
    if kind == "JPEG":  # neither mark can occur within the compressed pixels
        return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
    if kind == "PNG":
        at = 8
        while at + 12 <= len(data):
            if data[at + 4 : at + 8] == b"IEND":
                return True
            at += 12 + int.from_bytes(data[at : at + 4], "big")
        return False
    return True  # OpenCV itself refuses a BMP that is cut off


# ---- Pages of TIFF


class _TiffLayout(NamedTuple):
    """How a TIFF file writes its numbers.

    Args:
        pointer: an offset in the file; counter: a number of entries.
        byte_order: in the notation of struct.
        first_pointer: where the pointer to the first directory stands.
    """

    pointer: struct.Struct
    counter: struct.Struct
    byte_order: str
    first_pointer: int


@dataclass(frozen=True)
class _TiffPage:
    """One page of a TIFF file.

    Args:
        number: its directory's number, counted from 0 over all directories.
        offset: where its directory stands in the file.
        size: (width, height) in px.
    """

    number: int
    offset: int
    size: tuple[int, int]
    pixel_bits: int


def _page_decoder(path: Path, page: _TiffPage) -> Callable[[], Sequence[Raw]]:
    """A function that decodes the page; it returns nothing if OpenCV cannot.

    OpenCV looks through all pages before the one that it is to read, which takes an hour for a long
    stack. So it gets the file with this page as the first one. The file is mapped: only the parts
    that OpenCV reads are in memory.
    """
    if path.stat().st_size > _MAX_ARRAY_BYTES:
        return lambda: cv2.imreadmulti(str(path), page.number, 1, flags=cv2.IMREAD_UNCHANGED)[1]
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    layout = _tiff_layout(data[:4])
    layout.pointer.pack_into(data, layout.first_pointer, page.offset)
    array = np.frombuffer(data, np.uint8)

    def decode() -> Sequence[Raw]:
        image = cv2.imdecode(array, cv2.IMREAD_UNCHANGED)
        return () if image is None else (image,)

    return decode


def _tiff_layout(magic: bytes) -> _TiffLayout:
    """The layout that the first 4 bytes tell."""
    order = "<" if magic.startswith(b"II") else ">"
    is_big = b"+" in magic[2:4]  # BigTIFF
    pointer, counter = ("Q", "Q") if is_big else ("I", "H")
    return _TiffLayout(
        struct.Struct(order + pointer), struct.Struct(order + counter), order, 8 if is_big else 4
    )


def _tiff_pages(path: Path) -> Iterator[_TiffPage]:
    """All pages except the smaller copies in a pyramid.

    Raises:
        struct.error, ValueError: the file is cut off, or a directory is too long to be real.
    """
    with path.open("rb") as file:
        head = file.read(16)
        pointer, counter, order, first_pointer = _tiff_layout(head)
        entry = struct.Struct(f"{order}HH{pointer.format[1:]}{pointer.size}s")
        (offset,) = pointer.unpack_from(head, first_pointer)
        seen: set[int] = set()
        while offset and offset not in seen and len(seen) <= MAX_FRAMES:
            seen.add(offset)
            file.seek(offset)
            (count,) = counter.unpack(file.read(counter.size))
            if count > _MAX_TIFF_ENTRIES:
                raise ValueError(f"a directory of {count} entries")
            tags = {_SUBFILE_TYPE: 0, _WIDTH: 0, _HEIGHT: 0, _BITS_PER_SAMPLE: 1, _SAMPLES: 1}
            for _ in range(count):
                tag, kind, number, value = entry.unpack(file.read(entry.size))
                if tag not in tags:
                    continue
                code = struct.Struct(order + {4: "I", 16: "Q"}.get(kind, "H"))
                if number * code.size > len(value):  # then the entry holds the values' offset
                    next_entry = file.tell()
                    file.seek(*pointer.unpack(value))
                    value = file.read(code.size)
                    file.seek(next_entry)
                (tags[tag],) = code.unpack_from(value)
            if not tags[_SUBFILE_TYPE] & 1:  # bit 0 marks a smaller copy of another page
                size = tags[_WIDTH], tags[_HEIGHT]
                pixel_bits = tags[_BITS_PER_SAMPLE] * tags[_SAMPLES]
                yield _TiffPage(len(seen) - 1, offset, size, pixel_bits)
            (offset,) = pointer.unpack(file.read(pointer.size))
