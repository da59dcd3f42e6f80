"""Label images without labels by a trained network, keep the labels to believe, train on them.

    python -m training.pseudo_label --teacher RUN --data RUN/cases.csv --images IMAGES \\
        --unlabelled DIR --accept 0.6 --output OUT             # labels; look at OUT/sheet.png
    python -m training.fit ... --more OUT/pseudo.csv DIR       # trains on them too
    python -m training.pseudo_label ... --rounds 3 --masks MASKS --epochs 20 --output OUT

Each image is predicted in several views (turned, scaled, other gamma). Its label, their median, is
accepted where the anatomy is plausible, the peaks are sharp and the views agree. The two thresholds
follow from the share to accept (--accept) or from val (--precision: the loosest ones at which that
share of the accepted val cases has a mean radial error within --precision-px at 512 px).

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
from collections.abc import Sequence
from pathlib import Path

from training.cases import Case, CaseError, read_cases, read_table, write_rows
from training.checkpoint import load_weights, write_text
from training.groups import DUPLICATE_CORRELATION
from training.labelling import Rule, label, load_teacher
from training.metrics import mean_errors
from training.pool import Pool, excluded, find_pool, labelled_apart
from training.predict import predict_cases
from training.recipes import Recipe, add_recipe_arguments, recipe_from_arguments

HISTORY = ("round", "accepted", "val_mre_px", "val_aop_error_deg")
FREE = ("rounds", "resume", "device", "max_minutes", "output")  # --resume may change them
ROOT = Path(__file__).resolve().parent.parent

History = list[dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(arguments)
    try:
        pseudo_label(args, _recipe_flags(arguments))
    except (ValueError, OSError) as error:
        print(f"training.pseudo_label: {error}", file=sys.stderr)
        return 2
    return 0


def pseudo_label(args: argparse.Namespace, recipe_flags: Sequence[str]) -> None:
    """Label once, or in rounds of labelling and training."""
    args.teacher = args.teacher / "best.safetensors" if args.teacher.is_dir() else args.teacher
    check_student(args, recipe_from_arguments(args))
    apart = labelled_apart(args.data, args.images)
    apart += [excluded(table, Path(images)) for table, images in args.exclude]
    begin(args)
    pool = find_pool(args.unlabelled, apart, args.duplicate_correlation)
    print(f"{len(pool.candidates)} images to label, {len(pool.rejected)} left out or unreadable")
    val = [case for case in read_cases(args.data) if case.split == "val"]
    if args.rounds:
        alternate(args, recipe_flags, pool, val)
    else:
        _label(args, args.teacher, pool, val, args.output)


def check_student(args: argparse.Namespace, recipe: Recipe) -> None:
    """Refuse, before the work, a teacher from whose weights no student of the recipe can start."""
    if not args.rounds or args.scratch:
        return
    if args.teacher.suffix == ".onnx":
        raise CaseError("a student cannot start from an ONNX teacher: pass weights, or --scratch")
    described = load_weights(args.teacher)[1]
    if described.network != recipe.network:
        raise CaseError(
            f"{args.teacher} is of another network than --recipe {args.recipe} with its flags: "
            "give those it was trained with, or --scratch"
        )
    if args.masks and not described.masks:
        raise CaseError(f"{args.teacher} has no mask outputs: leave --masks out, or pass --scratch")


def begin(args: argparse.Namespace) -> None:
    """Write down what is asked; what has been labelled is gone on with only as it was begun."""
    asked = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    path = args.output / "settings.json"
    folders = args.output, args.output / "round-1"
    if any((folder / "thresholds.json").exists() for folder in folders):
        if not args.resume:
            raise CaseError(
                f"{args.output} holds pseudo-labels: pass --resume, or another --output"
            )
        before = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(asked.keys() | before.keys())
        changed = [name for name in names if asked.get(name) != before.get(name)]
        if changed:
            raise CaseError(
                f"{args.output} was begun with other settings ({', '.join(changed)}); resume with "
                "the same, or choose another --output"
            )
    else:
        (args.output / "rounds.csv").unlink(missing_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asked, indent=1) + "\n")


def alternate(
    args: argparse.Namespace, recipe_flags: Sequence[str], pool: Pool, val: Sequence[Case]
) -> None:
    """Rounds of labelling and training, while val improves."""
    teacher = args.teacher
    history = _history(args.output) or _add(args, [], 0, teacher, val)
    for number in range(1, args.rounds + 1):
        folder = args.output / f"round-{number}"
        student = folder / "student" / "best.safetensors"
        if number == len(history):
            accepted = _label(args, teacher, pool, val, folder)
            train_student(args, recipe_flags, pool.root, folder, teacher)
            history = _add(args, history, accepted, student, val)
        *earlier, now = [row["val_mre_px"] for row in history[: number + 1]]
        if now >= min(earlier):
            print(
                f"stopped after round {number}: val no longer improves, {now:.2f} px instead of "
                f"{min(earlier):.2f}; the best weights are {teacher}"
            )
            return
        teacher = student
        for suffix in (".json", ".safetensors"):
            shutil.copyfile(student.with_suffix(suffix), args.output / f"best{suffix}")


def train_student(
    args: argparse.Namespace,
    recipe_flags: Sequence[str],
    root: Path,
    folder: Path,
    teacher: Path,
) -> None:
    """Run training.fit, a stage of its own, on the labelled and the accepted images."""
    run = folder / "student"
    command = [sys.executable, "-m", "training.fit", *recipe_flags, "--device", args.device]
    command += ["--data", args.data, "--images", args.images, "--output", run]
    command += ["--more", folder / "pseudo.csv", root]
    command += ["--masks", args.masks] if args.masks else []
    command += [] if args.scratch else ["--init", teacher]
    command += ["--max-minutes", str(args.max_minutes)] if args.max_minutes is not None else []
    command += ["--resume"] if (run / "checkpoint.pt").exists() else []
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise CaseError(
            f"training.fit ended with status {done.returncode} in {run}, for the reason above; "
            "--resume goes on from there"
        )


def _label(
    args: argparse.Namespace, teacher: Path, pool: Pool, val: Sequence[Case], folder: Path
) -> int:
    rule = Rule(args.accept, args.precision, args.precision_px)
    return label(teacher, args.device, pool, val, args.images, rule, folder)


def _history(output: Path) -> History:
    """The rounds that are finished, the first being the teacher's."""
    path = output / "rounds.csv"
    rows = read_table(path).rows if path.exists() else []
    return [{name: float(row[name]) for name in HISTORY} for _, row in rows]


def _add(
    args: argparse.Namespace, history: History, accepted: int, model: Path, val: Sequence[Case]
) -> History:
    """The history with a model's errors on val, written down."""
    predictor = load_teacher(model, args.device)
    mre_px, aop_deg = mean_errors(predict_cases(predictor, val, args.images), val)
    row = dict(zip(HISTORY, (len(history), accepted, mre_px, aop_deg), strict=True))
    print(f"round {len(history)}: val {mre_px:.2f} px, AoP {aop_deg:.2f} deg ({model})")
    history = [*history, row]
    written = [[f"{value:.10g}" for value in each.values()] for each in history]
    write_rows(args.output / "rounds.csv", HISTORY, written)
    return history


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, got {text}")
    return value


def _recipe_flags(arguments: Sequence[str] | None) -> list[str]:
    """The recipe's flags among the arguments, to hand on."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_recipe_arguments(parser)
    given, _ = parser.parse_known_args(arguments)
    return [f"--{name}={value}" for name, value in vars(given).items()]


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
        help="a further table and its images, to be left out with what looks like them; of the "
        "splits named, else all of it")  # fmt: skip
    add(
        "--duplicate-correlation",
        type=float,
        default=DUPLICATE_CORRELATION,
        metavar="R",
        help="images whose 32x32 thumbnails correlate so much look alike (default: %(default)s)",
    )
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--accept", type=_share, metavar="SHARE", help="of the images to accept")
    rule.add_argument(
        "--precision",
        type=_share,
        metavar="SHARE",
        help="of the accepted val cases that shall have an error within --precision-px",
    )
    add("--precision-px", type=float, default=10.0, metavar="PX", help="at 512 (default: 10)")
    add("--output", type=Path, required=True, metavar="DIR", help="see above")
    add("--rounds", type=int, default=0, metavar="N", help="label and train so often; 0: label")
    add(
        "--scratch",
        action="store_true",
        help="students start from random weights, not from the teacher's",
    )
    add("--masks", type=Path, metavar="DIR", help="masks of --images, handed on to fit")
    add("--max-minutes", type=float, metavar="MIN", help="of each student's training")
    add("--resume", action="store_true", help="go on where an earlier run into --output stopped")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add_recipe_arguments(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
