"""Measure the angle of progression (AoP) in every ultrasound image of a folder.

    python process.py --input DIR --output DIR

The input is any folder of images, a folder that contains images/NAME/, or a grand-challenge job
(inputs.json). The output folder receives:

    CASE/aop-landmarks.json         the landmarks PS1, PS2 and FH1
    CASE/angle-of-progression.json  the angle in degrees
    CASE/overlay.png                a picture to check by eye
    results.json                    all of it for every case, with confidence, doubts and errors
    landmarks.csv                   the landmarks and angles as a table

CASE is the image's path below the input folder, without its suffix and with "__" for "/". The
answers to a job lie at the top of the output folder, and only --overlay adds pictures to them.

Exit status: 0        every case was answered, doubtful ones too
             1        some case failed, or --merge found something missing; the rest was answered
             2        nothing could be done, or the results could not be written
             128 + N  signal N stopped the run; run it again with --resume

Unless the status is 0, the last line of stderr says what went wrong and what to do.
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

from model.images.reader_pool import Readers
from model.pipeline.batch import (
    LoadedModel,
    conclude_run,
    count_outcomes,
    print_line,
    run_batch,
    select_cases,
)
from model.pipeline.case_runner import StopRequest
from model.pipeline.cases import InputError, find_cases
from model.pipeline.options import MOUNTED_MODELS, RunOptions, parse_options
from model.pipeline.server import serve
from model.pipeline.shards import merge_results
from model.predictor import MOST_THREADS, ModelError, load_predictor, usable_cpus
from model.results.files import OutputError

WEIGHTS = Path(__file__).resolve().parent / "model" / "weights"
SHIPPED_MODEL, SHIPPED_FOR_CPU = WEIGHTS / "aop.onnx", WEIGHTS / "aop.int8.onnx"


def main(arguments: Sequence[str] | None = None, stop: StopRequest | None = None) -> int:
    """Run the command; returns its exit status.

    Args:
        arguments: without the program's name; by default those of the command line.
        stop: through it a signal handler stops the run. By default nothing does.
    """
    options = parse_options(arguments, __doc__)
    stop = StopRequest() if stop is None else stop
    readers = Readers()
    try:
        if options.merge:
            return merge_parts(options)
        if options.api_method == "invoke":
            return serve_jobs(load_model(options, options.threads), options, stop, readers)
        selection = select_cases(options)
        readers.start_early(case.path for case in selection.cases)
        several = len(selection.cases) > 1
        model = load_model(options, 1 if several else options.threads)
        workers = 1
        if several and model.predictor.provider == "cpu":
            workers = options.threads or min(usable_cpus(), MOST_THREADS)
        return _print_outcome(*run_batch(model, options, selection, stop, readers, workers))
    except (InputError, ModelError, OutputError) as error:
        return _print_outcome(2, str(error))
    finally:
        readers.end()


def load_model(options: RunOptions, threads: int | None) -> LoadedModel:
    """Load the model that the options choose.

    Args:
        threads: of the network, for one image; None for all CPUs allowed. With several cases,
            one thread for each case is faster than several threads for one.
    """
    path = options.model or default_model()
    on_cpu = SHIPPED_FOR_CPU if path is SHIPPED_MODEL else None
    predictor = load_predictor(path, options.provider, threads, on_cpu)
    file = predictor.file or path
    print_line(f"model {predictor.spec.name} ({file}) on {predictor.provider}")
    return LoadedModel(predictor, file, file_sha256(file))


def default_model() -> Path:
    """The one *.onnx file under /opt/ml/model, else the shipped model.

    Raises:
        ModelError: several models are mounted there, or a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        if error.filename != str(MOUNTED_MODELS) or not isinstance(error, FileNotFoundError):
            raise ModelError(
                f"{error.filename} cannot be read ({error.strerror}); let this user read the "
                "mounted model, or choose another with --model"
            ) from error

    mounted = sorted(
        Path(folder, name)
        for folder, _, names in os.walk(MOUNTED_MODELS, onerror=refuse)
        for name in names
        if name.endswith(".onnx") and not name.startswith(".")  # macOS adds files like ._aop.onnx
    )
    if len(mounted) > 1:
        names = ", ".join(str(path.relative_to(MOUNTED_MODELS)) for path in mounted)
        raise ModelError(
            f"expected one model under {MOUNTED_MODELS}, found several ({names}); "
            "choose one with --model"
        )
    return mounted[0] if mounted else SHIPPED_MODEL


def serve_jobs(model: LoadedModel, options: RunOptions, stop: StopRequest, readers: Readers) -> int:
    """Answer the job in the input folder at each request; returns the exit status."""
    options = replace(options, resume=False)  # every request is a new job
    try:
        return serve(lambda: answer_job(model, options, stop, readers), options.serve_port, stop)
    except OSError as error:
        port = f"port {options.serve_port} cannot be used ({error.strerror})"
        return _print_outcome(2, f"{port}; choose another --serve-port")


def answer_job(
    model: LoadedModel, options: RunOptions, stop: StopRequest, readers: Readers
) -> str | None:
    """Answer the server's current job; returns a sentence about what went wrong, else None."""
    if stop.signal is not None:  # keep the answers of the previous job
        return "the server is stopping"
    try:
        # the previous job's answers must not be taken for this one's
        options.files.remove(options.output)
        options.run_files.remove(options.output)
        status, sentence = run_batch(model, options, select_cases(options), stop, readers)
    except (InputError, OutputError, OSError) as error:
        status, sentence = 2, str(error)
    _print_outcome(status, sentence)
    return sentence if status else None


def merge_parts(options: RunOptions) -> int:
    """Merge the results of all parts in the output folder; returns the exit status."""
    files, unknown = [], ""
    try:
        files = [case.file for case in find_cases(options.input, options.output)]
    except InputError as error:
        unknown = f"merged, but it is not known whether images are missing: {error}"
    merged = merge_results(options.output, files)
    for name in merged.missing:
        print_line(f"missing: {name!r}")
    status, sentence = conclude_run(count_outcomes(merged.cases), options)
    if merged.missing:
        count, first = len(merged.missing), merged.missing[0]
        sentence = (
            f"{count} parts or files are missing, the first is {first!r}; run the parts concerned "
            "again with --shard K/N (add --resume if they were stopped), then --merge"
        )
    sentences = "; ".join(filter(None, (sentence, unknown)))
    return _print_outcome(1 if sentences else status, sentences)


def file_sha256(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _print_outcome(status: int, sentence: str) -> int:
    """Print the last line of stderr, which grand-challenge shows to its users; returns `status`."""
    if sentence:
        with contextlib.suppress(OSError):  # the status counts even if nobody can read the line
            print(" ".join(sentence.split()), file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    # If a standard stream is closed, the next file opened would get its number and its output.
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name that stdout cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    stop = StopRequest()
    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # its terminal is closed
    ignored = signal.getsignal(hangup) is signal.SIG_IGN  # by nohup
    for number in (signal.SIGTERM, signal.SIGINT, *([] if ignored else [hangup])):
        signal.signal(number, lambda number, _: stop.request(number))
    try:
        status = main(stop=stop)
    except Exception:  # unforeseen, so the whole traceback is needed
        with contextlib.suppress(OSError):
            traceback.print_exc()
        status = 2  # Python's own 1 would mean that all other cases were answered
    os._exit(status)  # everything is written; the interpreter's own shutdown takes 0.1 s
