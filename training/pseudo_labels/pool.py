"""The images that may be pseudo-labelled: every frame of some folders but those to be left out.

Left out are images by their name, and images that look like one of split val or test: near-equal
frames of one examination would carry the answer from there into the training. What looks alike is
one group of `data.near_duplicates`: a chain of near-duplicates counts, over images of the folders
too.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from model.images.source import BadFrame, GreyFrame, ImageError, is_supported_name, open_image
from training.data.case_table import SPLITS, Case, CaseError, read_cases
from training.data.dataset import read_grey
from training.data.near_duplicates import Thumbnail, near_duplicate_groups, thumbnail
from training.data.sources import by_stem, stem_of
from training.pseudo_labels.criteria import Objection


@dataclass(frozen=True)
class Candidate:
    """One image without a label, or one frame of a stack.

    file: the path below the pool's root. name: below its own folder, without suffix.
    """

    path: Path
    file: str
    name: str
    frame: int | None = None


@dataclass(frozen=True)
class Apart:
    """Labelled images that must not be pseudo-labelled, named by table and split.

    look_alikes: leave out what looks like them too, not what has their name alone.
    """

    table: Path
    images: Path
    cases: tuple[Case, ...]
    look_alikes: bool


@dataclass(frozen=True)
class Pool:
    """candidates: files are below `root`. rejected: those left out or unreadable."""

    root: Path
    candidates: tuple[Candidate, ...]
    rejected: tuple[tuple[Candidate, Objection], ...]


def labelled_apart(data: Path, images: Path) -> list[Apart]:
    """The training table's cases: none is labelled again, and nothing like those of val and test.

    Raises:
        CaseError: the table has no cases of split train and val.
    """
    cases = read_cases(data)
    splits = {case.split for case in cases}
    if not {"train", "val"} <= splits:
        raise CaseError(
            f"{data} needs a split column with train and val (fit writes one to RUN/cases.csv): "
            "the teacher's own split, for a new one would leak through the pseudo-labels"
        )
    train = tuple(case for case in cases if case.split == "train")
    other = tuple(case for case in cases if case.split != "train")
    return [Apart(data, images, other, True), Apart(data, images, train, False)]


def excluded(text: str, images: Path) -> Apart:
    """What `--exclude TABLE[:SPLIT,...] IMAGES` names: all of a table's cases, or those splits'."""
    table, _, splits = text.rpartition(":")
    wanted = set(splits.split(","))
    if not table or not wanted <= set(SPLITS):
        table, wanted = text, set()
    cases = tuple(c for c in read_cases(table) if not wanted or c.split in wanted)
    if not cases:
        raise CaseError(f"--exclude {text}: the table has no case of that split")
    return Apart(Path(table), images, cases, True)


def find_pool(folders: Sequence[Path], apart: Sequence[Apart], correlation: float) -> Pool:
    """Every frame of the images below the folders, without those to be kept apart.

    Args:
        correlation: of two thumbnails, from which on they look alike.

    Raises:
        CaseError: no image is left, a folder is missing, or an image to keep apart is unreadable.
    """
    folders = [folder.resolve() for folder in folders]
    root = Path(os.path.commonpath(folders))
    found: list[tuple[Candidate, Thumbnail]] = []
    rejected: list[tuple[Candidate, Objection]] = []
    for each in tqdm(_files(root, folders), "reading", unit="file"):
        for candidate, frame in _frames(each):
            if isinstance(frame, GreyFrame):
                found.append((candidate, thumbnail(frame.pixels)))
            else:
                rejected.append((candidate, ("unreadable", frame)))
    reasons = _like(apart, [small for _, small in found], correlation)
    names = {_name(case.file): one.table for one in apart for case in one.cases}
    kept = []
    for (candidate, _), like in zip(found, reasons, strict=True):
        reason = like
        if candidate.name in names:
            table = names[candidate.name].name
            reason = f"has the name of a labelled image in {table}"
        if reason:
            rejected.append((candidate, ("left out", reason)))
        else:
            kept.append(candidate)
    if not kept:
        first = f"; the first: {rejected[0][0].file}: {rejected[0][1][1]}" if rejected else ""
        raise CaseError(f"no image of {len(rejected)} below {root} may be pseudo-labelled{first}")
    return Pool(root, tuple(kept), tuple(rejected))


def read_candidates(candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, GreyFrame]]:
    """The candidates with their pixels; each file is opened once."""
    for _, group in groupby(candidates, lambda candidate: candidate.path):
        wanted = {candidate.frame: candidate for candidate in group}
        for candidate, frame in _frames(next(iter(wanted.values()))):
            if candidate.frame in wanted and isinstance(frame, GreyFrame):
                yield wanted[candidate.frame], frame


def _files(root: Path, folders: Sequence[Path]) -> list[Candidate]:
    """Every supported file once, in the order of folders and names."""
    found: dict[Path, Candidate] = {}
    for folder in folders:
        if not folder.is_dir():
            raise CaseError(f"--unlabelled {folder} is not a folder")
        paths = [path for same in by_stem(folder, is_supported_name).values() for path in same]
        for path in sorted(paths):
            file = path.relative_to(root).as_posix()
            name = _name(path.relative_to(folder).as_posix())
            found.setdefault(path.resolve(), Candidate(path, file, name))
    return list(found.values())


def _frames(file: Candidate) -> Iterator[tuple[Candidate, GreyFrame | str]]:
    """Each frame of a file, or the reason why it cannot be used."""
    try:
        for frame in open_image(file.path).frames():
            at = Candidate(file.path, file.file, file.name, frame.index)
            yield at, frame.reason if isinstance(frame, BadFrame) else frame
    except ImageError as error:
        yield file, str(error)


def _like(
    apart: Sequence[Apart], thumbnails: Sequence[Thumbnail], correlation: float
) -> list[str | None]:
    """For each thumbnail which image it looks like among those whose look-alikes are left out."""
    labelled = [(one, case) for one in apart if one.look_alikes for case in one.cases]
    smalls = []
    for one, case in tqdm(labelled, "comparing", leave=False):
        try:
            smalls.append(thumbnail(read_grey(one.images / case.file, case.frame)[0]))
        except ImageError as error:
            raise CaseError(
                f"{one.images / case.file}: {error}; what looks like it could not be left out"
            ) from error
    groups = near_duplicate_groups([*smalls, *thumbnails], correlation)
    first: dict[int, str] = {}
    for (one, case), group in zip(labelled, groups, strict=False):
        split = f", split {case.split}" if case.split else ""
        first.setdefault(group, f"looks like {case.file} ({one.table.name}{split})")
    return [first.get(group) for group in groups[len(smalls) :]]


def _name(file: str) -> str:
    path = Path(file)
    return (path.parent / stem_of(path.name)).as_posix()
