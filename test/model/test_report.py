"""The report of a run, in a real browser if one is installed."""

import errno
import json
import os
import re
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from model.anatomy import LANDMARKS, angle_of_progression
from model.drawing.overlay import encode_png
from model.drawing.page import escape, page
from model.drawing.report import doubt_key, write_run_report
from model.frame import Geometry
from model.images.source import GreyFrame
from model.pipeline.case_runner import plain_picture
from model.results.files import RunFiles, write_bytes, write_results
from model.results.schemas import CaseEntry, Loop, Results, points_by_name
from test.support.browser import PHONE, complaints, overflowing, resize
from test.support.runs import job, load, made, png, run, volume
from training.data.case_table import read_cases

pytest_plugins = ["test.support.browser"]

POINTS = np.array([[130.25, 40.0], [70.5, 55.125], [160.0, 120.0]])
SPACING = (0.2, 0.3)
EVIL = [
    "<img src=x onerror=alert(1)>.png",
    "</script><script>alert(2)</script>.png",
    'a\'b"c&amp;d"><svg onload=alert(3)>.png',
    'line\nbreak,"(1, 2)","(3, 4)","(5, 6)",7.png',
    "100%2e#hash?query.png",
    "javascript:alert(4).png",
    "back\\xffslash \u202egnp.png",
]


def entry(file: str, frame: int | None = None, turn: float = 0.0, **known: Any) -> CaseEntry:
    points = (POINTS + [0, turn]).round(4)
    spacing = known.setdefault("spacing_mm", None)
    known.setdefault("confidence", dict.fromkeys(LANDMARKS, 0.9))
    return CaseEntry(
        case=file.removesuffix(".png").replace("/", "__"),
        file=file,
        frame=frame,
        status="ok",
        width=240,
        height=192,
        landmarks_px=points_by_name(points),
        aop_deg=float(angle_of_progression(points, spacing or (1, 1))),
        **known,
    )


def failed(file: str, error: str) -> CaseEntry:
    return CaseEntry(case=file, file=file, status="failed", error=error)


def reported(
    folder: Path,
    entries: list[CaseEntry],
    missing: tuple[str, ...] = (),
    loops: tuple[Loop, ...] = (),
) -> str:
    """Write a run's results, pictures and report; returns the URL of the page."""
    answered = [e for e in entries if e.status == "ok"]
    results = Results(
        model="m<b>",
        model_file="m.onnx",
        model_sha256="0",
        provider="cpu",
        settings={},
        missing=list(missing),
        answered=len(answered),
        failed=len(entries) - len(answered),
        doubtful=sum(bool(e.doubtful) for e in answered),
        cases=entries,
        loops=list(loops),
    )
    write_results(folder, results)
    first = folder / "picture"
    write_bytes(first, encode_png(made(1)))
    for e in answered:
        place = folder / e.case / ("" if e.frame is None else f"frame-{e.frame:04d}")
        place.mkdir(parents=True)
        os.link(first, place / "picture.png")
    write_run_report(folder, RunFiles())
    return (folder / "report.html").as_uri()


def click(browser: Any, css: str, number: int = 0) -> None:
    browser.execute_script(
        "document.querySelectorAll(arguments[0])[arguments[1]].click()", css, number
    )


def texts(browser: Any, css: str) -> list[str]:
    """The texts of the elements that are shown."""
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].filter((e) => !e.closest('[hidden]'))"
        ".map((e) => e.textContent)",
        css,
    )


def centre(browser: Any, name: str) -> list[float]:
    """Where a landmark's ring is on the screen."""
    script = """const b = document.querySelector(`#stage > g circle.${arguments[0]}`)
      .getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2];"""
    return browser.execute_script(script.replace("#stage > g", "#stage > g[role]"), name)


def drag(browser: Any, name: str, by: tuple[float, float], touch: bool = False) -> None:
    """Drag a landmark, grabbed beside its middle, by px of the screen."""
    x, y = np.add(centre(browser, name), 4)
    places = [(x + by[0] * part, y + by[1] * part) for part in (0, 0.4, 1)]
    if touch:
        steps = [("touchStart", places[0]), ("touchMove", places[1]), ("touchMove", places[2])]
        for kind, (px, py) in steps:
            points = [{"x": px, "y": py}]
            browser.execute_cdp_cmd(
                "Input.dispatchTouchEvent", {"type": kind, "touchPoints": points}
            )
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        return
    kinds = ("mousePressed", "mouseMoved", "mouseMoved", "mouseReleased")
    for kind, (px, py) in zip(kinds, [*places, places[2]], strict=True):
        event = {"type": kind, "x": px, "y": py, "button": "left", "buttons": 1, "clickCount": 1}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", event)


def press(browser: Any, key: str, shift: bool = False) -> None:
    for kind in ("keyDown", "keyUp"):
        event = {"type": kind, "key": key, "code": key, "modifiers": 8 if shift else 0}
        browser.execute_cdp_cmd("Input.dispatchKeyEvent", event)


def saved(browser: Any, name: str = "landmarks-corrected.csv") -> Path:
    """The table that the browser saves; at first it creates an empty file of that name."""
    path: Path = browser.downloads / name
    path.unlink(missing_ok=True)
    click(browser, "#save")
    until = time.monotonic() + 10
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < until, "nothing was saved"
        time.sleep(0.05)
    return path


def loaded(browser: Any, path: Path, content: str) -> str:
    """What the page says after it has loaded a table of corrections."""
    path.write_text(content, "utf-8", newline="")
    browser.execute_script("document.querySelector('#notice').textContent = ''")
    browser.find_element("css selector", "#load").send_keys(str(path))
    until = time.monotonic() + 10
    while not (told := texts(browser, "#notice")[0]):
        assert time.monotonic() < until, "nothing was told"
        time.sleep(0.05)
    return told


def test_escape() -> None:
    assert escape('<a href="\'&">') == "&lt;a href=&quot;&#x27;&amp;&quot;&gt;"
    assert escape("é\n\r\x1b\u202e\udcff\x00") == "é\\n\\r\\x1b\\u202e\\udcff\\x00"


def test_page_is_whole_and_refers_to_nothing_outside() -> None:
    text = page("A <title>", "<p>body</p>", "let a = 1;", "p { color: red; }")
    assert text.startswith("<!doctype html>") and text.endswith("</html>\n")
    assert text.count("A &lt;title&gt;") == 2 and "<p>body</p>" in text
    assert "<script>let a = 1;</script>" in text and "p { color: red; }</style>" in text
    assert "default-src 'none'" in text and "unsafe" not in text and "Research use only" in text
    assert "<script>" not in page("A", "") and "://" not in text


def test_policy(tmp_path: Path, browser: Any) -> None:
    """Scripts, styles and links that got in by mistake have no effect, and the log says so."""
    bad = '<script>document.title = "bad"</script><p onclick="document.title = 2">x</p>'
    bad += '<img src="http://127.0.0.1:9/x.png"><p style="color: red">y</p>'
    (tmp_path / "a.html").write_text(page("good", bad, "document.title += '!'"))
    browser.get((tmp_path / "a.html").as_uri())
    click(browser, "p[onclick]")
    assert browser.title == "good!" and len(complaints(browser)) >= 4


def test_order_of_doubt() -> None:
    low = {"PS1": 0.9, "PS2": 0.2, "FH1": 0.9}
    entries = [
        entry("surest", doubtful=False, expected_aop_error_deg=1.0, confidence=low),
        entry("unsure", doubtful=False, expected_aop_error_deg=6.0),
        entry("marked", doubtful=True, expected_aop_error_deg=2.0),
        entry("worst", doubtful=True, expected_aop_error_deg=9.0),
    ]
    order = ["worst", "marked", "unsure", "surest"]
    assert [e.file for e in sorted(entries, key=doubt_key)] == order
    bare = [entry("sure"), entry("weak", confidence=low), entry("marked", doubtful=True)]
    assert [e.file for e in sorted(bare, key=doubt_key)] == ["marked", "weak", "sure"]


def test_picture_has_square_pixels_and_loses_none() -> None:
    def size(width: int, height: int, spacing: tuple[float, float] | None) -> tuple[int, ...]:
        pixels = np.full((height, width), 300.0, np.float32)
        picture = plain_picture(GreyFrame(pixels, None, 0, Geometry(spacing)))
        assert (picture == 255).all()
        return picture.shape

    assert size(60, 40, None) == (40, 60) and size(60, 40, (0.2, 0.2)) == (40, 60)
    assert size(60, 40, (0.2, 0.3)) == (60, 60) and size(60, 40, (0.3, 0.2)) == (40, 90)
    assert size(2560, 640, None) == (320, 1280)


def test_what_stands_on_the_page(tmp_path: Path, browser: Any) -> None:
    entries = [
        entry("sure.png", doubtful=False, warnings=["took long"]),
        failed("bad.png", "it is <empty>"),
        entry("deep/odd.png", turn=5, doubtful=True, reasons=["<too> wide", "FH1 is uncertain"]),
        entry(
            "known.png",
            doubtful=False,
            aop_interval_deg=(95.2, 107.8),
            expected_aop_error_deg=3.14,
        ),
    ]
    browser.get(reported(tmp_path, entries, ("part 2/3",)))
    assert texts(browser, "h3 bdi")[:3] == ["deep/odd.png", "known.png", "sure.png"]
    odd, known, sure = texts(browser, "article")
    assert f"AoP {entries[2].aop_deg:.1f}°" in odd
    assert "Not sure: <too> wide; FH1 is uncertain." in odd and "took long" in sure
    assert "90 % interval 95 to 108°, expected error 3.1°." in known
    assert texts(browser, "li") == ["bad.png: it is <empty>", "part 2/3"]
    assert texts(browser, "dd") == ["3", "1", "1", "0"]
    links = browser.execute_script("return [...document.links].map((a) => a.href)")
    assert links == [(tmp_path / name).as_uri() for name in ("landmarks.csv", "results.json")]
    assert "Research use only" in texts(browser, "header")[0]
    assert complaints(browser) == []


def test_only_failures(tmp_path: Path, browser: Any) -> None:
    browser.get(reported(tmp_path, [failed(f"{k}.png", "why") for k in range(30)]))
    assert texts(browser, "summary") == ["30 failed"] and complaints(browser) == []
    assert not browser.execute_script("return document.querySelector('details').open")


def test_names_are_text(tmp_path: Path, browser: Any) -> None:
    entries = [entry(f"{k}/{name}", turn=k) for k, name in enumerate(EVIL)]
    reasons = {"doubtful": True, "reasons": ["<script>alert(5)</script>"], "warnings": ["<b>"]}
    entries += [entry("z.png", **reasons), failed("<i>.png", "<script>alert(6)</script>")]
    browser.get(reported(tmp_path, entries, ("<u>",)))
    shown = sorted(texts(browser, "article h3"))
    expected = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in e.file) for e in entries]
    assert shown == sorted(expected[:-1])
    tags = "main script, main b:not(p b, li b), main i, main u, svg[onload], img[onerror]"
    assert texts(browser, tags) == []
    for k in range(len(EVIL) + 1):  # the pictures are there, whatever their folders' names
        size = browser.execute_async_script(
            "const [k, done] = arguments, img = document.images[k]; img.loading = 'eager';"
            "img.decode().then(() => done(img.naturalWidth), (e) => done(String(e)))",
            k,
        )
        assert size == 240
    click(browser, "article .picture")
    press(browser, "PageDown")
    move_right(browser, "FH1")
    path = saved(browser)
    by_file = {case.file: case for case in read_cases(path)}
    assert set(by_file) == {e.file for e in entries[:-1]}
    assert complaints(browser) == [] and browser.title == "Angle of progression: report"


def move_right(browser: Any, name: str) -> None:
    browser.execute_script(
        "document.querySelector(`#stage > g[role].${arguments[0]}`).focus()", name
    )
    press(browser, "ArrowRight")


@pytest.mark.parametrize("touch", [False, True])
@pytest.mark.parametrize("spacing", [None, SPACING])
def test_drag(tmp_path: Path, browser: Any, touch: bool, spacing: Any) -> None:
    entries = [entry(f"{k}.png", turn=k / 8, spacing_mm=spacing) for k in range(3)]
    if touch:
        resize(browser, PHONE)
    browser.get(reported(tmp_path, entries))
    click(browser, "article .picture", 1)
    zoom = browser.execute_script("return document.querySelector('#stage').getScreenCTM().a")
    drag(browser, "FH1", (-31.0, 20.0), touch)
    live = texts(browser, "#angle")
    assert texts(browser, "#mark") == ["corrected"] and texts(browser, "#count") == ["1"]
    click(browser, "#close")
    marks = texts(browser, "article .mark"), texts(browser, "article .angle")
    assert marks[0] == ["", "corrected", ""] and marks[1][1] == live[0]
    assert texts(browser, "article .was")[1] == f"The model said {entries[1].aop_deg:.1f}°."
    path = saved(browser)
    case = read_cases(path)[1]
    scale = np.array(spacing or (1, 1)) / min(spacing or (1, 1))
    wanted = POINTS + [0, 0.125]
    wanted[2] += np.array([-31.0, 20.0]) / zoom / scale
    assert np.allclose(case.landmarks_px, wanted, atol=0.02)
    angle = float(angle_of_progression(case.landmarks_px, spacing or (1, 1)))
    assert case.aop_deg == pytest.approx(angle, abs=5.1e-5) and live == [f"{angle:.1f}°"]
    assert abs(angle - entries[1].aop_deg) > 3
    rows, model = path.read_text().splitlines(), (tmp_path / "landmarks.csv").read_text()
    kept = [row.removesuffix(",no") for row in rows if not row.endswith(",yes")]
    assert rows[0] == "Filename,PS1,PS2,FH1,AoP,Doubt,Corrected"
    assert kept[1:] == model.splitlines()[1::2] and rows[2].endswith(",yes")
    assert complaints(browser) == []


def test_saved_corrections_are_loaded_again(tmp_path: Path, browser: Any) -> None:
    entries = [entry(f"{k}/{name}", turn=k) for k, name in enumerate(EVIL)]
    entries += [entry("loop.png", k, spacing_mm=SPACING) for k in range(2)]
    url = reported(tmp_path / "one", entries)
    browser.get(url)
    for k in range(len(entries)):
        click(browser, "article .picture", k)
        move_right(browser, "PS2")
    click(browser, "#reset")
    click(browser, "#close")
    content = saved(browser).read_text("utf-8")
    assert content.count(",yes\n") == len(entries) - 1
    browser.get(reported(tmp_path / "two", entries[2:] + entries[:1]))  # of another run
    browser.execute_script("localStorage.clear(); location.reload()")
    assert texts(browser, "#count") == ["0"]
    click(browser, "article .picture")
    drag(browser, "FH1", (-40.0, 0.0))  # a loaded correction takes its place
    click(browser, "#close")
    told = loaded(browser, tmp_path / "a.csv", content)
    assert told.startswith(f"'a.csv': {len(entries) - 2} of {len(entries) - 1} corrections loaded.")
    name = json.dumps("1/" + EVIL[1])[1:-1]
    assert told.endswith(f" Not loaded: line 3: this report has no '{name}'.")
    marks = texts(browser, "article .mark")
    assert marks.count("corrected") == len(entries) - 2 == int(texts(browser, "#count")[0])
    wanted = {line for line in content.splitlines() if "alert(2)" not in line}
    assert set(saved(browser).read_text("utf-8").splitlines()) == wanted
    browser.refresh()
    assert texts(browser, "#count") == [str(len(entries) - 2)] and complaints(browser) == []


ROW = '{file},"({x}, 40.0000)","(70.5000, 55.1250)","(160.0000, 120.0000)",98.1,{doubt},{mark}\n'


def rows(*given: tuple[str, str], mark: str = "yes", doubt: str = "") -> str:
    """A table of corrections, from file names and x of PS1 as text."""
    written = [ROW.format(file=file, x=x, doubt=doubt, mark=mark) for file, x in given]
    return "Filename,PS1,PS2,FH1,AoP,Doubt,Corrected\n" + "".join(written)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (rows(("a.png", "99.5")), "1 of 1 corrections loaded."),
        (rows(("a.png", "99.5")).replace("\n", "\r\n").rstrip(), "1 of 1 corrections loaded."),
        ("\ufeff" + rows(("a.png", "99.5")), "1 of 1 corrections loaded."),
        (rows(("a.png", "99.5"), ("", "")) + "\n\n", "line 3: this report has no ''."),
        (rows(("zz.png", "9"), mark="no"), "0 of 0 corrections loaded."),
        (rows(("z\u202ez.png", "9")), "line 2: this report has no 'z\\u{202e}z.png'."),
        (
            rows(("a.png", "one")),
            "line 2: PS1 is '(one, 40.0000)', expected (x, y) in px inside",
        ),
        (rows(("a.png", "240")), "line 2: PS1 is '(240, 40.0000)', expected"),
        (rows(("a.png", "-0.6")), "line 2: PS1 is '(-0.6, 40.0000)', expected"),
        (rows(("a.png", "1.2.3")), "line 2: PS1 is '(1.2.3, 40.0000)', expected"),
        (rows(("a.png", "9"), mark="YES"), "line 2: Corrected is 'YES', expected yes or no."),
        (rows(("a.png", "9"))[:-3], "line 2: Corrected is 'y', expected yes or no."),
        (rows(("a.png", "9"))[:-9], "line 2: its cells do not fit the first line."),
        (
            rows(("a.png", "9"), doubt='"x') + rows(("a.png", "8"))[41:],
            "1 of 2 corrections loaded.",
        ),
        (rows(("a.png", "70.5")).replace("40.0000", "55.125"), "line 2: PS2 or FH1 equals PS1"),
        (rows(*[("b.png", "9")] * 12), "; line 11: this report has no 'b.png'; and 2 more."),
        ("Filename,PS1,PS2,FH1,AoP\n", "nothing loaded: it lacks Corrected; expected a table"),
        ("", "nothing loaded: it lacks Filename, PS1, PS2, FH1, Corrected;"),
    ],
)
def test_what_is_told_of_a_table(tmp_path: Path, browser: Any, content: str, told: str) -> None:
    browser.get(reported(tmp_path, [entry("a.png")]))
    found = loaded(browser, tmp_path / "a.csv", content)
    assert told in found and overflowing(browser) == [] == complaints(browser)
    taken = texts(browser, "#count") == ["1"]
    assert taken == ("1 of" in found)


@pytest.mark.parametrize("spacing", [None, SPACING])
def test_landmarks_lie_where_they_are(tmp_path: Path, browser: Any, spacing: Any) -> None:
    """Integer coordinates are pixel centres, and the picture's pixels are square."""
    browser.get(reported(tmp_path, [entry("a.png", spacing_mm=spacing)]))
    height = 1.5 if spacing else 1.0
    box, *rings = browser.execute_script(
        "const [svg] = document.querySelectorAll('article svg'), at = (e, n) => +e.getAttribute(n);"
        "return [svg.getAttribute('viewBox'), ...[...svg.querySelectorAll('circle')].map("
        "(e) => [at(e, 'cx'), at(e, 'cy')])];"
    )
    assert [float(number) for number in box.split()] == pytest.approx([0, 0, 240, 192 * height])
    assert np.allclose(rings, (POINTS + 0.5) * [1, height])


def test_keys_undo_and_what_outlives_a_reload(tmp_path: Path, browser: Any) -> None:
    entries = [entry("a.png"), *(entry("loop.png", k, turn=k) for k in range(2))]
    url = reported(tmp_path, entries)
    browser.get(url)
    click(browser, "article .picture", 2)
    assert browser.execute_script("return document.activeElement.id") == "close"  # of the last
    press(browser, "ArrowRight")  # no landmark has the focus
    press(browser, "PageUp")
    assert texts(browser, "#name") == ["loop.png, frame 0"]
    assert texts(browser, "#place") == ["2 of 3 shown"]
    assert texts(browser, "#count") == ["0"]
    move_right(browser, "PS2")
    press(browser, "ArrowUp", shift=True)
    assert texts(browser, "#at-PS2") == ["71.5, 45.1 px"]
    browser.get(url)
    assert texts(browser, "#count") == ["1"] and "again" in texts(browser, "#notice")[0]
    cases = {(c.file, c.frame): c for c in read_cases(saved(browser))}
    assert cases["loop.png", 0].landmarks_px.tolist()[1] == [71.5, 45.125]
    assert cases["loop.png", 1].landmarks_px.tolist()[1] == [70.5, 56.125]
    assert cases["a.png", None].landmarks_px.tolist() == POINTS.tolist()
    click(browser, "article .picture", 1)
    click(browser, "#reset")
    assert texts(browser, "article .angle")[1] == f"{entries[1].aop_deg:.1f}°"
    browser.get(url)
    assert texts(browser, "#count") == ["0"] and texts(browser, "#notice") == [""]
    browser.execute_script("localStorage.setItem(storageKey, '[[0, null]]')")
    browser.get(url)  # what another page on this disk may have put there
    assert "cannot be read" in texts(browser, "#notice")[0] and complaints(browser) == []


def test_a_landmark_stays_in_the_image_and_off_the_vertex(tmp_path: Path, browser: Any) -> None:
    browser.get(reported(tmp_path, [entry("a.png")]))
    click(browser, "article .picture")
    drag(browser, "PS2", (-3000, -3000))
    assert texts(browser, "#at-PS2") == ["-0.5, -0.5 px"]
    browser.execute_script("open.points = [[5, 5], [4, 5], [9, 9]]")
    move_right(browser, "PS2")
    assert texts(browser, "#at-PS2") != ["5.0, 5.0 px"] and "NaN" not in texts(browser, "#angle")[0]


def test_filter(tmp_path: Path, browser: Any) -> None:
    entries = [
        entry(f"{k}.png", doubtful=k % 3 == 0, reasons=["dark"][: k % 3 == 0]) for k in range(9)
    ]
    browser.get(reported(tmp_path, [*entries, failed("8.tif", "dark, empty")]))

    def shown(words: str, which: str = "*") -> list[str]:
        browser.execute_script(
            "for (const [id, value] of Object.entries(arguments[0])) {"
            "const e = document.getElementById(id); e.value = value;"
            "e.dispatchEvent(new Event(id === 'filter' ? 'input' : 'change')) }",
            {"filter": words, "which": which},
        )
        return sorted(texts(browser, ".case bdi"))

    assert len(shown("")) == 10 and texts(browser, "#shown") == ["9 of 9 shown"]
    assert shown("DARK") == ["0.png", "3.png", "6.png", "8.tif"]
    assert shown("dark 3.png") == ["3.png"] and texts(browser, "#shown") == ["1 of 9 shown"]
    assert shown("dark", ".failed") == ["8.tif"] and shown("", ".doubtful") == [
        "0.png",
        "3.png",
        "6.png",
    ]
    assert len(shown("", ".sure")) == 6 and shown("", ".corrected") == []
    click(browser, "article .picture", 1)
    move_right(browser, "PS1")
    click(browser, "#close")
    assert shown("", ".corrected") == ["3.png"] == shown("corrected")
    click(browser, "article:not([hidden]) .picture")
    assert texts(browser, "#place") == ["1 of 1 shown"]


@pytest.mark.parametrize("size", [PHONE, (768, 1024), (1280, 900)])
def test_nothing_stands_out_sideways(tmp_path: Path, browser: Any, size: tuple[int, int]) -> None:
    long = "averylongname" * 14 + ".png"
    entries = [entry(long, doubtful=True, reasons=["x" * 90]), failed(f"b{long}", "y" * 90)]
    resize(browser, size)
    browser.get(reported(tmp_path, [*entries, entry("a.png", spacing_mm=(1.0, 0.2))], (long,)))
    assert overflowing(browser) == []
    click(browser, "article .picture")
    move_right(browser, "FH1")
    assert overflowing(browser) == []


def test_a_thousand_cases_open_within_two_seconds(tmp_path: Path, browser: Any) -> None:
    entries = [
        entry(
            f"folder/{k:05d}.png", doubtful=k % 9 == 0, reasons=["it is dark"] if k % 9 == 0 else []
        )
        for k in range(1000)
    ]
    url = reported(tmp_path, entries)
    found = []
    for _ in range(3):
        browser.get(url)
        found.append(
            browser.execute_async_script("""
            const done = arguments[0];
            new PerformanceObserver((list) => done(Math.max(list.getEntries().at(-1).startTime,
              performance.getEntriesByType("navigation")[0].loadEventEnd)))
              .observe({type: "paint", buffered: true});""")
        )
    print("ms until loaded, run and painted:", found)
    assert 0 < min(found) < 2000
    drawn = "return document.querySelectorAll('article svg path.line[d]').length"
    assert browser.execute_script(drawn) == 1000
    loaded = "return [...document.images].filter((img) => img.naturalWidth).length"
    assert 0 < browser.execute_script(loaded) < 200


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cases(tmp_path: Path) -> None:
    peaks = []
    for count in (200, 2000):
        entries = [entry(f"{k}.png", reasons=["x" * 500]) for k in range(count)]
        folder = tmp_path / f"{count}"
        reported(folder, entries)
        tracemalloc.start()
        write_run_report(folder, RunFiles())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1800 * 400  # bytes a case, of a page of 2 KB a case


def pictures(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("picture.png"))


def test_of_a_real_run(tmp_path: Path, browser: Any) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    png(source / "sub" / "<b>é.png", made(1))
    volume(source / "cine.mha", np.stack([made(2), made(3)]), Spacing=(0.3, 0.2, 1))
    (source / "bad.png").write_bytes(b"nothing")
    found = run(source, out, "--report", "--no-overlay")
    assert found.status == 1 and str(out / "report.html") in found.out
    frames = ["cine/frame-0000/picture.png", "cine/frame-0001/picture.png"]
    assert pictures(out) == sorted([*frames, "sub__<b>é/picture.png"])
    shape = cv2.imread(str(out / frames[0]), cv2.IMREAD_UNCHANGED).shape
    assert shape == (192, 360)  # square pixels, one channel
    browser.get((out / "report.html").as_uri())
    assert len(texts(browser, "article")) == 3 and len(texts(browser, "li.failed")) == 1
    click(browser, "article .picture")
    assert complaints(browser) == []
    run(source, out, "--no-overlay")
    assert pictures(out) == [] and not (out / "report.html").exists()


def test_resume_makes_the_pictures_that_are_missing(tmp_path: Path) -> None:
    for k in range(3):
        png(tmp_path / "in" / f"{k}.png", made(k))
    run(tmp_path / "in", tmp_path / "out", "--no-overlay")
    again = run(tmp_path / "in", tmp_path / "out", "--no-overlay", "--resume", "--report")
    assert "cases are answered already" not in again.out and len(pictures(again.folder)) == 3
    (again.folder / "1" / "picture.png").unlink()
    again = run(tmp_path / "in", tmp_path / "out", "--no-overlay", "--resume", "--report")
    assert "2 of 3 cases are answered already" in again.out and len(pictures(again.folder)) == 3


def test_parts_have_pages_of_their_own_and_one_when_merged(tmp_path: Path) -> None:
    for k in range(6):
        png(tmp_path / "in" / f"{k}.png", made(k % 3))
    out = tmp_path / "out"
    for part in ("1/2", "2/2"):
        run(tmp_path / "in", out, "--no-overlay", "--report", "--shard", part)
    pages = sorted(path.name for path in out.glob("*.html"))
    assert pages == ["report-1-of-2.html", "report-2-of-2.html"]
    assert run(tmp_path / "in", out, "--merge", "--report").status == 0
    whole = (out / "report.html").read_text()
    assert whole.count("<article") == 6 == whole.count("/picture.png")
    cards = [(out / name).read_text().count("<article") for name in pages]
    assert sum(cards) == 6 and "landmarks-1-of-2.csv" in (out / pages[0]).read_text()
    run(tmp_path / "in", out, "--merge")
    assert not (out / "report.html").exists()


def test_loops_are_listed(tmp_path: Path, browser: Any) -> None:
    known = {"frames": 3, "median_frame": 2, "most_confident_frame": 0}
    moved = Loop(
        case="cine",
        file="<i>cine.mha",
        answered=2,
        aop_deg=[121.3, None, 98.06],
        median_aop_deg=98.06,
        doubtful_frames=1,
        **known,
    )
    nothing = {"answered": 0, "aop_deg": [None] * 3, "median_aop_deg": None, "doubtful_frames": 0}
    lost = Loop(case="lost", file="lost.mha", **known | nothing)
    write_bytes(tmp_path / "cine" / "contact-sheet.png", encode_png(made(1)))
    browser.get(reported(tmp_path, [entry("a.png"), failed("b.png", "why")], loops=(moved, lost)))
    assert texts(browser, "summary") == ["1 failed", "2 loops"]
    assert texts(browser, "li")[1:] == [
        "<i>cine.mha: AoP 98.1 to 121.3°, median 98.1° (frame 2), most confident frame 0; "
        "2 of 3 frames answered, 1 doubtful; contact sheet",
        "lost.mha: none of 3 frames answered",
    ]
    links = browser.execute_script("return [...document.links].map((a) => a.href)")
    assert links[2:] == [(tmp_path / "cine" / "contact-sheet.png").as_uri()]
    browser.execute_script("which.value = '.failed'; which.onchange()")
    assert texts(browser, "li bdi") == ["b.png", "lost.mha"] and complaints(browser) == []


def test_the_loops_of_real_runs(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    volume(tmp_path / "in" / "cine.mha", np.stack([made(2), made(3)]))
    volume(job(tmp_path / "job") / "a.mha", np.stack([made(2), made(3)]))
    for source, sheet in (("in", "cine/contact-sheet.png"), ("job", "contact-sheet.png")):
        out = run(tmp_path / source, tmp_path / f"{source}-out", "--report", "--overlay").folder
        angles = [e["aop_deg"] for e in load(out / "results.json")["cases"]]
        text = (out / "report.html").read_text()
        assert f"AoP {min(angles):.1f} to {max(angles):.1f}°, median" in text
        assert ">1 loop<" in text and f'href="{sheet}"' in text and (out / sheet).is_file()


def test_of_a_job(tmp_path: Path) -> None:
    png(job(tmp_path / "in") / "a.png")
    found = run(tmp_path / "in", tmp_path / "out", "--report")
    assert found.status == 0 and pictures(found.folder) == ["picture.png"]
    (shown,) = re.findall(r'<img src="(.*?)"', (found.folder / "report.html").read_text())
    assert shown == "picture.png"


def test_a_case_without_its_picture(tmp_path: Path) -> None:
    reported(tmp_path, [entry("a.png"), entry("b.png", turn=1)])
    shutil.rmtree(tmp_path / "a")
    write_run_report(tmp_path, RunFiles())
    text = (tmp_path / "report.html").read_text()
    assert text.count("no picture") == 1 and text.count("<img") == 1
    row = json.loads(re.findall(r'data-case="(.*?)"', text)[0].replace("&quot;", '"'))["row"]
    assert row.startswith('a.png,"(130.2500, 40.0000)"')


def test_a_report_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("model.pipeline.batch.write_run_report", full)
    png(tmp_path / "in" / "a.png")
    found = run(tmp_path / "in", tmp_path / "out", "--report", "--no-overlay")
    assert found.status == 2 and load(tmp_path / "out" / "results.json")["answered"] == 1
    assert "report.html could not be written (No space left on device)" in found.sentence
    monkeypatch.undo()
    again = run(tmp_path / "in", tmp_path / "out", "--report", "--no-overlay", "--resume")
    assert again.status == 0 and "1 of 1 cases are answered already" in again.out
    assert (tmp_path / "out" / "report.html").exists()
