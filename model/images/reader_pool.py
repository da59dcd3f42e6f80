"""Reader processes, which decode what could take the whole run down, and the turn of large images.

A decoder in C that meets untrusted bytes may crash, hang or allocate all memory. In a process of
its own that costs one file. `reader_process` is what runs there.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Lock, RLock, Semaphore, Timer
from typing import Any

import numpy as np

from model.frame import Geometry
from model.images.limits import ImageError, ImageFile, Raw
from model.images.reader_process import FOLDER_PREFIX

MOST_READERS = 4  # at a time; each takes 60 to 160 MB, and may take 0.7 GB for a small file
LONGEST_S = 60  # of processor time for one request
LONGEST_WAIT = 10  # times as long a request may take where others share the processor
LARGE_BYTES = 2**25  # a file or a frame above this is read while no other large one is

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
KINDS_BY_SUFFIX = {
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **{".mha": "MetaImage", ".mhd": "MetaImage", ".nii": "NIfTI", ".gz": "NIfTI", ".nrrd": "NRRD"},
}
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """\
import sys
sys.path.insert(0, sys.argv[1])
from model.images.reader_process import serve
serve(sys.argv[2])
"""
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"), "1"
)


class _ReaderDied(Exception):
    """The reader process ended before it had answered."""


class _Reader:
    """One reader process. It starts when it is made, and one thread at a time asks it.

    Args:
        kind: the format that it will probably read first.
    """

    def __init__(self, kind: str) -> None:
        self.last_path: Path | None = None
        self.has_answered, self.is_usable = False, True
        self._folder = TemporaryDirectory(prefix=FOLDER_PREFIX, ignore_cleanup_errors=True)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(ROOT), kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **ONE_THREAD, "TMPDIR": self._folder.name},
                start_new_session=True,  # Ctrl-C is for the main process alone
            )
        except BaseException:
            self._folder.cleanup()
            raise

    def ask(self, path: Path, kind: str, frame: int | None, longest_s: int) -> Any:
        """The header's fields without a frame, else the frame's pixels.

        Raises:
            ImageError: the file cannot be used.
            TimeoutError, _ReaderDied: there was no answer; the process cannot be used any more.
        """
        self.last_path, self.is_usable = path, False
        is_late = Event()

        def give_up() -> None:
            is_late.set()
            self._process.kill()

        watch = Timer(LONGEST_WAIT * longest_s, give_up)
        watch.start()
        try:
            request = {"path": str(path), "kind": kind, "frame": frame, "longest_s": longest_s}
            answer = self._exchange(request)
        except (OSError, EOFError, ValueError) as error:
            self._process.kill()
            is_late_by_itself = self._process.wait() == -getattr(signal, "SIGXCPU", 0)
            raise (
                TimeoutError if is_late.is_set() or is_late_by_itself else _ReaderDied
            ) from error
        finally:
            watch.cancel()
        self.has_answered = self.is_usable = True
        if isinstance(answer, str):
            raise ImageError(answer)
        return answer

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any] | Raw | str:
        """The header's fields, the pixels, or why there are none.

        Raises:
            OSError, EOFError, ValueError: the process ended.
        """
        stdin: Any = self._process.stdin
        stdout: Any = self._process.stdout
        stdin.write(json.dumps(request).encode() + b"\n")
        stdin.flush()
        head = json.loads(stdout.readline())
        if "error" in head:
            return str(head["error"])
        if "file" in head:
            return dict(head["file"])
        arrays = [np.empty(shape, dtype) for dtype, shape in head["arrays"]]
        for array in arrays:
            if stdout.readinto(array.data.cast("B")) < array.nbytes:
                raise EOFError
        return arrays[0] if len(arrays) == 1 else np.ma.MaskedArray(arrays[0], mask=arrays[1])

    def end(self) -> None:
        """End the process, whatever it does, and remove its temporary files."""
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()


class _Pool:
    """Up to `most` reader processes; one is started when all others are busy."""

    def __init__(self, most: int, longest_s: int) -> None:
        self._longest_s, self._slots, self._lock = longest_s, Semaphore(most), Lock()
        self._idle: list[_Reader] = []

    def ask(self, path: Path, kind: str, frame: int | None = None) -> Any:
        """As `_Reader.ask`, with a sentence for a reader that dies or takes too long.

        Raises:
            ImageError: the file cannot be used.
        """
        try:
            with self._borrow(path, kind) as reader:
                is_new = not reader.has_answered
                with suppress(_ReaderDied):
                    return reader.ask(path, kind, frame, self._longest_s)
            if not is_new:  # an earlier file may have harmed it
                with self._borrow(None, kind) as reader, suppress(_ReaderDied):
                    return reader.ask(path, kind, frame, self._longest_s)
        except TimeoutError as error:
            raise ImageError(
                f"reading took longer than {self._longest_s:g} s: the {kind} data is damaged, or "
                "this machine is too busy"
            ) from error
        raise ImageError(
            f"the {kind} data is damaged or of a variant that cannot be read: it ended the process "
            "that read it"
        )

    @contextmanager
    def _borrow(self, path: Path | None, kind: str) -> Iterator[_Reader]:
        """A reader for the block: the last one that read this file, or an idle one, or a new one.

        Args:
            path: None for a new one in any case.
        """
        with self._slots:
            with self._lock:
                self._idle.sort(key=lambda reader: reader.last_path == path)
                reader = self._idle.pop() if self._idle else None
            if reader is not None and path is None:
                reader.end()
                reader = None
            try:
                reader = reader or _Reader(kind)
            except OSError as error:
                raise ImageError(
                    f"no process could be started that reads the file ({error.strerror}): allow "
                    "more processes or memory"
                ) from error
            try:
                yield reader
            finally:
                if reader.is_usable:
                    with self._lock:
                        self._idle.append(reader)
                else:
                    reader.end()

    def start(self, kind: str) -> None:
        """Start a reader before there is something to read."""
        with suppress(OSError), self._lock:  # a request will say what is wrong
            self._idle.append(_Reader(kind))

    def end(self) -> None:
        """End the processes that are idle."""
        with self._lock:
            while self._idle:
                self._idle.pop().end()


@dataclass(frozen=True)
class Readers:
    """Reads files for several threads, in reader processes where that is safer.

    It also bounds the memory: while a thread answers a large image, no other thread reads one.
    Each thread enters and leaves its own blocks: the turn belongs to the thread that took it.
    """

    _pool: _Pool = field(default_factory=lambda: _Pool(MOST_READERS, LONGEST_S))
    _turn: AbstractContextManager[Any] = field(default_factory=RLock)
    _block: ExitStack | None = None  # the block of `admit`, at whose end the turn is released

    @contextmanager
    def admit(self, size: int) -> Iterator["Readers"]:
        """Before a block with a large image, wait until no other thread is in such a block.

        Two large images would take twice the memory.

        Args:
            size: bytes of the image, as far as they are known before it is read.

        Yields:
            The readers for the block. A small file may unpack to a large image: reading it then
            keeps others out until the block ends.
        """
        with ExitStack() as block:
            if size > LARGE_BYTES:
                block.enter_context(self._turn)
            yield replace(self, _block=block)

    def start_early(self, paths: Iterable[Path]) -> None:
        """Start a reader process now, which takes half a second, for the first file that needs one.

        Args:
            paths: only suffixes are looked at. A folder or an odd name is taken for DICOM.
        """
        suffixes = (path.suffix.lower() for path in paths)
        first = next((suffix for suffix in suffixes if suffix not in PICTURE_SUFFIXES), None)
        if first is not None:
            self._pool.start(KINDS_BY_SUFFIX.get(first, "DICOM"))

    def wait_for_turn(self, file: ImageFile) -> ImageFile:
        """The file; before it reads large pixels, it waits for its turn."""
        if file.needed <= LARGE_BYTES:
            return file

        def read(k: int) -> Raw:
            if self._block is not None:
                self._block.enter_context(self._turn)
            with self._turn:
                return file.read(k)

        return replace(file, read=read)

    def open(self, path: Path, kind: str) -> ImageFile:
        """A file that a reader process reads; `kind` as `formats.format_of` tells it.

        Raises:
            ImageError: it cannot be used.
        """

        def read(k: int) -> Raw:
            pixels: Raw = self._pool.ask(path, kind, k)
            return pixels

        fields = {name: _as_tuple(value) for name, value in self._pool.ask(path, kind).items()}
        geometry = {name: _as_tuple(value) for name, value in fields.pop("geometry").items()}
        return ImageFile(read=read, geometry=Geometry(**geometry), **fields)

    def end(self) -> None:
        """End the reader processes, once no thread uses them."""
        self._pool.end()


def _as_tuple(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(value) if isinstance(value, list) else value
