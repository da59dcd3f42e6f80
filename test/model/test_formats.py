"""Headers that ITK must not see, and similar ones that it may."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from model.images.formats import format_of
from model.images.limits import ImageError
from test.support.image_files import GREY, STACK, assert_stack, edit, save

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
HARMFUL = {  # as the last line of a MetaImage header
    "a pattern to print to": b"ElementDataFile = %s%s%s 1 5 1",
    "another": b"ElementDataFile = %d%n 1 5 1",
    "other spelling": b"ElementDataFile : %s%s 1 5 1\nElementDataFile = 0.raw",
    "a pipe": b"ElementDataFile = pipe",
    "a list with a pipe": b"ElementDataFile = LIST\n0.raw\npipe",
    "a file that is not there": b"ElementDataFile = 9.raw",
    "a folder": b"ElementDataFile = .",
    "nothing": b"",
    "a file elsewhere": b"ElementDataFile = /etc/hostname",
    "a file above": b"ElementDataFile = sub/../../" + b"0.raw",
    "dimensions again": b"NDims = 92\nElementDataFile = 0.raw",
}


def with_slices(path: Path, partner: bytes) -> Path:
    for k, plane in enumerate(STACK):
        (path / f"{k}.raw").write_bytes(plane.tobytes())
    header = save(path / "a.mha", STACK).read_bytes().partition(b"ElementDataFile")[0]
    (path / "a.mha").write_bytes(header + partner + b"\n")
    return path / "a.mha"


@pytest.mark.parametrize("name", HARMFUL)
def test_metaimage_headers_that_would_end_itk(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="MetaImage data is damaged"):
        format_of(with_slices(tmp_path, HARMFUL[name]))


@pytest.mark.parametrize("partner", [b"%d.raw 0 4 1", b"LIST\n0.raw\n1.raw\n2.raw\n3.raw\n4.raw"])
def test_metaimage_of_many_files(tmp_path: Path, partner: bytes) -> None:
    assert_stack(with_slices(tmp_path, b"ElementDataFile = " + partner), STACK)


def test_long_header_of_a_packed_metaimage(tmp_path: Path) -> None:
    fields = b"".join(b"0008|%04d = %s\n" % (k, b"value " * 10) for k in range(200))
    path = save(tmp_path / "a.mha", STACK, packed=True)
    assert_stack(edit(path, b"ElementSpacing", fields + b"ElementSpacing"), STACK)


def test_other_headers_that_would_keep_itk(tmp_path: Path) -> None:
    """Axes of infinite length that span no space in NIfTI; a pipe for the pixels in NRRD."""
    path = save(tmp_path / "a.nii", GREY)
    axes = struct.pack("<12f", 1, 0, 0, 0, 1, np.inf, 0, 0, 1, 0, 0, 0)
    path.write_bytes(path.read_bytes()[:280] + axes + path.read_bytes()[328:])
    with pytest.raises(ImageError, match="NIfTI data is damaged"):
        format_of(path)
    os.mkfifo(tmp_path / "pipe")
    path = save(tmp_path / "a.nrrd", GREY)
    edit(path, b"encoding: ", b"Data File:  pipe\r\nencoding: ")
    with pytest.raises(ImageError, match="NRRD data is damaged"):
        format_of(path)
