"""Join several networks into one model, whose maps are the mean of theirs.

    python -m training.join FIRST.safetensors SECOND.safetensors [...] --output ALL.safetensors
    python -m training.join FOLDS SECOND_FOLDS [...] --output ALL_FOLDS     # runs of training.folds

Networks that differ only by their random seeds make partly different errors, so their mean errs a
little less. It takes as long to run as all of them together. export/BENCHMARK.md has the figures.

It writes ALL.safetensors with ALL.json. The description is that of the first file, without its
calibration and figures. Given folders of training.folds it joins the networks of each fold, which
must have kept out the same cases, and writes such a folder. Next, calibrate anew:
training.calibrate --weights ALL.safetensors, with --folds ALL_FOLDS if val trained the networks.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from model.network import TransUNet, TransUNetConfig, build_network
from training.data.case_table import CaseError
from training.learning.checkpoint import (
    Checkpoint,
    CheckpointError,
    finished_folds,
    load_strictly,
    load_weights,
    save_weights,
    splits_of_fold,
)


@dataclass(frozen=True)
class JoinOptions:
    """The command line; networks: two or more files of weights, or folders of training.folds."""

    networks: Sequence[Path]
    output: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = _parser()
    options = JoinOptions(**vars(parser.parse_args(arguments)))
    if len(options.networks) < 2:
        parser.error(f"expected two networks or more, got {options.networks[0]} alone")
    join = join_folds if options.networks[0].is_dir() else join_networks
    try:
        join(options.networks, options.output)
    except (CaseError, CheckpointError, ValueError, OSError) as error:
        print(f"training.join: {error}", file=sys.stderr)
        return 2
    return 0


def join_folds(folders: Sequence[Path], output: Path) -> None:
    """Join the networks of each fold, which must have kept out the same cases.

    Raises:
        CaseError: a fold is not done, or folds of one number keep out different cases.
        CheckpointError, ValueError: as `join_networks`.
    """
    runs = [finished_folds(folder) for folder in folders]
    splits = [[splits_of_fold(run) for run in runs_of_folder] for runs_of_folder in runs]
    for folder, splits_of_folder in zip(folders, splits, strict=True):
        if splits_of_folder != splits[0]:
            raise CaseError(
                f"{folders[0]} and {folder} keep out different cases: run training.folds for both "
                "with the same --data, --folds, --alike and --seed"
            )
    for same_fold in zip(*runs, strict=True):
        joined = output / same_fold[0].name
        join_networks([run / "best.safetensors" for run in same_fold], joined / "best.safetensors")
        shutil.copy(same_fold[0] / "cases.csv", joined)
        (joined / "done").touch()


def join_networks(files: Sequence[Path], output: Path) -> None:
    """Write the networks of all files, and their members, as one network with members.

    View heads are left out, since calibrate trains one anew.

    Raises:
        CheckpointError: a file cannot be read, or its network does not fit the others.
        ValueError: (CheckpointError too) the networks have no mean.
    """
    loaded = [load_weights(file) for file in files]
    described = [checkpoint for _, checkpoint in loaded]
    inputs_and_targets = {
        (each.spec.mean, each.spec.std, each.spec.sigma_cells, each.masks) for each in described
    }
    configs = [each.network for each in described if isinstance(each.network, TransUNetConfig)]
    if len(inputs_and_targets) > 1 or len(configs) < len(described):
        raise CheckpointError(
            f"{', '.join(file.name for file in files)} cannot be joined: expected transunets that "
            "take grey values alike, aim at heatmaps of one width and give the same masks"
        )
    transunets = [network for network, _ in loaded if isinstance(network, TransUNet)]
    networks = [part for network in transunets for part in (network, *network.members)]
    parts = [part for config in configs for part in (config, *config.members)]
    first, *others = (replace(part, view_channels=0, members=()) for part in parts)
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
        "val_trained": any(each.spec.val_trained for each in described),
        "recipe": spec.recipe | {"network": asdict(config)},
    }
    joined = Checkpoint(
        network=config, masks=described[0].masks, spec=spec.model_copy(update=changes)
    )
    save_weights(output, network.state_dict(), joined)
    print(f"{len(networks)} networks: {output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.join",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    networks = "weights (.safetensors with .json beside it), or folders of training.folds"
    parser.add_argument("networks", type=Path, nargs="+", metavar="NETWORK", help=networks)
    output = "file of weights to write, or folder of folds"
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help=output)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
