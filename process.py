"""Landmarks and the angle of progression (AoP) for every image in an input folder.

    python process.py --input DIR --output DIR

Reads a grand-challenge job (inputs.json), images/<slug>/, or any folder of images. Writes for each
case aop-landmarks.json, angle-of-progression.json and overlay.png, and for the run results.json and
landmarks.csv. Exit status: 0 every case answered (doubtful ones too), 1 some case failed, 2 nothing
could be done; the last line of stderr then says why.
"""

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from model.image import BadFrame, GreyFrame
from model.jobs import Case, InputError, find_cases
from model.measure import bad_frame, failed_entry, measure, points_of, within_budget
from model.options import MOUNTED_MODELS, parse_options
from model.outputs import (
    OVERLAY,
    RESULTS,
    TABLE,
    CaseEntry,
    NamedPoint,
    OutputError,
    Results,
    csv_text,
    open_output,
    write_bytes,
    write_json,
)
from model.overlay import overlay_png
from model.predictor import ModelError, Predictor, load_predictor

SHIPPED_MODEL = Path(__file__).resolve().parent / "model" / "weights" / "aop.onnx"

Answer = tuple[CaseEntry, list[NamedPoint]]  # of a frame; no points where it failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parse_options(arguments, __doc__)
    start = time.perf_counter()
    try:
        cases = find_cases(args.input, args.output)
        args.model = args.model or model_file()
        predictor = load_predictor(args.model, args.provider)
        open_output(args.output)
    except (InputError, ModelError, OutputError) as error:
        return _say(str(error), 2)
    if args.overlay is None:
        args.overlay = not cases[0].is_job
    print(f"{len(cases)} cases, model {predictor.spec.name} on {predictor.provider}", flush=True)
    entries: list[CaseEntry] = []
    for number, case in enumerate(cases, 1):
        for entry in answer_case(case, predictor, args):
            entries.append(within_budget(entry, args.latency_budget_ms))
            print(f"[{number}/{len(cases)}] {_line(entry)}", flush=True)
    try:
        write_run(entries, predictor, args)
    except OSError as error:
        return _say(f"{args.output}: {RESULTS} and {TABLE} not written ({error.strerror})", 1)
    print(f"{time.perf_counter() - start:.1f} s; {args.output / RESULTS}, {args.output / TABLE}")
    return _conclude(entries, args)


def model_file() -> Path:
    """The one *.onnx under /opt/ml/model, else the shipped one.

    Raises:
        ModelError: several are mounted.
    """
    mounted = sorted(MOUNTED_MODELS.rglob("[!.]*.onnx"))  # macOS packs a ._aop.onnx beside it
    if len(mounted) > 1:
        names = ", ".join(str(path.relative_to(MOUNTED_MODELS)) for path in mounted)
        raise ModelError(f"{MOUNTED_MODELS} holds several models ({names}); choose one by --model")
    return mounted[0] if mounted else SHIPPED_MODEL


def answer_case(case: Case, predictor: Predictor, args: argparse.Namespace) -> Iterator[CaseEntry]:
    """Predict and write one case; an entry a frame. What goes wrong stays in the entry it is of."""
    top = args.output / case.folder
    try:
        args.files.remove(top)
    except OSError as error:
        yield bad_frame(case.name, case.file, BadFrame(None, _unwritten(error)))
        return
    of_job: list[Answer] = []
    for frame, read_ms in case.frames():
        folder = top if frame.index is None else top / f"frame-{frame.index:04d}"
        answer = answer_frame(case, frame, read_ms, folder, predictor, args)
        if case.is_job:  # there, all frames share one answer
            of_job.append(answer)
        else:
            yield from write_answers(folder, [answer], args)
    yield from write_answers(top, of_job, args)


def answer_frame(
    case: Case,
    frame: GreyFrame | BadFrame,
    read_ms: float,
    folder: Path,
    predictor: Predictor,
    args: argparse.Namespace,
) -> Answer:
    """Predict one frame and draw its overlay."""
    if isinstance(frame, BadFrame):
        return bad_frame(case.name, case.file, frame), []
    entry = measure(case.name, case.file, frame, predictor, args.decode)
    if entry.status == "failed":
        return entry, []
    start = time.perf_counter()
    if args.overlay:
        try:
            write_bytes(folder / OVERLAY, overlay_png(frame, entry))
        except OSError as error:
            return failed_entry(entry, _unwritten(error)), []
    stages = {"read": read_ms, **entry.milliseconds, "overlay": _ms_since(start)}
    entry = entry.model_copy(update={"milliseconds": stages})
    return entry, points_of(entry, frame, args.frame_of_answers == "world")


def write_answers(
    folder: Path, answers: Sequence[Answer], args: argparse.Namespace
) -> list[CaseEntry]:
    """Write what grand-challenge reads, one answer for all frames; returns their entries."""
    angles = [entry.aop_deg for entry, _ in answers if entry.aop_deg is not None]
    if not angles:
        return [entry for entry, _ in answers]
    start = time.perf_counter()
    try:
        args.files.write(folder, angles, [point for _, points in answers for point in points])
    except OSError as error:
        with contextlib.suppress(OSError):  # what cannot be written cannot be removed either
            args.files.remove(folder)
        return [failed_entry(e, _unwritten(error)) if points else e for e, points in answers]
    write_ms = _ms_since(start) / len(angles)
    for entry, points in answers:
        if points:
            entry.milliseconds["write"] = write_ms
    return [entry for entry, _ in answers]


def write_run(entries: list[CaseEntry], predictor: Predictor, args: argparse.Namespace) -> None:
    """results.json and landmarks.csv."""
    results = Results(
        model=predictor.spec.name,
        model_file=args.model.name,
        provider=predictor.provider,
        settings={
            "decode": args.decode or predictor.spec.decode,
            "frame_of_answers": args.frame_of_answers,
            "overlay": args.overlay,
            "latency_budget_ms": args.latency_budget_ms,
        },
        answered=sum(entry.status == "ok" for entry in entries),
        failed=sum(entry.status == "failed" for entry in entries),
        doubtful=sum(bool(entry.doubtful) for entry in entries),
        cases=entries,
    )
    write_json(args.output / RESULTS, results)
    write_bytes(args.output / TABLE, csv_text(entries).encode())


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1000


def _unwritten(error: OSError) -> str:
    return f"the answer could not be written: {error.strerror}"


def _label(entry: CaseEntry) -> str:
    return entry.file if entry.frame is None else f"{entry.file} frame {entry.frame}"


def _line(entry: CaseEntry) -> str:
    """One line of progress."""
    if entry.aop_deg is None:
        return f"{_label(entry)!r}: FAILED: {entry.error}"
    doubt = f"  not sure: {'; '.join(entry.reasons)}" if entry.doubtful else ""
    return f"{_label(entry)!r}: AoP {entry.aop_deg:.1f} deg{doubt}"


def _conclude(entries: list[CaseEntry], args: argparse.Namespace) -> int:
    """Print the summary; returns the exit status."""
    failures = [entry for entry in entries if entry.status == "failed"]
    doubtful = sum(bool(entry.doubtful) for entry in entries)
    late = sum(any("latency budget" in text for text in entry.warnings) for entry in entries)
    answered = len(entries) - len(failures)
    print(f"{answered} answered, of them {doubtful} doubtful; {len(failures)} failed")
    if late:
        print(f"{late} took longer than the latency budget of {args.latency_budget_ms:g} ms")
    if not failures:
        return 0
    first = f"{_label(failures[0])!r}: {failures[0].error}"
    if len(entries) == 1:
        return _say(f"the case failed: {first}", 1)
    rest = f"; {RESULTS} names the others" if len(failures) > 1 else ""
    return _say(f"{len(failures)} of {len(entries)} cases failed, the first is {first}{rest}", 1)


def _say(sentence: str, status: int) -> int:
    """The last line of stderr, which grand-challenge shows to the user; returns the status."""
    print(" ".join(sentence.split()), file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's strange name must not end the run
        sys.stdout.reconfigure(errors="backslashreplace")
    raise SystemExit(main())
