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

LABELLED = 300
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One row of the table: what it adds to the row above.

    trained: the row whose weights it measures, which is another one where it only decodes anew.
    pseudo: the folder of unlabelled images that get pseudo-labels; None: none do.
    """

    name: str
    words: str
    trained: str
    unet: bool = False
    pretrained: bool = True
    pseudo: str | None = "."
    styles: bool = False
    flags: tuple[str, ...] = ()
    decode: str = "subpixel"


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


def _rows() -> tuple[Row, ...]:
    plain = ("--landmark_noise_px", "0")
    return (
        Row("unet", "heatmap U-Net (baseline)", "unet", True, False, None, False, plain, "argmax"),
        Row("transunet", "TransUNet", "transunet", False, False, None, False, plain, "argmax"),
        Row(
            "pretraining",
            "+ pretraining",
            "pretraining",
            pseudo=None,
            flags=plain,
            decode="argmax",
        ),
        Row("pseudo", "+ pseudo-labels", "pseudo", flags=plain, decode="argmax"),
        Row(
            "pseudo_view",
            "(instead: of PSFHS's images alone)",
            "pseudo_view",
            pseudo="psfhs",
            flags=plain,
            decode="argmax",
        ),
        Row("noise", "+ device-domain adaptation", "noise", flags=NOISE, decode="argmax"),
        Row("subcell", "+ sub-cell decoding", "noise"),
        Row("strong", "+ stronger augmentation", "strong", flags=(*NOISE, *STRONG)),
        Row("ema", "+ averaged weights (EMA)", "ema", flags=(*NOISE, *STRONG, *EMA)),
        Row(
            "styles",
            "+ Fourier amplitudes of unlabelled images",
            "styles",
            styles=True,
            flags=(*NOISE, *STRONG, *EMA, *STYLES),
        ),
    )


ROWS = _rows()
PAPER_ROWS = 6  # those of the paper's Table 2, and one instead of its fourth


@dataclass(frozen=True)
class Scale:
    """Sizes and budget of every training; flags of fit and pretrain."""

    words: str
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
        "the paper's: 512 px, ResNet-50, ViT-Tiny, 100 epochs of 75 steps; for a GPU",
        7500,
        ("--recipe", "unet"),
        ("--recipe", "paper"),
        (),
        ("--recipe", "paper"),
    ),
}


@dataclass(frozen=True)
class AblateOptions:
    """The command line; teacher: of the pretraining, as training.pretrain takes it."""

    psfhs: Path
    hc18: Path
    output: Path
    scale: str
    seeds: Sequence[int]
    teacher: str | None
    jobs: int
    device: Provider
    table_only: bool


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
    options = AblateOptions(**vars(_parser().parse_args(arguments)))
    try:
        data = prepare(options)
        if not options.table_only:
            tasks = [pretraining(options, data)]
            tasks += [task for seed in options.seeds for task in plan(options, data, seed)]
            failed = carry_out(tasks, options.jobs)
            if failed:
                raise CaseError(f"{', '.join(failed)} failed: see RUNS/logs, mend it, run again")
        text = write_report(options.output, options.scale, data.images, data.everything)
        print(text)
    except (CaseError, OSError) as error:
        print(f"training.ablate: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(options: AblateOptions) -> Data:
    """Write the case table of the labelled images, and a folder of links to the unlabelled ones."""
    table = options.psfhs / "cases.csv"
    cases = read_cases(table)
    train = [case for case in cases if case.split == "train"]
    of_a = [case for case in train if case.device == "A"]
    count = min(LABELLED, len(of_a))
    chosen = np.random.default_rng(0).choice(len(of_a), count, replace=False)
    labelled = [of_a[k] for k in sorted(chosen)]
    val = [case for case in cases if case.split == "val" and case.device == "A"]
    if not labelled or not val:
        raise CaseError(f"{table}: expected images of device A in splits train and val")
    options.output.mkdir(parents=True, exist_ok=True)
    write_cases(options.output / "cases.csv", [*labelled, *val])
    apart = [case for case in cases if case.split != "train" or case in labelled]
    kept_apart = [dataclasses.replace(case, split="test") for case in apart]
    write_cases(options.output / "apart.csv", kept_apart)
    unlabelled = options.output / "unlabelled"
    known = {case.file for case in labelled}
    rest = [options.psfhs / "images" / case.file for case in train if case.file not in known]
    of_hc18 = sorted((options.hc18 / "images").iterdir())
    rest += [path for path in of_hc18 if not path.name.startswith("test_")]
    for path in rest:
        link = unlabelled / path.parent.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(path.resolve())
    print(f"{count} labelled images of device A, {len(rest)} unlabelled, {len(val)} val")
    return Data(options.output / "cases.csv", table, options.psfhs / "images", unlabelled, count)


def pretraining(options: AblateOptions, data: Data) -> Task:
    """The one pretraining that all seeds start from, as others start from a published one."""
    run = options.output / "shared" / "pretrain"
    command = [
        *("training.pretrain", "--images", str(data.unlabelled), "--output", str(run)),
        *(*resume(run), *SCALES[options.scale].pretrain, "--device", options.device),
        *(("--teacher", options.teacher) if options.teacher else ()),
    ]
    return Task("pretrain", command, run / "done")


def plan(options: AblateOptions, data: Data, seed: int) -> list[Task]:
    """The tasks of one seed: pseudo-labels, and training and measuring each row."""
    scale = SCALES[options.scale]
    place = options.output / f"seed-{seed}"
    device = ["--device", options.device]
    pretrained = options.output / "shared" / "pretrain"
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
                *("--exclude", str(options.output / "apart.csv"), str(data.images)),
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
            before = ["pretrain"] if row.pretrained else []
            more = []
            if row.pseudo:
                before.append(f"{labels[row.pseudo].name}-{seed}")
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
            tasks.append(Task(needs[0], fit, run / "done", tuple(before)))
        measured = options.output / "results" / f"{row.name}-{seed}.json"
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
    """--resume, if a training stopped halfway."""
    return ["--resume"] if (run / "checkpoint.pt").exists() else []


def carry_out(tasks: Sequence[Task], jobs: int) -> list[str]:
    """Run the tasks that are not done yet, `jobs` at a time; returns the names of what failed."""
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
                if future.result():
                    settled.add(task.name)
                else:
                    failed.append(task.name)
                print(f"{len(settled)} of {len(tasks)} done, the last is {task.name}", flush=True)
    return failed


def _run(task: Task, threads: str) -> bool:
    """Run a task's command with its output in a log, and leave its duration in `done`."""
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


def write_report(output: Path, scale: str, images: Path, table: Path) -> str:
    """Table (Markdown and CSV), plot and heatmaps of what has been measured; returns the text."""
    found = read_results(output)
    rows = [row for row in ROWS if found.get(row.name)]
    lines = [
        f"| Row ({SCALES[scale].words}) | seeds | MRE, px | AoP error, deg | device A: px, deg "
        "| device B: px, deg |",
        "|---|---|---|---|---|---|",
    ]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["row", "seed", "group", "mre_px", "aop_error_deg"])
    for row in rows:
        reports = found[row.name]
        cells = [_spread(reports, "all", key) for key in ("mre_px", "aop_error_deg")]
        for device in ("device A", "device B"):
            pair = [_spread(reports, device, key) for key in ("mre_px", "aop_error_deg")]
            cells.append(", ".join(pair))
        lines.append(f"| {row.words} | {len(reports)} | {' | '.join(cells)} |")
        for seed, report in reports.items():
            for group, figures in report.items():
                values = [figures[key]["value"] for key in ("mre_px", "aop_error_deg")]
                writer.writerow([row.name, seed, group, *(f"{value:.4f}" for value in values)])
    text = "\n".join(lines) + "\n"
    write_text(output / "table.md", text)
    write_text(output / "table.csv", stream.getvalue())
    if rows:
        _plot(output / "plot.png", rows, found)
        sheet = heatmaps(output, rows, images, table)
        cv2.imwrite(str(output / "heatmaps.png"), sheet)
    return text


# Seed -> group of cases -> figure -> value and interval: what training.evaluate wrote.
OfSeeds = dict[int, dict[str, dict[str, Any]]]


def read_results(output: Path) -> dict[str, OfSeeds]:
    """The figures of each row by its name, on split test."""
    found: dict[str, OfSeeds] = {}
    for row in ROWS:
        paths = sorted((output / "results").glob(f"{row.name}-*.json"))
        chosen = {p.stem.rpartition("-")[2]: p for p in paths if not p.stem.endswith(".val")}
        found[row.name] = {int(seed): json.loads(p.read_text()) for seed, p in chosen.items()}
    return found


def _values(reports: OfSeeds, group: str, key: str) -> list[float]:
    return [report[group][key]["value"] for report in reports.values()]


def _spread(reports: OfSeeds, group: str, key: str) -> str:
    """Mean and standard deviation over the seeds."""
    values = _values(reports, group, key)
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _plot(path: Path, rows: Sequence[Row], found: dict[str, OfSeeds]) -> None:
    """Draw each seed as a point and the mean as a line, for both devices."""
    import matplotlib  # noqa: PLC0415  slow, and only for this

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    for axis, (key, label) in zip(
        axes, (("mre_px", "MRE, px at 512"), ("aop_error_deg", "AoP error, deg")), strict=True
    ):
        for group, colour in (("all", "black"), ("device A", "tab:blue"), ("device B", "tab:red")):
            values = [_values(found[row.name], group, key) for row in rows]
            axis.plot([np.mean(v) for v in values], color=colour, label=group)
            for k, points in enumerate(values):
                axis.scatter([k] * len(points), points, color=colour, s=12)
        axis.set_xticks(range(len(rows)), [row.words for row in rows], rotation=30, ha="right")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


TILE, SHOWN = 160, 2  # px; so many easy and so many hard cases


def heatmaps(output: Path, rows: Sequence[Row], images: Path, table: Path) -> Picture:
    """Heatmaps on val images: a column for each image, a line for each row of the table.

    The images are those on which the first row errs least and most. Red, green and blue are the
    heatmaps of FH1, PS2 and PS1. White rings are the labels.
    """
    cases = [case for case in read_cases(table) if case.split == "val"]
    trained = [row for row in rows if row.trained == row.name]
    chosen: list[Case] = []
    lines = []
    for row in trained:
        run = next(iter(sorted(output.glob(f"seed-*/{row.name}/best.safetensors"))), None)
        if run is None:
            continue
        network, checkpoint = load_weights(run)
        predictor = torch_predictor(network, checkpoint.spec, next(network.parameters()).device)
        if not chosen:
            errors = case_errors(predict_cases(predictor, cases, images), cases)[0].mean(axis=1)
            order = [cases[k] for k in np.argsort(errors)]
            chosen = [*_of_groups(order), *reversed(_of_groups(order[::-1]))]
        tiles = [_tile(case, found.heatmaps, images) for case, found in zip(
            chosen, predict_cases(predictor, chosen, images), strict=True
        )]  # fmt: skip
        name = np.zeros((TILE, 2 * TILE, 3), np.uint8)
        draw_text(name, row.words, (6, TILE // 2))
        lines.append(np.hstack([name, *tiles]))
    return np.vstack(lines) if lines else np.zeros((1, 1, 3), np.uint8)


def _of_groups(cases: Sequence[Case]) -> list[Case]:
    """The first few cases of groups of their own: near-duplicates show nothing more."""
    found: dict[str, Case] = {}
    for case in cases:
        found.setdefault(case.group or case.file, case)
    return list(found.values())[:SHOWN]


def _tile(case: Case, maps: Heatmaps, images: Path) -> Picture:
    """(TILE, TILE, 3): heatmaps over the image."""
    tile, box = letterboxed_tile(*read_frame(images / case.file, case.frame), TILE)
    scaled = maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-6)
    heat = cv2.resize(np.clip(scaled, 0, 1).transpose(1, 2, 0), (TILE, TILE))
    shown = np.clip(0.6 * tile + 200 * heat, 0, 255).astype(np.uint8)
    draw_circles(shown, box.to_input(case.landmarks_px), [(255, 255, 255)] * 3, 4, 1)
    return np.asarray(shown, np.uint8)


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
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="seeds (1 2 3)")
    add("--teacher", help="teacher of the pretraining: usfm:FILE or mae:RUN (none: MAE)")
    add(
        "--jobs", type=int, default=2, metavar="N", help="commands that run at a time (%(default)s)"
    )
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--table-only", action="store_true", help="run nothing, write the report of what is there")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
