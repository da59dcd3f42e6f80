"""Training of the view head: does an image show the view in which the landmarks are defined?

The rest of the network stays as it is. Right samples are labelled images, changed as in training
but never mirrored. Wrong samples are the same images distorted (mirrored, turned, inverted and so
on, see training.data.scenes), images of other views, and drawn scenes. The head sees features of
the frozen network, which are computed once. It learns by binary cross-entropy, in which right and
wrong samples have the same total weight.
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
from training.data.dataset import read_frame
from training.data.scenes import DISTORTIONS, SCENES, GreyImage
from training.recipes import COMPACT

RIGHT_DRAWS, OTHER_DRAWS = 5, 3  # from each labelled image, and from each image of another view
LEARNING_RATE, WEIGHT_DECAY, EPOCHS, BATCH = 1e-3, 0.05, 30, 64
MARK_HEIGHT = 0.08  # share of the height, at the top, where machines put their orientation mark
AUGMENTATION = COMPACT.augmentation.model_copy(
    update={
        "rotation_deg": 25,
        "scale": (0.8, 1.25),
        "shift": 0.08,
        "stretch": 0.1,
        "elastic": 0.0,
        "erase": 0.2,
    }
)
Sample = tuple[GreyImage, bool]  # (size, size), and whether it shows the right view


def train_view_head(
    network: TransUNet,
    spec: ModelSpec,
    cases: Sequence[Case],
    images: Path,
    others: Sequence[Path],
    seed: int = 1,
) -> None:
    """Train `network.view` from random weights.

    Args:
        cases: labelled images, which show the right view.
        images: folder of the cases' images.
        others: image files of other views.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    samples = draw_samples(cases, images, others, spec.input_size, rng)
    count = 3 * RIGHT_DRAWS * len(cases) + OTHER_DRAWS * len(others)
    features, right = compute_features(network, spec, samples, rng, count)
    weight = torch.where(right, 0.5 / right.float().mean(), 0.5 / (~right).float().mean())
    head = network.view
    assert head is not None  # the caller has made it
    for module in head.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    train_head(head, features, right.float(), weight)


def draw_samples(
    cases: Sequence[Case], images: Path, others: Sequence[Path], size: int, rng: np.random.Generator
) -> Iterator[Sample]:
    """Right samples, each followed by a distorted one and a scene; then images of other views."""
    distortions, scenes = list(DISTORTIONS.values()), list(SCENES.values())
    for case in cases:
        square = _read_square(images / case.file, size)
        for _ in range(RIGHT_DRAWS):
            yield square, True
            yield distortions[rng.integers(len(distortions))](square, rng), False
            yield scenes[rng.integers(len(scenes))](size, rng), False
    for path in others:
        square = _read_square(path, size)
        for k in range(OTHER_DRAWS):
            yield (square[:, ::-1].copy() if k % 2 else square), False


def compute_features(
    network: TransUNet,
    spec: ModelSpec,
    samples: Iterator[Sample],
    rng: np.random.Generator,
    count: int,
) -> tuple[Tensor, Tensor]:
    """(n, channels, side, side) float16 features of the changed samples, and (n,) which are right.

    Args:
        count: number of samples, for the progress bar.
    """
    device = next(network.parameters()).device
    network.eval()
    rows, right = [], []
    batch: list[np.ndarray] = []

    def flush() -> None:
        if batch:
            with torch.inference_mode():
                features = network.view_features(torch.from_numpy(np.stack(batch)).to(device))
            rows.append(features.half().cpu())
            batch.clear()

    for image, is_right in tqdm(samples, "features of the view", total=count, leave=False):
        batch.append(spec.normalise(change_image(image, rng)))
        right.append(is_right)
        if len(batch) == BATCH:
            flush()
    flush()
    return torch.cat(rows), torch.tensor(right)


def change_image(image: GreyImage, rng: np.random.Generator) -> np.ndarray:
    """Change an image at random, as another examination might show it; it stays the right way up.

    The top, with its orientation mark, is blackened half of the time, so that the head has to look
    at the anatomy.
    """
    no_landmarks = np.zeros((3, 2))
    changed, _, _ = augment(image, None, no_landmarks, AUGMENTATION, rng)
    if rng.random() < 0.5:
        changed[: round(MARK_HEIGHT * len(changed))] = 0
    return changed


def train_head(head: nn.Module, features: Tensor, right: Tensor, weight: Tensor) -> None:
    """Train a head on features, and leave it in evaluation mode.

    Args:
        features: (n, channels, side, side).
        right: (n,) 1 for a sample of the right view, else 0.
        weight: (n,) of each sample in the loss.
    """
    device = next(head.parameters()).device
    optimiser = torch.optim.AdamW(head.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(features) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    head.train().requires_grad_(True)
    for _ in (progress := tqdm(range(EPOCHS), "view head", leave=False)):
        total = 0.0
        for chosen in torch.randperm(len(features)).split(BATCH):
            logits = head(features[chosen].to(device).float())
            losses = F.binary_cross_entropy_with_logits(
                logits, right[chosen].to(device), weight[chosen].to(device)
            )
            optimiser.zero_grad()
            losses.backward()
            optimiser.step()
            schedule.step()
            total += float(losses.detach()) * len(chosen)
        progress.set_postfix(loss=f"{total / len(features):.4f}")
    head.eval()


def _read_square(path: Path, size: int) -> GreyImage:
    """(size, size): an image, letterboxed."""
    grey, pixel_shape = read_frame(path)
    square = Letterbox(grey.shape[1], grey.shape[0], size, pixel_shape).apply(grey)
    return np.clip(np.rint(square), 0, 255).astype(np.uint8)
