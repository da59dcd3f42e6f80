"""Test-time augmentation: one image predicted in several views, its landmarks mapped back.

A view turns, scales or darkens the network's square input, about its centre, as training does. What
the views agree on does not hang on how the image happened to lie: the median of their landmarks is
the better answer, and their spread speaks of its error.
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
class View:
    """One way to look at a network input: turned, then scaled, both about the centre; then gamma.

    rotation_deg: counter-clockwise. gamma: the exponent of grey values / 255.
    """

    rotation_deg: float = 0.0
    scale: float = 1.0
    gamma: float = 1.0

    def matrix(self, size: int) -> Floats:
        """(2, 3) affine map from the px of a (size, size) input to those of its view."""
        centre = (size - 1) / 2
        return np.asarray(
            cv2.getRotationMatrix2D((centre, centre), self.rotation_deg, self.scale), np.float64
        )

    def apply(self, image: Pixels) -> npt.NDArray[np.float32]:
        """(size, size) grey values 0..255 -> the view of them, black where nothing was."""
        seen: npt.NDArray[np.float32] = image.astype(np.float32)
        if self.rotation_deg or self.scale != 1:
            turned = cv2.warpAffine(seen, self.matrix(len(image)), image.shape)
            seen = np.asarray(turned, np.float32)
        if self.gamma == 1:
            return seen
        return np.asarray(255 * (np.clip(seen, 0, 255) / 255) ** self.gamma, np.float32)

    def to_view(self, points: npt.ArrayLike, size: int) -> Floats:
        """(..., 2) input px -> px of the view."""
        matrix = self.matrix(size)
        return np.asarray(np.asarray(points, np.float64) @ matrix[:, :2].T + matrix[:, 2])

    def to_input(self, points: npt.ArrayLike, size: int) -> Floats:
        """(..., 2) px of the view -> input px: the inverse of `to_view`."""
        matrix = self.matrix(size)
        shifted = np.asarray(points, np.float64) - matrix[:, 2]
        return np.asarray(shifted @ np.linalg.inv(matrix[:, :2]).T)


# within what the recipes train on, so that a view is no harder than a training image
VIEWS = (
    View(),
    View(rotation_deg=-10),
    View(rotation_deg=10),
    View(scale=0.9),
    View(scale=1.1),
    View(gamma=0.8),
    View(gamma=1.25),
)


@dataclass(frozen=True)
class ViewPrediction:
    """What the views of one image say, mapped back to it.

    each_px: (views, 3, 2) landmarks as (x, y) in image px. confidence: (views, 3) 0 to 1.
    heatmaps: (views, 3, rows, columns), each in its view's own frame. doubts: of all views.
    """

    each_px: Floats
    confidence: Floats
    heatmaps: Heatmaps
    doubts: tuple[str, ...] = ()

    @property
    def landmarks_px(self) -> Floats:
        """(3, 2) the median over the views, on each axis: one view that jumps does not move it."""
        return np.asarray(np.median(self.each_px, axis=0))

    @property
    def spread_px(self) -> Floats:
        """(3,) root mean square distance of the views' landmarks from their median, image px."""
        squares = ((self.each_px - self.landmarks_px) ** 2).sum(axis=-1)
        return np.asarray(np.sqrt(squares.mean(axis=0)))


def predict_views(
    predictor: Predictor,
    grey: Pixels,
    pixel_shape: Pair = (1.0, 1.0),
    views: Sequence[View] = VIEWS,
    decode: Decode | None = None,
) -> ViewPrediction:
    """Landmarks of a (height, width) grey image of values 0..255 in each view, in one batch.

    Arguments as in `Predictor.predict`. With the identity alone it is that function's answer.
    """
    spec = predictor.spec
    size = spec.input_size
    box = Letterbox(grey.shape[1], grey.shape[0], size, pixel_shape)
    square = box.apply(grey)
    outputs = predictor.run(np.stack([spec.normalise(view.apply(square)) for view in views])).maps
    found = [decode_output(spec, output, decode) for output in outputs]
    each = [
        box.to_image(view.to_input(answer.landmarks_px, size))
        for view, answer in zip(views, found, strict=True)
    ]
    return ViewPrediction(
        np.stack(each),
        np.stack([answer.confidence for answer in found]),
        outputs[:, : len(spec.landmarks)],
        tuple(dict.fromkeys(doubt for answer in found for doubt in answer.doubts)),
    )
