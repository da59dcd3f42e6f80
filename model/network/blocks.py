"""Pieces that the networks share: convolutions, residual block, up step and the two heads."""

from __future__ import annotations

import math
from dataclasses import field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from model.anatomy import LANDMARKS

Default = TypeVar("Default")


def setting(default: Default, description: str) -> Default:
    """A field of a network's configuration; the description is the help text of its flag."""
    return field(default=default, metadata={"description": description})


class ConvNormAct(nn.Sequential):
    """Convolution, batch norm, ReLU; the padding keeps the size at stride 1."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, Fig. 2), for the compact encoder."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvNormAct(inputs, outputs, stride=stride),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, outputs, h / stride, w / stride)."""
        return torch.relu(self.body(x) + self.shortcut(x))


class UpStep(nn.Module):
    """One U-Net step up: transposed convolution by 2, concatenated skip, two ConvNormAct."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(inputs, outputs, 2, 2)
        self.join = nn.Sequential(
            ConvNormAct(outputs + skip, outputs), ConvNormAct(outputs, outputs)
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(n, inputs, h, w), (n, skip, 2h, 2w) -> (n, outputs, 2h, 2w)."""
        return self.join(torch.cat([self.up(x), skip], dim=1))


class RawMaps(NamedTuple):
    """A network's output in training mode, for the losses."""

    heatmaps: Tensor  # (n, 3, h, w), before the softmax if there is one
    masks: Tensor | None  # (n, masks, h, w) logits of the auxiliary masks


class HeatmapHead(nn.Module):
    """1x1 convolution to the landmarks' heatmaps, and another one to masks if there are any.

    With `softmax_sigma_cells` None the heatmaps are the convolution's own output, as in the paper.
    With a number each heatmap is a softmax over its cells, scaled so that a Gaussian of that sigma
    has height 1. Its mass is then fixed: a network in doubt spreads it, which lowers the peak.
    """

    def __init__(self, inputs: int, masks: int, softmax_sigma_cells: float | None) -> None:
        super().__init__()
        self.heatmaps = nn.Conv2d(inputs, len(LANDMARKS), 1)
        self.masks = nn.Conv2d(inputs, masks, 1) if masks else None
        self.mass = None if softmax_sigma_cells is None else 2 * math.pi * softmax_sigma_cells**2

    def forward(self, x: Tensor) -> Tensor | RawMaps:
        """(n, inputs, h, w) -> (n, 3 + masks, h, w): heatmaps, then mask shares 0..1.

        In training mode: `RawMaps`.
        """
        heatmaps: Tensor = self.heatmaps(x)
        masks = None if self.masks is None else self.masks(x)
        if self.training:
            return RawMaps(heatmaps, masks)
        if self.mass is not None:
            heatmaps = heatmaps.float().flatten(2).softmax(-1).view_as(heatmaps) * self.mass
        return heatmaps if masks is None else torch.cat([heatmaps, torch.sigmoid(masks)], dim=1)


class ViewHead(nn.Module):
    """Scores how much a whole image looks like the view that the landmarks are defined in.

    Its layers keep the places of the map apart, because a mirrored image differs from a right one
    only in where things lie.
    """

    def __init__(self, inputs: int, side: int, channels: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(inputs, channels, 1)
        self.judge = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * side * side, 64),
            nn.GELU(),
            nn.Dropout(0.5),
            nn.Linear(64, 1),
            nn.Flatten(0),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, side, side) -> (n,) scores 0..1; in training mode their logits."""
        logits = self.judge(nn.functional.gelu(self.narrow(x)))
        return logits if self.training else logits.sigmoid()
