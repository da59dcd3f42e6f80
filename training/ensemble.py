"""Distillation of an ensemble into one network of the same size.

The network's targets are partly what trained models say of the very image that it sees, with all
its random changes (Hinton et al. 2015; Beyer et al. 2022, "function matching"). A label is one
reader's judgement of one frame; the mean of several models is a steadier one.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.predictor import Provider, load_predictor
from training.recipes import Recipe

ALIKE = ("input_size", "channels", "mean", "std", "stride", "sigma_cells", "masks")  # in ModelSpec


class Ensemble:
    """Trained models that teach.

    Args:
        files: ONNX files; each model counts alike.
        recipe: the training's; its `teacher_share` is theirs in the targets.
        masks: how many masks the network gives.
        device: the training's; on CUDA the teachers run there too, where ONNX Runtime can.

    Raises:
        ValueError: (ModelError) a file that cannot be used, or one whose input or maps are not
            like the network's.
    """

    def __init__(
        self, files: Sequence[Path], recipe: Recipe, masks: int, device: torch.device
    ) -> None:
        self.share = recipe.teacher_share
        provider: Provider = "auto" if device.type == "cuda" else "cpu"
        threads = torch.get_num_threads()
        self.models = [load_predictor(file, provider, threads) for file in files]
        self.digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        own = recipe.spec(masks)
        for file, model in zip(files, self.models, strict=True):
            for name in ALIKE:
                theirs, ours = getattr(model.spec, name), getattr(own, name)
                if theirs != ours:
                    raise ValueError(f"{file} cannot teach: its {name} is {theirs}, here {ours}")

    def teach(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of training.data with the teachers' share in its `heatmaps` and `masks`."""
        images = batch["image"].float().cpu().numpy()
        maps = np.mean([model.run(images).maps for model in self.models], axis=0)
        taught = torch.from_numpy(maps).to(batch["image"].device)
        count = batch["heatmaps"].shape[1]
        found = {"heatmaps": taught[:, :count], "masks": taught[:, count:]}
        mixed = {k: torch.lerp(batch[k], v, self.share) for k, v in found.items() if k in batch}
        return batch | mixed


def teachers_of(
    files: Sequence[Path], recipe: Recipe, masks: int, device: torch.device
) -> Ensemble | None:
    """The ensemble, or None where there are no files; ValueError as `Ensemble`, or by half."""
    if bool(files) != bool(recipe.teacher_share):
        raise ValueError("--teachers and a --teacher_share above 0 are given together")
    return Ensemble(files, recipe, masks, device) if files else None
