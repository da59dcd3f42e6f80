"""Finding the cases in an input folder, in the three layouts that `find_cases` describes."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from model.image import SUFFIXES, is_supported_name

LONGEST_NAME = 200  # bytes; file systems stop at 255, and a folder's files need room


class InputError(ValueError):
    """An input folder with nothing to do; the message says what was expected."""


@dataclass(frozen=True)
class Case:
    """One image file, or one folder of DICOM files.

    name: unique in the run and fit for a folder's name. path: where it lies. file: the path below
    the input folder, for people. folder: below the output folder, "" for its top.
    """

    name: str
    path: Path
    file: str
    folder: str
    is_job: bool = False


def find_cases(root: Path) -> list[Case]:
    """The cases below an input folder, in a fixed order.

    1. inputs.json: a grand-challenge job. Its one value of super_kind "Image" names the folder.
    2. images/<slug>/: grand-challenge's older format, where there is no inputs.json.
    3. Any folder: every supported image below it. Links are followed, hidden files are not read.

    Raises:
        InputError: no folder, no image, or an inputs.json that names none.
    """
    if not root.is_dir():
        raise InputError(f"no input folder at {root}; mount one there or pass --input DIR")
    if (root / "inputs.json").is_file():
        return [_job_case(root)]
    start = root / "images" if (root / "images").is_dir() else root
    files = sorted(_walk(start, set()), key=os.fsencode)
    files = [path for path in files if is_supported_name(path)]
    if not files and start != root:
        files = [path for path in sorted(_walk(root, set())) if is_supported_name(path)]
    if not files:
        raise InputError(f"no image below {root}; expected files of {', '.join(SUFFIXES)}")
    taken: set[str] = set()
    return [_case(root, path, taken) for path in files]


def _walk(folder: Path, above: set[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # a link that leads back to a folder above it
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, above | {real})
        else:
            yield path


def _case(root: Path, path: Path, taken: set[str]) -> Case:
    file = readable(path.relative_to(root))
    stem = file
    for suffix in SUFFIXES:
        if file.lower().endswith(suffix):
            stem = file[: -len(suffix)]
            break
    name = stem = _short(stem.replace("/", "__"))
    number = 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return Case(name, path, file, name)


def _short(name: str) -> str:
    data = name.encode()
    if len(data) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(data).hexdigest()[:12]
    return data[: LONGEST_NAME - 13].decode(errors="ignore") + "-" + digest


def readable(path: Path | PurePosixPath) -> str:
    """A path as text that JSON and CSV can hold, whatever bytes the file system has in it."""
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


def _job_case(root: Path) -> Case:
    """The one case of a grand-challenge job; whether its file can be read is seen later."""
    relative = _image_path(root / "inputs.json")
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts:
        raise InputError(f"inputs.json: relative_path '{relative}' leaves the input folder")
    path = root / parts
    if path.is_dir():
        images = sorted(p for p in path.iterdir() if is_supported_name(p) and p.is_file())
        if len(images) == 1:
            path = images[0]
    return Case(readable(parts), path, readable(path.relative_to(root)), "", is_job=True)


def _image_path(inputs: Path) -> str:
    try:
        values: Any = json.loads(inputs.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"inputs.json cannot be read as JSON: {error}") from error
    if not isinstance(values, list):
        raise InputError("inputs.json: expected a list of values")
    sockets = [
        value.get("socket") or value.get("interface") for value in values if isinstance(value, dict)
    ]
    images = [
        socket
        for socket in sockets
        if isinstance(socket, dict) and str(socket.get("super_kind", "")).lower() == "image"
    ]
    if len(images) != 1:
        slugs = ", ".join(str(image.get("slug")) for image in images) or "none"
        raise InputError(
            f"inputs.json: expected one value whose socket has super_kind 'Image', found {slugs}"
        )
    relative = images[0].get("relative_path")
    if not isinstance(relative, str) or not relative or "\0" in relative:
        raise InputError("inputs.json: the image's socket has no relative_path")
    return relative
