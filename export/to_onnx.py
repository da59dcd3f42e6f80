"""Export trained weights to one self-describing ONNX file.

    python -m export.to_onnx --run RUN --output model/weights/aop.onnx --images DIR --data cases.csv
    python -m export.to_onnx --weights aop.safetensors --output aop.onnx

The ONNX file carries the ModelSpec. Before it is written, the landmarks of torch and of ONNX
Runtime are compared on the val images of --data, or without --data on smooth random images. They
must agree within 0.05 px of the network input, or nothing is written.

--data also sets the threshold of doubt, unless training.calibrate has calibrated the weights. The
least confident landmark lies below the threshold in the --doubted share of val. --half stores the
weights in 16 bits, under the same limit of 0.05 px. --bundle writes the weights and their
description beside the ONNX file, as in model/weights/.
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
    TOLERANCE_INPUT_PX,
    ParityError,
    convert_network,
    network_input,
    parity_error_px,
    random_image,
    save_onnx,
)
from export.rewrites import halve_weights
from model.predictor import load_predictor
from model.spec import ModelSpec
from training.data.case_table import Case, CaseError, read_cases
from training.data.dataset import read_frame
from training.evaluation.metrics import case_errors
from training.evaluation.predict import predict_cases
from training.learning.checkpoint import Checkpoint, CheckpointError, load_weights, save_weights


@dataclass(frozen=True)
class ExportOptions:
    """What the command line asks for; each field is the option of its name.

    weights: .safetensors file, also for --run. data and images: both or neither. doubted: 0..1.
    training_data, licence: None keeps the text in the weights' description.
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
    """Run the command and return its exit status."""
    values = vars(_parser().parse_args(arguments))
    run = values.pop("run")
    values["weights"] = values["weights"] or run / "best.safetensors"
    options = ExportOptions(**values)
    if (options.data is None) != (options.images is None):
        print("export.to_onnx: --data and --images go together: pass both", file=sys.stderr)
        return 2
    try:
        export_weights(options)
    except (CheckpointError, CaseError, ParityError, OSError) as error:
        print(f"export.to_onnx: {error}", file=sys.stderr)
        return 2
    return 0


def export_weights(options: ExportOptions) -> None:
    """Write the ONNX file after the check of parity, and with --bundle the weights beside it.

    Raises:
        ParityError: torch and ONNX Runtime differ; nothing is written.
    """
    network, checkpoint = load_weights(options.weights)
    texts = {"training_data": options.training_data, "licence": options.licence}
    spec = checkpoint.spec.model_copy(update={k: v for k, v in texts.items() if v is not None})
    inputs = [random_image(spec, seed) for seed in range(RANDOM_IMAGES)]
    model = convert_network(network, spec)
    model = halve_weights(model) if options.half else model
    with tempfile.TemporaryDirectory(dir=options.output.parent) as folder:
        draft = Path(folder) / "draft.onnx"
        save_onnx(model, spec, draft)
        if options.data is not None and options.images is not None:
            cases = val_cases(options.data)
            spec = spec_with_val_figures(spec, draft, cases, options.images, options.doubted)
            save_onnx(model, spec, draft)
            inputs = [network_input(spec, *read_frame(options.images / c.file)) for c in cases]
        worst = parity_error_px(network, draft, inputs)
        print(
            f"{options.weights} -> {options.output}: {len(inputs)} images, "
            f"worst difference {worst:.4f} px"
        )
        if worst > TOLERANCE_INPUT_PX:
            raise ParityError(
                f"torch and ONNX Runtime differ by {worst:.3f} px, allowed are "
                f"{TOLERANCE_INPUT_PX}; nothing is written"
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
            f"{table}: no case has split 'val', which sets the threshold of doubt; if "
            "training.fit drew the split, pass the cases.csv that it wrote into RUN"
        )
    return cases


def spec_with_val_figures(
    spec: ModelSpec, onnx_file: Path, cases: Sequence[Case], images: Path, doubted: float
) -> ModelSpec:
    """The spec with the model's errors on these cases and the threshold of doubt.

    Errors on cases that the model was trained on say nothing: the spec's own then stay.

    Args:
        doubted: share of the cases, 0..1, whose least confident landmark is below the threshold.
    """
    predictions = predict_cases(load_predictor(onnx_file, "cpu"), cases, images)
    radial_px, aop_deg = case_errors(predictions, cases)
    least = [float(prediction.confidence.min()) for prediction in predictions]
    doubt_below = 0.0 if spec.calibration else round(float(np.quantile(least, doubted)), 4)
    measured = {
        "val_mre_px": round(float(radial_px.mean()), 3),
        "val_aop_error_deg": round(float(aop_deg.mean()), 3),
    }
    metrics = spec.metrics if spec.val_trained else measured
    return spec.model_copy(update={"doubt_below": doubt_below, "metrics": metrics})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "export.to_onnx", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder that training.fit wrote")
    source.add_argument("--weights", type=Path, help=".safetensors file with .json beside it")
    parser.add_argument("--output", type=Path, required=True, help="ONNX file to write")
    parser.add_argument(
        "--data",
        type=Path,
        help="case table; split val checks parity and sets the threshold of doubt",
    )
    parser.add_argument("--images", type=Path, help="folder of the table's images")
    parser.add_argument(
        "--doubted",
        type=float,
        default=0.02,
        help="share of val, 0 to 1, that falls below the threshold of doubt (%(default)s)",
    )
    parser.add_argument(
        "--training-data", help="text for the ModelSpec: data sets and the origin of their labels"
    )
    parser.add_argument("--licence", help="text for the ModelSpec: licence of the weights")
    parser.add_argument("--half", action="store_true", help="weights in 16 bits; halves the file")
    parser.add_argument(
        "--bundle", action="store_true", help=".safetensors and .json beside the ONNX file"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
