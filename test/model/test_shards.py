"""Parts of a large folder: which part answers a file, and how parts are merged."""

import random
from pathlib import Path

import pytest

from model.pipeline.shards import Shard, merge_results, parse_shard
from model.results.files import OutputError
from test.support.runs import made, png, run, tree

FILES = [f"a/{k}.png" for k in range(1000)] + ["ü\\xff.png", "line\nbreak.png"]


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_parts_cover_every_file_once(count: int) -> None:
    parts = [Shard(number, count) for number in range(1, count + 1)]
    held = [sum(part.holds(file) for file in FILES) for part in parts]
    assert all(sum(part.holds(file) for part in parts) == 1 for file in FILES)
    assert sum(held) == len(FILES) and min(held) > 0.6 * len(FILES) / count


def test_a_part_does_not_depend_on_the_others_or_their_order() -> None:
    shuffled = random.Random(0).sample(FILES, len(FILES) // 2)
    part = Shard(3, 8)
    assert {f for f in shuffled if part.holds(f)} == {f for f in FILES if part.holds(f)} & {
        *shuffled
    }
    assert [f for f in FILES[:40] if part.holds(f)] == EIGHTH  # on every machine, in every version


EIGHTH = [f"a/{k}.png" for k in (1, 17, 19, 21, 28, 32, 39)]

SLURM = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "4"}


@pytest.mark.parametrize(
    ("text", "environment", "shard"),
    [
        ("3/8", {}, Shard(3, 8)),
        ("3/8", {"JOB_COMPLETION_INDEX": "5"}, Shard(3, 8)),
        ("auto/8", {"JOB_COMPLETION_INDEX": "0"}, Shard(1, 8)),
        ("auto/8", {"JOB_COMPLETION_INDEX": "7"}, Shard(8, 8)),
        ("auto", SLURM, Shard(1, 4)),
        ("auto", {**SLURM, "SLURM_ARRAY_TASK_ID": "4"}, Shard(4, 4)),
        ("auto/8", {**SLURM, "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3"}, Shard(7, 8)),
        ("auto/9", SLURM, Shard(1, 9)),
        ("auto/9", {"SLURM_ARRAY_TASK_ID": "2"}, Shard(2, 9)),
    ],
)
def test_shards(text: str, environment: dict, shard: Shard) -> None:
    assert parse_shard(text, environment) == shard
    assert str(shard) == f"{shard.number}/{shard.count}"


@pytest.mark.parametrize(
    ("text", "environment"),
    [
        *((text, {}) for text in ("", "3", "0/8", "9/8", "-1/8", "a/8", "3/b", "3/8/2", "auto/8")),
        ("auto", {"JOB_COMPLETION_INDEX": "1"}),
        ("auto", {**SLURM, "SLURM_ARRAY_TASK_ID": "0"}),
        ("auto", {**SLURM, "SLURM_ARRAY_TASK_ID": "7"}),
        ("1/1000000000", {}),
        ("auto/2", {"JOB_COMPLETION_INDEX": "2"}),
        ("auto/2", {"JOB_COMPLETION_INDEX": "one"}),
    ],
)
def test_what_is_no_shard(text: str, environment: dict) -> None:
    with pytest.raises(ValueError, match=r"expected K/N|auto needs|expected a number"):
        parse_shard(text, environment)


# ---- Through process.py


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(6):
        png(tmp_path / "in" / f"{k}.png", made(k % 3))
    (tmp_path / "in" / "bad.png").write_text("no image")
    return tmp_path / "in"


@pytest.mark.slow
def test_parts_merge_to_what_one_run_gives(folder: Path, tmp_path: Path) -> None:
    whole = run(folder, tmp_path / "whole", "--no-overlay", "--latency-budget-ms", "0.1")
    out = tmp_path / "out"
    for k in (3, 1, 2):
        part = run(folder, out, "--no-overlay", "--shard", f"{k}/3", "--latency-budget-ms", "0.1")
        assert part.results == {} and f"results-{k}-of-3.json" in tree(out)
    merged = run(folder, out, "--merge")
    assert merged.status == 1 and "'bad.png': the content matches none" in merged.sentence
    for results in (merged.results, whole.results):
        for entry in results["cases"]:
            entry.pop("milliseconds")
            entry["warnings"] = len(entry["warnings"])
    assert merged.results == whole.results
    same = "landmarks.csv"
    assert (out / same).read_bytes() == (whole.folder / same).read_bytes()
    parts = [f"{kind}-{k}-of-3.{suffix}" for k in (1, 2, 3) for kind, suffix in KINDS]
    assert tree(out) == sorted([*tree(whole.folder), *parts])


KINDS = (("results", "json"), ("landmarks", "csv"))


def test_merge_names_what_is_missing(folder: Path, tmp_path: Path) -> None:
    (folder / "bad.png").unlink()
    out = tmp_path / "out"
    for k in (1, 3):
        assert run(folder, out, "--no-overlay", "--shard", f"{k}/3").status == 0
    merged = run(folder, out, "--merge")
    lost = [f"{k}.png" for k in range(6) if Shard(2, 3).holds(f"{k}.png")]
    assert lost and merged.results["missing"] == ["part 2/3", *lost]
    assert (
        merged.status == 1
        and "the first is 'part 2/3'; run the parts concerned again" in merged.sentence
    )
    assert len(merged.results["cases"]) == 6 - len(lost)
    without_input = run(tmp_path / "gone", out, "--merge")
    assert without_input.results["missing"] == ["part 2/3"] and without_input.status == 1
    assert "'part 2/3'; run the parts concerned again" in without_input.sentence
    assert "is not known whether images are missing: the input folder" in without_input.sentence
    run(folder, out, "--no-overlay", "--shard", "2/3")
    merged = run(folder, out, "--merge")
    assert (merged.status, merged.results["missing"]) == (0, [])


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": ', b"\xff\x00"])
def test_a_damaged_part_is_named_and_the_others_are_merged(
    folder: Path, tmp_path: Path, content: bytes
) -> None:
    (folder / "bad.png").unlink()
    out = tmp_path / "out"
    for k in (1, 2, 3):
        assert run(folder, out, "--no-overlay", "--shard", f"{k}/3").status == 0
    (out / "results-2-of-3.json").write_bytes(content)
    merged = run(folder, out, "--merge")
    lost = [f"{k}.png" for k in range(6) if Shard(2, 3).holds(f"{k}.png")]
    part = "part 2/3 (results-2-of-3.json is damaged or cannot be read)"
    assert merged.results["missing"] == [part, *lost]
    assert (
        merged.status == 1
        and f"first is '{part}'; run the parts concerned again" in merged.sentence
    )
    assert len(merged.results["cases"]) == merged.results["answered"] == 6 - len(lost) > 0
    assert run(folder, out, "--no-overlay", "--shard", "2/3").status == 0
    again = run(folder, out, "--merge")
    assert (again.status, again.results["missing"]) == (0, [])


def test_merging_without_the_input_says_that_images_may_be_missing(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "bad.png").unlink()
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    for k in (1, 2):
        run(folder, out, "--no-overlay", "--shard", f"{k}/2")
    for source, words in ((tmp_path / "gone", "pass --input DIR"), (empty, "no image below")):
        merged = run(source, out, "--merge")
        assert merged.status == 1 and merged.results["answered"] == 6
        assert "merged, but it is not known whether images are missing" in merged.sentence
        assert words in merged.sentence and "not known" not in merged.out
        assert (out / "landmarks.csv").read_text().count("\n") == 7
    assert run(folder, out, "--merge").status == 0


def test_an_empty_part_is_no_fault(tmp_path: Path) -> None:
    png(tmp_path / "in" / "a.png")
    statuses = [
        run(tmp_path / "in", tmp_path / "out", "--shard", f"{k}/5").status for k in range(1, 6)
    ]
    assert statuses == [0] * 5
    assert run(tmp_path / "in", tmp_path / "out", "--merge").results["answered"] == 1


def test_parts_that_do_not_belong_together(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "cannot be read" in run(folder, out, "--merge").sentence
    out.mkdir()
    assert "found none" in run(folder, out, "--merge").sentence
    run(folder, out, "--no-overlay", "--shard", "1/2")
    run(folder, out, "--no-overlay", "--shard", "2/2", "--decode", "argmax")
    merged = run(folder, out, "--merge")
    assert merged.status == 2 and "differ in their model or settings" in merged.sentence
    run(folder, out, "--no-overlay", "--shard", "1/3")
    merged = run(folder, out, "--merge")
    assert merged.status == 2 and "results-1-of-2.json, results-1-of-3.json" in merged.sentence
    (out / "results-1-of-3.json").write_text("{}")
    (out / "results-1-of-2.json").unlink()
    (out / "results-2-of-2.json").unlink()
    with pytest.raises(OutputError, match=r"results-1-of-3\.json"):
        merge_results(out, [])


def test_a_job_is_not_divided(tmp_path: Path) -> None:
    from test.support.runs import job

    png(job(tmp_path / "in") / "a.png")
    result = run(tmp_path / "in", tmp_path / "out", "--shard", "1/2")
    assert result.status == 2 and "leave it out" in result.sentence


def test_images_everywhere_are_answered_and_other_files_named(tmp_path: Path) -> None:
    for name in ("top.png", "other/x.png", "images/p1/y.png"):
        png(tmp_path / "in" / name)
    for name in ("notes.txt", "images/p1/loop.AVI", "images/b.avi", "letter"):
        (tmp_path / "in" / name).write_text("no image")
    whole = run(tmp_path / "in", tmp_path / "whole", "--no-overlay")
    assert (whole.status, whole.err) == (0, "")
    assert [entry["file"] for entry in whole.results["cases"]] == [
        *("images/p1/y.png", "other/x.png", "top.png"),
    ]
    assert "2 images lie outside images/NAME/, so the whole folder is read\n" in whole.out
    expected = ".avi 2 (first 'images/b.avi'), .txt 1 (first 'notes.txt'), "
    assert f"left out files that are no images: {expected}no suffix 1 (first 'letter')" in whole.out
    assert whole.results["left_out"] == {
        ".avi": {"count": 2, "first": "images/b.avi"},
        ".txt": {"count": 1, "first": "notes.txt"},
        "no suffix": {"count": 1, "first": "letter"},
    }
    for part in ("1/2", "2/2"):
        run(tmp_path / "in", tmp_path / "parts", "--no-overlay", "--shard", part)
    merged = run(tmp_path / "in", tmp_path / "parts", "--merge")
    assert (merged.status, merged.results["missing"]) == (0, [])
    assert merged.results["left_out"] == whole.results["left_out"]
    assert len(merged.results["cases"]) == 3


def test_the_images_folder_alone_needs_no_remark(tmp_path: Path) -> None:
    png(tmp_path / "in" / "images" / "us" / "y.png")
    (tmp_path / "in" / "age.json").write_text("31")
    answered = run(tmp_path / "in", tmp_path / "out", "--no-overlay")
    assert answered.status == 0 and "outside" not in answered.out
    assert answered.results["left_out"] == {".json": {"count": 1, "first": "age.json"}}
