"""Label images without labels by a trained network, keep the labels to believe, train on them.

    python -m training.pseudo_label --teacher RUN --data RUN/cases.csv --images IMAGES \\
        --unlabelled DIR --accept 0.6 --output OUT             # labels; look at OUT/sheet.png
    python -m training.fit ... --more OUT/pseudo.csv DIR       # trains on them too
    python -m training.pseudo_label ... --rounds 3 --masks MASKS --epochs 20 --output OUT

Each image is predicted in several variants (turned, scaled, other gamma). Its label, their median,
is accepted where the anatomy is plausible, the peaks are sharp and the variants agree. The two
thresholds follow from the share to accept (--accept) or from val (--precision: the loosest ones at
which that share of the accepted val cases has a mean radial error within --precision-px at 512 px).

OUT holds pseudo.csv (a case table for fit --more; `source` names the teacher), rejected.csv (with
the reasons), thresholds.json and sheet.png. With --rounds these stand in OUT/round-1 and so on, and
in OUT/round-1/student what training.fit, given the recipe flags, trains on the labelled and the
accepted images. That student is the next round's teacher if it errs less on val than all before it;
else the rounds stop, lest it learn its own errors. rounds.csv has the errors on val after each
round, best.safetensors is the best student. With --resume no finished step is done again.

Images named in --data or --exclude are left out, and so is what looks like those of val, of test
and of --exclude. Every round validates on the val cases of --data.
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
from training.recipes import Recipe, add_recipe_arguments, recipe_from_arguments

HISTORY = ("round", "accepted", "val_mre_px", "val_aop_error_deg")
FREE = (  # --resume may change these; the recipe is written down by its flags
    *("rounds", "resume", "device", "max_minutes", "output"),
    *("recipe", "recipe_flags"),
)
ROOT = Path(__file__).resolve().parent.parent

History = list[dict[str, float]]


@dataclass(frozen=True)
class PseudoLabelOptions:
    """The command line.

    teacher: the file, never a run's folder. exclude: tables, perhaps with splits, and their images.
    Of accept and precision one is None. rounds: 0 labels once. recipe: the students', as
    recipe_flags (name -> text, all that were given, and the recipe's name) make it.
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    try:
        pseudo_label(read_options(arguments))
    except (ValueError, OSError) as error:
        print(f"training.pseudo_label: {error}", file=sys.stderr)
        return 2
    return 0


def read_options(arguments: Sequence[str] | None) -> PseudoLabelOptions:
    """The command line.

    Raises:
        ValueError: (pydantic's ValidationError) a field of the recipe does not take its value.
    """
    parsed = _parser().parse_args(arguments)
    recipe = recipe_from_arguments(parsed)
    given = vars(parsed)
    if parsed.teacher.is_dir():
        given["teacher"] = parsed.teacher / "best.safetensors"
    own = {field.name for field in fields(PseudoLabelOptions)} - {"recipe"}
    flags = {name: given.pop(name) for name in sorted(given.keys() - own)}
    return PseudoLabelOptions(**given, recipe=recipe, recipe_flags=flags)


def pseudo_label(options: PseudoLabelOptions) -> None:
    """Label once, or in rounds of labelling and training.

    Raises:
        ValueError, OSError: data, teacher or settings cannot be used, or no label is good enough.
    """
    check_student(options)
    apart = exclusions_of_training_table(options.data, options.images)
    apart += [parse_exclusion(table, Path(images)) for table, images in options.exclude]
    begin(options)
    pool = find_pool(options.unlabelled, apart, options.duplicate_correlation)
    print(f"{len(pool.candidates)} images to label, {len(pool.rejected)} left out or unreadable")
    val = [case for case in read_cases(options.data) if case.split == "val"]
    if options.rounds:
        alternate(options, pool, val)
    else:
        _label(options, options.teacher, pool, val, options.output)


def check_student(options: PseudoLabelOptions) -> None:
    """Refuse, before the work, a teacher from whose weights no student of the recipe can start."""
    if not options.rounds or options.scratch:
        return
    if options.teacher.suffix == ".onnx":
        raise CaseError("a student cannot start from an ONNX teacher: pass weights, or --scratch")
    described = load_weights(options.teacher)[1]
    if described.network != options.recipe.network:
        raise CaseError(
            f"{options.teacher} has another network than --recipe {options.recipe_flags['recipe']} "
            "with its flags: give those it was trained with, or --scratch"
        )
    if options.masks and not described.masks:
        raise CaseError(
            f"{options.teacher} has no mask outputs: leave --masks out, or pass --scratch"
        )


def begin(options: PseudoLabelOptions) -> None:
    """Write down the settings; a run that has labels goes on only with those it began with."""
    names = [field.name for field in fields(options) if field.name not in FREE]
    asked = {name: str(getattr(options, name)) for name in names} | dict(options.recipe_flags)
    path = options.output / "settings.json"
    folders = options.output, options.output / "round-1"
    if any((folder / "thresholds.json").exists() for folder in folders):
        if not options.resume:
            raise CaseError(
                f"{options.output} holds pseudo-labels: pass --resume, or another --output"
            )
        before = json.loads(path.read_text(encoding="utf-8"))
        either = sorted(asked.keys() | before.keys())
        changed = [name for name in either if asked.get(name) != before.get(name)]
        if changed:
            raise CaseError(
                f"{options.output} was begun with other settings ({', '.join(changed)}); resume "
                "with the same, or choose another --output"
            )
    else:
        (options.output / "rounds.csv").unlink(missing_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asked, indent=1) + "\n")


def alternate(options: PseudoLabelOptions, pool: Pool, val: Sequence[Case]) -> None:
    """Rounds of labelling and training, while val improves."""
    teacher = options.teacher
    history = _history(options.output) or _add(options, [], 0, teacher, val)
    for number in range(1, options.rounds + 1):
        folder = options.output / f"round-{number}"
        student = folder / "student" / "best.safetensors"
        if number == len(history):
            accepted = _label(options, teacher, pool, val, folder)
            train_student(options, pool.root, folder, teacher)
            history = _add(options, history, accepted, student, val)
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
    """Run training.fit, a stage of its own, on the labelled and the accepted images."""
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


def _label(
    options: PseudoLabelOptions, teacher: Path, pool: Pool, val: Sequence[Case], folder: Path
) -> int:
    rule = AcceptanceRule(options.accept, options.precision, options.precision_px)
    return label_pool(teacher, options.device, pool, val, options.images, rule, folder)


def _history(output: Path) -> History:
    """The finished rounds; the first is the teacher's."""
    path = output / "rounds.csv"
    rows = read_table(path).rows if path.exists() else []
    return [{name: float(row[name]) for name in HISTORY} for _, row in rows]


def _add(
    options: PseudoLabelOptions, history: History, accepted: int, model: Path, val: Sequence[Case]
) -> History:
    """The history with a model's errors on val, written down."""
    predictor = load_any_predictor(model, options.device)
    mre_px, aop_deg = mean_errors(predict_cases(predictor, val, options.images), val)
    row = dict(zip(HISTORY, (len(history), accepted, mre_px, aop_deg), strict=True))
    print(f"round {len(history)}: val {mre_px:.2f} px, AoP {aop_deg:.2f} deg ({model})")
    history = [*history, row]
    written = [[f"{value:.10g}" for value in each.values()] for each in history]
    write_csv(options.output / "rounds.csv", HISTORY, written)
    return history


def _share(text: str) -> float:
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
    add("--teacher", type=Path, required=True, metavar="RUN|FILE", help=".safetensors or .onnx")
    add("--data", type=Path, required=True, metavar="CSV", help="case table with the split")
    add("--images", type=Path, required=True, metavar="DIR", help="folder of its images")
    add("--unlabelled", type=Path, nargs="+", required=True, metavar="DIR", help="image folders")
    add("--exclude", nargs=2, action="append", default=[], metavar=("TABLE[:SPLIT,...]", "DIR"),
        help="further table and its images, which are left out with what looks like them; all of "
        "it, or only the splits that are named")  # fmt: skip
    add(
        "--duplicate-correlation",
        type=float,
        default=DUPLICATE_CORRELATION,
        metavar="R",
        help="images whose 32x32 thumbnails correlate so much look alike (default: %(default)s)",
    )
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--accept", type=_share, metavar="SHARE", help="share of images to accept")
    rule.add_argument(
        "--precision",
        type=_share,
        metavar="SHARE",
        help="share of the accepted val cases that must have an error within --precision-px",
    )
    add("--precision-px", type=float, default=10.0, metavar="PX", help="px at 512 (default: 10)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write to, see above")
    rounds = "rounds of labelling and training; 0 labels once (%(default)s)"
    add("--rounds", type=int, default=0, metavar="N", help=rounds)
    add(
        "--scratch",
        action="store_true",
        help="students start from random weights, not from the teacher's",
    )
    add("--masks", type=Path, metavar="DIR", help="masks of --images, handed on to fit")
    add("--max-minutes", type=float, metavar="MIN", help="limit of each student's training")
    add("--resume", action="store_true", help="go on where an earlier run into --output stopped")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add_recipe_arguments(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
