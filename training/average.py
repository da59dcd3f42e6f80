"""The mean of the weights of several trainings that began from the same ones.

    python -m training.average FIRST.safetensors SECOND.safetensors ... --output MEAN.safetensors

Fine-tunings of one network lie in one basin of the loss: the mean of their weights costs no time to
run and often errs less than each (Wortsman et al. 2022, model soups). The mean of trainings that
began apart is worthless. Measure it on split val, with training.evaluate, before you use it. The
description is the first file's, without its calibration and figures: calibrate anew.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from model.network import without_view_head
from training.learning.checkpoint import CheckpointError, load_weights, save_weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        "training.average",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", type=Path, nargs="+", help=".safetensors with .json beside it")
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors to write")
    args = parser.parse_args(arguments)
    try:
        average(args.weights, args.output)
    except (CheckpointError, OSError) as error:
        print(f"training.average: {error}", file=sys.stderr)
        return 2
    return 0


def average(files: Sequence[Path], output: Path) -> None:
    """Write the mean of the weights, without a view head, which calibrate trains anew.

    Raises:
        CheckpointError: a file cannot be read, or is of another network.
    """
    loaded = [load_weights(file) for file in files]
    _, described = loaded[0]
    networks = [without_view_head(checkpoint.network) for _, checkpoint in loaded]
    for file, network in zip(files, networks, strict=True):
        if network != networks[0]:
            raise CheckpointError(f"{file} is of another network than {files[0]}: no mean of them")
    states = [network.state_dict() for network, _ in loaded]
    mean = {
        name: torch.stack([state[name].float() for state in states]).mean(0).to(first.dtype)
        for name, first in states[0].items()
        if not name.startswith("view.")
    }
    known = any(checkpoint.spec.val_trained for _, checkpoint in loaded)
    unknown: dict[str, object] = {"calibration": None, "metrics": {}, "val_trained": known}
    spec = described.spec.model_copy(update=unknown)
    save_weights(output, mean, described.model_copy(update={"network": networks[0], "spec": spec}))
    print(f"the mean of {len(files)} weights: {output}")


if __name__ == "__main__":
    raise SystemExit(main())
