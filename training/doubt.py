"""How often a model says 'not sure': on a split as it is and spoiled, on other views, on scenes.

    python -m training.doubt --model aop.onnx --data cases.csv --images DIR --split test \\
        --others DIR 'test_*'

Each image is judged exactly as process.py judges it. Few images of the split should be doubted as
they are. Everything else (mirrored, upside down, inverted, noise, ..., other views) should be.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
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

SCENE_SIZE = 384  # px
Counts = dict[str, tuple[int, int]]  # kind -> doubted, of how many


@dataclass(frozen=True)
class DoubtOptions:
    """The command line.

    others: a folder and perhaps a pattern of file names. scenes: how many of each kind are drawn.
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
        counts = count(predictor, paths, others, options.scenes)
        print(as_text(counts))
        if options.output:
            write_text(options.output, json.dumps(counts, indent=1) + "\n")
    except (CaseError, ModelError, OSError, ValueError) as error:
        print(f"training.doubt: {error}", file=sys.stderr)
        return 2
    return 0


def count(
    predictor: Predictor,
    paths: Sequence[tuple[Path, int | None]],
    others: Sequence[Path],
    scenes: int,
) -> Counts:
    """Kind -> how many are doubtful, and of how many."""
    rng = np.random.default_rng(0)
    counts: Counts = {}

    def judge(kind: str, pixels: Pixels, pixel_shape: tuple[float, float]) -> None:
        frame = GreyFrame(pixels, None, 0, Geometry(pixel_shape))
        entry = measure_frame(kind, kind, frame, predictor)
        doubted, seen = counts.get(kind, (0, 0))
        counts[kind] = doubted + (entry.doubtful is not False), seen + 1

    for path, frame in tqdm(paths, "split", leave=False):
        grey, pixel_shape = read_frame(path, frame)
        judge("as they are", grey, pixel_shape)
        whole = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
        for kind, spoil in DISTORTIONS.items():
            judge(kind, spoil(whole, rng), pixel_shape)
    for path in tqdm(others, "others", leave=False):
        judge("other views", *read_frame(path))
    for kind, draw in tqdm(SCENES.items(), "scenes", leave=False):
        for _ in range(scenes):
            judge(kind, draw(SCENE_SIZE, rng), (1.0, 1.0))
    return counts


def as_text(counts: Counts) -> str:
    """One line for each kind, with the 95 % interval of the share."""
    return "\n".join(_lines(counts))


def _lines(counts: Counts) -> Iterator[str]:
    yield f"{'':<24}{'doubtful':>10}{'of':>6}   share, 95 % interval"
    for kind, (doubted, seen) in counts.items():
        low, high = coverage_interval(doubted, seen)
        share = f"{doubted / seen:6.1%} ({low:.1%} to {high:.1%})"
        yield f"{kind:<24}{doubted:>10}{seen:>6}   {share}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.doubt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="the ONNX file")
    add("--data", type=Path, required=True, help="case table (CSV) of images of the right view")
    add("--images", type=Path, required=True, help="folder of its images")
    add("--split", help="train, val or test (default: all cases)")
    add(
        "--others",
        nargs="+",
        metavar="DIR [PATTERN]",
        help="images of other views: a folder, and a pattern of names if not all of it",
    )
    add(
        "--scenes",
        type=int,
        default=100,
        metavar="N",
        help="drawn scenes of each kind (%(default)s)",
    )
    add("--output", type=Path, help="JSON file to write the counts to as well")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
