"""Training of the view head: does an image show the view that the landmarks are defined in?

The network stays as it is. The right samples are the labelled images of split train, changed as in
training, but never mirrored. The wrong ones are the same images spoiled (mirrored, turned,
inverted, ...: `data.scenes`), images of other views from given folders, and drawn scenes. The head
sees features of the frozen network, computed once, and learns by binary cross-entropy in which
right and wrong weigh the same.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from model.frame import Letterbox
from model.network import TransUNet
from model.spec import ModelSpec
from training.data.augment import augment
from training.data.case_table import Case
from training.data.dataset import read_grey
from training.data.scenes import SCENES, SPOILED, Draw, Grey
from training.recipes import COMPACT

RIGHT_DRAWS, OTHER_DRAWS = 5, 3  # of every image
LEARNING_RATE, WEIGHT_DECAY, EPOCHS, BATCH = 1e-3, 0.05, 30, 64
MARKS = 0.08  # share of the height at the top in which machines put their orientation mark
CHANGES = COMPACT.augmentation.model_copy(
    update={
        "rotation_deg": 25,
        "scale": (0.8, 1.25),
        "shift": 0.08,
        "stretch": 0.1,
        "elastic": 0.0,
        "erase": 0.2,
    }
)
Sample = tuple[Grey, bool]


def train_view_head(
    network: TransUNet,
    spec: ModelSpec,
    cases: Sequence[Case],
    images: Path,
    others: Sequence[Path],
    seed: int = 1,
) -> None:
    """Fill `network.view`.

    Args:
        cases: labelled images of the right view.
        others: image files of other views.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    x, right = features(network, spec, samples(cases, images, others, spec.input_size, rng), rng,
                        RIGHT_DRAWS * len(cases) * 3 + OTHER_DRAWS * len(others))  # fmt: skip
    weight = torch.where(right, 0.5 / right.float().mean(), 0.5 / (~right).float().mean())
    head = network.view
    assert head is not None  # the caller has made it
    for module in head.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    learn(head, x, right.float(), weight)


def samples(
    cases: Sequence[Case], images: Path, others: Sequence[Path], size: int, rng: Draw
) -> Iterator[Sample]:
    """(size, size) images and whether each is right: for each right one, a spoiled and a drawn."""
    spoilers, scenes = list(SPOILED.values()), list(SCENES.values())
    for case in cases:
        square = _square(images / case.file, size)
        for _ in range(RIGHT_DRAWS):
            yield square, True
            yield spoilers[rng.integers(len(spoilers))](square, rng), False
            yield scenes[rng.integers(len(scenes))](size, rng), False
    for path in others:
        square = _square(path, size)
        for k in range(OTHER_DRAWS):
            yield (square[:, ::-1].copy() if k % 2 else square), False


def features(
    network: TransUNet, spec: ModelSpec, seen: Iterator[Sample], rng: Draw, count: int
) -> tuple[Tensor, Tensor]:
    """(n, channels, side, side) float16 features of changed samples, and (n,) which are right."""
    device = next(network.parameters()).device
    network.eval()
    rows, right = [], []
    batch: list[np.ndarray] = []

    def flush() -> None:
        if batch:
            with torch.inference_mode():
                found = network.view_features(torch.from_numpy(np.stack(batch)).to(device))
            rows.append(found.half().cpu())
            batch.clear()

    for image, is_right in tqdm(seen, "features of the view", total=count, leave=False):
        batch.append(spec.normalise(change_image(image, rng)))
        right.append(is_right)
        if len(batch) == BATCH:
            flush()
    flush()
    return torch.cat(rows), torch.tensor(right)


def change_image(image: Grey, rng: Draw) -> np.ndarray:
    """An image as another examination might have it; its sides and its top stay where they are.

    In every second one the marks at the top are gone, so that the anatomy is looked at.
    """
    nowhere = np.zeros((3, 2))
    seen, _, _ = augment(image, None, nowhere, CHANGES, rng)
    if rng.random() < 0.5:
        seen[: round(MARKS * len(seen))] = 0
    return seen


def learn(head: nn.Module, x: Tensor, right: Tensor, weight: Tensor) -> None:
    """Train a head on features; ends in evaluation mode."""
    device = next(head.parameters()).device
    optimiser = torch.optim.AdamW(head.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    head.train().requires_grad_(True)
    for _ in (progress := tqdm(range(EPOCHS), "view head", leave=False)):
        total = 0.0
        for chosen in torch.randperm(len(x)).split(BATCH):
            logits = head(x[chosen].to(device).float())
            losses = F.binary_cross_entropy_with_logits(
                logits, right[chosen].to(device), weight[chosen].to(device)
            )
            optimiser.zero_grad()
            losses.backward()
            optimiser.step()
            schedule.step()
            total += float(losses.detach()) * len(chosen)
        progress.set_postfix(loss=f"{total / len(x):.4f}")
    head.eval()


def _square(path: Path, size: int) -> Grey:
    grey, pixel_shape = read_grey(path)
    square = Letterbox(grey.shape[1], grey.shape[0], size, pixel_shape).apply(grey)
    return np.clip(np.rint(square), 0, 255).astype(np.uint8)
