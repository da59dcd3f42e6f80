"""Finding the cases in an input folder, in the three layouts that `find_cases` describes."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from model.images.formats import SUFFIXES, is_dicom, is_supported_name
from model.results.files import REPORT, RESULTS, TABLE

LONGEST_NAME = 200  # bytes; file systems stop at 255, and a number may have to be added


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


def find_cases(
    root: Path, output: Path | None = None, passed_over: Counter[str] | None = None
) -> list[Case]:
    """The cases below an input folder, in a fixed order.

    1. inputs.json: a grand-challenge job. Its one value of super_kind "Image" names the folder.
    2. images/<slug>/: grand-challenge's older format; what lies beside images/ is no case.
    3. Any folder: every supported image below it.
    In 2 and 3, links are followed; hidden files and the output folder are left out. So are files
    whose suffix is no image's, but for DICOM without one; `passed_over` counts them by suffix.

    Raises:
        InputError: no folder, no image, or an inputs.json that names none.
    """
    try:
        next(root.iterdir(), None)
        is_job = (root / "inputs.json").is_file()
    except OSError as error:
        raise InputError(
            f"the input folder {root} cannot be read ({error.strerror}); mount a folder there that "
            "this user may read, or pass --input DIR"
        ) from error
    if is_job:
        return [_job_case(root)]
    if output is not None and _is_same(root, output):
        raise InputError(f"{root} is the input and the output folder; choose another --output")
    images = root / "images"
    passed_over = Counter() if passed_over is None else passed_over
    paths = _images_below(images, output, passed_over) if _is_folder(images) else []
    if all(path.parent == images for path in paths):  # no <slug>/
        passed_over.clear()
        paths = _images_below(root, output, passed_over)
    if not paths:
        raise InputError(f"no image below {root}; expected files of {', '.join(SUFFIXES)}")
    taken = {RESULTS, TABLE, REPORT}
    return [_case(root, path, taken) for path in paths]


def _images_below(folder: Path, output: Path | None, passed_over: Counter[str]) -> list[Path]:
    return sorted(_walk(folder, output, passed_over), key=os.fsencode)


def _walk(top: Path, output: Path | None, passed_over: Counter[str]) -> Iterator[Path]:
    """Every image; what cannot be looked into too, so that its case fails and says so."""
    nowhere: frozenset[Path] = frozenset()
    ahead = [(top, _real(top), nowhere)]  # a list, for folders can be deeper than Python calls
    while ahead:
        folder, real, above = ahead.pop()
        if real in above:  # one of them: a folder above this one, to which a link leads back
            continue
        if output is not None and _is_same(folder, output):  # mounted at two places, perhaps
            continue
        try:
            for path in folder.iterdir():
                if path.name.startswith("."):
                    continue
                try:
                    is_folder = path.is_dir()
                except OSError:  # no right to look, or too long a path
                    yield path
                    continue
                if is_folder:
                    place = _real(path) if path.is_symlink() else real / path.name
                    ahead.append((path, place, above | {real}))
                elif is_supported_name(path) or _is_bare_dicom(path):
                    yield path
                elif path.suffix.lower() not in (".raw", ".zraw"):  # the pixels of an .mhd
                    passed_over[path.suffix.lower() or "no suffix"] += 1
        except OSError:
            yield folder


def _is_bare_dicom(path: Path) -> bool:
    """Whether it is a DICOM file that has no suffix, as many machines export them."""
    try:
        return not path.suffix and path.is_file() and is_dicom(path)
    except OSError:
        return False


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # the output may not be there yet
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # too long a name, or no right to look; reading it as a file says which
        return False


def _real(path: Path) -> Path:
    """Without links; unlike Path.resolve in Python 3.11 it bears those that lead in a ring."""
    return Path(os.path.realpath(path))


def _case(root: Path, path: Path, taken: set[str]) -> Case:
    file = readable(path.relative_to(root))
    suffix = next((suffix for suffix in SUFFIXES if file.lower().endswith(suffix)), "")
    name = stem = _short(file[: len(file) - len(suffix)].replace("/", "__"))
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
    """A path as text that JSON and CSV can hold; bytes that are no UTF-8 as backslash escapes."""
    text = os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
    return text.replace("\r", "\\r")  # which Python's csv reads as the end of a line


def _job_case(root: Path) -> Case:
    """The one case of a grand-challenge job; whether its file can be read is seen later."""
    relative = _image_path(root / "inputs.json")
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts:
        raise InputError(f"inputs.json: relative_path '{relative}' leaves the input folder")
    path = root / parts
    if _is_folder(path):
        path = _only_image(path)
    return Case(readable(parts), path, readable(path.relative_to(root)), "", is_job=True)


def _only_image(folder: Path) -> Path:
    """The one image in a socket's folder: a file, a folder in it, or the folder itself."""
    try:
        inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
        files = [path for path in inside if path.is_file()]
        images = [path for path in files if is_supported_name(path) or is_dicom(path)]
        if len(images) == 1:
            return images[0]
        return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder
    except OSError:  # reading the case says so
        return folder


def _image_path(inputs: Path) -> str:
    try:
        values: Any = json.loads(inputs.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
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
    if not isinstance(relative, str) or not relative or not relative.isprintable():
        raise InputError("inputs.json: the image's socket has no usable relative_path")
    return relative
