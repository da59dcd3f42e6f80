"""Landmarks and the angle of progression (AoP) for every image in an input folder.

    python process.py --input DIR --output DIR

Reads a grand-challenge job (inputs.json), images/<slug>/, or any folder of images. Writes for each
case aop-landmarks.json, angle-of-progression.json and overlay.png, and for the run results.json and
landmarks.csv. Exit status: 0 every case answered (doubtful ones too), 1 some case failed, 2 nothing
could be done, 128 + N stopped by signal N; the last line of stderr then says why. Run again with
--resume after a stop. --serve answers jobs one after the other, --shard and --merge divide a large
folder among several machines.
"""

import contextlib
import hashlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from model.pipeline.batch import LoadedModel, cases_of, conclude, print_line, run, tally_of
from model.pipeline.case_runner import StopRequest
from model.pipeline.cases import InputError, find_cases
from model.pipeline.options import MOUNTED_MODELS, RunOptions, parse_options
from model.pipeline.server import serve
from model.pipeline.shards import merge
from model.predictor import MOST_THREADS, ModelError, load_predictor, usable_cpus
from model.results.files import OutputError

WEIGHTS = Path(__file__).resolve().parent / "model" / "weights"
SHIPPED_MODEL, SHIPPED_FOR_CPU = WEIGHTS / "aop.onnx", WEIGHTS / "aop.int8.onnx"


def main(arguments: Sequence[str] | None = None, stop: StopRequest | None = None) -> int:
    """Run the command; returns its exit status.

    Args:
        stop: set when a signal comes; by default none can.
    """
    options = parse_options(arguments, __doc__)
    stop = StopRequest() if stop is None else stop
    try:
        if options.merge:
            return merge_parts(options)
        if options.api_method == "invoke":
            return serve_jobs(load_model(options, options.threads), options, stop)
        cases = cases_of(options)
        several = len(cases) > 1
        model = load_model(options, 1 if several else options.threads)
        at_once = 1
        if several and model.predictor.provider == "cpu":
            at_once = options.threads or min(usable_cpus(), MOST_THREADS)
        return _say(*run(model, options, cases, stop, at_once))
    except (InputError, ModelError, OutputError) as error:
        return _say(2, str(error))


def load_model(options: RunOptions, threads: int | None) -> LoadedModel:
    """Load the model that the options choose.

    Args:
        threads: for a single image. Several cases at a time are faster than several threads.
    """
    path = options.model or model_file()
    on_cpu = SHIPPED_FOR_CPU if path is SHIPPED_MODEL else None
    predictor = load_predictor(path, options.provider, threads, on_cpu)
    file = predictor.file or path
    print_line(f"model {predictor.spec.name} ({file}) on {predictor.provider}")
    return LoadedModel(predictor, file, sha256(file))


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


def serve_jobs(model: LoadedModel, options: RunOptions, stop: StopRequest) -> int:
    """Answer the job in the input folder whenever asked to; returns the exit status."""
    options = replace(options, resume=False)  # each job is a new one
    try:
        return serve(lambda: answer_job(model, options, stop), options.serve_port, stop)
    except OSError as error:
        port = f"port {options.serve_port} cannot be used ({error.strerror})"
        return _say(2, f"{port}; choose another --serve-port")


def answer_job(model: LoadedModel, options: RunOptions, stop: StopRequest) -> str | None:
    """Answer one job of the server; returns what is wrong with it, if anything."""
    if stop.signal is not None:  # the answers of the job before stay
        return "the server is stopping"
    try:
        # an earlier job's answers must not pass for this one's
        options.files.remove(options.output)
        options.run_files.remove(options.output)
        status, sentence = run(model, options, cases_of(options), stop)
    except (InputError, OutputError, OSError) as error:
        status, sentence = 2, str(error)
    _say(status, sentence)
    return sentence if status else None


def merge_parts(options: RunOptions) -> int:
    """Merge the shards' results in the output folder; returns the exit status."""
    files, unknown = [], ""
    try:
        files = [case.file for case in find_cases(options.input, options.output)]
    except InputError as error:
        unknown = f"merged, but whether images are missing is not known: {error}"
    merged = merge(options.output, files)
    for name in merged.missing:
        print_line(f"missing: {name!r}")
    status, sentence = conclude(tally_of(merged.cases), options)
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


if __name__ == "__main__":
    # lest a file gets the number of a standard stream that is closed
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's strange name must not end the run
        sys.stdout.reconfigure(errors="backslashreplace")
    stop = StopRequest()  # after the frame at hand
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stop.request(number))
    try:
        status = main(stop=stop)
    except Exception:  # told in full
        with contextlib.suppress(OSError):
            traceback.print_exc()
        status = 2  # Python's own 1 would say that all other cases are answered
    os._exit(status)  # all is written; taking the interpreter down would last another 0.1 s
