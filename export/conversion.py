"""Torch network -> ONNX model, and the check that both find the same landmarks."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from model.frame import Letterbox, Pair
from model.heatmap import Heatmaps
from model.predictor import decode_output, load_predictor
from model.spec import METADATA_KEY, ModelSpec
from training.evaluation.predict import torch_predictor

OPSET, IR_VERSION = 20, 10
TOLERANCE_INPUT_PX = 0.05  # network input px
TOLERANCE_VIEW = 0.001  # view score, 0..1
RANDOM_IMAGES = 16  # for the check of parity without images


class ParityError(ValueError):
    """The ONNX file's landmarks or view scores differ from torch's, or are not finite."""


def convert_network(network: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    """A network in evaluation mode -> an ONNX model for batches of any size."""
    has_view_head = getattr(network, "view", None) is not None  # only a calibrated TransUNet has
    example = torch.zeros(2, spec.channels, spec.input_size, spec.input_size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from torch about its own code
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["heatmaps_and_masks", *(["view_score"] if has_view_head else [])],
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


def save_onnx(model: onnx.ModelProto, spec: ModelSpec, path: Path) -> None:
    """Write an ONNX model with the spec in its metadata."""
    onnx.helper.set_model_props(model, {METADATA_KEY: spec.model_dump_json()})
    onnx.save(model, path)


def parity_error_px(network: nn.Module, onnx_file: Path, inputs: Sequence[Heatmaps]) -> float:
    """The largest distance in input px between torch's and ONNX Runtime's landmarks on the CPU.

    Args:
        inputs: network inputs (channels, size, size).

    Raises:
        ParityError: the maps are not finite, or the view scores differ.
    """
    predictor = load_predictor(onnx_file, "cpu")
    spec = predictor.spec
    worst = 0.0
    for image in inputs:
        runs = (torch_predictor(network, spec, torch.device("cpu")).run, predictor.run)
        outputs = [run(image[None]) for run in runs]
        if not all(np.isfinite(output.maps).all() for output in outputs):
            raise ParityError(
                "the network's maps are not finite; check its weights; nothing is written"
            )
        scores = [output.view for output in outputs if output.view is not None]
        difference = float(np.abs(scores[0] - scores[-1]).max()) if scores else 0.0
        if not difference <= TOLERANCE_VIEW:  # NaN too
            raise ParityError(
                f"view scores differ by {difference:.4f} between torch and ONNX Runtime, allowed "
                f"are {TOLERANCE_VIEW}; nothing is written"
            )
        landmarks = [decode_output(spec, output.maps[0]).landmarks_px for output in outputs]
        worst = max(worst, float(np.linalg.norm(landmarks[0] - landmarks[1], axis=-1).max()))
    return worst


def network_input(
    spec: ModelSpec,
    grey: npt.NDArray[np.uint8] | npt.NDArray[np.float32],
    pixel_shape: Pair = (1.0, 1.0),
) -> Heatmaps:
    """(height, width) grey values 0..255 -> (channels, size, size).

    Args:
        pixel_shape: size of a pixel along x and y, in any unit: only the ratio matters.
    """
    box = Letterbox(grey.shape[1], grey.shape[0], spec.input_size, pixel_shape)
    return spec.normalise(box.apply(grey))


def random_image(spec: ModelSpec, seed: int) -> Heatmaps:
    """(channels, size, size) smooth noise as a network input, in place of a real image."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (8, 8)).astype(np.float32)
    image = cv2.resize(coarse, (spec.input_size,) * 2, interpolation=cv2.INTER_LINEAR)
    return spec.normalise(np.asarray(image, np.float32))
