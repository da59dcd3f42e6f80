"""What every reader of images shares: the form of what it returns, and what it refuses."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import numpy.typing as npt

from model import MAX_PIXELS
from model.anatomy import Floats
from model.frame import Geometry

if sys.platform == "linux":
    import resource

MIN_SIDE = 32  # px
MAX_FRAMES = 2**14
MAX_BYTES = 2**29  # pixels held at once: those of one frame, or of a file that is read whole
LARGE_BYTES = 2**25  # a file or a frame above this is read while no other large one is
# While an image is read, memory may grow by ROOM_BYTES + COPIES times the bytes of its pixels.
ROOM_BYTES, COPIES = 2**28, 6
# Only a damaged header has a length outside this range, which would overflow later on.
MIN_LENGTH_MM, MAX_LENGTH_MM = 1e-6, 1e6

Raw = npt.NDArray[Any]  # (H, W), or (H, W, channels) in the order RGB
Reader = Callable[[int], Raw]  # number of the frame in its file -> its pixels


# ---- What a reader returns


class ImageError(ValueError):
    """Why a file or frame cannot be used: one sentence for a user, without the file's path."""


@dataclass(frozen=True)
class ImageFile:
    """What a file's header says, before any pixel is read.

    Args:
        count: number of frames.
        size: (width, height) of a frame, in px.
        open: returns the reader of the frames.
        along_z: whether the frame's number is its z index in the world of `geometry`.
        instance_number: DICOM's InstanceNumber, by which the files of a folder are ordered;
            infinite without one.
    """

    count: int
    size: tuple[int, int]
    open: Callable[[], Reader]
    geometry: Geometry = field(default_factory=Geometry)
    along_z: bool = False
    warnings: tuple[str, ...] = ()
    instance_number: float = math.inf


# ---- What is refused


def damaged_error(kind: str) -> ImageError:
    """The error for a file of some format whose content cannot be read."""
    return ImageError(f"the {kind} data is damaged, truncated or of a variant that cannot be read")


def unreadable_error(error: OSError) -> ImageError:
    """The error for a file that the system does not let us read."""
    return ImageError(f"the file cannot be read: {error.strerror or error}")


def check_size(width: int, height: int) -> None:
    """Raise ImageError for an image that is too large or too small."""
    size = f"{width} x {height} px"
    if width * height > MAX_PIXELS:
        raise ImageError(f"the image of {size} is larger than {MAX_PIXELS >> 20} Mpx: shrink it")
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"the image of {size} is too small: a side needs {MIN_SIDE} px or more")


def check_channels(channels: int) -> None:
    """Raise ImageError for pixels that are neither grey nor RGB nor RGBA."""
    if channels not in (1, 3, 4):
        raise ImageError(f"a pixel has {channels} values: expected grey (1), RGB (3) or RGBA (4)")


def check_bytes(needed: int, remedy: str = "save them with fewer bytes per pixel") -> None:
    """Raise ImageError for pixels that take more than MAX_BYTES; call it before they are read.

    Args:
        needed: the bytes that the header claims.
    """
    if needed > MAX_BYTES:
        rounded_up = math.ceil(100 * needed / 2**30) / 100  # so that it exceeds the limit
        sizes = f"{rounded_up:g} GiB, more than {MAX_BYTES / 2**30:g} GiB"
        raise ImageError(f"the pixels take {sizes}: {remedy}")


def are_sane_lengths(lengths_mm: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Whether each length has a size, of either sign, that an intact header could have."""
    sizes: Floats = np.abs(np.asarray(lengths_mm, np.float64))
    return (sizes > MIN_LENGTH_MM) & (sizes < MAX_LENGTH_MM)


def is_pixel_size(lengths_mm: npt.ArrayLike) -> bool:
    """Whether all the lengths can be sides of a pixel: positive and sane."""
    return bool((np.asarray(lengths_mm) > 0).all() and are_sane_lengths(lengths_mm).all())


@dataclass(frozen=True)
class MemoryBudget:
    """Limits the memory that reading images takes.

    The limit is the process's, so all threads that read at the same time have to share one budget.
    Each thread enters and leaves its own blocks: the lock belongs to the thread that took it.
    """

    _turn: AbstractContextManager[Any] = field(default_factory=RLock)
    _block: ExitStack | None = None  # the block of `admit`, at whose end the turn is released

    @contextmanager
    def admit(self, size: int) -> Iterator["MemoryBudget"]:
        """Before a block with a large image, wait until no other thread is in such a block.

        Two large images would take twice the memory. The first would also take the room that
        reading the second needs.

        Args:
            size: bytes of the image, as far as they are known before it is read.

        Yields:
            The budget for what is read in the block. A small file may unpack to a large image:
            reading it then keeps others out until the block ends.
        """
        with ExitStack() as block:
            if size > LARGE_BYTES:
                block.enter_context(self._turn)
            yield MemoryBudget(self._turn, block)

    @contextmanager
    def limit_growth(self, needed: int) -> Iterator[None]:
        """In the block the process can grow by no more than ROOM_BYTES + COPIES * needed bytes.

        Some libraries allocate what a file claims before they look at its length: GDCM takes 4 GB
        for a DICOM file of 150 bytes. For JPEG frames GDCM reserves COPIES and uses half of that.
        One thread at a time is in such a block. The limit exists on Linux only.

        Args:
            needed: bytes of the pixels.
        """
        if self._block is not None and needed > LARGE_BYTES:
            self._block.enter_context(self._turn)
        with self._turn:
            if sys.platform != "linux":
                yield
                return
            before = resource.getrlimit(resource.RLIMIT_DATA)
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
            in_use = pages * resource.getpagesize()
            limit = in_use + ROOM_BYTES + COPIES * min(needed, MAX_BYTES)
            if not 0 <= before[0] < limit:  # -1 means no limit
                resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_DATA, before)
