"""Pseudo-label a pool of images with one teacher: predict, set thresholds, accept, write.

Two tables and a picture show whether each image was accepted, and why not.
"""

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from model.anatomy import LANDMARKS, Floats
from model.drawing.text import DOUBT, Picture
from model.frame import Pair, Pixels
from model.predictor import Predictor, Provider, load_predictor
from training.data.case_table import Case, CaseError, read_table, write_cases, write_csv
from training.data.dataset import read_frame
from training.evaluation.metrics import radial_errors_px
from training.evaluation.pictures import (
    CAPTION,
    LANDMARK_COLOURS,
    SHEET_COLUMNS,
    SHEET_TILE,
    TRUTH,
    add_legend,
    draw_circles,
    draw_text,
    letterboxed_tile,
    spread_indices,
    tile_grid,
)
from training.evaluation.predict import torch_predictor
from training.evaluation.test_time_augmentation import predict_variants
from training.learning.checkpoint import load_weights, write_text
from training.learning.trainer import join_processes
from training.pseudo_labels.criteria import (
    Evidence,
    Objection,
    Thresholds,
    gather_evidence,
    thresholds_by_precision,
    thresholds_by_share,
)
from training.pseudo_labels.pool import Candidate, Pool, read_candidates

EXAMPLES_PER_GROUP = 24  # on the sheet, of the accepted and of the rejected images
CAPTION_LINES, CAPTION_LETTERS = 4, 34  # at most, below a tile; letters a line


@dataclass(frozen=True)
class AcceptanceRule:
    """How the thresholds are set: by `accept` or by `precision`; the other is None.

    Args:
        accept: share of the images to accept.
        precision: share of the accepted val cases whose mean radial error is within `within_px`.
        within_px: px at 512.
    """

    accept: float | None
    precision: float | None
    within_px: float

    def thresholds(
        self, cases: Sequence[Evidence], on_val: Sequence[Evidence], errors_px: Floats
    ) -> Thresholds:
        """The thresholds for the cases to label.

        Args:
            on_val: the evidence about labelled cases.
            errors_px: (n,) the mean radial errors of these, px at 512.
        """
        if self.precision is not None:
            return thresholds_by_precision(on_val, errors_px, self.within_px, self.precision)
        assert self.accept is not None
        return thresholds_by_share(cases, self.accept)


@dataclass(frozen=True)
class PseudoLabel:
    """An image, the evidence about its predicted landmarks, and the objections to them.

    A pseudo-label without objections is accepted.
    """

    candidate: Candidate
    evidence: Evidence
    objections: list[Objection]

    @property
    def measures(self) -> tuple[str, str]:
        """Mean sharpness, and mean spread in px at 512, as the tables show them."""
        return (
            f"{self.evidence.sharpness.mean():.3f}",
            f"{self.evidence.spread_px.mean():.2f}",
        )


def label_pool(
    teacher: Path,
    device: Provider,
    pool: Pool,
    val: Sequence[Case],
    images: Path,
    rule: AcceptanceRule,
    folder: Path,
) -> int:
    """Pseudo-label the pool and return the number of accepted images.

    A folder that is already finished is not touched.

    Args:
        val: labelled cases in the folder `images`, on which the thresholds are measured.
        folder: receives pseudo.csv, rejected.csv, sheet.png and thresholds.json.

    Raises:
        CaseError, CriteriaError: no image can be accepted, or the sheet cannot be written.
    """
    done = folder / "thresholds.json"  # written last: the folder is finished
    if done.exists():
        return len(read_table(folder / "pseudo.csv").rows)
    predictor = load_any_predictor(teacher, device)
    on_val, errors_px = evidence_on_labelled(predictor, val, images)
    images_read = tqdm(
        read_candidates(pool.candidates), "labelling", len(pool.candidates), unit="image"
    )
    predicted = [
        (candidate, predict_evidence(predictor, frame.pixels, frame.geometry.pixel_shape))
        for candidate, frame in images_read
    ]
    thresholds = rule.thresholds([evidence for _, evidence in predicted], on_val, errors_px)
    labels = [
        PseudoLabel(candidate, evidence, thresholds.objections(evidence))
        for candidate, evidence in predicted
    ]
    accepted = sum(not label.objections for label in labels)
    if not accepted:
        raise CaseError(
            f"none of {len(labels)} images passes the thresholds: plausible anatomy, a sharpness "
            f"from {thresholds.sharpness:.3f} and variants within {thresholds.spread_px:.2f} px; "
            "lower --precision, raise --precision-px or pass --accept"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(folder, labels, pool, str(teacher))
    picture = folder / "sheet.png"
    if not cv2.imwrite(str(picture), example_sheet(labels)):
        raise CaseError(f"cannot write the picture {picture}")
    print(
        f"{accepted} of {len(labels)} accepted: sharpness at least {thresholds.sharpness:.3f}, "
        f"variants within {thresholds.spread_px:.2f} px; look at {picture}"
    )
    figures = {
        "rule": asdict(rule),
        **asdict(thresholds),
        "teacher": str(teacher),
        "images": str(pool.root),
        "accepted": accepted,
        "rejected": Counter(label.objections[0][0] for label in labels if label.objections),
        "not_judged": Counter(criterion for _, (criterion, _) in pool.rejected),
        "val": measure_thresholds(thresholds, on_val, errors_px, rule.within_px),
    }
    write_text(done, json.dumps(figures, indent=1) + "\n")
    return accepted


def predict_evidence(predictor: Predictor, grey: Pixels, pixel_shape: Pair) -> Evidence:
    """The evidence about a (height, width) grey image of values 0..255, from all its variants."""
    prediction = predict_variants(predictor, grey, pixel_shape)
    size = grey.shape[1], grey.shape[0]
    return gather_evidence(prediction, predictor.spec.codec, size, pixel_shape)


def evidence_on_labelled(
    predictor: Predictor, cases: Sequence[Case], images: Path
) -> tuple[list[Evidence], Floats]:
    """The evidence about labelled cases, and the (n,) mean radial error of each, px at 512."""
    evidence, sides_px = [], []
    for case in tqdm(cases, "predict val", leave=False):
        grey, pixel_shape = read_frame(images / case.file, case.frame)
        evidence.append(predict_evidence(predictor, grey, pixel_shape))
        sides_px.append(max(grey.shape))
    predicted = [one.landmarks_px for one in evidence]
    truth = [case.landmarks_px for case in cases]
    return evidence, radial_errors_px(predicted, truth, sides_px).mean(axis=1)


def measure_thresholds(
    thresholds: Thresholds, cases: Sequence[Evidence], errors_px: Floats, within_px: float
) -> dict[str, float | None]:
    """Measure the thresholds on labelled cases, and print the figures.

    The accepted pseudo-labels are at best as good as these figures.

    Returns:
        Name -> figure; None for a mean over no cases.
    """
    accepted = np.array([not thresholds.objections(case) for case in cases])
    good, bad = errors_px[accepted], errors_px[~accepted]
    figures = {
        "cases": len(cases),
        "accepted": len(good),
        "precision": float((good <= within_px).mean()) if len(good) else None,
        "mre_px_accepted": float(good.mean()) if len(good) else None,
        "mre_px_rejected": float(bad.mean()) if len(bad) else None,
    }
    texts = {name: "-" if value is None else f"{value:.4g}" for name, value in figures.items()}
    print("  on val: " + ", ".join(f"{name} {text}" for name, text in texts.items()))
    return figures


def load_any_predictor(path: Path, device: Provider) -> Predictor:
    """A predictor from an ONNX file or from weights (.safetensors)."""
    if path.suffix == ".onnx":
        return load_predictor(path, device)
    network, checkpoint = load_weights(path)
    with join_processes(device) as place:
        return torch_predictor(network.to(place.device), checkpoint.spec, place.device)


def write_tables(folder: Path, labels: Sequence[PseudoLabel], pool: Pool, source: str) -> None:
    """Write pseudo.csv and rejected.csv.

    pseudo.csv is a case table of the accepted images, each row with its source and its measures.
    rejected.csv names the other images, those that `pool` left out too, with the reasons.
    """
    accepted = [label for label in labels if not label.objections]
    path = folder / "pseudo.csv"
    cases = [
        Case(
            label.candidate.file,
            label.evidence.landmarks_px,
            label.evidence.aop_deg,
            frame=label.candidate.frame,
        )
        for label in accepted
    ]
    write_cases(path, cases)
    table = read_table(path)
    rows = [
        (*row.values(), source, *label.measures)
        for (_, row), label in zip(table.rows, accepted, strict=True)
    ]
    write_csv(path, [*table.header, "source", "sharpness", "spread_px"], rows)

    rejected: list[tuple[object, ...]] = [
        (candidate.file, candidate.frame, *objection, "", "")
        for candidate, objection in pool.rejected
    ]
    for label in labels:
        if label.objections:
            reason = "; ".join(sentence for _, sentence in label.objections)
            where = label.candidate.file, label.candidate.frame
            rejected.append((*where, label.objections[0][0], reason, *label.measures))
    header = ["Filename", "Frame", "criterion", "reason", "sharpness", "spread_px"]
    write_csv(folder / "rejected.csv", header, rejected)


def example_sheet(labels: Sequence[PseudoLabel]) -> Picture:
    """(H, W, 3) BGR: examples of the accepted images, then of the rejected.

    The accepted are in order of sharpness, the sharpest first; the rejected by criterion.
    """
    by_sharpness = sorted(labels, key=lambda label: -label.evidence.sharpness.mean())
    accepted = [label for label in by_sharpness if not label.objections]
    rejected = sorted(
        (label for label in by_sharpness if label.objections),
        key=lambda label: label.objections[0][0],
    )
    columns = min(SHEET_COLUMNS, max(3, len(accepted), len(rejected)))  # 3: the legend's width
    parts = []
    for group in (accepted, rejected):
        if group:
            chosen = [group[k] for k in spread_indices(len(group), EXAMPLES_PER_GROUP)]
            parts.append(tile_grid([_example_tile(label) for label in chosen], columns))
    names = dict(zip(LANDMARKS, LANDMARK_COLOURS, strict=True))
    return add_legend(np.vstack(parts), names | {"accepted": TRUTH, "rejected": DOUBT})


def _example_tile(label: PseudoLabel) -> Picture:
    """(SHEET_TILE + CAPTION_LINES * CAPTION, SHEET_TILE, 3): image, then name and first reason."""
    _, frame = next(read_candidates([label.candidate]))
    tile, box = letterboxed_tile(frame.pixels, frame.geometry.pixel_shape, SHEET_TILE)
    draw_circles(tile, box.to_input(label.evidence.landmarks_px), LANDMARK_COLOURS, 3, cv2.FILLED)
    colour = DOUBT if label.objections else TRUTH
    cv2.rectangle(tile, (0, 0), (SHEET_TILE - 1, SHEET_TILE - 1), colour, 2)
    lines = [f"{label.candidate.file[-24:]} {label.evidence.aop_deg:.0f} deg"]
    for _, sentence in label.objections[:1]:  # rejected.csv has all of them
        lines += textwrap.wrap(sentence, CAPTION_LETTERS)
    caption = np.zeros((CAPTION_LINES * CAPTION, SHEET_TILE, 3), np.uint8)
    for k, line in enumerate(lines[:CAPTION_LINES]):
        draw_text(caption, line, (4, (k + 1) * CAPTION - 5))
    return np.vstack([tile, caption])
