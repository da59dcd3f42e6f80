"""The page of an evaluation: what it says, and how it looks in a browser."""

import math
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from model.anatomy import angle_of_progression
from model.drawing.page import escape
from model.images.source import ImageError
from test.phantom import phantom
from test.support.browser import DESKTOP, PHONE, complaints, overflowing, resize
from training.data.case_table import Case, read_cases
from training.evaluation.figures import (
    CSS_VARIABLES,
    FIGURES_STYLE,
    calibration_chart,
    difference_chart,
    groups_chart,
    interval_text,
    picture_of_case,
)
from training.evaluation.metrics import case_errors, summarise_by_device
from training.evaluation.pictures import PREDICTED, TRUTH
from training.evaluation.predict import CasePrediction
from training.evaluation.report import write_evaluation_report
from training.evaluation.statistics import BlandAltman, Estimate, bland_altman

pytest_plugins = ["test.support.browser"]

COUNT = 30
HOSTILE = "<img src=x onerror=alert(1)> & 'q'.png"


def answer(case: Case, rng: np.random.Generator, longer: int, calibrated: bool) -> CasePrediction:
    """The label, moved at random; the doubt grows with the error, but is not the error."""
    moved = case.landmarks_px + rng.normal(0, rng.exponential(3) + 0.5, (3, 2))
    angle = float(angle_of_progression(moved))
    found = CasePrediction(moved, longer, angle, rng.uniform(0.2, 0.9, 3))
    if not calibrated:
        return found
    error = abs(angle - case.aop_deg)
    expected = float(0.6 * error + rng.exponential(2) + 0.5)
    radial = np.linalg.norm(moved - case.landmarks_px, axis=1)
    return replace(
        found,
        aop_interval_deg=(angle - 2.2 * expected, angle + 2.2 * expected),
        expected_error_px=0.7 * radial + 1,
        expected_aop_error_deg=expected,
        reasons=("expected to be off by much",) if expected > 8 else (),
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("phantoms")


@pytest.fixture(scope="module")
def cases(images) -> list[Case]:
    """Phantoms of two devices in `images`; one of them with a name that tries to be HTML."""
    made = []
    for seed in range(COUNT):
        one, name = phantom(seed, 160, 120), HOSTILE if seed == 3 else f"phantom-{seed:02d}.png"
        assert cv2.imwrite(str(images / name), one.image)
        group = f"g{seed // 2}"
        made.append(Case(name, one.landmarks_px, one.aop_deg, device=one.machine, group=group))
    return made


def answers(cases: list[Case], calibrated: bool) -> list[CasePrediction]:
    rng = np.random.default_rng(5)
    return [answer(case, rng, 160, calibrated) for case in cases]


@pytest.fixture(scope="module")
def pages(tmp_path_factory, images, cases) -> dict[str, Path]:
    """Of a calibrated model, of one that is not, and of another reader."""
    folder = tmp_path_factory.mktemp("pages")
    plain = answers(cases, calibrated=False)
    readers = [replace(one, confidence=np.empty(0)) for one in plain]
    made = {"calibrated": answers(cases, calibrated=True), "plain": plain, "reader": readers}
    for name, found in made.items():
        figures = summarise_by_device(cases, found)
        missing = ["gone/<b>.png", "late.png"] if name == "calibrated" else []
        write_evaluation_report(folder / f"{name}.html", cases, found, images, figures, missing)
    return {name: folder / f"{name}.html" for name in made}


def words(page: Path) -> str:
    """A page's words, without tags and drawings."""
    text = re.sub(r"<(style|svg).*?</\1>|<[^>]*>", " ", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", text)


@pytest.mark.slow
def test_figures_of_the_page_are_those_of_the_evaluation(pages, cases):
    found = answers(cases, calibrated=True)
    figures = summarise_by_device(cases, found)
    text = words(pages["calibrated"])
    for group in figures.values():
        for key in ("mre_px", "mre_FH1_px", "aop_error_deg", "aop_error_p95_deg"):
            figure = group[key]
            shown = f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"
            assert shown in text
    within = 100 * figures["all"]["sdr_8px"]["value"]
    assert f"Landmarks within 8 px, % {within:.0f} (" in text
    bias = bland_altman(
        [one.aop_deg - case.aop_deg for one, case in zip(found, cases, strict=True)]
    )
    assert f"{bias.bias.value:.1f} (".replace("-", "−") in text.partition("Bias, deg")[2][:12]
    inside = sum(
        one.aop_interval_deg[0] <= case.aop_deg <= one.aop_interval_deg[1]
        for one, case in zip(found, cases, strict=True)
    )
    assert f"Label in the 90 % interval {inside} of {COUNT}" in text
    assert f"{COUNT} cases (device A" in text and f"in {COUNT // 2} groups" in text
    assert "segmentation masks" in text and "not a medical device" in text


@pytest.mark.slow
def test_best_and_worst_cases_in_order(pages, cases):
    _, error = case_errors(answers(cases, calibrated=True), cases)
    shown = re.findall(r'<img [^>]*alt="([^"]*?): label', pages["calibrated"].read_text())
    order = [
        cases[k].file.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        for k in np.argsort(error, kind="stable")
    ]
    order = [name.replace("'", "&#x27;") for name in order]
    assert shown == order[::-1][:12] + order[:12]


@pytest.mark.slow
def test_missing_cases_and_doubt_are_listed(pages, cases):
    text = words(pages["calibrated"])
    doubtful = sum(bool(one.reasons) for one in answers(cases, calibrated=True))
    assert 0 < doubtful < COUNT
    assert "part of no figure: 2. gone/&lt;b&gt;.png late.png" in text
    assert f"Marked as doubtful: {doubtful} doubtful with" in text
    assert f"{COUNT - doubtful} others with" in text
    assert text.count("expected to be off by much") >= doubtful
    plain = words(pages["plain"])
    assert "part of no figure: none." in plain and "Marked as doubtful: none." in plain


@pytest.mark.slow
def test_what_is_not_calibrated_says_so(pages):
    for name in ("plain", "reader"):
        text = words(pages[name])
        assert "no intervals and no expected errors" in text
        assert "interval −" not in text and "Coverage, %" not in text
    assert "by lowest confidence, area" in words(pages["plain"])
    assert "there is no order in which" in words(pages["reader"])
    assert "by expected AoP error, area" in words(pages["calibrated"])


@pytest.mark.slow
def test_the_same_input_gives_the_same_page(pages, cases, images, tmp_path):
    found = answers(cases, calibrated=False)
    write_evaluation_report(
        tmp_path / "again.html", cases, found, images, summarise_by_device(cases, found), []
    )
    assert (tmp_path / "again.html").read_bytes() == pages["plain"].read_bytes()


@pytest.mark.slow
def test_answers_without_an_angle_and_few_cases(cases, images, tmp_path):
    """One case; and three, one of which has no angle: in every mean, but in no agreement."""
    found = answers(cases, calibrated=True)
    path = tmp_path / "few.html"
    write_evaluation_report(
        path, cases[:1], found[:1], images, summarise_by_device(cases[:1], found[:1]), []
    )
    assert "Agreement needs two cases" in words(path)
    lost = replace(found[0], aop_deg=math.nan, aop_interval_deg=None)
    some = [lost, *found[1:3]]
    write_evaluation_report(path, cases[:3], some, images, summarise_by_device(cases[:3], some), [])
    text = words(path)
    assert "out of agreement and coverage): 1. phantom-00.png" in text
    assert "Cases 3 " in text and "Cases 2 " in text  # all figures, agreement
    assert "answer without an angle" in text and "nan" not in text


@pytest.mark.slow
def test_cases_of_no_device_are_a_series_of_their_own(cases, images, tmp_path):
    some = [replace(case, device=None) if k < 2 else case for k, case in enumerate(cases)]
    found = answers(cases, calibrated=False)
    write_evaluation_report(
        tmp_path / "p.html", some, found, images, summarise_by_device(some, found), []
    )
    plot = re.search(r"<svg class=.chart.*?</figure>", (tmp_path / "p.html").read_text(), re.DOTALL)
    symbols = re.findall(r'<title>.*?stroke="var\(--s(\d)\)"', plot[0])
    assert [symbols.count(f"{k}") for k in range(3)] == [
        sum(case.device == name for case in some) for name in ("A", "B", None)
    ]
    assert re.findall(r'class="dot s(\d)"', plot[0]) == ["0", "1", "2"]  # the legend
    assert "device not known" in plot[0]


@pytest.mark.slow
def test_an_image_that_cannot_be_read_is_an_error_and_leaves_no_page(cases, tmp_path):
    found = answers(cases, calibrated=False)
    for case in cases:
        (tmp_path / case.file).write_bytes(b"no image")
    with pytest.raises(ImageError):
        write_evaluation_report(
            tmp_path / "p.html", cases, found, tmp_path, summarise_by_device(cases, found), []
        )
    assert not list(tmp_path.glob("p.html*"))


def test_readings_are_drawn_where_they_are():
    """On a picture of 1024 x 512 px, which is shown at half its size; corners lie at 0."""
    label = np.array([[511.5, 99.5], [99.5, 199.5], [699.5, 299.5]])
    html = picture_of_case(np.zeros((512, 1024), np.uint8), (1.0, 1.0), label, label + 10, "words")
    assert 'viewBox="0 0 512 256"' in html
    lines = re.findall(r'class="(truth|answer)(?: dashed)?" d="M([\d.]+) ([\d.]+)L([\d. ]+)L', html)
    assert [kind for kind, *_ in lines] == ["truth", "answer"]
    assert lines[0][1:] == ("50.00", "100.00", "256.00 50.00")
    assert lines[1][1:] == ("55.00", "105.00", "261.00 55.00")
    assert html.count(" dashed") == 2 and html.count("h-16.38z") == 2 * 3  # dashes; squares


def test_readings_have_the_colours_of_the_training_pictures():
    for kind, colour in (("truth", TRUTH), ("answer", PREDICTED)):
        assert f".{kind} {{ stroke: rgb{colour[::-1]}; }}" in FIGURES_STYLE


def test_pixels_that_are_not_square_are_shown_in_true_proportion():
    label = np.array([[9.5, 9.5], [0.0, 0.0], [19.5, 19.5]])
    html = picture_of_case(np.zeros((100, 100), np.uint8), (1.0, 2.0), label, label, "words")
    assert 'viewBox="0 0 50 100"' in html and "L5.00 10.00L" in html


def place(x: float, y: float, svg: str) -> tuple[float, float]:
    """Where data lie in a chart, from the grid lines of its ticks at 0 and the next."""
    lines = re.findall(r'd="M ([\d.]+) ([\d.]+) L ([\d.]+) ([\d.]+)" clip-path[^>]*--line', svg)
    ends = np.array(lines, float)
    columns, rows = ends[ends[:, 0] == ends[:, 2], 0], ends[ends[:, 1] == ends[:, 3], 1]
    ticks = [float(text) for text in re.findall(r">([\d.]+)</text>", svg)]
    step_x, step_y = ticks[1], ticks[len(columns) + 1]
    across, up = columns[1] - columns[0], rows[1] - rows[0]
    return columns[0] + x / step_x * across, rows[0] + y / step_y * up


def test_a_chart_places_data_between_its_axes():
    bins = [(2.0, Estimate(3.0, 1.0, 8.0)), (7.0, Estimate(6.0, 5.0, 40.0))]
    svg = calibration_chart([bins], "deg", "")
    symbols = np.array(re.findall(r'<use href="[^"]*" x="([\d.]+)" y="([\d.]+)"', svg), float)
    np.testing.assert_allclose(symbols, [place(2, 3, svg), place(7, 6, svg)], atol=0.1)
    lines = re.findall(r'd="M ([\d.]+) ([\d.]+) L ([\d.]+) ([\d.]+)"[^>]*--s0', svg)
    ends = [[*place(2, 1, svg), *place(2, 8, svg)], [*place(7, 5, svg), *place(7, 40, svg)]]
    np.testing.assert_allclose(np.array(lines, float), ends, atol=0.1)


@pytest.mark.parametrize("high", [0.011, 0.5, 3.0, 7.7, 180.0, 9999.0])
def test_ticks_are_round_and_few(high):
    svg = groups_chart(["all"], [[Estimate(high / 2, 0, high)]], "", "")
    ticks = [text for text in re.findall(r">([^<]*)</text>", svg) if text != "all"]
    assert 3 <= len(ticks) <= 7 and ticks[0].strip("0.") == ""
    assert set("".join(ticks).replace(".", "").strip("0")[:1]) <= set("125")


def test_ticks_below_zero_have_a_minus():
    difference = np.array([-12.3, 2.0, 11.0])
    bias, lower, upper = Estimate(0, -1, 1), Estimate(-5, -6, -4), Estimate(5, 4, 6)
    lines = BlandAltman(3, bias, 2.5, lower, upper)
    svg = difference_chart(np.array([80.0, 90.0, 100.0]), difference, [0] * 3, [""] * 3, lines)
    ticks = re.findall(r"<text [^>]*>([^<]*)</text>", svg)
    assert ticks[ticks.index("−10") :][:5] == ["−10", "−5", "0", "5", "10"]


@pytest.mark.slow
def test_charts_have_the_page_s_colours_and_no_style_of_their_own(pages):
    """What matplotlib draws with are the light page's colours; styles are against its policy."""
    text = pages["calibrated"].read_text()
    light = text.partition("@media")[0] + FIGURES_STYLE
    for colour, variable in CSS_VARIABLES.items():
        name = variable.removeprefix("var(").removesuffix(")")
        assert re.search(rf"{name}: ({colour}|{colour[:4]});", light), name
    charts = re.findall(r'<svg class="chart".*?</svg>', text, re.DOTALL)
    for chart in charts:
        drawn = re.sub("<title>.*?</title>", "", chart)
        assert not re.search(r"style|#[0-9a-f]{6}\b|font|xmlns", drawn)
        ids = re.findall(r' id="([^"]*)"', chart)
        assert ids and set(ids) == set(re.findall(r"#(\w+)", drawn))
    every = re.findall(r' id="([^"]*)"', text)
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("name", ["$x^{$", "a\x00\x1b\udcff", "机器 Ä", "<b>&amp;"])
def test_strange_names_of_devices_stay_as_they_are(name, recwarn):
    svg = groups_chart([f"{name}\nn = 3"], [[Estimate(1, 0, 2)]], "", name)
    shown = escape(name).replace("&#x27;", "'")
    assert f">{shown}<" in svg and f'aria-label="{shown}"' in svg
    assert not recwarn.list


def test_long_names_of_devices_are_cut():
    name = "device with a name that is far too long for a figure"
    svg = groups_chart([f"{name}\nn = 3", "B\nn = 4"], [[Estimate(1, 0, 2)] * 2], "", "")
    assert name not in svg and ">device with a name…<" in svg and ">n = 3<" in svg


def test_an_interval_in_words():
    assert interval_text(Estimate(-1.25, -2.0, -0.04), 1, "°") == "−1.2° (−2.0 to 0.0)"
    assert interval_text(Estimate(9.031, 8.349, 9.702), 2) == "9.03 (8.35 to 9.70)"


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", ["calibrated", "plain", "reader"])
def test_opens_without_complaint_overflow_or_overlap(browser, pages, name, size):
    resize(browser, size)
    browser.get(pages[name].as_uri())
    assert complaints(browser) == []
    assert overflowing(browser) == []
    assert browser.execute_script(OVERLAPS) == []
    loaded = browser.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])"
    )
    assert len(loaded) == 24 and all(done and own == 160 for done, own, _ in loaded)
    assert min(shown for *_, shown in loaded) >= 250
    charts = {"calibrated": 7, "plain": 5, "reader": 4}[name]
    assert len(browser.find_elements("css selector", "svg.chart")) == charts
    letters = browser.execute_script(
        "return [...document.querySelectorAll('.chart text')]"
        ".map(t => t.getBoundingClientRect()).map(b => Math.min(b.width, b.height))"
    )
    assert max(letters) < 25 and min(letters) > 5
    cells = "return [...document.querySelectorAll('tr > *')].slice(1).map(c => c.clientWidth)"
    assert min(browser.execute_script(cells)) >= 45  # no column of single letters


def test_asks_nothing_of_the_network(browser, pages):
    browser.get(pages["calibrated"].as_uri())
    asked = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert [name for name in asked if not name.startswith("data:")] == []
    links = re.findall(r'(?:src|href)="([^"]*)"', pages["calibrated"].read_text())
    assert links and all(link.startswith(("data:", "#")) for link in links)


def test_a_name_stays_text(browser, pages):
    browser.get(pages["calibrated"].as_uri())
    assert browser.execute_script("return document.querySelectorAll('img[onerror]').length") == 0
    titles = browser.execute_script(
        "return [...document.querySelectorAll('.chart title')].map(t => t.textContent)"
    )
    assert any(title.startswith(HOSTILE) for title in titles)


def test_switches_hide_a_reading(browser, pages):
    browser.get(pages["calibrated"].as_uri())

    def shown(kind: str) -> set[str]:
        return set(
            browser.execute_script(
                f"return [...document.querySelectorAll('.picture .{kind}')]"
                ".map(path => getComputedStyle(path).display)"
            )
        )

    assert shown("truth") == shown("answer") == {"inline"}
    browser.find_element("id", "show-truth").click()
    assert shown("truth") == {"none"} and shown("answer") == {"inline"}
    browser.find_element("id", "show-truth").click()
    browser.find_element("id", "show-answer").click()
    assert shown("truth") == {"inline"} and shown("answer") == {"none"}


def test_figures_follow_light_and_dark(browser, pages):
    browser.get(pages["calibrated"].as_uri())
    seen = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        ink, words, line = browser.execute_script(
            "const of = (name, what) => getComputedStyle(document.querySelector(name))[what];"
            "return [of('body', 'color'), of('.chart text', 'fill'),"
            " of('.chart [stroke*=s0]', 'stroke')]"
        )
        assert words == ink
        seen.append((ink, line))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]


# Two of the page's blocks, or two words of one figure, that share more than a pixel; and words that
# stand out of their figure.
OVERLAPS = """
const apart = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) < 1
  || Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) < 1;
const found = [];
const compare = elements => {
  const boxes = elements.map(e => [e, e.getBoundingClientRect()]).filter(([e, b]) => b.width);
  boxes.forEach(([e, a], k) => boxes.slice(k + 1).forEach(([f, b]) => {
    if (!e.contains(f) && !apart(a, b)) found.push(`${e.textContent} | ${f.textContent}`); }));
};
compare([...document.querySelectorAll(
  "h1, h2, h3, p, li, dt, dd, nav, .card, .card > *, .wide, .controls label, .keys > *")]);
for (const chart of document.querySelectorAll("svg.chart")) {
  const texts = [...chart.querySelectorAll("text")], box = chart.getBoundingClientRect();
  compare(texts);
  for (const text of texts) {
    const b = text.getBoundingClientRect();
    if (b.left < box.left || b.right > box.right || b.top < box.top || b.bottom > box.bottom)
      found.push(`outside: ${text.textContent}`);
  }
}
return found;
"""


@pytest.mark.real
def test_a_page_of_real_images_is_of_moderate_size(psfhs, tmp_path):
    """On split val, with answers made from the labels: what counts is the pictures."""
    rng = np.random.default_rng(0)
    some = [case for case in read_cases(psfhs / "cases.csv") if case.split == "val"]
    found = [answer(case, rng, 256, calibrated=True) for case in some]
    path = tmp_path / "report.html"
    write_evaluation_report(
        path, some, found, psfhs / "images", summarise_by_device(some, found), []
    )
    assert 100_000 < path.stat().st_size < 1_000_000
