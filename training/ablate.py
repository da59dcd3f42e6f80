"""Repeat the paper's Table 2 on real images: what each part of the method gives, row by row.

    python -m training.ablate --psfhs PSFHS --hc18 HC18 --output RUNS
    python -m training.ablate ... --output RUNS --scale paper --device cuda
    python -m training.ablate ... --output RUNS --table-only      # the report of what is there

Each row adds one part to the row above, and is measured on split `test`. The trainings see the
labels of 300 images of device A in split `train`. All other images of `train` (devices A and B) and
those of HC18, but for its test_*, serve without labels. Val of device A alone chooses the best
epoch, as if nobody had labelled device B. All trainings of a scale take the same number of steps,
so a row with more images does not train for longer.

RUNS/results holds one JSON for each row and seed. Finished work is not repeated: the same command
goes on where it stopped. At the end it writes RUNS/table.md, table.csv, plot.png and heatmaps.png
(the same easy and hard val images in every row, as in the paper's Figure 2). Look at the table and
the plot next. heatmaps.png shows patients' images: do not pass it on.
"""

import argparse
import csv
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from model.drawing.text import Picture
from model.heatmap import Heatmaps
from model.predictor import Provider
from training.data.case_table import Case, CaseError, read_cases, write_cases
from training.data.dataset import read_frame
from training.evaluation.metrics import case_errors
from training.evaluation.pictures import draw_circles, draw_text, letterboxed_tile
from training.evaluation.predict import predict_cases, torch_predictor
from training.learning.checkpoint import load_weights, write_text

ROOT = Path(__file__).resolve().parent.parent
LABELLED = 300  # images whose labels are used, as in the paper


@dataclass(frozen=True)
class AblateOptions:
    """The command line.

    Args:
        psfhs: folder with images/ and cases.csv. hc18: folder with images/.
        scale: a name in `SCALES`.
        teacher: of the pretraining, as training.pretrain takes it; None: no teacher.
        jobs: number of commands that run at a time.
        table_only: run nothing.
    """

    psfhs: Path
    hc18: Path
    output: Path
    scale: str
    seeds: Sequence[int]
    teacher: str | None
    jobs: int
    device: Provider
    table_only: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = AblateOptions(**vars(_parser().parse_args(arguments)))
    try:
        data = prepare_data(options)
        if not options.table_only:
            tasks = [plan_pretraining(options, data)]
            tasks += [task for seed in options.seeds for task in plan_seed(options, data, seed)]
            failed = run_tasks(tasks, options.jobs)
            if failed:
                raise CaseError(
                    f"{', '.join(failed)} failed: read their logs below {options.output}, mend the "
                    "cause, and run the same command again"
                )
        print(write_ablation(options.output, options.scale, data.images, data.all_cases))
    except (CaseError, OSError) as error:
        print(f"training.ablate: {error}", file=sys.stderr)
        return 2
    return 0


# ---- The rows of the table, and the scales at which it can be made


@dataclass(frozen=True)
class TableRow:
    """One row of the table: what it adds to the row above.

    Args:
        name: in file names. label: in the table.
        trained: name of the row whose weights it measures; another one if it only decodes anew.
        pseudo: folder of the unlabelled images that get pseudo-labels; None: no pseudo-labels.
        flags: for training.fit.
    """

    name: str
    label: str
    trained: str
    unet: bool = False
    pretrained: bool = True
    pseudo: str | None = "."
    styles: bool = False
    flags: tuple[str, ...] = ()
    decode: str = "subpixel"


NO_NOISE = ("--landmark_noise_px", "0")
NOISE = ("--landmark_noise_px", "2")
STRONG = (
    *("--augmentation.rotation_deg", "30", "--augmentation.scale", "0.75,1.3"),
    *("--augmentation.shift", "0.1", "--augmentation.stretch", "0.15"),
    *("--augmentation.gamma", "0.6,1.6", "--augmentation.contrast", "0.6,1.4"),
    *("--augmentation.gain", "0.4", "--augmentation.speckle", "0.25"),
    *("--augmentation.blur_sigma_px", "1", "--augmentation.erase", "0.25"),
)
EMA = ("--ema_decay", "0.99")
STYLES = ("--augmentation.style", "0.5")
TABLE_ROWS = (
    TableRow(
        "unet",
        "heatmap U-Net (baseline)",
        "unet",
        unet=True,
        pretrained=False,
        pseudo=None,
        flags=NO_NOISE,
        decode="argmax",
    ),
    TableRow(
        "transunet",
        "TransUNet",
        "transunet",
        pretrained=False,
        pseudo=None,
        flags=NO_NOISE,
        decode="argmax",
    ),
    TableRow(
        "pretraining",
        "+ pretraining",
        "pretraining",
        pseudo=None,
        flags=NO_NOISE,
        decode="argmax",
    ),
    TableRow("pseudo", "+ pseudo-labels", "pseudo", flags=NO_NOISE, decode="argmax"),
    TableRow(
        "pseudo_view",
        "(instead: of PSFHS's images alone)",
        "pseudo_view",
        pseudo="psfhs",
        flags=NO_NOISE,
        decode="argmax",
    ),
    TableRow("noise", "+ device-domain adaptation", "noise", flags=NOISE, decode="argmax"),
    TableRow("subcell", "+ sub-cell decoding", "noise"),
    TableRow("strong", "+ stronger augmentation", "strong", flags=(*NOISE, *STRONG)),
    TableRow("ema", "+ averaged weights (EMA)", "ema", flags=(*NOISE, *STRONG, *EMA)),
    TableRow(
        "styles",
        "+ Fourier amplitudes of unlabelled images",
        "styles",
        styles=True,
        flags=(*NOISE, *STRONG, *EMA, *STYLES),
    ),
)
PAPER_ROWS = 6  # the first rows: those of the paper's Table 2, and one that replaces the fourth


@dataclass(frozen=True)
class Scale:
    """Sizes and budget of every training.

    Args:
        steps: of each main training.
        unet, transunet, training: flags of training.fit, for one network or for both.
        pretrain: flags of training.pretrain.
    """

    description: str
    steps: int
    unet: tuple[str, ...]
    transunet: tuple[str, ...]
    training: tuple[str, ...]
    pretrain: tuple[str, ...]


SCALES = {
    "cpu": Scale(
        "128 px, narrow networks, 600 steps of 8 images; some 90 minutes on 2 CPU cores",
        600,
        (
            *("--recipe", "unet", "--network.input_size", "128", "--network.channels", "1"),
            *("--network.widths", "16,32,64,128,256", "--network.stride", "4"),
        ),
        (
            *("--recipe", "paper", "--network.input_size", "128", "--network.channels", "1"),
            *("--network.encoder", "compact", "--network.encoder_widths", "32,64,128,192"),
            *("--network.up_widths", "128,64", "--network.vit_depth", "6"),
        ),
        (
            *("--sigma_cells", "2", "--batch", "8", "--mean", "30", "--std", "46.4"),
            *("--optimiser", "adamw", "--learning_rate", "1e-3", "--weight_decay", "0.1"),
            *("--schedule", "one_cycle", "--clip_norm", "1"),
        ),
        (*("--recipe", "compact", "--epochs", "60"),),
    ),
    "paper": Scale(
        "as in the paper: 512 px, ResNet-50, ViT-Tiny, 100 epochs of 75 steps; for a GPU",
        7500,
        ("--recipe", "unet"),
        ("--recipe", "paper"),
        (),
        ("--recipe", "paper"),
    ),
}


# ---- The data


@dataclass(frozen=True)
class AblationData:
    """Where the data of an ablation lie.

    Args:
        cases: table of the labelled train images, and of val of device A.
        all_cases: table of all cases.
        images: folder of the tables' images.
        unlabelled: folder with a folder for each source of unlabelled images.
    """

    cases: Path
    all_cases: Path
    images: Path
    unlabelled: Path


def prepare_data(options: AblateOptions) -> AblationData:
    """Write the case table of the labelled images, and a folder of links to the unlabelled ones.

    Raises:
        CaseError: PSFHS's table has no image of device A in train or val.
    """
    table = options.psfhs / "cases.csv"
    cases = read_cases(table)
    train = [case for case in cases if case.split == "train"]
    train_of_a = [case for case in train if case.device == "A"]
    count = min(LABELLED, len(train_of_a))
    chosen = np.random.default_rng(0).choice(len(train_of_a), count, replace=False)
    labelled = [train_of_a[k] for k in sorted(chosen)]
    val = [case for case in cases if case.split == "val" and case.device == "A"]
    if not labelled or not val:
        raise CaseError(f"{table}: expected images of device A in splits train and val")
    options.output.mkdir(parents=True, exist_ok=True)
    write_cases(options.output / "cases.csv", [*labelled, *val])
    # pseudo_label leaves out what looks like these: all but the train images without labels
    apart = [case for case in cases if case.split != "train" or case in labelled]
    apart = [dataclasses.replace(case, split="test") for case in apart]
    write_cases(options.output / "apart.csv", apart)
    labelled_files = {case.file for case in labelled}
    unlabelled = [
        options.psfhs / "images" / case.file for case in train if case.file not in labelled_files
    ]
    hc18 = sorted((options.hc18 / "images").iterdir())
    unlabelled += [path for path in hc18 if not path.name.startswith("test_")]
    folder = options.output / "unlabelled"
    for path in unlabelled:
        link = folder / path.parent.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(path.resolve())
    print(f"{count} labelled images of device A, {len(unlabelled)} unlabelled, {len(val)} val")
    return AblationData(options.output / "cases.csv", table, options.psfhs / "images", folder)


# ---- The plan: one task for each command


@dataclass(frozen=True)
class Task:
    """One command.

    Args:
        command: module and arguments.
        done: file that exists once the command has succeeded.
        needs: names of the tasks that must be done before.
    """

    name: str
    command: list[str]
    done: Path
    needs: tuple[str, ...] = ()


def plan_pretraining(options: AblateOptions, data: AblationData) -> Task:
    """The one pretraining that all seeds start from, as others start from a published one."""
    run = options.output / "shared" / "pretrain"
    command = [
        *("training.pretrain", "--images", str(data.unlabelled), "--output", str(run)),
        *(*resume_flag(run), *SCALES[options.scale].pretrain, "--device", options.device),
        *(("--teacher", options.teacher) if options.teacher else ()),
    ]
    return Task("pretrain", command, run / "done")


def plan_seed(options: AblateOptions, data: AblationData, seed: int) -> list[Task]:
    """The tasks of one seed: make pseudo-labels, and train and measure each row."""
    scale = SCALES[options.scale]
    folder = options.output / f"seed-{seed}"
    device = ["--device", options.device]
    pretrained = options.output / "shared" / "pretrain"
    labels = {
        row.pseudo: folder / f"labels-{'all' if row.pseudo == '.' else row.pseudo}"
        for row in TABLE_ROWS
        if row.pseudo
    }
    tasks = [
        Task(
            f"{run.name}-{seed}",
            [
                *("training.pseudo_label", "--teacher", str(folder / "pretraining")),
                *("--data", str(data.cases), "--images", str(data.images), "--accept", "0.6"),
                *("--unlabelled", str(data.unlabelled / source), "--output", str(run), *device),
                *("--exclude", str(options.output / "apart.csv"), str(data.images)),
            ],
            run / "done",
            (f"fit-pretraining-{seed}",),
        )
        for source, run in labels.items()
    ]
    for row in TABLE_ROWS:
        run = folder / row.trained
        training = f"fit-{row.trained}-{seed}"
        if row.trained == row.name:
            needs = ["pretrain"] if row.pretrained else []
            more = []
            if row.pseudo:
                needs.append(f"{labels[row.pseudo].name}-{seed}")
                table = str(labels[row.pseudo] / "pseudo.csv")
                more = ["--more", table, str(data.unlabelled / row.pseudo)]
            fit = [
                *("training.fit", "--data", str(data.cases), "--images", str(data.images)),
                *("--output", str(run), "--seed", str(seed), *device, *resume_flag(run)),
                *(scale.unet if row.unet else scale.transunet), *scale.training, *row.flags,
                *(("--pretrained", str(pretrained)) if row.pretrained else ()),
                *(*more, *(("--styles", str(data.unlabelled)) if row.styles else ())),
                *("--steps", str(scale.steps)),
            ]  # fmt: skip
            tasks.append(Task(training, fit, run / "done", tuple(needs)))
        result = options.output / "results" / f"{row.name}-{seed}.json"
        for split in ("val", "test"):
            path = result if split == "test" else result.with_suffix(".val.json")
            evaluate = [
                *("training.evaluate", "--data", str(data.all_cases), "--split", split),
                *("--images", str(data.images), "--model", str(run), "--decode", row.decode),
                *("--output", str(path)),
            ]
            tasks.append(Task(f"{split}-{row.name}-{seed}", evaluate, path, (training,)))
    return tasks


def resume_flag(run: Path) -> list[str]:
    """--resume, if a training stopped halfway."""
    return ["--resume"] if (run / "checkpoint.pt").exists() else []


# ---- Running the tasks


def run_tasks(tasks: Sequence[Task], jobs: int) -> list[str]:
    """Run the tasks that are not done yet, `jobs` at a time; returns the names of failures."""
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
                running[pool.submit(run_task, task, threads)] = task
            if not running:  # what waits needs a task that failed
                break
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                task = running.pop(future)
                if future.result():
                    settled.add(task.name)
                else:
                    failed.append(task.name)
                print(f"{len(settled)} of {len(tasks)} done, the last is {task.name}", flush=True)
    return failed


def run_task(task: Task, threads: str) -> bool:
    """Run a task's command and log its output; returns whether it succeeded.

    A training's `done` gets the seconds that it took.

    Args:
        threads: number of threads for numerical libraries.
    """
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


# ---- Table, plot and heatmaps

# Seed -> group of cases -> figure -> value and interval, as training.evaluate writes them.
FiguresBySeed = dict[int, dict[str, dict[str, Any]]]

TILE_PX = 160
IMAGES_EACH = 2  # easy and hard cases among the heatmaps


def write_ablation(output: Path, scale: str, images: Path, table: Path) -> str:
    """Write table (Markdown and CSV), plot and heatmaps of all results; returns the Markdown.

    Args:
        scale: a name in `SCALES`.
        images, table: all cases, for the heatmaps.
    """
    results = read_results(output)
    rows = [row for row in TABLE_ROWS if results[row.name]]
    lines = [
        f"| Row ({SCALES[scale].description}) | seeds | MRE, px | AoP error, deg "
        "| device A: px, deg | device B: px, deg |",
        "|---|---|---|---|---|---|",
    ]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["row", "seed", "group", "mre_px", "aop_error_deg"])
    keys = ("mre_px", "aop_error_deg")
    for row in rows:
        by_seed = results[row.name]
        cells = [_mean_and_deviation(by_seed, "all", key) for key in keys]
        for device in ("device A", "device B"):
            cells.append(", ".join(_mean_and_deviation(by_seed, device, key) for key in keys))
        lines.append(f"| {row.label} | {len(by_seed)} | {' | '.join(cells)} |")
        for seed, groups in by_seed.items():
            for group, figures in groups.items():
                values = [f"{figures[key]['value']:.4f}" for key in keys]
                writer.writerow([row.name, seed, group, *values])
    text = "\n".join(lines) + "\n"
    write_text(output / "table.md", text)
    write_text(output / "table.csv", stream.getvalue())
    if rows:
        draw_plot(output / "plot.png", rows, results)
        cv2.imwrite(str(output / "heatmaps.png"), draw_heatmaps(output, rows, images, table))
    return text


def read_results(output: Path) -> dict[str, FiguresBySeed]:
    """The figures on split test of every row, by its name; empty for a row without results."""
    results: dict[str, FiguresBySeed] = {}
    for row in TABLE_ROWS:
        paths = sorted((output / "results").glob(f"{row.name}-*.json"))
        by_seed = {p.stem.rpartition("-")[2]: p for p in paths if not p.stem.endswith(".val")}
        results[row.name] = {int(seed): json.loads(p.read_text()) for seed, p in by_seed.items()}
    return results


def _values(by_seed: FiguresBySeed, group: str, key: str) -> list[float]:
    return [groups[group][key]["value"] for groups in by_seed.values()]


def _mean_and_deviation(by_seed: FiguresBySeed, group: str, key: str) -> str:
    """Mean and standard deviation over the seeds; the value alone if there is one seed."""
    values = _values(by_seed, group, key)
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def draw_plot(path: Path, rows: Sequence[TableRow], results: dict[str, FiguresBySeed]) -> None:
    """Plot each seed as a point and the mean as a line, for all cases and for each device."""
    import matplotlib  # noqa: PLC0415  slow to import, needed only here

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    for axis, (key, label) in zip(
        axes, (("mre_px", "MRE, px at 512"), ("aop_error_deg", "AoP error, deg")), strict=True
    ):
        for group, colour in (("all", "black"), ("device A", "tab:blue"), ("device B", "tab:red")):
            values = [_values(results[row.name], group, key) for row in rows]
            axis.plot([np.mean(v) for v in values], color=colour, label=group)
            for k, points in enumerate(values):
                axis.scatter([k] * len(points), points, color=colour, s=12)
        axis.set_xticks(range(len(rows)), [row.label for row in rows], rotation=30, ha="right")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_heatmaps(output: Path, rows: Sequence[TableRow], images: Path, table: Path) -> Picture:
    """Heatmaps on val images: a line for each trained row, a column for each image.

    The images are those on which the first row errs least and most. Red, green and blue are the
    heatmaps of FH1, PS2 and PS1. White rings are the labels.
    """
    cases = [case for case in read_cases(table) if case.split == "val"]
    chosen: list[Case] = []
    lines = []
    for row in rows:
        if row.trained != row.name:
            continue
        weights = next(iter(sorted(output.glob(f"seed-*/{row.name}/best.safetensors"))), None)
        if weights is None:
            continue
        network, checkpoint = load_weights(weights)
        predictor = torch_predictor(network, checkpoint.spec, next(network.parameters()).device)
        if not chosen:
            errors = case_errors(predict_cases(predictor, cases, images), cases)[0].mean(axis=1)
            order = [cases[k] for k in np.argsort(errors)]
            chosen = [*_one_per_group(order), *reversed(_one_per_group(order[::-1]))]
        answers = predict_cases(predictor, chosen, images)
        tiles = [
            _heatmap_tile(case, answer.heatmaps, images)
            for case, answer in zip(chosen, answers, strict=True)
        ]
        label = np.zeros((TILE_PX, 2 * TILE_PX, 3), np.uint8)
        draw_text(label, row.label, (6, TILE_PX // 2))
        lines.append(np.hstack([label, *tiles]))
    return np.vstack(lines) if lines else np.zeros((1, 1, 3), np.uint8)


def _one_per_group(cases: Sequence[Case]) -> list[Case]:
    """The first IMAGES_EACH cases of different groups, since near-duplicates show nothing more."""
    first: dict[str, Case] = {}
    for case in cases:
        first.setdefault(case.group or case.file, case)
    return list(first.values())[:IMAGES_EACH]


def _heatmap_tile(case: Case, maps: Heatmaps, images: Path) -> Picture:
    """(TILE_PX, TILE_PX, 3) BGR: heatmaps over the image."""
    tile, box = letterboxed_tile(*read_frame(images / case.file, case.frame), TILE_PX)
    scaled = maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-6)
    heat = cv2.resize(np.clip(scaled, 0, 1).transpose(1, 2, 0), (TILE_PX, TILE_PX))
    blended = np.clip(0.6 * tile + 200 * heat, 0, 255).astype(np.uint8)
    draw_circles(blended, box.to_input(case.landmarks_px), [(255, 255, 255)] * 3, 4, 1)
    return np.asarray(blended, np.uint8)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    psfhs = "folder of PSFHS, with images/ and cases.csv"
    add("--psfhs", type=Path, required=True, metavar="PSFHS", help=psfhs)
    hc18 = "folder of HC18, with images/"
    add("--hc18", type=Path, required=True, metavar="HC18", help=hc18)
    add("--output", type=Path, required=True, metavar="RUNS", help="folder of all runs")
    scales = "; ".join(f"{name}: {scale.description}" for name, scale in SCALES.items())
    scale = f"sizes and budget of the trainings (%(default)s); {scales}"
    add("--scale", choices=sorted(SCALES), default="cpu", help=scale)
    seeds = "random seeds; each trains every row once (1 2 3)"
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="SEED", help=seeds)
    teacher = "teacher of the pretraining: usfm:FILE or mae:RUN (default: none, a plain MAE)"
    add("--teacher", help=teacher)
    jobs = "number of commands that run at a time (%(default)s)"
    add("--jobs", type=int, default=2, metavar="N", help=jobs)
    device = "processor; auto takes the GPU if there is one (%(default)s)"
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help=device)
    table_only = "the report of finished runs alone; nothing is trained"
    add("--table-only", action="store_true", help=table_only)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
