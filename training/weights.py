"""Weights made elsewhere: reading their files, and the account of what became of each tensor."""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from training.checkpoint import CheckpointError

WRAPPERS = ("model", "state_dict", "module")


@dataclass
class Report:
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


def read_tensors(path: Path, report: Report) -> dict[str, Tensor]:
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
            f"{path.name} is no file of plain tensors: save its state dict alone, with torch.save "
            f"or safetensors ({(str(error).splitlines() or ['it is empty'])[0]})"
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
