"""Blend a labelled image with another one, bent so that its anatomy lies on the first one's.

A thin-plate spline (Bookstein 1989) lays the second symphysis and head on the first, PS1 on PS1,
PS2 on PS2, FH1 on FH1. What two scans look like is then mixed place by place under one outline,
and the first image's landmarks and mask hold for both.
"""

import cv2
import numpy as np

from model.anatomy import Floats
from model.masks import HEAD, SYMPHYSIS, Ellipse, MaskError, fit_ellipse

COARSE = 4  # px between the nodes at which the spline is computed
SMOOTH = 0.01  # how far the spline may miss its points, share of the side
AREA = (0.15, 8.0)  # a bend that changes an area by less or more folds or tears the image


Labelled = tuple[np.ndarray, Floats, np.ndarray | None]
"""(size, size) grey values, (3, 2) landmarks in px of the same frame, (size, size) mask."""


def blend(first: Labelled, second: Labelled, rng: np.random.Generator) -> np.ndarray:
    """(size, size) float32 grey values of `first`, in random smooth places those of `second`.

    The first image alone where one of the two has no ellipses or they are too unlike.
    """
    image = first[0].astype(np.float32)
    size = len(image)
    try:
        sources = spline(_outlines(*first[1:]), _outlines(*second[1:]), size)
    except MaskError:
        return image
    if sources is None:
        return image
    laid = cv2.remap(second[0].astype(np.float32), sources, None, cv2.INTER_LINEAR)
    inside = cv2.remap(np.ones_like(image), sources, None, cv2.INTER_LINEAR)
    nodes = rng.normal(rng.normal(0.0, 0.5), 1.0, (4, 4)).astype(np.float32)
    field = cv2.resize(nodes, (size, size), interpolation=cv2.INTER_CUBIC)
    share = inside / (1.0 + np.exp(-rng.uniform(0.5, 8.0) * field))
    return np.asarray(image + share * (laid - image), np.float32)


def spline(here: Floats, there: Floats, size: int) -> np.ndarray | None:
    """(size, size, 2) float32: for each pixel, where it lies in the frame of `there`.

    Args:
        here, there: (n, 2) points that belong together, px.

    Returns:
        None where the bend would fold the image or tear it.
    """
    n = len(here)
    system = np.zeros((n + 3, n + 3))
    system[:n, :n] = _kernel(here, here) + SMOOTH * size * np.eye(n)
    system[:n, n], system[:n, n + 1 :] = 1.0, here
    system[n:, :n] = system[:n, n:].T
    weights = np.linalg.solve(system, np.vstack([there, np.zeros((3, 2))]))
    ticks = (np.arange(size // COARSE) + 0.5) * COARSE - 0.5
    nodes = np.stack(np.meshgrid(ticks, ticks), axis=-1)
    at = nodes.reshape(-1, 2)
    found = _kernel(at, here) @ weights[:n] + weights[n] + at @ weights[n + 1 :]
    found = found.reshape(nodes.shape)
    down, along = np.gradient(found, COARSE, axis=(0, 1))
    area = along[..., 0] * down[..., 1] - along[..., 1] * down[..., 0]
    if area.min() < AREA[0] or area.max() > AREA[1]:
        return None
    return np.asarray(cv2.resize(found.astype(np.float32), (size, size)))


def _outlines(points: Floats, mask: np.ndarray | None) -> Floats:
    """(14, 2) points around the symphysis from PS1 on, and around the head from FH1 on."""
    if mask is None:
        raise MaskError("no mask")
    symphysis, head = fit_ellipse(mask, SYMPHYSIS), fit_ellipse(mask, HEAD)
    return np.concatenate([_outline(symphysis, points[0], 4), _outline(head, points[2], 10)])


def _outline(ellipse: Ellipse, start: Floats, count: int) -> Floats:
    """(count, 2) points of an ellipse from the direction of `start` on, even on the unit circle."""
    x, y = (start - ellipse.centre) @ ellipse.rotation / ellipse.semi_axes
    angles = np.arctan2(y, x) + 2.0 * np.pi * np.arange(count) / count
    circle = np.column_stack([np.cos(angles), np.sin(angles)])
    return np.asarray(ellipse.centre + (circle * ellipse.semi_axes) @ ellipse.rotation.T)


def _kernel(a: Floats, b: Floats) -> Floats:
    squared = ((a[:, None] - b) ** 2).sum(axis=-1)
    return np.asarray(squared * np.log(np.maximum(squared, 1e-9)))
