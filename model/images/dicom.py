"""DICOM: one image, or a loop whose frames are read one at a time.

pydicom reads the header up to the pixels. Where the frames lie in the file is found here, because
a damaged file must still give its whole frames. Each is decoded by what reads it right: numpy,
jpeg.py, pydicom's RLE, and GDCM within SimpleITK for the lossless kinds of JPEG. Nothing that names
a patient goes any further.

Values are as stored, after RescaleSlope and RescaleIntercept. WindowCenter is ignored: it says what
a viewer showed, and may cut values off.
"""

import io
import logging
import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pydicom
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_dataset

from model.anatomy import Floats
from model.frame import Geometry, Pair
from model.images.jpeg import SEQUENTIAL_OR_PROGRESSIVE, decode_jpeg, find_jpeg_frame
from model.images.limits import (
    MAX_BYTES,
    MAX_FRAMES,
    ImageError,
    ImageFile,
    Raw,
    check_bytes,
    check_size,
    damaged_error,
    errors_as_damage,
    is_pixel_size,
)
from model.images.volumes import import_simpleitk, read_geometry

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)

# ---- Transfer syntaxes: how a file is encoded (PS3.5, annex A)

_ROOT = "1.2.840.10008.1.2"
_EXPLICIT, _DEFLATED, _RLE = _ROOT + ".1", _ROOT + ".1.99", _ROOT + ".5"
_NATIVE = {_ROOT, _EXPLICIT, _ROOT + ".2", _DEFLATED, ""}  # "": the file has no header
_JPEG_KINDS = {0xC3: ".4.70", 0xF7: ".4.80"}  # marker of the frame header -> its syntax
_JPEG = {_ROOT + f".4.{k}" for k in (50, 51, 53, 55, 57, 70, 80, 81, 90, 91)}
_UNREADABLE_SYNTAXES = {  # the start of the rest of their UIDs -> their name
    ".4.10": "video",
    ".4.11": "JPEG XL",
    ".4.20": "High-Throughput JPEG 2000",
}

_FLOAT_PIXELS, _PIXEL_DATA = (0x7FE00008, 0x7FE00009), 0x7FE00010
_UNDEFINED_LENGTH = 0xFFFFFFFF  # of an element that goes on until an end mark
_ITEM = 0xE000FFFE  # as it is read in little endian

_ABOUT_PLACE = (
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "PixelAspectRatio"),
    *("SliceThickness", "SpacingBetweenSlices", "ImagerPixelSpacing"),
    "NominalScannedPixelSpacing",
)
_MAX_TEXT_BYTES = 2**10  # of a value about the place
_MAX_BOXES = 2**12  # bytes of a JPEG 2000 file before its data
_NEVER_WRITTEN = bytes(2**10)  # in JPEG 2000 it stands for a part that was lost
_MOST_KEPT_BYTES = 2**27  # of an inflated file, from frame to frame
_LONGEST_VALUE = 2**24  # bytes; a sequence for each frame of a long loop takes some MB
_TISSUE, _FLAT, _CENTIMETRES = 1, 1, 3  # a region's data type, spatial format and units
_MOST_OBLONG = 20.0  # a pixel's sides differ by less, or the header is damaged

Span = tuple[int, int]  # offsets in the file: of the first byte, and of the one after the last


def open_dicom(path: Path) -> ImageFile:
    """A DICOM file of one frame or several.

    Raises:
        ImageError, OSError: it cannot be used.
    """
    with errors_as_damage("DICOM"):
        return _open(path)


def _open(path: Path) -> ImageFile:
    with _open_data(path) as (file, end, syntax, start):
        header = _Header(file, end, syntax, start)
        _check_readable(header)
        layout = _read_layout(header, end)
        spans = _find_spans(header, layout)
        spacing_mm, aspect, warnings = _read_pixel_size(header)
        number = header.decimals("InstanceNumber")
        world = _read_world(header, layout)
        palette = _read_palette(header) if layout.colours == "PALETTE COLOR" else None
    size = layout.columns, layout.rows

    def read(k: int) -> Raw:
        if k >= len(spans) or not spans[k]:
            raise damaged_error("DICOM")
        with errors_as_damage("DICOM"):
            with _open_data(path) as (file, end, _, _):
                if spans[k][-1][1] > end:
                    raise damaged_error("DICOM")
                check_bytes(sum(end - start for start, end in spans[k]))
                data = b"".join(_read_span(file, span) for span in spans[k])
            stored = _decode(layout, data)
            if stored.shape[:2] != (layout.rows, layout.columns):  # as a JPEG's header may say
                raise damaged_error("DICOM")
            return _to_pixels(layout, stored, palette)

    return ImageFile(
        layout.frames,
        size,
        read,
        needed=max(layout.frame_bytes, end if syntax == _DEFLATED else 0),
        geometry=replace(world, spacing_mm=spacing_mm, aspect=aspect),
        along_z=layout.frames > 1,
        warnings=warnings,
        instance_number=number[0] if number and math.isfinite(number[0]) else math.inf,
    )


# ---- The header


class _Header:
    """The elements of a file up to its pixels, and where those lie.

    Args:
        syntax: the UID of the transfer syntax, "" without one.

    Raises:
        ImageError: there are no pixels.
    """

    def __init__(self, file: BinaryIO, end: int, syntax: str, start: int) -> None:
        self.file, self.syntax = file, syntax
        file.seek(start)
        head = file.read(6)
        # what the header says of its encoding can be wrong or missing
        is_explicit = re.fullmatch(b"[A-Z]{2}", head[4:]) is not None
        self.order = ">" if is_explicit and head[:1] == b"\0" else "<"
        self.are_words = False  # the pixels, which are then written two bytes at a time
        last = 0, 0, -1  # an element's tag, its length, and where its value begins

        def is_behind_header(tag: int, kind: str | None, length: int) -> bool:
            """Whether this element is the pixels, or a place where nothing was written."""
            nonlocal last
            last = tag, length, file.tell()
            self.are_words = kind == "OW"
            return tag >= _FLOAT_PIXELS[0] or tag >> 16 == 0

        file.seek(start)
        self.elements = read_dataset(
            file,
            not is_explicit,
            self.order == "<",
            stop_when=is_behind_header,
            defer_size=_LONGEST_VALUE,  # longer ones, of no use here, are not read
        )
        tag, length, at = last
        self.is_packed = length == _UNDEFINED_LENGTH  # compressed, in fragments
        value_end = at + length
        if tag != _PIXEL_DATA:
            raise _no_pixels_error(tag, (file.tell() if self.is_packed else value_end) == end)
        self.pixels: Span = at, end if self.is_packed else value_end

    def value(self, keyword: str, within: pydicom.Dataset | None = None) -> bytes:
        """The value as it is written; b"" without one."""
        element = (self.elements if within is None else within).get_item(keyword)
        value = element.value if isinstance(element, RawDataElement) else None
        return value if isinstance(value, bytes) else b""

    def text(self, keyword: str, within: pydicom.Dataset | None = None) -> str:
        """The value as text without padding."""
        return self.value(keyword, within).decode("latin-1").strip(" \0")

    def decimals(self, keyword: str, within: pydicom.Dataset | None = None) -> list[float]:
        """The numbers of a value that is text; NaN for parts that are not numbers."""
        text = self.text(keyword, within)
        return [_parse_decimal(part) for part in text.split("\\")] if text else []

    def numbers(
        self, keyword: str, code: str = "H", within: pydicom.Dataset | None = None
    ) -> list[Any]:
        """The numbers of a binary value, of one of struct's kinds."""
        value = self.value(keyword, within)
        size = struct.calcsize("=" + code)
        count = len(value) // size
        return list(struct.unpack_from(f"{self.order}{count}{code}", value))

    def integer(self, keyword: str, default: int = 0, within: pydicom.Dataset | None = None) -> int:
        """The first number of a binary value."""
        return int(next(iter(self.numbers(keyword, within=within)), default))

    def items(self, keyword: str, within: pydicom.Dataset | None = None) -> list[pydicom.Dataset]:
        """The items of a sequence; [] if it is missing or damaged."""
        part = self.elements if within is None else within
        try:
            value = part[keyword].value if keyword in part else []
            return list(value) if isinstance(value, pydicom.Sequence) else []
        except RecursionError:
            raise
        except Exception:  # it is damaged, but the pixels may be whole
            return []


def _no_pixels_error(last_tag: int, is_whole: bool) -> ImageError:
    """The error for a file whose last element, up to the pixels, is of this tag."""
    if last_tag in _FLOAT_PIXELS:
        return ImageError(
            "the DICOM file's pixels are floats (FloatPixelData), which are not read: save them as "
            "integers"
        )
    if is_whole:
        return ImageError("the DICOM file holds no pixels: it is not an image, or it was cut off")
    return damaged_error("DICOM")


def _parse_decimal(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


@contextmanager
def _open_data(path: Path) -> Iterator[tuple[BinaryIO, int, str, int]]:
    """The file, unpacked if it is deflated; its length, transfer syntax and first element."""
    with path.open("rb") as file:
        end = file.seek(0, io.SEEK_END)
        file.seek(128)
        file.seek(132 if file.read(4) == b"DICM" else 0)
        about = read_dataset(file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
        start = file.tell()
        element = about.get_item("TransferSyntaxUID")
        value = element.value if isinstance(element, RawDataElement) else b""
        syntax = (value or b"").decode("latin-1").strip(" \0")
        if syntax != _DEFLATED:
            yield file, end, syntax, start
            return
        data = _inflate(path, start, path.stat().st_mtime_ns)
        yield io.BytesIO(data), len(data), syntax, 0
        if len(data) > _MOST_KEPT_BYTES:
            _inflate.cache_clear()


@lru_cache(1)  # the frames of a loop are read one after the other
def _inflate(path: Path, start: int, _changed_ns: int) -> bytes:
    """What is deflated in the file from `start` on, up to MAX_BYTES."""
    with path.open("rb") as file:
        file.seek(start)
        try:
            return zlib.decompressobj(wbits=-15).decompress(file.read(), MAX_BYTES)
        except zlib.error as error:
            raise damaged_error("DICOM") from error


def _read_span(file: BinaryIO, span: Span) -> bytes:
    file.seek(span[0])
    return file.read(span[1] - span[0])


def _check_readable(header: _Header) -> None:
    """
    Raises:
        ImageError: the pixels are encoded in a way that is not read.
    """
    syntax = header.syntax
    if syntax in {_RLE, *_JPEG, *_NATIVE}:
        if header.is_packed and syntax in _NATIVE:
            raise damaged_error("DICOM")
        return
    # A damaged header may have anything in this place, such as a patient's name.
    is_uid = re.fullmatch(re.escape(_ROOT) + r"(\.\d{1,3}){1,3}", syntax)
    names = (
        f" ({name})"
        for start, name in _UNREADABLE_SYNTAXES.items()
        if syntax.startswith(_ROOT + start)
    )
    raise ImageError(
        f"the transfer syntax {syntax if is_uid else 'of the file'}{next(names, '')} cannot be "
        "read: save the file without compression, as gdcmconv --raw or dcmdjpeg do, or its frames "
        "as .png"
    )


# ---- Where the frames lie


class _Layout(NamedTuple):
    """What a header says of the pixels of a frame.

    Args:
        frames: how many there are.
        samples: values in a pixel: 1, or 3 for colours.
        colours: the photometric interpretation.
        by_plane: whether the colours lie in planes, one behind the other.
        bits: that a value takes, those of them that count, and the number of the highest one.
        is_signed: whether values are signed.
        is_shared: whether two neighbours share their colours (YBR_FULL_422), uncompressed.
        slope, intercept: a value is slope * what is stored + intercept.
        padding: the lowest and the highest stored value that mean: no image here.
        syntax: the UID of the transfer syntax; order: of bytes, in the notation of struct.
        is_packed: whether frames are compressed.
        is_inverted: whether small grey values are bright.
        are_swapped: whether each two neighbours of 8 bits changed places, as a word in big endian.
    """

    frames: int
    rows: int
    columns: int
    samples: int
    colours: str
    by_plane: bool
    bits: tuple[int, int, int]
    is_signed: bool
    is_shared: bool
    slope: float
    intercept: float
    padding: tuple[int, int] | None
    syntax: str
    order: str
    is_packed: bool
    are_swapped: bool
    is_inverted: bool

    @property
    def frame_bytes(self) -> int:
        """Bytes of a frame that is not compressed."""
        samples = 2 if self.is_shared else self.samples
        return math.ceil(self.rows * self.columns * samples * self.bits[0] / 8)

    @property
    def total_bytes(self) -> int:
        """Bytes of all frames without compression."""
        return self.frames * self.frame_bytes

    @property
    def sample_type(self) -> np.dtype[Any]:
        """The type of a stored value, in the order of its bytes."""
        return np.dtype(
            f"{self.order}{'i' if self.is_signed else 'u'}{math.ceil(self.bits[0] / 8)}"
        )


def _read_layout(header: _Header, end: int) -> _Layout:
    """
    Args:
        end: the length of the file; the pixels of one that is cut off lie partly beyond.
    """
    rows, columns = header.integer("Rows"), header.integer("Columns")
    count = header.decimals("NumberOfFrames")
    samples = header.integer("SamplesPerPixel", 1)
    colours = header.text("PhotometricInterpretation")
    allocated = header.integer("BitsAllocated")
    stored = header.integer("BitsStored", allocated)
    high = header.integer("HighBit", stored - 1)
    is_signed = header.integer("PixelRepresentation") == 1
    slope, intercept = (
        next((x for x in header.decimals(keyword)[:1] if math.isfinite(x)), default)
        for keyword, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
    )
    if not 0 < stored <= high + 1 <= allocated:
        stored, high = allocated, allocated - 1
    code = "h" if is_signed else "H"
    padding = [
        *header.numbers("PixelPaddingValue", code)[:1],
        *header.numbers("PixelPaddingRangeLimit", code)[:1],
    ]
    layout = _Layout(
        frames=max(1, int(count[0])) if count and math.isfinite(count[0]) else 1,
        rows=rows,
        columns=columns,
        samples=samples,
        colours=colours,
        by_plane=header.integer("PlanarConfiguration") == 1,
        bits=(allocated, stored, high),
        is_signed=is_signed,
        is_shared=False,
        slope=slope or 1.0,
        intercept=intercept,
        padding=(min(padding), max(padding)) if padding else None,
        syntax=header.syntax,
        order=header.order,
        is_packed=header.is_packed,
        is_inverted="MONOCHROME1" in colours or header.text("PresentationLUTShape") == "INVERSE",
        are_swapped=header.are_words and header.order == ">" and allocated == 8,
    )
    if samples not in (1, 3):
        raise ImageError(f"a pixel has {samples} values: expected grey (1) or RGB (3)")
    check_size(columns, rows)
    if allocated not in (1, 8, 12, 16, 32):
        raise ImageError(f"a value takes {allocated} bits: expected 1, 8, 12, 16 or 32")
    if "ModalityLUTSequence" in header.elements:
        raise ImageError(
            "the header maps the values by a table (ModalityLUTSequence), which is not applied: "
            "save the picture as .png"
        )
    if not header.is_packed and header.pixels[1] <= end:
        layout = _follow_length(header, layout)
    if layout.frames > header.pixels[1] - header.pixels[0]:
        raise damaged_error("DICOM")
    check_bytes(layout.frame_bytes)
    return layout


def _follow_length(header: _Header, layout: _Layout) -> _Layout:
    """The layout as the length of native pixels shows it, if the header contradicts itself.

    Raises:
        ImageError: the header describes other pixels than there are.
    """
    length = header.pixels[1] - header.pixels[0]
    of_one_value = layout._replace(samples=1)
    is_grey = layout.colours.startswith(("MONOCHROME", "PALETTE"))
    if layout.colours.endswith("_422") and length < layout.total_bytes:
        layout = layout._replace(is_shared=True)
        is_other = length - layout.total_bytes > layout.frame_bytes // 8
    elif layout.samples == 3 and 0 <= length - of_one_value.total_bytes < 2:
        # Several frames could as well be fewer than the header counts, with three values a pixel.
        is_other = layout.frames > 1 and not is_grey
        if not is_other:
            layout = of_one_value if is_grey else of_one_value._replace(colours="MONOCHROME2")
    else:
        is_colour = layout.colours.startswith(("RGB", "YBR"))
        if is_colour and 0 <= length - layout._replace(samples=3).total_bytes < 2:
            layout = layout._replace(samples=3)
        is_other = length - layout.total_bytes >= max(2, layout.frame_bytes)
    if is_other:
        raise ImageError(
            f"the DICOM file holds {length} bytes of pixels, but its header describes "
            f"{layout.total_bytes}: save it anew with a right header"
        )
    return layout


def _find_spans(header: _Header, layout: _Layout) -> list[list[Span]]:
    """For each frame its pieces in the file, several if it is compressed.

    A damaged file has too few, or a frame's last piece exceeds it.
    """
    start, end = header.pixels
    if not layout.is_packed:
        length = layout.frame_bytes
        starts = (start + k * length for k in range(min(layout.frames, MAX_FRAMES)))
        return [[(at, at + length)] for at in starts if at + length <= end]
    items: list[Span] = []  # the table of offsets, then the fragments (PS3.5, A.4)
    at = start
    while at + 8 <= end:
        mark, length = struct.unpack("<II", _read_span(header.file, (at, at + 8)))
        if mark != _ITEM:
            break
        items.append((at + 8, at + 8 + length))
        at += 8 + length
    fragments = items[1:]
    if layout.frames == 1:
        return [fragments]
    first_ones = set(_first_fragments(header.file, items, layout.frames))
    frames: list[list[Span]] = []
    for fragment in fragments:
        if fragment in first_ones or not frames:
            frames.append([])
        frames[-1].append(fragment)
    return frames


def _first_fragments(file: BinaryIO, items: list[Span], count: int) -> list[Span]:
    """The first fragment of each frame.

    The table of offsets says which ones they are. If it is missing or wrong, they are the fragments
    that begin as a JPEG stream does.
    """
    fragments = items[1:]
    if len(fragments) == count or not fragments:
        return fragments
    table_start, table_end = items[0]
    packed = _read_span(file, (table_start, min(table_end, table_start + 4 * count)))
    offsets = struct.iter_unpack("<I", packed[: len(packed) & ~3])
    starts = {fragments[0][0] + offset for (offset,) in offsets}
    in_table = [fragment for fragment in fragments if fragment[0] in starts]
    if len(in_table) == count:
        return in_table
    jpeg_starts = b"\xff\xd8", b"\xff\x4f"  # of JPEG and JPEG-LS; of JPEG 2000
    found = [part for part in fragments if _read_span(file, (part[0], part[0] + 2)) in jpeg_starts]
    return found or fragments


# ---- A frame's bytes -> pixels


def _decode(layout: _Layout, data: bytes) -> Raw:
    """(rows, columns[, 3]): the values as stored; colours as RGB, a palette's as its numbers.

    Raises:
        ImageError: the frame is damaged.
        Exception: what a library raises.
    """
    if layout.is_packed and layout.syntax != _RLE:
        return _decode_stream(layout, data)
    stored = (_decode_rle if layout.is_packed else _decode_native)(layout, data)
    if stored.ndim == 3:
        return _to_rgb(stored, layout)
    if layout.bits[0] == 1:
        return stored
    # bits above and below those that count belong to overlays
    _, used, high = layout.bits
    width = 8 * stored.itemsize
    return np.asarray(np.right_shift(np.left_shift(stored, width - 1 - high), width - used))


def _decode_stream(layout: _Layout, data: bytes) -> Raw:
    """JPEG of all kinds. What the data say of themselves counts, not what the header says."""
    frame = find_jpeg_frame(data) if data.startswith(b"\xff\xd8") else None
    if frame is not None and frame.marker in SEQUENTIAL_OR_PROGRESSIVE and frame.bits == 8:
        return decode_jpeg(data, "RGB" if layout.colours == "RGB" else "YCbCr")
    if frame is not None:
        kind, is_signed = _JPEG_KINDS.get(frame.marker, ".4.51"), layout.is_signed
        samples, bits = len(frame.components), frame.bits
    else:
        at = data[:_MAX_BOXES].index(b"\xff\x4f\xff\x51")
        if _NEVER_WRITTEN in data:  # OpenJPEG would read on
            raise damaged_error("DICOM")
        samples, depth = struct.unpack_from(">HB", data, at + 40)
        kind, is_signed = ".4.90", layout.is_signed or depth >= 128
        bits = (depth & 127) + 1
    # GDCM crashes at JPEG that claims more bits
    if bits > (32 if frame is None else 16) or samples not in (1, 3):
        raise damaged_error("DICOM")
    if bits > layout.bits[0]:
        layout = layout._replace(bits=(16 if bits <= 16 else 32, bits, bits - 1))
    return _decode_by_gdcm(
        layout._replace(syntax=_ROOT + kind, samples=samples, is_signed=is_signed), data
    )


def _decode_native(layout: _Layout, data: bytes) -> Raw:
    allocated = layout.bits[0]
    if allocated == 1:
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        return bits[: layout.rows * layout.columns].reshape(layout.rows, layout.columns)
    if allocated == 12:  # two values in three bytes
        first, middle, last = np.frombuffer(data, np.uint8).reshape(-1, 3).T.astype(np.uint16)
        values = np.column_stack([first | (middle & 15) << 8, middle >> 4 | last << 4]).ravel()
        values = values.view(layout.sample_type.newbyteorder("="))
    else:
        if layout.are_swapped:
            data = np.frombuffer(data, np.uint16).byteswap().tobytes()
        values = np.frombuffer(data, layout.sample_type)
        values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if layout.is_shared:  # Y Y Cb Cr
        pairs = values.reshape(layout.rows, -1, 4)
        luma = pairs[..., :2].reshape(layout.rows, -1)
        chroma = pairs[..., 2:].repeat(2, axis=1)
        return np.dstack([luma, chroma])
    if layout.samples == 1:
        return values.reshape(layout.rows, layout.columns)
    if layout.by_plane:
        planes = values.reshape(layout.samples, layout.rows, layout.columns)
        return np.moveaxis(planes, 0, 2)
    return values.reshape(layout.rows, layout.columns, layout.samples)


def _decode_rle(layout: _Layout, data: bytes) -> Raw:
    from pydicom.encaps import encapsulate  # noqa: PLC0415
    from pydicom.pixels.decoders.base import get_decoder  # noqa: PLC0415

    options: dict[str, Any] = {
        "rows": layout.rows,
        "columns": layout.columns,
        "number_of_frames": 1,
        "samples_per_pixel": layout.samples,
        "bits_allocated": layout.bits[0],
        "bits_stored": layout.bits[0],
        "pixel_representation": int(layout.is_signed),
        "photometric_interpretation": "RGB" if layout.samples == 3 else "MONOCHROME2",
        "planar_configuration": 0,
        "pixel_keyword": "PixelData",
    }
    for packed in (data, data.rstrip(b"\0")):  # padding unpacks to more than there should be
        with suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("error")
            pixels, _ = get_decoder(_RLE).as_array(
                encapsulate([packed]), index=0, raw=True, decoding_plugin="pydicom", **options
            )
            return np.asarray(pixels)
    raise damaged_error("DICOM")


def _to_rgb(pixels: Raw, layout: _Layout) -> Raw:
    """(H, W, 3) as stored -> RGB (PS3.3, C.7.6.3.1.2).

    YBR_RCT and YBR_ICT exist in JPEG 2000 only: a writer that unpacked it left a wrong name.
    """
    if not layout.colours.startswith(("YBR_FULL", "YBR_PARTIAL")):
        return pixels
    half = 2.0 ** (layout.bits[1] - 1)
    rgb = np.empty_like(pixels)
    for row, values in zip(rgb, pixels, strict=True):  # row by row: no whole copy in float64
        y, blue, red = values.T - np.array([[0], [half], [half]])
        if "PARTIAL" in layout.colours:
            y, blue, red = (y - half / 8) * 255 / 219, blue * 255 / 224, red * 255 / 224
        green = y - (0.114 * 1.772 * blue + 0.299 * 1.402 * red) / 0.587
        exact = np.column_stack([y + 1.402 * red, green, y + 1.772 * blue])
        row[:] = np.clip(np.floor(exact + 0.5), 0, 2 * half - 1)
    return rgb


def _decode_by_gdcm(layout: _Layout, data: bytes) -> Raw:
    """JPEG without loss or of 12 bits, JPEG-LS, JPEG 2000.

    GDCM gets a file of this frame alone, whose values it is to take as they are. It goes on where
    its decoders only warn of damage, so that a warning is an error here.
    """
    elements = _about_pixels(layout)
    fragments = _item(b"") + _item(data) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    head = struct.pack("<HH2s2xI", 0x7FE0, 0x10, b"OB", _UNDEFINED_LENGTH)
    elements[_PIXEL_DATA] = head + fragments
    with _dicom_file(layout.syntax, elements) as path, _captured_messages() as messages:
        simpleitk = import_simpleitk()
        try:
            image = simpleitk.ReadImage(str(path), imageIO="GDCMImageIO")
        except RuntimeError as error:
            raise damaged_error("DICOM") from error
        messages.seek(0)
        if messages.read(1):
            raise damaged_error("DICOM")
    pixels: Raw = simpleitk.GetArrayFromImage(image)[0]
    return pixels


def _about_pixels(layout: _Layout) -> dict[int, bytes]:
    """The elements that tell GDCM how the values lie, but not what they mean."""
    numbers = {
        **dict(zip((0x00280002, 0x00280006), (layout.samples, 0), strict=True)),
        **dict(zip((0x00280010, 0x00280011), (layout.rows, layout.columns), strict=True)),
        **dict(zip((0x00280100, 0x00280101, 0x00280102), layout.bits, strict=True)),
        0x00280103: int(layout.is_signed),
    }
    is_named = layout.colours.startswith(("RGB", "YBR"))
    colours = "MONOCHROME2" if layout.samples == 1 else layout.colours if is_named else "RGB"
    elements = {tag: _element(tag, b"US", struct.pack("<H", n)) for tag, n in numbers.items()}
    elements[0x00280004] = _element(0x00280004, b"CS", colours.encode("latin-1"))
    return elements


def _item(value: bytes) -> bytes:
    value += b"\0" * (len(value) % 2)
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(value)) + value


def _element(tag: int, kind: bytes, value: bytes) -> bytes:
    value += (b"\0" if kind == b"UI" else b" ") * (len(value) % 2)
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, kind, len(value)) + value


@contextmanager
def _dicom_file(syntax: str, elements: dict[int, bytes]) -> Iterator[Path]:
    """A temporary file of these elements, with the header that names its syntax."""
    elements = {0x00080016: _element(0x00080016, b"UI", b"1.2.840.10008.5.1.4.1.1.7"), **elements}
    head = bytes(128) + b"DICM" + _element(0x00020010, b"UI", syntax.encode())
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.dcm"
        path.write_bytes(head + b"".join(elements[tag] for tag in sorted(elements)))
        yield path


@contextmanager
def _captured_messages() -> Iterator[BinaryIO]:
    """What reaches stderr in the block, where the decoders of GDCM print their warnings."""
    before = os.dup(2)
    try:
        with TemporaryFile() as messages:
            os.dup2(messages.fileno(), 2)
            yield messages
    finally:
        os.dup2(before, 2)
        os.close(before)


# ---- What the values mean


def _to_pixels(layout: _Layout, stored: Raw, palette: Callable[[Raw], Raw] | None) -> Raw:
    """Stored values -> grey or RGB; padding is masked."""
    if stored.ndim == 3:
        return stored
    if palette is not None:
        return palette(stored)
    pixels = stored
    if layout.is_inverted:
        # packed data may have fewer bits than the header says
        highest = 2 ** min(layout.bits[1], 8 * stored.itemsize) - 1
        signed = stored.astype(np.promote_types(stored.dtype, np.int8))
        pixels = ~stored if stored.dtype.kind == "i" else highest - signed
    most = 2 ** layout.bits[1] - 1
    if most < 255 and pixels.min() >= 0 and pixels.max() <= most:  # as in other formats
        pixels = (pixels.astype(np.uint16) * 255 // most).astype(np.uint8)
    if (layout.slope, layout.intercept) != (1, 0):
        is_whole = layout.slope.is_integer() and layout.intercept.is_integer()
        kind = np.int64 if is_whole and abs(layout.intercept) < 2**31 else np.float64
        pixels = pixels.astype(kind) * kind(layout.slope) + kind(layout.intercept)
    if layout.padding is None:
        return pixels
    low, high = layout.padding
    padding = (stored >= low) & (stored <= high)
    return np.ma.MaskedArray(pixels, padding) if padding.any() else pixels


def _read_palette(header: _Header) -> Callable[[Raw], Raw]:
    """A function of (H, W) numbers that gives (H, W, 3) RGB (PS3.3, C.7.6.3.1.5 and 6).

    Numbers below the first one that is mapped have its colour, those beyond the last one that's.
    Descriptors are known to tell wrong bits, so the length of the entries decides.
    """
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    if any(f"Segmented{name}Data" in header.elements for name in names):
        from pydicom.pixels.processing import apply_color_lut  # noqa: PLC0415

        return lambda numbers: _as_colours(apply_color_lut(numbers, header.elements))
    is_signed = header.integer("PixelRepresentation") == 1
    tables, firsts = [], []
    for name in names:
        count, first, _ = header.numbers(f"{name}Descriptor")
        firsts.append(first - 2**16 if is_signed and first >= 2**15 else first)
        data = header.value(f"{name}Data")
        words = np.frombuffer(data[: len(data) & ~1], f"{header.order}u2")
        if len(words) < (count or 2**16):  # bytes, two to a word
            words = words.astype("<u2").view(np.uint8)
        tables.append(words[: count or 2**16].astype(np.uint16))

    def apply(numbers: Raw) -> Raw:
        planes = [
            table[np.clip(numbers.astype(np.int64) - first, 0, len(table) - 1)]
            for table, first in zip(tables, firsts, strict=True)
        ]
        return _as_colours(np.dstack(planes), max(int(table.max()) for table in tables))

    return apply


def _as_colours(values: Raw, largest: int = 0) -> Raw:
    """A palette's values of 16 bits by their upper byte, unless they fill only a part of the range.

    Args:
        largest: among all entries of the palette; by default among the values.
    """
    return values if (largest or values.max()) < 2**15 else (values >> 8).astype(np.uint8)


# ---- The size and the place of a pixel


def _read_pixel_size(header: _Header) -> tuple[Pair | None, Pair | None, tuple[str, ...]]:
    """mm per px along x and y, the shape of a pixel, each None if the file does not tell; warnings.

    PixelSpacing comes first; it gives y before x. If it is missing, or 1 x 1 because its writer
    knew nothing better, the ultrasound regions decide. ImagerPixelSpacing and
    NominalScannedPixelSpacing are lengths on a detector and on film, not in the body: like
    PixelAspectRatio they tell the shape. Warnings do not repeat an impossible value: in a damaged
    header it can be anything.
    """
    written = next((part for part in _written_spacings(header) if part), [])
    sizes = _region_sizes_mm(header)
    shape, warnings = _read_shape(header)
    if written and not (written == [1, 1] and (len(sizes) or shape)):
        if len(written) != 2 or not is_pixel_size(written):
            warning = "the header's PixelSpacing is impossible: lengths are given in px only"
            return None, shape, (warning, *warnings)
        return (written[1], written[0]), None, ()
    if not len(sizes):
        return None, shape, warnings
    x, y = (float(side) for side in sizes[0])
    if (sizes.max(0) <= 1.001 * sizes.min(0)).all():
        return (x, y), None, ()
    warning = "the header's ultrasound regions differ in pixel size: lengths are given in px only"
    shapes = sizes[:, 0] / sizes[:, 1]
    if shapes.max() <= 1.001 * shapes.min():
        return None, (x, y), (warning,)
    return None, shape, (warning, *warnings)


def _written_spacings(header: _Header) -> Iterator[list[float]]:
    """PixelSpacing of the file, of all its frames, and of the first one."""
    yield header.decimals("PixelSpacing")
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in header.items(keyword)[:1]:
            for part in header.items("PixelMeasuresSequence", group):
                yield header.decimals("PixelSpacing", part)


def _read_shape(header: _Header) -> tuple[Pair | None, tuple[str, ...]]:
    """The size of a pixel along x and y up to a factor, None if nothing tells it; and warnings."""
    warnings: tuple[str, ...] = ()
    for keyword in ("PixelAspectRatio", "NominalScannedPixelSpacing", "ImagerPixelSpacing"):
        written = header.decimals(keyword)  # the vertical side comes first
        is_size = len(written) == 2 and is_pixel_size(written)
        if is_size and 1 / _MOST_OBLONG < written[1] / written[0] < _MOST_OBLONG:
            return (written[1], written[0]), warnings
        if written:
            warnings += (f"the header's {keyword} is impossible: it is left out",)
    return None, warnings


def _region_sizes_mm(header: _Header) -> Floats:
    """(regions, 2): mm per px along x and y in the regions of tissue that are measured in cm.

    Other regions show curves, scales or graphics: they count only if none is marked as tissue.
    """
    sizes, are_tissue = [], []
    for region in header.items("SequenceOfUltrasoundRegions"):
        units = [header.integer(f"PhysicalUnits{axis}Direction", within=region) for axis in "XY"]
        deltas = [header.numbers(f"PhysicalDelta{axis}", "d", region) for axis in "XY"]
        if units != [_CENTIMETRES] * 2 or not all(deltas):
            continue
        size_mm = 10 * np.abs([delta[0] for delta in deltas])
        if is_pixel_size(size_mm):
            sizes.append(size_mm)
            are_tissue.append(
                header.integer("RegionDataType", _TISSUE, region) == _TISSUE
                and header.integer("RegionSpatialFormat", _FLAT, region) == _FLAT
            )
    found: Floats = np.array(sizes).reshape(-1, 2)
    return found[are_tissue] if any(are_tissue) else found


def _read_world(header: _Header, layout: _Layout) -> Geometry:
    """The world frame, as ITK takes it from a file of this header alone."""
    place = {keyword: header.value(keyword)[:_MAX_TEXT_BYTES] for keyword in _ABOUT_PLACE}
    if not any(place.values()):
        return Geometry()
    elements = _about_pixels(layout)
    for keyword, value in {**place, "SOPClassUID": header.value("SOPClassUID")[:64]}.items():
        tag = int(tag_for_keyword(keyword) or 0)
        if value:
            elements[tag] = _element(tag, dictionary_VR(tag).encode(), value)
    elements[_PIXEL_DATA] = struct.pack("<HH2s2xI", 0x7FE0, 0x10, b"OW", 0)
    with _dicom_file(_EXPLICIT, elements) as path, _captured_messages():
        reader = import_simpleitk().ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        return read_geometry(reader)[0]
