"""Landmarks from a segmentation mask: a labelled one, or one that a network predicts.

The landmarks of FH-PS-AoP 2023 and PSFHS are made this way; they are not an expert's clicks. An
ellipse is fitted to each of the two classes. The ends of the symphysis's major axis are PS1 (larger
x) and PS2. FH1 is where the tangent from PS1 touches the head's ellipse on the side away from PS2.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from model.anatomy import LANDMARKS, Floats

SYMPHYSIS, HEAD = 1, 2
CLASSES = {SYMPHYSIS: "the pubic symphysis (1)", HEAD: "the fetal head (2)"}


class MaskError(ValueError):
    """A mask that cannot be read, or from which no landmarks follow; the message says why."""


@dataclass(frozen=True)
class Ellipse:
    """An ellipse in an image.

    Args:
        centre: (2,) as (x, y), in px.
        semi_axes: (2,) the longer one first, in px.
        direction: (2,) unit vector along the longer axis.
    """

    centre: Floats
    semi_axes: Floats
    direction: Floats

    @property
    def rotation(self) -> Floats:
        """(2, 2) whose columns are the directions of the longer and the shorter axis."""
        x, y = self.direction
        return np.array([[x, -y], [y, x]])

    def ends(self) -> Floats:
        """(2, 2) the two ends of the longer axis, the one with the larger x first."""
        reach = self.semi_axes[0] * self.direction * (1 if self.direction[0] >= 0 else -1)
        return np.array([self.centre + reach, self.centre - reach])

    def tangent_points(self, point: Floats) -> Floats | None:
        """(2, 2) where the two tangents from a point touch; None if the point is not outside.

        The ellipse is mapped to the unit circle. From a point at distance d and angle t, tangents
        touch the circle at the angles t -+ acos(1 / d). The map keeps tangents and orientation.
        """
        x, y = (point - self.centre) @ self.rotation / self.semi_axes
        distance = np.hypot(x, y)
        if not distance > 1:
            return None
        angles = np.arctan2(y, x) + np.array([-1, 1]) * np.arccos(1 / distance)
        circle = np.column_stack([np.cos(angles), np.sin(angles)])
        return np.asarray(self.centre + (circle * self.semi_axes) @ self.rotation.T)


def outer_contour(mask: npt.NDArray[np.uint8], label: int) -> npt.NDArray[np.int32]:
    """(n, 1, 2) px: every point of the outer contour of a class's largest 8-connected component.

    Raises:
        MaskError: the mask has no pixel of the class.
    """
    chosen = mask == label
    rows, columns = (np.flatnonzero(chosen.any(axis)) for axis in (1, 0))
    if not len(rows):
        raise MaskError(f"the mask has no pixel of {CLASSES[label]}")
    box = chosen[
        rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1
    ]  # faster than the whole image
    _, labels, stats, _ = cv2.connectedComponentsWithStats(box.astype(np.uint8))
    component = labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    contours, _ = cv2.findContours(
        component.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    corner = np.array([columns[0], rows[0]])
    return np.asarray(max(contours, key=len) + corner, np.int32)


def fit_ellipse(mask: npt.NDArray[np.uint8], label: int) -> Ellipse:
    """The least-squares ellipse of one class (cv2.fitEllipse on every outer contour point).

    Raises:
        MaskError: the class is missing, or no ellipse fits its contour.
    """
    contour = outer_contour(mask, label)
    if len(contour) < 5:
        raise MaskError(
            f"the contour of {CLASSES[label]} has {len(contour)} points; an ellipse needs 5"
        )
    centre, diameters, angle_deg = cv2.fitEllipse(contour)
    values = np.array([*centre, *diameters, angle_deg], np.float64)
    if not np.isfinite(values).all() or min(diameters) < 1:
        raise MaskError(f"no ellipse fits the contour of {CLASSES[label]}: it may be a line")
    # angle_deg belongs to the first diameter, which is not always the longer one.
    angle = np.radians(angle_deg + (0 if diameters[0] >= diameters[1] else 90))
    return Ellipse(
        np.array(centre, np.float64),
        np.sort(np.array(diameters, np.float64))[::-1] / 2,
        np.array([np.cos(angle), np.sin(angle)]),
    )


def landmarks_from_ellipses(symphysis: Ellipse, head: Ellipse) -> Floats:
    """(3, 2) PS1, PS2, FH1 in px.

    Raises:
        MaskError: PS1 lies inside the head.
    """
    ps1, ps2 = symphysis.ends()
    tangents = head.tangent_points(ps1)
    if tangents is None:
        raise MaskError("PS1 lies inside the fetal head's ellipse: no tangent to it exists")
    to_centre, to_ps2 = head.centre - ps1, ps2 - ps1
    side = to_centre[0] * to_ps2[1] - to_centre[1] * to_ps2[0]
    sides = to_centre[0] * (tangents - ps1)[:, 1] - to_centre[1] * (tangents - ps1)[:, 0]
    return np.array([ps1, ps2, tangents[int(np.argmax(-sides * side))]])


def landmarks_from_mask(mask: npt.NDArray[np.uint8]) -> Floats:
    """(H, W) mask: 0 background, 1 symphysis, 2 head -> (3, 2) PS1, PS2, FH1 in px.

    Raises:
        MaskError: the mask has another shape or other values, a class is missing or too small for
            an ellipse, PS1 lies inside the head's ellipse, or a landmark lies outside the image.
    """
    if mask.ndim != 2:
        raise MaskError(f"expected a mask of (height, width), got {mask.shape}")
    if (mask > HEAD).any():
        unknown = np.setdiff1d(mask, [0, SYMPHYSIS, HEAD])
        raise MaskError(
            f"the mask holds the values {unknown[:5].tolist()}; expected only 0 (background), "
            "1 (pubic symphysis) and 2 (fetal head)"
        )
    landmarks = landmarks_from_ellipses(fit_ellipse(mask, SYMPHYSIS), fit_ellipse(mask, HEAD))
    height, width = mask.shape
    for landmark, (x, y) in zip(LANDMARKS, landmarks):
        if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
            raise MaskError(
                f"{landmark} would lie outside the image of {width}x{height} px, "
                f"at ({x:.1f}, {y:.1f})"
            )
    return landmarks


def landmarks_from_shares(shares: npt.NDArray[np.float32], size: int) -> Floats:
    """(2, rows, columns) shares of each cell that PS and FH cover -> (3, 2) in network input px.

    The shares are enlarged to the input's size. A pixel belongs to a class if its share is above
    one half.

    Args:
        size: side of the network input in px.

    Raises:
        MaskError: as `landmarks_from_mask`.
    """
    symphysis, head = (
        cv2.resize(share, (size, size), interpolation=cv2.INTER_CUBIC) > 0.5 for share in shares
    )
    mask = np.where(symphysis, SYMPHYSIS, np.where(head, HEAD, 0)).astype(np.uint8)
    return landmarks_from_mask(mask)
