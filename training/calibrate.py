"""Teach a trained model how far it may be off, and what it is not made for.

    python -m training.calibrate --weights RUN/best.safetensors --data cases.csv --images DIR \\
        --others DIR 'training_*' --output OUT/aop.safetensors

On split val it fits the error to expect of each landmark and of the angle (`model.uncertainty`) and
the angle's 90 % interval; with --others it first trains a view head on split train, spoiled images
of it, and images of other views. The thresholds of doubt are set so that at most --doubted of val
is doubtful. The landmarks change with --mask-share alone. Then export: python -m export.to_onnx.

Val should not have trained the model, nor chosen between many: the errors would come out too small.
It needs 20 cases or more. For weights that val trained too (training.fit --all), or with a smaller
val, pass --folds FOLDS. Errors and interval are then fitted on the answers of the cross-validation
of the same recipe (training.folds). Each is of a network that had not seen the case, and that saw
fewer images, so that the errors come out somewhat too large.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from model.anatomy import Floats
from model.network import TransUNet, TransUNetConfig, build_network, without_view_head
from model.predictor import Prediction, Predictor
from model.spec import MaskShares, ModelSpec
from model.uncertainty import QUANTITIES, Calibration, ErrorModel
from training.data.case_table import Case, CaseError, count_splits, read_cases, require_images
from training.data.dataset import read_frame
from training.data.sources import images_matching
from training.evaluation.metrics import case_errors, mean_errors
from training.evaluation.predict import CasePrediction, case_prediction, load_folds, torch_predictor
from training.learning.checkpoint import Checkpoint, CheckpointError, load_weights, save_weights
from training.learning.view_head import train_view_head
from training.recipes import mask_shares

LEVEL = 0.9
VIEW_CHANNELS = 16
PARTS = 10  # of the cases, in `crossed`
RIDGE = 5.0  # cases' worth of pull towards 'the terms say nothing', for standardised terms


@dataclass(frozen=True)
class CalibrateOptions:
    """The command line.

    others: a folder and perhaps a pattern of file names. mask_share: None keeps the weights' own.
    doubted: the share of val that may be doubtful, 0 to below 1.
    """

    weights: Path
    data: Path
    images: Path
    output: Path
    others: Sequence[str] | None
    mask_share: MaskShares | None
    folds: Path | None
    doubted: float
    seed: int


class CaseAnswer(NamedTuple):
    """A labelled case, what a network found in its image, and the answer that this gives."""

    case: Case
    found: Prediction
    answer: CasePrediction


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = CalibrateOptions(**vars(_parser().parse_args(arguments)))
    try:
        calibrate(options)
    except (CaseError, CheckpointError, ValueError, OSError) as error:
        print(f"training.calibrate: {error}", file=sys.stderr)
        return 2
    return 0


def calibrate(options: CalibrateOptions) -> None:
    """Write the calibrated weights.

    Raises:
        CaseError, CheckpointError, ValueError, OSError: table, images or weights cannot be used.
    """
    network, checkpoint = load_weights(options.weights)
    share = checkpoint.spec.mask_share if options.mask_share is None else options.mask_share
    plain = {"calibration": None, "doubt_below": 0.0, "mask_share": share}
    spec = checkpoint.spec.model_copy(update=plain)
    if spec.val_trained and not options.folds:
        raise CheckpointError(f"split val trained {options.weights}: give the answers of --folds")
    cases = read_cases(options.data)
    require_enough(cases, options)
    val = [case for case in cases if case.split == "val"]
    train = [case for case in cases if case.split == "train"]
    seen = [*val, *train] if options.others or options.folds else val
    require_images(seen, options.images, options.data)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    config = checkpoint.network
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.others:
        if not (
            isinstance(network, TransUNet) and isinstance(config, TransUNetConfig) and train and val
        ):
            raise CaseError("--others needs a transunet, and cases of split train and val")
        config = replace(config, view_channels=VIEW_CHANNELS)
        network = with_view_head(network, build_network(config, checkpoint.masks)).to(device)
        others = images_matching(options.others)
        train_view_head(network, spec, train, options.images, others, options.seed)
    predictor = torch_predictor(network.to(device), spec, device)
    of_val = answer_cases(predictor, val, options.images)
    answers = of_val
    if options.folds:
        answers = answer_folds(options.folds, options, checkpoint, spec, device)
    views = np.sort([one.found.view_score for one in of_val if one.found.view_score is not None])
    found = calibration_of(answers, shares_of_doubt(answers, options.doubted, len(views) > 0)[0])
    if len(views) and isinstance(network, TransUNet):
        below = shares_of_doubt(of_val, options.doubted, True)[1]
        score = centre_view_score(network, _between(views, below))
        found = found.model_copy(update={"view_below": score})
    spec = spec.model_copy(update={"calibration": found})
    if options.folds:
        errors = mean_errors([one.answer for one in answers], [one.case for one in answers])
        names = ("folds_mre_px", "folds_aop_error_deg")
        metrics = {name: round(value, 3) for name, value in zip(names, errors, strict=True)}
        spec = spec.model_copy(update={"metrics": metrics})
    described = Checkpoint(network=config, masks=checkpoint.masks, spec=spec)
    save_weights(options.output, network.state_dict(), described)
    print(f"{options.weights} -> {options.output}: {spec.calibration}")


def require_enough(cases: Sequence[Case], options: CalibrateOptions) -> None:
    """Refuse a table whose cases to calibrate on are too few, or all of one group.

    These are the cases of val, with --folds those of train too.

    Raises:
        CaseError: says what to do instead.
    """
    splits = ("train", "val") if options.folds else ("val",)
    chosen = [case for case in cases if case.split in splits]
    if len(chosen) < 2 * PARTS:
        raise CaseError(
            f"{options.data}: expected at least {2 * PARTS} cases of split {' and '.join(splits)}, "
            f"the table has {count_splits(cases)}; give val more cases and train again, or pass "
            "--folds with a run of training.folds, which calibrates on train and val together; or "
            "export the weights as they are, and the model states no interval and no expected error"
        )
    if len({case.group or case.file for case in chosen}) < 2:
        raise CaseError(
            f"{options.data}: expected several groups in split {' and '.join(splits)}, all cases "
            f"are of group {chosen[0].group}; label cases of other patients, or correct the groups"
        )


def with_view_head(network: TransUNet, other: torch.nn.Module) -> TransUNet:
    """The second network, with a view head still random, and all else of the first."""
    assert isinstance(other, TransUNet)
    own = {key: value for key, value in other.state_dict().items() if key.startswith("view.")}
    known = {k: v for k, v in network.state_dict().items() if not k.startswith("view.")}
    other.load_state_dict(own | known)  # strict: every key is there
    return other


def centre_view_score(network: TransUNet, threshold: float) -> float:
    """Shift the view head's logits so that its threshold is the score of 0.5, and return that."""
    assert network.view is not None
    last = next(one for one in reversed(network.view.judge) if isinstance(one, torch.nn.Linear))
    with torch.no_grad():
        last.bias.sub_(float(np.log(threshold / (1 - threshold))))
    return 0.5


def answer_cases(predictor: Predictor, cases: Sequence[Case], images: Path) -> list[CaseAnswer]:
    """What a network says of labelled cases."""
    answers = []
    for case in tqdm(cases, "answers", leave=False):
        grey, pixel_shape = read_frame(images / case.file, case.frame)
        found = predictor.predict(grey, pixel_shape)
        answer = case_prediction(found, grey.shape, pixel_shape, predictor.spec)
        answers.append(CaseAnswer(case, found, answer))
    return answers


def answer_folds(
    folds: Path,
    options: CalibrateOptions,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    device: torch.device,
) -> list[CaseAnswer]:
    """What the networks of a cross-validation say of the cases that each has not seen.

    Raises:
        CheckpointError: their network is not that of the weights.
    """
    answers = []
    for network, other, cases in load_folds(folds):
        if without_view_head(checkpoint.network) != without_view_head(other.network):
            raise CheckpointError(f"{folds} holds another network than {options.weights}")
        predictor = torch_predictor(network.to(device), spec, device)
        answers += answer_cases(predictor, cases, options.images)
    return answers


def calibration_of(answers: Sequence[CaseAnswer], above: int) -> Calibration:
    """The calibration that these cases give, which must not have trained the network.

    Args:
        above: so many of them are to be doubtful for their expected error.
    """
    cases = [one.case for one in answers]
    radial, aop = case_errors([one.answer for one in answers], cases)
    errors = np.column_stack([radial, aop])
    terms = np.array([one.found.terms for one in answers])
    models = {name: fit_error_model(terms[:, k], errors[:, k]) for k, name in enumerate(QUANTITIES)}
    ratios = aop / crossed(terms[:, 3], aop, [case.group or case.file for case in cases])
    expected = models["AoP"].expected(terms[:, 3])
    return Calibration(
        errors=models,
        interval=conformal_quantile(ratios, LEVEL),
        error_above_deg=_above(np.sort(expected)[::-1], above),
        cases=len(cases),
    )


def shares_of_doubt(answers: Sequence[CaseAnswer], doubted: float, view: bool) -> tuple[int, int]:
    """How many cases may be doubted for their expected error, and how many for their view.

    Together they are what the implausible ones, doubted anyway, leave of the share.
    """
    odd = sum(bool(one.answer.reasons) for one in answers)
    allowed = max(0, int(doubted * len(answers)) - odd)
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


def fit_error_model(terms: Floats, errors: Floats) -> ErrorModel:
    """The model of the expected error: a gamma regression with logarithmic link, and a ridge.

    Fitted by reweighted least squares (McCullagh and Nelder 1989, 2.5), whose weights are all 1
    here. A term by which the error would fall is left out: doubt never makes an answer better.

    Args:
        terms: (n, 2) as of `model.uncertainty.error_terms`. errors: (n,), not negative.
    """
    errors = np.maximum(errors, 1e-3)
    known = [column[np.isfinite(column)] for column in terms.T]
    limits = np.array([[c.min(), c.max()] if len(c) else [0.0, 0.0] for c in known]).T
    terms = np.clip(terms, *limits)
    mean, deviation = terms.mean(axis=0), terms.std(axis=0)
    used = deviation > 0
    slopes = np.zeros(2)
    while True:
        x = np.column_stack([np.ones(len(terms)), ((terms - mean) / np.where(used, deviation, 1))])
        x = x[:, [True, *used]]
        pull = np.diag([0.0, *[RIDGE] * used.sum()])
        weights = np.array([np.log(errors.mean()), *[0.0] * used.sum()])
        for _ in range(50):
            expected = np.exp(x @ weights)
            working = x @ weights + (errors - expected) / expected
            weights = np.linalg.solve(x.T @ x + pull, x.T @ working)
        slopes[:] = 0
        slopes[used] = weights[1:]
        if (slopes >= 0).all():
            break
        used &= slopes > 0
    slopes = np.where(used, slopes / np.where(used, deviation, 1), 0.0)
    offset = float(weights[0] - slopes @ mean)
    disagreement, spread = limits.T.tolist()
    return ErrorModel(
        weights=(offset, float(slopes[0]), float(slopes[1])),
        limits=((disagreement[0], disagreement[1]), (spread[0], spread[1])),
    )


def crossed(terms: Floats, errors: Floats, groups: Sequence[str]) -> Floats:
    """(n,) expected errors, each from a model that its own group of cases was kept out of."""
    names = sorted(set(groups))
    fold_of = dict(
        zip(names, np.random.default_rng(0).permutation(len(names)) % PARTS, strict=True)
    )
    folds = np.array([fold_of[group] for group in groups])
    expected = np.empty(len(errors))
    for fold in np.unique(folds):
        rest = folds != fold
        expected[~rest] = fit_error_model(terms[rest], errors[rest]).expected(terms[~rest])
    return expected


def conformal_quantile(scores: Floats, level: float) -> float:
    """The score that a new one stays below with this probability (Vovk et al. 2005).

    The ceil(level (n + 1))-th smallest of n.
    """
    rank = int(np.ceil(level * (len(scores) + 1)))
    if rank > len(scores):
        raise ValueError(f"{len(scores)} cases are too few for an interval of {level:.0%}")
    return float(np.sort(scores)[rank - 1])


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
    others_help = "images of other views: a folder, and a pattern of names if not all of it"
    add("--others", nargs="+", metavar="DIR [PATTERN]", help=others_help)
    share = "masks' share in the answer: one number, or three as 0.3,0.1,0.6 (the weights' own)"
    add("--mask-share", type=mask_shares, metavar="SHARE", help=share)
    add("--folds", type=Path, help="run of training.folds whose answers replace those of val")
    add(
        "--doubted",
        type=_share,
        default=0.02,
        metavar="SHARE",
        help="share of val to doubt (%(default)s)",
    )
    add("--seed", type=int, default=1, help="seed of the view head (%(default)s)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
