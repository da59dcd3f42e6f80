"""MetaImage, NIfTI and NRRD, through SimpleITK. "ITK" below is the library in C++ that it wraps."""

import gzip
import importlib
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from model.frame import IDENTITY, Geometry
from model.images.formats import is_gzip, read_head
from model.images.grey import over_black
from model.images.limits import (
    MAX_LENGTH_MM,
    MIN_SIDE,
    ImageError,
    ImageFile,
    Raw,
    are_sane_lengths,
    check_bytes,
    check_channels,
    check_size,
    damaged_error,
    is_pixel_size,
    unreadable_error,
)

_ITK_NAMES = {"MetaImage": "Meta", "NIfTI": "Nifti", "NRRD": "Nrrd"}

# Beyond these a direction matrix is damaged, or its axes do not span three dimensions.
_MAX_DIRECTION, _MIN_DETERMINANT = 1e6, 1e-6

# The geometry in a header: what matches it, and how many matches are removed at most.
_GEOMETRY_FIELDS = {
    "MetaImage": (rb"(?m)^(?:Element(?:Spacing|Size)|TransformMatrix)[ \t]*=.*\n", 3),
    "NRRD": (rb"(?m)^space[a-z ]*:.*\n", 5),
}
_NIFTI_FLOATS = {16: "f4", 64: "f8"}  # number of a type in the header -> numpy's name
_COMPRESSED_METAIMAGE = re.compile(rb"(?m)^CompressedData[ \t]*=[ \t]*[Tt1]")
_BINARY_METAIMAGE = re.compile(rb"(?m)^BinaryData[ \t]*=[ \t]*True")
_METAIMAGE_DATA_FILE = re.compile(rb"(?m)^ElementDataFile[ \t]*=[ \t]*(.*?)[ \t\r]*\n")
_RELATIVE_DATA_FILE = re.compile(rb"(?m)^(ElementDataFile[ \t]*=[ \t]*)(?![ \t]|LOCAL|LIST|/)")


# ---- Opening a file


def open_volume(path: Path, kind: str) -> ImageFile:
    """A MetaImage, NIfTI or NRRD file: one image, or a stack of them."""
    with _itk_reader(path, kind) as header:
        header.ReadImageInformation()
        value = import_simpleitk().Image([1, 1], header.GetPixelID())
    lengths, channels = header.GetSize(), header.GetNumberOfComponents()
    if len(lengths) < 2 or 0 in lengths:
        raise damaged_error(kind)
    check_channels(channels)
    # An array (H, W, 3) saved as if its channels were an axis of space comes with x = 3.
    may_be_channels = channels == 1 and len(lengths) > 2 and lengths[0] in (1, 3, 4)
    x_axis = 1 if may_be_channels and min(lengths[1:3]) >= MIN_SIDE else 0
    stacked = [axis for axis in range(x_axis + 2, len(lengths)) if lengths[axis] > 1]
    geometry, warnings, itk_accepts = read_geometry(header, x_axis, kind == "NIfTI")
    pixel_bytes = channels * value.GetSizeOfPixelComponent()
    volume = _Volume(path, kind, lengths, channels, pixel_bytes, x_axis, stacked, itk_accepts)
    volume.check()
    return ImageFile(
        lengths[stacked[0]] if stacked else 1,
        (lengths[x_axis], lengths[x_axis + 1]),
        volume.read_whole if volume.is_read_whole else volume.read_frame,
        volume.needed,
        volume.is_read_whole,
        geometry,
        stacked == [2],
        warnings,
    )


@dataclass(frozen=True)
class _Volume:
    """What the header says of the pixels.

    Args:
        lengths: the lengths of the file's axes, the fastest axis first.
        channels: values in a pixel, which takes `pixel_bytes`.
        x_axis: the axis along x: 0, or 1 if the channels are axis 0.
        stacked: the axis of the frames, if there are several; more axes are an error.
        itk_accepts: whether ITK reads the pixels with the header's geometry.
    """

    path: Path
    kind: str
    lengths: tuple[int, ...]
    channels: int
    pixel_bytes: int
    x_axis: int
    stacked: list[int]
    itk_accepts: bool

    def check(self) -> None:
        """Raise ImageError if this is not one image or one stack, or if a frame is too large."""
        width, height = self.lengths[self.x_axis : self.x_axis + 2]
        check_size(width, height)
        if len(self.stacked) > 1:
            shape = " x ".join(map(str, self.lengths))
            raise ImageError(
                f"the file's shape is {shape}: expected one image or one stack of images"
            )
        if self.is_read_whole and self.stacked:
            remedy = "save them as .mha without compression, which is read by frames"
            check_bytes(self.needed, remedy)
        check_bytes(self.needed)

    @cached_property
    def is_read_whole(self) -> bool:
        """Whether ITK cannot read single frames, or would uncompress the file anew for each."""
        by_frames = bool(self.stacked) and self.itk_accepts and self._has_readable_frames()
        return not by_frames or _is_compressed(self.path, self.kind)

    @property
    def needed(self) -> int:
        """Bytes of the pixels that are read at once, or of the file if that is larger."""
        total = math.prod(self.lengths) * self.pixel_bytes
        if self.is_read_whole:
            return max(total, self.path.stat().st_size)
        return total // math.prod(self.lengths[axis] for axis in self.stacked)

    def read_whole(self, _: int) -> Raw:
        """(frames, H, W, channels)."""
        if _is_truncated(self.path, self.kind, math.prod(self.lengths) * self.pixel_bytes):
            raise damaged_error(self.kind)
        return self._read()

    def read_frame(self, k: int) -> Raw:
        """(H, W, channels)."""
        frame: Raw = self._read({self.stacked[0]: (k, 1)})[0]
        return frame

    def _read(self, part: dict[int, tuple[int, int]] | None = None) -> Raw:
        """(frames, H, W, channels) of the whole file or a part of it.

        Args:
            part: of an axis the first index, and how many.
        """
        with _itk_reader(self.path, self.kind, not self.itk_accepts) as reader:
            if part is not None:
                region = [part.get(axis, (0, n)) for axis, n in enumerate(self.lengths)]
                reader.SetExtractIndex([start for start, _ in region])
                reader.SetExtractSize([length for _, length in region])
            image = reader.Execute()
        array: Raw = import_simpleitk().GetArrayFromImage(image)
        if self.kind == "NIfTI" and array.dtype.kind == "f":
            _check_nifti_is_finite(self.path, array.size, 0 if part is None else region[-1][0])
        width, height = self.lengths[self.x_axis : self.x_axis + 2]
        channels = self.lengths[0] if self.x_axis else self.channels
        pixels = array.reshape(-1, height, width, channels)
        if channels == 4 and pixels.dtype in (np.uint8, np.uint16) and pixels[..., 3].any():
            return over_black(pixels[..., :3], pixels[..., 3:], np.iinfo(pixels.dtype).max)
        return pixels

    def _has_readable_frames(self) -> bool:
        """Whether ITK reads one frame without the rest, and correctly.

        ITK 5.4 returns wrong values for MetaImage in ASCII, and corrupts the heap for NIfTI with
        channels. For NRRD it would read the whole file again for each frame.
        """
        if self.kind == "MetaImage":
            return _BINARY_METAIMAGE.search(read_head(self.path)) is not None
        return self.kind == "NIfTI" and self.channels == 1


# ---- Geometry


def read_geometry(
    header: Any, x_axis: int = 0, signs_are_free: bool = False
) -> tuple[Geometry, tuple[str, ...], bool]:
    """The geometry, warnings about it, and whether ITK reads pixels with such a geometry.

    Args:
        header: SimpleITK's reader, after it has read the header.
        x_axis: the axis along x, as in `_Volume`.
        signs_are_free: whether a negative spacing is a length, as in NIfTI.
    """
    axes = [1, 2, 0] if x_axis else [0, 1, 2]
    dimensions = header.GetDimension()
    matrix = np.eye(max(dimensions, 3))
    matrix[:dimensions, :dimensions] = np.reshape(header.GetDirection(), (dimensions, dimensions))
    matrix = matrix[:3, axes]
    spacing = np.array([*header.GetSpacing(), 1.0])[axes]
    origin = np.array([*header.GetOrigin(), 0.0])[:3]
    is_sane = are_sane_lengths(spacing)
    in_range = (np.abs(matrix) < _MAX_DIRECTION).all()
    has_axes = bool(in_range and abs(np.linalg.det(matrix)) > _MIN_DETERMINANT)
    # ITK says 1 x 1 if the file says nothing. Most files that say 1 x 1 themselves do not know.
    is_unknown = (spacing[:2] == 1).all()
    x, y = (float(side) for side in (np.abs(spacing[:2]) if signs_are_free else spacing[:2]))
    spacing_mm = (x, y) if is_pixel_size([x, y]) and not is_unknown else None
    warnings: tuple[str, ...] = ()
    if spacing_mm is None and not is_unknown:
        size = f"{x:g} x {y:g} mm"
        warnings = (f"the file's pixel size of {size} is impossible: lengths are given in px only",)
    if not has_axes:
        warnings += ("the file's axes do not span three dimensions: they are taken as unrotated",)
    geometry = Geometry(
        spacing_mm,
        tuple(np.where(is_sane, spacing, 1.0).tolist()),
        tuple(np.where(np.abs(origin) < MAX_LENGTH_MM, origin, 0.0).tolist()),
        tuple(matrix.ravel().tolist()) if has_axes else IDENTITY,
    )
    return geometry, warnings, bool(is_sane.all()) and has_axes


# ---- SimpleITK


@contextmanager
def _itk_reader(path: Path, kind: str, without_geometry: bool = False) -> Iterator[Any]:
    """An ImageFileReader of the file. ITK's errors in the block become ImageErrors.

    Args:
        without_geometry: ITK does not see the geometry, because it would refuse it.
    """
    reader = import_simpleitk().ImageFileReader()
    reader.SetImageIO(f"{_ITK_NAMES[kind]}ImageIO")
    try:
        with _acceptable_file(path, kind, without_geometry) as file:
            reader.SetFileName(str(file))
            yield reader
    except RuntimeError as error:
        raise damaged_error(kind) from error
    except OSError as error:
        raise unreadable_error(error) from error


def import_simpleitk() -> Any:
    """SimpleITK without its warnings; the import takes 0.4 s."""
    sitk: Any = importlib.import_module("SimpleITK")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk


@contextmanager
def _acceptable_file(path: Path, kind: str, without_geometry: bool) -> Iterator[Path]:
    """The file, or a temporary one in its place if ITK would refuse its name or its geometry.

    ITK refuses NIfTI by its suffix, and would crash at a path that is not UTF-8.
    """
    is_utf8 = _is_utf8(str(path.absolute()))
    if kind != "NIfTI" and not without_geometry and is_utf8:
        yield path
        return
    with TemporaryDirectory() as folder:
        file = Path(folder) / ("a.nii.gz" if is_gzip(path) else "a.nii")
        if kind == "NIfTI":
            file.symlink_to(path.absolute())
        elif not without_geometry:
            beside = Path(folder) / "beside"  # where the data file of an .mhd lies
            beside.symlink_to(path.absolute().parent)
            file = beside / path.name
            if not _is_utf8(path.name):
                file = Path(folder) / "a.mha"
                file.symlink_to(path.absolute())
        else:
            file.write_bytes(_remove_geometry(path, kind))
        yield file


def _is_utf8(text: str) -> bool:
    """Whether a path is text, without bytes that no encoding explains."""
    return os.fsencode(text).decode(errors="replace") == text


def _remove_geometry(path: Path, kind: str) -> bytes:
    """The file's content without its geometry, for a file in another folder."""
    pattern, count = _GEOMETRY_FIELDS[kind]
    data = re.sub(pattern, b"", path.read_bytes(), count=count)
    if kind != "MetaImage":
        return data
    folder = os.fsencode(path.absolute().parent) + b"/"  # where the data file of an .mhd lies
    return _RELATIVE_DATA_FILE.sub(lambda match: match[1] + folder, data, count=1)


# ---- Whether a file holds as many pixels as its header claims


def _is_compressed(path: Path, kind: str) -> bool:
    """Whether a MetaImage or NIfTI file is compressed."""
    if kind == "MetaImage":
        return _COMPRESSED_METAIMAGE.search(read_head(path)) is not None
    return kind == "NIfTI" and is_gzip(path)


def _is_truncated(path: Path, kind: str, needed: int) -> bool:
    """Whether pixels are missing and ITK would not notice.

    ITK fills up NIfTI and compressed MetaImage with zeros, or never ends on single frames of the
    latter. Other files it refuses by itself.

    Args:
        needed: bytes of the pixels.
    """
    if kind == "NIfTI":
        return _is_nifti_truncated(path)
    return _is_compressed(path, kind) and _is_metaimage_truncated(path, needed)


def _is_nifti_truncated(path: Path) -> bool:
    try:
        with (gzip.open if is_gzip(path) else open)(path, "rb") as file:
            head = file.read(352)
            order = "<" if 1 <= struct.unpack_from("<h", head, 40)[0] <= 7 else ">"
            dimensions, *lengths = struct.unpack_from(order + "8h", head, 40)
            (bits,) = struct.unpack_from(order + "h", head, 72)
            (start,) = struct.unpack_from(order + "f", head, 108)
            file.seek(int(start) + math.prod(lengths[:dimensions]) * bits // 8 - 1)
            return not file.read(1)
    except (EOFError, OSError, OverflowError, ValueError, zlib.error):  # impossible numbers too
        return True


def _check_nifti_is_finite(path: Path, count: int, frame: int) -> None:
    """Raise ImageError if floats are NaN or infinite: ITK makes zeros of them.

    Args:
        count: of the values that are looked at; frame: so many times as many lie before them.
    """
    with (gzip.open if is_gzip(path) else open)(path, "rb") as file:
        head = file.read(352)
        order = "<" if 1 <= struct.unpack_from("<h", head, 40)[0] <= 7 else ">"
        kind, _ = struct.unpack_from(order + "2h", head, 70)
        if kind not in _NIFTI_FLOATS:
            return
        dtype = np.dtype(order + _NIFTI_FLOATS[kind])
        (start,) = struct.unpack_from(order + "f", head, 108)
        file.seek(int(start) + frame * count * dtype.itemsize)
        values = np.frombuffer(file.read(count * dtype.itemsize), dtype)
    if not np.isfinite(values).all():
        raise ImageError("the image has pixels that are NaN or infinite")


def _is_metaimage_truncated(path: Path, needed: int) -> bool:
    """Whether a compressed MetaImage unpacks to fewer bytes than needed."""
    data_file = _METAIMAGE_DATA_FILE.search(read_head(path))
    if data_file is None:
        return True
    is_local = data_file[1] == b"LOCAL"
    unpack = zlib.decompressobj(wbits=47)  # gzip or zlib
    try:
        with (path if is_local else path.parent / os.fsdecode(data_file[1])).open("rb") as file:
            file.seek(data_file.end() if is_local else 0)
            while needed > 0 and (data := unpack.unconsumed_tail or file.read(2**20)):
                needed -= len(unpack.decompress(data, 2**24))
                if unpack.eof:
                    break
    except (OSError, ValueError, zlib.error):  # a name that no file can have is a ValueError
        return True
    return needed > 0
