"""Put a second network beside the first: heatmaps of the one, masks of the other.

    python -m training.join FIRST.safetensors SECOND.safetensors --output BOTH.safetensors
    python -m training.join FOLDS SECOND_FOLDS --output BOTH_FOLDS  # of training.folds

The landmarks of heatmaps and masks are averaged (ModelSpec.mask_share). Where one network gives
both, the two err alike; a second network trained for masks alone (training.fit --heatmap_weight 0
--mask_share 1) errs in its own way, so that the mean may be nearer: export/BENCHMARK.md tells when
it was. The description is the first file's; its calibration and figures are not, so calibrate anew.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from model.network import build_network
from training.cases import CaseError, read_cases
from training.checkpoint import CheckpointError, load_strictly, load_weights, save_weights
from training.folds import finished


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        "training.join",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    first, second = (f"weights that give the {maps}, or folds" for maps in ("heatmaps", "masks"))
    parser.add_argument("first", type=Path, help=first)
    parser.add_argument("second", type=Path, help=second)
    parser.add_argument("--output", type=Path, required=True, help="weights, or folds, to write")
    args = parser.parse_args(arguments)
    try:
        if args.first.is_dir():
            join_folds(args.first, args.second, args.output)
        else:
            join(args.first, args.second, args.output)
    except (CaseError, CheckpointError, ValueError, OSError) as error:
        print(f"training.join: {error}", file=sys.stderr)
        return 2
    return 0


def join_folds(first: Path, second: Path, output: Path) -> None:
    """Join each fold's network with the other one that kept the same cases out.

    Raises:
        CaseError: a fold is not done, or keeps out other cases.
        CheckpointError, ValueError: as `join`.
    """
    for run, other in zip(finished(first), finished(second), strict=True):
        dealt = [[(c.file, c.split) for c in read_cases(one / "cases.csv")] for one in (run, other)]
        if dealt[0] != dealt[1]:
            raise CaseError(f"{run} and {other} keep out different cases: use one --seed for both")
        joined = output / run.name
        joined.mkdir(parents=True)
        join(run / "best.safetensors", other / "best.safetensors", joined / "best.safetensors")
        shutil.copy(run / "cases.csv", joined)
        (joined / "done").touch()


def join(first: Path, second: Path, output: Path) -> None:
    """Write both, without view heads, which calibrate trains anew.

    Raises:
        CheckpointError: a file cannot be read.
        ValueError: (CheckpointError too) the networks do not fit together.
    """
    loaded = [load_weights(file) for file in (first, second)]
    specs = [checkpoint.spec for _, checkpoint in loaded]
    if (specs[0].mean, specs[0].std) != (specs[1].mean, specs[1].std):
        raise CheckpointError(f"{first} and {second} take grey values in different ways")
    plain = [checkpoint.network.model_copy(update={"view_channels": 0}) for _, checkpoint in loaded]
    config = plain[0].model_copy(update={"second": plain[1]})
    tensors = {
        prefix + name: tensor
        for prefix, (network, _) in zip(("", "second."), loaded, strict=True)
        for name, tensor in network.state_dict().items()
        if not name.startswith(("view.", "second."))
    }
    network = build_network(config, loaded[0][1].masks)
    load_strictly(network, tensors, f"{first.name} with {second.name}")
    known = any(spec.val_trained for spec in specs)
    spec = specs[0].model_copy(update={"calibration": None, "metrics": {}, "val_trained": known})
    described = loaded[0][1].model_copy(update={"network": config, "spec": spec})
    save_weights(output, network.state_dict(), described)
    print(f"{first.name} with the masks of {second.name}: {output}")


if __name__ == "__main__":
    raise SystemExit(main())
