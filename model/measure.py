"""One frame -> its entry in results.json: landmarks, angle, confidence, and reasons for doubt."""

import math
import re
from typing import Any

import numpy as np

from model.anatomy import LANDMARKS, angle_of_progression, implausibilities
from model.frame import Pair
from model.heatmap import Decode
from model.images.source import BadFrame, GreyFrame
from model.predictor import EngineError, Prediction, Predictor
from model.results.schemas import PX_DECIMALS, CaseEntry, NamedPoint, points_by_name
from model.spec import ModelSpec
from model.uncertainty import Bounds, interval_deg

OTHER_SIDE = {"left": "right", "right": "left"}


def measure_frame(
    case: str,
    file: str,
    frame: GreyFrame,
    predictor: Predictor,
    decode: Decode | None = None,
    mirror: bool = False,
) -> CaseEntry:
    """Predict one frame and judge the answer. A doubtful answer has all its numbers.

    Args:
        case, file: the case's name and file, for the entry.
        mirror: the image was acquired mirrored. It is flipped, predicted and judged, and the answer
            is mapped back. The reasons for doubt name the sides of the image before the flip.
    """
    height, width = frame.pixels.shape
    geometry = frame.geometry
    pixels = frame.pixels[:, ::-1].copy() if mirror else frame.pixels
    try:
        prediction = predictor.predict(pixels, geometry.pixel_shape, decode)
    except EngineError as error:
        return bad_frame_entry(case, file, BadFrame(frame.index, str(error)))
    predicted = prediction.landmarks_px.round(PX_DECIMALS)  # in px of `pixels`
    landmarks = predicted
    if mirror:
        landmarks = (np.array([width - 1, 0]) - predicted * [1, -1]).round(PX_DECIMALS)
    common = {
        "case": case,
        "file": file,
        "frame": frame.index,
        "width": width,
        "height": height,
        "spacing_mm": geometry.spacing_mm,
        "pixel_aspect": geometry.aspect if geometry.spacing_mm is None else None,
        "warnings": list(frame.warnings),
        "milliseconds": prediction.milliseconds,
    }
    try:
        angle = float(angle_of_progression(landmarks, geometry.pixel_shape))
    except ValueError as error:
        return CaseEntry(status="failed", error=f"no angle can be given: {error}", **common)
    implausible = implausibilities(predicted, (width, height), geometry.pixel_shape)
    reasons = [*implausible, *reasons_for_doubt(prediction, predictor.spec)]
    if mirror:
        reasons = [exchange_sides(reason) for reason in reasons]
    return CaseEntry(
        status="ok",
        landmarks_px=points_by_name(landmarks),
        landmarks_mm=points_by_name(geometry.to_mm(landmarks)),
        aop_deg=angle,
        confidence=dict(zip(LANDMARKS, prediction.confidence.tolist(), strict=True)),
        view_score=prediction.view_score,
        **_expected_error_fields(prediction, angle, predictor.spec, geometry.spacing_mm),
        plausible=not implausible,
        doubtful=bool(reasons),
        reasons=reasons,
        **common,
    )


# ---- Entries without an answer, or with a warning


def bad_frame_entry(case: str, file: str, bad: BadFrame) -> CaseEntry:
    """The entry of a frame, or of a whole file, that cannot be used."""
    return CaseEntry(case=case, file=file, frame=bad.index, status="failed", error=bad.reason)


def failed_entry(entry: CaseEntry, error: str) -> CaseEntry:
    """The entry of a frame that has an answer, but whose files could not be written."""
    known = {"case", "file", "frame", "width", "height", "spacing_mm", "pixel_aspect", "warnings"}
    return CaseEntry(status="failed", error=error, **entry.model_dump(include=known))


def warn_if_late(entry: CaseEntry, budget_ms: float | None) -> CaseEntry:
    """The entry, with a warning if its stages together took longer than the budget."""
    spent = sum(entry.milliseconds.values())
    if budget_ms is None or spent <= budget_ms:
        return entry
    warning = f"took {spent:.1f} ms, over the latency budget of {budget_ms:g} ms"
    return entry.model_copy(update={"warnings": [*entry.warnings, warning]})


# ---- Landmarks in the frame of answers


def named_points(entry: CaseEntry, frame: GreyFrame, in_world: bool) -> list[NamedPoint]:
    """An answered frame's landmarks in the file's world frame, or as (x, y, frame) in pixels."""
    assert entry.landmarks_px is not None and entry.confidence is not None  # it is answered
    flat = [entry.landmarks_px[name] for name in LANDMARKS]
    if in_world:
        points: list[list[float]] = frame.geometry.to_world(flat, frame.slice_index).tolist()
    else:
        points = [[x, y, float(frame.index or 0)] for x, y in flat]
    return [
        NamedPoint(name=name, point=(x, y, z), probability=entry.confidence[name])
        for name, (x, y, z) in zip(LANDMARKS, points, strict=True)
    ]


# ---- Doubt and expected errors


def reasons_for_doubt(prediction: Prediction, spec: ModelSpec) -> list[str]:
    """What speaks against a prediction, in words, apart from an implausible geometry."""
    reasons = list(prediction.doubts)
    calibration, expected = spec.calibration, prediction.expected
    if calibration is None or expected is None:
        for name, value in zip(LANDMARKS, prediction.confidence, strict=True):
            if value < spec.doubt_below:
                rounded_down = math.floor(value * 100) / 100  # so that it stays below the limit
                figures = f"confidence {rounded_down:.2f}, below {spec.doubt_below:.2f}"
                reasons.append(f"{name} is uncertain ({figures})")
        return reasons
    if prediction.view_score is not None and not _is_right_view(prediction, spec):
        reasons.append(
            "this does not look like a sagittal transperineal image with the symphysis on the "
            f"left (score {prediction.view_score:.3f}, below {calibration.view_below:.3f})"
        )
    if expected.aop_deg > calibration.error_above_deg:
        reasons.append(
            f"the angle's expected error is {expected.aop_deg:.1f} deg, above "
            f"{calibration.error_above_deg:.1f} deg"
        )
    return reasons


def exchange_sides(reason: str) -> str:
    """A reason for doubt about a flipped image, in words about the image before the flip."""
    exchanged = re.sub(r"\b(left|right)\b", lambda side: OTHER_SIDE[side[0]], reason)
    return exchanged.replace("the image may be mirrored", "perhaps the image needs no --mirror")


def aop_interval(prediction: Prediction, aop_deg: float, spec: ModelSpec) -> Bounds | None:
    """The 90 % interval of the angle in deg; None if it would not hold.

    It holds for a calibrated model, if there are an angle and outlines, in the view of the
    calibration.
    """
    if spec.calibration is None or prediction.expected is None or math.isnan(aop_deg):
        return None
    if prediction.doubts or not _is_right_view(prediction, spec):
        return None
    return interval_deg(spec.calibration, aop_deg, prediction.expected.aop_deg)


def _is_right_view(prediction: Prediction, spec: ModelSpec) -> bool:
    """Whether the view score reaches the calibration's threshold, or one of the two is missing."""
    threshold = spec.calibration.view_below if spec.calibration else None
    return threshold is None or prediction.view_score is None or prediction.view_score >= threshold


def _expected_error_fields(
    prediction: Prediction, aop_deg: float, spec: ModelSpec, spacing_mm: Pair | None
) -> dict[str, Any]:
    """The fields of an entry that only a calibrated model fills."""
    if spec.calibration is None or prediction.expected is None:
        return {}
    errors = prediction.expected.landmarks_px
    mm = None if spacing_mm is None else errors * float(np.sqrt(spacing_mm[0] * spacing_mm[1]))
    return {
        "expected_error_px": dict(zip(LANDMARKS, errors.tolist(), strict=True)),
        "expected_error_mm": None if mm is None else dict(zip(LANDMARKS, mm.tolist(), strict=True)),
        "expected_aop_error_deg": prediction.expected.aop_deg,
        "aop_interval_deg": aop_interval(prediction, aop_deg, spec),
    }
