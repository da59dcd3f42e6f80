"""MetaImage, NIfTI, NRRD and DICOM, through SimpleITK.

SimpleITK is imported when it is needed, for that takes 0.4 s.
"""

import importlib
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from model.complete import is_cut, is_packed
from model.formats import head_of, is_gzip
from model.placing import placing
from model.reading import (
    MAX_BYTES,
    MIN_SIDE,
    ImageError,
    ImageFile,
    Raw,
    Reader,
    bounded_memory,
    check_bytes,
    check_channels,
    check_size,
    damaged,
    unreadable,
)

ITK_NAMES = {"MetaImage": "Meta", "NIfTI": "Nifti", "NRRD": "Nrrd", "DICOM": "GDCM"}
# What to replace, and how often, in a file whose pixels ITK refuses because of the geometry. In
# DICOM only the tag Pixel Spacing gets another number, so that the file keeps its length.
_GEOMETRY = {
    "MetaImage": (rb"(?m)^(?:Element(?:Spacing|Size)|TransformMatrix)[ \t]*=.*\n", b"", 3),
    "NRRD": (rb"(?m)^space[a-z ]*:.*\n", b"", 5),
    "DICOM": (rb"\x28\x00\x30\x00", b"\x28\x00\x31\x00", 1),
}


def open_volume(path: Path, kind: str) -> ImageFile:
    """A file of one of the `ITK_NAMES`: one image, or a stack of them."""
    with _itk(path, kind, path.stat().st_size) as header:
        header.ReadImageInformation()
        value = _simpleitk().Image([1, 1], header.GetPixelID())
    lengths, channels = header.GetSize(), header.GetNumberOfComponents()
    if len(lengths) < 2 or 0 in lengths:
        raise damaged(kind)
    check_channels(channels)
    # An array (H, W, 3) saved as if its channels were an axis of space comes with x = 3.
    flat = channels == 1 and len(lengths) > 2 and lengths[0] in (1, 3, 4)
    first = 1 if flat and min(lengths[1:3]) >= MIN_SIDE else 0
    stacked = [axis for axis in range(first + 2, len(lengths)) if lengths[axis] > 1]
    geometry, warnings, readable = placing(header, path, kind, first)
    pixel_bytes = channels * value.GetSizeOfPixelComponent()
    volume = _Volume(path, kind, lengths, channels, pixel_bytes, first, stacked, readable)
    volume.check()
    count = lengths[stacked[0]] if stacked else 1
    size = lengths[first], lengths[first + 1]
    number = _instance_number(header)
    return ImageFile(count, size, volume.open, geometry, stacked == [2], warnings, number)


@dataclass(frozen=True)
class _Volume:
    """What the header tells of the pixels.

    Args:
        lengths: of the file's axes, from the fastest.
        channels: values of a pixel, which takes pixel_bytes.
        first: the axis along x; before it the channels may lie.
        stacked: the axis of the frames, if there are several.
        readable: whether ITK reads the pixels in spite of the geometry.
    """

    path: Path
    kind: str
    lengths: tuple[int, ...]
    channels: int
    pixel_bytes: int
    first: int
    stacked: list[int]
    readable: bool

    def check(self) -> None:
        """Raise ImageError where the shape is that of no image, or of one that is too large."""
        width, height = self.lengths[self.first : self.first + 2]
        check_size(width, height)
        if len(self.stacked) > 1:
            shape = " x ".join(map(str, self.lengths))
            raise ImageError(
                f"the file's shape is {shape}: expected one image or one stack of images"
            )
        check_bytes(self.frame_bytes)

    @property
    def pixels(self) -> int:
        return math.prod(self.lengths)

    @property
    def frame_bytes(self) -> int:
        frames = math.prod(self.lengths[axis] for axis in self.stacked)
        return self.pixels // frames * self.pixel_bytes

    def open(self) -> Reader:
        """Reads by frames, or the whole file: where it must, or to unpack it once only."""
        by_frames = bool(self.stacked) and self.readable and self._can_extract()
        if by_frames and not is_packed(self.path, self.kind):
            return self._frame
        if is_cut(self.path, self.kind, self.pixels, self.pixel_bytes):
            raise damaged(self.kind)
        needed = max(self.pixels * self.pixel_bytes, self.path.stat().st_size)
        if by_frames and needed > MAX_BYTES:
            return self._frame
        check_bytes(needed, "save them as .mha, which is read by frames")
        whole = self._pixels(needed)
        return lambda k: whole[k]

    def _frame(self, k: int) -> Raw:
        frame: Raw = self._pixels(self.frame_bytes, k)[0]
        return frame

    def _pixels(self, needed: int, only: int | None = None) -> Raw:
        """(frames, H, W, channels): all frames, or one; they take so many bytes."""
        with _itk(self.path, self.kind, needed, without_geometry=not self.readable) as reader:
            if only is not None:
                part = {self.stacked[0]: (only, 1)}
                region = [part.get(axis, (0, n)) for axis, n in enumerate(self.lengths)]
                reader.SetExtractIndex([start for start, _ in region])
                reader.SetExtractSize([length for _, length in region])
            image = reader.Execute()
        array: Raw = _simpleitk().GetArrayFromImage(image)
        width, height = self.lengths[self.first : self.first + 2]
        return array.reshape(-1, height, width, self.lengths[0] if self.first else self.channels)

    def _can_extract(self) -> bool:
        """Whether ITK reads one frame without the rest, and rightly.

        ITK 5.4 gives wrong values for MetaImage in ASCII and breaks the heap on NIfTI with
        channels; for NRRD and DICOM it would read the whole file again for each frame.
        """
        if self.kind == "MetaImage":
            return re.search(rb"(?m)^BinaryData[ \t]*=[ \t]*True", head_of(self.path)) is not None
        return self.kind == "NIfTI" and self.channels == 1


def _simpleitk() -> Any:
    """SimpleITK without its warnings."""
    sitk: Any = importlib.import_module("SimpleITK")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk


@contextmanager
def _itk(path: Path, kind: str, needed: int, without_geometry: bool = False) -> Iterator[Any]:
    """An ImageFileReader of the file; what it refuses in the block becomes an ImageError."""
    reader = _simpleitk().ImageFileReader()
    reader.SetImageIO(f"{ITK_NAMES[kind]}ImageIO")
    try:
        with _acceptable(path, kind, without_geometry) as name, bounded_memory(needed):
            reader.SetFileName(str(name))
            yield reader
    except RuntimeError as error:
        raise damaged(kind) from error
    except OSError as error:
        raise unreadable(error) from error


@contextmanager
def _acceptable(path: Path, kind: str, without_geometry: bool) -> Iterator[Path]:
    """The file, or one that stands in for it where ITK refuses its name or its geometry."""
    if kind != "NIfTI" and not without_geometry:
        yield path
        return
    with TemporaryDirectory() as folder:
        stand_in = Path(folder) / ("a.nii.gz" if is_gzip(path) else "a.nii")
        if kind == "NIfTI":  # alone is refused where the suffix is not its own
            stand_in.symlink_to(path.absolute())
        else:
            stand_in.write_bytes(_strike_geometry(path, kind))
        yield stand_in


def _strike_geometry(path: Path, kind: str) -> bytes:
    pattern, replacement, count = _GEOMETRY[kind]
    data = re.sub(pattern, replacement, path.read_bytes(), count=count)
    if kind != "MetaImage":
        return data
    beside = os.fsencode(path.absolute().parent) + b"/"  # where an .mhd has its pixels
    partner = rb"(?m)^(ElementDataFile[ \t]*=[ \t]*)(?![ \t]|LOCAL|LIST|/)"
    return re.sub(partner, lambda match: match[1] + beside, data, count=1)


def _instance_number(header: Any) -> float:
    try:
        return float(header.GetMetaData("0020|0013"))
    except (RuntimeError, ValueError):  # no such tag, or no number in it
        return math.inf
