"""The networks, and the typed configurations that choose and size them.

A configuration is a plain frozen dataclass. If it comes from a file or a command line, pydantic
validates it by its types.
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
        masks: number of auxiliary masks; their channels follow the heatmaps.
    """
    if isinstance(config, UNetConfig):
        return UNet(config, masks)
    return TransUNet(config, masks)


def without_view_head(config: NetworkConfig) -> NetworkConfig:
    """The same configuration, but without a view head; a U-Net's stays as it is."""
    return config if isinstance(config, UNetConfig) else replace(config, view_channels=0)
