"""From a frame to its entry: angle, reasons for doubt, and points in the frame of answers."""

import numpy as np
import pytest

from model.anatomy import LANDMARKS, angle_of_progression
from model.frame import Geometry
from model.images.source import BadFrame, GreyFrame
from model.measure import (
    bad_frame_entry,
    exchange_sides,
    failed_entry,
    measure_frame,
    named_points,
    warn_if_late,
)
from model.predictor import Output, Predictor
from model.results.schemas import CaseEntry
from model.uncertainty import QUANTITIES, Calibration, ErrorModel
from test.support.runs import predictor_at

SPREAD = [[40.0, 12.0], [15.0, 16.0], [48.0, 40.0]]  # px of a 64 px input
SWAPPED = [SPREAD[1], SPREAD[0], SPREAD[2]]
FRAME = GreyFrame(np.arange(64 * 128, dtype=np.float32).reshape(64, 128), None, 0, Geometry())


def entry_of(points: list, height: float = 0.9, frame: GreyFrame = FRAME) -> CaseEntry:
    return measure_frame("a", "a.png", frame, predictor_at(points, height))


def test_entry_of_a_sure_answer() -> None:
    entry = entry_of(SPREAD)
    assert (entry.status, entry.width, entry.height) == ("ok", 128, 64)
    # 128 px are 64 px of the input, and 16 rows of black lie above the image
    expected = (np.array(SPREAD) - [0, 16] + 0.5) * 2 - 0.5
    np.testing.assert_allclose([*entry.landmarks_px.values()], expected, atol=0.2)
    assert entry.aop_deg == angle_of_progression([*entry.landmarks_px.values()])
    for point in entry.landmarks_px.values():
        assert point == tuple(round(value, 4) for value in point)


@pytest.mark.parametrize(
    ("points", "height", "plausible", "words"),
    [
        (SPREAD, 0.9, True, []),
        (SPREAD, 0.3, True, [f"{name} is uncertain (confidence 0.2" for name in LANDMARKS]),
        (SWAPPED, 0.9, False, ["PS1 is not on the right of PS2"]),
    ],
)
def test_doubt(points: list, height: float, plausible: bool, words: list[str]) -> None:
    square = GreyFrame(FRAME.pixels[:, :64], None, 0, Geometry())
    entry = entry_of(points, height, square)
    assert (entry.status, entry.plausible, entry.doubtful) == ("ok", plausible, bool(words))
    assert all(reason.startswith(word) for reason, word in zip(entry.reasons, words, strict=False))
    assert entry.landmarks_px and entry.aop_deg


@pytest.mark.parametrize("points", [[SPREAD[0]] * 3, [SPREAD[0], SPREAD[1], SPREAD[0]], None])
def test_no_angle_is_a_failure(points: list | None) -> None:
    entry = entry_of(points) if points else entry_of(SPREAD, np.nan)  # a network gone wrong
    assert entry.status == "failed" and entry.landmarks_px is None and entry.aop_deg is None
    assert entry.error.startswith("no angle can be given: PS2 or FH1 equals PS1")
    assert (entry.width, entry.height, entry.doubtful) == (128, 64, None)


def test_spacing_warnings_and_frame_pass_into_the_entry() -> None:
    frame = GreyFrame(FRAME.pixels, 3, 3, Geometry((0.5, 0.25)), ("odd",))
    entry = entry_of(SPREAD, frame=frame)
    px = np.array([*entry.landmarks_px.values()])
    np.testing.assert_allclose([*entry.landmarks_mm.values()], px * [0.5, 0.25])
    assert (entry.frame, entry.spacing_mm, entry.warnings) == (3, (0.5, 0.25), ["odd"])
    assert entry.aop_deg == angle_of_progression(px, (0.5, 0.25)) != angle_of_progression(px)
    lost = failed_entry(entry, "no room")
    assert (lost.status, lost.error, lost.frame, lost.width) == ("failed", "no room", 3, 128)
    assert lost.landmarks_px is None and lost.confidence is None and lost.doubtful is None
    assert bad_frame_entry("a", "a.png", BadFrame(4, "cut")) == CaseEntry(
        case="a", file="a.png", frame=4, status="failed", error="cut"
    )


def test_points_in_world_and_pixels() -> None:
    turned = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    geometry = Geometry((0.5, 0.5), (0.5, 0.5, 2.0), (10.0, 20.0, 30.0), turned)
    frame = GreyFrame(FRAME.pixels, 3, 5, geometry)
    entry = entry_of(SPREAD, frame=frame)
    world, pixels = (named_points(entry, frame, in_world) for in_world in (True, False))
    for k, (x, y) in enumerate(entry.landmarks_px.values()):
        assert pixels[k].point == (x, y, 3.0)
        assert world[k].point == pytest.approx((10 - y / 2, 20 + x / 2, 40.0))
        assert world[k].name == pixels[k].name == LANDMARKS[k]
        assert world[k].probability == entry.confidence[LANDMARKS[k]]


def test_latency_budget() -> None:
    known = {"case": "a", "file": "a", "status": "ok", "warnings": ["odd"]}
    entry = CaseEntry(milliseconds={"read": 30.0, "write": 10.5}, **known)
    assert warn_if_late(entry, None) == warn_if_late(entry, 40.5) == entry
    late = warn_if_late(entry, 40.0).warnings
    assert late == ["odd", "took 40.5 ms, over the latency budget of 40 ms"]


def test_a_mirrored_image_is_flipped_judged_and_mapped_back() -> None:
    seen = []
    square = GreyFrame(FRAME.pixels[:, :64].copy(), None, 0, Geometry())
    inner = predictor_at(SPREAD)

    def run(network_input: np.ndarray) -> Output:
        seen.append(network_input)
        return inner.run(network_input)

    plain = measure_frame("a", "a.png", square, predictor_at(SPREAD))
    mirrored = measure_frame("a", "a.png", square, Predictor(inner.spec, run, "cpu"), mirror=True)
    flipped = GreyFrame(square.pixels[:, ::-1].copy(), None, 0, Geometry())
    measure_frame("a", "a.png", flipped, Predictor(inner.spec, run, "cpu"))
    np.testing.assert_array_equal(*seen)
    for name, (x, y) in plain.landmarks_px.items():
        assert mirrored.landmarks_px[name] == pytest.approx((63 - x, y))
    assert mirrored.aop_deg == pytest.approx(plain.aop_deg)
    assert mirrored.plausible  # though PS1 now lies on the left


def test_doubt_of_a_mirrored_image_names_its_own_sides() -> None:
    square = GreyFrame(FRAME.pixels[:, :64].copy(), None, 0, Geometry())
    first, *rest = measure_frame("a", "a.png", square, predictor_at(SWAPPED)).reasons
    assert first == "PS1 is not on the right of PS2: the image may be mirrored"
    entry = measure_frame("a", "a.png", square, predictor_at(SWAPPED), mirror=True)
    told = "PS1 is not on the left of PS2: perhaps the image needs no --mirror"
    assert entry.reasons == [told, *rest] and entry.doubtful and not entry.plausible
    assert entry.landmarks_px["PS1"][0] > entry.landmarks_px["PS2"][0]  # as the sentence says
    assert exchange_sides("left or right, upright") == "right or left, upright"


CALIBRATED = Calibration(
    errors={
        name: ErrorModel(weights=(np.log(error), 0, 0), limits=((0, 9), (-9, 9)))
        for name, error in zip(QUANTITIES, (4.0, 5.0, 8.0, 3.0), strict=True)
    },
    interval=2.0,
    error_above_deg=3.5,
    view_below=0.4,
    cases=30,
)


@pytest.mark.parametrize(
    ("view", "limit", "words"),
    [
        (0.5, 3.5, []),
        (0.3, 3.5, ["does not look like a sagittal transperineal image"]),
        (0.5, 2.5, ["the angle's expected error is 3.0 deg, above 2.5 deg"]),
        (0.1, 2.5, ["(score 0.100, below 0.400)", "expected error is 3.0 deg"]),
    ],
)
def test_what_a_calibrated_model_tells(view: float, limit: float, words: list[str]) -> None:
    inner = predictor_at(SPREAD, 0.01)  # its confidence no longer counts
    update = {"calibration": CALIBRATED.model_copy(update={"error_above_deg": limit})}
    spec = inner.spec.model_copy(update=update)

    def run(network_input: np.ndarray) -> Output:
        return Output(inner.run(network_input).maps, np.array([view], np.float32))

    frame = GreyFrame(FRAME.pixels[:, :64].copy(), None, 0, Geometry((0.5, 0.5)))
    entry = measure_frame("a", "a.png", frame, Predictor(spec, run, "cpu"))
    assert entry.expected_error_px == pytest.approx({"PS1": 0.5, "PS2": 0.625, "FH1": 1.0})
    assert entry.expected_error_mm == pytest.approx({"PS1": 0.25, "PS2": 0.3125, "FH1": 0.5})
    assert entry.expected_aop_error_deg == pytest.approx(3.0)
    if view < 0.4:  # the calibration is of another view
        assert entry.aop_interval_deg is None
    else:
        assert entry.aop_interval_deg == pytest.approx((entry.aop_deg - 6, entry.aop_deg + 6))
    assert entry.view_score == pytest.approx(view)
    assert entry.doubtful == bool(words) and len(entry.reasons) == len(words)
    assert all(word in reason for word, reason in zip(words, entry.reasons, strict=True))
    mirrored = measure_frame("a", "a.png", frame, Predictor(spec, run, "cpu"), mirror=True)
    sides = [("symphysis on the left", "symphysis on the right")] * (view < 0.4)
    for reason, other in zip(entry.reasons, mirrored.reasons, strict=True):
        assert other == (reason.replace(*sides.pop()) if sides else reason)
