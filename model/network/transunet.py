"""The paper's TransUNet, and the heatmap U-Net that the challenge gave as its baseline.

TransUNet: residual encoder, Vision Transformer bottleneck, U-Net up path to the heatmaps. It is the
paper's network with one correction: the up path stops at the heatmap's resolution, where the
published code climbs to stride 2 and shrinks back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from model.network.blocks import ConvNormAct, HeatmapHead, Raw, UpStep, ViewHead, setting
from model.network.resnet import RESNET50_WIDTHS, CompactEncoder, ResNet50
from model.network.vit import ViTBottleneck

# what pydantic reads where it validates a configuration: a field that is not known is an error
STRICT = {"extra": "forbid"}


@dataclass(frozen=True)
class TransUNetConfig:
    """Sizes of a TransUNet; the defaults are the paper's."""

    __pydantic_config__: ClassVar = STRICT

    kind: Literal["transunet"] = "transunet"
    input_size: int = setting(512, "side of the square input, px; a multiple of 32")
    channels: Literal[1, 3] = setting(3, "input channels; ImageNet weights want 3")
    encoder: Literal["resnet50", "compact"] = setting("resnet50", "the encoder's kind")
    encoder_widths: tuple[int, ...] = setting(
        RESNET50_WIDTHS, "channels at strides 2, 4, 8, 16, 32 (compact encoder)"
    )
    encoder_blocks: int = setting(1, "residual blocks a stride (compact encoder)")
    vit_width: int = setting(192, "the bottleneck's width")
    vit_depth: int = setting(12, "its blocks")
    vit_heads: int = setting(12, "its attention heads")
    vit_positions: Literal["sincos", "relative"] = setting(
        "sincos", "sincos: fixed codes; relative: learned tables, as USFM's ViT has"
    )
    up_widths: tuple[int, ...] = setting(
        (1024, 512), "channels of the up path from stride 16 on; its length sets the stride"
    )
    softmax_sigma_cells: float | None = setting(
        None, "None: plain heatmaps; a number: softmax heatmaps of that target sigma"
    )
    view_channels: int = setting(0, "width of the view head, which calibrate adds; 0: none")
    members: tuple[TransUNetConfig, ...] = setting(
        (), "further networks on the same image; the maps are the mean of all"
    )

    @property
    def stride(self) -> int:
        """Input px per heatmap cell."""
        return int(2 ** (len(self.encoder_widths) - len(self.up_widths)))


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the baseline; the defaults are the challenge's."""

    __pydantic_config__: ClassVar = STRICT

    kind: Literal["unet"] = "unet"
    input_size: int = setting(512, "side of the square input, px")
    channels: Literal[1, 3] = setting(3, "input channels")
    widths: tuple[int, ...] = setting((64, 128, 256, 512, 1024), "channels a level")
    stride: int = setting(8, "input px per heatmap cell, averaged")
    softmax_sigma_cells: float | None = setting(None, "as in TransUNetConfig")


class TransUNet(nn.Module):
    """One class for every size: `TransUNetConfig` chooses encoder, bottleneck and up path."""

    def __init__(self, config: TransUNetConfig, masks: int = 0) -> None:
        super().__init__()
        widths = config.encoder_widths
        if config.encoder == "resnet50":
            if widths != RESNET50_WIDTHS:
                raise ValueError(f"resnet50 has widths {RESNET50_WIDTHS}, got {widths}")
            self.encoder: nn.Module = ResNet50(config.channels)
        else:
            self.encoder = CompactEncoder(config.channels, widths, config.encoder_blocks)
        side = config.input_size // 2 ** len(widths)
        self.project = nn.Conv2d(widths[-1], config.vit_width, 1)
        self.bottleneck = ViTBottleneck(
            side,
            side,
            config.vit_width,
            config.vit_depth,
            config.vit_heads,
            config.vit_positions,
        )
        inputs = (config.vit_width, *config.up_widths)
        skips = widths[-2::-1]
        self.up = nn.ModuleList(UpStep(*step) for step in zip(inputs, skips, config.up_widths))
        self.head = HeatmapHead(inputs[-1], masks, config.softmax_sigma_cells)
        seen = widths[-1] + config.vit_width
        self.view = ViewHead(seen, side, config.view_channels) if config.view_channels else None
        self.members = nn.ModuleList(_member(one, config, masks) for one in config.members)

    def forward(self, x: Tensor) -> Tensor | Raw | tuple[Tensor, Tensor]:
        """(n, channels, s, s) -> (n, 3 + masks, s / stride, s / stride); in training mode `Raw`.

        With a view head, in evaluation mode: these and (n,) view scores. With members, in training
        mode: each network's maps after the other's, its own first.
        """
        features, tokens = self._encoded(x)
        y = tokens
        for step, skip in zip(self.up, features[-2::-1]):
            y = step(y, skip)
        maps = self.head(y)
        if self.members:
            every = [maps, *(member(x) for member in self.members)]
            maps = _in_a_row(every) if self.training else torch.stack(every).mean(0)
        if self.view is None or self.training:
            return maps
        return maps, self.view(torch.cat([features[-1], tokens], dim=1))

    def view_features(self, x: Tensor) -> Tensor:
        """(n, channels, s, s) -> (n, seen, side, side): what the view head judges by."""
        features, tokens = self._encoded(x)
        return torch.cat([features[-1], tokens], dim=1)

    def _encoded(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The encoder's features at every stride, and the bottleneck's."""
        features = self.encoder(x)
        return features, self.bottleneck(self.project(features[-1]))


def _member(config: TransUNetConfig, first: TransUNetConfig, masks: int) -> TransUNet:
    if config.view_channels or config.members:
        raise ValueError("a member is a plain network: it has no view head and no members")
    for name in ("input_size", "stride", "channels", "softmax_sigma_cells"):
        values = getattr(first, name), getattr(config, name)
        if values[0] != values[1]:
            raise ValueError(f"maps of different kinds have no mean: {name} is {values}")
    return TransUNet(config, masks)


def _in_a_row(raw: Sequence[Raw]) -> Raw:
    """Several networks' maps, one after the other."""
    masks = [one.masks for one in raw if one.masks is not None]
    return Raw(torch.cat([one.heatmaps for one in raw], 1), torch.cat(masks, 1) if masks else None)


class UNet(nn.Module):
    """Four levels down, four up, and the full-resolution map averaged down to the heatmap grid.

    The challenge's baseline (after Ronneberger et al. 2015).
    """

    def __init__(self, config: UNetConfig, masks: int = 0) -> None:
        super().__init__()
        widths = config.widths
        self.down = nn.ModuleList()
        for inputs, outputs in zip((config.channels, *widths), widths):
            self.down.append(
                nn.Sequential(ConvNormAct(inputs, outputs), ConvNormAct(outputs, outputs))
            )
        self.shrink = nn.MaxPool2d(2)
        self.up = nn.ModuleList(
            UpStep(below, skip, skip) for below, skip in zip(widths[::-1], widths[-2::-1])
        )
        self.pool = nn.AvgPool2d(config.stride)
        self.head = HeatmapHead(widths[0], masks, config.softmax_sigma_cells)

    def forward(self, x: Tensor) -> Tensor | Raw:
        """(n, channels, s, s) -> (n, 3 + masks, s / stride, s / stride); in training mode `Raw`."""
        features = []
        for k, level in enumerate(self.down):
            x = level(self.shrink(x) if k else x)
            features.append(x)
        for step, skip in zip(self.up, features[-2::-1]):
            x = step(x, skip)
        return self.head(self.pool(x))
