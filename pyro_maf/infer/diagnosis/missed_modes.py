"""Modes of a posterior that a guide has missed: importance weights, taken where the guide has mass, cannot tell.

Ascents from dispersed points end at modes. Around those that lie outside the draws of the guide, the probability of a
region is estimated from draws of a normal, and compared with the fraction of the guide's draws in it. Where there are
none, draws of wide normals around those of the guide tell if it is the peak of something much broader.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.models.double_precision import Score
from pyro_maf.infer.start.ascent import Ascents
from pyro_maf.infer.start.initialization import best_normal
from pyro_maf.infer.start.normal import Normal

__all__ = ["POOL", "Region", "missed_modes", "why_no_search"]

POOL = 256
"""Number of points of either kind that starting points are of: draws of the prior, uniform ones in real numbers."""
STARTS = 4
"""Number of starting points of either kind that are taken without a look; twice as many are chosen by their density."""
REACH = 2.0
"""Bound of the uniform starting points, as in Stan."""
ITERATIONS = 10
MOST_DIMENSIONS = 200
EXAMINED = 3
"""Maximum number of ends whose surroundings are examined."""
DRAWS = 512
RADII = 3.0
"""Radius of a region: the squared distance is at most so many standard deviations above that of a normal's draws."""
LEAST = 0.05
"""Least share of the posterior that counts as missed."""
SCALES = (3.0, 10.0, 30.0, 100.0)
"""Scales, in those of the guide's draws, at which there is a search around them."""
LEAST_EFFECTIVE = 20
"""Minimum effective number of draws around the guide's."""
NEIGHBOURS = 10
"""An end is outside of the draws if its tenth nearest draw is farther away than that of nearly all draws."""
COMPARED, NEARLY_ALL = 256, 0.99


class Region(NamedTuple):
    r"""A region of the posterior that a guide has missed: around a mode, or beyond the guide's draws.

    Attributes:
        values: The value of each latent site at the mode, or at the most probable of some points there, (\*site).
        log_joint: Log joint density in unconstrained coordinates there, in nats.
        share: Its share of the posterior, without what the guide has there.
        is_mode: Whether there is a mode; if not, the guide is too narrow.
    """

    values: dict[str, Tensor]
    log_joint: float
    share: float
    is_mode: bool


def missed_modes(
    score: Score, draws: Tensor, log_evidence: float, starts: Tensor, sites: Callable[[Tensor], dict[str, Tensor]]
) -> list[Region]:
    """Return modes with a share of the posterior that a guide lacks, the largest first; or what it lacks around them.

    Args:
        score: Log joint density of latent vectors in nats, differentiable, for many rows at once.
        draws: Draws of the guide, (rows, D).
        log_evidence: Log evidence in nats by the weights of these draws.
        starts: Draws of the prior, (starts, D); ascents start from some of them, and from uniform points.
        sites: The values of the latent sites at a latent vector, (D,).

    Cost: 512 evaluations; some dozen gradients and line searches for 16 starts in one batch; for up to three ends
        outside of the draws, the search for a normal as of a guide's start, and if there are none 2,048 evaluations
        around the draws.
    """
    spread = _Spread(draws)
    ends, values = _ends(score, spread, _starting_points(score, spread, starts.to(draws)))
    total = log_evidence if math.isfinite(log_evidence) else -math.inf
    found: list[tuple[Normal, float]] = []
    for index in spread.outside(ends, values):
        normal = best_normal(score, ends[index])
        if any(_fraction(normal.loc[None], other) for other, _ in found):
            continue  # an ascent to a mode that has been seen, which had not yet converged
        log_mass = _log_mass(score, normal)
        combined = float(torch.logaddexp(torch.tensor(total), torch.tensor(log_mass)))
        if math.exp(log_mass - combined) - _fraction(draws, normal) > LEAST:
            found.append((normal, log_mass))
            total = combined
    if not found:
        return _around(score, spread, total, sites)
    with torch.no_grad():
        modes = [
            Region(sites(loc), float(score(loc[None])), math.exp(mass - total), bool(spread.is_outside(loc[None])))
            for (loc, _), mass in found
        ]
    return sorted(modes, key=lambda mode: -mode.share)


def why_no_search(draws: Tensor) -> str:
    """Say why no modes are looked for around draws of a guide, (rows, D), as a clause; "" where they are."""
    size = draws.shape[1]
    if size > MOST_DIMENSIONS:
        return f"there are more than {MOST_DIMENSIONS} latent variables"
    return f"{size} latent variables need {2 * size} draws" if len(draws) < 2 * size else ""


@torch.no_grad()
def _around(
    score: Score, spread: _Spread, log_evidence: float, sites: Callable[[Tensor], dict[str, Tensor]]
) -> list[Region]:
    """Return the place of what a guide lacks around its draws, where it is too narrow by far, if there is any."""
    best: list[Region] = []
    for scale in SCALES:
        normal = Normal(spread.centre, scale * spread.factor)
        points, log_weights = _weighted(score, normal)
        log_weights = log_weights.where(spread.is_outside(points), -torch.inf)
        if float(2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)) < math.log(LEAST_EFFECTIVE):
            continue
        log_mass = _log_mean(log_weights)
        share = math.exp(log_mass - float(torch.logaddexp(torch.tensor(log_evidence), torch.tensor(log_mass))))
        if share > max([LEAST, *(each.share for each in best)]):
            loc = points[int(log_weights.argmax())]
            best = [Region(sites(loc), float(score(loc[None])), share, is_mode=False)]
    return best


@torch.no_grad()
def _starting_points(score: Score, spread: _Spread, prior: Tensor) -> Tensor:
    """Return some points of either kind, and those that are most probable beside a normal of the guide's moments.

    A sharp mode attracts ascents from a small region alone, which many points find, and a few would miss.
    """
    with seeded(2, prior.device):
        uniform = REACH * (2 * torch.rand(POOL, prior.shape[1]) - 1).to(prior)
    pool = torch.cat([prior, uniform])
    beside = score(pool) + _squares(pool, Normal(spread.centre, spread.factor)) / 2
    chosen = beside.nan_to_num(nan=-torch.inf).topk(min(2 * STARTS, len(pool))).indices
    return torch.cat([prior[:STARTS], uniform[:STARTS], pool[chosen]])


class _Spread:
    """Region of the draws of a guide, in units in which they have the covariance of a standard normal."""

    def __init__(self, draws: Tensor) -> None:
        centred = draws.double() - draws.double().mean(0)
        covariance = centred.T @ centred / len(draws)
        jitter = 1e-6 * covariance.diagonal().clamp(min=1e-12)
        factor, failed = torch.linalg.cholesky_ex(covariance + jitter.diag())
        self._factor = covariance.diagonal().clamp(min=1e-12).sqrt().diag() if failed else factor
        self.centre, self.factor = draws.mean(0), self._factor.to(draws)
        self._draws = self.scaled(draws)
        distances = self._to_draws(self._draws[:COMPARED], 1)
        self._usual = float(distances.quantile(NEARLY_ALL))

    def outside(self, ends: Tensor, values: Tensor) -> list[int]:
        """Return the indices of ends outside of the draws and apart from each other, of the highest values."""
        scaled = self.scaled(ends)
        far = self.is_outside(ends)
        chosen: list[int] = []
        for index in values.argsort(descending=True).tolist():
            apart = all(float((scaled[index] - scaled[other]).norm()) > self._usual for other in chosen)
            if far[index] and apart and values[index].isfinite() and len(chosen) < EXAMINED:
                chosen.append(index)
        return chosen

    def is_outside(self, points: Tensor) -> Tensor:
        """Test if points, (points, D), are farther from the draws than these are from each other; boolean."""
        return self._to_draws(self.scaled(points), 0) > self._usual

    def scaled(self, points: Tensor) -> Tensor:
        """Return points, (points, D), in units of the draws, around their mean, in float64."""
        return torch.linalg.solve_triangular(self._factor, (points - self.centre).double().T, upper=False).T

    def _to_draws(self, points: Tensor, itself: int) -> Tensor:
        """Distance of each point to its tenth nearest draw, without itself."""
        nearest = torch.cdist(points, self._draws).topk(NEIGHBOURS + itself, 1, largest=False)
        return nearest.values[:, -1]  # an eighth of the time of `kthvalue`


def _ends(score: Score, spread: _Spread, points: Tensor) -> tuple[Tensor, Tensor]:
    """Ascend from several points at once, in units of the guide's draws; return the ends and their log-densities."""
    ascents = Ascents(
        lambda rows: score(spread.centre + rows @ spread.factor.T), spread.scaled(points).to(points), True, newton=False
    )
    for _ in range(ITERATIONS):
        if ascents.active.any():
            ascents.step()
    return spread.centre + ascents.locs @ spread.factor.T, ascents.values


@torch.no_grad()
def _log_mass(score: Score, normal: Normal) -> float:
    """Logarithm of the integral of the density over the region around a mode, in nats."""
    points, log_weights = _weighted(score, normal)
    return _log_mean(log_weights.where(_squares(points, normal) <= _radius(len(normal.loc)), -torch.inf))


def _weighted(score: Score, normal: Normal) -> tuple[Tensor, Tensor]:
    """Draws of a normal, and the log-density at these over that of the normal, in nats."""
    size = len(normal.loc)
    with seeded(3, normal.loc.device):
        noise = torch.randn(DRAWS, size).to(normal.loc)
    points = normal.loc + noise @ normal.scale_tril.T
    log_det = float(normal.scale_tril.diagonal().double().log().sum())
    return points, score(points).double() + (noise.double() ** 2).sum(1) / 2 + size / 2 * math.log(
        2 * math.pi
    ) + log_det


def _log_mean(log_weights: Tensor) -> float:
    """Logarithm of the mean of weights, truncated so that no single one decides."""
    ceiling = log_weights.logsumexp(0) - 0.5 * math.log(len(log_weights))
    return float(log_weights.minimum(ceiling).logsumexp(0)) - math.log(len(log_weights))


def _fraction(draws: Tensor, normal: Normal) -> float:
    """Fraction of draws in the region around a mode."""
    return float((_squares(draws, normal) <= _radius(len(normal.loc))).double().mean())


def _squares(points: Tensor, normal: Normal) -> Tensor:
    """Squared distance of points from a normal's location, in its units."""
    scaled = torch.linalg.solve_triangular(normal.scale_tril, (points - normal.loc).T, upper=False)
    return (scaled**2).sum(0)


def _radius(size: int) -> float:
    """Squared radius of the region, in standard deviations."""
    return size + RADII * math.sqrt(2 * size)
