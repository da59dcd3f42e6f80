"""Quantise a model for the CPU: the same network with int8 weights and activations.

    python -m export.quantise --model model/weights/aop.onnx --data PSFHS/cases.csv \\
        --images PSFHS/images --output model/weights/aop.int8.onnx

The quantisation is static (QDQ, unsigned activations, signed weights, one scale per channel). Its
ranges come from the images of split val. The weights use 7 of 8 bits. A processor without VNNI adds
two products in 16 bits, and larger weights would overflow there: answers would depend on the
processor. The heads' results, attention, the layer norms, the sums of tokens and the view head stay
in floating point. export/rewrites.py first rewrites the network so that int8 kernels run the rest.
The graph is stored as ONNX Runtime optimises it for any CPU, channels last, which more than halves
the start of a session.

Both models are measured on val before the file is written. If the error grows by more than
--most-px or --most-deg, nothing is written.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from export.conversion import network_input, save_onnx
from export.rewrites import Graph, rewrite_for_int8, widen_weights
from model.heatmap import Heatmaps
from model.predictor import ModelError, load_predictor
from model.spec import ModelSpec
from training.data.case_table import Case, CaseError, read_cases
from training.data.dataset import read_frame
from training.evaluation.metrics import mean_errors
from training.evaluation.predict import CasePrediction, predict_cases

INT8_OPS = ("Conv", "MatMul", "Gemm", "Add", "Concat", "Relu", "Transpose", "Reshape")


@dataclass(frozen=True)
class QuantiseOptions:
    """What the command line asks for; each field is the option of its name.

    most_px, most_deg: largest growth of the MRE (px at 512) and of the AoP error (deg) on val.
    """

    model: Path
    data: Path
    images: Path
    output: Path
    most_px: float
    most_deg: float


class AccuracyError(ValueError):
    """The int8 model's error grows by more than the limits allow."""


class _CalibrationInputs(CalibrationDataReader):  # type: ignore[misc]  # the base has no types
    """Hands out one network input after the other to the quantiser."""

    def __init__(self, name: str, inputs: Sequence[Heatmaps]) -> None:
        self.remaining = iter([{name: image[None]} for image in inputs])

    def get_next(self) -> dict[str, Heatmaps] | None:
        return next(self.remaining, None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = QuantiseOptions(**vars(_parser().parse_args(arguments)))
    try:
        quantise_model(options)
    except (ModelError, CaseError, AccuracyError, OSError) as error:
        print(f"export.quantise: {error}", file=sys.stderr)
        return 2
    return 0


def quantise_model(options: QuantiseOptions) -> None:
    """Write the int8 model if its error on val grows by no more than the limits.

    Raises:
        AccuracyError: it grows by more; nothing is written.
    """
    before = load_predictor(options.model, "cpu")
    cases = [case for case in read_cases(options.data) if case.split == "val"]
    if not cases:
        raise CaseError(f"{options.data}: no case has split 'val', which the ranges come from")
    inputs = [network_input(before.spec, *read_frame(options.images / case.file)) for case in cases]
    spec = before.spec.model_copy(update={"name": f"{before.spec.name}-int8"})
    with tempfile.TemporaryDirectory(dir=options.output.parent) as folder:
        draft = Path(folder) / "draft.onnx"
        write_int8(options.model, draft, inputs, spec)
        predictions = [
            predict_cases(predictor, cases, options.images)
            for predictor in (before, load_predictor(draft, "cpu"))
        ]
        metrics = check_accuracy(predictions, cases, options)
        spec = spec if spec.val_trained else spec.model_copy(update={"metrics": metrics})
        save_onnx(onnx.load(draft), spec, draft)
        draft.replace(options.output)
    sizes = [path.stat().st_size / 1e6 for path in (options.model, options.output)]
    print(f"{options.model} {sizes[0]:.1f} MB -> {options.output} {sizes[1]:.1f} MB")


def write_int8(model: Path, output: Path, inputs: Sequence[Heatmaps], spec: ModelSpec) -> None:
    """Write the quantised model, with `spec` in its metadata.

    Args:
        inputs: network inputs (channels, size, size), which the ranges come from.
    """
    original = rewrite_for_int8(widen_weights(onnx.load(model)))
    graph = Graph(original)
    in_floating_point = [
        node.name
        for node in original.graph.node
        if any(name.startswith("view.") for name in node.input)
        or (node.op_type == "MatMul" and not {*node.input} & {*graph.weights})
        or (node.op_type == "Add" and not takes_feature_maps(node, graph))
    ]
    logging.getLogger().setLevel(logging.ERROR)  # it advises a step that changes nothing here
    quantize_static(
        original,
        output,
        _CalibrationInputs(original.graph.input[0].name, inputs),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(INT8_OPS),
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=in_floating_point,
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
    )
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(output)
    cpu_specific = ["NchwcTransformer"]  # its blocks are as wide as this processor's registers
    providers = ["CPUExecutionProvider"]
    ort.InferenceSession(output, options, providers, disabled_optimizers=cpu_specific)
    save_onnx(onnx.load(output), spec, output)


def takes_feature_maps(node: onnx.NodeProto, graph: Graph) -> bool:
    """Whether all inputs of a node are feature maps (n, channels, rows, columns)."""
    return all(len(graph.shapes.get(name, ())) == 4 for name in node.input)


def check_accuracy(
    predictions: Sequence[Sequence[CasePrediction]], cases: Sequence[Case], options: QuantiseOptions
) -> dict[str, float]:
    """Print both models' errors and return the int8 model's, as metrics of its spec.

    Args:
        predictions: the float32 model's for all cases, then the int8 model's.

    Raises:
        AccuracyError: the error grows by more than the options allow.
    """
    errors = [mean_errors(of_model, cases) for of_model in predictions]
    moved_px = [
        np.linalg.norm(one.landmarks_px - other.landmarks_px, axis=1).max()
        for one, other in zip(*predictions, strict=True)
    ]
    for name, (mre_px, aop_deg) in zip(("float32", "int8"), errors, strict=True):
        print(f"{name:8} val MRE {mre_px:.3f} px, AoP error {aop_deg:.3f} deg")
    print(
        f"largest move of a case's landmarks: {np.mean(moved_px):.2f} image px on average, "
        f"{max(moved_px):.2f} at most"
    )
    grown_px, grown_deg = np.subtract(errors[1], errors[0])
    if grown_px > options.most_px or grown_deg > options.most_deg:
        raise AccuracyError(
            f"the int8 model errs by {grown_px:.2f} px and {grown_deg:.2f} deg more on val, "
            f"allowed are {options.most_px:g} and {options.most_deg:g}; nothing is written"
        )
    return {
        "val_mre_px": round(float(errors[1][0]), 3),
        "val_aop_error_deg": round(float(errors[1][1]), 3),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "export.quantise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="ONNX file that export.to_onnx wrote")
    add("--data", type=Path, required=True, help="case table with a val split")
    add("--images", type=Path, required=True, help="folder of the table's images")
    add("--output", type=Path, required=True, help="ONNX file to write")
    add(
        "--most-px",
        type=float,
        default=0.1,
        help="largest growth of the MRE on val, px at 512 (%(default)s)",
    )
    add(
        "--most-deg",
        type=float,
        default=0.1,
        help="largest growth of the AoP error on val, deg (%(default)s)",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
