"""The command line of process.py; each option can be set by an environment variable as well."""

import argparse
import contextlib
import difflib
import itertools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from model.files import REPORT, RESULTS, TABLE, AnswerFiles, RunFiles
from model.predictor import MOST_THREADS
from model.shards import Shard, parse_shard

INPUT = Path("/input")
OUTPUT = Path("/output")
MOUNTED_MODELS = Path("/opt/ml/model")
PORT = 4743  # where grand-challenge looks for a server
EPILOG = """\
Each option can be set by an environment variable: --landmarks-file by AOP_LANDMARKS_FILE,
--overlay by AOP_OVERLAY=yes or no, and so on. The command line wins."""


def parse_options(
    arguments: Sequence[str] | None,
    description: str | None,
    environment: Mapping[str, str] = os.environ,
) -> argparse.Namespace:
    """The command line, after the environment's AOP_ variables; exits with 2 on a bad option.

    `files` and `run_files` are added: the names of a case's answers, and of the run's own files.
    """
    parser = argparse.ArgumentParser(
        "process.py",
        usage="%(prog)s [--input DIR] [--output DIR] [option ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
        exit_on_error=False,
    )
    options = _add_options(parser, environment)
    known = [variable(option.option_strings[0]) for option in options]
    for name in environment:
        near = difflib.get_close_matches(name, known, 1, 0.8) if name not in known else []
        if name.startswith("AOP_") and near:
            parser.error(f"unknown environment variable {name}; did you mean {near[0]}?")
    where = "from the environment: "
    try:
        first = [text for option in options for text in _from_environment(option, environment)]
        parser.parse_args(first)
        where = ""
        args = parser.parse_args([*first, *(sys.argv[1:] if arguments is None else arguments)])
    except (argparse.ArgumentError, ValueError) as error:
        parser.error(f"{where}{error}")
    args.files = AnswerFiles(args.landmarks_file, args.angle_file, args.three_points_file)
    args.shard = None if args.merge else args.shard  # the merged files are of all parts
    args.run_files = args.shard.run_files if args.shard else RunFiles()
    names = [*args.files.names, RESULTS, TABLE, REPORT]
    if any(f"{b}/".startswith(f"{a}/") for a, b in itertools.permutations(names, 2)):
        parser.error(f"each answer needs a name of its own, got {', '.join(names)}")
    return args


def _add_options(
    parser: argparse.ArgumentParser, environment: Mapping[str, str]
) -> list[argparse.Action]:
    added: list[argparse.Action] = []

    def group(title: str) -> Callable[..., None]:
        arguments = parser.add_argument_group(title)
        return lambda *names, **known: added.append(arguments.add_argument(*names, **known))

    def shard(text: str) -> Shard:
        try:
            return parse_shard(text, environment)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    add = group("what and where")
    add("--input", type=Path, default=INPUT, help="folder of images or a job (%(default)s)")
    add("--output", type=Path, default=OUTPUT, help="folder for the answers (%(default)s)")
    model_help = f"ONNX file (the one under {MOUNTED_MODELS}, else the shipped ones)"
    add("--model", type=Path, metavar="FILE", help=model_help)
    providers = ("auto", "cuda", "cpu")
    provider_help = "processor; auto: CUDA where it runs, else the CPU (%(default)s)"
    add("--provider", choices=providers, default="auto", help=provider_help)
    threads_help = "on the CPU: cases at a time, or threads of a single case (all CPUs allowed)"
    add("--threads", type=_threads, metavar="N", help=threads_help)
    add("--decode", choices=("subpixel", "argmax"), help="heatmap decoder (the model's own)")
    mirror_help = (
        "images acquired mirror-wise, symphysis on the right: flipped, predicted, mapped back"
    )
    add("--mirror", action=argparse.BooleanOptionalAction, default=False, help=mirror_help)
    budget_help = "warn of cases that took longer"
    add("--latency-budget-ms", type=_milliseconds, metavar="N", help=budget_help)

    add = group("answers")
    frame_help = "landmarks in the file's world frame, mm where it has one, or in px (%(default)s)"
    add("--frame-of-answers", choices=("world", "pixel"), default="world", help=frame_help)
    for option, default, words in (
        ("--landmarks-file", "aop-landmarks.json", "name of the landmarks' answer (%(default)s)"),
        ("--angle-file", "angle-of-progression.json", "name of the angle's (%(default)s)"),
        ("--three-points-file", None, "write a Three-point angle too, e.g. as aop-angle.json"),
    ):
        add(option, type=_name_inside, metavar="NAME", default=default, help=words)
    overlay_help = "write overlay.png, and contact-sheet.png for a stack (yes, but not for a job)"
    add("--overlay", action=argparse.BooleanOptionalAction, help=overlay_help)
    report_help = (
        "write report.html, all cases sorted by doubt to check and correct in a browser, and for "
        "it picture.png of each case (no); --resume answers cases without a picture again, --shard "
        "writes report-K-of-N.html, --merge the page of all parts"
    )
    add("--report", action=argparse.BooleanOptionalAction, default=False, help=report_help)

    add = group("large folders")
    resume_help = "keep what an earlier run in --output has answered, and answer the rest"
    add("--resume", action=argparse.BooleanOptionalAction, default=False, help=resume_help)
    shard_help = (
        "answer part K of N only (1 to N), into results-K-of-N.json; auto/N: K from "
        "JOB_COMPLETION_INDEX (Kubernetes) or SLURM_ARRAY_TASK_ID; auto: Slurm tells N too"
    )
    add("--shard", type=shard, metavar="K/N", help=shard_help)
    merge_help = "merge the parts in --output, and name what is missing of them and of --input"
    add("--merge", action=argparse.BooleanOptionalAction, default=False, help=merge_help)

    add = group("as a server")
    method_help = "exec: one run; invoke: a server, each POST /invoke a run (%(default)s)"
    add("--api-method", choices=("exec", "invoke"), default="exec", help=method_help)
    serve_help = "the same as --api-method invoke"
    add("--serve", dest="api_method", action="store_const", const="invoke", help=serve_help)
    add("--serve-port", type=_port, default=PORT, metavar="N", help="of the server (%(default)s)")
    return added


def variable(option: str) -> str:
    """--landmarks-file -> AOP_LANDMARKS_FILE."""
    return "AOP_" + option.lstrip("-").replace("-", "_").upper()


def _from_environment(option: argparse.Action, environment: Mapping[str, str]) -> list[str]:
    """The command line that says what an option's variable says."""
    name = option.option_strings[0]
    text = environment.get(variable(name))
    if not text or option.const is not None:  # --serve only abbreviates
        return []
    if not isinstance(option, argparse.BooleanOptionalAction):
        return [f"{name}={text}"]
    if text.lower() not in ("yes", "no"):
        raise ValueError(f"{variable(name)}: expected yes or no, got {text!r}")
    return [name if text.lower() == "yes" else option.option_strings[1]]


def _milliseconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"expected milliseconds, a number above 0, got {text!r}")


def _count(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (value := int(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")


def _up_to(largest: int, text: str) -> int:
    if _count(text) > largest:
        raise argparse.ArgumentTypeError(f"expected {largest} or less, got {text}")
    return int(text)


def _port(text: str) -> int:
    return _up_to(65535, text)


def _threads(text: str) -> int:
    return _up_to(MOST_THREADS, text)


def _name_inside(text: str) -> str:
    """A file's name, or its path below the case's folder; an answer never leaves the output.

    Hidden names are the run's own.
    """
    path = PurePosixPath(text)
    hidden = any(part.startswith(".") for part in path.parts)
    if path.is_absolute() or not path.name or hidden or not text.isprintable():
        raise argparse.ArgumentTypeError(f"expected a name inside the output folder, got {text!r}")
    return str(path)
