"""The three landmarks, the one angle of progression, and which anatomies are plausible.

Points are (x, y) in px, integer coordinates at pixel centres, in the order of `Landmark`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Landmark(IntEnum):
    """The landmarks in the order in which every array, file and heatmap holds them."""

    PS1 = 0  # inferior end of the pubic symphysis, on the image's right
    PS2 = 1  # superior end of the pubic symphysis, on the left
    FH1 = 2  # where the line from PS1 touches the fetal head, on the side away from PS2


LANDMARKS: tuple[str, ...] = tuple(landmark.name for landmark in Landmark)

# Limits of `implausibilities`: the extremes of the 730 training images of PSFHS, each widened by
# a fifth. Lengths are fractions of the image's longer side. A test requires that 99.5 % of real
# cases pass.
SYMPHYSIS_LENGTH = (0.12, 0.42)
TANGENT_LENGTH = (0.09, 0.65)
AOP_DEG = (51.0, 180.0)


def angle_of_progression(
    points: npt.ArrayLike, spacing: tuple[float, float] = (1.0, 1.0)
) -> Floats:
    """The unsigned angle PS2-PS1-FH1 at the vertex PS1, in degrees, 0 to 180.

    acos(u.v / |u||v|) with u = PS2 - PS1 and v = FH1 - PS1, as in the IUGC 2025 labels; after
    Barbera et al., Ultrasound Obstet Gynecol 2009; 33: 313-319.

    Args:
        points: (..., 3, 2) landmarks as (x, y), in pixels.
        spacing: size of a pixel along x and y; only its ratio matters.

    Returns:
        (...) degrees.

    Raises:
        ValueError: the shape is not (..., 3, 2), a coordinate is not finite, or PS2 or FH1 equals
            PS1, so that there is no angle.
    """
    array: Floats = np.asarray(points, dtype=np.float64)
    if array.shape[-2:] != (len(LANDMARKS), 2):
        raise ValueError(f"expected landmarks of shape (..., 3, 2), got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("landmarks hold a coordinate that is not finite")
    array = array * np.asarray(spacing, dtype=np.float64)
    vertex = array[..., Landmark.PS1, :]
    u = array[..., Landmark.PS2, :] - vertex
    v = array[..., Landmark.FH1, :] - vertex
    lengths = np.linalg.norm(u, axis=-1) * np.linalg.norm(v, axis=-1)
    if not np.all(lengths > 0):
        raise ValueError("PS2 or FH1 equals PS1: no angle is defined")
    cosine = np.clip((u * v).sum(axis=-1) / lengths, -1.0, 1.0)
    return np.degrees(np.arccos(cosine))  # type: ignore[no-any-return]


def implausibilities(
    points: npt.NDArray[np.floating[Any]],
    image_size: tuple[int, int],
    spacing: tuple[float, float] = (1.0, 1.0),
) -> list[str]:
    """Why these landmarks cannot be right, one sentence for each reason; empty if they may be.

    Args:
        points: (3, 2) landmarks as (x, y), in pixels.
        image_size: (width, height) in pixels.
        spacing: size of a pixel along x and y; only its ratio matters.
    """
    array = np.asarray(points, dtype=np.float64)
    width, height = image_size
    if not np.isfinite(array).all():
        return ["a landmark has no finite position"]
    reasons = []
    if ((array < -0.5) | (array > np.array([width, height]) - 0.5)).any():
        reasons.append("a landmark lies outside the image")
    scaled = array * np.asarray(spacing) / max(width * spacing[0], height * spacing[1])
    ps1, ps2, fh1 = scaled
    if ps1[0] <= ps2[0]:
        reasons.append("PS1 is not on the right of PS2: the image may be mirrored")
    for what, length, (low, high) in (
        ("the symphysis (PS1 to PS2)", np.linalg.norm(ps2 - ps1), SYMPHYSIS_LENGTH),
        ("the tangent (PS1 to FH1)", np.linalg.norm(fh1 - ps1), TANGENT_LENGTH),
    ):
        if not low <= length <= high:
            reasons.append(
                f"{what} is {length:.2f} of the image's longer side, "
                f"outside the usual {low:.2f} to {high:.2f}"
            )
    if np.array_equal(ps1, ps2) or np.array_equal(ps1, fh1):
        return [*reasons, "two landmarks coincide: no angle is defined"]
    angle = float(angle_of_progression(array, spacing))
    if not AOP_DEG[0] <= angle <= AOP_DEG[1]:
        reasons.append(
            f"the angle is {angle:.0f} deg, outside the usual {AOP_DEG[0]:.0f} to {AOP_DEG[1]:.0f}"
        )
    return reasons
