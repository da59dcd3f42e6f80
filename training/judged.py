"""What became of each image that was to be pseudo-labelled: two tables and a picture."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from model.anatomy import LANDMARKS
from model.overlay import DOUBT
from training.cases import Case, read_table, write_cases, write_rows
from training.criteria import Evidence, Objection
from training.pictures import (
    CAPTION,
    LANDMARK_COLOURS,
    SHEET_COLUMNS,
    SHEET_TILE,
    TRUTH,
    grid,
    mark,
    put_text,
    spread,
    tile_of,
    with_legend,
)
from training.pool import Candidate, Pool, read_candidates

EXAMPLES = 24  # of accepted and of rejected images on the sheet
LINES, LETTERS = 4, 34  # of words on a tile


@dataclass(frozen=True)
class Judged:
    """An image, its predicted landmarks, and what speaks against them; accepted if nothing does."""

    candidate: Candidate
    evidence: Evidence
    objections: list[Objection]

    @property
    def numbers(self) -> tuple[str, str]:
        """Mean sharpness, and mean spread in px at 512."""
        return (
            f"{self.evidence.sharpness.mean():.3f}",
            f"{self.evidence.spread_px.mean():.2f}",
        )


def write_tables(folder: Path, judged: Sequence[Judged], pool: Pool, source: str) -> None:
    """pseudo.csv: the accepted as a case table, with their source; rejected.csv: why not."""
    accepted = [one for one in judged if not one.objections]
    path = folder / "pseudo.csv"
    cases = [
        Case(
            one.candidate.file,
            one.evidence.landmarks_px,
            one.evidence.aop_deg,
            frame=one.candidate.frame,
        )
        for one in accepted
    ]
    write_cases(path, cases)
    table = read_table(path)
    rows = [
        (*row.values(), source, *one.numbers)
        for (_, row), one in zip(table.rows, accepted, strict=True)
    ]
    write_rows(path, [*table.header, "source", "sharpness", "spread_px"], rows)

    refused = [(c.file, c.frame, *objection, "", "") for c, objection in pool.rejected]
    for one in judged:
        if one.objections:
            reason = "; ".join(words for _, words in one.objections)
            where = one.candidate.file, one.candidate.frame
            refused.append((*where, one.objections[0][0], reason, *one.numbers))
    header = ["Filename", "Frame", "criterion", "reason", "sharpness", "spread_px"]
    write_rows(folder / "rejected.csv", header, refused)


def sheet(judged: Sequence[Judged]) -> np.ndarray:
    """(H, W, 3) BGR: examples of the accepted, the sharpest first, then of the rejected."""
    order = sorted(judged, key=lambda one: -one.evidence.sharpness.mean())
    accepted = [one for one in order if not one.objections]
    rejected = sorted(
        (one for one in order if one.objections), key=lambda one: one.objections[0][0]
    )
    columns = min(SHEET_COLUMNS, max(3, len(accepted), len(rejected)))  # 3: the legend's width
    parts = []
    for group in (accepted, rejected):
        if group:
            chosen = [group[k] for k in spread(len(group), EXAMPLES)]
            parts.append(grid([_tile(one) for one in chosen], columns))
    names = dict(zip(LANDMARKS, LANDMARK_COLOURS, strict=True))
    return with_legend(np.vstack(parts), names | {"accepted": TRUTH, "rejected": DOUBT})


def _tile(one: Judged) -> np.ndarray:
    """(SHEET_TILE + LINES * CAPTION, SHEET_TILE, 3) BGR: the image, then name and reasons."""
    _, frame = next(read_candidates([one.candidate]))
    tile, box = tile_of(frame.pixels, frame.geometry.pixel_shape, SHEET_TILE)
    mark(tile, box.to_input(one.evidence.landmarks_px), LANDMARK_COLOURS, 3, cv2.FILLED)
    colour = DOUBT if one.objections else TRUTH
    cv2.rectangle(tile, (0, 0), (SHEET_TILE - 1, SHEET_TILE - 1), colour, 2)
    words = [f"{one.candidate.file[-24:]} {one.evidence.aop_deg:.0f} deg"]
    for _, sentence in one.objections[:1]:  # the table has them all
        words += textwrap.wrap(sentence, LETTERS)
    caption = np.zeros((LINES * CAPTION, SHEET_TILE, 3), np.uint8)
    for k, line in enumerate(words[:LINES]):
        put_text(caption, line, (4, (k + 1) * CAPTION - 5))
    return np.vstack([tile, caption])
