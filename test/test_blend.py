"""Two images under one outline: the second is bent onto the first, landmark on landmark."""

import numpy as np
import pytest

from model.masks import HEAD
from test.phantom import Phantom, phantom
from training.blend import Labelled, blend, spline

SEEDS = (1, 2, 3, 5, 8, 13)


def painted(made: Phantom, head_grey: int, other_grey: int) -> Labelled:
    """A phantom's labels, with its head in one grey and all else in another."""
    image = np.where(made.mask == HEAD, head_grey, other_grey).astype(np.uint8)
    return image, made.landmarks_px, made.mask


def test_the_second_head_comes_to_lie_on_the_first() -> None:
    blended = 0
    for seed in SEEDS:
        one, two = phantom(seed), phantom(seed + 1)
        mixed = blend(painted(one, 150, 20), painted(two, 250, 20), np.random.default_rng(seed))
        blended += mixed.max() > 200
        bright, head = mixed > 85, one.mask == HEAD
        assert (bright & head).sum() > 0.95 * (bright | head).sum()
    assert blended > len(SEEDS) / 2


def test_an_image_blended_with_itself_is_itself() -> None:
    made = phantom(3)
    same = made.image, made.landmarks_px, made.mask
    inner = (slice(4, -4),) * 2  # the frame's edge has nothing to take from outside
    mixed = blend(same, same, np.random.default_rng(1))
    np.testing.assert_allclose(mixed[inner], made.image[inner], atol=0.5)


def test_points_lie_where_they_belong() -> None:
    rng = np.random.default_rng(1)
    here = phantom(4).landmarks_px[[0, 1, 2, 0, 1, 2]] + rng.uniform(-30, 30, (6, 2))
    turned = (here - 128) @ [[0.9, 0.2], [-0.2, 0.9]] + 120 + rng.normal(0, 2, here.shape)
    sources = spline(here, turned, 256)
    assert sources is not None
    at = np.rint(here).astype(int)
    found = sources[at[:, 1], at[:, 0]]
    assert np.linalg.norm(found - turned, axis=1).max() < 3


@pytest.mark.parametrize("why", ["folded", "no head", "no mask"])
def test_what_cannot_be_laid_on_it_leaves_the_image_alone(why: str) -> None:
    one, two = phantom(3), phantom(5)
    image, points, mask = two.image, two.landmarks_px, two.mask
    others = {
        "folded": (image, [255, 255] - points[[1, 0, 2]], mask[::-1, ::-1]),
        "no head": (image, points, np.where(mask == HEAD, 0, mask).astype(np.uint8)),
        "no mask": (image, points, None),
    }
    first = one.image, one.landmarks_px, one.mask
    mixed = blend(first, others[why], np.random.default_rng(1))
    np.testing.assert_array_equal(mixed, one.image)
    assert (blend(first, (image, points, mask), np.random.default_rng(1)) != one.image).any()
