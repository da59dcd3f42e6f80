"""Train a landmark network on labelled images.

    python -m training.fit --recipe compact --data cases.csv --images DIR --masks DIR --output RUN
    python -m training.fit ... --output RUN --resume           # goes on exactly where it stopped
    python -m training.fit ... --output RUN --all              # val trains too, nothing chooses
    torchrun --nproc-per-node 4 -m training.fit ...            # several processes

The case table's `split` column says what trains and what chooses (train, val; test is never read);
without it a split by its `group` column, else by near-duplicate images, is drawn and written to
RUN/cases.csv. RUN then holds best.safetensors and best.json (the weights of the lowest val error),
checkpoint.pt (to resume), log.csv, TensorBoard scalars and samples/.

With --all the weights of the last epoch are kept. That is for a last training, whose settings are
chosen already. training.folds measures how such a training does on images that it has not seen.
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
