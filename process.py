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
import hashlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from model.files import OutputError
from model.jobs import InputError, find_cases
from model.options import MOUNTED_MODELS, parse_options
from model.predictor import ModelError, Predictor, load_predictor
from model.run import STOPPED_BY, conclude, run, tally_of, tell
from model.serve import serve
from model.shards import merge

SHIPPED_MODEL = Path(__file__).resolve().parent / "model" / "weights" / "aop.onnx"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parse_options(arguments, __doc__)
    try:
        if args.merge:
            return merge_parts(args)
        args.model = args.model or model_file()
        predictor = load_predictor(args.model, args.provider, args.threads)
        args.model_sha256 = sha256(args.model)
        name = f"{predictor.spec.name} ({args.model}) on {predictor.provider}"
        tell(f"model {name}")
        if args.api_method == "invoke":
            return serve_jobs(predictor, args)
        return _say(*run(predictor, args))
    except (InputError, ModelError, OutputError) as error:
        return _say(2, str(error))


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
    args.resume = False  # each job is a new one
    try:
        return serve(lambda: invoke(predictor, args), args.serve_port, STOPPED_BY)
    except OSError as error:
        port = f"port {args.serve_port} cannot be used ({error.strerror})"
        sentence = f"{port}; choose another --serve-port"
        return _say(2, sentence)


def invoke(predictor: Predictor, args: argparse.Namespace) -> str | None:
    """One job of the server; returns what is wrong with it, if anything."""
    try:
        args.files.remove(args.output)  # an earlier job's answers must not pass for this one's
        args.run_files.remove(args.output)
        status, sentence = run(predictor, args)
    except (InputError, OutputError, OSError) as error:
        status, sentence = 2, str(error)
    _say(status, sentence)
    return sentence if status else None


def merge_parts(args: argparse.Namespace) -> int:
    """Merge the shards' results in the output folder; returns the exit status."""
    try:
        files = [case.file for case in find_cases(args.input, args.output)]
    except InputError as error:
        tell(f"what is missing of the input is not known: {error}")
        files = []
    merged = merge(args.output, files)
    for name in merged.missing:
        tell(f"missing: {name!r}")
    status, sentence = conclude(tally_of(merged.cases), args)
    if not merged.missing:
        return _say(status, sentence)
    first = f"{len(merged.missing)} parts or files are missing, the first is {merged.missing[0]!r}"
    again = "run that part again with --shard K/N --resume, then --merge"
    return _say(1, f"{first}; {again}")


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(status: int, sentence: str) -> int:
    """The last line of stderr, which grand-challenge shows to the user; returns the status."""
    if sentence:
        print(" ".join(sentence.split()), file=sys.stderr, flush=True)
    return status


def _stop(number: int, _: object) -> None:
    """Stop after the frame at hand; a second signal stops at once."""
    if STOPPED_BY:
        os._exit(128 + number)
    STOPPED_BY.append(number)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's strange name must not end the run
        sys.stdout.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    raise SystemExit(main())
