"""Unlabelled images: which files are taken, kept in memory as small squares, and crops of them."""

import argparse
import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from model.anatomy import Floats
from model.frame import Letterbox, Pair
from model.images.source import BadFrame, GreyFrame, ImageError, is_supported_name, open_image
from training.data.case_table import CaseError, read_cases
from training.data.sources import stem_of

FRAMES = 16  # taken from a stack, evenly: neighbours are nearly equal
VAL = 2**32 - 1  # stands for the epoch in the draws that never change


@dataclass(frozen=True)
class ImageChoice:
    """Which images are taken.

    Args:
        images: folders, searched with all below them.
        pattern: shell pattern of the file names to take.
        leave_out: patterns of file names to leave out, or text files that list such.
        data: case table: of the images that it names only those of `splits` are taken.
    """

    images: tuple[Path, ...]
    pattern: str = "*"
    leave_out: tuple[str, ...] = ()
    data: Path | None = None
    splits: tuple[str, ...] = ("train",)


@dataclass(frozen=True)
class CropSettings:
    """How crops are cut from an image, and how many of their patches stay visible.

    Args:
        size_px: a crop's side.
        patches: in a crop; `kept` of them are seen by the encoder.
        area: range of a crop's share of the image's area.
        rotation_deg: rotation by up to +- this.
        gamma, contrast: ranges of the grey values' exponent and of the factor about their mean.
        seed: of all draws.
    """

    size_px: int
    patches: int
    kept: int
    area: Pair
    rotation_deg: float
    gamma: Pair
    contrast: Pair
    seed: int


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `image_choice` reads."""
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


def image_choice(args: argparse.Namespace) -> ImageChoice:
    """What the flags of `add_image_arguments` say."""
    return ImageChoice(
        images=tuple(args.images),
        pattern=args.pattern,
        leave_out=tuple(args.leave_out),
        data=args.data,
        splits=tuple(args.splits),
    )


def find_images(choice: ImageChoice) -> list[Path]:
    """The chosen files, in the order of folders and names.

    Raises:
        CaseError: there is none, a folder is missing, or --data names none of them.
    """
    missing = [str(folder) for folder in choice.images if not folder.is_dir()]
    if missing:
        raise CaseError(f"--images: expected folders, {', '.join(missing)} is not one")
    unwanted: list[str] = []
    for text in choice.leave_out:
        listed = text.endswith(".txt")
        unwanted += Path(text).read_text(encoding="utf-8").split("\n") if listed else [text]
    unwanted = [Path(line.strip()).name for line in unwanted if line.strip()]
    found = [
        path
        for folder in choice.images
        for path in sorted(folder.rglob("*"))
        if is_supported_name(path)
        and path.is_file()
        and fnmatch.fnmatchcase(path.name, choice.pattern)
        and not any(fnmatch.fnmatchcase(path.name, name) for name in unwanted)
    ]
    if choice.data:
        found = _of_splits(found, choice.data, choice.splits)
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
                    names.append(path.name + (f"#{k}" if source.is_stack else ""))
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


def split_indices(count: int, val_share: float, seed: int) -> tuple[list[int], list[int]]:
    """Which of so many images train and which are val: a draw that keeps one or more of both."""
    order = np.random.default_rng((seed, VAL)).permutation(count)
    val = min(count - 1, max(1, round(count * val_share)))
    return sorted(order[val:].tolist()), sorted(order[:val].tolist())


class UnlabelledDataset(Dataset[dict[str, Tensor]]):
    """Crops and masks, drawn by (epoch, index) alone, so that a resumed training sees the same.

    Args:
        squares: (side, side) uint8 images.
        train: random crops; else whole images, whose masks are always the same.
    """

    def __init__(
        self, squares: Sequence[np.ndarray], settings: CropSettings, train: bool = True
    ) -> None:
        self.squares, self.settings, self.train = squares, settings, train

    def __len__(self) -> int:
        return len(self.squares)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key
        settings = self.settings
        rng = np.random.default_rng((settings.seed, epoch if self.train else VAL, index))
        image = crop(self.squares[index], settings, rng if self.train else None)
        kept = rng.permutation(settings.patches)[: settings.kept]
        return {"image": torch.from_numpy(image[None]), "kept": torch.from_numpy(kept)}


def crop(square: np.ndarray, settings: CropSettings, rng: np.random.Generator | None) -> np.ndarray:
    """(size_px, size_px) float32 grey 0..1: a random view of a square, or the whole of it.

    No flips: left and right are anatomy here. Proportions are kept; what is turned in is black.
    """
    side, size = square.shape[0], settings.size_px
    extent, angle, centre = float(side), 0.0, np.full(2, (side - 1) / 2)
    if rng is not None:
        extent *= math.sqrt(rng.uniform(*settings.area))
        angle = rng.uniform(-settings.rotation_deg, settings.rotation_deg)
        centre = centre + rng.uniform(-1, 1, 2) * (side - extent) / 2
    matrix: Floats = np.asarray(cv2.getRotationMatrix2D(tuple(centre), angle, size / extent))
    matrix[:, 2] += (size - 1) / 2 - centre
    image = cv2.warpAffine(square, matrix, (size, size), flags=cv2.INTER_LINEAR)
    grey = image.astype(np.float32) / 255
    if rng is not None:
        grey = grey ** rng.uniform(*settings.gamma)
        grey += (rng.uniform(*settings.contrast) - 1) * (grey - grey.mean()) * (grey > 0)
    return np.clip(grey, 0, 1).astype(np.float32)
