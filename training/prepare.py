"""Make the case table that training reads, from masks or from the IUGC 2025 release.

From images and their masks (.png or .mha; 0 background, 1 pubic symphysis, 2 fetal head), matched
by file name without suffix, as FH-PS-AoP 2023 and PSFHS publish them:

    python -m training.prepare --images DIR --masks DIR --output cases.csv
    python -m training.prepare --images DIR --masks DIR --output cases.csv --split 0.7 0.15 0.15
    python -m training.prepare --images DIR --masks DIR --output cases.csv \\
        --patients patients.csv --patient-column PatientID --split 0.8 0.2 0

From a folder of IUGC 2025 as released (a CSV with Filename, PS1, PS2, FH1, AoP, or
landmarks_data.csv with aop_results.csv; the images anywhere below the folder):

    python -m training.prepare --iugc DIR --output cases.csv

Landmarks from masks are no expert's clicks: the ends of the ellipse fitted to the symphysis, and
the point where the tangent from PS1 touches the ellipse fitted to the head. What cannot be derived
is named on stdout and in OUTPUT's .skipped.csv; the rest is written. Frames that look alike get one
group, and a split never parts a group. Look at the contact sheet before you train.

Exit status: 0 a table was written, 1 nothing could be derived, 2 a wrong option.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from model.anatomy import LANDMARKS, angle_of_progression
from model.frame import Letterbox
from model.image import BadFrame, GreyFrame, ImageError, is_supported_name, open_image
from training.cases import (
    Case,
    CaseError,
    case_tables,
    read_cases,
    read_table,
    write_cases,
    write_rows,
)
from training.groups import (
    DUPLICATE_CORRELATION,
    SPLITS,
    Thumbnail,
    near_duplicate_groups,
    split_by_group,
    thumbnail,
)
from training.masks import (
    CLASSES,
    MASK_SUFFIXES,
    MaskError,
    landmarks_from_mask,
    outer_contour,
    read_mask,
)

SHEET_CASES, TILE, COLUMNS, CAPTION = 48, 240, 8, 18  # the contact sheet; px
MASK_COLOURS = dict(zip(CLASSES, [(60, 200, 240), (230, 190, 90)], strict=True))  # BGR
LANDMARK_COLOURS = [(80, 80, 255), (255, 120, 60), (80, 255, 80)]


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if (args.iugc is None) == (args.images is None) or (args.images is None) != (
        args.masks is None
    ):
        parser.error("give --images and --masks, or --iugc")
    if (args.patients is None) != (args.patient_column is None):
        parser.error("--patients and --patient-column belong together")
    try:
        if args.split:
            split_by_group([], args.split)  # refuses wrong shares before the work, not after it
        return prepare(args)
    except ValueError as error:
        print(f"nothing was written: {error}", file=sys.stderr)
        return 1


def prepare(args: argparse.Namespace) -> int:
    """From the files to the table, the list of what was skipped, and the contact sheet."""
    folder: Path = args.iugc or args.images
    for each in (folder, args.masks or folder):
        if not each.is_dir():
            raise Unusable(f"{each} is not a folder")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    skipped: Skipped = []
    sources = list(
        iugc_sources(folder, skipped) if args.iugc else mask_sources(folder, args.masks, skipped)
    )
    derived = derive_all(sources, skipped)
    cases = group_cases(derived, args, skipped)
    write_skipped(args.output.with_name(args.output.stem + ".skipped.csv"), skipped)
    if not cases:
        first = f"; the first: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise Unusable(f"no case could be derived from {len(skipped)} files{first}")
    if args.split:
        splits = split_by_group([case.group for case in cases], args.split, args.seed)
        cases = [replace(case, split=split) for case, split in zip(cases, splits, strict=True)]
    write_cases(args.output, cases)
    report(cases, skipped, args)
    sheet = args.contact_sheet or args.output.with_name(args.output.stem + ".contact-sheet.png")
    by_file = {source.file: source for source in sources}
    chosen = np.unique(np.linspace(0, len(cases) - 1, SHEET_CASES).round().astype(int))
    write_sheet(sheet, [(cases[k], by_file[cases[k].file]) for k in chosen])
    print(f"look at {sheet} before you train")
    return 0


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
        )
    found = by_stem(folder, is_supported_name)
    for table in tables:
        for case in read_cases(table):
            images = found.get(stem_of(case.file), [])
            for narrower in (
                lambda path, case=case: path.as_posix().endswith("/" + case.file),
                lambda path, table=table: path.is_relative_to(table.parent),
            ):
                images = [path for path in images if narrower(path)] or images
            if len(images) != 1:
                skip(skipped, case.file, f"expected one image of this name, found {len(images)}")
                continue
            file = images[0].relative_to(folder).as_posix()
            split = split_of(f"{folder.name}/{table.relative_to(folder)}/{file}")
            yield Source(file, images[0], labelled=replace(case, file=file, split=split))


def by_stem(folder: Path, wanted: Callable[[Path], bool]) -> dict[str, list[Path]]:
    """The files below a folder whose name is wanted, by their name without suffix."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if wanted(path) and path.is_file():
            found.setdefault(stem_of(path.name), []).append(path)
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


def derive_all(sources: Sequence[Source], skipped: Skipped) -> list[tuple[Case, Thumbnail]]:
    """The cases that can be derived, each with the thumbnail by which it is grouped."""
    derived = []
    for source in tqdm(sources, desc="reading", unit="image"):
        try:
            derived.append(derive(source))
        except (Unusable, ImageError, MaskError) as error:
            skip(skipped, source.file, error)
    return derived


def derive(source: Source) -> tuple[Case, Thumbnail]:
    """One case and its image's thumbnail.

    Raises:
        Unusable, ImageError, MaskError: image, mask and landmarks do not fit together or are bad.
    """
    frame = one_frame(source.image)
    height, width = frame.pixels.shape
    if source.labelled is not None:
        case = source.labelled
        outside = (case.landmarks_px < -0.5) | (case.landmarks_px > np.array([width, height]) - 0.5)
        if outside.any():
            raise Unusable(f"a landmark of the table lies outside the image of {width}x{height} px")
    else:
        mask = read_mask(source.mask)
        if mask.shape != (height, width):
            size = f"{mask.shape[1]}x{mask.shape[0]}"
            raise Unusable(f"the mask has {size} px, its image {width}x{height}")
        landmarks = landmarks_from_mask(mask)
        aop_deg = float(angle_of_progression(landmarks, frame.geometry.pixel_shape))
        case = Case(source.file, landmarks, aop_deg)
    return case, thumbnail(frame.pixels)


def one_frame(path: Path) -> GreyFrame:
    """The picture of a file that holds one; ImageError or Unusable for any other."""
    source = open_image(path)
    if source.is_stack:
        raise Unusable(f"the file holds {source.frame_count} frames; expected a single image")
    frame = next(source.frames())
    if isinstance(frame, BadFrame):
        raise Unusable(frame.reason)
    return frame


def group_cases(
    derived: Sequence[tuple[Case, Thumbnail]], args: argparse.Namespace, skipped: Skipped
) -> list[Case]:
    """The cases with their groups: the patients of a CSV, or near-duplicate frames."""
    if args.patients is None:
        groups = near_duplicate_groups((small for _, small in derived), args.duplicate_correlation)
        return [
            replace(case, group=f"g{group:03d}")
            for (case, _), group in zip(derived, groups, strict=True)
        ]
    table = read_table(args.patients)
    file, column = table.find("Filename"), table.find(args.patient_column)
    patients = {stem_of(row[file]): row[column] for _, row in table.rows}
    cases = []
    for case, _ in derived:
        patient = patients.get(stem_of(case.file))
        if patient:
            cases.append(replace(case, group=patient))
        else:
            skip(skipped, case.file, f"{args.patients} names no {column} for it")
    return cases


def write_skipped(path: Path, skipped: Skipped) -> None:
    """The list of what was skipped; a list of an earlier run is removed where there is nothing."""
    if skipped:
        write_rows(path, ["file", "reason"], skipped)
    else:
        path.unlink(missing_ok=True)


def report(cases: Sequence[Case], skipped: Skipped, args: argparse.Namespace) -> None:
    """What was written, how large the groups are, and how the splits came out."""
    sizes = Counter(case.group for case in cases)
    print(f"{len(cases)} cases written to {args.output}, {len(skipped)} files skipped")
    print(f"{len(sizes)} groups, the largest of {max(sizes.values())} images")
    splits = Counter(case.split for case in cases if case.split)
    for name in SPLITS if splits else ():
        print(f"  {name:5} {splits[name]:6} images  {splits[name] / len(cases):6.1%}")
    parted = {g for g in sizes if len({case.split for case in cases if case.group == g}) > 1}
    if parted:
        print(
            f"{len(parted)} groups of look-alike images lie in several of the release's own splits;"
            " --split draws new ones that keep groups together"
        )


def write_sheet(path: Path, chosen: Sequence[tuple[Case, Source]]) -> None:
    """A PNG grid of cases with the outlines of their masks and their landmarks."""
    tiles = [sheet_tile(case, source) for case, source in chosen]
    columns = min(COLUMNS, max(2, len(tiles)))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[k : k + columns]) for k in range(0, len(tiles), columns)]
    legend = np.zeros((2 * CAPTION, columns * TILE, 3), np.uint8)
    names = dict(zip(LANDMARKS, LANDMARK_COLOURS, strict=True))
    names |= {"symphysis": MASK_COLOURS[1], "head": MASK_COLOURS[2]}
    for k, (name, colour) in enumerate(names.items()):
        cv2.circle(legend, (14 + 92 * k, CAPTION), 4, colour, -1, cv2.LINE_AA)
        put_text(legend, name, (24 + 92 * k, CAPTION + 4))
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), np.vstack([legend, *rows])):
        raise Unusable(f"the contact sheet cannot be written to {path}")


def sheet_tile(case: Case, source: Source) -> npt.NDArray[np.uint8]:
    """(CAPTION + TILE, TILE, 3) BGR of one case."""
    pixels = one_frame(source.image).pixels
    box = Letterbox(pixels.shape[1], pixels.shape[0], TILE)
    grey = box.apply(np.clip(pixels, 0, 255).astype(np.uint8))
    tile = cv2.cvtColor(np.pad(grey, ((CAPTION, 0), (0, 0))), cv2.COLOR_GRAY2BGR)
    below = np.array([0, CAPTION])
    if source.mask is not None:
        mask = read_mask(source.mask)
        for label, colour in MASK_COLOURS.items():
            outline = box.to_input(outer_contour(mask, label)) + below
            cv2.polylines(tile, [outline.round().astype(np.int32)], True, colour, 1, cv2.LINE_AA)
    for point, colour in zip(
        box.to_input(case.landmarks_px) + below, LANDMARK_COLOURS, strict=True
    ):
        x, y = point.round().astype(int)
        cv2.circle(tile, (int(x), int(y)), 3, colour, -1, cv2.LINE_AA)
    put_text(tile, f"{case.file[-24:]} {case.aop_deg:.0f} deg", (4, CAPTION - 5))
    return tile


def put_text(image: npt.NDArray[np.uint8], text: str, at: tuple[int, int]) -> None:
    cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (230, 230, 230), 1, cv2.LINE_AA)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--images", type=Path, metavar="DIR", help="folder of images, searched with its subfolders")
    add("--masks", type=Path, metavar="DIR", help="folder of masks, .png or .mha")
    add("--iugc", type=Path, metavar="DIR", help="folder of an IUGC 2025 release, instead of both")
    add("--output", type=Path, metavar="CSV", required=True, help="the case table to write")
    add(
        "--patients", type=Path, metavar="CSV", help="table of Filename and patient, for the groups"
    )
    add("--patient-column", metavar="NAME", help="that table's column with the patient")
    add(
        "--split",
        type=float,
        nargs=3,
        metavar=("TRAIN", "VAL", "TEST"),
        help="shares of images, adding up to 1, drawn by group; in place of a release's own splits",
    )
    add("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    add(
        "--duplicate-correlation",
        type=float,
        default=DUPLICATE_CORRELATION,
        metavar="R",
        help="images whose 32x32 thumbnails correlate so much share a group (default: %(default)s)",
    )
    add(
        "--contact-sheet",
        type=Path,
        metavar="PNG",
        help="picture of up to 48 cases to look at (default: beside the output)",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
