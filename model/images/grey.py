"""Pixel values of any type and range -> grey levels."""

from typing import Any

import cv2
import numpy as np

from model.frame import Pixels
from model.images.limits import ImageError, Raw

BT_601 = (0.299, 0.587, 0.114)  # weights of R, G and B in luminance, the same as OpenCV's


def to_grey(raw: Raw) -> Pixels:
    """(H, W[, channels]) of any type -> (H, W) in 0..255.

    Integers that all lie in 0..255 stay as they are, in uint8. Other values are stretched to
    0..255, in float32. Masked values are padding: they become black and do not count otherwise.

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


def _luminance(raw: Raw) -> Raw:
    """(H, W, 1 or 3) -> (H, W); equal channels stay exact."""
    if all(np.array_equal(raw[..., 0], raw[..., k]) for k in range(1, raw.shape[2])):
        return raw[..., 0]
    if raw.dtype == np.uint8:
        return cv2.cvtColor(np.ascontiguousarray(raw), cv2.COLOR_RGB2GRAY)
    grey: Raw = np.einsum("hwc,c->hw", raw, BT_601)  # unlike @, it makes no copy in float64
    return grey
