"""The journal keeps on disk what a run has answered so far.

So memory does not grow with the run, and a killed run can be resumed. The journal is a hidden file
of JSON lines in the output folder: the settings first; then, for each case, the entries of its
frames and a line that ends the case. At the end of the run, results.json and landmarks.csv are
written from it, and it is removed.

A second hidden file, the room, reserves disk space for all this before the first case: even if the
answers fill the disk, the list of failed cases can still be written. The run holds a lock on the
room, so that no second run writes the same files.
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

FRAME_BYTES = 4096  # room for a frame's lines in the journal, results.json and landmarks.csv
CHUNK_BYTES = 16 * FRAME_BYTES  # room given up at a time when the disk is full
END = b'{"end":'  # the beginning of a line that ends a case
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Journal:
    """The journal of one run.

    Creating it checks, before hours of work, whether the results can be written.

    Args:
        folder: the output folder; created if missing.
        names: names of the run's files. An earlier run's results under these names are removed;
            if it is resumed, its entries are taken over first.
        settings: everything that the answers depend on.
        cases: name -> file of each case of the run, in the order of results.json.
        is_current: says of an answered entry whether it can be kept. With it an earlier run is
            resumed, whether it was stopped or had ended. None begins anew.

    Raises:
        OutputError: the folder cannot be written or has no room; another process writes this run;
            or the run to resume had other settings or cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        names: RunFiles,
        settings: Mapping[str, Any],
        cases: Mapping[str, str],
        is_current: Callable[[CaseEntry], bool] | None = None,
    ) -> None:
        self._cases, self._names, self._folder = cases, names, folder
        self._path, self._room = folder / names.journal, folder / names.room
        self._reserved = 0  # bytes
        self._reserving = Lock()
        self._file: int | None = None
        self._lock: int | None = None
        self._offsets: dict[str, int] = {}  # name of an ended case -> byte of its first line
        first = json_line({"settings": settings})
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _open_locked(self._room)
            kept = self._reusable_lines(settings, is_current) if is_current else []
            write_chunks(self._path, chain([first], kept))
            names.remove(folder)
            self.reserve(CHUNK_BYTES // FRAME_BYTES + len(cases))
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
                f"--resume: {folder} holds no run that can be read; leave --resume out to begin "
                "anew"
            ) from error
        self._start = self._end = len(first)  # bytes; the lines of the current case
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
        """Reserve room for the entries of more frames. Any thread may call this.

        Raises:
            OSError: the disk has no room left.
        """
        if hasattr(os, "posix_fallocate"):  # macOS lacks it
            with self._reserving, self._room.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, self._reserved + frames * FRAME_BYTES)
                self._reserved += frames * FRAME_BYTES

    def add(self, entry: CaseEntry) -> None:
        """Add an entry of the current case."""
        self._append(json_line(entry))

    def end(self, case: str, loop: Loop | None = None) -> None:
        """End the current case, whose entries were all added."""
        self._append(_end_line(case, loop.model_dump() if loop else None))
        self._offsets[case], self._start = self._start, self._end

    def entries(self) -> Iterator[CaseEntry]:
        """The entries of the cases that have ended, in the order of results.json."""
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
        self._path.unlink()  # before the lock is given up
        self.close()

    def close(self) -> None:
        """Give up files and lock. The journal of an unfinished run stays, for --resume."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._room.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _lines(self, ends: bool) -> Iterator[bytes]:
        """The lines that end cases, or all others, in the order of the run's cases."""
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
        """Add a whole line or nothing. On a full disk, some of the reserved room is given up."""
        try:
            self._write(line)
        except OSError as error:
            if error.errno not in DISK_FULL or not self._reserved:
                raise
            with self._reserving:
                self._reserved = max(0, self._reserved - CHUNK_BYTES)
                os.truncate(self._room, self._reserved)
            self._write(line)
        self._end += len(line)

    def _write(self, line: bytes) -> None:
        assert self._file is not None  # until it is closed
        try:
            if os.pwrite(self._file, line, self._end) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._file, self._end)
            raise

    # ---- What an earlier run left

    def _reusable_lines(
        self, settings: Mapping[str, Any], is_current: Callable[[CaseEntry], bool]
    ) -> Iterator[bytes]:
        """An earlier run's lines for those of this run's cases that it answered in full."""
        read_lines = self._journal_lines if self._path.is_file() else self._results_lines
        block: list[bytes] = []  # the lines of one case
        known: set[str] = set()
        for line in read_lines(settings):
            block.append(line)
            if line.startswith(END):
                entries = [CaseEntry.model_validate_json(entry) for entry in block[:-1]]
                case = str(json.loads(line)["end"])
                is_whole = bool(entries) and {e.case for e in entries} == {case}
                is_new = case not in known
                known.add(case)
                if (
                    is_whole
                    and is_new
                    and all(
                        e.status == "ok" and self._cases.get(case) == e.file and is_current(e)
                        for e in entries
                    )
                ):
                    yield from block
                block = []

    def _journal_lines(self, settings: Mapping[str, Any]) -> Iterator[bytes]:
        """The lines of an interrupted run's journal, after its settings."""
        lines = self._lines_from(0)
        first = next(lines, None)
        if first is None:  # a power failure can leave an empty file
            return
        _check_settings(json.loads(first)["settings"], settings)
        yield from (line for line in lines if line.endswith(b"\n"))  # a kill can cut the last one

    def _results_lines(self, settings: Mapping[str, Any]) -> Iterator[bytes]:
        """The same lines, made from the results.json of a run that has ended."""
        path = self._folder / self._names.results
        if not path.is_file():
            return
        results = json.loads(path.read_bytes())
        _check_settings(settings_of(results), settings)
        loops = {loop["case"]: loop for loop in results["loops"]}
        for case, entries in groupby(results["cases"], key=lambda entry: str(entry["case"])):
            yield from map(json_line, entries)
            yield _end_line(case, loops.get(case))


def _open_locked(path: Path) -> int:
    """Create or empty a file and lock it; returns its descriptor.

    The lock ends with the process. On a file system without locks, the file is not locked.

    Raises:
        OutputError: another process holds the lock.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            raise OutputError(
                f"{path.parent} is being written by another run; wait until it ends, or choose "
                "another --output"
            ) from error
        except OSError:
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                os.ftruncate(file, 0)
                return file
        os.close(file)  # another run has just ended and removed this file, so try again


def settings_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a results.json that its answers depend on."""
    return {"model_sha256": results["model_sha256"], **results["settings"]}


def _check_settings(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    different = [name for name in {**earlier, **now} if earlier.get(name) != now.get(name)]
    if different:
        raise OutputError(
            f"--resume: the earlier run had another {', '.join(different)}; "
            "choose another --output, or leave --resume out to begin anew"
        )


def _end_line(case: str, loop: Mapping[str, Any] | None) -> bytes:
    return json_line({"end": case, "loop": loop})
