"""Case tables: reading and writing the CSV files that hold landmarks.

A case table is a CSV file with a header line, and one row for each image or each frame of a stack.
It is in UTF-8 with commas between the columns, or in a form that Excel writes: semicolons or tabs,
UTF-16 with its mark or Windows-1252, a first line `sep=;`, and empty rows, which are left out. If
semicolons or tabs separate the columns, a number may have a decimal comma: 12,5. The columns are
these; the last five are optional:

    Filename  path of the image below the folder of images, suffix included: site1/0001.png;
              if no path of the table has a slash, backslashes count as slashes
    PS1       point "(x, y)" in px, with the quotes because of its comma: "(131.5, 82)"; with
              decimal commas "(131,5; 82)"
    PS2, FH1  likewise
    AoP       degrees, 0 to 180; computed from the points if the cell or the column is missing
    split     train (trained on), val (chooses the best epoch, and calibrates) or test (measured
              only); a command that asks for a split does not use rows with an empty cell
    group     patient or examination, any text; a split that is drawn keeps a group together
    device    ultrasound machine, any text; an evaluation gives figures for each
    Frame     number of the frame in a stack or clip, from 0

x grows to the right and y downwards. Integers are pixel centres, counted from 0: the top left
pixel's centre is (0, 0), the bottom right one's (width - 1, height - 1). Case, spaces and
underscores in a column's name do not matter.

The tables of IUGC 2025 are read too: its training table, and landmarks_data.csv, which calls FH1
"AOP Tangency" and whose angles are in aop_results.csv beside it.
"""

import ast
import codecs
import csv
import glob
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from model.anatomy import LANDMARKS, Floats, angle_of_progression

ANGLES_FILE = "aop_results.csv"
SPLITS = ("train", "val", "test")
OPTIONAL_COLUMNS = {"split": "split", "device": "device", "group": "group", "frame": "Frame"}
# A column's name -> what its header may look like, reduced to lower-case letters and digits.
COLUMN_PATTERNS = {
    "Filename": r"filename|.*(file|image|name).*",
    "PS1": r"ps1",
    "PS2": r"ps2",
    "FH1": r"fh1|.*tangency.*",
    "AoP": r"aop|(?!.*tangency).*(aop|angle).*",
}
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_SEPARATOR_LINE = re.compile(
    r'"?sep=([,;\t])"?[ \t,;]*(?:\r\n?|\n|$)', re.IGNORECASE
)  # Excel's, before the header
_BINARY = re.compile(rb"[\0-\x08\x0e-\x1f]")
_NUMBER = r"[-+]?\d+(?:[.,]\d+)?"
_SEMICOLON_POINT = re.compile(rf"\(?\s*({_NUMBER})\s*;\s*({_NUMBER})\s*\)?")
_DECIMAL_COMMA = re.compile(r"([-+]?\d+),(\d+)")


class CaseError(ValueError):
    """A case table or its images cannot be used; the message says which, where and why."""


@dataclass(frozen=True, eq=False)
class Case:
    """One image, or one frame of a stack, and its landmarks.

    Args:
        file: the image's path below its folder.
        landmarks_px: (3, 2) float64 in the order of `Landmark`.
        aop_deg: the table's angle of progression, or the landmarks' if the table has none.
        split: train, val or test.
        device: the ultrasound machine.
        group: patient or examination, which a split keeps together.
        frame: number of the frame in a stack, from 0; None for a single image.
    """

    file: str
    landmarks_px: Floats
    aop_deg: float
    split: str | None = None
    device: str | None = None
    group: str | None = None
    frame: int | None = None


@dataclass(frozen=True)
class CsvTable:
    """A CSV file's header and rows.

    Args:
        rows: the line on which each row ends, and its cells by column; without empty rows.
        overfull: the first line with more cells than the header; `rows` lacks the surplus.
        decimal_comma: whether a comma may be a decimal comma, since none separates columns.
    """

    path: Path
    header: list[str]
    rows: list[tuple[int, dict[str, str]]]
    overfull: int | None = None
    decimal_comma: bool = False

    def read_paths(self, column: str) -> list[str]:
        """The paths in a column; Windows' backslashes become slashes if no path has a slash."""
        paths = [row[column] for _, row in self.rows]
        if any("/" in path for path in paths):
            return paths
        return [path[:1] + path[1:].replace("\\", "/") for path in paths]

    def find_column(self, name: str, required: bool = True) -> str:
        """The header of a column by its name in this module; "" if an optional one is missing.

        Raises:
            CaseError: a required column is missing, or several match.
        """
        plain = {column: _plain_name(column) for column in self.header}
        pattern = COLUMN_PATTERNS.get(name, re.escape(_plain_name(name)))
        matches = (
            [column for column in self.header if column == name]
            or [column for column in self.header if plain[column] == _plain_name(name)]
            or [column for column in self.header if re.fullmatch(pattern, plain[column])]
        )
        if len(matches) == 1 or not (matches or required):
            return matches[0] if matches else ""
        raise CaseError(
            f"{self.path}: expected one column {name}, found {', '.join(matches) or 'none'} among "
            f"{', '.join(self.header)}"
        )


def read_table(path: Path) -> CsvTable:
    """Read any CSV file with a header, in any form that this module's docstring names.

    Raises:
        CaseError: the file cannot be read, is empty, or is not a CSV file.
    """
    try:
        text = _decode_table(path.read_bytes())
        named = _SEPARATOR_LINE.match(text)
        text = text[named.end() :] if named else text
        separator = named[1] if named else _find_separator(path, text)
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True
        )
        lines = [(reader.line_num + bool(named), [*map(str.strip, cells)]) for cells in reader]
    except OSError as error:
        raise CaseError(f"{path}: the table cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise CaseError(
            f"{path}: expected a CSV file in UTF-8; a spreadsheet program saves one as 'CSV UTF-8'"
        ) from error
    filled = [(line, cells) for line, cells in lines if any(cells)]
    if not filled:
        raise CaseError(f"{path}: expected a header line with column names, the file is empty")
    (_, columns), *body = filled
    header = [column for column in columns if column]
    if len(header) == 1 and "|" in header[0]:
        raise CaseError(f"{path}: expected commas between the columns, found bars")
    overfull = [line for line, cells in body if any(cells[len(columns) :])]
    rows = [
        (
            line,
            {
                name: cell
                for name, cell in zip_longest(columns, cells[: len(columns)], fillvalue="")
                if name
            },
        )
        for line, cells in body
    ]
    first_overfull = overfull[0] if overfull else None
    return CsvTable(path, header, rows, first_overfull, decimal_comma=separator != ",")


def _decode_table(data: bytes) -> str:
    """The text of a file in UTF-8, in UTF-16 with its mark, or else in Windows-1252."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        if _BINARY.search(data):
            raise
        return data.decode("cp1252")
    if "\0" in text:
        raise csv.Error("UTF-16 without its mark, or no text")
    return text


def _find_separator(path: Path, text: str) -> str:
    """What separates the columns: the most frequent one in the header, outside quotes.

    Raises:
        CaseError: two are equally frequent.
    """
    number, header = next(
        ((k, line) for k, line in enumerate(text.splitlines(), 1) if line.strip("\t ,;")), (1, "")
    )
    bare = _QUOTED.sub("", header)
    counts = {separator: bare.count(separator) for separator in SEPARATORS}
    most = [separator for separator in SEPARATORS if counts[separator] == max(counts.values())]
    if bare and len(most) > 1 and max(counts.values()):
        names = " as ".join(SEPARATORS[separator] for separator in most)
        raise CaseError(
            f"{path}, line {number}: expected commas, semicolons or tabs between the columns, "
            f"found as many {names}; put names that contain one in quotes"
        )
    return most[0]


def read_cases(path: Path | str) -> list[Case]:
    """Read a case table, or the one case table in a folder.

    Raises:
        CaseError: a file, column or value is not as expected, or the table names a case twice.
    """
    path = Path(path)
    if path.is_dir():
        tables = [table for table in find_case_tables(path) if table.parent == path]
        if len(tables) != 1:
            raise CaseError(f"{path}: expected one CSV with landmarks, found {len(tables)}")
        path = tables[0]
    table = read_table(path)
    points = {name: table.find_column(name) for name in LANDMARKS}
    optional = {
        field: table.find_column(name, required=False) for field, name in OPTIONAL_COLUMNS.items()
    }
    file, angle = table.find_column("Filename"), table.find_column("AoP", required=False)
    if table.overfull:
        raise CaseError(
            f"{path}, line {table.overfull}: the row has more cells than the header; a point is "
            'put in quotes because of its comma: "(x, y)"'
            + (', with decimal commas "(x; y)"' if table.decimal_comma else "")
        )
    angles = {} if angle else _angles_beside(path)

    cases: dict[tuple[str, int | None], Case] = {}
    for name, (line, row) in zip(table.read_paths(file), table.rows, strict=True):
        where = f"{path}, line {line}"
        if not name:
            raise CaseError(
                f"{where}, column {file}: expected the name of an image, got an empty cell"
            )
        landmarks = np.array(
            [
                _parse_point(row[points[landmark]], where, points[landmark], table.decimal_comma)
                for landmark in LANDMARKS
            ]
        )
        known = {field: row[column] or None for field, column in optional.items() if column}
        frame = _parse_frame(known.pop("frame", None), where, optional["frame"])
        if known.get("split") not in (None, *SPLITS):
            raise CaseError(
                f"{where}, column {optional['split']}: expected {', '.join(SPLITS)} or an empty "
                f"cell, got {_quote_cell(row[optional['split']])}"
            )
        if angle and row[angle]:
            aop_deg = _parse_degrees(row[angle], where, angle, table.decimal_comma)
        else:
            beside = angles.get(Path(name).stem)
            aop_deg = _compute_angle(landmarks, where) if beside is None else beside
        if (name, frame) in cases:
            raise CaseError(
                f"{where}, column {file}: {_quote_cell(name)} is in the table twice; "
                "expected one row for each image"
            )
        cases[name, frame] = Case(name, landmarks, aop_deg, **known, frame=frame)
    return list(cases.values())


def cases_of_split(path: Path, split: str | None) -> list[Case]:
    """Read a table's cases of one split, or all of them if `split` is None.

    Raises:
        CaseError: the table cannot be read, or no case is in this split.
    """
    cases = read_cases(path)
    chosen = [case for case in cases if split in (None, case.split)]
    if not chosen:
        wanted = f"cases of split '{split}'" if split else "cases"
        raise CaseError(f"{path}: expected {wanted}, the table has {count_splits(cases)}")
    return chosen


def count_splits(cases: Sequence[Case]) -> str:
    """The number of cases in each split, as "8 of train, 2 of val and 1 of no split"."""
    counts = Counter(case.split or "no split" for case in cases)
    parts = [f"{counts[name]} of {name}" for name in (*SPLITS, "no split") if counts[name]]
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]])) or "no rows"


def require_images(cases: Sequence[Case], images: Path, table: Path) -> None:
    """Check that a table's images are in their folder.

    Raises:
        CaseError: names the first missing image, and a file of its name with another suffix.
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


def find_case_tables(folder: Path) -> list[Path]:
    """Every CSV file below a folder that has columns for the image and all landmarks."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() == ".csv" and path.is_file() and _has_landmarks(path)
    ]


def write_cases(path: Path | str, cases: Sequence[Case]) -> None:
    """Write a case table whole or not at all; an optional column that no case fills is left out."""
    known = [
        field for field in OPTIONAL_COLUMNS if any(getattr(c, field) is not None for c in cases)
    ]
    rows = (
        [
            case.file,
            *(f"({round(float(x), 4)}, {round(float(y), 4)})" for x, y in case.landmarks_px),
            f"{case.aop_deg:.4f}",
            *("" if getattr(case, field) is None else getattr(case, field) for field in known),
        ]
        for case in cases
    )
    write_csv(Path(path), [*COLUMN_PATTERNS, *(OPTIONAL_COLUMNS[field] for field in known)], rows)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file so that a reader sees the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows([header, *rows])
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _plain_name(header: str) -> str:
    return re.sub(r"[^a-z0-9]", "", header.lower())


def _has_landmarks(path: Path) -> bool:
    try:
        table = read_table(path)
        return all(table.find_column(name) for name in ("Filename", *LANDMARKS))
    except CaseError:
        return False


def _angles_beside(path: Path) -> dict[str, float]:
    """File stem -> degrees, from aop_results.csv beside a table; empty without that file."""
    beside = [other for other in path.parent.iterdir() if other.name.lower() == ANGLES_FILE]
    if not beside:
        return {}
    table = read_table(beside[0])
    file, angle = table.find_column("Filename"), table.find_column("AoP")
    return {
        Path(name).stem: _parse_degrees(
            row[angle], f"{table.path}, line {line}", angle, table.decimal_comma
        )
        for name, (line, row) in zip(table.read_paths(file), table.rows, strict=True)
    }


def _quote_cell(cell: str) -> str:
    """A cell's text for a message, on one line and at most 60 characters long."""
    text = " ".join(cell.split())
    return f"'{text if len(text) <= 60 else text[:57] + '...'}'" if text else "an empty cell"


def _parse_point(
    text: str, where: str, column: str, decimal_comma: bool = False
) -> tuple[float, float]:
    """A point "(x, y)" or, with decimal commas or without, "(x; y)"."""
    pair = _SEMICOLON_POINT.fullmatch(text)
    try:
        if pair and (decimal_comma or "," not in text):
            x, y = (float(value.replace(",", ".")) for value in pair.groups())
        else:
            x, y = (float(value) for value in ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        x = y = math.nan
    if not (math.isfinite(x) and math.isfinite(y)):
        raise CaseError(
            f'{where}, column {column}: expected a point "(x, y)" in px, such as "(131.5, 82)", '
            f"got {_quote_cell(text)}"
        )
    return x, y


def _parse_degrees(text: str, where: str, column: str, decimal_comma: bool = False) -> float:
    try:
        value = float(_DECIMAL_COMMA.sub(r"\1.\2", text) if decimal_comma else text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 180:
        raise CaseError(
            f"{where}, column {column}: expected degrees from 0 to 180, got {_quote_cell(text)}"
        )
    return value


def _parse_frame(text: str | None, where: str, column: str) -> int | None:
    if text is None:
        return None
    if text.isdecimal():
        return int(text)
    raise CaseError(
        f"{where}, column {column}: expected a frame's number from 0, got {_quote_cell(text)}"
    )


def _compute_angle(landmarks_px: Floats, where: str) -> float:
    try:
        return float(angle_of_progression(landmarks_px))
    except ValueError as error:
        raise CaseError(f"{where}: {error}; correct the points or give the angle") from error
