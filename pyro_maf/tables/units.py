"""Units of columns: a robust location and scale, and the weights of their tails where these are heavy."""

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
"""Distance in standard deviations of a normal distribution between its quartiles, and between its 5 % quantiles."""
FENCE = 10.0
MOST_BEYOND = 0.1
OUTLIERS = 0.005
MOST_ENTRIES = 2**22
"""Number of entries of contexts that are measured, if they are so together."""

GRID = torch.tensor([0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1, 3 / 2, 2], dtype=torch.float64)
"""Weights, inverse degrees of freedom of Student's t, from normal to heavier than Cauchy."""
SIZES = torch.linspace(-3.0, 1.2, 22, dtype=torch.float64).exp()
"""Scales of a side, in units of that of a normal distribution of the same quantile."""
MEAN_WEIGHT = 1 / 8
"""Mean of the exponential prior of a weight: what few rows come to, of which 1,000 normal ones say 0."""
LEAST = 3 / 16
"""Weight, five degrees of freedom, from which a tail is heavy: one normal column of 100 rows in 30 has it, none of 200;
with two degrees of freedom 7 in 10 of 100 rows do, 97 in 100 of 200. A spline fits lighter tails as they are."""
BEGINNINGS = (0.5, 0.75, 0.875)
"""Parts of a side beyond which its tail is looked at: the half, and then what is further out."""
LIGHTER = 2.0
"""Nats by which a further part is likelier with no tail than with the least heavy one, where the half seems to have it:
tens of clusters that lie beyond others, less than 1.5 of Student's t, Pareto and log-normal columns."""
FARTHEST = 0.01
"""Part of the rows beyond, and one row at least, that counts as being further out than all others, however
far: an error among the rows says nothing of the others."""
REACH, NORMAL_REACH = 1000.0, 10.0
"""A tail that is not heeded may be so long, in standard deviations; of one that is, no value is so far out."""
LEAST_ROWS = 20
JUDGED = 1_000
"""Number of rows by which tails are judged together."""
MOST_LOST, LOST_EACH = 3.0, 0.1
"""Nats a row that a multivariate t may lose by units of tails, in all and for each column in them: it likes rows that
are long-tailed together, of which a flow fits the tails of the first columns badly. Of those it loses 0.03 to 0.06
each, of columns that are linear in others, as image patches or sums of a few skewed factors, 0.1 to 0.5; there a flow
loses too."""
MOST_CLUSTERS = 4
"""Maximum number of clusters of the mixture that may lose as much: long-tailed clusters lose 0.12 to 0.16 by each."""
NO_LOSS = 0.02
"""Nats a row that are none."""
FREEDOMS = (1.0, 2.0, 4.0, 8.0, 1e6)
"""Degrees of freedom of the multivariate t that are tried, of which the last is normal."""
REWEIGHTINGS = 6
WIDE = 128
"""From so many columns on they are heeded all or none: a choice for each takes as many inversions."""
POINTS = 256
"""The outer half of a side is taken at so many of its quantiles: as good as all rows for one number."""


class Moments(NamedTuple):
    """Location and scale of each column, (D,) each."""

    loc: Tensor
    scale: Tensor

    def float(self) -> Moments:
        """Round to float32."""
        return Moments(self.loc.float(), self.scale.float())


def plain_moments_of(table: Tensor, weights: Tensor | None = None) -> Moments:
    """Mean and standard deviation of the columns of `table`, outliers and all, in float64; a constant one has scale 1.

    Example:
        >>> plain_moments_of(torch.tensor([[1.0], [2.0], [6.0]])).loc
        tensor([3.], dtype=torch.float64)
    """
    # In units of a power of two of a column's size, so that squares neither overflow nor vanish.
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
    r"""Return mean and standard deviation of the columns of `table`, its outliers moved to a fence; in float64.

    The fence lies 10 standard deviations on either side of the median, those of a normal distribution with the column's
    quartiles: far enough to leave ordinary columns unchanged, and near enough for one value at 1e6 to count as little
    as one at 10. The data are not clipped: a tail beyond the fence is as far out as it is in these units. Where more
    than a tenth of the rows lie beyond it, the 5% and 95% quantiles take the quartiles' place; where half of the rows
    share one value and fewer than a tenth have another, the median distance of those does. A constant column has scale
    1.

    Args:
        table: Rows, (N, D).
        most_beyond: A column with a larger fraction of its rows beyond the fence has no fence.
        weights: How often each row counts, (N,), here and in quartiles and fractions; by default once.

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
    # A column at a time: a sorted copy of all of them might not fit.
    columns = (column.double() for column in table.detach().unbind(1))
    often = None if weights is None else weights.double().numpy()
    clamped = (column.clamp(*_fence(column.numpy(), most_beyond, often)) for column in columns)
    each = [[*map(float, plain_moments_of(column[:, None], weights))] for column in clamped]
    return Moments(*torch.tensor(each, dtype=torch.float64).reshape(-1, 2).T.contiguous())


def context_moments_of(table: Tensor, weights: Tensor | None = None, *, together: bool = False) -> Moments:
    """Moments of a context: as `moments_of`, but with a fence against a few outliers only, up to one row in 200.

    A network takes a context linearly: in units of its bulk, the rows of a heavy tail would be so far out that they
    would dominate the steps of a fit. `together`, all columns, the entries of an image, a series or a set, have the
    units of all of them: units of each would blow up a margin that hardly varies, and take an image's shades.
    """
    if not together:
        return moments_of(table, OUTLIERS, weights)
    some = slice(None, None, -(-table.numel() // MOST_ENTRIES))
    table, width = table[some], table.shape[1]
    often = None if weights is None else weights[some].repeat_interleave(width)
    loc, scale = moments_of(table.reshape(-1, 1), OUTLIERS, often)
    return Moments(loc.expand(width), scale.expand(width))


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

    def standardised(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in these units, and the logarithms of the slopes of each column there, (N, D) both."""
        z = (table - self.loc) / self.scale
        log_slope = -self.scale.log().expand(z.shape)
        if self.tails is None:
            return z, log_slope
        zero = torch.zeros_like(self.loc[:1])
        # Each column alone, so that it has a log-determinant of its own.
        columns = zip(z.split(1, -1), self.tails.split(1, -1), strict=True)
        mapped, log_bent = zip(*(with_tails(*column, zero, zero + 1, -1) for column in columns), strict=True)
        return torch.cat(mapped, -1), log_slope + torch.stack(log_bent, -1)

    @property
    def reach(self) -> Tensor:
        """Standardised distance beyond which a value of a column is no part of its bulk or tails, (D,)."""
        heavy = torch.zeros(len(self.loc), dtype=torch.bool) if self.tails is None else self.tails.any(0)
        return torch.where(heavy, NORMAL_REACH, REACH)

    def reaching(self, table: Tensor) -> list[int]:
        """Columns of heavy tails from which no value of the rows, (N, D), is out of reach."""
        if self.tails is None:
            return []
        z, _ = self.standardised(table)
        return (self.tails.any(0) & (z.abs() <= NORMAL_REACH).all(0)).nonzero()[:, 0].tolist()

    def with_angles(self, columns: tuple[int, ...]) -> Units:
        """Units in which angles are radians."""
        if not columns:
            return self
        at = torch.isin(torch.arange(len(self.loc)), torch.tensor(columns))
        tails = None if self.tails is None else self.tails.masked_fill(at, 0.0)
        return Units(self.loc.masked_fill(at, 0.0), self.scale.masked_fill(at, 1.0), tails)

    def take(self, columns: list[int]) -> Units:
        """Units of some columns."""
        tails = None if self.tails is None else self.tails[:, columns]
        return Units(self.loc[columns], self.scale[columns], tails if tails is not None and tails.any() else None)


def units_of(moments: Moments, table: Tensor, weights: Tensor | None = None) -> Units:
    r"""Units of the columns of `table`: their moments, or median, quartiles and weights of tails if those are heavy.

    The outer half of the rows on either side of the median are taken to follow y = median + s x sqrt((exp(w x^2) - 1) /
    (w x^2)) for a normal x, as in `Tails`; the weight of that side is the mean of w over its likelihood, with s at its
    maximum, and an exponential prior. It is 0 if the outer quarter or eighth is likelier without a tail, as where rows
    form clusters. A column with a weight above 3 / 16 on either side has units of its median and quartiles and weights
    of both tails, so that it looks normal to a model; any other has its moments.

    Columns that are heavy-tailed each may be linear in one another, and long-tailed together, as neighbours in an
    image, of which some are all edges: curved one by one they are neither. So if a multivariate t of all columns loses
    more than 3 nats a row by these units, or 0.1 for each of their columns, of rows that it was not fitted to, they are
    only of columns that do not lose; and of none if a mixture of up to four clusters, which may be long-tailed, loses
    as much by those.

    Args:
        moments: Moments of the columns.
        table: Rows, (N, D), or some of them.
        weights: How often each row counts, (N,); by default once.

    Cost: a sort of each column and some 100,000 logarithms; and, with heavy tails, some 100 matrices of covariance of a
    thousand rows, for each column again if these lose by them; and four mixtures
    of 500 rows, half a second.

    Example:
        >>> rows = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
        >>> rows[:, 1] /= rows[:, 2]  # Cauchy
        >>> units = units_of(moments_of(rows), rows)
        >>> [[weight > 1 for weight in side] for side in units.tails.tolist()]
        [[False, True, False], [False, True, False]]
    """
    often = torch.ones(len(table), dtype=torch.float64) if weights is None else weights.double() / weights.mean()
    loc, scale = (each.clone() for each in moments)
    tails = loc.new_zeros(2, len(loc))
    for column, values in enumerate(table.detach().double().unbind(1)):
        low, median, high = _quantiles(values.numpy(), [0.25, 0.5, 0.75], None if weights is None else often.numpy())
        apart = values - median
        sides = torch.stack([_weight(apart, often), _weight(-apart, often)])
        if sides.max() > LEAST:
            tails[:, column], loc[column] = sides, median
            scale[column] = (high - low) / NORMAL_QUARTILES or scale[column]
    if not tails.any():
        return Units(*moments)
    both = Units(*moments), Units(loc, scale, tails)
    heeded = _heeded(table.detach().double(), often, *both, tails.amax(0))
    if not heeded.any():
        return Units(*moments)
    loc, scale = (torch.where(heeded, *each) for each in ((loc, moments.loc), (scale, moments.scale)))
    return Units(loc, scale, torch.where(heeded, tails, 0.0))


def _heeded(table: Tensor, often: Tensor, plain: Units, heavy: Units, weight: Tensor) -> Tensor:
    """Columns in units of their tails, (D,), of those whose tails have a weight, (D,), above 0."""
    if len(table) > JUDGED:
        rows = torch.linspace(0, len(table) - 1, JUDGED).long()
        table, often = table[rows], often[rows]
    of_plain, of_heavy = plain.standardised(table), heavy.standardised(table)
    is_heavy = weight > 0

    def score(heeded: Tensor, *, has_clusters: bool = False) -> float:
        z, log_slope = (torch.where(heeded, of_heavy[i], of_plain[i]) for i in range(2))
        score = _score_of_mixture if has_clusters else _score_of_t
        return (score(z, often) + float(often @ log_slope.sum(1))) / float(often.sum())

    def loses(heeded: Tensor, *, has_clusters: bool = False) -> bool:
        lost = score(none, has_clusters=has_clusters) - score(heeded, has_clusters=has_clusters)
        return lost >= min(MOST_LOST, LOST_EACH * int(heeded.sum()))

    heeded, none = is_heavy, torch.zeros_like(is_heavy)
    if loses(is_heavy):
        heeded, best = none, score(none)
        heaviest_first = weight.argsort(descending=True)[: int(is_heavy.sum())]
        for column in heaviest_first if len(weight) < WIDE else ():
            trial = heeded.clone()
            trial[column] = True
            if (found := score(trial)) > best - NO_LOSS:
                heeded, best = trial, found
    return none if heeded.any() and loses(heeded, has_clusters=True) else heeded


HALVES = (slice(None, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(None, None, 2))
"""Rows that are seen, and those that a density of them is judged by."""


def _score_of_t(z: Tensor, often: Tensor) -> float:
    """Log-likelihood of each half of the rows under the multivariate t of the others."""
    return sum(
        max(float(often[unseen] @ _multivariate_t(z[seen], often[seen], z[unseen], freedom)) for freedom in FREEDOMS)
        for seen, unseen in HALVES
    )


def _score_of_mixture(z: Tensor, often: Tensor) -> float:
    """Log-likelihood of each half of the rows under the mixture of the others."""
    z = z.clamp(-REACH, REACH)
    return sum(
        float(often[unseen] @ fit_mixture(z[seen], often[seen], most=MOST_CLUSTERS).log_prob(z[unseen]))
        for seen, unseen in HALVES
    )


def _multivariate_t(seen: Tensor, often: Tensor, unseen: Tensor, freedom: float) -> Tensor:
    """Log-density of rows under the multivariate t that others are most likely under, by iterated reweighting."""
    rows, dim = seen.shape
    centred = seen - (mean := seen.median(0).values)
    shrinkage = dim**2 / (rows**2 + dim**2)  # half of the correlations where there are as many columns as rows
    weights = often
    for _ in range(REWEIGHTINGS):
        scatter = (weights[:, None] * centred).T @ centred / often.sum()
        diagonal = scatter.diagonal().clamp(min=1e-12)
        factor = torch.linalg.cholesky((1 - shrinkage) * scatter + ((shrinkage + 1e-9) * diagonal).diag())
        weights = often * (freedom + dim) / (freedom + _squared_distance(factor, centred))
    constant = math.lgamma((freedom + dim) / 2) - math.lgamma(freedom / 2) - dim / 2 * math.log(freedom * math.pi)
    log_tail = (freedom + dim) / 2 * (_squared_distance(factor, unseen - mean) / freedom).log1p()
    return constant - factor.diagonal().log().sum() - log_tail


def _squared_distance(factor: Tensor, rows: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(factor, rows.T, upper=False).square().sum(0)


def _weight(apart: Tensor, often: Tensor) -> Tensor:
    """Weight of the tail of a side, that of the positive distances: 0 if it is lighter further out, as of clusters."""
    apart, often = apart[apart > 0], often[apart > 0]
    if len(apart) < LEAST_ROWS:
        return GRID[0]
    order = torch.from_numpy(np.argsort(apart.numpy()))  # in a tenth of torch's time
    apart, often = apart[order], often[order]
    log_likelihood = _log_likelihood(apart, often, BEGINNINGS[0]) - GRID / MEAN_WEIGHT
    likelihood = (log_likelihood - log_likelihood.max()).exp()
    weight = torch.trapezoid(GRID * likelihood, GRID) / torch.trapezoid(likelihood, GRID)
    for beginning in BEGINNINGS[1:] if weight > LEAST else ():
        further = _log_likelihood(apart, often, beginning)
        if further[0] > further[GRID == LEAST] + LIGHTER:
            return GRID[0]
    return weight


def _thinned(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """At most `POINTS` of ordered values, each with the same part of the counts."""
    if len(values) <= POINTS:
        return values, counts
    below = counts.cumsum(0)
    levels = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS * below[-1]
    return values[torch.searchsorted(below, levels)], (below[-1] / POINTS).expand(POINTS)


def _log_likelihood(apart: Tensor, often: Tensor, beginning: float) -> Tensor:
    """Log-likelihood of the ordered distances beyond a quantile, for each weight, at the best of scales."""
    below = often.cumsum(0)
    start = int(torch.searchsorted(below, beginning * below[-1:]))
    rows = len(below) - start - 1
    last = rows - max(1, math.ceil(FARTHEST * rows))
    if last < 1:
        return torch.zeros_like(GRID)
    beyond, counts = apart[start + 1 :] / apart[start], often[start + 1 :]
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
    """Quantiles; with weights, the smallest value with a fraction of at least the level at or below it."""
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
