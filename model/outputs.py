"""The answers: their schemas and their writers. Every file appears whole or not at all."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from model.anatomy import LANDMARKS, Floats, Landmark, angle_of_progression
from model.frame import Pair

RESULTS, TABLE, OVERLAY = "results.json", "landmarks.csv", "overlay.png"
PX_DECIMALS = 4  # of the landmarks in every answer, so that all angles are of the same points
Finite = Annotated[float, Field(allow_inf_nan=False)]
Point2 = tuple[Finite, Finite]
Point3 = tuple[Finite, Finite, Finite]
Confidence = Annotated[float, Field(ge=0, le=1)]


class OutputError(ValueError):
    """An output folder that cannot be written; the message says what to do."""


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
    """What results.json says of one case: an image, or one frame of a stack."""

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
    plausible: bool | None = None
    doubtful: bool | None = None
    reasons: list[str] = []
    warnings: list[str] = []
    milliseconds: dict[str, Finite] = {}
    error: str | None = None


class Results(_Strict):
    """results.json: one a run."""

    model: str
    model_file: str
    provider: str
    settings: dict[str, str | bool | float | None]
    answered: int
    failed: int
    doubtful: int
    cases: list[CaseEntry]


def named(points: Floats | None) -> dict[str, Point2] | None:
    """(3, 2) -> landmark name -> (x, y)."""
    if points is None:
        return None
    return {name: (float(x), float(y)) for name, (x, y) in zip(LANDMARKS, points, strict=True)}


def three_point_angle(points: Sequence[NamedPoint]) -> ThreePointAngle:
    """One frame's three landmarks -> its angle, as points."""
    ps1, ps2, fh1 = (points[landmark].point for landmark in Landmark)
    return ThreePointAngle(angle=(ps2, ps1, fh1))


def csv_text(entries: Sequence[CaseEntry]) -> str:
    """landmarks.csv in the challenge's columns, with a Frame column where there are stacks.

    Points are image px; AoP is that of the points as written, in mm where pixels are not square.
    """
    answered = [entry for entry in entries if entry.status == "ok"]
    stacks = any(entry.frame is not None for entry in answered)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["Filename", *(["Frame"] if stacks else []), *LANDMARKS, "AoP"])
    for entry in answered:
        assert entry.landmarks_px is not None  # an answered case has landmarks
        points = np.array([entry.landmarks_px[name] for name in LANDMARKS]).round(PX_DECIMALS)
        pixel_shape: Pair = entry.spacing_mm or (1.0, 1.0)
        angle = float(angle_of_progression(points, pixel_shape))
        cells = [f"({x:.{PX_DECIMALS}f}, {y:.{PX_DECIMALS}f})" for x, y in points]
        frame = [entry.frame if entry.frame is not None else ""] if stacks else []
        writer.writerow([entry.file, *frame, *cells, f"{angle:.4f}"])
    return text.getvalue()


def open_output(folder: Path) -> None:
    """Make the output folder and clear it of an earlier run's results.

    Raises:
        OutputError: it cannot be written, which is better known before hours of work.
    """
    try:
        for name in (RESULTS, TABLE):
            write_bytes(folder / name, b"")
            (folder / name).unlink()
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written ({error.strerror}); mount a writable folder"
        ) from error


@dataclass(frozen=True)
class AnswerFiles:
    """Names of the files in a case's folder, since a challenge chooses its sockets.

    three_points: None where that answer is not wanted.
    """

    landmarks: str
    angle: str
    three_points: str | None = None

    @property
    def names(self) -> list[str]:
        """All of them and the overlay."""
        return [name for name in (self.landmarks, self.angle, self.three_points, OVERLAY) if name]

    def write(self, folder: Path, angles_deg: Sequence[float], points: list[NamedPoint]) -> None:
        """Write one frame's answer, or one for several: all points, and the median angle.

        Args:
            angles_deg: one a frame; of an even number the lower of the two in the middle counts,
                so that the angle is that of a frame, the one in `three_points`.
            points: the landmarks of each frame in turn.
        """
        angle_deg = statistics.median_low(angles_deg)
        write_json(folder / self.landmarks, MultiplePoints(points=points))
        write_bytes(folder / self.angle, f"{angle_deg}\n".encode())
        if self.three_points:
            at = angles_deg.index(angle_deg) * len(LANDMARKS)
            write_json(folder / self.three_points, three_point_angle(points[at:]))

    def remove(self, folder: Path) -> None:
        """Remove an earlier run's answers, lest they pass for those of a case that now fails."""
        for place in (folder, *folder.glob("frame-*")):
            for name in self.names:
                (place / name).unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(".partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, answer: BaseModel) -> None:
    """Write a schema's JSON whole or not at all."""
    write_bytes(path, answer.model_dump_json(indent=1).encode() + b"\n")
