"""Export trained weights to one self-describing ONNX file.

    python -m export.to_onnx --run RUN --output model/weights/aop.onnx --images DIR --data cases.csv
    python -m export.to_onnx --weights aop.safetensors --output aop.onnx

The ONNX file carries the ModelSpec. Before it is written, the landmarks of torch and of ONNX
Runtime are compared: on the val images of --data if it is given, else on smooth random images. They
must agree within 0.05 px of the network input, or nothing is written.

--data also sets the threshold of doubt, unless training.calibrate has set others: the --doubted
share of val has its least confident landmark below it. --half stores the weights in 16 bits, under
the same limit of 0.05 px. --bundle writes the weights and their description beside the ONNX file,
as in model/weights/.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.conversion import (
    RANDOM_IMAGES,
    TOLERANCE_PX,
    ParityError,
    converted,
    network_input,
    parity,
    random_image,
    save,
)
from export.rewrites import halved
from model.predictor import load_predictor
from model.spec import ModelSpec
from training.data.case_table import Case, CaseError, read_cases
from training.data.dataset import read_frame
from training.evaluation.metrics import case_errors
from training.evaluation.predict import predict_cases
from training.learning.checkpoint import Checkpoint, CheckpointError, load_weights, save_weights


@dataclass(frozen=True)
class ExportOptions:
    """What the command line asks for; fields as its options.

    weights: .safetensors, those of --run too. data and images: both or neither. doubted: 0..1.
    training_data, licence: None leaves the weights' own.
    """

    weights: Path
    output: Path
    data: Path | None
    images: Path | None
    doubted: float
    training_data: str | None
    licence: str | None
    half: bool
    bundle: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    values = vars(_parser().parse_args(arguments))
    run = values.pop("run")
    values["weights"] = values["weights"] or run / "best.safetensors"
    options = ExportOptions(**values)
    if (options.data is None) != (options.images is None):
        print("export.to_onnx: --data and --images are given together", file=sys.stderr)
        return 2
    try:
        export(options)
    except (CheckpointError, CaseError, ParityError, OSError) as error:
        print(f"export.to_onnx: {error}", file=sys.stderr)
        return 2
    return 0


def export(options: ExportOptions) -> None:
    """Write the ONNX file, and the weights beside it with --bundle, once parity is shown."""
    network, checkpoint = load_weights(options.weights)
    texts = {"training_data": options.training_data, "licence": options.licence}
    spec = checkpoint.spec.model_copy(update={k: v for k, v in texts.items() if v is not None})
    inputs = [random_image(spec, seed) for seed in range(RANDOM_IMAGES)]
    model = converted(network, spec)
    model = halved(model) if options.half else model
    with tempfile.TemporaryDirectory(dir=options.output.parent) as folder:
        draft = Path(folder) / "draft.onnx"
        save(model, spec, draft)
        if options.data is not None and options.images is not None:
            cases = val_cases(options.data)
            spec = calibrated(spec, draft, cases, options.images, options.doubted)
            save(model, spec, draft)
            inputs = [network_input(spec, *read_frame(options.images / c.file)) for c in cases]
        worst = parity(network, draft, inputs)
        print(
            f"{options.weights} -> {options.output}: {len(inputs)} images, "
            f"worst difference {worst:.4f} px"
        )
        if worst > TOLERANCE_PX:
            raise ParityError(
                f"torch and ONNX differ by {worst:.3f} px, allowed are {TOLERANCE_PX}; not written"
            )
        draft.replace(options.output)
    if options.bundle:
        described = Checkpoint(network=checkpoint.network, masks=checkpoint.masks, spec=spec)
        save_weights(options.output.with_suffix(".safetensors"), network.state_dict(), described)


def val_cases(table: Path) -> list[Case]:
    """The cases of split val; CaseError if there is none."""
    cases = [case for case in read_cases(table) if case.split == "val"]
    if not cases:
        raise CaseError(
            f"{table}: no case has split 'val', which sets the threshold of doubt; if fit drew "
            "the split, pass the cases.csv that it wrote into RUN"
        )
    return cases


def calibrated(
    spec: ModelSpec, onnx_file: Path, cases: Sequence[Case], images: Path, doubted: float
) -> ModelSpec:
    """The spec with the figures of these cases, and the threshold of doubt that they give.

    Args:
        doubted: share of the cases, 0..1, whose least confident landmark is below the threshold.
    """
    predictions = predict_cases(load_predictor(onnx_file, "cpu"), cases, images)
    radial, aop = case_errors(predictions, cases)
    least = [float(found.confidence.min()) for found in predictions]
    doubt_below = 0.0 if spec.calibration else round(float(np.quantile(least, doubted)), 4)
    of_val = {
        "val_mre_px": round(float(radial.mean()), 3),
        "val_aop_error_deg": round(float(aop.mean()), 3),
    }
    metrics = spec.metrics if spec.val_trained else of_val
    return spec.model_copy(update={"doubt_below": doubt_below, "metrics": metrics})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "export.to_onnx", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder that training.fit wrote")
    source.add_argument("--weights", type=Path, help="weights, .safetensors with .json beside it")
    parser.add_argument("--output", type=Path, required=True, help="ONNX file to write")
    parser.add_argument(
        "--data",
        type=Path,
        help="case table whose val split is compared on, and sets the threshold",
    )
    parser.add_argument("--images", type=Path, help="folder of the table's images")
    parser.add_argument(
        "--doubted",
        type=float,
        default=0.02,
        help="share of val, 0 to 1, below the threshold of doubt (%(default)s)",
    )
    parser.add_argument(
        "--training-data", help="text for the ModelSpec: data sets and what their labels are"
    )
    parser.add_argument("--licence", help="text for the ModelSpec: licence of the weights")
    parser.add_argument(
        "--half", action="store_true", help="store weights in 16 bits: half the file"
    )
    parser.add_argument("--bundle", action="store_true", help="write .safetensors and .json too")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
