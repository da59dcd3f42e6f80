"""Weights on disk: our own files, loaded strictly, and files made elsewhere, with an account.

Our own are STEM.safetensors, and STEM.json to rebuild the network: it holds the network's
configuration, the number of auxiliary masks and the ModelSpec.
"""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.network import NetworkConfig, build_network
from model.spec import ModelSpec

WRAPPERS = ("model", "state_dict", "module")  # keys under which others nest their tensors


class CheckpointError(ValueError):
    """Weights that cannot be used, with what did not fit."""


class Checkpoint(BaseModel):
    """The JSON beside the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: NetworkConfig = Field(discriminator="kind")
    masks: int
    spec: ModelSpec


def save_weights(path: Path, state: Mapping[str, Tensor], described: BaseModel) -> None:
    """Write `path` (.safetensors) and its description beside it, each whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)
    write_text(path.with_suffix(".json"), described.model_dump_json(indent=2) + "\n")


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


@dataclass
class LoadReport:
    """What became of every tensor of a file, by its key there."""

    file: str
    used: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        names = dict.fromkeys(re.sub(r"\d+", "*", key) for key in self.left_out)
        listed = f" ({', '.join(names)})" if names else ""
        counts = f"{len(self.used)} tensors used, {len(self.resized)} resized"
        return f"{self.file}: {counts}, {len(self.left_out)} left out{listed}"

    def compare(self, found: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Note as faults what is missing from a file, or of another shape than it must have."""
        self.faults += [f"missing {key}" for key in shapes if key not in found]
        self.faults += [
            f"{key} is {tuple(found[key].shape)}, expected {shape}"
            for key, shape in shapes.items()
            if key in found and tuple(found[key].shape) != shape
        ]

    def check(self, expected: str) -> None:
        """Raise CheckpointError with the list of what did not fit, where something did not."""
        if self.faults:
            shown = "; ".join(self.faults[:8]) + ("; ..." if len(self.faults) > 8 else "")
            raise CheckpointError(
                f"{self.file} does not fit in {len(self.faults)} tensors, expected {expected}: "
                f"{shown}"
            )


def read_tensors(path: Path, report: LoadReport) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file, floating ones as float32, wrappers taken off.

    What else lies in the file (an epoch, an optimiser) is noted as left out.

    Raises:
        CheckpointError: no such file, or more in it than torch reads without running its code.
    """
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"expected a file of weights: {error}") from error
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
    ) as error:
        raise CheckpointError(
            f"{path.name} is not a file of plain tensors: save its state dict alone, with "
            f"torch.save or safetensors ({(str(error).splitlines() or ['it is empty'])[0]})"
        ) from error
    while isinstance(found, Mapping) and (inner := [w for w in WRAPPERS if _wraps(found, w)]):
        report.left_out += [str(key) for key in found if key != inner[0]]
        found = found[inner[0]]
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path.name}: expected tensors by name, got {type(found).__name__}")
    report.left_out += [str(key) for key, value in found.items() if not torch.is_tensor(value)]
    return {
        str(key): value.float().contiguous() if value.is_floating_point() else value
        for key, value in found.items()
        if torch.is_tensor(value)
    }


def _wraps(found: Mapping[Any, Any], key: str) -> bool:
    return isinstance(found.get(key), Mapping)
