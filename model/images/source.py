"""Any supported file, or a folder of DICOM files -> grey frames and where their pixels lie.

`open_image` raises ImageError for what concerns the whole file. It reads a single image at once, so
that this image's faults are raised there too; the frames of a stack are read one at a time by
`ImageSource.frames`, which does not raise for one that is unusable but yields a BadFrame. Pages of
a TIFF, DICOM, and MetaImage and NIfTI stacks that are not compressed and of one value a pixel are
never held whole; other stacks are.

formats.py recognises a file, raster.py and volumes.py read it, grey.py makes grey of its values.
"""

import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np

from model.frame import Geometry
from model.images.formats import SUFFIXES, format_of, is_dicom, is_supported_name
from model.images.grey import Grey, to_grey
from model.images.limits import (
    MAX_FRAMES,
    ImageError,
    ImageFile,
    MemoryBudget,
    Reader,
    unreadable,
)
from model.images.pictures import open_picture, open_tiff
from model.images.volumes import ITK_NAMES, open_volume

__all__ = [
    "SUFFIXES",
    "BadFrame",
    "GreyFrame",
    "ImageError",
    "ImageSource",
    "is_supported_name",
    "open_image",
]


@dataclass(frozen=True, eq=False)
class GreyFrame:
    """One image to find landmarks in.

    Args:
        pixels: (H, W), C-contiguous, 0..255; float32 where the values had to be stretched.
        index: number of the frame in its stack, from 0; None for a single image.
        slice_index: the z index in the world of `geometry`.
    """

    pixels: Grey
    index: int | None
    slice_index: int
    geometry: Geometry
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadFrame:
    """A frame that cannot be used, and the sentence that says why; `index` as in GreyFrame."""

    index: int | None
    reason: str


@dataclass(frozen=True)
class ImageSource:
    """An opened case: one image or a stack.

    `width`, `height` (px) and `geometry` are those of the first readable frame; pages of a TIFF and
    files of a folder may differ, so each GreyFrame has its own.
    """

    width: int
    height: int
    geometry: Geometry
    frame_count: int
    _files: tuple[ImageFile, ...]
    _single: GreyFrame | None = None

    @property
    def is_stack(self) -> bool:
        return self.frame_count > 1

    def frames(self) -> Iterator[GreyFrame | BadFrame]:
        """Every frame in order, `frame_count` of them, each read when it is asked for."""
        if self._single is not None:
            yield self._single
            return
        index = 0
        for file in self._files:
            try:
                read = file.open()
            except ImageError as error:
                read = partial(_refuse, error)
            for k in range(file.count):
                item: GreyFrame | BadFrame
                try:
                    item = _grey_frame(file, k, index, read)
                except ImageError as error:
                    item = BadFrame(index, str(error))
                yield item
                index += 1


def open_image(path: Path, budget: MemoryBudget | None = None) -> ImageSource:
    """Open one case: a file, or a folder whose DICOM files are its frames.

    Three equal planes are one image: PSFHS ships its images so.

    Args:
        budget: limits the memory that reading takes, of the frames too. Threads of one process have
            to share one; by default this image has a budget of its own.

    Raises:
        ImageError: the file as a whole, or the single image in it, cannot be used.
    """
    budget = MemoryBudget() if budget is None else budget
    try:
        return _open_folder(path, budget) if path.is_dir() else _open_one(path, budget)
    except OSError as error:
        raise unreadable(error) from error


def _open_one(path: Path, budget: MemoryBudget) -> ImageSource:
    file = _open_file(path, budget)
    read = file.open()
    if file.count == 3 and _are_equal_planes(read):
        file = replace(file, count=1)
    if file.count == 1:
        single = _grey_frame(file, 0, None, read)
        return ImageSource(*file.size, file.geometry, 1, (), single)
    return _stack((replace(file, open=lambda: read),))


def _open_folder(folder: Path, budget: MemoryBudget) -> ImageSource:
    """The DICOM files of a folder as frames, by InstanceNumber, then by name."""
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and is_dicom(path)]
    if not paths:
        count = sum(is_supported_name(path) for path in folder.iterdir())
        raise ImageError(f"the folder holds {count} images: expected one, or DICOM files")
    if len(paths) == 1:
        return _open_one(paths[0], budget)
    files, errors = [], []
    for path in paths:
        try:
            files.append(_open_file(path, budget))
        except ImageError as error:
            errors.append(error)
            files.append(ImageFile(1, (0, 0), partial(_refuse, error)))
    if len(errors) == len(paths):
        raise errors[0]
    return _stack(tuple(sorted(files, key=lambda file: file.number)))


def _stack(files: tuple[ImageFile, ...]) -> ImageSource:
    count = sum(file.count for file in files)
    if count > MAX_FRAMES:
        raise ImageError(f"the stack has {count} frames, more than {MAX_FRAMES}: split it")
    first = next(file for file in files if file.size != (0, 0))
    return ImageSource(*first.size, first.geometry, count, files)


def _open_file(path: Path, budget: MemoryBudget) -> ImageFile:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise ImageError("the file cannot be read: it is a pipe, a socket or a device")
        kind = format_of(path)
        if kind in ITK_NAMES:
            return open_volume(path, kind, budget)
        return open_tiff(path, budget) if kind == "TIFF" else open_picture(path, kind, budget)
    except OSError as error:
        raise unreadable(error) from error


def _are_equal_planes(read: Reader) -> bool:
    try:
        first = read(0)
        return all(np.array_equal(first, read(k)) for k in (1, 2))
    except ImageError:  # a stack with a bad frame, which frames() will name
        return False


def _grey_frame(file: ImageFile, k: int, index: int | None, read: Reader) -> GreyFrame:
    """The k-th frame of a file."""
    slice_index = k if file.along_z else 0
    return GreyFrame(to_grey(read(k)), index, slice_index, file.geometry, file.warnings)


def _refuse(error: ImageError, _: int = 0) -> NoReturn:
    """A Reader, or what opens one, of a file that cannot be opened."""
    raise error
