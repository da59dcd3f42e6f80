"""Pseudo-labelling a pool of images by one teacher: predict, set thresholds, accept, write down.

Two tables and a picture say what became of each image.
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
from training.data.case_table import Case, CaseError, read_table, write_cases, write_rows
from training.data.dataset import read_grey
from training.evaluation.metrics import radial_errors_px
from training.evaluation.pictures import (
    CAPTION,
    LANDMARK_COLOURS,
    SHEET_COLUMNS,
    SHEET_TILE,
    TRUTH,
    grid,
    mark,
    put_text,
    spread,
    tile_of,
    with_legend,
)
from training.evaluation.predict import torch_predictor
from training.evaluation.test_time_augmentation import predict_views
from training.learning.checkpoint import load_weights, write_text
from training.learning.trainer import processes
from training.pseudo_labels.criteria import (
    Evidence,
    Objection,
    Thresholds,
    by_precision,
    by_share,
    judge,
)
from training.pseudo_labels.pool import Candidate, Pool, read_candidates

EXAMPLES = 24  # of accepted and of rejected images on the sheet
LINES, LETTERS = 4, 34  # of words on a tile


@dataclass(frozen=True)
class Rule:
    """How the thresholds are set: by `accept` or by `precision`; the other is None.

    Args:
        accept: share of the images to accept.
        precision: share of the accepted val cases whose mean radial error is within the bound.
        within_px: that bound, px at 512.
    """

    accept: float | None
    precision: float | None
    within_px: float

    def thresholds(
        self, cases: Sequence[Evidence], on_val: Sequence[Evidence], errors_px: Floats
    ) -> Thresholds:
        """The thresholds for cases to label, given those of val and their errors."""
        if self.precision is not None:
            return by_precision(on_val, errors_px, self.within_px, self.precision)
        assert self.accept is not None
        return by_share(cases, self.accept)


def label(
    teacher: Path,
    device: Provider,
    pool: Pool,
    val: Sequence[Case],
    images: Path,
    rule: Rule,
    folder: Path,
) -> int:
    """Pseudo-label the pool into a folder, unless that is done; returns how many were accepted.

    Args:
        val: labelled cases, in `images`, that tell what the thresholds are worth.

    Raises:
        CaseError, CriteriaError: no image can be accepted, or the sheet cannot be written.
    """
    done = folder / "thresholds.json"  # written last
    if done.exists():
        return len(read_table(folder / "pseudo.csv").rows)
    predictor = load_teacher(teacher, device)
    on_val, errors_px = judge_labelled(predictor, val, images)
    read = tqdm(read_candidates(pool.candidates), "labelling", len(pool.candidates), unit="image")
    found = [
        (candidate, evidence_of(predictor, frame.pixels, frame.geometry.pixel_shape))
        for candidate, frame in read
    ]
    thresholds = rule.thresholds([evidence for _, evidence in found], on_val, errors_px)
    labels = [PseudoLabel(c, evidence, thresholds.objections(evidence)) for c, evidence in found]
    accepted = sum(not one.objections for one in labels)
    if not accepted:
        raise CaseError(f"none of {len(labels)} images passes the thresholds {thresholds}")
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(folder, labels, pool, str(teacher))
    picture = folder / "sheet.png"
    if not cv2.imwrite(str(picture), sheet(labels)):
        raise CaseError(f"the sheet cannot be written to {picture}")
    print(
        f"{accepted} of {len(labels)} accepted: sharpness from {thresholds.sharpness:.3f}, views "
        f"within {thresholds.spread_px:.2f} px; look at {picture}"
    )
    figures = {
        "rule": asdict(rule),
        **asdict(thresholds),
        "teacher": str(teacher),
        "images": str(pool.root),
        "accepted": accepted,
        "rejected": Counter(one.objections[0][0] for one in labels if one.objections),
        "not_judged": Counter(criterion for _, (criterion, _) in pool.rejected),
        "val": worth(thresholds, on_val, errors_px, rule.within_px),
    }
    write_text(done, json.dumps(figures, indent=1) + "\n")
    return accepted


def evidence_of(predictor: Predictor, grey: Pixels, pixel_shape: Pair) -> Evidence:
    """Predict a (height, width) grey image of values 0..255 in all views and judge the answer."""
    found = predict_views(predictor, grey, pixel_shape)
    size = grey.shape[1], grey.shape[0]
    return judge(found, predictor.spec.codec, size, pixel_shape)


def judge_labelled(
    predictor: Predictor, cases: Sequence[Case], images: Path
) -> tuple[list[Evidence], Floats]:
    """The evidence about labelled cases, and the mean radial error of each at 512 px."""
    found, sides = [], []
    for case in tqdm(cases, "judging val", leave=False):
        grey, pixel_shape = read_grey(images / case.file, case.frame)
        found.append(evidence_of(predictor, grey, pixel_shape))
        sides.append(max(grey.shape))
    truth = [case.landmarks_px for case in cases]
    return found, radial_errors_px([e.landmarks_px for e in found], truth, sides).mean(axis=1)


def worth(
    thresholds: Thresholds, cases: Sequence[Evidence], errors_px: Floats, within_px: float
) -> dict[str, float | None]:
    """What the thresholds do on labelled cases, printed too; None for a mean over no case.

    The accepted pseudo-labels can be hoped to be as good as this, and no better.
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
    shown = {name: "-" if value is None else f"{value:.4g}" for name, value in figures.items()}
    print("  on val: " + ", ".join(f"{name} {value}" for name, value in shown.items()))
    return figures


def load_teacher(path: Path, device: Provider) -> Predictor:
    """A predictor of weights (.safetensors) or of an ONNX file."""
    if path.suffix == ".onnx":
        return load_predictor(path, device)
    network, checkpoint = load_weights(path)
    with processes(device) as place:
        return torch_predictor(network.to(place.device), checkpoint.spec, place.device)


@dataclass(frozen=True)
class PseudoLabel:
    """An image, its predicted landmarks, and what speaks against them; accepted if nothing does."""

    candidate: Candidate
    evidence: Evidence
    objections: list[Objection]

    @property
    def numbers(self) -> tuple[str, str]:
        """Mean sharpness, and mean spread in px at 512."""
        return (
            f"{self.evidence.sharpness.mean():.3f}",
            f"{self.evidence.spread_px.mean():.2f}",
        )


def write_tables(folder: Path, labels: Sequence[PseudoLabel], pool: Pool, source: str) -> None:
    """Write pseudo.csv, a case table of the accepted with their source, and rejected.csv."""
    accepted = [one for one in labels if not one.objections]
    path = folder / "pseudo.csv"
    cases = [
        Case(
            one.candidate.file,
            one.evidence.landmarks_px,
            one.evidence.aop_deg,
            frame=one.candidate.frame,
        )
        for one in accepted
    ]
    write_cases(path, cases)
    table = read_table(path)
    rows = [
        (*row.values(), source, *one.numbers)
        for (_, row), one in zip(table.rows, accepted, strict=True)
    ]
    write_rows(path, [*table.header, "source", "sharpness", "spread_px"], rows)

    refused: list[tuple[object, ...]]
    refused = [(c.file, c.frame, *objection, "", "") for c, objection in pool.rejected]
    for one in labels:
        if one.objections:
            reason = "; ".join(words for _, words in one.objections)
            where = one.candidate.file, one.candidate.frame
            refused.append((*where, one.objections[0][0], reason, *one.numbers))
    header = ["Filename", "Frame", "criterion", "reason", "sharpness", "spread_px"]
    write_rows(folder / "rejected.csv", header, refused)


def sheet(labels: Sequence[PseudoLabel]) -> Picture:
    """(H, W, 3) BGR: examples of the accepted, the sharpest first, then of the rejected."""
    order = sorted(labels, key=lambda one: -one.evidence.sharpness.mean())
    accepted = [one for one in order if not one.objections]
    rejected = sorted(
        (one for one in order if one.objections), key=lambda one: one.objections[0][0]
    )
    columns = min(SHEET_COLUMNS, max(3, len(accepted), len(rejected)))  # 3: the legend's width
    parts = []
    for group in (accepted, rejected):
        if group:
            chosen = [group[k] for k in spread(len(group), EXAMPLES)]
            parts.append(grid([_tile(one) for one in chosen], columns))
    names = dict(zip(LANDMARKS, LANDMARK_COLOURS, strict=True))
    return with_legend(np.vstack(parts), names | {"accepted": TRUTH, "rejected": DOUBT})


def _tile(one: PseudoLabel) -> Picture:
    """(SHEET_TILE + LINES * CAPTION, SHEET_TILE, 3) BGR: the image, then name and reasons."""
    _, frame = next(read_candidates([one.candidate]))
    tile, box = tile_of(frame.pixels, frame.geometry.pixel_shape, SHEET_TILE)
    mark(tile, box.to_input(one.evidence.landmarks_px), LANDMARK_COLOURS, 3, cv2.FILLED)
    colour = DOUBT if one.objections else TRUTH
    cv2.rectangle(tile, (0, 0), (SHEET_TILE - 1, SHEET_TILE - 1), colour, 2)
    words = [f"{one.candidate.file[-24:]} {one.evidence.aop_deg:.0f} deg"]
    for _, sentence in one.objections[:1]:  # the table has them all
        words += textwrap.wrap(sentence, LETTERS)
    caption = np.zeros((LINES * CAPTION, SHEET_TILE, 3), np.uint8)
    for k, line in enumerate(words[:LINES]):
        put_text(caption, line, (4, (k + 1) * CAPTION - 5))
    return np.vstack([tile, caption])
