"""Which frames show the same scene, and a split that keeps such frames together.

Neighbouring frames of one examination are nearly equal. Spread over the splits they leak the answer
from one to the other, so that a split is drawn by group, never by image.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from training.data.case_table import SPLITS

SIDE = 32  # px a side
DUPLICATE_CORRELATION = 0.92
BLOCK = 1024  # rows of the correlation matrix held at once

Thumbnail = npt.NDArray[np.uint8]


def thumbnail(image: npt.NDArray[Any]) -> Thumbnail:
    """(H, W) grey image of values 0..255 -> (32, 32) uint8.

    A thumbnail's thumbnail is itself, so that a caller with many images keeps the small ones only.
    """
    grey = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
    return np.asarray(cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8)


def near_duplicate_groups(
    images: Iterable[npt.NDArray[Any]], threshold: float = DUPLICATE_CORRELATION
) -> list[int]:
    """A group number for each (H, W) image, counted from 0 in order of appearance.

    Two images are in one group where a chain of images joins them whose neighbours' thumbnails
    correlate at least by the threshold. Memory grows with the number of images, not its square.
    """
    flat = np.array([thumbnail(image).ravel() for image in images], np.float32)
    count = len(flat)
    flat = _standardised(flat.reshape(count, SIDE**2))
    first = np.arange(count)  # of each image: the lowest index known to be in its group
    for start in range(0, count, BLOCK):
        similar = flat[start : start + BLOCK] @ flat[start:].T >= threshold
        for row in similar:
            joined = np.unique(first[start:][row])
            if len(joined) > 1:
                first[np.isin(first, joined)] = joined[0]
    return [int(group) for group in np.unique(first, return_inverse=True)[1]]


def clusters(
    images: Iterable[npt.NDArray[Any]], groups: Sequence[Hashable], threshold: float
) -> list[int]:
    """A number for each (H, W) image, the same for all images of groups that look alike.

    Average linkage: the two most alike are joined until none are by the threshold. How alike two
    groups are lies halfway between the mean and the highest correlation of their images, reduced
    to 64 x 64 px and blurred. Other scans than these may still be of one patient or machine.
    """
    flat = _standardised(np.array([_blurred(image) for image in images], np.float32))
    names = list(dict.fromkeys(groups))
    number = np.array([names.index(group) for group in groups])
    every = [flat[number == k] for k in range(len(names))]
    sizes = np.array([float(len(one)) for one in every])
    alike = np.array([[(s.mean() + s.max()) / 2 for b in every for s in [a @ b.T]] for a in every])
    np.fill_diagonal(alike, -np.inf)
    while alike.max() >= threshold:
        i, j = np.unravel_index(alike.argmax(), alike.shape)
        joined = (sizes[i] * alike[i] + sizes[j] * alike[j]) / (sizes[i] + sizes[j])
        alike[i] = alike[:, i] = joined  # of itself and of what is gone: minus infinity
        alike[j] = alike[:, j] = -np.inf
        sizes[i] += sizes[j]
        number[number == j] = i
    return [int(one) for one in np.unique(number, return_inverse=True)[1]]


def _blurred(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(H, W) -> (4096,) grey values."""
    small = cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.GaussianBlur(small, (0, 0), 1.0)).ravel()


def _standardised(flat: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows of mean 0 and length 1, whose products are correlations."""
    flat = flat - flat.mean(axis=1, keepdims=True)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6))


def split_by_group(
    groups: Sequence[Hashable], fractions: Sequence[float], seed: int = 0
) -> list[str]:
    """A split name for each image, the same for a whole group.

    The groups are shuffled and each goes to the split that is furthest below its share of images.

    Args:
        groups: the group of each image.
        fractions: the shares of train, val and test, adding up to 1.
    """
    shares = np.asarray(fractions, np.float64)
    if shares.shape != (len(SPLITS),) or (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(
            f"expected the shares of {', '.join(SPLITS)}, three numbers from 0 that add up to 1, "
            f"got {list(fractions)}"
        )
    return [SPLITS[part] for part in deal(groups, shares, seed)]


def deal(groups: Sequence[Hashable], shares: npt.ArrayLike, seed: int = 0) -> list[int]:
    """A part's number for each image, the same for a whole group; arguments as above."""
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    order = list(members)
    missing = np.asarray(shares, np.float64) * len(groups)
    parts = [0] * len(groups)
    for position in np.random.default_rng(seed).permutation(len(order)):
        indices = members[order[position]]
        part = int(np.argmax(missing))
        missing[part] -= len(indices)
        for index in indices:
            parts[index] = part
    return parts
