"""The command line of process.py; each option can be set by an environment variable as well."""

import argparse
import contextlib
import difflib
import itertools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from model.heatmap import Decode
from model.pipeline.shards import Shard, parse_shard
from model.predictor import MOST_THREADS, Provider
from model.results.files import REPORT, RESULTS, TABLE, AnswerFiles, RunFiles

INPUT = Path("/input")
OUTPUT = Path("/output")
MOUNTED_MODELS = Path("/opt/ml/model")
PORT = 4743  # where grand-challenge looks for a server
EPILOG = """\
Each option can be set by an environment variable: --landmarks-file by AOP_LANDMARKS_FILE,
--overlay by AOP_OVERLAY=yes or no, and so on. The command line wins."""


@dataclass(frozen=True)
class RunOptions:
    """What the user wants: a field for each option of the command line.

    model: None for the mounted model, else the shipped one. threads: None for all CPUs allowed.
    decode: None for the model's own decoder. overlay: None for yes, but not for a job.
    """

    input: Path
    output: Path
    model: Path | None
    provider: Provider
    threads: int | None
    decode: Decode | None
    mirror: bool
    latency_budget_ms: float | None
    frame_of_answers: Literal["world", "pixel"]
    landmarks_file: str
    angle_file: str
    three_points_file: str | None
    overlay: bool | None
    report: bool
    resume: bool
    shard: Shard | None
    merge: bool
    api_method: Literal["exec", "invoke"]
    serve_port: int

    @property
    def files(self) -> AnswerFiles:
        """Names of a case's answers."""
        return AnswerFiles(self.landmarks_file, self.angle_file, self.three_points_file)

    @property
    def run_files(self) -> RunFiles:
        """Names of the run's own files."""
        return self.shard.run_files if self.shard else RunFiles()


def parse_options(
    arguments: Sequence[str] | None,
    description: str | None,
    environment: Mapping[str, str] = os.environ,
) -> RunOptions:
    """Read the AOP_ variables, then the command line; exits with 2 on a bad option."""
    parser = argparse.ArgumentParser(
        "process.py",
        usage="%(prog)s [--input DIR] [--output DIR] [option ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
        exit_on_error=False,
    )
    actions = _add_options(parser, environment)
    known = [variable(action.option_strings[0]) for action in actions]
    for name in environment:
        near = difflib.get_close_matches(name, known, 1, 0.8) if name not in known else []
        if name.startswith("AOP_") and near:
            parser.error(f"unknown environment variable {name}; did you mean {near[0]}?")
    where = "from the environment: "
    try:
        first = [text for action in actions for text in _from_environment(action, environment)]
        parser.parse_args(first)
        where = ""
        given = parser.parse_args([*first, *(sys.argv[1:] if arguments is None else arguments)])
    except (argparse.ArgumentError, ValueError) as error:
        parser.error(f"{where}{error}")
    options = RunOptions(**vars(given))
    if options.merge:  # the merged files are those of all parts
        options = replace(options, shard=None)
    names = [*options.files.names, RESULTS, TABLE, REPORT]
    if any(f"{b}/".startswith(f"{a}/") for a, b in itertools.permutations(names, 2)):
        parser.error(f"each answer needs a name of its own, got {', '.join(names)}")
    return options


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
    provider_help = "processor; auto: CUDA if it runs, else the CPU (%(default)s)"
    add("--provider", choices=providers, default="auto", help=provider_help)
    threads_help = "cases at a time on the CPU, or threads of a single case (all CPUs allowed)"
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
        ("--landmarks-file", "aop-landmarks.json", "file with the landmarks (%(default)s)"),
        ("--angle-file", "angle-of-progression.json", "file with the angle (%(default)s)"),
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
    port_help = "port of the server (%(default)s)"
    add("--serve-port", type=_port, default=PORT, metavar="N", help=port_help)
    return added


def variable(option: str) -> str:
    """The environment variable of an option: --landmarks-file -> AOP_LANDMARKS_FILE."""
    return "AOP_" + option.lstrip("-").replace("-", "_").upper()


def _from_environment(option: argparse.Action, environment: Mapping[str, str]) -> list[str]:
    """The command line that sets an option as its variable does; [] without a variable."""
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
