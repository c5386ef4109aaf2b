"""Modes of a posterior that a guide has missed, which importance weights, taken where the guide has mass, cannot show.

Ascents from dispersed points end at modes. Around those that lie outside the guide's draws, the probability of a region
is estimated from draws of a normal, and compared with the fraction of the guide's draws in it. If there are none, draws
of wide normals around the guide's show whether it is the peak of something much broader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.models.double_precision import Score
from pyro_maf.infer.start.ascent import Ascents
from pyro_maf.infer.start.initialization import best_normal
from pyro_maf.infer.start.normal import Normal, truncated

__all__ = ["LEAST", "POOL", "Region", "missed_modes", "missed_sentence", "percent", "places", "why_no_search"]

POOL = 256
"""Number of candidate starting points of each kind: draws of the prior, and points uniform in unconstrained space."""
STARTS = 4
"""Number of starting points of each kind that are taken unconditionally; twice as many are chosen by their density."""
REACH = 2.0
"""Bound of the uniform starting points, as in Stan."""
ITERATIONS = 10
MOST_DIMENSIONS = 200
EXAMINED = 3
"""Maximum number of ends whose surroundings are examined."""
DRAWS = 512
RADII = 3.0
"""Radius of a region: its squared value is this many standard deviations above the mean for draws of a normal."""
LEAST, WIDER = 0.05, 0.2
"""Minimum share of the posterior that counts as missed; and, for a mode with less, the fraction by which it raises a
variance from which on it is reported, which is a tenth of a standard deviation."""
SCALES = (3.0, 10.0, 30.0, 100.0)
"""Scales, relative to the guide's draws, at which their surroundings are searched."""
LEAST_EFFECTIVE = 20
"""Minimum effective number of draws in these surroundings."""
NEIGHBOURS = 10
"""An end is outside of the draws if its tenth nearest draw is farther away than that of nearly all draws."""
COMPARED, NEARLY_ALL = 256, 0.99
SHOWN_SITES, SHOWN_NUMBERS = 3, 3
"""Maximum number of sites of a mode in a sentence, and of numbers per site."""


class Region(NamedTuple):
    r"""A region of the posterior that a guide has missed: around a mode, or beyond the guide's draws.

    Attributes:
        values: The value of each latent site at the mode, or at the most probable of some points there, (\*site).
        log_joint: Log joint density in unconstrained coordinates there, in nats.
        share: Its share of the posterior, minus the guide's share there.
        is_mode: Whether there is a mode; if not, the guide is too narrow.
    """

    values: dict[str, Tensor]
    log_joint: float
    share: float
    is_mode: bool


def missed_sentence(regions: Sequence[Region]) -> str:
    """Describe the regions that a guide has missed in one sentence."""
    modes = [region for region in regions if region.is_mode]
    share = percent(sum(region.share for region in modes or regions))
    if not modes:
        return (
            f"The guide is too narrow: {share} of the posterior lies around its draws, such as {places(regions)}, "
            "where their weights do not reach; give it more layers or steps, reparameterise the model, or run NUTS on "
            "`neutra`."
        )
    return (
        f"The guide misses {share} of the posterior, {places(modes)}: its draws and their weights know nothing of it; "
        "fit another guide that starts there, by init_loc_fn, or run NUTS from several points."
    )


def places(regions: Sequence[Region]) -> str:
    """Describe where regions are, by the values of the first sites in the largest."""
    sites = list(regions[0].values.items())[:SHOWN_SITES]
    near = "near" if len(regions) == 1 else f"at {len(regions)} places or more, the largest near"
    return f"{near} {', '.join(f'{name} = {_number(value)}' for name, value in sites)}"


def _number(value: Tensor) -> str:
    """Format a site's value: a number, or the first few of several."""
    flat = value.flatten().tolist()
    numbers = ", ".join(f"{number:.3g}" for number in flat[:SHOWN_NUMBERS])
    return numbers if value.dim() == 0 else f"({numbers}{', ...' if len(flat) > SHOWN_NUMBERS else ''})"


def percent(share: float) -> str:
    """Format a share in per cent."""
    if share < 1e-3:
        return f"{100 * share:.1g} %"
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def missed_modes(
    score: Score, draws: Tensor, log_evidence: float, starts: Tensor, sites: Callable[[Tensor], dict[str, Tensor]]
) -> list[Region]:
    """Return modes with a share of the posterior that a guide lacks, the largest first, or the share around its draws.

    A mode with hardly any share is returned too if it is so far away that standard deviations depend on it.

    Args:
        score: Log joint density of latent vectors in nats, differentiable, for many rows at once.
        draws: Draws of the guide, (rows, D).
        log_evidence: Log-evidence in nats, from the weights of these draws.
        starts: Draws of the prior, (starts, D); ascents start from some of them, and from uniform points.
        sites: Maps a latent vector, (D,), to the values of the latent sites.

    Cost: 512 evaluations; a few dozen gradients and line searches for 16 starts in one batch; for up to three ends
        outside of the draws, the search for a normal as in a guide's set-up; and if there are none, 2,048 evaluations
        around the draws.
    """
    spread = _Spread(draws)
    ends, values = _ends(score, spread, _starting_points(score, spread, starts.to(draws)))
    total = log_evidence if math.isfinite(log_evidence) else -math.inf
    found: list[tuple[Normal, float]] = []
    for index in spread.outside(ends, values):
        normal = best_normal(score, ends[index])
        if any(_fraction(normal.loc[None], other) for other, _ in found):
            continue  # an ascent to a mode already seen that had not yet converged
        log_mass = _log_mass(score, normal)
        combined = float(torch.logaddexp(torch.tensor(total), torch.tensor(log_mass)))
        share = math.exp(log_mass - combined) - _fraction(draws, normal)
        if share > LEAST or share * spread.wider(normal.loc) > WIDER:
            found.append((normal, log_mass))
            total = combined
    if all(math.exp(log_mass - total) <= LEAST for _, log_mass in found) and (
        around := _around(score, spread, total, sites)
    ):
        return around
    with torch.no_grad():
        modes = [
            Region(sites(loc), float(score(loc[None])), math.exp(mass - total), bool(spread.is_outside(loc[None])))
            for (loc, _), mass in found
        ]
    return sorted(modes, key=lambda mode: -mode.share)


def why_no_search(draws: Tensor) -> str:
    """Reason why no modes are searched for around draws of a guide, (rows, D), as a clause; "" if they are."""
    size = draws.shape[1]
    if size > MOST_DIMENSIONS:
        return f"there are more than {MOST_DIMENSIONS} latent variables"
    return f"{size} latent variables need {2 * size} draws" if len(draws) < 2 * size else ""


@torch.no_grad()
def _around(
    score: Score, spread: _Spread, log_evidence: float, sites: Callable[[Tensor], dict[str, Tensor]]
) -> list[Region]:
    """Return the region that a guide lacks around its draws, if it is far too narrow."""
    best: list[Region] = []
    for scale in SCALES:
        normal = Normal(spread.normal.loc, scale * spread.normal.scale_tril)
        noise = _noise(normal)
        points = normal.of_noise(noise)
        log_weights = normal.log_weights(score, noise).where(spread.is_outside(points), -torch.inf)
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
    """Return some points of each kind, and those that are most probable relative to a normal with the guide's moments.

    A sharp mode attracts ascents only from a small region, which many points find and a few would miss.
    """
    with seeded(2, prior.device):
        uniform = REACH * (2 * torch.rand(POOL, prior.shape[1]) - 1).to(prior)
    pool = torch.cat([prior, uniform])
    beside = score(pool) + spread.normal.noise_of(pool).square().sum(1) / 2
    chosen = beside.nan_to_num(nan=-torch.inf).topk(min(2 * STARTS, len(pool))).indices
    return torch.cat([prior[:STARTS], uniform[:STARTS], pool[chosen]])


class _Spread:
    """Region of the draws of a guide, in units in which their covariance is the identity.

    Attributes:
        normal: The normal with the mean and covariance of the draws.
    """

    def __init__(self, draws: Tensor) -> None:
        centred = draws.double() - draws.double().mean(0)
        covariance = centred.T @ centred / len(draws)
        jitter = 1e-6 * covariance.diagonal().clamp(min=1e-12)
        factor, failed = torch.linalg.cholesky_ex(covariance + jitter.diag())
        factor = covariance.diagonal().clamp(min=1e-12).sqrt().diag() if failed else factor
        self.normal = Normal(draws.mean(0), factor.to(draws))
        self._precise = Normal(self.normal.loc.double(), factor)
        self._draws = self.scaled(draws)
        distances = self._to_draws(self._draws[:COMPARED], 1)
        self._usual = float(distances.quantile(NEARLY_ALL))

    def outside(self, ends: Tensor, values: Tensor) -> list[int]:
        """Return the indices of ends outside of the draws and apart from each other, those with the highest values."""
        scaled = self.scaled(ends)
        far = self.is_outside(ends)
        chosen: list[int] = []
        for index in values.argsort(descending=True).tolist():
            apart = all(float((scaled[index] - scaled[other]).norm()) > self._usual for other in chosen)
            if far[index] and apart and values[index].isfinite() and len(chosen) < EXAMINED:
                chosen.append(index)
        return chosen

    def is_outside(self, points: Tensor) -> Tensor:
        """Test whether points, (points, D), are farther from the draws than these are from each other; boolean."""
        return self._to_draws(self.scaled(points), 0) > self._usual

    def wider(self, loc: Tensor) -> float:
        """Squared distance of a mode outside of the draws, in deviations: with its share, what it adds to variances."""
        return float(self.scaled(loc[None]).square().sum()) if self.is_outside(loc[None]) else 0.0

    def scaled(self, points: Tensor) -> Tensor:
        """Convert points, (points, D), to units of the draws, around their mean, in float64."""
        return self._precise.noise_of(points.double())

    def _to_draws(self, points: Tensor, itself: int) -> Tensor:
        """Distance of each point to its tenth nearest draw, except itself."""
        nearest = torch.cdist(points, self._draws).topk(NEIGHBOURS + itself, 1, largest=False)
        return nearest.values[:, -1]  # takes an eighth of the time of `kthvalue`


def _ends(score: Score, spread: _Spread, points: Tensor) -> tuple[Tensor, Tensor]:
    """Ascend from several points at once, in units of the guide's draws; return the ends and their log-densities."""
    ascents = Ascents(
        lambda rows: score(spread.normal.of_noise(rows)), spread.scaled(points).to(points), True, newton=False
    )
    for _ in range(ITERATIONS):
        if ascents.active.any():
            ascents.step()
    return spread.normal.of_noise(ascents.locs), ascents.values


@torch.no_grad()
def _log_mass(score: Score, normal: Normal) -> float:
    """Logarithm of the integral of the density over the region around a mode, in nats."""
    noise = _noise(normal)
    return _log_mean(normal.log_weights(score, noise).where(_is_within(noise), -torch.inf))


def _noise(like: Normal) -> Tensor:
    with seeded(3, like.loc.device):
        return torch.randn(DRAWS, len(like.loc)).to(like.loc)


def _log_mean(log_weights: Tensor) -> float:
    """Logarithm of the mean of truncated weights."""
    return float(truncated(log_weights).logsumexp(0)) - math.log(len(log_weights))


def _fraction(draws: Tensor, normal: Normal) -> float:
    """Fraction of draws in the region around a mode."""
    return float(_is_within(normal.noise_of(draws)).double().mean())


def _is_within(noise: Tensor) -> Tensor:
    """Test whether points are in the region around a normal's mode, by their noise, (points, D); boolean."""
    size = noise.shape[1]
    return noise.square().sum(1) <= size + RADII * math.sqrt(2 * size)
