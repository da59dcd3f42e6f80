"""MetaImage, NIfTI, NRRD, and the DICOM frames that dicom.py finds, through SimpleITK.

SimpleITK is imported when it is first needed, because the import takes 0.4 s. "ITK" below is the
library in C++ that it wraps.
"""

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
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from model.frame import IDENTITY, Geometry
from model.images.dicom import open_dicom
from model.images.formats import is_gzip, read_head
from model.images.limits import (
    MAX_LENGTH_MM,
    MIN_SIDE,
    ImageError,
    ImageFile,
    MemoryBudget,
    Raw,
    Reader,
    are_sane_lengths,
    check_bytes,
    check_channels,
    check_size,
    damaged_error,
    is_pixel_size,
    unreadable_error,
)

ITK_NAMES = {"MetaImage": "Meta", "NIfTI": "Nifti", "NRRD": "Nrrd", "DICOM": "GDCM"}

# Beyond these a direction matrix is damaged, or its axes do not span three dimensions.
_MAX_DIRECTION, _MIN_DETERMINANT = 1e6, 1e-6

# The geometry in a header: what matches it, and how many matches are removed at most.
_GEOMETRY_FIELDS = {
    "MetaImage": (rb"(?m)^(?:Element(?:Spacing|Size)|TransformMatrix)[ \t]*=.*\n", 3),
    "NRRD": (rb"(?m)^space[a-z ]*:.*\n", 5),
}
_COMPRESSED_METAIMAGE = re.compile(rb"(?m)^CompressedData[ \t]*=[ \t]*[Tt1]")
_BINARY_METAIMAGE = re.compile(rb"(?m)^BinaryData[ \t]*=[ \t]*True")
_METAIMAGE_DATA_FILE = re.compile(rb"(?m)^ElementDataFile[ \t]*=[ \t]*(.*?)[ \t\r]*\n")
_RELATIVE_DATA_FILE = re.compile(rb"(?m)^(ElementDataFile[ \t]*=[ \t]*)(?![ \t]|LOCAL|LIST|/)")


# ---- Opening a file


def open_volume(path: Path, kind: str, budget: MemoryBudget) -> ImageFile:
    """A file of one of the `ITK_NAMES`: one image, or a stack of them."""
    if kind == "DICOM":
        return open_dicom(path, lambda frame: _open_with_itk(frame, kind, budget))
    return _open_with_itk(path, kind, budget)


def _open_with_itk(path: Path, kind: str, budget: MemoryBudget) -> ImageFile:
    """A file as ITK understands it. A DICOM file must have one frame."""
    with _itk_reader(path, kind, budget, path.stat().st_size) as header:
        header.ReadImageInformation()
        value = _import_simpleitk().Image([1, 1], header.GetPixelID())
    lengths, channels = header.GetSize(), header.GetNumberOfComponents()
    if len(lengths) < 2 or 0 in lengths:
        raise damaged_error(kind)
    check_channels(channels)
    # An array (H, W, 3) saved as if its channels were an axis of space comes with x = 3.
    may_be_channels = channels == 1 and len(lengths) > 2 and lengths[0] in (1, 3, 4)
    x_axis = 1 if may_be_channels and min(lengths[1:3]) >= MIN_SIDE else 0
    stacked = [axis for axis in range(x_axis + 2, len(lengths)) if lengths[axis] > 1]
    geometry, warnings, itk_accepts = _read_geometry(header, x_axis)
    pixel_bytes = channels * value.GetSizeOfPixelComponent()
    volume = _Volume(
        path, kind, budget, lengths, channels, pixel_bytes, x_axis, stacked, itk_accepts
    )
    volume.check()
    count = lengths[stacked[0]] if stacked else 1
    size = lengths[x_axis], lengths[x_axis + 1]
    return ImageFile(count, size, volume.open, geometry, stacked == [2], warnings)


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
    budget: MemoryBudget
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
        check_bytes(self.frame_bytes)

    @property
    def total_bytes(self) -> int:
        return math.prod(self.lengths) * self.pixel_bytes

    @property
    def frame_bytes(self) -> int:
        return self.total_bytes // math.prod(self.lengths[axis] for axis in self.stacked)

    def open(self) -> Reader:
        """A reader of single frames, or of the whole file.

        The whole file is read at once if ITK cannot read single frames of it, or would uncompress
        the file anew for each.
        """
        by_frames = bool(self.stacked) and self.itk_accepts and self._has_readable_frames()
        if by_frames and not _is_compressed(self.path, self.kind):
            return self._read_frame
        needed = max(self.total_bytes, self.path.stat().st_size)
        check_bytes(needed, "save them as .mha without compression, which is read by frames")
        if _is_truncated(self.path, self.kind, self.total_bytes):
            raise damaged_error(self.kind)
        frames = self._read(needed)
        return lambda k: frames[k]

    def _read_frame(self, k: int) -> Raw:
        frame: Raw = self._read(self.frame_bytes, k)[0]
        return frame

    def _read(self, needed: int, only: int | None = None) -> Raw:
        """(frames, H, W, channels): all frames, or only one.

        Args:
            needed: bytes of the pixels that are read.
        """
        with _itk_reader(self.path, self.kind, self.budget, needed, not self.itk_accepts) as reader:
            if only is not None:
                part = {self.stacked[0]: (only, 1)}
                region = [part.get(axis, (0, n)) for axis, n in enumerate(self.lengths)]
                reader.SetExtractIndex([start for start, _ in region])
                reader.SetExtractSize([length for _, length in region])
            image = reader.Execute()
        array: Raw = _import_simpleitk().GetArrayFromImage(image)
        width, height = self.lengths[self.x_axis : self.x_axis + 2]
        return array.reshape(-1, height, width, self.lengths[0] if self.x_axis else self.channels)

    def _has_readable_frames(self) -> bool:
        """Whether ITK reads one frame without the rest, and correctly.

        ITK 5.4 returns wrong values for MetaImage in ASCII, and corrupts the heap for NIfTI with
        channels. For NRRD it would read the whole file again for each frame.
        """
        if self.kind == "MetaImage":
            return _BINARY_METAIMAGE.search(read_head(self.path)) is not None
        return self.kind == "NIfTI" and self.channels == 1


# ---- Geometry


def _read_geometry(header: Any, x_axis: int) -> tuple[Geometry, tuple[str, ...], bool]:
    """The geometry, warnings about it, and whether ITK reads pixels with such a geometry.

    Args:
        header: SimpleITK's reader, after it has read the header.
        x_axis: the axis along x, as in `_Volume`.
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
    x, y = float(spacing[0]), float(spacing[1])
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
def _itk_reader(
    path: Path, kind: str, budget: MemoryBudget, needed: int, without_geometry: bool = False
) -> Iterator[Any]:
    """An ImageFileReader of the file. ITK's errors in the block become ImageErrors.

    Args:
        needed: bytes of the pixels, or of the file, which limit the memory of the block.
        without_geometry: ITK does not see the geometry, because it would refuse it.
    """
    reader = _import_simpleitk().ImageFileReader()
    reader.SetImageIO(f"{ITK_NAMES[kind]}ImageIO")
    try:
        with (
            _acceptable_file(path, kind, without_geometry) as file,
            budget.limit_growth(needed),
            _silence_stderr(),
        ):
            reader.SetFileName(str(file))
            yield reader
    except RuntimeError as error:
        raise damaged_error(kind) from error
    except OSError as error:
        raise unreadable_error(error) from error


def _import_simpleitk() -> Any:
    """SimpleITK without its warnings."""
    sitk: Any = importlib.import_module("SimpleITK")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk


@contextmanager
def _silence_stderr() -> Iterator[None]:
    """Nothing reaches stderr in the block. Libraries such as OpenJPEG print there directly."""
    before = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@contextmanager
def _acceptable_file(path: Path, kind: str, without_geometry: bool) -> Iterator[Path]:
    """The file, or a temporary one in its place if ITK would refuse its name or its geometry."""
    if kind != "NIfTI" and not without_geometry:
        yield path
        return
    with TemporaryDirectory() as folder:
        file = Path(folder) / ("a.nii.gz" if is_gzip(path) else "a.nii")
        if kind == "NIfTI":  # the only format that ITK refuses by its suffix
            file.symlink_to(path.absolute())
        else:
            file.write_bytes(_remove_geometry(path, kind))
        yield file


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
