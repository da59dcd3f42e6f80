"""DICOM: one image, or a loop whose frames are read one at a time.

SimpleITK reads DICOM with GDCM, which unpacks all frames of a file at once and does not pass on the
pixel size that an ultrasound machine writes. So the header is read here, and GDCM gets a small file
for each frame, with only those elements that describe pixels. A loop then takes the memory of one
frame, a damaged frame costs no other, and nothing that names a patient goes any further.

Values are as stored, after RescaleSlope and RescaleIntercept. WindowCenter is ignored: it says what
a viewer showed, and may cut values off.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, NamedTuple

import numpy as np

from model.anatomy import Floats
from model.frame import Pair
from model.images.formats import find_jpeg_frame
from model.images.limits import (
    MAX_BYTES,
    MAX_FRAMES,
    ImageError,
    ImageFile,
    Raw,
    check_bytes,
    damaged_error,
    is_pixel_size,
    unreadable_error,
)

# ---- Transfer syntaxes: how a file is encoded (PS3.5, annex A)

_SYNTAX_ROOT = "1.2.840.10008.1.2"
_DEFLATED = _SYNTAX_ROOT + ".1.99"
_RLE = _SYNTAX_ROOT + ".5"
_JPEG = {_SYNTAX_ROOT + f".4.{k}" for k in (50, 51, 57, 70, 80, 81, 90, 91)}
_UNREADABLE_SYNTAXES = {  # the start of the rest of their UIDs -> their name
    ".4.10": "video",
    ".4.11": "JPEG XL",
    ".4.20": "High-Throughput JPEG 2000",
    ".5": "RLE of colours with more than 8 bits",
}

# ---- Data elements by their keyword (PS3.6)

_TRANSFER_SYNTAX_UID = 0x00020010
_SOP_CLASS_UID = 0x00080016  # the kind of image
_INSTANCE_NUMBER = 0x00200013
_IMAGE_POSITION, _IMAGE_ORIENTATION = 0x00200032, 0x00200037

_SAMPLES_PER_PIXEL, _PHOTOMETRIC_INTERPRETATION = 0x00280002, 0x00280004
_PLANAR_CONFIGURATION, _NUMBER_OF_FRAMES = 0x00280006, 0x00280008
_ROWS, _COLUMNS = 0x00280010, 0x00280011
_BITS_ALLOCATED, _BITS_STORED, _HIGH_BIT = 0x00280100, 0x00280101, 0x00280102
_PIXEL_REPRESENTATION = 0x00280103  # signed or not
_RESCALE_INTERCEPT, _RESCALE_SLOPE = 0x00281052, 0x00281053
_PALETTE_DESCRIPTORS = 0x00281101, 0x00281102, 0x00281103  # red, green, blue
_PALETTES = 0x00281201, 0x00281202, 0x00281203
_PIXEL_DATA = 0x7FE00010

_SLICE_THICKNESS, _SPACING_BETWEEN_SLICES = 0x00180050, 0x00180088
_IMAGER_PIXEL_SPACING, _NOMINAL_SCANNED_PIXEL_SPACING = 0x00181164, 0x00182010
_PIXEL_SPACING, _PIXEL_ASPECT_RATIO = 0x00280030, 0x00280034
_SHARED_GROUPS, _PER_FRAME_GROUPS, _PIXEL_MEASURES = 0x52009229, 0x52009230, 0x00289110
_ULTRASOUND_REGIONS = 0x00186011
_REGION_UNITS, _REGION_DELTAS = (0x00186024, 0x00186026), (0x0018602C, 0x0018602E)  # x, y
_CENTIMETRES = 3  # among _REGION_UNITS

# What GDCM is told: what the pixels mean, and, apart from that, where they lie.
_ABOUT_PIXELS = {
    *(_SOP_CLASS_UID, _SAMPLES_PER_PIXEL, _PHOTOMETRIC_INTERPRETATION, _PLANAR_CONFIGURATION),
    *(_ROWS, _COLUMNS, _BITS_ALLOCATED, _BITS_STORED, _HIGH_BIT, _PIXEL_REPRESENTATION),
    *(_RESCALE_INTERCEPT, _RESCALE_SLOPE, *_PALETTE_DESCRIPTORS, *_PALETTES),
}
_ABOUT_PLACE = {
    *(_SLICE_THICKNESS, _SPACING_BETWEEN_SLICES, _IMAGER_PIXEL_SPACING),
    *(_NOMINAL_SCANNED_PIXEL_SPACING, _PIXEL_SPACING, _PIXEL_ASPECT_RATIO),
    *(_IMAGE_POSITION, _IMAGE_ORIENTATION),
}
_MAX_COPIED_BYTES = 2**18  # of an element; more than the longest palette
_MAX_VALUE_BYTES = 2**17  # of a value that is read: the longest palette


# ---- Opening a file


def open_dicom(path: Path, open_frame: Callable[[Path], ImageFile]) -> ImageFile:
    """A DICOM file of one frame or several.

    Args:
        open_frame: opens a file of one frame, or of a header only.
    """
    try:
        with open_data_set(path) as (syntax, data):
            _check_readable(syntax, data)
            count = max(1, int(_first_number(data, _NUMBER_OF_FRAMES, 1)))
            frames = _find_frames(path, syntax, data, count)
            spacing_mm, warnings = _read_spacing_mm(data)
            instance_number = _first_number(data, _INSTANCE_NUMBER, math.inf)
    except RecursionError as error:  # sequences in sequences in sequences
        raise damaged_error("DICOM") from error
    with frames.header_file() as file:
        header = open_frame(file)

    def read(k: int) -> Raw:
        try:
            with frames.frame_file(k) as file:
                frame = open_frame(file)
                if frame.size != header.size:  # a JPEG of another size than the header's
                    raise damaged_error("DICOM")
                return frame.open()(0)
        except OSError as error:  # the file is gone, or the disk has no room for the frame's
            raise unreadable_error(error) from error

    geometry = replace(header.geometry, spacing_mm=spacing_mm)
    return ImageFile(
        count, header.size, lambda: read, geometry, count > 1, warnings, instance_number
    )


def _check_readable(syntax: str, data: DataSet) -> None:
    """
    Raises:
        ImageError: there are no pixels, or GDCM cannot decode the transfer syntax.
    """
    if _PIXEL_DATA not in data.elements:
        if data.is_whole:
            raise ImageError(
                "the DICOM file holds no pixels: it is not an image, or it was cut off"
            )
        raise damaged_error("DICOM")
    samples, bits = (data.number(tag) or 0 for tag in (_SAMPLES_PER_PIXEL, _BITS_ALLOCATED))
    is_known = syntax in {"", _DEFLATED, _RLE, *_JPEG, *_NATIVE_SYNTAXES.values()}  # "": no header
    is_deep_rle = syntax == _RLE and samples > 1 and bits > 8  # whose bytes GDCM mixes up
    if is_known and not is_deep_rle:
        return
    # A damaged header may have anything in this place, such as a patient's name.
    is_uid = re.fullmatch(re.escape(_SYNTAX_ROOT) + r"(\.\d{1,3}){1,3}", syntax)
    names = (
        f" ({name})"
        for start, name in _UNREADABLE_SYNTAXES.items()
        if syntax.startswith(_SYNTAX_ROOT + start)
    )
    raise ImageError(
        f"the transfer syntax {syntax if is_uid else 'of the file'}{next(names, '')} cannot be "
        "read: save the file without compression, as gdcmconv --raw or dcmdjpeg do, or its frames "
        "as .png"
    )


def _first_number(data: DataSet, tag: int, default: float) -> float:
    """The first number of a value; the default if that is missing or not finite."""
    values = data.decimals(tag)
    return values[0] if values and math.isfinite(values[0]) else default


# ---- The size of a pixel


def _read_spacing_mm(data: DataSet) -> tuple[Pair | None, tuple[str, ...]]:
    """mm per px along x and y, or None if the file does not tell them; and warnings.

    PixelSpacing comes first; it gives y before x. If it is missing, or 1 x 1 because its writer
    knew nothing better, the ultrasound regions decide. ImagerPixelSpacing and
    NominalScannedPixelSpacing do not count: they are lengths on a detector and on film, not in the
    body. Warnings do not repeat an impossible value: in a damaged header it can be anything.
    """
    written = next((part.decimals(_PIXEL_SPACING) for part in _pixel_measures(data)), [])
    regions = data.items(_ULTRASOUND_REGIONS)
    sizes = np.array([size for region in regions for size in _region_pixel_mm(region)])
    if written and not (written == [1, 1] and len(sizes)):
        if len(written) != 2 or not is_pixel_size(written):
            return None, ("the header's PixelSpacing is impossible: lengths are given in px only",)
        return (written[1], written[0]), ()
    if not len(sizes):
        return None, ()
    if (sizes.max(0) > 1.001 * sizes.min(0)).any():
        return None, (
            "the header's ultrasound regions differ in pixel size: lengths are given in px only",
        )
    return (float(sizes[0, 0]), float(sizes[0, 1])), ()


def _pixel_measures(data: DataSet) -> Iterator[DataSet]:
    """The data sets with a PixelSpacing: the file's own, the one for all frames, the first's."""
    groups = [group for tag in (_SHARED_GROUPS, _PER_FRAME_GROUPS) for group in data.items(tag)[:1]]
    for part in (data, *(part for group in groups for part in group.items(_PIXEL_MEASURES))):
        if part.text(_PIXEL_SPACING):
            yield part


def _region_pixel_mm(region: DataSet) -> list[Floats]:
    """[(x, y)] of a pixel in an ultrasound region; [] if the region is not measured in cm."""
    size_mm = 10 * np.abs([region.number(tag, "d") or 0 for tag in _REGION_DELTAS])
    in_cm = all(region.number(tag) == _CENTIMETRES for tag in _REGION_UNITS)
    return [size_mm] if in_cm and is_pixel_size(size_mm) else []


# ---- The frames, each as a file for GDCM

Span = tuple[int, int]  # offsets in the file: of the first byte, and of the one after the last


@dataclass(frozen=True)
class _Frames:
    """Where the frames of a file lie, and what GDCM has to know of them.

    Args:
        syntax: the UID of the transfer syntax.
        native_syntax: the UID of the uncompressed syntax with the same encoding.
        byte_order: in the notation of struct.
        about_pixels: the elements that GDCM needs for a frame, as they are written.
        about_all: these, and those that say where the pixels lie.
        pixel_data_head: the PixelData element up to its length.
        spans: for each frame its pieces, several if it is compressed; a damaged file has too few.
    """

    path: Path
    syntax: str
    native_syntax: str
    byte_order: str
    about_pixels: bytes
    about_all: bytes
    pixel_data_head: bytes
    spans: list[list[Span]]

    def header_file(self) -> AbstractContextManager[Path]:
        """A file that describes the pixels and their place, and has none."""
        return _write_dicom(self.native_syntax, self.about_all + self._pixel_data(0))

    def frame_file(self, k: int) -> AbstractContextManager[Path]:
        """A file of the k-th frame. It does not say where the frame lies: GDCM might refuse that.

        Raises:
            ImageError: the frame is cut off, too large, or would crash GDCM.
        """
        spans = self.spans[k] if k < len(self.spans) else []
        with open_data_set(self.path) as (_, data):
            if not spans or spans[-1][1] > data.end:
                raise damaged_error("DICOM")
            check_bytes(sum(end - start for start, end in spans))
            pixels = b"".join(data.read(start, end) for start, end in spans)
        if _would_crash_gdcm(self.syntax, pixels):
            raise damaged_error("DICOM")
        pixels += b"\0" * (len(pixels) % 2)
        if self.syntax == self.native_syntax:
            content = self._pixel_data(len(pixels)) + pixels
        else:
            fragments = _pack_item(0xE000) + _pack_item(0xE000, pixels) + _pack_item(0xE0DD)
            content = self._pixel_data(_UNDEFINED_LENGTH) + fragments
        return _write_dicom(self.syntax, self.about_pixels + content)

    def _pixel_data(self, length: int) -> bytes:
        return self.pixel_data_head + struct.pack(self.byte_order + "I", length)


def _pack_item(number: int, value: bytes = b"") -> bytes:
    return struct.pack("<HHI", 0xFFFE, number, len(value)) + value


@contextmanager
def _write_dicom(syntax: str, data_set: bytes) -> Iterator[Path]:
    """A temporary file of a data set, with the header that names its syntax."""
    uid = syntax.encode() + b"\0" * (len(syntax) % 2)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.dcm"
        head = bytes(128) + b"DICM" + struct.pack("<HH2sH", 2, 0x10, b"UI", len(uid)) + uid
        path.write_bytes(head + data_set)
        yield path


def _would_crash_gdcm(syntax: str, frame: bytes) -> bool:
    """Whether the frame is RLE without segments, or JPEG with more than 16 bits for a value."""
    if syntax == _RLE:
        return not any(frame[:4])
    if syntax not in _JPEG or not frame.startswith(b"\xff\xd8"):
        return False
    at = find_jpeg_frame(frame)
    return at is not None and frame[at + 4] > 16


def _find_frames(path: Path, syntax: str, data: DataSet, count: int) -> _Frames:
    """
    Args:
        data: the file's data set, with pixels.
        count: the number of frames that it claims.

    Raises:
        ImageError: there cannot be that many, or they are compressed in an unknown way.
    """
    pixels, native_syntax = data.elements[_PIXEL_DATA], _NATIVE_SYNTAXES.get(data.encoding)
    is_compressed = pixels.length == _UNDEFINED_LENGTH
    if count > pixels.end - pixels.value_start or native_syntax is None:
        raise damaged_error("DICOM")
    if is_compressed and syntax not in {_RLE, *_JPEG}:
        raise damaged_error("DICOM")
    return _Frames(
        path,
        syntax if is_compressed else native_syntax,
        native_syntax,
        data.encoding.byte_order,
        data.copy(_ABOUT_PIXELS),
        data.copy(_ABOUT_PIXELS | _ABOUT_PLACE),
        data.read(pixels.start, pixels.value_start - 4),
        _compressed_spans(data, count) if is_compressed else _native_spans(data, count),
    )


def _native_spans(data: DataSet, count: int) -> list[list[Span]]:
    """The spans of uncompressed frames: equally long, one behind the other."""
    rows, columns, samples, bits = (
        int(data.number(tag) or 0) for tag in (_ROWS, _COLUMNS, _SAMPLES_PER_PIXEL, _BITS_ALLOCATED)
    )
    if data.text(_PHOTOMETRIC_INTERPRETATION).endswith("_422"):  # two pixels share their colour
        samples = 2
    first = data.elements[_PIXEL_DATA].value_start
    length = rows * columns * samples * bits // 8
    starts = (first + k * length for k in range(min(count, MAX_FRAMES)))
    return [[(start, start + length)] for start in starts if length]


def _compressed_spans(data: DataSet, count: int) -> list[list[Span]]:
    """The fragments of each frame (PS3.5, A.4)."""
    fragments = [(item.start, item.end) for item in data.items(_PIXEL_DATA)[1:]]
    first_ones = set(fragments[:1] if count == 1 else _first_fragments(data, fragments, count))
    frames: list[list[Span]] = []
    for fragment in fragments:
        if fragment in first_ones or not frames:
            frames.append([])
        frames[-1].append(fragment)
    return frames


def _first_fragments(data: DataSet, fragments: list[Span], count: int) -> list[Span]:
    """The first fragment of each frame.

    The table of offsets says which ones they are. If it is missing or wrong, they are the fragments
    that begin as a JPEG stream does.
    """
    if len(fragments) == count or not fragments:
        return fragments
    table = data.items(_PIXEL_DATA)[0]
    packed = data.read(table.start, min(table.end, table.start + 4 * count))
    offsets = struct.iter_unpack("<I", packed[: len(packed) & ~3])
    starts = {fragments[0][0] + offset for (offset,) in offsets}
    in_table = [fragment for fragment in fragments if fragment[0] in starts]
    if len(in_table) == count:
        return in_table
    jpeg_starts = b"\xff\xd8", b"\xff\x4f"  # of JPEG and JPEG-LS; of JPEG 2000
    return [part for part in fragments if data.read(part[0], part[0] + 2) in jpeg_starts] or (
        fragments
    )


# ---- The data elements (PS3.5, section 7); a value is read when it is asked for

_UNDEFINED_LENGTH = 0xFFFFFFFF  # of an element that goes on until an end mark
_ITEM, _END_MARKS = 0xFFFEE000, (0xFFFEE00D, 0xFFFEE0DD)
_LONG_TYPES = b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split()  # with a length of 4 bytes


class Encoding(NamedTuple):
    """How elements are written.

    Args:
        is_explicit: whether each element names the type of its value.
        byte_order: in the notation of struct.
    """

    is_explicit: bool
    byte_order: str


_LITTLE_ENDIAN, _IMPLICIT = Encoding(True, "<"), Encoding(False, "<")
_NATIVE_SYNTAXES = {  # encoding -> the UID of the syntax without compression
    _IMPLICIT: _SYNTAX_ROOT,
    _LITTLE_ENDIAN: _SYNTAX_ROOT + ".1",
    Encoding(True, ">"): _SYNTAX_ROOT + ".2",
}


class Element(NamedTuple):
    """Where an element lies: offsets in the file of itself, of its value, and of what follows.

    Args:
        encoding: that of the elements inside it.
        length: as written; `_UNDEFINED_LENGTH` if an end mark ends it.
    """

    tag: int
    start: int
    value_start: int
    end: int
    encoding: Encoding
    length: int


class DataSet:
    """The elements between two offsets of a file, by tag.

    The last element may be cut off: its value is then shorter than its length says.
    """

    def __init__(self, file: BinaryIO, start: int, end: int, encoding: Encoding) -> None:
        self.file, self.start, self.end, self.encoding = file, start, end, encoding

    @cached_property
    def elements(self) -> dict[int, Element]:
        elements = {}
        for element in _walk_elements(self.file, self.start, self.end, self.encoding):
            elements[element.tag] = element
            if element.tag == _PIXEL_DATA:  # what follows is of no use
                break
        return elements

    @property
    def is_whole(self) -> bool:
        """Whether it ends with its last element."""
        return max((element.end for element in self.elements.values()), default=0) == self.end

    def read(self, start: int, end: int) -> bytes:
        """The bytes between two offsets in the file."""
        self.file.seek(start)
        return self.file.read(end - start)

    def copy(self, tags: Iterable[int]) -> bytes:
        """The elements of these tags as they are written, each up to `_MAX_COPIED_BYTES`."""
        elements = (self.elements[tag] for tag in sorted(tags) if tag in self.elements)
        return b"".join(
            self.read(element.start, min(element.end, element.start + _MAX_COPIED_BYTES))
            for element in elements
        )

    def value(self, tag: int) -> bytes:
        """The value up to `_MAX_VALUE_BYTES`; b"" if there is none."""
        element = self.elements.get(tag)
        if element is None:
            return b""
        end = min(element.end, element.value_start + _MAX_VALUE_BYTES)
        return self.read(element.value_start, end)

    def text(self, tag: int) -> str:
        """The value as text without padding."""
        return self.value(tag).decode("latin-1").strip(" \0")

    def decimals(self, tag: int) -> list[float]:
        """The numbers of a value that is text; NaN for parts that are not numbers."""
        text = self.text(tag)
        return [_parse_decimal(part) for part in text.split("\\")] if text else []

    def number(self, tag: int, kind: str = "H") -> float | None:
        """A binary value of one of struct's kinds; None if it is missing or of another length."""
        value = self.value(tag)
        if len(value) != struct.calcsize("=" + kind):
            return None
        return float(struct.unpack(self.encoding.byte_order + kind, value)[0])

    def items(self, tag: int) -> list[DataSet]:
        """The items of a sequence, or the offset table and the fragments of compressed pixels."""
        element = self.elements.get(tag)
        if element is None:
            return []
        inside = _walk_elements(self.file, element.value_start, element.end, element.encoding)
        items = takewhile(lambda part: part.tag == _ITEM, inside)
        return [DataSet(self.file, item.value_start, item.end, item.encoding) for item in items]


@contextmanager
def open_data_set(path: Path) -> Iterator[tuple[str, DataSet]]:
    """The UID of a file's transfer syntax, "" without one, and its data set.

    Raises:
        ImageError: the file cannot be uncompressed.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        end = file.seek(0, io.SEEK_END)
        file.seek(128)
        header_start = data_start = 132 if file.read(4) == b"DICM" else 0
        for element in _walk_elements(file, header_start, end, _LITTLE_ENDIAN):
            if element.tag >> 16 != 2:  # the header's group
                break
            data_start = element.end
        header = DataSet(file, header_start, data_start, _LITTLE_ENDIAN)
        syntax = header.text(_TRANSFER_SYNTAX_UID)
        file.seek(data_start)
        if syntax != _DEFLATED:
            yield syntax, DataSet(file, data_start, end, _guess_encoding(file.read(6)))
            return
        try:
            data = zlib.decompressobj(wbits=-15).decompress(file.read(MAX_BYTES), MAX_BYTES)
        except zlib.error as error:
            raise damaged_error("DICOM") from error
        yield syntax, DataSet(io.BytesIO(data), 0, len(data), _LITTLE_ENDIAN)


def _parse_decimal(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _guess_encoding(head: bytes) -> Encoding:
    """The encoding that the first 6 bytes show: what the header says can be wrong or missing."""
    is_explicit = re.fullmatch(b"[A-Z]{2}", head[4:]) is not None
    return Encoding(is_explicit, ">" if head[:1] == b"\0" else "<")


def _walk_elements(file: BinaryIO, at: int, end: int, encoding: Encoding) -> Iterator[Element]:
    """The elements from offset `at` to `end`, or to the mark that ends an item or a sequence."""
    while at + 8 <= end:
        file.seek(at)
        head = file.read(12).ljust(12, b"\0")
        group, number, kind, length = struct.unpack_from(encoding.byte_order + "HH2sH", head)
        tag, value_start, inside = group << 16 | number, at + 8, encoding
        if not group:  # no element has group 0: the rest of the file was never written
            return
        if not encoding.is_explicit or group == 0xFFFE:
            (length,) = struct.unpack_from(encoding.byte_order + "I", head, 4)
        elif kind in _LONG_TYPES:
            (length,) = struct.unpack_from(encoding.byte_order + "I", head, 8)
            value_start += 4
            inside = _IMPLICIT if kind == b"UN" else encoding
        after = value_start + length
        if length == _UNDEFINED_LENGTH:
            parts = _walk_elements(file, value_start, end, inside)
            after = max([value_start, *(part.end for part in parts)])
        yield Element(tag, at, value_start, after, inside, length)
        if tag in _END_MARKS:
            return
        at = after
