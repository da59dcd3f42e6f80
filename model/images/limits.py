"""What the readers of pictures and of volumes share: what they give, and when they refuse."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

import numpy.typing as npt

from model import MAX_PIXELS
from model.frame import Geometry

if sys.platform == "linux":
    import resource

MIN_SIDE = 32  # px
MAX_FRAMES = 2**14
MAX_BYTES = 2**29  # of the pixels held at once: a frame's, or a file's that is read whole
LARGE = 2**25  # bytes of a file or of a frame's pixels; one image above this is read at a time
ROOM, COPIES = 2**28, 6  # memory that reading may take: ROOM bytes + COPIES times the pixels

Raw = npt.NDArray[Any]  # (H, W), or (H, W, channels) in the order RGB
Reader = Callable[[int], Raw]  # number of the frame in its file -> its pixels


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


@dataclass(frozen=True)
class MemoryBudget:
    """Limits the memory that reading images takes.

    The limit is the process's, so all threads that read at the same time have to share one budget.
    A thread enters and leaves a block by itself: the lock belongs to the thread that took it.
    """

    _turn: AbstractContextManager[Any] = field(default_factory=RLock)
    _block: ExitStack | None = None  # of `admit`; what it holds is released when the block ends

    @contextmanager
    def admit(self, size: int) -> Iterator["MemoryBudget"]:
        """Before a block with a large image, wait until no other thread holds one.

        Two large images would take twice the memory, and one of them the room that reading the
        other needs.

        Args:
            size: bytes of the image, as far as they are known before it is read.

        Yields:
            The budget for what is read in the block. A small file may unpack to a large image:
            reading it then keeps others out until the block ends.
        """
        with ExitStack() as block:
            if size > LARGE:
                block.enter_context(self._turn)
            yield MemoryBudget(self._turn, block)

    @contextmanager
    def limit_growth(self, needed: int) -> Iterator[None]:
        """In the block the process can grow by ROOM + COPIES * needed bytes only.

        Some libraries allocate what a file claims before they look how long it is: GDCM takes 4 GB
        for a DICOM file of 150 bytes. GDCM reserves COPIES for JPEG frames and uses half of that.
        One thread at a time is in such a block. The limit exists on Linux only.

        Args:
            needed: bytes of the pixels.
        """
        if self._block is not None and needed > LARGE:
            self._block.enter_context(self._turn)
        with self._turn:
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
