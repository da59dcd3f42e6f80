"""Case tables: the one reader and writer of the CSV files that hold landmarks.

Read are our own cases.csv and landmarks.csv (Filename, PS1, PS2, FH1, AoP, and where they have
them split, device, group, Frame) and the tables of IUGC 2025: the training one with the same
columns, and landmarks_data.csv, whose FH1 is called "AOP Tangency" and whose angles stand in
aop_results.csv beside it. Points are "(x, y)" in px, angles in degrees. Columns are found whatever
their case, spaces and underscores.
"""

import ast
import csv
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.anatomy import LANDMARKS, Floats, angle_of_progression

ANGLES_FILE = "aop_results.csv"
OPTIONAL = {"split": "split", "device": "device", "group": "group", "frame": "Frame"}
# Of a header in lower-case letters and digits: the usual name, and what else is taken for it.
COLUMNS = {
    "Filename": r"filename|.*(file|image|name).*",
    "PS1": r"ps1",
    "PS2": r"ps2",
    "FH1": r"fh1|.*tangency.*",
    "AoP": r"aop|(?!.*tangency).*(aop|angle).*",
}

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
        split: train, val or test. device: the ultrasound machine. group: what must not be split.
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
    """A CSV file's header and its rows with the line each ends on."""

    path: Path
    header: list[str]
    rows: list[tuple[int, Row]]

    def find(self, name: str, required: bool = True) -> str:
        """The header of the column that goes by this name; "" where it may be missing."""
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
            f"{self.path}: expected one column {name}, found {found or 'none'} among "
            f"{', '.join(self.header)}"
        )


def read_table(path: Path) -> Table:
    """Any CSV file with a header (UTF-8, with or without a byte order mark)."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restval="")
            header = [column for column in reader.fieldnames or [] if column]
            rows = [(reader.line_num, {c: row[c].strip() for c in header}) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CaseError(f"{path}: cannot be read as a CSV file: {error}") from error
    if not header:
        raise CaseError(f"{path}: expected a header line with column names, the file is empty")
    return Table(path, header, rows)


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
    angles = {} if angle else _angles_beside(path)

    cases: dict[tuple[str, int | None], Case] = {}
    for line, row in table.rows:
        at = f"{path}, line {line}"
        if not row[file]:
            raise CaseError(f"{at}, column {file}: expected the name of an image, got nothing")
        landmarks = np.array([_point(row[points[name]], at, points[name]) for name in LANDMARKS])
        known = {field: row[column] or None for field, column in optional.items() if column}
        frame = _frame(known.pop("frame", None), at, optional["frame"])
        given = row[angle] if angle else ""
        aop_deg = _degrees(given, at, angle) if given else angles.get(Path(row[file]).stem)
        if aop_deg is None:
            aop_deg = _computed(landmarks, at)
        if (row[file], frame) in cases:
            raise CaseError(f"{at}, column {file}: {row[file]!r} stands in the table twice")
        cases[row[file], frame] = Case(row[file], landmarks, aop_deg, **known, frame=frame)
    return list(cases.values())


def case_tables(folder: Path) -> list[Path]:
    """The CSV files anywhere below a folder that have columns for a file and its landmarks."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() == ".csv" and path.is_file() and _has_landmarks(path)
    ]


def write_cases(path: Path | str, cases: Sequence[Case]) -> None:
    """Write cases.csv atomically; an optional column only where some case has a value."""
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
    """File stem -> degrees from aop_results.csv beside a table, where there is one."""
    beside = [other for other in path.parent.iterdir() if other.name.lower() == ANGLES_FILE]
    if not beside:
        return {}
    table = read_table(beside[0])
    file, angle = table.find("Filename"), table.find("AoP")
    return {
        Path(row[file]).stem: _degrees(row[angle], f"{table.path}, line {line}", angle)
        for line, row in table.rows
    }


def _point(text: str, at: str, column: str) -> tuple[float, float]:
    try:
        x, y = (float(value) for value in ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        x = y = math.nan
    if not (math.isfinite(x) and math.isfinite(y)):
        raise CaseError(f'{at}, column {column}: expected a point "(x, y)" in px, got {text!r}')
    return x, y


def _degrees(text: str, at: str, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 180:
        raise CaseError(f"{at}, column {column}: expected degrees from 0 to 180, got {text!r}")
    return value


def _frame(text: str | None, at: str, column: str) -> int | None:
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    raise CaseError(f"{at}, column {column}: expected a frame's number from 0, got {text!r}")


def _computed(landmarks_px: Floats, at: str) -> float:
    try:
        return float(angle_of_progression(landmarks_px))
    except ValueError as error:
        raise CaseError(f"{at}: {error}; correct the points or give the angle") from error
