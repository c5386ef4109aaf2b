"""Grids of columns whose values are counts or were rounded, inferred from the values."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Grid", "grid_of"]

REPEATS = 3
"""Minimum average number of rows per value for a column on a grid; with fewer, a density cannot resolve spikes."""
FINEST = 1e-3
"""Spacing, in standard deviations of the column, below which rounding is finer than a flow resolves."""
DECIMALS = range(9, -10, -1)
ROUNDING = 4.0
CLEAR = 0.05
"""Tolerance of a multiple, in units in the last place of the values, and its maximum, in steps; beyond it, the dtype is
too coarse to distinguish multiples from other values."""


class Grid(NamedTuple):
    """Multiples of a spacing, counted from the lowest value, up to the highest."""

    spacing: float
    low: float
    high: float

    def misses(self, values: NDArray[np.floating]) -> bool:
        """Return whether any value lies off the grid, which continues below its lowest and above its highest point."""
        steps = (values.astype(np.float64) - self.low) / self.spacing
        return bool((np.abs(steps - np.round(steps)) > _tolerance(values, self.spacing)).any())

    def joined(self, values: NDArray[np.floating]) -> Grid:
        """The grid with its range extended to these values."""
        return Grid(self.spacing, min(self.low, float(values.min())), max(self.high, float(values.max())))


def grid_of(column: NDArray[np.floating]) -> Grid | None:
    """Return the grid of a column of finite values, (rows,), some of which repeat, or None.

    The spacing is the greatest common divisor of all differences, as a multiple of a power of 10: 1 for counts, 0.5 for
    half steps, 2.54 for inches in centimetres.

    Example:
        >>> grid_of(np.array([1.5, 0.5, 0.5, 2.0] * 5))
        Grid(spacing=0.5, low=0.5, high=2.0)
        >>> grid_of(np.random.default_rng(0).normal(size=100))
    """
    values = np.unique(column)
    if len(values) < 2 or REPEATS * len(values) > len(column):
        return None
    low, high = float(values[0]), float(values[-1])
    deviation = float(column.astype(np.float64).std())
    for exponent in DECIMALS:
        unit = 10.0**exponent
        if unit > high - low:
            continue
        tolerance = float(_tolerance(values, unit).max())
        if tolerance > CLEAR or unit < FINEST * deviation / len(values):
            return None
        steps = values.astype(np.float64) / unit
        if (np.abs(steps - np.round(steps)) <= tolerance).all():
            counts = np.round(steps).astype(np.int64)
            spacing = unit * int(np.gcd.reduce(counts - counts[0]))
            ends = unit * int(counts[0]), unit * int(counts[-1])
            return Grid(spacing, *ends) if spacing >= FINEST * deviation else None
    return None


def _tolerance(values: NDArray[np.floating], spacing: float) -> NDArray[np.float64]:
    """Distance from a multiple, in steps, that rounding to the dtype of the values may cause."""
    return np.maximum(1e-6, ROUNDING * np.finfo(values.dtype).eps * np.abs(values).astype(np.float64) / spacing)


def describe(grid: Grid) -> str:
    """Description of the spacing for a message, such as "steps of 0.1"."""
    digits = max(0, -math.floor(math.log10(grid.spacing))) + 3
    return f"steps of {round(grid.spacing, digits):g}"
