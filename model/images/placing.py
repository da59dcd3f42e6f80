"""Where the pixels of a volume lie, and how large they are, as far as its header says."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from model.anatomy import Floats
from model.frame import IDENTITY, Geometry, Pair
from model.images.elements import DataSet

# A length in mm beyond these is a damaged header's, and would overflow on the way to the angle.
SMALLEST, LARGEST = 1e-6, 1e6
_PIXEL_SPACING, _REGIONS = 0x00280030, 0x00186011
_UNITS, _DELTAS, _CM = (0x00186024, 0x00186026), (0x0018602C, 0x0018602E), 3
_SHARED, _PER_FRAME, _MEASURES = 0x52009229, 0x52009230, 0x00289110


def _is_sane(lengths: Floats) -> npt.NDArray[np.bool_]:
    return (np.abs(lengths) > SMALLEST) & (np.abs(lengths) < LARGEST)


def _is_size(lengths: npt.ArrayLike) -> bool:
    return bool((np.asarray(lengths) > 0).all() and _is_sane(np.asarray(lengths)).all())


def placing(header: Any, first: int) -> tuple[Geometry, tuple[str, ...], bool]:
    """The geometry, warnings about it, and whether ITK reads pixels that lie so."""
    axes = [1, 2, 0] if first else [0, 1, 2]
    dimensions = header.GetDimension()
    matrix = np.eye(max(dimensions, 3))
    matrix[:dimensions, :dimensions] = np.reshape(header.GetDirection(), (dimensions, dimensions))
    matrix = matrix[:3, axes]
    spacing = np.array([*header.GetSpacing(), 1.0])[axes]
    origin = np.array([*header.GetOrigin(), 0.0])[:3]
    sized = _is_sane(spacing)
    spanned = bool((np.abs(matrix) < LARGEST).all()) and abs(np.linalg.det(matrix)) > SMALLEST
    # ITK says 1 x 1 where a file says nothing; and most that say so themselves know nothing either.
    unknown = (spacing[:2] == 1).all()
    x, y = float(spacing[0]), float(spacing[1])
    spacing_mm = (x, y) if _is_size([x, y]) and not unknown else None
    warnings: tuple[str, ...] = ()
    if spacing_mm is None and not unknown:
        warnings = (f"the file's pixel size of {x:g} x {y:g} mm cannot be: lengths are in px only",)
    if not spanned:
        warnings += ("the file's axes do not span a space: they are taken as not turned",)
    geometry = Geometry(
        spacing_mm,
        tuple(np.where(sized, spacing, 1.0).tolist()),
        tuple(np.where(np.abs(origin) < LARGEST, origin, 0.0).tolist()),
        tuple(matrix.ravel().tolist()) if spanned else IDENTITY,
    )
    return geometry, warnings, bool(sized.all()) and spanned


def dicom_spacing(data: DataSet) -> tuple[Pair | None, tuple[str, ...]]:
    """mm per px along x and y, or None, of a DICOM file, and warnings.

    From PixelSpacing, which gives y first; where there is none, or 1 x 1 for want of a better one,
    from the regions of ultrasound. ImagerPixelSpacing and NominalScannedPixelSpacing do not count:
    they are lengths on a detector and on film, not in the body. What cannot be is not repeated: in
    a damaged header it can be anything.
    """
    told = next((part.decimals(_PIXEL_SPACING) for part in _measures(data)), [])
    sizes = np.array([size for region in data.items(_REGIONS) for size in _size_mm(region)])
    if told and not (told == [1, 1] and len(sizes)):
        if len(told) != 2 or not _is_size(told):
            return None, ("the header's PixelSpacing cannot be: lengths are in px only",)
        return (told[1], told[0]), ()
    if not len(sizes):
        return None, ()
    if (sizes.max(0) > 1.001 * sizes.min(0)).any():
        return None, ("the header's regions differ in their pixels' size: lengths are in px only",)
    return (float(sizes[0, 0]), float(sizes[0, 1])), ()


def _measures(data: DataSet) -> Iterator[DataSet]:
    """Where PixelSpacing stands: in the data set, or for the frames together, or for the first."""
    groups = [group for tag in (_SHARED, _PER_FRAME) for group in data.items(tag)[:1]]
    for part in (data, *(measures for group in groups for measures in group.items(_MEASURES))):
        if part.text(_PIXEL_SPACING):
            yield part


def _size_mm(region: DataSet) -> list[Floats]:
    """[(x, y)] of a pixel in an ultrasound region; [] where it is not measured in cm."""
    size = 10 * np.abs([region.number(tag, "d") or 0 for tag in _DELTAS])
    in_cm = all(region.number(tag) == _CM for tag in _UNITS)
    return [size] if in_cm and _is_size(size) else []
