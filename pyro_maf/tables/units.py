"""Units of columns: a robust location and scale, and tail weights where the tails are heavy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf.tables.mixture import fit_mixture
from pyro_maf.tables.moments import NORMAL_QUARTILES, Moments, quantiles
from pyro_maf.tables.tail_weights import HEAVY, tail_weight
from pyro_maf.transforms.tails import with_tails

__all__ = ["Units", "units_of"]

REACH, NORMAL_REACH = 1000.0, 10.0
"""Reach, in standard deviations, of a column's values without tail weights, and with them."""
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
EVEN, ODD = slice(None, None, 2), slice(1, None, 2)
HALVES = (EVEN, ODD), (ODD, EVEN)
"""Rows that a density is fitted to, and rows that it is judged by."""

Score = Callable[[Tensor, Tensor], float]
"""Log-likelihood of each half of the rows, (N, D), with weights (N,), under a density fitted to the other."""


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
        >>> from pyro_maf.tables.moments import moments_of
        >>> rows = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))
        >>> rows[:, 1] /= rows[:, 2]  # Cauchy
        >>> units = units_of(moments_of(rows), rows)
        >>> [[weight > 1 for weight in side] for side in units.tails.tolist()]
        [[False, True, False], [False, True, False]]
    """
    row_weights = torch.ones(len(table), dtype=torch.float64) if weights is None else weights.double() / weights.mean()
    table = table.detach().double()
    loc, scale = moments.loc.clone(), moments.scale.clone()
    tails = loc.new_zeros(2, len(loc))
    for column, values in enumerate(table.unbind(1)):
        low, median, high = quantiles(values, (0.25, 0.5, 0.75), None if weights is None else row_weights)
        sides = torch.stack([tail_weight(values - median, row_weights), tail_weight(median - values, row_weights)])
        if sides.max() > HEAVY:
            tails[:, column], loc[column] = sides, median
            scale[column] = (high - low) / NORMAL_QUARTILES or scale[column]
    if not tails.any():
        return Units(*moments)
    has_tails = _columns_with_tails(table, row_weights, Units(*moments), Units(loc, scale, tails), tails.amax(0))
    if not has_tails.any():
        return Units(*moments)
    loc, scale = torch.where(has_tails, loc, moments.loc), torch.where(has_tails, scale, moments.scale)
    return Units(loc, scale, torch.where(has_tails, tails, 0.0))


def _columns_with_tails(table: Tensor, row_weights: Tensor, plain: Units, heavy: Units, weight: Tensor) -> Tensor:
    """Mask of the columns that get tail weights, (D,), among those with a positive `weight`, (D,)."""
    if len(table) > JUDGED:
        rows = torch.linspace(0, len(table) - 1, JUDGED).long()
        table, row_weights = table[rows], row_weights[rows]
    comparison = _Comparison(plain.standardised(table), heavy.standardised(table), row_weights)
    has_tails = weight > 0
    if comparison.loses(has_tails, _score_of_t):
        heaviest_first = weight.argsort(descending=True)[: int(has_tails.sum())]
        has_tails = comparison.harmless(heaviest_first if len(weight) < WIDE else heaviest_first[:0])
    if has_tails.any() and comparison.loses(has_tails, _score_of_mixture):
        return torch.zeros_like(has_tails)
    return has_tails


class _Comparison(NamedTuple):
    """Rows in units without and with tail weights, and the log-slopes of the columns' maps, (N, D) each."""

    plain: tuple[Tensor, Tensor]
    heavy: tuple[Tensor, Tensor]
    row_weights: Tensor

    def log_likelihood(self, has_tails: Tensor, score: Score) -> float:
        """Log-likelihood per row if these columns have tail weights, from the score of standardised rows."""
        z, log_slope = (torch.where(has_tails, *pair) for pair in zip(self.heavy, self.plain, strict=True))
        total = score(z, self.row_weights) + float(self.row_weights @ log_slope.sum(1))
        return total / float(self.row_weights.sum())

    def loses(self, has_tails: Tensor, score: Score) -> bool:
        """Return whether tail weights of these columns lower the log-likelihood by more than is tolerated."""
        lost = self.log_likelihood(torch.zeros_like(has_tails), score) - self.log_likelihood(has_tails, score)
        return lost >= min(MOST_LOST, LOST_EACH * int(has_tails.sum()))

    def harmless(self, columns: Tensor) -> Tensor:
        """Mask of the columns whose tail weights, added one by one, do not lower the likelihood of a multivariate t."""
        has_tails = torch.zeros(self.plain[0].shape[1], dtype=torch.bool)
        best = self.log_likelihood(has_tails, _score_of_t)
        for column in columns:
            trial = has_tails.clone()
            trial[column] = True
            log_likelihood = self.log_likelihood(trial, _score_of_t)
            if log_likelihood > best - NO_LOSS:
                has_tails, best = trial, log_likelihood
        return has_tails


def _score_of_t(z: Tensor, row_weights: Tensor) -> float:
    """Score of a multivariate t, with the degrees of freedom that are best for each half."""
    total = 0.0
    for seen, unseen in HALVES:
        log_probs = (_multivariate_t(z[seen], row_weights[seen], z[unseen], freedom) for freedom in FREEDOMS)
        total += max(float(row_weights[unseen] @ log_prob) for log_prob in log_probs)
    return total


def _score_of_mixture(z: Tensor, row_weights: Tensor) -> float:
    """Score of a mixture of a few clusters."""
    z, total = z.clamp(-REACH, REACH), 0.0
    for seen, unseen in HALVES:
        mixture = fit_mixture(z[seen], row_weights[seen], most=MOST_CLUSTERS)
        total += float(row_weights[unseen] @ mixture.log_prob(z[unseen]))
    return total


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
