"""Weights on disk: STEM.safetensors, and STEM.json to rebuild the network; loaded strictly.

The JSON holds the network's configuration, the number of auxiliary masks and the ModelSpec.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.network import NetworkConfig, build_network
from model.spec import ModelSpec


class CheckpointError(ValueError):
    """Weights that cannot be used, with what did not fit."""


class Checkpoint(BaseModel):
    """The JSON beside the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: NetworkConfig = Field(discriminator="kind")
    masks: int
    spec: ModelSpec


def save_weights(path: Path, state: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Write `path` (.safetensors) and the JSON beside it, each whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)
    write_text(path.with_suffix(".json"), checkpoint.model_dump_json(indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def load_weights(path: Path) -> tuple[nn.Module, Checkpoint]:
    """The network of a .safetensors file in evaluation mode, and its description.

    Raises:
        CheckpointError: a file missing or unreadable, or tensors that do not fit the description.
    """
    try:
        described = Checkpoint.model_validate(json.loads(path.with_suffix(".json").read_text()))
        tensors = load_file(path)
    except (OSError, json.JSONDecodeError, ValidationError, SafetensorError) as error:
        raise CheckpointError(
            f"expected weights {path.name} and {path.with_suffix('.json').name} as training.fit "
            f"writes them in {path.parent}: {error}"
        ) from error
    network = build_network(described.network, described.masks)
    load_strictly(network, tensors, path.name)
    return network.eval(), described


def load_strictly(network: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Load every tensor into the network, or name what does not fit and change nothing."""
    own = network.state_dict()
    faults = [f"missing {key}" for key in own.keys() - tensors.keys()]
    faults += [f"unexpected {key}" for key in tensors.keys() - own.keys()]
    faults += [
        f"{key} is {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own.keys() & tensors.keys()
        if own[key].shape != tensors[key].shape
    ]
    if faults:
        shown = "; ".join(sorted(faults)[:8])
        raise CheckpointError(f"{name} does not fit the network in {len(faults)} tensors: {shown}")
    with torch.no_grad():
        network.load_state_dict(dict(tensors))
