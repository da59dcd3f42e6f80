"""Names and writers of a run's files. Each file appears whole or not at all."""

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
CASES_LINE = b' "cases": [\n'  # in results.json, the line before the first entry


class OutputError(ValueError):
    """The output folder cannot be used; the message says what to do."""


@dataclass(frozen=True)
class RunFiles:
    """Names of the files about a whole run, in the output folder. Each shard has its own."""

    results: str = RESULTS
    table: str = TABLE

    @property
    def report(self) -> str:
        """report.html, or for a shard a name like report-2-of-3.html."""
        return self.results.replace("results", "report").replace(".json", ".html")

    @property
    def journal(self) -> str:
        """The entries so far, while the run lasts."""
        return f".{self.results}.journal"

    @property
    def room(self) -> str:
        """A file that reserves disk space for the results, while the run lasts."""
        return f".{self.results}.room"

    def remove(self, folder: Path) -> None:
        """Remove an earlier run's results, table and report; leave its journal."""
        for name in (self.results, self.table, self.report):
            (folder / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class AnswerFiles:
    """Names of the files in a case's folder. Options set them, as each challenge has its own.

    three_points: None if that answer is not wanted.
    """

    landmarks: str
    angle: str
    three_points: str | None = None

    @property
    def answers(self) -> list[str]:
        """The names of the answers that are wanted."""
        return [name for name in (self.landmarks, self.angle, self.three_points) if name]

    @property
    def names(self) -> list[str]:
        """The names of the answers and of the pictures."""
        return [*self.answers, OVERLAY, SHEET, PICTURE]

    def write(self, folder: Path, angles_deg: Sequence[float], points: list[NamedPoint]) -> None:
        """Write one answer for one or several frames: all points, and the median angle.

        For an even number of frames, the median is the lower of the two middle angles. It is
        therefore the angle of a frame, and `three_points` holds that frame's points.

        Args:
            angles_deg: one for each frame.
            points: the three landmarks of each frame in turn.
        """
        angle_deg = statistics.median_low(angles_deg)
        write_json(folder / self.landmarks, MultiplePoints(points=points))
        write_bytes(folder / self.angle, f"{angle_deg}\n".encode())
        if self.three_points:
            first = angles_deg.index(angle_deg) * len(LANDMARKS)
            write_json(folder / self.three_points, three_point_angle(points[first:]))

    def remove(self, folder: Path) -> None:
        """Remove an earlier run's answers, so that a case that now fails has none."""
        for place in (folder, *folder.glob("frame-*")):
            for name in self.names:
                (place / name).unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Missing folders are created."""
    write_chunks(path, [data])


def write_chunks(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file, given in chunks, whole or not at all. Missing folders are created.

    On Linux the file has no name until it is whole, so even a killed process leaves nothing
    behind. Elsewhere the unfinished file is hidden and its name ends in `.partial`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with _open_nameless(path.parent) or partial.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            if not partial.exists():  # src_dir_fd makes os.link follow the link in /proc
                os.link(f"/proc/self/fd/{file.fileno()}", partial, src_dir_fd=file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _open_nameless(folder: Path) -> IO[bytes] | None:
    """A new file without a name in a folder; None if the file system cannot do that."""
    try:
        return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666), "wb")
    except (AttributeError, OSError):  # no O_TMPFILE outside Linux
        return None


def write_json(path: Path, answer: BaseModel) -> None:
    """Write a schema's JSON whole or not at all."""
    write_bytes(path, answer.model_dump_json(indent=1).encode() + b"\n")


def write_results(folder: Path, results: Results) -> None:
    """Write results.json and landmarks.csv from results in memory."""
    entries, loops = map(json_line, results.cases), map(json_line, results.loops)
    write_chunks(folder / RESULTS, results_json(results, entries, loops))
    write_table(folder / TABLE, lambda: iter(results.cases))


def results_json(
    summary: RunSummary, entries: Iterable[bytes], loops: Iterable[bytes]
) -> Iterator[bytes]:
    """results.json in chunks, with one entry to a line.

    Args:
        entries, loops: their lines, as `json_line` makes them.
    """
    head = summary.model_dump_json(indent=1, exclude={"cases", "loops"})
    yield head.encode().removesuffix(b"\n}") + b",\n"
    yield CASES_LINE.removesuffix(b"\n")
    yield from _json_list_lines(entries)
    yield b'\n ],\n "loops": ['
    yield from _json_list_lines(loops)
    yield b"\n ]\n}\n"


def read_summary(file: IO[bytes]) -> RunSummary:
    """The head of a results.json, read from its start; leaves the file at the first entry."""
    head = b""
    for line in file:
        if line == CASES_LINE:
            break
        head += line
    return RunSummary.model_validate_json(head.removesuffix(b",\n") + b"}")


def read_entry(file: IO[bytes]) -> CaseEntry | None:
    """The next entry of a results.json; None after the last one."""
    line = file.readline().strip().removesuffix(b",")
    return None if line == b"]" else CaseEntry.model_validate_json(line)


def write_table(path: Path, entries: Callable[[], Iterator[CaseEntry]]) -> None:
    """Write landmarks.csv.

    Args:
        entries: returns all entries anew at each call, since they are read twice and need not fit
            in memory.
    """
    stacks = any(entry.frame is not None for entry in entries() if entry.status == "ok")
    write_chunks(path, map(str.encode, table_lines(entries(), stacks)))


def json_line(content: BaseModel | Mapping[str, Any]) -> bytes:
    """A JSON object on one line, with its line end."""
    if isinstance(content, BaseModel):
        return content.model_dump_json().encode() + b"\n"
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def _json_list_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The items of a JSON list, with commas, one to a line."""
    for number, line in enumerate(lines):
        yield (b",\n  " if number else b"\n  ") + line.rstrip(b"\n")
