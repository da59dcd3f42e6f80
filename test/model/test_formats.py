"""Headers that ITK must not see, and similar ones that it may."""

import gzip
import io
import os
import struct
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from model.images.formats import format_of
from model.images.limits import ImageError
from test.support.image_files import GREY, STACK, assert_stack, edit, save, write

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", "text")
    return stream.getvalue()


HARMFUL = {  # the last line of a MetaImage header -> what the error says
    b"ElementDataFile = %s%s%s 1 5 1": "MetaImage data is damaged",  # a pattern to print to
    b"ElementDataFile = %d%n 1 5 1": "MetaImage data is damaged",
    b"ElementDataFile : %s%s 1 5 1\nElementDataFile = 0.raw": "MetaImage data is damaged",
    b"NDims = 92\nElementDataFile = 0.raw": "MetaImage data is damaged",
    b"ElementDataFile = ": "MetaImage data is damaged",
    b"": "MetaImage data is damaged",
    b"ElementDataFile = pipe": "data file pipe is not a file but",
    b"ElementDataFile = LIST\n0.raw\npipe": "data file pipe is not a file but",
    b"ElementDataFile = .": "is not a file but a folder",
    b"ElementDataFile = 9.raw": "data file 9.raw is missing: copy it beside the header",
    b"ElementDataFile = %d.raw 3 6 1": "data file 5.raw is missing",
    b"ElementDataFile = sub/9.raw": "the header's data file is missing",
    b"ElementDataFile = \x1b[31m.raw": "the header's data file is missing",
    b"ElementDataFile = /etc/hostname": "not in its folder: copy the file there",
    b"ElementDataFile = sub/../../0.raw": "not in its folder",
    b"ElementDataFile = C:\\scans\\0.raw": "not in its folder",
}


def with_slices(path: Path, partner: bytes) -> Path:
    for k, plane in enumerate(STACK):
        (path / f"{k}.raw").write_bytes(plane.tobytes())
    header = save(path / "a.mha", STACK).read_bytes().partition(b"ElementDataFile")[0]
    (path / "a.mha").write_bytes(header + partner + b"\n")
    return path / "a.mha"


@pytest.mark.parametrize("line", HARMFUL)
def test_metaimage_headers_that_would_end_itk_or_lack_their_pixels(
    tmp_path: Path, line: bytes
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError) as caught:
        format_of(with_slices(tmp_path, line))
    assert HARMFUL[line] in str(caught.value)
    assert all(word not in str(caught.value) for word in ("\x1b", "hostname", "scans", "sub"))


@pytest.mark.parametrize("partner", [b"%d.raw 0 4 1", b"LIST\n0.raw\n1.raw\n2.raw\n3.raw\n4.raw"])
def test_metaimage_of_many_files(tmp_path: Path, partner: bytes) -> None:
    assert_stack(with_slices(tmp_path, b"ElementDataFile = " + partner), STACK)


def test_long_header_of_a_packed_metaimage(tmp_path: Path) -> None:
    fields = b"".join(b"0008|%04d = %s\n" % (k, b"value " * 10) for k in range(200))
    path = save(tmp_path / "a.mha", STACK, packed=True)
    assert_stack(edit(path, b"ElementSpacing", fields + b"ElementSpacing"), STACK)


def test_other_headers_that_would_keep_itk(tmp_path: Path) -> None:
    """Axes of infinite length that span no space in NIfTI."""
    path = save(tmp_path / "a.nii", GREY)
    axes = struct.pack("<12f", 1, 0, 0, 0, 1, np.inf, 0, 0, 1, 0, 0, 0)
    path.write_bytes(path.read_bytes()[:280] + axes + path.read_bytes()[328:])
    with pytest.raises(ImageError, match="NIfTI data is damaged"):
        format_of(path)


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        (b"pipe", "data file pipe is not a file but"),
        (b"a.raw", "data file a.raw is missing: copy it beside the header"),
        (b"../a.raw", "not in its folder"),
        (b"LIST", "NRRD data is damaged"),
        (b"%d.raw 1 5 1", "NRRD data is damaged"),
    ],
)
def test_nrrd_whose_pixels_lie_elsewhere(tmp_path: Path, name: bytes, phrase: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = save(tmp_path / "a.nrrd", GREY)
    edit(path, b"encoding: ", b"Data File:  " + name + b"\r\nencoding: ")
    with pytest.raises(ImageError, match=phrase):
        format_of(path)


# ---- Content of other formats

CONTENTS = {  # its name -> first bytes
    "JPEG 2000": cv2.imencode(".jp2", GREY)[1].tobytes(),
    "GIF": b"GIF89a\x3c\0\x28\0",
    "WebP": cv2.imencode(".webp", GREY)[1].tobytes(),
    "HEIC or AVIF": b"\0\0\0\x1cftypheic\0\0\0\0mif1heic",
    "an MP4 or QuickTime video": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41",
    "an AVI video": b"RIFF\x9e\x1a\0\0AVI LIST",
    "a Matroska or WebM video": b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\1",
    "an MPEG video": b"\0\0\1\xba\x44\0",
    "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "SVG, HTML or XML text": b"\n<!DOCTYPE html><title>404</title>",
    "a ZIP archive": zipped(),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("suffix", [".png", ".dcm"])
def test_content_of_other_formats_is_named(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(CONTENTS[name].ljust(400, b"\0"))
    with pytest.raises(ImageError, match=f"the content is {name}: (save|unpack) its? ?"):
        format_of(path)


def test_gzip_of_what_is_not_nifti(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", GREY)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ImageError, match="packed by gzip, and is not NIfTI: unpack it"):
        format_of(path)
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(ImageError, match="gzip data is damaged, truncated"):
        format_of(path)
