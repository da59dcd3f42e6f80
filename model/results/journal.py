"""What a run has answered so far, kept on disk: memory does not grow with it, and a run that was
killed can be resumed.

The journal is a hidden file in the output folder, of JSON lines: the settings, then for each case
the entries of its frames and a line that ends it. When the run ends, results.json and landmarks.csv
are written from it, and it goes. Room for them is set aside before the first case, so that a disk
which fills up with answers still takes the list of what failed. Who holds the lock on that room is
the one that writes this run.
"""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, groupby
from pathlib import Path
from threading import Lock
from typing import Any

from model.results.files import (
    OutputError,
    RunFiles,
    json_line,
    results_json,
    write_chunks,
    write_table,
)
from model.results.schemas import CaseEntry, Loop, RunSummary

ROOM = 4096  # bytes for a frame: its line in the journal, in results.json and in the table
CHUNK = 16 * ROOM
END = b'{"end":'
FULL = (errno.ENOSPC, errno.EDQUOT)


class Journal:
    """The journal of one run.

    Args:
        folder: the output folder; made where it is missing.
        names: of the run's files in it. An earlier run's are removed, unless it is resumed.
        settings: what the answers depend on.
        cases: name -> file of each case of the run, in the order of results.json.
        holds: to resume a run with these settings, interrupted or ended: whether what it answered
            still holds. None: begin anew.

    Raises:
        OutputError: the folder cannot be written, has no room, was begun with other settings, or
            another process writes this run: that is better known before hours of work.
    """

    def __init__(
        self,
        folder: Path,
        names: RunFiles,
        settings: Mapping[str, Any],
        cases: Mapping[str, str],
        holds: Callable[[CaseEntry], bool] | None = None,
    ) -> None:
        self._cases, self._names, self._folder = cases, names, folder
        self._path, self._room = folder / names.journal, folder / names.room
        self._reserved = 0  # bytes
        self._reserving = Lock()
        self._file: int | None = None
        self._lock: int | None = None
        self._offsets: dict[str, int] = {}  # where the cases that have ended begin
        first = json_line({"settings": settings})
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self._room)
            write_chunks(self._path, chain([first], self._kept(settings, holds) if holds else []))
            names.remove(folder)
            self.reserve(CHUNK // ROOM + len(cases))
            self._file = os.open(self._path, os.O_RDWR)
        except OSError as error:
            self.close()
            raise OutputError(
                f"{folder} cannot be written ({error.strerror}); mount a writable folder with "
                "room, or run as its owner (docker run --user)"
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self.close()
            if isinstance(error, OutputError):
                raise
            raise OutputError(
                f"--resume: {folder} holds no run that can be read; leave --resume out"
            ) from error
        self._start = self._end = len(first)  # of the current case
        for line in self._lines_from(self._start):
            self._end += len(line)
            if line.startswith(END):
                self._offsets[json.loads(line)["end"]] = self._start
                self._start = self._end

    @property
    def done(self) -> frozenset[str]:
        """Names of the cases that have ended."""
        return frozenset(self._offsets)

    def reserve(self, frames: int) -> None:
        """Set room aside for so many frames more, in any thread; OSError where there is none."""
        if hasattr(os, "posix_fallocate"):  # macOS has none
            with self._reserving, self._room.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, self._reserved + frames * ROOM)
                self._reserved += frames * ROOM

    def add(self, entry: CaseEntry) -> None:
        """An entry of the current case."""
        self._append(json_line(entry))

    def end(self, case: str, loop: Loop | None = None) -> None:
        """The current case is complete."""
        self._append(_end_line(case, loop.model_dump() if loop else None))
        self._offsets[case], self._start = self._start, self._end

    def entries(self) -> Iterator[CaseEntry]:
        """Of the cases that have ended."""
        return map(CaseEntry.model_validate_json, self._lines(ends=False))

    def finish(self, summary: RunSummary) -> None:
        """Write results.json and landmarks.csv, and remove the journal."""
        os.truncate(self._room, 0)
        loops = (json.loads(line)["loop"] for line in self._lines(ends=True))
        results = results_json(
            summary, self._lines(ends=False), (json_line(loop) for loop in loops if loop)
        )
        write_chunks(self._folder / self._names.results, results)
        write_table(self._folder / self._names.table, self.entries)
        self._path.unlink()  # while it is ours
        self.close()

    def close(self) -> None:
        """Leave the journal behind, for --resume, if the run has not finished."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._room.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _lines(self, ends: bool) -> Iterator[bytes]:
        """The lines of entries, or those that end cases, in the order of the run's cases."""
        for case in self._cases:
            if case in self._offsets:
                for line in self._lines_from(self._offsets[case]):
                    is_end = line.startswith(END)
                    if is_end == ends:
                        yield line
                    if is_end:
                        break

    def _lines_from(self, offset: int) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            file.seek(offset)
            yield from file

    def _append(self, line: bytes) -> None:
        """Add a whole line or none; where the disk is full, in the room that was set aside."""
        try:
            self._write(line)
        except OSError as error:
            if error.errno not in FULL or not self._reserved:
                raise
            with self._reserving:
                self._reserved = max(0, self._reserved - CHUNK)
                os.truncate(self._room, self._reserved)
            self._write(line)
        self._end += len(line)

    def _write(self, line: bytes) -> None:
        assert self._file is not None  # it is open
        try:
            if os.pwrite(self._file, line, self._end) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._file, self._end)
            raise

    def _kept(
        self, settings: Mapping[str, Any], holds: Callable[[CaseEntry], bool]
    ) -> Iterator[bytes]:
        """The lines of an earlier run's cases that are answered in full and are of this run."""
        earlier = self._of_journal if self._path.is_file() else self._of_results
        block: list[bytes] = []
        known: set[str] = set()
        for line in earlier(settings):
            block.append(line)
            if line.startswith(END):
                entries = [CaseEntry.model_validate_json(entry) for entry in block[:-1]]
                case = str(json.loads(line)["end"])
                mine = bool(entries) and {e.case for e in entries} == {case} and case not in known
                known.add(case)
                if mine and all(
                    e.status == "ok" and self._cases.get(case) == e.file and holds(e)
                    for e in entries
                ):
                    yield from block
                block = []

    def _of_journal(self, settings: Mapping[str, Any]) -> Iterator[bytes]:
        lines = self._lines_from(0)
        first = next(lines, None)
        if first is None:  # a machine that lost its power may leave an empty file
            return
        _check_settings(json.loads(first)["settings"], settings)
        yield from (line for line in lines if line.endswith(b"\n"))  # a killed run's may not

    def _of_results(self, settings: Mapping[str, Any]) -> Iterator[bytes]:
        path = self._folder / self._names.results
        if not path.is_file():
            return
        results = json.loads(path.read_bytes())
        _check_settings(settings_of(results), settings)
        loops = {loop["case"]: loop for loop in results["loops"]}
        for case, entries in groupby(results["cases"], key=lambda entry: str(entry["case"])):
            yield from map(json_line, entries)
            yield _end_line(case, loops.get(case))


def _locked(path: Path) -> int:
    """A descriptor of this file, emptied or made, that no other process holds the lock of.

    The lock goes with the process. A file system without locks has to do without.

    Raises:
        OutputError: another process holds it.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            raise OutputError(
                f"{path.parent} is being written by another run: let it end, or choose another "
                "--output"
            ) from error
        except OSError:
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                os.ftruncate(file, 0)
                return file
        os.close(file)  # of a run that has just ended, and removed it


def settings_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the answers in a results.json depend on."""
    return {"model_sha256": results["model_sha256"], **results["settings"]}


def _check_settings(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    other = [name for name in {**earlier, **now} if earlier.get(name) != now.get(name)]
    if other:
        raise OutputError(
            f"--resume: the earlier run had another {', '.join(other)}; "
            "choose another --output, or leave --resume out to begin anew"
        )


def _end_line(case: str, loop: Mapping[str, Any] | None) -> bytes:
    return json_line({"end": case, "loop": loop})
