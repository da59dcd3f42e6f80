"""Pretrain the ViT of the bottleneck on unlabelled images: masked autoencoder, perhaps distilled.

    python -m training.pretrain --images DIR MORE --leave-out 'test_*' --output RUN
    python -m training.pretrain --images DIR --data cases.csv --splits train --output RUN
    python -m training.pretrain --recipe paper --teacher usfm:USFM_latest.pth ... --output RUN
    python -m training.pretrain ... --output RUN --resume        # goes on exactly where it stopped
    python -m training.fit --pretrained RUN ...                  # puts the blocks into a network

--recipe compact makes the bottleneck of training.fit --recipe compact, paper that of paper.
The loss is MSE(student's features, teacher's) + lambda * L_MAE (Eq. 1 of the paper; --mae_weight is
lambda). Keep every test image out: by name (--pattern, --leave-out) or by a case table (--data,
--splits). RUN then holds mae.safetensors and mae.json (the latest weights and what rebuilds them),
checkpoint.pt (to resume), images.csv (what was read), log.csv, TensorBoard scalars and samples/
with reconstructions of val images. val_explained in the log is the share of the variance within
masked patches that is predicted: 0 for a network that knows no more than each patch's mean.
With torchrun it runs on several processes, as training.fit does. Does it help? Compare a few epochs
of training.fit with --pretrained RUN and without.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.utils.data import DataLoader

from training.data.case_table import CaseError, read_table, write_csv
from training.data.dataset import EpochSampler, train_loader
from training.data.unlabelled import (
    CropSettings,
    ImageSelection,
    UnlabelledDataset,
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
    AutoencoderConfig,
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
from training.recipes import Range, one_cycle_factor

SAMPLES_EVERY, SAMPLES = 10, 6  # epochs between two sheets, images on each
COLUMNS = ("image", "what it sees", "patch means", "reconstruction")


class PretrainRecipe(AutoencoderConfig):
    """One pretraining; the defaults are the paper's, and MAE's where it is silent."""

    model_config = ConfigDict(extra="forbid")

    optimiser: ClassVar[str] = "adamw"

    name: str = Field("paper", description="the recipe's name")
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that is masked")
    variance_floor: float = Field(
        1e-6, gt=0, description="added to a patch's variance (grey 0..1) before it is normalised"
    )
    teacher: str = Field(
        "none", description="usfm:FILE (BEiT-style weights), mae:RUN (our own), none (plain MAE)"
    )
    target: Literal["features", "attention", "features+attention"] = Field(
        "features", description="what of the teacher is matched: features, attention, or both"
    )
    teacher_sees: Literal["image", "kept"] = Field(
        "image", description="image: features of the whole image are matched (Eq. 1); kept: patches"
    )
    mae_weight: float = Field(1.0, ge=0, description="lambda of Eq. 1, weight of the MAE's loss")
    attention_weight: float = Field(1.0, ge=0, description="weight of the attention maps' loss")
    crop_area: Range = Field((0.2, 1.0), description="range of a crop's share of the area")
    rotation_deg: float = Field(10.0, description="rotation by up to +- this")
    gamma: Range = Field((0.8, 1.2), description="range of the greys' exponent")
    contrast: Range = Field((0.8, 1.2), description="factor about the mean grey")
    learning_rate: float = Field(1e-4, description="the highest learning rate of AdamW")
    weight_decay: float = Field(0.05, description="weight decay")
    warm_up: float = Field(0.1, description="share of the training in which the rate climbs")
    clip_norm: float = Field(0.0, description="largest gradient norm; 0: not clipped")
    epochs: int = Field(400, description="passes over the images")
    batch: int = Field(1024, description="images a step, over all processes")
    ema_decay: float = Field(0.0, description="decay of the averaged weights a step; 0: none")
    val_share: float = Field(0.05, gt=0, lt=1, description="share of the images kept for val")
    seed: int = Field(1, description="seed of weights, order, crops and masks")
    workers: int = Field(1, description="processes that cut crops; 0: none")

    @property
    def crops(self) -> CropSettings:
        """How crops are cut; the encoder sees one of their patches or more."""
        return CropSettings(
            size_px=self.image_size,
            patches=self.grid**2,
            kept=max(1, round(self.grid**2 * (1 - self.mask_ratio))),
            area=self.crop_area,
            rotation_deg=self.rotation_deg,
            gamma=self.gamma,
            contrast=self.contrast,
            seed=self.seed,
        )

    def rate_factor(self, step: int, steps_an_epoch: int) -> float:
        """The learning rate at a step, counted from 0, as a share of `learning_rate`."""
        return one_cycle_factor(step / max(1, self.epochs * steps_an_epoch), self.warm_up)


PAPER = PretrainRecipe()
COMPACT = PretrainRecipe(
    name="compact",
    image_size=128,
    depth=6,
    variance_floor=1e-3,
    crop_area=(0.4, 1.0),
    learning_rate=5e-4,
    clip_norm=1.0,
    epochs=200,
    batch=16,  # of few images many steps: with 64 it had explained 0.10 where this explains 0.16
)
RECIPES = {"paper": PAPER, "compact": COMPACT}


class Student(nn.Module):
    """What is trained: the autoencoder, and a linear map of its features where widths differ."""

    def __init__(self, recipe: PretrainRecipe, teacher_width: int | None) -> None:
        super().__init__()
        self.mae = MaskedAutoencoder(recipe)
        self.taught, self.whole = teacher_width is not None, recipe.teacher_sees == "image"
        self.attention = self.taught and "attention" in recipe.target
        self.match: nn.Module = nn.Identity()
        if teacher_width not in (None, recipe.width) and "features" in recipe.target:
            self.match = nn.Linear(recipe.width, teacher_width)

    def forward(self, image: Tensor, kept: Tensor) -> tuple[Tensor, Features | None]:
        """The autoencoder's prediction, and features to compare with the teacher's, if any."""
        encoder = self.mae.encoder
        features = encoder(image, kept, self.attention and not self.whole)
        prediction = self.mae.decoder(features.tokens, kept)
        if not self.taught:
            return prediction, None
        if self.whole:
            features = encoder(image, None, self.attention)
        return prediction, Features(self.match(features.tokens), features.attention)


def distillation_loss(student: Features, teacher: Features, recipe: PretrainRecipe) -> Tensor:
    """Eq. 1's MSE of features and, or, the divergence of the last block's attention maps."""
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

    Shares of some hundred tokens are too small for a squared error. Where the numbers of heads
    differ, the means over heads are compared.
    """
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    student, teacher = student.float().clamp(min=1e-8), teacher.float().clamp(min=1e-8)
    return (teacher * (teacher.log() - student.log())).sum(dim=-1).mean()


class PretrainLoss:
    """Eq. 1 of the paper; its parts are kept for the log."""

    def __init__(self, recipe: PretrainRecipe, teacher: Beit | MaeTeacher | None) -> None:
        self.recipe, self.teacher = recipe, teacher
        self.parts: list[tuple[float, float]] = []  # L_MAE and distillation of the epoch's steps

    def __call__(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch; notes its parts."""
        mae, distillation = self.measure_parts(network, batch)
        self.parts.append((mae.item(), distillation.item()))
        return distillation + self.recipe.mae_weight * mae

    def measure_parts(self, network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """L_MAE and the distillation's loss of a batch."""
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


@torch.no_grad()
def validate(
    student: Student, loss: PretrainLoss, held_out: UnlabelledDataset, device: torch.device
) -> tuple[float, float, float]:
    """On whole val images: L_MAE, what share of the variance within masked patches is explained
    (0: no more than each patch's mean is known), distillation.
    """
    network, recipe = student.eval(), loss.recipe
    keys = [(0, k) for k in range(len(held_out))]
    sums = np.zeros(3)
    for loaded in DataLoader(held_out, batch_size=min(64, recipe.batch), sampler=keys):
        batch = {name: tensor.to(device) for name, tensor in loaded.items()}
        image, kept = batch["image"], batch["kept"]
        mae, distillation = loss.measure_parts(network, batch)
        blank = image.new_zeros(len(image), recipe.grid**2, recipe.patch**2)
        nothing = mae_loss(blank, image, kept, recipe.variance_floor)
        sums += len(image) * np.array([mae.item(), nothing.item(), distillation.item()])
    mae, nothing, distillation = (sums / len(held_out)).tolist()
    return mae, 1 - mae / nothing if nothing else 0.0, distillation


@dataclass(frozen=True)
class PretrainOptions:
    """What a pretraining reads and where it writes; its recipe says how it trains.

    Args:
        choice: the images.
        output: the run's folder.
        resume: go on from the checkpoint in it.
        max_minutes: stop after the epoch in which these end.
        device: auto, cuda or cpu, for `join_processes`.
    """

    choice: ImageSelection
    output: Path
    resume: bool = False
    max_minutes: float | None = None
    device: str = "auto"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(arguments)
    options = PretrainOptions(
        choice=image_selection(args),
        output=args.output,
        resume=args.resume,
        max_minutes=args.max_minutes,
        device=args.device,
    )
    try:
        recipe = recipe_from_arguments(args)
        with join_processes(options.device) as place:
            pretrain(options, recipe, place)
    except (CaseError, CheckpointError, ValueError, OSError) as error:
        print(f"training.pretrain: {error}", file=sys.stderr)
        return 2
    return 0


def pretrain(options: PretrainOptions, recipe: PretrainRecipe, place: Processes) -> None:
    """Train until the recipe's epochs or --max-minutes are over."""
    checkpoint = options.output / "checkpoint.pt"
    if checkpoint.exists() != options.resume:
        what = (
            "there is nothing to resume" if options.resume else "it holds a training: pass --resume"
        )
        raise CaseError(f"{options.output}: {what}, or another --output")
    teacher, line = load_teacher(recipe.teacher, recipe.grid)
    names, squares = read_squares(find_images(options.choice), recipe.image_size)
    train, val = split_indices(len(squares), recipe.val_share, recipe.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    note_images(options.output / "images.csv", names, set(val), options.resume, place)
    order = EpochSampler(len(train), recipe.seed, place.rank, place.world)
    dataset = UnlabelledDataset([squares[k] for k in train], recipe.crops)
    loader = train_loader(dataset, order, recipe.batch, recipe.workers)
    torch.manual_seed(recipe.seed)
    student = Student(recipe, teacher.width if teacher else None)
    loss = PretrainLoss(recipe, teacher.to(place.device) if teacher else None)
    trainer = Trainer(student, recipe, len(loader), place)
    spent = trainer.resume(checkpoint) if options.resume else 0.0
    if place.leads:
        print(f"{line}\n{len(train)} images train, {len(val)} val, {place.world} x {place.device}")
    start = time.monotonic() - spent
    held_out = UnlabelledDataset([squares[k] for k in val], recipe.crops, train=False)
    while trainer.epoch < recipe.epochs:
        mean_loss = trainer.train_epoch(loader, loss)
        seconds = time.monotonic() - start
        if place.leads:
            keep(trainer, loss, options.output, held_out, mean_loss, seconds)
        place.barrier()
        if place.any(options.max_minutes is not None and seconds > 60 * options.max_minutes):
            if place.leads:
                print(f"--max-minutes reached after epoch {trainer.epoch}; --resume goes on")
            return


def note_images(
    path: Path, names: Sequence[str], val: set[int], resume: bool, place: Processes
) -> None:
    """Write down which images are used; a resumed training must find the same again."""
    rows = [[name, "val" if k in val else "train"] for k, name in enumerate(names)]
    if resume:
        if [list(row.values()) for _, row in read_table(path).rows] != rows:
            raise CaseError(f"the images are not those of {path}: resume with the same ones")
    elif place.leads:
        write_csv(path, ["Filename", "split"], rows)


def keep(
    trainer: Trainer,
    loss: PretrainLoss,
    folder: Path,
    held_out: UnlabelledDataset,
    mean_loss: float,
    seconds: float,
) -> None:
    """Validate, log, save the weights that count, checkpoint."""
    recipe, epoch, device = loss.recipe, trainer.epoch, trainer.processes.device
    student = trainer.evaluated_network
    assert isinstance(student, Student)  # the trained one, or the average's copy of it
    val_mae, explained, val_distillation = validate(student, loss, held_out, device)
    of_mae, of_distillation = np.mean(loss.parts, axis=0)
    loss.parts.clear()
    row: dict[str, float] = {
        "epoch": epoch,
        "loss": round(mean_loss, 5),
        "mae": round(float(of_mae), 5),
        "distillation": round(float(of_distillation), 5),
        "val_mae": round(val_mae, 5),
        "val_explained": round(explained, 5),
        "val_distillation": round(val_distillation, 5),
        "learning_rate": float(trainer.scheduler.get_last_lr()[0]),
        "minutes": round(seconds / 60, 2),
    }
    print("  ".join(f"{name} {value:g}" for name, value in row.items()), flush=True)
    sheet = None
    if epoch % SAMPLES_EVERY == 0 or epoch == recipe.epochs:
        samples = [held_out[0, k] for k in spread_indices(len(held_out), SAMPLES)]
        batch = {k: torch.stack([s[k] for s in samples]).to(device) for k in samples[0]}
        sheet = reconstructions(
            student.mae.eval(), batch["image"], batch["kept"], recipe.variance_floor
        )
    log_epoch(folder, row, "reconstructions", sheet)
    described = MaeDescription(recipe=recipe, epoch=epoch, val_explained=explained)
    save_weights(folder / MAE_FILE, student.mae.state_dict(), described)
    trainer.save(folder / "checkpoint.pt", seconds)


@torch.no_grad()
def reconstructions(
    mae: MaskedAutoencoder, image: Tensor, kept: Tensor, floor: float
) -> np.ndarray:
    """(H, W) uint8: a row an image, with the columns of `COLUMNS`.

    A normalised prediction needs each patch's true mean and deviation to be shown; the column of
    patch means shows how much of the picture these alone give away.
    """
    grid = round(mae.encoder.position_embedding.shape[1] ** 0.5)
    patches = patchify(image, image.shape[-1] // grid)
    mean, deviation = patch_statistics(patches, floor)
    seen = torch.zeros_like(mean).scatter(1, kept[..., None], 1.0)
    full = mae(image, kept).float() * deviation + mean
    columns = [patches, patches * seen, mean.expand_as(patches)]
    columns.append(torch.where(seen > 0, patches, full))
    rows = torch.cat([unpatchify(column, grid) for column in columns], dim=3)
    sheet = (rows.clamp(0, 1) * 255).round().flatten(0, 2).to(torch.uint8).cpu().numpy()
    caption = np.zeros((CAPTION, sheet.shape[1]), np.uint8)
    for k, name in enumerate(COLUMNS):
        draw_text(caption, name, (4 + k * image.shape[-1], CAPTION - 5))
    return cv2.vconcat([caption, sheet])


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """`--recipe` and one flag for every field."""
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="compact")
    group = parser.add_argument_group(
        "recipe fields", "override the recipe; pairs as 1,2; defaults below are paper | compact"
    )
    for name, field in PretrainRecipe.model_fields.items():
        shown = " | ".join(json.dumps(getattr(recipe, name)) for recipe in RECIPES.values())
        text = f"{field.description} ({shown})".replace("%", "%%")
        group.add_argument(f"--{name}", metavar="V", default=argparse.SUPPRESS, help=text)


def recipe_from_arguments(args: argparse.Namespace) -> PretrainRecipe:
    """The chosen recipe with the fields that the command line sets.

    Raises:
        ValueError: (pydantic's ValidationError) a value that its field does not take.
    """
    values: dict[str, Any] = RECIPES[args.recipe].model_dump()
    for name in PretrainRecipe.model_fields.keys() & vars(args).keys():
        text = getattr(args, name)
        values[name] = text.split(",") if isinstance(values[name], tuple) else text
    return PretrainRecipe.model_validate(values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_image_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on from RUN/checkpoint.pt")
    parser.add_argument("--max-minutes", type=float, help="stop after the epoch in which they end")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add_recipe_arguments(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
