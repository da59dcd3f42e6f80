"""The files that a run writes: their names, and their writers. Each appears whole or not at all."""

import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel

from model.anatomy import LANDMARKS
from model.results.schemas import (
    CaseEntry,
    MultiplePoints,
    NamedPoint,
    Results,
    RunSummary,
    table_lines,
    three_point_angle,
)

RESULTS, TABLE, REPORT = "results.json", "landmarks.csv", "report.html"
OVERLAY, SHEET, PICTURE = "overlay.png", "contact-sheet.png", "picture.png"
FIRST_ENTRY = b' "cases": [\n'  # the line before it


class OutputError(ValueError):
    """An output folder that cannot be written; the message says what to do."""


@dataclass(frozen=True)
class RunFiles:
    """Names of a run's own files in the output folder; a shard has names of its own."""

    results: str = RESULTS
    table: str = TABLE

    @property
    def report(self) -> str:
        """report.html, or of a shard report-2-of-3.html."""
        return self.results.replace("results", "report").replace(".json", ".html")

    @property
    def journal(self) -> str:
        return f".{self.results}.journal"

    @property
    def room(self) -> str:
        return f".{self.results}.room"

    def remove(self, folder: Path) -> None:
        """Remove an earlier run's, but for its journal and room."""
        for name in (self.results, self.table, self.report):
            (folder / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class AnswerFiles:
    """Names of the files in a case's folder, since a challenge chooses its sockets.

    three_points: None where that answer is not wanted.
    """

    landmarks: str
    angle: str
    three_points: str | None = None

    @property
    def answers(self) -> list[str]:
        """Those that are wanted."""
        return [name for name in (self.landmarks, self.angle, self.three_points) if name]

    @property
    def names(self) -> list[str]:
        """All of them and the pictures."""
        return [*self.answers, OVERLAY, SHEET, PICTURE]

    def write(self, folder: Path, angles_deg: Sequence[float], points: list[NamedPoint]) -> None:
        """Write one frame's answer, or one for several: all points, and the median angle.

        Args:
            angles_deg: one a frame; of an even number the lower of the two in the middle counts,
                so that the angle is that of a frame, the one in `three_points`.
            points: the landmarks of each frame in turn.
        """
        angle_deg = statistics.median_low(angles_deg)
        write_json(folder / self.landmarks, MultiplePoints(points=points))
        write_bytes(folder / self.angle, f"{angle_deg}\n".encode())
        if self.three_points:
            at = angles_deg.index(angle_deg) * len(LANDMARKS)
            write_json(folder / self.three_points, three_point_angle(points[at:]))

    def remove(self, folder: Path) -> None:
        """Remove an earlier run's answers, lest they pass for those of a case that now fails."""
        for place in (folder, *folder.glob("frame-*")):
            for name in self.names:
                (place / name).unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; folders on the way are made."""
    write_chunks(path, [data])


def write_chunks(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file, given in pieces, whole or not at all.

    Where the file system can do so (Linux) it has no name until it is whole, so that even a process
    that is killed leaves no part of it; elsewhere the part is hidden and ends in `.partial`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with _nameless(path.parent) or partial.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            if not partial.exists():  # given a descriptor, os.link follows the link in /proc
                os.link(f"/proc/self/fd/{file.fileno()}", partial, src_dir_fd=file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _nameless(folder: Path) -> IO[bytes] | None:
    """A file without a name in a folder, or None where that cannot be."""
    try:
        return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb")
    except (AttributeError, OSError):  # not Linux, or a file system without them
        return None


def write_json(path: Path, answer: BaseModel) -> None:
    """Write a schema's JSON whole or not at all."""
    write_bytes(path, answer.model_dump_json(indent=1).encode() + b"\n")


def write_results(folder: Path, results: Results) -> None:
    """Write results.json and landmarks.csv of results that are in memory."""
    entries, loops = map(json_line, results.cases), map(json_line, results.loops)
    write_chunks(folder / RESULTS, results_json(results, entries, loops))
    write_table(folder / TABLE, lambda: iter(results.cases))


def results_json(
    summary: RunSummary, entries: Iterable[bytes], loops: Iterable[bytes]
) -> Iterator[bytes]:
    """results.json in pieces, an entry a line."""
    head = summary.model_dump_json(indent=1, exclude={"cases", "loops"})
    yield head.encode().removesuffix(b"\n}") + b",\n"
    yield FIRST_ENTRY.removesuffix(b"\n")
    yield from _separated(entries)
    yield b'\n ],\n "loops": ['
    yield from _separated(loops)
    yield b"\n ]\n}\n"


def read_summary(file: IO[bytes]) -> RunSummary:
    """What a results.json begins with; the file then stands at its first entry."""
    head = b""
    for line in file:
        if line == FIRST_ENTRY:
            break
        head += line
    return RunSummary.model_validate_json(head.removesuffix(b",\n") + b"}")


def read_entry(file: IO[bytes]) -> CaseEntry | None:
    """The next entry of a results.json; None after the last."""
    line = file.readline().strip().removesuffix(b",")
    return None if line == b"]" else CaseEntry.model_validate_json(line)


def write_table(path: Path, entries: Callable[[], Iterator[CaseEntry]]) -> None:
    """landmarks.csv; the entries are read twice, so that not all have to be in memory."""
    stacks = any(entry.frame is not None for entry in entries() if entry.status == "ok")
    write_chunks(path, map(str.encode, table_lines(entries(), stacks)))


def json_line(content: BaseModel | Mapping[str, Any]) -> bytes:
    """One line of JSON."""
    if isinstance(content, BaseModel):
        return content.model_dump_json().encode() + b"\n"
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def _separated(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The items of a JSON list, a line each."""
    for number, line in enumerate(lines):
        yield (b",\n  " if number else b"\n  ") + line.rstrip(b"\n")
