"""Any supported file, or a folder of DICOM files -> grey frames and where their pixels lie.

`open_image` raises ImageError for a fault of the whole file. It reads a single image at once, so
that the faults of this image are raised there too. The frames of a stack are read one at a time by
`ImageSource.frames`, which yields a BadFrame for one that cannot be used and goes on.

Only one frame is in memory for TIFF, DICOM, and uncompressed MetaImage and NIfTI with one value per
pixel. Other stacks are read whole.

formats.py recognises a file. pictures.py reads PNG, JPEG and BMP here; tiff.py, dicom.py and
volumes.py read the others, in a reader process if `open_image` gets one.
"""

import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np

from model.frame import Geometry, Pixels
from model.images.formats import SUFFIXES, format_of, is_dicom, is_supported_name
from model.images.grey import to_grey
from model.images.limits import MAX_FRAMES, ImageError, ImageFile, unreadable_error
from model.images.pictures import open_picture
from model.images.reader_pool import Readers
from model.images.reader_process import open_file

__all__ = [
    "SUFFIXES",
    "BadFrame",
    "GreyFrame",
    "ImageError",
    "ImageSource",
    "is_supported_name",
    "open_image",
]

PICTURES = {"PNG", "JPEG", "BMP"}  # whose decoders have proved safe, so that they run here
# Among the pixels that are not black, the largest share that may differ in three planes of colour.
MOST_COLOURED = 0.1


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
            for k in range(file.count):
                item: GreyFrame | BadFrame
                try:
                    item = _read_frame(file, k, index)
                except ImageError as error:
                    item = BadFrame(index, str(error))
                yield item
                index += 1


def open_image(path: Path, readers: Readers | None = None) -> ImageSource:
    """Open one case: a file, or a folder whose DICOM files are its frames.

    Three slices that are the red, green and blue of one image are one image: PSFHS ships its images
    like that.

    Args:
        readers: read what could end this process, now and for the frames, and bound the memory.
            Threads of one process have to share one. By default everything is read in this
            process, which is right for files that one trusts.

    Raises:
        ImageError: the file as a whole, or the single image in it, cannot be used.
    """
    try:
        if path.is_dir():
            return _open_folder(path, readers)
        return _open_single_file(path, readers)
    except OSError as error:
        raise unreadable_error(error) from error


def _open_single_file(path: Path, readers: Readers | None) -> ImageSource:
    file = _open_file(path, readers)
    if file.is_read_whole:
        frames = file.read(0)
        file = replace(file, read=lambda k: frames[k])
    if file.count == 3:
        file = _as_one_colour_image(file)
    if file.count == 1:
        single = _read_frame(file, 0, None)
        height, width = single.pixels.shape
        return ImageSource(width, height, file.geometry, 1, (), single)
    return _stack_of((file,))


def _open_folder(folder: Path, readers: Readers | None) -> ImageSource:
    """The DICOM files of a folder as frames, ordered by InstanceNumber, then by name."""
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and is_dicom(path)]
    if not paths:
        count = sum(is_supported_name(path) for path in folder.iterdir())
        raise ImageError(f"the folder holds {count} images: expected one, or DICOM files")
    if len(paths) == 1:
        return _open_single_file(paths[0], readers)
    files, errors = [], []
    for path in paths:
        try:
            files.append(_open_file(path, readers))
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


def _open_file(path: Path, readers: Readers | None) -> ImageFile:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise ImageError("the file cannot be read: it is a pipe, a socket or a device")
        kind = format_of(path)
        if kind in PICTURES:
            file = open_picture(path, kind)
        else:
            file = open_file(path, kind) if readers is None else readers.open(path, kind)
    except OSError as error:
        raise unreadable_error(error) from error
    return file if readers is None else readers.wait_for_turn(file)


def _as_one_colour_image(file: ImageFile) -> ImageFile:
    """A file of three frames as one image, if they are its red, green and blue.

    They are if they are equal, or differ only where something coloured was drawn.
    """
    try:
        planes = [np.squeeze(file.read(k)) for k in range(3)]
    except ImageError:  # a stack with a bad frame, which `frames` will report
        return file
    first = planes[0]
    if all(np.array_equal(first, plane) for plane in planes):
        return replace(file, count=1, read=lambda _: first)
    if first.ndim != 2 or any(plane.shape != first.shape for plane in planes):
        return file
    has_padding = any(hasattr(plane, "mask") for plane in planes)
    pixels = (np.ma.stack if has_padding else np.stack)(planes, axis=-1)
    differs = (pixels != first[..., np.newaxis]).any(axis=-1)
    share = differs.sum() / max(1, np.count_nonzero((pixels != pixels.min()).any(axis=-1)))
    if share > MOST_COLOURED:
        return file
    warning = "three slices that differ in few pixels are read as the colours of one image"
    warnings = (*file.warnings, warning)
    return replace(file, count=1, read=lambda _: pixels, warnings=warnings)


def _read_frame(file: ImageFile, k: int, index: int | None) -> GreyFrame:
    """The k-th frame of a file, which is frame `index` of its stack."""
    try:
        grey = to_grey(file.read(k))
    except OSError as error:  # the file has disappeared
        raise unreadable_error(error) from error
    return GreyFrame(grey, index, k if file.along_z else 0, file.geometry, file.warnings)


def _raise(error: ImageError, _: int = 0) -> NoReturn:
    """Stands in for the `read` of a file that cannot be opened."""
    raise error
