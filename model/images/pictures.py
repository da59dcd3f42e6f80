"""PNG, JPEG, BMP and TIFF, through OpenCV; what they say about resolution is not trusted.

OpenCV makes up what is missing at the end of a file, and makes room for whatever a header claims:
size and end are looked at here, before it reads.
"""

import mmap
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

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
    damaged,
)

_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG markers
_MOST_ENTRIES = 2**12  # of a TIFF directory, as in libtiff
_LARGEST_ARRAY = 2**31 - 1  # bytes of an array that OpenCV takes
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _SAMPLES = 254, 256, 257, 258, 277  # TIFF tags


def open_picture(path: Path, kind: str, budget: MemoryBudget) -> ImageFile:
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
        with _opencv(kind, 8 * size[0] * size[1], budget):  # as stored, whatever EXIF's orientation
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
            if image is None:
                raise damaged(kind)
            return _rgb(image)

    return ImageFile(1, size, lambda: read)


def open_tiff(path: Path, budget: MemoryBudget) -> ImageFile:
    """A TIFF file; its pages may differ in size."""
    try:
        pages = list(_tiff_pages(path))
        size = pages[0].size
    except (struct.error, IndexError, ValueError) as error:
        raise damaged("TIFF") from error

    def read(k: int) -> Raw:
        page = pages[k]
        check_size(*page.size)
        needed = page.size[0] * page.size[1] * page.pixel_bits // 8
        check_bytes(needed)
        decode = _page_decoder(path, page)
        with _opencv("TIFF", needed, budget):
            images = decode()
            if not images:
                raise damaged("TIFF")
            return _rgb(images[0])

    return ImageFile(len(pages), size, lambda: read, along_z=True)


@contextmanager
def _opencv(kind: str, needed: int, budget: MemoryBudget) -> Iterator[None]:
    """What OpenCV refuses becomes an ImageError, and is not printed as well."""
    with budget.limit_growth(needed):
        before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            yield
        except (cv2.error, MemoryError) as error:
            raise damaged(kind) from error
        finally:
            cv2.utils.logging.setLogLevel(before)


def _rgb(image: Raw) -> Raw:
    """OpenCV's grey, BGR or BGRA -> grey or RGB."""
    if image.ndim == 2:
        return image
    check_channels(image.shape[2])
    if image.shape[2] == 1:
        return image
    rgb = np.empty((*image.shape[:2], 3), image.dtype)
    cv2.mixChannels([image], [rgb], [0, 2, 1, 1, 2, 0])  # 8 times as fast as image[..., 2::-1]
    return rgb


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


@dataclass(frozen=True)
class _Page:
    """One of a TIFF file: its directory's number and place in the file, (width, height), bits."""

    number: int
    place: int
    size: tuple[int, int]
    pixel_bits: int


def _page_decoder(path: Path, page: _Page) -> Callable[[], Sequence[Raw]]:
    """What reads a page, and gives nothing where it cannot.

    OpenCV looks through all pages before the one that it is to read, an hour for a long loop. So it
    gets the file with this page as the first: mapped, so that only what it reads is in memory.
    """
    if path.stat().st_size > _LARGEST_ARRAY:
        return lambda: cv2.imreadmulti(str(path), page.number, 1, flags=cv2.IMREAD_UNCHANGED)[1]
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    pointer, _, _, at = _layout(data[:4])
    pointer.pack_into(data, at, page.place)
    array = np.frombuffer(data, np.uint8)

    def decode() -> Sequence[Raw]:
        image = cv2.imdecode(array, cv2.IMREAD_UNCHANGED)
        return () if image is None else (image,)

    return decode


def _layout(magic: bytes) -> tuple[struct.Struct, struct.Struct, str, int]:
    """A TIFF file's pointers and counters, its order of bytes, where the first pointer stands."""
    order = "<" if magic.startswith(b"II") else ">"
    big = b"+" in magic[2:4]  # BigTIFF
    pointer, counter = ("Q", "Q") if big else ("I", "H")
    return struct.Struct(order + pointer), struct.Struct(order + counter), order, 8 if big else 4


def _tiff_pages(path: Path) -> Iterator[_Page]:
    """All pages but the smaller copies in a pyramid."""
    with path.open("rb") as file:
        head = file.read(16)
        pointer, counter, order, at = _layout(head)
        entry = struct.Struct(f"{order}HH{pointer.format[1:]}{pointer.size}s")
        (offset,) = pointer.unpack_from(head, at)
        seen: set[int] = set()
        while offset and offset not in seen and len(seen) <= MAX_FRAMES:
            seen.add(offset)
            file.seek(offset)
            (count,) = counter.unpack(file.read(counter.size))
            if count > _MOST_ENTRIES:
                raise ValueError
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
                size = tags[_WIDTH], tags[_HEIGHT]
                yield _Page(len(seen) - 1, offset, size, tags[_BITS] * tags[_SAMPLES])
            (offset,) = pointer.unpack(file.read(pointer.size))
