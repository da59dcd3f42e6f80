"""Random changes of one training sample in network input px; the landmarks follow the image.

No flips: they would exchange PS1 and PS2.
"""

import cv2
import numpy as np

from model.anatomy import Floats
from training.recipes import Augmentation


def augment(
    image: np.ndarray,
    mask: np.ndarray | None,
    points: Floats,
    settings: Augmentation,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray | None, Floats]:
    """Rotate, scale and shift image, mask and landmarks alike; then change the grey values.

    Args:
        image: (size, size) grey 0..255.
        mask: (size, size) class numbers or None.
        points: (3, 2) landmarks in input px; the returned ones may lie outside the frame.
    """
    size = image.shape[0]
    matrix = _similarity(size, settings, rng)
    image = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR)
    if mask is not None:
        mask = cv2.warpAffine(mask, matrix, (size, size), flags=cv2.INTER_NEAREST)
    points = points @ matrix[:, :2].T + matrix[:, 2]
    return _change_grey(image.astype(np.float32), settings, rng), mask, points


def _similarity(size: int, settings: Augmentation, rng: np.random.Generator) -> Floats:
    """(2, 3) matrix from old to new input px, about the frame's centre."""
    centre = (size - 1) / 2
    angle = rng.uniform(-settings.rotation_deg, settings.rotation_deg)
    matrix = cv2.getRotationMatrix2D((centre, centre), angle, rng.uniform(*settings.scale))
    matrix[:, 2] += rng.uniform(-settings.shift, settings.shift, 2) * size
    return matrix


def _change_grey(image: np.ndarray, settings: Augmentation, rng: np.random.Generator) -> np.ndarray:
    size = image.shape[0]
    image = 255.0 * (image / 255.0) ** rng.uniform(*settings.gamma)
    image = image + (rng.uniform(*settings.contrast) - 1.0) * (image - image.mean()) * (image > 0)
    if settings.gain:
        ramp = np.linspace(-1.0, 1.0, size, dtype=np.float32)
        direction = rng.uniform(0.0, 2.0 * np.pi)
        slope = np.cos(direction) * ramp[None] + np.sin(direction) * ramp[:, None]
        image = image * (1.0 + rng.uniform(0.0, settings.gain) * slope)
    if settings.blur_sigma_px and rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.1, settings.blur_sigma_px))
    if settings.speckle and rng.random() < 0.5:
        noise = rng.standard_normal((size, size), dtype=np.float32)
        image = image * (1.0 + rng.uniform(0.0, settings.speckle) * noise)
    return np.clip(image, 0.0, 255.0).astype(np.float32)
