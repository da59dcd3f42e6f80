"""The images of a benchmark: of a case table, of a folder, or smooth random ones."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.timing import QUICK_ROUNDS, Picture
from export.to_onnx import RANDOM_IMAGES, random_image
from model.images.source import is_supported_name
from training.cases import Case, CaseError, read_cases
from training.data import read_grey
from training.recipes import UNET

SIDE_PX = 512  # of random images


@dataclass(frozen=True)
class Images:
    """pictures: those that are timed. words: what they are. cases, folder: those with labels."""

    pictures: Sequence[Picture]
    words: str
    cases: Sequence[Case] = ()
    folder: Path = Path()


def images_of(args: argparse.Namespace) -> Images:
    """The images that the command line names, in a fixed random order, so that any share is fair.

    Raises:
        CaseError, ImageError: the table, the folder or an image cannot be used.
    """
    timed = args.rounds * (1 + QUICK_ROUNDS)
    if args.data:
        folder = args.images or args.data.parent / "images"
        split = args.split or "val"
        cases = [case for case in read_cases(args.data) if split in ("all", case.split)]
        if not cases:
            raise CaseError(
                f"{args.data}: no case has split '{split}': pass another --split, or all"
            )
        cases = [cases[k] for k in _chosen(len(cases), args.images_count)]
        pictures = [Picture(*read_grey(folder / case.file, case.frame)) for case in cases[:timed]]
        words = f"{len(cases)} images of {args.data.name}, split {split}"
        return Images(pictures, words, cases, folder)
    if args.input:
        paths = sorted(path for path in args.input.rglob("*") if is_supported_name(path))
        if not paths:
            raise CaseError(f"--input: no image below {args.input}")
        paths = [paths[k] for k in _chosen(len(paths), args.images_count)][:timed]
        pictures = [Picture(*read_grey(path)) for path in paths]
        return Images(pictures, f"{len(paths)} images of the folder {args.input.name}")
    count = min(args.images_count or RANDOM_IMAGES, timed)
    plain = UNET.spec().model_copy(
        update={"input_size": SIDE_PX, "channels": 1, "mean": 0, "std": 1}
    )
    random = [random_image(plain, seed)[0].astype(np.uint8) for seed in range(count)]
    words = f"{count} smooth random images of {SIDE_PX} px"
    return Images([Picture(grey, (1.0, 1.0)) for grey in random], words)


def _chosen(count: int, most: int | None) -> list[int]:
    """Numbers of the images in their random order, so many at most."""
    order: list[int] = np.random.default_rng(0).permutation(count).tolist()
    return order[:most]
