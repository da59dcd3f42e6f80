"""Any supported file, or a folder of DICOM files -> grey frames and where their pixels lie.

A file is recognised by its content, never by its name. `open_image` raises ImageError for what
concerns the whole file. It reads a single image at once, so that this image's faults are raised
there too; the frames of a stack are read one at a time by `ImageSource.frames`, which does not
raise for one that is unusable but yields a BadFrame. Pages of a TIFF, files of a folder, MetaImage
stacks, and NIfTI stacks of one value a pixel are never held whole; other stacks are.
"""

import gzip
import importlib
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# A second guard behind `_check_size`; it counts where nothing has loaded OpenCV before.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(64 * 2**20))

import cv2
import numpy as np
import numpy.typing as npt

from model.frame import IDENTITY, Geometry, Pair

MAX_PIXELS = 64 * 2**20  # of a frame
MIN_SIDE = 32  # px
MAX_FRAMES = 2**14
MAX_WHOLE_BYTES = 2**30  # of the pixels of a file that can only be read whole
SUFFIXES = (
    *(".mha", ".mhd", ".nii", ".nii.gz", ".nrrd", ".dcm"),
    *(".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp"),
)
_ITK = {"MetaImage": "Meta", "NIfTI": "Nifti", "NRRD": "Nrrd", "DICOM": "GDCM"}
_MAGIC = (
    ("DICOM", 128, b"DICM"),
    ("PNG", 0, b"\x89PNG\r\n\x1a\n"),
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("BMP", 0, b"BM"),
    *(("TIFF", 0, magic) for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ("NRRD", 0, b"NRRD"),
    ("NIfTI", 344, b"n+1\0"),
    ("NIfTI", 4, b"n+2\0"),
)
# ITK breaks the heap where NDims is above 10.
_METAIMAGE = re.compile(rb"(?:\w+[ \t]*=.*\n)*?NDims[ \t]*=[ \t]*[1-9]\s")
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG markers
# What to replace, and how often, in a file whose pixels ITK refuses because of the geometry. In
# DICOM only the tag Pixel Spacing gets another number, so that the file keeps its length.
_GEOMETRY = {
    "MetaImage": (rb"(?m)^(?:Element(?:Spacing|Size)|TransformMatrix)[ \t]*=.*\n", b"", 3),
    "NRRD": (rb"(?m)^space[a-z ]*:.*\n", b"", 5),
    "DICOM": (rb"\x28\x00\x30\x00", b"\x28\x00\x31\x00", 1),
}

Raw = npt.NDArray[Any]  # (H, W), or (H, W, channels) in the order RGB
Grey = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
Reader = Callable[[int], Raw]  # number of the frame in its file -> its pixels


class ImageError(ValueError):
    """Why a file or frame cannot be used: one sentence for a user, without the file's path."""


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
class _File:
    """What a header tells: `count` frames of `size` (width, height); `open` gives their reader."""

    count: int
    size: tuple[int, int]
    open: Callable[[], Reader]
    geometry: Geometry = field(default_factory=Geometry)
    along_z: bool = False
    warnings: tuple[str, ...] = ()
    number: float = math.inf  # DICOM's InstanceNumber

    def grey_frame(self, k: int, index: int | None, read: Reader) -> GreyFrame:
        slice_index = k if self.along_z else 0
        return GreyFrame(_grey(read(k)), index, slice_index, self.geometry, self.warnings)


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
    _files: tuple[_File, ...]
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
                read = partial(_refuse, str(error))
            for k in range(file.count):
                item: GreyFrame | BadFrame
                try:
                    item = file.grey_frame(k, index, read)
                except ImageError as error:
                    item = BadFrame(index, str(error))
                yield item
                index += 1


def is_supported_name(path: Path) -> bool:
    """Whether the name ends like an image's; the partner of an .mhd (.raw, .zraw) is none."""
    return path.name.lower().endswith(SUFFIXES)


def open_image(path: Path) -> ImageSource:
    """Open one case: a file, or a folder whose DICOM files are its frames.

    Three equal planes are one image: so PSFHS ships its images.

    Raises:
        ImageError: the file as a whole, or the single image in it, cannot be used.
    """
    try:
        return _open_folder(path) if path.is_dir() else _open_one(path)
    except OSError as error:
        raise _unreadable(error) from error


def _open_one(path: Path) -> ImageSource:
    file = _open_file(path)
    read = file.open()
    if file.count == 3 and _are_equal_planes(read):
        file = replace(file, count=1)
    if file.count == 1:
        single = file.grey_frame(0, None, read)
        return ImageSource(*file.size, file.geometry, 1, (), single)
    return _stack((replace(file, open=lambda: read),))


def _open_folder(folder: Path) -> ImageSource:
    """The DICOM files of a folder as frames, by InstanceNumber, then by name."""
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and _is_dicom(path)]
    if not paths:
        raise ImageError("the folder holds no DICOM file")
    if len(paths) == 1:
        return _open_one(paths[0])
    files, errors = [], []
    for path in paths:
        try:
            files.append(_open_file(path))
        except ImageError as error:
            errors.append(error)
            files.append(_File(1, (0, 0), partial(partial, _refuse, str(error))))
    if len(errors) == len(paths):
        raise errors[0]
    return _stack(tuple(sorted(files, key=lambda file: file.number)))


def _stack(files: tuple[_File, ...]) -> ImageSource:
    count = sum(file.count for file in files)
    if count > MAX_FRAMES:
        raise ImageError(f"the stack has {count} frames, more than {MAX_FRAMES}: split it")
    first = next(file for file in files if file.size != (0, 0))
    return ImageSource(*first.size, first.geometry, count, files)


def _open_file(path: Path) -> _File:
    try:
        kind = _kind(path)
        if kind in _ITK:
            return _volume(path, kind)
        return _tiff(path) if kind == "TIFF" else _picture(path, kind)
    except OSError as error:
        raise _unreadable(error) from error


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096)


def _is_gzip(path: Path) -> bool:
    return _head(path).startswith(b"\x1f\x8b")


def _is_dicom(path: Path) -> bool:
    """Whether a file of a folder is meant as a frame; a DICOMDIR only lists the others."""
    by_name = path.suffix.lower() == ".dcm"
    return path.name.upper() != "DICOMDIR" and (by_name or _head(path)[128:132] == b"DICM")


def _kind(path: Path) -> str:
    head = _head(path)
    if not head:
        raise ImageError("the file is empty")
    if _is_gzip(path):  # of these formats only NIfTI is packed as a whole
        try:
            head = zlib.decompressobj(wbits=31).decompress(head)
        except zlib.error as error:
            raise _damaged("gzip") from error
    for kind, offset, magic in _MAGIC:
        if head.startswith(magic, offset):
            return kind
    if _METAIMAGE.match(head):
        return "MetaImage"
    if path.suffix.lower() == ".dcm":  # old DICOM files have no magic bytes
        return "DICOM"
    raise ImageError(
        "the content is none of the supported formats: expected MetaImage, NIfTI, NRRD, DICOM, "
        "TIFF, PNG, JPEG or BMP"
    )


def _are_equal_planes(read: Reader) -> bool:
    try:
        first = read(0)
        return all(np.array_equal(first, read(k)) for k in (1, 2))
    except ImageError:  # a stack with a bad frame, which frames() will name
        return False


# Refusals


def _damaged(kind: str) -> ImageError:
    return ImageError(f"the {kind} data is damaged, truncated or of a variant that cannot be read")


def _unreadable(error: OSError) -> ImageError:
    return ImageError(f"the file cannot be read: {error.strerror or error}")


def _refuse(reason: str, _: int) -> Raw:
    """A Reader, once it has its reason, for a file that has none."""
    raise ImageError(reason)


def _check_size(width: int, height: int) -> None:
    size = f"{width} x {height} px"
    if width * height > MAX_PIXELS:
        raise ImageError(f"the image of {size} is larger than {MAX_PIXELS >> 20} Mpx: shrink it")
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"the image of {size} is too small: a side needs {MIN_SIDE} px or more")


def _check_channels(channels: int) -> None:
    if channels not in (1, 3, 4):
        raise ImageError(f"a pixel has {channels} values: expected grey (1), RGB (3) or RGBA (4)")


# Values


def _grey(raw: Raw) -> Grey:
    """(H, W[, channels]) of any type -> (H, W) in 0..255: uint8 as it is, or stretched float32."""
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
    stretched = grey.astype(np.float64)
    stretched -= low
    stretched *= 255 / (high - low)
    return np.ascontiguousarray(stretched, np.float32)


def _luminance(raw: Raw) -> Raw:
    """(H, W, 1 or 3) -> (H, W), by OpenCV's (ITU-R BT.601) weights; equal channels stay exact."""
    if all(np.array_equal(raw[..., 0], raw[..., k]) for k in range(1, raw.shape[2])):
        return raw[..., 0]
    if raw.dtype == np.uint8:
        return cv2.cvtColor(np.ascontiguousarray(raw), cv2.COLOR_RGB2GRAY)
    grey: Raw = raw @ np.array([0.299, 0.587, 0.114])
    return grey


# PNG, JPEG, BMP and TIFF, by OpenCV; what they say about resolution is not trusted


@contextmanager
def _opencv(kind: str) -> Iterator[None]:
    """What OpenCV refuses becomes an ImageError, and is not printed as well."""
    before = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    except cv2.error as error:
        raise _damaged(kind) from error
    finally:
        cv2.utils.logging.setLogLevel(before)


def _rgb(image: Raw) -> Raw:
    """OpenCV's grey, BGR or BGRA -> grey or RGB."""
    if image.ndim == 2:
        return image
    _check_channels(image.shape[2])
    return image[..., 2::-1] if image.shape[2] > 1 else image


def _picture(path: Path, kind: str) -> _File:
    if path.stat().st_size > MAX_WHOLE_BYTES:
        raise _damaged(kind)  # no image within the limits takes so many bytes
    data = path.read_bytes()
    try:
        size = _picture_size(data, kind)
    except (struct.error, IndexError) as error:
        raise _damaged(kind) from error
    _check_size(*size)
    if not _has_end(data, kind):
        raise ImageError(f"the {kind} data is truncated: its end mark is missing")

    def read(_: int) -> Raw:
        with _opencv(kind):  # as stored: an orientation in EXIF is left alone
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if image is None:
            raise _damaged(kind)
        return _rgb(image)

    return _File(1, size, lambda: read)


def _picture_size(data: bytes, kind: str) -> tuple[int, int]:
    """(width, height) from the header; struct.error or IndexError where it is cut off."""
    if kind == "PNG":
        width, height = struct.unpack_from(">II", data, 16)
    elif kind == "BMP":
        width, height = struct.unpack_from("<ii", data, 18)
        height = abs(height)  # negative where the rows run downwards
    else:
        at = 2
        while data[at + 1] not in _START_OF_FRAME:
            at += 1 if data[at + 1] == 0xFF else 2 + struct.unpack_from(">H", data, at + 2)[0]
        height, width = struct.unpack_from(">HH", data, at + 5)
    return width, height


def _has_end(data: bytes, kind: str) -> bool:
    """Whether the data goes to its end mark, for OpenCV makes up what is missing."""
    if kind == "JPEG":  # neither mark can occur within the compressed pixels
        return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
    if kind == "PNG":
        at = 8
        while at + 12 <= len(data):
            if data[at + 4 : at + 8] == b"IEND":
                return True
            at += 12 + int.from_bytes(data[at : at + 4], "big")
        return False
    return True  # BMP: OpenCV refuses


def _tiff(path: Path) -> _File:
    try:
        pages = list(_tiff_pages(path))
        size = pages[0][1]
    except (struct.error, IndexError, ValueError) as error:
        raise _damaged("TIFF") from error

    def read(k: int) -> Raw:
        number, size = pages[k]
        _check_size(*size)
        with _opencv("TIFF"):
            done, images = cv2.imreadmulti(str(path), number, 1, flags=cv2.IMREAD_UNCHANGED)
        if not done:
            raise _damaged("TIFF")
        return _rgb(images[0])

    return _File(len(pages), size, lambda: read)


def _tiff_pages(path: Path) -> Iterator[tuple[int, tuple[int, int]]]:
    """(number, (width, height)) of each page, leaving out the smaller copies in a pyramid."""
    with path.open("rb") as file:
        head = file.read(16)
        order = "<" if head.startswith(b"II") else ">"
        big = b"+" in head[2:4]  # BigTIFF
        codes = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
        counter, entry, pointer = (struct.Struct(order + code) for code in codes)
        (offset,) = pointer.unpack_from(head, 8 if big else 4)
        seen: set[int] = set()
        while offset and offset not in seen and len(seen) <= MAX_FRAMES:
            seen.add(offset)
            file.seek(offset)
            (count,) = counter.unpack(file.read(counter.size))
            tags = {254: 0, 256: 0, 257: 0}  # subfile type, width, height
            for _ in range(count):
                tag, kind, _number, value = entry.unpack(file.read(entry.size))
                if tag in tags:
                    code = {4: "I", 16: "Q"}.get(kind, "H")
                    (tags[tag],) = struct.unpack_from(order + code, value)
            if not tags[254] & 1:
                yield len(seen) - 1, (tags[256], tags[257])
            (offset,) = pointer.unpack(file.read(pointer.size))


# MetaImage, NIfTI, NRRD and DICOM, by SimpleITK


def _simpleitk() -> Any:
    """SimpleITK without its warnings; imported late, for that takes 0.4 s."""
    sitk: Any = importlib.import_module("SimpleITK")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk


@contextmanager
def _itk(path: Path, kind: str, without_geometry: bool = False) -> Iterator[Any]:
    """An ImageFileReader of the file; what it refuses in the block becomes an ImageError."""
    reader = _simpleitk().ImageFileReader()
    reader.SetImageIO(f"{_ITK[kind]}ImageIO")
    try:
        if kind != "NIfTI" and not without_geometry:
            reader.SetFileName(str(path))
            yield reader
            return
        with TemporaryDirectory() as folder:
            # NIfTI alone is refused where the suffix is not its own
            other = Path(folder) / ("a.nii.gz" if _is_gzip(path) else "a.nii")
            if without_geometry and kind in _GEOMETRY:
                other.write_bytes(_strike_geometry(path, kind))
            else:
                other.symlink_to(path.absolute())
            reader.SetFileName(str(other))
            yield reader
    except RuntimeError as error:
        raise _damaged(kind) from error
    except OSError as error:
        raise _unreadable(error) from error


def _strike_geometry(path: Path, kind: str) -> bytes:
    pattern, replacement, count = _GEOMETRY[kind]
    data = re.sub(pattern, replacement, path.read_bytes(), count=count)
    if kind != "MetaImage":
        return data
    beside = os.fsencode(path.absolute().parent) + b"/"  # where an .mhd has its pixels
    partner = rb"(?m)^(ElementDataFile[ \t]*=[ \t]*)(?![ \t]|LOCAL|LIST|/)"
    return re.sub(partner, lambda match: match[1] + beside, data, count=1)


def _volume(path: Path, kind: str) -> _File:
    with _itk(path, kind) as header:
        header.ReadImageInformation()
        value_bytes = _simpleitk().Image([1, 1], header.GetPixelID()).GetSizeOfPixelComponent()
    lengths, channels = header.GetSize(), header.GetNumberOfComponents()
    if len(lengths) < 2 or 0 in lengths:
        raise _damaged(kind)
    _check_channels(channels)
    # An array (H, W, 3) saved as if its channels were an axis of space comes with x = 3.
    flat = channels == 1 and len(lengths) > 2 and lengths[0] in (1, 3, 4)
    first = 1 if flat and min(lengths[1:3]) >= MIN_SIDE else 0
    width, height = lengths[first : first + 2]
    _check_size(width, height)
    stacked = [axis for axis in range(first + 2, len(lengths)) if lengths[axis] > 1]
    if len(stacked) > 1:
        shape = " x ".join(map(str, lengths))
        raise ImageError(f"the file's shape is {shape}: expected one image or one stack of images")
    geometry, warnings, readable = _geometry(header, path, kind, first)

    def pixels(region: list[tuple[int, int]] | None) -> Raw:
        """(frames, H, W, channels) of a region, (start, length) an axis, or of the whole file."""
        with _itk(path, kind, without_geometry=not readable) as reader:
            if region:
                reader.SetExtractIndex([start for start, _ in region])
                reader.SetExtractSize([length for _, length in region])
            array: Raw = _simpleitk().GetArrayFromImage(reader.Execute())
        return array.reshape(-1, height, width, lengths[0] if first else channels)

    def frame(k: int) -> Raw:
        region = [(k, 1) if axis in stacked else (0, n) for axis, n in enumerate(lengths)]
        only: Raw = pixels(region)[0]
        return only

    def open_file() -> Reader:
        if stacked and readable and _can_extract(path, kind, channels):
            return frame
        _check_memory(math.prod(lengths) * channels * value_bytes)
        if kind == "NIfTI" and _is_cut_nifti(path):  # for ITK fills up with zeros
            raise _damaged(kind)
        whole = pixels(None)
        return lambda k: whole[k]

    count = lengths[stacked[0]] if stacked else 1
    number, along_z = _instance_number(header), stacked == [2]
    return _File(count, (width, height), open_file, geometry, along_z, warnings, number)


def _can_extract(path: Path, kind: str, channels: int) -> bool:
    """Whether ITK reads one frame without the rest, and rightly.

    ITK 5.4 gives wrong values for MetaImage in ASCII and breaks the heap on NIfTI with channels;
    for NRRD and DICOM it would read the whole file again for each frame.
    """
    if kind == "MetaImage":
        return re.search(rb"(?m)^BinaryData[ \t]*=[ \t]*True", _head(path)) is not None
    return kind == "NIfTI" and channels == 1


def _is_cut_nifti(path: Path) -> bool:
    try:
        with (gzip.open if _is_gzip(path) else open)(path, "rb") as file:
            head = file.read(352)
            order = "<" if 1 <= struct.unpack_from("<h", head, 40)[0] <= 7 else ">"
            dimensions, *lengths = struct.unpack_from(order + "8h", head, 40)
            (bits,) = struct.unpack_from(order + "h", head, 72)
            (start,) = struct.unpack_from(order + "f", head, 108)
            file.seek(int(start) + math.prod(lengths[:dimensions]) * bits // 8 - 1)
            return not file.read(1)
    except (EOFError, OSError, OverflowError, ValueError, zlib.error):  # impossible numbers too
        return True


def _check_memory(needed: int) -> None:
    if needed > MAX_WHOLE_BYTES:
        limit = f"{needed / 2**30:.1f} GiB, more than {MAX_WHOLE_BYTES / 2**30:g} GiB"
        raise ImageError(f"the pixels take {limit}: save them as .mha, which is read by frames")


def _geometry(
    header: Any, path: Path, kind: str, first: int
) -> tuple[Geometry, tuple[str, ...], bool]:
    """The geometry, warnings about it, and whether ITK reads pixels that lie so."""
    axes = [1, 2, 0] if first else [0, 1, 2]
    dimensions = header.GetDimension()
    matrix = np.eye(max(dimensions, 3))
    matrix[:dimensions, :dimensions] = np.reshape(header.GetDirection(), (dimensions, dimensions))
    matrix = matrix[:3, axes]
    spacing = np.array([*header.GetSpacing(), 1.0])[axes]
    origin = np.array([*header.GetOrigin(), 0.0])[:3]
    sized = np.isfinite(spacing) & (spacing != 0)
    spanned = bool(np.isfinite(matrix).all()) and np.linalg.det(matrix) != 0
    spacing_mm, warnings = _spacing_mm(header, path, kind, (float(spacing[0]), float(spacing[1])))
    if not spanned:
        warnings += ("the file's axes do not span a space: they are taken as not turned",)
    geometry = Geometry(
        spacing_mm,
        tuple(np.where(sized, spacing, 1.0).tolist()),
        tuple(np.where(np.isfinite(origin), origin, 0.0).tolist()),
        tuple(matrix.ravel().tolist()) if spanned else IDENTITY,
    )
    return geometry, warnings, bool(sized.all()) and spanned


def _spacing_mm(
    header: Any, path: Path, kind: str, spacing: Pair
) -> tuple[Pair | None, tuple[str, ...]]:
    """The size of a pixel along x and y, or None, and a warning where the file's cannot be.

    ITK says 1 x 1 where a file says nothing, and most files that say it themselves were written by
    a program that knew nothing either: 1 x 1 counts as unknown, but in DICOM's own tag.
    """
    if spacing == (1.0, 1.0) and not (kind == "DICOM" and header.HasMetaDataKey("0028|0030")):
        regions = _ultrasound_spacing(path) if kind == "DICOM" else None
        if regions is None:
            return None, ()
        spacing = regions
    if all(math.isfinite(side) and side > 0 for side in spacing):
        return spacing, ()
    x, y = spacing
    return None, (f"the file's pixel size of {x:g} x {y:g} mm cannot be: lengths are in px only",)


def _ultrasound_spacing(path: Path) -> Pair | None:
    """mm per px from DICOM's Sequence of Ultrasound Regions, which SimpleITK does not pass on.

    Only where all regions that are measured in cm along both axes (unit code 3) agree. Found by the
    bytes of its tags, in the little-endian order of all but a retired transfer syntax.
    """
    with path.open("rb") as file:
        header = file.read(2**20).partition(b"\xe0\x7f\x10\x00")[0]  # up to the pixels
    unit = rb"\x18\0%b\x60(?:US\x02\0|\x02\0\0\0)(..)"
    delta = rb"\x18\0%b\x60(?:FD\x08\0|\x08\0\0\0)(.{8})"
    tags = unit % rb"\x24", unit % rb"\x26", rb".{,64}?", delta % rb"\x2c", delta % rb"\x2e"
    regions = re.findall(b"".join(tags), header, re.DOTALL)
    sizes = {struct.unpack("<dd", x + y) for *units, x, y in regions if units == [b"\3\0"] * 2}
    if len(sizes) != 1:
        return None
    x, y = sizes.pop()
    return x * 10, y * 10


def _instance_number(header: Any) -> float:
    try:
        return float(header.GetMetaData("0020|0013"))
    except (RuntimeError, ValueError):  # no such tag, or no number in it
        return math.inf
