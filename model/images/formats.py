"""Which format a file has. Its content decides, never its name.

Some headers crash ITK or keep it busy for ever. They are refused here, before ITK sees them.
"""

import math
import os
import re
import struct
import zlib
from pathlib import Path

from model.images.limits import ImageError, damaged_error

SUFFIXES = (
    *(".mha", ".mhd", ".nii", ".nii.gz", ".nrrd", ".dcm"),
    *(".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp"),
)
_MAGIC = (  # format, offset in the file, bytes there
    ("DICOM", 128, b"DICM"),
    ("PNG", 0, b"\x89PNG\r\n\x1a\n"),
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("BMP", 0, b"BM"),
    *(("TIFF", 0, magic) for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ("NRRD", 0, b"NRRD"),
    ("NIfTI", 344, b"n+1\0"),
    ("NIfTI", 4, b"n+2\0"),
)
# Old DICOM files lack the magic bytes. They begin with group 0002 or 0008, and an element near the
# start names one of the standard's UIDs, or the standard before it.
_BARE_DICOM = re.compile(
    rb"(?:[\x02\x08]\0..|\0[\x02\x08]..).{0,1000}?"
    rb"(?:(?:\x08\0\x16\0|\0\x08\0\x16|\x02\0[\x02\x10]\0)....1\.2\.840\.10008\."
    rb"|(?:\x08\0\x10\0|\0\x08\0\x10)....ACR-NEMA)",
    re.DOTALL,
)
_DICOMDIR = re.compile(
    rb".{128}DICM.{0,200}?\x02\0\x02\0UI..1\.2\.840\.10008\.1\.3\.10\x02", re.DOTALL
)
_TO_PNG, _FRAMES_TO_PNG = "save it as .png", "save its frames as .png"
_OTHERS = (  # what else has a picture's name, what to do with it, a pattern of its first bytes
    ("JPEG 2000", _TO_PNG, rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    ("JPEG XL", _TO_PNG, rb"\0\0\0\x0cJXL |\xff\x0a"),
    ("GIF", _TO_PNG, rb"GIF8[79]a"),
    ("WebP", _TO_PNG, rb"RIFF....WEBP"),
    ("HEIC or AVIF", _TO_PNG, rb"....ftyp(?:hei|hev|mif1|msf1|avi)"),
    ("an MP4 or QuickTime video", _FRAMES_TO_PNG, rb"....(?:ftyp|moov|mdat)"),
    ("an AVI video", _FRAMES_TO_PNG, rb"RIFF....AVI "),
    ("a Matroska or WebM video", _FRAMES_TO_PNG, rb"\x1a\x45\xdf\xa3"),
    ("an MPEG video", _FRAMES_TO_PNG, rb"\0\0\x01[\xb3\xba]"),
    ("a Windows Media video", _FRAMES_TO_PNG, rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
    ("PDF", "save its images as .png", rb"\s{0,9}%PDF-"),
    ("SVG, HTML or XML text", _TO_PNG, rb"(?:\xef\xbb\xbf)?\s{0,9}<(?i:\?xml|!doctype|html|svg)"),
    ("a Photoshop image", _TO_PNG, rb"8BPS\0"),
    ("HDF5", _TO_PNG, rb"\x89HDF\r\n"),
    ("a NumPy array", _TO_PNG, rb"\x93NUMPY"),
    ("a ZIP archive", "unpack it", rb"PK(?:\x03\x04|\x05\x06)"),
    ("a 7-Zip or RAR archive", "unpack it", rb"7z\xbc\xaf\x27\x1c|Rar!\x1a"),
)
_HEAD_BYTES = 2**16  # long, because SimpleITK copies the fields of a DICOM file into headers
_NIFTI_HEADER_BYTES = 348
_METAIMAGE = re.compile(rb"(?:\w+[ \t]*=.*\n)*?NDims[ \t]*=[ \t]*[1-9]\s")
# All fields to the last, which names the data file. To ITK a colon ends a field's name as well.
_FIELDS = re.compile(rb"(?:\s*[^\s=:][^\n=:]*=.*\n)*?\s*ElementDataFile\s*=(?P<data_file>.*)\n?")
_NDIMS = re.compile(rb"NDims\s*=[ \t]*(\S+\s)")
_NUMBERED_FILES = re.compile(rb"([^%\s]*%\d{0,2}d[^%\s]*)((?:[ \t]+\d{1,5}){3})")
_NRRD_DATA_FILE = re.compile(rb"(?im)^[ \t]*data ?file[ \t]*:(.*)")
_WINDOWS_ROOT = re.compile(rb"[A-Za-z]:|\\")


def is_supported_name(path: Path) -> bool:
    """Whether the name ends like an image's; the data file of an .mhd (.raw, .zraw) does not."""
    return path.name.lower().endswith(SUFFIXES)


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its content if its name does not end in .dcm.

    Machines name such files by UID, IM_0001, .dicom, .ima, .1. A DICOMDIR only lists the others.
    """
    if path.name.upper() == "DICOMDIR":
        return False
    if path.suffix.lower() == ".dcm":
        return True
    head = read_head(path, 2**11)
    is_marked = head[128:132] == b"DICM"
    return (is_marked or _BARE_DICOM.match(head) is not None) and not _DICOMDIR.match(head)


def format_of(path: Path) -> str:
    """DICOM, PNG, JPEG, BMP, TIFF, NRRD, NIfTI or MetaImage.

    Raises:
        ImageError: the file is empty, of another format, or harmful to ITK.
    """
    head = read_head(path)
    if not head:
        raise ImageError("the file is empty")
    is_packed = is_gzip(path)
    if is_packed:
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, _HEAD_BYTES)
        except zlib.error as error:
            raise damaged_error("gzip") from error
    kind = next((kind for kind, offset, magic in _MAGIC if head.startswith(magic, offset)), "")
    if not kind and _BARE_DICOM.match(head):
        kind = "DICOM"
    if not kind and _METAIMAGE.match(head):
        kind = "MetaImage"
    if is_packed and len(head) < _NIFTI_HEADER_BYTES:
        raise damaged_error("gzip")
    if is_packed and kind != "NIfTI":  # the only one of the formats that is compressed as a whole
        raise ImageError("the content is packed by gzip, and is not NIfTI: unpack it")
    _check_for_itk(path, kind, head)
    if kind:
        return kind
    for name, remedy, pattern in _OTHERS:
        if re.match(pattern, head, re.DOTALL):
            raise ImageError(f"the content is {name}: {remedy}")
    if path.suffix.lower() == ".dcm":  # old DICOM files have no magic bytes
        return "DICOM"
    raise ImageError(
        "the content matches none of the supported formats: expected MetaImage, NIfTI, NRRD, "
        "DICOM, TIFF, PNG, JPEG or BMP"
    )


def read_head(path: Path, count: int = _HEAD_BYTES) -> bytes:
    """The file's first bytes, by default enough for the header of every format."""
    with path.open("rb") as file:
        return file.read(count)


def is_gzip(path: Path) -> bool:
    """Whether the whole file is compressed by gzip."""
    return read_head(path).startswith(b"\x1f\x8b")


# ---- Headers that ITK must not see


def _check_for_itk(path: Path, kind: str, head: bytes) -> None:
    """Raise ImageError if ITK must not read the file.

    Args:
        head: the file's first bytes, uncompressed.
    """
    if kind == "NIfTI":  # ITK never ends on axes of infinite length that span no space
        axes = head[280:328].ljust(48, b"\0")
        if any(map(math.isinf, struct.unpack("<12f", axes) + struct.unpack(">12f", axes))):
            raise damaged_error(kind)
    elif kind == "NRRD":
        data_file = _NRRD_DATA_FILE.search(re.split(rb"\r?\n\r?\n", head)[0])
        if data_file is not None:
            _check_data_files(path, kind, [data_file[1].strip()])
    elif kind == "MetaImage":
        fields = _FIELDS.match(head)
        # NDims above 10 corrupts ITK's heap.
        if fields is None or not re.fullmatch(rb"[1-9]\s", b"".join(_NDIMS.findall(fields[0]))):
            raise damaged_error(kind)
        name, rest = fields["data_file"].strip(), head[fields.end() :]
        if name not in (b"LOCAL", b"Local", b"local"):
            _check_data_files(path, kind, _data_file_names(name, rest))


def _data_file_names(name: bytes, rest: bytes) -> list[bytes]:
    """The data files that a MetaImage header names: one, or by a list or pattern one per frame.

    Args:
        name: the value of ElementDataFile.
        rest: what follows it.
    """
    if name == b"LIST":
        return [line.strip() for line in rest.splitlines() if line.strip()]
    numbered = _NUMBERED_FILES.fullmatch(name)
    if numbered is None:
        return [name]
    first, last, step = map(int, numbered[2].split())
    return [numbered[1] % k for k in range(first, last + 1, max(1, step))]


def _check_data_files(path: Path, kind: str, names: list[bytes]) -> None:
    """Raise ImageError unless ITK may open the files: regular ones in the header's folder or below.

    ITK would wait for a pipe, and it takes a name with % for a format to print with.
    """
    for name in names:
        if not name or b"%" in name or b"\0" in name or name.startswith(b"LIST"):
            raise damaged_error(kind)
        if name.startswith(b"/") or b".." in name.split(b"/") or _WINDOWS_ROOT.match(name):
            raise ImageError(
                "the header names a data file that is not in its folder: copy the file there, and "
                "write its bare name into the header"
            )
        file, text = path.parent / os.fsdecode(name), name.decode(errors="replace")
        is_plain = (
            text.isprintable() and "/" not in text and "\N{REPLACEMENT CHARACTER}" not in text
        )
        what = f"data file {text}" if is_plain and len(text) < 100 else "data file"
        if not file.exists():
            raise ImageError(f"the header's {what} is missing: copy it beside the header")
        if not file.is_file():
            raise ImageError(f"the header's {what} is not a file but a folder, a pipe or a device")
