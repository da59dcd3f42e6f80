"""The options of process.py, from the command line and from AOP_ environment variables."""

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
PORT = 4743  # grand-challenge connects to this one
EPILOG = """\
Each option can also be set by an environment variable: --landmarks-file by AOP_LANDMARKS_FILE,
--overlay by AOP_OVERLAY=yes or no, and so on. The command line wins. model/README.md describes
all inputs, answers and fields."""


@dataclass(frozen=True)
class RunOptions:
    """The options of one run, a field for each option of the command line.

    None means: for `model` the mounted model, or without one the shipped model; for `threads` all
    CPUs that this process may use; for `decode` the model's own decoder; for `overlay` yes, but no
    for a job; for `shard` all cases.
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
        """Names of the answers for one case."""
        return AnswerFiles(self.landmarks_file, self.angle_file, self.three_points_file)

    @property
    def run_files(self) -> RunFiles:
        """Names of the files about the whole run."""
        return self.shard.run_files if self.shard else RunFiles()


def parse_options(
    arguments: Sequence[str] | None,
    description: str | None,
    environment: Mapping[str, str] = os.environ,
) -> RunOptions:
    """Read the AOP_ variables, then the command line.

    Args:
        arguments: None for those of this process.
        description: printed by --help above the options.

    Raises:
        SystemExit: with status 2 after a bad option or variable, with 0 after --help.
    """
    parser = argparse.ArgumentParser(
        "process.py",
        usage="%(prog)s [--input DIR] [--output DIR] [option ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
        exit_on_error=False,
    )
    actions = _add_options(parser, environment)
    known = [variable_name(action.option_strings[0]) for action in actions]
    for name in environment:
        similar = difflib.get_close_matches(name, known, 1, 0.8) if name not in known else []
        if name.startswith("AOP_") and similar:
            parser.error(f"unknown environment variable {name}; did you mean {similar[0]}?")
    source = "from the environment: "
    try:
        defaults = [text for action in actions for text in _from_environment(action, environment)]
        parser.parse_args(defaults)
        source = ""
        given = sys.argv[1:] if arguments is None else arguments
        parsed = parser.parse_args([*defaults, *given])
    except (argparse.ArgumentError, ValueError) as error:
        parser.error(f"{source}{error}")
    options = RunOptions(**vars(parsed))
    if options.merge:  # AOP_SHARD may be set, but the merged files are those of all parts
        options = replace(options, shard=None)
    names = [*options.files.names, RESULTS, TABLE, REPORT]
    if any(f"{b}/".startswith(f"{a}/") for a, b in itertools.permutations(names, 2)):
        parser.error(f"each answer needs a name of its own, got {', '.join(names)}")
    return options


def _add_options(
    parser: argparse.ArgumentParser, environment: Mapping[str, str]
) -> list[argparse.Action]:
    """Add all options to the parser; returns them in the order of --help."""
    added: list[argparse.Action] = []

    def add_group(title: str) -> Callable[..., None]:
        group = parser.add_argument_group(title)
        return lambda *names, **settings: added.append(group.add_argument(*names, **settings))

    def shard(text: str) -> Shard:
        try:
            return parse_shard(text, environment)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    switch = argparse.BooleanOptionalAction

    add = add_group("input, model and processor")
    input_help = "folder of images, or a grand-challenge job (default: %(default)s)"
    add("--input", type=Path, metavar="DIR", default=INPUT, help=input_help)
    output_help = "folder for the answers; created if missing (default: %(default)s)"
    add("--output", type=Path, metavar="DIR", default=OUTPUT, help=output_help)
    model_help = f"ONNX model (default: the one file under {MOUNTED_MODELS}, else a shipped model)"
    add("--model", type=Path, metavar="FILE", help=model_help)
    providers = ("auto", "cuda", "cpu")
    provider_help = (
        "processor; auto takes CUDA if it works, else the CPU; cuda fails if it does not work "
        "(default: %(default)s)"
    )
    add("--provider", choices=providers, default="auto", help=provider_help)
    threads_help = (
        "number of cases answered at a time on the CPU, or of threads if there is one case "
        "(default: all CPUs allowed)"
    )
    add("--threads", type=_threads, metavar="N", help=threads_help)
    decode_help = "method that finds landmarks in heatmaps (default: the model's own)"
    add("--decode", choices=("subpixel", "argmax"), help=decode_help)
    mirror_help = (
        "images acquired mirror-wise, with the symphysis on the right: each is flipped, predicted, "
        "and its landmarks are mapped back (default: no)"
    )
    add("--mirror", action=switch, default=False, help=mirror_help)
    budget_help = "time limit for one case; a slower case is answered, with a warning"
    add("--latency-budget-ms", type=_milliseconds, metavar="N", help=budget_help)

    add = add_group("answers")
    frame_help = (
        "coordinates of the landmarks' file: those of the image's world frame, in mm if it has a "
        "pixel size, or px of the image (default: %(default)s)"
    )
    add("--frame-of-answers", choices=("world", "pixel"), default="world", help=frame_help)
    for option, default, words in (
        ("--landmarks-file", "aop-landmarks.json", "name of the landmarks' file"),
        ("--angle-file", "angle-of-progression.json", "name of the angle's file"),
        ("--three-points-file", None, 'name of a "Three-point angle" file such as aop-angle.json'),
    ):
        end = "(default: %(default)s)" if default else "(default: not written)"
        add(option, type=_name_inside, metavar="NAME", default=default, help=f"{words} {end}")
    overlay_help = (
        "pictures to check: overlay.png for each image or frame, and contact-sheet.png for a stack "
        "or cine loop (default: yes, but no for a job)"
    )
    add("--overlay", action=switch, help=overlay_help)
    report_help = (
        "report.html, a page that shows all cases sorted by doubt and lets you correct their "
        "landmarks, and picture.png of each case for it. --resume answers cases without "
        "picture.png again; --shard K/N writes report-K-of-N.html, and --merge the page of all "
        "parts (default: no)"
    )
    add("--report", action=switch, default=False, help=report_help)

    add = add_group("large folders")
    resume_help = (
        "continuation of an earlier run in --output: what it answered is kept, and the rest is "
        "answered (default: no)"
    )
    add("--resume", action=switch, default=False, help=resume_help)
    shard_help = (
        "part to answer, K from 1 to N; its results go to results-K-of-N.json. auto/N takes K from "
        "Kubernetes (JOB_COMPLETION_INDEX) or Slurm (SLURM_ARRAY_TASK_ID), and auto takes N from "
        "Slurm too (default: all cases)"
    )
    add("--shard", type=shard, metavar="K/N", help=shard_help)
    merge_help = (
        "results of all parts in --output, merged; parts and images of --input that are missing "
        "are named (default: no)"
    )
    add("--merge", action=switch, default=False, help=merge_help)

    add = add_group("server")
    method_help = (
        "exec: one run; invoke: a server that answers the job in --input at each POST /invoke "
        "(default: %(default)s)"
    )
    add("--api-method", choices=("exec", "invoke"), default="exec", help=method_help)
    serve_help = "short form of --api-method invoke"
    add("--serve", dest="api_method", action="store_const", const="invoke", help=serve_help)
    port_help = "port of the server (default: %(default)s)"
    add("--serve-port", type=_port, default=PORT, metavar="N", help=port_help)
    return added


def variable_name(option: str) -> str:
    """The environment variable of an option: --landmarks-file -> AOP_LANDMARKS_FILE."""
    return "AOP_" + option.lstrip("-").replace("-", "_").upper()


def _from_environment(option: argparse.Action, environment: Mapping[str, str]) -> list[str]:
    """The arguments that set an option as its variable does; [] if the variable is not set.

    Raises:
        ValueError: the variable of a switch is neither yes nor no.
    """
    name = option.option_strings[0]
    text = environment.get(variable_name(name))
    if not text or option.const is not None:  # --serve has no variable
        return []
    if not isinstance(option, argparse.BooleanOptionalAction):
        return [f"{name}={text}"]
    if text.lower() not in ("yes", "no"):
        raise ValueError(f"{variable_name(name)}: expected yes or no, got {text!r}")
    return [name if text.lower() == "yes" else option.option_strings[1]]


def _milliseconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"expected milliseconds, a number above 0, got {text!r}")


def _positive_int(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (value := int(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")


def _int_up_to(largest: int, text: str) -> int:
    if _positive_int(text) > largest:
        raise argparse.ArgumentTypeError(f"expected {largest} or less, got {text}")
    return int(text)


def _port(text: str) -> int:
    return _int_up_to(65535, text)


def _threads(text: str) -> int:
    return _int_up_to(MOST_THREADS, text)


def _name_inside(text: str) -> str:
    """A file name, or a path below the case's folder.

    It may not leave that folder. Hidden names are kept for the run's own working files.
    """
    path = PurePosixPath(text)
    hidden = any(part.startswith(".") for part in path.parts)
    if path.is_absolute() or not path.name or hidden or not text.isprintable():
        raise argparse.ArgumentTypeError(
            f"expected a file name inside the case's folder, not hidden, got {text!r}"
        )
    return str(path)
