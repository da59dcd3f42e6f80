"""Any supported file, or a folder of DICOM files -> grey frames and where their pixels lie.

`open_image` raises ImageError for a fault of the whole file. It reads a single image at once, so
that the faults of this image are raised there too. The frames of a stack are read one at a time by
`ImageSource.frames`, which yields a BadFrame for one that cannot be used and goes on.

Only one frame is in memory for TIFF, DICOM, and uncompressed MetaImage and NIfTI with one value per
pixel. Other stacks are read whole.

formats.py recognises a file; pictures.py, volumes.py and dicom.py read it.
"""

import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import cv2
import numpy as np

from model.frame import Geometry, Pixels
from model.images.formats import SUFFIXES, format_of, is_dicom, is_supported_name
from model.images.limits import (
    MAX_FRAMES,
    ImageError,
    ImageFile,
    MemoryBudget,
    Raw,
    Reader,
    unreadable_error,
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
    "to_grey",
]

BT_601 = (0.299, 0.587, 0.114)  # weights of R, G and B in luminance, the same as OpenCV's


@dataclass(frozen=True, eq=False)
class GreyFrame:
    """One image to find landmarks in.

    Args:
        pixels: (H, W), C-contiguous, 0..255; float32 if the values had to be stretched.
        index: number of the frame in its stack, from 0; None for a single image.
        slice_index: z index of the frame in the world of `geometry`.
    """

    pixels: Pixels
    index: int | None
    slice_index: int
    geometry: Geometry
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadFrame:
    """A frame that cannot be used, and a sentence that says why; `index` as in GreyFrame."""

    index: int | None
    reason: str


@dataclass(frozen=True)
class ImageSource:
    """An opened case: one image or a stack.

    `width`, `height` (px) and `geometry` are those of the first readable frame. Pages of a TIFF and
    files of a folder may differ, so each GreyFrame has its own size and geometry.
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
                read = partial(_raise, error)
            for k in range(file.count):
                item: GreyFrame | BadFrame
                try:
                    item = _read_frame(file, k, index, read)
                except ImageError as error:
                    item = BadFrame(index, str(error))
                yield item
                index += 1


def open_image(path: Path, budget: MemoryBudget | None = None) -> ImageSource:
    """Open one case: a file, or a folder whose DICOM files are its frames.

    A stack of three equal planes is one image: PSFHS ships its images like that.

    Args:
        budget: limits the memory that reading takes, now and for the frames. Threads of one process
            have to share one budget; by default this image has its own.

    Raises:
        ImageError: the file as a whole, or the single image in it, cannot be used.
    """
    budget = MemoryBudget() if budget is None else budget
    try:
        return _open_folder(path, budget) if path.is_dir() else _open_single_file(path, budget)
    except OSError as error:
        raise unreadable_error(error) from error


def _open_single_file(path: Path, budget: MemoryBudget) -> ImageSource:
    file = _read_header(path, budget)
    read = file.open()
    if file.count == 3 and _are_equal_planes(read):
        file = replace(file, count=1)
    if file.count == 1:
        single = _read_frame(file, 0, None, read)
        return ImageSource(*file.size, file.geometry, 1, (), single)
    return _stack_of((replace(file, open=lambda: read),))


def _open_folder(folder: Path, budget: MemoryBudget) -> ImageSource:
    """The DICOM files of a folder as frames, ordered by InstanceNumber, then by name."""
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and is_dicom(path)]
    if not paths:
        count = sum(is_supported_name(path) for path in folder.iterdir())
        raise ImageError(f"the folder holds {count} images: expected one, or DICOM files")
    if len(paths) == 1:
        return _open_single_file(paths[0], budget)
    files, errors = [], []
    for path in paths:
        try:
            files.append(_read_header(path, budget))
        except ImageError as error:
            errors.append(error)
            files.append(ImageFile(1, (0, 0), partial(_raise, error)))
    if len(errors) == len(paths):
        raise errors[0]
    return _stack_of(tuple(sorted(files, key=lambda file: file.instance_number)))


def _stack_of(files: tuple[ImageFile, ...]) -> ImageSource:
    """A stack of all the files' frames; files of size (0, 0) could not be opened."""
    count = sum(file.count for file in files)
    if count > MAX_FRAMES:
        raise ImageError(f"the stack has {count} frames, more than {MAX_FRAMES}: split it")
    first = next(file for file in files if file.size != (0, 0))
    return ImageSource(*first.size, first.geometry, count, files)


def _read_header(path: Path, budget: MemoryBudget) -> ImageFile:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise ImageError("the file cannot be read: it is a pipe, a socket or a device")
        kind = format_of(path)
        if kind in ITK_NAMES:
            return open_volume(path, kind, budget)
        return open_tiff(path, budget) if kind == "TIFF" else open_picture(path, kind, budget)
    except OSError as error:
        raise unreadable_error(error) from error


def _are_equal_planes(read: Reader) -> bool:
    try:
        first = read(0)
        return all(np.array_equal(first, read(k)) for k in (1, 2))
    except ImageError:  # a stack with a bad frame, which `frames` will report
        return False


def _read_frame(file: ImageFile, k: int, index: int | None, read: Reader) -> GreyFrame:
    """The k-th frame of a file, which is frame `index` of its stack."""
    slice_index = k if file.along_z else 0
    return GreyFrame(to_grey(read(k)), index, slice_index, file.geometry, file.warnings)


def _raise(error: ImageError, _: int = 0) -> NoReturn:
    """A stand-in for the `open` or the reader of a file that cannot be opened."""
    raise error


# ---- Pixel values of any type and range -> grey levels


def to_grey(raw: Raw) -> Pixels:
    """(H, W[, channels]) of any type -> (H, W) in 0..255.

    Integers that all lie in 0..255 stay as they are, in uint8. Other values are stretched to
    0..255, in float32.

    Raises:
        ImageError: a value is not finite, all are equal, or they are too far apart.
    """
    raw = raw[..., :3] if raw.ndim == 3 else raw[..., np.newaxis]
    if raw.dtype.kind == "f":
        if not np.isfinite(raw).all():
            raise ImageError("the image has pixels that are NaN or infinite")
    elif raw.min() >= 0 and raw.max() <= 255:
        raw = raw.astype(np.uint8, copy=False)
    grey = _luminance(raw)
    low, high = float(grey.min()), float(grey.max())
    if low == high:
        raise ImageError("the image is constant: all its pixels have the same value")
    if grey.dtype == np.uint8:
        return np.ascontiguousarray(grey)
    if not 1e-300 < high - low < 1e300:
        raise ImageError(f"values from {low:g} to {high:g} cannot be spread over 256 grey levels")
    stretched = np.empty(grey.shape, np.float32)
    for row, values in zip(stretched, grey, strict=True):  # row by row: no whole copy in float64
        row[:] = (values.astype(np.float64) - low) * (255 / (high - low))
    return stretched


def _luminance(raw: Raw) -> Raw:
    """(H, W, 1 or 3) -> (H, W); equal channels stay exact."""
    if all(np.array_equal(raw[..., 0], raw[..., k]) for k in range(1, raw.shape[2])):
        return raw[..., 0]
    if raw.dtype == np.uint8:
        return cv2.cvtColor(np.ascontiguousarray(raw), cv2.COLOR_RGB2GRAY)
    grey: Raw = np.einsum("hwc,c->hw", raw, BT_601)  # unlike @, it makes no copy in float64
    return grey
