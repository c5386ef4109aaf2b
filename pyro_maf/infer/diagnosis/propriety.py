"""Propriety of a posterior: whether its density falls far away, as a finite integral requires."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["IMPROPER", "seems_improper"]

IMPROPER = (
    "the posterior seems to be improper: along some direction its density still rises a million scales away, so that "
    "its integral is not finite; look at priors and factors"
)
SCALES = (1.0, 1e2, 1e4, 1e6)
"""Distances, in scales of the points, at which the density is evaluated: no data are a million scales from a prior."""


@torch.no_grad()
def seems_improper(score: Callable[[Tensor], Tensor], starts: Tensor, draws: Tensor) -> bool:
    """Return whether a density rises along some line up to a million scales, both from starting points and from draws.

    Either check alone misleads: starting points may have other units than the data if a prior is improper, and draws of
    a guide that is far too narrow are on the slope of the posterior. A density that is level far away passes: on a
    bounded support, rounding may cause that.

    Args:
        score: Log-density of latent vectors, (rows, D) to (rows,).
        starts: Draws of the prior, or a single point, (starts, D).
        draws: Draws of the guide, (draws, D).

    Cost: 16 D evaluations.
    """
    rises, _ = _along_axes(score, starts)
    rises_there, fails_there = _along_axes(score, draws)
    return bool((rises & (rises_there | fails_there)).any())


def _along_axes(score: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    """Test on either side of each axis if a density rises with distance from points, and if that is unknown."""
    centre = points.median(0).values
    spread = (points - centre).abs().median(0).values
    lines = torch.where(spread > 0, spread, torch.ones_like(spread)).diag()
    distances = torch.tensor(SCALES).to(points)
    moved = distances[:, None, None] * torch.cat([lines, -lines])
    values = score((centre + moved).flatten(0, 1)).view(len(SCALES), 2, -1)
    rises = (values.diff(dim=0) > 0).all(0) & values.isfinite().all(0)
    # A density rounded to whole nats or coarser says no more about that than one that has overflowed.
    is_lost = values[0].abs() * torch.finfo(values.dtype).eps > 1
    fails = is_lost | (values.isnan() | values.isposinf()).any(0)
    return rises.any(0), fails.any(0)
