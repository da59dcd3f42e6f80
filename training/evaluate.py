"""Measure landmarks and the angle of progression (AoP) against labels.

A model, or the folder RUN of its training:
    python -m training.evaluate --data cases.csv --split val --model aop.onnx
    python -m training.evaluate --data cases.csv --split val --model RUN --images DIR
What process.py wrote, or another reader's table (results.json adds uncertainty to a report):
    python -m training.evaluate --data cases.csv --predictions out/landmarks.csv
    python -m training.evaluate --data cases.csv --predictions out/results.json --report report.html
The jobs of a challenge, as in an evaluation container (training/evaluation.Dockerfile):
    python -m training.evaluate --truth DIR --predictions /input/predictions.json
    python -m training.evaluate --truth DIR --predictions predictions.json --output metrics.json \\
        --frame-of-answers pixel --size 512x512 --landmarks-slug my-points --angle-slug my-angle

The content of the file tells what --predictions is: a JSON list of jobs, a JSON object
(results.json), or else a CSV table. Labels and answers are matched by path and frame, by file name,
or by file name without suffix.

It prints errors at 512 px (px times 512 / the image's longer side) with 95 % bootstrap intervals
over cases, also by device if the table has that column. --output writes them as JSON. --report
writes a page of figures and pictures, to look at next. A case that a model or reader did not answer
is named and counted, and is part of no mean.

The figures of jobs are always written, by default to /output/metrics.json: `results` (an entry for
each case) and `aggregates` (the figures and the rules they follow; a leaderboard takes for example
aggregates.mre_px.value). A missing or malformed answer counts as the worst, and the entry says why.
The answers of job PK are read from PK/output/ beside predictions.json.

Exit status: 0 measured, 1 measured but the report failed, 2 nothing could be measured. On failure
the last line of stderr says why.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from model.heatmap import Decode
from model.images.source import ImageError
from model.results.files import write_bytes
from training.data.case_table import Case, CaseError, cases_of_split, require_images
from training.evaluation.challenge_jobs import (
    AnsweredCases,
    PixelGrid,
    ScoresError,
    Sockets,
    aggregate_scores,
    answers_from_scores,
    detect_kind,
    find_image_file,
    read_answers,
    read_pixel_grid,
    score_jobs,
)
from training.evaluation.metrics import Summary, format_metrics, summarise_by_device

METRICS = Path("/output/metrics.json")


@dataclass(frozen=True)
class EvaluateOptions:
    """The command line; of `predictions` and `model` one is None.

    Args:
        split: None takes all cases.
        model: an ONNX file, weights, or the folder of a training.
        decode: None takes the model's own.
        note: sentence for the report about the labels; None takes the report's own.
        size: width and height of all images, px; None reads it from each image.
        landmarks_slug, angle_slug, image_slug: of the jobs' sockets.
    """

    data: Path
    images: Path
    split: str | None
    predictions: Path | None
    model: Path | None
    decode: Decode | None
    output: Path | None
    report: Path | None
    note: str | None
    frame_of_answers: Literal["world", "pixel"]
    size: tuple[int, int] | None
    landmarks_slug: str
    angle_slug: str
    image_slug: str | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = evaluate_options(arguments)
    try:
        cases = cases_of_split(options.data, options.split)
        figures, answers, fate = evaluate(options, cases)
        print(format_metrics(figures, answers.missing, fate))
    except (CaseError, ScoresError, ImageError, OSError) as error:
        print(f"training.evaluate: {error_sentence(error)}", file=sys.stderr)
        return 2
    try:
        if options.report:
            write_page(options, options.report, answers)
    except (ScoresError, ImageError, OSError) as error:
        print(
            f"training.evaluate: measured, but without a report: {error_sentence(error)}",
            file=sys.stderr,
        )
        return 1
    return 0


def evaluate_options(arguments: Sequence[str] | None) -> EvaluateOptions:
    """The options that a command line asks for, with --images filled in if it is left out."""
    args = _parser().parse_args(arguments)
    folder = args.data if args.data.is_dir() else args.data.parent
    beside = folder / "images"
    args.images = args.images or (beside if beside.is_dir() else folder)
    return EvaluateOptions(**vars(args))


def evaluate(
    options: EvaluateOptions, cases: list[Case]
) -> tuple[dict[str, Summary], AnsweredCases, str]:
    """Measure a model, a table of answers or jobs, and write the figures if asked for.

    Returns:
        The figures of each group, the answers, and what becomes of cases without one (to complete
        the sentence "3 cases ...").

    Raises:
        CaseError, ScoresError, ImageError, OSError: labels, images, answers or model are unusable.
    """
    if options.model:
        answers = predict_with_model(options, options.model, cases)
    else:
        assert options.predictions is not None  # the command line demands one of the two
        kind = detect_kind(options.predictions)
        if kind == "jobs":
            return *measure_jobs(options, options.predictions, cases), "counted as the worst"
        answers = read_answers(options.predictions, kind, cases, options.images)
    figures = summarise_by_device(answers.cases, answers.predictions)
    figures["all"]["missing"] = answers.missing
    if options.output:
        write_figures(options.output, figures)
    return figures, answers, "without a prediction, in no mean"


def predict_with_model(options: EvaluateOptions, model: Path, cases: list[Case]) -> AnsweredCases:
    """The answers of an ONNX file, of weights, or of the best weights in the folder of a training.

    Raises:
        ScoresError: the model cannot be used. CaseError: images are missing.
    """
    # imported late: an evaluation container has no torch, and measures no model
    import torch  # noqa: PLC0415

    from model.predictor import ModelError, load_predictor  # noqa: PLC0415
    from training.evaluation.predict import predict_cases, torch_predictor  # noqa: PLC0415
    from training.learning.checkpoint import CheckpointError, load_weights  # noqa: PLC0415

    require_images(cases, options.images, options.data)
    path = model / "best.safetensors" if model.is_dir() else model
    try:
        if path.suffix == ".onnx":
            predictor = load_predictor(path)
        else:
            network, checkpoint = load_weights(path)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            predictor = torch_predictor(network.to(device), checkpoint.spec, device)
        return AnsweredCases(
            cases, predict_cases(predictor, cases, options.images, options.decode), []
        )
    except (CheckpointError, ModelError) as error:
        raise ScoresError(str(error)) from error


def measure_jobs(
    options: EvaluateOptions, predictions: Path, cases: list[Case]
) -> tuple[dict[str, Summary], AnsweredCases]:
    """Score grand-challenge's jobs and write metrics.json; returns figures and answers."""
    in_world = options.frame_of_answers == "world"
    if options.size and in_world:
        raise ScoresError("--size needs answers in px: pass --frame-of-answers pixel too")
    common_grid = PixelGrid(*options.size) if options.size else None

    def grid_of(case: Case) -> PixelGrid:
        return common_grid or read_pixel_grid(options.images, case)

    sockets = Sockets(options.landmarks_slug, options.angle_slug, options.image_slug)
    scores, unmatched = score_jobs(predictions, cases, grid_of, sockets, in_world)
    figures = aggregate_scores(scores, unmatched)
    results = [score.result for score in scores]
    write_figures(options.output or METRICS, {"results": results, "aggregates": figures})
    if unmatched:
        print(f"{len(unmatched)} jobs belong to no case, the first: {unmatched[0]}")
    worst = [f"{r['case']}: {'; '.join(r['problems'])}" for r in results if r["problems"]]
    answers = answers_from_scores(scores) if options.report else AnsweredCases([], [], [])
    return {"all": figures}, answers._replace(missing=worst)


def write_page(options: EvaluateOptions, path: Path, answers: AnsweredCases) -> None:
    """Write the HTML report; without any answer, only say that there is none."""
    from training.evaluation.report import write_evaluation_report  # noqa: PLC0415

    cases, predictions, missing = answers
    if not cases:
        print("no report: no case has an answer")
        return
    source = options.model or options.predictions
    assert source is not None
    title = f"{source.name} against labels"
    title += f", split {options.split}" if options.split else ""
    more = {"note": options.note} if options.note else {}
    cases = [replace(case, file=find_image_file(options.images, case)) for case in cases]
    figures = summarise_by_device(cases, predictions)
    write_evaluation_report(
        path, cases, predictions, options.images, figures, missing, title, **more
    )


def write_figures(path: Path, content: object) -> None:
    """Write a JSON file, whole or not at all; numbers must be finite."""
    write_bytes(path, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def error_sentence(error: Exception) -> str:
    """An error in words, with the name of the file that it is about."""
    if isinstance(error, OSError):
        return f"{error.filename} cannot be used: {error.strerror}"
    return str(error)


def _parse_size(text: str) -> tuple[int, int]:
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
    images = (
        "folder of the table's images, in any format (default: images/ beside the table, else the "
        "table's folder)"
    )
    add("--images", type=Path, metavar="DIR", help=images)
    add("--split", help="split to measure: train, val or test (default: all cases)")
    source = parser.add_mutually_exclusive_group(required=True)
    answers = "answers: predictions.json, results.json, landmarks.csv or another reader's table"
    source.add_argument("--predictions", type=Path, metavar="FILE", help=answers)
    model = "model: .onnx, .safetensors with .json beside it, or the folder of a training"
    source.add_argument("--model", type=Path, metavar="FILE|RUN", help=model)
    decode = "decoder of --model (default: the model's own)"
    add("--decode", choices=get_args(Decode), help=decode)
    output = f"JSON file for the figures (default: none; for jobs {METRICS})"
    add("--output", type=Path, metavar="FILE", help=output)
    add("--report", type=Path, metavar="FILE", help="HTML page of figures and pictures to write")
    note = "sentence for the page that says where the labels come from"
    add("--note", metavar="SENTENCE", help=note)
    add = parser.add_argument_group("jobs").add_argument
    frame = "frame of the jobs' points: the image's world frame in mm, or px (%(default)s)"
    add("--frame-of-answers", choices=("world", "pixel"), default="world", help=frame)
    size = "size of all images in px, for when the images are not at hand"
    add("--size", type=_parse_size, metavar="WIDTHxHEIGHT", help=size)
    slug = "slug of the output that holds the points (%(default)s)"
    add("--landmarks-slug", default=Sockets().landmarks, metavar="SLUG", help=slug)
    slug = "slug of the output that holds the angle (%(default)s)"
    add("--angle-slug", default=Sockets().angle, metavar="SLUG", help=slug)
    slug = "slug of the input that names the case (default: the only input that is an image)"
    add("--image-slug", metavar="SLUG", help=slug)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
