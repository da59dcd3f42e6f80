"""Pseudo-labelling a pool of images by one teacher: predict, set the thresholds, accept or not."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from model.anatomy import Floats
from model.frame import Pair
from model.predictor import Predictor, load_predictor
from training.cases import Case, CaseError, read_table
from training.checkpoint import load_weights, write_text
from training.criteria import Evidence, Thresholds, by_precision, by_share, judge
from training.data import read_grey
from training.judged import Judged, sheet, write_tables
from training.loop import processes
from training.metrics import radial_errors_px
from training.pool import Pool, read_candidates
from training.predict import torch_predictor
from training.views import predict_views


@dataclass(frozen=True)
class Rule:
    """How the thresholds are set.

    Args:
        accept: by the share of the images to accept; or
        precision: by the share of the accepted val cases that have a mean radial error
        within_px: of so many px at 512 or less.
    """

    accept: float | None
    precision: float | None
    within_px: float

    def thresholds(
        self, cases: Sequence[Evidence], on_val: Sequence[Evidence], errors_px: Floats
    ) -> Thresholds:
        """The thresholds for cases to label, given those of val and their errors."""
        if self.precision is None:
            return by_share(cases, self.accept)
        return by_precision(on_val, errors_px, self.within_px, self.precision)


def label(
    teacher: Path,
    device: str,
    pool: Pool,
    val: Sequence[Case],
    images: Path,
    rule: Rule,
    folder: Path,
) -> int:
    """Pseudo-label the pool into a folder, if that is not done; returns how many were accepted.

    Args:
        val: labelled cases, in `images`, that tell what the thresholds are worth.
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
    judged = [Judged(c, evidence, thresholds.objections(evidence)) for c, evidence in found]
    accepted = sum(not one.objections for one in judged)
    if not accepted:
        raise CaseError(f"none of {len(judged)} images passes the thresholds {thresholds}")
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(folder, judged, pool, str(teacher))
    picture = folder / "sheet.png"
    if not cv2.imwrite(str(picture), sheet(judged)):
        raise CaseError(f"the sheet cannot be written to {picture}")
    print(
        f"{accepted} of {len(judged)} accepted: sharpness from {thresholds.sharpness:.3f}, views "
        f"within {thresholds.spread_px:.2f} px; look at {picture}"
    )
    figures = {
        "rule": asdict(rule),
        **asdict(thresholds),
        "teacher": str(teacher),
        "images": str(pool.root),
        "accepted": accepted,
        "rejected": Counter(one.objections[0][0] for one in judged if one.objections),
        "not_judged": Counter(criterion for _, (criterion, _) in pool.rejected),
        "val": worth(thresholds, on_val, errors_px, rule.within_px),
    }
    write_text(done, json.dumps(figures, indent=1) + "\n")
    return accepted


def evidence_of(predictor: Predictor, grey: np.ndarray, pixel_shape: Pair) -> Evidence:
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
    """What the thresholds do on labelled cases, printed too; None: of no case.

    So much, and no more, may be hoped of the accepted pseudo-labels.
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


def load_teacher(path: Path, device: str) -> Predictor:
    """A predictor of weights (.safetensors) or of an ONNX file, on auto, cuda or cpu."""
    if path.suffix == ".onnx":
        return load_predictor(path, device)
    network, checkpoint = load_weights(path)
    with processes(device) as place:
        return torch_predictor(network.to(place.device), checkpoint.spec, place.device)
