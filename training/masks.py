"""Reading segmentation masks from files."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from model.masks import MaskError

MASK_SUFFIXES = (".png", ".mha")


def read_mask(path: Path) -> npt.NDArray[np.uint8]:
    """A .png or .mha file -> (H, W) uint8; a leading axis of 1 is dropped.

    Raises:
        MaskError: the file cannot be read, or holds something other than one uint8 plane.
    """
    suffix = path.suffix.lower()
    if suffix not in MASK_SUFFIXES:
        raise MaskError(f"a mask is read from {' or '.join(MASK_SUFFIXES)}, not from {suffix!r}")
    if not path.is_file():
        raise MaskError("the mask's file does not exist")
    mask = _read_mha(path) if suffix == ".mha" else _read_png(path)
    if mask.ndim == 3 and mask.shape[0] == 1:
        mask = mask[0]
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise MaskError(
            f"the mask is {mask.dtype} of {mask.shape}; expected uint8 of (height, width)"
        )
    return mask


def _read_png(path: Path) -> npt.NDArray[Any]:
    data = np.fromfile(path, np.uint8)
    mask = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    if mask is None:
        raise MaskError("the mask's file is no PNG, or damaged")
    return np.asarray(mask)


def _read_mha(path: Path) -> npt.NDArray[Any]:
    import SimpleITK  # noqa: PLC0415  takes 0.4 s, and PNG masks do without it

    try:
        return np.asarray(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))))
    except RuntimeError as error:
        raise MaskError("the mask's file is no MetaImage, or damaged") from error
