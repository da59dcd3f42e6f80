"""Divides a large folder among several containers, and merges what they wrote.

The path of a file alone decides which part it belongs to. So parts neither overlap nor leave gaps,
in whatever order the folder is listed. The folder must not change while the parts run.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from model.results.files import OutputError, RunFiles, write_results
from model.results.journal import settings_of
from model.results.schemas import Results

MOST_PARTS = 10_000
SUMMED = ("answered", "failed", "doubtful")  # fields of the merged results
PART_NAME = re.compile(r"results-(\d+)-of-(\d+)\.json")


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def holds(self, file: str) -> bool:
        """Whether this part answers a file, named by its path below the input folder."""
        digest = hashlib.sha256(file.encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.number - 1

    @property
    def run_files(self) -> RunFiles:
        """Names that differ between parts, so that all can write to one output folder."""
        label = f"{self.number}-of-{self.count}"
        return RunFiles(f"results-{label}.json", f"landmarks-{label}.csv")


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """Read `K/N`, `auto/N` or, in a Slurm array, `auto`.

    Args:
        environment: the batch engine's variables, from which `auto` takes K and, on Slurm, N.

    Raises:
        ValueError: the text is none of these, K is not within 1 to N, or the variable is missing.
    """
    part, _, count = text.partition("/")
    is_auto = part == "auto"
    if is_auto:
        part, count = _read_batch_engine(count, environment)
    if not (part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count) <= MOST_PARTS):
        raise ValueError(
            f"expected K/N with K from 1 to N, N at most {MOST_PARTS}, or auto/N; got {text!r}"
            + (f", which is {part}/{count} here" if is_auto else "")
        )
    return Shard(int(part), int(count))


def _read_batch_engine(count: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """(K, N) as text. Kubernetes counts from 0; a Slurm array has to count from 1."""
    variable, first = "JOB_COMPLETION_INDEX", 0
    if variable not in environment:
        variable, first = "SLURM_ARRAY_TASK_ID", 1
        count = count or environment.get("SLURM_ARRAY_TASK_COUNT", "")
    if variable not in environment:
        raise ValueError(
            "auto needs JOB_COMPLETION_INDEX (Kubernetes) or SLURM_ARRAY_TASK_ID (Slurm) in the "
            "environment; without a batch engine, pass K/N"
        )
    index = environment[variable]
    if not index.isdecimal():
        raise ValueError(f"{variable}: expected a number, got {index!r}")
    return str(int(index) - first + 1), count


def merge_results(folder: Path, files: Iterable[str]) -> Results:
    """Write results.json and landmarks.csv from those of all parts in an output folder.

    Args:
        files: all images, as paths below the input folder. `missing` in the results names those
            without an entry, after the parts that are missing or cannot be read.

    Raises:
        OutputError: no part is there or can be read, parts do not belong together, or the folder
            cannot be read or written.
    """
    parts = _find_parts(folder)
    counts = {part.count for part in parts}
    if len(counts) != 1:
        names = ", ".join(sorted(path.name for path in parts.values())) or "none"
        raise OutputError(
            f"--merge: expected files results-K-of-N.json of one N in {folder}, found {names}; "
            "first run the parts with --shard K/N, and remove the files of another N"
        )
    read = {part: _read_part(path) for part, path in parts.items()}
    results = {part: result for part, result in read.items() if result}
    if not results:
        names = ", ".join(path.name for path in parts.values())
        raise OutputError(
            f"--merge: none of the parts in {folder} can be read ({names}); run them again"
        )
    first = next(iter(results.values()))
    if any(settings_of(vars(other)) != settings_of(vars(first)) for other in results.values()):
        raise OutputError(
            f"--merge: the parts in {folder} differ in their model or settings; "
            "run all of them with the same model and options"
        )
    count = counts.pop()
    expected = [Shard(number, count) for number in range(1, count + 1)]
    entries = [entry for result in results.values() for entry in result.cases]
    known = {entry.file for entry in entries}
    merged = first.model_copy(
        update={
            "shard": None,
            **{name: sum(getattr(part, name) for part in results.values()) for name in SUMMED},
            "missing": [
                *(_part_text(part, parts.get(part)) for part in expected if part not in results),
                *(file for file in files if file not in known),
            ],
            "cases": sorted(entries, key=lambda e: (os.fsencode(e.file), e.case, e.frame or 0)),
            "loops": sorted(
                (loop for result in results.values() for loop in result.loops),
                key=lambda loop: (os.fsencode(loop.file), loop.case),
            ),
        }
    )
    try:
        write_results(folder, merged)
    except OSError as error:
        raise OutputError(f"--merge: {folder} cannot be written ({error.strerror})") from error
    return merged


def _find_parts(folder: Path) -> dict[Shard, Path]:
    """The results files of parts in a folder, in the order of their names."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise OutputError(f"--merge: {folder} cannot be read ({error.strerror})") from error
    matches = [(path, PART_NAME.fullmatch(path.name)) for path in paths]
    return {Shard(*map(int, match.groups())): path for path, match in matches if match}


def _read_part(path: Path) -> Results | None:
    """A part's results; None if the file cannot be read or holds something else."""
    try:
        return Results.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _part_text(part: Shard, path: Path | None) -> str:
    """A missing part, as the results name it."""
    return f"part {part}" + (f" ({path.name} is damaged or cannot be read)" if path else "")
