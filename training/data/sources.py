"""Inputs that cases are made from: images with masks, and the rows of an IUGC 2025 release."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from model.images.source import BadFrame, GreyFrame, is_supported_name, open_image
from model.masks import MaskError
from training.data.case_table import Case, CaseError, find_case_tables, read_cases

MASK_SUFFIXES = (".png", ".mha")


class UnusableInput(ValueError):
    """An input that gives no case; the message says why."""


@dataclass(frozen=True)
class CaseSource:
    """The inputs of one case: an image, and either a mask or a row of a table."""

    file: str  # the image's path below its folder
    image: Path
    mask: Path | None = None
    labelled: Case | None = None


Skipped = list[tuple[str, str]]  # file, reason why it gives no case


def note_skipped(skipped: Skipped, file: str, reason: object) -> None:
    """Add a file to the list, and print why it gives no case."""
    skipped.append((file, str(reason)))
    tqdm.write(f"skipped {file}: {reason}")


def mask_sources(images: Path, masks: Path, skipped: Skipped) -> Iterator[CaseSource]:
    """Pairs of an image and a mask that have the same name without suffix."""
    image_files = files_by_name(images, is_supported_name)
    mask_files = files_by_name(masks, is_mask_name)
    for name in sorted(image_files.keys() | mask_files.keys()):
        of_image, of_mask = image_files.get(name, []), mask_files.get(name, [])
        first, folder = (of_image[0], images) if of_image else (of_mask[0], masks)
        file = first.relative_to(folder).as_posix()
        if len(of_image) == len(of_mask) == 1:
            yield CaseSource(file, of_image[0], mask=of_mask[0])
        else:
            counts = f"{len(of_image)} images and {len(of_mask)} masks"
            note_skipped(
                skipped, file, f"expected one image and one mask of this name, found {counts}"
            )


def iugc_sources(folder: Path, skipped: Skipped) -> Iterator[CaseSource]:
    """The rows of every case table below a folder, with their images.

    Raises:
        CaseError: no table has the columns, or one cannot be read.
    """
    tables = find_case_tables(folder)
    if not tables:
        raise CaseError(
            f"no CSV below {folder} has the columns Filename, PS1, PS2 and FH1 (or AOP Tangency)"
            f"{_first_table_error(folder)}"
        )
    found = files_by_name(folder, is_supported_name)
    for table in tables:
        for case in read_cases(table):
            images = found.get(name_without_suffix(case.file), [])
            images = [p for p in images if p.as_posix().endswith("/" + case.file)] or images
            images = [p for p in images if p.is_relative_to(table.parent)] or images
            if len(images) != 1:
                note_skipped(
                    skipped, case.file, f"expected one image of this name, found {len(images)}"
                )
                continue
            file = images[0].relative_to(folder).as_posix()
            split = case.split or split_in_path(f"{folder.name}/{table.relative_to(folder)}/{file}")
            yield CaseSource(file, images[0], labelled=replace(case, file=file, split=split))


def _first_table_error(folder: Path) -> str:
    """The end of a sentence: why the first CSV below a folder is not a case table."""
    for path in sorted(folder.rglob("*.csv")):
        try:
            read_cases(path)
        except CaseError as error:
            return f"; the first: {error}"
    return ""


def files_by_name(folder: Path, wanted: Callable[[Path], bool]) -> dict[str, list[Path]]:
    """The wanted files below a folder, by their name without suffix."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if wanted(path) and path.is_file():
            found.setdefault(name_without_suffix(path.name), []).append(path)
    return found


def images_matching(folder_and_pattern: Sequence[str]) -> list[Path]:
    """The image files below a folder whose names match.

    Args:
        folder_and_pattern: the folder, and optionally a shell pattern of file names.

    Raises:
        CaseError: no image file matches.
    """
    folder = Path(folder_and_pattern[0])
    pattern = folder_and_pattern[1] if len(folder_and_pattern) > 1 else "*"
    found = sorted(path for path in folder.rglob(pattern) if is_supported_name(path))
    if not found:
        raise CaseError(f"{folder}: no image file's name matches '{pattern}'")
    return found


def is_mask_name(path: Path) -> bool:
    return path.name.lower().endswith(MASK_SUFFIXES)


def name_without_suffix(name: str) -> str:
    """A file's name without folder and suffix; .nii.gz counts as one suffix."""
    return Path(name.removesuffix(".gz")).stem


def split_in_path(path: str) -> str | None:
    """The last split that a path names, such as val for Validation_set/1.png; None without one."""
    splits = re.findall(r"(?:^|[^a-z])(train|val|test)", path.lower())
    return splits[-1] if splits else None


def read_single_frame(path: Path) -> GreyFrame:
    """Read a file that holds one image.

    Raises:
        ImageError: the file cannot be read.
        UnusableInput: it holds several frames, or one without usable content.
    """
    source = open_image(path)
    if source.is_stack:
        raise UnusableInput(f"the file holds {source.frame_count} frames; expected a single image")
    frame = next(source.frames())
    if isinstance(frame, BadFrame):
        raise UnusableInput(frame.reason)
    return frame


def read_mask(path: Path) -> npt.NDArray[np.uint8]:
    """A .png or .mha file -> (H, W) uint8; a leading axis of 1 is dropped.

    Raises:
        MaskError: the file cannot be read, or holds something other than one uint8 plane.
    """
    suffix = path.suffix.lower()
    if suffix not in MASK_SUFFIXES:
        raise MaskError(f"a mask is read from {' or '.join(MASK_SUFFIXES)}, not from {suffix!r}")
    if not path.is_file():
        raise MaskError("the mask's file does not exist")
    mask = _read_mha(path) if suffix == ".mha" else _read_png(path)
    if mask.ndim == 3 and mask.shape[0] == 1:
        mask = mask[0]
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise MaskError(
            f"the mask is {mask.dtype} of {mask.shape}; expected uint8 of (height, width)"
        )
    return mask


def _read_png(path: Path) -> npt.NDArray[Any]:
    data = np.fromfile(path, np.uint8)
    mask = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    if mask is None:
        raise MaskError("the mask's file is damaged or not a PNG")
    return np.asarray(mask)


def _read_mha(path: Path) -> npt.NDArray[Any]:
    import SimpleITK  # noqa: PLC0415  takes 0.4 s, and PNG masks do not need it

    try:
        return np.asarray(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))))
    except RuntimeError as error:
        raise MaskError("the mask's file is damaged or not a MetaImage") from error
