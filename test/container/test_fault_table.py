"""The fault table: a row for everything that may be wrong with input, output or model.

If AOP_IMAGE names an image, the tests run in its container (test/container/strict.py). All faulty
files lie in one folder with good ones, and no file may cost another its answer.
"""

import gzip
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import process
from model.spec import METADATA_KEY
from test.container import strict
from test.container.strict import IMAGE, Outcome
from test.support.runs import ANGLE, POINTS, job, load, made, png, tree, volume

GREY = made(1)
ODD = np.uint8([[7]])


def with_value(path: Path, value: float) -> None:
    image = GREY.astype(np.float32)
    image[5, 7] = value
    volume(path, image)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def edited(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def png_claiming(path: Path, side: int) -> None:
    data = bytearray(png(path, GREY).read_bytes())
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


def bomb_mha(path: Path) -> None:
    zeros = zlib.compressobj()
    data = b"".join(zeros.compress(bytes(2**20)) for _ in range(9 * 64)) + zeros.flush()
    header = "NDims = 3\nBinaryData = True\nDimSize = 8192 8192 9\nElementType = MET_UCHAR\n"
    header += "CompressedData = True\n"
    header += f"CompressedDataSize = {len(data)}\nElementDataFile = LOCAL\n"
    path.write_bytes(b"ObjectType = Image\n" + header.encode() + data)


def bomb_nifti(path: Path) -> None:
    whole = volume(path.with_name("whole.nii"), GREY).read_bytes()
    path.with_name("whole.nii").unlink()
    head = bytearray(whole[:352])
    head[40:56] = struct.pack("<8h", 3, 8000, 8000, 30, 1, 1, 1, 1)
    with gzip.open(path, "wb") as file:
        file.write(head)
        for _ in range(200):
            file.write(bytes(2**20))


def zero_spacing(path: Path) -> None:
    volume(path, GREY, Spacing=(0.25, 0.25))
    edited(path, b"ElementSpacing = 0.25 0.25", b"ElementSpacing = 0 0")


# fault -> (file, function that writes it, pattern of its entry's error; None if it is answered)
Row = tuple[str, Callable[[Path], object], str | None]
FILES: dict[str, Row] = {
    "missing": ("gone.png", lambda p: p.symlink_to("nowhere.png"), "No such file"),
    "empty": ("empty.jpg", lambda p: p.write_bytes(b""), "the file is empty"),
    "truncated png": ("cut.png", lambda p: cut(png(p)), "truncated"),
    "truncated mha": ("cut.mha", lambda p: cut(volume(p, GREY)), "truncated"),
    "truncated tif": ("cut.tif", lambda p: cut(png(p)), "truncated"),
    "truncated nii.gz": ("cut.nii.gz", lambda p: cut(volume(p, GREY)), "truncated"),
    "foreign": ("text.png", lambda p: p.write_text("a letter"), "none of the supported formats"),
    "foreign archive": (
        "zip.dcm",
        lambda p: p.write_bytes(b"PK\3\4" + bytes(99)),
        "is a ZIP archive: unpack",
    ),
    "wrong suffix": ("png.jpg", lambda p: png(p.with_suffix(".png")).rename(p), None),
    "wrong suffix of a volume": (
        "mha.png",
        lambda p: volume(p.with_suffix(".mha"), GREY).rename(p),
        None,
    ),
    "zero spacing": ("zero.mha", zero_spacing, None),
    "NaN pixels": ("nan.nrrd", lambda p: with_value(p, np.nan), "NaN or infinite"),
    "infinite pixels": ("inf.mha", lambda p: with_value(p, np.inf), "NaN or infinite"),
    "constant pixels": ("flat.bmp", lambda p: png(p, np.full((40, 50), 9, np.uint8)), "constant"),
    "one pixel": ("one.png", lambda p: png(p, ODD), "1 x 1 px is too small"),
    "one pixel wide": ("thin.png", lambda p: png(p, GREY[:, :1]), "1 x 192 px is too small"),
    "20,000 px sides": ("huge.png", lambda p: png_claiming(p, 20_000), "larger than 64 Mpx"),
    "a 20,000 px side": ("long.png", lambda p: png(p, np.tile(GREY[:40, :200], (1, 100))), None),
    "bomb png": ("bomb.png", lambda p: png_claiming(p, 2**31 - 1), "larger than 64 Mpx"),
    "bomb mha": ("bomb.mha", bomb_mha, "GiB, more than 0.5 GiB"),
    "bomb nii.gz": ("bomb.nii.gz", bomb_nifti, r"GiB|damaged"),
    "spaces in a name": ("  a  b .png", png, None),
    "newline in a name": ("a\nb.png", png, None),
    "non-ASCII name": ("größe-角度.png", png, None),
    "leading dash": ("-rf.png", png, None),
    "leading dashes": ("--output.png", png, None),
    "250 bytes in a name": ("x" * 246 + ".png", png, None),
    "250 bytes of umlauts": ("ü" * 123 + ".png", png, None),
    "names that collide": ("a__b.png", png, None),
    "name of a result": ("results.json.png", png, None),
}
COLLIDING = "a/b.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults") / "in"
    root.mkdir()
    for file, make, _ in FILES.values():
        make(root / file)
    png(root / COLLIDING)
    return root


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Outcome:
    return strict.run(folder, folder.parent / "out", "--latency-budget-ms", "5000")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FILES)
def test_file(fault: str, folder: Path, outcome: Outcome) -> None:
    file, _, reason = FILES[fault]
    entries = [entry for entry in outcome.results["cases"] if entry["file"] == file]
    place = folder.parent / "out" / entries[0]["case"]
    assert outcome.status == 1 and not any(entry["warnings"] for entry in entries if reason)
    if reason is None:
        assert [entry["status"] for entry in entries] == ["ok"], entries
        assert {POINTS, ANGLE, "overlay.png"} <= {*tree(place)}
        assert 0 <= load(place / ANGLE) <= 180
    else:
        assert {entry["status"] for entry in entries} == {"failed"}
        assert all(re.search(reason, entry["error"]) for entry in entries), entries
        assert not place.exists() or tree(place) == []
        assert repr(file) in outcome.out.replace(" frame 0'", "'")


@pytest.mark.slow
def test_all_files_together(folder: Path, outcome: Outcome) -> None:
    entries = outcome.results["cases"]
    assert len({entry["case"] for entry in entries}) == len(FILES) + 1
    assert {entry["file"] for entry in entries} == {COLLIDING, *(f for f, *_ in FILES.values())}
    failed = [entry for entry in entries if entry["status"] == "failed"]
    sentence = f"{len(failed)} of {len(entries)} cases failed, the first is "
    assert outcome.sentence.startswith(sentence)
    assert outcome.sentence.endswith("results.json names the others")
    (collided,) = [entry for entry in entries if entry["file"] == COLLIDING]
    assert collided["status"] == "ok"
    assert {collided["case"], outcome.entry("a__b.png")["case"]} == {"a__b", "a__b-2"}
    spacing = outcome.entry("zero.mha")
    assert spacing["spacing_mm"] is None and "0 x 0 mm is impossible" in spacing["warnings"][0]
    assert not [name for name in tree(folder.parent / "out") if "partial" in name]


# ---- Jobs


def no_job(text: str | bytes) -> Callable[[Path], object]:
    data = text.encode() if isinstance(text, str) else text
    return lambda root: (root / "inputs.json").write_bytes(data)


def job_of(relative: str) -> str:
    return json.dumps([{"socket": {"relative_path": relative, "super_kind": "Image", "slug": "s"}}])


JOBS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "malformed": (no_job("[{"), 2, "inputs.json cannot be read as JSON"),
    "not a list": (no_job("{}"), 2, "expected a list of values"),
    "empty list": (no_job("[]"), 2, "expected one value whose socket has super_kind 'Image'"),
    "binary": (no_job(b"\xff\xfe\0\1"), 2, "inputs.json cannot be read as JSON"),
    "deep": (no_job("[" * 100_000), 2, "inputs.json cannot be read as JSON"),
    "points outside": (no_job(job_of("../../etc")), 2, "leaves the input folder"),
    "points outside, absolute": (no_job(job_of("/etc/passwd")), 2, "leaves the input folder"),
    "names what is not there": (no_job(job_of("images/none")), 1, "the case failed: 'images/none'"),
    "names an empty folder": (job, 1, "the case failed: 'images/us'"),
}


@pytest.mark.parametrize("fault", JOBS)
def test_job(tmp_path: Path, fault: str) -> None:
    make, status, sentence = JOBS[fault]
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    found = strict.run(tmp_path / "in", tmp_path / "out")
    assert (found.status, found.err.count("\n")) == (status, 1) and sentence in found.sentence
    assert bool(found.results) is (status == 1)
    assert not {POINTS, ANGLE} & {*tree(tmp_path / "out")}


# ---- Models


def other_version(path: Path) -> None:
    model = onnx.load(process.SHIPPED_MODEL)
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = entry.value.replace('"schema_version":1', '"schema_version":99')
            assert "99" in entry.value
    onnx.save(model, path)


def without_spec(path: Path) -> None:
    model = onnx.load(process.SHIPPED_MODEL)
    del model.metadata_props[:]
    onnx.save(model, path)


def half(path: Path) -> None:
    data = process.SHIPPED_MODEL.read_bytes()
    path.write_bytes(data[: len(data) // 2])


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "corrupt": (lambda path: path.write_bytes(b"no model"), "cannot be loaded as an ONNX model"),
    "truncated": (half, "cannot be loaded as an ONNX model"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be loaded as an ONNX model"),
    "of another schema version": (other_version, "is not of schema version 1: schema_version"),
    "without a spec": (without_spec, "has no ModelSpec"),
}


@pytest.mark.parametrize("fault", MODELS)
def test_model(tmp_path: Path, fault: str) -> None:
    make, sentence = MODELS[fault]
    (tmp_path / "models").mkdir()
    make(tmp_path / "models" / "mine.onnx")
    (tmp_path / "models").chmod(0o755)
    png(tmp_path / "in" / "a.png")
    found = strict.run(tmp_path / "in", tmp_path / "out", models=tmp_path / "models")
    assert (found.status, found.err.count("\n")) == (2, 1)
    assert sentence in found.sentence and "export" in found.sentence


@pytest.mark.docker
@pytest.mark.skipif(not IMAGE, reason="only the container has another user")
def test_model_that_may_not_be_read(tmp_path: Path) -> None:
    """The shipped model must not take its place."""
    (tmp_path / "models").mkdir()
    shutil.copy(process.SHIPPED_MODEL, tmp_path / "models" / "mine.onnx")
    (tmp_path / "models").chmod(0o000)
    png(tmp_path / "in" / "a.png")
    found = strict.run(tmp_path / "in", tmp_path / "out", models=tmp_path / "models")
    assert found.status == 2 and "/opt/ml/model cannot be read" in found.sentence


# ---- Output


def test_input_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    found = strict.run(tmp_path / "in", tmp_path / "out")
    assert found.status == 2 and "no image below" in found.sentence


def test_output_that_is_not_writable(tmp_path: Path) -> None:
    png(tmp_path / "in" / "a.png")
    (tmp_path / "file").write_text("in the way")
    if IMAGE:
        line = strict.command(tmp_path / "in", tmp_path / "out")
        line = [part.replace(":/output", ":/output:ro") for part in line]
    else:
        line = strict.command(tmp_path / "in", tmp_path / "file" / "out")
    ran = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    assert "mount a writable folder" in ran.stderr


@pytest.mark.docker
@pytest.mark.skipif(not IMAGE, reason="only the container has a small disk")
@pytest.mark.parametrize("megabytes", [1, 2, 3])
def test_output_that_is_full_in_the_middle(tmp_path: Path, megabytes: int) -> None:
    for k in range(40):
        png(tmp_path / "in" / f"{k}.png", made(k % 4))
    (tmp_path / "in").chmod(0o755)
    script = "python /opt/app/process.py; status=$?; cat /output/results.json >&2; exit $status"
    small = ["--tmpfs", f"/output:size={megabytes}m,mode=1777", "--entrypoint", "sh"]
    line = ["docker", "run", *strict.FLAGS, *small, "-v", f"{tmp_path / 'in'}:/input:ro", IMAGE]
    ran = subprocess.run([*line, "-c", script], capture_output=True, text=True, check=False)
    sentence, _, text = ran.stderr.partition("\n")
    assert ran.returncode == 1 and "No space left on device" in sentence
    results = json.loads(text)
    assert len(results["cases"]) == 40 and results["answered"] + results["failed"] == 40
    assert 0 < results["answered"] < 40
    assert f"{results['failed']} of 40 cases failed" in sentence


# ---- Signals


def many(tmp_path: Path, count: int = 60) -> Path:
    for k in range(count):
        png(tmp_path / "in" / f"{k:03d}.png", made(k % 4))
    return tmp_path / "in"


def interrupted(tmp_path: Path, source: Path, number: signal.Signals) -> tuple[int, str]:
    """Run and send a signal once some cases are answered; returns the exit status and stderr."""
    name = f"aop-{tmp_path.name}-{os.getpid()}"
    line = strict.command(source, tmp_path / "out", "--no-overlay", name=name)
    child = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(list((tmp_path / "out").glob(f"*/{ANGLE}"))) < 5:
        assert child.poll() is None
        time.sleep(0.005)
    if IMAGE:
        subprocess.run(["docker", "kill", "-s", number.name, name], check=True, capture_output=True)
    else:
        child.send_signal(number)
    _, err = child.communicate(timeout=60)
    return child.returncode, err


def all_whole(folder: Path) -> None:
    for name in tree(folder):
        if name.endswith(".json"):
            load(folder / name)
        assert not name.endswith(".partial")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_signal_in_the_middle_and_resume(tmp_path: Path, number: signal.Signals) -> None:
    source = many(tmp_path)
    status, err = interrupted(tmp_path, source, number)
    all_whole(tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
    if number != signal.SIGKILL:
        assert status == 128 + number
        assert f"stopped by {number.name} after " in err and "--resume" in err
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob(f"*/{ANGLE}")}
    found = strict.run(source, tmp_path / "out", "--no-overlay", "--resume")
    assert found.status == 0 and found.results["answered"] == 60
    kept = [path for path, time_ns in first.items() if path.stat().st_mtime_ns == time_ns]
    assert len(kept) >= len(first) - 1  # the signal may have hit one that was being written
    assert f"{len(kept)} of 60 cases are answered already" in found.out
    shutil.rmtree(tmp_path / "out")
