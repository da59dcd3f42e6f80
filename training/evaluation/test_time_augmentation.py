"""Test-time augmentation: predict one image in several variants and map the landmarks back.

A variant rotates, scales or darkens the network's square input about its centre, as training does.
An answer on which the variants agree does not depend on how the image happened to lie. The median
of their landmarks is the better answer, and their spread is a measure of its error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from model.anatomy import Floats
from model.frame import Letterbox, Pair, Pixels
from model.heatmap import Decode, Heatmaps
from model.predictor import Predictor, decode_output


@dataclass(frozen=True)
class Variant:
    """One transform of a network input: rotation, then scale, about the centre; then gamma.

    rotation_deg: counter-clockwise. gamma: the exponent of grey values / 255.
    """

    rotation_deg: float = 0.0
    scale: float = 1.0
    gamma: float = 1.0

    def matrix(self, size: int) -> Floats:
        """(2, 3) affine map from the px of a (size, size) input to the px of its variant."""
        centre = (size - 1) / 2
        return np.asarray(
            cv2.getRotationMatrix2D((centre, centre), self.rotation_deg, self.scale), np.float64
        )

    def apply(self, image: Pixels) -> npt.NDArray[np.float32]:
        """(size, size) grey values 0..255 -> the variant, black beyond the image's border."""
        variant: npt.NDArray[np.float32] = image.astype(np.float32)
        if self.rotation_deg or self.scale != 1:
            warped = cv2.warpAffine(variant, self.matrix(len(image)), image.shape)
            variant = np.asarray(warped, np.float32)
        if self.gamma == 1:
            return variant
        return np.asarray(255 * (np.clip(variant, 0, 255) / 255) ** self.gamma, np.float32)

    def to_variant(self, points: npt.ArrayLike, size: int) -> Floats:
        """(..., 2) input px -> px of the variant."""
        matrix = self.matrix(size)
        return np.asarray(np.asarray(points, np.float64) @ matrix[:, :2].T + matrix[:, 2])

    def to_input(self, points: npt.ArrayLike, size: int) -> Floats:
        """(..., 2) px of the variant -> input px: the inverse of `to_variant`."""
        matrix = self.matrix(size)
        shifted = np.asarray(points, np.float64) - matrix[:, 2]
        return np.asarray(shifted @ np.linalg.inv(matrix[:, :2]).T)


# Within the ranges of the recipes' augmentation, so that no variant is harder than training images.
VARIANTS = (
    Variant(),
    Variant(rotation_deg=-10),
    Variant(rotation_deg=10),
    Variant(scale=0.9),
    Variant(scale=1.1),
    Variant(gamma=0.8),
    Variant(gamma=1.25),
)


@dataclass(frozen=True)
class AugmentedPrediction:
    """The predictions for all variants of one image, mapped back to the image.

    each_px: (variants, 3, 2) landmarks in image px. confidence: (variants, 3), 0 to 1.
    heatmaps: (variants, 3, rows, columns), each in the frame of its own variant.
    doubts: those of all variants, each sentence once.
    """

    each_px: Floats
    confidence: Floats
    heatmaps: Heatmaps
    doubts: tuple[str, ...] = ()

    @property
    def landmarks_px(self) -> Floats:
        """(3, 2) median over the variants on each axis, which one outlier does not move."""
        return np.asarray(np.median(self.each_px, axis=0))

    @property
    def spread_px(self) -> Floats:
        """(3,) root mean square distance of the variants' landmarks from the median, image px."""
        squares = ((self.each_px - self.landmarks_px) ** 2).sum(axis=-1)
        return np.asarray(np.sqrt(squares.mean(axis=0)))


def predict_variants(
    predictor: Predictor,
    grey: Pixels,
    pixel_shape: Pair = (1.0, 1.0),
    variants: Sequence[Variant] = VARIANTS,
    decode: Decode | None = None,
) -> AugmentedPrediction:
    """Predict a (height, width) grey image of values 0..255 in each variant, in one batch.

    The arguments are those of `Predictor.predict`. With the identity as the only variant, the
    answer is that function's.
    """
    spec = predictor.spec
    size = spec.input_size
    box = Letterbox(grey.shape[1], grey.shape[0], size, pixel_shape)
    square = box.apply(grey)
    inputs = np.stack([spec.normalise(variant.apply(square)) for variant in variants])
    outputs = predictor.run(inputs).maps
    predictions = [decode_output(spec, output, decode) for output in outputs]
    each_px = [
        box.to_image(variant.to_input(prediction.landmarks_px, size))
        for variant, prediction in zip(variants, predictions, strict=True)
    ]
    return AugmentedPrediction(
        np.stack(each_px),
        np.stack([prediction.confidence for prediction in predictions]),
        outputs[:, : len(spec.landmarks)],
        tuple(dict.fromkeys(doubt for prediction in predictions for doubt in prediction.doubts)),
    )
