"""The heatmap U-Net that the challenge gave as its baseline (Ronneberger et al. 2015)."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from model.network.blocks import ConvNormAct, HeatmapHead, Raw, UpStep


class UNetConfig(BaseModel):
    """Sizes of the baseline; the defaults are the challenge's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["unet"] = "unet"
    input_size: int = Field(512, description="side of the square input, px")
    channels: Literal[1, 3] = Field(3, description="input channels")
    widths: tuple[int, ...] = Field((64, 128, 256, 512, 1024), description="channels a level")
    stride: int = Field(8, description="input px per heatmap cell, averaged")
    softmax_sigma_cells: float | None = Field(None, description="as in TransUNetConfig")


class UNet(nn.Module):
    """Four levels down, four up, and the full-resolution map averaged down to the heatmap grid."""

    def __init__(self, config: UNetConfig, masks: int = 0) -> None:
        super().__init__()
        widths = config.widths
        self.down = nn.ModuleList()
        for inputs, outputs in zip((config.channels, *widths), widths, strict=False):
            self.down.append(
                nn.Sequential(ConvNormAct(inputs, outputs), ConvNormAct(outputs, outputs))
            )
        self.shrink = nn.MaxPool2d(2)
        self.up = nn.ModuleList(
            UpStep(below, skip, skip)
            for below, skip in zip(widths[::-1], widths[-2::-1], strict=False)
        )
        self.pool = nn.AvgPool2d(config.stride)
        self.head = HeatmapHead(widths[0], masks, config.softmax_sigma_cells)

    def forward(self, x: Tensor) -> Tensor | Raw:
        """(n, channels, s, s) -> (n, 3 + masks, s / stride, s / stride); in training mode `Raw`."""
        features = []
        for k, level in enumerate(self.down):
            x = level(self.shrink(x) if k else x)
            features.append(x)
        for step, skip in zip(self.up, features[-2::-1], strict=False):
            x = step(x, skip)
        return self.head(self.pool(x))
