"""Errors of landmarks and of the angle of progression, summarised with bootstrap intervals."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from model.anatomy import LANDMARKS, Floats
from model.frame import Pair
from training.cases import Case
from training.certainty import LABELS as OF_CERTAINTY
from training.certainty import certainty

if TYPE_CHECKING:  # torch, which an evaluation container does without
    from training.predict import CasePrediction

REFERENCE_PX = 512  # errors are quoted as on an image of this longer side
SDR_PX = (4, 8, 16, 24)
BOOTSTRAPS, BLOCK = 2000, 50
LABELS = {
    "mre_px": "mean radial error, px",
    "median_re_px": "median radial error, px",
    "mre_PS1_px": "  PS1, px",
    "mre_PS2_px": "  PS2, px",
    "mre_FH1_px": "  FH1, px",
    "sdr_4px": "within 4 px",
    "sdr_8px": "within 8 px",
    "sdr_16px": "within 16 px",
    "sdr_24px": "within 24 px",
    "aop_error_deg": "AoP error, deg",
    "aop_error_median_deg": "  median, deg",
    "aop_error_p95_deg": "  95th percentile, deg",
    **OF_CERTAINTY,
}

Figures = dict[str, dict[str, Any]]  # group of cases -> name -> figure, as `summarise` gives them


def radial_errors_px(
    predicted: npt.ArrayLike, truth: npt.ArrayLike, longer_side_px: npt.ArrayLike
) -> Floats:
    """(n, 3) distances at 512 px of (n, 3, 2) landmarks on images with (n,) longer sides."""
    difference = np.asarray(predicted, np.float64) - np.asarray(truth, np.float64)
    scale = REFERENCE_PX / np.asarray(longer_side_px, np.float64)
    return np.linalg.norm(difference, axis=-1) * scale[:, None]


def mean_errors(predictions: "Sequence[CasePrediction]", cases: Sequence[Case]) -> Pair:
    """(MRE in px at 512, AoP error in deg); an angle that is not defined counts as 180 deg off."""
    radial, aop = case_errors(predictions, cases)
    return float(radial.mean()), float(aop.mean())


def case_errors(
    predictions: "Sequence[CasePrediction]", cases: Sequence[Case]
) -> tuple[Floats, Floats]:
    """(n, 3) radial errors in px at 512 and (n,) AoP errors in deg of predictions for cases."""
    radial = radial_errors_px(
        [found.landmarks_px for found in predictions],
        [case.landmarks_px for case in cases],
        [found.longer_side_px for found in predictions],
    )
    pairs = zip(predictions, cases, strict=True)
    aop = np.array([abs(found.aop_deg - case.aop_deg) for found, case in pairs])
    return radial, np.nan_to_num(aop, nan=180.0)


def summarise(radial_px: Floats, aop_error_deg: Floats, seed: int = 0) -> dict[str, object]:
    """The figures of one group of cases.

    Args:
        radial_px: (n, 3) radial errors at 512 px.
        aop_error_deg: (n,) absolute angle errors.

    Returns:
        name -> {"value", "low", "high"}: the value and its 95 % bootstrap interval over cases
        (percentile method, 2,000 resamples); and "cases": n.
    """
    # each maps (..., n, 3) radial errors and (..., n) angle errors to (...)
    figures: dict[str, Callable[[Floats, Floats], Floats]] = {
        "mre_px": lambda r, a: r.mean(axis=(-2, -1)),
        "median_re_px": lambda r, a: np.median(r, axis=(-2, -1)),
        "aop_error_deg": lambda r, a: a.mean(axis=-1),
        "aop_error_median_deg": lambda r, a: np.median(a, axis=-1),
        "aop_error_p95_deg": lambda r, a: np.percentile(a, 95, axis=-1),
    }
    for k, name in enumerate(LANDMARKS):
        figures[f"mre_{name}_px"] = lambda r, a, k=k: r[..., k].mean(axis=-1)
    for limit in SDR_PX:
        figures[f"sdr_{limit}px"] = lambda r, a, limit=limit: (r <= limit).mean(axis=(-2, -1))
    cases = len(radial_px)
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[Floats]] = {name: [] for name in figures}
    for _ in range(BOOTSTRAPS // BLOCK):  # in blocks, so that many cases fit in memory
        draws = rng.integers(0, cases, (BLOCK, cases))
        radial, aop = radial_px[draws], aop_error_deg[draws]
        for name, figure in figures.items():
            drawn[name].append(figure(radial, aop))
    result: dict[str, object] = {"cases": cases}
    for name, figure in figures.items():
        low, high = np.percentile(np.concatenate(drawn[name]), [2.5, 97.5])
        value = float(figure(radial_px, aop_error_deg))
        result[name] = {"value": value, "low": float(low), "high": float(high)}
    return result


def evaluate(cases: Sequence[Case], predictions: "Sequence[CasePrediction]") -> Figures:
    """Figures of `summarise` and `certainty`, of all cases and of each device."""
    radial, aop = case_errors(predictions, cases)
    groups = {"all": list(range(len(cases)))}
    devices = sorted({case.device for case in cases if case.device})
    for device in devices if len(devices) > 1 else []:
        groups[f"device {device}"] = [k for k, one in enumerate(cases) if one.device == device]
    return {
        name: summarise(radial[chosen], aop[chosen])
        | certainty([cases[k] for k in chosen], [predictions[k] for k in chosen], aop[chosen])
        for name, chosen in groups.items()
    }


def as_text(report: Figures, missing: Sequence[str], fate: str) -> str:
    """The report as a table for a terminal."""
    width = max(map(len, LABELS.values())) + 2
    heads = [f"{name} (n={figures['cases']})" for name, figures in report.items()]
    lines = [
        "errors at 512 px, with 95 % intervals",
        " " * width + "".join(f"{h:>26}" for h in heads),
    ]
    for key, label in LABELS.items():
        cells = []
        if key not in report["all"]:  # of a model that is not calibrated
            continue
        for figures in report.values():
            figure = figures[key]
            cells.append(f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})")
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>26}" for cell in cells))
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        lines.append(f"{len(missing)} cases {fate}: {shown}")
    return "\n".join(lines)
