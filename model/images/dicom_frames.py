"""Where the frames of a DICOM file lie, and each of them as a file of its own."""

import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from model.images.elements import PIXELS, UNDEFINED, DataSet, open_data_set
from model.images.limits import MAX_FRAMES, check_bytes, damaged

ROOT = "1.2.840.10008.1.2"  # of the UIDs of transfer syntaxes
NATIVE = {(False, "<"): ROOT, (True, "<"): ROOT + ".1", (True, ">"): ROOT + ".2"}
JPEG = {ROOT + f".4.{k}" for k in (50, 51, 57, 70, 80, 81, 90, 91)}
RLE = ROOT + ".5"
_STARTS = b"\xff\xd8", b"\xff\x4f"  # of JPEG and JPEG-LS, and of JPEG 2000
_HEADERS = {0xF7, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG markers

SAMPLES, COLOURS, FRAMES, ROWS, COLUMNS = (0x00280000 + k for k in (2, 4, 8, 16, 17))
BITS, _PALETTES = 0x00280100, (*range(0x00281101, 0x00281104), *range(0x00281201, 0x00281204))
# The kind of image; how planes lie; how many bits are used, the highest, the sign; rescaling.
_MEANING = 0x00080016, 0x00280006, 0x00280101, 0x00280102, 0x00280103, 0x00281052, 0x00281053
_OF_PIXELS = {SAMPLES, COLOURS, ROWS, COLUMNS, BITS, *_MEANING, *_PALETTES}
# Spacing of all kinds, in the order of slices, detector, film and image; position and direction.
_SPACING = 0x00180050, 0x00180088, 0x00181164, 0x00182010, 0x00280030, 0x00280034
_OF_PLACE = {*_SPACING, 0x00200032, 0x00200037}

Span = tuple[int, int]  # offsets in the file of the first byte and of the one after the last


@dataclass(frozen=True)
class Frames:
    """The frames of a file, and what GDCM has to know of them.

    Args:
        syntax: the UID of the transfer syntax; native: that of the same without packing.
        order: of bytes, as struct has it.
        about: the elements that tell of pixels; placed: these and those that tell where they lie.
        head: the pixels' element up to its length.
        spans: of each frame, in several pieces if it is packed; in a damaged file they are too few.
    """

    path: Path
    syntax: str
    native: str
    order: str
    about: bytes
    placed: bytes
    head: bytes
    spans: list[list[Span]]

    def header(self) -> AbstractContextManager[Path]:
        """A file that tells the same, and has no pixels."""
        return _file(self.native, self.placed + self._element(0))

    def single_frame(self, k: int) -> AbstractContextManager[Path]:
        """A file of the k-th frame. It does not say where it lies: GDCM could refuse it for that.

        Raises:
            ImageError: the frame is not there to its end, or too large.
        """
        spans = self.spans[k] if k < len(self.spans) else []
        with open_data_set(self.path) as (_, data):
            if not spans or spans[-1][1] > data.end:
                raise damaged("DICOM")
            check_bytes(sum(end - start for start, end in spans))
            pixels = b"".join(data.read(start, end) for start, end in spans)
        if _ends_gdcm(self.syntax, pixels):
            raise damaged("DICOM")
        pixels += b"\0" * (len(pixels) % 2)
        if self.syntax == self.native:
            return _file(self.syntax, self.about + self._element(len(pixels)) + pixels)
        items = _item(0xE000) + _item(0xE000, pixels) + _item(0xE0DD)
        return _file(self.syntax, self.about + self._element(UNDEFINED) + items)

    def _element(self, length: int) -> bytes:
        return self.head + struct.pack(self.order + "I", length)


def _item(number: int, value: bytes = b"") -> bytes:
    return struct.pack("<HHI", 0xFFFE, number, len(value)) + value


@contextmanager
def _file(syntax: str, data_set: bytes) -> Iterator[Path]:
    uid = syntax.encode() + b"\0" * (len(syntax) % 2)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.dcm"
        head = bytes(128) + b"DICM" + struct.pack("<HH2sH", 2, 0x10, b"UI", len(uid)) + uid
        path.write_bytes(head + data_set)
        yield path


def _ends_gdcm(syntax: str, frame: bytes) -> bool:
    """Damage that would end the process: RLE of no segments, JPEG of more than 16 bits a value."""
    if syntax not in JPEG or not frame.startswith(b"\xff\xd8"):
        return syntax == RLE and not any(frame[:4])
    at = 2
    while at + 4 < len(frame) and frame[at + 1] not in _HEADERS:
        at += 1 if frame[at + 1] == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return at + 4 < len(frame) and frame[at + 4] > 16


# ---- Where frames lie


def find_frames(path: Path, syntax: str, data: DataSet, count: int) -> Frames:
    """
    Args:
        data: of the file, with pixels.
        count: as many frames as it claims.

    Raises:
        ImageError: that many cannot be there, or they are packed and nobody knows how.
    """
    pixels, native = data.elements[PIXELS], NATIVE.get(data.code)
    is_packed = pixels.length == UNDEFINED
    if count > pixels.end - pixels.value or native is None:
        raise damaged("DICOM")
    if is_packed and syntax not in {RLE, *JPEG}:
        raise damaged("DICOM")
    return Frames(
        path,
        syntax if is_packed else native,
        native,
        data.code.order,
        data.copy(_OF_PIXELS),
        data.copy(_OF_PIXELS | _OF_PLACE),
        data.read(pixels.start, pixels.value - 4),
        _packed(data, count) if is_packed else _native(data, count),
    )


def _native(data: DataSet, count: int) -> list[list[Span]]:
    rows, columns, samples, bits = (
        int(data.number(tag) or 0) for tag in (ROWS, COLUMNS, SAMPLES, BITS)
    )
    if data.text(COLOURS).endswith("_422"):  # where two pixels share their colour
        samples = 2
    first, length = data.elements[PIXELS].value, rows * columns * samples * bits // 8
    starts = (first + k * length for k in range(min(count, MAX_FRAMES)))
    return [[(start, start + length)] for start in starts if length]


def _packed(data: DataSet, count: int) -> list[list[Span]]:
    """The fragments of each frame (PS3.5, A.4)."""
    fragments = data.items(PIXELS)[1:]
    spans = [(fragment.start, fragment.end) for fragment in fragments]
    firsts = set(spans[:1] if count == 1 else _firsts(data, spans, count))
    frames: list[list[Span]] = []
    for span in spans:
        if span in firsts or not frames:
            frames.append([])
        frames[-1].append(span)
    return frames


def _firsts(data: DataSet, spans: list[Span], count: int) -> list[Span]:
    """The first fragment of each frame: as the table of offsets says, or as JPEG frames begin."""
    if len(spans) == count or not spans:
        return spans
    table = data.items(PIXELS)[0]
    offsets = data.read(table.start, min(table.end, table.start + 4 * count))
    starts = {spans[0][0] + at for (at,) in struct.iter_unpack("<I", offsets[: len(offsets) & ~3])}
    told = [span for span in spans if span[0] in starts]
    if len(told) == count:
        return told
    return [span for span in spans if data.read(span[0], span[0] + 2) in _STARTS] or spans
