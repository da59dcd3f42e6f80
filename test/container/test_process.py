"""The container's contract when all goes well, on synthetic images."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import SimpleITK as sitk

from model.anatomy import LANDMARKS, angle_of_progression
from test.support.image_files import dicom
from test.support.runs import (
    ANGLE,
    ANSWERS,
    HEIGHT,
    POINTS,
    THREE,
    WIDTH,
    Run,
    job,
    load,
    made,
    png,
    run,
    shipped,
    tree,
    volume,
)
from training.data.case_table import read_cases

TURNED = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)


# ---- A folder of everything


@pytest.fixture(scope="session")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clinic")
    png(root / "grey.png")
    png(root / "sub" / "deep" / "colour.JPG", np.dstack([made(2)] * 3))
    planes = np.stack([made(3)] * 3)
    world = {"Spacing": (0.2, 0.3, 1.5), "Origin": (-7.0, 11.0, 3.0), "Direction": TURNED}
    volume(root / "planes.mha", planes, **world)
    stack = np.stack([made(seed) for seed in (1, 2, 3, 4)])
    volume(root / "cine.nrrd", stack, **world)
    volume(root / "flat.nii.gz", made(4).astype(np.float32) / 99, Spacing=(0.4, 0.4))
    png(root / "wide.png", made(1).astype(np.uint16) * 200)
    assert cv2.imwritemulti(str(root / "pages.tif"), [made(1), made(2)])
    (root / "notes.txt").write_text("no case")
    (root / ".hidden.png").write_text("no case")
    return root


@pytest.fixture(scope="session")
def answered(clinic: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(clinic, tmp_path_factory.mktemp("answered") / "new" / "out")


FOLDERS = {
    ("grey.png", None): "grey",
    ("sub/deep/colour.JPG", None): "sub__deep__colour",
    ("planes.mha", None): "planes",
    ("flat.nii.gz", None): "flat",
    ("wide.png", None): "wide",
    **{("cine.nrrd", k): f"cine/frame-000{k}" for k in range(4)},
    **{("pages.tif", k): f"pages/frame-000{k}" for k in range(2)},
}


def test_every_case_is_answered_in_its_folder(answered: Run) -> None:
    assert (answered.status, answered.err) == (0, "")
    assert re.search(r"11 answered, \d+ of them doubtful; 0 failed\n", answered.out)
    expected = [f"{folder}/{name}" for folder in FOLDERS.values() for name in ANSWERS]
    sheets = [f"{stack}/contact-sheet.png" for stack in ("cine", "pages")]
    assert tree(answered.folder) == sorted([*expected, *sheets, "results.json", "landmarks.csv"])
    found = [(entry["file"], entry["frame"]) for entry in answered.results["cases"]]
    assert sorted(found, key=str) == sorted(FOLDERS, key=str)


def test_entries_have_the_fields_of_the_contract(answered: Run) -> None:
    results = answered.results
    assert {"model", "provider", "settings", "cases"} <= set(results)
    assert results["model"] == shipped().spec.name
    assert results["provider"] == shipped().provider
    assert results["settings"]["decode"] == "subpixel" and results["settings"]["overlay"] is True
    for entry in results["cases"]:
        folder = FOLDERS[entry["file"], entry["frame"]]
        assert entry["case"] == folder.split("/")[0]
        assert entry["status"] == "ok" and entry["error"] is None
        assert (entry["width"], entry["height"]) == (WIDTH, HEIGHT)
        assert [*entry["landmarks_px"]] == [*entry["confidence"]] == [*LANDMARKS]
        assert all(0 <= value <= 1 for value in entry["confidence"].values())
        assert isinstance(entry["plausible"], bool)
        assert entry["doubtful"] is bool(entry["reasons"]) and entry["warnings"] == []
        stages = ["read", "preprocess", "inference", "decode", "overlay", "write"]
        assert [*entry["milliseconds"]] == stages and min(entry["milliseconds"].values()) >= 0
        if entry["view_score"] >= 0.5:
            low, high = entry["aop_interval_deg"]
            assert low < entry["aop_deg"] < high
        else:
            assert entry["aop_interval_deg"] is None and entry["doubtful"]
        for key in ("expected_error_px", *(["expected_error_mm"] if entry["spacing_mm"] else [])):
            assert [*entry[key]] == [*LANDMARKS] and min(entry[key].values()) > 0


def test_answer_files_say_what_results_say(answered: Run) -> None:
    for (file, frame), folder in FOLDERS.items():
        entry = answered.entry(file, frame)
        text = (answered.folder / folder / ANGLE).read_text()
        assert json.loads(text) == entry["aop_deg"] and isinstance(json.loads(text), float)
        answer = load(answered.folder / folder / POINTS)
        assert {key: answer[key] for key in ("name", "type", "version")} == {
            **{"name": "AoP landmarks", "type": "Multiple points"},
            "version": {"major": 1, "minor": 0},
        }
        found = {point["name"]: point["probability"] for point in answer["points"]}
        assert [*found] == [*LANDMARKS] and found == entry["confidence"]
        picture = cv2.imread(str(answered.folder / folder / "overlay.png"))
        expected = (640, 512) if file not in ("planes.mha", "cine.nrrd") else (533, 640)
        assert (
            picture.shape[1] == expected[0] and picture.shape[0] > expected[1]
        )  # the text is below


@pytest.mark.parametrize("frame_of_answers", ["world", "pixel"])
def test_points_lie_where_simpleitk_puts_them(
    clinic: Path, answered: Run, tmp_path: Path, frame_of_answers: str
) -> None:
    result = answered
    if frame_of_answers == "pixel":
        result = run(clinic, tmp_path, "--frame-of-answers", "pixel", "--no-overlay")
        assert result.results["settings"]["frame_of_answers"] == "pixel"
    for (file, frame), folder in FOLDERS.items():
        points = load(result.folder / folder / POINTS)["points"]
        image = None
        if frame_of_answers == "world" and file.endswith((".mha", ".nrrd", ".nii.gz")):
            image = sitk.ReadImage(str(clinic / file))
        elif frame_of_answers == "world" and frame is not None:
            continue  # a TIFF has no world
        for point, (x, y) in zip(
            points, result.entry(file, frame)["landmarks_px"].values(), strict=True
        ):
            expected = (x, y, float(frame or 0))
            if image is not None:
                index = expected[: image.GetDimension()]
                expected = (*image.TransformContinuousIndexToPhysicalPoint(index), 0.0)[:3]
            np.testing.assert_allclose(point["point"], expected, atol=1e-9)


def test_mm_and_the_angle_in_mm(answered: Run) -> None:
    spacings = {"planes.mha": (0.2, 0.3), "cine.nrrd": (0.2, 0.3), "flat.nii.gz": (0.4, 0.4)}
    for file, frame in FOLDERS:
        entry, spacing = answered.entry(file, frame), spacings.get(file)
        points = np.array([*entry["landmarks_px"].values()])
        expected = angle_of_progression(points, spacing or (1, 1))
        assert entry["aop_deg"] == pytest.approx(expected, abs=1e-9)
        if spacing is None:
            assert entry["spacing_mm"] is None and entry["landmarks_mm"] is None
        else:
            assert entry["spacing_mm"] == pytest.approx(spacing, abs=1e-7)
            mm = [*entry["landmarks_mm"].values()]
            np.testing.assert_allclose(mm, points * entry["spacing_mm"], atol=1e-9)


def test_table_is_read_by_the_training_code(answered: Run) -> None:
    lines = (answered.folder / "landmarks.csv").read_text().splitlines()
    names = ["Filename", "Frame", *LANDMARKS, "AoP", "Doubt"]
    assert sorted(lines[0].split(",")) == sorted(names)
    cases = read_cases(answered.folder / "landmarks.csv")
    assert {(case.file, case.frame) for case in cases} == set(FOLDERS)
    for case in cases:
        entry = answered.entry(case.file, case.frame)
        points = np.array([*entry["landmarks_px"].values()])
        np.testing.assert_allclose(case.landmarks_px, points, atol=5.1e-5)
        angle = angle_of_progression(case.landmarks_px, entry["spacing_mm"] or (1, 1))
        assert case.aop_deg == pytest.approx(angle, abs=5.1e-5)


def test_equal_scenes_get_equal_answers_whatever_the_file(answered: Run) -> None:
    same = [("grey.png", None), ("wide.png", None), ("pages.tif", 0)]
    points = [[*answered.entry(*key)["landmarks_px"].values()] for key in same]
    np.testing.assert_allclose(points[1], points[0], atol=2)  # a stretched grey scale
    assert points[2] == points[0]
    assert (
        answered.entry("cine.nrrd", 2)["landmarks_px"]
        == answered.entry("planes.mha")["landmarks_px"]
    )


@pytest.mark.slow
def test_same_input_gives_the_same_bytes(clinic: Path, answered: Run, tmp_path: Path) -> None:
    shutil.copytree(answered.folder, tmp_path / "out")  # an earlier run lies there
    again = run(clinic, tmp_path / "out")
    assert tree(again.folder) == tree(answered.folder)
    for name in tree(again.folder):
        if name != "results.json":
            assert (again.folder / name).read_bytes() == (answered.folder / name).read_bytes()
    first = load(answered.folder / "results.json")
    for entry in (*first["cases"], *again.results["cases"]):
        assert entry.pop("milliseconds")
    assert again.results == first


# ---- A job


def test_job_answers_at_the_top_without_overlay(tmp_path: Path) -> None:
    image = volume(job(tmp_path / "in") / "0e1f.mha", made(1)[None], Spacing=(0.5, 0.5, 1))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    result = run(tmp_path / "link", tmp_path / "out")
    assert (result.status, result.err) == (0, "")
    assert tree(result.folder) == sorted([POINTS, ANGLE, "results.json", "landmarks.csv"])
    entry = result.entry("images/us/0e1f.mha")
    assert load(result.folder / ANGLE) == entry["aop_deg"]
    points = [point["point"][:2] for point in load(result.folder / POINTS)["points"]]
    np.testing.assert_allclose(points, [*entry["landmarks_mm"].values()], atol=1e-9)
    assert [case.file for case in read_cases(result.folder / "landmarks.csv")] == [entry["file"]]
    assert str(image.relative_to(tmp_path / "in")) == entry["file"]


def test_names_of_answers_and_overlay_by_option(tmp_path: Path) -> None:
    png(job(tmp_path / "in") / "a.tif")
    names = ("--landmarks-file", "points.json", "--angle-file", "x/deg.json")
    result = run(
        tmp_path / "in", tmp_path / "out", *names, "--overlay", "--three-points-file", THREE
    )
    expected = ["results.json", "landmarks.csv", "overlay.png", "points.json", "x/deg.json", THREE]
    assert result.status == 0 and tree(result.folder) == sorted(expected)
    points = {p["name"]: p["point"] for p in load(result.folder / "points.json")["points"]}
    assert load(result.folder / THREE) == {
        **{"name": "AoP", "type": "Three-point angle", "version": {"major": 1, "minor": 0}},
        "angle": [points[name] for name in ("PS2", "PS1", "FH1")],
    }


@pytest.mark.slow
@pytest.mark.parametrize("below", ["", "series"])
def test_job_of_a_dicom_folder_answers_all_frames_at_once(tmp_path: Path, below: str) -> None:
    folder = job(tmp_path / "in") / below
    folder.mkdir(exist_ok=True)
    for name, seed in (("c.dcm", 1), ("a.dcm", 2), ("b.dcm", 3)):
        dicom(folder / name, made(seed)[None], spacing="0.2\\0.2", number=seed + 8)  # 9 before 10
    result = run(tmp_path / "in", tmp_path / "out", "--three-points-file", THREE)
    assert (result.status, result.err) == (0, "")
    assert tree(result.folder) == sorted([POINTS, ANGLE, THREE, "results.json", "landmarks.csv"])
    entries = result.results["cases"]
    assert [entry["frame"] for entry in entries] == [0, 1, 2]
    for seed, entry in enumerate(entries, 1):
        png(tmp_path / "one" / f"{seed}.png", made(seed))
        assert entry["file"] == str(Path("images/us") / below)
        assert entry["spacing_mm"] == [0.2, 0.2]
    one = run(tmp_path / "one", tmp_path / "one-out", "--no-overlay")
    expected = [e["landmarks_px"] for e in one.results["cases"]]
    assert [entry["landmarks_px"] for entry in entries] == expected  # by InstanceNumber
    points = load(result.folder / POINTS)["points"]
    assert [point["name"] for point in points] == [*LANDMARKS] * 3
    found = [point["point"][:2] for point in points]
    wanted = [xy for entry in entries for xy in entry["landmarks_mm"].values()]
    np.testing.assert_allclose(found, wanted, atol=1e-9)
    angles = [entry["aop_deg"] for entry in entries]
    assert load(result.folder / ANGLE) == sorted(angles)[1]
    middle = angles.index(sorted(angles)[1])
    assert load(result.folder / THREE)["angle"][1] == points[3 * middle]["point"]


@pytest.mark.slow
def test_frames_of_a_job_have_their_z(tmp_path: Path) -> None:
    stack = np.stack([made(1), made(2)])
    volume(job(tmp_path / "in") / "a.mha", stack, Spacing=(0.5, 0.5, 2), Origin=(0, 0, 5))
    for frame_of_answers, expected in (("world", [5.0, 7.0]), ("pixel", [0.0, 1.0])):
        result = run(tmp_path / "in", tmp_path / "out", "--frame-of-answers", frame_of_answers)
        z = [point["point"][2] for point in load(result.folder / POINTS)["points"]]
        assert z == [expected[0]] * 3 + [expected[1]] * 3
    overlaid = run(tmp_path / "in", tmp_path / "out", "--overlay")
    pictures = [name for name in tree(overlaid.folder) if name.endswith("overlay.png")]
    assert pictures == ["frame-0000/overlay.png", "frame-0001/overlay.png"]
    assert "contact-sheet.png" in tree(overlaid.folder)
