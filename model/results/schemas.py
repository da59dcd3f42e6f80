"""Schemas of the answers (pydantic), and the rows of landmarks.csv."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from model.anatomy import LANDMARKS, Floats, Landmark, angle_of_progression
from model.frame import Pair

PX_DECIMALS = 4  # in every answer alike, so that all angles belong to the same points
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
    """One landmark, in the frame of answers: world mm or px."""

    name: str
    point: Point3
    probability: Confidence


class MultiplePoints(_Strict):
    """grand-challenge's kind "Multiple points": the landmarks of each frame in turn."""

    name: str = "AoP landmarks"
    type: Literal["Multiple points"] = "Multiple points"
    points: list[NamedPoint]
    version: Version = Version()


class ThreePointAngle(_Strict):
    """grand-challenge's kind "Three-point angle": PS2, the vertex PS1, FH1."""

    name: str = "AoP"
    type: Literal["Three-point angle"] = "Three-point angle"
    angle: tuple[Point3, Point3, Point3]
    version: Version = Version()


class CaseEntry(_Strict):
    """An entry of results.json: one single image, or one frame of a stack or cine loop.

    frame counts from 0. pixel_aspect is the size of a pixel up to a factor if the file tells only
    that; the angle is taken in pixels of that shape. Landmarks are (x, y), landmarks_px with
    integers at pixel centres. expected_error_* and expected_aop_error_deg are mean errors to
    expect. aop_interval_deg should hold the true angle nine times in ten. view_score says how much
    the image looks like the view that the model is for. These fields are None if the model is not
    calibrated, and the interval also if the view is doubted or no outlines were found.
    """

    case: str
    file: str
    frame: int | None = None
    status: Literal["ok", "failed"]
    width: int | None = None
    height: int | None = None
    spacing_mm: Point2 | None = None
    pixel_aspect: Point2 | None = None
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

    @property
    def pixel_shape(self) -> Pair:
        """Size of a pixel along x and y up to a common factor, as in `Geometry`."""
        return self.spacing_mm or self.pixel_aspect or (1.0, 1.0)


class Loop(_Strict):
    """A stack or cine loop as a whole, in results.json. Frames count from 0.

    aop_deg: one for each frame, None for a failed one. median_aop_deg: for an even number the lower
    of the two middle angles, so that it is the angle of median_frame. most_confident_frame: the
    frame whose least confident landmark has the highest confidence.
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


class LeftOut(_Strict):
    """Files of one suffix that are no images: how many, and the first one's path."""

    count: int
    first: str


class RunSummary(_Strict):
    """The head of results.json: model, settings and counts.

    shard: "K/N" for the results of one part. missing: after --merge, the parts and files that have
    no entry. left_out: by suffix, the files of the whole input folder that are no images.
    """

    model: str
    model_file: str
    model_sha256: str
    provider: str
    settings: dict[str, str | bool | float | None]
    shard: str | None = None
    missing: list[str] = []
    left_out: dict[str, LeftOut] = {}
    answered: int
    failed: int
    doubtful: int


class Results(RunSummary):
    """The whole of results.json."""

    cases: list[CaseEntry]
    loops: list[Loop] = []


def points_by_name(points: Floats | None) -> dict[str, Point2] | None:
    """Landmark name -> (x, y), from (3, 2) points; None without points."""
    if points is None:
        return None
    return {name: (float(x), float(y)) for name, (x, y) in zip(LANDMARKS, points, strict=True)}


def three_point_angle(points: Sequence[NamedPoint]) -> ThreePointAngle:
    """The angle answer for one frame, from its landmarks PS1, PS2 and FH1."""
    ps1, ps2, fh1 = (points[landmark].point for landmark in Landmark)
    return ThreePointAngle(angle=(ps2, ps1, fh1))


def table_lines(entries: Iterable[CaseEntry], stacks: bool) -> Iterator[str]:
    """Lines of landmarks.csv: the challenge's columns, then Doubt, the reasons in words.

    Points are in image px. AoP is computed from the points as written, in mm if pixels are not
    square. Failed entries have no line.

    Args:
        stacks: whether the table has a Frame column.
    """
    yield _csv_line(["Filename", *(["Frame"] if stacks else []), *LANDMARKS, "AoP", "Doubt"])
    for entry in entries:
        if entry.landmarks_px is None:  # failed
            continue
        points = np.array([entry.landmarks_px[name] for name in LANDMARKS]).round(PX_DECIMALS)
        angle = float(angle_of_progression(points, entry.pixel_shape))
        cells = [f"({x:.{PX_DECIMALS}f}, {y:.{PX_DECIMALS}f})" for x, y in points]
        frame = [entry.frame if entry.frame is not None else ""] if stacks else []
        doubt = "; ".join(entry.reasons)
        yield _csv_line([entry.file, *frame, *cells, f"{angle:.4f}", doubt])


def _csv_line(cells: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
