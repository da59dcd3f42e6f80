"""Figures of hand-made errors, matching of tables, results.json and jobs, and two readers."""

import csv
import json
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from model.anatomy import LANDMARKS, angle_of_progression
from model.results.files import write_results
from model.results.schemas import CaseEntry, Results, points_by_name
from training import evaluate
from training.data.case_table import Case, read_cases, write_cases
from training.data.dataset import read_frame
from training.evaluation.challenge_jobs import detect_kind
from training.evaluation.metrics import radial_errors_px, summarise

POINTS = np.array([[60.0, 20.0], [20.0, 30.0], [90.0, 60.0]])


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four 128 x 96 images of two devices; so 4 px at 512 is 1 px."""
    cases = []
    for k in range(4):
        image = np.random.default_rng(k).integers(0, 255, (96, 128), np.uint8)
        cv2.imwrite(str(tmp_path / f"{k}.png"), image)
        points = POINTS + k
        angle = float(angle_of_progression(points))
        cases.append(Case(f"{k}.png", points, angle, "test" if k else "train", "AB"[k % 2], None))
    write_cases(tmp_path / "cases.csv", cases)
    return tmp_path


def run(folder: Path, predictions: Path, *more: str) -> dict:
    output = folder / "figures.json"
    arguments = ["--data", str(folder / "cases.csv"), "--images", str(folder)]
    arguments += ["--predictions", str(predictions), "--output", str(output), *more]
    assert evaluate.main(arguments) == 0
    return json.loads(output.read_text())


def test_figures_of_known_errors(folder, capsys):
    truth = read_cases(folder / "cases.csv")
    moved = []
    for k, case in enumerate(truth):
        points = case.landmarks_px + np.array([[3.0, 4.0], [0, 0], [0, k]])
        angle = float(angle_of_progression(points))
        moved.append(Case(case.file.replace(".png", ".mha"), points, angle))
    write_cases(folder / "reader.csv", moved)
    figures = run(folder, folder / "reader.csv")
    everyone = figures["all"]
    assert everyone["cases"] == 4
    assert everyone["mre_PS1_px"]["value"] == pytest.approx(20)  # 5 px of 128 are 20 of 512
    assert everyone["mre_PS2_px"]["value"] == 0
    assert everyone["mre_FH1_px"]["value"] == pytest.approx(4 * (0 + 1 + 2 + 3) / 4)
    assert everyone["mre_px"]["value"] == pytest.approx((20 + 0 + 6) / 3)
    assert everyone["sdr_4px"]["value"] == pytest.approx((4 + 2) / 12)
    assert everyone["sdr_24px"]["value"] == 1
    expected = [abs(a.aop_deg - b.aop_deg) for a, b in zip(truth, moved, strict=True)]
    assert everyone["aop_error_deg"]["value"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert figures["device A"]["cases"] == figures["device B"]["cases"] == 2
    assert "mean radial error" in capsys.readouterr().out


def test_split_and_missing_cases(folder, capsys):
    write_cases(folder / "some.csv", read_cases(folder / "cases.csv")[:3])
    figures = run(folder, folder / "some.csv", "--split", "test")
    assert figures["all"]["cases"] == 2 and figures["all"]["missing"] == ["3.png"]
    assert "3.png" in capsys.readouterr().out


def test_no_match_and_no_split_are_errors(folder, capsys):
    other = Case("else.png", POINTS, 100.0)
    write_cases(folder / "other.csv", [other])
    base = ["--data", str(folder / "cases.csv"), "--images", str(folder)]
    assert evaluate.main([*base, "--predictions", str(folder / "other.csv")]) == 2
    assert "none of the 4 cases" in capsys.readouterr().err
    again = [*base, "--predictions", str(folder / "other.csv"), "--split", "val"]
    assert evaluate.main(again) == 2
    assert "split 'val'" in capsys.readouterr().err


# ---- What --predictions can be


CALIBRATED = {
    "aop_interval_deg": (80.0, 99.5),
    "expected_error_px": dict(zip(LANDMARKS, (1.0, 2.0, 3.5), strict=True)),
    "expected_aop_error_deg": 4.5,
    "view_score": 0.9,
    "doubtful": True,
    "reasons": ["FH1 is uncertain", "the view"],
}


def entry(case: Case, **more) -> CaseEntry:
    found = {
        "case": Path(case.file).stem,
        "file": case.file.replace(".png", ".mha"),
        "status": "ok",
        "width": 128,
        "height": 96,
        "landmarks_px": points_by_name(case.landmarks_px + [3.0, 4.0]),
        "aop_deg": case.aop_deg + 1,
        "confidence": dict(zip(LANDMARKS, (0.5, 0.6, 0.7), strict=True)),
    }
    return CaseEntry(**(found | more))


def results(folder: Path, entries: list[CaseEntry]) -> Path:
    """What process.py writes: results.json, and landmarks.csv beside it."""
    made = {"model": "m", "model_file": "m", "model_sha256": "", "provider": "cpu", "settings": {}}
    counts = {"answered": 1, "failed": 0, "doubtful": 0}
    folder.mkdir(exist_ok=True)
    write_results(folder, Results(**made, **counts, cases=entries))
    return folder / "results.json"


@pytest.fixture
def shown(monkeypatch) -> list[tuple]:
    """What write_evaluation_report was given."""
    calls: list[tuple] = []
    fake = SimpleNamespace(write_evaluation_report=lambda *given: calls.append(given))
    monkeypatch.setitem(sys.modules, "training.evaluation.report", fake)
    return calls


def test_results_of_process_with_what_a_calibrated_model_tells(folder, shown, capsys):
    truth = read_cases(folder / "cases.csv")
    broken = {"case": "2", "file": "2.mha", "status": "failed", "error": "the file is empty"}
    entries = [entry(truth[0], **CALIBRATED), entry(truth[1]), CaseEntry(**broken)]
    path = results(folder / "out", entries)
    figures = run(folder, path, "--report", str(folder / "report.html"))
    assert figures["all"]["cases"] == 2
    assert figures["all"]["mre_px"]["value"] == pytest.approx(20)
    assert figures["all"]["aop_error_deg"]["value"] == pytest.approx(1)
    assert figures["all"]["missing"] == ["2.png: the file is empty", "3.png"]
    assert "2 cases without a prediction, in no mean: 2.png: the file" in capsys.readouterr().out

    ((page, cases, (sure, unsure), images, report, missing, title),) = shown
    assert page == folder / "report.html" and images == folder
    assert [case.file for case in cases] == ["0.png", "1.png"]
    assert missing == figures["all"].pop("missing") and report == figures
    assert title == "results.json against labels"
    np.testing.assert_array_equal(sure.landmarks_px, truth[0].landmarks_px + [3.0, 4.0])
    assert sure.longer_side_px == 128 and sure.aop_deg == truth[0].aop_deg + 1
    np.testing.assert_array_equal(sure.confidence, [0.5, 0.6, 0.7])
    np.testing.assert_array_equal(sure.expected_error_px, [1.0, 2.0, 3.5])
    assert sure.aop_interval_deg == (80.0, 99.5) and sure.expected_aop_error_deg == 4.5
    assert sure.reasons == ("FH1 is uncertain", "the view")
    assert unsure.aop_interval_deg is unsure.expected_error_px is None
    assert unsure.expected_aop_error_deg is None and unsure.reasons == ()


def test_results_and_table_of_one_run_give_the_same_figures(folder):
    truth = read_cases(folder / "cases.csv")
    moved = [Case(c.file, c.landmarks_px, c.aop_deg - 1) for c in truth]
    angles = [float(angle_of_progression(c.landmarks_px)) for c in truth]
    entries = [entry(c, aop_deg=a) for c, a in zip(moved, angles, strict=True)]
    path = results(folder / "out", entries)
    table = run(folder, path.with_name("landmarks.csv"))
    for group, figures in run(folder, path).items():
        for name, figure in figures.items():
            if isinstance(figure, dict):
                assert table[group][name] == pytest.approx(figure, abs=1e-3), name


def test_tables_of_excel_give_the_same_figures(folder):
    """Labels and answers with semicolons in UTF-16, backslashes, and empty rows at the end."""
    plain = run(folder, folder / "cases.csv")
    lines = ["Filename;PS1;PS2;FH1;AoP;device"]
    for case in read_cases(folder / "cases.csv"):
        points = (f'"({x}; {y})"'.replace(".", ",") for x, y in case.landmarks_px)
        angle = f"{case.aop_deg:.4f}".replace(".", ",")
        lines.append(f"site\\{case.file};{';'.join(points)};{angle};{case.device}")
        (folder / "site").mkdir(exist_ok=True)
        (folder / case.file).rename(folder / "site" / case.file)
    text = "\r\n".join([*lines, ";;;;;", ";;;;;", ""])
    for name in ("cases.csv", "reader.csv"):
        (folder / name).write_bytes(text.encode("utf-16"))
    assert run(folder, folder / "reader.csv") == plain
    assert plain["all"]["mre_px"]["value"] == 0 and plain["device A"]["cases"] == 2


def test_frames_of_a_stack(folder, capsys):
    cases = [Case("s.mha", POINTS, 90.0, frame=k) for k in range(3)]
    write_cases(folder / "cases.csv", cases)
    entries = [entry(cases[0], frame=0), entry(cases[2], frame=2)]
    figures = run(folder, results(folder / "out", entries))
    assert figures["all"]["cases"] == 2 and figures["all"]["missing"] == ["s.mha frame 1"]


def test_a_table_with_words_of_doubt(folder):
    """landmarks.csv has a last column of words, which is no column that a case has."""
    plain = folder / "cases.csv"
    with plain.open(newline="") as stream:
        header, *rows = csv.reader(stream)
    words = ['no file, PS1 or "angle" (12.3)\nat all', "", "the angle is 12, FH1 uncertain", "x"]
    doubting = folder / "landmarks.csv"
    with doubting.open("w", newline="") as stream:
        lines = [[*row, doubt] for row, doubt in zip(rows, words, strict=True)]
        csv.writer(stream).writerows([[*header, "Doubt"], *lines])
    expected = [(c.file, c.landmarks_px.tolist(), c.aop_deg, c.frame) for c in read_cases(plain)]
    found = read_cases(doubting)
    assert [(c.file, c.landmarks_px.tolist(), c.aop_deg, c.frame) for c in found] == expected
    assert run(folder, doubting)["all"]["mre_px"]["value"] == 0


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b" \n[]", "jobs"),
        (b"\xef\xbb\xbf[{}]", "jobs"),
        (b'\r\n{"cases": []}', "results"),
        (b"Filename,PS1", "table"),
        (b"", "table"),
    ],
)
def test_the_content_tells_the_kind(tmp_path, data, kind):
    (tmp_path / "results.csv").write_bytes(data)
    assert detect_kind(tmp_path / "results.csv") == kind
    assert detect_kind(tmp_path) == "table"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "results.json, but model: Field required"),
        ('{"cases": 3}', "results.json, but model: Field required"),
        ("{", "results.json, but JSON: Invalid JSON"),
        ("Filename\n", "expected one column PS1"),
        ("", "the file is empty"),
    ],
)
def test_predictions_that_cannot_be_used(folder, text, words, capsys):
    (folder / "given").write_text(text)
    arguments = ["--data", str(folder / "cases.csv"), "--predictions", str(folder / "given")]
    assert evaluate.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "given" in error and error.count("\n") == 1


def test_files_that_are_not_there_are_named(folder, capsys):
    data = ["--data", str(folder / "cases.csv")]
    assert evaluate.main([*data, "--predictions", str(folder / "none.json")]) == 2
    assert "none.json cannot be used: No such file" in capsys.readouterr().err
    assert evaluate.main([*data, "--model", str(folder / "none.onnx")]) == 2
    assert "none.onnx" in capsys.readouterr().err
    write_cases(folder / "moved.csv", [Case("gone.png", POINTS, 90.0)])
    moved = ["--data", str(folder / "moved.csv"), "--predictions", str(folder / "moved.csv")]
    assert evaluate.main(moved) == 2
    assert "gone.png; name the folder" in capsys.readouterr().err


# ---- Jobs, whose scores test_challenge_jobs.py holds


@pytest.fixture
def predictions(folder) -> Path:
    """predictions.json with a job that has answered, and one that has not."""
    jobs = []
    for k, status in enumerate(("Succeeded", "Failed")):
        place = folder / "in" / f"job-{k}" / "output"
        place.mkdir(parents=True)
        points = [{"name": n, "point": [*p, 0]} for n, p in points_by_name(POINTS).items()]
        (place / "aop-landmarks.json").write_text(json.dumps({"points": points}))
        (place / "angle-of-progression.json").write_text("90.5")
        slugs = ("aop-landmarks", "angle-of-progression")
        outputs = [{"socket": {"slug": s, "relative_path": f"{s}.json"}} for s in slugs]
        asked = [{"image": {"name": f"{k}.png"}}]
        jobs.append({"pk": f"job-{k}", "inputs": asked, "outputs": outputs, "status": status})
    (folder / "in" / "predictions.json").write_text(json.dumps(jobs))
    return folder / "in" / "predictions.json"


def test_jobs_write_metrics_where_grand_challenge_looks(
    folder, predictions, shown, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate, "METRICS", folder / "output" / "metrics.json")
    (folder / "x.csv").symlink_to("cases.csv")  # a file serves as well as its folder
    arguments = ["--truth", str(folder / "x.csv"), "--predictions", str(predictions)]
    assert evaluate.main([*arguments, "--report", str(folder / "report.html")]) == 0
    metrics = json.loads((folder / "output" / "metrics.json").read_text())
    assert sorted(metrics) == ["aggregates", "results"]
    problems = [result["problems"] for result in metrics["results"]]
    assert problems == [[], ["the job's status is 'Failed'"], *[["no job for this case"]] * 2]
    assert metrics["aggregates"]["cases"] == 4 and metrics["aggregates"]["counted_as_worst"] == 3
    out = capsys.readouterr().out
    assert "3 cases counted as the worst: 1.png: the job's status is 'Failed', 2.png: no job" in out

    ((_, (case,), (prediction,), images, figures, missing, _),) = shown  # of what was answered
    assert case.file == "0.png" and prediction.aop_deg == 90.5 and images == folder
    assert figures["all"]["cases"] == 1 and figures["all"]["mre_px"]["value"] == 0
    assert len(missing) == 3


def test_a_report_of_no_answer_says_so(folder, predictions, shown, capsys):
    arguments = ["--truth", str(folder / "cases.csv"), "--predictions", str(predictions)]
    arguments += ["--output", str(folder / "metrics.json"), "--report", str(folder / "r.html")]
    assert evaluate.main([*arguments, "--split", "test"]) == 0  # 0.png is of split train
    text = capsys.readouterr().out
    assert "no report: no case has an answer" in text and "mean radial error" in text
    assert not shown
    assert (folder / "metrics.json").is_file()


def test_a_report_finds_images_of_another_format(folder, predictions, shown):
    (folder / "images").mkdir()
    image = cv2.imread(str(folder / "0.png"))
    for k in range(4):
        assert cv2.imwrite(str(folder / "images" / f"{k}.bmp"), image)
    arguments = ["--truth", str(folder / "cases.csv"), "--predictions", str(predictions)]
    arguments += ["--output", str(folder / "metrics.json"), "--report", str(folder / "r.html")]
    assert evaluate.main(arguments) == 0
    ((_, (case,), _, images, *_),) = shown
    assert (images / case.file) == folder / "images" / "0.bmp"


def test_help_teaches_every_kind(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    text = capsys.readouterr().out
    examples = [line for line in text.splitlines() if "python -m training.evaluate" in line]
    for word in ("--model", "landmarks.csv", "results.json", "--report", "predictions.json"):
        assert any(word in line for line in examples), word
    for word in ("metrics.json", "results", "aggregates", "--frame-of-answers", "worst"):
        assert word in text


def test_errors_are_scaled_to_512():
    truth = np.zeros((2, 3, 2))
    moved = truth + [3.0, 4.0]
    np.testing.assert_allclose(radial_errors_px(moved, truth, [256, 1024]), [[10] * 3, [2.5] * 3])


@pytest.mark.slow
def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    """95 % intervals of the mean of 40 exponential errors hold the true mean in about 95 %."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(100):
        errors = rng.exponential(10.0, (40, 3))
        figure = summarise(errors, errors[:, 0])["mre_px"]
        held += figure["low"] <= 10.0 <= figure["high"]
    assert 88 <= held <= 99


@pytest.mark.real
def test_images_labelled_twice_show_the_noise_of_the_labels(psfhs):
    """The figures that README and the model card quote: 4.6 px at 512 px and 1.9 deg."""
    by_pixels: dict[bytes, list[Case]] = {}
    for case in read_cases(psfhs / "cases.csv"):
        pixels = read_frame(psfhs / "images" / case.file)[0]
        by_pixels.setdefault(pixels.tobytes(), []).append(case)
    pairs = [pair for cases in by_pixels.values() for pair in combinations(cases, 2)]
    assert len(pairs) == 3
    first, second = zip(*pairs, strict=True)
    points = [np.stack([case.landmarks_px for case in cases]) for cases in (first, second)]
    assert radial_errors_px(*points, [256] * 3).mean() == pytest.approx(4.6, abs=0.05)
    angles = [np.array([case.aop_deg for case in cases]) for cases in (first, second)]
    assert np.abs(angles[0] - angles[1]).mean() == pytest.approx(1.9, abs=0.05)


@pytest.mark.real
def test_near_identical_images_show_the_noise_of_the_labels(psfhs):
    """The figures that BENCHMARK.md quotes: 5.3 px apart, 3.6 deg of deviation in each label."""
    cases = [c for c in read_cases(psfhs / "cases.csv") if c.split in ("train", "val")]
    small = [
        cv2.resize(read_frame(psfhs / "images" / case.file)[0], (128, 128), None, 0, 0, 3)
        for case in cases
    ]
    pairs = [
        (a, b)
        for a, b in combinations(range(len(cases)), 2)
        if cases[a].group == cases[b].group
        and np.corrcoef(small[a].ravel(), small[b].ravel())[0, 1] >= 0.98
    ]
    points = [np.stack([cases[k].landmarks_px for k in side]) for side in zip(*pairs, strict=True)]
    angles = [np.array([cases[k].aop_deg for k in side]) for side in zip(*pairs, strict=True)]
    assert len(pairs) == 124
    apart_px = radial_errors_px(*points, [256] * len(pairs)).mean()
    assert apart_px == pytest.approx(5.3, abs=0.05)
    deviation_deg = np.sqrt(np.mean((angles[0] - angles[1]) ** 2) / 2)  # of each of the two labels
    assert deviation_deg == pytest.approx(3.6, abs=0.05)
