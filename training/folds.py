"""Cross-validate a recipe: how it does on scans that it has not seen, of many more than val has.

    python -m training.folds --recipe compact --data cases.csv --images DIR --masks DIR \\
        --output FOLDS

The cases of train and val, never those of test, are dealt by group into --folds parts. For each
part training.fit trains a network on all the others, to the last epoch, and it answers the part:
each answer is of a network that neither was trained on the case's group nor chosen by it. Flags
that are not listed below go to training.fit, but for --init (its weights would know the cases) and
--max-minutes (it would leave a fold half trained). --start is the --init of each fold:

    python -m training.folds --recipe finish --start FOLDS ... --output FINISHED

Groups are near-duplicates of one another. With --alike 0.85 groups that look alike are dealt
together, so that each part is stranger to the network that answers it.

FOLDS/fold-0 and so on are the trainings; the part that one keeps out has split `test` in its
cases.csv. FOLDS/landmarks.csv holds the answers to all parts, to be looked at with

    python -m training.evaluate --data cases.csv --predictions FOLDS/landmarks.csv --report FILE

What is done is not done again: the same command goes on where it stopped, and --only lets several
share the work, or is content with some parts for want of time. Then train on all cases
(training.fit --all), and calibrate with --folds FOLDS.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from model.image import ImageError
from model.spec import MaskShares
from training import fit
from training.cases import Case, CaseError, read_cases, write_cases
from training.checkpoint import Checkpoint, CheckpointError, load_weights, write_text
from training.data import read_grey
from training.groups import clusters, deal
from training.metrics import as_text, evaluate, mean_errors
from training.predict import CasePrediction, predict_cases, torch_predictor

KEPT_OUT = "test"  # the split that training.fit never reads
TEACHER = "aop.onnx"  # of a fold, as export.to_onnx makes it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = _parser()
    args, of_fit = parser.parse_known_args(arguments)
    given = {flag.split("=")[0] for flag in of_fit}
    if refused := given & {"--init", "--max-minutes"}:
        parser.error(f"{min(refused)} is not for cross-validation")
    args.only = range(args.folds) if args.only is None else args.only
    if not {*args.only} <= {*range(args.folds)}:
        parser.error(f"--only: expected numbers from 0 to {args.folds - 1}, got {args.only}")
    try:
        runs = deal_out(args)
        given = [given_to(args, runs[k]) for k in args.only]  # raises before hours of training
        for k, (start, teachers) in zip(args.only, given, strict=True):
            train(args, runs[k], of_fit, start, teachers)
        unfinished = [run.name for run in runs if not (run / "done").exists()]
        if unfinished:
            print(f"{', '.join(unfinished)} remain; the figures come with the last")
            return 0
        cases, answers = answer(args)
        pairs = zip(cases, answers, strict=True)
        found = [replace(c, landmarks_px=a.landmarks_px, aop_deg=a.aop_deg) for c, a in pairs]
        write_cases(args.output / "landmarks.csv", found)
        print(as_text(evaluate(cases, answers), [], ""))
        for share in args.mask_shares:
            mre_px, aop_deg = mean_errors(answer(args, share)[1], cases)
            shown = ",".join(f"{part:g}" for part in (share if len({*share}) > 1 else share[:1]))
            print(f"masks' share {shown}: MRE {mre_px:.2f} px, AoP error {aop_deg:.2f} deg")
    except (CaseError, CheckpointError, ImageError, OSError) as error:
        print(f"training.folds: {error}", file=sys.stderr)
        return 2
    return 0


def deal_out(args: argparse.Namespace) -> list[Path]:
    """Write the case table of each fold asked for; returns the folders of all trainings."""
    cases = [case for case in read_cases(args.data) if case.split in ("train", "val")]
    groups = [case.group for case in cases]
    if not cases or None in groups:
        raise CaseError(
            f"{args.data}: expected cases of split train or val, each with a group; "
            "training.prepare --splits writes both"
        )
    if args.alike is not None:
        images = (read_grey(args.images / case.file, case.frame)[0] for case in cases)
        groups = clusters(images, groups, args.alike)
    parts = deal(groups, [1 / args.folds] * args.folds, args.seed)
    runs = [args.output / f"fold-{k}" for k in range(args.folds)]
    for k in args.only:
        run = runs[k]
        run.mkdir(parents=True, exist_ok=True)
        table = [
            replace(case, split=KEPT_OUT if part == k else "train")
            for case, part in zip(cases, parts, strict=True)
        ]
        path = run / "cases.csv"
        if path.exists() and dealt(run) != [(case.file, case.split) for case in table]:
            raise CaseError(f"{path} deals the cases in another way: choose another --output")
        write_cases(path, table)
    return runs


def dealt(run: Path) -> list[tuple[str, str | None]]:
    """Each case's file and split in a fold's folder."""
    return [(case.file, case.split) for case in read_cases(run / "cases.csv")]


def train(
    args: argparse.Namespace,
    run: Path,
    of_fit: Sequence[str],
    start: Path | None,
    teachers: Sequence[Path],
) -> None:
    """Run training.fit on what a fold does not keep out, or go on with it."""
    seed = args.seed if args.training_seed is None else args.training_seed
    of = [*([start] if start else []), *teachers]
    origin = "".join(hashlib.sha256(file.read_bytes()).hexdigest() + "\n" for file in of)
    note = run / "origin.txt"  # what it starts from, and who teaches
    if not ((run / "done").exists() or (run / "checkpoint.pt").exists()):
        write_text(note, origin)
    elif note.exists() and note.read_text(encoding="utf-8") != origin:
        raise CaseError(f"{run} has other --start or --teachers: give those, or another --output")
    if (run / "done").exists():
        known = load_weights(run / "best.safetensors")[1].spec.recipe["seed"]
        if known != seed:
            raise CaseError(f"{run} was trained with seed {known}: choose another --output")
        return
    print(f"{run.name}: training", flush=True)
    places = {"--data": run / "cases.csv", "--images": args.images, "--output": run}
    places |= {"--masks": args.masks} if args.masks else {}
    flags = [str(part) for pair in places.items() for part in pair]
    if teachers:
        flags += ["--teachers", *map(str, teachers)]
    if (run / "checkpoint.pt").exists():
        flags += ["--resume"]
    elif start:
        flags += ["--init", str(start)]
    if fit.main([*flags, "--all", "--seed", str(seed), *of_fit]):
        raise CaseError(f"training.fit failed in {run}, for the reason above")
    (run / "done").touch()


def given_to(args: argparse.Namespace, run: Path) -> tuple[Path | None, list[Path]]:
    """The weights that a fold's training starts from, and its teachers, where there are any."""
    start = _same(args.start, run) / "best.safetensors" if args.start else None
    teachers = [_same(one, run) / TEACHER for one in args.teachers]
    for file in teachers:
        weights = file.with_name("best.safetensors")
        if not file.is_file() or file.stat().st_mtime < weights.stat().st_mtime:
            made = "make it with python -m export.to_onnx"
            raise CaseError(f"there is no {file}, or it is older than {weights.name}: {made}")
    return start, teachers


def _same(folds: Path, run: Path) -> Path:
    """This fold of another cross-validation, which must keep out the same cases."""
    other = folds / run.name
    if not (other / "done").exists() or dealt(other) != dealt(run):
        raise CaseError(f"{other} is not done, or keeps out other cases than {run}")
    return other


def finished(folds: Path) -> list[Path]:
    """The folders of the trainings.

    Raises:
        CaseError: no fold is there, or one is not done.
    """
    runs = sorted(folds.glob("fold-*"))
    if not runs or not all((run / "done").exists() for run in runs):
        raise CaseError(f"{folds} holds no finished folds: run training.folds --output {folds}")
    return runs


def kept_out(folds: Path) -> Iterator[tuple[nn.Module, Checkpoint, list[Case]]]:
    """Each fold's network, and the cases that it has not seen; CaseError as `finished`."""
    for run in finished(folds):
        cases = [case for case in read_cases(run / "cases.csv") if case.split == KEPT_OUT]
        yield *load_weights(run / "best.safetensors"), cases


def answer(
    args: argparse.Namespace, share: MaskShares | None = None
) -> tuple[list[Case], list[CasePrediction]]:
    """Every case, and what the network that has not seen it answers.

    Args:
        share: of the masks in the answer; by default the networks' own.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    all_cases, answers = [], []
    for network, checkpoint, cases in kept_out(args.output):
        spec = checkpoint.spec
        spec = spec if share is None else spec.model_copy(update={"mask_share": share})
        predictor = torch_predictor(network.to(device), spec, device)
        all_cases += cases
        answers += predict_cases(predictor, cases, args.images)
    return all_cases, answers


def mask_shares(text: str) -> MaskShares:
    """A command line's share of the masks: one for all landmarks, or three with commas between."""
    parts = text.split(",")
    try:
        return TypeAdapter(MaskShares).validate_python(parts * 3 if len(parts) == 1 else parts)
    except ValidationError as error:
        expected = "a share of 0 to 1, or three as 0.3,0.1,0.6 for PS1, PS2 and FH1"
        raise argparse.ArgumentTypeError(f"expected {expected}; got {text!r}") from error


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
    add("--masks", type=Path, help="folder of masks, handed on to fit")
    add("--output", type=Path, required=True, metavar="FOLDS", help="folder of the folds' runs")
    add("--folds", type=_several, default=4, metavar="N", help="parts (%(default)s)")
    add("--seed", type=int, default=1, help="of the dealing, and of the trainings (%(default)s)")
    alike = "deal groups together whose images correlate so much or more: stranger scans"
    add("--alike", type=float, metavar="R", help=alike)
    other = (
        "of the trainings alone: other networks for the same parts, to be joined (training.join)"
    )
    add("--training-seed", type=int, metavar="SEED", help=other)
    start = "of an earlier cross-validation with the same parts: each fold trains on from there"
    add("--start", type=Path, metavar="FOLDS", help=start)
    teachers = (
        f"of earlier ones: in each fold, the {TEACHER} that export.to_onnx made there teaches"
    )
    add("--teachers", type=Path, nargs="+", default=[], metavar="FOLDS", help=teachers)
    only = "train these folds alone (0 is the first), while others train elsewhere"
    shares = "shares of the masks in the answer to compare, such as 0 0.5 0.3,0.1,0.6"
    add("--mask-shares", type=mask_shares, nargs="+", default=[], metavar="SHARE", help=shares)
    add("--only", type=int, nargs="+", metavar="K", help=only)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
