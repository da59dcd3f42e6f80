"""Images that do not show the model's view, to train the view head and to measure doubt.

`DISTORTIONS` turn an image of the right view into one of a wrong view. `SCENES` draw images that
show no anatomy at all. Every image is (rows, columns) grey 0..255, uint8.
"""

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt

GreyImage = npt.NDArray[np.uint8]


def mirror(image: GreyImage, _: np.random.Generator) -> GreyImage:
    """Exchange left and right, so that the symphysis lies on the right."""
    return np.ascontiguousarray(image[:, ::-1])


def turn_upside_down(image: GreyImage, _: np.random.Generator) -> GreyImage:
    """Exchange top and bottom, so that the probe lies at the bottom."""
    return np.ascontiguousarray(image[::-1])


def turn_around(image: GreyImage, _: np.random.Generator) -> GreyImage:
    """Turn by 180 deg."""
    return np.ascontiguousarray(image[::-1, ::-1])


def lay_on_its_side(image: GreyImage, rng: np.random.Generator) -> GreyImage:
    """Turn by 90 deg to either side, and flip every second time."""
    side = np.rot90(image, 1 if rng.random() < 0.5 else 3)
    return np.ascontiguousarray(side if rng.random() < 0.5 else side[::-1])


def invert(image: GreyImage, _: np.random.Generator) -> GreyImage:
    """Invert the grey values, those of the black around the sector included."""
    return 255 - image


def invert_inside(image: GreyImage, _: np.random.Generator) -> GreyImage:
    """Invert the grey values, but keep the black around the sector."""
    inside = cv2.morphologyEx((image > 8).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((15, 15)))
    return np.where(inside > 0, 255 - image, image).astype(np.uint8)


def shuffle_tiles(image: GreyImage, rng: np.random.Generator) -> GreyImage:
    """Put the image's tiles into another order: the texture is right, the anatomy is not."""
    count = int(rng.choice([2, 3, 4]))
    rows, columns = image.shape[0] // count, image.shape[1] // count
    tiles = [
        image[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns]
        for r in range(count)
        for c in range(count)
    ]
    order = rng.permutation(len(tiles))
    while (order == np.arange(len(tiles))).mean() > 0.3:
        order = rng.permutation(len(tiles))
    shuffled = np.zeros_like(image)
    for place, k in enumerate(order):
        r, c = divmod(place, count)
        shuffled[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns] = tiles[k]
    return shuffled


def shrink_into_frame(image: GreyImage, rng: np.random.Generator) -> GreyImage:
    """Shrink the image into a small part of a black frame, as in a screenshot."""
    share = rng.uniform(0.25, 0.5)
    height, width = image.shape
    small = cv2.resize(image, None, fx=share, fy=share, interpolation=cv2.INTER_AREA)
    frame = np.zeros_like(image)
    top = int(rng.integers(0, height - small.shape[0] + 1))
    left = int(rng.integers(0, width - small.shape[1] + 1))
    frame[top : top + small.shape[0], left : left + small.shape[1]] = small
    return frame


def enlarge_part(image: GreyImage, rng: np.random.Generator) -> GreyImage:
    """Enlarge a part of the image, too small to hold all landmarks."""
    share = rng.uniform(0.2, 0.4)
    height, width = (round(share * side) for side in image.shape)
    top = int(rng.integers(0, image.shape[0] - height + 1))
    left = int(rng.integers(0, image.shape[1] - width + 1))
    part = image[top : top + height, left : left + width]
    return np.asarray(cv2.resize(part, image.shape[::-1], interpolation=cv2.INTER_CUBIC), np.uint8)


DISTORTIONS: dict[str, Callable[[GreyImage, np.random.Generator], GreyImage]] = {
    "mirrored": mirror,
    "upside down": turn_upside_down,
    "turned by 180 deg": turn_around,
    "on its side": lay_on_its_side,
    "grey-inverted": invert,
    "grey-inverted inside": invert_inside,
    "shuffled": shuffle_tiles,
    "far away": shrink_into_frame,
    "too near": enlarge_part,
}


def draw_noise(size: int, rng: np.random.Generator) -> GreyImage:
    """Uniform, normal or smooth noise."""
    kind = rng.integers(3)
    if kind == 0:
        return rng.integers(0, 256, (size, size), dtype=np.uint8)
    if kind == 1:
        return _to_uint8(
            rng.uniform(20, 128) + rng.uniform(5, 80) * rng.standard_normal((size, size))
        )
    return draw_smooth_noise(size, rng)


def draw_smooth_noise(size: int, rng: np.random.Generator) -> GreyImage:
    """Noise whose power falls with frequency, as that of a photograph does."""
    steps = np.fft.fftfreq(size)
    radius = np.hypot(steps[:, None], steps[None])
    radius[0, 0] = 1
    spectrum = np.fft.fft2(rng.standard_normal((size, size))) / radius ** rng.uniform(0.6, 1.8)
    field = np.fft.ifft2(spectrum).real
    return _to_uint8(128 + rng.uniform(20, 60) * (field - field.mean()) / field.std())


def draw_shapes(size: int, rng: np.random.Generator) -> GreyImage:
    """Ellipses, polygons and lines before a gradient, blurred or not."""
    ramp = np.linspace(0, 1, size)
    slope = rng.uniform(-1, 1, 2)
    field = slope[0] * ramp[None] + slope[1] * ramp[:, None]
    image = _to_uint8(rng.uniform(0, 200) + 120 * field)
    for _ in range(rng.integers(2, 20)):
        colour = int(rng.integers(0, 256))
        centre = tuple(int(v) for v in rng.integers(0, size, 2))
        axes = tuple(int(v) for v in rng.integers(3, size // 3, 2))
        kind = rng.integers(3)
        if kind == 0:
            width = int(rng.choice([-1, 1, 3, 8]))
            cv2.ellipse(image, centre, axes, rng.uniform(0, 180), 0, 360, colour, width)
        elif kind == 1:
            corners = rng.integers(0, size, (rng.integers(3, 7), 1, 2)).astype(np.int32)
            cv2.fillPoly(image, [corners], colour)
        else:
            end = tuple(int(v) for v in rng.integers(0, size, 2))
            cv2.line(image, centre, end, colour, int(rng.integers(1, 12)))
    if rng.random() < 0.5:
        return np.asarray(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 4)), np.uint8)
    return image


def draw_lettering(size: int, rng: np.random.Generator) -> GreyImage:
    """Lines of random letters, light on dark or dark on light."""
    image = np.zeros((size, size), np.uint8)
    scale = rng.uniform(0.3, 1.5)
    for line in range(int(rng.integers(2, 14))):
        words = "".join(chr(code) for code in rng.integers(48, 123, 40))
        place = (int(rng.integers(0, size // 3)), int((line + 1) * 28 * scale))
        cv2.putText(image, words, place, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, max(1, round(scale)))
    return image if rng.random() < 0.5 else 255 - image


def draw_speckled_sector(size: int, rng: np.random.Generator) -> GreyImage:
    """An ultrasound sector of speckle with a few ellipses instead of anatomy."""
    field = cv2.GaussianBlur(np.abs(rng.standard_normal((size, size))), (0, 0), rng.uniform(0.7, 2))
    light = np.full((size, size), rng.uniform(0.2, 0.8))
    for _ in range(rng.integers(0, 6)):
        centre = tuple(int(v) for v in rng.integers(0, size, 2))
        axes = tuple(int(v) for v in rng.integers(size // 20, size // 3, 2))
        width = int(rng.choice([-1, 2, 4]))
        cv2.ellipse(light, centre, axes, rng.uniform(0, 180), 0, 360, rng.uniform(0, 1.5), width)
    light = cv2.GaussianBlur(light, (0, 0), rng.uniform(0.5, 6))
    mask = np.zeros((size, size), np.uint8)
    apex = (int(rng.uniform(0.35, 0.65) * size), int(rng.uniform(-0.3, 0.1) * size))
    half = rng.uniform(30, 60)
    cv2.ellipse(mask, apex, (size, size), 0, 90 - half, 90 + half, 1, -1)
    return _to_uint8(120 * field * light * mask / max(field.mean(), 1e-6))


SCENES: dict[str, Callable[[int, np.random.Generator], GreyImage]] = {
    "noise": draw_noise,
    "smooth noise": draw_smooth_noise,
    "shapes": draw_shapes,
    "lettering": draw_lettering,
    "speckled sector": draw_speckled_sector,
}


def _to_uint8(values: npt.NDArray[np.floating]) -> GreyImage:
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)
