"""Entries of latent sites that masks exclude from a model's density."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_maf._core.random import seeded
from pyro_maf.infer.latents import Latents, Part, masked_entries

__all__ = ["idle_entries", "masked_in_vector"]

POINTS = 4


def idle_entries(
    latents: Latents, masked: Tensor, log_joint: Callable[[Mapping[str, Tensor]], Tensor], nesting: int
) -> Tensor:
    """Mask of the entries of a latent vector that are masked and do not affect the log joint density, (D,).

    Other masked entries, such as those of a flat prior, have a posterior by their likelihood. The test of an idle
    entry: the gradient of the log joint density with respect to it is zero, and another value of it gives the same
    density.

    Args:
        latents: The layout of the vector.
        masked: Mask of the masked entries, (D,).
        log_joint: log p(x, z) in nats, (draws,), as a function of the values of all sites.
        nesting: Number of plate dimensions of the values.
    """
    loc = latents.initial()
    with seeded(0, loc.device):
        noise = torch.randn(2 * POINTS, len(loc), dtype=loc.dtype, device=loc.device)

    def score(points: Tensor) -> Tensor:
        return log_joint(latents.unpack(points.reshape(len(points), *(1,) * nesting, -1))[0])

    points = (loc + 0.5 * noise[:POINTS]).requires_grad_()
    with torch.enable_grad():
        scores = score(points)
        total = scores.sum() + 0 * points.sum()  # so that there is a gradient in any case
        (gradient,) = torch.autograd.grad(total, points)
    idle = masked & (gradient == 0).all(0)
    idle = torch.cat([_whole_events(part, idle) for part in latents.parts.values()])
    with torch.no_grad():
        others = score(torch.where(idle, loc + noise[POINTS:], points))
    same = torch.allclose(scores, others, rtol=1e-5, atol=1e-5)
    return idle if same else torch.zeros_like(idle)


def masked_in_vector(latents: Latents, sites: Mapping[str, Any]) -> Tensor:
    """Mask of the entries of all sites, in the layout of `latents`, whose elements are masked in these sites."""
    return torch.cat([_masked(part, sites.get(name, part.site)) for name, part in latents.parts.items()])


def _masked(part: Part, site: Any) -> Tensor:
    masked = None if part.rows else masked_entries(site, part.value)
    shape = part.plates + part.event
    if masked is None:
        return torch.zeros(shape.numel(), dtype=torch.bool, device=part.value.device)
    if masked.shape == shape:
        return masked.flatten()
    # An event of another shape than its unconstrained one, as on a simplex, is masked as a whole.
    whole = masked.reshape(*part.plates, -1).all(-1)
    return whole.reshape(part.plates + (1,) * len(part.event)).expand(shape).flatten()


def _whole_events(part: Part, idle: Tensor) -> Tensor:
    """Restrict the idle entries of a site to transform events that are idle as a whole."""
    shape = part.plates + part.event
    idle = idle[part.start : part.stop].reshape(shape)
    transform = part.transform
    while hasattr(transform, "base_transform"):
        transform = transform.base_transform
    event = transform.domain.event_dim
    whole = idle.reshape(*shape[: len(shape) - event], -1).all(-1)
    return whole.reshape(whole.shape + (1,) * event).expand(shape).flatten()
