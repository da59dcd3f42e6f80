"""Landmarks and the angle of progression (AoP) for every image in an input folder.

    python process.py --input DIR --output DIR

Reads a grand-challenge job (inputs.json), images/<slug>/, or any folder of images. Writes for each
case aop-landmarks.json, angle-of-progression.json and overlay.png, and for the run results.json and
landmarks.csv. Exit status: 0 every case answered (doubtful ones too), 1 some case failed, 2 nothing
could be done; the last line of stderr then says why.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from model.image import BadFrame, GreyFrame, ImageError, open_image
from model.jobs import Case, InputError, find_cases
from model.measure import bad_frame, failed_entry, measure, points_of
from model.outputs import (
    CaseEntry,
    MultiplePoints,
    NamedPoint,
    Results,
    csv_text,
    three_point_angle,
    write_bytes,
    write_json,
)
from model.overlay import overlay_png
from model.predictor import ModelError, Predictor, load_predictor

INPUT = Path("/input")
OUTPUT = Path("/output")
MOUNTED_MODELS = Path("/opt/ml/model")
SHIPPED_MODEL = Path(__file__).resolve().parent / "model" / "weights" / "aop.onnx"
RESULTS, TABLE, OVERLAY = "results.json", "landmarks.csv", "overlay.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(arguments)
    start = time.perf_counter()
    try:
        cases = find_cases(args.input)
        predictor = load_predictor(args.model or model_file(), args.provider)
        args.output.mkdir(parents=True, exist_ok=True)
        for name in (RESULTS, TABLE):  # also finds out, before hours of work, if it can be written
            write_bytes(args.output / name, b"")
            (args.output / name).unlink()
    except (InputError, ModelError) as error:
        return _say(str(error), 2)
    except OSError as error:
        return _say(
            f"{args.output} cannot be written ({error.strerror}); mount a writable folder", 2
        )
    if args.overlay is None:
        args.overlay = not cases[0].is_job
    print(f"{len(cases)} cases, model {predictor.spec.name} on {predictor.provider}", flush=True)
    entries: list[CaseEntry] = []
    for number, case in enumerate(cases, 1):
        for entry in answer_case(case, predictor, args):
            entries.append(entry)
            print(f"[{number}/{len(cases)}] {_line(entry)}", flush=True)
    try:
        write_run(entries, predictor, args)
    except OSError as error:
        return _say(f"{args.output}: {RESULTS} and {TABLE} not written ({error.strerror})", 1)
    print(f"{time.perf_counter() - start:.1f} s; {args.output / RESULTS}, {args.output / TABLE}")
    return _conclude(entries, args)


def model_file() -> Path:
    """The one *.onnx that is mounted at /opt/ml/model, else the shipped one.

    Raises:
        ModelError: several are mounted.
    """
    mounted = sorted(MOUNTED_MODELS.glob("*.onnx"))
    if len(mounted) > 1:
        names = ", ".join(path.name for path in mounted)
        raise ModelError(f"{MOUNTED_MODELS} holds several models ({names}); choose one by --model")
    return mounted[0] if mounted else SHIPPED_MODEL


def answer_case(case: Case, predictor: Predictor, args: argparse.Namespace) -> Iterator[CaseEntry]:
    """Predict and write one case; an entry a frame. What goes wrong stays in the entry it is of."""
    top = args.output / case.folder
    points: list[NamedPoint] = []
    angles: list[float] = []
    _forget(top, args)
    for frame, read_ms in _read(case.path):
        folder = top if frame.index is None else top / f"frame-{frame.index:04d}"
        _forget(folder, args)
        if isinstance(frame, BadFrame):
            yield bad_frame(case.name, case.file, frame)
            continue
        entry = measure(case.name, case.file, frame, predictor, args.decode)
        stages = {"read": read_ms, **entry.milliseconds}
        start = time.perf_counter()
        if entry.aop_deg is not None:
            if not case.is_job:  # there, all frames share one answer
                points, angles = [], []
            points += points_of(entry, frame, args.frame_of_answers == "world")
            angles.append(entry.aop_deg)
            try:
                answer_folder = top if case.is_job else folder
                write_answers(answer_folder, points, statistics.median(angles), args)
                if args.overlay:
                    write_bytes(folder / OVERLAY, overlay_png(frame, entry))
            except OSError as error:
                entry = failed_entry(entry, f"the answer could not be written: {error.strerror}")
        stages["write"] = (time.perf_counter() - start) * 1000
        yield _within_budget(entry.model_copy(update={"milliseconds": stages}), args)


def _read(path: Path) -> Iterator[tuple[GreyFrame | BadFrame, float]]:
    """The case's frames and the ms that reading each took; an unusable file is one bad frame."""
    start = time.perf_counter()
    try:
        for frame in open_image(path).frames():
            yield frame, (time.perf_counter() - start) * 1000
            start = time.perf_counter()
    except (ImageError, OSError) as error:
        yield BadFrame(None, getattr(error, "strerror", None) or str(error)), 0.0


def write_answers(
    folder: Path, points: list[NamedPoint], angle_deg: float, args: argparse.Namespace
) -> None:
    """The files that grand-challenge reads; of several frames all points and the median angle."""
    write_json(folder / args.landmarks_file, MultiplePoints(points=points))
    write_bytes(folder / args.angle_file, f"{angle_deg}\n".encode())
    if args.three_points_file:
        write_json(folder / args.three_points_file, three_point_angle(points[-3:]))


def _forget(folder: Path, args: argparse.Namespace) -> None:
    """Remove an earlier run's answers, lest they pass for those of a case that now fails."""
    for name in (args.landmarks_file, args.angle_file, args.three_points_file, OVERLAY):
        if name:
            (folder / name).unlink(missing_ok=True)


def _within_budget(entry: CaseEntry, args: argparse.Namespace) -> CaseEntry:
    spent, budget = sum(entry.milliseconds.values()), args.latency_budget_ms
    if budget is None or spent <= budget:
        return entry
    warning = f"took {spent:.0f} ms, over the latency budget of {budget:g} ms"
    return entry.model_copy(update={"warnings": [*entry.warnings, warning]})


def write_run(entries: list[CaseEntry], predictor: Predictor, args: argparse.Namespace) -> None:
    """results.json and landmarks.csv."""
    results = Results(
        model=predictor.spec.name,
        model_file=(args.model or model_file()).name,
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
        print(
            f"{late} answers took longer than the latency budget of {args.latency_budget_ms:g} ms"
        )
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "process.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", type=Path, default=INPUT, help="folder of images or a job (%(default)s)")
    add("--output", type=Path, default=OUTPUT, help="folder for the answers (%(default)s)")
    add(
        "--model",
        type=Path,
        help=f"ONNX file (the one under {MOUNTED_MODELS}, else the shipped one)",
    )
    add(
        "--provider",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="processor (%(default)s)",
    )
    add("--decode", choices=("subpixel", "argmax"), help="heatmap decoder (the model's own)")
    add(
        "--overlay", action=argparse.BooleanOptionalAction, help="write overlay.png (not for a job)"
    )
    add(
        "--frame-of-answers",
        choices=("world", "pixel"),
        default="world",
        help="landmarks in the file's world frame, mm where it has one, or in px (%(default)s)",
    )
    add("--latency-budget-ms", type=float, metavar="N", help="warn of answers that took longer")
    add("--landmarks-file", default="aop-landmarks.json", help="name of this answer (%(default)s)")
    add("--angle-file", default="angle-of-progression.json", help="likewise (%(default)s)")
    add(
        "--three-points-file",
        metavar="NAME",
        help="write a Three-point angle too, e.g. aop-angle.json",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
