"""The images that may be pseudo-labelled: every frame of some folders, without those left out.

Two kinds of images are left out: those with the name of a labelled image, and those that look like
a labelled image of split val or test. Nearly equal frames of one examination would carry the answer
from there into training. "Look alike" means one group of `data.near_duplicates`: a chain of
near-duplicates counts, and images of the folders can be links of the chain.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from model.images.source import BadFrame, GreyFrame, ImageError, is_supported_name, open_image
from training.data.case_table import SPLITS, Case, CaseError, read_cases
from training.data.dataset import read_frame
from training.data.near_duplicates import Thumbnail, near_duplicate_groups, thumbnail
from training.data.sources import files_by_name, name_without_suffix
from training.pseudo_labels.criteria import Objection


@dataclass(frozen=True)
class Candidate:
    """One image without a label, or one frame of a stack.

    file: path below the pool's root. name: path below its own folder, without suffix.
    """

    path: Path
    file: str
    name: str
    frame: int | None = None


@dataclass(frozen=True)
class Exclusion:
    """Labelled images that must not be pseudo-labelled.

    table: where the cases stand. images: folder of their images. look_alikes: whether images that
    look like them are left out too, or only images with their name.
    """

    table: Path
    images: Path
    cases: tuple[Case, ...]
    look_alikes: bool


@dataclass(frozen=True)
class Pool:
    """The candidates below `root`, and the images left out or unreadable, with the reason."""

    root: Path
    candidates: tuple[Candidate, ...]
    rejected: tuple[tuple[Candidate, Objection], ...]


def exclusions_of_training_table(data: Path, images: Path) -> list[Exclusion]:
    """Exclude the cases of the training table, and look-alikes of those that do not train.

    Raises:
        CaseError: the table has no cases of split train or val.
    """
    cases = read_cases(data)
    splits = {case.split for case in cases}
    if not {"train", "val"} <= splits:
        raise CaseError(
            f"{data} needs a split column with train and val: pass the table of the teacher's own "
            "split (fit writes it to RUN/cases.csv), because a new split would leak through the "
            "pseudo-labels"
        )
    train = tuple(case for case in cases if case.split == "train")
    other = tuple(case for case in cases if case.split != "train")
    return [
        Exclusion(data, images, other, look_alikes=True),
        Exclusion(data, images, train, look_alikes=False),
    ]


def parse_exclusion(text: str, images: Path) -> Exclusion:
    """Exclude what `--exclude TABLE[:SPLIT,...] IMAGES` names: a table's cases, or some splits.

    Raises:
        CaseError: the table cannot be used, or no case is in these splits.
    """
    table, _, splits = text.rpartition(":")
    wanted = set(splits.split(","))
    if not table or not wanted <= set(SPLITS):
        table, wanted = text, set()
    cases = tuple(c for c in read_cases(table) if not wanted or c.split in wanted)
    if not cases:
        raise CaseError(f"--exclude {text}: the table has no case of that split")
    return Exclusion(Path(table), images, cases, look_alikes=True)


def find_pool(folders: Sequence[Path], exclusions: Sequence[Exclusion], correlation: float) -> Pool:
    """Every frame of the images below the folders that no exclusion leaves out.

    Args:
        correlation: two thumbnails look alike if they correlate at least by this.

    Raises:
        CaseError: a folder is missing, no image is left, or an excluded image cannot be read.
    """
    folders = [folder.resolve() for folder in folders]
    root = Path(os.path.commonpath(folders))
    readable: list[tuple[Candidate, Thumbnail]] = []
    rejected: list[tuple[Candidate, Objection]] = []
    for file in tqdm(_list_files(root, folders), "reading", unit="file"):
        for candidate, frame in _frames_of_file(file):
            if isinstance(frame, GreyFrame):
                readable.append((candidate, thumbnail(frame.pixels)))
            else:
                rejected.append((candidate, ("unreadable", frame)))
    look_alikes = _find_look_alikes(exclusions, [small for _, small in readable], correlation)
    tables = {
        _name_without_suffix(case.file): exclusion.table
        for exclusion in exclusions
        for case in exclusion.cases
    }
    candidates = []
    for (candidate, _), look_alike in zip(readable, look_alikes, strict=True):
        reason = look_alike
        if candidate.name in tables:
            reason = f"has the name of a labelled image in {tables[candidate.name].name}"
        if reason:
            rejected.append((candidate, ("left out", reason)))
        else:
            candidates.append(candidate)
    if not candidates:
        first = f"; the first: {rejected[0][0].file}: {rejected[0][1][1]}" if rejected else ""
        raise CaseError(f"no image of {len(rejected)} below {root} may be pseudo-labelled{first}")
    return Pool(root, tuple(candidates), tuple(rejected))


def read_candidates(candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, GreyFrame]]:
    """The candidates with their pixels; each file is opened once."""
    for _, group in groupby(candidates, lambda candidate: candidate.path):
        wanted = {candidate.frame: candidate for candidate in group}
        for candidate, frame in _frames_of_file(next(iter(wanted.values()))):
            if candidate.frame in wanted and isinstance(frame, GreyFrame):
                yield wanted[candidate.frame], frame


def _list_files(root: Path, folders: Sequence[Path]) -> list[Candidate]:
    """Every supported file once, in the order of folders and names; CaseError for a non-folder."""
    files: dict[Path, Candidate] = {}  # by the path without links
    for folder in folders:
        if not folder.is_dir():
            raise CaseError(f"--unlabelled {folder} is not a folder")
        paths = [
            path for same in files_by_name(folder, is_supported_name).values() for path in same
        ]
        for path in sorted(paths):
            file = path.relative_to(root).as_posix()
            name = _name_without_suffix(path.relative_to(folder).as_posix())
            files.setdefault(path.resolve(), Candidate(path, file, name))
    return list(files.values())


def _frames_of_file(file: Candidate) -> Iterator[tuple[Candidate, GreyFrame | str]]:
    """Each frame of a file, or the reason why it cannot be read."""
    try:
        for frame in open_image(file.path).frames():
            candidate = Candidate(file.path, file.file, file.name, frame.index)
            yield candidate, frame.reason if isinstance(frame, BadFrame) else frame
    except ImageError as error:
        yield file, str(error)


def _find_look_alikes(
    exclusions: Sequence[Exclusion], thumbnails: Sequence[Thumbnail], correlation: float
) -> list[str | None]:
    """For each thumbnail, the excluded image that it looks like, in words; None if there is none.

    Raises:
        CaseError: an excluded image cannot be read.
    """
    labelled = [
        (exclusion, case)
        for exclusion in exclusions
        if exclusion.look_alikes
        for case in exclusion.cases
    ]
    labelled_thumbnails = []
    for exclusion, case in tqdm(labelled, "comparing", leave=False):
        path = exclusion.images / case.file
        try:
            labelled_thumbnails.append(thumbnail(read_frame(path, case.frame)[0]))
        except ImageError as error:
            raise CaseError(
                f"{path}: {error}; images that look like it could not be left out"
            ) from error
    groups = near_duplicate_groups([*labelled_thumbnails, *thumbnails], correlation)
    reasons: dict[int, str] = {}
    for (exclusion, case), group in zip(labelled, groups, strict=False):
        split = f", split {case.split}" if case.split else ""
        reasons.setdefault(group, f"looks like {case.file} ({exclusion.table.name}{split})")
    return [reasons.get(group) for group in groups[len(labelled) :]]


def _name_without_suffix(file: str) -> str:
    path = Path(file)
    return (path.parent / name_without_suffix(path.name)).as_posix()
