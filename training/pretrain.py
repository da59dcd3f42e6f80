"""Pretrain the bottleneck's ViT on unlabelled images: a masked autoencoder, perhaps distilled.

    python -m training.pretrain --images DIR MORE --leave-out 'test_*' --output RUN
    python -m training.pretrain --images DIR --data cases.csv --splits train --output RUN
    python -m training.pretrain --recipe paper --teacher usfm:USFM_latest.pth ... --output RUN
    python -m training.pretrain ... --output RUN --resume     # goes on where it stopped

Keep every test image out: by its name (--pattern, --leave-out) or by a case table (--data,
--splits). The loss is Eq. 1 of the paper: MSE(student's features, teacher's) + lambda * L_MAE.
--mae_weight is lambda. Without a teacher only L_MAE remains. With torchrun it runs on several
processes, as training.fit does.

RUN then holds mae.safetensors with mae.json (the latest weights and their recipe), checkpoint.pt
(for --resume), images.csv (the images that were read), log.csv, TensorBoard scalars, and samples/
with reconstructions of val images. In the log val_explained is the share of the variance within
masked patches that the network predicts. It is 0 for a network that knows only each patch's mean.

Next, put the blocks into a network whose recipe has the same name:

    python -m training.fit --recipe compact --pretrained RUN ...

Does it help? training.probe shows what the encoder learned. A few epochs of training.fit with and
without --pretrained show what that is worth.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from training.data.case_table import CaseError, read_table, write_csv
from training.data.dataset import EpochSampler, train_loader
from training.data.unlabelled import (
    CropSettings,
    UnlabelledDataset,
    UnlabelledSelection,
    add_image_arguments,
    find_images,
    image_selection,
    read_squares,
    split_indices,
)
from training.evaluation.pictures import CAPTION, draw_text, spread_indices
from training.learning.checkpoint import CheckpointError, save_weights
from training.learning.mae import (
    MAE_FILE,
    Features,
    MaeDescription,
    MaskedAutoencoder,
    mae_loss,
    patch_statistics,
    patchify,
    unpatchify,
)
from training.learning.teachers import Beit, MaeTeacher, load_teacher
from training.learning.trainer import (
    Processes,
    Trainer,
    join_processes,
    log_epoch,
    mixed_precision,
)
from training.recipes import (
    PRETRAIN_RECIPES,
    PretrainRecipe,
    add_recipe_arguments,
    recipe_from_arguments,
)

EPOCHS_PER_SHEET = 10
IMAGES_PER_SHEET = 6
RECONSTRUCTION_COLUMNS = ("image", "what it sees", "patch means", "reconstruction")


@dataclass(frozen=True)
class PretrainOptions:
    """What a pretraining reads and where it writes; its recipe says how it trains.

    Args:
        selection: the images.
        output: the run's folder.
        resume: go on from the checkpoint in it.
        max_minutes: stop after the epoch in which these end.
        device: auto, cuda or cpu.
    """

    selection: UnlabelledSelection
    output: Path
    resume: bool = False
    max_minutes: float | None = None
    device: str = "auto"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(arguments)
    options = PretrainOptions(
        selection=image_selection(args),
        output=args.output,
        resume=args.resume,
        max_minutes=args.max_minutes,
        device=args.device,
    )
    try:
        recipe = recipe_from_arguments(args, PRETRAIN_RECIPES)
        with join_processes(options.device) as processes:
            pretrain(options, recipe, processes)
    except (CaseError, CheckpointError, ValueError, OSError) as error:
        print(f"training.pretrain: {error}", file=sys.stderr)
        return 2
    return 0


def pretrain(options: PretrainOptions, recipe: PretrainRecipe, processes: Processes) -> None:
    """Train until the recipe's epochs or --max-minutes are over.

    Raises:
        ValueError: (CaseError, CheckpointError) images, teacher or checkpoint cannot be used.
    """
    checkpoint = options.output / "checkpoint.pt"
    if checkpoint.exists() != options.resume:
        what = (
            "there is nothing to resume: leave --resume out"
            if options.resume
            else "it holds a training: pass --resume"
        )
        raise CaseError(f"{options.output}: {what}, or choose another --output")
    teacher, teacher_report = load_teacher(recipe.teacher, recipe.grid)
    names, squares = read_squares(find_images(options.selection), recipe.image_size)
    train, val = split_indices(len(squares), recipe.val_share, recipe.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    note_images(options.output / "images.csv", names, set(val), options.resume, processes)
    crops = crop_settings(recipe)
    order = EpochSampler(len(train), recipe.seed, processes.rank, processes.world)
    train_data = UnlabelledDataset([squares[k] for k in train], crops)
    val_data = UnlabelledDataset([squares[k] for k in val], crops, train=False)
    loader = train_loader(train_data, order, recipe.batch, recipe.workers)
    torch.manual_seed(recipe.seed)
    student = Student(recipe, teacher.width if teacher else None)
    loss = PretrainLoss(recipe, teacher.to(processes.device) if teacher else None)
    trainer = Trainer(student, recipe, len(loader), processes)
    seconds_before = trainer.resume(checkpoint) if options.resume else 0.0
    if processes.leads:
        counts = f"{len(train)} images train, {len(val)} val"
        print(f"{teacher_report}\n{counts}, {processes.world} x {processes.device}")
    start = time.monotonic() - seconds_before
    while trainer.epoch < recipe.epochs:
        mean_loss = trainer.train_epoch(loader, loss)
        seconds = time.monotonic() - start
        if processes.leads:
            finish_pretrain_epoch(trainer, loss, options.output, val_data, mean_loss, seconds)
        processes.barrier()
        if processes.any(options.max_minutes is not None and seconds > 60 * options.max_minutes):
            if processes.leads:
                print(f"--max-minutes reached after epoch {trainer.epoch}; --resume goes on")
            return


def note_images(
    path: Path, names: Sequence[str], val: set[int], resume: bool, processes: Processes
) -> None:
    """Write down which images train and which are val.

    Args:
        names: the images' names. val: indices of those that are val.

    Raises:
        CaseError: a resumed training has found other images than before.
    """
    rows = [[name, "val" if k in val else "train"] for k, name in enumerate(names)]
    if resume:
        if [list(row.values()) for _, row in read_table(path).rows] != rows:
            raise CaseError(f"the images are not those of {path}: resume with the same ones")
    elif processes.leads:
        write_csv(path, ["Filename", "split"], rows)


def crop_settings(recipe: PretrainRecipe) -> CropSettings:
    """How a recipe cuts crops. At least one patch of each stays visible."""
    patches = recipe.grid**2
    return CropSettings(
        size_px=recipe.image_size,
        patches=patches,
        kept=max(1, round(patches * (1 - recipe.mask_ratio))),
        area=recipe.crop_area,
        rotation_deg=recipe.rotation_deg,
        gamma=recipe.gamma,
        contrast=recipe.contrast,
        seed=recipe.seed,
    )


# ---- What is trained, and by which loss


class Student(nn.Module):
    """The autoencoder, and a linear map of its features if the teacher's have another width."""

    def __init__(self, recipe: PretrainRecipe, teacher_width: int | None) -> None:
        super().__init__()
        self.mae = MaskedAutoencoder(recipe)
        self.has_teacher = teacher_width is not None
        self.matches_whole_image = recipe.teacher_sees == "image"
        self.wants_attention = self.has_teacher and "attention" in recipe.target
        self.match: nn.Module = nn.Identity()
        if teacher_width not in (None, recipe.width) and "features" in recipe.target:
            self.match = nn.Linear(recipe.width, teacher_width)

    def forward(self, image: Tensor, kept: Tensor) -> tuple[Tensor, Features | None]:
        """The autoencoder's prediction, and the features to compare with a teacher's, if any."""
        encoder = self.mae.encoder
        features = encoder(image, kept, self.wants_attention and not self.matches_whole_image)
        prediction = self.mae.decoder(features.tokens, kept)
        if not self.has_teacher:
            return prediction, None
        if self.matches_whole_image:
            features = encoder(image, None, self.wants_attention)
        return prediction, Features(self.match(features.tokens), features.attention)


def distillation_loss(student: Features, teacher: Features, recipe: PretrainRecipe) -> Tensor:
    """MSE of the features (Eq. 1), divergence of the last block's attention maps, or both."""
    loss = student.tokens.new_zeros((), dtype=torch.float32)
    if "features" in recipe.target:
        loss = loss + F.mse_loss(student.tokens.float(), teacher.tokens.float())
    if "attention" in recipe.target:
        assert student.attention is not None and teacher.attention is not None  # both were asked
        divergence = attention_divergence(student.attention, teacher.attention)
        loss = loss + recipe.attention_weight * divergence
    return loss


def attention_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of (n, heads, tokens, tokens) maps, mean over their rows.

    The shares of some hundred tokens are too small for a squared error. If the numbers of heads
    differ, the means over heads are compared.
    """
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    student, teacher = student.float().clamp(min=1e-8), teacher.float().clamp(min=1e-8)
    return (teacher * (teacher.log() - student.log())).sum(dim=-1).mean()


class PretrainLoss:
    """Eq. 1 of the paper for one batch after another.

    Args:
        teacher: on the device of the student; None leaves L_MAE alone.
    """

    def __init__(self, recipe: PretrainRecipe, teacher: Beit | MaeTeacher | None) -> None:
        self.recipe, self.teacher = recipe, teacher
        self.parts: list[tuple[float, float]] = []  # L_MAE and distillation in each step so far

    def __call__(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch; `parts` gets its two terms."""
        mae, distillation = self.measure_parts(network, batch)
        self.parts.append((mae.item(), distillation.item()))
        return distillation + self.recipe.mae_weight * mae

    def measure_parts(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """L_MAE and the distillation loss of a batch."""
        recipe, image, kept = self.recipe, batch["image"], batch["kept"]
        truth: Features | None = None
        with mixed_precision(image.device):
            prediction, features = network(image, kept)
            if self.teacher is not None:
                shown = kept if recipe.teacher_sees == "kept" else None
                with torch.no_grad():
                    truth = self.teacher(image, shown, "attention" in recipe.target)
        mae = mae_loss(prediction, image, kept, recipe.variance_floor)
        if truth is None:
            return mae, torch.zeros_like(mae)
        return mae, distillation_loss(features, truth, recipe)


# ---- What is written after each epoch


def finish_pretrain_epoch(
    trainer: Trainer,
    loss: PretrainLoss,
    folder: Path,
    val_data: UnlabelledDataset,
    mean_loss: float,
    seconds: float,
) -> None:
    """Validate, log, save the weights that count, and write the checkpoint.

    Args:
        loss: holds the parts of the epoch's losses, which are emptied.
        mean_loss: of the epoch.
        seconds: how long the training has run, its earlier parts included.
    """
    recipe, epoch, device = loss.recipe, trainer.epoch, trainer.processes.device
    student = trainer.evaluated_network
    assert isinstance(student, Student)  # the trained one, or the average's copy of it
    val_mae, val_explained, val_distillation = measure_val(student, loss, val_data, device)
    mae, distillation = np.mean(loss.parts, axis=0)
    loss.parts.clear()
    row: dict[str, float] = {
        "epoch": epoch,
        "loss": round(mean_loss, 5),
        "mae": round(float(mae), 5),
        "distillation": round(float(distillation), 5),
        "val_mae": round(val_mae, 5),
        "val_explained": round(val_explained, 5),
        "val_distillation": round(val_distillation, 5),
        "learning_rate": float(trainer.scheduler.get_last_lr()[0]),
        "minutes": round(seconds / 60, 2),
    }
    print("  ".join(f"{name} {value:g}" for name, value in row.items()), flush=True)
    sheet = None
    if epoch % EPOCHS_PER_SHEET == 0 or epoch == recipe.epochs:
        samples = [val_data[0, k] for k in spread_indices(len(val_data), IMAGES_PER_SHEET)]
        image, kept = (
            torch.stack([sample[key] for sample in samples]).to(device) for key in ("image", "kept")
        )
        sheet = draw_reconstructions(student.mae.eval(), image, kept, recipe.variance_floor)
    log_epoch(folder, row, "reconstructions", sheet)
    described = MaeDescription(recipe=recipe, epoch=epoch, val_explained=val_explained)
    save_weights(folder / MAE_FILE, student.mae.state_dict(), described)
    trainer.save(folder / "checkpoint.pt", seconds)


@torch.no_grad()
def measure_val(
    student: Student, loss: PretrainLoss, val_data: UnlabelledDataset, device: torch.device
) -> tuple[float, float, float]:
    """L_MAE, explained share of variance, and distillation loss on whole val images.

    The share is of the variance within masked patches. It is 0 if only each patch's mean is known,
    and negative if the prediction is worse than that.
    """
    network, recipe = student.eval(), loss.recipe
    keys = [(0, k) for k in range(len(val_data))]
    sums = np.zeros(3)
    for loaded in DataLoader(val_data, batch_size=min(64, recipe.batch), sampler=keys):
        batch = {name: tensor.to(device) for name, tensor in loaded.items()}
        image, kept = batch["image"], batch["kept"]
        mae, distillation = loss.measure_parts(network, batch)
        blank = image.new_zeros(len(image), recipe.grid**2, recipe.patch**2)
        blank_mae = mae_loss(blank, image, kept, recipe.variance_floor)
        sums += len(image) * np.array([mae.item(), blank_mae.item(), distillation.item()])
    mae, blank_mae, distillation = (sums / len(val_data)).tolist()
    return mae, 1 - mae / blank_mae if blank_mae else 0.0, distillation


@torch.no_grad()
def draw_reconstructions(
    autoencoder: MaskedAutoencoder, image: Tensor, kept: Tensor, floor: float
) -> np.ndarray:
    """(H, W) uint8 sheet: a row for each image, with the columns of `RECONSTRUCTION_COLUMNS`.

    A normalised prediction is shown with each patch's true mean and deviation. The column of patch
    means shows how much of the picture these alone give away.
    """
    grid = round(autoencoder.encoder.position_embedding.shape[1] ** 0.5)
    patches = patchify(image, image.shape[-1] // grid)
    mean, deviation = patch_statistics(patches, floor)
    seen = torch.zeros_like(mean).scatter(1, kept[..., None], 1.0)
    full = autoencoder(image, kept).float() * deviation + mean
    columns = [patches, patches * seen, mean.expand_as(patches)]
    columns.append(torch.where(seen > 0, patches, full))
    rows = torch.cat([unpatchify(column, grid) for column in columns], dim=3)
    sheet = (rows.clamp(0, 1) * 255).round().flatten(0, 2).to(torch.uint8).cpu().numpy()
    caption = np.zeros((CAPTION, sheet.shape[1]), np.uint8)
    for k, name in enumerate(RECONSTRUCTION_COLUMNS):
        draw_text(caption, name, (4 + k * image.shape[-1], CAPTION - 5))
    return cv2.vconcat([caption, sheet])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_image_arguments(parser)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="RUN", help="folder that the run writes to")
    add("--resume", action="store_true", help="go on from RUN/checkpoint.pt")
    minutes = "time limit; training stops after the epoch in which it is reached"
    add("--max-minutes", type=float, metavar="MIN", help=minutes)
    device = "processor; auto takes the GPU if there is one (%(default)s)"
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help=device)
    add_recipe_arguments(parser, PRETRAIN_RECIPES)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
