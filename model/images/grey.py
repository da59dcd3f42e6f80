"""Pixel values of any type and range -> grey levels."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from model.frame import Pixels
from model.images.limits import ImageError, Raw

# What writers put where no signal is: CT's values, and the types' lowest. Such a value counts as
# padding if this share of the pixels has it, and if the next value is far: this part of the range
# of the others away.
_PADDING = (
    *(-1024, -2000, -2048, -3024),
    *(np.iinfo(kind).min for kind in (np.int16, np.int32, np.int64)),
    *(float(np.finfo(kind).min) for kind in (np.float32, np.float64)),
)
_LEAST_PADDED, _LEAST_GAP = 0.01, 1 / 8
BT_601 = (0.299, 0.587, 0.114)  # weights of R, G and B in luminance, the same as OpenCV's


def to_grey(raw: Raw) -> Pixels:
    """(H, W[, channels]) of any type -> (H, W) in 0..255.

    Integers that all lie in 0..255 stay as they are, in uint8. Other values are stretched to
    0..255, in float32. Padding becomes black and does not count otherwise: masked values, and a
    constant far below the others that writers put outside the image.

    Raises:
        ImageError: a value is not finite, all are equal, or they are too far apart.
    """
    if hasattr(raw, "mask"):  # without np.ma, whose import takes 10 ms
        return _grey_without_padding(raw)
    raw = raw[..., :3] if raw.ndim == 3 else raw[..., np.newaxis]
    if raw.dtype.kind == "f":
        if not np.isfinite(raw).all():
            raise ImageError("the image has pixels that are NaN or infinite")
    elif raw.min() >= 0 and raw.max() <= 255:
        raw = raw.astype(np.uint8, copy=False)
    grey = _luminance(raw)
    low, high = float(grey.min()), float(grey.max())
    if low == high:
        raise ImageError("the image is constant: all its pixels have the same value")
    if grey.dtype == np.uint8:
        return np.ascontiguousarray(grey)
    padding = _find_padding(grey)
    if padding is not None:
        return _grey_without_padding(np.ma.MaskedArray(grey, padding))
    if not 1e-300 < high - low < 1e300:
        raise ImageError(f"values from {low:g} to {high:g} cannot be spread over 256 grey levels")
    stretched = np.empty(grey.shape, np.float32)
    for row, values in zip(stretched, grey, strict=True):  # row by row: no whole copy in float64
        row[:] = (values.astype(np.float64) - low) * (255 / (high - low))
    return stretched


def _grey_without_padding(raw: Any) -> Pixels:
    """Grey levels of a masked array's values that are not masked; the others become 0."""
    padding = np.atleast_3d(np.ma.getmaskarray(raw)).any(axis=-1)
    if padding.all():
        raise ImageError("the image is constant: all its pixels are padding")
    values = np.array(raw.data)
    seen = values[~padding]
    values[padding] = seen.min(axis=0)  # which is black after stretching
    grey = to_grey(values)
    grey[padding] = 0
    return grey


def _find_padding(grey: Raw) -> npt.NDArray[np.bool_] | None:
    """Where values (H, W) are padding; None if none of them surely is."""
    lowest = grey.min().item()
    if lowest not in _PADDING:
        return None
    is_lowest: npt.NDArray[np.bool_] = grey == lowest
    if is_lowest.mean() < _LEAST_PADDED:
        return None
    others = grey[~is_lowest]
    low, high = float(others.min()), float(others.max())
    return is_lowest if low - lowest > _LEAST_GAP * (high - low) > 0 else None


def over_black(pixels: Raw, alpha: Raw, largest: int) -> Raw:
    """(H, W, colours) times their opacity (H, W, 1), `largest` or 1.0; opaque ones stay exact.

    Raises:
        ImageError: the values are of a type that has no largest one.
    """
    if pixels.dtype.kind == "f":
        return np.asarray(pixels * alpha)
    if pixels.dtype.kind == "i" or pixels.itemsize > 2:
        raise ImageError(
            "the image has transparency and values that are signed or of more than 16 bits: "
            "save it without transparency"
        )
    rounded = (pixels.astype(np.uint32) * alpha + largest // 2) // largest
    return np.asarray(rounded.astype(pixels.dtype))


def _luminance(raw: Raw) -> Raw:
    """(H, W, 1 or 3) -> (H, W); equal channels stay exact."""
    if all(np.array_equal(raw[..., 0], raw[..., k]) for k in range(1, raw.shape[2])):
        return raw[..., 0]
    if raw.dtype == np.uint8:
        return cv2.cvtColor(np.ascontiguousarray(raw), cv2.COLOR_RGB2GRAY)
    grey: Raw = np.einsum("hwc,c->hw", raw, BT_601)  # unlike @, it makes no copy in float64
    return grey
