"""Cases with their answers and errors, in the groups of which a report speaks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from model.anatomy import Floats
from training.data.case_table import Case
from training.evaluation.chart import signed
from training.evaluation.metrics import summarise
from training.evaluation.statistics import (
    BlandAltman,
    Estimate,
    bland_altman,
    coverage_interval,
    icc_2_1,
)

if TYPE_CHECKING:  # torch, which a report can do without
    from training.evaluation.predict import CasePrediction

Chosen = npt.NDArray[np.int_]
Figures = Mapping[str, Mapping[str, object]]  # group -> figure's name -> value and interval

IN_A_BIN, MOST_BINS = 15, 10  # cases of like expected error


@dataclass(frozen=True)
class Scored:
    """Cases with their answers, and the errors.

    radial_px: (n, 3) at 512 px. aop_error_deg: (n,), 180 where an answer has no angle.
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
        """(n,) angle of the answer minus that of the label; NaN where an answer has none."""
        return np.array([found.aop_deg for found in self.predictions]) - self.label_deg

    @property
    def everyone(self) -> Chosen:
        """(n,) the indices of all cases."""
        return np.arange(len(self.cases))

    @cached_property
    def devices(self) -> list[str]:
        """Names of the devices; none where there is one only, or they are not known."""
        names = sorted({case.device for case in self.cases if case.device})
        return names if len(names) > 1 else []

    @cached_property
    def groups(self) -> dict[str, Chosen]:
        """All cases and those of each device: name -> indices."""
        device = np.array([case.device or "" for case in self.cases])
        return {"all": self.everyone} | {
            f"device {name}": np.flatnonzero(device == name) for name in self.devices
        }

    def name(self, k: int) -> str:
        """The file, and the frame of a stack."""
        case = self.cases[k]
        return case.file if case.frame is None else f"{case.file}, frame {case.frame}"

    def angles(self, k: int) -> str:
        """Both angles of a case and their difference, in words."""
        label, difference = self.label_deg[k], self.difference_deg[k]
        if not math.isfinite(difference):
            return f"label {label:.1f}°, answer without an angle"
        return f"label {label:.1f}°, answer {label + difference:.1f}° ({signed(difference)}°)"

    def figures(self, chosen: Chosen) -> dict[str, object]:
        """The figures of `training.evaluation.metrics.summarise` of some of the cases."""
        return summarise(self.radial_px[chosen], self.aop_error_deg[chosen])


def agreeing(scored: Scored, chosen: Chosen) -> tuple[BlandAltman | None, Estimate | None]:
    """Agreement of the chosen cases that have an angle; None where it is not defined."""
    known = chosen[np.isfinite(scored.difference_deg[chosen])]
    if len(known) < 2:
        return None, None
    label, difference = scored.label_deg[known], scored.difference_deg[known]
    try:
        icc = icc_2_1(np.column_stack([label, label + difference]))
    except ValueError:  # cases that do not differ
        icc = None
    return bland_altman(difference), icc


def given(scored: Scored, name: str) -> Chosen:
    """The cases whose answer has an angle, and a value of this name."""
    has = [getattr(found, name) is not None for found in scored.predictions]
    return np.flatnonzero(np.array(has) & np.isfinite(scored.difference_deg))


def held(scored: Scored, chosen: Chosen) -> npt.NDArray[np.bool_]:
    """Of the chosen cases that have an interval: whether it holds the label."""
    of = np.intersect1d(chosen, given(scored, "aop_interval_deg"))
    ends = np.array([scored.predictions[k].aop_interval_deg for k in of]).reshape(-1, 2)
    return (ends[:, 0] <= scored.label_deg[of]) & (scored.label_deg[of] <= ends[:, 1])


def share_of(hits: npt.NDArray[np.bool_]) -> Estimate:
    """Percent that are true, with the binomial interval."""
    low, high = coverage_interval(int(hits.sum()), len(hits))
    return Estimate(100 * float(hits.mean()), 100 * low, 100 * high)


def binned(
    scored: Scored, chosen: Chosen, expected: Floats, key: str
) -> list[tuple[float, Estimate]]:
    """Cases in bins of like expected error: its mean, and the figure that was observed."""
    count = max(1, min(MOST_BINS, len(chosen) // IN_A_BIN))
    parts = np.array_split(np.argsort(expected, kind="stable"), count)
    return [
        (float(expected[part].mean()), estimate(scored.figures(chosen[part]), key))
        for part in parts
    ]


def estimate(figures: Mapping[str, object], key: str) -> Estimate:
    """One of the figures with its interval."""
    found = figures[key]
    return Estimate(found["value"], found["low"], found["high"])
