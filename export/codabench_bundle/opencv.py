"""The functions of OpenCV that prediction calls, in numpy: the Codabench bundle's `cv2`.

An ingestion program's environment may lack OpenCV. Arguments and results are OpenCV's, as far as
model/ uses them; the tests compare them with the real ones.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

INTER_LINEAR, INTER_CUBIC, INTER_AREA, INTER_NEAREST_EXACT = 1, 2, 3, 6
CC_STAT_AREA = 4
RETR_EXTERNAL, CHAIN_APPROX_NONE = 0, 1

Array = npt.NDArray[Any]

# (x, y) of the eight neighbours, anticlockwise from the right, as OpenCV numbers them
_NEIGHBOURS = ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))
_LEFT = 4


def resize(image: Array, dsize: tuple[int, int], interpolation: int = INTER_LINEAR) -> Array:
    """(h, w) -> (height, width) of the same type, for dsize (width, height).

    INTER_LINEAR enlarges uint8, INTER_AREA shrinks uint8, INTER_CUBIC enlarges float32.
    """
    expected = np.float32 if interpolation == INTER_CUBIC else np.uint8
    if image.dtype != expected:
        raise NotImplementedError(f"resize of type {image.dtype} by method {interpolation}")
    resizers = {INTER_LINEAR: _enlarge, INTER_AREA: _shrink, INTER_CUBIC: _enlarge_smoothly}
    return resizers[interpolation](image, *dsize)


def _enlarge(image: Array, width: int, height: int) -> Array:
    """Linear interpolation in OpenCV's fixed point: weights in 1/2048, sums in 1/4 grey level."""
    low, high, low_weight, high_weight = _linear_taps(image.shape[1], width)
    rows = image[:, low] * low_weight + image[:, high] * high_weight
    low, high, low_weight, high_weight = _linear_taps(image.shape[0], height)
    taps = (low, low_weight), (high, high_weight)
    parts = ((rows[k] >> 4) * weight[:, None] >> 16 for k, weight in taps)
    return np.asarray((sum(parts) + 2) >> 2, np.uint8)


def _linear_taps(source: int, target: int) -> tuple[Array, Array, Array, Array]:
    """For each new pixel: the old pixels before and after it, and the weights of both in 1/2048."""
    centres = _pixel_centres(source, target).astype(np.float32)
    low = np.floor(centres).astype(np.int32)
    share = centres - low
    before, after = (np.rint(part * 2048).astype(np.int32) for part in (1 - share, share))
    return np.clip(low, 0, source - 1), np.clip(low + 1, 0, source - 1), before, after


def _pixel_centres(source: int, target: int) -> Array:
    """(target,) the new pixels' centres, in old pixels."""
    return np.asarray((np.arange(target) + 0.5) * (source / target) - 0.5)


def _shrink(image: Array, width: int, height: int) -> Array:
    """Mean over the area of each new pixel, summed and rounded in OpenCV's order."""
    rows, columns = image.shape
    if rows % height or columns % width:
        along_x = _area_means(image.astype(np.float32), width)
        return np.asarray(np.rint(_area_means(along_x.T, height).T), np.uint8)
    down, across = rows // height, columns // width
    sums = image.reshape(height, down, width, across).sum(axis=(1, 3), dtype=np.int32)
    if (down, across) == (2, 2):
        return np.asarray((sums + 2) >> 2, np.uint8)
    return np.asarray(np.rint(sums.astype(np.float32) * np.float32(1 / (down * across))), np.uint8)


def _area_means(values: Array, target: int) -> Array:
    """(n, source) -> (n, target) float32 means over the span of each new value, summed in order."""
    source = values.shape[1]
    low = np.arange(target) * (source / target)
    high = low + source / target
    total = np.zeros((len(values), target), np.float32)
    for offset in range(math.ceil(source / target) + 1):
        old = np.floor(low).astype(int) + offset
        covered = np.minimum(high, old + 1) - np.maximum(low, old)
        share = np.where(covered > 1e-3, covered, 0) / np.minimum(source / target, source - low)
        total += values[:, np.minimum(old, source - 1)] * share.astype(np.float32)
    return total


def _enlarge_smoothly(image: Array, width: int, height: int) -> Array:
    along_x, along_y = _cubic_weights(image.shape[1], width), _cubic_weights(image.shape[0], height)
    return np.asarray(along_y @ image @ along_x.T)


def _cubic_weights(source: int, target: int) -> Array:
    """(target, source) weights of Keys's cubic kernel with OpenCV's parameter.

    Beyond the border its pixels are repeated.
    """
    a, centres = -0.75, _pixel_centres(source, target)
    weights = np.zeros((target, source))
    for offset in (-1, 0, 1, 2):
        old = np.floor(centres) + offset
        x = np.abs(centres - old)
        near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * x * a - 4 * a
        within = np.clip(old, 0, source - 1).astype(int)
        np.add.at(weights, (np.arange(target), within), np.where(x <= 1, near, far))
    return weights.astype(np.float32)


def connectedComponentsWithStats(image: Array) -> tuple[int, Array, Array, None]:
    """Number of labels, (H, W) labels of 8-connected components, (labels, 5) statistics, None.

    Of the statistics only the area is filled in. The centres are left out.
    """
    steps = np.diff(np.pad(image > 0, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = (values.tolist() for values in np.nonzero(steps == 1))
    ends = np.nonzero(steps == -1)[1].tolist()
    group = list(range(len(rows)))  # for each run of pixels an earlier run of its component

    def first_run(k: int) -> int:
        while group[k] != k:
            k = group[k]
        return k

    above = 0
    for k, row in enumerate(rows):
        while rows[above] < row - 1 or (rows[above] < row and ends[above] < starts[k]):
            above += 1
        j = above
        while rows[j] < row and starts[j] <= ends[k]:
            low, high = sorted((first_run(j), first_run(k)))
            group[high] = low
            j += 1
    numbers: dict[int, int] = {}
    labels = np.zeros(image.shape, np.int32)
    for k, row in enumerate(rows):
        labels[row, starts[k] : ends[k]] = numbers.setdefault(first_run(k), len(numbers) + 1)
    stats = np.zeros((len(numbers) + 1, 5), np.int32)
    stats[:, CC_STAT_AREA] = np.bincount(labels.ravel(), minlength=len(stats))
    return len(stats), labels, stats, None


def findContours(image: Array, mode: int, method: int) -> tuple[list[Array], None]:
    """The outer border of the only component in an image, as [(n, 1, 2)] points (x, y).

    After Suzuki and Abe 1985, in OpenCV's order. The border passes a spur one pixel wide twice.
    """
    if (mode, method) != (RETR_EXTERNAL, CHAIN_APPROX_NONE):
        raise NotImplementedError(f"findContours of mode {mode} and method {method}")
    padded = np.pad(image > 0, 1)
    inside, width = padded.ravel().tolist(), padded.shape[1]
    ways = [x + y * width for x, y in _NEIGHBOURS]
    start = inside.index(True)
    back = [way for way in range(_LEFT + 7, _LEFT, -1) if inside[start + ways[way % 8]]]
    if not back:
        points = [start]
    else:
        last = start + ways[back[0] % 8]  # from this pixel the border returns to the start
        points, at, way = [], start, _LEFT
        while True:
            way = next(w % 8 for w in range(way + 1, way + 9) if inside[at + ways[w % 8]])
            points.append(at)
            if at == last and at + ways[way] == start:
                break
            at, way = at + ways[way], way + 4
    y, x = np.divmod(np.array(points), width)
    return [np.stack([x - 1, y - 1], axis=-1)[:, None].astype(np.int32)], None


def fitEllipse(points: Array) -> tuple[tuple[float, float], tuple[float, float], float]:
    """(n, 1, 2) points -> centre, diameters and the angle of the first one in degrees.

    As OpenCV does, it fits the conic a x^2 + b y^2 + c x y + d x + e y = 1 about the points' mean
    by least squares, and then a, b and c again about the centre of the first fit. If a dozen points
    lie almost on a line, OpenCV first moves them at random, and its ellipse differs from this one.
    """
    flat = points.reshape(-1, 2).astype(np.float64)
    mean = flat.mean(axis=0)
    scale = 100 / max(np.abs(flat - mean).sum(), np.finfo(np.float32).eps)
    x, y = ((flat - mean) * scale).T
    ones = np.ones_like(x)
    a, b, c, d, e = _least_squares(np.stack([-x * x, -y * y, -x * y, x, y], axis=1), ones)
    centre = _least_squares(np.array([[2 * a, c], [c, 2 * b]]), np.array([d, e]))
    x, y = x - centre[0], y - centre[1]
    a, b, c = _least_squares(np.stack([x * x, y * y, x * y], axis=1), ones)
    angle = -0.5 * math.atan2(c, b - a)
    spread = c / math.sin(-2 * angle) if abs(c) > 1e-8 else b - a
    reach = np.abs([a + b - spread, a + b + spread])
    squares = np.divide(2, reach, out=np.zeros(2), where=reach > 1e-8)  # 0: infinite axis
    x, y = (centre / scale + mean).tolist()
    first, second = (2 * np.sqrt(squares) / scale).tolist()
    return (x, y), (first, second), math.degrees(angle)


def _least_squares(terms: Array, values: Array) -> Array:
    return np.asarray(np.linalg.lstsq(terms, values, rcond=None)[0])
