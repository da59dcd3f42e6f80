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
_HEAD_BYTES = 2**16  # long, because SimpleITK copies the fields of a DICOM file into headers
_METAIMAGE = re.compile(rb"(?:\w+[ \t]*=.*\n)*?NDims[ \t]*=[ \t]*[1-9]\s")
# All fields to the last, which names the data file. To ITK a colon ends a field's name as well.
_FIELDS = re.compile(rb"(?:\s*[^\s=:][^\n=:]*=.*\n)*?\s*ElementDataFile\s*=(?P<data_file>.*)\n?")
_NDIMS = re.compile(rb"NDims\s*=[ \t]*(\S+\s)")
_NUMBERED_FILES = re.compile(rb"([^%\s]*%\d{0,2}d[^%\s]*)((?:[ \t]+\d{1,5}){3})")
_NRRD_DATA_FILE = re.compile(rb"(?im)^[ \t]*data ?file[ \t]*:(.*)")
_JPEG_FRAME_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15


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
    if is_gzip(path):  # NIfTI is the only one of these formats that is compressed as a whole
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, _HEAD_BYTES)
        except zlib.error as error:
            raise damaged_error("gzip") from error
    kind = next((kind for kind, offset, magic in _MAGIC if head.startswith(magic, offset)), "")
    if not kind and _BARE_DICOM.match(head):
        kind = "DICOM"
    if not kind and _METAIMAGE.match(head):
        kind = "MetaImage"
    if _is_harmful(path, kind, head):
        raise damaged_error(kind)
    if kind:
        return kind
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


def find_jpeg_frame(data: bytes) -> int | None:
    """The offset of the marker of JPEG's frame header; None where the data ends before it.

    The header has at least 3 bytes behind the marker: its length, then the bits of a value.
    """
    at = 2
    while at + 4 < len(data):
        if data[at + 1] in _JPEG_FRAME_MARKERS:
            return at
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


# ---- Headers that ITK must not see


def _is_harmful(path: Path, kind: str, head: bytes) -> bool:
    """Whether ITK must not read the file, whose first bytes, uncompressed, are `head`."""
    if kind == "NIfTI":  # ITK never ends on axes of infinite length that span no space
        axes = head[280:328].ljust(48, b"\0")
        return any(map(math.isinf, struct.unpack("<12f", axes) + struct.unpack(">12f", axes)))
    if kind == "NRRD":
        data_file = _NRRD_DATA_FILE.search(re.split(rb"\r?\n\r?\n", head)[0])
        return data_file is not None and not _are_safe_files(path, [data_file[1].strip()])
    if kind != "MetaImage":
        return False
    fields = _FIELDS.match(head)
    # NDims above 10 corrupts ITK's heap.
    if fields is None or not re.fullmatch(rb"[1-9]\s", b"".join(_NDIMS.findall(fields[0]))):
        return True
    name, rest = fields["data_file"].strip(), head[fields.end() :]
    is_local = name in (b"LOCAL", b"Local", b"local")
    return not is_local and not _are_safe_files(path, _data_file_names(name, rest))


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


def _are_safe_files(path: Path, names: list[bytes]) -> bool:
    """Whether ITK may open the files: regular ones in the header's folder or below it.

    ITK would wait for a pipe, and it takes a name with % for a format to print with.
    """
    return all(
        b"%" not in name
        and not name.startswith(b"/")
        and b".." not in name.split(b"/")
        and (path.parent / os.fsdecode(name)).is_file()
        for name in names
    )
