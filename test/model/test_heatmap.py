"""The codec: small exact heatmaps, and the round trip over positions, sizes and batches."""

import numpy as np
import pytest

from model.heatmap import HeatmapCodec


def test_encode_is_a_gaussian_of_height_one_at_the_point():
    heatmap = HeatmapCodec(5, 7, 1.0).encode([3.0, 2.0])
    assert heatmap.shape == (5, 7)
    assert heatmap[2, 3] == 1
    assert heatmap[2, 4] == pytest.approx(np.exp(-0.5))
    assert heatmap[4, 2] == pytest.approx(np.exp(-2.5))


def test_encode_does_not_truncate():
    heatmap = HeatmapCodec(5, 7, 1.0).encode([2.5, 2.0])
    assert heatmap[2, 2] == heatmap[2, 3] < 1


def test_argmax_returns_the_centre_of_the_highest_cell():
    heatmaps = np.zeros((2, 5, 7), np.float32)
    heatmaps[0, 1, 6], heatmaps[1, 4, 0] = 0.7, 1.8
    points, confidence = HeatmapCodec(5, 7, 1.0).decode(heatmaps, "argmax")
    assert points.tolist() == [[6, 1], [0, 4]]
    assert confidence == pytest.approx([0.7, 1.0])  # clipped


@pytest.mark.parametrize("shape", [(64, 64, 2.0), (64, 64, 4.0), (33, 80, 1.5), (20, 17, 1.0)])
@pytest.mark.parametrize("batch", [(), (3,), (4, 3)])
def test_subpixel_round_trip(shape, batch):
    rows, columns, sigma = shape
    codec = HeatmapCodec(rows, columns, sigma)
    rng = np.random.default_rng(rows)
    points = rng.uniform([-0.4, -0.4], [columns - 0.6, rows - 0.6], (200, *batch, 2))
    decoded, confidence = codec.decode(codec.encode(points))
    error = decoded - points
    assert decoded.shape == points.shape and confidence.shape == points.shape[:-1]
    assert np.linalg.norm(error, axis=-1).mean() < 0.05
    assert np.abs(error.reshape(-1, 2).mean(axis=0)).max() < 0.01


def test_subpixel_stands_noise_width_and_height():
    """Half the height, another width than the codec's, and noise: still well within a cell."""
    rng = np.random.default_rng(3)
    points = rng.uniform(8, 56, (100, 2))
    heatmaps = 0.5 * HeatmapCodec(64, 64, 3.0).encode(points)
    heatmaps = heatmaps + rng.normal(0, 0.01, heatmaps.shape)
    decoded, confidence = HeatmapCodec(64, 64, 2.0).decode(heatmaps)
    assert np.linalg.norm(decoded - points, axis=-1).mean() < 0.15
    assert np.abs((decoded - points).mean(axis=0)).max() < 0.05
    assert confidence.mean() == pytest.approx(0.5, abs=0.05)


def test_subpixel_beats_argmax():
    codec = HeatmapCodec(32, 48, 2.0)
    points = np.random.default_rng(5).uniform(2, 29, (300, 2))
    heatmaps = codec.encode(points)
    coarse = np.linalg.norm(codec.decode(heatmaps, "argmax")[0] - points, axis=-1).mean()
    fine = np.linalg.norm(codec.decode(heatmaps)[0] - points, axis=-1).mean()
    assert 0.3 < coarse < 0.45 and fine < 0.01


@pytest.mark.parametrize("method", ["subpixel", "argmax"])
def test_broken_heatmaps_decode_to_something_finite(method):
    codec = HeatmapCodec(9, 13, 1.0)
    heatmaps = np.stack(
        [np.full((9, 13), np.nan), np.zeros((9, 13)), np.full((9, 13), -3.0), np.ones((9, 13))]
    )
    points, confidence = codec.decode(heatmaps, method)
    assert points[0].tolist() == [6, 4]
    assert np.isfinite(points).all() and confidence.tolist() == [0, 0, 0, 1]


def test_wrong_grid_is_an_error():
    with pytest.raises(ValueError, match="expected heatmaps"):
        HeatmapCodec(9, 13, 1.0).decode(np.zeros((13, 9)))
