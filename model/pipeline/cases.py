"""Finds the cases in an input folder, in the layouts that `find_cases` describes."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from model.images.formats import SUFFIXES, is_dicom, is_supported_name
from model.results.files import REPORT, RESULTS, TABLE

DATA_SUFFIXES = (".raw", ".zraw")  # the pixels of an .mhd
LONGEST_NAME = 200  # bytes; most file systems allow 255, and a number may be appended


class InputError(ValueError):
    """The input folder holds no case; the message says what was expected."""


@dataclass(frozen=True)
class InputCase:
    """One image file or one folder of DICOM files, which may hold several frames.

    name: unique in the run; a valid folder name unless the case is a job. file: the path below the
    input folder as printable text. folder: the answers' place below the output folder; "" is the
    top.
    """

    name: str
    path: Path
    file: str
    folder: str
    is_job: bool = False


def find_cases(
    root: Path, output: Path | None = None, skipped: dict[str, list[str]] | None = None
) -> list[InputCase]:
    """The cases below an input folder, in a fixed order.

    1. inputs.json: a grand-challenge job. Its one value of super_kind "Image" names the folder.
    2. Any folder: every supported image below it, also in grand-challenge's older format
       images/<slug>/.
    In 2, links are followed. Hidden files, the output folder and files without an image's suffix
    are left out, except DICOM files, which may have any name.

    Args:
        output: the output folder, in case it lies below the input folder.
        skipped: receives, by suffix, the files that were left out because they are no images.

    Raises:
        InputError: the folder cannot be read or has no image, or inputs.json names none.
    """
    try:
        next(root.iterdir(), None)
        is_job = (root / "inputs.json").is_file()
    except OSError as error:
        raise InputError(
            f"the input folder {root} cannot be read ({error.strerror}); pass --input DIR with an "
            "existing folder, or in a container mount one there that its user may read"
        ) from error
    if is_job:
        return [_job_case(root)]
    if output is not None and _is_same(root, output):
        raise InputError(f"{root} is the input and the output folder; choose another --output")
    paths: list[Path] = []
    others: list[Path] = []
    for path, is_image in _walk(root, output):
        (paths if is_image else others).append(path)
    if not paths:
        suffixes = ", ".join(SUFFIXES)
        raise InputError(
            f"no image below {root}; expected files that end in {suffixes}, or DICOM of any name"
        )
    for file in sorted(printable_path(path.relative_to(root)) for path in others):
        if skipped is not None:
            skipped.setdefault(_suffix_of(file), []).append(file)
    paths.sort(key=os.fsencode)
    taken = {RESULTS, TABLE, REPORT}
    return [_case_in_folder(root, path, taken) for path in paths]


# ---- Layout 2: a folder of images


def _walk(top: Path, output: Path | None) -> Iterator[tuple[Path, bool]]:
    """Every file below a folder, and whether it is an image.

    A path that cannot be looked at counts as an image, so that its case fails and says why.
    """
    no_parents: frozenset[Path] = frozenset()
    ahead = [(top, _real_path(top), no_parents)]  # folders can be deeper than Python can recurse
    while ahead:
        folder, real, parents = ahead.pop()
        if real in parents:  # a link leads back to a folder above it
            continue
        if output is not None and _is_same(folder, output):
            continue
        try:
            for path in folder.iterdir():
                if path.name.startswith("."):
                    continue
                try:
                    is_folder = path.is_dir()
                except OSError:  # permission denied, or the path is too long
                    yield path, True
                    continue
                if is_folder:
                    place = _real_path(path) if path.is_symlink() else real / path.name
                    ahead.append((path, place, parents | {real}))
                elif path.suffix.lower() not in DATA_SUFFIXES:
                    yield path, is_supported_name(path) or _is_unnamed_dicom(path)
        except OSError:
            yield folder, True


def _is_unnamed_dicom(path: Path) -> bool:
    """Whether a file without an image's suffix is DICOM; opens no pipe."""
    try:
        return path.is_file() and is_dicom(path)
    except OSError:
        return False


def _suffix_of(file: str) -> str:
    """The suffix by which a file is counted. The end of a UID, or of x.0001, is none."""
    suffix = PurePosixPath(file).suffix.lower()
    return suffix if re.fullmatch(r"\.(?=\w*[a-z])\w{1,12}", suffix) else "no suffix"


def _case_in_folder(root: Path, path: Path, taken: set[str]) -> InputCase:
    """A case with a new name, which is added to `taken`."""
    file = printable_path(path.relative_to(root))
    suffix = next((suffix for suffix in SUFFIXES if file.lower().endswith(suffix)), "")
    name = stem = _shorten_name(file[: len(file) - len(suffix)].replace("/", "__"))
    number = 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return InputCase(name, path, file, name)


def _shorten_name(name: str) -> str:
    data = name.encode()
    if len(data) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(data).hexdigest()[:12]
    return data[: LONGEST_NAME - 13].decode(errors="ignore") + "-" + digest


# ---- Layout 1: a grand-challenge job


def _job_case(root: Path) -> InputCase:
    """The one case of a job. Its file may turn out to be unreadable later."""
    relative = _read_relative_path(root / "inputs.json")
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts:
        raise InputError(
            f"inputs.json: relative_path '{relative}' leaves the input folder; "
            "expected a path below it"
        )
    path = root / parts
    if _is_folder(path):
        path = _only_image(path)
    file = printable_path(path.relative_to(root))
    return InputCase(printable_path(parts), path, file, "", is_job=True)


def _only_image(folder: Path) -> Path:
    """The image in a socket's folder: its one image file, its one subfolder, or the folder."""
    try:
        inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
        files = [path for path in inside if path.is_file()]
        images = [path for path in files if is_supported_name(path) or is_dicom(path)]
        if len(images) == 1:
            return images[0]
        return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder
    except OSError:  # reading the case will fail and say why
        return folder


def _read_relative_path(inputs: Path) -> str:
    """The relative_path of the one image socket in an inputs.json."""
    try:
        values: Any = json.loads(inputs.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"inputs.json cannot be read as JSON: {error}") from error
    if not isinstance(values, list):
        raise InputError(
            f"inputs.json: expected a list of values, found {type(values).__name__} at the top"
        )
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
    if not isinstance(relative, str) or not relative or not relative.isprintable():
        raise InputError(
            "inputs.json: the image's socket has no usable relative_path; expected a path below "
            "the input folder"
        )
    return relative


# ---- Paths


def printable_path(path: Path | PurePosixPath) -> str:
    """A path as text for JSON and CSV; bytes that are not UTF-8 become backslash escapes."""
    text = os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
    return text.replace("\r", "\\r")  # Python's csv would read it as the end of a line


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths are one folder, even if it is mounted at two places."""
    try:
        return one.samefile(other)
    except OSError:  # the output folder need not exist yet
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # name too long, or permission denied; reading it as a file says which
        return False


def _real_path(path: Path) -> Path:
    """The path without links. Path.resolve of Python 3.11 fails at links that form a ring."""
    return Path(os.path.realpath(path))
