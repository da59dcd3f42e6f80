"""A decoder that does what a file's name says, for reader processes that must survive it."""

import ctypes
import os
import time
from pathlib import Path

import numpy as np

from model.frame import Geometry
from model.images import reader_process
from model.images.limits import ImageError, ImageFile, Raw

FAULTY_PROGRAM = """\
import sys
sys.path.insert(0, sys.argv[1])
from test.support import faulty_decoder
faulty_decoder.serve(sys.argv[2])
"""
PIXELS = np.arange(20 * 30, dtype=np.uint8).reshape(20, 30)
CONTENT = b"for the faulty decoder"  # of its files
HARMED: list[Path] = []  # files that have harmed this process


def serve(kind: str) -> None:
    """The reader process with this decoder in front of the real ones."""
    real = reader_process.open_file
    reader_process.open_file = lambda path, kind: open_faulty(path) or real(path, kind)
    reader_process.serve(kind)


def misbehave(name: str) -> None:
    if name.startswith("crash"):
        ctypes.string_at(0)  # reads address 0: a segmentation fault
    elif name.startswith("exit"):
        os._exit(3)
    elif name.startswith("hang"):
        while True:
            pass
    elif name.startswith("waits"):
        time.sleep(600)
    elif name.startswith("memory"):
        held = []
        while True:
            held.append(bytearray(2**27))
    elif name.startswith("raises"):
        raise KeyError("what no reader expects")
    elif name.startswith("refuses"):
        raise ImageError("a sentence about the file")


def open_faulty(path: Path) -> ImageFile | None:
    """A file of two frames; its InstanceNumber is the number of the process."""
    name = path.name
    if not path.read_bytes().startswith(CONTENT):
        return None
    if name == "harms":
        HARMED.append(path)
    elif name == "dies-if-harmed" and HARMED:
        os._exit(4)
    elif name == "prints":
        os.write(1, b"a library's chatter\n")
    if not name.partition(".")[0].endswith("at-frame"):
        misbehave(name)

    def read(k: int) -> Raw:
        misbehave(name)
        pixels = PIXELS + np.uint8(k)
        mask = np.indices(pixels.shape)[0] == 0
        return np.ma.MaskedArray(pixels, mask=mask) if name == "padded" else pixels

    return ImageFile(
        2,
        (30, 20),
        read,
        needed=2**26 if name == "large" else PIXELS.nbytes,
        geometry=Geometry((0.5, 0.25)),
        warnings=("odd",),
        instance_number=os.getpid(),
    )
