"""Measure landmarks and angle of progression (AoP) against labels.

A model, or what it trained in (RUN):
    python -m training.evaluate --data cases.csv --split val --model aop.onnx
    python -m training.evaluate --data cases.csv --split val --model RUN --images DIR
What process.py wrote, or another reader's table; results.json tells more to a report:
    python -m training.evaluate --data cases.csv --predictions out/landmarks.csv
    python -m training.evaluate --data cases.csv --predictions out/results.json --report report.html
The jobs of a challenge, as an evaluation container does (training/evaluation.Dockerfile):
    python -m training.evaluate --truth DIR --predictions /input/predictions.json
    python -m training.evaluate --truth DIR --predictions predictions.json --output metrics.json \\
        --frame-of-answers pixel --size 512x512 --landmarks-slug my-points --angle-slug my-angle

Which of these --predictions holds is seen by its content: a JSON list of jobs, a JSON object
(results.json), else a CSV table. All errors are at 512 px (px times 512 / the image's longer side),
with 95 % bootstrap intervals over cases; by device where the table has that column. Labels and
answers are matched by path and frame, file name, or the name's stem.

A case that a model or reader did not answer is named and counted, and is part of no mean. Of jobs,
it counts as the worst, as does whatever is malformed; metrics.json says by which rules, and why, in
its `results` (an entry a case) and `aggregates` (the figures; the leaderboard takes, for example,
aggregates.mre_px.value). A job's answers are read from PK/output/ beside predictions.json. Exit
status: 0 measured, 2 nothing could be measured; the last line of stderr then says why.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from model.files import write_bytes
from model.heatmap import Decode
from model.image import ImageError
from training.answers import (
    Answers,
    ScoresError,
    View,
    image_file,
    kind_of,
    read_answers,
    view_of_image,
)
from training.cases import Case, CaseError, read_cases
from training.jobs import Sockets
from training.metrics import Figures, as_text, evaluate
from training.scores import aggregates, answered, score_jobs

METRICS = Path("/output/metrics.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(arguments)
    folder = args.data if args.data.is_dir() else args.data.parent
    args.images = args.images or (folder / "images" if (folder / "images").is_dir() else folder)
    try:
        cases = [case for case in read_cases(args.data) if args.split in (None, case.split)]
        if not cases:
            raise CaseError(f"{args.data}: no case has split '{args.split}'")
        kind = "model" if args.model else kind_of(args.predictions)
        if kind == "jobs":
            report, answers = _measure_jobs(args, cases)
        else:
            reader = (args.predictions, kind, cases, args.images)
            answers = _predict(args, cases) if args.model else read_answers(*reader)
            report = evaluate(*answers[:2])
            report["all"]["missing"] = answers[2]
            if args.output:
                write_json(args.output, report)
        fate = "counted as the worst" if kind == "jobs" else "without a prediction, in no mean"
        print(as_text(report, answers[2], fate))
    except (CaseError, ScoresError, ImageError, OSError) as error:
        print(f"training.evaluate: {_words(error)}", file=sys.stderr)
        return 2
    try:
        if args.report:
            _write_report(args, answers)
    except (ScoresError, ImageError, OSError) as error:
        print(
            f"training.evaluate: measured, but without a report: {_words(error)}", file=sys.stderr
        )
        return 1
    return 0


def _words(error: Exception) -> object:
    is_file = isinstance(error, OSError)
    return f"{error.filename} cannot be used: {error.strerror}" if is_file else error


def _predict(args: argparse.Namespace, cases: list[Case]) -> Answers:
    """Answers of a model: an ONNX file, weights, or the folder of a training."""
    import torch  # noqa: PLC0415

    from model.predictor import ModelError, load_predictor  # noqa: PLC0415
    from training.checkpoint import CheckpointError, load_weights  # noqa: PLC0415
    from training.predict import predict_cases, torch_predictor  # noqa: PLC0415

    path = args.model / "best.safetensors" if args.model.is_dir() else args.model
    try:
        if path.suffix == ".onnx":
            predictor = load_predictor(path)
        else:
            network, checkpoint = load_weights(path)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            predictor = torch_predictor(network.to(device), checkpoint.spec, device)
        return cases, predict_cases(predictor, cases, args.images, args.decode), []
    except (CheckpointError, ModelError) as error:
        raise ScoresError(str(error)) from error


def _measure_jobs(args: argparse.Namespace, cases: list[Case]) -> tuple[Figures, Answers]:
    """Scores of grand-challenge's jobs, written to metrics.json."""
    in_world = args.frame_of_answers == "world"
    if args.size and in_world:
        raise ScoresError("--size is for answers in px: add --frame-of-answers pixel")
    view_of = (lambda _: View(*args.size)) if args.size else partial(view_of_image, args.images)
    sockets = Sockets(args.landmarks_slug, args.angle_slug, args.image_slug)
    scores, unmatched = score_jobs(args.predictions, cases, view_of, sockets, in_world)
    figures = aggregates(scores, unmatched)
    results = [score.result for score in scores]
    write_json(args.output or METRICS, {"results": results, "aggregates": figures})
    if unmatched:
        print(f"{len(unmatched)} jobs are of no case, the first: {unmatched[0]}")
    bad = [f"{r['case']}: {'; '.join(r['problems'])}" for r in results if r["problems"]]
    return {"all": figures}, (*(answered(scores) if args.report else ([], [])), bad)


def _write_report(args: argparse.Namespace, answers: Answers) -> None:
    from training.report import write_report  # noqa: PLC0415

    cases, predictions, missing = answers
    if not cases:
        print("no report: no case has an answer")
        return
    source = args.model or args.predictions
    title = f"{source.name} against labels" + (f", split {args.split}" if args.split else "")
    more = {"note": args.note} if args.note else {}
    cases = [replace(case, file=image_file(args.images, case)) for case in cases]
    figures = evaluate(cases, predictions)
    write_report(args.report, cases, predictions, args.images, figures, missing, title, **more)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file whole or not at all."""
    write_bytes(path, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def _size(text: str) -> tuple[int, int]:
    if size := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text):
        return int(size[1]), int(size[2])
    raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT in px, as 512x512, got {text!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    table = "case table with the labels in px (CSV), or the folder that holds it"
    add("--data", "--truth", type=Path, required=True, metavar="TABLE", help=table)
    images = "folder of its images, of any format (images/ beside the table, else the table's)"
    add("--images", type=Path, metavar="DIR", help=images)
    add("--split", help="train, val or test; by default all cases")
    source = parser.add_mutually_exclusive_group(required=True)
    answers = "predictions.json, results.json, landmarks.csv or another reader's table"
    source.add_argument("--predictions", type=Path, metavar="FILE", help=answers)
    source.add_argument("--model", type=Path, help=".onnx, .safetensors with its .json, or RUN")
    add("--decode", choices=Decode.__args__, help="the model's own by default")
    output = f"write the figures as JSON too; of jobs always, by default as {METRICS}"
    add("--output", type=Path, metavar="FILE", help=output)
    add("--report", type=Path, metavar="FILE", help="write a page to look at (HTML)")
    add("--note", help="a sentence on the page: where the labels come from")
    add = parser.add_argument_group("jobs").add_argument
    frame = "of the points: the image's world frame, in mm, or px (%(default)s)"
    add("--frame-of-answers", choices=("world", "pixel"), default="world", help=frame)
    size = "of all images, where they are not at hand"
    add("--size", type=_size, metavar="WIDTHxHEIGHT", help=size)
    slug = "of the output that holds the points (%(default)s)"
    add("--landmarks-slug", default=Sockets().landmarks, metavar="SLUG", help=slug)
    slug = "of the output that holds the angle (%(default)s)"
    add("--angle-slug", default=Sockets().angle, metavar="SLUG", help=slug)
    slug = "of the input that names the case (the one that is an image)"
    add("--image-slug", metavar="SLUG", help=slug)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
