"""One frame -> its entry in results.json: landmarks, angle, confidence, and any doubt in words."""

from model.anatomy import LANDMARKS, Floats, angle_of_progression, implausibilities
from model.heatmap import Decode
from model.image import BadFrame, GreyFrame
from model.outputs import PX_DECIMALS, CaseEntry, NamedPoint, named
from model.predictor import EngineError, Predictor


def measure(
    case: str, file: str, frame: GreyFrame, predictor: Predictor, decode: Decode | None = None
) -> CaseEntry:
    """Predict one frame and judge the answer; doubt is a mark, the numbers are always there."""
    height, width = frame.pixels.shape
    geometry = frame.geometry
    try:
        found = predictor.predict(frame.pixels, geometry.pixel_shape, decode)
    except EngineError as error:
        return bad_frame(case, file, BadFrame(frame.index, str(error)))
    landmarks = found.landmarks_px.round(PX_DECIMALS)
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
    oddities = implausibilities(landmarks, (width, height), geometry.pixel_shape)
    reasons = [*oddities, *found.doubts]
    reasons += _uncertain(found.confidence, predictor.spec.doubt_below)
    return CaseEntry(
        status="ok",
        landmarks_px=named(landmarks),
        landmarks_mm=named(geometry.to_mm(landmarks)),
        aop_deg=angle,
        confidence=dict(zip(LANDMARKS, found.confidence.tolist(), strict=True)),
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


def _uncertain(confidence: Floats, doubt_below: float) -> list[str]:
    return [
        f"{name} is uncertain (confidence {value:.2f}, below {doubt_below:.2f})"
        for name, value in zip(LANDMARKS, confidence, strict=True)
        if value < doubt_below
    ]
