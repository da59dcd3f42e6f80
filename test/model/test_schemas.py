"""The schemas of the answers, and the table."""

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from model.anatomy import angle_of_progression
from model.results.files import AnswerFiles, write_json
from model.results.schemas import (
    CaseEntry,
    MultiplePoints,
    NamedPoint,
    points_by_name,
    table_lines,
    three_point_angle,
)
from training.data.case_table import read_cases

POINTS = {"PS1": (60.12344, 20.5), "PS2": (21.0, 31.25), "FH1": (80.99996, 71.00004)}
FILES = AnswerFiles("aop-landmarks.json", "angle-of-progression.json")


def entry(file: str = "a.png", **known) -> CaseEntry:
    fields = {"status": "ok", "landmarks_px": POINTS, "aop_deg": 100.0, **known}
    return CaseEntry(case=file, file=file, **fields)


def frame_points(k: int) -> list[NamedPoint]:
    """Three landmarks: x is the number of the landmark, y and z are that of the frame."""
    return [
        NamedPoint(name=name, point=(x, float(k), float(k)), probability=0.5)
        for x, name in enumerate(("PS1", "PS2", "FH1"))
    ]


def table(*entries: CaseEntry) -> str:
    stacks = any(entry.frame is not None for entry in entries if entry.status == "ok")
    return "".join(table_lines(entries, stacks))


def rows(*entries: CaseEntry) -> list[str]:
    return table(*entries).splitlines()


def load(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- Schemas


def test_multiple_points_is_the_challenges_kind(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", MultiplePoints(points=frame_points(4)))
    point = {"probability": 0.5}
    assert load(tmp_path / "a.json") == {
        "name": "AoP landmarks",
        "type": "Multiple points",
        "points": [
            {"name": "PS1", "point": [0.0, 4.0, 4.0], **point},
            {"name": "PS2", "point": [1.0, 4.0, 4.0], **point},
            {"name": "FH1", "point": [2.0, 4.0, 4.0], **point},
        ],
        "version": {"major": 1, "minor": 0},
    }


def test_three_point_angle_has_ps1_in_the_middle(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", three_point_angle(frame_points(4)))
    assert load(tmp_path / "a.json") == {
        "name": "AoP",
        "type": "Three-point angle",
        "angle": [[1.0, 4.0, 4.0], [0.0, 4.0, 4.0], [2.0, 4.0, 4.0]],
        "version": {"major": 1, "minor": 0},
    }


def test_case_entry_has_exactly_the_fields_of_the_contract() -> None:
    assert list(CaseEntry.model_fields) == [
        *("case", "file", "frame", "status", "width", "height", "spacing_mm"),
        "pixel_aspect",
        *("landmarks_px", "landmarks_mm", "aop_deg", "aop_interval_deg", "confidence"),
        *("expected_error_px", "expected_error_mm", "expected_aop_error_deg", "view_score"),
        *("plausible", "doubtful", "reasons", "warnings"),
        *("milliseconds", "error"),
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_no_answer_holds_a_number_that_is_not_finite(bad: float) -> None:
    with pytest.raises(ValidationError):
        NamedPoint(name="PS1", point=(1.0, bad, 0.0), probability=0.5)
    with pytest.raises(ValidationError):
        entry(aop_deg=bad)
    with pytest.raises(ValidationError):
        entry(landmarks_mm={"PS1": (bad, 1.0)})


@pytest.mark.parametrize("bad", [-0.01, 1.01])
def test_probability_is_one(bad: float) -> None:
    with pytest.raises(ValidationError):
        NamedPoint(name="PS1", point=(1.0, 2.0, 0.0), probability=bad)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError, match="landmarks"):
        CaseEntry(case="a", file="a", status="failed", landmarks=[])


def test_points_by_name_gives_plain_numbers_in_the_landmarks_order() -> None:
    points = points_by_name(np.float32([[1, 2], [3, 4], [5, 6]]).astype(np.float64))
    assert points == {"PS1": (1, 2), "PS2": (3, 4), "FH1": (5, 6)} and points_by_name(None) is None
    assert [*points] == ["PS1", "PS2", "FH1"]
    assert all(type(value) is float for point in points.values() for value in point)


# ---- The table


def test_table_has_the_challenges_columns_and_four_decimals() -> None:
    header, row = rows(entry())
    assert header == "Filename,PS1,PS2,FH1,AoP,Doubt"
    cells = 'a.png,"(60.1234, 20.5000)","(21.0000, 31.2500)","(81.0000, 71.0000)",'
    written = [(60.1234, 20.5), (21, 31.25), (81, 71)]
    assert row == f"{cells}{angle_of_progression(written):.4f},"
    assert "np." not in row


def test_angle_is_that_of_the_points_as_written() -> None:
    near = {"PS1": (10.0, 10.0), "PS2": (9.99994, 10.0), "FH1": (10.0, 10.00016)}
    turned = {**near, "FH1": (10.00006, 10.00016)}  # is written as (10.0001, 10.0002)
    for points, expected in ((near, 90.0), (turned, 116.5651)):
        row = rows(entry(landmarks_px=points))[1]
        assert float(row.rsplit(",", 2)[1]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("spacing", [None, (0.3, 0.3), (0.2, 0.5)])
def test_angle_is_in_mm_where_pixels_are_not_square(spacing: tuple | None) -> None:
    row = rows(entry(spacing_mm=spacing))[1]
    written = [(60.1234, 20.5), (21, 31.25), (81, 71)]
    expected = angle_of_progression(written, (0.2, 0.5) if spacing == (0.2, 0.5) else (1, 1))
    assert row.endswith(f",{expected:.4f},")
    assert (
        f"{angle_of_progression(written, (0.2, 0.5)):.1f}" != f"{angle_of_progression(written):.1f}"
    )


def test_doubt_stands_in_the_last_column() -> None:
    doubtful = entry(doubtful=True, reasons=["it is odd, very", 'a "b"'])
    assert rows(doubtful)[1].endswith(',"it is odd, very; a ""b"""')
    assert rows(entry())[1].endswith(",")


def test_table_leaves_failed_cases_out_and_gives_stacks_a_column(tmp_path: Path) -> None:
    failed = CaseEntry(case="b", file="b.png", frame=3, status="failed", error="no")
    assert rows(failed) == ["Filename,PS1,PS2,FH1,AoP,Doubt"]
    text = table(entry(), failed, entry("c.tif", frame=0), entry("c.tif", frame=11))
    assert [line.split(',"')[0] for line in text.splitlines()] == [
        "Filename,Frame,PS1,PS2,FH1,AoP,Doubt",
        *("a.png,", "c.tif,0", "c.tif,11"),
    ]
    (tmp_path / "landmarks.csv").write_text(text)
    cases = read_cases(tmp_path / "landmarks.csv")
    assert [(case.file, case.frame) for case in cases] == [
        *(("a.png", None), ("c.tif", 0), ("c.tif", 11)),
    ]
    np.testing.assert_allclose(cases[0].landmarks_px, [*POINTS.values()], atol=5.1e-5)


@pytest.mark.parametrize("name", ['a, "b".png', "line\nbreak.png", "a/\\xff.png", "é/ü.png"])
def test_table_holds_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "landmarks.csv").write_bytes(table(entry(name)).encode())
    assert read_cases(tmp_path / "landmarks.csv")[0].file == name
