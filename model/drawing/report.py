"""report.html: a run's cases sorted by doubt, whose landmarks a person can check and correct.

The page lies in the output folder, shows the cases' pictures from there, and needs no server. It is
written from results.json one entry at a time. Corrections stay in the browser until the user saves
them, as a table like landmarks.csv with a column that says which cases were corrected. The page
can load such a table again.
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
from model.drawing.page import escape, page_head_and_foot
from model.drawing.text import confidence_text
from model.results.files import PICTURE, SHEET, RunFiles, read_entry, read_summary, write_chunks
from model.results.schemas import CaseEntry, Loop, RunSummary, table_lines

RUN_TITLE = "Angle of progression: report"
MOST_UNFOLDED = 10  # a longer list of failures or loops is folded up until it is clicked
COLOURS = {name: "#{2:02x}{1:02x}{0:02x}".format(*bgr) for name, bgr in overlay.COLOURS.items()}

STYLE_FILE, SCRIPT_FILE = (Path(__file__).with_suffix(suffix) for suffix in (".css", ".js"))
RUN_STYLE = "".join(f".{name} {{ stroke: {c}; color: {c}; }}\n" for name, c in COLOURS.items())
RUN_STYLE += STYLE_FILE.read_text("utf-8")
RUN_SCRIPT = SCRIPT_FILE.read_text("utf-8")

EDITOR = f"""
<dialog id="editor" aria-labelledby="name"><div class="editor">
<div class="stage"><svg id="stage"><g id="drawing"></g></svg>
<svg id="loupe" aria-hidden="true"><use href="#drawing"/><path class="cross"/></svg></div>
<div class="panel"><h3><bdi id="name"></bdi></h3>
<p>AoP <output id="angle" class="angle"></output><span id="mark" class="mark good"></span></p>
<div class="buttons"><button id="previous">Previous</button><button id="next">Next</button>
<button id="reset">Undo correction</button><button id="close">Close</button></div>
<div id="remarks"></div>
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
<p>Cases are sorted by doubt: doubtful ones first, then by largest expected error or lowest
confidence. Click a picture to look closely and, if the model is wrong, to drag its landmarks.
Corrections loaded from a saved table replace those made here.</p>
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
<noscript><p class="note">Without JavaScript this page shows the pictures without lines. The
overlay.png in each case's folder has them.</p></noscript>
"""


class _EntryPlace(NamedTuple):
    """Where an answered entry stands.

    key: its rank, as `doubt_key` gives it. offset: its byte in results.json. row: its number in
    landmarks.csv, from 0.
    """

    key: tuple[bool, float, float]
    offset: int
    row: int


def write_run_report(folder: Path, names: RunFiles, is_job: bool = False) -> None:
    """Write the report of a run from its results and table.

    Args:
        folder: the output folder.
        names: names of the run's files in it.
        is_job: the files of the run's one case lie at the top of the folder.

    Raises:
        OSError: a file cannot be read or written.
    """
    with (folder / names.results).open("rb") as file:
        write_chunks(
            folder / names.report,
            (text.encode() for text in _page_pieces(file, folder, names, is_job)),
        )


def _page_pieces(file: IO[bytes], folder: Path, names: RunFiles, is_job: bool) -> Iterator[str]:
    """The page in pieces. Memory holds the place of each entry in the file, and one entry."""
    summary = read_summary(file)
    answered, failed, stacks = _index_entries(file)
    loops = [_loop_item(loop, folder, is_job) for loop in _read_loops(file)]
    head, foot = page_head_and_foot(RUN_TITLE, RUN_SCRIPT if answered else "", RUN_STYLE)
    yield head
    yield from _summary_pieces(summary, names)
    yield from _failure_lists(file, summary, failed)
    yield from _folding_list("loop" if len(loops) == 1 else "loops", len(loops), loops)
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
            url = _picture_url(entry, folder, is_job)
            yield _case_card(entry, place.row, stacks, url)
        yield "</div>" + EDITOR
    yield foot


def _index_entries(file: IO[bytes]) -> tuple[list[_EntryPlace], list[int], bool]:
    """Read all entries of a results.json, from the first one on.

    Returns:
        The places of the answered entries; the offsets of the failed ones, in bytes; and whether
        an answered entry belongs to a stack.
    """
    answered: list[_EntryPlace] = []
    failed: list[int] = []
    stacks = False
    offset = file.tell()
    while entry := read_entry(file):
        if entry.status == "ok":
            answered.append(_EntryPlace(doubt_key(entry), offset, len(answered)))
            stacks = stacks or entry.frame is not None
        else:
            failed.append(offset)
        offset = file.tell()
    return answered, failed, stacks


def _read_loops(file: IO[bytes]) -> Iterator[Loop]:
    """The loops of a results.json, read from the end of its entries."""
    file.readline()  # "loops": [
    while (line := file.readline().strip().removesuffix(b",")) != b"]":
        yield Loop.model_validate_json(line)


def doubt_key(entry: CaseEntry) -> tuple[bool, float, float]:
    """A sort key: doubtful entries first, then by largest expected error, or lowest confidence."""
    assert entry.confidence  # it is answered
    expected = entry.expected_aop_error_deg
    return not entry.doubtful, -(expected or 0.0), min(entry.confidence.values())


def _entry_at(file: IO[bytes], offset: int) -> CaseEntry:
    file.seek(offset)
    entry = read_entry(file)
    assert entry is not None  # an entry was read there before
    return entry


def _picture_url(entry: CaseEntry, folder: Path, is_job: bool) -> str | None:
    """The URL of an entry's picture, relative to the page; None if the file is missing."""
    path = PurePosixPath("" if is_job else entry.case)
    if entry.frame is not None:
        path /= f"frame-{entry.frame:04d}"
    return _relative_url(folder, path / PICTURE)


def _relative_url(folder: Path, path: PurePosixPath) -> str | None:
    return quote(str(path)) if (folder / path).is_file() else None


def _summary_pieces(summary: RunSummary, names: RunFiles) -> Iterator[str]:
    """The model, the run's files, and the counts."""
    part = f", part {escape(summary.shard)}" if summary.shard else ""
    yield (
        f"<p>Model {escape(summary.model)} ({escape(summary.model_file)}) on "
        f"{escape(summary.provider)}{part}. Files of this run: "
        f'<a href="{quote(names.table)}">{names.table}</a>, '
        f'<a href="{quote(names.results)}">{names.results}</a>.</p>\n<dl class="figures">'
    )
    for label, count, style in (
        ("Answered", summary.answered, ""),
        ("Doubtful", summary.doubtful, "doubt" if summary.doubtful else ""),
        ("Failed", summary.failed, "bad" if summary.failed else ""),
    ):
        yield f'<div><dt>{label}</dt><dd class="{style}">{count}</dd></div>'
    yield '<div><dt>Corrected</dt><dd id="count" class="good">0</dd></div></dl>\n'


def _failure_lists(file: IO[bytes], summary: RunSummary, failed: list[int]) -> Iterator[str]:
    """The failed entries, and what is missing after --merge."""
    for label, count, items in (
        ("failed", len(failed), (_failure_item(_entry_at(file, offset)) for offset in failed)),
        ("missing", len(summary.missing), (f"<bdi>{escape(m)}</bdi>" for m in summary.missing)),
    ):
        yield from _folding_list(
            label, count, (f'<li class="case failed">{item}</li>\n' for item in items), "bad"
        )


def _folding_list(label: str, count: int, items: Iterable[str], style: str = "") -> Iterator[str]:
    """A list under its count and label, folded up if it is long; nothing without items."""
    if count:
        state = " open" if count <= MOST_UNFOLDED else ""
        yield f'<details{state}><summary class="{style}">{count} {label}</summary><ul>\n'
        yield from items
        yield "</ul></details>\n"


def _failure_item(entry: CaseEntry) -> str:
    return f"<b><bdi>{_entry_label(entry)}</bdi></b>: {escape(entry.error or '')}"


def _loop_item(loop: Loop, folder: Path, is_job: bool) -> str:
    """A loop's angles and counts, with a link to its contact sheet if there is one."""
    angles = [angle for angle in loop.aop_deg if angle is not None]
    text, style = f"none of {loop.frames} frames answered", "failed"
    if angles:
        text = (
            f"AoP {min(angles):.1f} to {max(angles):.1f}°, median {loop.median_aop_deg:.1f}° "
            f"(frame {loop.median_frame}), most confident frame {loop.most_confident_frame}; "
            f"{loop.answered} of {loop.frames} frames answered, {loop.doubtful_frames} doubtful"
        )
        style = "doubtful" if loop.doubtful_frames else "sure"
    url = _relative_url(folder, PurePosixPath("" if is_job else loop.case) / SHEET)
    sheet = f'; <a href="{url}">contact sheet</a>' if url else ""
    return f'<li class="case {style}"><b><bdi>{escape(loop.file)}</bdi></b>: {text}{sheet}</li>\n'


def _entry_label(entry: CaseEntry) -> str:
    return escape(entry.file) + ("" if entry.frame is None else f", frame {entry.frame}")


def _case_card(entry: CaseEntry, row: int, stacks: bool, url: str | None) -> str:
    """The card of an answered entry. The script draws its lines from the values in data-case.

    Args:
        row: the entry's number in landmarks.csv, from 0.
        stacks: whether that table has a Frame column.
        url: of the picture; None if there is none.
    """
    assert entry.aop_deg is not None and entry.confidence  # it is answered
    data = {
        "row": list(table_lines([entry], stacks))[1].removesuffix("\n"),
        "index": row,
        "size": (entry.width, entry.height),
        "pixelShape": entry.pixel_shape,
    }
    label = _entry_label(entry)
    return (
        f'<article class="card case {"doubtful" if entry.doubtful else "sure"}" '
        f'data-case="{html.escape(json.dumps(data))}">{_picture_button(label, url)}\n'
        f"<h3><bdi>{label}</bdi></h3>\n"
        f'<p>AoP <span class="angle">{entry.aop_deg:.1f}°</span><span class="mark good"></span></p>'
        f'<p class="was remark small"></p>\n{"".join(_remarks(entry))}</article>\n'
    )


def _picture_button(label: str, url: str | None) -> str:
    if url is None:
        return '<div class="picture none">no picture: run the case again with --report</div>'
    return (
        f'<button class="picture" aria-label="Check and correct {label}">'
        f'<img src="{url}" alt="" loading="lazy" decoding="async"><svg aria-hidden="true"></svg>'
        "</button>"
    )


def _remarks(entry: CaseEntry) -> Iterator[str]:
    """Paragraphs on the entry's doubts, interval, confidence and warnings."""
    assert entry.confidence  # it is answered
    if entry.reasons:
        reasons = "; ".join(map(escape, entry.reasons))
        yield f'<p class="remark doubt small"><b>Not sure:</b> {reasons}.</p>\n'
    if entry.aop_interval_deg:
        low, high = entry.aop_interval_deg
        expected = entry.expected_aop_error_deg
        error = "" if expected is None else f", expected error {expected:.1f}°"
        yield '<p class="remark small">The model\'s 90 % interval '
        yield f"{low:.0f} to {high:.0f}°{error}.</p>\n"
    pairs = (f"{name} {confidence_text(value)}" for name, value in entry.confidence.items())
    yield f'<p class="remark small dim">Confidence {", ".join(pairs)}.</p>\n'
    for warning in entry.warnings:
        yield f'<p class="remark small dim">{escape(warning)}</p>\n'
