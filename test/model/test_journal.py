"""The journal of a run: what it keeps, what it refuses, and a disk that is full."""

import errno
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from model.results.files import OutputError, RunFiles
from model.results.journal import FRAME_BYTES, Journal
from model.results.schemas import CaseEntry, Loop, Results, RunSummary

NAMES = RunFiles()
SETTINGS = {"model_sha256": "abc", "decode": "subpixel"}
SUMMARY = RunSummary(
    model="m",
    model_file="m.onnx",
    model_sha256="abc",
    provider="cpu",
    settings={"decode": "subpixel"},
    answered=3,
    failed=1,
    doubtful=0,
)
POINTS = {"PS1": (60.0, 20.5), "PS2": (21.0, 31.25), "FH1": (81.0, 71.0)}
CASES = {"b": "b.png", "a": "a.png", "c": "c.tif"}  # in the run's order


def entry(case: str, frame: int | None = None, ok: bool = True) -> CaseEntry:
    known = {"landmarks_px": POINTS, "aop_deg": 100.0} if ok else {"error": "no"}
    status = "ok" if ok else "failed"
    return CaseEntry(case=case, file=CASES[case], frame=frame, status=status, **known)


def loop() -> Loop:
    return Loop(
        case="c",
        file="c.tif",
        frames=2,
        answered=2,
        aop_deg=[100.0, 100.0],
        median_aop_deg=100.0,
        median_frame=0,
        most_confident_frame=1,
        doubtful_frames=0,
    )


def begin(folder: Path, resume: bool = False, settings: dict = SETTINGS) -> Journal:
    return Journal(folder, NAMES, settings, CASES, (lambda _: True) if resume else None)


def fill(journal: Journal) -> None:
    """c, then a, which failed, then b."""
    for k in (0, 1):
        journal.add(entry("c", k))
    journal.end("c", loop())
    for case in ("a", "b"):
        journal.add(entry(case, ok=case == "b"))
        journal.end(case)


def read(folder: Path) -> Results:
    return Results.model_validate_json((folder / "results.json").read_bytes())


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_results_are_in_the_order_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("of an earlier run")
    journal = begin(tmp_path)
    assert listed(tmp_path) == [NAMES.journal, NAMES.room]
    fill(journal)
    journal.finish(SUMMARY)
    results = read(tmp_path)
    assert [(e.case, e.frame) for e in results.cases] == [
        ("b", None),
        ("a", None),
        *(("c", k) for k in (0, 1)),
    ]
    assert results.loops == [loop()]
    assert (results.answered, results.failed, results.model) == (3, 1, "m")
    rows = (tmp_path / "landmarks.csv").read_text().splitlines()
    assert [row.split(',"')[0] for row in rows[1:]] == ["b.png,", "c.tif,0", "c.tif,1"]
    assert listed(tmp_path) == ["landmarks.csv", "results.json"]


def test_results_of_nothing(tmp_path: Path) -> None:
    begin(tmp_path).finish(SUMMARY)
    assert read(tmp_path).cases == [] and read(tmp_path).loops == []


@pytest.mark.parametrize("ended", [True, False])
def test_resume_keeps_what_is_answered_in_full(tmp_path: Path, ended: bool) -> None:
    journal = begin(tmp_path)
    fill(journal)
    if ended:
        journal.finish(SUMMARY)
    else:
        journal.add(entry("a"))  # begun again, and killed in the middle of a line
        with (tmp_path / NAMES.journal).open("ab") as file:
            file.write(b'{"case":"a","file":"a.p')
        journal.close()
        (tmp_path / NAMES.room).write_bytes(bytes(3 * FRAME_BYTES))
    resumed = begin(tmp_path, resume=True)
    assert resumed.done == {"b", "c"}
    assert "results.json" not in listed(tmp_path)
    resumed.add(entry("a"))
    resumed.end("a")
    resumed.finish(SUMMARY)
    results = read(tmp_path)
    assert [(e.case, e.status) for e in results.cases] == [
        *(("b", "ok"), ("a", "ok"), ("c", "ok"), ("c", "ok"))
    ]
    assert results.loops == [loop()]


def test_a_name_that_now_means_another_file_is_not_kept(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    fill(journal)
    journal.close()
    cases = {**CASES, "b": "b.jpg"}
    assert Journal(tmp_path, NAMES, SETTINGS, cases, lambda _: True).done == {"c"}


def test_what_no_longer_holds_is_not_kept(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    fill(journal)
    journal.close()
    resumed = Journal(tmp_path, NAMES, SETTINGS, CASES, lambda entry: entry.frame != 1)
    assert resumed.done == {"b"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [*lines, lines[1]],  # an entry without its end
        lambda lines: [*lines, *lines[1:]],  # every case twice
        lambda lines: [lines[0], *lines[2:]],  # a loop without its first frame
        lambda lines: [line for line in lines if b'"end":"c"' not in line],
    ],
)
def test_a_journal_that_was_edited_keeps_no_case_twice(tmp_path: Path, damage) -> None:
    journal = begin(tmp_path)
    fill(journal)
    journal.close()
    path = tmp_path / NAMES.journal
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    resumed = begin(tmp_path, resume=True)
    resumed.finish(SUMMARY)
    found = [(e.case, e.frame) for e in read(tmp_path).cases]
    assert len(found) == len({*found}) and ("b", None) in found


@pytest.mark.parametrize("line", [b'{"end":1', b'{"end":\xff}', b'{"end":"b"', b"[" * 100_000])
def test_a_journal_that_cannot_be_read(tmp_path: Path, line: bytes) -> None:
    begin(tmp_path).close()
    with (tmp_path / NAMES.journal).open("ab") as file:
        file.write(line + b"\n" + b'{"end":"b","loop":null}\n')
    with pytest.raises(OutputError, match="holds no run that can be read"):
        begin(tmp_path, resume=True)


def test_resume_where_there_is_nothing(tmp_path: Path) -> None:
    assert begin(tmp_path / "new", resume=True).done == frozenset()


@pytest.mark.parametrize("ended", [True, False])
def test_resume_with_other_settings_is_refused_and_loses_nothing(
    tmp_path: Path, ended: bool
) -> None:
    journal = begin(tmp_path)
    fill(journal)
    (journal.finish if ended else lambda _: journal.close())(SUMMARY)
    before = {name: (tmp_path / name).read_bytes() for name in listed(tmp_path)}
    with pytest.raises(OutputError, match="--resume: the earlier run had another decode; choose"):
        begin(tmp_path, resume=True, settings={**SETTINGS, "decode": "argmax"})
    assert {name: (tmp_path / name).read_bytes() for name in listed(tmp_path)} == before


def test_resume_from_an_empty_journal_begins_anew(tmp_path: Path) -> None:
    (tmp_path / NAMES.journal).write_bytes(b"")
    assert begin(tmp_path, resume=True).done == frozenset()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"settings": {}}', "null"])
@pytest.mark.parametrize("name", ["results.json", NAMES.journal])
def test_resume_from_what_is_no_run(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(OutputError, match="--resume: "):
        begin(tmp_path, resume=True)
    assert (tmp_path / name).read_text() == text


@pytest.mark.parametrize("blocked", ["out", "out/results.json/x", "out/landmarks.csv/x"])
def test_output_that_cannot_be_written(tmp_path: Path, blocked: str) -> None:
    (tmp_path / blocked).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / blocked).write_text("in the way")
    with pytest.raises(OutputError, match=r"out cannot be written \(.+\); mount a writable"):
        begin(tmp_path / "out")


def test_room_is_set_aside_and_used_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begin(tmp_path)
    room = tmp_path / NAMES.room
    before = room.stat().st_size
    assert before >= len(CASES) * FRAME_BYTES
    journal.reserve(5)
    assert room.stat().st_size == before + 5 * FRAME_BYTES
    real = os.pwrite

    def full(file: int, data: bytes, at: int) -> int:
        if room.stat().st_size == before + 5 * FRAME_BYTES:
            return real(file, data[:10], at)  # a part still fits
        return real(file, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    fill(journal)
    assert room.stat().st_size < before + 5 * FRAME_BYTES
    journal.finish(SUMMARY)
    assert len(read(tmp_path).cases) == 4


def test_two_runs_do_not_write_the_same_files(tmp_path: Path) -> None:
    first = begin(tmp_path)
    before = (tmp_path / NAMES.journal).read_bytes()
    with pytest.raises(OutputError, match="being written by another run"):
        begin(tmp_path)
    assert (tmp_path / NAMES.journal).read_bytes() == before
    other = RunFiles("results-1-of-2.json", "landmarks-1-of-2.csv")
    Journal(tmp_path, other, SETTINGS, CASES).close()
    fill(first)
    first.finish(SUMMARY)
    assert len(read(tmp_path).cases) == 4
    begin(tmp_path).close()
    assert NAMES.room not in listed(tmp_path)


def test_a_disk_without_any_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = begin(tmp_path)
    monkeypatch.setattr(os, "pwrite", lambda *_: 3)
    with pytest.raises(OSError, match="No space left"):
        fill(journal)
    monkeypatch.undo()
    journal.close()

    def none(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", none)
    with pytest.raises(OutputError, match=r"No space left on device.*with room"):
        begin(tmp_path)


@pytest.mark.slow
def test_memory_does_not_grow_with_entries(tmp_path: Path) -> None:
    def peak(frames: int) -> int:
        tracemalloc.start()
        journal = begin(tmp_path)
        for k in range(frames):
            journal.add(entry("c", k))
        journal.end("c")
        journal.finish(SUMMARY)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(10)
    assert peak(3000) < peak(30) + 200_000
    assert len(json.loads((tmp_path / "results.json").read_bytes())["cases"]) == 30
