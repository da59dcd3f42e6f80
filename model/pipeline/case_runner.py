"""Answers one case: reads, predicts, draws, writes, and makes an entry for each frame."""

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
from model.drawing.overlay import LONGEST, encode_png, overlay_picture
from model.drawing.text import Picture
from model.images.reader_pool import Readers
from model.images.source import BadFrame, GreyFrame, ImageError, ImageSource, open_image
from model.measure import (
    bad_frame_entry,
    failed_entry,
    measure_frame,
    named_points,
    warn_if_late,
)
from model.pipeline.cases import InputCase
from model.pipeline.options import RunOptions
from model.predictor import Predictor
from model.results.files import OVERLAY, PICTURE, SHEET, write_bytes
from model.results.journal import Journal
from model.results.schemas import CaseEntry, Loop, NamedPoint


class Stopped(Exception):
    """A signal asked for a stop, and the frames that are left were not answered."""


class StopRequest:
    """The signal that asked the process to stop, or None so far.

    The run looks at it between frames, so that all files are written whole.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def request(self, number: int) -> None:
        """Ask for a stop because of this signal; a second request ends the process at once."""
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number

    def raise_if_asked(self) -> None:
        """Raise Stopped after a signal."""
        if self.signal is not None:
            raise Stopped


@dataclass(frozen=True)
class Answer:
    """The answer for one frame; a failed one has neither points nor picture.

    points: in the frame of answers. picture: the overlay; None also without --overlay.
    """

    entry: CaseEntry
    points: Sequence[NamedPoint] = ()
    picture: Picture | None = None


Record = Callable[[CaseEntry], None]  # stores an entry of results.json


def answer_case(
    case: InputCase,
    predictor: Predictor,
    options: RunOptions,
    journal: Journal,
    record: Record,
    readers: Readers,
    stop: StopRequest,
) -> Loop | None:
    """Predict and write one case. A fault in one frame fails that frame alone.

    Args:
        journal: reserves room on the disk for the entries of further frames.
        record: is called with the entry of each frame in turn.
        readers: read what could end this process.

    Returns:
        The summary of a stack or cine loop; None for a single image.

    Raises:
        Stopped: a stop was requested.
    """
    start = time.perf_counter()
    folder = options.output / case.folder
    try:
        options.files.remove(folder)
        source = open_image(case.path, readers)
        journal.reserve(source.frame_count - 1)
    except (ImageError, OSError) as error:
        reason = str(error) if isinstance(error, ImageError) else _write_fault(error)
        record(bad_frame_entry(case.name, case.file, BadFrame(None, reason)))
        return None
    answers = _answer_frames(case, source, start, predictor, options, readers, stop)
    empty_loop = partial(LoopSummary, case.name, case.file, source.frame_count)
    write = _write_together if case.is_job else _write_each
    loop = write(answers, folder, options, record, empty_loop)
    if not source.is_stack:
        return None
    _write_sheet(loop, folder)
    return loop.summary()


def frame_folder(folder: Path, frame: int | None) -> Path:
    """The folder of a frame's files within that of its case; None stands for a single image."""
    return folder if frame is None else folder / f"frame-{frame:04d}"


def _answer_frames(
    case: InputCase,
    source: ImageSource,
    start: float,
    predictor: Predictor,
    options: RunOptions,
    readers: Readers,
    stop: StopRequest,
) -> Iterator[Answer]:
    """The answer for each frame in turn, computed when the caller asks for it.

    Args:
        start: the time.perf_counter() at which reading the case began, in seconds.
    """
    for frame, read_ms in _frames_with_read_ms(source, start):
        stop.raise_if_asked()
        with readers.admit(0 if isinstance(frame, BadFrame) else frame.pixels.nbytes):
            answer = _answer_frame(case, frame, read_ms, predictor, options)
        yield answer


def _frames_with_read_ms(
    source: ImageSource, start: float
) -> Iterator[tuple[GreyFrame | BadFrame, float]]:
    """Each frame, and the milliseconds that reading it took."""
    for frame in source.frames():
        yield frame, _ms_since(start)
        start = time.perf_counter()


def _answer_frame(
    case: InputCase,
    frame: GreyFrame | BadFrame,
    read_ms: float,
    predictor: Predictor,
    options: RunOptions,
) -> Answer:
    """Predict one frame and write its pictures."""
    if isinstance(frame, BadFrame):
        return Answer(bad_frame_entry(case.name, case.file, frame))
    entry = measure_frame(case.name, case.file, frame, predictor, options.decode, options.mirror)
    if entry.status == "failed":
        return Answer(entry)
    folder = frame_folder(options.output / case.folder, frame.index)
    start = time.perf_counter()
    picture = overlay_picture(frame, entry) if options.overlay else None
    try:
        if picture is not None:
            write_bytes(folder / OVERLAY, encode_png(picture))
        if options.report:
            write_bytes(folder / PICTURE, encode_png(plain_picture(frame)))
    except OSError as error:
        with contextlib.suppress(OSError):  # a file that cannot be written may not be removable
            options.files.remove(folder)
        return Answer(failed_entry(entry, _write_fault(error)))
    stages = {"read": read_ms, **entry.milliseconds, "overlay": _ms_since(start)}
    entry = entry.model_copy(update={"milliseconds": stages})
    return Answer(entry, named_points(entry, frame, options.frame_of_answers == "world"), picture)


def plain_picture(frame: GreyFrame) -> Picture:
    """The image alone, (height, width), with square pixels.

    Up to LONGEST px no pixel is lost: the axis with the larger pixels is enlarged.
    """
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
    """Write and record each frame's answer as soon as it is known, in a folder of its own."""
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
    """Write and record one answer for all frames of a job, once the last frame is known."""
    loop = empty_loop()
    without_pictures = []
    for answer in answers:
        loop.add(answer.entry, answer.picture)
        without_pictures.append(replace(answer, picture=None))  # they would fill the memory
    entries = _write_answer(without_pictures, folder, options)
    for entry in entries:
        record(entry)
    if any(entry.status == "ok" for entry in entries):
        return loop
    return empty_loop()  # the one answer could not be written, so every frame has failed


def _write_sheet(loop: LoopSummary, folder: Path) -> None:
    """Write the contact sheet, if any frame has an overlay."""
    sheet = loop.contact_sheet(lambda frame: frame_folder(folder, frame) / OVERLAY)
    if sheet is not None:
        with contextlib.suppress(OSError):  # on a full disk the answers stand without it
            write_bytes(folder / SHEET, sheet)


def _write_answer(answers: Sequence[Answer], folder: Path, options: RunOptions) -> list[CaseEntry]:
    """Write one answer for all these frames, as grand-challenge reads it; returns their entries."""
    angles = [answer.entry.aop_deg for answer in answers if answer.entry.aop_deg is not None]
    start = time.perf_counter()
    error = None
    if angles:
        try:
            points = [point for answer in answers for point in answer.points]
            options.files.write(folder, angles, points)
        except OSError as write_error:
            error = write_error
            with contextlib.suppress(OSError):  # a file that cannot be written may not be removable
                options.files.remove(folder)
    write_ms = _ms_since(start) / max(1, len(angles))
    for answer in answers:
        if answer.points:
            answer.entry.milliseconds["write"] = write_ms
    entries = [
        failed_entry(answer.entry, _write_fault(error)) if error and answer.points else answer.entry
        for answer in answers
    ]
    return [warn_if_late(entry, options.latency_budget_ms) for entry in entries]


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1000


def _write_fault(error: OSError) -> str:
    return f"the answer could not be written: {error.strerror}"
