"""Calibrate a trained model: how far it may be off, and which images it is not made for.

    python -m training.calibrate --weights RUN/best.safetensors --data cases.csv --images DIR \\
        --others DIR 'training_*' --output OUT/aop.safetensors

On split val it fits the expected error of each landmark and of the angle (`model.uncertainty`), and
the 90 % interval of the angle. With --others it first trains a view head: on images of split train,
on spoiled copies of them, and on the images of other views in DIR. The thresholds of doubt are set
so that at most the share --doubted of val is doubtful.

It writes OUT/aop.safetensors with aop.json. Landmarks stay as they are, unless --mask-share changes
them. Next, export the model: python -m export.to_onnx --weights OUT/aop.safetensors ...

Val needs 20 cases or more. It must not have trained the model, and the model should not be the best
of many on it: the errors would come out too small. For weights that val trained too (training.fit
--all), or for a smaller val, pass --folds FOLDS, a run of training.folds with the same recipe.
Errors and interval are then fitted on its answers, each from a network that had not seen the case.
These networks saw fewer images, so the errors come out somewhat too large.
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
from training.evaluation.predict import CasePrediction, case_prediction, torch_predictor
from training.learning.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_folds,
    load_weights,
    save_weights,
)
from training.learning.view_head import train_view_head
from training.recipes import parse_mask_shares

INTERVAL_LEVEL = 0.9  # probability with which the interval is to hold the angle
VIEW_CHANNELS = 16
PARTS = 10  # parts of the cases in `cross_fit_errors`
RIDGE = 5.0  # pull of the slopes (of standardised terms) towards 0, as a number of cases


@dataclass(frozen=True)
class CalibrateOptions:
    """The command line.

    others: a folder, and a pattern of file names if one follows it. mask_share: None keeps that of
    the weights. doubted: share of val that may be doubtful, 0 to below 1.
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
    """A labelled case, a network's prediction for its image, and the answer made of it."""

    case: Case
    prediction: Prediction
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
        raise CheckpointError(
            f"split val trained {options.weights}: pass --folds with a run of training.folds"
        )
    cases = read_cases(options.data)
    require_enough_cases(cases, options)
    val = [case for case in cases if case.split == "val"]
    train = [case for case in cases if case.split == "train"]
    needed = [*val, *train] if options.others or options.folds else val
    require_images(needed, options.images, options.data)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    config = checkpoint.network
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.others:
        if not (
            isinstance(network, TransUNet) and isinstance(config, TransUNetConfig) and train and val
        ):
            raise CaseError(
                "--others needs weights of a transunet, and cases of split train and val; "
                f"{options.weights} is a {config.kind}, {options.data} has {count_splits(cases)}"
            )
        config = replace(config, view_channels=VIEW_CHANNELS)
        network = with_view_head(network, build_network(config, checkpoint.masks)).to(device)
        others = images_matching(options.others)
        train_view_head(network, spec, train, options.images, others, options.seed)
    predictor = torch_predictor(network.to(device), spec, device)
    val_answers = predict_labelled(predictor, val, options.images)
    answers = val_answers
    if options.folds:
        answers = predict_folds(options.folds, options, checkpoint, spec, device)
    scores = [each.prediction.view_score for each in val_answers]
    view_scores = np.sort([score for score in scores if score is not None])
    has_view = len(view_scores) > 0
    calibration = fit_calibration(answers, doubt_budget(answers, options.doubted, has_view)[0])
    if has_view and isinstance(network, TransUNet):
        below = doubt_budget(val_answers, options.doubted, has_view)[1]
        score = centre_view_score(network, view_threshold(view_scores, below))
        calibration = calibration.model_copy(update={"view_below": score})
    spec = spec.model_copy(update={"calibration": calibration})
    if options.folds:
        errors = mean_errors([each.answer for each in answers], [each.case for each in answers])
        names = ("folds_mre_px", "folds_aop_error_deg")
        metrics = {name: round(value, 3) for name, value in zip(names, errors, strict=True)}
        spec = spec.model_copy(update={"metrics": metrics})
    described = Checkpoint(network=config, masks=checkpoint.masks, spec=spec)
    save_weights(options.output, network.state_dict(), described)
    print(f"{options.weights} -> {options.output}: {spec.calibration}")


def require_enough_cases(cases: Sequence[Case], options: CalibrateOptions) -> None:
    """Refuse a table with too few cases to calibrate on, or with all of them in one group.

    The cases are those of val, and with --folds those of train too.

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


# ---- The view head


def with_view_head(network: TransUNet, other: torch.nn.Module) -> TransUNet:
    """Copy a network's weights into another one, which has a view head and keeps that head's own.

    Returns:
        The other network.
    """
    assert isinstance(other, TransUNet)
    head = {key: value for key, value in other.state_dict().items() if key.startswith("view.")}
    states = network.state_dict().items()
    rest = {key: value for key, value in states if not key.startswith("view.")}
    other.load_state_dict(head | rest)  # strict: every key is there
    return other


def centre_view_score(network: TransUNet, threshold: float) -> float:
    """Shift the view head's logits so that the threshold becomes a score of 0.5; returns 0.5."""
    assert network.view is not None
    layers = reversed(network.view.judge)
    last = next(layer for layer in layers if isinstance(layer, torch.nn.Linear))
    with torch.no_grad():
        last.bias.sub_(float(np.log(threshold / (1 - threshold))))
    return 0.5


# ---- Answers to labelled cases


def predict_labelled(predictor: Predictor, cases: Sequence[Case], images: Path) -> list[CaseAnswer]:
    """What a network answers for labelled cases, in their order."""
    answers = []
    for case in tqdm(cases, "answers", leave=False):
        grey, pixel_shape = read_frame(images / case.file, case.frame)
        prediction = predictor.predict(grey, pixel_shape)
        answer = case_prediction(prediction, grey.shape, pixel_shape, predictor.spec)
        answers.append(CaseAnswer(case, prediction, answer))
    return answers


def predict_folds(
    folds: Path,
    options: CalibrateOptions,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    device: torch.device,
) -> list[CaseAnswer]:
    """What the networks of a cross-validation answer for the cases that each has not seen.

    Raises:
        CheckpointError: the networks differ from that of the weights.
    """
    answers = []
    for network, other, cases in load_folds(folds):
        if without_view_head(checkpoint.network) != without_view_head(other.network):
            raise CheckpointError(
                f"{folds} holds another network than {options.weights}: pass a run of "
                "training.folds with the recipe of the weights"
            )
        predictor = torch_predictor(network.to(device), spec, device)
        answers += predict_labelled(predictor, cases, options.images)
    return answers


# ---- Expected errors, interval and thresholds


def fit_calibration(answers: Sequence[CaseAnswer], above: int) -> Calibration:
    """The calibration that fits these answers, whose cases must not have trained the network.

    Args:
        above: number of answers that are to be doubtful for their expected error.
    """
    cases = [each.case for each in answers]
    radial, aop = case_errors([each.answer for each in answers], cases)
    errors = np.column_stack([radial, aop])
    terms = np.array([each.prediction.terms for each in answers])
    models = {name: fit_error_model(terms[:, k], errors[:, k]) for k, name in enumerate(QUANTITIES)}
    groups = [case.group or case.file for case in cases]
    ratios = aop / cross_fit_errors(terms[:, 3], aop, groups)
    expected = models["AoP"].expected(terms[:, 3])
    return Calibration(
        errors=models,
        interval=conformal_quantile(ratios, INTERVAL_LEVEL),
        error_above_deg=error_threshold(np.sort(expected)[::-1], above),
        cases=len(cases),
    )


def doubt_budget(answers: Sequence[CaseAnswer], doubted: float, has_view: bool) -> tuple[int, int]:
    """How many cases may be doubted for their expected error, and how many for their view.

    Implausible answers are doubted anyway. The two numbers share what these leave of `doubted`.
    """
    implausible = sum(bool(each.answer.reasons) for each in answers)
    allowed = max(0, int(doubted * len(answers)) - implausible)
    for_view = (allowed + 1) // 2 if has_view else 0
    return allowed - for_view, for_view


def view_threshold(scores: Floats, below: int) -> float:
    """A threshold with `below` of the ascending scores below it.

    It lies halfway to the next score, measured in logits.
    """
    inside = np.clip(scores, 1e-7, 1 - 1e-7)
    logits = np.log(inside / (1 - inside))
    middle = (logits[below - 1] + logits[below]) / 2 if below else logits[0] - 1
    return float(1 / (1 + np.exp(-middle)))


def error_threshold(errors: Floats, above: int) -> float:
    """A threshold with `above` of the descending errors above it."""
    return float(errors[: above + 1][-2:].mean()) if above else float(errors[0] * 1.01)


def fit_error_model(terms: Floats, errors: Floats) -> ErrorModel:
    """Fit the expected error: a gamma regression with logarithmic link, and a ridge.

    The fit is by reweighted least squares (McCullagh and Nelder 1989, 2.5), whose weights are all 1
    here. A term with which the error would fall is left out: doubt never makes an answer better.

    Args:
        terms: (n, 2), disagreement and spread as from `model.uncertainty.error_terms`.
        errors: (n,), not negative.
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


def cross_fit_errors(terms: Floats, errors: Floats, groups: Sequence[str]) -> Floats:
    """(n,) expected errors, each from a model that was fitted without the case's own group.

    Args:
        terms, errors: as in `fit_error_model`.
    """
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
    """The bound that a new score stays within with this probability (Vovk et al. 2005).

    It is the ceil(level (n + 1))-th smallest of n scores.

    Raises:
        ValueError: there are too few scores for this probability.
    """
    rank = int(np.ceil(level * (len(scores) + 1)))
    if rank > len(scores):
        raise ValueError(f"{len(scores)} cases are too few for an interval of {level:.0%}")
    return float(np.sort(scores)[rank - 1])


def _parse_doubted(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (share := float(text)) < 1:
            return share
    raise argparse.ArgumentTypeError(f"expected a share from 0 to below 1, got {text!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    weights = "weights to calibrate (.safetensors with .json beside it)"
    add("--weights", type=Path, required=True, metavar="FILE", help=weights)
    add("--data", type=Path, required=True, metavar="CSV", help="case table with labels and splits")
    add("--images", type=Path, required=True, metavar="DIR", help="folder of the table's images")
    output = "calibrated weights to write (.safetensors)"
    add("--output", type=Path, required=True, metavar="FILE", help=output)
    others = "folder of images of other views, and a pattern if only some of their names count"
    add("--others", nargs="+", metavar=("DIR", "PATTERN"), help=others)
    share = (
        "share of the masks' landmarks in the answer: one number, or three as 0.3,0.1,0.6 for PS1, "
        "PS2 and FH1 (default: that of the weights)"
    )
    add("--mask-share", type=parse_mask_shares, metavar="SHARE", help=share)
    folds = "run of training.folds whose answers take the place of those on val"
    add("--folds", type=Path, metavar="FOLDS", help=folds)
    doubted = "largest share of val that may be doubtful (%(default)s)"
    add("--doubted", type=_parse_doubted, default=0.02, metavar="SHARE", help=doubted)
    seed = "random seed for training the view head (%(default)s)"
    add("--seed", type=int, default=1, metavar="SEED", help=seed)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
