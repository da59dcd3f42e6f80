"""Frozen teachers: of the pretraining one ViT, of the main training an ensemble of models.

The ViT is USFM (BEiT-style weights) or a larger model of our own. Both take (n, 1, side, side) grey
values 0..1, and `kept` as in training.learning.mae.

The ensemble's maps are part of the targets, for the very image that the network sees, with all its
random changes (Hinton et al. 2015; Beyer et al. 2022, "function matching"). A label is one reader's
judgement of one frame; the mean of several models is a steadier one.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.network.vit import Block, relative_index
from model.predictor import Provider, load_predictor
from training.learning.checkpoint import load_strictly
from training.learning.mae import Encoder, Features, load_mae, resize_positions, take
from training.learning.pretrained import BeitWeights, read_beit
from training.recipes import Recipe

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # USFM's input scale
ALIKE = ("input_size", "channels", "mean", "std", "stride", "sigma_cells", "masks")  # in ModelSpec


class Beit(nn.Module):
    """A BEiT-style ViT for images of `grid` by `grid` patches; grey images become its RGB."""

    index: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, weights: BeitWeights, grid: int) -> None:
        super().__init__()
        tables = weights.on_grid(grid, grid)
        state = weights.state
        self.width, _, self.patch, _ = state["patch_embed.weight"].shape
        self.grid, (depth, offsets, self.heads) = grid, tables.shape
        ratio = len(state["blocks.0.mlp.0.bias"]) / self.width
        self.patch_embed = nn.Conv2d(3, self.width, self.patch, self.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.tables = nn.Parameter(torch.zeros(tables.shape))
        self.blocks = nn.ModuleList(Block(self.width, self.heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        index = torch.full((grid**2 + 1, grid**2 + 1), offsets - 2)
        index[0] = offsets - 3
        index[0, 0] = offsets - 1
        index[1:, 1:] = relative_index(grid, grid)
        self.register_buffer("index", index, persistent=False)
        for name, value in zip(("mean", "std"), (IMAGENET_MEAN, IMAGENET_STD), strict=True):
            self.register_buffer(name, torch.tensor(value).reshape(3, 1, 1), persistent=False)
        load_strictly(self, {**state, "tables": tables}, weights.report.file)

    def forward(
        self, image: Tensor, kept: Tensor | None = None, attention: bool = False
    ) -> Features:
        """Features of all patches, or of those kept; attention maps without the cls token."""
        image = resize_squares(image, self.grid * self.patch)
        tokens = self.patch_embed((image - self.mean) / self.std).flatten(2).transpose(1, 2)
        index = self.index
        if kept is not None:
            tokens = take(tokens, kept)
            with_cls = F.pad(kept + 1, (1, 0))
            index = index[with_cls[:, :, None], with_cls[:, None, :]]
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], 1)
        maps = None
        for k, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            bias = self.tables[k][index].movedim(-1, -3)  # (heads, ...) or (n, heads, ...)
            if attention and k + 1 == len(self.blocks):
                maps = block.attn.maps(block.norm1(tokens), bias)[..., 1:, 1:]
                maps = maps / maps.sum(dim=-1, keepdim=True)
            tokens = block(tokens, bias)
        return Features(self.norm(tokens)[:, 1:], maps)


class MaeTeacher(nn.Module):
    """The encoder of one of our own runs, on a grid of `grid` by `grid` patches."""

    def __init__(self, encoder: Encoder, grid: int) -> None:
        super().__init__()
        self.width, self.patch = encoder.patch_embed.weight.shape[0], encoder.patch_embed.stride[0]
        self.grid, self.encoder = grid, encoder
        positions = resize_positions(encoder.position_embedding, grid, grid)
        encoder.position_embedding = nn.Parameter(positions, requires_grad=False)

    def forward(
        self, image: Tensor, kept: Tensor | None = None, attention: bool = False
    ) -> Features:
        """Features of all patches, or of those kept; attention maps where asked for."""
        size = self.grid * self.patch
        features: Features = self.encoder(resize_squares(image, size), kept, attention)
        return features


def resize_squares(image: Tensor, side: int) -> Tensor:
    """Square images at another size; unchanged where they have it."""
    if image.shape[-1] == side:
        return image
    return F.interpolate(image, (side, side), mode="bilinear", antialias=True)


def load_teacher(text: str, grid: int) -> tuple[Beit | MaeTeacher | None, str]:
    """The teacher that a recipe names, for so many patches a side, frozen; and a line about it.

    Raises:
        ValueError: (CheckpointError) a kind that is not known, or a file that does not fit.
    """
    kind, _, name = text.partition(":")
    if text == "none":
        return None, "no teacher: a plain masked autoencoder"
    if kind not in ("usfm", "mae") or not name:
        raise ValueError(f"expected the teacher usfm:FILE, mae:RUN or none, got {text!r}")
    teacher: Beit | MaeTeacher
    if kind == "usfm":
        weights = read_beit(Path(name))
        teacher = Beit(weights, grid)
        line = f"teacher {weights.report}"
    else:
        mae, described = load_mae(Path(name))
        teacher = MaeTeacher(mae.encoder, grid)
        line = f"teacher {name}: {described.recipe.width} wide, epoch {described.epoch}"
    return teacher.eval().requires_grad_(False), line


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
        """A batch with the teachers' share in its `heatmaps` and `masks`."""
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
