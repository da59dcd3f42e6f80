"""Options, their environment variables, and their table in model/README.md."""

import re
from pathlib import Path

import pytest

from model.pipeline.options import parse_options, variable_name
from model.pipeline.shards import Shard
from model.results.files import RunFiles

CONTRACT = Path(__file__).resolve().parents[2] / "model" / "README.md"
# option, two values as text, and both as parsed
VALUES = [
    ("--input", "a", "b", Path("a"), Path("b")),
    ("--output", "a", "b", Path("a"), Path("b")),
    ("--model", "a", "b", Path("a"), Path("b")),
    ("--provider", "cpu", "cuda", "cpu", "cuda"),
    ("--threads", "2", "3", 2, 3),
    ("--decode", "argmax", "subpixel", "argmax", "subpixel"),
    ("--latency-budget-ms", "5", "6", 5.0, 6.0),
    ("--frame-of-answers", "pixel", "world", "pixel", "world"),
    ("--landmarks-file", "a.json", "b.json", "a.json", "b.json"),
    ("--angle-file", "a.json", "b.json", "a.json", "b.json"),
    ("--three-points-file", "a.json", "b.json", "a.json", "b.json"),
    ("--shard", "1/2", "2/2", Shard(1, 2), Shard(2, 2)),
    ("--api-method", "invoke", "exec", "invoke", "exec"),
    ("--serve-port", "80", "81", 80, 81),
]
SWITCHES = ["--overlay", "--report", "--resume", "--merge", "--mirror"]


def name(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def parse(*arguments: str, **environment: str):
    return parse_options(arguments, "", environment)


@pytest.mark.parametrize(("option", "first", "second", "one", "two"), VALUES)
def test_variable_option_and_which_wins(
    option: str, first: str, second: str, one: object, two: object
) -> None:
    found = [
        getattr(args, name(option))
        for args in (
            parse(option, first),
            parse(**{variable_name(option): first}),
            parse(option, second, **{variable_name(option): first}),
            parse(**{variable_name(option): ""}),
        )
    ]
    assert found == [one, one, two, getattr(parse(), name(option))]


@pytest.mark.parametrize("option", SWITCHES)
def test_switches(option: str) -> None:
    no = option.replace("--", "--no-")
    found = [
        getattr(args, name(option))
        for args in (
            parse(option),
            parse(**{variable_name(option): "yes"}),
            parse(**{variable_name(option): "No"}),
            parse(no, **{variable_name(option): "yes"}),
            parse(option, **{variable_name(option): "no"}),
        )
    ]
    assert found == [True, True, False, False, True]


def test_serve_is_the_invoke_method() -> None:
    assert parse("--serve").api_method == "invoke" and parse().api_method == "exec"
    assert parse(AOP_SERVE="yes").api_method == "exec"  # --serve has no variable


def test_names_of_a_shards_files() -> None:
    assert parse("--merge", AOP_SHARD="2/3").run_files == parse().run_files  # it merges all parts
    assert parse().run_files == RunFiles("results.json", "landmarks.csv")
    assert parse().run_files.report == "report.html"
    expected = RunFiles("results-2-of-3.json", "landmarks-2-of-3.csv")
    assert parse("--shard", "2/3").run_files == expected
    assert expected.report == "report-2-of-3.html"


def test_batch_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("--shard", "auto/4", JOB_COMPLETION_INDEX="3").shard == Shard(4, 4)
    assert parse(AOP_SHARD="auto/4", JOB_COMPLETION_INDEX="0").shard == Shard(1, 4)
    assert parse(JOB_COMPLETION_INDEX="3").shard is None  # an indexed job may have another purpose


def test_a_variable_that_is_nearly_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(AOP_LANDMARKS="a.json")
    said = "unknown environment variable AOP_LANDMARKS; did you mean AOP_LANDMARKS_FILE?"
    assert said in capsys.readouterr().err
    assert parse(AOP_DATA="/data", PATH="/bin").landmarks_file == "aop-landmarks.json"


@pytest.mark.parametrize(
    "variables",
    [
        {"AOP_DECODE": "peak"},
        {"AOP_OVERLAY": "maybe"},
        {"AOP_LANDMARKS_FILE": "../a.json"},
        {"AOP_SERVE_PORT": "0"},
        {"AOP_THREADS": "many"},
        {"AOP_SHARD": "auto/2"},
    ],
)
def test_bad_variables(variables: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(**variables)
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("process.py: error: from the environment: ")
    ((key, value),) = variables.items()
    assert key.removeprefix("AOP_").lower().replace("_", "-") in last.lower().replace("_", "-")
    assert value in last or "auto needs" in last


def test_the_contract_has_every_option_with_its_variable() -> None:
    row = r"^\| `(--[a-z-]+)[^|]*\| `(AOP_[A-Z_]+)` \|"
    rows = dict(re.findall(row, CONTRACT.read_text(), re.MULTILINE))
    options = [*(option for option, *_ in VALUES), *SWITCHES]
    assert rows == {option: variable_name(option) for option in options}
