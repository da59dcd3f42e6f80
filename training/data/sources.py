"""What cases are made from: image files, masks, and the rows of an IUGC 2025 release."""

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
from training.data.case_table import Case, CaseError, case_tables, read_cases

MASK_SUFFIXES = (".png", ".mha")


class Unusable(ValueError):
    """An image that cannot become a case; the message says why."""


@dataclass(frozen=True)
class Source:
    """What a case is made from: an image, and either a mask or a row of a table."""

    file: str  # path below the images' folder
    image: Path
    mask: Path | None = None
    labelled: Case | None = None


Skipped = list[tuple[str, str]]  # file, reason


def skip(skipped: Skipped, file: str, reason: object) -> None:
    """Note and print why a file gives no case."""
    skipped.append((file, str(reason)))
    tqdm.write(f"skipped {file}: {reason}")


def mask_sources(images: Path, masks: Path, skipped: Skipped) -> Iterator[Source]:
    """Pairs of an image and the mask of the same name without suffix."""
    found, labels = by_stem(images, is_supported_name), by_stem(masks, is_mask_name)
    for stem in sorted(found.keys() | labels.keys()):
        pair = found.get(stem, []), labels.get(stem, [])
        file = (pair[0] or pair[1])[0].relative_to(images if pair[0] else masks).as_posix()
        if [len(each) for each in pair] == [1, 1]:
            yield Source(file, pair[0][0], mask=pair[1][0])
        else:
            counts = f"{len(pair[0])} images and {len(pair[1])} masks"
            skip(skipped, file, f"expected one image and one mask of this name, found {counts}")


def iugc_sources(folder: Path, skipped: Skipped) -> Iterator[Source]:
    """The rows of every table of landmarks below the folder, with their images."""
    tables = case_tables(folder)
    if not tables:
        raise CaseError(
            f"no CSV below {folder} has the columns Filename, PS1, PS2 and FH1 (or AOP Tangency)"
            f"{_first_objection(folder)}"
        )
    found = by_stem(folder, is_supported_name)
    for table in tables:
        for case in read_cases(table):
            images = found.get(stem_of(case.file), [])
            images = [p for p in images if p.as_posix().endswith("/" + case.file)] or images
            images = [p for p in images if p.is_relative_to(table.parent)] or images
            if len(images) != 1:
                skip(skipped, case.file, f"expected one image of this name, found {len(images)}")
                continue
            file = images[0].relative_to(folder).as_posix()
            named = split_of(f"{folder.name}/{table.relative_to(folder)}/{file}")
            yield Source(
                file, images[0], labelled=replace(case, file=file, split=case.split or named)
            )


def _first_objection(folder: Path) -> str:
    """Why the first CSV below a folder is no table of landmarks, to end a sentence with."""
    for path in sorted(folder.rglob("*.csv")):
        try:
            read_cases(path)
        except CaseError as error:
            return f"; the first: {error}"
    return ""


def by_stem(folder: Path, wanted: Callable[[Path], bool]) -> dict[str, list[Path]]:
    """The files below a folder whose name is wanted, by their name without suffix."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if wanted(path) and path.is_file():
            found.setdefault(stem_of(path.name), []).append(path)
    return found


def images_matching(folder_and_pattern: Sequence[str]) -> list[Path]:
    """The image files below a folder, or those whose names match a pattern that follows it.

    Raises:
        CaseError: there is none.
    """
    folder = Path(folder_and_pattern[0])
    pattern = folder_and_pattern[1] if len(folder_and_pattern) > 1 else "*"
    found = sorted(path for path in folder.rglob(pattern) if is_supported_name(path))
    if not found:
        raise CaseError(f"{folder}: no image file's name matches '{pattern}'")
    return found


def is_mask_name(path: Path) -> bool:
    return path.name.lower().endswith(MASK_SUFFIXES)


def stem_of(name: str) -> str:
    """A file's name without folder and suffix, .nii.gz being one suffix."""
    return Path(name.removesuffix(".gz")).stem


def split_of(path: str) -> str | None:
    """The split that the last telling part of a path names, such as val for Validation_set."""
    named = re.findall(r"(?:^|[^a-z])(train|val|test)", path.lower())
    return named[-1] if named else None


def one_frame(path: Path) -> GreyFrame:
    """The picture of a file that holds one; ImageError or Unusable for any other."""
    source = open_image(path)
    if source.is_stack:
        raise Unusable(f"the file holds {source.frame_count} frames; expected a single image")
    frame = next(source.frames())
    if isinstance(frame, BadFrame):
        raise Unusable(frame.reason)
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
        raise MaskError("the mask's file is no PNG, or damaged")
    return np.asarray(mask)


def _read_mha(path: Path) -> npt.NDArray[Any]:
    import SimpleITK  # noqa: PLC0415  takes 0.4 s, and PNG masks do without it

    try:
        return np.asarray(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))))
    except RuntimeError as error:
        raise MaskError("the mask's file is no MetaImage, or damaged") from error
