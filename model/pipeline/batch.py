"""One run: answers every case of the input folder, then writes results.json and landmarks.csv."""

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from threading import Lock

import cv2
from pydantic import ValidationError

from model.drawing.report import write_run_report
from model.images.reader_pool import Readers
from model.pipeline.case_runner import Stopped, StopRequest, answer_case, frame_folder
from model.pipeline.cases import InputCase, InputError, find_cases
from model.pipeline.options import RunOptions
from model.predictor import Predictor
from model.results.files import PICTURE, OutputError
from model.results.journal import Journal, settings_of
from model.results.schemas import CaseEntry, LeftOut, RunSummary


@dataclass(frozen=True)
class LoadedModel:
    """A predictor, and the file that results.json names as its model."""

    predictor: Predictor
    file: Path
    sha256: str


@dataclass
class Tally:
    """Counts of entries, one for each single image and for each frame of a stack.

    doubtful: among the answered ones. late: took longer than the latency budget.
    """

    answered: int = 0
    failed: int = 0
    doubtful: int = 0
    late: int = 0
    first_failure: CaseEntry | None = None


@dataclass(frozen=True)
class Selection:
    """The cases of a run, and by suffix the files that were left out because they are no images."""

    cases: list[InputCase]
    left_out: dict[str, LeftOut]


def print_line(text: str) -> None:
    """Print a line of progress. The run goes on if stdout takes nothing."""
    try:
        print(text, flush=True)
    except OSError:  # for instance, the disk of the log is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_batch(
    model: LoadedModel,
    options: RunOptions,
    selection: Selection,
    stop: StopRequest,
    readers: Readers,
    workers: int = 1,
) -> tuple[int, str]:
    """Answer these cases and write the results; returns the exit status and what went wrong.

    Args:
        workers: number of cases answered at a time.

    Raises:
        OutputError: the output folder cannot be used, or the report cannot be written.
    """
    start, cases = time.perf_counter(), selection.cases
    if options.overlay is None:
        options = replace(options, overlay=not any(case.is_job for case in cases))
    summary = summarise_settings(model, options)
    files = {case.name: case.file for case in cases}
    by_name = {case.name: case for case in cases}
    is_current = partial(_is_current, by_name, options) if options.resume else None
    settings = settings_of(vars(summary))
    journal = Journal(options.output, options.run_files, settings, files, is_current)
    if journal.done:
        print_line(f"{len(journal.done)} of {len(cases)} cases are answered already")
    try:
        answer_cases(cases, model.predictor, options, journal, stop, readers, workers)
        if stop.signal is not None and len(journal.done) < len(cases):
            return 128 + stop.signal, _stop_sentence(stop.signal, len(journal.done), len(cases))
        tally = count_outcomes(journal.entries())
        counts = {name: getattr(tally, name) for name in ("answered", "failed", "doubtful")}
        journal.finish(summary.model_copy(update={"left_out": selection.left_out, **counts}))
    except ValidationError:
        sentence = f"{options.output / options.run_files.journal} was changed from outside"
        return 2, f"{sentence} during the run; leave that file alone, then run again with --resume"
    except OSError as error:
        names = f"{options.run_files.results} and {options.run_files.table}"
        sentence = f"{names} could not be written to {options.output} ({error.strerror})"
        return 2, f"{sentence}; free space or mend the folder, then run again with --resume"
    finally:
        journal.close()
    written = ", ".join(
        str(options.output / name) for name in (options.run_files.results, options.run_files.table)
    )
    print_line(f"wrote {written} after {time.perf_counter() - start:.1f} s")
    return conclude_run(tally, options, cases[0].is_job if cases else False)


def select_cases(options: RunOptions) -> Selection:
    """The cases of the input folder, or with --shard those of this part.

    Raises:
        InputError: the input has no case, or --shard is given for a job.
    """
    skipped: dict[str, list[str]] = {}
    cases = find_cases(options.input, options.output, skipped)
    left_out = {
        suffix: LeftOut(count=len(files), first=files[0])
        for suffix, files in sorted(skipped.items())
    }
    if left_out:
        counts = (f"{name} {some.count} (first {some.first!r})" for name, some in left_out.items())
        print_line(f"left out files that are no images: {', '.join(counts)}")
    outside = sum(not case.file.startswith("images/") for case in cases)
    if outside and any(fnmatchcase(case.file, "images/?*/?*") for case in cases):
        print_line(f"{outside} images lie outside images/NAME/, so the whole folder is read")
    if options.shard is None:
        return Selection(cases, left_out)
    if cases[0].is_job:
        raise InputError("--shard divides a folder of images, but the input is a job; leave it out")
    part = [case for case in cases if options.shard.holds(case.file)]
    print_line(f"part {options.shard}: {len(part)} of {len(cases)} cases")
    return Selection(part, left_out)


def answer_cases(
    cases: Sequence[InputCase],
    predictor: Predictor,
    options: RunOptions,
    journal: Journal,
    stop: StopRequest,
    readers: Readers,
    workers: int,
) -> None:
    """Answer the cases that the journal lacks, until all are done or a stop is requested.

    The progress lines count the answered cases, in whatever order they are answered.

    Args:
        workers: number of cases answered at a time. While one waits for its file or for Python's
            lock, others compute.
    """
    done = journal.done
    waiting = iter([case for case in cases if case.name not in done])
    ended = len(done)
    lock = Lock()  # guards `waiting`, `ended` and the journal

    def record(entry: CaseEntry) -> None:
        journal.add(entry)
        print_line(f"[{ended + 1}/{len(cases)}] {_progress_line(entry)}")

    def work() -> None:
        nonlocal ended
        while stop.signal is None:
            with lock:
                case = next(waiting, None)
            if case is None:
                return
            entries: list[CaseEntry] = []
            keep = entries.append if workers > 1 else record
            with readers.admit(_file_bytes(case.path)) as admitted:
                loop = answer_case(case, predictor, options, journal, keep, admitted, stop)
            with lock:  # the journal keeps the entries of a case together
                for entry in entries:
                    record(entry)
                journal.end(case.name, loop)
                ended += 1

    if workers > 1:
        cv2.setNumThreads(1)
    with suppress(Stopped), ThreadPoolExecutor(workers) as pool:
        try:
            working = {pool.submit(work) for _ in range(workers)}
            while working:  # waking up each second lets the main thread handle signals
                finished, working = wait(working, 1, FIRST_COMPLETED)
                for worker in finished:
                    worker.result()
        finally:  # after an error in one worker, the others find nothing left to do
            with lock:
                deque(waiting, maxlen=0)


def _file_bytes(path: Path) -> int:
    """Size of a case's file, or of all files in its folder; 0 if it cannot be read."""
    try:
        return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    except OSError:
        return 0


def _is_current(cases: Mapping[str, InputCase], options: RunOptions, entry: CaseEntry) -> bool:
    """Whether all files of an earlier run's answer exist and are newer than their image."""
    case = cases[entry.case]
    top = options.output / case.folder
    folder = frame_folder(top, entry.frame)
    answers = [(top if case.is_job else folder) / name for name in options.files.answers]
    if options.report:
        answers.append(folder / PICTURE)
    try:
        images = [*case.path.iterdir()] if case.path.is_dir() else [case.path]
        newest = max(max(s.st_mtime_ns, s.st_ctime_ns) for s in map(Path.stat, images))
        return all(answer.stat().st_mtime_ns >= newest for answer in answers)
    except (OSError, ValueError):
        return False


def summarise_settings(model: LoadedModel, options: RunOptions) -> RunSummary:
    """The head of results.json: model and settings. The counts are still 0."""
    spec = model.predictor.spec
    return RunSummary(
        model=spec.name,
        model_file=model.file.name,
        model_sha256=model.sha256,
        provider=model.predictor.provider,
        settings={
            "decode": options.decode or spec.decode,
            "frame_of_answers": options.frame_of_answers,
            "overlay": options.overlay,
            "mirror": options.mirror,
            "latency_budget_ms": options.latency_budget_ms,
            "landmarks_file": options.files.landmarks,
            "angle_file": options.files.angle,
            "three_points_file": options.files.three_points,
        },
        shard=str(options.shard) if options.shard else None,
        answered=0,
        failed=0,
        doubtful=0,
    )


def count_outcomes(entries: Iterable[CaseEntry]) -> Tally:
    """Count the entries by what became of them."""
    tally = Tally()
    for entry in entries:
        tally.answered += entry.status == "ok"
        tally.failed += entry.status == "failed"
        tally.doubtful += bool(entry.doubtful)
        tally.late += any("latency budget" in text for text in entry.warnings)
        if entry.status == "failed" and tally.first_failure is None:
            tally.first_failure = entry
    return tally


def conclude_run(tally: Tally, options: RunOptions, is_job: bool = False) -> tuple[int, str]:
    """Write the report and print the counts; returns the exit status and what went wrong.

    Raises:
        OutputError: the report cannot be written.
    """
    _update_report(options, is_job)
    count = tally.answered + tally.failed
    print_line(
        f"{tally.answered} answered, {tally.doubtful} of them doubtful; {tally.failed} failed"
    )
    if tally.late:
        print_line(f"{tally.late} took longer than the latency budget")
    if tally.first_failure is None:
        return 0, ""
    first = f"{_entry_name(tally.first_failure)!r}: {tally.first_failure.error}"
    if count == 1:
        return 1, f"the case failed: {first}"
    rest = f"; {options.run_files.results} names the others" if tally.failed > 1 else ""
    return 1, f"{tally.failed} of {count} cases failed, the first is {first}{rest}"


def _update_report(options: RunOptions, is_job: bool) -> None:
    """Write report.html from results.json, or without --report remove an earlier run's."""
    path = options.output / options.run_files.report
    try:
        if options.report:
            write_run_report(options.output, options.run_files, is_job)
            print_line(f"report {path}")
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path} could not be written ({error.strerror}), but all other results were; "
            "free space or mend the folder, then run again with --resume"
        ) from error


def _stop_sentence(number: int, done: int, count: int) -> str:
    name = signal.Signals(number).name
    return f"stopped by {name} after {done} of {count} cases; run again with --resume"


def _entry_name(entry: CaseEntry) -> str:
    return entry.file if entry.frame is None else f"{entry.file} frame {entry.frame}"


def _progress_line(entry: CaseEntry) -> str:
    if entry.aop_deg is None:
        return f"{_entry_name(entry)!r}: FAILED: {entry.error}"
    doubt = f"  not sure: {'; '.join(entry.reasons)}" if entry.doubtful else ""
    return f"{_entry_name(entry)!r}: AoP {entry.aop_deg:.1f} deg{doubt}"
