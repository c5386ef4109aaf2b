"""Posterior of the latent vector of a guide, up to its normalising constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyro_maf._core.random import seeded
from pyro_maf.infer.initialization import Normal, best_normal, best_of
from pyro_maf.infer.latents import Latents, Part, masked_entries
from pyro_maf.infer.log_joint import FAILURES, LogJoint, is_enumerated, without_blocks
from pyro_maf.infer.model import Call, Site, Trace, latent_sites

__all__ = ["masked_in_vector", "start_of"]

PRIOR_DRAWS = 64
POINTS = 4
"""Number of points at which the effect of masked entries is tested."""
MINIBATCHES = 8
"""Maximum number of minibatches of a plate that subsamples; they stand for the others."""


def start_of(
    call: Call,
    prototype: Trace,
    latents: Latents,
    scale: float | None,
    is_told: bool,
) -> Normal:
    """Initialise a guide; leave out of `latents` entries that a mask excludes from the model: they have no posterior.

    Args:
        call, prototype, latents: As in `Posterior`.
        scale: Scale of an isotropic normal at the initial values, or None for the best normal of an ascent.
        is_told: True if the user chose the starting point. If not, and a draw of the prior has a higher density than
            the end of the ascent, and so lies near another mode, there is an ascent from that draw too.
    """
    masked = latents.has_masks()
    if scale is not None and not masked:
        return Normal.isotropic(latents.initial(), scale)
    posterior = Posterior(call, prototype, latents)
    if masked:
        posterior.leave_out_idle()
    loc = latents.initial()
    if scale is not None or not posterior.is_known:
        return Normal.isotropic(loc, 0.1 if scale is None else scale)
    found = best_normal(posterior, loc, vectorised=posterior.is_vectorised)
    draw = None if is_told or not posterior.is_vectorised else posterior.better_draw(found.loc)
    return found if draw is None else best_of(posterior, [found, best_normal(posterior, draw)])


class Posterior:
    r"""log p(x, z(v)) |det dz/dv| in nats, (draws,), for latent vectors v, (draws, D).

    Discrete sites that are enumerated in parallel are summed out, including those that `pyro.poutine.block` hides from
    a guide. Where a plate subsamples data, the rows of some minibatches stand for all.

    Args:
        call: The model of the guide, with its arguments.
        prototype: The trace that defines the guide's layout.
        latents: The layout of the latent vector.

    Attributes:
        is_known: True if it is the posterior: no other random draws, and the latent variables of all rows.
        is_vectorised: True if one run of the model scores many draws.
    """

    def __init__(self, call: Call, prototype: Trace, latents: Latents) -> None:
        for candidate in (call.of(without_blocks(call.program)), call):
            example = candidate.replayed(prototype)
            hidden = [site for name, site in latent_sites(example).items() if name not in latents.parts]
            if all(map(is_enumerated, hidden)):
                break  # and there are latent variables that belong to another guide
        shapes = {name: part.value.shape for name, part in latents.parts.items()}
        by_row = any(part.rows for part in latents.parts.values())
        most = math.inf if by_row else MINIBATCHES
        self._latents = latents
        self._joint = LogJoint(candidate, example, shapes=shapes, most_minibatches=most)
        near = latents.initial() + torch.tensor([[0.0], [0.01]]).to(latents.initial())
        self._joint.settle(self._unpacked(near)[0])
        self.is_vectorised = self._joint.is_vectorised
        self.is_known = not self._joint.is_random and not (by_row and self._joint.partial)

    def __call__(self, latents: Tensor) -> Tensor:
        """Return the log-density of latent vectors, (draws, D), in nats, (draws,)."""
        values, log_det = self._unpacked(latents)
        return self._joint(values) + log_det

    @torch.no_grad()
    def better_draw(self, loc: Tensor) -> Tensor | None:
        """Return the draw of the prior of the highest log-density, (D,), or None if `loc` has a higher one."""
        try:
            values = self._joint.prior_draws(PRIOR_DRAWS)
        except (*FAILURES, NotImplementedError):  # such as of an improper prior
            return None
        draws, _ = self._latents.pack(values)
        scores = self(torch.cat([loc[None], draws]))
        index = int(scores.argmax())
        return draws[index - 1] if scores[index] > scores[0] + 1 else None

    def leave_out_idle(self) -> None:
        """Leave out of the latent vector the entries that a mask excludes from the model."""
        masked = masked_in_vector(self._latents, {})
        self._latents.leave_out(idle_entries(self._latents, masked, self._joint, self._joint.nesting), masked)

    def _unpacked(self, latents: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return self._latents.unpack(latents.reshape(len(latents), *(1,) * self._joint.nesting, -1))


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


def masked_in_vector(latents: Latents, sites: Mapping[str, Site]) -> Tensor:
    """Mask of the entries of all sites, in the layout of `latents`, whose elements are masked in these sites."""
    return torch.cat([_masked(part, sites.get(name, part.site)) for name, part in latents.parts.items()])


def _masked(part: Part, site: Site) -> Tensor:
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
