"""The measured parts of an evaluation's report: agreement, errors, calibration, risk (HTML)."""

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from model.anatomy import LANDMARKS
from model.drawing.page import escape
from training.evaluation import figures as draw
from training.evaluation.chart import figure, interval, legend, signed
from training.evaluation.metrics import REFERENCE_PX
from training.evaluation.scored import (
    Chosen,
    Figures,
    Scored,
    agreeing,
    binned,
    estimate,
    given,
    held,
    share_of,
)
from training.evaluation.statistics import (
    Estimate,
    area_under_risk_coverage,
    error_when_answering,
    risk_coverage,
)

Columns = Mapping[str, Mapping[str, str]]  # column -> row -> cell


RANGES_DEG = (90, 110, 130, 150)  # where ranges of the labelled angle meet
ANSWERED = (1.0, 0.9, 0.8, 0.7, 0.5)  # shares of the cases


def agreement(scored: Scored) -> str:
    """Bland and Altman's figure and ICC(2,1) of the angle."""
    whole, _ = agreeing(scored, scored.everyone)
    if whole is None:
        return "<p>Agreement needs two cases with an angle.</p>"
    columns = {}
    for name, chosen in scored.groups.items():
        found, icc = agreeing(scored, chosen)
        if found:
            columns[name] = {
                "Cases": f"{found.cases}",
                "Bias, deg": interval(found.bias),
                "SD, deg": f"{found.deviation:.1f}",
                "Lower limit, deg": interval(found.lower),
                "Upper limit, deg": interval(found.upper),
                "ICC(2,1)": interval(icc, 3) if icc else "not defined",
            }
    known = np.flatnonzero(np.isfinite(scored.difference_deg))
    label, difference = scored.label_deg[known], scored.difference_deg[known]
    series, keys = series_of(scored, known)
    words = [f"{scored.name(k)}: {scored.angles(k)}" for k in known]
    chart = draw.difference_chart(label + difference / 2, difference, series, words, whole)
    caption = (
        "Bland-Altman plot, a symbol a case. Full line: bias; dashed: limits of agreement (bias ± "
        "1.96 SD); bands: their 95 % intervals; dotted: no difference."
    )
    return (
        f'<div class="beside">{figure(chart, keys, caption)}<div>{table(columns)}'
        "<p>Differences are answer minus label, positive where the answer is the wider angle. "
        "ICC(2,1): two-way random effects, absolute agreement, single reading.</p></div></div>"
    )


def series_of(scored: Scored, chosen: Chosen) -> tuple[list[int], str]:
    """Number of each case's device, and the legend that names them; none where it is one."""
    if not scored.devices:
        return [0] * len(chosen), ""
    names = [scored.cases[k].device or "not known" for k in chosen]
    known = [*scored.devices, *(["not known"] if "not known" in names else [])]
    return [known.index(name) for name in names], legend([f"device {name}" for name in known])


def errors(scored: Scored, figures: Figures) -> str:
    """Errors by landmark, by device, and by range of the labelled angle."""
    by_range, range_table = ranges(scored)
    last = float(10 * np.ceil(np.percentile(scored.radial_px, 98) / 10 + 1e-9))
    beyond = (scored.radial_px > last).sum()
    by_landmark = figure(
        draw.cumulative_chart(scored.radial_px, last),
        legend(LANDMARKS, line=True),
        f"By landmark: share of cases within an error. {beyond} of {scored.radial_px.size} "
        f"landmarks are further off than {last:.0f} px.",
    )
    by_device = figure(
        draw.groups_chart(
            [f"{name}\nn = {group['cases']}" for name, group in figures.items()],
            [[estimate(of, f"mre_{name}_px") for of in figures.values()] for name in LANDMARKS],
            "mean radial error, px",
            "Mean radial error by device and landmark",
        ),
        legend(LANDMARKS),
        "By device: mean radial error of each landmark, with its 95 % interval.",
    )
    return (
        f'<div class="charts">{by_landmark}{by_device}{by_range}</div>'
        f"<h3>By landmark</h3>{landmark_table(scored, figures)}"
        "<p>Shift: mean of answer minus label along the image's axes.</p>"
        f"<h3>By AoP of the label</h3>{range_table}"
        "<p>A label's own error lets the lowest labels be too low and the highest too high: a bias "
        "towards the middle is to be expected even of a perfect reader.</p>"
    )


def landmark_table(scored: Scored, figures: Figures) -> str:
    """Radial error and systematic shift of each landmark."""
    found = np.array([one.landmarks_px for one in scored.predictions])
    truth = np.array([case.landmarks_px for case in scored.cases])
    scale = REFERENCE_PX / np.array([one.longer_side_px for one in scored.predictions])
    shift = ((found - truth) * scale[:, None, None]).mean(axis=0)
    median, most = np.percentile(scored.radial_px, [50, 95], axis=0)
    return table(
        {
            name: {
                "Mean, px": interval(estimate(figures["all"], f"mre_{name}_px")),
                "Median, px": f"{median[k]:.1f}",
                "95th percentile, px": f"{most[k]:.1f}",
                "Shift to the right, px": signed(shift[k, 0]),
                "Shift down, px": signed(shift[k, 1]),
            }
            for k, name in enumerate(LANDMARKS)
        }
    )


def ranges(scored: Scored) -> tuple[str, str]:
    """Figure and table of the errors by range of the labelled angle."""
    place = np.searchsorted(RANGES_DEG, scored.label_deg, side="right")
    between = (f"{low}–{high}" for low, high in pairwise(RANGES_DEG))
    names = [f"< {RANGES_DEG[0]}", *between, f"≥ {RANGES_DEG[-1]}"]
    chosen = {name: of for k, name in enumerate(names) if len(of := np.flatnonzero(place == k))}
    found = {name: scored.figures(of) for name, of in chosen.items()}
    columns = {}
    for name, of in chosen.items():
        differences, inside = scored.difference_deg[of], held(scored, of)
        known = differences[np.isfinite(differences)]
        columns[f"{name}°"] = {
            "Cases": f"{len(of)}",
            "AoP error, deg": interval(estimate(found[name], "aop_error_deg")),
            "AoP bias, deg": signed(float(known.mean())) if len(known) else "–",
            "Mean radial error, px": interval(estimate(found[name], "mre_px")),
        }
        if len(inside):
            columns[f"{name}°"]["In the 90 % interval"] = f"{inside.sum()} of {len(inside)}"
    chart = draw.groups_chart(
        [f"{name}\nn = {len(of)}" for name, of in chosen.items()],
        [[estimate(of, "aop_error_deg") for of in found.values()]],
        "mean AoP error, deg",
        "Mean error of the angle by range of the label",
    )
    caption = "By AoP of the label, deg: mean absolute error of the angle, with its 95 % interval."
    return figure(chart, "", caption), table(columns)


def calibration(scored: Scored) -> str:
    """Whether intervals hold the label as often as they say, and errors are as expected."""
    columns = {name: calibrated(scored, chosen) for name, chosen in scored.groups.items()}
    if not any(columns.values()):
        return (
            "<p>These answers carry no intervals and no expected errors: the model is not "
            "calibrated, or they are another reader's.</p>"
        )
    charts = []
    told = given(scored, "expected_aop_error_deg")
    if len(told):
        expected = np.array([scored.predictions[k].expected_aop_error_deg for k in told])
        bins = [binned(scored, told, expected, "aop_error_deg")]
        chart = draw.calibration_chart(bins, "deg", "Observed over expected error of the angle")
        caption = "AoP error: cases in bins of like expected error. Dotted: as expected."
        charts.append(figure(chart, "", caption))
    told = given(scored, "expected_error_px")
    if len(told):
        scale = REFERENCE_PX / np.array([scored.predictions[k].longer_side_px for k in told])
        expected = np.array([scored.predictions[k].expected_error_px for k in told]).T * scale
        bins = [
            binned(scored, told, of, f"mre_{name}_px")
            for name, of in zip(LANDMARKS, expected, strict=True)
        ]
        chart = draw.calibration_chart(bins, "px", "Observed over expected radial error")
        charts.append(figure(chart, legend(LANDMARKS), "Radial error of each landmark, likewise."))
    return table(columns) + f'<div class="charts">{"".join(charts)}</div>'


def calibrated(scored: Scored, chosen: Chosen) -> dict[str, str]:
    """Coverage and sharpness of the intervals of some cases, and their expected error."""
    cells = {}
    inside = held(scored, chosen)
    if len(inside):
        share = share_of(inside)
        of = np.intersect1d(chosen, given(scored, "aop_interval_deg"))
        widths = [np.ptp(scored.predictions[k].aop_interval_deg) for k in of]
        cells["Label in the 90 % interval"] = f"{inside.sum()} of {len(inside)}"
        cells["Coverage, %"] = interval(share, 0)
        cells["90 % in this interval?"] = "yes" if share.low <= 90 <= share.high else "no"
        cells["Median width, deg"] = f"{np.median(widths):.1f}"
    told = np.intersect1d(chosen, given(scored, "expected_aop_error_deg"))
    if len(told):
        expected = np.mean([scored.predictions[k].expected_aop_error_deg for k in told])
        cells["Expected AoP error, mean, deg"] = f"{expected:.1f}"
        observed = estimate(scored.figures(told), "aop_error_deg")
        cells["Observed AoP error, mean, deg"] = interval(observed)
    return cells


def risk_and_coverage(scored: Scored) -> str:
    """The error of those answered where the least sure are left out."""
    found, error = scored.predictions, scored.aop_error_deg
    if all(one.expected_aop_error_deg is not None for one in found):
        risk, words = np.array([one.expected_aop_error_deg for one in found]), "expected AoP error"
    elif all(len(one.confidence) for one in found):
        risk, words = -np.array([one.confidence.min() for one in found]), "lowest confidence"
    else:
        return (
            "<p>These answers carry neither expected errors nor confidences: there is no order in "
            "which to leave cases out.</p>"
        )
    areas = area_under_risk_coverage(error, risk)
    names = [
        f"by {words}, area {areas.own:.2f}°",
        f"best possible order, area {areas.best:.2f}°",
        f"random order, area {areas.random:.2f}°",
    ]
    caption = (
        "Mean AoP error of the cases answered where the least sure are left out. Area: the mean "
        f"over all shares; the first {100 * draw.FIRST_SHARE:.0f} % are not drawn."
    )
    best = risk_coverage(error, error)[1]
    columns: dict[str, dict[str, str]] = {
        "AoP error, deg": {},
        "Below that of all by, %": {},
        "Best possible, deg": {},
    }
    for share in ANSWERED:
        mean, part = error_when_answering(error, risk, share)
        below = interval(Estimate(*(100 * value for value in part)), 0) if share < 1 else "–"
        cells = interval(mean, 2), below, f"{best[math.ceil(share * len(best) - 1e-9) - 1]:.2f}"
        for column, cell in zip(columns.values(), cells, strict=True):
            column[f"{100 * share:.0f} % answered"] = cell
    return (
        f'<div class="beside">{figure(draw.risk_chart(error, risk), legend(names, True), caption)}'
        f"<div>{table(columns)}<p>Cases are left out by {words}. The best possible order is that "
        "of the errors themselves, which nobody knows.</p></div></div>"
    )


def table(columns: Columns, kind: str = "number") -> str:
    """An HTML table of plain texts; a cell that a column lacks is a dash.

    kind: of the cells; of numbers no line breaks within an interval.
    """

    def cell(text: str) -> str:
        value, bracket, rest = escape(text).partition(" (")
        together = f"{value} <span>({rest}</span>" if bracket and kind == "number" else escape(text)
        return f'<td class="{kind}">{together}</td>'

    rows = dict.fromkeys(row for cells in columns.values() for row in cells)
    head = "".join(f'<th scope="col" class="{kind}">{escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(row)}</th>'
        + "".join(cell(cells.get(row, "–")) for cells in columns.values())
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )
