"""One training: processes, epochs, validation, checkpoints; resumes exactly where it stopped."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from training.losses import total_loss
from training.optimisers import optimiser
from training.recipes import Recipe
from training.teachers import Ensemble


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
        """True where it is true in some process, so that all take the same turn."""
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


class Trainer:
    """Network, optimiser, schedule and averaged weights of one recipe."""

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        steps: int,
        place: Processes,
        teachers: Ensemble | None = None,
    ) -> None:
        self.recipe, self.place, self.steps_an_epoch = recipe, place, steps
        self.teachers = teachers
        self.network = network.to(place.device, memory_format=torch.channels_last)
        if place.world > 1 and place.device.type == "cuda":
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.wrapped = self.network
        if place.world > 1:
            self.wrapped = DistributedDataParallel(self.network)
        ema = running_average(recipe.ema_decay)
        self.average = AveragedModel(self.network, multi_avg_fn=ema, use_buffers=True)
        self.optimiser = optimiser(self.network, recipe)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimiser, self._factor)
        kind, number = place.device.type, number_format(place.device)
        self.autocast = torch.autocast(kind, number, enabled=number is not torch.float32)
        self.scaler = torch.amp.GradScaler(kind, enabled=number is torch.float16)
        self.epoch = 0
        self.best_px = math.inf

    def _factor(self, step: int) -> float:
        """The learning rate at a step, as a share of the recipe's."""
        recipe = self.recipe
        if recipe.schedule == "step":
            return recipe.step_factor ** (step // self.steps_an_epoch // recipe.step_epochs)
        done = step / max(1, recipe.epochs * self.steps_an_epoch)
        if done < recipe.warm_up:
            return 0.04 + 0.96 * done / recipe.warm_up
        return 0.5 * (1 + math.cos(math.pi * (done - recipe.warm_up) / (1 - recipe.warm_up)))

    @property
    def evaluated(self) -> nn.Module:
        """The weights that count: the averaged ones where the recipe averages."""
        return self.average.module if self.recipe.ema_decay else self.network

    def train_epoch(self, loader: DataLoader[dict[str, Tensor]]) -> float:
        """One pass over the training images; returns the mean loss."""
        self.wrapped.train()
        losses = []
        bar = tqdm(
            loader,
            f"epoch {self.epoch + 1}/{self.recipe.epochs}",
            leave=False,
            disable=not self.place.leads,
        )
        for batch in bar:
            losses.append(self._step({k: v.to(self.place.device) for k, v in batch.items()}))
            bar.set_postfix(loss=f"{np.mean(losses):.3f}")
        self.epoch += 1
        return float(np.mean(losses))

    def _step(self, batch: dict[str, Tensor]) -> float:
        batch = self.teachers.teach(batch) if self.teachers else batch
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        with self.autocast:
            raw = self.wrapped(image)
        recipe = self.recipe
        weights = recipe.heatmap_weight, recipe.mask_weight
        return self._descend(total_loss(raw.heatmaps, raw.masks, batch, recipe.loss, *weights))

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

    def _taught_by(self) -> list[str]:
        return self.teachers.digests if self.teachers else []

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
            "teachers": self._taught_by(),
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
        if state.get("teachers", []) != self._taught_by():
            raise ValueError(f"{path} is of other --teachers; resume with the same files")
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best_px = state["epoch"], state["best_px"]
        return float(state["seconds"])


def running_average(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """Exponential average that starts as the plain mean, so that random weights do not linger."""

    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
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
