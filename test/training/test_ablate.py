"""The ablation: its data, its plan, what it does not run again, and its table."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from test.phantom import phantom
from training import ablate, pretrain, pseudo_label
from training.ablate import (
    PAPER_ROWS,
    SCALES,
    TABLE_ROWS,
    AblateOptions,
    Task,
    plan_pretraining,
    plan_seed,
    prepare_data,
    run_tasks,
    write_ablation,
)
from training.data.case_table import Case, read_cases, write_cases
from training.learning.trainer import parse_fit


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """psfhs/ and hc18/ in small: 12 images of device A and 6 of B, in three splits."""
    import cv2

    root = tmp_path_factory.mktemp("data")
    for name in ("psfhs", "hc18"):
        (root / name / "images").mkdir(parents=True)
    cases = []
    for k in range(18):
        made = phantom(k, 64, 64)
        cv2.imwrite(str(root / "psfhs" / "images" / f"{k:02d}.png"), made.image)
        split = ("train", "train", "val", "test")[k % 4]
        device = "B" if k % 3 == 2 else "A"
        landmarks = np.asarray(made.landmarks_px)
        cases.append(Case(f"{k:02d}.png", landmarks, 100.0, split, device, f"g{k}"))
    write_cases(root / "psfhs" / "cases.csv", cases)
    for name in ("1_HC.png", "2_HC.png", "test_3_HC.png"):
        cv2.imwrite(str(root / "hc18" / "images" / name), phantom(50, 64, 64).image)
    return root


def options(folders: Path, output: Path, *more: str) -> AblateOptions:
    places = ["--psfhs", str(folders / "psfhs"), "--hc18", str(folders / "hc18")]
    parsed = ablate._parser().parse_args([*places, "--output", str(output), *more])
    return AblateOptions(**vars(parsed))


def test_who_is_labelled_and_who_is_not(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablate, "LABELLED", 4)
    data = prepare_data(options(folders, tmp_path))
    everything = {case.file: case for case in read_cases(folders / "psfhs" / "cases.csv")}
    mine = read_cases(data.cases)
    assert {case.device for case in mine} == {"A"}
    assert sum(case.split == "train" for case in mine) == 4
    assert {c.file for c in mine if c.split == "val"} == {
        file for file, case in everything.items() if (case.split, case.device) == ("val", "A")
    }
    unlabelled = {path.name for path in data.unlabelled.rglob("*.png")}
    assert {"1_HC.png", "2_HC.png"} < unlabelled and "test_3_HC.png" not in unlabelled
    of_psfhs = unlabelled & {*everything}
    assert {everything[file].split for file in of_psfhs} == {"train"}
    assert {everything[file].device for file in of_psfhs} == {"A", "B"}
    assert not of_psfhs & {case.file for case in mine}
    before = data.cases.read_text()
    prepare_data(options(folders, tmp_path))  # again: the same images
    assert data.cases.read_text() == before


@pytest.mark.parametrize("scale", SCALES)
def test_the_plan_is_understood_by_every_stage(folders: Path, tmp_path: Path, scale: str) -> None:
    given = options(folders, tmp_path, "--scale", scale)
    data = prepare_data(given)
    tasks = [plan_pretraining(given, data), *plan_seed(given, data, 7)]
    names = [task.name for task in tasks]
    assert len({*names}) == len(names) and all({*task.needs} <= {*names} for task in tasks)
    parsers = {"training.pretrain": pretrain, "training.pseudo_label": pseudo_label}
    seen = set()
    for task in tasks:
        stage, *arguments = task.command
        if stage == "training.fit":
            settings, recipe = parse_fit(arguments)
            assert recipe.seed == 7 and settings.steps == SCALES[scale].steps
            unet = "/unet" in str(settings.output)
            assert recipe.network.kind == ("unet" if unet else "transunet")
        elif stage in parsers:
            parsers[stage]._parser().parse_args(arguments)
        seen.add(stage)
    assert seen >= {"training.fit", *parsers}
    places = [task.done for task in tasks]
    assert len({*places}) == len(places)  # no two leave the same mark
    noise = [row for row in TABLE_ROWS if "--landmark_noise_px" in row.flags]
    assert {row.flags[row.flags.index("--landmark_noise_px") + 1] for row in noise[:5]} == {"0"}


def test_each_row_adds_one_thing() -> None:
    paper = TABLE_ROWS[:PAPER_ROWS]
    assert [row.decode for row in paper] == ["argmax"] * PAPER_ROWS
    assert [(row.unet, row.pretrained, row.pseudo) for row in paper] == [
        (True, False, None),
        (False, False, None),
        (False, True, None),
        (False, True, "."),
        (False, True, "psfhs"),  # instead
        (False, True, "."),
    ]
    ours = TABLE_ROWS[PAPER_ROWS:]
    assert ours[0].trained == paper[-1].name
    for before, after in zip((paper[-1], *ours[1:]), ours[1:], strict=False):
        assert after.flags[: len(before.flags)] == before.flags and after.flags != before.flags


def test_nothing_is_done_twice_and_what_fails_stops_its_followers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def pretend(task: Task, threads: str) -> bool:
        order.append(task.name)
        if task.name != "x":
            task.done.touch()
        return task.name != "x"

    monkeypatch.setattr(ablate, "run_task", pretend)

    def task(name: str, *needs: str) -> Task:
        return Task(name, [], tmp_path / name, needs)

    tasks = [task("c", "b"), task("b", "a"), task("a"), task("x"), task("y", "x")]
    assert run_tasks(tasks, 1) == ["x"] and [n for n in order if n != "x"] == ["a", "b", "c"]
    order.clear()
    assert run_tasks(tasks, 2) == ["x"] and order == ["x"]


@pytest.mark.slow
def test_a_stage_leaves_its_time_or_its_log(tmp_path: Path) -> None:
    good = Task("good", ["training.fit", "--help"], tmp_path / "seed" / "good" / "done")
    assert ablate.run_task(good, "1") and good.done.read_text().endswith(" s\n")
    bad = Task("bad", ["training.fit", "--no-such"], tmp_path / "seed" / "bad" / "done")
    assert not ablate.run_task(bad, "1") and not bad.done.exists()
    assert (
        "the following arguments are required"
        in (tmp_path / "seed" / "logs" / "bad.log").read_text()
    )


def report(value: float) -> dict:
    figures = {key: {"value": value} for key in ("mre_px", "aop_error_deg")}
    return {group: figures for group in ("all", "device A", "device B")}


def test_the_table_has_mean_and_spread_over_seeds(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for seed, value in ((1, 10.0), (2, 12.0)):
        for suffix, factor in (("", 1), (".val", 9)):
            path = tmp_path / "results" / f"unet-{seed}{suffix}.json"
            path.write_text(json.dumps(report(value * factor)))
    (tmp_path / "results" / "noise-1.json").write_text(json.dumps(report(7.0)))
    images, table = folders / "psfhs" / "images", folders / "psfhs" / "cases.csv"
    text = write_ablation(tmp_path, "cpu", images, table)
    lines = text.splitlines()
    assert "| heatmap U-Net (baseline) | 2 | 11.00 ± 1.41 | 11.00 ± 1.41 |" in lines[2]
    assert "| + device-domain adaptation | 1 | 7.00 | 7.00 | 7.00, 7.00 | 7.00, 7.00 |" in lines[3]
    assert len(lines) == 4 and (tmp_path / "plot.png").stat().st_size > 1000
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert {(row["row"], row["seed"]) for row in rows} == {
        ("unet", "1"),
        ("unet", "2"),
        ("noise", "1"),
    }
    assert sys.modules["matplotlib"].get_backend().lower() == "agg"
