"""Put several networks together as one, whose maps are the mean of theirs.

    python -m training.join FIRST.safetensors SECOND.safetensors [...] --output ALL.safetensors
    python -m training.join FOLDS SECOND_FOLDS [...] --output ALL_FOLDS  # of training.folds

Networks that differ only by their seeds err in part by chance, each in its own way, so that their
mean errs a little less. export/BENCHMARK.md says by how much, and what it costs in time. The
description is the first file's, without its calibration and figures: calibrate anew.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from model.network import TransUNet, TransUNetConfig, build_network
from training.data.case_table import CaseError
from training.evaluation.predict import finished_folds, splits_of_fold
from training.learning.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_strictly,
    load_weights,
    save_weights,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        "training.join",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = "weights (.safetensors), or folders of training.folds; two or more"
    parser.add_argument("networks", type=Path, nargs="+", help=words)
    parser.add_argument("--output", type=Path, required=True, help="weights, or folds, to write")
    args = parser.parse_args(arguments)
    if len(args.networks) < 2:
        parser.error(f"expected two networks or more, got {args.networks[0]} alone")
    try:
        if args.networks[0].is_dir():
            join_folds(args.networks, args.output)
        else:
            join(args.networks, args.output)
    except (CaseError, CheckpointError, ValueError, OSError) as error:
        print(f"training.join: {error}", file=sys.stderr)
        return 2
    return 0


def join_folds(folds: Sequence[Path], output: Path) -> None:
    """Join each fold's networks, which kept the same cases out.

    Raises:
        CaseError: a fold is not done, or keeps out other cases.
        CheckpointError, ValueError: as `join`.
    """
    runs = [finished_folds(one) for one in folds]
    parts = [[splits_of_fold(run) for run in one] for one in runs]
    for one, cases in zip(folds, parts, strict=True):
        if cases != parts[0]:
            raise CaseError(f"{folds[0]} and {one} keep out different cases: deal with one --seed")
    for same in zip(*runs, strict=True):
        joined = output / same[0].name
        join([run / "best.safetensors" for run in same], joined / "best.safetensors")
        shutil.copy(same[0] / "cases.csv", joined)
        (joined / "done").touch()


def join(files: Sequence[Path], output: Path) -> None:
    """Write all of them, and their members, as one, without view heads: calibrate adds one anew.

    Raises:
        CheckpointError: a file cannot be read.
        ValueError: (CheckpointError too) the networks do not fit together.
    """
    loaded = [load_weights(file) for file in files]
    described = [checkpoint for _, checkpoint in loaded]
    ways = {(one.spec.mean, one.spec.std, one.spec.sigma_cells, one.masks) for one in described}
    own = [one.network for one in described if isinstance(one.network, TransUNetConfig)]
    if len(ways) > 1 or len(own) < len(described):
        raise CheckpointError(
            f"{', '.join(file.name for file in files)} are not transunets that take grey values "
            "alike, aim at heatmaps of one width and give the same masks"
        )
    transunets = [network for network, _ in loaded if isinstance(network, TransUNet)]
    networks = [part for network in transunets for part in (network, *network.members)]
    configs = [part for one in own for part in (one, *one.members)]
    first, *others = (replace(part, view_channels=0, members=()) for part in configs)
    config = replace(first, members=tuple(others))
    tensors = {
        f"members.{k - 1}.{name}" if k else name: tensor
        for k, network in enumerate(networks)
        for name, tensor in network.state_dict().items()
        if not name.startswith(("view.", "members."))
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    network = build_network(config, described[0].masks)
    load_strictly(network, tensors, " with ".join(file.name for file in files))
    spec = described[0].spec
    changes = {
        "calibration": None,
        "metrics": {},
        "val_trained": any(one.spec.val_trained for one in described),
        "recipe": spec.recipe | {"network": asdict(config)},
    }
    joined = Checkpoint(
        network=config, masks=described[0].masks, spec=spec.model_copy(update=changes)
    )
    save_weights(output, network.state_dict(), joined)
    print(f"{len(networks)} networks: {output}")


if __name__ == "__main__":
    raise SystemExit(main())
