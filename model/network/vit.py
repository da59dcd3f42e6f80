"""The Vision Transformer of the bottleneck: pre-norm blocks and their positions.

Positions are fixed 2-D sin-cos codes, which are added to the tokens. Or, as in BEiT, they are a
learned bias for each offset between two cells, which is added to each block's attention scores.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """(rows * columns, width) fixed 2-D sine-cosine position embedding (He et al. 2022, MAE).

    The first half of the width encodes the column, the second the row; each half has sines, then
    cosines.

    Raises:
        ValueError: the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"expected a width that is a multiple of 4, got {width}")
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    parts = []
    for position in (column, row):
        angles = position.reshape(-1, 1) * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1)


def relative_index(rows: int, columns: int) -> Tensor:
    """(rows * columns, rows * columns) numbers of the offsets between any two cells.

    Offsets are numbered as in BEiT: by rows from -(rows - 1) on, then by columns. A table of biases
    has (2 rows - 1) * (2 columns - 1) of them.
    """
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    down = row.reshape(-1, 1) - row.reshape(1, -1) + rows - 1
    right = column.reshape(-1, 1) - column.reshape(1, -1) + columns - 1
    return down * (2 * columns - 1) + right


class Attention(nn.Module):
    """Multi-head self-attention; a `bias` (heads, tokens, tokens) is added to the scores."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(n, tokens, width) -> the same shape."""
        query, key, value = self._split_heads(x)
        mask = None if bias is None else bias.to(query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(attended.transpose(1, 2).reshape(x.shape))

    def maps(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(n, tokens, width) -> (n, heads, tokens, tokens) attention of each token to all."""
        query, key, _ = self._split_heads(x)
        scores = query.float() @ key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
        return (scores if bias is None else scores + bias).softmax(dim=-1)

    def _split_heads(self, x: Tensor) -> Tensor:
        """(n, tokens, width) -> (3, n, heads, tokens, width / heads): query, key and value."""
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        return qkv.permute(2, 0, 3, 1, 4)


class Block(nn.Module):
    """Attention and MLP, each with a layer norm before it and a shortcut beside it."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(n, tokens, width) -> the same shape; `bias` as in `Attention`."""
        x = x + self.attn(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class ViTBottleneck(nn.Module):
    """Runs a feature map as tokens through `depth` blocks; positions are for maps of one size."""

    index: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        width: int,
        depth: int,
        heads: int,
        positions: Literal["sincos", "relative"] = "sincos",
    ) -> None:
        super().__init__()
        self.rows, self.columns, self.relative = rows, columns, positions == "relative"
        if self.relative:
            offsets = (2 * rows - 1) * (2 * columns - 1)
            self.bias_tables = nn.Parameter(torch.zeros(depth, offsets, heads))
            self.register_buffer("index", relative_index(rows, columns), persistent=False)
        else:
            fixed = sincos_positions(rows, columns, width)
            self.position_embedding = nn.Parameter(fixed[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, rows, columns) -> the same shape."""
        n, width, rows, columns = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        if not self.relative:
            tokens = tokens + self.position_embedding
        for k, block in enumerate(self.blocks):
            bias = self.bias_tables[k][self.index].permute(2, 0, 1) if self.relative else None
            tokens = block(tokens, bias)
        return self.norm(tokens).transpose(1, 2).reshape(n, width, rows, columns)
