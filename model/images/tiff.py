"""TIFF. tifffile reads the structure of a file; its strips and tiles are unpacked and checked here.

libtiff and tifffile fill in what is missing or damaged. Here a strip or tile holds all its bytes,
or the page is refused. A file's resolution is not trusted.
"""

import logging
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from tifffile import COMPRESSION, PHOTOMETRIC, TiffFile, TiffPage

from model.images.grey import over_black
from model.images.jpeg import decode_jpeg, find_jpeg_frame
from model.images.limits import (
    MAX_BYTES,
    MAX_FRAMES,
    UPRIGHT,
    ImageError,
    ImageFile,
    Raw,
    check_bytes,
    check_size,
    damaged_error,
    errors_as_damage,
    turn_upright,
)

logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # its guesses are checked here

# The tags that pixels depend on. tifffile leaves out a tag that is damaged.
_ORIENTATION, _PHOTOMETRIC, _COLOUR_MAP, _NODATA = 274, 262, 320, 42113
_OFFSETS, _LENGTHS = {273, 324}, {279, 325}  # of strips, of tiles
_NEEDED_TAGS = {
    *(254, 255, 256, 257, 258, 259, 266, 277, 278, 284, 317, 322, 323, 338, 339, 347, 32997),
    *(529, 530, 532, _ORIENTATION, _PHOTOMETRIC, _COLOUR_MAP, _NODATA, *_OFFSETS, *_LENGTHS),
}
_COPY, _MASK = 0b001, 0b100  # bits of NewSubfileType: a smaller copy of a page; its transparency

_LZW, _PACKBITS, _JPEG, _DEFLATE = 5, 32773, 7, (8, 32946)
_COMPRESSIONS = {1, _LZW, _PACKBITS, _JPEG, *_DEFLATE}
_COMPRESSION_NAMES = {
    **dict.fromkeys((2, 3, 4, 32771), "fax (CCITT)"),
    **dict.fromkeys((33003, 33004, 33005, 34712), "JPEG 2000"),
    6: "JPEG of the old style",
}
# What unpacks to one byte, to be put before the packed data
_PACKED_BYTE = {_LZW: b"\x80\x40\x20\x10\x08\x04\x02\0\0", _PACKBITS: b"\0\0"}

_WHITE_IS_0, _BLACK_IS_0, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6  # photometric interpretations
_COLOURS = {_WHITE_IS_0: 1, _BLACK_IS_0: 1, _RGB: 3, _PALETTE: 1, _YCBCR: 3}
_COLOUR_NAMES = {5: "CMYK"}
_WEIGHTS, _SUBSAMPLING, _SCALES = 529, 530, 532  # of YCbCr
_PLAIN_SCALES = (0, 1, 255, 1, *(128, 1, 255, 1) * 2)  # fractions
_UNSIGNED, _SIGNED, _FLOAT, _UNDEFINED = 1, 2, 3, 4  # sample formats
_KINDS = {_UNSIGNED: "u", _SIGNED: "i", _FLOAT: "f", _UNDEFINED: "u"}
_BITS = {"u": {*range(1, 17), 32, 64}, "i": {8, 16, 32, 64}, "f": {16, 32, 64}}
_HORIZONTAL, _FLOATING_POINT = 2, 3  # predictors
_ASSOCIATED_NOT = 2  # an extra sample: transparency that the colours do not include yet
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def open_tiff(path: Path) -> ImageFile:
    """A TIFF file; its pages may differ in size. Smaller copies and masks of pages are left out.

    Raises:
        ImageError: the directories are damaged, or none of them is of a whole image.
    """
    offsets, turned, needed = list[int](), False, 0
    size: tuple[int, int] | None = None
    with _open(path) as tiff:
        for offset in _page_offsets(tiff):
            try:
                page = _page_at(tiff, offset)
            except Exception:  # reading this page will say that it is damaged
                offsets.append(offset)
                continue
            if page.subfiletype & (_COPY | _MASK):
                continue
            offsets.append(offset)
            turned |= _orientation(page) != 1
            needed = max(needed, _bytes_of(page))
            if size is None:
                size = page.imagewidth, page.imagelength
                size = size[::-1] if _orientation(page) > 4 else size
        if size is None and offsets:
            raise damaged_error("TIFF")
        if size is None:
            raise ImageError("the TIFF file holds only smaller copies or masks of an image")
        is_alone = offsets == [tiff.pages.first.offset]
        count, step = _frames_of_imagej(tiff) if is_alone else (len(offsets), 0)

    def read(k: int) -> Raw:
        with _open(path) as tiff:
            page = _page_at(tiff, offsets[0] if step else offsets[k])
            return _read_page(tiff, page, k * step)

    warnings = (UPRIGHT,) if turned else ()
    return ImageFile(count, size, read, min(needed, MAX_BYTES), along_z=True, warnings=warnings)


# ---- Structure


@contextmanager
def _open(path: Path) -> Iterator[TiffFile]:
    """The file for the block, in which errors of any kind mean that it is damaged."""
    with errors_as_damage("TIFF"), TiffFile(path) as tiff:
        yield tiff


def _page_offsets(tiff: TiffFile) -> Iterator[int]:
    """Where the directories stand in the file; at most MAX_FRAMES + 1 of them."""
    offset, seen, form = tiff.pages.first.offset, set[int](), tiff.tiff
    while offset and len(seen) <= MAX_FRAMES:
        if offset in seen:
            raise damaged_error("TIFF")
        seen.add(offset)
        yield offset
        tiff.filehandle.seek(offset)
        (count,) = struct.unpack(form.tagnoformat, tiff.filehandle.read(form.tagnosize))
        tiff.filehandle.seek(offset + form.tagnosize + count * form.tagsize)
        (offset,) = struct.unpack(form.offsetformat, tiff.filehandle.read(form.offsetsize))


def _page_at(tiff: TiffFile, offset: int) -> TiffPage:
    """The page of the directory there."""
    file, form = tiff.filehandle, tiff.tiff
    file.seek(offset)
    page = TiffPage(tiff, index=0)
    file.seek(offset)
    (count,) = struct.unpack(form.tagnoformat, file.read(form.tagnosize))
    entries = struct.iter_unpack(
        f"{form.byteorder}H{form.tagsize - 2}x", file.read(count * form.tagsize)
    )
    if _NEEDED_TAGS & {code for (code,) in entries} - {tag.code for tag in page.tags}:
        raise damaged_error("TIFF")
    return page


def _bytes_of(page: TiffPage) -> int:
    value_bytes = math.ceil(np.max(page.bitspersample) / 8)
    return int(page.imagewidth * page.imagelength * page.samplesperpixel * value_bytes)


def _orientation(page: TiffPage) -> int:
    value = page.tags.valueof(_ORIENTATION)
    return int(value) if value in range(1, 9) else 1


def _frames_of_imagej(tiff: TiffFile) -> tuple[int, int]:
    """The number of frames under the only directory, and the bytes from one to the next.

    ImageJ and others write the frames behind each other, and a directory for the first only.
    """
    page, metadata = tiff.pages.first, tiff.imagej_metadata or {}
    count, step = metadata.get("images"), page.nbytes
    if not isinstance(count, int) or count < 2 or not page.is_contiguous:
        return 1, 0
    are_there = page.dataoffsets[0] + count * step <= tiff.filehandle.size
    return (count, step) if are_there else (1, 0)


# ---- One page


def _read_page(tiff: TiffFile, page: TiffPage, shift: int) -> Raw:
    """The page's pixels, upright.

    Args:
        shift: bytes from the strips that the directory names to those that are read.
    """
    check_size(page.imagewidth, page.imagelength)
    photometric, count = _photometric(page), page.samplesperpixel
    colours = _COLOURS[photometric]
    if count - colours not in (0, 1):
        raise ImageError(
            f"a pixel has {count} values: expected grey (1) or RGB (3), and one for transparency"
        )
    dtype = _sample_type(page)
    check_bytes(page.imagewidth * page.imagelength * count * dtype.itemsize)
    samples = _read_samples(tiff, page, dtype, shift)
    pixels = samples[..., :colours]
    padding = _padding(page, pixels)
    largest = 2**page.bitspersample - 1  # of unsigned values
    if pixels.dtype == np.uint64:  # a float is exact only near 0
        largest = int(pixels.max())
    if photometric == _PALETTE:
        pixels = _colour_map(page)[pixels[..., 0]]
    elif photometric == _YCBCR and not _is_rgb_of_jpeg(page):
        pixels = _rgb_from_ycbcr(pixels)
    elif photometric == _WHITE_IS_0:
        pixels = (0.0 if dtype.kind == "f" else -1 if dtype.kind == "i" else largest) - pixels
    if count > colours and _ASSOCIATED_NOT in np.atleast_1d(page.extrasamples):
        pixels = over_black(pixels, samples[..., colours:], largest)
    if photometric != _PALETTE:
        pixels = _scaled(pixels, page.bitspersample)
    if pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if padding.any():
        pixels = np.ma.MaskedArray(pixels, np.broadcast_to(padding.T, pixels.T.shape).T)
    return turn_upright(pixels, _orientation(page))


def _photometric(page: TiffPage) -> int:
    """What the values mean.

    Raises:
        ImageError: they cannot be read as grey, RGB or a palette.
    """
    if page.compression not in _COMPRESSIONS:
        number = page.compression
        known = COMPRESSION(number).name if number in {*COMPRESSION} else f"method {number}"
        raise ImageError(
            f"the TIFF is compressed by {_COMPRESSION_NAMES.get(number, known)}, which cannot be "
            "read: save it without compression, or with LZW or deflate, or as .png"
        )
    if page.imagedepth != 1:
        raise ImageError(
            f"a page of the TIFF has {page.imagedepth} slices: save each of them as a page"
        )
    if _PHOTOMETRIC not in page.tags:
        return _RGB if page.samplesperpixel > 2 else _BLACK_IS_0
    number = int(page.photometric)
    name = PHOTOMETRIC(number).name if number in {*PHOTOMETRIC} else f"kind {number}"
    if number not in _COLOURS:
        raise ImageError(
            f"the TIFF has colours of the kind {_COLOUR_NAMES.get(number, name)}, which cannot be "
            "read: save it in grey or RGB"
        )
    if number == _YCBCR and not _is_rgb_of_jpeg(page) and not _is_plain_ycbcr(page):
        raise ImageError(
            "the TIFF has YCbCr colours that are subsampled or scaled, which cannot be read: "
            "save it in grey or RGB"
        )
    if page.compression == _JPEG and page.planarconfig == 1 and page.samplesperpixel in (2, 4):
        raise ImageError(
            "the TIFF has transparency within JPEG, which cannot be read: "
            "save it without transparency, or as .png"
        )
    return number


def _is_rgb_of_jpeg(page: TiffPage) -> bool:
    """Whether the JPEG decoder has turned YCbCr into RGB."""
    return page.compression == _JPEG and page.planarconfig == 1


def _is_plain_ycbcr(page: TiffPage) -> bool:
    """Whether a pixel has its own Y, Cb and Cr of 8 bits, scaled as in JPEG."""
    scales = np.reshape(page.tags.valueof(_SCALES, _PLAIN_SCALES), (6, 2))
    plain = np.array_equal(scales[:, 0], np.array(_PLAIN_SCALES)[::2] * scales[:, 1])
    subsampled = tuple(page.tags.valueof(_SUBSAMPLING, (2, 2))) != (1, 1)
    return page.bitspersample == 8 and plain and not subsampled and _WEIGHTS not in page.tags


def _sample_type(page: TiffPage) -> np.dtype[Any]:
    """The smallest type, in this machine's byte order, for a value as it is stored."""
    bits: Any = page.bitspersample
    kind = _KINDS.get(page.sampleformat)
    if kind is None or bits not in _BITS[kind]:
        raise ImageError(
            f"the values in the TIFF have {bits} bits and the sample format {page.sampleformat}: "
            "expected unsigned values of 1 to 16, 32 or 64 bits, signed ones of 8 to 64 bits, or "
            "floats of 16 to 64 bits"
        )
    return np.dtype(f"{kind}{next(n for n in (1, 2, 4, 8) if 8 * n >= bits)}")


def _colour_map(page: TiffPage) -> npt.NDArray[np.uint8]:
    """(entries, 3) RGB."""
    table = np.asarray(page.tags[_COLOUR_MAP].value).reshape(3, -1).T
    return (table >> 8 if table.max() > 255 else table).astype(np.uint8)


def _padding(page: TiffPage, pixels: Raw) -> npt.NDArray[np.bool_]:
    """(H, W): where all values are the one that GDAL marks the absence of data with."""
    try:
        value = float(page.tags.valueof(_NODATA, "x"))
    except ValueError:
        return np.zeros(pixels.shape[:2], np.bool_)
    if pixels.dtype.kind == "f":
        with np.errstate(over="ignore"):
            same = np.isnan(pixels) if math.isnan(value) else pixels == pixels.dtype.type(value)
    else:
        limits = np.iinfo(pixels.dtype)
        fits = limits.min <= value <= limits.max and value.is_integer()
        same = pixels == int(value) if fits else np.zeros(pixels.shape, np.bool_)
    return np.asarray(same.all(axis=-1))


def _scaled(pixels: Raw, bits: int) -> Raw:
    """Values of up to 8 bits fill 0..255, and those of up to 16 bits nearly fill 0..65535."""
    if pixels.dtype == np.uint8 and bits < 8:
        return np.asarray((pixels.astype(np.uint16) * 255 // (2**bits - 1)).astype(np.uint8))
    if pixels.dtype == np.uint16 and bits < 16:
        return np.asarray(pixels << (16 - bits))
    return pixels.astype(np.float32) if pixels.dtype == np.float16 else pixels


# ---- Strips and tiles


def _read_samples(tiff: TiffFile, page: TiffPage, dtype: np.dtype[Any], shift: int) -> Raw:
    """(H, W, samples) as they are stored, in this machine's byte order."""
    width, height, count = page.imagewidth, page.imagelength, page.samplesperpixel
    planes = count if page.planarconfig == 2 else 1
    rows, columns = min(page.rowsperstrip, height), width
    if page.is_tiled:
        rows, columns = page.tilelength, page.tilewidth
        check_bytes(rows * columns * count * dtype.itemsize)
    samples = np.empty((height, width, count), dtype)
    corners = product(
        np.split(samples, planes, axis=2), range(0, height, rows), range(0, width, columns)
    )
    for k, (plane, y, x) in enumerate(corners):
        part = plane[y : y + rows, x : x + columns]
        # a tile is whole even where it exceeds the image
        shape = (rows if page.is_tiled else len(part), columns, plane.shape[2])
        part[...] = _read_block(tiff, page, k, shift, shape, dtype)[: len(part), : part.shape[1]]
    return samples


def _read_block(
    tiff: TiffFile,
    page: TiffPage,
    k: int,
    shift: int,
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
) -> Raw:
    """The samples of the k-th strip or tile: at least `shape`."""
    row_bytes = math.ceil(shape[1] * shape[2] * page.bitspersample / 8)
    size = shape[0] * row_bytes
    offset, length = int(page.dataoffsets[k]) + shift, 0
    if k < len(page.databytecounts) and any(tag in page.tags for tag in _LENGTHS):
        length = int(page.databytecounts[k])  # else a guess of tifffile's
    if page.compression == 1:
        length = min(length or size, size)
    if min(offset, length) < 1 or offset + length > tiff.filehandle.size:
        raise damaged_error("TIFF")
    tiff.filehandle.seek(offset)
    packed = tiff.filehandle.read(length)
    if page.compression == _JPEG:
        return _decode_jpeg(page, packed, shape)
    if page.fillorder == 2:
        packed = packed.translate(_REVERSED_BITS)
    data: bytes | memoryview = packed
    if page.compression in _DEFLATE:
        data = zlib.decompressobj().decompress(packed, size + 1)  # past the end: the checksum
    elif page.compression != 1:
        data = _unpack_by_libtiff(page.compression, packed, shape[0], row_bytes)
    if len(data) < size:
        raise damaged_error("TIFF")
    stored = np.frombuffer(data, np.uint8, size).reshape(shape[0], row_bytes)
    return _to_samples(page, stored, shape, dtype)


def _decode_jpeg(page: TiffPage, data: bytes, shape: tuple[int, int, int]) -> Raw:
    """The samples of a strip or tile that is a JPEG, without its tables if the page has them."""
    if page.jpegtables:
        data = page.jpegtables.removesuffix(b"\xff\xd9") + data.removeprefix(b"\xff\xd8")
    frame = find_jpeg_frame(data)
    if frame is None or frame.size[0] != shape[1] or frame.size[1] < shape[0]:
        raise damaged_error("TIFF")
    check_bytes(frame.size[0] * frame.size[1] * len(frame.components))
    pixels = decode_jpeg(data, "RGB" if _photometric(page) == _RGB else "YCbCr")
    return pixels.reshape(*pixels.shape[:2], shape[2])


def _unpack_by_libtiff(
    compression: int, data: bytes, rows: int, row_bytes: int
) -> bytes | memoryview:
    """The bytes of a packed strip or tile; none if they are not complete.

    OpenCV gets them as grey values of 16 bits: at 8 bits it ignores libtiff's errors.
    """
    size = rows * row_bytes
    if size % 2:  # one more row makes it even
        data, rows = _PACKED_BYTE[compression] * row_bytes + data, rows + 1
    width, height = (row_bytes // 2, rows) if row_bytes % 2 == 0 else (row_bytes, rows // 2)
    values = _read_by_libtiff(data, width, height, {258: 16, 259: compression, 262: _BLACK_IS_0})
    return b"" if values is None else values.astype("<u2", copy=False).data.cast("B")[-size:]


def _rgb_from_ycbcr(samples: Raw) -> Raw:
    height, width, count = samples.shape
    tags = {258: 8, 259: 1, 262: _YCBCR, 277: count, _SUBSAMPLING: 0x10001}
    bgr = _read_by_libtiff(samples.tobytes(), width, height, tags)
    if bgr is None:
        raise damaged_error("TIFF")
    return bgr[..., ::-1]


def _read_by_libtiff(data: bytes, width: int, height: int, tags: dict[int, int]) -> Raw | None:
    """The image of one strip, as OpenCV returns it; None if it cannot be read."""
    tags = {256: width, 257: height, **tags, 273: 8, 278: height, 279: len(data)}
    entries = b"".join(
        struct.pack("<HHII", tag, *((3, 2) if tag == _SUBSAMPLING else (4, 1)), tags[tag])
        for tag in sorted(tags)
    )
    end = 8 + len(data) + len(data) % 2
    file = struct.pack("<2sHI", b"II", 42, end) + data.ljust(end - 8, b"\0")
    file += struct.pack("<H", len(tags)) + entries + bytes(4)
    before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        return cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        cv2.utils.logging.setLogLevel(before)


def _to_samples(
    page: TiffPage,
    stored: npt.NDArray[np.uint8],
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
) -> Raw:
    """Rows of bytes -> values, without the differences that a predictor made of them."""
    bits = page.bitspersample
    predictor = int(page.predictor) if page.compression in (_LZW, *_DEFLATE) else 1
    if predictor == _FLOATING_POINT and dtype.kind == "f":
        sums = stored.reshape(len(stored), -1, shape[2]).cumsum(axis=1, dtype=np.uint8)
        planes = sums.reshape(len(stored), dtype.itemsize, -1)
        values = np.ascontiguousarray(planes.swapaxes(1, 2)).view(dtype.newbyteorder(">"))
        return values.reshape(shape)
    if bits % 8 and predictor == 1:
        packed = np.empty((len(stored), shape[1] * shape[2]), dtype)
        weights = 1 << np.arange(bits)[::-1]
        for row, values in zip(packed, stored, strict=True):
            row[:] = np.unpackbits(values, count=row.size * bits).reshape(-1, bits) @ weights
        return packed.reshape(shape)
    if bits % 8 or predictor not in (1, _HORIZONTAL):
        raise ImageError(
            f"the TIFF has predictor {predictor} with values of {bits} bits, which cannot be read: "
            "save it without a predictor"
        )
    values = stored.view(dtype.newbyteorder(page.parent.tiff.byteorder)).reshape(shape)
    if predictor == 1:
        return values
    whole = np.dtype(f"u{dtype.itemsize}")
    return values.astype(dtype).view(whole).cumsum(axis=1, dtype=whole).view(dtype)
