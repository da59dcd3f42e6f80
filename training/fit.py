"""Train a landmark network on labelled images.

    python -m training.fit --recipe compact --data cases.csv --images DIR --masks DIR --output RUN
    python -m training.fit ... --output RUN --resume           # goes on exactly where it stopped
    python -m training.fit ... --output RUN --all              # val trains too, nothing chooses
    torchrun --nproc-per-node 4 -m training.fit ...            # several processes

The case table's `split` column says what trains and what chooses (train, val; test is never read);
without it a split by its `group` column, else by near-duplicate images, is drawn and written to
RUN/cases.csv. RUN then holds best.safetensors and best.json (the weights of the lowest val error),
checkpoint.pt (to resume), log.csv, TensorBoard scalars and samples/.

With --all the weights of the last epoch are kept. That is for a last training with settings that
are chosen already; how it does on images that it has not seen, training.folds tells.
"""

import argparse
import csv
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from pydantic import ValidationError
from torch.utils.tensorboard import SummaryWriter

from model.image import is_supported_name
from model.masks import CLASSES
from model.network import build_network
from training.cases import Case, CaseError, read_cases, write_cases
from training.checkpoint import (
    Checkpoint,
    CheckpointError,
    save_weights,
)
from training.data import LandmarkDataset, chances, further_cases, read_grey, train_loader
from training.groups import near_duplicate_groups, split_by_group
from training.loop import Processes, Trainer, processes
from training.metrics import mean_errors
from training.pictures import sample_sheet
from training.predict import predict_cases, torch_predictor
from training.recipes import Recipe, add_recipe_arguments, recipe_from_arguments
from training.teachers import teachers_of
from training.transfer import start_from, start_pretrained, with_members

FRACTIONS = (0.8, 0.2, 0.0)  # the paper's 4:1
SAMPLES_EVERY = 8  # epochs between two sample sheets


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(arguments)
    try:
        recipe = recipe_from_arguments(args)
        with processes(args.device) as place:
            fit(args, recipe, place)
    except (CaseError, CheckpointError, ValidationError, ValueError, OSError) as error:
        print(f"training.fit: {error}", file=sys.stderr)
        return 2
    return 0


def fit(args: argparse.Namespace, recipe: Recipe, place: Processes) -> None:
    """Train until the recipe's epochs or --max-minutes are over."""
    checkpoint = _checkpoint(args)
    recipe = with_members(args.output / "best.safetensors" if args.resume else args.init, recipe)
    args.output.mkdir(parents=True, exist_ok=True)
    more = further_cases(args.more, args.data, args.images)
    cases = split_cases(args, recipe, place)
    styles = style_images(args.styles)
    dataset = LandmarkDataset(cases["train"], args.images, args.masks, recipe, True, more, styles)
    loader = train_loader(dataset, place.rank, place.world, chances(dataset))
    if args.steps:
        recipe = recipe.model_copy(update={"epochs": max(1, round(args.steps / len(loader)))})
    torch.manual_seed(recipe.seed)
    masks = len(CLASSES) if args.masks else 0
    network = build_network(recipe.network, masks)
    if args.init and not args.resume:
        left_out = start_from(args.init, network, bool(masks))
        if left_out and place.leads:
            print(f"of {args.init.name} these are left out: {', '.join(left_out)}")
    if not args.resume:
        for report in start_pretrained(network, args.pretrained, args.encoder_weights):
            if place.leads:
                print(report)
    teachers = teachers_of(args.teachers, recipe, masks, place.device)
    trainer = Trainer(network, recipe, len(loader), place, teachers)
    spent = trainer.resume(checkpoint) if args.resume else 0.0
    if place.leads:
        count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        print(
            f"{len(dataset)} images train, {len(cases['val']) or 'none'} choose; {count:.1f} M "
            f"parameters, {place.world} x {place.device}, epoch {trainer.epoch} of {recipe.epochs}"
        )
    start = time.monotonic() - spent
    while trainer.epoch < recipe.epochs:
        loader.sampler.epoch = trainer.epoch
        loss = trainer.train_epoch(loader)
        seconds = time.monotonic() - start
        if place.leads:
            keep(trainer, args, masks, cases["val"], loss, seconds)
        place.barrier()
        if place.any(args.max_minutes is not None and seconds > 60 * args.max_minutes):
            if place.leads:
                print(f"--max-minutes reached after epoch {trainer.epoch}; --resume goes on")
            return


def _checkpoint(args: argparse.Namespace) -> Path:
    """RUN/checkpoint.pt, which is there if and only if it is to be resumed."""
    path: Path = args.output / "checkpoint.pt"
    if path.exists() and not args.resume:
        raise CaseError(f"{args.output} holds a training: pass --resume, or another --output")
    if args.resume and not path.exists():
        raise CaseError(f"there is no {path} to resume")
    if args.init and (args.pretrained or args.encoder_weights):
        raise ValueError("--init fills the whole network: give no --pretrained, --encoder-weights")
    return path


def style_images(folder: Path | None) -> list[Path]:
    """Every image below a folder."""
    if folder is None:
        return []
    found = sorted(path for path in folder.rglob("*") if is_supported_name(path))
    if not found:
        raise CaseError(f"--styles: no image below {folder}")
    return found


def keep(
    trainer: Trainer,
    args: argparse.Namespace,
    masks: int,
    val: list[Case],
    loss: float,
    seconds: float,
) -> None:
    """Validate the weights that count, log, keep them if they are the best so far, checkpoint.

    Without cases of val the last are the best.
    """
    recipe, epoch = trainer.recipe, trainer.epoch
    predictor = torch_predictor(trainer.evaluated, recipe.spec(masks), trainer.place.device)
    predictions = predict_cases(predictor, val, args.images)
    metrics = {}
    if val:
        mre_px, aop_deg = mean_errors(predictions, val)
        metrics = {"val_mre_px": round(mre_px, 3), "val_aop_error_deg": round(aop_deg, 3)}
    row = {
        "epoch": epoch,
        "loss": round(loss, 5),
        **metrics,
        "learning_rate": trainer.scheduler.get_last_lr()[0],
        "minutes": round(seconds / 60, 2),
    }
    print("  ".join(f"{name} {value:g}" for name, value in row.items()), flush=True)
    sheet = None
    if val and (epoch % SAMPLES_EVERY == 0 or epoch == recipe.epochs):
        sheet = sample_sheet(predictions, val, args.images)
    log(args.output, row, sheet)
    if not val or mre_px < trainer.best_px:
        trainer.best_px = mre_px if val else trainer.best_px
        spec = recipe.spec(masks).model_copy(update={"metrics": metrics, "val_trained": not val})
        checkpoint = Checkpoint(network=recipe.network, masks=masks, spec=spec)
        path = args.output / "best.safetensors"
        save_weights(path, trainer.evaluated.state_dict(), checkpoint)
    trainer.save(args.output / "checkpoint.pt", seconds)


def log(folder: Path, row: dict[str, float], sheet: np.ndarray | None) -> None:
    """Add an epoch to log.csv and TensorBoard, and its sample pictures to both."""
    path = folder / "log.csv"
    new = row["epoch"] == 1 or not path.exists()
    with path.open("w" if new else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row.keys())
        if new:
            writer.writeheader()
        writer.writerow(row)
    with SummaryWriter(str(folder / "tensorboard")) as board:
        for name, value in row.items():
            board.add_scalar(name, value, row["epoch"])
        if sheet is not None:
            board.add_image("val", sheet[..., ::-1].copy(), row["epoch"], dataformats="HWC")
            (folder / "samples").mkdir(exist_ok=True)
            cv2.imwrite(str(folder / "samples" / f"epoch-{row['epoch']:03d}.png"), sheet)


def split_cases(
    args: argparse.Namespace, recipe: Recipe, place: Processes
) -> dict[str, list[Case]]:
    """The cases by split; where the table has none it is drawn by group and written down."""
    cases = read_cases(args.data)
    if not any(case.split for case in cases):
        groups = [case.group for case in cases]
        if not all(groups):
            if place.leads:
                print("no group column: comparing the images to find near-duplicates")
            images = (read_grey(args.images / case.file, case.frame)[0] for case in cases)
            groups = [f"g{group:04d}" for group in near_duplicate_groups(images)]
        splits = split_by_group(groups, FRACTIONS, recipe.seed)
        cases = [
            dataclasses.replace(case, split=split, group=group)
            for case, split, group in zip(cases, splits, groups, strict=True)
        ]
        if place.leads:
            write_cases(args.output / "cases.csv", cases)
            print(f"a split by group was drawn and written to {args.output / 'cases.csv'}")
    chosen = {name: [case for case in cases if case.split == name] for name in ("train", "val")}
    if args.all:
        chosen = {"train": chosen["train"] + chosen["val"], "val": []}
    for name, found in chosen.items():
        if not found and not (args.all and name == "val"):
            raise CaseError(f"{args.data}: no case has split '{name}'; expected train and val")
    missing = [case.file for case in cases if not (args.images / case.file).is_file()]
    if missing:
        raise CaseError(f"{len(missing)} images not in {args.images}, the first is {missing[0]}")
    if args.masks:
        stems = {path.stem for path in args.masks.iterdir()}
        bare = [case.file for case in chosen["train"] if Path(case.file).stem not in stems]
        if bare:
            raise CaseError(f"{len(bare)} images without a mask in {args.masks}, first {bare[0]}")
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="case table (CSV), see prepare")
    parser.add_argument("--images", type=Path, required=True, help="folder of its images")
    parser.add_argument("--masks", type=Path, help="folder of masks: an auxiliary target")
    parser.add_argument(
        "--more", type=Path, nargs=2, action="append", default=[], metavar=("TABLE", "IMAGES"),
        help="further training cases with their own images and no masks, such as the pseudo.csv "
        "of pseudo_label; may be given several times",
    )  # fmt: skip
    parser.add_argument("--init", type=Path, help="start from these weights (.safetensors)")
    parser.add_argument(
        "--teachers", type=Path, nargs="+", default=[], metavar="ONNX",
        help="trained models whose maps are part of the targets: see --teacher_share",
    )  # fmt: skip
    parser.add_argument(
        "--pretrained", metavar="RUN", help="bottleneck from a run of training.pretrain, or "
        "usfm:FILE; its width, depth and heads must be the network's",
    )  # fmt: skip
    parser.add_argument(
        "--encoder-weights", type=Path, metavar="FILE",
        help="encoder from ImageNet: ResNet-50 under torchvision's keys",
    )  # fmt: skip
    parser.add_argument(
        "--styles", type=Path, metavar="DIR", help="unlabelled images, of other machines too, "
        "whose look is mixed in: see --augmentation.style",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, metavar="N", help="in place of epochs: as many as make N steps"
    )
    parser.add_argument("--output", type=Path, required=True, help="the run's folder")
    parser.add_argument("--all", action="store_true", help="train on split val too, choose nothing")
    parser.add_argument("--resume", action="store_true", help="go on from RUN/checkpoint.pt")
    parser.add_argument("--max-minutes", type=float, help="stop after the epoch in which they end")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add_recipe_arguments(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
