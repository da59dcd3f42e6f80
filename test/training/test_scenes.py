"""Images that do not show the right view: sizes, types, and that each does what its name says."""

import numpy as np
import pytest

from test.phantom import phantom
from training.data.scenes import DISTORTIONS, SCENES

IMAGE = phantom(3, 130, 97).image


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_distorted_images_are_images_and_differ(name: str) -> None:
    before = IMAGE.copy()
    found = DISTORTIONS[name](IMAGE, rng())
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    assert sorted(found.shape) == sorted(IMAGE.shape)
    assert found.shape != IMAGE.shape or (found != IMAGE).mean() > 0.1
    np.testing.assert_array_equal(IMAGE, before)


@pytest.mark.parametrize("name", SCENES)
def test_scenes_are_drawn_anew_each_time(name: str) -> None:
    draw = rng()
    many = [SCENES[name](80, draw) for _ in range(12)]
    assert all(one.shape == (80, 80) and one.dtype == np.uint8 for one in many)
    assert len({one.tobytes() for one in many}) == 12
    np.testing.assert_array_equal(SCENES[name](80, rng()), many[0])


def test_flips_and_turns() -> None:
    corner = np.zeros((4, 6), np.uint8)
    corner[0, 1] = 9
    places = {name: np.argwhere(DISTORTIONS[name](corner, rng()) == 9).tolist() for name in
              ("mirrored", "upside down", "turned by 180 deg")}  # fmt: skip
    assert places == {
        "mirrored": [[0, 4]], "upside down": [[3, 1]], "turned by 180 deg": [[3, 4]],
    }  # fmt: skip
    inverted = DISTORTIONS["grey-inverted"](corner, rng())
    assert inverted[0, 1] == 246 and (inverted == 255).sum() == 23


def test_shuffled_keeps_the_tiles_and_not_their_places() -> None:
    image = np.arange(96 * 96, dtype=np.int64).reshape(96, 96).astype(np.uint8)
    for seed in range(8):
        found = DISTORTIONS["shuffled"](image, np.random.default_rng(seed))
        assert sorted(found.ravel()) == sorted(image.ravel()) and (found != image).mean() > 0.5


def test_inside_alone_is_inverted() -> None:
    image = np.zeros((64, 64), np.uint8)
    image[20:50, 20:50] = 100
    found = DISTORTIONS["grey-inverted inside"](image, rng())
    assert (found[:10] == 0).all() and (found[25:45, 25:45] == 155).all()
