"""Modes at the ends of ascents: which are different, and which hold a part of the probability that matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf.infer.models.double_precision import Score
from pyro_maf.infer.start.ascent import Normal
from pyro_maf.infer.start.mean_field import fixed_noise

__all__ = ["MOST", "End", "Start", "bounds_of", "covering", "different", "distance"]

APART = 1.0
"""Distance, in standard deviations of either's normal, within which two ends are one mode."""
DIP, PLACES = 1.0, 16
"""Nats by which the density falls on the line between two modes, and the number of places there that show it."""
NEGLIGIBLE = 1e-3
"""Share of the probability below which a mode is left out: draws by the thousand do not tell."""
MOST = 8
"""Maximum number of modes that a guide covers."""
EVIDENCE_DRAWS = 256
EVEN = 0.2
"""Part of the shares that is distributed evenly, as the evidence of a normal is a rough estimate."""


class End(NamedTuple):
    """The end of an ascent at a mode: where it is, its log-density, and normals of the curvature there."""

    loc: Tensor
    value: float
    normals: list[Normal]


class Start(NamedTuple):
    """The initialization of a guide.

    Attributes:
        normals: One for each mode, that of the largest share first.
        shares: Estimate of each mode's share of the probability, (modes,).
        missed: Number of further modes that were seen and would matter.
        is_fitted: Whether the normals are near the posterior: false if their scale is a default, or the user's.
    """

    normals: tuple[Normal, ...]
    shares: Tensor
    missed: int = 0
    is_fitted: bool = True

    @classmethod
    def single(cls, normal: Normal) -> Start:
        """Return the initialization by one normal."""
        return cls((normal,), normal.loc.new_ones(1))


def bounds_of(log_density: Score, candidates: Sequence[Normal], noise: Tensor) -> Tensor:
    """Evidence lower bound of each candidate, up to a common constant.

    If all have draws that cannot be scored, it is that of the others, less twice the nats of their share.
    """
    draws = torch.cat([each.of_noise(noise) for each in candidates])
    scores = log_density(draws).view(len(candidates), -1)
    scored = scores.isfinite()
    means = scores.mean(1)
    if not scored.all(1).any():
        shares = scored.double().mean(1)
        means = (scores.where(scored, 0.0).mean(1) / shares + 2 * shares.log()).to(draws)
    entropies = torch.stack([each.scale_tril.diagonal().log().sum() for each in candidates])
    return (means + entropies).nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def _evidence(log_density: Score, normal: Normal) -> float:
    """Log evidence in nats by importance weights of a normal's draws, up to the same constant as `bounds_of`.

    Weights are truncated at the root of their number times their mean, so that none of them decides alone.
    """
    noise = fixed_noise(normal.loc, draws=EVIDENCE_DRAWS)
    scores = log_density(normal.of_noise(noise)).nan_to_num(nan=-torch.inf)
    log_weights = scores + (noise.square().sum(1) - len(normal.loc)) / 2 + normal.scale_tril.diagonal().log().sum()
    mean = log_weights.logsumexp(0) - math.log(len(noise))
    truncated = log_weights.minimum(mean + math.log(len(noise)) / 2)
    return float(truncated.logsumexp(0)) - math.log(len(noise))


def distance(normal: Normal, loc: Tensor) -> float:
    """Distance of a point from a normal's location, in its standard deviations."""
    moved = (loc - normal.loc)[:, None]
    return float(torch.linalg.solve_triangular(normal.scale_tril, moved, upper=False).norm())


def different(log_density: Score, ends: Sequence[End]) -> list[End]:
    """Return one end for each mode, in the order of the first of them."""
    modes: list[End] = []
    for end in ends:
        if not any(_is_same(log_density, mode, end) for mode in modes):
            modes.append(end)
    return modes


def _is_same(log_density: Score, one: End, other: End) -> bool:
    """True if two ends are one mode: near each other in the units of both, or without a dip between them."""
    if max(distance(one.normals[0], other.loc), distance(other.normals[0], one.loc)) < APART:
        return True
    parts = torch.linspace(0, 1, PLACES + 2, dtype=one.loc.dtype, device=one.loc.device)[1:-1, None]
    with torch.no_grad():
        lowest = float(log_density(one.loc + parts * (other.loc - one.loc)).min())
    return lowest > min(one.value, other.value) - DIP


@torch.no_grad()
def covering(log_density: Score, normals: Sequence[Normal], bounds: Sequence[float]) -> Start:
    """Return the initialization by the normals of those modes that matter.

    A mode matters if its evidence is at least a thousandth of that of all, of which the largest bound is a lower
    estimate.
    """
    evidence = [max(bound, _evidence(log_density, normal)) for normal, bound in zip(normals, bounds, strict=True)]
    within = [index for index, each in enumerate(evidence) if each > max(bounds) + math.log(NEGLIGIBLE)]
    within.sort(key=lambda index: -evidence[index])
    covered = within[:MOST]
    shares = torch.tensor([evidence[index] for index in covered], dtype=torch.float64).softmax(0)
    shares = (1 - EVEN) * shares + EVEN / len(covered)
    kept = tuple(normals[index] for index in covered)
    return Start(kept, shares.to(kept[0].loc), missed=len(within) - len(covered))
