"""JPEG data, from a .jpg file or from within DICOM and TIFF, through simplejpeg.

libjpeg reads damaged data to its end and fills in what is missing; simplejpeg turns its warnings
into errors. Two faults give no warning and are found here: scans that are missing as a whole, and
marks of colour that contradict the container. So libjpeg gets a stream that is put together from
the segments that it needs: without comments, EXIF and whatever follows the first image's end mark.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from model.images.limits import ImageError, Raw, check_channels, damaged_error

Colours = Literal["as marked", "YCbCr", "RGB"]
Segment = tuple[int, memoryview]  # marker; what follows it, with SOS also the compressed pixels

_SOI, _EOI, _SOS, _DNL, _COM = b"\xff\xd8", 0xD9, 0xDA, 0xDC, 0xFE
_APP0, _APP14 = 0xE0, 0xEE
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15, and JPEG-LS
_PROGRESSIVE = 0xC2
SEQUENTIAL_OR_PROGRESSIVE = {0xC0, 0xC1, _PROGRESSIVE}
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xDA)}
_MARKER = re.compile(rb"\xff(?=[^\x00\xff])", re.DOTALL)
_MARKER_AFTER_SCAN = re.compile(rb"\xff(?=[^\x00\xff\xd0-\xd7])", re.DOTALL)
_MAX_SEGMENTS = 2**14
_MAX_SCANS = 100  # each takes time for the whole image; real files have about ten
_REMEDY = "save it as an ordinary JPEG of 8 bits (baseline), or as .png"


class JpegFrame(NamedTuple):
    """What a frame header (SOFn) says.

    Args:
        marker: the second byte of its marker: which kind of JPEG it is.
        bits: of a value.
        size: (width, height) in px; a height of 0 is told behind the pixels.
        components: identifier, and sampling factors in a byte (4 bits along x, 4 along y), of each.
    """

    marker: int
    bits: int
    size: tuple[int, int]
    components: tuple[tuple[int, int], ...]


def find_jpeg_frame(data: bytes) -> JpegFrame | None:
    """The first frame header, of any kind of JPEG; None if the data is damaged or ends before."""
    try:
        return _first_frame(_segments(data))
    except ImageError:
        return None


def read_jpeg_header(data: bytes) -> tuple[JpegFrame, bytes]:
    """The first frame header, and the EXIF data before it, which may be empty.

    Raises:
        ImageError: `decode_jpeg` cannot read the data, as far as the header tells.
    """
    exif = b""
    for marker, payload in _segments(data):
        if marker == _APP0 + 1 and bytes(payload[2:8]) == b"Exif\0\0" and not exif:
            exif = bytes(payload[8:])
        if marker in _FRAMES:
            frame = _read_frame(marker, payload)
            _check_readable(frame)
            return frame, exif
    raise _truncated("it ends within its header")


def decode_jpeg(data: bytes, colours: Colours = "as marked") -> Raw:
    """(H, W) or (H, W, 3) RGB in uint8: the first image in the data.

    Args:
        colours: what the container says of the colours. It counts only where the data does not
            say: without JFIF or Adobe marker, identifiers "RGB", or subsampling.

    Raises:
        ImageError: the data is damaged, incomplete, or of a kind that cannot be read.
    """
    import simplejpeg  # noqa: PLC0415

    segments = list(_segments(data))
    frame = _first_frame(segments)
    _check_readable(frame, segments)
    _check_complete(frame, segments)
    is_grey = len(frame.components) == 1
    adobe = b"" if is_grey else _adobe_segment(_are_rgb(frame, segments, colours))
    needed = (
        part
        for marker, payload in segments
        if not _is_remark(marker) and marker not in (_DNL, _EOI)
        for part in (b"\xff%c" % marker, payload)
    )
    stream = b"".join((_SOI, adobe, *needed, b"\xff%c" % _EOI))
    try:
        pixels: Raw = simplejpeg.decode_jpeg(stream, "GRAY" if is_grey else "RGB", strict=True)
    except ValueError as error:
        if "subsampling" in str(error):
            raise _unreadable("with an unusual subsampling of its colours") from error
        if segments[-1][0] != _EOI:
            raise _truncated("its end mark is missing") from error
        raise damaged_error("JPEG") from error
    return pixels[..., 0] if is_grey else pixels


def _segments(data: bytes) -> Iterator[Segment]:
    """The segments behind SOI, up to the end mark or, without one, to the end of the data.

    Raises:
        ImageError: something that is not a segment follows one. Only behind APPn and COM such bytes
            are passed over: writers are known to get their lengths wrong, and nothing depends on
            them.
    """
    if not data.startswith(_SOI):
        raise damaged_error("JPEG")
    view, at, marker, count = memoryview(data), 2, _COM, 0
    while found := _MARKER.search(data, at):
        count += 1
        is_gap = bool(data[at : found.start()].strip(b"\xff"))
        if (is_gap and not _is_remark(marker)) or count > _MAX_SEGMENTS:
            raise damaged_error("JPEG")
        start = found.end() + 1
        marker = data[start - 1]
        at = start
        if marker not in _WITHOUT_LENGTH:
            at += int.from_bytes(data[start : start + 2], "big")
            if at < start + 2 or at > len(data):
                raise _truncated("it ends within its header")
        if marker == _SOS:
            behind = _MARKER_AFTER_SCAN.search(data, at)
            at = behind.start() if behind else len(data)
        yield marker, view[start:at]
        if marker == _EOI:
            return


def _is_remark(marker: int) -> bool:
    """Whether a segment is APPn or COM, which libjpeg does not need for the pixels."""
    return _APP0 <= marker < _APP0 + 16 or marker == _COM


def _first_frame(segments: Iterable[Segment]) -> JpegFrame:
    for marker, payload in segments:
        if marker in _FRAMES:
            return _read_frame(marker, payload)
    raise _truncated("it ends within its header")


def _read_frame(marker: int, payload: memoryview) -> JpegFrame:
    try:
        bits, height, width, count = struct.unpack_from(">BHHB", payload, 2)
        components = tuple(struct.unpack_from("BB", payload, 8 + 3 * k) for k in range(count))
    except struct.error as error:
        raise damaged_error("JPEG") from error
    return JpegFrame(marker, bits, (width, height), components)


# ---- What cannot be read


def _unreadable(what: str) -> ImageError:
    return ImageError(f"the image is a JPEG {what}, which cannot be read: {_REMEDY}")


def _truncated(what: str) -> ImageError:
    return ImageError(f"the JPEG data is truncated: {what}")


def _check_readable(frame: JpegFrame, segments: Iterable[Segment] = ()) -> None:
    """Raise ImageError for a JPEG of a kind that libjpeg does not read, or not safely.

    Arithmetic coding may leave out zeros at the end of its data: nobody can tell whether it is cut.
    """
    if frame.marker not in SEQUENTIAL_OR_PROGRESSIVE:
        kinds = {0xC3: "without loss (lossless)", 0xF7: "of the kind JPEG-LS"}
        other = "with arithmetic coding" if frame.marker > 0xC8 else "in layers (hierarchical)"
        raise _unreadable(kinds.get(frame.marker, other))
    if frame.bits != 8:
        raise _unreadable(f"of {frame.bits} bits per value")
    if len(frame.components) == 4:
        raise ImageError(
            "the image is a JPEG in CMYK, the colours of print: save it in grey or RGB"
        )
    check_channels(len(frame.components))
    told = [int.from_bytes(payload[2:4], "big") for marker, payload in segments if marker == _DNL]
    if frame.size[1] == 0 or any(height != frame.size[1] for height in told):
        raise _unreadable("that tells its height behind its pixels (DNL)")


def _check_complete(frame: JpegFrame, segments: Iterable[Segment]) -> None:
    """Raise ImageError unless the scans hold every component, and each of its 64 coefficients.

    A progressive scan holds coefficients `first` to `last` down to bit `low`, the others all bits.
    """
    low_bits = {identifier: [1] * 64 for identifier, _ in frame.components}
    scans = [payload for marker, payload in segments if marker == _SOS]
    for scan in scans:
        count = scan[2]
        if len(scan) < 6 + 2 * count:
            raise damaged_error("JPEG")
        first, last, low = scan[3 + 2 * count], scan[4 + 2 * count], scan[5 + 2 * count] & 15
        if frame.marker != _PROGRESSIVE:
            first, last, low = 0, 63, 0
        for k in range(count):
            coefficients = low_bits.get(scan[3 + 2 * k], [])
            coefficients[first : last + 1] = [low] * len(coefficients[first : last + 1])
    if len(scans) > _MAX_SCANS:
        raise damaged_error("JPEG")
    if any(map(any, low_bits.values())):
        raise _truncated("some of its scans are missing")


# ---- Colours


def _are_rgb(frame: JpegFrame, segments: Iterable[Segment], colours: Colours) -> bool:
    """Whether the three components are red, green and blue, as libjpeg would decide.

    Where libjpeg would guess YCbCr, the container decides, unless a component is subsampled.
    """
    is_jfif, transform = False, None
    for marker, payload in segments:
        is_jfif |= marker == _APP0 and len(payload) >= 16 and bytes(payload[2:7]) == b"JFIF\0"
        if marker == _APP14 and len(payload) >= 14 and bytes(payload[2:7]) == b"Adobe":
            transform = payload[13]
    if is_jfif or transform is not None:
        return not is_jfif and transform == 0
    identifiers, sampling = zip(*frame.components, strict=True)
    if bytes(identifiers) == b"RGB":
        return True
    return colours == "RGB" and len(set(sampling)) == 1


def _adobe_segment(are_rgb: bool) -> bytes:
    """A marker of Adobe's that tells libjpeg how to transform the colours."""
    return b"\xff%c" % _APP14 + struct.pack(">H5sHHHB", 14, b"Adobe", 100, 0, 0, not are_rgb)
