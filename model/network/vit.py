"""The Vision Transformer of the bottleneck: pre-norm blocks and fixed 2-D sin-cos positions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """(rows * columns, width) fixed 2-D sine-cosine position embedding (He et al. 2022, MAE).

    The first half of the width encodes the column, the second the row; each: sines, then cosines.

    Raises:
        ValueError: a width that four does not divide.
    """
    if width % 4:
        raise ValueError(f"the width must be a multiple of 4, got {width}")
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    parts = []
    for position in (column, row):
        angles = position.reshape(-1, 1) * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width) -> the same shape."""
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).reshape(n, tokens, width))


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width) -> the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViTBottleneck(nn.Module):
    """A feature map as tokens through `depth` blocks and back; positions fit the map's size."""

    def __init__(self, rows: int, columns: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        positions = sincos_positions(rows, columns, width)
        self.position_embedding = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, rows, columns) -> the same shape."""
        n, width, rows, columns = x.shape
        tokens = x.flatten(2).transpose(1, 2) + self.position_embedding
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens).transpose(1, 2).reshape(n, width, rows, columns)
