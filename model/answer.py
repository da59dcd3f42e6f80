"""Answering one case: read, predict, draw, write; an entry of results.json for each frame."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from model.files import OVERLAY, PICTURE, SHEET, write_bytes
from model.image import BadFrame, GreyFrame, ImageError, ImageSource, open_image
from model.jobs import Case
from model.journal import Journal
from model.loops import LoopSummary
from model.measure import bad_frame, failed_entry, measure, points_of, within_budget
from model.outputs import CaseEntry, Loop, NamedPoint
from model.overlay import LONGEST, overlay_picture, png
from model.predictor import Predictor
from model.reading import alone
from model.words import Picture

Take = Callable[[CaseEntry], None]


@dataclass(frozen=True)
class Answer:
    """Of one frame; without points or picture where it failed."""

    entry: CaseEntry
    points: Sequence[NamedPoint] = ()
    picture: Picture | None = None


def answer_case(
    case: Case,
    predictor: Predictor,
    args: argparse.Namespace,
    journal: Journal,
    take: Take,
    pause: Callable[[], None] = lambda: None,
) -> Loop | None:
    """Predict and write one case. What goes wrong stays in the entry it is of.

    Args:
        take: is given the entry of each frame in turn.
        pause: is called before each frame is answered; may raise, to stop.

    Returns:
        the summary of a stack.
    """
    top = args.output / case.folder
    start = time.perf_counter()
    try:
        args.files.remove(top)
        source = open_image(case.path)
        journal.reserve(source.frame_count - 1)
    except (ImageError, OSError) as error:
        reason = str(error) if isinstance(error, ImageError) else _unwritten(error)
        take(bad_frame(case.name, case.file, BadFrame(None, reason)))
        return None
    loop = LoopSummary(case.name, case.file, source.frame_count)
    of_job: list[Answer] = []
    for frame, read_ms in _timed(source, start):
        pause()
        folder = top if frame.index is None else top / f"frame-{frame.index:04d}"
        with alone(0 if isinstance(frame, BadFrame) else frame.pixels.nbytes):
            answer = _answer_frame(case, frame, read_ms, folder, predictor, args)
        if case.is_job:  # there, all frames share one answer
            of_job.append(replace(answer, picture=None))
        else:
            answer = replace(answer, entry=_write([answer], folder, args)[0])
            take(answer.entry)
        loop.add(answer.entry, answer.picture if answer.entry.status == "ok" else None)
    if of_job:
        entries = _write(of_job, top, args)
        if not any(entry.status == "ok" for entry in entries):
            loop = LoopSummary(case.name, case.file, source.frame_count)  # of failures alone
        for entry in entries:
            take(entry)
    if not source.is_stack:
        return None
    sheet = loop.contact_sheet(lambda frame: top / f"frame-{frame:04d}" / OVERLAY)
    if sheet is not None:
        with contextlib.suppress(OSError):  # a disk that is full: the answers count for more
            write_bytes(top / SHEET, sheet)
    return loop.summary()


def _timed(source: ImageSource, start: float) -> Iterator[tuple[GreyFrame | BadFrame, float]]:
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
    folder: Path,
    predictor: Predictor,
    args: argparse.Namespace,
) -> Answer:
    """Predict one frame and draw its overlay."""
    if isinstance(frame, BadFrame):
        return Answer(bad_frame(case.name, case.file, frame))
    entry = measure(case.name, case.file, frame, predictor, args.decode, args.mirror)
    if entry.status == "failed":
        return Answer(entry)
    start = time.perf_counter()
    picture = overlay_picture(frame, entry) if args.overlay else None
    try:
        if picture is not None:
            write_bytes(folder / OVERLAY, png(picture))
        if args.report:
            write_bytes(folder / PICTURE, png(unmarked(frame)))
    except OSError as error:
        with contextlib.suppress(OSError):  # what cannot be written cannot be removed either
            args.files.remove(folder)
        return Answer(failed_entry(entry, _unwritten(error)))
    stages = {"read": read_ms, **entry.milliseconds, "overlay": _ms_since(start)}
    entry = entry.model_copy(update={"milliseconds": stages})
    return Answer(entry, points_of(entry, frame, args.frame_of_answers == "world"), picture)


def unmarked(frame: GreyFrame) -> Picture:
    """(height, width) the image alone, of square pixels, none of them lost up to LONGEST px."""
    height, width = frame.pixels.shape
    extent = np.array([width, height]) * np.array(frame.geometry.pixel_shape)
    finest = min(frame.geometry.pixel_shape)
    size = np.rint(extent / max(finest, extent.max() / LONGEST)).astype(int)
    byte = np.clip(np.rint(frame.pixels), 0, 255).astype(np.uint8)
    smooth = cv2.INTER_AREA if size[0] < width else cv2.INTER_CUBIC
    shown = cv2.resize(byte, np.maximum(1, size).tolist(), interpolation=smooth)
    return np.asarray(shown, np.uint8)


def _write(answers: Sequence[Answer], folder: Path, args: argparse.Namespace) -> list[CaseEntry]:
    """Write what grand-challenge reads, one answer for all frames; returns their entries."""
    angles = [answer.entry.aop_deg for answer in answers if answer.entry.aop_deg is not None]
    start = time.perf_counter()
    error = None
    if angles:
        try:
            points = [point for answer in answers for point in answer.points]
            args.files.write(folder, angles, points)
        except OSError as full:
            error = full
            with contextlib.suppress(OSError):  # what cannot be written cannot be removed either
                args.files.remove(folder)
    write_ms = _ms_since(start) / max(1, len(angles))
    for answer in answers:
        if answer.points:
            answer.entry.milliseconds["write"] = write_ms
    entries = [
        failed_entry(answer.entry, _unwritten(error)) if error and answer.points else answer.entry
        for answer in answers
    ]
    return [within_budget(entry, args.latency_budget_ms) for entry in entries]


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1000


def _unwritten(error: OSError) -> str:
    return f"the answer could not be written: {error.strerror}"
