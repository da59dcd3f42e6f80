"""One run: every case of the input folder, results.json and landmarks.csv."""

import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock

import cv2
from pydantic import ValidationError

from model.drawing.report import write_report
from model.images.limits import MemoryBudget
from model.pipeline.case_runner import Stopped, StopRequest, answer_case, frame_folder
from model.pipeline.cases import Case, InputError, find_cases
from model.pipeline.options import RunOptions
from model.predictor import Predictor
from model.results.files import PICTURE, OutputError
from model.results.journal import Journal, settings_of
from model.results.schemas import CaseEntry, RunSummary


@dataclass(frozen=True)
class LoadedModel:
    """A model that can answer, and what the answers say of its file."""

    predictor: Predictor
    file: Path
    sha256: str


@dataclass
class Tally:
    """How many cases, or frames of stacks, came to what."""

    answered: int = 0
    failed: int = 0
    doubtful: int = 0
    late: int = 0
    first_failure: CaseEntry | None = None


def print_line(text: str) -> None:
    """Print a line of progress. The run goes on if nobody can read it."""
    try:
        print(text, flush=True)
    except OSError:  # as when the disk of the log is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(
    model: LoadedModel,
    options: RunOptions,
    cases: Sequence[Case],
    stop: StopRequest,
    at_once: int = 1,
) -> tuple[int, str]:
    """Answer these cases of the input folder; returns the exit status, and what is wrong.

    Args:
        at_once: cases at a time.

    Raises:
        InputError, OutputError: nothing can be done.
    """
    start = time.perf_counter()
    if options.overlay is None:
        options = replace(options, overlay=not any(case.is_job for case in cases))
    summary = summary_of(model, options)
    files = {case.name: case.file for case in cases}
    by_name = {case.name: case for case in cases}
    holds = partial(_is_current, by_name, options) if options.resume else None
    journal = Journal(options.output, options.run_files, settings_of(vars(summary)), files, holds)
    if journal.done:
        print_line(f"{len(journal.done)} of {len(cases)} cases are answered already")
    try:
        answer_cases(cases, model.predictor, options, journal, stop, at_once)
        if stop.signal is not None and len(journal.done) < len(cases):
            return 128 + stop.signal, _stop_sentence(stop.signal, len(journal.done), len(cases))
        tally = tally_of(journal.entries())
        counts = {name: getattr(tally, name) for name in ("answered", "failed", "doubtful")}
        journal.finish(summary.model_copy(update=counts))
    except ValidationError:
        sentence = f"{options.output / options.run_files.journal} was changed from outside"
        return 2, f"{sentence}; leave it alone, then --resume"
    except OSError as error:
        unwritten = f"{options.run_files.results} and {options.run_files.table} not written"
        return 2, f"{options.output}: {unwritten} ({error.strerror}); mend it, then --resume"
    finally:
        journal.close()
    written = ", ".join(
        str(options.output / name) for name in (options.run_files.results, options.run_files.table)
    )
    print_line(f"{time.perf_counter() - start:.1f} s; {written}")
    return conclude(tally, options, cases[0].is_job if cases else False)


def cases_of(options: RunOptions) -> list[Case]:
    """The cases of the input folder, or of this part of it."""
    passed_over: Counter[str] = Counter()
    cases = find_cases(options.input, options.output, passed_over)
    if passed_over:
        found = ", ".join(f"{suffix} {count}" for suffix, count in sorted(passed_over.items()))
        print_line(f"passed over files that are no image by their name: {found}")
    if options.shard is None:
        return cases
    if cases[0].is_job:
        raise InputError("--shard divides a folder of images, but this is a job: leave it out")
    part = [case for case in cases if options.shard.holds(case.file)]
    print_line(f"part {options.shard}: {len(part)} of {len(cases)} cases")
    return part


def answer_cases(
    cases: Sequence[Case],
    predictor: Predictor,
    options: RunOptions,
    journal: Journal,
    stop: StopRequest,
    at_once: int,
) -> None:
    """Answer the cases that the journal does not have, until all are done or a stop is requested.

    Args:
        at_once: cases at a time. While one waits for its file, or for Python, others compute.
    """
    budget = MemoryBudget()
    done = journal.done
    waiting = iter([item for item in enumerate(cases, 1) if item[1].name not in done])
    turn = Lock()

    def record(number: int, entry: CaseEntry) -> None:
        journal.add(entry)
        print_line(f"[{number}/{len(cases)}] {_line(entry)}")

    def work() -> None:
        while stop.signal is None:
            with turn:
                number, case = next(waiting, (0, None))
            if case is None:
                return
            entries: list[CaseEntry] = []
            take = entries.append if at_once > 1 else partial(record, number)
            with budget.admit(_size(case.path)) as admitted:
                loop = answer_case(case, predictor, options, journal, take, admitted, stop)
            with turn:  # a case's entries stand together in the journal
                for entry in entries:
                    record(number, entry)
                journal.end(case.name, loop)

    if at_once > 1:
        cv2.setNumThreads(1)
    with suppress(Stopped), ThreadPoolExecutor(at_once) as pool:
        try:
            working = {pool.submit(work) for _ in range(at_once)}
            while working:  # a signal that hit another thread is looked at within a second
                ended, working = wait(working, 1, FIRST_COMPLETED)
                for worker in ended:
                    worker.result()
        finally:  # after an error the others stop too
            with turn:
                deque(waiting, maxlen=0)


def _size(path: Path) -> int:
    """Bytes of a case's file, or of its folder's; 0 where it cannot be told."""
    try:
        return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    except OSError:
        return 0


def _is_current(cases: Mapping[str, Case], options: RunOptions, entry: CaseEntry) -> bool:
    """Whether an earlier run's answer is there, and newer than its image."""
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


def summary_of(model: LoadedModel, options: RunOptions) -> RunSummary:
    """How the run is made. Its counts are not known yet."""
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


def tally_of(entries: Iterable[CaseEntry]) -> Tally:
    """Count what came of the cases."""
    tally = Tally()
    for entry in entries:
        tally.answered += entry.status == "ok"
        tally.failed += entry.status == "failed"
        tally.doubtful += bool(entry.doubtful)
        tally.late += any("latency budget" in text for text in entry.warnings)
        if entry.status == "failed" and tally.first_failure is None:
            tally.first_failure = entry
    return tally


def conclude(tally: Tally, options: RunOptions, is_job: bool = False) -> tuple[int, str]:
    """Write the report, print the summary; returns the exit status and what is wrong.

    Raises:
        OutputError: the report cannot be written.
    """
    _report(options, is_job)
    count = tally.answered + tally.failed
    print_line(
        f"{tally.answered} answered, of them {tally.doubtful} doubtful; {tally.failed} failed"
    )
    if tally.late:
        print_line(f"{tally.late} took longer than the latency budget")
    if tally.first_failure is None:
        return 0, ""
    first = f"{_label(tally.first_failure)!r}: {tally.first_failure.error}"
    if count == 1:
        return 1, f"the case failed: {first}"
    rest = f"; {options.run_files.results} names the others" if tally.failed > 1 else ""
    return 1, f"{tally.failed} of {count} cases failed, the first is {first}{rest}"


def _report(options: RunOptions, is_job: bool) -> None:
    """Write the page of what results.json now says, or remove that of an earlier run."""
    path = options.output / options.run_files.report
    try:
        if options.report:
            write_report(options.output, options.run_files, is_job)
            print_line(f"report {path}")
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path} not written ({error.strerror}), all else was; mend it, then --resume"
        ) from error


def _stop_sentence(number: int, done: int, count: int) -> str:
    name = signal.Signals(number).name
    return f"stopped by {name} after {done} of {count} cases; run it again with --resume"


def _label(entry: CaseEntry) -> str:
    return entry.file if entry.frame is None else f"{entry.file} frame {entry.frame}"


def _line(entry: CaseEntry) -> str:
    """One line of progress."""
    if entry.aop_deg is None:
        return f"{_label(entry)!r}: FAILED: {entry.error}"
    doubt = f"  not sure: {'; '.join(entry.reasons)}" if entry.doubtful else ""
    return f"{_label(entry)!r}: AoP {entry.aop_deg:.1f} deg{doubt}"
