"""The writers, which leave a whole file or none."""

import errno
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.results import files
from model.results.files import (
    AnswerFiles,
    RunFiles,
    read_entry,
    read_summary,
    write_bytes,
    write_chunks,
    write_results,
)
from model.results.schemas import CaseEntry, Loop, NamedPoint, Results

ROOT = Path(__file__).resolve().parents[2]
FILES = AnswerFiles("aop-landmarks.json", "angle-of-progression.json")


def frame_points(k: int) -> list[NamedPoint]:
    """Three landmarks: x is the number of the landmark, y and z are that of the frame."""
    return [
        NamedPoint(name=name, point=(x, float(k), float(k)), probability=0.5)
        for x, name in enumerate(("PS1", "PS2", "FH1"))
    ]


def load(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    for data in (b"first, longer", b"second"):
        write_bytes(path, data)
        assert path.read_bytes() == data and listed(path.parent) == ["c.txt"]


@pytest.mark.parametrize("named", [False, True])
def test_write_that_fails_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """Also on a file system that cannot create files without a name."""
    if named:
        monkeypatch.setattr(files, "_open_nameless", lambda folder: None)
    write_bytes(tmp_path / "a.txt", b"old")

    def chunks() -> Iterator[bytes]:
        yield b"ne"
        assert named or listed(tmp_path) == ["a.txt"]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_chunks(tmp_path / "a.txt", chunks())
    assert (tmp_path / "a.txt").read_bytes() == b"old" and listed(tmp_path) == ["a.txt"]
    write_bytes(tmp_path / "a.txt", b"new")
    assert (tmp_path / "a.txt").read_bytes() == b"new" and listed(tmp_path) == ["a.txt"]


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_whole_files(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from model.results.files import write_bytes\n"
        "for k in range(10**9):\n"
        "    write_bytes(Path(sys.argv[1]) / f'{k % 7}', bytes([k % 251]) * 2**18)"
    )
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT)
        while not list(tmp_path.iterdir()):
            time.sleep(0.01)
        time.sleep(0.03)
        process.kill()
        process.wait()
        for path in tmp_path.iterdir():
            data = path.read_bytes()
            assert len(data) == 2**18 and len(set(data)) == 1, path
            path.unlink()


def test_answers_of_one_frame(tmp_path: Path) -> None:
    FILES.write(tmp_path / "a", [101.25], frame_points(0))
    assert listed(tmp_path / "a") == [FILES.angle, FILES.landmarks]
    assert (tmp_path / "a" / FILES.angle).read_text() == "101.25\n"


def test_answers_of_several_frames(tmp_path: Path) -> None:
    names = AnswerFiles("points.json", "sub/angle.json", "three.json")
    points = [point for k in range(4) for point in frame_points(k)]
    names.write(tmp_path, [100.0, 90.0, 120.0, 110.0], points)
    assert load(tmp_path / "sub/angle.json") == 100.0  # the lower of the two in the middle
    assert load(tmp_path / "three.json")["angle"][1] == [0.0, 0.0, 0.0]  # its frame
    found = load(tmp_path / "points.json")["points"]
    assert [(point["name"], point["point"][2]) for point in found] == [
        (name, float(k)) for k in range(4) for name in ("PS1", "PS2", "FH1")
    ]
    names.write(tmp_path, [100.0, 90.0, 95.0], points[:9])
    assert load(tmp_path / "sub/angle.json") == 95.0
    assert load(tmp_path / "three.json")["angle"][1] == [0.0, 2.0, 2.0]


def test_remove_takes_answers_of_the_case_and_its_frames_and_nothing_else(tmp_path: Path) -> None:
    names = AnswerFiles("points.json", "angle.json", "three.json")
    mine = [*names.names, *(f"frame-{k}/{name}" for k in ("0007", "12345") for name in names.names)]
    others = ["notes.txt", "results.json", "frame-0007/notes.txt", "other/points.json"]
    for name in (*mine, *others):
        write_bytes(tmp_path / name, b"x")
    for _ in range(2):  # again where nothing is left
        names.remove(tmp_path)
        left = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()]
        assert sorted(left) == sorted(others)
    names.remove(tmp_path / "not-there")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_are_read_back_an_entry_at_a_time(tmp_path: Path, count: int) -> None:
    cases = [CaseEntry(case=f"{k}\n]", file='"],\n', status="failed") for k in range(count)]
    loop = Loop(
        case="c",
        file="c",
        frames=0,
        answered=0,
        aop_deg=[],
        median_aop_deg=None,
        median_frame=None,
        most_confident_frame=None,
        doubtful_frames=0,
    )
    results = Results(
        model='a\n "cases": [\n',
        model_file="b",
        model_sha256="c",
        provider="cpu",
        settings={"x": None},
        missing=[' "cases": ['],
        answered=1,
        failed=2,
        doubtful=3,
        cases=cases,
        loops=[loop],
    )
    write_results(tmp_path, results)
    with (tmp_path / "results.json").open("rb") as file:
        summary = read_summary(file)
        found = list(iter(lambda: read_entry(file), None))
    assert found == cases
    assert summary.model_dump() == results.model_dump(exclude={"cases", "loops"})


def test_remove_takes_the_runs_files_and_leaves_its_journal(tmp_path: Path) -> None:
    names = RunFiles("results-1-of-2.json", "landmarks-1-of-2.csv")
    mine = [names.results, names.table, names.report, names.journal, "report.html"]
    for name in mine:
        write_bytes(tmp_path / name, b"x")
    names.remove(tmp_path)
    assert listed(tmp_path) == sorted([names.journal, "report.html"])
