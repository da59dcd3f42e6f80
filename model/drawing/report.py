"""report.html: a run's cases sorted by doubt, whose landmarks a person can check and correct.

It stands in the output folder and shows the pictures of the cases beside it. It is made from
results.json, an entry at a time, and needs no server: corrections stay in the browser until they
are saved as a table like landmarks.csv, with a column that says which cases were corrected. Such a
table can be loaded again.
"""

import hashlib
import html
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple
from urllib.parse import quote

from model.anatomy import LANDMARKS
from model.drawing import overlay
from model.drawing.page import around, escape
from model.drawing.text import shown_confidence
from model.results.files import PICTURE, SHEET, RunFiles, read_entry, read_summary, write_chunks
from model.results.schemas import CaseEntry, Loop, RunSummary, table_lines

TITLE = "Angle of progression: report"
OPEN = 10  # that many failures or loops are listed at once, more of them behind a click
COLOURS = {name: "#{2:02x}{1:02x}{0:02x}".format(*bgr) for name, bgr in overlay.COLOURS.items()}

HERE = Path(__file__)
STYLE = "".join(f".{name} {{ stroke: {c}; color: {c}; }}\n" for name, c in COLOURS.items())
STYLE += HERE.with_suffix(".css").read_text("utf-8")
SCRIPT = HERE.with_suffix(".js").read_text("utf-8")

EDITOR = f"""
<dialog id="editor" aria-labelledby="name"><div class="editor">
<div class="stage"><svg id="stage"><g id="drawing"></g></svg>
<svg id="loupe" aria-hidden="true"><use href="#drawing"/><path class="cross"/></svg></div>
<div class="panel"><h3><bdi id="name"></bdi></h3>
<p>AoP <output id="angle" class="angle"></output><span id="mark" class="mark good"></span></p>
<div class="buttons"><button id="previous">Previous</button><button id="next">Next</button>
<button id="reset">Undo correction</button><button id="close">Close</button></div>
<div id="said"></div>
<table>{
    "".join(
        f'<tr><td><span class="dot {name}"></span>{name}</td>'
        f'<td class="number" id="at-{name}"></td></tr>'
        for name in LANDMARKS
    )
}</table>
<p class="small dim">Drag a ring to correct its landmark.<span class="keys"> Or
<kbd>Tab</kbd> to it and move it with the arrow keys (1 px, with <kbd>Shift</kbd> 10 px);
<kbd>Page Down</kbd> and <kbd>Page Up</kbd> turn to the next and the previous case.</span></p>
<p id="place" class="small dim"></p></div></div></dialog>
"""

CONTROLS = """
<p>Sorted by doubt: marked cases first, then the largest expected error or the lowest confidence.
Click a picture to look closely and, where the model is wrong, to drag its landmarks. Corrections
loaded from a saved table take the place of those made here.</p>
<p id="notice" class="doubt" role="status"></p>
<div id="controls" class="controls" hidden><input id="filter" type="search"
placeholder="Filter by name or reason" aria-label="Filter by name or reason">
<select id="which" aria-label="Which cases"><option value="*">all</option>
<option value=".doubtful">doubtful</option><option value=".sure">not doubtful</option>
<option value=".corrected">corrected</option><option value=".failed">failed</option></select>
<span id="shown" class="dim" role="status"></span>
<button id="save" disabled>Save corrections as CSV</button>
<button id="pick">Load corrections</button>
<input id="load" type="file" accept=".csv" aria-label="Load corrections" hidden></div>
<noscript><p class="note">Without JavaScript the pictures stand here without lines; overlay.png
in the folder of each case has them.</p></noscript>
"""


class _Place(NamedTuple):
    """An entry of results.json: what it is sorted by, its byte offset, its row in the table."""

    key: tuple[bool, float, float]
    offset: int
    row: int


def write_report(folder: Path, names: RunFiles, is_job: bool = False) -> None:
    """Write the page of a run whose results and table are there.

    Args:
        folder: the output folder.
        names: of the run's files in it.
        is_job: the run's one case has its files at the top of the folder.

    Raises:
        OSError: a file cannot be read or written.
    """
    with (folder / names.results).open("rb") as file:
        write_chunks(
            folder / names.report,
            (text.encode() for text in _pieces(file, folder, names, is_job)),
        )


def _pieces(file: IO[bytes], folder: Path, names: RunFiles, is_job: bool) -> Iterator[str]:
    """The page, an entry at a time: what is kept in memory of a case is its place in the file."""
    summary = read_summary(file)
    answered, failed, stacks = _places(file)
    loops = [_loop(loop, folder, is_job) for loop in _loops(file)]
    before, after = around(TITLE, SCRIPT if answered else "", STYLE)
    yield before
    yield from _head(summary, names)
    yield from _failures(file, summary, failed)
    yield from _listed("loop" if len(loops) == 1 else "loops", len(loops), loops)
    if answered:
        yield CONTROLS
        header = next(table_lines([], stacks)).rstrip("\n")
        with (folder / names.table).open("rb") as table:
            digest = hashlib.file_digest(table, "sha256").hexdigest()
        saved = names.table.replace(".csv", "-corrected.csv")
        yield (
            f'<div id="cases" class="cards" data-header="{header}" data-table="{saved}" '
            f'data-digest="{digest}">\n'
        )
        for place in sorted(answered):
            entry = _entry_at(file, place.offset)
            yield _card(entry, place.row, stacks, _picture(entry, folder, is_job))
        yield "</div>" + EDITOR
    yield after


def _places(file: IO[bytes]) -> tuple[list[_Place], list[int], bool]:
    """Of the answered entries; the offsets of the failed ones; whether there are stacks."""
    answered: list[_Place] = []
    failed: list[int] = []
    stacks = False
    offset = file.tell()
    while entry := read_entry(file):
        if entry.status == "ok":
            answered.append(_Place(doubt_key(entry), offset, len(answered)))
            stacks = stacks or entry.frame is not None
        else:
            failed.append(offset)
        offset = file.tell()
    return answered, failed, stacks


def _loops(file: IO[bytes]) -> Iterator[Loop]:
    """The loops of a results.json that stands behind its last entry."""
    file.readline()  # "loops": [
    while (line := file.readline().strip().removesuffix(b",")) != b"]":
        yield Loop.model_validate_json(line)


def doubt_key(entry: CaseEntry) -> tuple[bool, float, float]:
    """Sorts the most doubtful first: marked ones, then by expected error, or by confidence."""
    assert entry.confidence  # it is answered
    expected = entry.expected_aop_error_deg
    return not entry.doubtful, -(expected or 0.0), min(entry.confidence.values())


def _entry_at(file: IO[bytes], offset: int) -> CaseEntry:
    file.seek(offset)
    entry = read_entry(file)
    assert entry is not None  # it was there a moment ago
    return entry


def _picture(entry: CaseEntry, folder: Path, is_job: bool) -> str | None:
    """The URL of an entry's picture, relative to the page; None where there is none."""
    path = PurePosixPath("" if is_job else entry.case)
    if entry.frame is not None:
        path /= f"frame-{entry.frame:04d}"
    return _url(folder, path / PICTURE)


def _url(folder: Path, path: PurePosixPath) -> str | None:
    return quote(str(path)) if (folder / path).is_file() else None


def _head(summary: RunSummary, names: RunFiles) -> Iterator[str]:
    """What the run was, and what came of it."""
    part = f", part {escape(summary.shard)}" if summary.shard else ""
    yield (
        f"<p>Model {escape(summary.model)} ({escape(summary.model_file)}) on "
        f"{escape(summary.provider)}{part}. Files of this run: "
        f'<a href="{quote(names.table)}">{names.table}</a>, '
        f'<a href="{quote(names.results)}">{names.results}</a>.</p>\n<dl class="figures">'
    )
    for words, count, style in (
        ("Answered", summary.answered, ""),
        ("Doubtful", summary.doubtful, "doubt" if summary.doubtful else ""),
        ("Failed", summary.failed, "bad" if summary.failed else ""),
    ):
        yield f'<div><dt>{words}</dt><dd class="{style}">{count}</dd></div>'
    yield '<div><dt>Corrected</dt><dd id="count" class="good">0</dd></div></dl>\n'


def _failures(file: IO[bytes], summary: RunSummary, failed: list[int]) -> Iterator[str]:
    """The cases without an answer, and what merged parts lack."""
    for words, count, items in (
        ("failed", len(failed), (_failure(_entry_at(file, offset)) for offset in failed)),
        ("missing", len(summary.missing), (f"<bdi>{escape(m)}</bdi>" for m in summary.missing)),
    ):
        yield from _listed(
            words, count, (f'<li class="case failed">{item}</li>\n' for item in items), "bad"
        )


def _listed(words: str, count: int, items: Iterable[str], style: str = "") -> Iterator[str]:
    """List items under their number, if there are any; closed where they are many."""
    if count:
        state = " open" if count <= OPEN else ""
        yield f'<details{state}><summary class="{style}">{count} {words}</summary><ul>\n'
        yield from items
        yield "</ul></details>\n"


def _failure(entry: CaseEntry) -> str:
    return f"<b><bdi>{_label(entry)}</bdi></b>: {escape(entry.error or '')}"


def _loop(loop: Loop, folder: Path, is_job: bool) -> str:
    """What results.json says of a loop, in a line, and its contact sheet where there is one."""
    angles = [angle for angle in loop.aop_deg if angle is not None]
    words, style = f"none of {loop.frames} frames answered", "failed"
    if angles:
        words = (
            f"AoP {min(angles):.1f} to {max(angles):.1f}°, median {loop.median_aop_deg:.1f}° "
            f"(frame {loop.median_frame}), most confident frame {loop.most_confident_frame}; "
            f"{loop.answered} of {loop.frames} frames answered, {loop.doubtful_frames} doubtful"
        )
        style = "doubtful" if loop.doubtful_frames else "sure"
    url = _url(folder, PurePosixPath("" if is_job else loop.case) / SHEET)
    sheet = f'; <a href="{url}">contact sheet</a>' if url else ""
    return f'<li class="case {style}"><b><bdi>{escape(loop.file)}</bdi></b>: {words}{sheet}</li>\n'


def _label(entry: CaseEntry) -> str:
    return escape(entry.file) + ("" if entry.frame is None else f", frame {entry.frame}")


def _card(entry: CaseEntry, row: int, stacks: bool, url: str | None) -> str:
    """One answered case; the script draws its lines and reads what else it needs in data-case."""
    assert entry.aop_deg is not None and entry.confidence  # it is answered
    data = {
        "row": list(table_lines([entry], stacks))[1].removesuffix("\n"),
        "at": row,
        "size": (entry.width, entry.height),
        "pixel": entry.spacing_mm or (1, 1),
    }
    label = _label(entry)
    return (
        f'<article class="card case {"doubtful" if entry.doubtful else "sure"}" '
        f'data-case="{html.escape(json.dumps(data))}">{_shown(label, url)}\n'
        f"<h3><bdi>{label}</bdi></h3>\n"
        f'<p>AoP <span class="angle">{entry.aop_deg:.1f}°</span><span class="mark good"></span></p>'
        f'<p class="was told small"></p>\n{"".join(_words(entry))}</article>\n'
    )


def _shown(label: str, url: str | None) -> str:
    if url is None:
        return '<div class="picture none">no picture: run the case again with --report</div>'
    return (
        f'<button class="picture" aria-label="Check and correct {label}">'
        f'<img src="{url}" alt="" loading="lazy" decoding="async"><svg aria-hidden="true"></svg>'
        "</button>"
    )


def _words(entry: CaseEntry) -> Iterator[str]:
    """What is known of a case beside its angle."""
    assert entry.confidence  # it is answered
    if entry.reasons:
        reasons = "; ".join(map(escape, entry.reasons))
        yield f'<p class="told doubt small"><b>Not sure:</b> {reasons}.</p>\n'
    if entry.aop_interval_deg:
        low, high = entry.aop_interval_deg
        expected = entry.expected_aop_error_deg
        error = "" if expected is None else f", expected error {expected:.1f}°"
        yield '<p class="told small">The model\'s 90 % interval '
        yield f"{low:.0f} to {high:.0f}°{error}.</p>\n"
    shown = {name: shown_confidence(value) for name, value in entry.confidence.items()}
    sure = ", ".join(f"{name} {value}" for name, value in shown.items())
    yield f'<p class="told small dim">Confidence {sure}.</p>\n'
    for warning in entry.warnings:
        yield f'<p class="told small dim">{escape(warning)}</p>\n'
