"""Case tables: the one reader and writer of the CSV files that hold landmarks.

A case table is a CSV file in UTF-8: commas between the columns, a header line, then one row for
each image, or for each frame of a stack. Its columns, the last five of which may be missing:

    Filename  path of the image below the folder of images, suffix included: site1/0001.png
    PS1       point "(x, y)" in px, with the quotes because of its comma: "(131.5, 82)"
    PS2, FH1  likewise
    AoP       degrees, 0 to 180; an empty cell, or no column: computed from the points
    split     train (trained on), val (chooses the best epoch, and calibrates) or test (measured
              only); an empty cell: not used where a split is asked for
    group     patient or examination, any text; a split that is drawn keeps a group together
    device    ultrasound machine, any text; figures are given for each
    Frame     number of the frame in a stack or clip, from 0

x grows to the right and y downwards. Integers are pixel centres, counted from 0: the top left
pixel's centre is (0, 0), the bottom right one's (width - 1, height - 1). Columns are found whatever
their case, spaces and underscores.

The tables of IUGC 2025 are read too: the training one, and landmarks_data.csv, whose FH1 is called
"AOP Tangency" and whose angles stand in aop_results.csv beside it.
"""

import ast
import csv
import glob
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.anatomy import LANDMARKS, Floats, angle_of_progression

ANGLES_FILE = "aop_results.csv"
SPLITS = ("train", "val", "test")
OPTIONAL = {"split": "split", "device": "device", "group": "group", "frame": "Frame"}
# Of a header in lower-case letters and digits: the usual name, and what else is taken for it.
COLUMNS = {
    "Filename": r"filename|.*(file|image|name).*",
    "PS1": r"ps1",
    "PS2": r"ps2",
    "FH1": r"fh1|.*tangency.*",
    "AoP": r"aop|(?!.*tangency).*(aop|angle).*",
}

SURPLUS = "\0"  # no column's name: where a reader puts the cells beyond the header's

Row = dict[str, str]


class CaseError(ValueError):
    """A case table that cannot be read; the message names file, line, column and value."""


@dataclass(frozen=True, eq=False)
class Case:
    """One image, or one frame of a stack, and its landmarks.

    Args:
        file: the image's path below its folder.
        landmarks_px: (3, 2) float64 in the order of `Landmark`.
        aop_deg: the angle of progression as the table gives it, else computed from the landmarks.
        split: train, val or test. device: the ultrasound machine. group: what a split keeps whole.
        frame: number of the frame of a stack; None for a single image.
    """

    file: str
    landmarks_px: Floats
    aop_deg: float
    split: str | None = None
    device: str | None = None
    group: str | None = None
    frame: int | None = None


@dataclass(frozen=True)
class Table:
    """A CSV file's header and its rows with the line each ends on.

    overfull: the first line with more cells than the header has; the surplus is not in `rows`.
    """

    path: Path
    header: list[str]
    rows: list[tuple[int, Row]]
    overfull: int | None = None

    def find(self, name: str, required: bool = True) -> str:
        """The header of the column that goes by this name; "" if it is missing and may be."""
        plain = {column: _plain(column) for column in self.header}
        pattern = COLUMNS.get(name, re.escape(_plain(name)))
        found = (
            [column for column in self.header if column == name]
            or [column for column in self.header if plain[column] == _plain(name)]
            or [column for column in self.header if re.fullmatch(pattern, plain[column])]
        )
        if len(found) == 1 or not (found or required):
            return found[0] if found else ""
        raise CaseError(
            f"{self.path}: expected one column {name}, found {', '.join(found) or 'none'} among "
            f"{', '.join(self.header)}"
        )


def read_table(path: Path) -> Table:
    """Any CSV file with a header (UTF-8, with or without a byte order mark).

    Raises:
        CaseError: the file cannot be read, or is not a CSV file.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, None, SURPLUS, "", skipinitialspace=True)
            header = [column for column in reader.fieldnames or [] if column]
            read = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise CaseError(f"{path}: the table cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise CaseError(
            f"{path}: expected a CSV file in UTF-8; a spreadsheet program saves one as 'CSV UTF-8'"
        ) from error
    if not header:
        raise CaseError(f"{path}: expected a header line with column names, the file is empty")
    if len(header) == 1 and (other := re.search(r"[;\t|]", header[0])):
        separator = {";": "semicolons", "\t": "tabs", "|": "bars"}[other[0]]
        raise CaseError(f"{path}: expected commas between the columns, found {separator}")
    overfull = [line for line, row in read if any(map(str.strip, row.get(SURPLUS, ())))]
    rows = [(line, {column: row[column].strip() for column in header}) for line, row in read]
    return Table(path, header, rows, overfull[0] if overfull else None)


def read_cases(path: Path | str) -> list[Case]:
    """The cases of a CSV file, or of the one table of landmarks in a folder.

    Raises:
        CaseError: the file, a column or a value is not as expected, or a case is named twice.
    """
    path = Path(path)
    if path.is_dir():
        tables = [table for table in case_tables(path) if table.parent == path]
        if len(tables) != 1:
            raise CaseError(f"{path}: expected one CSV with landmarks, found {len(tables)}")
        path = tables[0]
    table = read_table(path)
    points = {name: table.find(name) for name in LANDMARKS}
    optional = {field: table.find(name, required=False) for field, name in OPTIONAL.items()}
    file, angle = table.find("Filename"), table.find("AoP", required=False)
    if table.overfull:
        raise CaseError(
            f"{path}, line {table.overfull}: the row has more cells than the header; a point is "
            'put in quotes because of its comma: "(x, y)"'
        )
    angles = {} if angle else _angles_beside(path)

    cases: dict[tuple[str, int | None], Case] = {}
    for line, row in table.rows:
        at = f"{path}, line {line}"
        if not row[file]:
            raise CaseError(
                f"{at}, column {file}: expected the name of an image, got an empty cell"
            )
        landmarks = np.array([_point(row[points[name]], at, points[name]) for name in LANDMARKS])
        known = {field: row[column] or None for field, column in optional.items() if column}
        frame = _frame(known.pop("frame", None), at, optional["frame"])
        if known.get("split") not in (None, *SPLITS):
            raise CaseError(
                f"{at}, column {optional['split']}: expected {', '.join(SPLITS)} or an empty cell, "
                f"got {_quoted(row[optional['split']])}"
            )
        written = row[angle] if angle else ""
        aop_deg = _degrees(written, at, angle) if written else angles.get(Path(row[file]).stem)
        if aop_deg is None:
            aop_deg = _computed(landmarks, at)
        if (row[file], frame) in cases:
            raise CaseError(
                f"{at}, column {file}: {_quoted(row[file])} stands in the table twice, expected "
                "one row for each image"
            )
        cases[row[file], frame] = Case(row[file], landmarks, aop_deg, **known, frame=frame)
    return list(cases.values())


def cases_of_split(path: Path, split: str | None) -> list[Case]:
    """The cases of a table that have a split, or all of them.

    Raises:
        CaseError: the table cannot be read, or has no such case.
    """
    cases = read_cases(path)
    chosen = [case for case in cases if split in (None, case.split)]
    if not chosen:
        wanted = f"cases of split '{split}'" if split else "cases"
        raise CaseError(f"{path}: expected {wanted}, the table has {count_splits(cases)}")
    return chosen


def count_splits(cases: Sequence[Case]) -> str:
    """How many cases each split has, in words: "8 of train, 2 of val and 1 of no split"."""
    counts = Counter(case.split or "no split" for case in cases)
    parts = [f"{counts[name]} of {name}" for name in (*SPLITS, "no split") if counts[name]]
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]])) or "no rows"


def require_images(cases: Sequence[Case], images: Path, table: Path) -> None:
    """Refuse a table whose images are not all in their folder.

    Raises:
        CaseError: names the first image that is missing, and what the folder has instead.
    """
    if not images.is_dir():
        raise CaseError(f"{images} is not a folder; expected the folder of the images of {table}")
    missing = [case.file for case in cases if not (images / case.file).is_file()]
    if missing:
        first = images / missing[0]
        alike = sorted(first.parent.glob(glob.escape(Path(first.name).stem) + ".*"))
        there = f", which has {alike[0].name}" if alike else ""
        raise CaseError(
            f"{len(missing)} of the {len(cases)} images of {table} are not in {images}{there}; the "
            f"first is {missing[0]} (Filename is the path below that folder, suffix included)"
        )


def case_tables(folder: Path) -> list[Path]:
    """The CSV files anywhere below a folder that have columns for a file and its landmarks."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() == ".csv" and path.is_file() and _has_landmarks(path)
    ]


def write_cases(path: Path | str, cases: Sequence[Case]) -> None:
    """Write a case table whole or not at all, without optional columns that no case has."""
    known = [field for field in OPTIONAL if any(getattr(c, field) is not None for c in cases)]
    rows = (
        [
            case.file,
            *(f"({round(float(x), 4)}, {round(float(y), 4)})" for x, y in case.landmarks_px),
            f"{case.aop_deg:.4f}",
            *("" if getattr(case, field) is None else getattr(case, field) for field in known),
        ]
        for case in cases
    )
    write_rows(Path(path), [*COLUMNS, *(OPTIONAL[field] for field in known)], rows)


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file so that a reader sees the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows([header, *rows])
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _plain(header: str) -> str:
    return re.sub(r"[^a-z0-9]", "", header.lower())


def _has_landmarks(path: Path) -> bool:
    try:
        table = read_table(path)
        return all(table.find(name) for name in ("Filename", *LANDMARKS))
    except CaseError:
        return False


def _angles_beside(path: Path) -> dict[str, float]:
    """File stem -> degrees from aop_results.csv beside a table, if it is there."""
    beside = [other for other in path.parent.iterdir() if other.name.lower() == ANGLES_FILE]
    if not beside:
        return {}
    table = read_table(beside[0])
    file, angle = table.find("Filename"), table.find("AoP")
    return {
        Path(row[file]).stem: _degrees(row[angle], f"{table.path}, line {line}", angle)
        for line, row in table.rows
    }


def _quoted(cell: str) -> str:
    """A cell's text as a message shows it."""
    text = " ".join(cell.split())
    return f"'{text if len(text) <= 60 else text[:57] + '...'}'" if text else "an empty cell"


def _point(text: str, at: str, column: str) -> tuple[float, float]:
    try:
        x, y = (float(value) for value in ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        x = y = math.nan
    if not (math.isfinite(x) and math.isfinite(y)):
        raise CaseError(
            f'{at}, column {column}: expected a point "(x, y)" in px, such as "(131.5, 82)", got '
            f"{_quoted(text)}"
        )
    return x, y


def _degrees(text: str, at: str, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 180:
        raise CaseError(
            f"{at}, column {column}: expected degrees from 0 to 180, got {_quoted(text)}"
        )
    return value


def _frame(text: str | None, at: str, column: str) -> int | None:
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    raise CaseError(f"{at}, column {column}: expected a frame's number from 0, got {_quoted(text)}")


def _computed(landmarks_px: Floats, at: str) -> float:
    try:
        return float(angle_of_progression(landmarks_px))
    except ValueError as error:
        raise CaseError(f"{at}: {error}; correct the points or give the angle") from error
