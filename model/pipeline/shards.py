"""Dividing a large folder among several containers, and merging what they wrote.

A file belongs to a part by its name alone: parts neither overlap nor leave gaps, whatever the order
in which a folder is listed. The folder must not change while they run.
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

MOST = 10_000
_COUNTS = ("answered", "failed", "doubtful")
_NAME = re.compile(r"results-(\d+)-of-(\d+)\.json")


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`, from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def holds(self, file: str) -> bool:
        """Whether a file, by its path below the input folder, is of this part."""
        digest = hashlib.sha256(file.encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.number - 1

    @property
    def run_files(self) -> RunFiles:
        """Names of its own, so that all parts can write to one output folder."""
        label = f"{self.number}-of-{self.count}"
        return RunFiles(f"results-{label}.json", f"landmarks-{label}.csv")


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """`K/N`; or `auto/N`, or `auto` for Slurm, with K from the batch engine's own variable.

    Raises:
        ValueError: it is neither, or the variable is not there.
    """
    part, _, count = text.partition("/")
    if part == "auto":
        part, count = _of_batch_engine(count, environment)
    if not (part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count) <= MOST):
        raise ValueError(
            f"expected K/N with K from 1 to N (at most {MOST}), or auto/N, got {text!r}, "
            f"which is {part}/{count}"
        )
    return Shard(int(part), int(count))


def _of_batch_engine(count: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """(K, N) as text: Kubernetes counts from 0, a Slurm array is to count from 1."""
    index, first = environment.get("JOB_COMPLETION_INDEX"), 0
    if index is None:
        index, first = environment.get("SLURM_ARRAY_TASK_ID"), 1
        count = count or environment.get("SLURM_ARRAY_TASK_COUNT", "")
    if index is None:
        raise ValueError(
            "auto needs JOB_COMPLETION_INDEX (Kubernetes) or SLURM_ARRAY_TASK_ID (Slurm)"
        )
    if not index.isdecimal():
        raise ValueError(f"the batch engine's index is {index!r}, expected a number")
    return str(int(index) - first + 1), count


def merge(folder: Path, files: Iterable[str]) -> Results:
    """Write results.json and landmarks.csv of all parts in an output folder.

    What is missing is named in the results: parts that are not there or cannot be read, and those
    of `files` (paths below the input folder) that no part has an entry of.

    Raises:
        OutputError: there are no parts, none that can be read, or parts that do not belong
            together; or it cannot write.
    """
    parts = {Shard(*map(int, match.groups())): path for path, match in _named(folder)}
    counts = {part.count for part in parts}
    if len(counts) != 1:
        names = ", ".join(sorted(path.name for path in parts.values())) or "none"
        raise OutputError(
            f"--merge: expected results-K-of-N.json of one N in {folder}, found {names}; "
            "run the parts with --shard K/N first, and remove those of another N"
        )
    found = {part: _read(path) for part, path in parts.items()}
    results = {part: result for part, result in found.items() if result}
    if not results:
        names = ", ".join(path.name for path in parts.values())
        raise OutputError(
            f"--merge: none of the parts in {folder} can be read ({names}); run them again"
        )
    first = next(iter(results.values()))
    if any(settings_of(vars(other)) != settings_of(vars(first)) for other in results.values()):
        raise OutputError(f"--merge: the parts in {folder} differ in their model or settings")
    count = counts.pop()
    wanted = [Shard(number, count) for number in range(1, count + 1)]
    entries = [entry for result in results.values() for entry in result.cases]
    known = {entry.file for entry in entries}
    merged = first.model_copy(
        update={
            "shard": None,
            **{name: sum(getattr(part, name) for part in results.values()) for name in _COUNTS},
            "missing": [
                *(_missing(part, parts.get(part)) for part in wanted if part not in results),
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


def _named(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    try:
        found = [(path, _NAME.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    except OSError as error:
        raise OutputError(f"--merge: {folder} cannot be read ({error.strerror})") from error
    return [(path, match) for path, match in found if match]


def _read(path: Path) -> Results | None:
    """A part's results; None where the file cannot be read or holds something else."""
    try:
        return Results.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _missing(part: Shard, path: Path | None) -> str:
    return f"part {part}" + (f" ({path.name} is damaged or cannot be read)" if path else "")
