"""The torch modules and the typed configuration that chooses and sizes them."""

from typing import Annotated

from pydantic import Field
from torch import nn

from model.network.transunet import TransUNet, TransUNetConfig
from model.network.unet import UNet, UNetConfig

NetworkConfig = Annotated[TransUNetConfig | UNetConfig, Field(discriminator="kind")]

__all__ = ["NetworkConfig", "TransUNet", "TransUNetConfig", "UNet", "UNetConfig", "build_network"]


def build_network(config: TransUNetConfig | UNetConfig, masks: int = 0) -> nn.Module:
    """A network with random weights; `masks`: output channels after the heatmaps."""
    if isinstance(config, UNetConfig):
        return UNet(config, masks)
    return TransUNet(config, masks)
