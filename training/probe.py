"""What a pretraining learned: a linear probe of its encoder, beside the same encoder untrained.

    python -m training.probe --run RUN --data cases.csv --images DIR

The encoder stays as it is. Ridge regression takes all its patches' features to the landmarks: it is
fitted on split train, its strength chosen there by leave-one-out, and measured on split val. For
comparison it measures an encoder of random weights, and the mean landmarks of train everywhere.
"""

import argparse
import sys
from collections.abc import Sequence
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

STRENGTHS = np.logspace(-4, 4, 33)  # times the mean eigenvalue


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(arguments)
    try:
        for words, error in probe(args.run, args.data, args.images).items():
            print(f"{words:<28}{error:8.1f} px")
    except (CaseError, CheckpointError, OSError) as error:
        print(f"training.probe: {error}", file=sys.stderr)
        return 2
    return 0


def probe(run: Path, data: Path, images: Path) -> dict[str, float]:
    """MRE on val, px at 512, of the run's encoder, of a random one, and of the mean landmarks."""
    mae, described = load_mae(run)
    recipe = described.recipe
    cases = read_cases(data)
    split = {name: [case for case in cases if case.split == name] for name in ("train", "val")}
    if min(map(len, split.values())) < 2:
        raise CaseError(f"{data}: expected cases of splits train and val")
    torch.manual_seed(0)
    errors = {}
    encoders = {f"pretrained, {described.epoch} epochs": mae.encoder, "random": Encoder(recipe)}
    truth = {name: landmarks(split[name], images, recipe.image_size) for name in split}
    scale = REFERENCE_PX / recipe.image_size
    for words, encoder in encoders.items():
        x = {name: features(encoder.eval(), split[name], images, recipe.image_size, words)
             for name in split}  # fmt: skip
        found = ridge(x["train"], truth["train"], x["val"])
        errors[words] = _mre(found, truth["val"]) * scale
    mean = truth["train"].mean(axis=0, keepdims=True)
    return errors | {"mean landmarks of train": _mre(mean, truth["val"]) * scale}


def ridge(x: Floats, y: Floats, other: Floats) -> Floats:
    """(n, d) features and (n, k) targets -> (m, k) predictions for (m, d) features.

    In its dual form, since features outnumber images; the strength is the one of the least squared
    leave-one-out error, which has a closed form (Hastie et al., The Elements of Statistical
    Learning, 7.10).
    """
    centre, mean = x.mean(axis=0), y.mean(axis=0)
    x, other, residual = x - centre, other - centre, y - mean
    values, vectors = np.linalg.eigh(x @ x.T)
    values, turned = np.maximum(values, 0), vectors.T @ residual
    best, weights = np.inf, residual
    for strength in STRENGTHS * values.mean():
        inverse = 1 / (values + strength)
        dual = vectors @ (inverse[:, None] * turned)
        left_out = dual / (vectors**2 @ inverse)[:, None]
        if (error := float((left_out**2).mean())) < best:
            best, weights = error, dual
    return np.asarray(mean + (other @ x.T) @ weights)


def features(
    encoder: Encoder, cases: Sequence[Case], images: Path, size: int, words: str
) -> Floats:
    """(n, tokens * width) features of whole images."""
    rows = []
    for case in tqdm(cases, words, leave=False):
        grey, pixel_shape = read_frame(images / case.file, case.frame)
        box = Letterbox(grey.shape[1], grey.shape[0], size, pixel_shape)
        image = torch.from_numpy(box.apply(grey).astype(np.float32) / 255)
        with torch.inference_mode():
            rows.append(encoder(image[None, None]).tokens.flatten().numpy())
    return np.array(rows, np.float64)


def landmarks(cases: Sequence[Case], images: Path, size: int) -> Floats:
    """(n, 6) landmarks in px of an input of that size."""
    rows = []
    for case in cases:
        grey, pixel_shape = read_frame(images / case.file, case.frame)
        box = Letterbox(grey.shape[1], grey.shape[0], size, pixel_shape)
        rows.append(box.to_input(case.landmarks_px).ravel())
    return np.array(rows)


def _mre(found: Floats, truth: Floats) -> float:
    return float(np.linalg.norm((found - truth).reshape(-1, 3, 2), axis=2).mean())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, help="a run of training.pretrain")
    parser.add_argument("--data", type=Path, required=True, help="case table with the labels (CSV)")
    parser.add_argument("--images", type=Path, required=True, help="folder of its images")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
