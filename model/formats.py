"""Which format a file is of: by its content, never by its name."""

import re
import zlib
from pathlib import Path

from model.reading import ImageError, damaged

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
# ITK breaks the heap where NDims is above 10.
_METAIMAGE = re.compile(rb"(?:\w+[ \t]*=.*\n)*?NDims[ \t]*=[ \t]*[1-9]\s")


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
            head = zlib.decompressobj(wbits=31).decompress(head)
        except zlib.error as error:
            raise damaged("gzip") from error
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


def is_dicom(path: Path) -> bool:
    """Whether a file of a folder is meant as a frame; a DICOMDIR only lists the others."""
    by_name = path.suffix.lower() == ".dcm"
    return path.name.upper() != "DICOMDIR" and (by_name or head_of(path)[128:132] == b"DICM")


def head_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096)


def is_gzip(path: Path) -> bool:
    return head_of(path).startswith(b"\x1f\x8b")
