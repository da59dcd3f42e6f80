"""Unlabelled images: which files are taken, kept in memory as small squares, and crops of them."""

import argparse
import fnmatch
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from model.frame import Letterbox
from model.image import BadFrame, GreyFrame, ImageError, is_supported_name, open_image
from training.cases import CaseError, read_cases
from training.pretrain_recipe import PretrainRecipe
from training.sources import stem_of

FRAMES = 16  # taken from a stack, evenly: neighbours are nearly equal
VAL = 2**32 - 1  # stands for the epoch in the draws that never change


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which images are taken."""
    add = parser.add_argument
    add("--images", type=Path, nargs="+", required=True, metavar="DIR", help="folders of images")
    add("--pattern", default="*", metavar="GLOB", help="take only files of such names")
    add(
        "--leave-out",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="leave out files of such names, as 'test_*'; NAMES.txt: those that it lists",
    )
    add(
        "--data",
        type=Path,
        metavar="CSV",
        help="case table: of the images it names take only --splits, others are taken",
    )
    add("--splits", nargs="+", default=["train"], metavar="SPLIT", help="default: train")


def find_images(args: argparse.Namespace) -> list[Path]:
    """The files below --images that the flags leave, in the order of folders and names.

    Raises:
        CaseError: there is none, a folder is missing, or --data names none of them.
    """
    missing = [str(folder) for folder in args.images if not folder.is_dir()]
    if missing:
        raise CaseError(f"--images: expected folders, {', '.join(missing)} is none")
    unwanted = []
    for text in args.leave_out:
        listed = text.endswith(".txt")
        unwanted += Path(text).read_text(encoding="utf-8").split("\n") if listed else [text]
    unwanted = [Path(line.strip()).name for line in unwanted if line.strip()]
    found = [
        path
        for folder in args.images
        for path in sorted(folder.rglob("*"))
        if is_supported_name(path)
        and path.is_file()
        and fnmatch.fnmatchcase(path.name, args.pattern)
        and not any(fnmatch.fnmatchcase(path.name, name) for name in unwanted)
    ]
    if args.data:
        found = _of_splits(found, args.data, args.splits)
    if not found:
        raise CaseError("no image is left: look at --images, --pattern, --leave-out and --splits")
    return found


def _of_splits(paths: Sequence[Path], table: Path, splits: Sequence[str]) -> list[Path]:
    """The paths without those of a table's other splits.

    An image is known by its name without suffix, so that a copy in another format is left out too;
    where names repeat (train/1.png, test/1.png) the folders that the table gives decide.
    """
    cases = read_cases(table)
    wanted = tuple("/" + case.file for case in cases if case.split in splits)
    named = {stem_of(Path(case.file).name) for case in cases}
    barred = {stem_of(Path(case.file).name) for case in cases if case.split not in splits}
    if not any(stem_of(path.name) in named for path in paths):
        raise CaseError(
            f"{table} names no image below --images; expected the table of these images"
        )
    return [
        path
        for path in paths
        if stem_of(path.name) not in barred or ("/" + path.as_posix()).endswith(wanted)
    ]


def read_squares(paths: Sequence[Path], size: int) -> tuple[list[str], list[np.ndarray]]:
    """Names and (side, side) uint8 grey squares of every image; unreadable ones are named and left.

    Args:
        size: the crops' side; a square's is the image's longer one, at most twice the crop's.
    """
    names, squares = [], []
    for path in tqdm(paths, "reading images", leave=False):
        try:
            source = open_image(path)
            spread = np.linspace(0, source.frame_count - 1, min(FRAMES, source.frame_count))
            chosen = set(spread.round().astype(int).tolist())
            for k, frame in enumerate(source.frames()):
                if isinstance(frame, BadFrame):
                    tqdm.write(f"skipped {path.name}, frame {k}: {frame.reason}")
                elif k in chosen:
                    names.append(f"{path.name}" + (f"#{k}" if source.is_stack else ""))
                    squares.append(_square(frame, 2 * size))
        except ImageError as error:
            tqdm.write(f"skipped {path.name}: {error}")
    if len(squares) < 2:
        raise CaseError(f"expected two images or more, {len(squares)} could be read")
    return names, squares


def _square(frame: GreyFrame, largest: int) -> np.ndarray:
    height, width = frame.pixels.shape
    side = min(largest, max(height, width))
    box = Letterbox(width, height, side, frame.geometry.pixel_shape)
    return np.rint(box.apply(frame.pixels)).astype(np.uint8)


def split_indices(count: int, recipe: PretrainRecipe) -> tuple[list[int], list[int]]:
    """Which images train and which are val: a draw by the recipe's seed."""
    order = np.random.default_rng((recipe.seed, VAL)).permutation(count)
    val = min(count - 1, max(1, round(count * recipe.val_share)))
    return sorted(order[val:].tolist()), sorted(order[:val].tolist())


class UnlabelledDataset(Dataset[dict[str, Tensor]]):
    """Crops and masks, drawn by (epoch, index) alone, so that a resumed training sees the same.

    Args:
        squares: (side, side) uint8 images.
        train: random crops; else whole images, whose masks are always the same.
    """

    def __init__(
        self, squares: Sequence[np.ndarray], recipe: PretrainRecipe, train: bool = True
    ) -> None:
        self.squares, self.recipe, self.train = squares, recipe, train

    def __len__(self) -> int:
        return len(self.squares)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key
        recipe = self.recipe
        rng = np.random.default_rng((recipe.seed, epoch if self.train else VAL, index))
        image = crop(self.squares[index], recipe, rng if self.train else None)
        kept = rng.permutation(recipe.grid**2)[: recipe.kept]
        return {"image": torch.from_numpy(image[None]), "kept": torch.from_numpy(kept)}


def crop(square: np.ndarray, recipe: PretrainRecipe, rng: np.random.Generator | None) -> np.ndarray:
    """(image_size, image_size) float32 grey 0..1: a random view of a square, or the whole of it.

    No flips: left and right are anatomy here. Proportions are kept; what is turned in is black.
    """
    side, size = square.shape[0], recipe.image_size
    extent, angle, centre = float(side), 0.0, np.full(2, (side - 1) / 2)
    if rng is not None:
        extent *= math.sqrt(rng.uniform(*recipe.crop_area))
        angle = rng.uniform(-recipe.rotation_deg, recipe.rotation_deg)
        centre = centre + rng.uniform(-1, 1, 2) * (side - extent) / 2
    matrix = cv2.getRotationMatrix2D(tuple(centre), angle, size / extent)
    matrix[:, 2] += (size - 1) / 2 - centre
    image = cv2.warpAffine(square, matrix, (size, size), flags=cv2.INTER_LINEAR)
    grey = image.astype(np.float32) / 255
    if rng is not None:
        grey = grey ** rng.uniform(*recipe.gamma)
        grey += (rng.uniform(*recipe.contrast) - 1) * (grey - grey.mean()) * (grey > 0)
    return np.clip(grey, 0, 1).astype(np.float32)
