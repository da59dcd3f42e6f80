"""The paper's Table 2 on real images: what each part of the method gives, row by row.

    python -m training.ablate --psfhs PSFHS --hc18 HC18 --output RUNS
    python -m training.ablate ... --output RUNS --scale paper --device cuda
    python -m training.ablate ... --output RUNS --table-only

From split `train`: 300 labelled images of device A; all others of it (A and B) and the images of
hc18 (not its test_*) without labels. Val chooses the best epoch, on device A alone, as if nobody
had labelled B. Each row adds one part to the row above and is measured on split `test`. Every
training of a scale takes the same number of steps, so that a row with more images does not train
for longer.

RUNS/results holds one JSON a row and seed; what is there is not run again, so that the command goes
on where it stopped. Then it writes RUNS/table.md, table.csv, plot.png and heatmaps.png (the same
easy and hard val images in every row, as in the paper's Figure 2; images, not to be passed on).
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.ablation import ROWS, SCALES, Scale, write_report
from training.cases import CaseError, read_cases, write_cases

LABELLED = 300
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Task:
    """One command, and the tasks that must be done before it; `done` is what it leaves."""

    name: str
    command: list[str]
    done: Path
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Data:
    """Where the ablation's data lie."""

    cases: Path  # labelled train images, and val of device A
    everything: Path  # the whole table
    images: Path
    unlabelled: Path
    labelled: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(arguments)
    try:
        scale = SCALES[args.scale]
        data = prepare(args)
        if not args.table_only:
            tasks = [pretraining(args, scale, data)]
            tasks += [task for seed in args.seeds for task in plan(args, scale, data, seed)]
            failed = carry_out(tasks, args.jobs)
            if failed:
                raise CaseError(f"{', '.join(failed)} failed: see RUNS/logs, mend it, run again")
        text = write_report(args.output, args.scale, data.images, data.everything)
        print(text)
    except (CaseError, OSError) as error:
        print(f"training.ablate: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(args: argparse.Namespace) -> Data:
    """Write the case table of the labelled images, and a folder of links to the unlabelled ones."""
    table = args.psfhs / "cases.csv"
    cases = read_cases(table)
    train = [case for case in cases if case.split == "train"]
    of_a = [case for case in train if case.device == "A"]
    count = min(LABELLED, len(of_a))
    chosen = np.random.default_rng(0).choice(len(of_a), count, replace=False)
    labelled = [of_a[k] for k in sorted(chosen)]
    val = [case for case in cases if case.split == "val" and case.device == "A"]
    if not labelled or not val:
        raise CaseError(f"{table}: expected images of device A in splits train and val")
    args.output.mkdir(parents=True, exist_ok=True)
    write_cases(args.output / "cases.csv", [*labelled, *val])
    apart = [case for case in cases if case.split != "train" or case in labelled]
    write_cases(args.output / "apart.csv", [dataclasses.replace(c, split="test") for c in apart])
    unlabelled = args.output / "unlabelled"
    known = {case.file for case in labelled}
    rest = [args.psfhs / "images" / case.file for case in train if case.file not in known]
    rest += [p for p in sorted((args.hc18 / "images").iterdir()) if not p.name.startswith("test_")]
    for path in rest:
        link = unlabelled / path.parent.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(path.resolve())
    print(f"{count} labelled images of device A, {len(rest)} unlabelled, {len(val)} val")
    return Data(args.output / "cases.csv", table, args.psfhs / "images", unlabelled, count)


def pretraining(args: argparse.Namespace, scale: Scale, data: Data) -> Task:
    """The one pretraining that all seeds start from, as others start from a published one."""
    run = args.output / "shared" / "pretrain"
    command = [
        *("training.pretrain", "--images", str(data.unlabelled), "--output", str(run)),
        *(*resume(run), *scale.pretrain, "--device", args.device),
        *(("--teacher", args.teacher) if args.teacher else ()),
    ]
    return Task("pretrain", command, run / "done")


def plan(args: argparse.Namespace, scale: Scale, data: Data, seed: int) -> list[Task]:
    """The tasks of one seed: pseudo-labels, and training and measuring each row."""
    place = args.output / f"seed-{seed}"
    device = ["--device", args.device]
    pretrained = args.output / "shared" / "pretrain"
    labels = {
        row.pseudo: place / f"labels-{'all' if row.pseudo == '.' else row.pseudo}"
        for row in ROWS
        if row.pseudo
    }
    tasks = [
        Task(
            f"{run.name}-{seed}",
            [
                *("training.pseudo_label", "--teacher", str(place / "pretraining")),
                *("--data", str(data.cases), "--images", str(data.images), "--accept", "0.6"),
                *("--unlabelled", str(data.unlabelled / folder), "--output", str(run), *device),
                *("--exclude", str(args.output / "apart.csv"), str(data.images)),
            ],
            run / "done",
            (f"fit-pretraining-{seed}",),
        )
        for folder, run in labels.items()
    ]
    for row in ROWS:
        run = place / row.trained
        needs = [f"fit-{row.trained}-{seed}"]
        if row.trained == row.name:
            before = ("pretrain",) if row.pretrained else ()
            more = []
            if row.pseudo:
                before += (f"{labels[row.pseudo].name}-{seed}",)
                table = str(labels[row.pseudo] / "pseudo.csv")
                more = ["--more", table, str(data.unlabelled / row.pseudo)]
            fit = [
                *("training.fit", "--data", str(data.cases), "--images", str(data.images)),
                *("--output", str(run), "--seed", str(seed), *device, *resume(run)),
                *(scale.unet if row.unet else scale.transunet), *scale.training, *row.flags,
                *(("--pretrained", str(pretrained)) if row.pretrained else ()),
                *(*more, *(("--styles", str(data.unlabelled)) if row.styles else ())),
                *("--steps", str(scale.steps)),
            ]  # fmt: skip
            tasks.append(Task(needs[0], fit, run / "done", before))
        measured = args.output / "results" / f"{row.name}-{seed}.json"
        for split in ("val", "test"):
            path = measured if split == "test" else measured.with_suffix(".val.json")
            measure = [
                *("training.evaluate", "--data", str(data.everything), "--split", split),
                *("--images", str(data.images), "--model", str(run), "--decode", row.decode),
                *("--output", str(path)),
            ]
            tasks.append(Task(f"{split}-{row.name}-{seed}", measure, path, tuple(needs)))
    return tasks


def resume(run: Path) -> list[str]:
    """--resume, where a training stopped halfway."""
    return ["--resume"] if (run / "checkpoint.pt").exists() else []


def carry_out(tasks: Sequence[Task], jobs: int) -> list[str]:
    """Run what is not done yet, so many at a time; returns the names of what failed."""
    waiting = [task for task in tasks if not task.done.exists()]
    settled = {task.name for task in tasks if task.done.exists()}
    running: dict[Future[bool], Task] = {}
    failed: list[str] = []
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            ready = [task for task in waiting if settled.issuperset(task.needs)]
            for task in ready[: jobs - len(running)]:
                waiting.remove(task)
                running[pool.submit(_run, task, threads)] = task
            if not running:  # the rest needs what failed
                break
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                task = running.pop(future)
                (settled.add if future.result() else failed.append)(task.name)
                print(f"{len(settled)} of {len(tasks)} done, the last is {task.name}", flush=True)
    return failed


def _run(task: Task, threads: str) -> bool:
    """Run a task's command, its output into a log; leave its time where it is done."""
    log = task.done.parent.parent / "logs" / f"{task.name}.log"
    for folder in (log.parent, task.done.parent):
        folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    with log.open("ab") as file:
        command = [sys.executable, "-m", *task.command]
        ran = subprocess.run(
            command, stdout=file, stderr=file, cwd=ROOT, env=environment, check=False
        )
    if ran.returncode == 0 and task.done.name == "done":
        task.done.write_text(f"{time.monotonic() - start:.0f} s\n")
    return ran.returncode == 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--psfhs", type=Path, required=True, help="folder with images/ and cases.csv")
    add("--hc18", type=Path, required=True, help="folder with images/")
    add("--output", type=Path, required=True, help="folder of all runs")
    scale_help = "; ".join(f"{name}: {scale.words}" for name, scale in SCALES.items())
    add("--scale", choices=sorted(SCALES), default="cpu", help=scale_help)
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="(1 2 3)")
    add("--teacher", help="of the pretraining: usfm:FILE, mae:RUN; by default none (plain MAE)")
    add("--jobs", type=int, default=2, metavar="N", help="commands at a time (%(default)s)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--table-only", action="store_true", help="run nothing, write the report of what is there")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
