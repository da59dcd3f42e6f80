"""Pictures of training data and of predictions on them: to look at, never to commit."""

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
from training.data.dataset import read_grey
from training.data.sources import Source, one_frame, read_mask
from training.evaluation.predict import CasePrediction

TILE = 256  # px
TRUTH, PREDICTED = (80, 220, 80), (255, 80, 255)

SHEET_CASES, SHEET_COLUMNS, SHEET_TILE, CAPTION = 48, 8, 240, 18  # the last two in px
LANDMARK_COLOURS = [COLOURS[name] for name in LANDMARKS]  # those of the overlay
MASK_COLOURS = {SYMPHYSIS: (80, 130, 255), HEAD: (230, 190, 90)}


def sample_sheet(
    predictions: Sequence[CasePrediction], cases: Sequence[Case], images: Path, count: int = 12
) -> Picture:
    """Some cases with truth and prediction, and beside each its heatmaps."""
    tiles = []
    for k in spread(len(cases), count):
        case, found = cases[k], predictions[k]
        tile, box = tile_of(*read_grey(images / case.file, case.frame), TILE)
        for points, colour in ((case.landmarks_px, TRUTH), (found.landmarks_px, PREDICTED)):
            mark(tile, box.to_input(points), [colour] * len(LANDMARKS), 4, 1)
        cells = np.clip(found.heatmaps.transpose(1, 2, 0), 0, 1) * 255
        heat = cv2.resize(cells, (TILE, TILE), interpolation=cv2.INTER_NEAREST)
        tiles.append(np.hstack([tile, heat.astype(np.uint8)]))
    return with_legend(grid(tiles, 3), {"truth": TRUTH, "predicted": PREDICTED})


def contact_sheet(cases: Sequence[Case], sources: Mapping[str, Source]) -> Picture:
    """Some cases with their landmarks and the outlines of their masks.

    Args:
        sources: what the cases are made from, by the case's file.
    """
    chosen = [cases[k] for k in spread(len(cases), SHEET_CASES)]
    tiles = [case_tile(case, sources[case.file]) for case in chosen]
    sheet = grid(tiles, min(SHEET_COLUMNS, max(2, len(tiles))))
    names = dict(zip(LANDMARKS, LANDMARK_COLOURS, strict=True))
    names |= {"symphysis": MASK_COLOURS[SYMPHYSIS], "head": MASK_COLOURS[HEAD]}
    return with_legend(sheet, names)


def with_legend(sheet: Picture, names: Mapping[str, Colour]) -> Picture:
    """The sheet below a line that says what each colour is."""
    legend = np.zeros((2 * CAPTION, sheet.shape[1], 3), np.uint8)
    for k, (name, colour) in enumerate(names.items()):
        mark(legend, np.array([[14 + 92 * k, CAPTION]]), [colour], 4, cv2.FILLED)
        put_text(legend, name, (24 + 92 * k, CAPTION + 4))
    return np.vstack([legend, sheet])


def case_tile(case: Case, source: Source) -> Picture:
    """(CAPTION + SHEET_TILE, SHEET_TILE, 3): one case."""
    tile, box = tile_of(one_frame(source.image).pixels, (1, 1), SHEET_TILE)
    if source.mask is not None:
        mask = read_mask(source.mask)
        for label, colour in MASK_COLOURS.items():
            outline = box.to_input(outer_contour(mask, label)).round().astype(np.int32)
            cv2.polylines(tile, [outline], True, colour, 1, cv2.LINE_AA)
    mark(tile, box.to_input(case.landmarks_px), LANDMARK_COLOURS, 3, cv2.FILLED)
    caption = np.zeros((CAPTION, SHEET_TILE, 3), np.uint8)
    put_text(caption, f"{case.file[-24:]} {case.aop_deg:.0f} deg", (4, CAPTION - 5))
    return np.vstack([caption, tile])


def spread(length: int, count: int) -> list[int]:
    """`count` indices, evenly over a sequence of this length; all of them if it is shorter."""
    return [round(k) for k in np.linspace(0, length - 1, min(count, length)).tolist()]


def tile_of(grey: Pixels, spacing: Pair, size: int) -> tuple[Picture, Letterbox]:
    """(size, size, 3): an image, letterboxed; and the letterbox, which says where points lie."""
    box = Letterbox(grey.shape[1], grey.shape[0], size, spacing)
    square = box.apply(np.clip(grey, 0, 255).astype(np.uint8))
    return np.asarray(cv2.cvtColor(square, cv2.COLOR_GRAY2BGR), np.uint8), box


def grid(tiles: Sequence[Picture], columns: int) -> Picture:
    """Tiles of one size, row by row."""
    blank = [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [*tiles, *blank]
    return np.vstack([np.hstack(rows[k : k + columns]) for k in range(0, len(rows), columns)])


def mark(
    image: Picture, points: Floats, colours: Sequence[Colour], radius: int, thickness: int
) -> None:
    """Draw a circle at each of the (n, 2) points."""
    for (x, y), colour in zip(points, colours, strict=True):
        cv2.circle(image, (round(x), round(y)), radius, colour, thickness, cv2.LINE_AA)


def put_text(image: Picture, text: str, at: tuple[int, int]) -> None:
    cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (230, 230, 230), 1, cv2.LINE_AA)
