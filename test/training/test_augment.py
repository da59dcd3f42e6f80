"""Fourier amplitudes of another machine, and smooth bends that the landmarks follow."""

import numpy as np
import pytest

from model.masks import HEAD, landmarks_from_mask
from test.phantom import phantom
from training.data.augment import augment, mix_amplitudes
from training.recipes import Augmentation

IMAGE, STYLE = (phantom(seed, 96, 96).image.astype(np.float32) for seed in (1, 2))
DARK = STYLE * 0.4


def low_amplitudes(image: np.ndarray, reach: int) -> np.ndarray:
    found = np.abs(np.fft.fftshift(np.fft.fft2(image)))
    centre = image.shape[0] // 2
    return found[centre - reach : centre + reach + 1, centre - reach : centre + reach + 1]


def test_nothing_of_the_style_is_the_image() -> None:
    np.testing.assert_allclose(mix_amplitudes(IMAGE, DARK, 0.0, 0.05), IMAGE, atol=1e-3)


def test_the_style_takes_the_low_amplitudes_alone() -> None:
    gentle = 128 + (IMAGE - 128) / 8  # so that nothing is clipped
    other = 128 + (STYLE - 128) / 9
    mixed = mix_amplitudes(gentle, other, 1.0, 0.05)
    reach = int(0.05 * 96)
    wanted = low_amplitudes(other, reach)
    np.testing.assert_allclose(low_amplitudes(mixed, reach), wanted, rtol=1e-3, atol=1)
    outside = np.abs(np.fft.fftshift(np.fft.fft2(mixed - gentle)))
    outside[48 - reach : 49 + reach, 48 - reach : 49 + reach] = 0
    assert outside.max() < 1
    half = mix_amplitudes(gentle, other, 0.5, 0.05)
    between = (low_amplitudes(gentle, reach) + wanted) / 2
    np.testing.assert_allclose(low_amplitudes(half, reach), between, rtol=1e-3, atol=1)


@pytest.mark.parametrize(("share", "changes"), [(0.0, False), (1.0, True)])
def test_augment_mixes_as_often_as_it_is_told(share: float, changes: bool) -> None:
    still = Augmentation(
        rotation_deg=0, scale=(1, 1), gamma=(1, 1), contrast=(1, 1), style=share, style_band=0.1
    )
    points = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    mixed, _, moved = augment(IMAGE, None, points, still, np.random.default_rng(0), DARK)
    plain, _, _ = augment(IMAGE, None, points, still, np.random.default_rng(0))
    np.testing.assert_allclose(moved, points)
    assert np.allclose(mixed, plain, atol=0.5) is not changes


STILL = Augmentation(rotation_deg=0, scale=(1, 1), gamma=(1, 1), contrast=(1, 1), elastic=0.02)


def test_landmarks_follow_a_bend() -> None:
    points = np.array([[30.0, 40.0], [70.0, 25.0], [55.0, 72.0]])
    moved_px = []
    for seed in range(8):
        bent = []
        for point in points:
            y, x = np.mgrid[:96, :96]
            blob = 250 * np.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / 6)
            image, _, moved = augment(
                blob.astype(np.float32), None, points, STILL, np.random.default_rng(seed)
            )
            bent.append([(image * x).sum() / image.sum(), (image * y).sum() / image.sum()])
        np.testing.assert_allclose(moved, bent, atol=0.75)
        moved_px.append(np.abs(moved - points).max())
    assert np.mean(moved_px) > 2


def test_a_bent_mask_gives_the_landmarks_anew() -> None:
    found = phantom(3, 192, 192)
    image, mask_before = (np.pad(plane, 40) for plane in (found.image, found.mask))
    before = found.landmarks_px + 40
    apart_px = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        _, mask, points = augment(image, mask_before, before, STILL, rng)
        _, _, carried = augment(image, None, before, STILL, np.random.default_rng(seed))
        np.testing.assert_array_equal(points, landmarks_from_mask(mask))
        apart_px.append(np.linalg.norm(points - carried, axis=1).max())
    assert 0.5 < np.mean(apart_px) < 10


def test_a_bent_mask_that_the_frame_cuts_keeps_the_points_carried_along() -> None:
    found = phantom(3, 192, 192)
    mask = found.mask.copy()
    mask[:, 100:] = HEAD
    bent = [
        augment(found.image, m, found.landmarks_px, STILL, np.random.default_rng(1))[2]
        for m in (mask, None)
    ]
    np.testing.assert_array_equal(*bent)
