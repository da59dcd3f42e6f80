"""Answers that are measured against labels: grand-challenge's jobs, and tables of answers.

predictions.json lists the jobs, as an evaluation container finds it. The answers of job PK lie
below PK/output/ beside it, at the relative_path of the job's outputs. Jobs come from strangers:
whatever is missing, malformed or hostile is an AnswerError of that one job or answer.

Tables of answers are process.py's results.json and landmarks.csv, or another reader's CSV file.
"""

import math
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from tqdm import tqdm

from model.anatomy import LANDMARKS, Floats, angle_of_progression
from model.frame import Geometry
from model.images.formats import SUFFIXES
from model.images.source import ImageError, open_image
from model.results.schemas import CaseEntry, Results
from training.data.case_table import Case, CaseError, read_cases
from training.evaluation.metrics import (
    REFERENCE_PX,
    WORST_AOP_ERROR_DEG,
    Summary,
    radial_errors_px,
    summarise,
)

if TYPE_CHECKING:  # imports torch, which an evaluation container does not have
    from training.evaluation.predict import CasePrediction

MAX_ANSWER_BYTES = 2**16  # process.py's answers have 500
NOTED_DIFFERENCE_DEG = 0.1  # between the angle of an answer and the angle of its landmarks
SCORING_RULES = (
    "A missing or malformed answer counts as the worst. The worst landmarks have a radial error of "
    "the image's diagonal at 512 px (724.08 px for a square image), and no radial error counts as "
    "more. The worst angle has an error of 180 deg. If a case has no job, several jobs or a failed "
    "job, both of its answers count as the worst. A job that belongs to no case is named and does "
    "not count."
)
# An unterminated string runs to the end of the text, so that matching takes linear time.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[][{},]', re.DOTALL)

T = TypeVar("T")
CaseLike = TypeVar("CaseLike", bound="_HasFile")


class ScoresError(ValueError):
    """Predictions or images that cannot be scored; the message says what to do."""


class AnswerError(ValueError):
    """One job or answer that cannot be used; the message says why, in a few words."""


class PixelGrid(NamedTuple):
    """The size of a case's image in px, and where its pixels lie in the world."""

    width: int
    height: int
    geometry: Geometry = Geometry()


class AnsweredCases(NamedTuple):
    """Cases with an answer and their predictions, in the same order.

    missing: the other cases, each by its name, with the reason if it is known.
    """

    cases: list[Case]
    predictions: "list[CasePrediction]"
    missing: list[str]


class _HasFile(Protocol):
    """A case of a table, or an entry of results.json."""

    @property
    def file(self) -> str: ...

    @property
    def frame(self) -> int | None: ...


# ---- Jobs: what is read of predictions.json and of the answers


class Sockets(NamedTuple):
    """The slugs that a challenge chose; image: None if each job has only one image."""

    landmarks: str = "aop-landmarks"
    angle: str = "angle-of-progression"
    image: str | None = None


class _ForeignJson(BaseModel):
    """JSON by a stranger: unknown fields are ignored, and text does not count as a number."""

    model_config = ConfigDict(strict=True, frozen=True)


# No image has a side of a million px or mm.
Coordinate = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]
Angle = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=180)]


class _Socket(_ForeignJson):
    slug: str = ""
    relative_path: str = ""


class _Image(_ForeignJson):
    name: str | None = None


class _Value(_ForeignJson):
    image: _Image | None = None
    socket: _Socket = Field(_Socket(), validation_alias=AliasChoices("socket", "interface"))


class Job(_ForeignJson):
    """The fields of a job in predictions.json that are used."""

    pk: str
    status: str = "Succeeded"
    inputs: list[_Value] = []
    outputs: list[_Value] = []


class _Point(_ForeignJson):
    name: str
    point: tuple[Coordinate, Coordinate, Coordinate]


class _Points(_ForeignJson):
    points: list[_Point]


JOB_SCHEMA, POINTS_SCHEMA, ANGLE_SCHEMA = TypeAdapter(Job), TypeAdapter(_Points), TypeAdapter(Angle)


def read_jobs(
    predictions: Path, cases: Sequence[Case], image: str | None
) -> tuple[dict[str, list[Job]], list[str]]:
    """The jobs of each case, by the case's file; and a sentence for each job of no case.

    Args:
        image: slug of the input that names the case; None if each job has only one image.

    Raises:
        ScoresError: predictions.json is not a list.
        OSError: predictions.json cannot be read.
    """
    text = predictions.read_text(encoding="utf-8-sig", errors="replace")
    find_case = case_finder(cases)
    jobs_of_case: dict[str, list[Job]] = {}
    unmatched = []
    for number, item in enumerate(_split_list(text, predictions), 1):
        try:
            job = _parse(JOB_SCHEMA, item)
            jobs_of_case.setdefault(_case_of_job(job, find_case, image).file, []).append(job)
        except AnswerError as error:
            unmatched.append(f"job {number}: {error}")
    return jobs_of_case, unmatched


def only_job(jobs: Sequence[Job]) -> Job:
    """The only job of a case.

    Raises:
        AnswerError: the case has no job or several, or its job has not succeeded.
    """
    if len(jobs) != 1:
        raise AnswerError(f"{len(jobs)} jobs are for this case" if jobs else "no job for this case")
    if jobs[0].status.lower() != "succeeded":
        raise AnswerError(f"the job's status is {_escape(jobs[0].status)}")
    if not re.fullmatch(r"[0-9A-Za-z_-]{1,100}", jobs[0].pk):
        raise AnswerError(f"the job's pk is {_escape(jobs[0].pk)}, expected letters and digits")
    return jobs[0]


def read_landmarks(root: Path, job: Job, slug: str) -> Floats:
    """(3, 3) points (x, y, z) in the order of LANDMARKS, in the frame of the job's answers.

    Raises:
        AnswerError: the answer is missing or malformed.
    """
    points = _parse(POINTS_SCHEMA, _read_answer_file(root, job, slug), "the landmarks").points
    names = [point.name for point in points]
    if sorted(names) != sorted(LANDMARKS):
        wanted = ", ".join(LANDMARKS)
        raise AnswerError(
            f"the points are {_escape(', '.join(names))}, expected {wanted} once each"
        )
    return np.array([points[names.index(name)].point for name in LANDMARKS])


def read_angle(root: Path, job: Job, slug: str) -> float:
    """Degrees, 0 to 180.

    Raises:
        AnswerError: the answer is missing or malformed.
    """
    return _parse(ANGLE_SCHEMA, _read_answer_file(root, job, slug), "the angle")


def _split_list(text: str, path: Path) -> Iterator[str]:
    """The text of each item of a JSON list, so that a damaged or deep item costs no other.

    Raises:
        ScoresError: the text is not one list.
    """
    depth = start = 0
    for token in _TOKEN.finditer(text):
        if depth == 1 and token[0] in ("]", ",") and text[start : token.start()].strip():
            yield text[start : token.start()]
        depth += (token[0] in ("[", "{")) - (token[0] in ("]", "}"))
        if depth == 1 and token[0] in ("[", ","):
            start = token.end()
        if depth <= 0:
            if text[token.end() :].strip():
                break
            return
    raise ScoresError(f"{path}: expected a list of jobs as JSON, complete and nothing after it")


def _case_of_job(
    job: Job, find_case: Callable[[str, int | None], Case | None], slug: str | None
) -> Case:
    names = [v.image.name for v in job.inputs if v.image and slug in (None, v.socket.slug)]
    if len(names) != 1 or not names[0]:
        which = f"by the slug {slug!r}" if slug else "(--image-slug chooses among several)"
        raise AnswerError(f"{_escape(job.pk)} names {len(names)} images {which}, expected one")
    case = find_case(names[0], None)
    if case is None:
        raise AnswerError(
            f"the image {_escape(names[0])} is not one case of the truth, but none or several"
        )
    return case


def _read_answer_file(root: Path, job: Job, slug: str) -> bytes:
    """The content of a job's answer: one small file in the job's own folder, without links.

    Args:
        root: folder of the jobs, as a path without links.

    Raises:
        AnswerError: there is no such file.
    """
    paths = [value.socket.relative_path for value in job.outputs if value.socket.slug == slug]
    if len(paths) != 1:
        raise AnswerError(f"the job has {len(paths)} outputs {slug}, expected one")
    parts = PurePosixPath(paths[0])
    if not parts.name or parts.is_absolute() or ".." in parts.parts or not paths[0].isprintable():
        raise AnswerError(f"{slug}: relative_path {_escape(paths[0])} leaves the job's folder")
    path = root / job.pk / "output" / parts
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or os.path.realpath(path) != str(path):
            raise AnswerError(f"{slug}: expected a file, not a link, a folder or a pipe")
        if status.st_size > MAX_ANSWER_BYTES:
            raise AnswerError(
                f"{slug}: the file has {status.st_size} bytes, over {MAX_ANSWER_BYTES}"
            )
        return path.read_bytes()
    except OSError as error:
        raise AnswerError(f"{slug}: no file that can be read ({error.strerror})") from error


def _parse(kind: TypeAdapter[T], data: str | bytes, what: str = "") -> T:
    try:
        return kind.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = " ".join(map(str, (what, *first["loc"]))).strip()
        raise AnswerError(f"{where}: {first['msg']}" if where else first["msg"]) from error


def _escape(text: str) -> str:
    """A stranger's text in quotes, shortened, and with control characters escaped."""
    return ascii(text if len(text) < 80 else text[:77] + "...")


# ---- Scores of jobs


@dataclass(frozen=True, eq=False)
class Score:
    """A case's answers and their errors; an answer that counts as the worst is None.

    landmarks_px: (3, 2) in image px. radial_px: (3,) px at 512. result: the case's entry in
    metrics.json.
    """

    case: Case
    grid: PixelGrid
    landmarks_px: Floats | None
    aop_deg: float | None
    radial_px: Floats
    aop_error_deg: float
    result: dict[str, Any]


def score_jobs(
    predictions: Path,
    cases: Sequence[Case],
    read_grid: Callable[[Case], PixelGrid],
    sockets: Sockets,
    in_world: bool,
) -> tuple[list[Score], list[str]]:
    """A score for each case, in their order, and a sentence for each job of no case.

    Args:
        read_grid: gives the pixel grid of a case's image.
        in_world: points are in the image's world frame in mm; otherwise in image px.

    Raises:
        ScoresError: predictions.json, the truth or one of its images cannot be used.
        OSError: predictions.json cannot be read.
    """
    stacked = next((case.file for case in cases if case.frame is not None), None)
    if stacked is not None:
        raise ScoresError(
            f"the truth of {stacked} is for a frame of a stack, but a job answers for one image: "
            "pass a table without a Frame column"
        )
    jobs, unmatched = read_jobs(predictions, cases, sockets.image)
    root = Path(os.path.realpath(predictions.parent))
    scores = [
        _score_case(case, read_grid(case), jobs.get(case.file, ()), root, sockets, in_world)
        for case in tqdm(cases, "score", file=sys.stdout, leave=False, disable=None)
    ]
    return scores, unmatched


def aggregate_scores(scores: Sequence[Score], unmatched: Sequence[str]) -> Summary:
    """`summarise` over all cases of the truth, with the rules and what counts as the worst."""
    radial = np.stack([score.radial_px for score in scores])
    return {
        **summarise(radial, np.array([score.aop_error_deg for score in scores])),
        "rules": SCORING_RULES,
        "counted_as_worst": sum(bool(score.result["problems"]) for score in scores),
        "missing": [score.case.file for score in scores if not score.result["jobs"]],
        "unmatched_jobs": list(unmatched),
    }


def answers_from_scores(scores: Sequence[Score]) -> AnsweredCases:
    """The cases whose jobs gave both answers, with these; `missing` is left empty."""
    from training.evaluation.predict import CasePrediction  # noqa: PLC0415

    answers = AnsweredCases([], [], [])
    for score in scores:
        if score.landmarks_px is not None and score.aop_deg is not None:
            longer = max(score.grid[:2])
            answers.cases.append(score.case)
            answers.predictions.append(CasePrediction(score.landmarks_px, longer, score.aop_deg))
    return answers


def _score_case(
    case: Case,
    grid: PixelGrid,
    jobs: Sequence[Job],
    root: Path,
    sockets: Sockets,
    in_world: bool,
) -> Score:
    """The score of a case; every problem and difference is noted in its result."""
    problems: list[str] = []
    notes: list[str] = []

    def try_reading(read: Callable[..., T], *arguments: object) -> T | None:
        try:
            return read(*arguments)
        except AnswerError as error:
            problems.append(str(error))
            return None

    points, aop_deg, aop_of_landmarks_deg = None, None, None
    job = try_reading(only_job, jobs)
    if job is not None:
        points = try_reading(read_landmarks, root, job, sockets.landmarks)
        aop_deg = try_reading(read_angle, root, job, sockets.angle)
    longer = max(grid.width, grid.height)
    radial = np.full(len(LANDMARKS), np.hypot(grid.width, grid.height) / longer * REFERENCE_PX)
    if points is not None:
        points = (grid.geometry.from_world(points) if in_world else points)[:, :2]
        radial = np.minimum(radial, radial_errors_px([points], [case.landmarks_px], [longer])[0])
        try:
            aop_of_landmarks_deg = float(angle_of_progression(points, grid.geometry.pixel_shape))
        except ValueError as error:
            notes.append(str(error))
    if (
        aop_deg is not None
        and aop_of_landmarks_deg is not None
        and abs(aop_deg - aop_of_landmarks_deg) > NOTED_DIFFERENCE_DEG
    ):
        notes.append(
            f"the angle is {aop_deg:.2f} deg, that of the landmarks {aop_of_landmarks_deg:.2f}"
        )
    error_deg = WORST_AOP_ERROR_DEG if aop_deg is None else abs(aop_deg - case.aop_deg)
    result = {
        "case": case.file,
        "jobs": [job.pk[:100] for job in jobs],
        "mre_px": float(radial.mean()),
        "radial_error_px": dict(zip(LANDMARKS, radial.tolist(), strict=True)),
        "aop_deg": aop_deg,
        "aop_error_deg": error_deg,
        "aop_of_landmarks_deg": aop_of_landmarks_deg,
        "problems": problems,
        "notes": notes,
    }
    return Score(case, grid, points, aop_deg, radial, error_deg, result)


# ---- Answers of results.json and of tables


def detect_kind(path: Path) -> Literal["jobs", "results", "table"]:
    """The kind of predictions in a file, by its first character; a folder holds a table."""
    if path.is_dir():
        return "table"
    with path.open("rb") as file:
        start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return "jobs" if start == b"[" else "results" if start == b"{" else "table"


def read_answers(
    path: Path, kind: Literal["results", "table"], cases: Sequence[Case], images: Path
) -> AnsweredCases:
    """Answers from results.json or from a table.

    Args:
        images: folder of the cases' images, whose sizes a table does not give.

    Raises:
        CaseError: the table cannot be used, or no case has an answer.
        ScoresError: results.json or an image cannot be used.
    """
    answers = AnsweredCases([], [], [])
    find_answer: Callable[[str, int | None], Case | CaseEntry | None]
    if kind == "table":
        find_answer = case_finder(read_cases(path))
    else:
        find_answer = case_finder(_read_entries(path))
    for case in cases:
        answer = find_answer(case.file, case.frame)
        name = case.file if case.frame is None else f"{case.file} frame {case.frame}"
        if answer is None:
            answers.missing.append(name)
        elif isinstance(answer, CaseEntry) and answer.status == "failed":
            answers.missing.append(f"{name}: {answer.error}")
        else:
            answers.cases.append(case)
            answers.predictions.append(
                _prediction_of(answer, partial(read_pixel_grid, images, case))
            )
    if not answers.cases:
        raise CaseError(
            f"none of the {len(cases)} cases (the first is {cases[0].file}) has an answer in "
            f"{path}: run process.py on the folder of these images first"
        )
    return answers


def _read_entries(path: Path) -> list[CaseEntry]:
    """The entries of results.json."""
    try:
        return Results.model_validate_json(path.read_bytes()).cases
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ", ".join(map(str, first["loc"])) or "JSON"
        problem = f"{where}: {first['msg']}"
        raise ScoresError(f"{path}: expected process.py's results.json, but {problem}") from error


def _prediction_of(
    answer: Case | CaseEntry, read_grid: Callable[[], PixelGrid]
) -> "CasePrediction":
    """The prediction in a table's row or an entry of results.json.

    Args:
        read_grid: reads the image's size, which only a table's row lacks.
    """
    from training.evaluation.predict import CasePrediction  # noqa: PLC0415

    if isinstance(answer, Case):
        return CasePrediction(answer.landmarks_px, max(read_grid()[:2]), answer.aop_deg)

    def array(values: Mapping[str, Any]) -> Floats:
        return np.array([values[name] for name in LANDMARKS], np.float64)

    if answer.landmarks_px is None or answer.width is None or answer.height is None:
        raise ScoresError(
            f"expected landmarks or an error in results.json for {answer.case}, got none"
        )
    error_px = answer.expected_error_px
    return CasePrediction(
        array(answer.landmarks_px),
        max(answer.width, answer.height),
        math.nan if answer.aop_deg is None else answer.aop_deg,
        np.empty(0) if answer.confidence is None else array(answer.confidence),
        aop_interval_deg=answer.aop_interval_deg,
        expected_error_px=None if error_px is None else array(error_px),
        expected_aop_error_deg=answer.expected_aop_error_deg,
        reasons=tuple(answer.reasons),
    )


# ---- Which case a file name means


def case_finder(cases: Sequence[CaseLike]) -> Callable[[str, int | None], CaseLike | None]:
    """A function that finds a case by path and frame.

    A path that is not found counts by its last part, and then by that without its suffix. The
    function returns None if no case fits, or several do.
    """
    index: dict[tuple[str, int | None], CaseLike | None] = {}
    for key_of in (image_stem, file_name, str):  # a later key replaces an equal earlier one
        count = Counter((key_of(case.file), case.frame) for case in cases)
        keys = {(key_of(case.file), case.frame): case for case in cases}
        index |= {key: case if count[key] == 1 else None for key, case in keys.items()}

    def find(file: str, frame: int | None = None) -> CaseLike | None:
        keys = ((key, frame) for key in (file, file_name(file), image_stem(file)))
        return next((index[key] for key in keys if key in index), None)

    return find


def file_name(file: str) -> str:
    """The last part of a path."""
    return PurePosixPath(file).name


def image_stem(file: str) -> str:
    """The last part of a path without an image's suffix; other dots belong to the stem."""
    name = file_name(file)
    suffixes = [suffix for suffix in SUFFIXES if name.lower().endswith(suffix)]
    return name[: len(name) - max(map(len, suffixes), default=0)]


def find_image_file(images: Path, case: Case) -> str:
    """The path of a case's image below the folder `images`, in any supported format.

    Raises:
        ScoresError: the folder has no image of that name.
    """
    file = PurePosixPath(case.file)
    for name in (file.name, *(image_stem(file.name) + suffix for suffix in SUFFIXES)):
        if (images / file.with_name(name)).exists():
            return str(file.with_name(name))
    raise ScoresError(
        f"no image {images / file}; name the folder of the table's images by --images; if jobs "
        "answer in px and all images have the same size, --size WIDTHxHEIGHT is enough"
    )


def read_pixel_grid(images: Path, case: Case) -> PixelGrid:
    """The pixel grid of a case's image in the folder `images`.

    Raises:
        ScoresError: the image is missing or cannot be read.
    """
    path = images / find_image_file(images, case)
    try:
        source = open_image(path)
    except ImageError as error:
        raise ScoresError(f"{path}: {error}") from error
    return PixelGrid(source.width, source.height, source.geometry)
