"""Answers to compare with a table of cases, and how a case finds its answer and its image."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from pydantic import ValidationError

from model.anatomy import LANDMARKS, Floats
from model.formats import SUFFIXES
from model.frame import Geometry
from model.image import ImageError, open_image
from model.outputs import CaseEntry, Results
from training.cases import Case, CaseError, read_cases

if TYPE_CHECKING:  # torch, which an evaluation container does without
    from training.predict import CasePrediction

T = TypeVar("T")
# cases, their answers, and the names of the other cases, perhaps with a reason
Answers = tuple[list[Case], "list[CasePrediction]", list[str]]


class ScoresError(ValueError):
    """Predictions or images that nothing can be scored with; the message says what to do."""


class View(NamedTuple):
    """What must be known of a case's image: its size in px, and where its pixels lie."""

    width: int
    height: int
    geometry: Geometry = Geometry()


def kind_of(path: Path) -> str:
    """What a file of predictions holds: jobs, results or a table."""
    if path.is_dir():
        return "table"
    with path.open("rb") as file:
        start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return {b"[": "jobs", b"{": "results"}.get(start, "table")


def read_answers(path: Path, kind: str, cases: Sequence[Case], images: Path) -> Answers:
    """Cases with their answers from a table or from results.json, and the names of the others.

    Raises:
        CaseError: the table cannot be used, or no case has an answer.
        ScoresError: results.json or an image cannot be used.
    """
    find = by_name(read_cases(path) if kind == "table" else _entries(path))
    found, predictions, missing = [], [], []
    for case in cases:
        answer = find(case.file, case.frame)
        label = case.file if case.frame is None else f"{case.file} frame {case.frame}"
        if answer is None:
            missing.append(label)
        elif isinstance(answer, CaseEntry) and answer.status == "failed":
            missing.append(f"{label}: {answer.error}")
        else:
            found.append(case)
            predictions.append(_prediction(answer, partial(view_of_image, images, case)))
    if not found:
        raise CaseError(
            f"none of the {len(cases)} cases, the first being {cases[0].file}, has a row in the "
            "predictions: run process.py on the folder of these images first"
        )
    return found, predictions, missing


def by_name(cases: Sequence[T]) -> Callable[[str, int | None], T | None]:
    """Finds by `file` and `frame`, else by the name, else by its stem; None: none, or several."""
    index: dict[tuple[str, int | None], T | None] = {}
    for key_of in (stem_of, name_of, str):  # the later the better
        count = Counter((key_of(case.file), case.frame) for case in cases)
        keys = {(key_of(case.file), case.frame): case for case in cases}
        index |= {key: case if count[key] == 1 else None for key, case in keys.items()}

    def find(file: str, frame: int | None = None) -> T | None:
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


def view_of_image(images: Path, case: Case) -> View:
    """The view of a case's image.

    Raises:
        ScoresError: there is none, or it cannot be read.
    """
    path = images / image_file(images, case)
    try:
        source = open_image(path)
    except ImageError as error:
        raise ScoresError(f"{path}: {error}") from error
    return View(source.width, source.height, source.geometry)


def _entries(path: Path) -> list[CaseEntry]:
    try:
        return Results.model_validate_json(path.read_bytes()).cases
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ", ".join(map(str, first["loc"])) or "JSON"
        told = f"{where}: {first['msg']}"
        raise ScoresError(f"{path}: expected process.py's results.json, but {told}") from error


def _prediction(answer: Case | CaseEntry, view: Callable[[], View]) -> "CasePrediction":
    """Of a table's row, the image tells how large it is."""
    from training.predict import CasePrediction  # noqa: PLC0415

    if isinstance(answer, Case):
        return CasePrediction(answer.landmarks_px, max(view()[:2]), answer.aop_deg)

    def array(values: Mapping[str, Any] | None) -> Floats | None:
        return None if values is None else np.array([values[name] for name in LANDMARKS], float)

    return CasePrediction(
        array(answer.landmarks_px),
        max(answer.width, answer.height),
        answer.aop_deg,
        np.empty(0) if answer.confidence is None else array(answer.confidence),
        aop_interval_deg=answer.aop_interval_deg,
        expected_error_px=array(answer.expected_error_px),
        expected_aop_error_deg=answer.expected_aop_error_deg,
        reasons=tuple(answer.reasons),
    )
