"""Run process.py of two checkouts on the same images and compare all that they write.

    git worktree add /tmp/before COMMIT
    python -m test.support.compare_answers --odd-files /tmp/odd          # odd, damaged files
    python -m test.support.compare_answers /tmp/before /tmp/odd          # any folder of images
    python -m test.support.compare_answers /tmp/before IMAGES --report   # process.py's own options

Every number, field, status and file must be the same, apart from times. Sentences (errors, reasons,
warnings) may be rewritten: each pair of an old and a new sentence is printed once. Pictures show
sentences, so they may then differ too. Exits 1 on any other difference.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
SENTENCES = {"error", "reasons", "warnings"}
PICTURES = (".png", ".html")
DAMAGED = (("flip", 0.6), ("cut", 0.7))  # kind of damage, and its place as a share of the file


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, nargs="?", help="checkout of the earlier commit")
    parser.add_argument("images", type=Path, nargs="?", help="folder of images, or a job")
    parser.add_argument(
        "--odd-files",
        type=Path,
        metavar="DIR",
        help="folder to write odd files into; nothing is compared",
    )
    args, options = parser.parse_known_args()
    if args.odd_files:
        print(f"{write_odd_files(args.odd_files)} files in {args.odd_files}")
        return 0
    if not args.images:
        parser.error("expected a checkout and a folder of images")
    with tempfile.TemporaryDirectory() as name:
        folders = Path(name, "before"), Path(name, "now")
        statuses = [
            run(checkout.resolve(), args.images.resolve(), folder, options)
            for checkout, folder in zip((args.before, HERE), folders, strict=True)
        ]
        differences, rewritten = compare(*folders)
        cases = len(json.loads((folders[1] / "results.json").read_text())["cases"])
    if statuses[0] != statuses[1]:
        differences.append(f"exit status {statuses[0]}, now {statuses[1]}")
    for old, new in sorted(rewritten):
        print(f"rewritten: {old}\n       to: {new}")
    for difference in differences:
        print(f"DIFFERENT {difference}")
    print(f"{cases} entries compared: {len(differences)} differences, {len(rewritten)} rewritten")
    return int(bool(differences))


def write_odd_files(folder: Path) -> int:
    """Write valid files of every format and variant, and damaged copies; returns their number."""
    from test.support.strange_files import DAMAGES, valid  # these need OpenCV and SimpleITK

    folder.mkdir(parents=True, exist_ok=True)
    for name, data in valid().items():
        (folder / name).write_bytes(data)
        for damage, share in DAMAGED:
            damaged = DAMAGES[damage](data, int(share * len(data)), 77)
            (folder / f"{damage}-{name}").write_bytes(damaged)
    return len(list(folder.iterdir()))


def run(checkout: Path, images: Path, output: Path, options: list[str]) -> int:
    """Answer the images with one checkout's process.py; returns the exit status."""
    command = [sys.executable, "process.py", "--input", images, "--output", output, *options]
    done = subprocess.run(command, cwd=checkout, stdout=subprocess.DEVNULL, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"process.py of {checkout} ended with status {done.returncode}")
    return done.returncode


def compare(before: Path, now: Path) -> tuple[list[str], set[tuple[str, str]]]:
    """The differences between two output folders, and the pairs of rewritten sentences."""
    old, new = (
        {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        for folder in (before, now)
    )
    differences = [f"{name}: in one folder only" for name in sorted(old.keys() ^ new.keys())]
    rewritten: set[tuple[str, str]] = set()
    for name in sorted(old.keys() & new.keys(), key=lambda name: (name.endswith(PICTURES), name)):
        pair = old[name], new[name]
        if pair[0].read_bytes() == pair[1].read_bytes():
            continue
        if name.endswith(".json"):
            contents = [json.loads(file.read_bytes()) for file in pair]
            differences += compare_values(name, *contents, rewritten)
        elif name.endswith(".csv"):
            contents = [list(csv.DictReader(file.read_text().splitlines())) for file in pair]
            for row in (*contents[0], *contents[1]):
                row.pop("Doubt", None)  # the reasons of results.json
            differences += compare_values(name, *contents, rewritten)
        elif not (name.endswith(PICTURES) and rewritten):  # pictures show the sentences
            differences.append(f"{name}: other bytes")
    return differences, rewritten


def compare_values(where: str, old: Any, new: Any, rewritten: set[tuple[str, str]]) -> list[str]:
    """The differences between two JSON values; adds pairs of sentences to `rewritten`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = [f"{where}: field {key} in one only" for key in sorted(old.keys() ^ new.keys())]
        for key in old.keys() & new.keys():
            pair = old[key], new[key]
            if key == "milliseconds":
                found += (
                    [f"{where}.{key}: other stages"] if pair[0].keys() != pair[1].keys() else []
                )
            elif key in SENTENCES and pair[0] and pair[1]:
                texts = [[text] if isinstance(text, str) else text for text in pair]
                if len(texts[0]) != len(texts[1]):
                    found.append(f"{where}.{key}: {pair[0]}, now {pair[1]}")
                rewritten |= {both for both in zip(*texts, strict=False) if both[0] != both[1]}
            else:
                found += compare_values(f"{where}.{key}", *pair, rewritten)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [d for k, pair in pairs for d in compare_values(f"{where}[{k}]", *pair, rewritten)]
    return [] if old == new else [f"{where}: {old}, now {new}"]


if __name__ == "__main__":
    raise SystemExit(main())
