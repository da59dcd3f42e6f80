"""Pictures of training data and of predictions on them: to look at, never to commit."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from training.cases import Case
from training.data import read_grey
from training.predict import CasePrediction

TILE = 256  # px
TRUTH, PREDICTED = (80, 220, 80), (255, 80, 255)  # BGR


def sample_sheet(
    predictions: Sequence[CasePrediction], cases: Sequence[Case], images: Path, count: int = 12
) -> np.ndarray:
    """(H, W, 3) BGR: some cases with truth (green), prediction (magenta) and the heatmaps."""
    chosen = np.linspace(0, len(cases) - 1, min(count, len(cases))).astype(int)
    tiles = []
    for k in chosen:
        grey, _ = read_grey(images / cases[k].file, cases[k].frame)
        heat = np.clip(predictions[k].heatmaps.transpose(1, 2, 0), 0, 1)
        tile = tile_of(grey)
        scale = TILE / max(grey.shape)
        for points, colour in (
            (cases[k].landmarks_px, TRUTH),
            (predictions[k].landmarks_px, PREDICTED),
        ):
            for x, y in (points + 0.5) * scale - 0.5:
                cv2.circle(tile, (round(x), round(y)), 4, colour, 1, cv2.LINE_AA)
        heat = cv2.resize(heat * 255, (TILE, TILE), interpolation=cv2.INTER_NEAREST)
        tiles.append(np.hstack([tile, heat.astype(np.uint8)]))
    return grid(tiles, 3)


def tile_of(grey: np.ndarray) -> np.ndarray:
    """(TILE, TILE, 3) BGR: the image scaled to the tile's longer side, black around it."""
    scale = TILE / max(grey.shape)
    height, width = (max(1, round(side * scale)) for side in grey.shape)
    tile = np.zeros((TILE, TILE, 3), np.uint8)
    small = cv2.resize(grey.astype(np.uint8), (width, height), interpolation=cv2.INTER_AREA)
    tile[:height, :width] = small[..., None]
    return tile


def grid(tiles: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Tiles of one size, row by row."""
    blank = [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [*tiles, *blank]
    return np.vstack([np.hstack(rows[k : k + columns]) for k in range(0, len(rows), columns)])
