"""Cross-validate a recipe: measure it on many more unseen cases than split val has.

    python -m training.folds --recipe compact --data cases.csv --images DIR --masks DIR \\
        --output FOLDS
    python -m training.folds --recipe finish --start FOLDS ... --output FINISHED

The cases of train and val, never those of test, are assigned to --folds parts, whole groups at a
time. For each part a network is trained on all the others, to the last epoch, as training.fit --all
does. It then answers the cases of its part. So no case is answered by a network that its group has
trained or helped to choose.

Every flag of training.fit works here too, but for two. --init is refused because its weights would
know the cases: --start gives each fold its own. --max-minutes is refused because it would leave a
fold half trained. Groups hold near-duplicates. With --alike 0.85 groups that look alike also stay
together, so that the cases of a part are less like those that its network was trained on.

FOLDS holds the trainings (fold-0 and so on; the part that one keeps out has split `test` in its
cases.csv) and landmarks.csv, the answers to all cases. Finished work is not repeated: the same
command goes on where it stopped. With --only, several computers can share the folds.

Next, look at the answers, train on all cases, and calibrate those weights with the folds:

    python -m training.evaluate --data cases.csv --predictions FOLDS/landmarks.csv --report FILE
    python -m training.fit --all ... --output RUN
    python -m training.calibrate --weights RUN/best.safetensors --folds FOLDS ...
"""

import argparse
import hashlib
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.images.source import ImageError
from model.spec import MaskShares
from training.data.case_table import Case, CaseError, read_cases, write_cases
from training.data.dataset import read_frame
from training.data.near_duplicates import assign_parts, cluster_groups
from training.evaluation.metrics import format_metrics, mean_errors, summarise_by_device
from training.evaluation.predict import CasePrediction, predict_cases, torch_predictor
from training.learning.checkpoint import (
    HELD_OUT_SPLIT,
    CheckpointError,
    load_folds,
    load_weights,
    splits_of_fold,
    write_text,
)
from training.learning.trainer import FitSettings, fit, join_processes, parse_fit
from training.recipes import Recipe, parse_mask_shares

TEACHER = "aop.onnx"  # file in a fold's folder, written by export.to_onnx


@dataclass(frozen=True)
class FoldsOptions:
    """A cross-validation. How each fold trains, its FitSettings and its recipe say.

    Args:
        data: case table with split and group.
        output: folder of the folds' runs.
        folds: number of parts.
        seed: random seed for fold assignment, and for training if `training_seed` is None.
        alike: correlation from which on groups of similar images stay together; None: never.
        start: an earlier cross-validation, from whose weights each fold trains on.
        teachers: earlier cross-validations, whose exported models teach.
        mask_shares: shares of the masks in the answer to compare.
        only: numbers of the folds to train, from 0.
    """

    data: Path
    images: Path
    output: Path
    folds: int
    seed: int
    only: tuple[int, ...]
    masks: Path | None = None
    alike: float | None = None
    training_seed: int | None = None
    start: Path | None = None
    teachers: tuple[Path, ...] = ()
    mask_shares: tuple[MaskShares, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = _parser()
    args, fit_flags = parser.parse_known_args(arguments)
    only = tuple(range(args.folds) if args.only is None else args.only)
    lists = {"only": only, "teachers": tuple(args.teachers), "mask_shares": tuple(args.mask_shares)}
    options = FoldsOptions(**{**vars(args), **lists})
    if not {*only} <= {*range(options.folds)}:
        parser.error(f"--only: expected numbers from 0 to {options.folds - 1}, got {args.only}")
    try:
        settings, recipe = parse_fit_flags(parser, options, fit_flags)
        cross_validate(options, settings, recipe)
    except (CaseError, CheckpointError, ImageError, OSError) as error:
        print(f"training.folds: {error}", file=sys.stderr)
        return 2
    return 0


def parse_fit_flags(
    parser: argparse.ArgumentParser, options: FoldsOptions, fit_flags: Sequence[str]
) -> tuple[FitSettings, Recipe]:
    """The settings and the recipe that all folds share, from the flags of training.fit.

    Raises:
        CaseError: a field of the recipe does not take its value.
        SystemExit: argparse's, for an unknown flag, --init or --max-minutes.
    """
    required = {"--data": options.data, "--images": options.images, "--output": options.output}
    flags = [str(part) for pair in required.items() for part in pair]
    try:
        settings, recipe = parse_fit([*flags, *fit_flags])
    except ValueError as error:
        raise CaseError(f"a flag of training.fit is wrong: {error}") from error
    for flag, value in (("--init", settings.init), ("--max-minutes", settings.max_minutes)):
        if value is not None:
            parser.error(f"{flag} is not for cross-validation")
    return settings, recipe


def cross_validate(options: FoldsOptions, settings: FitSettings, recipe: Recipe) -> None:
    """Train the chosen folds. Once all folds are done, write and measure their answers."""
    runs = assign_folds(options)
    origins = [
        find_origin(options, runs[k]) for k in options.only
    ]  # fails before hours of training
    for k, (start, teachers) in zip(options.only, origins, strict=True):
        train_fold(options, runs[k], settings, recipe, start, teachers)
    unfinished = [run.name for run in runs if not (run / "done").exists()]
    if unfinished:
        print(f"{', '.join(unfinished)} remain; the figures come with the last")
        return
    cases, answers = predict_kept_out(options)
    answered_cases = [
        replace(case, landmarks_px=answer.landmarks_px, aop_deg=answer.aop_deg)
        for case, answer in zip(cases, answers, strict=True)
    ]
    write_cases(options.output / "landmarks.csv", answered_cases)
    print(format_metrics(summarise_by_device(cases, answers), [], ""))
    for share in options.mask_shares:
        mre_px, aop_deg = mean_errors(predict_kept_out(options, share)[1], cases)
        shown = ",".join(f"{part:g}" for part in (share if len({*share}) > 1 else share[:1]))
        print(f"masks' share {shown}: MRE {mre_px:.2f} px, AoP error {aop_deg:.2f} deg")


def assign_folds(options: FoldsOptions) -> list[Path]:
    """Write the case table of each chosen fold; returns the folders of all folds.

    Raises:
        CaseError: a case has no group, or a folder holds another assignment.
    """
    cases = [case for case in read_cases(options.data) if case.split in ("train", "val")]
    groups: list[Hashable] = [case.group for case in cases]
    if not cases or None in groups:
        raise CaseError(
            f"{options.data}: expected cases of split train or val, each with a group; "
            "training.prepare --split writes both"
        )
    if options.alike is not None:
        images = (read_frame(options.images / case.file, case.frame)[0] for case in cases)
        groups = [*cluster_groups(images, groups, options.alike)]
    parts = assign_parts(groups, [1 / options.folds] * options.folds, options.seed)
    runs = [options.output / f"fold-{k}" for k in range(options.folds)]
    for k in options.only:
        run = runs[k]
        run.mkdir(parents=True, exist_ok=True)
        table = [
            replace(case, split=HELD_OUT_SPLIT if part == k else "train")
            for case, part in zip(cases, parts, strict=True)
        ]
        path = run / "cases.csv"
        if path.exists() and splits_of_fold(run) != [(case.file, case.split) for case in table]:
            raise CaseError(
                f"{path} assigns the cases in another way: pass the flags of that run, or choose "
                "another --output"
            )
        write_cases(path, table)
    return runs


def find_origin(options: FoldsOptions, run: Path) -> tuple[Path | None, list[Path]]:
    """The weights from which a fold's training starts (or None), and its teachers' files.

    Raises:
        CaseError: an earlier fold keeps out other cases, or its exported model is missing or old.
    """
    start = matching_fold(options.start, run) / "best.safetensors" if options.start else None
    teachers = [matching_fold(folds, run) / TEACHER for folds in options.teachers]
    for file in teachers:
        weights = file.with_name("best.safetensors")
        if not file.is_file() or file.stat().st_mtime < weights.stat().st_mtime:
            raise CaseError(
                f"{file} is missing or older than {weights.name}: make it with "
                "python -m export.to_onnx"
            )
    return start, teachers


def matching_fold(folds: Path, run: Path) -> Path:
    """The fold of the same number in another cross-validation.

    Raises:
        CaseError: it is not done, or keeps out other cases.
    """
    other = folds / run.name
    if not (other / "done").exists() or splits_of_fold(other) != splits_of_fold(run):
        raise CaseError(f"{other} is not done, or keeps out other cases than {run}")
    return other


def train_fold(
    options: FoldsOptions,
    run: Path,
    settings: FitSettings,
    recipe: Recipe,
    start: Path | None,
    teachers: Sequence[Path],
) -> None:
    """Train on the cases that a fold does not keep out, or go on with that training.

    Args:
        settings, recipe: what all folds share.
        start, teachers: the fold's own, from `find_origin`.

    Raises:
        CaseError: the run began with other files or another seed, or the training failed.
    """
    seed = options.seed if options.training_seed is None else options.training_seed
    files = [*([start] if start else []), *teachers]
    origin = "".join(hashlib.sha256(file.read_bytes()).hexdigest() + "\n" for file in files)
    note = run / "origin.txt"  # digests of the weights that it starts from and of its teachers
    resume = (run / "checkpoint.pt").exists()
    if not ((run / "done").exists() or resume):
        write_text(note, origin)
    elif note.exists() and note.read_text(encoding="utf-8") != origin:
        raise CaseError(
            f"{run} has other --start or --teachers: pass those, or choose another --output"
        )
    if (run / "done").exists():
        known = load_weights(run / "best.safetensors")[1].spec.recipe["seed"]
        if known != seed:
            raise CaseError(f"{run} was trained with seed {known}: choose another --output")
        return
    print(f"{run.name}: training", flush=True)
    fold_settings = replace(
        settings,
        data=run / "cases.csv",
        images=options.images,
        masks=options.masks,
        output=run,
        init=None if resume else start,
        teachers=tuple(teachers),
        all=True,
        resume=resume,
    )
    try:
        with join_processes(fold_settings.device) as place:
            fit(fold_settings, recipe.model_copy(update={"seed": seed}), place)
    except (ValueError, OSError) as error:
        raise CaseError(f"the training in {run} failed: {error}") from error
    (run / "done").touch()


def predict_kept_out(
    options: FoldsOptions, share: MaskShares | None = None
) -> tuple[list[Case], list[CasePrediction]]:
    """Every case, and the answer of the network that has not seen it.

    Args:
        share: of the masks in the answer; None takes the networks' own.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    all_cases: list[Case] = []
    answers: list[CasePrediction] = []
    for network, checkpoint, cases in load_folds(options.output):
        spec = checkpoint.spec
        spec = spec if share is None else spec.model_copy(update={"mask_share": share})
        predictor = torch_predictor(network.to(device), spec, device)
        all_cases += cases
        answers += predict_cases(predictor, cases, options.images)
    return all_cases, answers


def _parse_fold_count(text: str) -> int:
    if text.isdecimal() and int(text) > 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected 2 or more, got {text!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.folds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    data = "case table with split and group"
    add("--data", type=Path, required=True, metavar="CSV", help=data)
    add("--images", type=Path, required=True, metavar="DIR", help="folder of the table's images")
    masks = "folder of the images' masks, which become an auxiliary target"
    add("--masks", type=Path, metavar="DIR", help=masks)
    output = "folder that the folds are written to"
    add("--output", type=Path, required=True, metavar="FOLDS", help=output)
    add(
        "--folds",
        type=_parse_fold_count,
        default=4,
        metavar="N",
        help="number of parts (%(default)s)",
    )
    seed = "random seed for fold assignment and training (%(default)s)"
    add("--seed", type=int, default=1, metavar="SEED", help=seed)
    training_seed = (
        "random seed for training alone: gives other networks of the same parts, for training.join"
    )
    add("--training-seed", type=int, metavar="SEED", help=training_seed)
    alike = "correlation (such as 0.85) from which on groups of similar images stay together"
    add("--alike", type=float, metavar="R", help=alike)
    start = "earlier cross-validation of the same parts, from whose weights each fold trains on"
    add("--start", type=Path, metavar="FOLDS", help=start)
    teachers = (
        f"earlier cross-validations of the same parts; in each fold its {TEACHER}, made by "
        "export.to_onnx, teaches"
    )
    add("--teachers", type=Path, nargs="+", default=[], metavar="FOLDS", help=teachers)
    shares = "shares of the masks in the answer to compare, such as 0 0.5 0.3,0.1,0.6"
    add(
        "--mask-shares",
        type=parse_mask_shares,
        nargs="+",
        default=[],
        metavar="SHARE",
        help=shares,
    )
    only = "folds to train here (0 is the first) while others train elsewhere (default: all)"
    add("--only", type=int, nargs="+", metavar="K", help=only)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
