"""TransUNet: residual encoder, Vision Transformer bottleneck, U-Net up path to the heatmaps.

The paper's network with one correction: the up path stops at the heatmap's resolution, where the
published code climbs to stride 2 and shrinks back.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from model.network.blocks import HeatmapHead, Raw, UpStep, ViewHead
from model.network.resnet import RESNET50_WIDTHS, CompactEncoder, ResNet50
from model.network.vit import ViTBottleneck


class TransUNetConfig(BaseModel):
    """Sizes of a TransUNet; the defaults are the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["transunet"] = "transunet"
    input_size: int = Field(512, description="side of the square input, px; a multiple of 32")
    channels: Literal[1, 3] = Field(3, description="input channels; ImageNet weights want 3")
    encoder: Literal["resnet50", "compact"] = Field("resnet50", description="the encoder's kind")
    encoder_widths: tuple[int, ...] = Field(
        RESNET50_WIDTHS, description="channels at strides 2, 4, 8, 16, 32 (compact encoder)"
    )
    encoder_blocks: int = Field(1, description="residual blocks a stride (compact encoder)")
    vit_width: int = Field(192, description="the bottleneck's width")
    vit_depth: int = Field(12, description="its blocks")
    vit_heads: int = Field(12, description="its attention heads")
    vit_positions: Literal["sincos", "relative"] = Field(
        "sincos", description="sincos: fixed codes; relative: learned tables, as USFM's ViT has"
    )
    up_widths: tuple[int, ...] = Field(
        (1024, 512),
        description="channels of the up path from stride 16 on; its length sets the stride",
    )
    softmax_sigma_cells: float | None = Field(
        None, description="None: plain heatmaps; a number: softmax heatmaps of that target sigma"
    )
    view_channels: int = Field(
        0, description="width of the view head, which calibrate adds; 0: none"
    )
    second: "TransUNetConfig | None" = Field(
        None, description="another network on the same image, whose masks take the place of its own"
    )

    @property
    def stride(self) -> int:
        """Input px per heatmap cell."""
        return int(2 ** (len(self.encoder_widths) - len(self.up_widths)))


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
        self.up = nn.ModuleList(
            UpStep(*step) for step in zip(inputs, skips, config.up_widths, strict=False)
        )
        self.head = HeatmapHead(inputs[-1], masks, config.softmax_sigma_cells)
        seen = widths[-1] + config.vit_width
        self.view = ViewHead(seen, side, config.view_channels) if config.view_channels else None
        self.second = _second(config, masks)

    def forward(self, x: Tensor) -> Tensor | Raw | tuple[Tensor, Tensor]:
        """(n, channels, s, s) -> (n, 3 + masks, s / stride, s / stride); in training mode `Raw`.

        With a view head, in evaluation mode: these and (n,) view scores. With a second network the
        masks are its own; `Raw` then holds both networks' masks, first this one's.
        """
        features, tokens, y = self._climbed(x)
        maps = self.head(y) if self.second is None else self._joined(y, x, self.second)
        if self.view is None or self.training:
            return maps
        assert isinstance(maps, Tensor)
        return maps, self.view(torch.cat([features[-1], tokens], dim=1))

    def _joined(self, y: Tensor, x: Tensor, second: "TransUNet") -> Tensor | Raw:
        """Own heatmaps and the second network's masks; in training mode both networks' masks."""
        other = second._climbed(x)[-1]
        if self.training:
            own, raw = self.head(y), second.head(other)
            return Raw(own.heatmaps, torch.cat([own.masks, raw.masks], dim=1))
        return torch.cat([self.head.heights(y), second.head.shares(other)], dim=1)

    def _climbed(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """The encoder's features, the bottleneck's, and those at the heatmaps' stride."""
        features, tokens = self._encoded(x)
        y = tokens
        for step, skip in zip(self.up, features[-2::-1], strict=False):
            y = step(y, skip)
        return features, tokens, y

    def view_features(self, x: Tensor) -> Tensor:
        """(n, channels, s, s) -> (n, seen, side, side): what the view head judges by."""
        features, tokens = self._encoded(x)
        return torch.cat([features[-1], tokens], dim=1)

    def _encoded(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The encoder's features at every stride, and the bottleneck's."""
        features = self.encoder(x)
        return features, self.bottleneck(self.project(features[-1]))


def _second(config: TransUNetConfig, masks: int) -> TransUNet | None:
    if config.second is None:
        return None
    grids = [(one.input_size, one.stride, one.channels) for one in (config, config.second)]
    if grids[0] != grids[1] or not masks or config.second.view_channels or config.second.second:
        raise ValueError(
            "a second network gives masks on the first one's grid: it needs masks, the first one's "
            f"input_size, stride and channels {grids[0]}, got {grids[1]}, and no parts beside it"
        )
    return TransUNet(config.second, masks)
