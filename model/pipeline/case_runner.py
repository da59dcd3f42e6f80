"""Answering one case: read, predict, draw, write; an entry of results.json for each frame."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from model.drawing.contact_sheet import LoopSummary
from model.drawing.overlay import LONGEST, overlay_picture, png
from model.drawing.text import Picture
from model.images.limits import MemoryBudget
from model.images.source import BadFrame, GreyFrame, ImageError, ImageSource, open_image
from model.measure import bad_frame, failed_entry, measure, points_of, within_budget
from model.pipeline.cases import Case
from model.pipeline.options import RunOptions
from model.predictor import Predictor
from model.results.files import OVERLAY, PICTURE, SHEET, write_bytes
from model.results.journal import Journal
from model.results.schemas import CaseEntry, Loop, NamedPoint


class Stopped(Exception):
    """The run was asked to stop between two frames of a stack."""


class StopRequest:
    """Whether a signal has asked the process to stop, and which one.

    It is looked at between frames, so that what is written is whole.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def request(self, number: int) -> None:
        """Ask for a stop because of this signal; the second one ends the process at once."""
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number

    def raise_if_asked(self) -> None:
        """Raise Stopped after a signal."""
        if self.signal is not None:
            raise Stopped


@dataclass(frozen=True)
class Answer:
    """The answer for one frame; without points or picture if it failed."""

    entry: CaseEntry
    points: Sequence[NamedPoint] = ()
    picture: Picture | None = None


Record = Callable[[CaseEntry], None]


def answer_case(
    case: Case,
    predictor: Predictor,
    options: RunOptions,
    journal: Journal,
    record: Record,
    budget: MemoryBudget,
    stop: StopRequest,
) -> Loop | None:
    """Predict and write one case. A fault stays in the entry of the frame that has it.

    Args:
        record: is called with the entry of each frame in turn.

    Returns:
        The summary of a stack; None for a single image.

    Raises:
        Stopped: a signal asked for it.
    """
    start = time.perf_counter()
    folder = options.output / case.folder
    try:
        options.files.remove(folder)
        source = open_image(case.path, budget)
        journal.reserve(source.frame_count - 1)
    except (ImageError, OSError) as error:
        reason = str(error) if isinstance(error, ImageError) else _write_fault(error)
        record(bad_frame(case.name, case.file, BadFrame(None, reason)))
        return None
    answers = _answer_frames(case, source, start, predictor, options, budget, stop)
    empty_loop = partial(LoopSummary, case.name, case.file, source.frame_count)
    write = _write_together if case.is_job else _write_each
    loop = write(answers, folder, options, record, empty_loop)
    if not source.is_stack:
        return None
    _write_sheet(loop, folder)
    return loop.summary()


def frame_folder(folder: Path, frame: int | None) -> Path:
    """Where a frame's files lie in the folder of its case; None: a single image's."""
    return folder if frame is None else folder / f"frame-{frame:04d}"


def _answer_frames(
    case: Case,
    source: ImageSource,
    start: float,
    predictor: Predictor,
    options: RunOptions,
    budget: MemoryBudget,
    stop: StopRequest,
) -> Iterator[Answer]:
    """The answer for each frame in turn, found when it is asked for.

    Args:
        start: when reading the case began, by `time.perf_counter`.
    """
    for frame, read_ms in _read_frames(source, start):
        stop.raise_if_asked()
        with budget.admit(0 if isinstance(frame, BadFrame) else frame.pixels.nbytes):
            answer = _answer_frame(case, frame, read_ms, predictor, options)
        yield answer


def _read_frames(source: ImageSource, start: float) -> Iterator[tuple[GreyFrame | BadFrame, float]]:
    """The frames, and the ms that reading each took."""
    try:
        for frame in source.frames():
            yield frame, _ms_since(start)
            start = time.perf_counter()
    except OSError as error:  # the file has gone
        yield BadFrame(None, f"the file cannot be read: {error.strerror}"), 0.0


def _answer_frame(
    case: Case,
    frame: GreyFrame | BadFrame,
    read_ms: float,
    predictor: Predictor,
    options: RunOptions,
) -> Answer:
    """Predict one frame and write its pictures."""
    if isinstance(frame, BadFrame):
        return Answer(bad_frame(case.name, case.file, frame))
    entry = measure(case.name, case.file, frame, predictor, options.decode, options.mirror)
    if entry.status == "failed":
        return Answer(entry)
    folder = frame_folder(options.output / case.folder, frame.index)
    start = time.perf_counter()
    picture = overlay_picture(frame, entry) if options.overlay else None
    try:
        if picture is not None:
            write_bytes(folder / OVERLAY, png(picture))
        if options.report:
            write_bytes(folder / PICTURE, png(plain_picture(frame)))
    except OSError as error:
        with contextlib.suppress(OSError):  # what cannot be written cannot be removed either
            options.files.remove(folder)
        return Answer(failed_entry(entry, _write_fault(error)))
    stages = {"read": read_ms, **entry.milliseconds, "overlay": _ms_since(start)}
    entry = entry.model_copy(update={"milliseconds": stages})
    return Answer(entry, points_of(entry, frame, options.frame_of_answers == "world"), picture)


def plain_picture(frame: GreyFrame) -> Picture:
    """(height, width) the image without marks, of square pixels; none is lost up to LONGEST px."""
    height, width = frame.pixels.shape
    extent = np.array([width, height]) * np.array(frame.geometry.pixel_shape)
    finest = min(frame.geometry.pixel_shape)
    size = np.rint(extent / max(finest, extent.max() / LONGEST)).astype(int)
    byte = np.clip(np.rint(frame.pixels), 0, 255).astype(np.uint8)
    smooth = cv2.INTER_AREA if size[0] < width else cv2.INTER_CUBIC
    shown = cv2.resize(byte, np.maximum(1, size).tolist(), interpolation=smooth)
    return np.asarray(shown, np.uint8)


def _write_each(
    answers: Iterable[Answer],
    folder: Path,
    options: RunOptions,
    record: Record,
    empty_loop: Callable[[], LoopSummary],
) -> LoopSummary:
    """Write and record the answer for each frame as soon as it is there, in a folder of its own."""
    loop = empty_loop()
    for answer in answers:
        place = frame_folder(folder, answer.entry.frame)
        (entry,) = _write_answer([answer], place, options)
        record(entry)
        loop.add(entry, answer.picture if entry.status == "ok" else None)
    return loop


def _write_together(
    answers: Iterable[Answer],
    folder: Path,
    options: RunOptions,
    record: Record,
    empty_loop: Callable[[], LoopSummary],
) -> LoopSummary:
    """Write and record one answer for all frames of a job, once the last of them is there."""
    loop = empty_loop()
    kept = []
    for answer in answers:
        loop.add(answer.entry, answer.picture)
        kept.append(replace(answer, picture=None))  # lest pictures pile up
    entries = _write_answer(kept, folder, options)
    for entry in entries:
        record(entry)
    if any(entry.status == "ok" for entry in entries):
        return loop
    return empty_loop()  # the answer is lost, so every frame has failed


def _write_sheet(loop: LoopSummary, folder: Path) -> None:
    """Write the contact sheet, if there are pictures for one."""
    sheet = loop.contact_sheet(lambda frame: frame_folder(folder, frame) / OVERLAY)
    if sheet is not None:
        with contextlib.suppress(OSError):  # a disk that is full: the answers count for more
            write_bytes(folder / SHEET, sheet)


def _write_answer(answers: Sequence[Answer], folder: Path, options: RunOptions) -> list[CaseEntry]:
    """Write what grand-challenge reads, one answer for all these frames; returns their entries."""
    angles = [answer.entry.aop_deg for answer in answers if answer.entry.aop_deg is not None]
    start = time.perf_counter()
    error = None
    if angles:
        try:
            points = [point for answer in answers for point in answer.points]
            options.files.write(folder, angles, points)
        except OSError as full:
            error = full
            with contextlib.suppress(OSError):  # what cannot be written cannot be removed either
                options.files.remove(folder)
    write_ms = _ms_since(start) / max(1, len(angles))
    for answer in answers:
        if answer.points:
            answer.entry.milliseconds["write"] = write_ms
    entries = [
        failed_entry(answer.entry, _write_fault(error)) if error and answer.points else answer.entry
        for answer in answers
    ]
    return [within_budget(entry, options.latency_budget_ms) for entry in entries]


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1000


def _write_fault(error: OSError) -> str:
    return f"the answer could not be written: {error.strerror}"
