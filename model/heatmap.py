"""The one heatmap codec: landmarks in heatmap cells <-> heatmaps, in numpy.

A cell's integer index is its centre. Encoding rounds nothing, and decoding never returns a cell's
corner. A heatmap is a Gaussian of height 1 at the landmark. A network that is unsure spreads it out
or lowers it, so the height of its peak is a confidence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from model.anatomy import Floats

Decode = Literal["subpixel", "argmax"]
Heatmaps = npt.NDArray[np.float32]


@dataclass(frozen=True)
class HeatmapCodec:
    """Encodes and decodes heatmaps on one grid.

    Args:
        rows, columns: the grid's size in cells.
        sigma_cells: standard deviation of the Gaussian, in cells.
    """

    rows: int
    columns: int
    sigma_cells: float

    def encode(self, points_cells: npt.ArrayLike) -> Heatmaps:
        """(..., 2) points (x, y) in cells -> (..., rows, columns) Gaussians of height 1.

        A point need not lie on a cell's centre, nor inside the grid.
        """
        points = np.asarray(points_cells, np.float64)
        exponent = -0.5 / self.sigma_cells**2
        along_x = np.exp(exponent * (np.arange(self.columns) - points[..., 0, None]) ** 2)
        along_y = np.exp(exponent * (np.arange(self.rows) - points[..., 1, None]) ** 2)
        return (along_y[..., :, None] * along_x[..., None, :]).astype(np.float32)

    def decode(
        self, heatmaps: npt.NDArray[np.floating[Any]], method: Decode = "subpixel"
    ) -> tuple[Floats, Floats]:
        """(..., rows, columns) heatmaps -> (..., 2) points (x, y) in cells, (...) confidences.

        "argmax" returns the centre of the highest cell. "subpixel" refines it by the Gaussian that
        best fits the heatmap around it (`_fit_gaussian`). The confidence is the peak's height,
        clipped to 0..1. A heatmap that is not finite decodes to its centre with confidence 0, a
        constant one to its first cell.

        Raises:
            ValueError: the heatmaps have another size than this codec's grid.
        """
        if heatmaps.shape[-2:] != (self.rows, self.columns):
            expected = (self.rows, self.columns)
            raise ValueError(f"expected heatmaps of {expected} cells, got {heatmaps.shape[-2:]}")
        flat = np.asarray(heatmaps, np.float64).reshape(-1, self.rows, self.columns)
        points = np.empty((len(flat), 2))
        confidences = np.zeros(len(flat))
        for k, heatmap in enumerate(flat):
            if not np.isfinite(heatmap).all():
                points[k] = (self.columns - 1) / 2, (self.rows - 1) / 2
                continue
            row, column = divmod(int(heatmap.argmax()), self.columns)
            confidences[k] = np.clip(heatmap[row, column], 0.0, 1.0)
            points[k] = column, row
            if method == "subpixel":
                points[k] = _fit_gaussian(heatmap, column, row, self.sigma_cells)
        lead = heatmaps.shape[:-2]
        return points.reshape(*lead, 2), confidences.reshape(lead)


def _fit_gaussian(
    heatmap: Floats, column: int, row: int, sigma_cells: float
) -> tuple[float, float]:
    """(x, y) in cells of the isotropic Gaussian that fits the heatmap around its highest cell.

    Least squares fit log h = a + b x + c y + d (x^2 + y^2). The weights h^2 reduce the noise of low
    cells (Guo, IEEE Signal Processing Magazine 2011). The fit is exact for a Gaussian of any width
    and height, at the border too. If it has no peak within 1.5 cells, the highest cell's centre is
    returned.
    """
    radius = max(1, round(sigma_cells))
    top, left = max(0, row - radius), max(0, column - radius)
    window = heatmap[top : row + radius + 1, left : column + radius + 1]
    y, x = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in window.shape), indexing="ij")
    y, x = y + (top - row), x + (left - column)
    used = window > 1e-3 * heatmap[row, column]
    if heatmap[row, column] <= 0 or used.sum() < 4:
        return float(column), float(row)
    x, y, height = x[used], y[used], window[used]
    terms = np.stack([np.ones_like(height), x, y, x * x + y * y], axis=1)
    weighted = terms * (height * height)[:, None]
    moments = weighted.T @ terms, weighted.T @ np.log(height)
    fit, _, rank, _ = np.linalg.lstsq(*moments, rcond=None)
    _, b, c, d = fit.tolist()
    if rank < 4 or d >= 0 or max(abs(b), abs(c)) > -3.0 * d:
        return float(column), float(row)
    return column - b / (2 * d), row - c / (2 * d)
