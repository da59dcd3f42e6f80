"""Variants of an image: exact maps, and an answer that follows the image."""

import cv2
import numpy as np
import pytest

from model.frame import input_to_cells
from model.predictor import Output, Predictor
from model.spec import ModelSpec
from training.evaluation.test_time_augmentation import VARIANTS, Variant, predict_variants

SPEC = ModelSpec(input_size=128, mean=30.0, std=50.0, stride=4, sigma_cells=2.0)
GREYS = (255, 170, 90)  # of the dots at PS1, PS2 and FH1
TURNED = Variant(rotation_deg=25, scale=0.8)


def dots(points, width=160, height=120, background=0) -> np.ndarray:
    """(height, width) grey image with a dot of its own grey value at each of three points."""
    image = np.full((height, width), background, np.uint8)
    for (x, y), grey in zip(points, GREYS, strict=True):
        cv2.circle(image, (round(16 * x), round(16 * y)), 4 * 16, grey, -1, cv2.LINE_AA, shift=4)
    return image


def find_dots(network_input: np.ndarray) -> Output:
    """A network that finds the dots; its peaks are wider if the background is lighter."""
    heatmaps = []
    for image in network_input[:, 0] * SPEC.std + SPEC.mean:
        grey = np.median(image)
        count, labels, _, _ = cv2.connectedComponentsWithStats((image > grey + 15).astype(np.uint8))
        parts = [np.where(labels == k, image - grey, 0.0) for k in range(1, count)]
        parts = sorted(parts, key=lambda part: -part.max())[:3]
        rows, columns = np.indices(image.shape)
        found = [((columns * p).sum() / p.sum(), (rows * p).sum() / p.sum()) for p in parts]
        wider = 1 + grey / 10
        codec = SPEC.codec.__class__(32, 32, SPEC.sigma_cells * wider)
        heatmaps.append(codec.encode(input_to_cells(found, SPEC.stride)))
    return Output(np.stack(heatmaps))


def always_at(points) -> Predictor:
    """A predictor that answers the same input px for every image."""
    heatmaps = SPEC.codec.encode(input_to_cells(points, SPEC.stride))
    return Predictor(SPEC, lambda seen: Output(np.repeat(heatmaps[None], len(seen), axis=0)), "cpu")


POINTS = np.array([[98.0, 37.0], [52.0, 45.5], [101.25, 80.0]])


@pytest.mark.parametrize("variant", [*VARIANTS, TURNED])
def test_points_come_back_exactly_and_follow_the_image(variant):
    points = np.array([[70.0, 40.0], [45.0, 60.0], [80.0, 90.0]])
    there = variant.to_variant(points, 128)
    assert np.abs(variant.to_input(there, 128) - points).max() < 1e-12
    seen = variant.apply(dots(points, 128, 128))
    heatmap = find_dots(((seen - SPEC.mean) / SPEC.std)[None, None]).maps[0]
    found = SPEC.codec.decode(heatmap)[0]
    assert np.abs(found - input_to_cells(there, SPEC.stride)).max() < 0.1 / SPEC.stride


def test_a_variant_turns_scales_and_darkens_as_it_says():
    centre = np.array([63.5, 63.5])
    right = centre + [20.0, 0.0]
    # counter-clockwise on the screen, where y points down
    assert Variant(rotation_deg=90).to_variant(right, 128) == pytest.approx(centre - [0.0, 20.0])
    assert Variant(scale=1.5).to_variant(right, 128) == pytest.approx(centre + [30.0, 0.0])
    image = np.full((4, 4), 51, np.uint8)
    assert Variant(gamma=2.0).apply(image) == pytest.approx(np.full((4, 4), 10.2))
    assert (Variant().apply(image) == image).all()


def test_variants_begin_with_the_image_itself_and_have_every_kind():
    assert VARIANTS[0] == Variant() and len(set(VARIANTS)) == len(VARIANTS)
    for name in ("rotation_deg", "scale", "gamma"):
        values = [getattr(variant, name) for variant in VARIANTS]
        plain = getattr(Variant(), name)
        assert min(values) < plain < max(values)


def test_one_plain_variant_is_the_predictors_own_answer():
    predictor = Predictor(SPEC, find_dots, "cpu")
    image, shape = dots(POINTS), (1.0, 1.1)
    plain, seen = (
        predictor.predict(image, shape),
        predict_variants(predictor, image, shape, [Variant()]),
    )
    assert np.array_equal(seen.landmarks_px, plain.landmarks_px)
    assert np.array_equal(seen.confidence[0], plain.confidence)
    assert np.array_equal(seen.heatmaps[0], plain.heatmaps)
    assert seen.each_px.shape == (1, 3, 2) and (seen.spread_px == 0).all()


@pytest.mark.parametrize("pixel_shape", [(1.0, 1.0), (0.7, 1.0)])
def test_variants_agree_where_the_answer_follows_the_image(pixel_shape):
    predictor = Predictor(SPEC, find_dots, "cpu")
    seen = predict_variants(predictor, dots(POINTS), pixel_shape, [*VARIANTS, TURNED])
    assert seen.each_px.shape == (8, 3, 2) and seen.heatmaps.shape == (8, 3, 32, 32)
    assert np.abs(seen.each_px - POINTS).max() < 0.3
    assert np.abs(seen.landmarks_px - POINTS).max() < 0.15 and seen.spread_px.max() < 0.2


def test_the_spread_is_the_distance_from_the_median():
    offsets = np.array([[20.0, 0.0], [0.0, 8.0], [3.0, 4.0]])
    quarter_turns = [Variant(rotation_deg=angle) for angle in (0, 90, 180, 270)]
    predictor = always_at(63.5 + offsets)
    # 64 image px are 128 input px: the four answers lie on circles about the image's centre
    seen = predict_variants(predictor, np.zeros((48, 64), np.uint8), variants=quarter_turns)
    assert np.abs(seen.landmarks_px - [31.5, 23.5]).max() < 1e-4
    assert seen.spread_px == pytest.approx([10.0, 4.0, 2.5], abs=1e-4)


def test_one_variant_that_jumps_does_not_move_the_answer():
    def jumps(seen):
        found = find_dots(seen)
        found.maps[2, 1] = np.roll(found.maps[2, 1], 9, axis=1)
        return found

    seen = predict_variants(Predictor(SPEC, jumps, "cpu"), dots(POINTS))
    assert np.abs(seen.landmarks_px - POINTS).max() < 0.3
    assert seen.spread_px[1] > 10 and max(seen.spread_px[0], seen.spread_px[2]) < 1


def test_the_doubts_of_all_variants_are_given_once():
    spec = SPEC.model_copy(update={"masks": 2, "mask_share": (0.5,) * 3})

    def no_outline(seen):
        masks = np.zeros((len(seen), 2, 32, 32), np.float32)
        return Output(np.concatenate([find_dots(seen).maps, masks], axis=1))

    seen = predict_variants(Predictor(spec, no_outline, "cpu"), dots(POINTS))
    assert len(seen.doubts) == 1 and "outlines" in seen.doubts[0]
    assert seen.heatmaps.shape[1] == 3
