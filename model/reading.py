"""What the readers of pictures and of volumes share: what they give, and when they refuse."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock, local
from typing import Any

import numpy.typing as npt

from model import MAX_PIXELS
from model.frame import Geometry

if sys.platform == "linux":
    import resource

MIN_SIDE = 32  # px
MAX_FRAMES = 2**14
MAX_BYTES = 2**29  # of the pixels held at once: a frame's, or a file's that is read whole
LARGE = 2**25  # bytes of a file, or of a frame's pixels, that is answered alone
ROOM, COPIES = 2**28, 6  # what reading may take: so many bytes, and the pixels so many times

Raw = npt.NDArray[Any]  # (H, W), or (H, W, channels) in the order RGB
Reader = Callable[[int], Raw]  # number of the frame in its file -> its pixels

_ONE_AT_A_TIME = RLock()  # the limit is the whole process's
_CASE = local()  # .locks: what this thread holds until its case is answered


class ImageError(ValueError):
    """Why a file or frame cannot be used: one sentence for a user, without the file's path."""


@dataclass(frozen=True)
class ImageFile:
    """What a header tells: `count` frames of `size` (width, height); `open` gives their reader."""

    count: int
    size: tuple[int, int]
    open: Callable[[], Reader]
    geometry: Geometry = field(default_factory=Geometry)
    along_z: bool = False
    warnings: tuple[str, ...] = ()
    number: float = math.inf  # DICOM's InstanceNumber


def damaged(kind: str) -> ImageError:
    return ImageError(f"the {kind} data is damaged, truncated or of a variant that cannot be read")


def unreadable(error: OSError) -> ImageError:
    return ImageError(f"the file cannot be read: {error.strerror or error}")


def check_size(width: int, height: int) -> None:
    size = f"{width} x {height} px"
    if width * height > MAX_PIXELS:
        raise ImageError(f"the image of {size} is larger than {MAX_PIXELS >> 20} Mpx: shrink it")
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"the image of {size} is too small: a side needs {MIN_SIDE} px or more")


def check_channels(channels: int) -> None:
    if channels not in (1, 3, 4):
        raise ImageError(f"a pixel has {channels} values: expected grey (1), RGB (3) or RGBA (4)")


def check_bytes(needed: int, remedy: str = "save them with fewer bytes a pixel") -> None:
    """Call it before the pixels are read, with the number of bytes that the header claims."""
    if needed > MAX_BYTES:
        taken = math.ceil(100 * needed / 2**30) / 100  # never as few as the limit
        limit = f"{taken:g} GiB, more than {MAX_BYTES / 2**30:g} GiB"
        raise ImageError(f"the pixels take {limit}: {remedy}")


@contextmanager
def alone(size: int) -> Iterator[None]:
    """In the block no other thread reads, where so many bytes are large.

    Two large images would take twice the memory, and one the room that the other's reading has.
    A small file may unpack to a large image: reading it then takes the lock for the block's rest.
    """
    outer = getattr(_CASE, "locks", None)
    with ExitStack() as locks:
        if size > LARGE:
            locks.enter_context(_ONE_AT_A_TIME)
        _CASE.locks = locks
        try:
            yield
        finally:
            _CASE.locks = outer


@contextmanager
def bounded_memory(needed: int) -> Iterator[None]:
    """In the block the process can grow by ROOM bytes and COPIES times the bytes needed only.

    For libraries that make room for what a file claims before they look how long it is: GDCM takes
    4 GB for a DICOM file of 150 bytes. COPIES are what it reserves for JPEG frames; half of that is
    used. One block at a time; the limit on Linux only.
    """
    locks = getattr(_CASE, "locks", None)
    if locks is not None and needed > LARGE:
        locks.enter_context(_ONE_AT_A_TIME)
    with _ONE_AT_A_TIME:
        if sys.platform != "linux":
            yield
            return
        before = resource.getrlimit(resource.RLIMIT_DATA)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
        limit = pages * resource.getpagesize() + ROOM + COPIES * min(needed, MAX_BYTES)
        if not 0 <= before[0] < limit:  # -1 is no limit
            resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)
