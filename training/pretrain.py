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
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from training.cases import CaseError, read_table, write_rows
from training.checkpoint import CheckpointError, save_weights
from training.data import train_loader
from training.distill import PretrainTrainer, Student
from training.loop import Processes, processes
from training.mae import (
    FILE,
    MaskedAutoencoder,
    Pretrained,
    patchify,
    statistics,
    unpatchify,
)
from training.pictures import CAPTION, put_text, spread
from training.pretrain_recipe import PretrainRecipe, add_recipe_arguments, recipe_from_arguments
from training.teachers import load_teacher
from training.unlabelled import (
    UnlabelledDataset,
    add_image_arguments,
    find_images,
    read_squares,
    split_indices,
)

SAMPLES_EVERY, SAMPLES = 10, 6  # epochs between two sheets, images on each
COLUMNS = ("image", "what it sees", "patch means", "reconstruction")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(arguments)
    try:
        recipe = recipe_from_arguments(args)
        with processes(args.device) as place:
            pretrain(args, recipe, place)
    except (CaseError, CheckpointError, ValueError, OSError) as error:
        print(f"training.pretrain: {error}", file=sys.stderr)
        return 2
    return 0


def pretrain(args: argparse.Namespace, recipe: PretrainRecipe, place: Processes) -> None:
    """Train until the recipe's epochs or --max-minutes are over."""
    checkpoint: Path = args.output / "checkpoint.pt"
    if checkpoint.exists() != args.resume:
        what = "there is nothing to resume" if args.resume else "it holds a training: pass --resume"
        raise CaseError(f"{args.output}: {what}, or another --output")
    teacher, line = load_teacher(recipe.teacher, recipe.grid)
    names, squares = read_squares(find_images(args), recipe.image_size)
    train, val = split_indices(len(squares), recipe)
    args.output.mkdir(parents=True, exist_ok=True)
    note_images(args.output / "images.csv", names, set(val), args.resume, place)
    loader = train_loader(
        UnlabelledDataset([squares[k] for k in train], recipe), place.rank, place.world
    )
    torch.manual_seed(recipe.seed)
    student = Student(recipe, teacher.width if teacher else None)
    trainer = PretrainTrainer(student, recipe, len(loader), place, teacher)
    spent = trainer.resume(checkpoint) if args.resume else 0.0
    if place.leads:
        print(f"{line}\n{len(train)} images train, {len(val)} val, {place.world} x {place.device}")
    start = time.monotonic() - spent
    held_out = UnlabelledDataset([squares[k] for k in val], recipe, train=False)
    while trainer.epoch < recipe.epochs:
        loader.sampler.epoch = trainer.epoch
        loss = trainer.train_epoch(loader)
        seconds = time.monotonic() - start
        if place.leads:
            keep(trainer, args.output, held_out, loss, seconds)
        place.barrier()
        if place.any(args.max_minutes is not None and seconds > 60 * args.max_minutes):
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
        write_rows(path, ["Filename", "split"], rows)


def keep(
    trainer: PretrainTrainer, folder: Path, held_out: UnlabelledDataset, loss: float, seconds: float
) -> None:
    """Validate, log, save the weights that count, checkpoint."""
    recipe, epoch = trainer.recipe, trainer.epoch
    val_mae, explained, val_distillation = trainer.validate(held_out)
    mae, distillation = np.mean(trainer.parts, axis=0)
    trainer.parts.clear()
    row = {
        "epoch": epoch,
        "loss": round(loss, 5),
        "mae": round(float(mae), 5),
        "distillation": round(float(distillation), 5),
        "val_mae": round(val_mae, 5),
        "val_explained": round(explained, 5),
        "val_distillation": round(val_distillation, 5),
        "learning_rate": trainer.scheduler.get_last_lr()[0],
        "minutes": round(seconds / 60, 2),
    }
    print("  ".join(f"{name} {value:g}" for name, value in row.items()), flush=True)
    sheet = None
    if epoch % SAMPLES_EVERY == 0 or epoch == recipe.epochs:
        samples = [held_out[0, k] for k in spread(len(held_out), SAMPLES)]
        batch = {
            k: torch.stack([s[k] for s in samples]).to(trainer.place.device) for k in samples[0]
        }
        sheet = reconstructions(trainer.evaluated.mae.eval(), **batch, floor=recipe.variance_floor)
    log(folder, row, sheet)
    described = Pretrained(recipe=recipe, epoch=epoch, val_explained=explained)
    save_weights(folder / FILE, trainer.evaluated.mae.state_dict(), described)
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
    mean, deviation = statistics(patches, floor)
    seen = torch.zeros_like(mean).scatter(1, kept[..., None], 1.0)
    full = mae(image, kept).float() * deviation + mean
    columns = [patches, patches * seen, mean.expand_as(patches)]
    columns.append(torch.where(seen > 0, patches, full))
    rows = torch.cat([unpatchify(column, grid) for column in columns], dim=3)
    sheet = (rows.clamp(0, 1) * 255).round().flatten(0, 2).to(torch.uint8).cpu().numpy()
    caption = np.zeros((CAPTION, sheet.shape[1]), np.uint8)
    for k, name in enumerate(COLUMNS):
        put_text(caption, name, (4 + k * image.shape[-1], CAPTION - 5))
    return cv2.vconcat([caption, sheet])


def log(folder: Path, row: dict[str, float], sheet: np.ndarray | None) -> None:
    """Add an epoch to log.csv and TensorBoard, and its reconstructions to both."""
    with (folder / "log.csv").open(
        "w" if row["epoch"] == 1 else "a", newline="", encoding="utf-8"
    ) as file:
        writer = csv.DictWriter(file, row.keys())
        if row["epoch"] == 1:
            writer.writeheader()
        writer.writerow(row)
    with SummaryWriter(str(folder / "tensorboard")) as board:
        for name, value in row.items():
            board.add_scalar(name, value, row["epoch"])
        if sheet is not None:
            board.add_image("reconstructions", sheet, row["epoch"], dataformats="HW")
            (folder / "samples").mkdir(exist_ok=True)
            cv2.imwrite(str(folder / "samples" / f"epoch-{row['epoch']:03d}.png"), sheet)


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
