"""Every map and its inverse; an image and its points move alike."""

import numpy as np
import pytest

from model.frame import Geometry, Letterbox, cells_to_input, input_to_cells

SIZES = [(256, 256), (512, 384), (333, 777), (1024, 40), (64, 65)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.2, 0.5)])
def test_letterbox_round_trip(width, height, spacing):
    box = Letterbox(width, height, 256, spacing)
    points = np.random.default_rng(1).uniform(-5, 800, (20, 3, 2))
    np.testing.assert_allclose(box.to_image(box.to_input(points)), points, atol=1e-9)


def test_pixel_centres_not_corners():
    box = Letterbox(512, 512, 256)
    np.testing.assert_allclose(box.to_input([0.5, 0.5]), [0.0, 0.0])
    np.testing.assert_allclose(cells_to_input([0.0, 0.0], 4), [1.5, 1.5])
    np.testing.assert_allclose(input_to_cells([1.5, 5.5], 4), [0.0, 1.0])


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_longer_side_fills_the_input(width, height):
    box = Letterbox(width, height, 256)
    assert max(box.resized) == 256
    corners = box.to_input([[-0.5, -0.5], [width - 0.5, height - 0.5]])
    low = np.array(box.offset) - 0.5
    np.testing.assert_allclose(corners, [low, low + box.resized])


def test_unequal_pixels_become_square():
    box = Letterbox(400, 200, 256, (0.1, 0.2))
    assert box.resized == (256, 256)


@pytest.mark.parametrize(("width", "height"), [(200, 120), (97, 151), (600, 420)])
def test_image_and_points_move_alike(width, height):
    """A bright spot is found where `to_input` says it goes."""
    x, y = 0.61 * width, 0.37 * height
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    sigma = 0.03 * max(width, height)
    image = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2)).astype(np.float32)
    box = Letterbox(width, height, 256)
    moved = box.apply(image)
    total = moved.sum()
    found = [(moved.sum(0) @ np.arange(256)) / total, (moved.sum(1) @ np.arange(256)) / total]
    np.testing.assert_allclose(found, box.to_input([x, y]), atol=0.02)
    assert moved.dtype == np.float32


def test_nearest_keeps_class_numbers():
    mask = np.zeros((90, 130), np.uint8)
    mask[20:50, 30:80] = 2
    assert set(np.unique(Letterbox(130, 90, 256).apply(mask, nearest=True))) == {0, 2}


def test_wrong_image_size_is_an_error():
    with pytest.raises(ValueError, match="expected an image"):
        Letterbox(10, 20, 64).apply(np.zeros((10, 20), np.uint8))


def test_geometry_round_trips():
    turned = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    geometry = Geometry((0.3, 0.5), (0.3, 0.5, 2.0), (10.0, -20.0, 5.0), turned)
    points = np.array([[3.0, 4.0], [100.5, 7.25]])
    world = geometry.to_world(points, slice_index=3)
    np.testing.assert_allclose(world[0], [10 - 4 * 0.5, -20 + 3 * 0.3, 5 + 6])
    np.testing.assert_allclose(geometry.from_world(world), np.c_[points, [3, 3]])
    np.testing.assert_allclose(geometry.to_mm(points), points * [0.3, 0.5])
    np.testing.assert_allclose(geometry.from_mm(geometry.to_mm(points)), points)
    assert Geometry().to_mm(points) is None and Geometry().pixel_shape == (1.0, 1.0)
