"""The container's contract when input, options or output are wrong."""

import errno
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

import process
from model.drawing.overlay import DOUBT
from model.pipeline.case_runner import Stopped, StopRequest
from model.predictor import EngineError
from model.results import journal
from model.results.files import RunFiles
from test.support.image_files import dicom
from test.support.runs import (
    ANGLE,
    ANSWERS,
    HEIGHT,
    POINTS,
    WIDTH,
    job,
    load,
    made,
    png,
    predictor_at,
    run,
    shipped,
    tree,
    volume,
)
from training.data.case_table import read_cases

ROOT = Path(__file__).resolve().parents[2]
TOLD = {"case", "file", "status", "error"}  # fields that an unreadable file's entry sets


def image_with(value: float) -> np.ndarray:
    image = made(1).astype(np.float32)
    image[5, 7] = value
    return image


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "text.png": (lambda path: path.write_text("I am no image"), "none of the supported formats"),
    "empty.jpg": (lambda path: path.write_bytes(b""), "the file is empty"),
    "cut.mha": (lambda path: truncate(volume(path, made(1)[None])), "truncated"),
    "cut.png": (lambda path: truncate(png(path)), "truncated"),
    "one.png": (lambda path: png(path, np.uint8([[7]])), "1 x 1 px is too small"),
    "low.png": (lambda path: png(path, made(1)[:31]), "240 x 31 px is too small"),
    "flat.bmp": (lambda path: png(path, np.full((40, 50), 9, np.uint8)), "constant"),
    "nan.nrrd": (lambda path: volume(path, image_with(np.nan)), "NaN or infinite"),
    "inf.tif": (lambda path: png(path, image_with(np.inf)), "NaN or infinite"),
    "gone.dcm": (lambda path: path.symlink_to("nowhere.dcm"), "No such file"),
}


def test_bad_files_fail_by_name_and_the_others_are_answered(tmp_path: Path) -> None:
    for name, (make, _) in BAD.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        make(tmp_path / "in" / name)
        earlier = tmp_path / "out" / Path(name).stem  # answers that must not be taken for these
        png(earlier / "overlay.png")
        png(earlier / "frame-0003" / "overlay.png")
        (earlier / POINTS).write_text("{}")
    png(tmp_path / "in" / "wide.png", made(1).astype(np.uint16) * 150)
    volume(tmp_path / "in" / "real.mha", made(1).astype(np.float32) - 99.5)
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.status == 1
    expected = [f"{case}/{name}" for case in ("real", "wide") for name in ANSWERS]
    assert tree(result.folder) == sorted([*expected, "landmarks.csv", "results.json"])
    assert [case.file for case in read_cases(result.folder / "landmarks.csv")] == [
        *("real.mha", "wide.png")
    ]
    for name, (_, cause) in BAD.items():
        entry = result.entry(name)
        assert entry["status"] == "failed" and cause in entry["error"]
        assert "\n" not in entry["error"] and str(tmp_path) not in entry["error"]
        rest = {key: value for key, value in entry.items() if key not in TOLD}
        assert not any(rest.values())
    assert result.sentence == (
        "10 of 12 cases failed, the first is 'cut.mha': "
        f"{result.entry('cut.mha')['error']}; results.json names the others"
    )
    assert "2 answered" in result.out and result.out.count("FAILED") == len(BAD)


def test_one_failure_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a\nb.png").write_text("no image")
    alone = run(tmp_path, tmp_path / "out")
    assert alone.status == 1 and re.match(r"the case failed: 'a\\nb.png': the", alone.sentence)
    png(tmp_path / "c.png")
    beside = run(tmp_path, tmp_path / "out")
    assert re.match(r"1 of 2 cases failed, the first is 'a\\nb.png': the", beside.sentence)
    assert beside.status == 1 and "names the others" not in beside.sentence


def test_bad_frame_of_a_stack_leaves_the_others(tmp_path: Path) -> None:
    pages = [made(1), np.full_like(made(1), 5), made(2)]
    (tmp_path / "in").mkdir()
    assert cv2.imwritemulti(str(tmp_path / "in" / "a.tif"), pages)
    result = run(tmp_path / "in", tmp_path / "out", "--no-overlay")
    assert result.status == 1 and "'a.tif frame 1': the image is constant" in result.sentence
    answered = [f"a/frame-000{k}/{name}" for k in (0, 2) for name in (POINTS, ANGLE)]
    assert tree(result.folder) == sorted([*answered, "landmarks.csv", "results.json"])
    shutil.move(tmp_path / "in" / "a.tif", job(tmp_path / "job") / "a.tif")
    result = run(tmp_path / "job", tmp_path / "job-out")
    assert result.status == 1 and [e["frame"] for e in result.results["cases"]] == [0, 1, 2]
    assert len(load(result.folder / POINTS)["points"]) == 6


def test_job_without_its_file_fails_and_leaves_no_earlier_answer(tmp_path: Path) -> None:
    folder = job(tmp_path / "in")
    image = png(folder / "a.png")
    assert run(tmp_path / "in", tmp_path / "out").status == 0
    image.unlink()
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.status == 1 and result.sentence.startswith("the case failed: 'images/us': ")
    assert tree(result.folder) == ["landmarks.csv", "results.json"]
    folder.rmdir()
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.status == 1 and "No such file or directory" in result.sentence


def test_wrong_pictures_are_answered_and_doubted(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    png(tmp_path / "in" / "noise.png", noise)
    result = run(tmp_path / "in", tmp_path / "out")
    entry = result.entry("noise.png")
    assert (result.status, result.err) == (0, "") and "1 of them doubtful" in result.out
    assert entry["status"] == "ok" and entry["doubtful"] and entry["landmarks_px"]
    picture = cv2.imread(str(result.folder / "noise" / "overlay.png"))
    assert (picture[0] == DOUBT).all() and len(tree(result.folder / "noise")) == 3


# ---- Options


@pytest.mark.slow
def test_decoders_and_the_latency_budget(tmp_path: Path) -> None:
    png(tmp_path / "in" / "a.png")
    fine = run(tmp_path / "in", tmp_path / "out")
    coarse = run(tmp_path / "in", tmp_path / "out", "--decode", "argmax")
    assert coarse.results["settings"]["decode"] == "argmax"
    assert coarse.entry("a.png")["landmarks_px"] != fine.entry("a.png")["landmarks_px"]
    late = run(tmp_path / "in", tmp_path / "out", "--latency-budget-ms", "0.01")
    (warning,) = late.entry("a.png")["warnings"]
    assert (late.status, late.err) == (0, "") and "over the latency budget of 0.01 ms" in warning
    assert "1 took longer than the latency budget\n" in late.out
    assert late.entry("a.png")["landmarks_px"] == fine.entry("a.png")["landmarks_px"]
    early = run(tmp_path / "in", tmp_path / "out", "--latency-budget-ms", "1e6")
    assert early.entry("a.png")["warnings"] == [] and "budget" not in early.out


@pytest.mark.parametrize(
    "options",
    [
        ["--provider", "tpu"],
        ["--decode", "peak"],
        ["--frame-of-answers", "mm"],
        ["--latency-budget-ms", "soon"],
        ["--latency-budget-ms", "-1"],
        ["--latency-budget-ms", "nan"],
        ["--landmarks-file", "../points.json"],
        ["--landmarks-file", "p\udcff.json"],
        ["--angle-file", "/tmp/angle.json"],
        ["--three-points-file", ""],
        ["--angle-file", "aop-landmarks.json"],
        ["--angle-file", "./results.json"],
        ["--angle-file", "results.json/a"],
        ["--landmarks-file", "overlay.png/x.json"],
        ["--landmarks-file", ".results.json.journal"],
        ["--threads", "1000"],
        ["--serve-port", "70000"],
        ["--no-such-option"],
        ["more"],
    ],
)
def test_bad_options(tmp_path: Path, options: list[str]) -> None:
    png(tmp_path / "in" / "a.png")
    result = run(tmp_path / "in", tmp_path / "out", *options)
    assert result.status == 2 and not result.folder.exists()
    assert result.err.splitlines()[-1].startswith("process.py: error: ")
    assert options[0] in result.err.splitlines()[-1] or "name of its own" in result.err


def test_help_teaches_every_option_and_status() -> None:
    out = subprocess.run(
        [sys.executable, "process.py", "--help"], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    for word in ("inputs.json", "results.json", "Exit status: 0", "stderr", "--no-overlay"):
        assert word in out
    for option in ("input", "output", "model", "provider", "decode", "frame-of-answers"):
        assert re.search(rf"--{option} \S+\s+\w+", out)
    for default in ("/input", "/output", "auto", "world", "the one file under /opt/ml/model"):
        assert f"(default: {default}" in " ".join(out.split())


def changed(folder: Path, code: str) -> list[str | Path]:
    """The command that runs some code and then process.py."""
    start = "import os, runpy, sys; sys.argv[0] = 'process.py'"
    code = f"{start}\n{code}\nrunpy.run_path('process.py', run_name='__main__')"
    return [sys.executable, "-c", code, "--input", folder / "in", "--output", folder / "out"]


@pytest.mark.slow
def test_as_a_command(tmp_path: Path) -> None:
    """stderr stays empty, heavy libraries are not loaded, and stdout takes any file name."""
    png(tmp_path / "in" / "ü.png")
    command = changed(
        tmp_path,
        "heavy = {'torch', 'SimpleITK', 'training'}\n"
        "os._exit = lambda status: print(heavy & set(sys.modules), status)",
    )
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert rb"[1/1] '\xfc.png': AoP " in ran.stdout and ran.stdout.endswith(b"\nset() 0\n")


def test_an_engine_that_fails_on_one_image(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        png(tmp_path / "in" / name)
    predictor = predictor_at([(40, 20), (20, 22), (45, 40)])
    real, calls = predictor.run, iter("abc")

    def fail_once(network_input: np.ndarray) -> np.ndarray:
        if next(calls) == "b":
            raise EngineError("the network could not be run: no memory")
        return real(network_input)

    predictor.run = fail_once
    result = run(tmp_path / "in", tmp_path / "out", "--threads", "1", predictor=predictor)
    assert result.status == 1 and "'b.png': the network could not be run" in result.sentence
    assert [entry["status"] for entry in result.results["cases"]] == ["ok", "failed", "ok"]


def test_resume_does_anew_what_is_gone_or_changed(tmp_path: Path) -> None:
    for seed, name in enumerate(("a.png", "b.png", "c.png", "d.png"), 1):
        png(tmp_path / "in" / name, made(seed))
    before = run(tmp_path / "in", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "a")
    (tmp_path / "out" / "d" / ANGLE).unlink()
    time.sleep(0.02)
    png(tmp_path / "in" / "b.png", made(4))
    after = run(tmp_path / "in", tmp_path / "out", "--resume")
    assert after.status == 0 and "1 of 4 cases are answered already" in after.out
    assert all((tmp_path / "out" / name).is_file() for name in (f"a/{POINTS}", f"d/{ANGLE}"))
    assert after.entry("a.png")["landmarks_px"] == before.entry("a.png")["landmarks_px"]
    assert after.entry("b.png")["landmarks_px"] != before.entry("b.png")["landmarks_px"]
    assert after.entry("c.png") == before.entry("c.png")


def test_a_job_of_dicom_files_with_and_without_suffix(tmp_path: Path) -> None:
    folder = job(tmp_path / "in")
    for number, name in enumerate(("a.dcm", "IM_0002", "IM_0003"), 1):
        dicom(folder / name, made(number)[None], number=number)
    png(folder / "thumb.png")
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.status == 0 and [e["frame"] for e in result.results["cases"]] == [0, 1, 2]


def test_stop_between_the_frames_of_a_job(tmp_path: Path) -> None:
    volume(job(tmp_path / "in") / "a.mha", np.stack([made(k) for k in range(4)]))
    predictor = predictor_at([(40, 20), (20, 22), (45, 40)])
    real, stop, frames = predictor.run, StopRequest(), []

    def signalled(network_input: np.ndarray) -> np.ndarray:
        frames.append(network_input)
        stop.signal = 15  # a second stop.request would end the tests
        return real(network_input)

    predictor.run = signalled
    result = run(tmp_path / "in", tmp_path / "out", predictor=predictor, stop=stop)
    assert result.status == 143 and len(frames) == 1
    assert "stopped by SIGTERM after 0 of 1 cases" in result.sentence
    assert not {POINTS, ANGLE, "results.json"} & {*tree(result.folder)}


def test_stop_during_the_last_case_is_none(tmp_path: Path) -> None:
    png(tmp_path / "in" / "a.png")
    predictor = predictor_at([(40, 20), (20, 22), (45, 40)])
    real, stop = predictor.run, StopRequest()
    predictor.run = lambda network_input: stop.request(15) or real(network_input)
    assert run(tmp_path / "in", tmp_path / "out", predictor=predictor, stop=stop).status == 0
    assert stop.signal == 15


def test_the_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    stop = StopRequest()
    stop.raise_if_asked()
    stop.request(signal.SIGTERM)
    assert stop.signal == signal.SIGTERM and not ended
    with pytest.raises(Stopped):
        stop.raise_if_asked()
    stop.request(signal.SIGINT)
    assert ended == [130]


@pytest.mark.slow
def test_nobody_listens(tmp_path: Path) -> None:
    """As with `process.py ... | head -1`."""
    for k in range(5):
        png(tmp_path / "in" / f"{k}.png")
    command = [sys.executable, "process.py", "--input", tmp_path / "in", "--output", tmp_path / "o"]
    with subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1) as child:
        child.stdout.close()
        assert (child.stderr.read(), child.wait()) == (b"", 0)
    assert load(tmp_path / "o" / "results.json")["answered"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">/dev/full", "2>/dev/full", "<&- >&- 2>&-"])
def test_streams_that_take_nothing(tmp_path: Path, streams: str) -> None:
    """A full log disk, or streams that the caller closed, change neither answers nor status."""
    (tmp_path / "in").mkdir()
    for k in range(3):
        volume(tmp_path / "in" / f"{k}.mha", made(k)[None])
    for source, status in (("in", 0), ("nowhere", 2)):
        command = f"{sys.executable} process.py --input {tmp_path}/{source} --output {tmp_path}/out"
        ran = subprocess.run(f"{command} {streams}", cwd=ROOT, shell=True, check=False)
        assert ran.returncode == status
    assert load(tmp_path / "out" / "results.json")["answered"] == 3


@pytest.mark.slow
def test_an_error_that_nobody_foresaw(tmp_path: Path) -> None:
    """Python's own exit status, 1, would mean that all other cases were answered."""
    png(tmp_path / "in" / "a.png")
    command = changed(
        tmp_path, "import model.pipeline.batch; model.pipeline.batch.run_batch = lambda *_: 1 / 0"
    )
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert ran.returncode == 2 and b"\nZeroDivisionError: " in ran.stderr
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(command, cwd=ROOT, stderr=full, check=False).returncode == 2


# ---- Nothing can be done


@pytest.mark.parametrize(
    ("made_input", "sentence"),
    [
        (lambda path: None, "the input folder .* cannot be read .*--input DIR"),
        (lambda path: path.mkdir(), "no image below .*expected files that end in .mha, .*.png"),
        (lambda path: job(path, "../out"), "inputs.json: relative_path .* leaves the input folder"),
        (lambda path: (job(path) / "../../inputs.json").write_text("{"), "inputs.json cannot be"),
    ],
)
def test_no_input(tmp_path: Path, made_input: Callable, sentence: str) -> None:
    source = tmp_path / "line\nbreak"
    made_input(source)
    result = run(source, tmp_path / "answers")
    assert result.status == 2 and re.match(sentence, result.sentence)
    assert not result.folder.exists()


@pytest.mark.slow
def test_models(tmp_path: Path) -> None:
    png(tmp_path / "in" / "a.png")
    mounted, out = tmp_path / "models", tmp_path / "out"
    mounted.mkdir()
    (mounted / "._mine.onnx").write_bytes(b"what macOS packs")
    result = run(tmp_path / "in", out, models=mounted)
    assert result.status == 0 and result.results["model_file"] == shipped().file.name
    (mounted / "deep").mkdir()
    shutil.copy(process.SHIPPED_MODEL, mounted / "deep" / "mine.onnx")
    result = run(tmp_path / "in", out, models=mounted)
    assert result.status == 0 and result.results["model_file"] == "mine.onnx"
    (mounted / "broken.onnx").write_bytes(b"no model")
    result = run(tmp_path / "in", out, models=mounted)
    assert result.status == 2 and "(broken.onnx, deep/mine.onnx)" in result.sentence
    assert "--model" in result.sentence
    for name, cause in (("broken.onnx", "cannot be loaded"), ("gone.onnx", "no model file at")):
        result = run(tmp_path / "in", out, "--model", str(mounted / name))
        assert result.status == 2 and cause in result.sentence and name in result.sentence
    chosen = run(tmp_path / "in", out, "--model", str(process.SHIPPED_MODEL), models=mounted)
    assert chosen.status == 0 and chosen.results["model_file"] == "aop.onnx"


def test_cuda_that_is_not_there(tmp_path: Path) -> None:
    if shipped().provider == "cuda":
        pytest.skip("there is a GPU")
    png(tmp_path / "in" / "a.png")
    result = run(tmp_path / "in", tmp_path / "out", "--provider", "cuda")
    assert result.status == 2 and "--provider cuda" in result.sentence
    assert run(tmp_path / "in", tmp_path / "out", "--provider", "cpu").results["provider"] == "cpu"


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    png(tmp_path / "in" / "a.png")
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = run(tmp_path / "in", out)
        assert result.status == 2 and "mount a writable folder" in result.sentence
    assert "choose another" in run(tmp_path / "in", tmp_path / "in").sentence


# ---- Faults while writing


@pytest.mark.parametrize("in_the_way", ["a", f"a/{ANGLE}/x", "a/overlay.png/x"])
def test_case_whose_place_is_taken_fails_alone(tmp_path: Path, in_the_way: str) -> None:
    for name in ("a.png", "b.png"):
        png(tmp_path / "in" / name)
    (tmp_path / "out" / in_the_way).parent.mkdir(parents=True)
    (tmp_path / "out" / in_the_way).write_text("not ours")
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.status == 1
    assert "1 of 2 cases failed, the first is 'a.png': the answer could not" in result.sentence
    assert [name for name in tree(result.folder) if name.startswith("a")] == [in_the_way]
    assert result.entry("b.png")["status"] == "ok"


@pytest.mark.parametrize("full_at", [POINTS, ANGLE, "overlay.png"])
def test_full_disk_leaves_no_half_of_an_answer(tmp_path: Path, monkeypatch, full_at: str) -> None:
    stack = np.stack([made(1), made(2)])
    volume(job(tmp_path / "job") / "a.mha", stack)
    png(tmp_path / "in" / "a.png")
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target.name == full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    for source in ("in", "job"):
        result = run(tmp_path / source, tmp_path / f"{source}-out", "--overlay")
        assert result.status == 1 and "No space left on device" in result.sentence
        assert tree(result.folder) == ["landmarks.csv", "results.json"]
        for entry in result.results["cases"]:
            assert entry["status"] == "failed" and entry["landmarks_px"] is None
            assert (entry["width"], entry["height"]) == (WIDTH, HEIGHT)


def test_results_that_cannot_be_written_are_told(tmp_path: Path, monkeypatch) -> None:
    png(tmp_path / "in" / "a.png")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal, "write_table", full)
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.status == 2 and "results.json" in result.sentence
    assert "No space left on device" in result.sentence and "--resume" in result.sentence
    monkeypatch.undo()
    resumed = run(tmp_path / "in", tmp_path / "out", "--resume")
    assert resumed.status == 0 and "1 of 1 cases are answered already" in resumed.out


def test_a_second_run_on_the_same_output_is_refused(tmp_path: Path) -> None:
    png(tmp_path / "in" / "a.png")
    first = journal.Journal(tmp_path / "out", RunFiles(), {}, {})
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.status == 2 and "being written by another run" in result.sentence
    first.close()
    assert run(tmp_path / "in", tmp_path / "out").status == 0


def test_a_journal_changed_from_outside_is_told(tmp_path: Path, monkeypatch) -> None:
    png(tmp_path / "in" / "a.png")
    end = journal.Journal.end

    def spoilt(self: journal.Journal, *given: object) -> None:
        end(self, *given)
        path = tmp_path / "out" / RunFiles().journal
        path.write_bytes(path.read_bytes().replace(b'"case"', b"\0case\0"))

    monkeypatch.setattr(journal.Journal, "end", spoilt)
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.status == 2 and "was changed from outside" in result.sentence
    assert not (tmp_path / "out" / "results.json").exists()


def test_output_inside_the_input_is_not_read_again(tmp_path: Path) -> None:
    png(tmp_path / "a.png")
    for _ in range(2):
        result = run(tmp_path, tmp_path / "out")
        assert [entry["file"] for entry in result.results["cases"]] == ["a.png"]
