"""The training loop: processes, epochs, checkpoints, and resuming exactly where a run stopped.

`Trainer` serves every training: the caller passes the loss to `train_epoch`. `fit` is the main
training, which training.fit runs once and training.folds once for each fold.
"""

import argparse
import contextlib
import csv
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
    further_cases,
    read_frame,
    sampling_probabilities,
    train_loader,
)
from training.data.near_duplicates import near_duplicate_groups, split_by_group
from training.evaluation.metrics import mean_errors
from training.evaluation.pictures import sample_sheet
from training.evaluation.predict import predict_cases, torch_predictor
from training.learning.checkpoint import Checkpoint, save_weights
from training.learning.losses import total_loss
from training.learning.optimisers import make_optimiser
from training.learning.pretrained import adopt_members, load_initial_weights, load_pretrained_parts
from training.learning.teachers import Ensemble, load_ensemble
from training.recipes import (
    RECIPES,
    Recipe,
    TrainingRecipe,
    add_recipe_arguments,
    recipe_from_arguments,
)

SPLIT_SHARES = (0.8, 0.2, 0.0)  # of train, val and test: the paper's 4:1
SHEET_EPOCHS = 8  # epochs between two sample sheets

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
Tensors = tuple[Tensor, ...] | list[Tensor]


# ---- processes and number formats


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; the only one without torchrun.

    Args:
        rank: number of this process, from 0.
        world: number of processes.
        device: where this process trains.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is the process that validates, writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.world > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """True in every process if the flag is true in any, so that all decide alike."""
        if self.world == 1:
            return flag
        shared = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return bool(shared.item())


@contextlib.contextmanager
def join_processes(device: str = "auto") -> Iterator[Processes]:
    """Join torchrun's processes, through nccl on CUDA and gloo on the CPU, until the block ends.

    Args:
        device: auto, cuda or cpu.

    Raises:
        ValueError: cuda is asked for, and torch finds no CUDA device.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; pass --device cpu or auto")
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local = int(os.environ.get("LOCAL_RANK", "0"))
    own = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(own)
    else:  # flash attention's backward pass in bfloat16 takes 3 times as long as plain products
        torch.backends.cuda.enable_flash_sdp(False)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Processes(rank, world, own)
    finally:
        if world > 1:
            dist.destroy_process_group()


def number_format(device: torch.device) -> torch.dtype:
    """The number format of a training's matrix products: bfloat16 on a device that is quick at it.

    Otherwise a GPU takes fp16, with a scaled loss, and a CPU float32. A CPU without AVX-512 takes
    11 times as long in bfloat16 (one step of recipe compact on one core of an AMD EPYC of 2021).
    """
    if device.type == "cuda":
        quick = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if quick else torch.float16
    quick = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.bfloat16 if quick else torch.float32


def mixed_precision(device: torch.device) -> torch.autocast:
    """A context in which products are computed in the device's `number_format`."""
    number = number_format(device)
    return torch.autocast(device.type, number, enabled=number is not torch.float32)


# ---- one training


class Trainer:
    """A network in training, with its optimiser, schedule and averaged weights.

    Args:
        steps: batches an epoch, from which the learning rate's schedule follows.
        teacher_digests: SHA-256 of the teachers' files; a resumed training must have the same.
    """

    def __init__(
        self,
        network: nn.Module,
        recipe: TrainingRecipe,
        steps: int,
        processes: Processes,
        teacher_digests: Sequence[str] = (),
    ) -> None:
        self.recipe, self.processes = recipe, processes
        self.teacher_digests = list(teacher_digests)
        device = processes.device
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if processes.world > 1 and device.type == "cuda":
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.wrapped = self.network
        if processes.world > 1:
            self.wrapped = DistributedDataParallel(self.network)
        ema = running_average(recipe.ema_decay)
        self.average = AveragedModel(self.network, multi_avg_fn=ema, use_buffers=True)
        self.optimiser = make_optimiser(self.network, recipe)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: recipe.rate_factor(step, steps)
        )
        scaled = number_format(device) is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.epoch = 0
        self.best_px = math.inf

    @property
    def evaluated_network(self) -> nn.Module:
        """The network to validate and save: the averaged one if the recipe averages weights."""
        return self.average.module if self.recipe.ema_decay else self.network

    def train_epoch(self, loader: TrainLoader, loss: Loss) -> float:
        """Make one pass over the training images; returns the mean loss.

        Args:
            loss: from the network and a batch on the device to a scalar.
        """
        loader.sampler.epoch = self.epoch
        self.wrapped.train()
        values = []
        bar = tqdm(
            loader,
            f"epoch {self.epoch + 1}/{self.recipe.epochs}",
            leave=False,
            disable=not self.processes.leads,
        )
        for batch in bar:
            on_device = {name: value.to(self.processes.device) for name, value in batch.items()}
            values.append(self._take_step(loss(self.wrapped, on_device)))
            bar.set_postfix(loss=f"{np.mean(values):.3f}")
        self.epoch += 1
        return float(np.mean(values))

    def _take_step(self, loss: Tensor) -> float:
        """Take one step of the optimiser down the loss; returns the loss's value."""
        if not torch.isfinite(loss):
            raise SystemExit(
                f"the loss is {loss.item()} in epoch {self.epoch + 1}, expected a finite number; "
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
        """Write all that resuming needs, whole or not at all.

        Args:
            seconds: how long the training has run.
        """
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
            "teachers": self.teacher_digests,
        }
        unfinished = path.with_suffix(".partial")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def resume(self, path: Path) -> float:
        """Restore what `save` wrote; returns the seconds that the training had run.

        Raises:
            ValueError: the file was written with another recipe or other teachers.
        """
        state = torch.load(path, map_location=self.processes.device, weights_only=True)
        own = self.recipe.model_dump(mode="json")
        earlier = type(self.recipe)().model_dump(mode="json") | json.loads(state["recipe"])
        differing = [name for name in own if own[name] != earlier.get(name)]
        if differing:
            raise ValueError(
                f"{path} was written by another recipe (differs in {', '.join(differing)}); resume "
                "with the same settings, or start anew from its weights with --init"
            )
        if state.get("teachers", []) != self.teacher_digests:
            raise ValueError(
                f"{path} was written with other --teachers; resume with the same files"
            )
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best_px = state["epoch"], state["best_px"]
        return float(state["seconds"])


def running_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Exponential average that starts as the plain mean, so that random weights do not linger."""

    def update(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        if averaged[0].is_floating_point():
            share = 1 - min(decay, float(count / (count + 1)))
            torch._foreach_lerp_(averaged, current, share)
        else:
            torch._foreach_copy_(averaged, current)

    return update


def log_epoch(folder: Path, row: Mapping[str, float], title: str, sheet: np.ndarray | None) -> None:
    """Add an epoch to log.csv and TensorBoard, and its sheet to TensorBoard and samples/.

    Args:
        row: name -> figure, `epoch` among them.
        title: name of the sheets in TensorBoard.
        sheet: (H, W) grey or (H, W, 3) BGR, uint8, or None for an epoch without a sheet.
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
            image, axes = (sheet, "HW") if sheet.ndim == 2 else (sheet[..., ::-1].copy(), "HWC")
            board.add_image(title, image, epoch, dataformats=axes)
            (folder / "samples").mkdir(exist_ok=True)
            cv2.imwrite(str(folder / "samples" / f"epoch-{epoch:03d}.png"), sheet)


# ---- the main training


@dataclass(frozen=True)
class FitSettings:
    """What a main training reads and where it writes; its recipe says how it trains.

    Args:
        data: case table. If it has no splits, one is drawn and written to `output`.
        images: folder of the table's images.
        output: the run's folder.
        masks: folder of masks with the images' stems, for an auxiliary target.
        more: further case tables, each with the folder of its images.
        init: weights (.safetensors) of a whole network to start from.
        teachers: ONNX files whose maps make up the recipe's `teacher_share` of the targets.
        pretrained: weights for the bottleneck: a run of training.pretrain, or usfm:FILE.
        encoder_weights: weights for the encoder: ResNet-50's, under torchvision's keys.
        styles: folder of unlabelled images whose look the augmentation mixes in.
        steps: number of steps to train, to the nearest epoch, instead of the recipe's epochs.
        all: train on split val too, and keep the last weights.
        resume: continue from the checkpoint in `output`.
        max_minutes: minutes of training after which the current epoch is the last.
        device: auto, cuda or cpu.
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


def fit(settings: FitSettings, recipe: Recipe, processes: Processes) -> None:
    """Train until the recipe's epochs or `max_minutes` are over.

    Raises:
        ValueError: settings, cases, images, weights or teachers that cannot be used (among them
            CaseError, CheckpointError, ImageError and ModelError).
    """
    checkpoint = _checkpoint_path(settings)
    start = settings.output / "best.safetensors" if settings.resume else settings.init
    recipe = adopt_members(start, recipe)
    settings.output.mkdir(parents=True, exist_ok=True)
    more = further_cases(settings.more, settings.data, settings.images)
    cases = split_cases(settings, recipe, processes)
    styles = find_style_images(settings.styles)
    dataset = LandmarkDataset(
        cases["train"], settings.images, settings.masks, recipe, True, more, styles
    )
    probabilities = sampling_probabilities(dataset)
    sampler = EpochSampler(
        len(dataset), recipe.seed, processes.rank, processes.world, probabilities
    )
    loader = train_loader(dataset, sampler, recipe.batch, recipe.workers)
    if settings.steps:
        recipe = recipe.model_copy(update={"epochs": max(1, round(settings.steps / len(loader)))})
    torch.manual_seed(recipe.seed)
    masks = len(CLASSES) if settings.masks else 0
    network = build_network(recipe.network, masks)
    if settings.init and not settings.resume:
        left_out = load_initial_weights(settings.init, network, bool(masks))
        if left_out and processes.leads:
            print(f"{settings.init.name}: these parts are left out: {', '.join(left_out)}")
    if not settings.resume:
        for report in load_pretrained_parts(network, settings.pretrained, settings.encoder_weights):
            if processes.leads:
                print(report)
    teachers = load_ensemble(settings.teachers, recipe, masks, processes.device)
    loss = partial(landmark_loss, recipe=recipe, teachers=teachers)
    digests = teachers.digests if teachers else ()
    trainer = Trainer(network, recipe, len(loader), processes, digests)
    seconds = trainer.resume(checkpoint) if settings.resume else 0.0
    if processes.leads:
        count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        print(
            f"{len(dataset)} images train, {len(cases['val']) or 'none'} choose; {count:.1f} M "
            f"parameters, {processes.world} x {processes.device}, "
            f"epoch {trainer.epoch} of {recipe.epochs}"
        )
    began = time.monotonic() - seconds
    while trainer.epoch < recipe.epochs:
        mean_loss = trainer.train_epoch(loader, loss)
        seconds = time.monotonic() - began
        if processes.leads:
            finish_epoch(trainer, settings, recipe, masks, cases["val"], mean_loss, seconds)
        processes.barrier()
        if processes.any(settings.max_minutes is not None and seconds > 60 * settings.max_minutes):
            if processes.leads:
                print(f"--max-minutes reached after epoch {trainer.epoch}; --resume continues")
            return


def landmark_loss(
    network: nn.Module, batch: Batch, recipe: Recipe, teachers: Ensemble | None = None
) -> Tensor:
    """The recipe's loss of a batch of `LandmarkDataset`; its targets may be part the teachers'."""
    if teachers:
        batch = teachers.teach(batch)
    image = batch["image"].contiguous(memory_format=torch.channels_last)
    with mixed_precision(image.device):
        raw = network(image)
    weights = recipe.heatmap_weight, recipe.mask_weight
    return total_loss(raw.heatmaps, raw.masks, batch, recipe.loss, *weights)


def finish_epoch(
    trainer: Trainer,
    settings: FitSettings,
    recipe: Recipe,
    masks: int,
    val: list[Case],
    loss: float,
    seconds: float,
) -> None:
    """Validate the network, log the epoch, save the best weights, and write the checkpoint.

    Args:
        masks: number of masks that the network gives.
        val: cases of split val; without any, the last weights count as the best.
        loss: the epoch's mean.
        seconds: how long the training has run.
    """
    epoch, network = trainer.epoch, trainer.evaluated_network
    predictor = torch_predictor(network, recipe.spec(masks), trainer.processes.device)
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
    if val and (epoch % SHEET_EPOCHS == 0 or epoch == recipe.epochs):
        sheet = sample_sheet(predictions, val, settings.images)
    log_epoch(settings.output, row, "val", sheet)
    if not val or mre_px < trainer.best_px:
        trainer.best_px = mre_px if val else trainer.best_px
        spec = recipe.spec(masks).model_copy(update={"metrics": metrics, "val_trained": not val})
        checkpoint = Checkpoint(network=recipe.network, masks=masks, spec=spec)
        path = settings.output / "best.safetensors"
        save_weights(path, network.state_dict(), checkpoint)
    trainer.save(settings.output / "checkpoint.pt", seconds)


def split_cases(
    settings: FitSettings, recipe: Recipe, processes: Processes
) -> dict[str, list[Case]]:
    """The cases of train and val. A table without splits gets one, drawn by group and written down.

    Raises:
        CaseError: the table, its images or masks cannot be used, or train or val has no case.
    """
    cases = read_cases(settings.data)
    require_images(cases, settings.images, settings.data)
    if not any(case.split for case in cases):
        groups = [case.group for case in cases]
        if not all(groups):
            if processes.leads:
                print("the table has no groups: comparing the images to find near-duplicates")
            images = (read_frame(settings.images / case.file, case.frame)[0] for case in cases)
            groups = [f"g{group:04d}" for group in near_duplicate_groups(images)]
        splits = split_by_group(groups, SPLIT_SHARES, recipe.seed)
        cases = [
            dataclasses.replace(case, split=split, group=group)
            for case, split, group in zip(cases, splits, groups, strict=True)
        ]
        if processes.leads:
            write_cases(settings.output / "cases.csv", cases)
            print(f"a split by group was drawn and written to {settings.output / 'cases.csv'}")
    chosen = {name: [case for case in cases if case.split == name] for name in ("train", "val")}
    if settings.all:
        chosen = {"train": chosen["train"] + chosen["val"], "val": []}
    for name, of_split in chosen.items():
        if not of_split and not (settings.all and name == "val"):
            raise CaseError(
                f"{settings.data}: expected cases of split train and val, the table has "
                f"{count_splits(cases)}"
            )
    if settings.masks:
        if not settings.masks.is_dir():
            raise CaseError(f"{settings.masks} is not a folder; expected the folder of the masks")
        stems = {path.stem for path in settings.masks.iterdir()}
        unmasked = [case.file for case in chosen["train"] if Path(case.file).stem not in stems]
        if unmasked:
            raise CaseError(
                f"{len(unmasked)} images without a mask in {settings.masks}, the first is "
                f"{unmasked[0]}; expected a mask of the same name for each training image"
            )
    return chosen


def find_style_images(folder: Path | None) -> list[Path]:
    """Every image below a folder; none for None.

    Raises:
        CaseError: the folder has no image.
    """
    if folder is None:
        return []
    paths = sorted(path for path in folder.rglob("*") if is_supported_name(path))
    if not paths:
        raise CaseError(f"--styles: expected a folder of images, {folder} has none")
    return paths


def _checkpoint_path(settings: FitSettings) -> Path:
    """RUN/checkpoint.pt, which must exist if the training resumes, and only then.

    Raises:
        ValueError: it does or does not exist, or --init contradicts another setting.
    """
    path = settings.output / "checkpoint.pt"
    if path.exists() and not settings.resume:
        raise CaseError(f"{settings.output} holds a training: pass --resume, or another --output")
    if settings.resume and not path.exists():
        raise CaseError(f"there is no {path} to resume: check --output, or leave out --resume")
    if settings.init and (settings.pretrained or settings.encoder_weights):
        raise ValueError(
            "--init fills the whole network: leave out --pretrained and --encoder-weights"
        )
    return path


# ---- the command line of training.fit, which training.folds reads too


def parse_fit(
    arguments: Sequence[str] | None, description: str | None = None
) -> tuple[FitSettings, Recipe]:
    """The settings and the recipe that a command line of training.fit asks for.

    Raises:
        ValueError: (pydantic's ValidationError) a recipe field does not take its value.
        SystemExit: argparse has printed what is wrong.
    """
    parser = argparse.ArgumentParser(
        "training.fit",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="case table (CSV); training.prepare makes one"
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of the table's images")
    parser.add_argument(
        "--masks", type=Path, help="folder of masks, predicted as an auxiliary target"
    )
    parser.add_argument(
        "--more", type=Path, nargs=2, action="append", default=[], metavar=("TABLE", "IMAGES"),
        help="further case table to train on, and the folder of its images, such as pseudo.csv of "
        "training.pseudo_label; has no masks; may be given several times",
    )  # fmt: skip
    parser.add_argument("--init", type=Path, help="weights (.safetensors) to start from")
    parser.add_argument(
        "--teachers", type=Path, nargs="+", default=[], metavar="ONNX",
        help="trained models whose maps are mixed into the targets; see --teacher_share",
    )  # fmt: skip
    parser.add_argument(
        "--pretrained", metavar="RUN", help="run of training.pretrain, or usfm:FILE, to fill the "
        "bottleneck; its width, depth and heads must equal the network's",
    )  # fmt: skip
    parser.add_argument(
        "--encoder-weights", type=Path, metavar="FILE",
        help="ImageNet weights of a ResNet-50, under torchvision's keys, to fill the encoder",
    )  # fmt: skip
    parser.add_argument(
        "--styles", type=Path, metavar="DIR", help="folder of unlabelled images, of other machines "
        "too, whose look is mixed in; see --augmentation.style",
    )  # fmt: skip
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="number of steps to train, to the nearest epoch, instead of --epochs",
    )
    parser.add_argument("--output", type=Path, required=True, help="the run's folder")
    parser.add_argument(
        "--all", action="store_true", help="train on split val too, keep the last weights"
    )
    parser.add_argument("--resume", action="store_true", help="continue from RUN/checkpoint.pt")
    parser.add_argument(
        "--max-minutes", type=float, help="minutes after which the current epoch is the last"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="processor to train on; auto is cuda if torch finds it (default: %(default)s)",
    )
    add_recipe_arguments(parser, RECIPES)
    args = parser.parse_args(arguments)
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(FitSettings)}
    values["more"] = tuple((table, folder) for table, folder in args.more)
    values["teachers"] = tuple(args.teachers)
    return FitSettings(**values), recipe_from_arguments(args, RECIPES)
