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
    """The command line; either `predictions` or `model` is given.

    split: None for all cases. size: width and height of all images, px. slugs: of a job's sockets.
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
    options = read_options(arguments)
    try:
        cases = cases_of_split(options.data, options.split)
        figures, answers, fate = measure(options, cases)
        print(format_metrics(figures, answers.missing, fate))
    except (CaseError, ScoresError, ImageError, OSError) as error:
        print(f"training.evaluate: {sentence_of(error)}", file=sys.stderr)
        return 2
    try:
        if options.report:
            _write_report(options, options.report, answers)
    except (ScoresError, ImageError, OSError) as error:
        print(
            f"training.evaluate: measured, but without a report: {sentence_of(error)}",
            file=sys.stderr,
        )
        return 1
    return 0


def read_options(arguments: Sequence[str] | None) -> EvaluateOptions:
    """The command line, with the folder of images filled in where it is left out."""
    given = _parser().parse_args(arguments)
    folder = given.data if given.data.is_dir() else given.data.parent
    beside = folder / "images"
    given.images = given.images or (beside if beside.is_dir() else folder)
    return EvaluateOptions(**vars(given))


def measure(
    options: EvaluateOptions, cases: list[Case]
) -> tuple[dict[str, Summary], AnsweredCases, str]:
    """The figures of each group, the answers, and what becomes of cases without one.

    The figures are written as JSON too, if that is asked for; those of jobs always.
    """
    if options.model:
        answers = _predict(options, options.model, cases)
    else:
        assert options.predictions is not None  # the command line demands one of the two
        kind = detect_kind(options.predictions)
        if kind == "jobs":
            return *_measure_jobs(options, options.predictions, cases), "counted as the worst"
        answers = read_answers(options.predictions, kind, cases, options.images)
    figures = summarise_by_device(answers.cases, answers.predictions)
    figures["all"]["missing"] = answers.missing
    if options.output:
        write_json(options.output, figures)
    return figures, answers, "without a prediction, in no mean"


def sentence_of(error: Exception) -> str:
    """An error in words, with the name of the file that it is about."""
    if isinstance(error, OSError):
        return f"{error.filename} cannot be used: {error.strerror}"
    return str(error)


def _predict(options: EvaluateOptions, model: Path, cases: list[Case]) -> AnsweredCases:
    """Answers of an ONNX file, of weights, or of the best weights in the folder of a training."""
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


def _measure_jobs(
    options: EvaluateOptions, predictions: Path, cases: list[Case]
) -> tuple[dict[str, Summary], AnsweredCases]:
    """Scores of grand-challenge's jobs, written to metrics.json."""
    in_world = options.frame_of_answers == "world"
    if options.size and in_world:
        raise ScoresError("--size is for answers in px: add --frame-of-answers pixel")
    of_all = PixelGrid(*options.size) if options.size else None

    def grid_of(case: Case) -> PixelGrid:
        return of_all or read_pixel_grid(options.images, case)

    sockets = Sockets(options.landmarks_slug, options.angle_slug, options.image_slug)
    scores, unmatched = score_jobs(predictions, cases, grid_of, sockets, in_world)
    figures = aggregate_scores(scores, unmatched)
    results = [score.result for score in scores]
    write_json(options.output or METRICS, {"results": results, "aggregates": figures})
    if unmatched:
        print(f"{len(unmatched)} jobs belong to no case, the first: {unmatched[0]}")
    bad = [f"{r['case']}: {'; '.join(r['problems'])}" for r in results if r["problems"]]
    found = answers_from_scores(scores) if options.report else AnsweredCases([], [], [])
    return {"all": figures}, found._replace(missing=bad)


def _write_report(options: EvaluateOptions, path: Path, answers: AnsweredCases) -> None:
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
    add("--split", help="train, val or test (default: all cases)")
    source = parser.add_mutually_exclusive_group(required=True)
    answers = "predictions.json, results.json, landmarks.csv or another reader's table"
    source.add_argument("--predictions", type=Path, metavar="FILE", help=answers)
    source.add_argument("--model", type=Path, help=".onnx, .safetensors with its .json, or RUN")
    add("--decode", choices=get_args(Decode), help="decoder (default: the model's own)")
    output = f"JSON file for the figures (default: none; for jobs {METRICS})"
    add("--output", type=Path, metavar="FILE", help=output)
    add("--report", type=Path, metavar="FILE", help="HTML page to write, to look at")
    add("--note", help="sentence for the page that says where the labels come from")
    add = parser.add_argument_group("jobs").add_argument
    frame = "frame of the jobs' points: the image's world frame in mm, or px (%(default)s)"
    add("--frame-of-answers", choices=("world", "pixel"), default="world", help=frame)
    size = "size of all images in px, if they are not at hand"
    add("--size", type=_size, metavar="WIDTHxHEIGHT", help=size)
    slug = "slug of the output with the points (%(default)s)"
    add("--landmarks-slug", default=Sockets().landmarks, metavar="SLUG", help=slug)
    slug = "slug of the output with the angle (%(default)s)"
    add("--angle-slug", default=Sockets().angle, metavar="SLUG", help=slug)
    slug = "slug of the input that names the case (default: the one that is an image)"
    add("--image-slug", metavar="SLUG", help=slug)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
