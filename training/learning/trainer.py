"""One training: processes, epochs, validation, checkpoints; resumes exactly where it stopped.

`fit` is the main training, that of training.fit and of each part of training.folds.
"""

import argparse
import contextlib
import csv
import dataclasses
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model.images.source import is_supported_name
from model.masks import CLASSES
from model.network import build_network
from training.data.case_table import (
    Case,
    CaseError,
    count_splits,
    read_cases,
    require_images,
    write_cases,
)
from training.data.dataset import (
    EpochSampler,
    LandmarkDataset,
    TrainLoader,
    chances,
    further_cases,
    read_grey,
    train_loader,
)
from training.data.near_duplicates import near_duplicate_groups, split_by_group
from training.evaluation.metrics import mean_errors
from training.evaluation.pictures import sample_sheet
from training.evaluation.predict import predict_cases, torch_predictor
from training.learning.checkpoint import Checkpoint, save_weights
from training.learning.losses import total_loss
from training.learning.optimisers import optimiser
from training.learning.pretrained import start_from, start_pretrained, with_members
from training.learning.teachers import Ensemble, teachers_of
from training.recipes import Recipe, TrainingRecipe, add_recipe_arguments, recipe_from_arguments

FRACTIONS = (0.8, 0.2, 0.0)  # the paper's 4:1
SAMPLES_EVERY = 8  # epochs between two sample sheets

Tensors = tuple[Tensor, ...] | list[Tensor]
AnyRecipe = TypeVar("AnyRecipe", bound=TrainingRecipe)


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; alone without torchrun."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """The one process that validates, writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """True if it is true in some process, so that all take the same turn."""
        if self.world == 1:
            return flag
        shared = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return bool(shared.item())


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Join torchrun's processes (nccl on CUDA, gloo on the CPU), or stand alone."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; pass --device cpu or auto")
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local = int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    else:  # on the CPU its backward pass in bfloat16 takes 3 times as long as plain products
        torch.backends.cuda.enable_flash_sdp(False)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Processes(rank, world, place)
    finally:
        if world > 1:
            dist.destroy_process_group()


class Trainer(ABC, Generic[AnyRecipe]):
    """Network, optimiser, schedule and averaged weights of one recipe; a subclass has the loss.

    Args:
        steps: batches an epoch.
        taught_by: digests of the teachers, which a resumed training must have again.
    """

    def __init__(
        self,
        network: nn.Module,
        recipe: AnyRecipe,
        steps: int,
        place: Processes,
        taught_by: Sequence[str] = (),
    ) -> None:
        self.recipe, self.place, self.taught_by = recipe, place, list(taught_by)
        self.network = network.to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if place.world > 1 and place.device.type == "cuda":
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.wrapped = self.network
        if place.world > 1:
            self.wrapped = DistributedDataParallel(self.network)
        ema = running_average(recipe.ema_decay)
        self.average = AveragedModel(self.network, multi_avg_fn=ema, use_buffers=True)
        self.optimiser = optimiser(self.network, recipe)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: recipe.rate_factor(step, steps)
        )
        kind, number = place.device.type, number_format(place.device)
        self.autocast = torch.autocast(kind, number, enabled=number is not torch.float32)
        self.scaler = torch.amp.GradScaler(kind, enabled=number is torch.float16)
        self.epoch = 0
        self.best_px = math.inf

    @abstractmethod
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch that lies on the device."""

    @property
    def evaluated(self) -> nn.Module:
        """The weights that count: the averaged ones where the recipe averages."""
        return self.average.module if self.recipe.ema_decay else self.network

    def train_epoch(self, loader: TrainLoader) -> float:
        """One pass over the training images; returns the mean loss."""
        loader.sampler.epoch = self.epoch
        self.wrapped.train()
        losses = []
        bar = tqdm(
            loader,
            f"epoch {self.epoch + 1}/{self.recipe.epochs}",
            leave=False,
            disable=not self.place.leads,
        )
        for batch in bar:
            on_device = {name: value.to(self.place.device) for name, value in batch.items()}
            losses.append(self._descend(self.loss(on_device)))
            bar.set_postfix(loss=f"{np.mean(losses):.3f}")
        self.epoch += 1
        return float(np.mean(losses))

    def _descend(self, loss: Tensor) -> float:
        """One step down a loss; returns its value."""
        if not torch.isfinite(loss):
            raise SystemExit(
                f"the loss is {loss.item()} in epoch {self.epoch + 1}: expected a finite one; "
                "lower --learning_rate or set --clip_norm 1, then start again"
            )
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.scheduler.step()
        self.average.update_parameters(self.network)
        return float(loss.item())

    def save(self, path: Path, seconds: float) -> None:
        """Everything that resuming needs, whole or not at all."""
        state = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "best_px": self.best_px,
            "seconds": seconds,
            "recipe": self.recipe.model_dump_json(),
            "teachers": self.taught_by,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> float:
        """Take up a training that `save` wrote; returns the seconds it had run.

        Raises:
            ValueError: the file is of another recipe or other teachers.
        """
        state = torch.load(path, map_location=self.place.device, weights_only=True)
        asked = self.recipe.model_dump(mode="json")
        earlier = type(self.recipe)().model_dump(mode="json") | json.loads(state["recipe"])
        changed = [name for name in asked if asked[name] != earlier.get(name)]
        if changed:
            raise ValueError(
                f"{path} was written by another recipe (differs in {', '.join(changed)}); resume "
                "with the same settings, or start anew from its weights with --init"
            )
        if state.get("teachers", []) != self.taught_by:
            raise ValueError(f"{path} is of other --teachers; resume with the same files")
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best_px = state["epoch"], state["best_px"]
        return float(state["seconds"])


class LandmarkTrainer(Trainer[Recipe]):
    """The trainer of the main training."""

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        steps: int,
        place: Processes,
        teachers: Ensemble | None = None,
    ) -> None:
        super().__init__(network, recipe, steps, place, teachers.digests if teachers else ())
        self.teachers = teachers

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch of training.data.dataset, with the teachers' share in its targets."""
        batch = self.teachers.teach(batch) if self.teachers else batch
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        with self.autocast:
            raw = self.wrapped(image)
        recipe = self.recipe
        weights = recipe.heatmap_weight, recipe.mask_weight
        return total_loss(raw.heatmaps, raw.masks, batch, recipe.loss, *weights)


def running_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Exponential average that starts as the plain mean, so that random weights do not linger."""

    def update(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        if averaged[0].is_floating_point():
            share = 1 - min(decay, float(count / (count + 1)))
            torch._foreach_lerp_(averaged, current, share)
        else:
            torch._foreach_copy_(averaged, current)

    return update


def number_format(device: torch.device) -> torch.dtype:
    """What a training's products are in: bfloat16 where the device is quick at it.

    Else a GPU takes fp16, with a scaled loss, and a CPU float32: one without AVX-512 takes 11 times
    as long in bfloat16 (a step of recipe compact, one core of an AMD EPYC of 2021).
    """
    if device.type == "cuda":
        quick = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if quick else torch.float16
    quick = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.bfloat16 if quick else torch.float32


@dataclass(frozen=True)
class FitSettings:
    """What a main training reads and where it writes; its recipe says how it trains.

    Args:
        data: case table; without splits one is drawn and written to `output`.
        masks: folder of masks with the images' stems, an auxiliary target.
        more: further case tables, each with the folder of its images.
        init: weights (.safetensors) to start from.
        teachers: ONNX files whose maps have the recipe's `teacher_share` in the targets.
        pretrained: for the bottleneck: a run of training.pretrain, or usfm:FILE.
        encoder_weights: for the encoder: ResNet-50's, under torchvision's keys.
        styles: folder of unlabelled images whose look the augmentation mixes in.
        steps: in place of the recipe's epochs: as many as make about so many steps.
        all: split val trains too, and the last weights are kept.
        max_minutes: stop after the epoch in which these end.
        device: auto, cuda or cpu, for `processes`.
    """

    data: Path
    images: Path
    output: Path
    masks: Path | None = None
    more: tuple[tuple[Path, Path], ...] = ()
    init: Path | None = None
    teachers: tuple[Path, ...] = ()
    pretrained: str | None = None
    encoder_weights: Path | None = None
    styles: Path | None = None
    steps: int | None = None
    all: bool = False
    resume: bool = False
    max_minutes: float | None = None
    device: str = "auto"


def parse_fit(
    arguments: Sequence[str] | None, description: str | None = None
) -> tuple[FitSettings, Recipe]:
    """The settings and the recipe that a command line of training.fit asks for.

    Raises:
        ValueError: (pydantic's ValidationError) a value that its field of the recipe does not take.
        SystemExit: argparse's, after it has said what is wrong.
    """
    parser = argparse.ArgumentParser(
        "training.fit",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    args = parser.parse_args(arguments)
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(FitSettings)}
    values["more"] = tuple((table, folder) for table, folder in args.more)
    values["teachers"] = tuple(args.teachers)
    return FitSettings(**values), recipe_from_arguments(args)


def fit(settings: FitSettings, recipe: Recipe, place: Processes) -> None:
    """Train until the recipe's epochs or `max_minutes` are over.

    Raises:
        ValueError: (CaseError, CheckpointError, ImageError, ModelError) settings, cases, images,
            weights or teachers that cannot be used.
    """
    checkpoint = _checkpoint(settings)
    start = settings.output / "best.safetensors" if settings.resume else settings.init
    recipe = with_members(start, recipe)
    settings.output.mkdir(parents=True, exist_ok=True)
    more = further_cases(settings.more, settings.data, settings.images)
    cases = split_cases(settings, recipe, place)
    styles = style_images(settings.styles)
    dataset = LandmarkDataset(
        cases["train"], settings.images, settings.masks, recipe, True, more, styles
    )
    order = EpochSampler(len(dataset), recipe.seed, place.rank, place.world, chances(dataset))
    loader = train_loader(dataset, order, recipe.batch, recipe.workers)
    if settings.steps:
        recipe = recipe.model_copy(update={"epochs": max(1, round(settings.steps / len(loader)))})
    torch.manual_seed(recipe.seed)
    masks = len(CLASSES) if settings.masks else 0
    network = build_network(recipe.network, masks)
    if settings.init and not settings.resume:
        left_out = start_from(settings.init, network, bool(masks))
        if left_out and place.leads:
            print(f"of {settings.init.name} these are left out: {', '.join(left_out)}")
    if not settings.resume:
        for report in start_pretrained(network, settings.pretrained, settings.encoder_weights):
            if place.leads:
                print(report)
    teachers = teachers_of(settings.teachers, recipe, masks, place.device)
    trainer = LandmarkTrainer(network, recipe, len(loader), place, teachers)
    spent = trainer.resume(checkpoint) if settings.resume else 0.0
    if place.leads:
        count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        print(
            f"{len(dataset)} images train, {len(cases['val']) or 'none'} choose; {count:.1f} M "
            f"parameters, {place.world} x {place.device}, epoch {trainer.epoch} of {recipe.epochs}"
        )
    began = time.monotonic() - spent
    while trainer.epoch < recipe.epochs:
        loss = trainer.train_epoch(loader)
        seconds = time.monotonic() - began
        if place.leads:
            keep(trainer, settings, masks, cases["val"], loss, seconds)
        place.barrier()
        if place.any(settings.max_minutes is not None and seconds > 60 * settings.max_minutes):
            if place.leads:
                print(f"--max-minutes reached after epoch {trainer.epoch}; --resume goes on")
            return


def _checkpoint(settings: FitSettings) -> Path:
    """RUN/checkpoint.pt, which is there if and only if it is to be resumed."""
    path = settings.output / "checkpoint.pt"
    if path.exists() and not settings.resume:
        raise CaseError(f"{settings.output} holds a training: pass --resume, or another --output")
    if settings.resume and not path.exists():
        raise CaseError(f"there is no {path} to resume")
    if settings.init and (settings.pretrained or settings.encoder_weights):
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
    trainer: LandmarkTrainer,
    settings: FitSettings,
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
    predictions = predict_cases(predictor, val, settings.images)
    metrics: dict[str, float] = {}
    if val:
        mre_px, aop_deg = mean_errors(predictions, val)
        metrics = {"val_mre_px": round(mre_px, 3), "val_aop_error_deg": round(aop_deg, 3)}
    row: dict[str, float] = {
        "epoch": epoch,
        "loss": round(loss, 5),
        **metrics,
        "learning_rate": float(trainer.scheduler.get_last_lr()[0]),
        "minutes": round(seconds / 60, 2),
    }
    print("  ".join(f"{name} {value:g}" for name, value in row.items()), flush=True)
    sheet = None
    if val and (epoch % SAMPLES_EVERY == 0 or epoch == recipe.epochs):
        sheet = sample_sheet(predictions, val, settings.images)
    log_epoch(settings.output, row, "val", sheet)
    if not val or mre_px < trainer.best_px:
        trainer.best_px = mre_px if val else trainer.best_px
        spec = recipe.spec(masks).model_copy(update={"metrics": metrics, "val_trained": not val})
        checkpoint = Checkpoint(network=recipe.network, masks=masks, spec=spec)
        path = settings.output / "best.safetensors"
        save_weights(path, trainer.evaluated.state_dict(), checkpoint)
    trainer.save(settings.output / "checkpoint.pt", seconds)


def log_epoch(folder: Path, row: Mapping[str, float], title: str, sheet: np.ndarray | None) -> None:
    """Add an epoch to log.csv and TensorBoard, and its pictures to TensorBoard and samples/.

    Args:
        row: name -> figure, `epoch` among them.
        title: of the pictures in TensorBoard.
        sheet: (H, W) grey or (H, W, 3) BGR, uint8.
    """
    epoch, path = int(row["epoch"]), folder / "log.csv"
    new = epoch == 1 or not path.exists()
    with path.open("w" if new else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row.keys())
        if new:
            writer.writeheader()
        writer.writerow(row)
    with SummaryWriter(str(folder / "tensorboard")) as board:
        for name, value in row.items():
            board.add_scalar(name, value, epoch)
        if sheet is not None:
            shown, axes = (sheet, "HW") if sheet.ndim == 2 else (sheet[..., ::-1].copy(), "HWC")
            board.add_image(title, shown, epoch, dataformats=axes)
            (folder / "samples").mkdir(exist_ok=True)
            cv2.imwrite(str(folder / "samples" / f"epoch-{epoch:03d}.png"), sheet)


def split_cases(settings: FitSettings, recipe: Recipe, place: Processes) -> dict[str, list[Case]]:
    """The cases by split; where the table has none it is drawn by group and written down."""
    cases = read_cases(settings.data)
    require_images(cases, settings.images, settings.data)
    if not any(case.split for case in cases):
        groups = [case.group for case in cases]
        if not all(groups):
            if place.leads:
                print("no group column: comparing the images to find near-duplicates")
            images = (read_grey(settings.images / case.file, case.frame)[0] for case in cases)
            groups = [f"g{group:04d}" for group in near_duplicate_groups(images)]
        splits = split_by_group(groups, FRACTIONS, recipe.seed)
        cases = [
            dataclasses.replace(case, split=split, group=group)
            for case, split, group in zip(cases, splits, groups, strict=True)
        ]
        if place.leads:
            write_cases(settings.output / "cases.csv", cases)
            print(f"a split by group was drawn and written to {settings.output / 'cases.csv'}")
    chosen = {name: [case for case in cases if case.split == name] for name in ("train", "val")}
    if settings.all:
        chosen = {"train": chosen["train"] + chosen["val"], "val": []}
    for name, found in chosen.items():
        if not found and not (settings.all and name == "val"):
            raise CaseError(
                f"{settings.data}: expected cases of split train and val, the table has "
                f"{count_splits(cases)}"
            )
    if settings.masks:
        if not settings.masks.is_dir():
            raise CaseError(f"{settings.masks} is not a folder; expected the folder of the masks")
        stems = {path.stem for path in settings.masks.iterdir()}
        bare = [case.file for case in chosen["train"] if Path(case.file).stem not in stems]
        if bare:
            raise CaseError(
                f"{len(bare)} images without a mask in {settings.masks}, first {bare[0]}"
            )
    return chosen
