"""Units of columns: a robust location and scale, and tail weights where the tails are heavy."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_maf.tables.mixture import fit_mixture
from pyro_maf.transforms.tails import with_tails

__all__ = ["Moments", "Units", "context_moments_of", "moments_of", "plain_moments_of", "units_of"]

NORMAL_QUARTILES = 1.3490
NORMAL_TAILS = 3.2897
"""Distances, in standard deviations, between the quartiles and between the 5 % quantiles of a normal distribution."""
FENCE = 10.0
MOST_BEYOND = 0.1
OUTLIERS = 0.005
MOST_ENTRIES = 2**22
"""Maximum number of context entries that are measured if they share their units."""

GRID = torch.tensor([0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1, 3 / 2, 2], dtype=torch.float64)
"""Tail weights, inverse degrees of freedom of Student's t, from normal to heavier than Cauchy."""
SIZES = torch.linspace(-3.0, 1.2, 22, dtype=torch.float64).exp()
"""Scales of a side, in units of the scale of a normal distribution with the same quantile."""
MEAN_WEIGHT = 1 / 8
"""Mean of the exponential prior of a weight, which dominates for few rows; for 1,000 normal rows the weight is 0."""
LEAST = 3 / 16
"""Weight, five degrees of freedom, above which a tail is heavy. Of normal columns with 100 rows one in 30 exceeds it,
with 200 rows none; of columns with two degrees of freedom 7 in 10 with 100 rows do, 97 in 100 with 200. A spline fits
lighter tails without it."""
BEGINNINGS = (0.5, 0.75, 0.875)
"""Quantiles of a side beyond which its tail is examined: the median first, then further out."""
LIGHTER = 2.0
"""Gain in nats, for rows further out, of no tail over the lightest heavy one, from which a heavy tail seen beyond the
median is dismissed: tens of nats for clusters that lie apart, less than 1.5 for Student's t, Pareto and log-normal
columns."""
FARTHEST = 0.01
"""Fraction of these rows, at least one, that only counts as being further out than all others, however far: an error
among the rows says nothing about the others."""
REACH, NORMAL_REACH = 1000.0, 10.0
"""Reach, in standard deviations, of a column's values without tail weights, and with them."""
LEAST_ROWS = 20
JUDGED = 1_000
"""Maximum number of rows by which tails are judged jointly."""
MOST_LOST, LOST_EACH = 3.0, 0.1
"""Maximum loss of a multivariate t through tail weights, in nats per row, in total and per transformed column. It
favours jointly long-tailed rows, of which a flow fits the tails of the first columns badly: these lose 0.03 to 0.06 per
column. Columns that are linear in others, such as image patches or sums of a few skewed factors, lose 0.1 to 0.5; there
a flow loses too."""
MOST_CLUSTERS = 4
"""Maximum number of clusters of the mixture that may lose as much; each long-tailed cluster loses 0.12 to 0.16."""
NO_LOSS = 0.02
"""Loss, in nats per row, that counts as none."""
FREEDOMS = (1.0, 2.0, 4.0, 8.0, 1e6)
"""Degrees of freedom of the multivariate t that are tried; the last is normal."""
REWEIGHTINGS = 6
WIDE = 128
"""Number of columns from which all tail weights are used or none: a choice per column takes as many inversions."""
POINTS = 256
"""Number of quantiles that represent the outer half of a side, as good as all rows for a single parameter."""


class Moments(NamedTuple):
    """Location and scale of each column, (D,) each."""

    loc: Tensor
    scale: Tensor

    def float(self) -> Moments:
        """Round to float32."""
        return Moments(self.loc.float(), self.scale.float())


def plain_moments_of(table: Tensor, weights: Tensor | None = None) -> Moments:
    """Mean and standard deviation of each column, outliers included, in float64; a constant column has scale 1.

    Example:
        >>> plain_moments_of(torch.tensor([[1.0], [2.0], [6.0]])).loc
        tensor([3.], dtype=torch.float64)
    """
    # In units of a power of two near a column's size, so that squares neither overflow nor underflow.
    largest = table.abs().amax(0).double()
    size = torch.where(largest > 0, largest / (2 * largest.frexp().mantissa), 1.0)
    table = table.double() / size
    if weights is None:
        variance, mean = torch.var_mean(table, 0, correction=0)
    else:
        share = weights.double() / weights.double().sum()
        mean = share @ table
        variance = share @ (table - mean).square()
    deviation = variance.sqrt() * size
    return Moments(mean * size, torch.where(deviation > 0, deviation, 1.0))


def moments_of(table: Tensor, most_beyond: float = 1.0, weights: Tensor | None = None) -> Moments:
    r"""Mean and standard deviation of each column, with outliers moved to a fence, in float64.

    The fence lies 10 standard deviations on either side of the median, as estimated from the quartiles: far enough to
    leave ordinary columns unchanged, and near enough for a value of 1e6 to count no more than one of 10. The data are
    not clipped: a value beyond the fence stays where it is, in these units. If more than a tenth of the rows lie beyond
    it, the 5 % and 95 % quantiles replace the quartiles; if half of the rows share one value and fewer than a tenth
    have another, the median distance of the latter does. A constant column has scale 1.

    Args:
        table: Rows, (N, D).
        most_beyond: A column with a larger fraction of its rows beyond the fence has no fence.
        weights: Weight of each row, (N,), also for quartiles and fractions; by default 1.

    Cost: a partial sort of each column.

    Example:
        >>> rows = torch.tensor([[1.0, 7.0], [3.0, 7.0]])
        >>> moments_of(rows).loc.tolist(), moments_of(rows).scale.tolist()
        ([2.0, 7.0], [1.0, 1.0])
        >>> normal = torch.randn(9000, 1, generator=torch.Generator().manual_seed(0))
        >>> normal[0] = 1e6
        >>> round(moments_of(normal).scale.item(), 1)
        1.0
    """
    # One column at a time, since a sorted copy of all of them might not fit in memory.
    columns = (column.double() for column in table.detach().unbind(1))
    row_weights = None if weights is None else weights.double().numpy()
    clamped = (column.clamp(*_fence(column.numpy(), most_beyond, row_weights)) for column in columns)
    each = [[*map(float, plain_moments_of(column[:, None], weights))] for column in clamped]
    return Moments(*torch.tensor(each, dtype=torch.float64).reshape(-1, 2).T.contiguous())


def context_moments_of(table: Tensor, weights: Tensor | None = None, *, together: bool = False) -> Moments:
    """Moments of a context, like `moments_of`, but with a fence only against few outliers, up to one row in 200.

    A network takes a context linearly. In units of the bulk, rows of a heavy tail would be so far out that they would
    dominate the gradient. With `together`, all entries of an image, series or set share their units: units per entry
    would amplify a margin that hardly varies, and remove an image's shades.
    """
    if not together:
        return moments_of(table, OUTLIERS, weights)
    some = slice(None, None, -(-table.numel() // MOST_ENTRIES))
    table, width = table[some], table.shape[1]
    row_weights = None if weights is None else weights[some].repeat_interleave(width)
    loc, scale = moments_of(table.reshape(-1, 1), OUTLIERS, row_weights)
    return Moments(loc.expand(width), scale.expand(width))


class Units(NamedTuple):
    """Units of each column: location and scale, (D,) each, and weights of the right and left tails, (2, D).

    `tails` is None if no column has heavy tails.
    """

    loc: Tensor
    scale: Tensor
    tails: Tensor | None = None

    def float(self) -> Units:
        """Round to float32."""
        return Units(self.loc.float(), self.scale.float(), None if self.tails is None else self.tails.float())

    def standardised(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in these units, and the log-slope of each column's map there, (N, D) both."""
        z = (table - self.loc) / self.scale
        log_slope = -self.scale.log().expand(z.shape)
        if self.tails is None:
            return z, log_slope
        zero = torch.zeros_like(self.loc[:1])
        # Each column separately, so that it has its own log-determinant.
        columns = zip(z.split(1, -1), self.tails.split(1, -1), strict=True)
        mapped, log_bent = zip(*(with_tails(*column, zero, zero + 1, -1) for column in columns), strict=True)
        return torch.cat(mapped, -1), log_slope + torch.stack(log_bent, -1)

    @property
    def reach(self) -> Tensor:
        """Standardised distance beyond which a value is part of neither the bulk nor the tails of its column, (D,)."""
        heavy = torch.zeros(len(self.loc), dtype=torch.bool) if self.tails is None else self.tails.any(0)
        return torch.where(heavy, NORMAL_REACH, REACH)

    def reaching(self, table: Tensor) -> list[int]:
        """Heavy-tailed columns in which no value of the rows, (N, D), is out of reach."""
        if self.tails is None:
            return []
        z, _ = self.standardised(table)
        return (self.tails.any(0) & (z.abs() <= NORMAL_REACH).all(0)).nonzero()[:, 0].tolist()

    def with_angles(self, columns: tuple[int, ...]) -> Units:
        """The units with angles in radians."""
        if not columns:
            return self
        at = torch.isin(torch.arange(len(self.loc)), torch.tensor(columns))
        tails = None if self.tails is None else self.tails.masked_fill(at, 0.0)
        return Units(self.loc.masked_fill(at, 0.0), self.scale.masked_fill(at, 1.0), tails)

    def take(self, columns: list[int]) -> Units:
        """The units of some columns."""
        tails = None if self.tails is None else self.tails[:, columns]
        return Units(self.loc[columns], self.scale[columns], tails if tails is not None and tails.any() else None)


def units_of(moments: Moments, table: Tensor, weights: Tensor | None = None) -> Units:
    r"""Units of the columns of `table`: moments or, for heavy tails, median, interquartile range and tail weights.

    The outer half of the rows on either side of the median is modelled by y = median + s x sqrt((exp(w x^2) - 1) / (w
    x^2)) for a normal x, as in `Tails`. The weight of that side is the posterior mean of w, with s at its maximum
    likelihood and an exponential prior. It is 0 if the outer quarter or eighth is likelier without a tail, as where
    rows form clusters. A column with a weight above 3 / 16 on either side has units of its median and interquartile
    range and the weights of both tails, so that it looks normal to a model; any other column has its moments.

    Heavy-tailed columns may be linear in one another, and long-tailed jointly, such as neighbouring pixels of images
    that contain edges; transformed one by one, they are neither. So the units are compared by the held-out
    log-likelihood of a multivariate t. If it falls by more than 3 nats per row, or 0.1 per transformed column, only the
    columns that do not lower it are transformed; and none if the log-likelihood of a mixture of up to four clusters,
    which may be long-tailed, falls by as much.

    Args:
        moments: Moments of the columns.
        table: Rows, (N, D), or some of them.
        weights: Weight of each row, (N,); by default 1.

    Cost: a sort of each column and some 100,000 logarithms. With heavy tails, also some 100 covariance matrices of a
    thousand rows, again for each column if the likelihood falls, and four mixtures of 500 rows, half a second.

    Example:
        >>> rows = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
        >>> rows[:, 1] /= rows[:, 2]  # Cauchy
        >>> units = units_of(moments_of(rows), rows)
        >>> [[weight > 1 for weight in side] for side in units.tails.tolist()]
        [[False, True, False], [False, True, False]]
    """
    row_weights = torch.ones(len(table), dtype=torch.float64) if weights is None else weights.double() / weights.mean()
    loc, scale = (each.clone() for each in moments)
    tails = loc.new_zeros(2, len(loc))
    for column, values in enumerate(table.detach().double().unbind(1)):
        low, median, high = _quantiles(
            values.numpy(), [0.25, 0.5, 0.75], None if weights is None else row_weights.numpy()
        )
        apart = values - median
        sides = torch.stack([_weight(apart, row_weights), _weight(-apart, row_weights)])
        if sides.max() > LEAST:
            tails[:, column], loc[column] = sides, median
            scale[column] = (high - low) / NORMAL_QUARTILES or scale[column]
    if not tails.any():
        return Units(*moments)
    both = Units(*moments), Units(loc, scale, tails)
    chosen = _columns_with_tails(table.detach().double(), row_weights, *both, tails.amax(0))
    if not chosen.any():
        return Units(*moments)
    loc, scale = (torch.where(chosen, *each) for each in ((loc, moments.loc), (scale, moments.scale)))
    return Units(loc, scale, torch.where(chosen, tails, 0.0))


def _columns_with_tails(table: Tensor, row_weights: Tensor, plain: Units, heavy: Units, weight: Tensor) -> Tensor:
    """Mask of the columns that get tail weights, (D,), among those with a positive `weight`, (D,)."""
    if len(table) > JUDGED:
        rows = torch.linspace(0, len(table) - 1, JUDGED).long()
        table, row_weights = table[rows], row_weights[rows]
    of_plain, of_heavy = plain.standardised(table), heavy.standardised(table)
    is_heavy = weight > 0

    def score(chosen: Tensor, *, has_clusters: bool = False) -> float:
        z, log_slope = (torch.where(chosen, of_heavy[i], of_plain[i]) for i in range(2))
        score = _score_of_mixture if has_clusters else _score_of_t
        return (score(z, row_weights) + float(row_weights @ log_slope.sum(1))) / float(row_weights.sum())

    def loses(chosen: Tensor, *, has_clusters: bool = False) -> bool:
        lost = score(none, has_clusters=has_clusters) - score(chosen, has_clusters=has_clusters)
        return lost >= min(MOST_LOST, LOST_EACH * int(chosen.sum()))

    chosen, none = is_heavy, torch.zeros_like(is_heavy)
    if loses(is_heavy):
        chosen, best = none, score(none)
        heaviest_first = weight.argsort(descending=True)[: int(is_heavy.sum())]
        for column in heaviest_first if len(weight) < WIDE else ():
            trial = chosen.clone()
            trial[column] = True
            if (found := score(trial)) > best - NO_LOSS:
                chosen, best = trial, found
    return none if chosen.any() and loses(chosen, has_clusters=True) else chosen


HALVES = (slice(None, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(None, None, 2))
"""Rows that a density is fitted to, and rows that it is judged by."""


def _score_of_t(z: Tensor, row_weights: Tensor) -> float:
    """Log-likelihood of each half of the rows under a multivariate t fitted to the other."""
    return sum(
        max(
            float(row_weights[unseen] @ _multivariate_t(z[seen], row_weights[seen], z[unseen], freedom))
            for freedom in FREEDOMS
        )
        for seen, unseen in HALVES
    )


def _score_of_mixture(z: Tensor, row_weights: Tensor) -> float:
    """Log-likelihood of each half of the rows under a mixture fitted to the other."""
    z = z.clamp(-REACH, REACH)
    return sum(
        float(row_weights[unseen] @ fit_mixture(z[seen], row_weights[seen], most=MOST_CLUSTERS).log_prob(z[unseen]))
        for seen, unseen in HALVES
    )


def _multivariate_t(seen: Tensor, row_weights: Tensor, unseen: Tensor, freedom: float) -> Tensor:
    """Log-density of unseen rows under the multivariate t fitted to seen ones, by iteratively reweighted estimation."""
    rows, dim = seen.shape
    centred = seen - (mean := seen.median(0).values)
    shrinkage = dim**2 / (rows**2 + dim**2)  # halves the correlations if there are as many columns as rows
    weights = row_weights
    for _ in range(REWEIGHTINGS):
        scatter = (weights[:, None] * centred).T @ centred / row_weights.sum()
        diagonal = scatter.diagonal().clamp(min=1e-12)
        factor = torch.linalg.cholesky((1 - shrinkage) * scatter + ((shrinkage + 1e-9) * diagonal).diag())
        weights = row_weights * (freedom + dim) / (freedom + _squared_distance(factor, centred))
    constant = math.lgamma((freedom + dim) / 2) - math.lgamma(freedom / 2) - dim / 2 * math.log(freedom * math.pi)
    log_tail = (freedom + dim) / 2 * (_squared_distance(factor, unseen - mean) / freedom).log1p()
    return constant - factor.diagonal().log().sum() - log_tail


def _squared_distance(factor: Tensor, rows: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, rows.T, upper=False).square().sum(0)


def _weight(apart: Tensor, row_weights: Tensor) -> Tensor:
    """Weight of the tail of the positive distances; 0 if the tail is lighter further out, as for clusters."""
    apart, row_weights = apart[apart > 0], row_weights[apart > 0]
    if len(apart) < LEAST_ROWS:
        return GRID[0]
    order = torch.from_numpy(np.argsort(apart.numpy()))  # takes a tenth of the time of torch's sort
    apart, row_weights = apart[order], row_weights[order]
    log_likelihood = _log_likelihood(apart, row_weights, BEGINNINGS[0]) - GRID / MEAN_WEIGHT
    likelihood = (log_likelihood - log_likelihood.max()).exp()
    weight = torch.trapezoid(GRID * likelihood, GRID) / torch.trapezoid(likelihood, GRID)
    for beginning in BEGINNINGS[1:] if weight > LEAST else ():
        further = _log_likelihood(apart, row_weights, beginning)
        if further[0] > further[GRID == LEAST] + LIGHTER:
            return GRID[0]
    return weight


def _thinned(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """At most `POINTS` of ordered values, each representing the same total count."""
    if len(values) <= POINTS:
        return values, counts
    below = counts.cumsum(0)
    levels = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS * below[-1]
    return values[torch.searchsorted(below, levels)], (below[-1] / POINTS).expand(POINTS)


def _log_likelihood(apart: Tensor, row_weights: Tensor, beginning: float) -> Tensor:
    """Log-likelihood of the ordered distances beyond a quantile, for each weight, maximised over the scale."""
    below = row_weights.cumsum(0)
    start = int(torch.searchsorted(below, beginning * below[-1:]))
    rows = len(below) - start - 1
    last = rows - max(1, math.ceil(FARTHEST * rows))
    if last < 1:
        return torch.zeros_like(GRID)
    beyond, counts = apart[start + 1 :] / apart[start], row_weights[start + 1 :]
    farther = counts[last:].sum()
    beyond, counts = _thinned(beyond[:last], counts[:last])
    quantile = torch.special.ndtri(torch.tensor((1 + beginning) / 2, dtype=torch.float64))
    distance = torch.cat([beyond, beyond.new_ones(1), beyond[-1:]]) * quantile / SIZES[:, None]
    raw = GRID[:, None, None] * distance.square()
    is_normal = raw == 0
    normal = torch.where(is_normal, distance, (raw.log1p() / torch.where(is_normal, 1.0, GRID[:, None, None])).sqrt())
    log_slope = (distance / normal).log() - raw.log1p() - SIZES.log()[:, None]
    each = (log_slope - 0.5 * normal.square() - 0.5 * math.log(2 * math.pi))[..., :-2]
    log_above = torch.special.log_ndtr(-normal[..., -2:])
    total = each @ counts + farther * log_above[..., 1] - (counts.sum() + farther) * log_above[..., 0]
    return total.amax(1)


def _quantiles(
    column: NDArray[np.float64], levels: list[float], weights: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Quantiles; with weights, the smallest value up to which the weights sum to at least the level."""
    if weights is None:
        return np.quantile(column, levels)
    order = np.argsort(column)
    below = weights[order].cumsum()
    return column[order[np.searchsorted(below, np.multiply(levels, below[-1]))]]


def _fence(column: NDArray[np.float64], most_beyond: float, weights: NDArray[np.float64] | None) -> tuple[float, float]:
    """Lower and upper fence of a column."""
    tail, low, median, high, other_tail = _quantiles(column, [0.05, 0.25, 0.5, 0.75, 0.95], weights)
    reach = FENCE * (high - low) / NORMAL_QUARTILES
    apart = np.abs(column - median)
    if np.average(apart > reach, weights=weights) > MOST_BEYOND:
        reach = FENCE * (other_tail - tail) / NORMAL_TAILS
    elif not reach and (others := apart[apart > 0]).size:
        reach = FENCE * _quantiles(others, [0.5], None if weights is None else weights[apart > 0])[0]
    if np.average(apart > reach, weights=weights) > most_beyond:
        reach = np.inf
    return float(median - reach), float(median + reach)
