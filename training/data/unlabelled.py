"""Unlabelled images for pretraining: select files, keep them in memory as squares, cut crops."""

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
from training.data.sources import name_without_suffix

FRAMES_A_STACK = 16  # at most, spread evenly, since neighbours are nearly equal
NO_EPOCH = 2**32 - 1  # takes the epoch's place in draws that are the same in every epoch


@dataclass(frozen=True)
class UnlabelledSelection:
    """Which images to use.

    Args:
        images: folders, searched with their subfolders.
        pattern: shell pattern of the file names to use.
        leave_out: shell patterns of file names to leave out, or .txt files with a pattern a line.
        data: case table; images that it names outside `splits` are left out, images that it does
            not name are used.
        splits: names of splits.
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
        size_px: side of a crop.
        patches: number of patches in a crop.
        kept: number of patches that the encoder sees.
        area: range of the share of the image's area that a crop covers.
        rotation_deg: largest rotation to either side.
        gamma: range of the exponent of the grey values.
        contrast: range of the factor about the mean grey value.
        seed: random seed of crops and masks.
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
    """Add the flags that `image_selection` reads."""
    add = parser.add_argument
    add(
        "--images",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="folders of images, searched with their subfolders",
    )
    add("--pattern", default="*", metavar="GLOB", help="shell pattern of the file names to use")
    add(
        "--leave-out",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="file names to leave out, such as 'test_*', or a .txt file that lists names",
    )
    add(
        "--data",
        type=Path,
        metavar="CSV",
        help="case table; images that it names outside --splits are left out",
    )
    add(
        "--splits",
        nargs="+",
        default=["train"],
        metavar="SPLIT",
        help="splits of --data to use (default: train)",
    )


def image_selection(args: argparse.Namespace) -> UnlabelledSelection:
    """The selection that the flags of `add_image_arguments` ask for."""
    return UnlabelledSelection(
        images=tuple(args.images),
        pattern=args.pattern,
        leave_out=tuple(args.leave_out),
        data=args.data,
        splits=tuple(args.splits),
    )


def find_images(selection: UnlabelledSelection) -> list[Path]:
    """The selected files, in the order of folders and names.

    Raises:
        CaseError: no file is left, a folder is missing, or the case table names no file found.
    """
    missing = [str(folder) for folder in selection.images if not folder.is_dir()]
    if missing:
        raise CaseError(f"--images: expected folders, found none at {', '.join(missing)}")
    lines: list[str] = []
    for text in selection.leave_out:
        is_list = text.endswith(".txt")
        lines += Path(text).read_text(encoding="utf-8").split("\n") if is_list else [text]
    unwanted = [Path(line.strip()).name for line in lines if line.strip()]
    paths = [
        path
        for folder in selection.images
        for path in sorted(folder.rglob("*"))
        if is_supported_name(path)
        and path.is_file()
        and fnmatch.fnmatchcase(path.name, selection.pattern)
        and not any(fnmatch.fnmatchcase(path.name, name) for name in unwanted)
    ]
    if selection.data:
        paths = _drop_other_splits(paths, selection.data, selection.splits)
    if not paths:
        raise CaseError("no image is left: check --images, --pattern, --leave-out and --splits")
    return paths


def _drop_other_splits(paths: Sequence[Path], table: Path, splits: Sequence[str]) -> list[Path]:
    """The paths without images that a table puts into other splits.

    An image is recognised by its name without suffix, so a copy in another format is left out too.
    If a name is in several splits (train/1.png, test/1.png), the table's folders decide.
    """
    cases = read_cases(table)
    wanted = tuple("/" + case.file for case in cases if case.split in splits)
    named = {name_without_suffix(Path(case.file).name) for case in cases}
    barred = {
        name_without_suffix(Path(case.file).name) for case in cases if case.split not in splits
    }
    if not any(name_without_suffix(path.name) in named for path in paths):
        raise CaseError(
            f"{table} names no image below --images; expected the case table of these images"
        )
    return [
        path
        for path in paths
        if name_without_suffix(path.name) not in barred or ("/" + path.as_posix()).endswith(wanted)
    ]


def read_squares(paths: Sequence[Path], size: int) -> tuple[list[str], list[np.ndarray]]:
    """Read every image: names, and (side, side) uint8 grey squares.

    A square's side is the image's longer side, but at most twice `size`. Images that cannot be read
    are printed and left out.

    Args:
        size: side of a crop, px.

    Raises:
        CaseError: fewer than two images could be read.
    """
    names, squares = [], []
    for path in tqdm(paths, "reading images", leave=False):
        try:
            source = open_image(path)
            count = min(FRAMES_A_STACK, source.frame_count)
            chosen = set(np.linspace(0, source.frame_count - 1, count).round().astype(int).tolist())
            for k, frame in enumerate(source.frames()):
                if isinstance(frame, BadFrame):
                    tqdm.write(f"skipped {path.name}, frame {k}: {frame.reason}")
                elif k in chosen:
                    names.append(path.name + (f"#{k}" if source.is_stack else ""))
                    squares.append(_letterbox(frame, 2 * size))
        except ImageError as error:
            tqdm.write(f"skipped {path.name}: {error}")
    if len(squares) < 2:
        raise CaseError(f"expected two images or more, {len(squares)} could be read")
    return names, squares


def _letterbox(frame: GreyFrame, largest: int) -> np.ndarray:
    """(side, side) uint8: the frame in a square of at most `largest` px a side."""
    height, width = frame.pixels.shape
    side = min(largest, max(height, width))
    box = Letterbox(width, height, side, frame.geometry.pixel_shape)
    return np.rint(box.apply(frame.pixels)).astype(np.uint8)


def split_indices(count: int, val_share: float, seed: int) -> tuple[list[int], list[int]]:
    """Draw the indices of train and val, at least one of each, out of `count` images."""
    order = np.random.default_rng((seed, NO_EPOCH)).permutation(count)
    val = min(count - 1, max(1, round(count * val_share)))
    return sorted(order[val:].tolist()), sorted(order[:val].tolist())


class UnlabelledDataset(Dataset[dict[str, Tensor]]):
    """Crops and the patches kept of them; the key is (epoch, index).

    A draw depends only on the seed and the key, so a resumed training sees the same crops. A sample
    holds `image` (1, size_px, size_px), grey 0..1, and `kept` (kept,), numbers of patches.

    Args:
        squares: (side, side) uint8 images.
        train: True for random crops; False for whole images whose masks never change.
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
        rng = np.random.default_rng((settings.seed, epoch if self.train else NO_EPOCH, index))
        image = cut_crop(self.squares[index], settings, rng if self.train else None)
        kept = rng.permutation(settings.patches)[: settings.kept]
        return {"image": torch.from_numpy(image[None]), "kept": torch.from_numpy(kept)}


def cut_crop(
    square: np.ndarray, settings: CropSettings, rng: np.random.Generator | None
) -> np.ndarray:
    """(size_px, size_px) float32 grey 0..1: a random crop of a square, or all of it without `rng`.

    There are no flips, since left and right are anatomy. Proportions are kept. A rotated crop is
    black where it reaches beyond the square.
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
