"""METHOD.md names a test for each trap; each of them is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_tests_that_hold_the_traps_out_are_there() -> None:
    text = (ROOT / "training" / "METHOD.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if ".py::" in line]
    assert len(rows) >= 12
    for row in rows:
        file = ""
        for name, test in re.findall(r"`(test_\w+\.py)?::(\w+)`", row):
            file = name or file
            (path,) = (ROOT / "test").rglob(file)
            assert f"def {test}(" in path.read_text(encoding="utf-8"), f"{file}::{test}"
