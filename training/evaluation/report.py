"""The page that `training.evaluate --report` writes: one HTML file that needs nothing else.

It shows all metrics, agreement, errors by landmark, device and angle, and how true the stated
uncertainty is. It shows pictures of the best and worst cases, and lists those without an answer.
Errors in px are at 512 px.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from model.anatomy import LANDMARKS, Floats
from model.drawing.page import escape, page
from model.images.source import GreyFrame, ImageError, open_image
from model.results.files import write_bytes
from training.data.case_table import Case
from training.evaluation import figures
from training.evaluation.figures import figure_html, interval_text, legend, signed_text
from training.evaluation.metrics import REFERENCE_PX, SDR_PX, Summary, case_errors, summarise
from training.evaluation.statistics import (
    BlandAltman,
    Estimate,
    area_under_risk_coverage,
    bland_altman,
    coverage_interval,
    error_when_answering,
    icc_2_1,
    risk_coverage,
)

if TYPE_CHECKING:  # imports torch, which an evaluation container does not have
    from training.evaluation.predict import CasePrediction

Indices = npt.NDArray[np.int_]  # (k,) places of cases in `EvaluatedCases.cases`
Columns = Mapping[str, Mapping[str, str]]  # a table's: name of column -> name of row -> cell

DEFAULT_TITLE = "Landmarks and angle of progression against labels"
DEFAULT_NOTE = (
    "The labels of such images may come from segmentation masks (an ellipse fitted to each "
    "structure) and not from an expert's clicks: see the description of the data. The errors are "
    "then distances to what the masks say."
)
EXAMPLE_CASES = 12  # pictures of the best cases, and as many of the worst
RANGES_DEG = (90, 110, 130, 150)  # bounds between ranges of the label's angle
ANSWERED_SHARES = (1.0, 0.9, 0.8, 0.7, 0.5)  # rows of the table of risk and coverage
LEAST_CASES_PER_BIN, MOST_BINS = 15, 10  # bins of similar expected error
METRIC_ROWS = {  # metric -> its row in the table of all figures
    "mre_px": "Mean radial error, px",
    "median_re_px": "Median radial error, px",
    **{f"mre_{name}_px": f"Mean radial error of {name}, px" for name in LANDMARKS},
    **{f"sdr_{limit}px": f"Landmarks within {limit} px, %" for limit in SDR_PX},
    "aop_error_deg": "AoP, mean absolute error, deg",
    "aop_error_median_deg": "AoP, median absolute error, deg",
    "aop_error_p95_deg": "AoP, 95th percentile, deg",
}
METHOD = (
    "<p><code>python -m training.evaluate --report</code> wrote this page from a table of labels, "
    "the answers and the images. The same input gives the same page.</p><p>Radial error: the "
    "distance between answer and label. AoP: the angle PS2-PS1-FH1; its error is the absolute "
    "difference. Sources of the intervals: bootstrap over cases (percentiles of 2,000 resamples) "
    "for errors; Clopper and Pearson, Biometrika 1934, for shares in the 90 % interval; Bland and "
    "Altman, Lancet 1986 and Stat Methods Med Res 1999, for bias and limits; McGraw and Wong, "
    "Psychol Methods 1996, for ICC(2,1), which is that of Shrout and Fleiss, Psychol Bull 1979. "
    "The area under the risk-coverage curve is that of Geifman et al., ICLR 2019. Nothing is "
    "corrected for multiple comparisons.</p>"
)
EVALUATION_STYLE = (
    figures.FIGURES_STYLE
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


@dataclass(frozen=True)
class EvaluatedCases:
    """Cases with their predictions, in the same order, and the errors.

    radial_px: (n, 3) px at 512 px. aop_error_deg: (n,), 180 for an answer without an angle.
    """

    cases: Sequence[Case]
    predictions: "Sequence[CasePrediction]"
    radial_px: Floats
    aop_error_deg: Floats

    @cached_property
    def label_deg(self) -> Floats:
        """(n,) angles of the labels."""
        return np.array([case.aop_deg for case in self.cases])

    @cached_property
    def difference_deg(self) -> Floats:
        """(n,) the answer's angle minus the label's; NaN for an answer without an angle."""
        return np.array([answer.aop_deg for answer in self.predictions]) - self.label_deg

    @property
    def all_indices(self) -> Indices:
        return np.arange(len(self.cases))

    @cached_property
    def devices(self) -> list[str]:
        """Names of the devices; empty unless at least two are known."""
        names = sorted({case.device for case in self.cases if case.device})
        return names if len(names) > 1 else []

    @cached_property
    def groups(self) -> dict[str, Indices]:
        """Name -> indices: all cases, and the cases of each device."""
        device = np.array([case.device or "" for case in self.cases])
        return {"all": self.all_indices} | {
            f"device {name}": np.flatnonzero(device == name) for name in self.devices
        }

    def indices_with(self, field: str) -> Indices:
        """The cases whose answer has an angle and a value in this field of `CasePrediction`."""
        stated = [getattr(answer, field) is not None for answer in self.predictions]
        return np.flatnonzero(np.array(stated) & np.isfinite(self.difference_deg))

    def label_in_interval(self, chosen: Indices) -> npt.NDArray[np.bool_]:
        """Whether the 90 % interval holds the label, for each chosen case that has an interval."""
        known = np.intersect1d(chosen, self.indices_with("aop_interval_deg"))
        ends = np.array([self.predictions[k].aop_interval_deg for k in known]).reshape(-1, 2)
        return (ends[:, 0] <= self.label_deg[known]) & (self.label_deg[known] <= ends[:, 1])

    def metrics_of(self, chosen: Indices) -> Summary:
        """`training.evaluation.metrics.summarise` of the chosen cases."""
        return summarise(self.radial_px[chosen], self.aop_error_deg[chosen])

    def agreement_of(self, chosen: Indices) -> tuple[BlandAltman | None, Estimate | None]:
        """Bland-Altman and ICC(2,1) of the chosen cases that have an angle.

        Each is None if it is not defined: both for fewer than two such cases, ICC also for cases
        that do not differ.
        """
        known = chosen[np.isfinite(self.difference_deg[chosen])]
        if len(known) < 2:
            return None, None
        label, difference = self.label_deg[known], self.difference_deg[known]
        try:
            icc = icc_2_1(np.column_stack([label, label + difference]))
        except ValueError:  # the cases do not differ
            icc = None
        return bland_altman(difference), icc

    def name_of(self, k: int) -> str:
        """The case's file, and the frame if it is one of a stack."""
        case = self.cases[k]
        return case.file if case.frame is None else f"{case.file}, frame {case.frame}"

    def angles_text(self, k: int) -> str:
        """Both angles of a case and their difference, in words."""
        label, difference = self.label_deg[k], self.difference_deg[k]
        if not math.isfinite(difference):
            return f"label {label:.1f}°, answer without an angle"
        return f"label {label:.1f}°, answer {label + difference:.1f}° ({signed_text(difference)}°)"


def write_evaluation_report(
    path: Path,
    cases: Sequence[Case],
    predictions: "Sequence[CasePrediction]",
    images: Path,
    metrics: Mapping[str, Summary],
    missing: Sequence[str],
    title: str = DEFAULT_TITLE,
    note: str = DEFAULT_NOTE,
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: HTML file to write.
        cases, predictions: the answered cases, one or more, in the same order.
        images: folder of the cases' images.
        metrics: name of a group of these cases ("all", "device A", ...) -> its metrics.
        missing: names of cases without an answer.
        title: the page's title, in plain text.
        note: what a reader must know about the labels, in plain text.

    Raises:
        ImageError: an image that the page shows cannot be read.
        OSError: the page cannot be written.
    """
    evaluated = EvaluatedCases(cases, predictions, *case_errors(predictions, cases))
    sections = {
        "Summary": summary_section(evaluated, metrics["all"], missing, note),
        "All figures": metrics_table(metrics),
        "Agreement": agreement_section(evaluated),
        "Errors": errors_section(evaluated, metrics),
        "Calibration": calibration_section(evaluated),
        "Risk and coverage": risk_section(evaluated),
        "Cases": cases_section(evaluated, images),
        "Failures and doubt": failures_section(evaluated, missing),
        "Method": METHOD,
    }
    ids = {name: name.lower().replace(" ", "-") for name in sections}
    links = "".join(f'<a href="#{ids[name]}">{name}</a>' for name in sections)
    body = "\n".join(
        f'<section id="{ids[name]}"><h2>{name}</h2>{html}</section>'
        for name, html in sections.items()
    )
    html = page(title, f'<nav class="keys">{links}</nav>\n{body}', style=EVALUATION_STYLE)
    write_bytes(path, html.encode())


# ---- Summary and all figures


def summary_section(
    evaluated: EvaluatedCases, metrics: Summary, missing: Sequence[str], note: str
) -> str:
    """HTML of the key figures, and of the cases they cover."""
    boxes = {
        "Cases answered": (f"{len(evaluated.cases)}", f"{len(missing)} not answered"),
        "Mean radial error": split_interval(estimate_of(metrics, "mre_px"), 2, " px"),
        "Mean AoP error": split_interval(estimate_of(metrics, "aop_error_deg"), 2, "°"),
    }
    agreement, icc = evaluated.agreement_of(evaluated.all_indices)
    if agreement:
        lower, upper = signed_text(agreement.lower.value), signed_text(agreement.upper.value)
        boxes["AoP bias"] = f"{signed_text(agreement.bias.value)}°", f"limits {lower}° to {upper}°"
    if icc:
        boxes["AoP ICC(2,1)"] = split_interval(icc, 3)
    inside = evaluated.label_in_interval(evaluated.all_indices)
    if len(inside):
        boxes["In the 90 % interval"] = split_interval(percentage(inside), 0, " %")
    key_figures = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>"
        for name, (value, more) in boxes.items()
    )
    groups = evaluated.groups.items()
    parts = ", ".join(f"{name}: {len(chosen)}" for name, chosen in groups if name != "all")
    scope = f"{len(evaluated.cases)} cases" + (f" ({parts})." if parts else ".")
    case_groups = {case.group for case in evaluated.cases if case.group}
    if case_groups:
        scope += (
            f" They fall in {len(case_groups)} groups; a group holds near-duplicate images or the "
            "images of one patient. The intervals take each case as independent, so they are too "
            "narrow."
        )
    return (
        f'<dl class="figures">{key_figures}</dl><p class="note">{escape(note)}</p><p>'
        f"{escape(scope)} Errors in px are at {REFERENCE_PX} px (px times {REFERENCE_PX} / the "
        "image's longer side). Parentheses hold 95 % intervals.</p>"
    )


def metrics_table(metrics: Mapping[str, Summary]) -> str:
    """HTML table of all metrics, a column for each group of cases."""
    columns = {}
    for name, group in metrics.items():
        cells = {"Cases": f"{group['cases']}"}
        for key, row in METRIC_ROWS.items():
            scale, places = (100, 0) if key.startswith("sdr") else (1, 2)
            scaled = Estimate(*(scale * value for value in estimate_of(group, key)))
            cells[row] = interval_text(scaled, places)
        columns[name] = cells
    return html_table(columns)


# ---- Agreement


def agreement_section(evaluated: EvaluatedCases) -> str:
    """HTML of the angle's Bland-Altman plot, and of a table with ICC(2,1) for each group."""
    whole, _ = evaluated.agreement_of(evaluated.all_indices)
    if whole is None:
        return "<p>Agreement needs two cases with an angle.</p>"
    columns = {}
    for name, chosen in evaluated.groups.items():
        agreement, icc = evaluated.agreement_of(chosen)
        if agreement:
            columns[name] = {
                "Cases": f"{agreement.cases}",
                "Bias, deg": interval_text(agreement.bias),
                "SD, deg": f"{agreement.deviation:.1f}",
                "Lower limit, deg": interval_text(agreement.lower),
                "Upper limit, deg": interval_text(agreement.upper),
                "ICC(2,1)": interval_text(icc, 3) if icc else "not defined",
            }
    known = np.flatnonzero(np.isfinite(evaluated.difference_deg))
    label, difference = evaluated.label_deg[known], evaluated.difference_deg[known]
    series, keys = device_series(evaluated, known)
    tooltips = [f"{evaluated.name_of(k)}: {evaluated.angles_text(k)}" for k in known.tolist()]
    chart = figures.difference_chart(label + difference / 2, difference, series, tooltips, whole)
    caption = (
        "Bland-Altman plot, one symbol for each case. Full line: bias. Dashed lines: limits of "
        "agreement (bias ± 1.96 SD). Bands: their 95 % intervals. Dotted line: no difference."
    )
    return (
        f'<div class="beside">{figure_html(chart, keys, caption)}<div>{html_table(columns)}'
        "<p>Differences are answer minus label: positive if the answer's angle is wider. "
        "ICC(2,1): two-way random effects, absolute agreement, single reading.</p></div></div>"
    )


def device_series(evaluated: EvaluatedCases, chosen: Indices) -> tuple[list[int], str]:
    """Series number of each chosen case, one series for each device, and the legend as HTML.

    With fewer than two known devices there is one series, and the legend is empty.
    """
    if not evaluated.devices:
        return [0] * len(chosen), ""
    names = [evaluated.cases[k].device or "not known" for k in chosen]
    known = [*evaluated.devices, *(["not known"] if "not known" in names else [])]
    return [known.index(name) for name in names], legend([f"device {name}" for name in known])


# ---- Errors by landmark, device and angle


def errors_section(evaluated: EvaluatedCases, metrics: Mapping[str, Summary]) -> str:
    """HTML of the errors by landmark, by device, and by range of the label's angle."""
    angle_chart, angle_table = errors_by_angle(evaluated)
    last_px = float(10 * np.ceil(np.percentile(evaluated.radial_px, 98) / 10 + 1e-9))
    beyond = (evaluated.radial_px > last_px).sum()
    landmark_chart = figure_html(
        figures.cumulative_chart(evaluated.radial_px, last_px),
        legend(LANDMARKS, line=True),
        f"By landmark: share of cases within an error. {beyond} of {evaluated.radial_px.size} "
        f"landmarks are more than {last_px:.0f} px off.",
    )
    device_chart = figure_html(
        figures.groups_chart(
            [f"{name}\nn = {group['cases']}" for name, group in metrics.items()],
            [
                [estimate_of(group, f"mre_{name}_px") for group in metrics.values()]
                for name in LANDMARKS
            ],
            "mean radial error, px",
            "Mean radial error by device and landmark",
        ),
        legend(LANDMARKS),
        "By device: mean radial error of each landmark, with its 95 % interval.",
    )
    return (
        f'<div class="charts">{landmark_chart}{device_chart}{angle_chart}</div>'
        f"<h3>By landmark</h3>{landmark_table(evaluated, metrics['all'])}"
        "<p>Shift: mean of answer minus label along the image's axes.</p>"
        f"<h3>By AoP of the label</h3>{angle_table}"
        "<p>Labels have errors too, so the lowest labels tend to be too low and the highest too "
        "high. Expect a bias towards the middle even from a perfect reader.</p>"
    )


def landmark_table(evaluated: EvaluatedCases, metrics: Summary) -> str:
    """HTML table of each landmark's radial error and systematic shift."""
    answer = np.array([one.landmarks_px for one in evaluated.predictions])
    label = np.array([case.landmarks_px for case in evaluated.cases])
    scale = REFERENCE_PX / np.array([one.longer_side_px for one in evaluated.predictions])
    shift = ((answer - label) * scale[:, None, None]).mean(axis=0)
    median, most = np.percentile(evaluated.radial_px, [50, 95], axis=0)
    return html_table(
        {
            name: {
                "Mean, px": interval_text(estimate_of(metrics, f"mre_{name}_px")),
                "Median, px": f"{median[k]:.1f}",
                "95th percentile, px": f"{most[k]:.1f}",
                "Shift to the right, px": signed_text(shift[k, 0]),
                "Shift down, px": signed_text(shift[k, 1]),
            }
            for k, name in enumerate(LANDMARKS)
        }
    )


def errors_by_angle(evaluated: EvaluatedCases) -> tuple[str, str]:
    """Chart and table, as HTML, of the errors by range of the label's angle."""
    range_of_case = np.searchsorted(RANGES_DEG, evaluated.label_deg, side="right")
    between = (f"{low}–{high}" for low, high in pairwise(RANGES_DEG))
    names = [f"< {RANGES_DEG[0]}", *between, f"≥ {RANGES_DEG[-1]}"]
    ranges = {name: np.flatnonzero(range_of_case == k) for k, name in enumerate(names)}
    ranges = {name: chosen for name, chosen in ranges.items() if len(chosen)}
    metrics = {name: evaluated.metrics_of(chosen) for name, chosen in ranges.items()}
    columns = {}
    for name, chosen in ranges.items():
        differences = evaluated.difference_deg[chosen]
        inside = evaluated.label_in_interval(chosen)
        known = differences[np.isfinite(differences)]
        columns[f"{name}°"] = {
            "Cases": f"{len(chosen)}",
            "AoP error, deg": interval_text(estimate_of(metrics[name], "aop_error_deg")),
            "AoP bias, deg": signed_text(float(known.mean())) if len(known) else "–",
            "Mean radial error, px": interval_text(estimate_of(metrics[name], "mre_px")),
        }
        if len(inside):
            columns[f"{name}°"]["In the 90 % interval"] = f"{inside.sum()} of {len(inside)}"
    chart = figures.groups_chart(
        [f"{name}\nn = {len(chosen)}" for name, chosen in ranges.items()],
        [[estimate_of(group, "aop_error_deg") for group in metrics.values()]],
        "mean AoP error, deg",
        "Mean error of the angle by range of the label",
    )
    caption = "By AoP of the label, deg: mean absolute error of the angle, with its 95 % interval."
    return figure_html(chart, "", caption), html_table(columns)


# ---- Whether the stated uncertainty is true and useful


def calibration_section(evaluated: EvaluatedCases) -> str:
    """HTML that compares intervals and expected errors with the labels and the observed errors."""
    columns = {
        name: calibration_cells(evaluated, chosen) for name, chosen in evaluated.groups.items()
    }
    if not any(columns.values()):
        return (
            "<p>These answers carry no intervals and no expected errors. Either the model is not "
            "calibrated, or another reader gave them.</p>"
        )
    charts = []
    known = evaluated.indices_with("expected_aop_error_deg")
    if len(known):
        expected = np.array([evaluated.predictions[k].expected_aop_error_deg for k in known])
        bins = [calibration_bins(evaluated, known, expected, "aop_error_deg")]
        chart = figures.calibration_chart(bins, "deg", "Observed over expected error of the angle")
        caption = "AoP error of cases in bins of similar expected error. Dotted line: as expected."
        charts.append(figure_html(chart, "", caption))
    known = evaluated.indices_with("expected_error_px")
    if len(known):
        scale = REFERENCE_PX / np.array([evaluated.predictions[k].longer_side_px for k in known])
        expected = np.array([evaluated.predictions[k].expected_error_px for k in known]).T * scale
        bins = [
            calibration_bins(evaluated, known, row, f"mre_{name}_px")
            for name, row in zip(LANDMARKS, expected, strict=True)
        ]
        chart = figures.calibration_chart(bins, "px", "Observed over expected radial error")
        caption = "Radial error of each landmark, in the same way."
        charts.append(figure_html(chart, legend(LANDMARKS), caption))
    return html_table(columns) + f'<div class="charts">{"".join(charts)}</div>'


def calibration_cells(evaluated: EvaluatedCases, chosen: Indices) -> dict[str, str]:
    """Column of a table: the chosen cases' coverage, interval width, and expected error.

    Rows that need what the answers lack are left out.
    """
    cells = {}
    inside = evaluated.label_in_interval(chosen)
    if len(inside):
        share = percentage(inside)
        known = np.intersect1d(chosen, evaluated.indices_with("aop_interval_deg"))
        ends = np.array([evaluated.predictions[k].aop_interval_deg for k in known])
        cells["Label in the 90 % interval"] = f"{inside.sum()} of {len(inside)}"
        cells["Coverage, %"] = interval_text(share, 0)
        cells["Coverage agrees with 90 %?"] = "yes" if share.low <= 90 <= share.high else "no"
        cells["Median width, deg"] = f"{np.median(np.ptp(ends, axis=1)):.1f}"
    known = np.intersect1d(chosen, evaluated.indices_with("expected_aop_error_deg"))
    if len(known):
        expected = [evaluated.predictions[k].expected_aop_error_deg for k in known]
        observed = estimate_of(evaluated.metrics_of(known), "aop_error_deg")
        cells["Expected AoP error, mean, deg"] = f"{np.mean(np.array(expected)):.1f}"
        cells["Observed AoP error, mean, deg"] = interval_text(observed)
    return cells


def calibration_bins(
    evaluated: EvaluatedCases, chosen: Indices, expected: Floats, key: str
) -> list[tuple[float, Estimate]]:
    """Mean expected error and observed metric `key`, for each bin of similar expected error.

    expected: (k,) the chosen cases' expected errors, in the metric's unit.
    """
    count = max(1, min(MOST_BINS, len(chosen) // LEAST_CASES_PER_BIN))
    parts = np.array_split(np.argsort(expected, kind="stable"), count)
    return [
        (float(expected[part].mean()), estimate_of(evaluated.metrics_of(chosen[part]), key))
        for part in parts
    ]


def risk_section(evaluated: EvaluatedCases) -> str:
    """HTML of the answered cases' AoP error if the least sure cases are left out."""
    answers, error = evaluated.predictions, evaluated.aop_error_deg
    if all(one.expected_aop_error_deg is not None for one in answers):
        criterion = "expected AoP error"
        risk = np.array([one.expected_aop_error_deg for one in answers])
    elif all(len(one.confidence) for one in answers):
        criterion = "lowest confidence"
        risk = -np.array([one.confidence.min() for one in answers])
    else:
        return (
            "<p>These answers carry neither expected errors nor confidences, so there is no order "
            "in which to leave cases out.</p>"
        )
    areas = area_under_risk_coverage(error, risk)
    names = [
        f"by {criterion}, area {areas.own:.2f}°",
        f"best possible order, area {areas.best:.2f}°",
        f"random order, area {areas.random:.2f}°",
    ]
    caption = (
        "Mean AoP error of the answered cases if the least sure ones are left out. Area: the mean "
        f"over all shares. The first {100 * figures.LEAST_SHARE:.0f} % are not drawn."
    )
    best = risk_coverage(error, error)[1]
    columns: dict[str, dict[str, str]] = {
        "AoP error, deg": {},
        "Reduction against all, %": {},
        "Best possible, deg": {},
    }
    for share in ANSWERED_SHARES:
        mean, reduced_share = error_when_answering(error, risk, share)
        reduction = Estimate(*(100 * value for value in reduced_share))
        cells = (
            interval_text(mean, 2),
            interval_text(reduction, 0) if share < 1 else "–",
            f"{best[math.ceil(share * len(best) - 1e-9) - 1]:.2f}",
        )
        for column, cell in zip(columns.values(), cells, strict=True):
            column[f"{100 * share:.0f} % answered"] = cell
    chart = figure_html(figures.risk_chart(error, risk), legend(names, line=True), caption)
    return (
        f'<div class="beside">{chart}<div>{html_table(columns)}'
        f"<p>Cases are left out by {criterion}. The best possible order is that of the errors "
        "themselves, which nobody knows in advance.</p>"
        "</div></div>"
    )


# ---- Cases


def cases_section(evaluated: EvaluatedCases, images: Path) -> str:
    """HTML with pictures of the worst and the best cases by AoP error."""
    order = np.argsort(evaluated.aop_error_deg, kind="stable")
    best = order[: min(EXAMPLE_CASES, len(order) // 2)]
    worst = order[len(best) :][::-1][:EXAMPLE_CASES]
    label = figures.reading_switch("truth", "label (truth): squares, full lines")
    answer = figures.reading_switch("answer", "answer (prediction): circles, dashed lines")
    parts = [
        f'<div class="controls">{label}{answer}</div>'
        '<p class="dim">The angle opens at PS1, between PS2 and the tangent through FH1. The '
        "tangent is drawn a little past FH1. The switches hide a drawing.</p>"
    ]
    for which, chosen in (("worst", worst), ("best", best)):
        cards = "".join(case_card(evaluated, k, images) for k in chosen.tolist())
        heading = f"<h3>The {len(chosen)} {which} by AoP error</h3>"
        parts += [f'{heading}<div class="cards">{cards}</div>'] if len(chosen) else []
    return "".join(parts)


def case_card(evaluated: EvaluatedCases, k: int, images: Path) -> str:
    """HTML of a case's picture and description.

    Raises:
        ImageError: the image cannot be read, or lacks the case's frame.
    """
    case, answer = evaluated.cases[k], evaluated.predictions[k]
    name, angles = evaluated.name_of(k), evaluated.angles_text(k)
    frame = next(islice(open_image(images / case.file).frames(), case.frame or 0, None), None)
    if not isinstance(frame, GreyFrame):
        reason = frame.reason if frame else "the file has fewer frames"
        raise ImageError(f"{images / case.file}: {name} cannot be shown: {reason}")
    picture = figures.picture_of_case(
        frame.pixels,
        frame.geometry.pixel_shape,
        case.landmarks_px,
        answer.landmarks_px,
        f"{name}: {angles}",
    )
    device = f" · device {case.device}" if case.device else ""
    lines = [f"<b>{escape(name)}</b>{escape(device)}", angles]
    if answer.aop_interval_deg is not None:
        low, high = answer.aop_interval_deg
        outside = "" if low <= case.aop_deg <= high else ", label outside"
        lines.append(f"90 % interval {low:.1f}° to {high:.1f}°{outside}")
    if answer.expected_aop_error_deg is not None:
        lines.append(f"expected error {answer.expected_aop_error_deg:.1f}°")
    radial = zip(LANDMARKS, evaluated.radial_px[k], strict=True)
    lines.append(", ".join(f"{name} {error:.1f}" for name, error in radial) + " px off")
    if answer.reasons:
        lines.append(f'<span class="doubt">Not sure: {escape("; ".join(answer.reasons))}</span>')
    return f'<figure class="card">{picture}<figcaption>{"<br>".join(lines)}</figcaption></figure>'


# ---- Failures and doubt


def failures_section(evaluated: EvaluatedCases, missing: Sequence[str]) -> str:
    """HTML of the cases without an answer or an angle, and of the cases marked as doubtful."""
    undefined = np.flatnonzero(~np.isfinite(evaluated.difference_deg)).tolist()
    parts = [
        named_list("Without an answer, and part of no figure", missing),
        named_list(
            "Without an angle, because two landmarks coincide (they count as an error of 180° in "
            "means, and are left out of agreement and coverage)",
            [evaluated.name_of(k) for k in undefined],
        ),
    ]
    doubtful = [k for k, answer in enumerate(evaluated.predictions) if answer.reasons]
    if not doubtful:
        return "".join([*parts, "<p>Marked as doubtful: none.</p>"])
    sure = np.setdiff1d(evaluated.all_indices, doubtful)
    means = [
        f"{len(chosen)} {which} with a mean AoP error of "
        f"{interval_text(estimate_of(evaluated.metrics_of(chosen), 'aop_error_deg'))} deg"
        for which, chosen in (("doubtful", np.array(doubtful)), ("others", sure))
        if len(chosen)
    ]
    columns: dict[str, dict[str, str]] = {"Label": {}, "Answer": {}, "Reasons": {}}
    for k in doubtful:
        name, answer = evaluated.name_of(k), evaluated.predictions[k]
        columns["Label"][name] = f"{evaluated.label_deg[k]:.1f}°"
        columns["Answer"][name] = (
            f"{answer.aop_deg:.1f}°" if math.isfinite(answer.aop_deg) else "none"
        )
        columns["Reasons"][name] = "; ".join(answer.reasons)
    return "".join(
        [*parts, f"<p>Marked as doubtful: {', '.join(means)}.</p>", html_table(columns, "")]
    )


def named_list(heading: str, names: Sequence[str]) -> str:
    """HTML of the heading, the number of names, and the names."""
    items = "".join(f"<li>{escape(name)}</li>" for name in names)
    return f"<p>{heading}: {len(names) or 'none'}.</p>" + (f"<ul>{items}</ul>" if names else "")


# ---- Numbers and tables


def estimate_of(metrics: Summary, key: str) -> Estimate:
    """A metric with its interval."""
    return Estimate(**metrics[key])


def percentage(hits: npt.NDArray[np.bool_]) -> Estimate:
    """Percentage of hits, with its 95 % binomial interval."""
    low, high = coverage_interval(int(hits.sum()), len(hits))
    return Estimate(100 * float(hits.mean()), 100 * low, 100 * high)


def split_interval(one: Estimate, places: int, unit: str = "") -> tuple[str, str]:
    """An estimate's value and its interval, as two texts."""
    value, _, rest = interval_text(one, places, unit).partition(" (")
    return value, rest.rstrip(")")


def html_table(columns: Columns, kind: str = "number") -> str:
    """HTML table of plain texts, in which a dash stands for a cell that a column lacks.

    kind: CSS class of the cells. In cells of class "number" no line breaks within an interval.
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
