"""Average the weights of several trainings that began from the same weights.

    python -m training.average FIRST.safetensors SECOND.safetensors ... --output MEAN.safetensors

Trainings that began from one network stay close together. The mean of their weights costs no time
to run and often errs less than each of them (Wortsman et al. 2022, model soups). For trainings that
began apart the mean is worthless.

It writes MEAN.safetensors with MEAN.json. The description is that of the first file, without its
calibration and figures. Next, measure the mean on split val with training.evaluate before you use
it, and calibrate it anew with training.calibrate.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model.network import without_view_head
from training.learning.checkpoint import CheckpointError, load_weights, save_weights


@dataclass(frozen=True)
class AverageOptions:
    """The command line."""

    weights: Sequence[Path]
    output: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = AverageOptions(**vars(_parser().parse_args(arguments)))
    try:
        average(options.weights, options.output)
    except (CheckpointError, OSError) as error:
        print(f"training.average: {error}", file=sys.stderr)
        return 2
    return 0


def average(files: Sequence[Path], output: Path) -> None:
    """Write the mean of the weights. A view head is left out, since calibrate trains it anew.

    Raises:
        CheckpointError: a file cannot be read, or its network differs from the first one's.
    """
    loaded = [load_weights(file) for file in files]
    _, described = loaded[0]
    configs = [without_view_head(checkpoint.network) for _, checkpoint in loaded]
    for file, config in zip(files, configs, strict=True):
        if config != configs[0]:
            raise CheckpointError(
                f"{file} is of another network than {files[0]}: only weights of one network, whose "
                "trainings began from the same weights, have a mean"
            )
    states = [network.state_dict() for network, _ in loaded]
    mean = {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(first.dtype)
        for name, first in states[0].items()
        if not name.startswith("view.")
    }
    changes: dict[str, object] = {
        "calibration": None,
        "metrics": {},
        "val_trained": any(checkpoint.spec.val_trained for _, checkpoint in loaded),
    }
    spec = described.spec.model_copy(update=changes)
    save_weights(output, mean, described.model_copy(update={"network": configs[0], "spec": spec}))
    print(f"the mean of {len(files)} weights: {output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.average",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    files = "files of weights (.safetensors), each with its .json beside it"
    parser.add_argument("weights", type=Path, nargs="+", metavar="FILE", help=files)
    output = "file of weights to write (.safetensors)"
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=output)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
