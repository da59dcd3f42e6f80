"""Answers to compare with labels: grand-challenge's jobs and their scores, and tables of answers.

predictions.json lists jobs, as an evaluation container finds them. The answers of one lie below
PK/output/ beside it, as its outputs' relative_path says. They come from strangers: whatever is
missing, malformed or hostile is an AnswerError of that job or answer alone. Tables of answers are
process.py's results.json and landmarks.csv, or another reader's CSV.
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
from training.evaluation.metrics import REFERENCE_PX, Summary, radial_errors_px, summarise

if TYPE_CHECKING:  # torch, which an evaluation container does without
    from training.evaluation.predict import CasePrediction

MOST_BYTES = 2**16  # of an answer; ours have 500
# A string that does not end goes to the end: no text takes longer than its length.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[][{},]', re.DOTALL)

Coordinate = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]  # no image is as large
Angle = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=180)]

WORST_AOP_DEG = 180.0
NOTED_DEG = 0.1  # between the angle that is answered and that of the landmarks
RULES = (
    "Landmarks or an angle that are missing or malformed count as the worst: radial errors of the "
    "image's diagonal at 512 px (724.08 px where it is square), an angle error of 180 deg. No "
    "radial error counts as more. A case without a job, with several, or whose job failed, counts "
    "as the worst in both. A job of no case is named and counts for nothing."
)

T = TypeVar("T")
Named = TypeVar("Named", bound="_Named")


class ScoresError(ValueError):
    """Predictions or images that nothing can be scored with; the message says what to do."""


class PixelGrid(NamedTuple):
    """A case's image without its grey values: its size in px, and where its pixels lie."""

    width: int
    height: int
    geometry: Geometry = Geometry()


class Answers(NamedTuple):
    """Cases and their answers, in the same order; and the names of other cases, or why none."""

    cases: list[Case]
    predictions: "list[CasePrediction]"
    missing: list[str]


class _Named(Protocol):
    """What has a file and a frame: a case of a table, or an entry of results.json."""

    @property
    def file(self) -> str: ...

    @property
    def frame(self) -> int | None: ...


class AnswerError(ValueError):
    """What is wrong with one job or one of its answers, in a few words."""


class Sockets(NamedTuple):
    """The slugs that a challenge chose; image: None if a job has one image."""

    landmarks: str = "aop-landmarks"
    angle: str = "angle-of-progression"
    image: str | None = None


class _Told(BaseModel):
    """Whatever else a job or an answer holds is passed over; no text is taken for a number."""

    model_config = ConfigDict(strict=True, frozen=True)


class _Socket(_Told):
    slug: str = ""
    relative_path: str = ""


class _Image(_Told):
    name: str | None = None


class _Value(_Told):
    image: _Image | None = None
    socket: _Socket = Field(_Socket(), validation_alias=AliasChoices("socket", "interface"))


class Job(_Told):
    """What predictions.json says of a job, as far as it is wanted."""

    pk: str
    status: str = "Succeeded"
    inputs: list[_Value] = []
    outputs: list[_Value] = []


class _Point(_Told):
    name: str
    point: tuple[Coordinate, Coordinate, Coordinate]


class _Points(_Told):
    points: list[_Point]


JOB, POINTS, ANGLE = TypeAdapter(Job), TypeAdapter(_Points), TypeAdapter(Angle)


def read_jobs(
    predictions: Path, cases: Sequence[Case], image: str | None
) -> tuple[dict[str, list[Job]], list[str]]:
    """File of a case -> its jobs; and a sentence for each job that belongs to no case.

    Args:
        image: the slug of the input that names the case.

    Raises:
        ScoresError: it is not a list.
        OSError: it cannot be read.
    """
    text = predictions.read_text(encoding="utf-8-sig", errors="replace")
    find = by_name(cases)
    found: dict[str, list[Job]] = {}
    unmatched = []
    for number, item in enumerate(_items(text, predictions), 1):
        try:
            job = _parsed(JOB, item)
            found.setdefault(_case_of(job, find, image).file, []).append(job)
        except AnswerError as error:
            unmatched.append(f"job {number}: {error}")
    return found, unmatched


def the_job(jobs: Sequence[Job]) -> Job:
    """The one job that a case has.

    Raises:
        AnswerError: it has none or several, or its job has not succeeded.
    """
    if len(jobs) != 1:
        raise AnswerError(f"{len(jobs)} jobs are for this case" if jobs else "no job for this case")
    if jobs[0].status.lower() != "succeeded":
        raise AnswerError(f"the job's status is {_shown(jobs[0].status)}")
    if not re.fullmatch(r"[0-9A-Za-z_-]{1,100}", jobs[0].pk):
        raise AnswerError(f"the job's pk is {_shown(jobs[0].pk)}, expected letters and digits")
    return jobs[0]


def read_landmarks(root: Path, job: Job, slug: str) -> Floats:
    """(3, 3) in the order of `Landmark`, in the frame of answers."""
    points = _parsed(POINTS, _answer(root, job, slug), "the landmarks").points
    names = [point.name for point in points]
    if sorted(names) != sorted(LANDMARKS):
        wanted = ", ".join(LANDMARKS)
        raise AnswerError(f"the points are {_shown(', '.join(names))}, expected {wanted} once each")
    return np.array([points[names.index(name)].point for name in LANDMARKS])


def read_angle(root: Path, job: Job, slug: str) -> float:
    """Degrees, 0 to 180."""
    return _parsed(ANGLE, _answer(root, job, slug), "the angle")


def _items(text: str, path: Path) -> Iterator[str]:
    """The items of a JSON list as text, a damaged or deeply nested one too: it costs no other."""
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
    raise ScoresError(f"{path}: expected a list of jobs as JSON, which ends where the file ends")


def _case_of(job: Job, find: Callable[[str, int | None], Case | None], slug: str | None) -> Case:
    names = [v.image.name for v in job.inputs if v.image and slug in (None, v.socket.slug)]
    if len(names) != 1 or not names[0]:
        which = f"by the slug {slug!r}" if slug else "(--image-slug chooses among several)"
        raise AnswerError(f"{_shown(job.pk)} names {len(names)} images {which}, expected one")
    case = find(names[0], None)
    if case is None:
        raise AnswerError(f"the image {_shown(names[0])} is no case of the truth, or not only one")
    return case


def _answer(root: Path, job: Job, slug: str) -> bytes:
    """What is in a job's file, which is a small one of its own, and nobody else's.

    Args:
        root: the folder of the jobs, without links.
    """
    paths = [value.socket.relative_path for value in job.outputs if value.socket.slug == slug]
    if len(paths) != 1:
        raise AnswerError(f"the job has {len(paths)} outputs {slug}, expected one")
    parts = PurePosixPath(paths[0])
    if not parts.name or parts.is_absolute() or ".." in parts.parts or not paths[0].isprintable():
        raise AnswerError(f"{slug}: relative_path {_shown(paths[0])} leaves the job's folder")
    path = root / job.pk / "output" / parts
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or os.path.realpath(path) != str(path):
            raise AnswerError(f"{slug}: expected a file, not a link, a folder or a pipe")
        if status.st_size > MOST_BYTES:
            raise AnswerError(f"{slug}: the file has {status.st_size} bytes, over {MOST_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise AnswerError(f"{slug}: no file that can be read ({error.strerror})") from error


def _parsed(kind: TypeAdapter[T], data: str | bytes, what: str = "") -> T:
    try:
        return kind.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = " ".join(map(str, (what, *first["loc"]))).strip()
        raise AnswerError(f"{where}: {first['msg']}" if where else first["msg"]) from error


def _shown(text: str) -> str:
    """A stranger's text, short and without what a terminal would obey."""
    return ascii(text if len(text) < 80 else text[:77] + "...")


@dataclass(frozen=True, eq=False)
class Score:
    """A case's answers and their errors; an answer is None if it counts as the worst.

    landmarks_px: (3, 2). radial_px: (3,) at 512 px. result: the case's entry in metrics.json.
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
    grid_of: Callable[[Case], PixelGrid],
    sockets: Sockets,
    in_world: bool,
) -> tuple[list[Score], list[str]]:
    """A score for each case, in their order, and a sentence for each job that belongs to no case.

    Args:
        in_world: points are in the image's world frame, in mm; else in px.

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
        _score(case, grid_of(case), jobs.get(case.file, ()), root, sockets, in_world)
        for case in tqdm(cases, "score", file=sys.stdout, leave=False, disable=None)
    ]
    return scores, unmatched


def aggregates(scores: Sequence[Score], unmatched: Sequence[str]) -> Summary:
    """`summarise` over all cases of the truth, and how many of them count as the worst."""
    radial = np.stack([score.radial_px for score in scores])
    return {
        **summarise(radial, np.array([score.aop_error_deg for score in scores])),
        "rules": RULES,
        "counted_as_worst": sum(bool(score.result["problems"]) for score in scores),
        "missing": [score.case.file for score in scores if not score.result["jobs"]],
        "unmatched_jobs": list(unmatched),
    }


def answers_of_scores(scores: Sequence[Score]) -> Answers:
    """The cases whose jobs have given both answers, with these."""
    from training.evaluation.predict import CasePrediction  # noqa: PLC0415

    answers = Answers([], [], [])
    for score in scores:
        if score.landmarks_px is not None and score.aop_deg is not None:
            longer = max(score.grid[:2])
            answers.cases.append(score.case)
            answers.predictions.append(CasePrediction(score.landmarks_px, longer, score.aop_deg))
    return answers


def _score(
    case: Case,
    grid: PixelGrid,
    jobs: Sequence[Job],
    root: Path,
    sockets: Sockets,
    in_world: bool,
) -> Score:
    problems: list[str] = []
    notes: list[str] = []

    def try_reading(read: Callable[..., T], *arguments: object) -> T | None:
        try:
            return read(*arguments)
        except AnswerError as error:
            problems.append(str(error))
            return None

    job, points, aop_deg, of_landmarks = try_reading(the_job, jobs), None, None, None
    if job is not None:
        points = try_reading(read_landmarks, root, job, sockets.landmarks)
        aop_deg = try_reading(read_angle, root, job, sockets.angle)
    longer = max(grid.width, grid.height)
    radial = np.full(len(LANDMARKS), np.hypot(grid.width, grid.height) / longer * REFERENCE_PX)
    if points is not None:
        points = (grid.geometry.from_world(points) if in_world else points)[:, :2]
        radial = np.minimum(radial, radial_errors_px([points], [case.landmarks_px], [longer])[0])
        try:
            of_landmarks = float(angle_of_progression(points, grid.geometry.pixel_shape))
        except ValueError as error:
            notes.append(str(error))
    if aop_deg is not None and of_landmarks is not None and abs(aop_deg - of_landmarks) > NOTED_DEG:
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
    return Score(case, grid, points, aop_deg, radial, error_deg, result)


def kind_of(path: Path) -> Literal["jobs", "results", "table"]:
    """What a file of predictions holds, seen by its content; a folder holds a table."""
    if path.is_dir():
        return "table"
    with path.open("rb") as file:
        start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return "jobs" if start == b"[" else "results" if start == b"{" else "table"


def read_answers(
    path: Path, kind: Literal["results", "table"], cases: Sequence[Case], images: Path
) -> Answers:
    """Answers from results.json or from a table.

    Args:
        images: folder of the cases' images, which say how large they are; results.json says it.

    Raises:
        CaseError: the table cannot be used, or no case has an answer.
        ScoresError: results.json or an image cannot be used.
    """
    answers = Answers([], [], [])
    find: Callable[[str, int | None], Case | CaseEntry | None]
    find = by_name(read_cases(path)) if kind == "table" else by_name(_entries(path))
    for case in cases:
        answer = find(case.file, case.frame)
        label = case.file if case.frame is None else f"{case.file} frame {case.frame}"
        if answer is None:
            answers.missing.append(label)
        elif isinstance(answer, CaseEntry) and answer.status == "failed":
            answers.missing.append(f"{label}: {answer.error}")
        else:
            answers.cases.append(case)
            answers.predictions.append(_prediction(answer, partial(pixel_grid_of, images, case)))
    if not answers.cases:
        raise CaseError(
            f"none of the {len(cases)} cases, the first being {cases[0].file}, has a row in the "
            "predictions: run process.py on the folder of these images first"
        )
    return answers


def by_name(cases: Sequence[Named]) -> Callable[[str, int | None], Named | None]:
    """A function that finds a case by `file` and `frame`, else by name, else by the name's stem.

    It returns None for none, and for several of one name.
    """
    index: dict[tuple[str, int | None], Named | None] = {}
    for key_of in (stem_of, name_of, str):  # the later the better
        count = Counter((key_of(case.file), case.frame) for case in cases)
        keys = {(key_of(case.file), case.frame): case for case in cases}
        index |= {key: case if count[key] == 1 else None for key, case in keys.items()}

    def find(file: str, frame: int | None = None) -> Named | None:
        keys = ((key, frame) for key in (file, name_of(file), stem_of(file)))
        return next((index[key] for key in keys if key in index), None)

    return find


def name_of(file: str) -> str:
    """The last part of a path."""
    return PurePosixPath(file).name


def stem_of(file: str) -> str:
    """The last part of a path without an image's suffix; any other dot belongs to the name."""
    name = name_of(file)
    suffixes = [suffix for suffix in SUFFIXES if name.lower().endswith(suffix)]
    return name[: len(name) - max(map(len, suffixes), default=0)]


def image_file(images: Path, case: Case) -> str:
    """The path below a folder of a case's image, in whatever format the folder has it.

    Raises:
        ScoresError: there is none.
    """
    file = PurePosixPath(case.file)
    for name in (file.name, *(stem_of(file.name) + suffix for suffix in SUFFIXES)):
        if (images / file.with_name(name)).exists():
            return str(file.with_name(name))
    raise ScoresError(
        f"no image {images / file}; name the folder of the table's images by --images, or, where "
        "jobs answer in px and all images have one size, that by --size WIDTHxHEIGHT"
    )


def pixel_grid_of(images: Path, case: Case) -> PixelGrid:
    """The pixel grid of a case's image.

    Raises:
        ScoresError: the image is missing, or cannot be read.
    """
    path = images / image_file(images, case)
    try:
        source = open_image(path)
    except ImageError as error:
        raise ScoresError(f"{path}: {error}") from error
    return PixelGrid(source.width, source.height, source.geometry)


def _entries(path: Path) -> list[CaseEntry]:
    try:
        return Results.model_validate_json(path.read_bytes()).cases
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ", ".join(map(str, first["loc"])) or "JSON"
        told = f"{where}: {first['msg']}"
        raise ScoresError(f"{path}: expected process.py's results.json, but {told}") from error


def _prediction(answer: Case | CaseEntry, grid: Callable[[], PixelGrid]) -> "CasePrediction":
    """An answer as it is measured; only for a table's row the image must say how large it is."""
    from training.evaluation.predict import CasePrediction  # noqa: PLC0415

    if isinstance(answer, Case):
        return CasePrediction(answer.landmarks_px, max(grid()[:2]), answer.aop_deg)

    def array(values: Mapping[str, Any]) -> Floats:
        return np.array([values[name] for name in LANDMARKS], np.float64)

    if answer.landmarks_px is None or answer.width is None or answer.height is None:
        raise ScoresError(f"results.json has neither landmarks nor an error for {answer.case}")
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
