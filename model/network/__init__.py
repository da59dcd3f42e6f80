"""The networks, and the typed configurations that choose and size them.

A configuration is a plain frozen dataclass. Where it comes from a file or from a command line,
pydantic validates it by its types.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Union

from torch import nn

from model.network.transunet import TransUNet, TransUNetConfig, UNet, UNetConfig

NetworkConfig = Union[TransUNetConfig, UNetConfig]

__all__ = [
    "NetworkConfig", "TransUNet", "TransUNetConfig", "UNet", "UNetConfig", "build_network",
    "without_view_head",
]  # fmt: skip


def build_network(config: NetworkConfig, masks: int = 0) -> nn.Module:
    """A network with random weights.

    Args:
        masks: how many output channels follow the heatmaps.
    """
    if isinstance(config, UNetConfig):
        return UNet(config, masks)
    return TransUNet(config, masks)


def without_view_head(config: NetworkConfig) -> NetworkConfig:
    """The configuration of the same network without a view head; a U-Net never has one."""
    return config if isinstance(config, UNetConfig) else replace(config, view_channels=0)
