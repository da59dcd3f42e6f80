"""Scores of jobs whose answers are known, damaged or hostile, and how jobs find their cases."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from model.anatomy import LANDMARKS, angle_of_progression
from model.images.source import open_image
from test.conftest import ROOT
from test.support.runs import job as input_job
from test.support.runs import load, made, run, volume
from training import evaluate
from training.data.case_table import Case, write_cases
from training.evaluation.challenge_jobs import (
    MAX_ANSWER_BYTES,
    PixelGrid,
    ScoresError,
    case_finder,
    image_stem,
    read_pixel_grid,
)

POINTS = np.array([[60.0, 20.0], [20.0, 30.0], [90.0, 60.0]])
WIDTH, HEIGHT = 128, 96  # 1 px is 4 px at 512
WORST_PX = 640.0  # the diagonal, 160 px, at 512
NAMES = ["a.png", "b.png", "c.png"]
FIELDS = ("radial_error_px", "aop_error_deg", "problems", "aop_of_landmarks_deg")


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """Three cases in truth/cases.csv and truth/images/; case k has its landmarks moved by k px."""
    folder = tmp_path / "truth"
    (folder / "images").mkdir(parents=True)
    cases = []
    for k, name in enumerate(NAMES):
        image = np.random.default_rng(k).integers(0, 255, (HEIGHT, WIDTH), np.uint8)
        assert cv2.imwrite(str(folder / "images" / name), image)
        cases.append(Case(name, POINTS + k, float(angle_of_progression(POINTS))))
    write_cases(folder / "cases.csv", cases)
    return folder


def answer(points: np.ndarray, names: tuple[str, ...] = LANDMARKS) -> str:
    rows = np.column_stack([points, np.zeros(len(points))]).tolist()
    found = [{"name": n, "point": row} for n, row in zip(names, rows, strict=True)]
    return json.dumps({"name": "any", "type": "Multiple points", "points": found})


def a_job(root: Path, pk: str, image: str, points: np.ndarray, key: str = "socket", **more) -> dict:
    """A job as grand-challenge lists it; its answers are written below root/pk/output."""
    slugs = ("aop-landmarks", "angle-of-progression")
    folder = root / pk / "output"
    folder.mkdir(parents=True)
    (folder / f"{slugs[0]}.json").write_text(answer(points))
    (folder / f"{slugs[1]}.json").write_text(str(float(angle_of_progression(points))))
    place = {"slug": "us", "relative_path": "images/us", "super_kind": "Image", "id": 7}
    asked = [
        {"image": None, "value": 31, key: {"slug": "age", "relative_path": "age.json"}},
        {"image": {"name": image, "pk": "x"}, "value": None, "file": None, key: place},
    ]
    outputs = [
        {"image": None, "value": None, key: {"slug": s, "relative_path": f"{s}.json"}}
        for s in slugs
    ]
    status = {"status": "Succeeded", "exec_duration": "P0DT00H31M14S", **more}
    return {"pk": pk, "inputs": asked, "outputs": outputs, **status}


@pytest.fixture
def jobs(tmp_path: Path, truth: Path) -> list[dict]:
    """A job for each case, in another order, whose landmarks lie 1 px too far right."""
    return [a_job(tmp_path / "in", f"job-{k}", NAMES[k], POINTS + k + [1, 0]) for k in (2, 0, 1)]


def score(truth: Path, jobs: list | str, *options: str) -> dict:
    """The metrics.json of these jobs, read as strict JSON."""
    root = truth.parent / "in"
    root.mkdir(exist_ok=True)
    text = jobs if isinstance(jobs, str) else json.dumps(jobs)
    (root / "predictions.json").write_text(text)
    output = truth.parent / "out" / "metrics.json"
    arguments = ["--truth", str(truth), "--predictions", str(root / "predictions.json")]
    assert evaluate.main([*arguments, "--output", str(output), *options]) == 0

    def refuse(text: str) -> None:
        raise AssertionError(text)

    return json.loads(output.read_text(), parse_constant=refuse)


def test_figures_of_known_errors(truth, tmp_path, capsys):
    moved = [POINTS + [[3, 4], [0, 0], [0, k]] + k for k in range(3)]
    names = ["deep/er/a.mha", "b", "C.PNG"]  # the first two are found by their stem
    root = tmp_path / "in"
    jobs = [a_job(root, f"j{k}", n, moved[k], "interface") for k, n in enumerate(names)]
    jobs[2]["inputs"][1]["image"]["name"] = "c.png"
    turned = [2, 0, 1]
    (root / "j1/output/aop-landmarks.json").write_text(
        answer(moved[1][turned], tuple(LANDMARKS[k] for k in turned))
    )
    metrics = score(truth, jobs)
    assert [result["case"] for result in metrics["results"]] == NAMES
    for k, result in enumerate(metrics["results"]):
        assert result["jobs"] == [f"j{k}"] and result["problems"] == result["notes"] == []
        assert result["radial_error_px"] == pytest.approx({"PS1": 20, "PS2": 0, "FH1": 4 * k})
        angle = float(angle_of_progression(moved[k]))
        assert result["aop_deg"] == result["aop_of_landmarks_deg"] == pytest.approx(angle)
        off = abs(angle - float(angle_of_progression(POINTS)))
        assert result["aop_error_deg"] == pytest.approx(off, abs=1e-3)
    figures = metrics["aggregates"]
    assert figures["cases"] == 3 and figures["counted_as_worst"] == 0
    assert figures["missing"] == figures["unmatched_jobs"] == []
    assert figures["mre_px"]["value"] == pytest.approx((20 + 0 + 4) / 3)
    assert figures["mre_px"]["low"] < figures["mre_px"]["value"] < figures["mre_px"]["high"]
    assert figures["sdr_4px"]["value"] == pytest.approx((3 + 2) / 9)
    errors = [result["aop_error_deg"] for result in metrics["results"]]
    assert figures["aop_error_deg"]["value"] == pytest.approx(np.mean(errors))
    assert "mean radial error" in capsys.readouterr().out


# ---- One bad job: a change to the job or its files, and the problem that must be named


def write(name: str, text: str | bytes) -> Callable[[Path, dict], None]:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder, job: (folder / name).write_bytes(data) and None


def points(text: str) -> Callable[[Path, dict], None]:
    return write("aop-landmarks.json", text)


def angle(text: str) -> Callable[[Path, dict], None]:
    return write("angle-of-progression.json", text)


def path(text: str) -> Callable[[Path, dict], None]:
    return lambda folder, job: job["outputs"][0]["socket"].update(relative_path=text)


def changed(**more: object) -> Callable[[Path, dict], None]:
    return lambda folder, job: job.update(more)


def instead(make: Callable[[Path], object]) -> Callable[[Path, dict], None]:
    """Replace the landmarks' file by something else."""

    def change(folder: Path, job: dict) -> None:
        (folder / "aop-landmarks.json").unlink()
        make(folder / "aop-landmarks.json")

    return change


def huge(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(2**40)


def behind_link(folder: Path, job: dict) -> None:
    (folder / "there").symlink_to(folder.parent.parent / "job-1" / "output")
    job["outputs"][0]["socket"]["relative_path"] = "there/aop-landmarks.json"


def elsewhere(folder: Path, job: dict) -> None:
    folder.rename(folder.with_name("real"))
    folder.symlink_to("real")


GOOD = answer(POINTS)
DEEP = "[" * 30_000 + "]" * 30_000
OF_LANDMARKS = {
    "no file": (instead(lambda file: None), "no file that can be read"),
    "empty": (points(""), "Invalid JSON"),
    "no JSON": (points("PS1: 3, 4"), "Invalid JSON"),
    "no UTF-8": (write("aop-landmarks.json", b'{"points": "\xff"}'), "Invalid JSON"),
    "cut off": (points(GOOD[:-9]), "Invalid JSON"),
    "NaN": (points(GOOD.replace("60.0", "NaN", 1)), "points 0 point 0: Input should be a finite"),
    "infinite": (points(GOOD.replace("60.0", "-Infinity", 1)), "finite"),
    "1e999": (points(GOOD.replace("60.0", "1e999", 1)), "finite"),
    "a long number": (points(GOOD.replace("60.0", "9" * 5000, 1)), "number out of range"),
    "far out": (points(GOOD.replace("60.0", "1e300", 1)), "less than or equal to 1000000"),
    "a number as text": (points(GOOD.replace("60.0", '"60"', 1)), "valid number"),
    "true": (points(GOOD.replace("60.0", "true", 1)), "valid number"),
    "null": (points("null"), "object"),
    "a list": (points("[1, 2]"), "object"),
    "no points": (points('{"points": []}'), "the points are '', expected PS1, PS2, FH1"),
    "two points": (points(answer(POINTS[:2], LANDMARKS[:2])), "'PS1, PS2', expected"),
    "four": (points(answer(POINTS[[0, 1, 2, 0]], (*LANDMARKS, "PS1"))), "'PS1, PS2, FH1, PS1'"),
    "one twice": (points(answer(POINTS, ("PS1", "PS1", "FH1"))), "'PS1, PS1, FH1'"),
    "other names": (points(answer(POINTS, ("A", "\x1b[2J", "ps1"))), r"'A, \x1b[2J, ps1'"),
    "two numbers": (points(GOOD.replace(", 0.0]", "]")), "points 0 point 2: Field required"),
    "four numbers": (points(GOOD.replace("0.0]", "0.0, 0.0]")), "points 0 point: Tuple should"),
    "deep": (points(DEEP), "recursion limit"),
    "deep inside": (points(GOOD[:-1] + f', "more": {DEEP}}}'), "recursion limit"),
    "long": (points(GOOD + " " * MAX_ANSWER_BYTES), f"bytes, over {MAX_ANSWER_BYTES}"),
    "huge": (instead(huge), "1099511627776 bytes"),
    "a folder": (instead(Path.mkdir), "not a link, a folder or a pipe"),
    "a pipe": (instead(os.mkfifo), "not a link, a folder or a pipe"),
    "a link": (instead(lambda file: file.symlink_to("/etc/hostname")), "not a link"),
    "a ring": (instead(lambda file: file.symlink_to(file.name)), "not a link"),
    "another job's": (behind_link, "not a link"),
    "upwards": (path("../../job-1/output/aop-landmarks.json"), "leaves the job's folder"),
    "absolute": (path("/etc/hostname"), "'/etc/hostname' leaves the job's folder"),
    "the folder": (path("."), "leaves the job's folder"),
    "no path": (path(""), "leaves the job's folder"),
    "NUL": (path("a\0b"), r"'a\x00b' leaves"),
    "a long path": (path("x" * 5000), "no file that can be read (File name too long)"),
    "no such output": (lambda folder, job: job["outputs"].pop(0), "0 outputs aop-landmarks"),
}
OF_ANGLE = {
    "null": (angle("null"), "the angle: Input should be a valid number"),
    "NaN": (angle("NaN"), "finite"),
    "text": (angle('"92.4"'), "valid number"),
    "true": (angle("true"), "valid number"),
    "below 0": (angle("-0.1"), "greater than or equal to 0"),
    "above 180": (angle("180.01"), "less than or equal to 180"),
    "a list": (angle("[92.4]"), "valid number"),
    "deep": (angle(DEEP), "recursion limit"),
    "no file": (
        lambda folder, job: (folder / "angle-of-progression.json").unlink(),
        "angle-of-progression: no file",
    ),
    "two outputs": (lambda folder, job: job["outputs"].append(job["outputs"][1]), "2 outputs"),
}
OF_BOTH = {
    "failed": (changed(status="Failed"), "the job's status is 'Failed'"),
    "cancelled": (changed(status="Cancelled\r"), r"'Cancelled\r'"),
    "pk upwards": (changed(pk="../in/job-0"), "the job's pk is '../in/job-0'"),
    "pk absolute": (changed(pk="/etc"), "the job's pk is '/etc'"),
    "another script": (changed(pk="\u0661"), r"'\u0661'"),
    "no pk": (changed(pk=""), "the job's pk is ''"),
    "pk of another": (changed(pk="job-9"), "no file that can be read"),
    "no outputs": (changed(outputs=[]), "0 outputs aop-landmarks"),
    "a link as folder": (elsewhere, "not a link"),
}
BAD = [
    pytest.param(change, words, (landmarks, of_angle), id=f"{kind}: {name}")
    for kind, table, landmarks, of_angle in (
        ("landmarks", OF_LANDMARKS, True, False),
        ("angle", OF_ANGLE, False, True),
        ("both", OF_BOTH, True, True),
    )
    for name, (change, words) in table.items()
]


@pytest.mark.parametrize(("change", "words", "is_bad"), BAD)
def test_a_bad_answer_is_the_worst_and_costs_no_other(truth, jobs, change, words, is_bad):
    good = score(truth, jobs)["results"]
    change(truth.parent / "in" / "job-0" / "output", jobs[1])
    metrics = score(truth, jobs)
    bad, *others = metrics["results"]
    assert others == good[1:]
    assert bad["case"] == "a.png" and 1 <= len(bad["problems"]) <= sum(is_bad)
    assert words in " ".join(bad["problems"])
    assert max(map(len, bad["problems"])) < 200
    landmarks, of_angle = is_bad
    kept = set(FIELDS) - {"problems"}
    kept -= {"radial_error_px", "aop_of_landmarks_deg"} if landmarks else set()
    kept -= {"aop_error_deg"} if of_angle else set()
    assert {key: bad[key] for key in kept} == {key: good[0][key] for key in kept}
    if landmarks:
        assert bad["radial_error_px"] == dict.fromkeys(LANDMARKS, pytest.approx(WORST_PX))
        assert bad["mre_px"] == pytest.approx(WORST_PX) and bad["aop_of_landmarks_deg"] is None
    if of_angle:
        assert bad["aop_error_deg"] == 180 and bad["aop_deg"] is None
    figures = metrics["aggregates"]
    assert figures["cases"] == 3 and figures["counted_as_worst"] == 1
    mean = np.mean([result["mre_px"] for result in metrics["results"]])
    assert figures["mre_px"]["value"] == pytest.approx(mean)
    assert "180 deg" in figures["rules"] and "diagonal" in figures["rules"]


# ---- Jobs without a case, cases without a job


def worst(result: dict) -> bool:
    return result["aop_error_deg"] == 180 and result["mre_px"] == pytest.approx(WORST_PX)


DAMAGED = {
    "another image": (
        lambda job: job["inputs"][1]["image"].update(name="z.png"),
        "'z.png' is not one case of the truth",
    ),
    "no image": (lambda job: job["inputs"].pop(), "'job-0' names 0 images"),
    "no name": (lambda job: job["inputs"][1].update(image={}), "'job-0' names 1 images"),
    "two images": (lambda job: job["inputs"].append(job["inputs"][1]), "names 2 images"),
    "no pk": (lambda job: job.pop("pk"), "pk: Field required"),
    "a number as pk": (lambda job: job.update(pk=3), "pk: Input should be a valid string"),
    "inputs of another kind": (lambda job: job.update(inputs={}), "inputs: Input should be"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_job_without_a_case_is_named_and_its_case_is_missing(truth, jobs, name, capsys):
    good = score(truth, jobs)["results"]
    change, words = DAMAGED[name]
    change(jobs[1])
    metrics = score(truth, jobs)
    bad, *others = metrics["results"]
    assert others == good[1:] and worst(bad)
    assert bad["problems"] == ["no job for this case"] and bad["jobs"] == []
    assert metrics["aggregates"]["missing"] == ["a.png"]
    (sentence,) = metrics["aggregates"]["unmatched_jobs"]
    assert sentence.startswith("job 2: ") and words in sentence
    out = capsys.readouterr().out
    assert sentence in out and "1 cases counted as the worst: a.png: no job" in out


@pytest.mark.parametrize("item", ["7", "null", '"]"', "{pk: 3}", "[[],{}]", '{"pk": ' + DEEP + "}"])
def test_an_item_that_is_not_a_job_costs_no_other(truth, jobs, item):
    good = score(truth, jobs)["results"]
    texts = [json.dumps(job, indent=1) for job in jobs]
    metrics = score(truth, f" [{texts[0]}, {item} ,{texts[1]},\n{texts[2]}] \n")
    assert metrics["results"] == good
    (sentence,) = metrics["aggregates"]["unmatched_jobs"]
    assert sentence.startswith("job 2: ") and len(sentence) < 200


def test_strings_in_a_job_do_not_end_it(truth, jobs):
    good = score(truth, jobs)["results"]
    jobs[0]["inputs"][0]["value"] = '],[{"\\"'
    assert score(truth, jobs)["results"] == good


def test_two_jobs_of_one_case_count_neither(truth, jobs):
    twice = a_job(truth.parent / "in", "job-8", "a.mha", POINTS)
    metrics = score(truth, [*jobs, twice])
    assert [worst(result) for result in metrics["results"]] == [True, False, False]
    assert metrics["results"][0]["jobs"] == ["job-0", "job-8"]
    assert metrics["results"][0]["problems"] == ["2 jobs are for this case"]
    assert metrics["aggregates"]["missing"] == []


def test_no_job_at_all(truth):
    metrics = score(truth, [])
    assert all(map(worst, metrics["results"])) and metrics["aggregates"]["missing"] == NAMES
    assert metrics["aggregates"]["aop_error_deg"] == {"value": 180, "low": 180, "high": 180}


def test_no_answer_is_worse_than_a_missing_one(truth, jobs):
    file = truth.parent / "in/job-0/output/aop-landmarks.json"
    file.write_text(answer(POINTS + [[-999_999, 0], [5000, 0], [1, 0]]))
    errors = score(truth, jobs)["results"][0]["radial_error_px"]
    assert errors == pytest.approx({"PS1": WORST_PX, "PS2": WORST_PX, "FH1": 4})


def test_an_angle_that_is_not_the_landmarks_is_noted(truth, jobs):
    folder = truth.parent / "in/job-0/output"
    found = float(angle_of_progression(POINTS + [1, 0]))
    (folder / "angle-of-progression.json").write_text(f"{found + 0.2:.4f}")
    (truth.parent / "in/job-1/output/aop-landmarks.json").write_text(answer(POINTS[[0, 0, 2]]))
    first, second, third = score(truth, jobs)["results"]
    assert first["aop_error_deg"] == pytest.approx(0.2, abs=1e-3) and not first["problems"]
    expected = f"the angle is {found + 0.2:.2f} deg, that of the landmarks {found:.2f}"
    assert first["notes"] == [expected]
    assert second["notes"] == ["PS2 or FH1 equals PS1: no angle is defined"]
    assert second["aop_of_landmarks_deg"] is None and not second["problems"]
    assert second["aop_error_deg"] == pytest.approx(0, abs=1e-3)
    assert third["notes"] == []


# ---- The world's frame, sizes, slugs


def test_points_in_the_world_of_a_turned_image(truth, jobs):
    """An .mha instead of the .png: its world frame and unequal spacing count, for the angle too."""
    (truth / "images/a.png").unlink()
    turned = {"Spacing": (0.2, 0.5), "Origin": (-30.0, 7.0), "Direction": (0.0, -1.0, 1.0, 0.0)}
    image = volume(truth / "images/a.mha", made(1)[:HEIGHT, :WIDTH], **turned)
    world = open_image(image).geometry.to_world(POINTS + [0, 1])
    assert np.abs(world[:, :2] - POINTS).max() > 30
    file = truth.parent / "in/job-0/output/aop-landmarks.json"
    pairs = zip(LANDMARKS, world.tolist(), strict=True)
    file.write_text(json.dumps({"points": [{"name": n, "point": p} for n, p in pairs]}))
    result = score(truth, jobs)["results"][0]
    assert result["radial_error_px"] == pytest.approx(dict.fromkeys(LANDMARKS, 4))
    in_mm = float(angle_of_progression(POINTS, (0.2, 0.5)))
    assert result["aop_of_landmarks_deg"] == pytest.approx(in_mm)
    in_px = score(truth, jobs, "--frame-of-answers", "pixel")["results"][0]
    assert in_px["mre_px"] > 100


def test_a_size_replaces_the_images(truth, jobs, capsys):
    expected = score(truth, jobs, "--frame-of-answers", "pixel")
    (truth / "images").rename(truth.parent / "hidden")
    sized = ["--frame-of-answers", "pixel", "--size", f"{WIDTH}x{HEIGHT}"]
    assert score(truth, jobs, *sized) == expected
    moved = ["--images", str(truth.parent / "hidden")]
    assert score(truth, jobs, *moved) == expected  # the world frame of a PNG is px
    base = ["--truth", str(truth), "--predictions", str(truth.parent / "in/predictions.json")]
    assert evaluate.main(base) == 2
    error = capsys.readouterr().err
    assert "no image" in error and "--images" in error and "--size" in error
    assert evaluate.main([*base, "--size", "128x96"]) == 2
    assert "--frame-of-answers pixel" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main([*base, "--size", "128"])
    assert "expected WIDTHxHEIGHT" in capsys.readouterr().err


def test_slugs_of_a_challenge(truth, jobs):
    expected = score(truth, jobs)
    for job in jobs:
        for output, name in zip(job["outputs"], ("my-points", "my-angle"), strict=True):
            old = truth.parent / "in" / job["pk"] / "output" / output["socket"]["relative_path"]
            (old.parent / "my").mkdir(exist_ok=True)
            old.rename(old.parent / "my" / f"{name}.json")
            output["socket"] = {"slug": name, "relative_path": f"my/{name}.json"}
        job["inputs"].append({"image": {"name": "mask.mha"}, "socket": {"slug": "mask"}})
    options = ["--landmarks-slug", "my-points", "--angle-slug", "my-angle", "--image-slug", "us"]
    assert score(truth, jobs, *options) == expected


# ---- Predictions and truths that cannot be scored


@pytest.mark.parametrize(
    "text", ["[", '[{"pk": "a"}', "[]]", "[] x", '["', "[{]", '["' + '\\"' * 10**6, '["\\']
)
def test_a_list_that_does_not_end(truth, text, capsys):
    (truth.parent / "p.json").write_text(text)
    arguments = ["--truth", str(truth), "--predictions", str(truth.parent / "p.json")]
    assert evaluate.main([*arguments, "--output", str(truth / "metrics.json")]) == 2
    error = capsys.readouterr().err
    assert "p.json: expected a list of jobs as JSON" in error and error.count("\n") == 1
    assert not (truth / "metrics.json").exists()


def test_a_truth_of_frames_is_refused(truth, jobs, capsys):
    write_cases(truth / "cases.csv", [Case("a.png", POINTS, 90.0, frame=3)])
    with pytest.raises(AssertionError):
        score(truth, jobs)
    assert "the truth of a.png is for a frame" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_is_named(truth):
    (truth / "images/a.png").write_bytes(b"no image")
    with pytest.raises(ScoresError, match=r"images/a\.png: "):
        read_pixel_grid(truth / "images", Case("a.png", POINTS, 90.0))


@pytest.mark.slow
def test_scoring_jobs_needs_only_what_its_container_installs():
    """An evaluation container without torch stays small."""
    training = ROOT / "training"
    installed = re.search(r"grep -E '(.*?)'", (training / "evaluation.Dockerfile").read_text())[1]
    required = [line.partition("==")[::2] for line in (training / "requirements.txt").open()]
    absent = [name for name, pin in required if pin and not re.match(installed, f"{name}==")]
    assert "torch" in absent and "scipy" not in absent
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); "
        "import training.evaluate, training.evaluation.report"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_container_passes_its_options_on(truth, jobs, tmp_path):
    """The entry point of evaluation.Dockerfile, with the folders of the test instead of its own."""
    expected = score(truth, jobs)["aggregates"]
    text = (ROOT / "training" / "evaluation.Dockerfile").read_text()
    shell, *rest = json.loads(text.split("ENTRYPOINT ")[1])
    places = {
        "/input": tmp_path / "in", "/opt/ml/input/data/ground_truth": truth,
        "exec python": f"exec {sys.executable}",
    }  # fmt: skip
    for old, new in reversed(places.items()):
        rest = [word.replace(old, str(new)) for word in rest]
    set_by_build = {"EVALUATION_OPTIONS": f"--frame-of-answers pixel --size {WIDTH}x{HEIGHT}"}
    output = tmp_path / "with space" / "metrics.json"
    command = [shell, *rest, "--output", str(output)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | set_by_build, check=True, capture_output=True
    )
    assert load(output)["aggregates"] == expected
    assert done.stderr == b""  # grand-challenge shows stderr as warnings


# ---- Names


def test_cases_are_found_by_path_name_or_stem():
    files = ["x/1.png", "y/1.png", "2.nii.gz", "3.v1.png", "3.png", "4", "5.png", "5.mha"]
    find = case_finder([Case(file, POINTS, 0.0) for file in files])
    expected = {
        "x/1.png": "x/1.png", "1.png": None, "1": None, "z/1.png": None,
        "2.nii.gz": "2.nii.gz", "2.mha": "2.nii.gz", "2": "2.nii.gz", "sub/2.tif": "2.nii.gz",
        "3.v1.mha": "3.v1.png", "3.v1": "3.v1.png", "3.mha": "3.png", "4.png": "4", "9.png": None,
        "5.png": "5.png", "5.mha": "5.mha", "5.tif": None, "": None,
    }  # fmt: skip
    for name, file in expected.items():
        found = find(name)
        assert (found and found.file) == file, name
    assert image_stem("a/b.PNG") == "b"


def test_a_frame_is_found_by_its_number():
    cases = [Case("s.mha", POINTS, 0.0, frame=k) for k in (0, 1)] + [Case("t.mha", POINTS, 0.0)]
    find = case_finder(cases)
    assert find("s.tif", 1) is cases[1]
    assert find("s.mha") is None and find("t.mha", 0) is None and find("t.png") is cases[2]


# ---- The answers of process.py


def test_the_score_of_our_own_answers_agrees_with_results_json(tmp_path, truth):
    """The image is turned and has a spacing; scores in its world frame equal those in px."""
    turned = {"Spacing": (0.3, 0.3), "Origin": (5.0, -9.0), "Direction": (0.0, 1.0, -1.0, 0.0)}
    image = volume(input_job(tmp_path / "job") / "0e1f.mha", made(2), **turned)
    image.replace(truth / "images" / "b.mha")
    (tmp_path / "job/images/us/0e1f.mha").symlink_to(truth / "images" / "b.mha")
    answered = run(tmp_path / "job", tmp_path / "in" / "our-job" / "output")
    (entry,) = answered.results["cases"]
    found = np.array([entry["landmarks_px"][name] for name in LANDMARKS])
    case = Case("b.mha", found + [3, 4], entry["aop_deg"] + 2)
    write_cases(truth / "cases.csv", [case])
    place = {"slug": "us", "relative_path": "images/us", "super_kind": "Image"}
    outputs = [
        {"socket": {"slug": name, "relative_path": f"{name}.json"}}
        for name in ("aop-landmarks", "angle-of-progression")
    ]
    job = {"pk": "our-job", "inputs": [{"image": {"name": "b.mha"}, "socket": place}]}
    (result,) = score(truth, [{**job, "outputs": outputs, "status": "Succeeded"}])["results"]
    assert result["problems"] == result["notes"] == []
    moved = 5 * 512 / max(entry["width"], entry["height"])
    assert result["radial_error_px"] == pytest.approx(dict.fromkeys(LANDMARKS, moved), abs=1e-3)
    assert result["aop_error_deg"] == pytest.approx(2, abs=1e-3)
    assert load(tmp_path / "out" / "metrics.json")["aggregates"]["cases"] == 1


def test_a_pixel_grid_comes_from_the_file(truth):
    grid = read_pixel_grid(truth / "images", Case("b.png", POINTS, 0.0))
    assert grid == PixelGrid(WIDTH, HEIGHT)
