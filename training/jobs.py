"""grand-challenge's jobs, as an evaluation container finds them, and what they answered.

predictions.json lists the jobs; the answers of one lie below PK/output/ beside it, as its outputs'
relative_path says. They come from strangers: whatever is missing, malformed or hostile is an
AnswerError of that job or answer alone.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple, TypeVar

import numpy as np
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from model.anatomy import LANDMARKS, Floats
from training.answers import ScoresError, by_name
from training.cases import Case

MOST_BYTES = 2**16  # of an answer; ours have 500
# A string that does not end goes to the end: no text takes longer than its length.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[][{},]', re.DOTALL)

Coordinate = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]  # no image is as large
Angle = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=180)]
T = TypeVar("T")


class AnswerError(ValueError):
    """What is wrong with one job or one of its answers, in a few words."""


class Sockets(NamedTuple):
    """The slugs that a challenge chose; image: None where a job has one image."""

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
    """File of a case -> its jobs; and a sentence for each job that is no case's.

    Args:
        image: the slug of the input that names the case.

    Raises:
        ScoresError: it is no list.
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
    """The one that a case has, if it has succeeded."""
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


def _case_of(job: Job, find: Callable[[str], Case | None], slug: str | None) -> Case:
    names = [v.image.name for v in job.inputs if v.image and slug in (None, v.socket.slug)]
    if len(names) != 1 or not names[0]:
        which = f"by the slug {slug!r}" if slug else "(--image-slug chooses among several)"
        raise AnswerError(f"{_shown(job.pk)} names {len(names)} images {which}, expected one")
    case = find(names[0])
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
