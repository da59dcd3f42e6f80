"""PNG, JPEG and BMP. Their resolution is not trusted.

OpenCV reads PNG and BMP, jpeg.py reads JPEG. OpenCV allocates whatever a header claims, and takes
some kinds of file for others. So the headers are read here first, and the size is checked.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from model.images.jpeg import decode_jpeg, read_jpeg_header
from model.images.limits import (
    MAX_BYTES,
    UPRIGHT,
    ImageError,
    ImageFile,
    Raw,
    check_channels,
    check_size,
    damaged_error,
    turn_upright,
)

Size = tuple[int, int]  # (width, height) in px
# Size as stored, orientation by EXIF, warnings, and a function that decodes the pixels
Header = tuple[Size, int, tuple[str, ...], Callable[[], Raw]]

_ORIENTATION, _SHORT = 274, 3  # a tag of EXIF, and its type
_MAX_EXIF_BYTES = 2**17  # that are unpacked; a JPEG can hold half of it
_MAX_CHUNKS = 2**18  # of a PNG
_ANIMATED = "the file is an animation: only its still image is read"


def open_picture(path: Path, kind: str) -> ImageFile:
    """A PNG, JPEG or BMP file, upright as viewers show it.

    Raises:
        ImageError: its header is damaged, or tells of something that cannot be read.
    """
    if path.stat().st_size > 1.1 * MAX_BYTES:
        raise damaged_error(kind)  # no image within the limits takes that much
    data = path.read_bytes()
    read_header = {"PNG": _read_png_header, "JPEG": _read_jpeg_header, "BMP": _read_bmp_header}
    try:
        (width, height), orientation, warnings, decode = read_header[kind](data)
    except (struct.error, IndexError) as error:  # the data ends within the header
        raise damaged_error(kind) from error
    check_size(width, height)

    def read(_: int) -> Raw:
        try:
            pixels = decode()
        except MemoryError as error:
            raise ImageError("there is not enough memory for the image") from error
        if pixels.shape[:2] != (height, width):
            raise damaged_error(kind)
        return turn_upright(pixels, orientation)

    size = (height, width) if orientation >= 5 else (width, height)
    if orientation > 1:
        warnings = (*warnings, UPRIGHT)
    return ImageFile(1, size, read, needed=8 * width * height, warnings=warnings)


def _read_jpeg_header(data: bytes) -> Header:
    frame, exif = read_jpeg_header(data)
    return frame.size, _orientation(exif), (), lambda: decode_jpeg(data)


def _decode_by_opencv(data: bytes, kind: str) -> Raw:
    """(H, W) grey, or (H, W, 3 or 4) in the order BGR, BGRA."""
    # it would print to stderr; the level is that of all threads, and is never set back
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise damaged_error(kind) from error
    if image is None:
        raise damaged_error(kind)
    return image


def _to_rgb(image: Raw, has_alpha: bool = True) -> Raw:
    """OpenCV's grey, BGR or BGRA -> grey or RGB; what is transparent shows black behind it.

    Args:
        has_alpha: whether a fourth channel is alpha; else it has no meaning.
    """
    if image.ndim == 2:
        return image
    check_channels(image.shape[2])
    rgb = np.empty((*image.shape[:2], 3), image.dtype)
    cv2.mixChannels([image], [rgb], [0, 2, 1, 1, 2, 0])  # 8 times as fast as image[..., 2::-1]
    if image.shape[2] == 4 and has_alpha:
        alpha, opaque = image[..., 3], np.iinfo(image.dtype).max
        if not alpha.any():
            raise ImageError("the image is fully transparent: save it without transparency")
        if alpha.min() < opaque:
            for k in range(3):
                rgb[..., k] = cv2.multiply(rgb[..., k], alpha, scale=1 / opaque)
    return rgb


# ---- PNG


def _read_png_header(data: bytes) -> Header:
    """OpenCV gets the still image alone: no remarks, and no animation."""
    needed: list[bytes | memoryview] = [data[:8]]
    warnings: tuple[str, ...] = ()
    grey_key: int | None = None
    orientation, kind = 1, b""
    for kind, chunk in _png_chunks(data):
        if kind == b"CgBI":
            raise ImageError(
                "the image is a PNG of Apple's own kind (CgBI), which cannot be read: save it "
                "again as an ordinary PNG"
            )
        if not _is_intact(chunk):
            if kind[:1].isupper():  # a chunk that the image needs
                raise damaged_error("PNG")
            continue
        if kind[:1].isupper() or kind == b"tRNS":
            needed.append(chunk)
        if kind in (b"eXIf", b"tEXt", b"zTXt") and orientation == 1:
            orientation = _orientation(_exif_of_png(kind, bytes(chunk[8:-4])))
        elif kind == b"acTL":
            warnings = (_ANIMATED,)
        elif kind == b"tRNS" and data[25] == 0:  # OpenCV ignores which grey level is transparent
            grey_key = int.from_bytes(chunk[8:10], "big")
    if kind != b"IEND":
        raise ImageError("the PNG data is truncated: its end mark is missing")
    width, height, bits = struct.unpack_from(">IIB", data, 16)

    def decode() -> Raw:
        pixels = _to_rgb(_decode_by_opencv(b"".join(needed), "PNG"))
        if grey_key is not None:
            pixels[pixels == grey_key * (255 // (2**bits - 1) if bits < 8 else 1)] = 0
        return pixels

    return (width, height), orientation, warnings, decode


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """(type, chunk with length, type and checksum) up to IEND or to the end of the data."""
    at, view = 8, memoryview(data)
    for _ in range(_MAX_CHUNKS):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            return
        yield kind, view[at:end]
        if kind == b"IEND":
            return
        at = end


def _is_intact(chunk: memoryview) -> bool:
    """Whether a chunk has the right checksum."""
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _exif_of_png(kind: bytes, value: bytes) -> bytes:
    """EXIF data in a chunk, as it is or as ImageMagick writes it into text; it may be empty."""
    if kind == b"eXIf":
        return value
    keyword, _, text = value.partition(b"\0")
    if keyword not in (b"Raw profile type exif", b"Raw profile type APP1"):
        return b""
    try:
        if kind == b"zTXt":
            text = zlib.decompressobj().decompress(text[1:], _MAX_EXIF_BYTES)
        return bytes.fromhex(b"".join(text.split()[2:]).decode())  # after a name and a length
    except (zlib.error, ValueError):
        return b""


# ---- BMP

_OFFSET_OF_PIXELS, _HEADER_BYTES = 10, 14  # where their numbers stand
_BITFIELDS = 3
_BGR_MASKS = (0xFF0000, 0xFF00, 0xFF)
_RGB_MASKS = _BGR_MASKS[::-1]
_MASKS_OF_16_BITS = (0x7C00, 0x3E0, 0x1F), (0xF800, 0x7E0, 0x1F)


def _read_bmp_header(data: bytes) -> Header:
    """
    Raises:
        ImageError: OpenCV would not read this kind of BMP, or would mix up its colours.
    """
    pixels_at, header_bytes = struct.unpack_from("<II", data, _OFFSET_OF_PIXELS)
    width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    if header_bytes in (12, 16) or (header_bytes == 64 and compression >= _BITFIELDS):
        raise _unreadable_bmp(f"of OS/2, with a header of {header_bytes} bytes")
    has_alpha = False
    if compression == _BITFIELDS:
        *masks, alpha_mask = struct.unpack_from("<4I", data, 54)
        is_long = header_bytes >= 56  # then the masks are a part of it, with that of alpha
        known = {32: (_BGR_MASKS, _RGB_MASKS) if is_long else (_BGR_MASKS,)}
        if not is_long:
            known[16] = _MASKS_OF_16_BITS
        if tuple(masks) not in known.get(bits, ()):
            raise _unreadable_bmp("with an unusual layout of its colours (bit masks)")
        has_alpha = is_long and alpha_mask > 0
    if pixels_at < 14 + header_bytes:  # OpenCV would take the header for pixels
        raise damaged_error("BMP")

    def decode() -> Raw:
        image = _decode_by_opencv(data, "BMP")
        # writers that know nothing of alpha leave it 0
        return _to_rgb(image, has_alpha and bool(image[..., 3:].any()))

    return (width, abs(height)), 1, (), decode  # rows run downwards if the height is negative


def _unreadable_bmp(what: str) -> ImageError:
    return ImageError(f"the image is a BMP {what}, which cannot be read: save it as .png")


# ---- EXIF


def _orientation(exif: bytes) -> int:
    """The orientation tag, 1 to 8; 1 also if there is none or the data is damaged."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, at)
        for k in range(count):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, at + 2 + 12 * k)
            if (tag, kind) == (_ORIENTATION, _SHORT):
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
