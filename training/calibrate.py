"""Teach a trained model how far it may be off, and what it is not made for.

    python -m training.calibrate --weights RUN/best.safetensors --data cases.csv --images DIR \\
        --others DIR 'training_*' --output OUT/aop.safetensors

On split val it fits the error to expect of each landmark and of the angle (`model.uncertainty`) and
the angle's 90 % interval; with --others it first trains a view head on split train, spoiled images
of it, and images of other views. The thresholds of doubt are set so that at most --doubted of val
is doubtful. The landmarks change with --mask-share alone. Then export: python -m export.to_onnx.

Val should not have trained the model, nor chosen between many: then the errors come out too small.
For weights that val trained too (training.fit --all), --folds FOLDS fits errors and interval on the
answers of the cross-validation of the same recipe (training.folds), each of a network that had not
seen the case; those networks saw fewer images, so that the errors come out somewhat too large.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from model.anatomy import Floats
from model.network import TransUNet, TransUNetConfig, build_network, without_view_head
from model.predictor import Prediction, Predictor
from model.spec import ModelSpec
from model.uncertainty import QUANTITIES, Calibration
from training.cases import Case, CaseError, read_cases
from training.checkpoint import Checkpoint, CheckpointError, load_weights, save_weights
from training.data import read_grey
from training.doubt import files_of
from training.error_model import PARTS, conformal_quantile, crossed, fit_error_model
from training.folds import kept_out, mask_shares
from training.metrics import case_errors, mean_errors
from training.predict import CasePrediction, answer_of, torch_predictor
from training.view import train_view_head

LEVEL = 0.9
VIEW_CHANNELS = 16


class Judged(NamedTuple):
    """A case with its label, what a network found, and what that says."""

    case: Case
    found: Prediction
    answer: CasePrediction


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(arguments)
    try:
        calibrate(args)
    except (CaseError, CheckpointError, ValueError, OSError) as error:
        print(f"training.calibrate: {error}", file=sys.stderr)
        return 2
    return 0


def calibrate(args: argparse.Namespace) -> None:
    """Write the calibrated weights."""
    network, checkpoint = load_weights(args.weights)
    share = checkpoint.spec.mask_share if args.mask_share is None else args.mask_share
    plain = {"calibration": None, "doubt_below": 0.0, "mask_share": share}
    spec = checkpoint.spec.model_copy(update=plain)
    if spec.val_trained and not args.folds:
        raise CheckpointError(f"split val trained {args.weights}: give the answers of --folds")
    cases = read_cases(args.data)
    val = [case for case in cases if case.split == "val"]
    if len(val) < 2 * PARTS:
        raise CaseError(f"{args.data}: expected {2 * PARTS} cases of split val, got {len(val)}")
    if len({case.group or case.file for case in val}) < 2:
        raise CaseError(f"{args.data}: expected several groups in split val, all cases are of one")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    config = checkpoint.network
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.others:
        train = [case for case in cases if case.split == "train"]
        if not (isinstance(network, TransUNet) and isinstance(config, TransUNetConfig) and train):
            raise CaseError("--others needs a transunet, and cases of split train")
        config = replace(config, view_channels=VIEW_CHANNELS)
        network = with_view_head(network, build_network(config, checkpoint.masks)).to(device)
        others = files_of(args.others)
        train_view_head(network, spec, train, args.images, others, args.seed)
    of_val = judge(torch_predictor(network.to(device), spec, device), val, args.images)
    judged = of_folds(args, checkpoint, spec, device) if args.folds else of_val
    views = np.sort([one.found.view_score for one in of_val if one.found.view_score is not None])
    found = calibration_of(judged, shares_of_doubt(judged, args.doubted, len(views) > 0)[0])
    if len(views):
        below = shares_of_doubt(of_val, args.doubted, True)[1]
        score = centre_view_score(network, _between(views, below))
        found = found.model_copy(update={"view_below": score})
    spec = spec.model_copy(update={"calibration": found})
    if args.folds:
        errors = mean_errors([one.answer for one in judged], [one.case for one in judged])
        names = ("folds_mre_px", "folds_aop_error_deg")
        metrics = {name: round(value, 3) for name, value in zip(names, errors, strict=True)}
        spec = spec.model_copy(update={"metrics": metrics})
    described = Checkpoint(network=config, masks=checkpoint.masks, spec=spec)
    save_weights(args.output, network.state_dict(), described)
    print(f"{args.weights} -> {args.output}: {spec.calibration}")


def with_view_head(network: TransUNet, other: torch.nn.Module) -> TransUNet:
    """The second network, with a view head still random, and all else of the first."""
    assert isinstance(other, TransUNet)
    own = {key: value for key, value in other.state_dict().items() if key.startswith("view.")}
    known = {k: v for k, v in network.state_dict().items() if not k.startswith("view.")}
    other.load_state_dict(own | known)  # strict: every key is there
    return other


def centre_view_score(network: torch.nn.Module, threshold: float) -> float:
    """Shift the view head's logits so that its threshold is the score of 0.5, and return that."""
    last = next(layer for layer in reversed(network.view.judge) if hasattr(layer, "bias"))
    with torch.no_grad():
        last.bias -= float(np.log(threshold / (1 - threshold)))
    return 0.5


def judge(predictor: Predictor, cases: Sequence[Case], images: Path) -> list[Judged]:
    """What a network says of cases with labels."""
    judged = []
    for case in tqdm(cases, "answers", leave=False):
        grey, pixel_shape = read_grey(images / case.file, case.frame)
        found = predictor.predict(grey, pixel_shape)
        answer = answer_of(found, grey.shape, pixel_shape, predictor.spec)
        judged.append(Judged(case, found, answer))
    return judged


def of_folds(
    args: argparse.Namespace, checkpoint: Checkpoint, spec: ModelSpec, device: torch.device
) -> list[Judged]:
    """What the networks of a cross-validation say of the cases that each has not seen."""
    judged = []
    for network, other, cases in kept_out(args.folds):
        if without_view_head(checkpoint.network) != without_view_head(other.network):
            raise CheckpointError(f"{args.folds} holds another network than {args.weights}")
        judged += judge(torch_predictor(network.to(device), spec, device), cases, args.images)
    return judged


def calibration_of(judged: Sequence[Judged], above: int) -> Calibration:
    """The calibration that these cases give, which must not have trained the network.

    Args:
        above: so many of them are to be doubtful for their expected error.
    """
    cases = [one.case for one in judged]
    radial, aop = case_errors([one.answer for one in judged], cases)
    errors = np.column_stack([radial, aop])
    terms = np.array([one.found.terms for one in judged])
    models = {name: fit_error_model(terms[:, k], errors[:, k]) for k, name in enumerate(QUANTITIES)}
    ratios = aop / crossed(terms[:, 3], aop, [case.group or case.file for case in cases])
    expected = models["AoP"].expected(terms[:, 3])
    return Calibration(
        errors=models,
        interval=conformal_quantile(ratios, LEVEL),
        error_above_deg=_above(np.sort(expected)[::-1], above),
        cases=len(cases),
    )


def shares_of_doubt(judged: Sequence[Judged], doubted: float, view: bool) -> tuple[int, int]:
    """How many cases may be doubted for their expected error, and how many for their view.

    Together they are what the implausible ones, doubted anyway, leave of the share.
    """
    odd = sum(bool(one.answer.reasons) for one in judged)
    allowed = max(0, int(doubted * len(judged)) - odd)
    of_view = (allowed + 1) // 2 if view else 0
    return allowed - of_view, of_view


def _between(scores: Floats, below: int) -> float:
    """A threshold with so many of the sorted scores below it, halfway (of logits) to the next."""
    inside = np.clip(scores, 1e-7, 1 - 1e-7)
    logits = np.log(inside / (1 - inside))
    middle = (logits[below - 1] + logits[below]) / 2 if below else logits[0] - 1
    return float(1 / (1 + np.exp(-middle)))


def _above(errors: Floats, above: int) -> float:
    """A threshold with so many of the errors, sorted from the largest, above it."""
    return float(errors[: above + 1][-2:].mean()) if above else float(errors[0] * 1.01)


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (share := float(text)) < 1:
            return share
    raise argparse.ArgumentTypeError(f"expected a share, 0 to below 1, got {text!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--weights", type=Path, required=True, help=".safetensors with its .json beside it")
    add("--data", type=Path, required=True, help="case table with the labels (CSV)")
    add("--images", type=Path, required=True, help="folder of its images")
    add("--output", type=Path, required=True, help="the .safetensors to write")
    others_help = "images of other views; a pattern of their names"
    add("--others", nargs="+", metavar="DIR [PATTERN]", help=others_help)
    share = "of the masks' landmarks in the answer, for all or as 0.3,0.1,0.6 (the weights' own)"
    add("--mask-share", type=mask_shares, metavar="SHARE", help=share)
    add("--folds", type=Path, help="of training.folds: errors are of its answers, not of val")
    add("--doubted", type=_share, default=0.02, metavar="SHARE", help="of val (%(default)s)")
    add("--seed", type=int, default=1, help="seed of the view head (%(default)s)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
