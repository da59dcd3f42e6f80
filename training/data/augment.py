"""Random changes of one training sample, in network input px; the landmarks follow the image.

There are no flips: a flip would exchange PS1 and PS2.
"""

import cv2
import numpy as np

from model.anatomy import Floats
from model.masks import MaskError, landmarks_from_mask
from training.recipes import Augmentation


def augment(
    image: np.ndarray,
    mask: np.ndarray | None,
    points: Floats,
    settings: Augmentation,
    rng: np.random.Generator,
    style: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None, Floats]:
    """Change the geometry of image, mask and landmarks alike, then the image's grey values.

    An affine map keeps FH1 a point of tangency. A mild stretch hardly moves the symphysis's ends.

    Args:
        image: (size, size) grey 0..255.
        mask: (size, size) class numbers or None.
        points: (3, 2) landmarks in input px.
        style: (size, size) grey 0..255; the low frequencies of `image` may come to look like its.

    Returns:
        Image, mask and landmarks. A landmark may then lie outside the frame.
    """
    size = image.shape[0]
    if style is not None and rng.random() < settings.style:
        image = mix_amplitudes(image, style, rng.uniform(0.0, 1.0), settings.style_band)
    matrix = _draw_affine(size, settings, rng)
    bend = (
        _draw_bend(size, settings.elastic, rng) if settings.elastic else np.zeros((size, size, 2))
    )
    sources = _source_positions(matrix, bend)
    image = _resample(image, sources, cv2.INTER_LINEAR)
    points = _bend_points(points @ matrix[:, :2].T + matrix[:, 2], bend)
    if mask is not None:
        mask = np.asarray(_resample(mask, sources, cv2.INTER_NEAREST), np.uint8)
        if settings.elastic:
            points = _refit_landmarks(mask, points)
    return _change_grey(image.astype(np.float32), settings, rng), mask, points


def mix_amplitudes(image: np.ndarray, style: np.ndarray, share: float, band: float) -> np.ndarray:
    """Move the amplitudes of an image's low frequencies towards those of another image.

    The phases, which carry the anatomy, stay. The low amplitudes carry the machine's look (Yang and
    Soatto 2020, FDA, Eq. 3; a random share of them is mixed in as in Xu et al. 2021, Eq. 5).

    Args:
        image, style: (size, size) grey 0..255.
        share: 0 keeps the image's amplitudes, 1 takes the style's.
        band: frequencies up to band * size cycles on each axis are mixed.
    """
    size = image.shape[0]
    spectrum = np.fft.fftshift(np.fft.fft2(image))
    style_amplitude = np.abs(np.fft.fftshift(np.fft.fft2(style)))
    centre, reach = size // 2, int(band * size)
    low = (slice(centre - reach, centre + reach + 1),) * 2
    amplitude = np.abs(spectrum)
    amplitude[low] += share * (style_amplitude[low] - amplitude[low])
    mixed = np.fft.ifft2(np.fft.ifftshift(amplitude * np.exp(1j * np.angle(spectrum)))).real
    return np.clip(mixed, 0.0, 255.0).astype(np.float32)


def _draw_affine(size: int, settings: Augmentation, rng: np.random.Generator) -> Floats:
    """(2, 3) matrix from old to new input px, about the frame's centre."""
    centre = (size - 1) / 2
    angle = rng.uniform(-settings.rotation_deg, settings.rotation_deg)
    turn = cv2.getRotationMatrix2D((centre, centre), angle, rng.uniform(*settings.scale))
    matrix: Floats = np.asarray(turn)
    if settings.stretch:
        direction = rng.uniform(0.0, np.pi)
        along = np.array([np.cos(direction), np.sin(direction)])
        factor = rng.uniform(-settings.stretch, settings.stretch)
        stretch = np.eye(2) + factor * np.outer(along, along)
        matrix[:, :2] = stretch @ matrix[:, :2]
        matrix[:, 2] = stretch @ (matrix[:, 2] - centre) + centre
    matrix[:, 2] += rng.uniform(-settings.shift, settings.shift, 2) * size
    return matrix


def _draw_bend(size: int, amount: float, rng: np.random.Generator) -> np.ndarray:
    """(size, size, 2) smooth displacements in px, interpolated between 4 x 4 nodes.

    Args:
        amount: standard deviation of the nodes' displacements, as a share of the size.
    """
    nodes = rng.normal(0.0, amount * size, (4, 4, 2)).astype(np.float32)
    return np.asarray(cv2.resize(nodes, (size, size), interpolation=cv2.INTER_CUBIC))


def _source_positions(matrix: Floats, bend: np.ndarray) -> np.ndarray:
    """(size, size, 2) float32: the old (x, y) that each new pixel is read from.

    A new position is displaced by the bend, then taken back through the affine map.
    """
    size = len(bend)
    new = np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=-1) + bend
    back = cv2.invertAffineTransform(matrix)
    return np.asarray(new @ back[:, :2].T + back[:, 2], np.float32)


def _resample(
    image: np.ndarray, positions: np.ndarray, interpolation: int, border: int = cv2.BORDER_CONSTANT
) -> np.ndarray:
    """An image's values at (rows, columns, 2) positions, float32 (x, y)."""
    values = cv2.remap(image, positions, None, interpolation, None, border)  # type: ignore[call-overload]
    return np.asarray(values)


def _bend_points(points: Floats, bend: np.ndarray) -> Floats:
    """The points q with q + bend(q) = points, by fixed-point iteration."""
    bent = points
    for _ in range(20):
        positions = bent.astype(np.float32)[None]
        bent = points - _resample(bend, positions, cv2.INTER_LINEAR, cv2.BORDER_REPLICATE)[0]
    return np.asarray(bent)


def _refit_landmarks(mask: np.ndarray, points: Floats) -> Floats:
    """The landmarks of a bent mask, since a bend keeps neither axes nor tangents.

    The bent points stay if the frame cuts the mask, or if no landmarks can be derived from it.
    """
    if mask[[0, -1]].any() or mask[:, [0, -1]].any():
        return points
    try:
        return landmarks_from_mask(mask)
    except MaskError:
        return points


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
    if settings.erase and rng.random() < 0.5:
        width, height = (rng.uniform(0.05, settings.erase, 2) * size).astype(int)
        left, top = rng.integers(0, size - width), rng.integers(0, size - height)
        image[top : top + height, left : left + width] = 0.0
    return np.clip(image, 0.0, 255.0).astype(np.float32)
