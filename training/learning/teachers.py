"""Frozen teachers: a ViT for the pretraining, and an ensemble of models for the main training.

The ViT is USFM (BEiT-style weights) or a larger autoencoder of our own. It takes (n, 1, side, side)
grey values 0..1, and `kept` as in training.learning.mae.

The ensemble's maps are mixed into the targets. They are computed for the very image that the
network sees, with all its random changes (Hinton et al. 2015; Beyer et al. 2022, "function
matching"). A label is one reader's judgement of one frame; the mean of several models is steadier.
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
from training.learning.mae import Encoder, Features, load_mae, resize_positions, take_tokens
from training.learning.pretrained import BeitWeights, read_beit
from training.recipes import Recipe

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # scale USFM's input
# fields of ModelSpec in which a teacher must equal the network that it teaches
SHARED_FIELDS = ("input_size", "channels", "mean", "std", "stride", "sigma_cells", "masks")


# ---- teachers of the pretraining


class Beit(nn.Module):
    """A BEiT-style ViT for images of `grid` by `grid` patches; it sees grey images as RGB."""

    index: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, weights: BeitWeights, grid: int) -> None:
        super().__init__()
        tables = weights.tables_on_grid(grid, grid)
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
        """Features of all patches, or of those kept, with attention maps on request.

        The attention maps leave out the cls token; their rows still add up to 1.
        """
        image = resize_squares(image, self.grid * self.patch)
        tokens = self.patch_embed((image - self.mean) / self.std).flatten(2).transpose(1, 2)
        index = self.index
        if kept is not None:
            tokens = take_tokens(tokens, kept)
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
    """The encoder of a pretraining run, for images of `grid` by `grid` patches."""

    def __init__(self, encoder: Encoder, grid: int) -> None:
        super().__init__()
        self.width, self.patch = encoder.patch_embed.weight.shape[0], encoder.patch_embed.stride[0]
        self.grid, self.encoder = grid, encoder
        positions = resize_positions(encoder.position_embedding, grid, grid)
        encoder.position_embedding = nn.Parameter(positions, requires_grad=False)

    def forward(
        self, image: Tensor, kept: Tensor | None = None, attention: bool = False
    ) -> Features:
        """Features of all patches, or of those kept, with attention maps on request."""
        size = self.grid * self.patch
        features: Features = self.encoder(resize_squares(image, size), kept, attention)
        return features


def resize_squares(image: Tensor, side: int) -> Tensor:
    """Resize square images to `side` px; images of that size are unchanged."""
    if image.shape[-1] == side:
        return image
    return F.interpolate(image, (side, side), mode="bilinear", antialias=True)


def load_teacher(text: str, grid: int) -> tuple[Beit | MaeTeacher | None, str]:
    """The frozen teacher that a recipe names, and a line about it for the log.

    Args:
        text: usfm:FILE, mae:RUN or none.
        grid: patches along a side.

    Raises:
        ValueError: the text is none of these, or (CheckpointError) the file does not fit.
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


# ---- teachers of the main training


class Ensemble:
    """Trained models whose mean maps are mixed into the targets.

    Args:
        files: ONNX files of the models.
        recipe: the training's recipe; `teacher_share` is the models' share of the targets.
        masks: number of masks that the network gives.
        device: the training's device; on CUDA the models run there too if ONNX Runtime can.

    Raises:
        ValueError: (ModelError) a file cannot be used, or a model's input or maps differ from the
            network's.
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
            for name in SHARED_FIELDS:
                theirs, ours = getattr(model.spec, name), getattr(own, name)
                if theirs != ours:
                    raise ValueError(
                        f"{file} cannot teach: its {name} is {theirs}, the network's is {ours}"
                    )

    def teach(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch with the models' maps mixed into its `heatmaps` and `masks`."""
        images = batch["image"].float().cpu().numpy()
        maps = np.mean([model.run(images).maps for model in self.models], axis=0)
        means = torch.from_numpy(maps).to(batch["image"].device)
        count = batch["heatmaps"].shape[1]
        targets = {"heatmaps": means[:, :count], "masks": means[:, count:]}
        mixed = {k: torch.lerp(batch[k], v, self.share) for k, v in targets.items() if k in batch}
        return batch | mixed


def load_ensemble(
    files: Sequence[Path], recipe: Recipe, masks: int, device: torch.device
) -> Ensemble | None:
    """The ensemble of these files, or None without files; arguments as in `Ensemble`.

    Raises:
        ValueError: a file cannot be used, or only one of files and `teacher_share` is given.
    """
    if bool(files) != bool(recipe.teacher_share):
        raise ValueError(
            "--teachers and a --teacher_share above 0 must be given together: add or drop one"
        )
    return Ensemble(files, recipe, masks, device) if files else None
