"""The answers: their schemas (pydantic), and the rows of landmarks.csv."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from model.anatomy import LANDMARKS, Floats, Landmark, angle_of_progression
from model.frame import Pair

PX_DECIMALS = 4  # of the landmarks in every answer, so that all angles are of the same points
Finite = Annotated[float, Field(allow_inf_nan=False)]
Point2 = tuple[Finite, Finite]
Point3 = tuple[Finite, Finite, Finite]
Confidence = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Version(_Strict):
    """Version of a grand-challenge annotation."""

    major: int = 1
    minor: int = 0


class NamedPoint(_Strict):
    """One landmark in the frame of answers."""

    name: str
    point: Point3
    probability: Confidence


class MultiplePoints(_Strict):
    """grand-challenge kind "Multiple points": the landmarks, of each frame in turn."""

    name: str = "AoP landmarks"
    type: Literal["Multiple points"] = "Multiple points"
    points: list[NamedPoint]
    version: Version = Version()


class ThreePointAngle(_Strict):
    """grand-challenge kind "Three-point angle": PS2, the vertex PS1, FH1."""

    name: str = "AoP"
    type: Literal["Three-point angle"] = "Three-point angle"
    angle: tuple[Point3, Point3, Point3]
    version: Version = Version()


class CaseEntry(_Strict):
    """What results.json says of one case: an image, or one frame of a stack.

    aop_interval_deg is to hold the true angle nine times in ten, and is None too where the image is
    of another view or shows no outlines; expected_error_* is the mean error to expect, of each
    landmark and of the angle; view_score, 0 to 1, how much the image looks like the view that the
    model is for. They are None where the model is not calibrated.
    """

    case: str
    file: str
    frame: int | None = None
    status: Literal["ok", "failed"]
    width: int | None = None
    height: int | None = None
    spacing_mm: Point2 | None = None
    landmarks_px: dict[str, Point2] | None = None
    landmarks_mm: dict[str, Point2] | None = None
    aop_deg: Finite | None = None
    aop_interval_deg: Point2 | None = None
    confidence: dict[str, Confidence] | None = None
    expected_error_px: dict[str, Finite] | None = None
    expected_error_mm: dict[str, Finite] | None = None
    expected_aop_error_deg: Finite | None = None
    view_score: Confidence | None = None
    plausible: bool | None = None
    doubtful: bool | None = None
    reasons: list[str] = []
    warnings: list[str] = []
    milliseconds: dict[str, Finite] = {}
    error: str | None = None


class Loop(_Strict):
    """What results.json says of a stack or cine loop as a whole; frames count from 0.

    aop_deg: one a frame, None where it failed. median_aop_deg: of an even number the lower of the
    two in the middle, so that it is the angle of a frame. most_confident_frame: the one whose least
    confident landmark is the most confident.
    """

    case: str
    file: str
    frames: int
    answered: int
    aop_deg: list[Finite | None]
    median_aop_deg: Finite | None
    median_frame: int | None
    most_confident_frame: int | None
    doubtful_frames: int


class RunSummary(_Strict):
    """results.json without its lists: how a run was made, and what came of it.

    missing: of merged shards, the parts and files that are not there.
    """

    model: str
    model_file: str
    model_sha256: str
    provider: str
    settings: dict[str, str | bool | float | None]
    shard: str | None = None
    missing: list[str] = []
    answered: int
    failed: int
    doubtful: int


class Results(RunSummary):
    """results.json: one a run."""

    cases: list[CaseEntry]
    loops: list[Loop] = []


def named(points: Floats | None) -> dict[str, Point2] | None:
    """(3, 2) -> landmark name -> (x, y)."""
    if points is None:
        return None
    return {name: (float(x), float(y)) for name, (x, y) in zip(LANDMARKS, points, strict=True)}


def three_point_angle(points: Sequence[NamedPoint]) -> ThreePointAngle:
    """One frame's three landmarks -> its angle, as points."""
    ps1, ps2, fh1 = (points[landmark].point for landmark in Landmark)
    return ThreePointAngle(angle=(ps2, ps1, fh1))


def table_lines(entries: Iterable[CaseEntry], stacks: bool) -> Iterator[str]:
    """landmarks.csv in the challenge's columns, with a Frame column where there are stacks.

    The last column, Doubt, is empty where there is none. Points are image px; AoP is that of the
    points as written, in mm where pixels are not square.
    """
    yield _row(["Filename", *(["Frame"] if stacks else []), *LANDMARKS, "AoP", "Doubt"])
    for entry in entries:
        if entry.landmarks_px is None:  # failed
            continue
        points = np.array([entry.landmarks_px[name] for name in LANDMARKS]).round(PX_DECIMALS)
        pixel_shape: Pair = entry.spacing_mm or (1.0, 1.0)
        angle = float(angle_of_progression(points, pixel_shape))
        cells = [f"({x:.{PX_DECIMALS}f}, {y:.{PX_DECIMALS}f})" for x, y in points]
        frame = [entry.frame if entry.frame is not None else ""] if stacks else []
        doubt = "; ".join(entry.reasons)
        yield _row([entry.file, *frame, *cells, f"{angle:.4f}", doubt])


def _row(cells: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
