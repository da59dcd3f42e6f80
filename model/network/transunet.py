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

from model.network.blocks import ConvNormAct, HeatmapHead, RawMaps, UpStep, ViewHead, setting
from model.network.resnet import RESNET50_WIDTHS, CompactEncoder, ResNet50
from model.network.vit import ViTBottleneck

# pydantic reads this when it validates a configuration: an unknown field is an error
STRICT = {"extra": "forbid"}


@dataclass(frozen=True)
class TransUNetConfig:
    """Sizes of a TransUNet; the defaults are the paper's."""

    __pydantic_config__: ClassVar = STRICT

    kind: Literal["transunet"] = "transunet"
    input_size: int = setting(512, "side of the square network input, px; a multiple of 32")
    channels: Literal[1, 3] = setting(3, "number of input channels; ImageNet weights need 3")
    encoder: Literal["resnet50", "compact"] = setting("resnet50", "kind of encoder")
    encoder_widths: tuple[int, ...] = setting(
        RESNET50_WIDTHS, "channels at strides 2, 4, 8, 16, 32 (only a compact encoder's can change)"
    )
    encoder_blocks: int = setting(1, "residual blocks per stride (compact encoder only)")
    vit_width: int = setting(192, "channels of the ViT bottleneck")
    vit_depth: int = setting(12, "blocks of the ViT bottleneck")
    vit_heads: int = setting(12, "attention heads of the ViT bottleneck")
    vit_positions: Literal["sincos", "relative"] = setting(
        "sincos", "positions in the bottleneck: fixed sin-cos codes, or learned tables as in USFM"
    )
    up_widths: tuple[int, ...] = setting(
        (1024, 512),
        "channels of the up path, from stride 16 on; their number sets the map's stride",
    )
    softmax_sigma_cells: float | None = setting(
        None, "target sigma of softmax heatmaps, cells; None: plain heatmaps"
    )
    view_channels: int = setting(
        0, "channels of the view head, which training.calibrate adds; 0: none"
    )
    members: tuple[TransUNetConfig, ...] = setting(
        (), "further networks on the same image; the maps of all are averaged"
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
    input_size: int = setting(512, "side of the square network input, px")
    channels: Literal[1, 3] = setting(3, "number of input channels")
    widths: tuple[int, ...] = setting((64, 128, 256, 512, 1024), "channels per level")
    stride: int = setting(8, "input px per heatmap cell; the map is averaged down")
    softmax_sigma_cells: float | None = setting(
        None, "target sigma of softmax heatmaps, cells; None: plain heatmaps"
    )


class TransUNet(nn.Module):
    """Encoder, ViT bottleneck and U-Net up path, of the kinds and sizes in `TransUNetConfig`.

    `view` is the view head and `members` are further networks; both are keys of the weights.
    """

    def __init__(self, config: TransUNetConfig, masks: int = 0) -> None:
        super().__init__()
        widths = config.encoder_widths
        if config.encoder == "resnet50":
            if widths != RESNET50_WIDTHS:
                raise ValueError(f"expected encoder_widths {RESNET50_WIDTHS}, got {widths}")
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
        judged = widths[-1] + config.vit_width  # channels that the view head takes
        self.view = ViewHead(judged, side, config.view_channels) if config.view_channels else None
        self.members = nn.ModuleList(_build_member(one, config, masks) for one in config.members)

    def forward(self, x: Tensor) -> Tensor | RawMaps | tuple[Tensor, Tensor]:
        """(n, channels, s, s) -> (n, 3 + masks, s / stride, s / stride) maps.

        With a view head: these and (n,) view scores 0..1. In training mode: `RawMaps` without view
        scores. With members they hold every network's maps one after the other, its own first.
        """
        features, tokens = self._features_and_tokens(x)
        y = tokens
        for step, skip in zip(self.up, features[-2::-1]):
            y = step(y, skip)
        maps = self.head(y)
        if self.members:
            all_maps = [maps, *(member(x) for member in self.members)]
            maps = _concatenate(all_maps) if self.training else torch.stack(all_maps).mean(0)
        if self.view is None or self.training:
            return maps
        return maps, self.view(torch.cat([features[-1], tokens], dim=1))

    def view_features(self, x: Tensor) -> Tensor:
        """(n, channels, s, s) -> (n, channels of the head's input, side, side): its input."""
        features, tokens = self._features_and_tokens(x)
        return torch.cat([features[-1], tokens], dim=1)

    def _features_and_tokens(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The encoder's features at every stride, and the bottleneck's output."""
        features = self.encoder(x)
        return features, self.bottleneck(self.project(features[-1]))


def _build_member(config: TransUNetConfig, first: TransUNetConfig, masks: int) -> TransUNet:
    if config.view_channels or config.members:
        raise ValueError("expected members without a view head and without members of their own")
    for name in ("input_size", "stride", "channels", "softmax_sigma_cells"):
        values = getattr(first, name), getattr(config, name)
        if values[0] != values[1]:
            raise ValueError(
                f"expected members with the same {name}, got {values}: their maps differ"
            )
    return TransUNet(config, masks)


def _concatenate(raw: Sequence[RawMaps]) -> RawMaps:
    """Several networks' maps, one after the other in the channels."""
    masks = [one.masks for one in raw if one.masks is not None]
    return RawMaps(
        torch.cat([one.heatmaps for one in raw], 1), torch.cat(masks, 1) if masks else None
    )


class UNet(nn.Module):
    """The challenge's baseline, after Ronneberger et al. 2015.

    Four levels down, four up, and the full-resolution map is averaged down to the heatmap grid.
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

    def forward(self, x: Tensor) -> Tensor | RawMaps:
        """(n, channels, s, s) -> (n, 3 + masks, s / stride, s / stride); in training: `RawMaps`."""
        features = []
        for k, level in enumerate(self.down):
            x = level(self.shrink(x) if k else x)
            features.append(x)
        for step, skip in zip(self.up, features[-2::-1]):
            x = step(x, skip)
        return self.head(self.pool(x))
