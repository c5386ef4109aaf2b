"""Propriety of a posterior: its density falls far away, if it has a finite integral."""

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
"""Distances, in scales of the points, at which the density is looked at: no data are a million of them from a prior."""


@torch.no_grad()
def seems_improper(score: Callable[[Tensor], Tensor], starts: Tensor, draws: Tensor) -> bool:
    """True if a density rises along some line up to a million scales, both of starting points and of a guide's draws.

    Either look alone misleads: starting points may lie in other units than the data where a prior is improper, and
    draws of a guide that is far too narrow are on the slope of the posterior. A density that is level far away is let
    pass: on a bounded support it may be so by rounding alone.

    Args:
        score: Log-density of latent vectors, (rows, D) to (rows,).
        starts: Draws of the prior, or a point, (starts, D).
        draws: Draws of the guide, (draws, D).

    Cost: 16 D evaluations.
    """
    rises, _ = _along_axes(score, starts)
    rises_there, fails_there = _along_axes(score, draws)
    return bool((rises & (rises_there | fails_there)).any())


def _along_axes(score: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    """Test if a density rises with distance from points, and if that cannot be told, on either side of each axis."""
    centre = points.median(0).values
    spread = (points - centre).abs().median(0).values
    lines = torch.where(spread > 0, spread, torch.ones_like(spread)).diag()
    distances = torch.tensor(SCALES).to(points)
    moved = distances[:, None, None] * torch.cat([lines, -lines])
    values = score((centre + moved).flatten(0, 1)).view(len(SCALES), 2, -1)
    rises = (values.diff(dim=0) > 0).all(0) & values.isfinite().all(0)
    # Rounded to whole nats or coarser, a density no more says if it rises than one that has overflowed.
    is_lost = values[0].abs() * torch.finfo(values.dtype).eps > 1
    fails = is_lost | (values.isnan() | values.isposinf()).any(0)
    return rises.any(0), fails.any(0)
