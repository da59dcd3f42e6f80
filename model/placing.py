"""Where the pixels of a volume lie, and how large they are, as far as its header says."""

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.anatomy import Floats
from model.frame import IDENTITY, Geometry, Pair

# A length in mm beyond these is a damaged header's, and would overflow on the way to the angle.
SMALLEST, LARGEST = 1e-6, 1e6


def _is_sane(lengths: Floats) -> npt.NDArray[np.bool_]:
    return (np.abs(lengths) > SMALLEST) & (np.abs(lengths) < LARGEST)


def placing(
    header: Any, path: Path, kind: str, first: int
) -> tuple[Geometry, tuple[str, ...], bool]:
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
    spacing_mm, warnings = _spacing_mm(header, path, kind, (float(spacing[0]), float(spacing[1])))
    if not spanned:
        warnings += ("the file's axes do not span a space: they are taken as not turned",)
    geometry = Geometry(
        spacing_mm,
        tuple(np.where(sized, spacing, 1.0).tolist()),
        tuple(np.where(np.abs(origin) < LARGEST, origin, 0.0).tolist()),
        tuple(matrix.ravel().tolist()) if spanned else IDENTITY,
    )
    return geometry, warnings, bool(sized.all()) and spanned


def _spacing_mm(
    header: Any, path: Path, kind: str, spacing: Pair
) -> tuple[Pair | None, tuple[str, ...]]:
    """The size of a pixel along x and y, or None, and a warning where the file's cannot be.

    ITK says 1 x 1 where a file says nothing, and most files that say it themselves were written by
    a program that knew nothing either: 1 x 1 counts as unknown, but in DICOM's own tag.
    """
    if spacing == (1.0, 1.0) and not (kind == "DICOM" and header.HasMetaDataKey("0028|0030")):
        regions = _ultrasound_spacing(path) if kind == "DICOM" else None
        if regions is None:
            return None, ()
        spacing = regions
    x, y = spacing
    if min(x, y) > 0 and _is_sane(np.array(spacing)).all():
        return spacing, ()
    return None, (f"the file's pixel size of {x:g} x {y:g} mm cannot be: lengths are in px only",)


def _ultrasound_spacing(path: Path) -> Pair | None:
    """mm per px from DICOM's Sequence of Ultrasound Regions, which SimpleITK does not pass on.

    Only where all regions that are measured in cm along both axes (unit code 3) agree. Found by the
    bytes of its tags, in the little-endian order of all but a retired transfer syntax.
    """
    with path.open("rb") as file:
        header = file.read(2**20).partition(b"\xe0\x7f\x10\x00")[0]  # up to the pixels
    unit = rb"\x18\0%b\x60(?:US\x02\0|\x02\0\0\0)(..)"
    delta = rb"\x18\0%b\x60(?:FD\x08\0|\x08\0\0\0)(.{8})"
    tags = unit % rb"\x24", unit % rb"\x26", rb".{,64}?", delta % rb"\x2c", delta % rb"\x2e"
    regions = re.findall(b"".join(tags), header, re.DOTALL)
    sizes = {struct.unpack("<dd", x + y) for *units, x, y in regions if units == [b"\3\0"] * 2}
    if len(sizes) != 1:
        return None
    x, y = sizes.pop()
    return x * 10, y * 10
