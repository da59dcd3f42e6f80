"""Masked autoencoder on a small ViT (He et al. 2022): network, loss and weights.

Images are (n, 1, size, size) grey values 0..1. `kept`, (n, k), holds the numbers of the patches
that the encoder sees, counted row by row from 0, in any order.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from model.network.vit import Block, sincos_positions
from training.learning.checkpoint import CheckpointError, load_strictly

GREY_MEAN, GREY_STD = 30 / 255, 46.4 / 255  # of ultrasound images; the encoder's input scale
FILE = "mae.safetensors"  # in a run's folder


class AutoencoderConfig(BaseModel):
    """Sizes of a masked autoencoder; the defaults are the paper's, and MAE's where it is silent."""

    model_config = ConfigDict(frozen=True)

    image_size: int = Field(224, description="side of a crop, px")
    patch: int = Field(16, description="side of a patch, px")
    width: int = Field(192, description="the encoder's width: the bottleneck's, to fit into it")
    depth: int = Field(12, description="blocks of the encoder: the bottleneck's, to fit into it")
    heads: int = Field(12, description="attention heads of the encoder, likewise")
    decoder_width: int = Field(96, description="the decoder's width")
    decoder_depth: int = Field(1, description="blocks of the decoder")
    decoder_heads: int = Field(3, description="attention heads of the decoder")

    @model_validator(mode="after")
    def _fits(self) -> "AutoencoderConfig":
        if self.image_size % self.patch:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch {self.patch}"
            )
        for part in ("", "decoder_"):
            width, heads = getattr(self, f"{part}width"), getattr(self, f"{part}heads")
            if width % heads or width % 4:
                raise ValueError(f"{part}width {width} is not a multiple of 4 and of {heads} heads")
        return self

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch


class Features(NamedTuple):
    """What an encoder makes of tokens."""

    tokens: Tensor  # (n, tokens, width) behind the final norm
    attention: Tensor | None  # (n, heads, tokens, tokens) of the last block


class Encoder(nn.Module):
    """Patches to features; its blocks and norm are those of the network's bottleneck."""

    def __init__(self, config: AutoencoderConfig) -> None:
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
        """Features of all patches, or of those kept; attention maps where asked for."""
        tokens = self.patch_embed((image - GREY_MEAN) / GREY_STD).flatten(2).transpose(1, 2)
        tokens = tokens + self.position_embedding
        if kept is not None:
            tokens = take(tokens, kept)
        maps = None
        for k, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if attention and k + 1 == len(self.blocks):
                maps = block.attn.maps(block.norm1(tokens))
            tokens = block(tokens)
        return Features(self.norm(tokens), maps)


class Decoder(nn.Module):
    """Features of the kept patches to the grey values of all."""

    def __init__(self, config: AutoencoderConfig) -> None:
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
        """(n, tokens kept, encoder's width) -> (n, tokens, patch * patch)."""
        seen = self.embed(features)
        shape = (len(seen), self.position_embedding.shape[1], seen.shape[2])
        index = kept[..., None].expand_as(seen)
        tokens = self.mask_token.to(seen.dtype).expand(shape).scatter(1, index, seen)
        tokens = tokens + self.position_embedding
        for block in self.blocks:
            tokens = block(tokens)
        found: Tensor = self.predict(self.norm(tokens))
        return found


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder of one configuration."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor, kept: Tensor) -> Tensor:
        """(n, tokens, patch * patch): every patch, in the scale that the loss compares."""
        found: Tensor = self.decoder(self.encoder(image, kept).tokens, kept)
        return found


def take(tokens: Tensor, kept: Tensor) -> Tensor:
    """(n, tokens, width), (n, k) -> (n, k, width)."""
    return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))


def patchify(image: Tensor, patch: int) -> Tensor:
    """(n, 1, rows * patch, columns * patch) -> (n, rows * columns, patch * patch)."""
    return F.unfold(image, patch, stride=patch).transpose(1, 2)


def unpatchify(patches: Tensor, rows: int) -> Tensor:
    """The inverse of `patchify` for so many rows of patches."""
    patch, columns = round(patches.shape[2] ** 0.5), patches.shape[1] // rows
    size = (rows * patch, columns * patch)
    return F.fold(patches.transpose(1, 2), size, patch, stride=patch)


def statistics(patches: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Each patch's mean and deviation, (n, tokens, 1); the variance is unbiased, as in MAE."""
    variance = patches.var(dim=-1, keepdim=True)
    return patches.mean(dim=-1, keepdim=True), (variance + floor).sqrt()


def mae_loss(prediction: Tensor, image: Tensor, kept: Tensor, floor: float) -> Tensor:
    """Mean squared error on the masked patches alone, each normalised by its mean and deviation.

    A prediction of zeros is each patch's mean: it scores 1, and less where patches are flat.
    """
    patches = patchify(image, round(prediction.shape[2] ** 0.5))
    mean, deviation = statistics(patches, floor)
    errors = ((prediction.float() - (patches - mean) / deviation) ** 2).mean(dim=-1)
    masked = torch.ones_like(errors).scatter(1, kept, 0.0)
    return (errors * masked).sum() / masked.sum()


def resize_positions(embedding: Tensor, rows: int, columns: int) -> Tensor:
    """A square grid's (1, g * g, width) position embedding on another grid, by bicubic resampling.

    The grids cover the same frame edge to edge, so that a position keeps its place in the image,
    and none is asked for that the blocks never saw in pretraining. At equal size it is unchanged.
    """
    side = round(embedding.shape[1] ** 0.5)
    if (rows, columns) == (side, side):
        return embedding
    planes = embedding.transpose(1, 2).reshape(1, -1, side, side)
    planes = F.interpolate(planes, (rows, columns), mode="bicubic", align_corners=False)
    return planes.flatten(2).transpose(1, 2)


class Pretrained(BaseModel):
    """The JSON beside a run's weights.

    `recipe` is written whole, as training.pretrain has it. Only the sizes are read back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: SerializeAsAny[AutoencoderConfig]
    epoch: int
    val_explained: float


def load_mae(path: Path) -> tuple[MaskedAutoencoder, Pretrained]:
    """The autoencoder of a run's folder, or of its .safetensors file, and its description.

    Raises:
        CheckpointError: a file missing or unreadable, or tensors that do not fit the description.
    """
    path = path / FILE if path.is_dir() else path
    try:
        described = Pretrained.model_validate(json.loads(path.with_suffix(".json").read_text()))
        tensors = load_file(path)
    except (OSError, json.JSONDecodeError, ValidationError, SafetensorError) as error:
        raise CheckpointError(
            f"expected {FILE} and its .json as training.pretrain writes them, got {path}: {error}"
        ) from error
    mae = MaskedAutoencoder(described.recipe)
    load_strictly(mae, tensors, path.name)
    return mae.eval(), described
