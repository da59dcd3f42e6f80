"""One frame -> its entry in results.json: landmarks, angle, confidence, and any doubt in words."""

import math
import re
from typing import Any

import numpy as np

from model.anatomy import LANDMARKS, angle_of_progression, implausibilities
from model.frame import Pair
from model.heatmap import Decode
from model.images.source import BadFrame, GreyFrame
from model.predictor import EngineError, Prediction, Predictor
from model.results.schemas import PX_DECIMALS, CaseEntry, NamedPoint, named
from model.spec import ModelSpec
from model.uncertainty import interval_deg

OTHER_SIDE = {"left": "right", "right": "left"}


def measure(
    case: str,
    file: str,
    frame: GreyFrame,
    predictor: Predictor,
    decode: Decode | None = None,
    mirror: bool = False,
) -> CaseEntry:
    """Predict one frame and judge the answer; doubt is a mark, the numbers are always there.

    Args:
        mirror: the image was acquired mirror-wise: it is flipped, predicted, judged, mapped back;
            the reasons for doubt speak of the image as it was given.
    """
    height, width = frame.pixels.shape
    geometry = frame.geometry
    pixels = frame.pixels[:, ::-1].copy() if mirror else frame.pixels
    try:
        found = predictor.predict(pixels, geometry.pixel_shape, decode)
    except EngineError as error:
        return bad_frame(case, file, BadFrame(frame.index, str(error)))
    seen = found.landmarks_px.round(PX_DECIMALS)
    landmarks = (np.array([width - 1, 0]) - seen * [1, -1]).round(PX_DECIMALS) if mirror else seen
    common = {
        "case": case,
        "file": file,
        "frame": frame.index,
        "width": width,
        "height": height,
        "spacing_mm": geometry.spacing_mm,
        "warnings": list(frame.warnings),
        "milliseconds": found.milliseconds,
    }
    try:
        angle = float(angle_of_progression(landmarks, geometry.pixel_shape))
    except ValueError as error:
        return CaseEntry(status="failed", error=f"no angle can be given: {error}", **common)
    oddities = implausibilities(seen, (width, height), geometry.pixel_shape)
    reasons = [*oddities, *doubts(found, predictor.spec)]
    if mirror:
        reasons = [unflipped(reason) for reason in reasons]
    return CaseEntry(
        status="ok",
        landmarks_px=named(landmarks),
        landmarks_mm=named(geometry.to_mm(landmarks)),
        aop_deg=angle,
        confidence=dict(zip(LANDMARKS, found.confidence.tolist(), strict=True)),
        view_score=found.view_score,
        **_expected(found, angle, predictor.spec, geometry.spacing_mm),
        plausible=not oddities,
        doubtful=bool(reasons),
        reasons=reasons,
        **common,
    )


def bad_frame(case: str, file: str, bad: BadFrame) -> CaseEntry:
    """The entry of a frame, or of a whole file, that cannot be used."""
    return CaseEntry(case=case, file=file, frame=bad.index, status="failed", error=bad.reason)


def failed_entry(entry: CaseEntry, error: str) -> CaseEntry:
    """The entry of a frame whose answer was found and then lost."""
    known = {"case", "file", "frame", "width", "height", "spacing_mm", "warnings"}
    return CaseEntry(status="failed", error=error, **entry.model_dump(include=known))


def within_budget(entry: CaseEntry, budget_ms: float | None) -> CaseEntry:
    """The entry, with a warning where its stages took longer than the budget."""
    spent = sum(entry.milliseconds.values())
    if budget_ms is None or spent <= budget_ms:
        return entry
    warning = f"took {spent:.1f} ms, over the latency budget of {budget_ms:g} ms"
    return entry.model_copy(update={"warnings": [*entry.warnings, warning]})


def points_of(entry: CaseEntry, frame: GreyFrame, in_world: bool) -> list[NamedPoint]:
    """An answered frame's landmarks in the file's world frame, or as (x, y, frame) in pixels."""
    assert entry.landmarks_px is not None and entry.confidence is not None  # it is answered
    flat = [entry.landmarks_px[name] for name in LANDMARKS]
    if in_world:
        placed: list[list[float]] = frame.geometry.to_world(flat, frame.slice_index).tolist()
    else:
        placed = [[x, y, float(frame.index or 0)] for x, y in flat]
    return [
        NamedPoint(name=name, point=(x, y, z), probability=entry.confidence[name])
        for name, (x, y, z) in zip(LANDMARKS, placed, strict=True)
    ]


def doubts(found: Prediction, spec: ModelSpec) -> list[str]:
    """What speaks against a prediction, in words, but for its geometry."""
    reasons = list(found.doubts)
    calibration = spec.calibration
    if calibration is None or found.expected is None:
        for name, value in zip(LANDMARKS, found.confidence, strict=True):
            if value < spec.doubt_below:
                shown = math.floor(value * 100) / 100  # never as if it reached the limit
                limit = f"confidence {shown:.2f}, below {spec.doubt_below:.2f}"
                reasons.append(f"{name} is uncertain ({limit})")
        return reasons
    if found.view_score is not None and not _right_view(found, spec):
        reasons.append(
            "this does not look like a sagittal transperineal image with the symphysis on the "
            f"left (score {found.view_score:.3f}, below {calibration.view_below:.3f})"
        )
    if found.expected.aop_deg > calibration.error_above_deg:
        reasons.append(
            f"an error of {found.expected.aop_deg:.1f} deg is to be expected, above "
            f"{calibration.error_above_deg:.1f} deg"
        )
    return reasons


def unflipped(reason: str) -> str:
    """What was said of a flipped image, said of the image before it was flipped."""
    swapped = re.sub(r"\b(left|right)\b", lambda side: OTHER_SIDE[side[0]], reason)
    return swapped.replace("the image may be mirrored", "perhaps the image needs no --mirror")


def interval_of(found: Prediction, aop_deg: float, spec: ModelSpec) -> Pair | None:
    """The 90 % interval of the angle; None where it would not hold.

    That is without a calibration or an angle, without outlines, and in another view than the one
    that the calibration is of.
    """
    if spec.calibration is None or found.expected is None or math.isnan(aop_deg):
        return None
    if found.doubts or not _right_view(found, spec):
        return None
    return interval_deg(spec.calibration, aop_deg, found.expected.aop_deg)


def _right_view(found: Prediction, spec: ModelSpec) -> bool:
    least = spec.calibration.view_below if spec.calibration else None
    return least is None or found.view_score is None or found.view_score >= least


def _expected(
    found: Prediction, aop_deg: float, spec: ModelSpec, spacing_mm: Pair | None
) -> dict[str, Any]:
    """The fields of an entry that a calibrated model fills."""
    if spec.calibration is None or found.expected is None:
        return {}
    errors = found.expected.landmarks_px
    mm = None if spacing_mm is None else errors * float(np.sqrt(spacing_mm[0] * spacing_mm[1]))
    return {
        "expected_error_px": dict(zip(LANDMARKS, errors.tolist(), strict=True)),
        "expected_error_mm": None if mm is None else dict(zip(LANDMARKS, mm.tolist(), strict=True)),
        "expected_aop_error_deg": found.expected.aop_deg,
        "aop_interval_deg": interval_of(found, aop_deg, spec),
    }
