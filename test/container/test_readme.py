"""README.md and the pages it leads to: its Python lines run, and what the pages name is there."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("model", "training", "export", "test")
COMING = {"test/check.sh"}
PAGES = ["README.md", *(f"{folder}/README.md" for folder in FOLDERS)]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_python_lines_run_and_give_the_recorded_answer() -> None:
    (lines,) = re.findall(r"^```python\n(.*?)^```$", text_of("README.md"), re.MULTILINE | re.DOTALL)
    ran = subprocess.run(
        [sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    with (ROOT / "test" / "cases" / "expected.int8.csv").open(encoding="utf-8") as file:
        expected = {row["Filename"]: float(row["AoP"]) for row in csv.DictReader(file)}
    (printed,) = ran.stdout.splitlines()
    assert float(printed.split()[0]) == pytest.approx(expected["phantom-18.png"], abs=0.5)
    assert "PS1" in printed


def test_readme_is_short_and_begins_with_the_results() -> None:
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 130
    top = lines[:25]
    for words in ("shipped, int8", "baseline U-Net", "do not compare with IUGC 2025's"):
        assert any(words in line for line in top), words


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https:)([^)#]*)(#[^)]*)?\)", text_of(page))
    for path, heading in links:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), f"{page}: {path}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading[1:] in anchors, f"{page}: {path}{heading}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_files_that_are_there(page: str) -> None:
    text = text_of(page)
    modules = re.findall(r"python -m ((?:training|export)\.\w+)", text)
    modules += re.findall(r"`((?:training|export)\.[a-z]\w+)\b", text)
    files = [f"{module.replace('.', '/')}.py" for module in modules]
    files += re.findall(r"\btest/\w+\.(?:py|sh)\b", text)
    missing = [file for file in {*files} - COMING if not (ROOT / file).is_file()]
    assert not missing, f"{page}: {missing}"


def test_the_tutorials_block_is_what_its_script_takes() -> None:
    script = (ROOT / "test" / "run_example.sh").read_text(encoding="utf-8")
    (extract,) = re.findall(r"^lines=\$\((.*)\)$", script, re.MULTILINE)
    taken = subprocess.run(
        ["bash", "-c", extract], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert taken[0].startswith("pip install") and taken[-1].endswith("aop-demo --report")
    assert not [line for line in taken if line.startswith("```")]
