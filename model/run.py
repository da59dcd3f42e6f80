"""One run: every case of the input folder, results.json and landmarks.csv."""

import argparse
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import cv2
from pydantic import ValidationError

from model.answer import answer_case
from model.files import PICTURE, OutputError
from model.jobs import Case, InputError, find_cases
from model.journal import Journal, settings_of
from model.outputs import CaseEntry, RunSummary
from model.predictor import Predictor
from model.reading import alone
from model.report import write_report

STOPPED_BY: list[int] = []  # signals; looked at between frames, so that what is written is whole


class Stopped(Exception):
    """The run was asked to stop between two frames of a stack."""


@dataclass
class Tally:
    """What came of a run's cases, an entry each, or one a frame."""

    answered: int = 0
    failed: int = 0
    doubtful: int = 0
    late: int = 0
    first_failure: CaseEntry | None = None


def tell(text: str) -> None:
    """Print a line; whoever reads them may stop listening, the run goes on."""
    try:
        print(text, flush=True)
    except OSError:  # as when the disk of the log is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(predictor: Predictor, args: argparse.Namespace, cases: Sequence[Case]) -> tuple[int, str]:
    """Answer these cases of the input folder; returns the exit status, and what is wrong.

    Raises:
        InputError, OutputError: nothing can be done.
    """
    start = time.perf_counter()
    args = argparse.Namespace(**vars(args))
    if args.overlay is None:
        args.overlay = not any(case.is_job for case in cases)
    summary = summary_of(predictor, args)
    files = {case.name: case.file for case in cases}
    by_name = {case.name: case for case in cases}
    holds = (lambda entry: _holds(by_name[entry.case], entry, args)) if args.resume else None
    journal = Journal(args.output, args.run_files, settings_of(vars(summary)), files, holds)
    if journal.done:
        tell(f"{len(journal.done)} of {len(cases)} cases are answered already")
    try:
        answer_cases(cases, predictor, args, journal)
        if STOPPED_BY and len(journal.done) < len(cases):
            return stopped(len(journal.done), len(cases))
        tally = tally_of(journal.entries())
        counts = {name: getattr(tally, name) for name in ("answered", "failed", "doubtful")}
        journal.finish(summary.model_copy(update=counts))
    except ValidationError:
        sentence = f"{args.output / args.run_files.journal} was changed from outside"
        return 2, f"{sentence}; leave it alone, then --resume"
    except OSError as error:
        names = f"{args.run_files.results} and {args.run_files.table}"
        sentence = f"{args.output}: {names} not written ({error.strerror}); mend it, then --resume"
        return 2, sentence
    finally:
        journal.close()
    written = ", ".join(
        str(args.output / name) for name in (args.run_files.results, args.run_files.table)
    )
    tell(f"{time.perf_counter() - start:.1f} s; {written}")
    return conclude(tally, args, cases[0].is_job if cases else False)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """The cases of the input folder, or of this part of it."""
    passed_over: Counter[str] = Counter()
    cases = find_cases(args.input, args.output, passed_over)
    if passed_over:
        found = ", ".join(f"{suffix} {count}" for suffix, count in sorted(passed_over.items()))
        tell(f"passed over files that are no image by their name: {found}")
    if args.shard is None:
        return cases
    if cases[0].is_job:
        raise InputError("--shard divides a folder of images, but this is a job: leave it out")
    held = [case for case in cases if args.shard.holds(case.file)]
    tell(f"part {args.shard}: {len(held)} of {len(cases)} cases")
    return held


def answer_cases(
    cases: Sequence[Case], predictor: Predictor, args: argparse.Namespace, journal: Journal
) -> None:
    """Answer the cases that the journal does not have, until all are done or a signal came.

    `args.at_once` cases at a time: while one waits for its file, or for Python, others compute.
    """
    done = journal.done
    waiting = iter([item for item in enumerate(cases, 1) if item[1].name not in done])
    turn = Lock()

    def record(number: int, entry: CaseEntry) -> None:
        journal.add(entry)
        tell(f"[{number}/{len(cases)}] {_line(entry)}")

    def work() -> None:
        while not STOPPED_BY:
            with turn:
                number, case = next(waiting, (0, None))
            if case is None:
                return
            entries: list[CaseEntry] = []
            take = entries.append if args.at_once > 1 else partial(record, number)
            with alone(_size(case.path)):
                loop = answer_case(case, predictor, args, journal, take, _pause)
            with turn:  # a case's entries stand together in the journal
                for entry in entries:
                    record(number, entry)
                journal.end(case.name, loop)

    if args.at_once > 1:
        cv2.setNumThreads(1)
    with suppress(Stopped), ThreadPoolExecutor(args.at_once) as pool:
        try:
            working = {pool.submit(work) for _ in range(args.at_once)}
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


def _pause() -> None:
    if STOPPED_BY:
        raise Stopped


def _holds(case: Case, entry: CaseEntry, args: argparse.Namespace) -> bool:
    """Whether an earlier run's answer is there, and newer than its image."""
    top = folder = args.output / case.folder
    if entry.frame is not None:
        folder = top / f"frame-{entry.frame:04d}"
    answers = [(top if case.is_job else folder) / name for name in args.files.answers]
    if args.report:
        answers.append(folder / PICTURE)
    try:
        images = [*case.path.iterdir()] if case.path.is_dir() else [case.path]
        newest = max(max(s.st_mtime_ns, s.st_ctime_ns) for s in map(Path.stat, images))
        return all(answer.stat().st_mtime_ns >= newest for answer in answers)
    except (OSError, ValueError):
        return False


def summary_of(predictor: Predictor, args: argparse.Namespace) -> RunSummary:
    """How the run is made; its numbers are not known yet."""
    return RunSummary(
        model=predictor.spec.name,
        model_file=args.model.name,
        model_sha256=args.model_sha256,
        provider=predictor.provider,
        settings={
            "decode": args.decode or predictor.spec.decode,
            "frame_of_answers": args.frame_of_answers,
            "overlay": args.overlay,
            "mirror": args.mirror,
            "latency_budget_ms": args.latency_budget_ms,
            "landmarks_file": args.files.landmarks,
            "angle_file": args.files.angle,
            "three_points_file": args.files.three_points,
        },
        shard=str(args.shard) if args.shard else None,
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


def conclude(tally: Tally, args: argparse.Namespace, is_job: bool = False) -> tuple[int, str]:
    """Write the report, print the summary; returns the exit status and what is wrong.

    Raises:
        OutputError: the report cannot be written.
    """
    _report(args, is_job)
    count = tally.answered + tally.failed
    tell(f"{tally.answered} answered, of them {tally.doubtful} doubtful; {tally.failed} failed")
    if tally.late:
        tell(f"{tally.late} took longer than the latency budget")
    if tally.first_failure is None:
        return 0, ""
    first = f"{_label(tally.first_failure)!r}: {tally.first_failure.error}"
    if count == 1:
        return 1, f"the case failed: {first}"
    rest = f"; {args.run_files.results} names the others" if tally.failed > 1 else ""
    return 1, f"{tally.failed} of {count} cases failed, the first is {first}{rest}"


def _report(args: argparse.Namespace, is_job: bool) -> None:
    """Write the page of what results.json now says, or remove that of an earlier run."""
    path = args.output / args.run_files.report
    try:
        if args.report:
            write_report(args.output, args.run_files, is_job)
            tell(f"report {path}")
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path} not written ({error.strerror}), all else was; mend it, then --resume"
        ) from error


def stopped(done: int, count: int) -> tuple[int, str]:
    """What is said after a signal."""
    name = signal.Signals(STOPPED_BY[0]).name
    sentence = f"stopped by {name} after {done} of {count} cases; run it again with --resume"
    return 128 + STOPPED_BY[0], sentence


def _label(entry: CaseEntry) -> str:
    return entry.file if entry.frame is None else f"{entry.file} frame {entry.frame}"


def _line(entry: CaseEntry) -> str:
    """One line of progress."""
    if entry.aop_deg is None:
        return f"{_label(entry)!r}: FAILED: {entry.error}"
    doubt = f"  not sure: {'; '.join(entry.reasons)}" if entry.doubtful else ""
    return f"{_label(entry)!r}: AoP {entry.aop_deg:.1f} deg{doubt}"
