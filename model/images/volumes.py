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
from typing import Any

from model.images.complete import is_cut, is_packed
from model.images.dicom import open_dicom
from model.images.formats import head_of
from model.images.limits import (
    MIN_SIDE,
    ImageError,
    ImageFile,
    MemoryBudget,
    Raw,
    Reader,
    check_bytes,
    check_channels,
    check_size,
    damaged,
    unreadable,
)
from model.images.placing import placing
from model.images.stand_in import acceptable

ITK_NAMES = {"MetaImage": "Meta", "NIfTI": "Nifti", "NRRD": "Nrrd", "DICOM": "GDCM"}


def open_volume(path: Path, kind: str, budget: MemoryBudget) -> ImageFile:
    """A file of one of the `ITK_NAMES`: one image, or a stack of them."""
    if kind == "DICOM":
        return open_dicom(path, lambda frame: _open(frame, kind, budget))
    return _open(path, kind, budget)


def _open(path: Path, kind: str, budget: MemoryBudget) -> ImageFile:
    """A file as ITK understands it; a DICOM file must have one frame."""
    with _itk(path, kind, budget, path.stat().st_size) as header:
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
    geometry, warnings, readable = placing(header, first)
    pixel_bytes = channels * value.GetSizeOfPixelComponent()
    volume = _Volume(path, kind, budget, lengths, channels, pixel_bytes, first, stacked, readable)
    volume.check()
    count = lengths[stacked[0]] if stacked else 1
    size = lengths[first], lengths[first + 1]
    return ImageFile(count, size, volume.open, geometry, stacked == [2], warnings)


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
    budget: MemoryBudget
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
        needed = max(self.pixels * self.pixel_bytes, self.path.stat().st_size)
        check_bytes(needed, "save them as .mha without compression, which is read by frames")
        if is_cut(self.path, self.kind, self.pixels * self.pixel_bytes):
            raise damaged(self.kind)
        whole = self._pixels(needed)
        return lambda k: whole[k]

    def _frame(self, k: int) -> Raw:
        frame: Raw = self._pixels(self.frame_bytes, k)[0]
        return frame

    def _pixels(self, needed: int, only: int | None = None) -> Raw:
        """(frames, H, W, channels): all frames, or one; they take so many bytes."""
        with _itk(self.path, self.kind, self.budget, needed, not self.readable) as reader:
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
        channels; for NRRD it would read the whole file again for each frame.
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
def _itk(
    path: Path, kind: str, budget: MemoryBudget, needed: int, without_geometry: bool = False
) -> Iterator[Any]:
    """An ImageFileReader of the file; what it refuses in the block becomes an ImageError."""
    reader = _simpleitk().ImageFileReader()
    reader.SetImageIO(f"{ITK_NAMES[kind]}ImageIO")
    try:
        with (
            acceptable(path, kind, without_geometry) as name,
            budget.limit_growth(needed),
            _silence(),
        ):
            reader.SetFileName(str(name))
            yield reader
    except RuntimeError as error:
        raise damaged(kind) from error
    except OSError as error:
        raise unreadable(error) from error


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing gets to stderr: libjpeg and OpenJPEG, among others, print there by themselves."""
    before = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
