"""Train a landmark network on labelled images.

    python -m training.fit --recipe compact --data cases.csv --images DIR --masks DIR --output RUN
    python -m training.fit --recipe finish --init RUN/best.safetensors ... --output FINISHED
    python -m training.fit ... --output RUN --resume      # goes on exactly where it stopped
    python -m training.fit ... --output RUN --all         # trains on val too
    torchrun --nproc-per-node 4 -m training.fit ...       # trains in several processes

In the case table the column `split` says which cases train and which choose the best epoch (train,
val). Cases of split test are never read. If the table has no splits, a split of 4:1 is drawn and
written to RUN/cases.csv. It keeps together cases of one group, or images that look alike if there
are no groups.

RUN then holds best.safetensors with best.json (the weights of the lowest error on val),
checkpoint.pt (for --resume), log.csv, TensorBoard scalars, and samples/ with pictures of answers.

With --all no epoch is chosen: the weights of the last one are kept. Use it for a last training
whose settings are settled. training.folds measures how such a training does on unseen images.

Next: training.evaluate --model RUN measures the weights, training.calibrate adds expected errors
and intervals, and export.to_onnx writes the model that process.py runs.
"""

import sys
from collections.abc import Sequence

from pydantic import ValidationError

from training.data.case_table import CaseError
from training.learning.checkpoint import CheckpointError
from training.learning.trainer import fit, join_processes, parse_fit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        settings, recipe = parse_fit(arguments, __doc__)
        with join_processes(settings.device) as place:
            fit(settings, recipe, place)
    except (CaseError, CheckpointError, ValidationError, ValueError, OSError) as error:
        print(f"training.fit: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
