"""Sheets of training images with labels or predictions: for a person's eye, not for the repository.

Pictures are BGR.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from model.anatomy import LANDMARKS, Floats
from model.drawing.overlay import COLOURS
from model.drawing.text import Colour, Picture
from model.frame import Letterbox, Pair, Pixels
from model.masks import HEAD, SYMPHYSIS, outer_contour
from training.data.case_table import Case
from training.data.dataset import read_frame
from training.data.sources import CaseSource, read_mask, read_single_frame
from training.evaluation.predict import CasePrediction

TRUTH, PREDICTED = (80, 220, 80), (255, 80, 255)
LANDMARK_COLOURS = [COLOURS[name] for name in LANDMARKS]  # as in the overlay
MASK_COLOURS = {SYMPHYSIS: (80, 130, 255), HEAD: (230, 190, 90)}

SAMPLE_TILE = 256  # px a side, on `sample_sheet`
SHEET_TILE = 240  # px a side, on other sheets
CAPTION = 18  # px, the height of a line of text
SHEET_CASES, SHEET_COLUMNS = 48, 8


def sample_sheet(
    predictions: Sequence[CasePrediction], cases: Sequence[Case], images: Path, count: int = 12
) -> Picture:
    """`count` cases with truth and prediction, each with its heatmaps beside it."""
    tiles = []
    for k in spread_indices(len(cases), count):
        case, prediction = cases[k], predictions[k]
        tile, box = letterboxed_tile(*read_frame(images / case.file, case.frame), SAMPLE_TILE)
        for shown, colour in ((case, TRUTH), (prediction, PREDICTED)):
            points = box.to_input(shown.landmarks_px)
            draw_circles(tile, points, [colour] * len(LANDMARKS), 4, 1)
        cells = np.clip(prediction.heatmaps.transpose(1, 2, 0), 0, 1) * 255
        heat = cv2.resize(cells, (SAMPLE_TILE, SAMPLE_TILE), interpolation=cv2.INTER_NEAREST)
        tiles.append(np.hstack([tile, heat.astype(np.uint8)]))
    return add_legend(tile_grid(tiles, 3), {"truth": TRUTH, "predicted": PREDICTED})


def label_sheet(cases: Sequence[Case], sources: Mapping[str, CaseSource]) -> Picture:
    """Up to 48 cases with their labelled landmarks and the outlines of their masks.

    Args:
        sources: a case's file -> the image and mask that the case was made from.
    """
    chosen = [cases[k] for k in spread_indices(len(cases), SHEET_CASES)]
    tiles = [case_tile(case, sources[case.file]) for case in chosen]
    sheet = tile_grid(tiles, min(SHEET_COLUMNS, max(2, len(tiles))))
    names = dict(zip(LANDMARKS, LANDMARK_COLOURS, strict=True))
    names |= {"symphysis": MASK_COLOURS[SYMPHYSIS], "head": MASK_COLOURS[HEAD]}
    return add_legend(sheet, names)


def add_legend(sheet: Picture, names: Mapping[str, Colour]) -> Picture:
    """The sheet with a legend above it: names -> their colours."""
    legend = np.zeros((2 * CAPTION, sheet.shape[1], 3), np.uint8)
    for k, (name, colour) in enumerate(names.items()):
        draw_circles(legend, np.array([[14 + 92 * k, CAPTION]]), [colour], 4, cv2.FILLED)
        draw_text(legend, name, (24 + 92 * k, CAPTION + 4))
    return np.vstack([legend, sheet])


def case_tile(case: Case, source: CaseSource) -> Picture:
    """(CAPTION + SHEET_TILE, SHEET_TILE, 3): one case below its name and angle."""
    tile, box = letterboxed_tile(read_single_frame(source.image).pixels, (1, 1), SHEET_TILE)
    if source.mask is not None:
        mask = read_mask(source.mask)
        for label, colour in MASK_COLOURS.items():
            outline = box.to_input(outer_contour(mask, label)).round().astype(np.int32)
            cv2.polylines(tile, [outline], True, colour, 1, cv2.LINE_AA)
    draw_circles(tile, box.to_input(case.landmarks_px), LANDMARK_COLOURS, 3, cv2.FILLED)
    caption = np.zeros((CAPTION, SHEET_TILE, 3), np.uint8)
    draw_text(caption, f"{case.file[-24:]} {case.aop_deg:.0f} deg", (4, CAPTION - 5))
    return np.vstack([caption, tile])


def spread_indices(length: int, count: int) -> list[int]:
    """`count` indices, evenly spaced over a sequence; all indices if the sequence is shorter."""
    return [round(k) for k in np.linspace(0, length - 1, min(count, length)).tolist()]


def letterboxed_tile(grey: Pixels, pixel_shape: Pair, size: int) -> tuple[Picture, Letterbox]:
    """A (size, size, 3) tile of a grey image, and the letterbox that maps points to the tile."""
    box = Letterbox(grey.shape[1], grey.shape[0], size, pixel_shape)
    square = box.apply(np.clip(grey, 0, 255).astype(np.uint8))
    return np.asarray(cv2.cvtColor(square, cv2.COLOR_GRAY2BGR), np.uint8), box


def tile_grid(tiles: Sequence[Picture], columns: int) -> Picture:
    """One picture of tiles of one size, row by row; the last row is filled up with black."""
    blank = [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [*tiles, *blank]
    return np.vstack([np.hstack(rows[k : k + columns]) for k in range(0, len(rows), columns)])


def draw_circles(
    image: Picture, points: Floats, colours: Sequence[Colour], radius: int, thickness: int
) -> None:
    """Draw a circle at each of the (n, 2) points, in px of the image."""
    for (x, y), colour in zip(points, colours, strict=True):
        cv2.circle(image, (round(x), round(y)), radius, colour, thickness, cv2.LINE_AA)


def draw_text(image: Picture, text: str, left_bottom: tuple[int, int]) -> None:
    """Draw a line of small, light text (ASCII only) from its lower left corner on, in px."""
    cv2.putText(
        image, text, left_bottom, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (230, 230, 230), 1, cv2.LINE_AA
    )
