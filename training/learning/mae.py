"""Masked autoencoder on a small ViT (He et al. 2022): network, loss and weights.

An image is (n, 1, size, size), grey 0..1. `kept`, (n, k), holds the numbers of the patches that the
encoder sees, in any order; patches are counted row by row from 0.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from model.network.vit import Block, sincos_positions
from training.learning.checkpoint import load_strictly, read_described
from training.recipes import PretrainRecipe

GREY_MEAN, GREY_STD = 30 / 255, 46.4 / 255  # of ultrasound images, to scale the encoder's input
MAE_FILE = "mae.safetensors"  # the weights in the folder of a pretraining run


class Features(NamedTuple):
    """An encoder's output."""

    tokens: Tensor  # (n, tokens, width) after the final norm
    attention: Tensor | None  # (n, heads, tokens, tokens) of the last block


class Encoder(nn.Module):
    """Encodes patches to features; its blocks and norm are built like the bottleneck's."""

    def __init__(self, config: PretrainRecipe) -> None:
        super().__init__()
        width, grid = config.width, config.grid
        self.patch_embed = nn.Conv2d(1, width, config.patch, config.patch)
        positions = sincos_positions(grid, grid, width)
        self.position_embedding = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(
        self, image: Tensor, kept: Tensor | None = None, attention: bool = False
    ) -> Features:
        """Features of all patches, or of those kept, with attention maps on request."""
        tokens = self.patch_embed((image - GREY_MEAN) / GREY_STD).flatten(2).transpose(1, 2)
        tokens = tokens + self.position_embedding
        if kept is not None:
            tokens = take_tokens(tokens, kept)
        maps = None
        for k, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if attention and k + 1 == len(self.blocks):
                maps = block.attn.maps(block.norm1(tokens))
            tokens = block(tokens)
        return Features(self.norm(tokens), maps)


class Decoder(nn.Module):
    """Decodes features of the kept patches to the grey values of all patches."""

    def __init__(self, config: PretrainRecipe) -> None:
        super().__init__()
        width, grid = config.decoder_width, config.grid
        self.embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        positions = sincos_positions(grid, grid, width)
        self.position_embedding = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(width, config.decoder_heads) for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, config.patch**2)

    def forward(self, features: Tensor, kept: Tensor) -> Tensor:
        """(n, kept tokens, encoder's width) -> (n, tokens, patch * patch)."""
        visible = self.embed(features)
        shape = (len(visible), self.position_embedding.shape[1], visible.shape[2])
        index = kept[..., None].expand_as(visible)
        tokens = self.mask_token.to(visible.dtype).expand(shape).scatter(1, index, visible)
        tokens = tokens + self.position_embedding
        for block in self.blocks:
            tokens = block(tokens)
        patches: Tensor = self.predict(self.norm(tokens))
        return patches


class MaskedAutoencoder(nn.Module):
    """An encoder and a decoder of one configuration."""

    def __init__(self, config: PretrainRecipe) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor, kept: Tensor) -> Tensor:
        """(n, tokens, patch * patch): every patch, normalised as in `mae_loss`."""
        patches: Tensor = self.decoder(self.encoder(image, kept).tokens, kept)
        return patches


def take_tokens(tokens: Tensor, kept: Tensor) -> Tensor:
    """The kept tokens: (n, tokens, width), (n, k) -> (n, k, width)."""
    return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))


def patchify(image: Tensor, patch: int) -> Tensor:
    """(n, 1, rows * patch, columns * patch) -> (n, rows * columns, patch * patch)."""
    return F.unfold(image, patch, stride=patch).transpose(1, 2)


def unpatchify(patches: Tensor, rows: int) -> Tensor:
    """The inverse of `patchify` for an image with this number of rows of patches."""
    patch, columns = round(patches.shape[2] ** 0.5), patches.shape[1] // rows
    size = (rows * patch, columns * patch)
    return F.fold(patches.transpose(1, 2), size, patch, stride=patch)


def patch_statistics(patches: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Each patch's mean and standard deviation, (n, tokens, 1); unbiased, as in MAE.

    Args:
        floor: added to the variance.
    """
    variance = patches.var(dim=-1, keepdim=True)
    return patches.mean(dim=-1, keepdim=True), (variance + floor).sqrt()


def mae_loss(prediction: Tensor, image: Tensor, kept: Tensor, floor: float) -> Tensor:
    """Mean squared error on the masked patches, each normalised by its mean and deviation.

    A prediction of zeros stands for each patch's mean. It scores 1, or less if patches are flat.
    """
    patches = patchify(image, round(prediction.shape[2] ** 0.5))
    mean, deviation = patch_statistics(patches, floor)
    errors = ((prediction.float() - (patches - mean) / deviation) ** 2).mean(dim=-1)
    masked = torch.ones_like(errors).scatter(1, kept, 0.0)
    return (errors * masked).sum() / masked.sum()


def resize_positions(embedding: Tensor, rows: int, columns: int) -> Tensor:
    """Resample a square grid's (1, g * g, width) position embedding to another grid, bicubically.

    Both grids cover the same frame edge to edge, so a position keeps its place in the image, and
    the blocks meet no position beyond those of pretraining. At equal size nothing changes.
    """
    side = round(embedding.shape[1] ** 0.5)
    if (rows, columns) == (side, side):
        return embedding
    planes = embedding.transpose(1, 2).reshape(1, -1, side, side)
    planes = F.interpolate(planes, (rows, columns), mode="bicubic", align_corners=False)
    return planes.flatten(2).transpose(1, 2)


class MaeDescription(BaseModel):
    """The description of a pretraining run beside its weights, as JSON.

    val_explained: share of the variance within masked val patches that the network predicts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: PretrainRecipe
    epoch: int
    val_explained: float


def load_mae(path: Path) -> tuple[MaskedAutoencoder, MaeDescription]:
    """The autoencoder of a pretraining run, in evaluation mode, and its description.

    Args:
        path: the run's folder, or the .safetensors file in it.

    Raises:
        CheckpointError: a file is missing or unreadable, or the tensors do not fit the description.
    """
    path = path / MAE_FILE if path.is_dir() else path
    described, tensors = read_described(path, MaeDescription, "training.pretrain")
    mae = MaskedAutoencoder(described.recipe)
    load_strictly(mae, tensors, path.name)
    return mae.eval(), described
