"""METHOD.md names a test for each trap; each of them is there."""

import re
from pathlib import Path

TEST = Path(__file__).resolve().parent


def test_the_tests_that_hold_the_traps_out_are_there() -> None:
    text = (TEST.parent / "training" / "METHOD.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if ".py::" in line]
    assert len(rows) >= 12
    for row in rows:
        file = ""
        for name, test in re.findall(r"`(test_\w+\.py)?::(\w+)`", row):
            file = name or file
            assert f"def {test}(" in (TEST / file).read_text(encoding="utf-8"), f"{file}::{test}"
