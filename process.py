"""Landmarks and the angle of progression (AoP) for every image in an input folder.

    python process.py --input DIR --output DIR

Reads a grand-challenge job (inputs.json), images/<slug>/, or any folder of images. Writes for each
case aop-landmarks.json, angle-of-progression.json and overlay.png, and for the run results.json and
landmarks.csv. Exit status: 0 every case answered (doubtful ones too), 1 some case failed, 2 nothing
could be done, 128 + N stopped by signal N; the last line of stderr then says why. Run again with
--resume after a stop. --serve answers jobs one after the other, --shard and --merge divide a large
folder among several machines.
"""

import argparse
import contextlib
import hashlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from model.files import OutputError
from model.jobs import InputError, find_cases
from model.options import MOUNTED_MODELS, parse_options
from model.predictor import MOST_THREADS, ModelError, Predictor, load_predictor, usable_cpus
from model.run import STOPPED_BY, cases_of, conclude, run, tally_of, tell
from model.serve import serve
from model.shards import merge

WEIGHTS = Path(__file__).resolve().parent / "model" / "weights"
SHIPPED_MODEL, SHIPPED_FOR_CPU = WEIGHTS / "aop.onnx", WEIGHTS / "aop.int8.onnx"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parse_options(arguments, __doc__)
    try:
        if args.merge:
            return merge_parts(args)
        if args.api_method == "invoke":
            return serve_jobs(loaded(args, args.threads), args)
        cases = cases_of(args)
        several = len(cases) > 1
        predictor = loaded(args, 1 if several else args.threads)
        at_once = args.threads or min(usable_cpus(), MOST_THREADS)
        args.at_once = at_once if several and predictor.provider == "cpu" else 1
        return _say(*run(predictor, args, cases))
    except (InputError, ModelError, OutputError) as error:
        return _say(2, str(error))


def loaded(args: argparse.Namespace, threads: int | None) -> Predictor:
    """The model; `args` then name it. Several cases at a time are faster than several threads."""
    path = args.model or model_file()
    on_cpu = SHIPPED_FOR_CPU if path is SHIPPED_MODEL else None
    predictor = load_predictor(path, args.provider, threads, on_cpu)
    args.model = predictor.file
    args.model_sha256 = sha256(args.model)
    tell(f"model {predictor.spec.name} ({args.model}) on {predictor.provider}")
    return predictor


def model_file() -> Path:
    """The one *.onnx under /opt/ml/model, else the shipped one.

    Raises:
        ModelError: several are mounted, or a folder there cannot be read.
    """

    def refuse(error: OSError) -> None:
        if error.filename != str(MOUNTED_MODELS) or not isinstance(error, FileNotFoundError):
            raise ModelError(
                f"{error.filename} cannot be read ({error.strerror}); let this user read the "
                "mounted model, or pass --model"
            ) from error

    mounted = sorted(
        Path(folder, name)
        for folder, _, names in os.walk(MOUNTED_MODELS, onerror=refuse)
        for name in names
        if name.endswith(".onnx") and not name.startswith(".")  # macOS packs a ._aop.onnx too
    )
    if len(mounted) > 1:
        names = ", ".join(str(path.relative_to(MOUNTED_MODELS)) for path in mounted)
        raise ModelError(f"{MOUNTED_MODELS} holds several models ({names}); choose one by --model")
    return mounted[0] if mounted else SHIPPED_MODEL


def serve_jobs(predictor: Predictor, args: argparse.Namespace) -> int:
    """Answer the job in the input folder whenever asked to; returns the exit status."""
    args.resume, args.at_once = False, 1  # each job is a new one
    try:
        return serve(lambda: invoke(predictor, args), args.serve_port, STOPPED_BY)
    except OSError as error:
        port = f"port {args.serve_port} cannot be used ({error.strerror})"
        sentence = f"{port}; choose another --serve-port"
        return _say(2, sentence)


def invoke(predictor: Predictor, args: argparse.Namespace) -> str | None:
    """One job of the server; returns what is wrong with it, if anything."""
    if STOPPED_BY:  # the answers of the job before stay
        return "the server is stopping"
    try:
        args.files.remove(args.output)  # an earlier job's answers must not pass for this one's
        args.run_files.remove(args.output)
        status, sentence = run(predictor, args, cases_of(args))
    except (InputError, OutputError, OSError) as error:
        status, sentence = 2, str(error)
    _say(status, sentence)
    return sentence if status else None


def merge_parts(args: argparse.Namespace) -> int:
    """Merge the shards' results in the output folder; returns the exit status."""
    files, unknown = [], ""
    try:
        files = [case.file for case in find_cases(args.input, args.output)]
    except InputError as error:
        unknown = f"merged, but whether images are missing is not known: {error}"
    merged = merge(args.output, files)
    for name in merged.missing:
        tell(f"missing: {name!r}")
    status, sentence = conclude(tally_of(merged.cases), args)
    if merged.missing:
        count, first = len(merged.missing), merged.missing[0]
        again = "run that part again with --shard K/N (--resume if it was stopped), then --merge"
        sentence = f"{count} parts or files are missing, the first is {first!r}; {again}"
    sentences = "; ".join(filter(None, (sentence, unknown)))
    return _say(1 if sentences else status, sentences)


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(status: int, sentence: str) -> int:
    """The last line of stderr, which grand-challenge shows to the user; returns the status."""
    if sentence:
        with contextlib.suppress(OSError):  # nobody may read it, the status stands
            print(" ".join(sentence.split()), file=sys.stderr, flush=True)
    return status


def _stop(number: int, _: object) -> None:
    """Stop after the frame at hand; a second signal stops at once."""
    if STOPPED_BY:
        os._exit(128 + number)
    STOPPED_BY.append(number)


if __name__ == "__main__":
    # lest a file gets the number of a standard stream that is closed
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's strange name must not end the run
        sys.stdout.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        status = main()
    except Exception:  # told in full
        with contextlib.suppress(OSError):
            traceback.print_exc()
        status = 2  # Python's own 1 would say that all other cases are answered
    os._exit(status)  # all is written; taking the interpreter down would last another 0.1 s
