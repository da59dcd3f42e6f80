"""Label unlabelled images with a trained network, and keep the labels that can be trusted.

    python -m training.pseudo_label --teacher RUN --data RUN/cases.csv --images IMAGES \\
        --unlabelled DIR --accept 0.6 --output OUT
    python -m training.pseudo_label ... --rounds 3 --masks MASKS --epochs 20 --output OUT

The teacher predicts each image several times (turned, scaled, with another gamma). The median of
these predictions is the label. It is accepted if the anatomy is plausible, the peaks are sharp and
the predictions agree. The thresholds for sharpness and agreement follow from the share to accept
(--accept), or from val (--precision: the loosest thresholds at which that share of the accepted val
cases has a mean radial error within --precision-px).

OUT holds pseudo.csv (a case table whose column `source` names the teacher), rejected.csv (with the
reasons), thresholds.json and sheet.png. Next, look at the sheet, then train on the labels too:

    python -m training.fit ... --more OUT/pseudo.csv DIR

--rounds repeats labelling and training. OUT/round-1 and so on hold the files above, and in student/
what training.fit, given the recipe flags, trains on the labelled and the accepted images. A student
that errs less on val than all before it teaches the next round. Otherwise the rounds stop, so that
no student learns its own errors. rounds.csv holds the errors on val after each round, and
best.safetensors is the best student. --resume skips the steps that are finished.

Images that --data or --exclude names are left out. So are images that look like those of --exclude,
or like those of split val or test in --data. Every round validates on the val cases of --data.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from model.predictor import Provider
from training.data.case_table import (
    Case,
    CaseError,
    read_cases,
    read_table,
    write_csv,
)
from training.data.near_duplicates import DUPLICATE_CORRELATION
from training.evaluation.metrics import mean_errors
from training.evaluation.predict import predict_cases
from training.learning.checkpoint import load_weights, write_text
from training.pseudo_labels.labelling import AcceptanceRule, label_pool, load_any_predictor
from training.pseudo_labels.pool import (
    Pool,
    exclusions_of_training_table,
    find_pool,
    parse_exclusion,
)
from training.recipes import RECIPES, Recipe, add_recipe_arguments, recipe_from_arguments

ROOT = Path(__file__).resolve().parent.parent
HISTORY_COLUMNS = ("round", "accepted", "val_mre_px", "val_aop_error_deg")
# Options that may differ when a run is resumed. recipe_flags are compared one by one instead.
CHANGEABLE = ("rounds", "resume", "device", "max_minutes", "output", "recipe", "recipe_flags")

History = list[dict[str, float]]  # a row for each finished round, the first for the teacher


@dataclass(frozen=True)
class PseudoLabelOptions:
    """The command line.

    Args:
        teacher: a file of weights or an ONNX file, never a run's folder.
        exclude: further tables, perhaps with splits (TABLE:SPLIT,...), each with its images.
        duplicate_correlation: of thumbnails, from which on images look alike.
        accept, precision: the rule for the thresholds, as a share; one of them is None.
        precision_px: px at 512.
        rounds: 0 labels once.
        scratch: students start from random weights.
        max_minutes: limit of each student's training.
        recipe: of the students.
        recipe_flags: flag -> text, which make `recipe`; `recipe` (its name) is always among them.
    """

    teacher: Path
    data: Path
    images: Path
    unlabelled: Sequence[Path]
    exclude: Sequence[tuple[str, str]]
    duplicate_correlation: float
    accept: float | None
    precision: float | None
    precision_px: float
    output: Path
    rounds: int
    scratch: bool
    masks: Path | None
    max_minutes: float | None
    resume: bool
    device: Provider
    recipe: Recipe
    recipe_flags: Mapping[str, str]

    @property
    def rule(self) -> AcceptanceRule:
        """The rule for the thresholds."""
        return AcceptanceRule(self.accept, self.precision, self.precision_px)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        pseudo_label(pseudo_label_options(arguments))
    except (ValueError, OSError) as error:
        print(f"training.pseudo_label: {error}", file=sys.stderr)
        return 2
    return 0


def pseudo_label_options(arguments: Sequence[str] | None) -> PseudoLabelOptions:
    """The options that a command line asks for.

    Raises:
        ValueError: (pydantic's ValidationError) a field of the recipe does not take its value.
    """
    args = _parser().parse_args(arguments)
    recipe = recipe_from_arguments(args, RECIPES)
    values = vars(args)
    if args.teacher.is_dir():
        values["teacher"] = args.teacher / "best.safetensors"
    own = {field.name for field in fields(PseudoLabelOptions)} - {"recipe"}
    flags = {name: values.pop(name) for name in sorted(values.keys() - own)}
    return PseudoLabelOptions(**values, recipe=recipe, recipe_flags=flags)


def pseudo_label(options: PseudoLabelOptions) -> None:
    """Label once, or in rounds of labelling and training.

    Raises:
        ValueError, OSError: data, teacher or settings cannot be used, or no label is good enough.
    """
    check_student(options)
    exclusions = exclusions_of_training_table(options.data, options.images)
    exclusions += [parse_exclusion(table, Path(images)) for table, images in options.exclude]
    write_settings(options)
    pool = find_pool(options.unlabelled, exclusions, options.duplicate_correlation)
    print(f"{len(pool.candidates)} images to label, {len(pool.rejected)} left out or unreadable")
    val = [case for case in read_cases(options.data) if case.split == "val"]
    if options.rounds:
        run_rounds(options, pool, val)
    else:
        teacher, folder = options.teacher, options.output
        label_pool(teacher, options.device, pool, val, options.images, options.rule, folder)


def run_rounds(options: PseudoLabelOptions, pool: Pool, val: Sequence[Case]) -> None:
    """Label and train in turn, as long as the error on val falls."""
    teacher = options.teacher
    history = read_history(options.output)
    if not history:
        history = record_round(options, [], 0, teacher, val)
    for number in range(1, options.rounds + 1):
        folder = options.output / f"round-{number}"
        student = folder / "student" / "best.safetensors"
        if number == len(history):
            accepted = label_pool(
                teacher, options.device, pool, val, options.images, options.rule, folder
            )
            train_student(options, pool.root, folder, teacher)
            history = record_round(options, history, accepted, student, val)
        *earlier, now = [row["val_mre_px"] for row in history[: number + 1]]
        if now >= min(earlier):
            print(
                f"stopped after round {number}: val no longer improves, {now:.2f} px instead of "
                f"{min(earlier):.2f}; the best weights are {teacher}"
            )
            return
        teacher = student
        for suffix in (".json", ".safetensors"):
            shutil.copyfile(student.with_suffix(suffix), options.output / f"best{suffix}")


def train_student(options: PseudoLabelOptions, root: Path, folder: Path, teacher: Path) -> None:
    """Run training.fit in a process of its own, on the labelled and the accepted images.

    Args:
        root: folder that the files in pseudo.csv are relative to.
        folder: of the round.
    """
    run = folder / "student"
    flags = [f"--{name}={value}" for name, value in options.recipe_flags.items()]
    command: list[str | Path] = [sys.executable, "-m", "training.fit", *flags]
    command += ["--device", options.device]
    command += ["--data", options.data, "--images", options.images, "--output", run]
    command += ["--more", folder / "pseudo.csv", root]
    command += ["--masks", options.masks] if options.masks else []
    command += [] if options.scratch else ["--init", teacher]
    command += (
        ["--max-minutes", str(options.max_minutes)] if options.max_minutes is not None else []
    )
    command += ["--resume"] if (run / "checkpoint.pt").exists() else []
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise CaseError(
            f"training.fit ended with status {done.returncode} in {run}, for the reason above; "
            "--resume goes on from there"
        )


# ---- Checks before the work


def check_student(options: PseudoLabelOptions) -> None:
    """Refuse a teacher from whose weights no student of the recipe can start.

    Raises:
        CaseError: says what to pass instead.
        CheckpointError: the teacher's weights cannot be read.
    """
    if not options.rounds or options.scratch:
        return
    if options.teacher.suffix == ".onnx":
        raise CaseError("a student cannot start from an ONNX teacher: pass weights, or --scratch")
    described = load_weights(options.teacher)[1]
    if described.network != options.recipe.network:
        raise CaseError(
            f"{options.teacher} has another network than --recipe {options.recipe_flags['recipe']} "
            "with its flags: pass the recipe and flags it was trained with, or --scratch"
        )
    if options.masks and not described.masks:
        raise CaseError(
            f"{options.teacher} has no mask outputs: leave --masks out, or pass --scratch"
        )


def write_settings(options: PseudoLabelOptions) -> None:
    """Write settings.json. A run that already has labels goes on only with the same settings.

    Raises:
        CaseError: there are labels and no --resume, or the settings differ.
    """
    names = [field.name for field in fields(options) if field.name not in CHANGEABLE]
    asked = {name: str(getattr(options, name)) for name in names} | dict(options.recipe_flags)
    path = options.output / "settings.json"
    folders = options.output, options.output / "round-1"
    if any((folder / "thresholds.json").exists() for folder in folders):
        if not options.resume:
            raise CaseError(
                f"{options.output} holds pseudo-labels: pass --resume, or choose another --output"
            )
        before = json.loads(path.read_text(encoding="utf-8"))
        either = sorted(asked.keys() | before.keys())
        changed = [name for name in either if asked.get(name) != before.get(name)]
        if changed:
            raise CaseError(
                f"{options.output} was begun with other settings ({', '.join(changed)}): resume "
                "with the same ones, or choose another --output"
            )
    else:
        (options.output / "rounds.csv").unlink(missing_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asked, indent=1) + "\n")


# ---- The errors on val after each round


def read_history(output: Path) -> History:
    """The rounds that are finished; empty before the first."""
    path = output / "rounds.csv"
    rows = read_table(path).rows if path.exists() else []
    return [{name: float(row[name]) for name in HISTORY_COLUMNS} for _, row in rows]


def record_round(
    options: PseudoLabelOptions, history: History, accepted: int, model: Path, val: Sequence[Case]
) -> History:
    """Measure a model on val and add it to the history and to rounds.csv; returns the history."""
    predictor = load_any_predictor(model, options.device)
    mre_px, aop_deg = mean_errors(predict_cases(predictor, val, options.images), val)
    row = dict(zip(HISTORY_COLUMNS, (len(history), accepted, mre_px, aop_deg), strict=True))
    print(f"round {len(history)}: val {mre_px:.2f} px, AoP {aop_deg:.2f} deg ({model})")
    history = [*history, row]
    rows = [[f"{value:.10g}" for value in each.values()] for each in history]
    write_csv(options.output / "rounds.csv", HISTORY_COLUMNS, rows)
    return history


def _parse_share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.pseudo_label",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    teacher = "trained network: a run of training.fit, weights (.safetensors) or an ONNX file"
    add("--teacher", type=Path, required=True, metavar="RUN|FILE", help=teacher)
    data = "case table with the split that trained the teacher"
    add("--data", type=Path, required=True, metavar="CSV", help=data)
    add("--images", type=Path, required=True, metavar="DIR", help="folder of the table's images")
    unlabelled = "folders of images to label"
    add("--unlabelled", type=Path, nargs="+", required=True, metavar="DIR", help=unlabelled)
    exclude = (
        "further table and its images, or only those of the splits named; they are left out, with "
        "all that looks like them"
    )
    names = ("TABLE[:SPLIT,...]", "DIR")
    add("--exclude", nargs=2, action="append", default=[], metavar=names, help=exclude)
    correlation = "correlation of 32x32 thumbnails from which on images look alike (%(default)s)"
    default = DUPLICATE_CORRELATION
    add("--duplicate-correlation", type=float, default=default, metavar="R", help=correlation)
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument(
        "--accept", type=_parse_share, metavar="SHARE", help="share of the images to accept"
    )
    precision = "share of the accepted val cases whose error must be within --precision-px"
    rule.add_argument("--precision", type=_parse_share, metavar="SHARE", help=precision)
    limit = "limit for a case's mean radial error, px at 512 (%(default)s)"
    add("--precision-px", type=float, default=10.0, metavar="PX", help=limit)
    add("--output", type=Path, required=True, metavar="OUT", help="folder to write to (see above)")
    rounds = "rounds of labelling and training; 0 labels once (%(default)s)"
    add("--rounds", type=int, default=0, metavar="N", help=rounds)
    scratch = "students from random weights, not from those of their teacher"
    add("--scratch", action="store_true", help=scratch)
    masks = "folder of the masks of --images, for the students' training"
    add("--masks", type=Path, metavar="DIR", help=masks)
    minutes = "time limit for the training of each student"
    add("--max-minutes", type=float, metavar="MIN", help=minutes)
    add("--resume", action="store_true", help="go on where an earlier run into --output stopped")
    device = "processor; auto takes the GPU if there is one (%(default)s)"
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help=device)
    add_recipe_arguments(parser, RECIPES)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
