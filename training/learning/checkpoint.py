"""Files of weights: our own, the folds of a cross-validation, and those made elsewhere.

Our own weights are STEM.safetensors. STEM.json beside it rebuilds the network: it holds the
network's configuration, the number of auxiliary masks and the ModelSpec.
"""

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.network import NetworkConfig, build_network
from model.spec import ModelSpec
from training.data.case_table import Case, CaseError, read_cases

# In the table of a fold, the split of its held-out cases: training.fit never reads this split.
HELD_OUT_SPLIT = "test"
WRAPPERS = ("model", "state_dict", "module")  # keys under which other programs nest tensors


Description = TypeVar("Description", bound=BaseModel)


class CheckpointError(ValueError):
    """Weights cannot be used; the message says which file and what does not fit."""


class Checkpoint(BaseModel):
    """The description of a network beside its weights, as JSON.

    masks: number of auxiliary masks that the network gives.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: NetworkConfig = Field(discriminator="kind")
    masks: int
    spec: ModelSpec


def save_weights(path: Path, state: Mapping[str, Tensor], described: BaseModel) -> None:
    """Write weights to `path` (.safetensors) and the description beside it as JSON.

    Each file is written whole or not at all.
    """
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
    """The network of a .safetensors file, in evaluation mode, and its description.

    Raises:
        CheckpointError: a file is missing or unreadable, or the tensors do not fit the description.
    """
    described, tensors = read_described(path, Checkpoint, "training.fit")
    network = build_network(described.network, described.masks)
    load_strictly(network, tensors, path.name)
    return network.eval(), described


def read_described(
    path: Path, description: type[Description], command: str
) -> tuple[Description, dict[str, Tensor]]:
    """Read the description and the tensors of our own weights.

    Args:
        path: the .safetensors file; the description is the .json file beside it.
        description: pydantic model of the description.
        command: the command that writes such weights, for the error message.

    Raises:
        CheckpointError: a file is missing, unreadable or not of this kind.
    """
    beside = path.with_suffix(".json")
    expected = (
        f"expected weights {path.name} and {beside.name} in {path.parent}, as {command} writes them"
    )
    missing = [file.name for file in (path, beside) if not file.is_file()]
    if missing:
        raise CheckpointError(f"{expected}; missing: {' and '.join(missing)}")
    try:
        return description.model_validate(json.loads(beside.read_text())), load_file(path)
    except OSError as error:
        raise CheckpointError(f"{expected}; cannot be read: {error.strerror}") from error
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{expected}: {error}") from error


def load_strictly(network: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Load every tensor into the network.

    Raises:
        CheckpointError: names the tensors that do not fit; the network is unchanged.
    """
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
    """What became of each tensor of a file: lists of the file's keys, and sentences of faults."""

    file: str
    used: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        patterns = dict.fromkeys(re.sub(r"\d+", "*", key) for key in self.left_out)
        keys = f" ({', '.join(patterns)})" if patterns else ""
        counts = f"{len(self.used)} tensors used, {len(self.resized)} resized"
        return f"{self.file}: {counts}, {len(self.left_out)} left out{keys}"

    def compare_shapes(
        self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Note as faults the tensors that are missing or have another shape than expected."""
        self.faults += [f"missing {key}" for key in shapes if key not in tensors]
        self.faults += [
            f"{key} is {tuple(tensors[key].shape)}, expected {shape}"
            for key, shape in shapes.items()
            if key in tensors and tuple(tensors[key].shape) != shape
        ]

    def raise_faults(self, expected: str) -> None:
        """Raise CheckpointError with the list of faults, if there are any.

        Args:
            expected: what the file should hold, for the message.
        """
        if self.faults:
            shown = "; ".join(self.faults[:8]) + ("; ..." if len(self.faults) > 8 else "")
            raise CheckpointError(
                f"{self.file} does not fit in {len(self.faults)} tensors, expected {expected}: "
                f"{shown}"
            )


def read_tensors(path: Path, report: LoadReport) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file, without wrappers; floating ones as float32.

    The report lists what else the file holds, such as an epoch or an optimiser, as left out.

    Raises:
        CheckpointError: the file cannot be read, or torch would have to run code to read it.
    """
    if not path.is_file():
        raise CheckpointError(f"expected a file of weights, {path} is missing or not a file")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
    ) as error:
        raise CheckpointError(
            f"{path.name} is not a file of plain tensors: save only its state dict, with "
            f"torch.save or safetensors ({(str(error).splitlines() or ['it is empty'])[0]})"
        ) from error
    while isinstance(content, Mapping):
        wrappers = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not wrappers:
            break
        report.left_out += [str(key) for key in content if key != wrappers[0]]
        content = content[wrappers[0]]
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path.name}: expected tensors by name, got {type(content).__name__}"
        )
    report.left_out += [str(key) for key, value in content.items() if not torch.is_tensor(value)]
    return {
        str(key): value.float().contiguous() if value.is_floating_point() else value
        for key, value in content.items()
        if torch.is_tensor(value)
    }


# ---- The networks of a cross-validation (training.folds)


def finished_folds(folds: Path) -> list[Path]:
    """The folders of a cross-validation's trainings, one for each fold.

    Raises:
        CaseError: there is no fold, or the training of one is not finished.
    """
    runs = sorted(folds.glob("fold-*"))
    if not runs or not all((run / "done").exists() for run in runs):
        raise CaseError(
            f"expected finished folds in {folds}, got none or unfinished ones: "
            f"run training.folds --output {folds}"
        )
    return runs


def splits_of_fold(run: Path) -> list[tuple[str, str | None]]:
    """File and split of each case of a fold; two folds can be combined if these are equal."""
    return [(case.file, case.split) for case in read_cases(run / "cases.csv")]


def load_folds(folds: Path) -> Iterator[tuple[nn.Module, Checkpoint, list[Case]]]:
    """For each fold: its network, the network's description, and the cases it has not seen.

    Raises:
        CaseError: as `finished_folds`.
    """
    for run in finished_folds(folds):
        cases = [case for case in read_cases(run / "cases.csv") if case.split == HELD_OUT_SPLIT]
        yield *load_weights(run / "best.safetensors"), cases
