"""Fitting how large an error to expect, and how far an interval has to reach."""

from collections.abc import Sequence

import numpy as np

from model.anatomy import Floats
from model.uncertainty import ErrorModel

PARTS = 10  # of the cases, in `crossed`
RIDGE = 5.0  # cases' worth of pull towards 'the terms say nothing', for standardised terms


def fit_error_model(terms: Floats, errors: Floats) -> ErrorModel:
    """The model of the expected error: a gamma regression with logarithmic link, and a ridge.

    Fitted by reweighted least squares (McCullagh and Nelder 1989, 2.5), whose weights are all 1
    here. A term by which the error would fall is left out: doubt never makes an answer better.

    Args:
        terms: (n, 2) as of `model.uncertainty.evidence`. errors: (n,), not negative.
    """
    errors = np.maximum(errors, 1e-3)
    known = [column[np.isfinite(column)] for column in terms.T]
    limits = np.array([[c.min(), c.max()] if len(c) else [0.0, 0.0] for c in known]).T
    terms = np.clip(terms, *limits)
    mean, deviation = terms.mean(axis=0), terms.std(axis=0)
    used = deviation > 0
    slopes = np.zeros(2)
    while True:
        x = np.column_stack([np.ones(len(terms)), ((terms - mean) / np.where(used, deviation, 1))])
        x = x[:, [True, *used]]
        pull = np.diag([0.0, *[RIDGE] * used.sum()])
        weights = np.array([np.log(errors.mean()), *[0.0] * used.sum()])
        for _ in range(50):
            expected = np.exp(x @ weights)
            working = x @ weights + (errors - expected) / expected
            weights = np.linalg.solve(x.T @ x + pull, x.T @ working)
        slopes[:] = 0
        slopes[used] = weights[1:]
        if (slopes >= 0).all():
            break
        used &= slopes > 0
    slopes = np.where(used, slopes / np.where(used, deviation, 1), 0.0)
    offset = float(weights[0] - slopes @ mean)
    return ErrorModel(
        weights=(offset, float(slopes[0]), float(slopes[1])),
        limits=tuple(map(tuple, limits.T.tolist())),
    )


def crossed(terms: Floats, errors: Floats, groups: Sequence[str]) -> Floats:
    """(n,) expected errors, each from a model that its own group of cases was kept out of."""
    names = sorted(set(groups))
    fold_of = dict(
        zip(names, np.random.default_rng(0).permutation(len(names)) % PARTS, strict=True)
    )
    folds = np.array([fold_of[group] for group in groups])
    expected = np.empty(len(errors))
    for fold in np.unique(folds):
        rest = folds != fold
        expected[~rest] = fit_error_model(terms[rest], errors[rest]).expected(terms[~rest])
    return expected


def conformal_quantile(scores: Floats, level: float) -> float:
    """The score that a new one stays below with this probability (Vovk et al. 2005).

    The ceil(level (n + 1))-th smallest of n.
    """
    rank = int(np.ceil(level * (len(scores) + 1)))
    if rank > len(scores):
        raise ValueError(f"{len(scores)} cases are too few for an interval of {level:.0%}")
    return float(np.sort(scores)[rank - 1])
