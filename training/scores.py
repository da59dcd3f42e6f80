"""Scores of grand-challenge's jobs against the truth: what an evaluation container computes."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tqdm import tqdm

from model.anatomy import LANDMARKS, Floats, angle_of_progression
from training.answers import ScoresError, View
from training.cases import Case
from training.jobs import (
    AnswerError,
    Job,
    Sockets,
    read_angle,
    read_jobs,
    read_landmarks,
    the_job,
)
from training.metrics import REFERENCE_PX, radial_errors_px, summarise

if TYPE_CHECKING:  # torch, which an evaluation container does without
    from training.predict import CasePrediction

WORST_AOP_DEG = 180.0
NOTED_DEG = 0.1  # between the angle that is answered and that of the landmarks
RULES = (
    "Landmarks or an angle that are missing or malformed count as the worst: radial errors of the "
    "image's diagonal at 512 px (724.08 px where it is square), an angle error of 180 deg. No "
    "radial error counts as more. A case without a job, with several, or whose job failed, counts "
    "as the worst in both. A job of no case is named and counts for nothing."
)
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Score:
    """A case's errors and what they are of; answers are None where they count as the worst.

    landmarks_px: (3, 2). radial_px: (3,) at 512 px. result: the case's entry in metrics.json.
    """

    case: Case
    view: View
    landmarks_px: Floats | None
    aop_deg: float | None
    radial_px: Floats
    aop_error_deg: float
    result: dict[str, Any]


def score_jobs(
    predictions: Path,
    cases: Sequence[Case],
    view_of: Callable[[Case], View],
    sockets: Sockets,
    in_world: bool,
) -> tuple[list[Score], list[str]]:
    """A score for each case, in their order, and a sentence for each job that is no case's.

    Raises:
        ScoresError: predictions.json, the truth or an image of it cannot be used.
        OSError: predictions.json cannot be read.
    """
    stacked = next((case.file for case in cases if case.frame is not None), None)
    if stacked is not None:
        raise ScoresError(f"the truth of {stacked} is of a frame, but a job answers for one image")
    jobs, unmatched = read_jobs(predictions, cases, sockets.image)
    root = Path(os.path.realpath(predictions.parent))
    scores = [
        _score(case, view_of(case), jobs.get(case.file, ()), root, sockets, in_world)
        for case in tqdm(cases, "score", file=sys.stdout, leave=False, disable=None)
    ]
    return scores, unmatched


def aggregates(scores: Sequence[Score], unmatched: Sequence[str]) -> dict[str, object]:
    """`summarise` over all cases of the truth, and what of it counts as the worst."""
    radial = np.stack([score.radial_px for score in scores])
    return {
        **summarise(radial, np.array([score.aop_error_deg for score in scores])),
        "rules": RULES,
        "counted_as_worst": sum(bool(score.result["problems"]) for score in scores),
        "missing": [score.case.file for score in scores if not score.result["jobs"]],
        "unmatched_jobs": list(unmatched),
    }


def answered(scores: Sequence[Score]) -> tuple[list[Case], "list[CasePrediction]"]:
    """The cases whose jobs have given both answers, and these."""
    from training.predict import CasePrediction  # noqa: PLC0415

    good = [score for score in scores if not score.result["problems"]]
    return [score.case for score in good], [
        CasePrediction(score.landmarks_px, max(score.view[:2]), score.aop_deg) for score in good
    ]


def _score(
    case: Case,
    view: View,
    jobs: Sequence[Job],
    root: Path,
    sockets: Sockets,
    in_world: bool,
) -> Score:
    problems: list[str] = []
    notes: list[str] = []

    def unless_bad(read: Callable[..., T], *arguments: object) -> T | None:
        try:
            return read(*arguments)
        except AnswerError as error:
            problems.append(str(error))
            return None

    job, points, aop_deg, of_landmarks = unless_bad(the_job, jobs), None, None, None
    if job is not None:
        points = unless_bad(read_landmarks, root, job, sockets.landmarks)
        aop_deg = unless_bad(read_angle, root, job, sockets.angle)
    longer = max(view.width, view.height)
    radial = np.full(len(LANDMARKS), np.hypot(view.width, view.height) / longer * REFERENCE_PX)
    if points is not None:
        points = (view.geometry.from_world(points) if in_world else points)[:, :2]
        radial = np.minimum(radial, radial_errors_px([points], [case.landmarks_px], [longer])[0])
        try:
            of_landmarks = float(angle_of_progression(points, view.geometry.pixel_shape))
        except ValueError as error:
            notes.append(str(error))
    if None not in (aop_deg, of_landmarks) and abs(aop_deg - of_landmarks) > NOTED_DEG:
        notes.append(f"the angle is {aop_deg:.2f} deg, that of the landmarks {of_landmarks:.2f}")
    error_deg = WORST_AOP_DEG if aop_deg is None else abs(aop_deg - case.aop_deg)
    result = {
        "case": case.file,
        "jobs": [job.pk[:100] for job in jobs],
        "mre_px": float(radial.mean()),
        "radial_error_px": dict(zip(LANDMARKS, radial.tolist(), strict=True)),
        "aop_deg": aop_deg,
        "aop_error_deg": error_deg,
        "aop_of_landmarks_deg": of_landmarks,
        "problems": problems,
        "notes": notes,
    }
    return Score(case, view, points, aop_deg, radial, error_deg, result)
