"""Measure what a pretraining learned: a linear probe of its encoder.

    python -m training.probe --run RUN --data cases.csv --images DIR

The encoder stays as it is. Ridge regression maps the features of all patches to the landmarks. It
is fitted on split train, where leave-one-out chooses its strength, and measured on split val. The
command writes no file. It prints the mean radial error on val, in px at 512, of

    the encoder of RUN,
    the same encoder with random weights,
    the mean landmarks of train, for every image alike.

If RUN is clearly better than the random encoder, put it into a network with training.fit
--pretrained RUN.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model.anatomy import Floats
from model.frame import Letterbox
from training.data.case_table import Case, CaseError, read_cases
from training.data.dataset import read_frame
from training.evaluation.metrics import REFERENCE_PX
from training.learning.checkpoint import CheckpointError
from training.learning.mae import Encoder, load_mae

STRENGTHS = np.logspace(-4, 4, 33)  # of the ridge, as multiples of the mean eigenvalue


@dataclass(frozen=True)
class ProbeOptions:
    """The command line; run: the folder of a pretraining, or its .safetensors file."""

    run: Path
    data: Path
    images: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = ProbeOptions(**vars(_parser().parse_args(arguments)))
    try:
        for name, error_px in probe(options).items():
            print(f"{name:<28}{error_px:8.1f} px")
    except (CaseError, CheckpointError, OSError) as error:
        print(f"training.probe: {error}", file=sys.stderr)
        return 2
    return 0


def probe(options: ProbeOptions) -> dict[str, float]:
    """What is probed -> its MRE on val, px at 512."""
    mae, described = load_mae(options.run)
    recipe = described.recipe
    cases = read_cases(options.data)
    splits = {name: [case for case in cases if case.split == name] for name in ("train", "val")}
    if min(map(len, splits.values())) < 2:
        raise CaseError(
            f"{options.data}: expected two or more cases of each of the splits train and val, "
            f"got {len(splits['train'])} and {len(splits['val'])}"
        )
    torch.manual_seed(0)
    encoders = {f"pretrained, {described.epoch} epochs": mae.encoder, "random": Encoder(recipe)}
    size_px = recipe.image_size
    truth = {name: input_landmarks(splits[name], options.images, size_px) for name in splits}
    scale = REFERENCE_PX / size_px
    errors_px = {}
    for name, encoder in encoders.items():
        train, val = (
            encode_cases(encoder.eval(), splits[split], options.images, size_px, name)
            for split in ("train", "val")
        )
        predicted = predict_by_ridge(train, truth["train"], val)
        errors_px[name] = _mean_radial_error(predicted, truth["val"]) * scale
    mean = truth["train"].mean(axis=0, keepdims=True)
    errors_px["mean landmarks of train"] = _mean_radial_error(mean, truth["val"]) * scale
    return errors_px


def predict_by_ridge(x: Floats, y: Floats, other: Floats) -> Floats:
    """Fit (n, d) features to (n, k) targets; predict (m, k) for (m, d) other features.

    The regression is solved in its dual form, since features outnumber images. Its strength is the
    one of least squared leave-one-out error, which has a closed form (Hastie et al., The Elements
    of Statistical Learning, 7.10).
    """
    centre, mean = x.mean(axis=0), y.mean(axis=0)
    x, other, residual = x - centre, other - centre, y - mean
    values, vectors = np.linalg.eigh(x @ x.T)
    values, turned = np.maximum(values, 0), vectors.T @ residual
    least, weights = np.inf, residual
    for strength in STRENGTHS * values.mean():
        inverse = 1 / (values + strength)
        dual = vectors @ (inverse[:, None] * turned)
        left_out = dual / (vectors**2 @ inverse)[:, None]
        if (error := float((left_out**2).mean())) < least:
            least, weights = error, dual
    return np.asarray(mean + (other @ x.T) @ weights)


def encode_cases(
    encoder: Encoder, cases: Sequence[Case], images: Path, size_px: int, title: str
) -> Floats:
    """(n, tokens * width) features of whole images; title: of the progress bar."""
    rows = []
    for case in tqdm(cases, title, leave=False):
        grey, pixel_shape = read_frame(images / case.file, case.frame)
        box = Letterbox(grey.shape[1], grey.shape[0], size_px, pixel_shape)
        image = torch.from_numpy(box.apply(grey).astype(np.float32) / 255)
        with torch.inference_mode():
            rows.append(encoder(image[None, None]).tokens.flatten().numpy())
    return np.array(rows, np.float64)


def input_landmarks(cases: Sequence[Case], images: Path, size_px: int) -> Floats:
    """(n, 6) labelled landmarks, in px of a square input of size_px a side."""
    rows = []
    for case in cases:
        grey, pixel_shape = read_frame(images / case.file, case.frame)
        box = Letterbox(grey.shape[1], grey.shape[0], size_px, pixel_shape)
        rows.append(box.to_input(case.landmarks_px).ravel())
    return np.array(rows)


def _mean_radial_error(predicted: Floats, truth: Floats) -> float:
    return float(np.linalg.norm((predicted - truth).reshape(-1, 3, 2), axis=2).mean())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="RUN", help="folder of training.pretrain")
    add("--data", type=Path, required=True, metavar="CSV", help="case table with labels and splits")
    add("--images", type=Path, required=True, metavar="DIR", help="folder of the table's images")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
