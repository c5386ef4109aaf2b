"""Entries of latent sites that masks keep out of a model's density."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_maf.infer.latents import Latents, Part, masked_entries
from pyro_maf.randomness import seeded

__all__ = ["idle_entries", "masked_in_vector"]

POINTS = 4


def idle_entries(
    latents: Latents, masked: Tensor, log_joint: Callable[[Mapping[str, Tensor]], Tensor], nesting: int
) -> Tensor:
    """Which entries of a latent vector are masked and matter nowhere else in a model, (D,).

    Others that are masked, such as those of a flat prior, have a posterior by their likelihood. What matters is found
    by trying: the log joint density has no gradient by an entry, and is the same at another value of it.

    Args:
        latents: The layout of the vector.
        masked: Which entries are masked, (D,).
        log_joint: log p(x, z) in nats, (draws,), of values of all sites.
        nesting: How many dimensions the values have for plates.
    """
    loc = latents.initial()
    with seeded(0, loc.device):
        noise = torch.randn(2 * POINTS, len(loc), dtype=loc.dtype, device=loc.device)

    def score(points: Tensor) -> Tensor:
        return log_joint(latents.unpack(points.reshape(len(points), *(1,) * nesting, -1))[0])

    points = (loc + 0.5 * noise[:POINTS]).requires_grad_()
    with torch.enable_grad():
        scores = score(points)
        total = scores.sum() + 0 * points.sum()  # which has a gradient where nothing else does
        (gradient,) = torch.autograd.grad(total, points)
    idle = masked & (gradient == 0).all(0)
    idle = torch.cat([_whole_events(part, idle) for part in latents.parts.values()])
    with torch.no_grad():
        others = score(torch.where(idle, loc + noise[POINTS:], points))
    same = torch.allclose(scores, others, rtol=1e-5, atol=1e-5)
    return idle if same else torch.zeros_like(idle)


def masked_in_vector(latents: Latents, sites: Mapping[str, Any]) -> Tensor:
    """Which entries of all sites, laid out as by `latents`, belong to elements that are masked in these sites."""
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
    """Idle entries of a site without those whose event, as its transform has them, is idle in part."""
    shape = part.plates + part.event
    idle = idle[part.start : part.stop].reshape(shape)
    transform = part.transform
    while hasattr(transform, "base_transform"):
        transform = transform.base_transform
    event = transform.domain.event_dim
    whole = idle.reshape(*shape[: len(shape) - event], -1).all(-1)
    return whole.reshape(whole.shape + (1,) * event).expand(shape).flatten()
