"""The data elements of a DICOM file (PS3.5, section 7); a value is read when it is asked for."""

import io
import math
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from model.images.limits import MAX_BYTES, damaged

PIXELS = 0x7FE00010
UNDEFINED = 0xFFFFFFFF  # the length of what goes on until an end mark
_ITEM, _END_MARKS = 0xFFFEE000, (0xFFFEE00D, 0xFFFEE0DD)
_LONG = b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split()  # kinds with a length of 4 bytes
_SYNTAX, _DEFLATED = 0x00020010, "1.2.840.10008.1.2.1.99"


class Code(NamedTuple):
    """How elements are written: whether each names its value's type, and the order of bytes."""

    explicit: bool
    order: str


class Element(NamedTuple):
    """Offsets in the file: of the element, of its value, and of what follows it."""

    tag: int
    start: int
    value: int
    end: int
    code: Code  # of the elements inside
    length: int


class DataSet:
    """The elements from an offset to another, by tag; of those that are cut off, what is there."""

    def __init__(self, file: BinaryIO, start: int, end: int, code: Code) -> None:
        self.file, self.start, self.end, self.code = file, start, end, code

    @cached_property
    def elements(self) -> dict[int, Element]:
        found = {}
        for element in _elements(self.file, self.start, self.end, self.code):
            found[element.tag] = element
            if element.tag == PIXELS:  # behind which nothing tells anything
                break
        return found

    @property
    def is_whole(self) -> bool:
        """Whether it ends with its last element."""
        return max((element.end for element in self.elements.values()), default=0) == self.end

    def read(self, start: int, end: int) -> bytes:
        self.file.seek(start)
        return self.file.read(end - start)

    def copy(self, tags: Iterable[int]) -> bytes:
        """Those elements, as they are written; of long ones the beginning."""
        found = (self.elements[tag] for tag in sorted(tags) if tag in self.elements)
        return b"".join(self.read(at.start, min(at.end, at.start + 2**18)) for at in found)

    def value(self, tag: int) -> bytes:
        """As much of it as the longest palette takes; b"" where there is none."""
        at = self.elements.get(tag)
        return self.read(at.value, min(at.end, at.value + 2**17)) if at else b""

    def text(self, tag: int) -> str:
        return self.value(tag).decode("latin-1").strip(" \0")

    def decimals(self, tag: int) -> list[float]:
        """Numbers that are written out; NaN for what is none."""
        return [_decimal(part) for part in self.text(tag).split("\\")] if self.text(tag) else []

    def number(self, tag: int, kind: str = "H") -> float | None:
        """A value in binary, of one of struct's kinds; None where there is no such."""
        value = self.value(tag)
        right = len(value) == struct.calcsize("=" + kind)
        return float(struct.unpack(self.code.order + kind, value)[0]) if right else None

    def items(self, tag: int) -> list["DataSet"]:
        """What a sequence holds, or the fragments of packed pixels."""
        element = self.elements.get(tag)
        if element is None:
            return []
        inside = _elements(self.file, element.value, element.end, element.code)
        parts = takewhile(lambda part: part.tag == _ITEM, inside)
        return [DataSet(self.file, part.value, part.end, part.code) for part in parts]


@contextmanager
def open_data_set(path: Path) -> Iterator[tuple[str, DataSet]]:
    """The UID of a file's transfer syntax, "" where it has none, and its data set.

    Raises:
        ImageError: the file cannot be unpacked.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        end = file.seek(0, io.SEEK_END)
        file.seek(128)
        start = at = 132 if file.read(4) == b"DICM" else 0
        for element in _elements(file, start, end, Code(True, "<")):
            if element.tag >> 16 != 2:  # of the header before the data set
                break
            at = element.end
        syntax = DataSet(file, start, at, Code(True, "<")).text(_SYNTAX)
        file.seek(at)
        if syntax != _DEFLATED:
            yield syntax, DataSet(file, at, end, _code(file.read(6)))
            return
        try:
            data = zlib.decompressobj(wbits=-15).decompress(file.read(MAX_BYTES), MAX_BYTES)
        except zlib.error as error:
            raise damaged("DICOM") from error
        yield syntax, DataSet(io.BytesIO(data), 0, len(data), Code(True, "<"))


def _decimal(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _code(head: bytes) -> Code:
    """As the first element shows: what a file says of itself can be wrong, or missing."""
    return Code(re.fullmatch(b"[A-Z]{2}", head[4:]) is not None, ">" if head[:1] == b"\0" else "<")


def _elements(file: BinaryIO, at: int, end: int, code: Code) -> Iterator[Element]:
    """To the end, or to the mark that ends an item or a sequence."""
    while at + 8 <= end:
        file.seek(at)
        head = file.read(12).ljust(12, b"\0")
        group, number, kind, length = struct.unpack_from(code.order + "HH2sH", head)
        tag, value, inside = group << 16 | number, at + 8, code
        if not group:  # none has: a file that was not written to its end, and filled up
            return
        if not code.explicit or group == 0xFFFE:
            (length,) = struct.unpack_from(code.order + "I", head, 4)
        elif kind in _LONG:
            (length,) = struct.unpack_from(code.order + "I", head, 8)
            value += 4
            inside = Code(False, "<") if kind == b"UN" else code
        after = value + length
        if length == UNDEFINED:
            after = max([value, *(e.end for e in _elements(file, value, end, inside))])
        yield Element(tag, at, value, after, inside, length)
        if tag in _END_MARKS:
            return
        at = after
