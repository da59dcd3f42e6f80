"""Make the case table that training reads, from masks, from clicks or from IUGC 2025.

From images and masks (.png or .mha; 0 background, 1 pubic symphysis, 2 fetal head) of the same name
without suffix, as FH-PS-AoP 2023 and PSFHS publish them:

    python -m training.prepare --images DIR --masks DIR --output cases.csv --split 0.7 0.15 0.15
    python -m training.prepare --images DIR --masks DIR --output cases.csv \\
        --patients patients.csv --patient-column PatientID --split 0.8 0.2 0

The first draws a split by groups of images that look alike, the second by patient. For PSFHS the
splits, devices and groups behind this repository's figures are given:

    python -m training.prepare --images image_mha --masks label_mha --output cases.csv \\
        --splits training/psfhs_splits.csv

From a folder of IUGC 2025 as released (a CSV with Filename, PS1, PS2, FH1, AoP, or
landmarks_data.csv with aop_results.csv; the images anywhere below the folder), or from a folder
with an expert's clicks in such a table:

    python -m training.prepare --iugc DIR --output cases.csv

A table of clicks is a case table already, and training.fit reads it as it is. --iugc checks its
points and images first, and finds groups if it has none. Such a table looks like this:

    Filename,PS1,PS2,FH1,AoP,split,group
    site1/0001.png,"(131.5, 82)","(60, 95.25)","(190, 141)",,train,patient-7

Filename is the path below the folder of images, with its suffix. Points are in px: x to the right,
y down, (0, 0) at the centre of the top left pixel. AoP (degrees), split (train, val or test) and
group (a patient or examination, which a split keeps together) may be missing.

It writes the table, a contact sheet, and the names of unusable files with reasons in OUTPUT's
.skipped.csv. Landmarks from masks are not an expert's clicks: PS1 and PS2 are the ends of the
ellipse fitted to the symphysis, and FH1 is where the tangent from PS1 touches the ellipse fitted to
the head. Images that look alike get one group, unless patients or the table give the groups.

Next, look at the contact sheet, then train: python -m training.fit --data cases.csv ...

Exit status: 0 a table was written, 1 no case could be made, 2 an option is wrong.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
from tqdm import tqdm

from model.anatomy import LANDMARKS, angle_of_progression
from model.images.source import ImageError
from model.masks import MaskError, landmarks_from_mask
from training.data.case_table import SPLITS, Case, read_table, write_cases, write_csv
from training.data.near_duplicates import (
    DUPLICATE_CORRELATION,
    Thumbnail,
    near_duplicate_groups,
    split_by_group,
    thumbnail,
)
from training.data.sources import (
    CaseSource,
    Skipped,
    UnusableInput,
    iugc_sources,
    mask_sources,
    name_without_suffix,
    note_skipped,
    read_mask,
    read_single_frame,
)
from training.evaluation.pictures import label_sheet


@dataclass(frozen=True)
class PrepareOptions:
    """The command line: either `iugc`, or `images` and `masks`.

    Args:
        patients: table of Filename and the column that names the patient.
        split: shares of train, val and test.
        splits: table of Filename, split, device and group.
        duplicate_correlation: of thumbnails, from which on images share a group.
        contact_sheet: None: beside the output.
    """

    images: Path | None
    masks: Path | None
    iugc: Path | None
    output: Path
    patients: Path | None
    patient_column: str | None
    split: Sequence[float] | None
    splits: Path | None
    seed: int
    duplicate_correlation: float
    contact_sheet: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = _parser()
    options = PrepareOptions(**vars(parser.parse_args(arguments)))
    from_masks = (options.images is not None, options.masks is not None)
    if from_masks not in ((True, True), (False, False)) or from_masks[0] == bool(options.iugc):
        parser.error("expected --images and --masks, or --iugc")
    if (options.patients is None) != (options.patient_column is None):
        parser.error("--patients and --patient-column belong together")
    if options.splits and (options.split or options.patients):
        parser.error("--splits gives split and group: leave out --split and --patients")
    try:
        if options.split:
            split_by_group([], options.split)  # refuses wrong shares before the work, not after it
        prepare(options)
    except ValueError as error:
        print(f"nothing was written: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(options: PrepareOptions) -> None:
    """Write the case table, the list of skipped files and the contact sheet.

    Raises:
        ValueError: no case could be made, or a folder or table cannot be used.
    """
    for folder in (options.iugc, options.images, options.masks):
        if folder is not None and not folder.is_dir():
            raise UnusableInput(f"{folder} is not a folder")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    skipped: Skipped = []
    if options.images is not None and options.masks is not None:
        sources = list(mask_sources(options.images, options.masks, skipped))
    else:
        assert options.iugc is not None
        sources = list(iugc_sources(options.iugc, skipped))
    derived = derive_cases(sources, skipped)
    cases = group_cases(derived, options, skipped)
    write_skipped(options.output.with_name(options.output.stem + ".skipped.csv"), skipped)
    if not cases:
        first = f"; the first: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise UnusableInput(f"no case could be derived from {len(skipped)} files{first}")
    if options.split:
        splits = split_by_group([case.group for case in cases], options.split, options.seed)
        cases = [replace(case, split=split) for case, split in zip(cases, splits, strict=True)]
    write_cases(options.output, cases)
    print_summary(cases, skipped, options.output)
    sheet = options.contact_sheet or options.output.with_name(
        options.output.stem + ".contact-sheet.png"
    )
    sheet.parent.mkdir(parents=True, exist_ok=True)
    sources_by_file = {source.file: source for source in sources}
    if not cv2.imwrite(str(sheet), label_sheet(cases, sources_by_file)):
        raise UnusableInput(f"the contact sheet cannot be written to {sheet}")
    print(f"look at {sheet} before you train")


def derive_cases(sources: Sequence[CaseSource], skipped: Skipped) -> list[tuple[Case, Thumbnail]]:
    """The cases that can be made, each with the thumbnail of its image.

    Args:
        skipped: gets the sources that give no case.
    """
    derived = []
    for source in tqdm(sources, desc="reading", unit="image"):
        try:
            derived.append(derive_case(source))
        except (UnusableInput, ImageError, MaskError) as error:
            note_skipped(skipped, source.file, error)
    return derived


def derive_case(source: CaseSource) -> tuple[Case, Thumbnail]:
    """The case of a source, and its image's thumbnail.

    Raises:
        UnusableInput, ImageError, MaskError: image, mask or landmarks are bad or do not fit.
    """
    frame = read_single_frame(source.image)
    height, width = frame.pixels.shape
    if source.labelled is not None:
        case = source.labelled
        for name, (x, y) in zip(LANDMARKS, case.landmarks_px.tolist(), strict=True):
            if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
                raise UnusableInput(
                    f"{name} of the table, ({x:g}, {y:g}), lies outside the image of "
                    f"{width}x{height} px"
                )
    else:
        assert source.mask is not None
        mask = read_mask(source.mask)
        if mask.shape != (height, width):
            size = f"{mask.shape[1]}x{mask.shape[0]}"
            raise UnusableInput(f"the mask has {size} px, its image {width}x{height}")
        landmarks = landmarks_from_mask(mask)
        aop_deg = float(angle_of_progression(landmarks, frame.geometry.pixel_shape))
        case = Case(source.file, landmarks, aop_deg)
    return case, thumbnail(frame.pixels)


def group_cases(
    derived: Sequence[tuple[Case, Thumbnail]], options: PrepareOptions, skipped: Skipped
) -> list[Case]:
    """The cases with groups: of --splits, --patients, the cases' own table, or look-alikes."""
    if options.splits:
        return assign_splits([case for case, _ in derived], options.splits, skipped)
    if options.patients is not None and options.patient_column is not None:
        cases = [case for case, _ in derived]
        return group_by_patient(cases, options.patients, options.patient_column, skipped)
    if all(case.group for case, _ in derived):
        return [case for case, _ in derived]
    groups = near_duplicate_groups((small for _, small in derived), options.duplicate_correlation)
    return [
        replace(case, group=f"g{group:03d}")
        for (case, _), group in zip(derived, groups, strict=True)
    ]


def assign_splits(cases: Sequence[Case], path: Path, skipped: Skipped) -> list[Case]:
    """The cases that a table names, with its split, device and group."""
    table = read_table(path)
    split, device, group = (table.find_column(name) for name in ("split", "device", "group"))
    file = table.find_column("Filename")
    rows = {
        name_without_suffix(name): row
        for name, (_, row) in zip(table.read_paths(file), table.rows, strict=True)
    }
    assigned = []
    for case in cases:
        row = rows.get(name_without_suffix(case.file))
        if row:
            assigned.append(replace(case, split=row[split], device=row[device], group=row[group]))
        else:
            note_skipped(skipped, case.file, f"{path} does not name it")
    return assigned


def group_by_patient(
    cases: Sequence[Case], path: Path, patient_column: str, skipped: Skipped
) -> list[Case]:
    """The cases for which a table names a patient, who becomes their group."""
    table = read_table(path)
    file, column = table.find_column("Filename"), table.find_column(patient_column)
    patients = {
        name_without_suffix(name): row[column]
        for name, (_, row) in zip(table.read_paths(file), table.rows, strict=True)
    }
    grouped = []
    for case in cases:
        patient = patients.get(name_without_suffix(case.file))
        if patient:
            grouped.append(replace(case, group=patient))
        else:
            note_skipped(skipped, case.file, f"{path} names no {column} for it")
    return grouped


def write_skipped(path: Path, skipped: Skipped) -> None:
    """Write the list of skipped files; if there are none, remove the list of an earlier run."""
    if skipped:
        write_csv(path, ["file", "reason"], skipped)
    else:
        path.unlink(missing_ok=True)


def print_summary(cases: Sequence[Case], skipped: Skipped, output: Path) -> None:
    """Print what was written, how large the groups are, and how the splits came out."""
    sizes = Counter(case.group for case in cases)
    print(f"{len(cases)} cases written to {output}, {len(skipped)} files skipped")
    print(f"{len(sizes)} groups, the largest of {max(sizes.values())} images")
    splits = Counter(case.split for case in cases if case.split)
    for name in SPLITS if splits else ():
        print(f"  {name:5} {splits[name]:6} images  {splits[name] / len(cases):6.1%}")
    spread = [
        group for group in sizes if len({case.split for case in cases if case.group == group}) > 1
    ]
    if spread:
        print(
            f"{len(spread)} groups of look-alike images lie in several of the release's own splits;"
            " --split draws new ones that keep groups together"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--images", type=Path, metavar="DIR", help="folder of images, searched with its subfolders")
    add("--masks", type=Path, metavar="DIR", help="folder of their masks, .png or .mha")
    iugc = "folder of an IUGC 2025 release or of clicks, in place of --images and --masks"
    add("--iugc", type=Path, metavar="DIR", help=iugc)
    add("--output", type=Path, metavar="CSV", required=True, help="case table to write")
    patients = "table of Filename and patient; images of one patient share a group"
    add("--patients", type=Path, metavar="CSV", help=patients)
    column = "column of --patients that names the patient"
    add("--patient-column", metavar="NAME", help=column)
    split = (
        "shares of images, adding up to 1, for a split drawn by group; it replaces a release's own"
    )
    names = ("TRAIN", "VAL", "TEST")
    add("--split", type=float, nargs=3, metavar=names, help=split)
    splits = "table of Filename, split, device and group, which the cases take over"
    add("--splits", type=Path, metavar="CSV", help=splits)
    add("--seed", type=int, default=0, help="random seed for --split (%(default)s)")
    correlation = "correlation of 32x32 thumbnails from which on images share a group (%(default)s)"
    default = DUPLICATE_CORRELATION
    add("--duplicate-correlation", type=float, default=default, metavar="R", help=correlation)
    sheet = "picture of up to 48 cases to look at (default: beside the output)"
    add("--contact-sheet", type=Path, metavar="PNG", help=sheet)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
