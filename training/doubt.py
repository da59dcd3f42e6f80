"""Count how often a model says NOT SURE: on a split, on distorted copies, other views and scenes.

    python -m training.doubt --model aop.onnx --data cases.csv --images DIR --split test \\
        --others DIR 'test_*' --output counts.json

Each image is judged exactly as process.py judges it. Of the split's images as they are, few should
be doubted. Nearly all others should be: distorted copies (mirrored, upside down, inverted, ...),
images of other views (--others), and drawn scenes.

It prints one line for each kind of image, and --output writes the same counts as JSON. If too many
images of the split are doubted, or too few of the others, calibrate the model anew:
training.calibrate --doubted SHARE --others DIR.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from model.frame import Geometry, Pixels
from model.images.source import GreyFrame
from model.measure import measure_frame
from model.predictor import ModelError, Predictor, load_predictor
from training.data.case_table import CaseError, cases_of_split
from training.data.dataset import read_frame
from training.data.scenes import DISTORTIONS, SCENES
from training.data.sources import images_matching
from training.evaluation.statistics import coverage_interval
from training.learning.checkpoint import write_text

SCENE_SIDE_PX = 384
Counts = dict[str, tuple[int, int]]  # kind of image -> number doubted, number of all


@dataclass(frozen=True)
class DoubtOptions:
    """The command line.

    Args:
        split: None takes all cases.
        others: a folder, and a pattern of file names if one follows it.
        scenes: number to draw of each kind.
    """

    model: Path
    data: Path
    images: Path
    split: str | None
    others: Sequence[str] | None
    scenes: int
    output: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = DoubtOptions(**vars(_parser().parse_args(arguments)))
    try:
        predictor = load_predictor(options.model)
        cases = cases_of_split(options.data, options.split)
        paths = [(options.images / case.file, case.frame) for case in cases]
        others = images_matching(options.others) if options.others else []
        counts = count_doubtful(predictor, paths, others, options.scenes)
        print(format_counts(counts))
        if options.output:
            write_text(options.output, json.dumps(counts, indent=1) + "\n")
    except (CaseError, ModelError, OSError, ValueError) as error:
        print(f"training.doubt: {error}", file=sys.stderr)
        return 2
    return 0


def count_doubtful(
    predictor: Predictor,
    paths: Sequence[tuple[Path, int | None]],
    others: Sequence[Path],
    scenes: int,
) -> Counts:
    """Judge every image and count the doubtful ones by kind.

    Args:
        paths: image files of the right view, with the frame's number in a stack.
        others: image files of other views.
        scenes: number to draw of each kind.
    """
    rng = np.random.default_rng(0)
    counts: Counts = {}

    def judge(kind: str, pixels: Pixels, pixel_shape: tuple[float, float]) -> None:
        frame = GreyFrame(pixels, None, 0, Geometry(pixel_shape))
        entry = measure_frame(kind, kind, frame, predictor)
        doubted, total = counts.get(kind, (0, 0))
        counts[kind] = doubted + (entry.doubtful is not False), total + 1

    for path, frame in tqdm(paths, "split", leave=False):
        grey, pixel_shape = read_frame(path, frame)
        judge("as they are", grey, pixel_shape)
        grey_uint8 = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
        for kind, distort in DISTORTIONS.items():
            judge(kind, distort(grey_uint8, rng), pixel_shape)
    for path in tqdm(others, "others", leave=False):
        judge("other views", *read_frame(path))
    for kind, draw in tqdm(SCENES.items(), "scenes", leave=False):
        for _ in range(scenes):
            judge(kind, draw(SCENE_SIDE_PX, rng), (1.0, 1.0))
    return counts


def format_counts(counts: Counts) -> str:
    """One line for each kind, with the 95 % interval of the doubtful share."""
    lines = [f"{'':<24}{'doubtful':>10}{'of':>6}   share, 95 % interval"]
    for kind, (doubted, total) in counts.items():
        low, high = coverage_interval(doubted, total)
        share = f"{doubted / total:6.1%} ({low:.1%} to {high:.1%})"
        lines.append(f"{kind:<24}{doubted:>10}{total:>6}   {share}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.doubt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="ONNX", help="model that process.py runs")
    data = "case table of images that show the right view"
    add("--data", type=Path, required=True, metavar="CSV", help=data)
    add("--images", type=Path, required=True, metavar="DIR", help="folder of the table's images")
    add("--split", help="split to judge: train, val or test (default: all cases)")
    others = "folder of images of other views, and a pattern if only some of their names count"
    add("--others", nargs="+", metavar=("DIR", "PATTERN"), help=others)
    scenes = "number of scenes to draw of each kind (%(default)s)"
    add("--scenes", type=int, default=100, metavar="N", help=scenes)
    add("--output", type=Path, metavar="FILE", help="JSON file for the counts (default: none)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
