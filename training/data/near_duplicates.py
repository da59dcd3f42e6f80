"""Groups of images that show the same scene, and splits that keep a group together.

Neighbouring frames of one examination are nearly equal. If they lie in several splits, the answer
leaks from one to the other. A split is therefore drawn by group, never by image.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from training.data.case_table import SPLITS

THUMBNAIL_PX = 32  # a thumbnail's side
DUPLICATE_CORRELATION = 0.92  # of two thumbnails
BLOCK_ROWS = 1024  # rows of the correlation matrix in memory at once

Thumbnail = npt.NDArray[np.uint8]


def thumbnail(image: npt.NDArray[Any]) -> Thumbnail:
    """(H, W) grey image of values 0..255 -> (32, 32) uint8.

    The thumbnail of a thumbnail is the same, so a caller with many images can keep thumbnails only.
    """
    grey = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
    return np.asarray(
        cv2.resize(grey, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA), np.uint8
    )


def near_duplicate_groups(
    images: Iterable[npt.NDArray[Any]], threshold: float = DUPLICATE_CORRELATION
) -> list[int]:
    """A group number for each (H, W) image, from 0 in order of appearance.

    Two images share a group if a chain of images joins them in which the thumbnails of neighbours
    correlate by the threshold or more. Memory grows with the number of images, not its square.
    """
    flat = np.array([thumbnail(image).ravel() for image in images], np.float32)
    count = len(flat)
    flat = _standardise(flat.reshape(count, THUMBNAIL_PX**2))
    first = np.arange(count)  # the lowest index known to be in each image's group
    for start in range(0, count, BLOCK_ROWS):
        similar = flat[start : start + BLOCK_ROWS] @ flat[start:].T >= threshold
        for row in similar:
            joined = np.unique(first[start:][row])
            if len(joined) > 1:
                first[np.isin(first, joined)] = joined[0]
    return [int(group) for group in np.unique(first, return_inverse=True)[1]]


def cluster_groups(
    images: Iterable[npt.NDArray[Any]], groups: Sequence[Hashable], threshold: float
) -> list[int]:
    """A cluster number for each (H, W) image; groups that look alike share a cluster.

    Clusters are joined by average linkage, the two most alike first, while their likeness is the
    threshold or more. The likeness of two groups lies halfway between the mean and the highest
    correlation of their images, reduced to 64 x 64 px and blurred. Different clusters may still
    show one patient, or come from one machine.
    """
    flat = _standardise(np.array([_blur(image) for image in images], np.float32))
    names = list(dict.fromkeys(groups))
    cluster = np.array([names.index(group) for group in groups])
    members = [flat[cluster == k] for k in range(len(names))]
    sizes = np.array([float(len(rows)) for rows in members])
    likeness = np.array([[_group_likeness(a, b) for b in members] for a in members], np.float32)
    np.fill_diagonal(likeness, -np.inf)
    while likeness.max() >= threshold:
        i, j = np.unravel_index(likeness.argmax(), likeness.shape)
        # minus infinity stays for the cluster itself and for those already joined
        joined = (sizes[i] * likeness[i] + sizes[j] * likeness[j]) / (sizes[i] + sizes[j])
        likeness[i] = likeness[:, i] = joined
        likeness[j] = likeness[:, j] = -np.inf
        sizes[i] += sizes[j]
        cluster[cluster == j] = i
    return [int(number) for number in np.unique(cluster, return_inverse=True)[1]]


def _group_likeness(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """Halfway between the mean and the highest correlation of two groups' standardised rows."""
    correlations = a @ b.T
    return float((correlations.mean() + correlations.max()) / 2)


def _blur(image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(H, W) -> (4096,) grey values."""
    small = cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.GaussianBlur(small, (0, 0), 1.0)).ravel()


def _standardise(flat: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows shifted and scaled to mean 0 and length 1, so that their products are correlations."""
    flat = flat - flat.mean(axis=1, keepdims=True)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6))


def split_by_group(
    groups: Sequence[Hashable], fractions: Sequence[float], seed: int = 0
) -> list[str]:
    """A split name for each image, the same for a whole group.

    Args:
        groups: the group of each image.
        fractions: shares of train, val and test, adding up to 1.

    Raises:
        ValueError: the fractions are not three such shares.
    """
    shares = np.asarray(fractions, np.float64)
    if shares.shape != (len(SPLITS),) or (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(
            f"expected the shares of {', '.join(SPLITS)}, three numbers from 0 that add up to 1, "
            f"got {list(fractions)}"
        )
    return [SPLITS[part] for part in assign_parts(groups, shares, seed)]


def assign_parts(groups: Sequence[Hashable], shares: npt.ArrayLike, seed: int = 0) -> list[int]:
    """A part number for each image, from 0, the same for a whole group.

    The groups are shuffled. Each goes to the part that lacks most images of its share.

    Args:
        groups: the group of each image.
        shares: each part's share of the images.
    """
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
