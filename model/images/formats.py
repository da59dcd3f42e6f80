"""Which format a file is of: by its content, never by its name.

A header that ITK must not see is refused here: one that would end the process, or keep it for ever.
"""

import math
import os
import re
import struct
import zlib
from pathlib import Path

from model.images.limits import ImageError, damaged

SUFFIXES = (
    *(".mha", ".mhd", ".nii", ".nii.gz", ".nrrd", ".dcm"),
    *(".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp"),
)
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
_HEAD = 2**16  # bytes; SimpleITK writes into headers what DICOM files say of themselves
_METAIMAGE = re.compile(rb"(?:\w+[ \t]*=.*\n)*?NDims[ \t]*=[ \t]*[1-9]\s")
# All fields up to the last; to ITK, a colon ends a field's name as well.
_FIELDS = re.compile(rb"(?:\s*[^\s=:][^\n=:]*=.*\n)*?\s*ElementDataFile\s*=(?P<partner>.*)\n?")
_NDIMS = re.compile(rb"NDims\s*=[ \t]*(\S+\s)")
_NUMBERED = re.compile(rb"([^%\s]*%\d{0,2}d[^%\s]*)((?:[ \t]+\d{1,5}){3})")
_NRRD_PARTNER = re.compile(rb"(?im)^[ \t]*data ?file[ \t]*:(.*)")


def is_supported_name(path: Path) -> bool:
    """Whether the name ends like an image's; the partner of an .mhd (.raw, .zraw) is none."""
    return path.name.lower().endswith(SUFFIXES)


def format_of(path: Path) -> str:
    """DICOM, PNG, JPEG, BMP, TIFF, NRRD, NIfTI or MetaImage.

    Raises:
        ImageError: it is none of them, or empty.
    """
    head = head_of(path)
    if not head:
        raise ImageError("the file is empty")
    if is_gzip(path):  # of these formats only NIfTI is packed as a whole
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, _HEAD)
        except zlib.error as error:
            raise damaged("gzip") from error
    kind = next((kind for kind, offset, magic in _MAGIC if head.startswith(magic, offset)), "")
    if not kind and _METAIMAGE.match(head):
        kind = "MetaImage"
    if _is_harmful(path, kind, head):
        raise damaged(kind)
    if kind:
        return kind
    if path.suffix.lower() == ".dcm":  # old DICOM files have no magic bytes
        return "DICOM"
    raise ImageError(
        "the content is none of the supported formats: expected MetaImage, NIfTI, NRRD, DICOM, "
        "TIFF, PNG, JPEG or BMP"
    )


def _is_harmful(path: Path, kind: str, head: bytes) -> bool:
    """Whether ITK must not read it. `head`: the file's first bytes, unpacked."""
    if kind == "NIfTI":  # where axes of infinite length span no space, ITK turns them for ever
        axes = head[280:328].ljust(48, b"\0")
        return any(map(math.isinf, struct.unpack("<12f", axes) + struct.unpack(">12f", axes)))
    if kind == "NRRD":
        partner = _NRRD_PARTNER.search(re.split(rb"\r?\n\r?\n", head)[0])
        return partner is not None and not _are_files(path, [partner[1].strip()])
    if kind != "MetaImage":
        return False
    fields = _FIELDS.match(head)
    # ITK breaks the heap where NDims is above 10.
    if fields is None or not re.fullmatch(rb"[1-9]\s", b"".join(_NDIMS.findall(fields[0]))):
        return True
    name, rest = fields["partner"].strip(), head[fields.end() :]
    return name not in (b"LOCAL", b"Local", b"local") and not _are_files(path, _named(name, rest))


def _named(name: bytes, rest: bytes) -> list[bytes]:
    """The files that a MetaImage header names: one, or one a frame by a list or a pattern."""
    if name == b"LIST":
        return [line.strip() for line in rest.splitlines() if line.strip()]
    numbered = _NUMBERED.fullmatch(name)
    if numbered is None:
        return [name]
    first, last, step = map(int, numbered[2].split())
    return [numbered[1] % k for k in range(first, last + 1, max(1, step))]


def _are_files(path: Path, names: list[bytes]) -> bool:
    """Whether ITK can read them: it waits for a pipe, and prints to any name that has a %.

    Nor is it to read what does not lie beside the header.
    """
    return all(
        b"%" not in name
        and not name.startswith(b"/")
        and b".." not in name.split(b"/")
        and (path.parent / os.fsdecode(name)).is_file()
        for name in names
    )


def is_dicom(path: Path) -> bool:
    """Whether a file of a folder is meant as a frame; a DICOMDIR only lists the others."""
    by_name = path.suffix.lower() == ".dcm"
    return path.name.upper() != "DICOMDIR" and (by_name or head_of(path)[128:132] == b"DICM")


def head_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def is_gzip(path: Path) -> bool:
    return head_of(path).startswith(b"\x1f\x8b")
