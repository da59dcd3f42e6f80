"""Samples for training: image files and a case table -> normalised inputs and target heatmaps.

The random changes of a sample depend only on the seed, the epoch and the index. A resumed training
therefore sees the same samples, with any number of workers and processes.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from model.anatomy import Floats
from model.frame import Letterbox, Pair, input_to_cells
from model.images.source import BadFrame, ImageError, open_image
from model.masks import CLASSES
from training.data.augment import augment
from training.data.case_table import Case, CaseError, read_cases, require_images
from training.data.sources import read_mask
from training.recipes import Recipe


class LandmarkDataset(Dataset[dict[str, Tensor]]):
    """Labelled images as network inputs, with target heatmaps; the key is (epoch, index).

    A sample holds `image` (channels, size, size), `heatmaps` (3, cells, cells), `visible` (3,),
    which is 1 for a landmark in the frame, and `index`. With a folder of masks it also holds
    `masks` (2, cells, cells) and `has_mask`, 0 or 1.

    Args:
        cases: labelled images; each `file` is a path below `images`.
        masks: folder of masks with the images' stems, or None.
        train: True for random changes and label noise, False for the plain letterboxed image.
        more: further cases without masks, each with its own folder of images.
        styles: images whose look the augmentation may mix in (augment.mix_amplitudes).
    """

    def __init__(
        self,
        cases: Sequence[Case],
        images: Path,
        masks: Path | None,
        recipe: Recipe,
        train: bool,
        more: Sequence[tuple[Case, Path]] = (),
        styles: Sequence[Path] = (),
    ) -> None:
        self.styles = list(styles)
        self.cases = [*cases, *(case for case, _ in more)]
        self.folders = [images] * len(cases) + [folder for _, folder in more]
        self.masked_count = len(cases)  # `more`, which has no masks, follows
        self.masks = {path.stem: path for path in masks.iterdir()} if masks else None
        self.recipe = recipe
        self.spec = recipe.spec()
        self.train = train

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key
        case = self.cases[index]
        grey, spacing = read_frame(self.folders[index] / case.file, case.frame)
        box = Letterbox(grey.shape[1], grey.shape[0], self.spec.input_size, spacing)
        image, points, mask = box.apply(grey), box.to_input(case.landmarks_px), None
        if self.masks is not None and index < self.masked_count:
            mask = box.apply(read_mask(self.masks[Path(case.file).stem]), nearest=True)
        if self.train:
            rng = np.random.default_rng((self.recipe.seed, epoch, index))
            noise_px = self.recipe.landmark_noise_px * self.spec.input_size / 512
            points = points + rng.normal(0.0, 1.0, points.shape) * noise_px
            style = self._draw_style(rng) if self.styles else None
            settings = self.recipe.augmentation
            image, mask, points = augment(image, mask, points, settings, rng, style)
        inside = ((points >= -0.5) & (points <= self.spec.input_size - 0.5)).all(axis=1)
        heatmaps = self.spec.codec.encode(input_to_cells(points, self.spec.stride))
        sample = {
            "image": torch.from_numpy(self.spec.normalise(image)),
            "heatmaps": torch.from_numpy(heatmaps),
            "visible": torch.from_numpy(inside.astype(np.float32)),
            "index": torch.tensor(index),
        }
        if self.masks is not None:
            sample["masks"] = torch.from_numpy(self._mask_shares(mask))
            sample["has_mask"] = torch.tensor(float(mask is not None))
        return sample

    def _draw_style(self, rng: np.random.Generator) -> np.ndarray:
        grey, spacing = read_frame(self.styles[rng.integers(len(self.styles))])
        return Letterbox(grey.shape[1], grey.shape[0], self.spec.input_size, spacing).apply(grey)

    def _mask_shares(self, mask: np.ndarray | None) -> np.ndarray:
        """(size, size) class numbers -> (2, cells, cells): each class's share of a cell's area."""
        cells = self.spec.codec.columns
        if mask is None:
            return np.zeros((len(CLASSES), cells, cells), np.float32)
        shares = [
            cv2.resize(
                (mask == k + 1).astype(np.float32), (cells, cells), interpolation=cv2.INTER_AREA
            )
            for k in range(len(CLASSES))
        ]
        return np.stack(shares)


def further_cases(
    tables: Sequence[tuple[Path, Path]], data: Path, images: Path
) -> list[tuple[Case, Path]]:
    """Read the training cases of further tables, each with its folder of images.

    Args:
        tables: (table, folder of its images). Rows with a split other than train are left out.
        data: the main table, whose split says which images must not be trained on.
        images: folder of the main table's images.

    Raises:
        CaseError: a table cannot be read or used, or an image is missing or is in val or test.
    """
    known = read_cases(data) if tables else []
    if tables and not any(case.split for case in known):
        raise CaseError(
            f"--more needs a split column in {data} (training.fit writes one to RUN/cases.csv): a "
            "split drawn anew could validate on images that pseudo-labels were made from"
        )
    held_out = {
        ((images / case.file).resolve(), case.frame) for case in known if case.split != "train"
    }
    further = []
    for table, folder in tables:
        cases = [case for case in read_cases(table) if case.split in (None, "train")]
        require_images(cases, folder, table)
        leaked = [c.file for c in cases if ((folder / c.file).resolve(), c.frame) in held_out]
        if leaked:
            raise CaseError(
                f"{len(leaked)} images of {table} are in split val or test of {data}, the first is "
                f"{leaked[0]}; remove them from {table.name}, or they would be trained on"
            )
        further += [(case, folder) for case in cases]
    return further


def read_frame(path: Path, frame: int | None = None) -> tuple[np.ndarray, Pair]:
    """Read one frame: its (H, W) grey values 0..255, and the width and height of a pixel.

    Args:
        frame: number of the frame in a stack, from 0; None for the first.

    Raises:
        ImageError: the file cannot be read, or does not have this frame.
    """
    for number, content in enumerate(open_image(path).frames()):
        if number == (frame or 0):
            if isinstance(content, BadFrame):
                raise ImageError(f"{path.name}: {content.reason}")
            return content.pixels, content.geometry.pixel_shape
    raise ImageError(f"{path.name} has no frame {frame}")


class EpochSampler(Sampler[tuple[int, int]]):
    """This process's share of an epoch: (epoch, index) in the epoch's random order.

    Args:
        length: number of images.
        rank, world: number of this process, from 0, and how many there are.
        probabilities: (length,) with which each image is drawn, with replacement; None to draw each
            image once.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        probabilities: Floats | None = None,
    ) -> None:
        self.length, self.seed, self.rank, self.world = length, seed, rank, world
        self.probabilities = probabilities
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        if self.probabilities is None:
            order = rng.permutation(self.length)
        else:
            order = rng.choice(self.length, self.length, p=self.probabilities)
        # repeats the start of the order where the processes do not divide it
        order = np.resize(order, len(self) * self.world)
        return iter([(self.epoch, int(i)) for i in order[self.rank :: self.world]])

    def __len__(self) -> int:
        return math.ceil(self.length / self.world)


class TrainLoader(DataLoader[dict[str, Tensor]]):
    """Batches of this process's share of an epoch; set `sampler.epoch` before each pass."""

    sampler: EpochSampler


def train_loader(
    dataset: Dataset[dict[str, Tensor]], sampler: EpochSampler, batch: int, workers: int
) -> TrainLoader:
    """Batches of a dataset in the sampler's order.

    Args:
        batch: images a step, over all processes.
        workers: number of subprocesses that load images; with 0, this process loads them.
    """
    own = max(1, batch // sampler.world)  # images a step in this process
    return TrainLoader(
        dataset,
        batch_size=own,
        sampler=sampler,
        num_workers=workers,
        drop_last=sampler.length // sampler.world >= own,
        worker_init_fn=_use_one_thread,
    )


def sampling_probabilities(dataset: LandmarkDataset) -> Floats | None:
    """(n,) probability of each image, so that many frames of one scan do not count as many scans.

    A case without a group counts as its own group. None if the recipe does not balance groups.
    """
    balance = dataset.recipe.balance
    if not balance:
        return None
    groups = [case.group or f"case {k}" for k, case in enumerate(dataset.cases)]
    sizes = Counter(groups)
    weights = np.array([sizes[group] ** -balance for group in groups])
    return np.asarray(weights / weights.sum())


def _use_one_thread(_worker: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
