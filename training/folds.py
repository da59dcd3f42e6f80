"""Cross-validate a recipe: how it does on scans that it has not seen, of many more than val has.

    python -m training.folds --recipe compact --data cases.csv --images DIR --masks DIR \\
        --output FOLDS

The cases of train and val, never those of test, are dealt by group into --folds parts. For each
part a network is trained on all the others, to the last epoch, as training.fit --all does. It then
answers the part: no network was trained on the group of a case that it answers, nor chosen by it.
Every flag of training.fit works here too. Refused are --init, whose weights would know the cases,
and --max-minutes, which would leave a fold half trained. --start is the --init of each fold:

    python -m training.folds --recipe finish --start FOLDS ... --output FINISHED

Groups are near-duplicates of one another. With --alike 0.85 groups that look alike are dealt
together, so that each part is stranger to the network that answers it.

FOLDS/fold-0 and so on are the trainings; the part that one keeps out has split `test` in its
cases.csv. FOLDS/landmarks.csv holds the answers to all parts, to be looked at with

    python -m training.evaluate --data cases.csv --predictions FOLDS/landmarks.csv --report FILE

What is done is not done again: the same command goes on where it stopped. With --only several
machines share the work, or some parts have to do. Then train on all cases (training.fit --all), and
calibrate with --folds FOLDS.
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
from training.evaluation.predict import (
    HELD_OUT_SPLIT,
    CasePrediction,
    load_folds,
    predict_cases,
    splits_of_fold,
    torch_predictor,
)
from training.learning.checkpoint import CheckpointError, load_weights, write_text
from training.learning.trainer import FitSettings, fit, join_processes, parse_fit
from training.recipes import Recipe, mask_shares

TEACHER = "aop.onnx"  # of a fold, as export.to_onnx makes it


@dataclass(frozen=True)
class FoldsOptions:
    """A cross-validation; how each fold trains, its FitSettings and its recipe say.

    Args:
        data: case table with split and group.
        output: folder of the folds' runs.
        folds: number of parts.
        seed: random seed of the dealing, and of the trainings if `training_seed` is None.
        alike: groups whose images correlate so much or more are dealt together; None: none are.
        start: an earlier cross-validation, from whose weights each fold trains on.
        teachers: earlier cross-validations, whose exported models teach.
        mask_shares: shares of the masks in the answer to compare.
        only: numbers of the folds to train.
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
    args, of_fit = parser.parse_known_args(arguments)
    only = tuple(range(args.folds) if args.only is None else args.only)
    lists = {"only": only, "teachers": tuple(args.teachers), "mask_shares": tuple(args.mask_shares)}
    options = FoldsOptions(**{**vars(args), **lists})
    if not {*only} <= {*range(options.folds)}:
        parser.error(f"--only: expected numbers from 0 to {options.folds - 1}, got {args.only}")
    try:
        settings, recipe = _parse_of_fit(parser, options, of_fit)
        cross_validate(options, settings, recipe)
    except (CaseError, CheckpointError, ImageError, OSError) as error:
        print(f"training.folds: {error}", file=sys.stderr)
        return 2
    return 0


def _parse_of_fit(
    parser: argparse.ArgumentParser, options: FoldsOptions, of_fit: Sequence[str]
) -> tuple[FitSettings, Recipe]:
    """What the flags that only training.fit lists say, for every fold alike."""
    required = {"--data": options.data, "--images": options.images, "--output": options.output}
    flags = [str(part) for pair in required.items() for part in pair]
    try:
        settings, recipe = parse_fit([*flags, *of_fit])
    except ValueError as error:
        raise CaseError(f"a flag of training.fit is wrong: {error}") from error
    for flag, value in (("--init", settings.init), ("--max-minutes", settings.max_minutes)):
        if value is not None:
            parser.error(f"{flag} is not for cross-validation")
    return settings, recipe


def cross_validate(options: FoldsOptions, settings: FitSettings, recipe: Recipe) -> None:
    """Train the folds asked for; once all are done, write and measure their answers."""
    runs = deal_out(options)
    origins = [origin_of(options, runs[k]) for k in options.only]  # raises before hours of training
    for k, (start, teachers) in zip(options.only, origins, strict=True):
        train(options, runs[k], settings, recipe, start, teachers)
    unfinished = [run.name for run in runs if not (run / "done").exists()]
    if unfinished:
        print(f"{', '.join(unfinished)} remain; the figures come with the last")
        return
    cases, answers = answer(options)
    pairs = zip(cases, answers, strict=True)
    found = [replace(c, landmarks_px=a.landmarks_px, aop_deg=a.aop_deg) for c, a in pairs]
    write_cases(options.output / "landmarks.csv", found)
    print(format_metrics(summarise_by_device(cases, answers), [], ""))
    for share in options.mask_shares:
        mre_px, aop_deg = mean_errors(answer(options, share)[1], cases)
        shown = ",".join(f"{part:g}" for part in (share if len({*share}) > 1 else share[:1]))
        print(f"masks' share {shown}: MRE {mre_px:.2f} px, AoP error {aop_deg:.2f} deg")


def deal_out(options: FoldsOptions) -> list[Path]:
    """Write the case table of each fold asked for; returns the folders of all trainings."""
    cases = [case for case in read_cases(options.data) if case.split in ("train", "val")]
    groups: list[Hashable] = [case.group for case in cases]
    if not cases or None in groups:
        raise CaseError(
            f"{options.data}: expected cases of split train or val, each with a group; "
            "training.prepare --splits writes both"
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
            raise CaseError(f"{path} deals the cases in another way: choose another --output")
        write_cases(path, table)
    return runs


def train(
    options: FoldsOptions,
    run: Path,
    settings: FitSettings,
    recipe: Recipe,
    start: Path | None,
    teachers: Sequence[Path],
) -> None:
    """Train on what a fold does not keep out, or go on with it.

    Args:
        settings, recipe: as every fold has them.
        start, teachers: the fold's own, of `origin_of`.
    """
    seed = options.seed if options.training_seed is None else options.training_seed
    of = [*([start] if start else []), *teachers]
    origin = "".join(hashlib.sha256(file.read_bytes()).hexdigest() + "\n" for file in of)
    note = run / "origin.txt"  # what it starts from, and who teaches
    resume = (run / "checkpoint.pt").exists()
    if not ((run / "done").exists() or resume):
        write_text(note, origin)
    elif note.exists() and note.read_text(encoding="utf-8") != origin:
        raise CaseError(f"{run} has other --start or --teachers: give those, or another --output")
    if (run / "done").exists():
        known = load_weights(run / "best.safetensors")[1].spec.recipe["seed"]
        if known != seed:
            raise CaseError(f"{run} was trained with seed {known}: choose another --output")
        return
    print(f"{run.name}: training", flush=True)
    own = replace(
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
        with join_processes(own.device) as place:
            fit(own, recipe.model_copy(update={"seed": seed}), place)
    except (ValueError, OSError) as error:
        raise CaseError(f"the training in {run} failed: {error}") from error
    (run / "done").touch()


def origin_of(options: FoldsOptions, run: Path) -> tuple[Path | None, list[Path]]:
    """The weights that a fold's training starts from, and its teachers, where there are any."""
    start = _same_fold(options.start, run) / "best.safetensors" if options.start else None
    teachers = [_same_fold(one, run) / TEACHER for one in options.teachers]
    for file in teachers:
        weights = file.with_name("best.safetensors")
        if not file.is_file() or file.stat().st_mtime < weights.stat().st_mtime:
            made = "make it with python -m export.to_onnx"
            raise CaseError(f"there is no {file}, or it is older than {weights.name}: {made}")
    return start, teachers


def _same_fold(folds: Path, run: Path) -> Path:
    """This fold of another cross-validation, which must keep out the same cases."""
    other = folds / run.name
    if not (other / "done").exists() or splits_of_fold(other) != splits_of_fold(run):
        raise CaseError(f"{other} is not done, or keeps out other cases than {run}")
    return other


def answer(
    options: FoldsOptions, share: MaskShares | None = None
) -> tuple[list[Case], list[CasePrediction]]:
    """Every case, and what the network that has not seen it answers.

    Args:
        share: of the masks in the answer; by default the networks' own.
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


def _several(text: str) -> int:
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
    add("--data", type=Path, required=True, help="case table with split and group (CSV)")
    add("--images", type=Path, required=True, help="folder of its images")
    add("--masks", type=Path, help="folder of masks: an auxiliary target")
    add("--output", type=Path, required=True, metavar="FOLDS", help="folder of the folds' runs")
    add("--folds", type=_several, default=4, metavar="N", help="parts (%(default)s)")
    add("--seed", type=int, default=1, help="random seed for dealing and training (%(default)s)")
    alike = "deal groups together whose images correlate by R or more, for stranger scans"
    add("--alike", type=float, metavar="R", help=alike)
    other = "another seed for training: other networks of the same parts, for training.join"
    add("--training-seed", type=int, metavar="SEED", help=other)
    start = "an earlier cross-validation of the same parts, where each fold starts from"
    add("--start", type=Path, metavar="FOLDS", help=start)
    teachers = f"earlier ones: the {TEACHER} that export.to_onnx made in each fold teaches there"
    add("--teachers", type=Path, nargs="+", default=[], metavar="FOLDS", help=teachers)
    only = "folds to train here (0 is the first), while others train elsewhere"
    shares = "shares of the masks in the answer to compare, such as 0 0.5 0.3,0.1,0.6"
    add("--mask-shares", type=mask_shares, nargs="+", default=[], metavar="SHARE", help=shares)
    add("--only", type=int, nargs="+", metavar="K", help=only)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
