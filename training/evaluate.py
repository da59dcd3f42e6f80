"""Measure landmarks and angle of progression against labels, or two readers against each other.

    python -m training.evaluate --data cases.csv --split test --predictions out/landmarks.csv \\
        --images DIR
    python -m training.evaluate --data cases.csv --split val --model aop.onnx --images DIR
    python -m training.evaluate --data cases.csv --split val --model RUN --images DIR

All errors are at 512 px (px times 512 / the image's longer side), with 95 % bootstrap intervals
over cases; also by device where the table has that column. A case without a prediction is named and
counted, and is part of no mean. --output writes the same as JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from model.heatmap import Decode
from model.image import ImageError, open_image
from model.predictor import ModelError, Predictor, load_predictor
from training.cases import Case, CaseError, read_cases
from training.checkpoint import CheckpointError, load_weights, write_text
from training.metrics import case_errors, summarise
from training.predict import CasePrediction, predict_cases, torch_predictor

Report = dict[str, dict[str, object]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(arguments)
    try:
        cases = [case for case in read_cases(args.data) if args.split in (None, case.split)]
        if not cases:
            raise CaseError(f"{args.data}: no case has split '{args.split}'")
        if args.model:
            predictions = predict_cases(_predictor(args.model), cases, args.images, args.decode)
            missing: list[str] = []
        else:
            cases, predictions, missing = matched(cases, read_cases(args.predictions), args.images)
    except (CaseError, CheckpointError, ModelError, ImageError, OSError) as error:
        print(f"training.evaluate: {error}", file=sys.stderr)
        return 2
    report = evaluate(cases, predictions)
    report["all"]["missing"] = missing
    print(as_text(report, missing))
    if args.output:
        write_text(args.output, json.dumps(report, indent=1) + "\n")
    return 0


def evaluate(cases: Sequence[Case], predictions: Sequence[CasePrediction]) -> Report:
    """Figures of `training.metrics.summarise` for all cases and for each device."""
    radial, aop = case_errors(predictions, cases)
    report = {"all": summarise(radial, aop)}
    devices = sorted({case.device for case in cases if case.device})
    for device in devices if len(devices) > 1 else []:
        chosen = [k for k, case in enumerate(cases) if case.device == device]
        report[f"device {device}"] = summarise(radial[chosen], aop[chosen])
    return report


def matched(
    cases: Sequence[Case], answers: Sequence[Case], images: Path
) -> tuple[list[Case], list[CasePrediction], list[str]]:
    """Cases with their answers from a table, by file name and frame, else by the name's stem.

    Raises:
        CaseError: no case has an answer.
    """
    by_name = {(answer.file, answer.frame): answer for answer in answers}
    by_stem = {(Path(answer.file).stem, answer.frame): answer for answer in answers}
    found, predictions, missing = [], [], []
    for case in cases:
        answer = by_name.get((case.file, case.frame))
        answer = answer or by_stem.get((Path(case.file).stem, case.frame))
        if answer is None:
            missing.append(case.file)
            continue
        source = open_image(images / case.file)
        longer = max(source.width, source.height)
        found.append(case)
        predictions.append(CasePrediction(answer.landmarks_px, longer, answer.aop_deg))
    if not found:
        raise CaseError(
            f"none of the {len(cases)} cases, the first being {cases[0].file}, has a row in the "
            "predictions: run process.py on the folder of these images first"
        )
    return found, predictions, missing


def _predictor(path: Path) -> Predictor:
    path = path / "best.safetensors" if path.is_dir() else path
    if path.suffix == ".onnx":
        return load_predictor(path)
    network, checkpoint = load_weights(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch_predictor(network.to(device), checkpoint.spec, device)


LABELS = {
    "mre_px": "mean radial error, px",
    "median_re_px": "median radial error, px",
    "mre_PS1_px": "  PS1, px",
    "mre_PS2_px": "  PS2, px",
    "mre_FH1_px": "  FH1, px",
    "sdr_4px": "within 4 px",
    "sdr_8px": "within 8 px",
    "sdr_16px": "within 16 px",
    "sdr_24px": "within 24 px",
    "aop_error_deg": "AoP error, deg",
    "aop_error_median_deg": "  median, deg",
    "aop_error_p95_deg": "  95th percentile, deg",
}


def as_text(report: Report, missing: Sequence[str]) -> str:
    """The report as a table for a terminal."""
    width = max(map(len, LABELS.values())) + 2
    heads = [f"{name} (n={figures['cases']})" for name, figures in report.items()]
    lines = [
        "errors at 512 px, with 95 % intervals",
        " " * width + "".join(f"{h:>26}" for h in heads),
    ]
    for key, label in LABELS.items():
        cells = []
        for figures in report.values():
            figure = figures[key]
            cells.append(f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})")
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>26}" for cell in cells))
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        lines.append(f"{len(missing)} cases without a prediction, in no mean: {shown}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="case table with the labels (CSV)")
    parser.add_argument("--images", type=Path, required=True, help="folder of its images")
    parser.add_argument("--split", help="train, val or test; by default all cases")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--predictions", type=Path, help="landmarks.csv or another reader's table")
    source.add_argument("--model", type=Path, help=".onnx, .safetensors with its .json, or RUN")
    parser.add_argument("--decode", choices=Decode.__args__, help="the model's own by default")
    parser.add_argument("--output", type=Path, help="write the figures as JSON too")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
