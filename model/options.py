"""The command line of process.py."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from model.outputs import RESULTS, TABLE, AnswerFiles

INPUT = Path("/input")
OUTPUT = Path("/output")
MOUNTED_MODELS = Path("/opt/ml/model")


def parse_options(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """The command line, with `files` made of the answers' names; exits with 2 on a bad option."""
    parser = argparse.ArgumentParser(
        "process.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", type=Path, default=INPUT, help="folder of images or a job (%(default)s)")
    add("--output", type=Path, default=OUTPUT, help="folder for the answers (%(default)s)")
    model_help = f"ONNX file (the one under {MOUNTED_MODELS}, else the shipped one)"
    add("--model", type=Path, metavar="FILE", help=model_help)
    providers = ("auto", "cuda", "cpu")
    provider_help = "processor; auto: CUDA where it runs, else the CPU (%(default)s)"
    add("--provider", choices=providers, default="auto", help=provider_help)
    add("--decode", choices=("subpixel", "argmax"), help="heatmap decoder (the model's own)")
    overlay_help = "write overlay.png (yes, but not for a job)"
    add("--overlay", action=argparse.BooleanOptionalAction, help=overlay_help)
    frame_help = "landmarks in the file's world frame, mm where it has one, or in px (%(default)s)"
    add("--frame-of-answers", choices=("world", "pixel"), default="world", help=frame_help)
    budget_help = "warn of cases that took longer"
    add("--latency-budget-ms", type=milliseconds, metavar="N", help=budget_help)
    for option, default, words in (
        ("--landmarks-file", "aop-landmarks.json", "name of the landmarks' answer (%(default)s)"),
        ("--angle-file", "angle-of-progression.json", "name of the angle's (%(default)s)"),
        ("--three-points-file", None, "write a Three-point angle too, e.g. as aop-angle.json"),
    ):
        add(option, type=_name_inside, metavar="NAME", default=default, help=words)
    args = parser.parse_args(arguments)
    args.files = AnswerFiles(args.landmarks_file, args.angle_file, args.three_points_file)
    names = [*args.files.names, RESULTS, TABLE]
    if len(set(names)) < len(names):
        parser.error(f"each answer needs a name of its own, got {', '.join(names)}")
    return args


def milliseconds(text: str) -> float:
    """A number above 0; argparse tells the user this function's name for any other text."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def _name_inside(text: str) -> str:
    """A file's name, or its path below the case's folder; an answer never leaves the output."""
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise argparse.ArgumentTypeError(f"expected a name inside the output folder, got {text!r}")
    return str(path)
