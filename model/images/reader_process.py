"""Reads the formats whose decoders may crash, hang or fill the memory: TIFF, DICOM and ITK's.

`reader_pool` runs `serve` in a process of its own, which answers one request at a time. A request
is a line of JSON on stdin: "path", "kind", "longest_s" (of processor time) and "frame", the number
of the one whose pixels are wanted, or null for what the file's header says. The answer on stdout
is a line of JSON, then the bytes of its arrays.
"""

import importlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from model.images.limits import MAX_BYTES, ImageError, ImageFile, damaged_error, unreadable_error

if sys.platform == "linux":
    import resource

# While a file is read, the process may grow by ROOM_BYTES + COPIES times the bytes of its pixels.
# Libraries that are loaded late map 300 MB of the room, without using that much memory.
ROOM_BYTES, COPIES = 2**29, 6
FOLDER_PREFIX = "aop-reader-"  # of the folder for temporary files
REMEMBERED_FILES = (
    64  # headers that are not read again for each frame; as many as there are threads
)


def open_file(path: Path, kind: str) -> ImageFile:
    """A file of one of the formats that `formats.format_of` tells, except PNG, JPEG and BMP.

    Raises:
        ImageError, OSError: it cannot be used.
        Exception: what a library raises at bytes that it does not expect.
    """
    # each imports libraries that the other formats do not need
    if kind == "TIFF":
        from model.images.tiff import open_tiff  # noqa: PLC0415

        return open_tiff(path)
    if kind == "DICOM":
        from model.images.dicom import open_dicom  # noqa: PLC0415

        return open_dicom(path)
    from model.images.volumes import open_volume  # noqa: PLC0415

    return open_volume(path, kind)


def import_decoder(kind: str) -> None:
    """Import what reads a format, which takes up to a quarter of a second."""
    if kind in ("TIFF", "DICOM"):
        importlib.import_module(f"model.images.{kind.lower()}")
    else:
        importlib.import_module("model.images.volumes").import_simpleitk()


def serve(kind: str) -> None:
    """Answer requests until stdin ends.

    Args:
        kind: the format of the first file, whose libraries are imported at once.
    """
    requests, answers = sys.stdin.buffer, io.FileIO(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no answer
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file behind
    import_decoder(kind)
    for line in requests:
        head, arrays = _answer(json.loads(line))
        _write(answers, json.dumps(head).encode() + b"\n")
        for array in arrays:
            _write(answers, array.data.cast("B"))
    folder = Path(os.environ.get("TMPDIR", ""))
    if folder.name.startswith(FOLDER_PREFIX):  # the main process may have been killed
        shutil.rmtree(folder, ignore_errors=True)


def _write(stream: io.FileIO, data: bytes | memoryview) -> None:
    while data:
        data = data[stream.write(data) :]


def _answer(request: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray[Any, Any]]]:
    path, kind, frame = Path(request["path"]), request["kind"], request["frame"]
    limit_time(request["longest_s"])
    try:
        status = path.stat()
        with limited_memory(min(status.st_size, MAX_BYTES)):
            file = _open_once(path, kind, status.st_mtime_ns, status.st_size)
        if frame is None:
            return {"file": _header(file)}, []
        with limited_memory(file.needed):
            pixels = file.read(frame)
    except ImageError as error:
        return {"error": str(error)}, []
    except OSError as error:
        return {"error": str(unreadable_error(error))}, []
    except Exception:  # libraries raise anything at damaged bytes, MemoryError among it
        return {"error": str(damaged_error(kind))}, []
    arrays = [np.ascontiguousarray(np.ma.getdata(pixels))]
    if isinstance(pixels, np.ma.MaskedArray):
        arrays.append(np.ascontiguousarray(np.ma.getmaskarray(pixels)))
    return {"arrays": [(array.dtype.str, array.shape) for array in arrays]}, arrays


@lru_cache(REMEMBERED_FILES)
def _open_once(path: Path, kind: str, _changed_ns: int, _size: int) -> ImageFile:
    return open_file(path, kind)


def _header(file: ImageFile) -> dict[str, Any]:
    """The fields of an ImageFile without its function."""
    values = vars(file) | {"geometry": asdict(file.geometry)}
    del values["read"]
    return values


def limit_time(seconds: int) -> None:
    """End this process by SIGXCPU after so much more processor time; on Linux only."""
    if sys.platform == "linux":
        spent = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(spent.ru_utime + spent.ru_stime) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


@contextmanager
def limited_memory(needed: int) -> Iterator[None]:
    """In the block the process can grow by no more than ROOM_BYTES + COPIES * needed bytes.

    Some libraries allocate what a file claims before they look at its length: GDCM takes 4 GB for
    a DICOM file of 150 bytes. The limits exist on Linux only.

    Args:
        needed: bytes of the pixels.
    """
    if sys.platform != "linux":
        yield
        return
    in_use = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = in_use * resource.getpagesize() + ROOM_BYTES + COPIES * min(needed, MAX_BYTES)
    if not 0 <= before[1] < limit:  # -1 means no limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
