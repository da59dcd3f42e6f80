"""Image px <-> network input px <-> heatmap cells, image px <-> mm; each with an exact inverse.

One convention: integers are pixel centres, so a resize by s maps x to (x + 0.5) * s - 0.5.

One resizing rule: the image is scaled until its longer side fills the square network input, and
centred on black. Pixels that are not square are scaled to square ones, because the network knows
anatomy in its true proportions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Union

import cv2
import numpy as np
import numpy.typing as npt

from model.anatomy import Floats

# (H, W), grey or class numbers
Pixels = Union[npt.NDArray[np.uint8], npt.NDArray[np.float32]]

Pair = tuple[float, float]  # (along x, along y)
Triple = tuple[float, float, float]
NEAREST = cv2.INTER_NEAREST_EXACT
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Letterbox:
    """Image px <-> network input px, for images of one size.

    Args:
        width, height: the image's size in px.
        size: side of the square network input in px.
        spacing: size of an image pixel along x and y; only its ratio matters.
    """

    width: int
    height: int
    size: int
    spacing: Pair = (1.0, 1.0)

    @cached_property
    def resized(self) -> tuple[int, int]:
        """(width, height) of the scaled image inside the square, in input px."""
        extent = self.width * self.spacing[0], self.height * self.spacing[1]
        scale = self.size / max(extent)
        return max(1, round(extent[0] * scale)), max(1, round(extent[1] * scale))

    @cached_property
    def offset(self) -> tuple[int, int]:
        """(columns, rows) of black on the left of the scaled image and above it, in input px."""
        return (self.size - self.resized[0]) // 2, (self.size - self.resized[1]) // 2

    @cached_property
    def scale(self) -> Floats:
        """Input px per image px along x and y: exact, after rounding to whole pixels."""
        return np.array([self.resized[0] / self.width, self.resized[1] / self.height])

    def to_input(self, points: npt.ArrayLike) -> Floats:
        """(..., 2) image px -> (..., 2) network input px."""
        array: Floats = np.asarray(points, np.float64)
        return np.asarray((array + 0.5) * self.scale - 0.5 + np.array(self.offset))

    def to_image(self, points: npt.ArrayLike) -> Floats:
        """(..., 2) network input px -> (..., 2) image px."""
        array: Floats = np.asarray(points, np.float64)
        return np.asarray((array - np.array(self.offset) + 0.5) / self.scale - 0.5)

    def apply(self, image: Pixels, nearest: bool = False) -> Pixels:
        """(height, width) image -> (size, size) of the same type, with 0 around it.

        Args:
            nearest: for masks, whose class numbers must not be interpolated.

        Raises:
            ValueError: the image has another size than this letterbox.
        """
        if image.shape != (self.height, self.width):
            raise ValueError(f"expected an image of {(self.height, self.width)}, got {image.shape}")
        shrinks = self.resized[0] < self.width or self.resized[1] < self.height
        smooth = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        scaled = cv2.resize(image, self.resized, interpolation=NEAREST if nearest else smooth)
        left, top = self.offset
        square = np.zeros((self.size, self.size), image.dtype)
        square[top : top + self.resized[1], left : left + self.resized[0]] = scaled
        return square


def input_to_cells(points: npt.ArrayLike, stride: float) -> Floats:
    """(..., 2) input px -> (..., 2) cells; cell c is centred at (c + 0.5) * stride - 0.5 px."""
    return (np.asarray(points, np.float64) + 0.5) / stride - 0.5


def cells_to_input(points: npt.ArrayLike, stride: float) -> Floats:
    """(..., 2) cells -> (..., 2) input px."""
    return (np.asarray(points, np.float64) + 0.5) * stride - 0.5


@dataclass(frozen=True)
class Geometry:
    """Where a file says its pixels lie.

    Args:
        spacing_mm: mm per px along x and y, or None if the file does not say.
        aspect: size of a pixel along x and y up to a common factor, where the file says only that.
        world_spacing, origin, direction: the file's own world frame, or the identity. ITK's
            convention: world = origin + direction @ (spacing * index), direction in row-major
            order.
    """

    spacing_mm: Pair | None = None
    world_spacing: Triple = (1.0, 1.0, 1.0)
    origin: Triple = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = field(default=IDENTITY)
    aspect: Pair | None = None

    @property
    def pixel_shape(self) -> Pair:
        """Size of a pixel along x and y up to a common factor; (1, 1) if it is unknown."""
        return self.spacing_mm or self.aspect or (1.0, 1.0)

    def to_mm(self, points: npt.ArrayLike) -> Floats | None:
        """(..., 2) image px -> (..., 2) mm from the first pixel's centre; None without spacing."""
        return None if self.spacing_mm is None else np.asarray(points, np.float64) * self.spacing_mm

    def from_mm(self, points: npt.ArrayLike) -> Floats | None:
        """(..., 2) mm -> (..., 2) image px: the inverse of `to_mm`."""
        return None if self.spacing_mm is None else np.asarray(points, np.float64) / self.spacing_mm

    def to_world(self, points: npt.ArrayLike, slice_index: int = 0) -> Floats:
        """(n, 2) image px of one slice -> (n, 3) in the file's world frame."""
        flat = np.asarray(points, np.float64)
        index = np.column_stack([flat, np.full(len(flat), float(slice_index))])
        matrix = np.reshape(self.direction, (3, 3))
        return np.asarray((index * self.world_spacing) @ matrix.T + np.asarray(self.origin))

    def from_world(self, points: npt.ArrayLike) -> Floats:
        """(n, 3) world -> (n, 3) pixel index (x, y, slice): the inverse of `to_world`."""
        matrix = np.reshape(self.direction, (3, 3))
        shifted = (np.asarray(points, np.float64) - self.origin) @ np.linalg.inv(matrix).T
        return np.asarray(shifted / self.world_spacing)
