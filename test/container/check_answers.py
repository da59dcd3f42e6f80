"""Check an output folder: every answered case has its files, and they hold the expected values.

    python test/container/check_answers.py OUTPUT [--expected landmarks.csv [--some]]

Prints a line for each case; exits 1 on any mismatch. Files are matched by name, whatever folder
they lie in. Needs only the standard library.
"""

import argparse
import ast
import csv
import json
import math
import sys
from pathlib import Path

LANDMARKS = ("PS1", "PS2", "FH1")


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--expected", type=Path, help="landmarks.csv to compare with")
    parser.add_argument(
        "--some", action="store_true", help="accept a run of only some of the table's cases"
    )
    parser.add_argument("--tolerance-px", type=float, default=0.5)
    parser.add_argument("--tolerance-deg", type=float, default=0.5)
    args = parser.parse_args()
    entries = json.loads((args.output / "results.json").read_text())["cases"]
    expected = read_table(args.expected) if args.expected else {}
    answered = {Path(entry["file"]).name for entry in entries if entry["status"] == "ok"}
    missing = [] if args.some and answered else [name for name in expected if name not in answered]
    faults = [f"{name}: expected, but not answered" for name in missing]
    for entry in entries:
        if entry["status"] != "ok":
            print(f"{entry['file']:<28} failed: {entry['error']}")
            continue
        found = [faults_of(entry, args.output)]
        if Path(entry["file"]).name in expected:
            found.append(difference(entry, expected[Path(entry["file"]).name], args))
        doubt = "  not sure: " + "; ".join(entry["reasons"]) if entry["doubtful"] else ""
        print(f"{entry['file']:<28} AoP {entry['aop_deg']:6.1f} deg{doubt}")
        faults += [f"{entry['file']}: {fault}" for some in found for fault in some]
    for fault in faults:
        print(f"MISMATCH {fault}", file=sys.stderr)
    against = f"{args.expected.name}" if args.expected else "their form; accuracy is not checked"
    print(f"{len(entries)} answers checked against {against}: {len(faults)} mismatches")
    return 1 if faults else 0


def read_table(path: Path) -> dict[str, dict[str, str]]:
    """File name -> row of a landmarks.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        return {row["Filename"]: row for row in csv.DictReader(file)}


def faults_of(entry: dict, output: Path) -> list[str]:
    """A sentence for each fault in the files of an answered case."""
    folder = output / entry["case"]
    if not folder.is_dir():
        folder = output
    if entry["frame"] is not None:
        folder = folder / f"frame-{entry['frame']:04d}"
    faults = []
    try:
        answer = json.loads((folder / "aop-landmarks.json").read_text())
        names = tuple(point["name"] for point in answer["points"])
        if names[-3:] != LANDMARKS:
            faults.append(f"aop-landmarks.json holds {names}, expected {LANDMARKS}")
        angle = json.loads((folder / "angle-of-progression.json").read_text())
        if not math.isclose(angle, entry["aop_deg"], abs_tol=1e-6):
            faults.append(f"angle-of-progression.json: {angle}, results.json: {entry['aop_deg']}")
    except (OSError, ValueError, KeyError) as error:
        faults.append(f"an answer file is missing or malformed: {error}")
    return faults


def difference(entry: dict, row: dict[str, str], args: argparse.Namespace) -> list[str]:
    """A sentence for each value that differs from the expected row by more than the tolerance."""
    faults = []
    for name in LANDMARKS:
        off = math.dist(entry["landmarks_px"][name], ast.literal_eval(row[name]))
        if off > args.tolerance_px:
            faults.append(f"{name} is {off:.2f} px from the expected {row[name]}")
    off = abs(entry["aop_deg"] - float(row["AoP"]))
    if off > args.tolerance_deg:
        faults.append(f"AoP is {entry['aop_deg']:.2f} deg, expected {row['AoP']}")
    return faults


if __name__ == "__main__":
    raise SystemExit(main())
