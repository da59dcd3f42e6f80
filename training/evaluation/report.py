"""The page that `training.evaluate --report` writes: one HTML file, which needs nothing else.

Tables, agreement, errors by landmark, device and angle, whether the stated uncertainty is true, the
best and the worst cases as pictures, and what was not answered. Errors in px are at 512 px.
"""

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.anatomy import LANDMARKS
from model.drawing.page import escape, page
from model.images.source import GreyFrame, ImageError, open_image
from model.results.files import write_bytes
from training.data.case_table import Case
from training.evaluation import figures as draw
from training.evaluation.chart import interval, signed
from training.evaluation.metrics import REFERENCE_PX, SDR_PX, case_errors
from training.evaluation.report_parts import (
    agreement,
    calibration,
    errors,
    risk_and_coverage,
    table,
)
from training.evaluation.scored import Figures, Scored, agreeing, estimate, held, share_of
from training.evaluation.statistics import Estimate

if TYPE_CHECKING:  # torch, which a report can do without
    from training.evaluation.predict import CasePrediction


TITLE = "Landmarks and angle of progression against labels"
NOTE = (
    "Labels of such images may come from segmentation masks (an ellipse fitted to each structure) "
    "and not from an expert's clicks: see the description of the data. Errors are then distances "
    "to what the masks say."
)
EXAMPLES = 12  # best and worst cases
ROWS = {
    "mre_px": "Mean radial error, px",
    "median_re_px": "Median radial error, px",
    **{f"mre_{name}_px": f"Mean radial error of {name}, px" for name in LANDMARKS},
    **{f"sdr_{limit}px": f"Landmarks within {limit} px, %" for limit in SDR_PX},
    "aop_error_deg": "AoP, mean absolute error, deg",
    "aop_error_median_deg": "AoP, median absolute error, deg",
    "aop_error_p95_deg": "AoP, 95th percentile, deg",
}
METHOD = (
    "<p>Written by <code>python -m training.evaluate --report</code> from a table of labels, the "
    "answers and the images; the same input gives the same page.</p><p>Radial error: the distance "
    "of answer and label. AoP: the angle PS2-PS1-FH1; its error is the absolute difference. "
    "Intervals: bootstrap over cases (percentiles of 2,000 resamples); of shares in the 90 % "
    "interval Clopper and Pearson, Biometrika 1934; of bias and limits Bland and Altman, Lancet "
    "1986 and Stat Methods Med Res 1999; ICC(2,1) Shrout and Fleiss, Psychol Bull 1979, its "
    "interval McGraw and Wong, Psychol Methods 1996; area under the risk-coverage curve Geifman et "
    "al., ICLR 2019. Nothing is corrected for the number of comparisons.</p>"
)
STYLE = (
    draw.STYLE
    + """\
tbody th { min-width: 6.5rem; position: sticky; left: 0; background: var(--card); }
td { min-width: 3.6rem; } td span { white-space: nowrap; } .number { overflow-wrap: normal; }
@media (max-width: 600px) { td.number, th.number { white-space: normal; } th, td { padding: 4px 6px;
  font-size: .88rem; } }
.figures small { display: block; font-size: .85rem; font-weight: 400; color: var(--dim); }
.wide { margin: 12px 0; } figcaption { font-size: .92rem; } nav { margin: 10px 0; }
figcaption b { color: var(--ink); } ul { columns: 16rem; } section { scroll-margin-top: 8px; }
.controls input { min-height: 0; } .controls label { min-height: 40px; }
#cases:has(#show-truth:not(:checked)) .picture .truth,
#cases:has(#show-answer:not(:checked)) .picture .answer { display: none; }
@media (min-width: 960px) { .beside { display: grid; gap: 14px; align-items: start;
  grid-template-columns: 390px minmax(0, 1fr); } .beside > .wide { margin-left: 10px; } }
"""
)


def write_report(
    path: Path,
    cases: Sequence[Case],
    predictions: "Sequence[CasePrediction]",
    images: Path,
    figures: Figures,
    missing: Sequence[str],
    title: str = TITLE,
    note: str = NOTE,
) -> None:
    """Write the page, whole or not at all.

    Args:
        cases, predictions: what was answered, in the same order; one or more.
        images: folder of the cases' images.
        figures: of `training.evaluate.evaluate`, for these cases.
        missing: names of cases without an answer.
        title: of the page. note: what must be known of the labels.

    Raises:
        ImageError: an image that is to be shown cannot be read.
        OSError: the page cannot be written.
    """
    scored = Scored(cases, predictions, *case_errors(predictions, cases))
    sections = {
        "Summary": summary(scored, figures, missing, note),
        "All figures": all_figures(figures),
        "Agreement": agreement(scored),
        "Errors": errors(scored, figures),
        "Calibration": calibration(scored),
        "Risk and coverage": risk_and_coverage(scored),
        "Cases": gallery(scored, images),
        "Failures and doubt": failures(scored, missing),
        "Method": METHOD,
    }
    ids = {name: name.lower().replace(" ", "-") for name in sections}
    links = "".join(f'<a href="#{ids[name]}">{name}</a>' for name in sections)
    body = "\n".join(
        f'<section id="{ids[name]}"><h2>{name}</h2>{html}</section>'
        for name, html in sections.items()
    )
    html = page(title, f'<nav class="keys">{links}</nav>\n{body}', style=STYLE)
    write_bytes(path, html.encode())


def summary(scored: Scored, figures: Figures, missing: Sequence[str], note: str) -> str:
    """The figures that are asked for first, and what they are of."""
    boxes = {
        "Cases answered": (f"{len(scored.cases)}", f"{len(missing)} not answered"),
        "Mean radial error": apart(estimate(figures["all"], "mre_px"), 2, " px"),
        "Mean AoP error": apart(estimate(figures["all"], "aop_error_deg"), 2, "°"),
    }
    found, icc = agreeing(scored, scored.everyone)
    if found:
        limits = f"limits {signed(found.lower.value)}° to {signed(found.upper.value)}°"
        boxes["AoP bias"] = f"{signed(found.bias.value)}°", limits
    if icc:
        boxes["AoP ICC(2,1)"] = apart(icc, 3)
    inside = held(scored, scored.everyone)
    if len(inside):
        boxes["In the 90 % interval"] = apart(share_of(inside), 0, " %")
    key_figures = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>"
        for name, (value, more) in boxes.items()
    )
    parts = ", ".join(f"{name}: {len(of)}" for name, of in scored.groups.items() if name != "all")
    words = f"{len(scored.cases)} cases" + (f" ({parts})." if parts else ".")
    alike = {case.group for case in scored.cases if case.group}
    if alike:
        words += (
            f" They come in {len(alike)} groups of near-duplicate images or of one patient, but "
            "the intervals take each case as independent, and so are too narrow."
        )
    return (
        f'<dl class="figures">{key_figures}</dl><p class="note">{escape(note)}</p><p>'
        f"{escape(words)} Errors in px are at {REFERENCE_PX} px (px times {REFERENCE_PX} / the "
        "image's longer side). What follows a figure in parentheses is its 95 % interval.</p>"
    )


def all_figures(figures: Figures) -> str:
    """Every figure for all cases and for each device."""
    columns = {}
    for name, group in figures.items():
        cells = {"Cases": f"{group['cases']}"}
        for key, words in ROWS.items():
            scale, places = (100, 0) if key.startswith("sdr") else (1, 2)
            found = Estimate(*(scale * value for value in estimate(group, key)))
            cells[words] = interval(found, places)
        columns[name] = cells
    return table(columns)


def gallery(scored: Scored, images: Path) -> str:
    """The best and the worst cases by AoP error, as pictures."""
    order = np.argsort(scored.aop_error_deg, kind="stable")
    best = order[: min(EXAMPLES, len(order) // 2)]
    worst = order[len(best) :][::-1][:EXAMPLES]
    parts = [
        f'<div class="controls">{draw.switch("truth", "label (truth): squares, full lines")}'
        f"{draw.switch('answer', 'answer (prediction): circles, dashed lines')}</div>"
        '<p class="dim">The angle opens at PS1 between PS2 and the tangent through FH1, which is '
        "drawn on past it. The switches hide a drawing.</p>"
    ]
    for words, chosen in (("worst", worst), ("best", best)):
        cards = "".join(card(scored, int(k), images) for k in chosen)
        heading = f"<h3>The {len(chosen)} {words} by AoP error</h3>"
        parts += [f'{heading}<div class="cards">{cards}</div>'] if len(chosen) else []
    return "".join(parts)


def card(scored: Scored, k: int, images: Path) -> str:
    """One case's picture and what is to be said of it."""
    case, found = scored.cases[k], scored.predictions[k]
    words = f"{scored.name(k)}: {scored.angles(k)}"
    read = next(islice(open_image(images / case.file).frames(), case.frame or 0, None), None)
    if not isinstance(read, GreyFrame):
        raise ImageError(f"{images / case.file}: {scored.name(k)} cannot be shown")
    shape = read.geometry.pixel_shape
    picture = draw.drawn_case(read.pixels, shape, case.landmarks_px, found.landmarks_px, words)
    device = f" · device {case.device}" if case.device else ""
    lines = [f"<b>{escape(scored.name(k))}</b>{escape(device)}", scored.angles(k)]
    if found.aop_interval_deg is not None:
        low, high = found.aop_interval_deg
        outside = "" if low <= case.aop_deg <= high else ", label outside"
        lines.append(f"90 % interval {low:.1f}° to {high:.1f}°{outside}")
    if found.expected_aop_error_deg is not None:
        lines.append(f"expected error {found.expected_aop_error_deg:.1f}°")
    radial = zip(LANDMARKS, scored.radial_px[k], strict=True)
    lines.append(", ".join(f"{name} {error:.1f}" for name, error in radial) + " px off")
    if found.reasons:
        lines.append(f'<span class="doubt">Not sure: {escape("; ".join(found.reasons))}</span>')
    return f'<figure class="card">{picture}<figcaption>{"<br>".join(lines)}</figcaption></figure>'


def failures(scored: Scored, missing: Sequence[str]) -> str:
    """What has no answer or no angle, and what is marked as doubtful."""
    undefined = np.flatnonzero(~np.isfinite(scored.difference_deg))
    parts = [
        listed("Without an answer, and part of no figure", missing),
        listed(
            "Without an angle, since two landmarks coincide (an error of 180° in all means, left "
            "out of agreement and coverage)",
            [scored.name(k) for k in undefined],
        ),
    ]
    doubtful = [k for k, found in enumerate(scored.predictions) if found.reasons]
    if not doubtful:
        return "".join([*parts, "<p>Marked as doubtful: none.</p>"])
    sure = np.setdiff1d(scored.everyone, doubtful)
    means = [
        f"{len(of)} {words} with a mean AoP error of "
        f"{interval(estimate(scored.figures(of), 'aop_error_deg'))} deg"
        for words, of in (("doubtful", np.array(doubtful)), ("others", sure))
        if len(of)
    ]
    columns: dict[str, dict[str, str]] = {"Label": {}, "Answer": {}, "Reasons": {}}
    for k in doubtful:
        name, label, angle = scored.name(k), scored.label_deg[k], scored.predictions[k].aop_deg
        columns["Label"][name] = f"{label:.1f}°"
        columns["Answer"][name] = f"{angle:.1f}°" if math.isfinite(angle) else "none"
        columns["Reasons"][name] = "; ".join(scored.predictions[k].reasons)
    return "".join([*parts, f"<p>Marked as doubtful: {', '.join(means)}.</p>", table(columns, "")])


def apart(one: Estimate, places: int, unit: str = "") -> tuple[str, str]:
    """A figure, and its interval."""
    value, _, rest = interval(one, places, unit).partition(" (")
    return value, rest.rstrip(")")


def listed(words: str, names: Sequence[str]) -> str:
    """Words, how many there are, and their names."""
    items = "".join(f"<li>{escape(name)}</li>" for name in names)
    return f"<p>{words}: {len(names) or 'none'}.</p>" + (f"<ul>{items}</ul>" if names else "")
