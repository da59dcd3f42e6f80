"""Export trained weights to one self-describing ONNX file.

    python -m export.to_onnx --run RUN --output model/weights/aop.onnx --images DIR --data cases.csv
    python -m export.to_onnx --weights aop.safetensors --output aop.onnx

The ONNX file carries the ModelSpec. Before it is written, torch and ONNX Runtime are compared on
landmarks: on the val images of --data where they are given, else on smooth random images. They
must agree within 0.05 px of the network input, or nothing is written. With --data the threshold
of doubt is also set, unless training.calibrate has set others: in the --doubted share of val the
least confident landmark is below it.
--half stores the weights in 16 bits, held to the same 0.05 px.
--bundle writes the weights and their description beside the ONNX file, as in model/weights/.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import onnx
import torch
from torch import nn

from export.half import halved
from model.frame import Letterbox
from model.heatmap import Heatmaps
from model.predictor import decode_output, load_predictor
from model.spec import METADATA_KEY, ModelSpec
from training.cases import CaseError, read_cases
from training.checkpoint import Checkpoint, CheckpointError, load_weights, save_weights
from training.data import read_grey
from training.metrics import case_errors
from training.predict import predict_cases, torch_predictor

OPSET, IR_VERSION = 20, 10
TOLERANCE_PX = 0.05  # network input px
TOLERANCE_VIEW = 0.001  # of a score 0..1
RANDOM_IMAGES = 16


class ParityError(ValueError):
    """The ONNX file's landmarks differ from torch's."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(arguments)
    weights = args.weights or args.run / "best.safetensors"
    if (args.data is None) != (args.images is None):
        print("export.to_onnx: --data and --images are given together", file=sys.stderr)
        return 2
    try:
        export(weights, args)
    except (CheckpointError, CaseError, ParityError, OSError) as error:
        print(f"export.to_onnx: {error}", file=sys.stderr)
        return 2
    return 0


def export(weights: Path, args: argparse.Namespace) -> None:
    """Write the ONNX file, and the weights beside it with --bundle, once parity is shown."""
    network, checkpoint = load_weights(weights)
    texts = {"training_data": args.training_data, "licence": args.licence}
    spec = checkpoint.spec.model_copy(update={k: v for k, v in texts.items() if v is not None})
    inputs = [random_image(spec, seed) for seed in range(RANDOM_IMAGES)]
    model = converted(network, spec)
    model = halved(model) if args.half else model
    with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
        draft = Path(folder) / "draft.onnx"
        save(model, spec, draft)
        if args.data is not None:
            spec = calibrated(spec, draft, args)
            save(model, spec, draft)
            cases = [case for case in read_cases(args.data) if case.split == "val"]
            inputs = [network_input(spec, args.images / case.file) for case in cases]
        worst = parity(network, draft, inputs)
        print(f"{weights} -> {args.output}: {len(inputs)} images, worst difference {worst:.4f} px")
        if worst > TOLERANCE_PX:
            raise ParityError(
                f"torch and ONNX differ by {worst:.3f} px, allowed are {TOLERANCE_PX}; not written"
            )
        draft.replace(args.output)
    if args.bundle:
        described = Checkpoint(network=checkpoint.network, masks=checkpoint.masks, spec=spec)
        save_weights(args.output.with_suffix(".safetensors"), network.state_dict(), described)


def converted(network: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    """A network in evaluation mode as an ONNX model, for batches of any size."""
    has_view = getattr(network, "view", None) is not None  # a TransUNet's, and calibrated
    example = torch.zeros(2, spec.channels, spec.input_size, spec.input_size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, we do not
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about torch
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["heatmaps_and_masks", *(["view_score"] if has_view else [])],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None  # dynamo=True always returns a program
    model = program.model_proto
    model.ir_version = IR_VERSION
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces with the paths of this machine
    onnx.checker.check_model(model)
    return model


def save(model: onnx.ModelProto, spec: ModelSpec, path: Path) -> None:
    """Write an ONNX model with the spec in its metadata."""
    onnx.helper.set_model_props(model, {METADATA_KEY: spec.model_dump_json()})
    onnx.save(model, path)


def parity(network: nn.Module, onnx_file: Path, inputs: Sequence[Heatmaps]) -> float:
    """The largest distance in input px between torch's and ONNX Runtime's landmarks on the CPU.

    Args:
        inputs: network inputs (channels, size, size).
    """
    predictor = load_predictor(onnx_file, "cpu")
    spec = predictor.spec
    worst = 0.0
    for image in inputs:
        runs = (torch_predictor(network, spec, torch.device("cpu")).run, predictor.run)
        outputs = [run(image[None]) for run in runs]
        if not all(np.isfinite(output.maps).all() for output in outputs):
            raise ParityError("the network returns maps that are not finite; not written")
        views = [output.view for output in outputs if output.view is not None]
        moved = float(np.abs(views[0] - views[-1]).max()) if views else 0.0
        if not moved <= TOLERANCE_VIEW:  # NaN too
            raise ParityError(
                f"torch's and ONNX's view scores differ by {moved:.4f}, allowed are "
                f"{TOLERANCE_VIEW}; not written"
            )
        landmarks = [decode_output(spec, output.maps[0]).landmarks_px for output in outputs]
        worst = max(worst, float(np.linalg.norm(landmarks[0] - landmarks[1], axis=-1).max()))
    return worst


def calibrated(spec: ModelSpec, onnx_file: Path, args: argparse.Namespace) -> ModelSpec:
    """The spec with the figures of split val, and the doubt threshold that val gives."""
    cases = [case for case in read_cases(args.data) if case.split == "val"]
    if not cases:
        raise CaseError(
            f"{args.data}: no case has split 'val', from which the threshold is set; where fit "
            "drew the split, pass the cases.csv that it wrote in RUN"
        )
    predictions = predict_cases(load_predictor(onnx_file, "cpu"), cases, args.images)
    radial, aop = case_errors(predictions, cases)
    least = [float(found.confidence.min()) for found in predictions]
    doubt_below = 0.0 if spec.calibration else round(float(np.quantile(least, args.doubted)), 4)
    of_val = {
        "val_mre_px": round(float(radial.mean()), 3),
        "val_aop_error_deg": round(float(aop.mean()), 3),
    }
    metrics = spec.metrics if spec.val_trained else of_val
    return spec.model_copy(update={"doubt_below": doubt_below, "metrics": metrics})


def network_input(spec: ModelSpec, path: Path) -> Heatmaps:
    """(channels, size, size) of an image file."""
    grey, pixel_shape = read_grey(path)
    box = Letterbox(grey.shape[1], grey.shape[0], spec.input_size, pixel_shape)
    return spec.normalise(box.apply(grey))


def random_image(spec: ModelSpec, seed: int) -> Heatmaps:
    """(channels, size, size) smooth noise, for parity where there are no images."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (8, 8)).astype(np.float32)
    image = cv2.resize(coarse, (spec.input_size,) * 2, interpolation=cv2.INTER_LINEAR)
    return spec.normalise(np.asarray(image, np.float32))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "export.to_onnx", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of training.fit")
    source.add_argument("--weights", type=Path, help="weights, .safetensors with .json beside it")
    parser.add_argument("--output", type=Path, required=True, help="the ONNX file to write")
    parser.add_argument("--data", type=Path, help="case table whose val split sets the threshold")
    parser.add_argument("--images", type=Path, help="folder of its images")
    parser.add_argument(
        "--doubted", type=float, default=0.02, help="share of val below the threshold (%(default)s)"
    )
    parser.add_argument("--training-data", help="text for the spec: data sets and their labels")
    parser.add_argument("--licence", help="text for the spec")
    parser.add_argument("--half", action="store_true", help="weights in 16 bits: half the file")
    parser.add_argument("--bundle", action="store_true", help="write .safetensors and .json too")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
