"""Compare measured figures with the model card's: at most a tenth worse.

    python test/container/gate.py figures.json model/weights/MODEL_CARD.md

The card quotes the text of training.evaluate. The first figure of a line counts: it is that of all
cases. Exits 1 if a figure is worse.
"""

import json
import re
import sys
from pathlib import Path

SLACK = 1.1
FIGURES = {"mre_px": "mean radial error, px", "aop_error_deg": "AoP error, deg"}


def main(measured: Path, card: Path) -> int:
    """Compare and print; returns 1 if a figure is beyond the slack or a case is missing."""
    figures = json.loads(measured.read_text())["all"]
    text = card.read_text()
    status = 0 if not figures["missing"] else 1
    for key, label in FIGURES.items():
        quoted = re.findall(rf"^ *{re.escape(label)} +([\d.]+)", text, re.MULTILINE)
        if len(quoted) != 1:
            raise SystemExit(
                f"{card}: expected one line '{label}', as training.evaluate prints it, "
                f"found {len(quoted)}"
            )
        value, allowed = figures[key]["value"], float(quoted[0]) * SLACK
        verdict = "ok" if value <= allowed else "WORSE"
        print(f"{label}: {value:.2f}, the card says {quoted[0]}, allowed {allowed:.2f}: {verdict}")
        status |= value > allowed
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), Path(sys.argv[2])))
