"""The rows and scales of the ablation, and its report: table, plot and heatmaps side by side."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from training.cases import Case, read_cases
from training.checkpoint import load_weights, write_text
from training.metrics import case_errors
from training.pictures import mark, put_text, tile_of
from training.predict import predict_cases, torch_predictor


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


def write_report(output: Path, scale: str, images: Path, table: Path) -> str:
    """Table (Markdown and CSV), plot and heatmaps of what has been measured; returns the text."""
    found = measured(output)
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


Reports = dict[str, dict[int, dict[str, dict[str, dict[str, float]]]]]


def measured(output: Path) -> Reports:
    """Row -> seed -> the report of training.evaluate on split test."""
    found: Reports = {}
    for row in ROWS:
        paths = sorted((output / "results").glob(f"{row.name}-*.json"))
        chosen = {p.stem.rpartition("-")[2]: p for p in paths if not p.stem.endswith(".val")}
        found[row.name] = {int(seed): json.loads(p.read_text()) for seed, p in chosen.items()}
    return found


def _values(reports: dict, group: str, key: str) -> list[float]:
    return [report[group][key]["value"] for report in reports.values()]


def _spread(reports: dict, group: str, key: str) -> str:
    """Mean and standard deviation over the seeds."""
    values = _values(reports, group, key)
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _plot(path: Path, rows: Sequence[Row], found: Reports) -> None:
    """Each seed as a point, the mean as a line, for both devices."""
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


def heatmaps(output: Path, rows: Sequence[Row], images: Path, table: Path) -> np.ndarray:
    """(H, W, 3) BGR: the same easy and hard val images, a column; the rows' heatmaps, a row each.

    Easy and hard is what the first row errs least and most on. Red, green and blue are the heatmaps
    of FH1, PS2 and PS1; white rings the labels.
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
        words = np.zeros((TILE, 2 * TILE, 3), np.uint8)
        put_text(words, row.words, (6, TILE // 2))
        lines.append(np.hstack([words, *tiles]))
    return np.vstack(lines) if lines else np.zeros((1, 1, 3), np.uint8)


def _of_groups(cases: Sequence[Case]) -> list[Case]:
    """The first few cases of groups of their own: near-duplicates show nothing more."""
    found: dict[str, Case] = {}
    for case in cases:
        found.setdefault(case.group or case.file, case)
    return list(found.values())[:SHOWN]


def _tile(case: Case, maps: np.ndarray, images: Path) -> np.ndarray:
    """(TILE, TILE, 3): heatmaps over the image."""
    from training.data import read_grey  # noqa: PLC0415

    tile, box = tile_of(*read_grey(images / case.file, case.frame), TILE)
    scaled = maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-6)
    heat = cv2.resize(np.clip(scaled, 0, 1).transpose(1, 2, 0), (TILE, TILE))
    shown = np.clip(0.6 * tile + 200 * heat, 0, 255).astype(np.uint8)
    mark(shown, box.to_input(case.landmarks_px), [(255, 255, 255)] * 3, 4, 1)
    return shown
