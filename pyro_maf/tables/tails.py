"""Units of columns with heavy tails: their location, scale and the weight of the tail on either side."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf.tables.moments import NORMAL_QUARTILES, Moments, quantiles
from pyro_maf.transforms.tails import with_tails

__all__ = ["Units", "units_of"]

GRID = torch.tensor([0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1, 3 / 2, 2], dtype=torch.float64)
"""Weights, inverse degrees of freedom of Student's t, from normal to heavier than Cauchy."""
SIZES = torch.linspace(-1.2, 1.2, 13, dtype=torch.float64).exp()
"""Scales of a side, in units of that of a normal distribution of the same median distance."""
MEAN_WEIGHT = 1 / 8
"""Mean of the exponential prior of a weight: what few rows come to, of which 1,000 normal ones say 0."""
LEAST = 3 / 16
"""Weight, five degrees of freedom, from which a tail is heavy: one normal column of 100 rows in 30 has it, none of 200;
with two degrees of freedom 7 in 10 of 100 rows do, 97 in 100 of 200. A spline fits lighter tails as they are."""
FARTHEST = 0.01
"""Part of the outer half of a side, and one row at least, that counts as being further out than all others, however
far: an error among the rows says nothing of the others."""
REACH, NORMAL_REACH = 1000.0, 10.0
"""A tail that is not heeded may be so long, in standard deviations; of one that is, no value is so far out."""
LEAST_ROWS = 20
POINTS = 256
"""The outer half of a side is taken at so many of its quantiles: as good as all rows for one number."""


class Units(NamedTuple):
    """Units of each column: its location and scale, (D,) each, and the weights of its right and left tails, (2, D).

    Without heavy tails there are no weights, None.
    """

    loc: Tensor
    scale: Tensor
    tails: Tensor | None = None

    def float(self) -> Units:
        """Round to float32."""
        return Units(self.loc.float(), self.scale.float(), None if self.tails is None else self.tails.float())

    @property
    def reach(self) -> Tensor:
        """Standardised distance beyond which a value of a column is no part of its bulk or tails, (D,)."""
        heavy = torch.zeros(len(self.loc), dtype=torch.bool) if self.tails is None else self.tails.any(0)
        return torch.where(heavy, NORMAL_REACH, REACH)

    def reaching(self, table: Tensor) -> list[int]:
        """Columns of heavy tails from which no value of the rows, (N, D), is out of reach."""
        if self.tails is None:
            return []
        zeros = torch.zeros_like(self.loc)
        z, _ = with_tails((table - self.loc) / self.scale, self.tails, zeros, zeros + 1, -1)
        return (self.tails.any(0) & (z.abs() <= NORMAL_REACH).all(0)).nonzero()[:, 0].tolist()

    def take(self, columns: list[int]) -> Units:
        """Units of some columns."""
        tails = None if self.tails is None else self.tails[:, columns]
        return Units(self.loc[columns], self.scale[columns], tails if tails is not None and tails.any() else None)


def units_of(moments: Moments, table: Tensor, weights: Tensor | None = None) -> Units:
    r"""Units of the columns of `table`: their moments, or median, quartiles and weights of tails if those are heavy.

    The outer half of the rows on either side of the median are taken to follow y = median + s x sqrt((exp(w x^2) - 1) /
    (w x^2)) for a normal x, as in `Tails`; the weight of that side is the mean of w over its likelihood, with s at its
    maximum, and an exponential prior. A column with a weight above 3 / 16 on either side has units of its median and
    quartiles and weights of both tails, so that it looks normal to a model; any other has its moments.

    Args:
        moments: Moments of the columns.
        table: Rows, (N, D), or some of them.
        weights: How often each row counts, (N,); by default once.

    Cost: a sort of each column and some 70,000 logarithms.

    Example:
        >>> from pyro_maf.tables.moments import moments_of
        >>> rows = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
        >>> rows[:, 1] /= rows[:, 2]  # Cauchy
        >>> units = units_of(moments_of(rows), rows)
        >>> [[weight > 1 for weight in side] for side in units.tails.tolist()]
        [[False, True, False], [False, True, False]]
    """
    loc, scale = (each.clone() for each in moments)
    often = torch.ones(len(table), dtype=torch.float64) if weights is None else weights.double() / weights.mean()
    tails = torch.zeros(2, len(loc), dtype=torch.float64)
    for column, values in enumerate(table.detach().double().unbind(1)):
        low, median, high = quantiles(values.numpy(), [0.25, 0.5, 0.75], None if weights is None else often.numpy())
        apart = values - median
        sides = torch.stack([_weight(apart, often), _weight(-apart, often)])
        if sides.max() > LEAST:
            tails[:, column], loc[column] = sides, median
            scale[column] = (high - low) / NORMAL_QUARTILES or scale[column]
    return Units(loc, scale, tails.to(loc) if tails.any() else None)


def _weight(apart: Tensor, often: Tensor) -> Tensor:
    """Weight of the tail of a side: that of the positive distances."""
    order = apart.argsort()
    order = order[apart[order] > 0]
    apart, often = apart[order], often[order]
    below = often.cumsum(0)
    start = int(torch.searchsorted(below, below[-1:] / 2)) if len(below) else 0
    rows = len(below) - start - 1  # beyond the median distance
    last = rows - max(1, math.ceil(FARTHEST * rows))
    if len(below) < LEAST_ROWS:
        return GRID[0]
    beyond, counts = apart[start + 1 :] / apart[start], often[start + 1 :]
    farther = counts[last:].sum()
    beyond, counts = _thinned(beyond[:last], counts[:last])
    log_likelihood = _log_likelihood(beyond, counts, farther) - GRID / MEAN_WEIGHT
    likelihood = (log_likelihood - log_likelihood.max()).exp()
    return torch.trapezoid(GRID * likelihood, GRID) / torch.trapezoid(likelihood, GRID)


def _thinned(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """At most `POINTS` of ordered values, each with the same part of the counts."""
    if len(values) <= POINTS:
        return values, counts
    below = counts.cumsum(0)
    levels = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS * below[-1]
    return values[torch.searchsorted(below, levels)], (below[-1] / POINTS).expand(POINTS)


def _log_likelihood(beyond: Tensor, counts: Tensor, farther: Tensor) -> Tensor:
    """Log-likelihood of distances beyond 1, and of some farther than all, for each weight, at the best of scales."""
    unit = torch.special.ndtri(torch.tensor(0.75, dtype=torch.float64))
    distance = torch.cat([beyond, beyond.new_ones(1), beyond[-1:]]) * unit / SIZES[:, None]
    raw = GRID[:, None, None] * distance.square()
    is_normal = raw == 0
    normal = torch.where(is_normal, distance, (raw.log1p() / torch.where(is_normal, 1.0, GRID[:, None, None])).sqrt())
    log_slope = (distance / normal).log() - raw.log1p() - SIZES.log()[:, None]
    each = (log_slope - 0.5 * normal.square() - 0.5 * math.log(2 * math.pi))[..., :-2]
    log_above = torch.special.log_ndtr(-normal[..., -2:])
    total = each @ counts + farther * log_above[..., 1] - (counts.sum() + farther) * log_above[..., 0]
    return total.amax(1)
