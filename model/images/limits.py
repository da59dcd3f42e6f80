"""What every reader of images shares: the form of what it returns, and what it refuses."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from model import MAX_PIXELS
from model.anatomy import Floats
from model.frame import Geometry

MIN_SIDE = 32  # px
MAX_FRAMES = 2**14
MAX_BYTES = 2**29  # pixels held at once: those of one frame, or of a file that is read whole
# Only a damaged header has a length outside this range, which would overflow later on.
MIN_LENGTH_MM, MAX_LENGTH_MM = 1e-6, 1e6

UPRIGHT = (
    "the file's orientation tag was applied: landmarks are in the upright picture that viewers show"
)

# (H, W), or (H, W, channels) in the order RGB; the masked values of a masked array are padding
Raw = npt.NDArray[Any]


# ---- What a reader returns


class ImageError(ValueError):
    """Why a file or frame cannot be used: one sentence for a user, without the file's path."""


@dataclass(frozen=True)
class ImageFile:
    """What a file's header says, and how its pixels are read.

    Args:
        count: number of frames.
        size: (width, height) of a frame, in px.
        read: number of the frame in its file -> its pixels. Raises ImageError.
        is_read_whole: whether `read` returns all frames at once, (count, H, W[, channels]),
            whatever number it is given.
        needed: bytes of the pixels that one call of `read` unpacks.
        along_z: whether the frame's number is its z index in the world of `geometry`.
        warnings: sentences about the whole file, for each of its frames.
        instance_number: DICOM's InstanceNumber, by which the files of a folder are ordered;
            infinite without one.
    """

    count: int
    size: tuple[int, int]
    read: Callable[[int], Raw]
    needed: int = 0
    is_read_whole: bool = False
    geometry: Geometry = field(default_factory=Geometry)
    along_z: bool = False
    warnings: tuple[str, ...] = ()
    instance_number: float = math.inf


def turn_upright(pixels: Raw, orientation: int) -> Raw:
    """Pixels as stored, (H, W[, channels]) -> as viewers show them.

    Args:
        orientation: 1 to 8, as the tag of TIFF and EXIF tells it; from 5 on the axes are exchanged.
    """
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    flips_x, flips_y = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    return pixels[:: -1 if flips_y else 1, :: -1 if flips_x else 1]


# ---- What is refused


def damaged_error(kind: str) -> ImageError:
    """The error for a file of some format whose content cannot be read."""
    return ImageError(f"the {kind} data is damaged, truncated or of a variant that cannot be read")


@contextmanager
def errors_as_damage(kind: str) -> Iterator[None]:
    """In the block, whatever a library raises at bytes that it does not expect means damage."""
    try:
        yield
    except (ImageError, OSError):
        raise
    except Exception as error:
        raise damaged_error(kind) from error


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
