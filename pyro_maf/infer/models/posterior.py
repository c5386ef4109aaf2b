"""Posterior of a model as a density of latent vectors."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import partial

import torch
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.models.coordinates import Coordinates
from pyro_maf.infer.models.enumeration import is_enumerated
from pyro_maf.infer.models.latents import UNIFORM, Latents, Part
from pyro_maf.infer.models.log_joint import LogJoint
from pyro_maf.infer.models.model import FAILURES, Call, Model, Trace, latent_sites

__all__ = ["Posterior", "without_blocks"]

TRIES = 100
"""Maximum number of random points that are tried, as in NUTS, if the model raises or is improbable at initial
values."""
POINTS = 4
"""Number of points at which the effect of masked entries is tested."""
MINIBATCHES = 8
"""Maximum number of minibatches of a subsampling plate; they represent the others."""


class Posterior:
    r"""log p(x, z(v)) |det dz/dv| in nats, (draws,), for latent vectors v, (draws, D).

    Discrete sites that are enumerated in parallel are summed out, including those that `pyro.poutine.block` hides from
    a guide. If a plate subsamples data, the rows of some minibatches represent all.

    Args:
        call: The model of the guide, with its arguments.
        prototype: The trace that defines the guide's layout.
        latents: The layout of the latent vector.

    Attributes:
        joint: The log joint density, as a function of the values of the sites.
        shapes: Shape of the value of each site.
        centre: A latent vector that the model can score, (D,): the initial values if possible.
        is_complete: True if this is the posterior, with no other random draws and the latent variables of all rows.
        is_vectorised: True if one run of the model scores many draws.
    """

    def __init__(self, call: Call, prototype: Trace, latents: Latents) -> None:
        for candidate in (call.of(without_blocks(call.program)), call):
            example = candidate.replayed(prototype)
            hidden = [site for name, site in latent_sites(example).items() if name not in latents.parts]
            if all(map(is_enumerated, hidden)):
                break  # there are latent variables that belong to another guide
        by_row = bool(latents.shapes_of_all_rows)
        self.shapes = {name: value.shape for name, value in latents.values.items()}
        most = math.inf if by_row else MINIBATCHES
        self._latents, self._call = latents, call
        self._coordinates: Coordinates | None = None
        self.joint = LogJoint(candidate, example, shapes=self.shapes, most_minibatches=most)
        self.centre = self._centre()
        near = self.centre + torch.tensor([[0.0], [0.01]]).to(self.centre)
        self.joint.settle(self.unpacked(near)[0])
        self.is_vectorised = self.joint.is_vectorised
        self.is_complete = not self.joint.is_random and not (by_row and self.joint.partial)

    def _centre(self) -> Tensor:
        """The initial values, or the first point of the cube that the model can score, as one vector."""
        initial = self._latents.initial()
        with seeded(0, initial.device):
            cube = UNIFORM * (2 * torch.rand(TRIES, len(initial), device=initial.device) - 1).to(initial)
        points = torch.cat([initial[None], cube])
        return next((point for point in points if self.joint.can_score(self.unpacked(point[None])[0])), initial)

    def within(self, coordinates: Coordinates) -> Posterior:
        """Return the same density as a function of coordinates."""
        twin = copy.copy(self)
        twin._coordinates = coordinates
        return twin

    def __call__(self, latents: Tensor) -> Tensor:
        """Return the log-density of latent vectors, (draws, D), in nats, (draws,)."""
        values, log_det = self.unpacked(latents)
        return self.joint(values) + log_det

    def check_sites(self) -> None:
        """Check that all runs so far had the same sites, like `LogJoint`."""
        self.joint.check_sites(self._latents.who)

    def prior_vectors(self, count: int) -> Tensor | None:
        """Draw latent vectors from the prior, (count, D); None if that is impossible, as for an improper prior."""
        try:
            return self.packed(self.joint.prior_draws(count))
        except (*FAILURES, NotImplementedError, KeyError):  # the last if not every run has a site
            return None

    def packed(self, values: Mapping[str, Tensor]) -> Tensor:
        r"""Return the latent vectors, (draws, D), of values of the sites, (draws, \*site)."""
        if self._coordinates is None:
            return self._latents.pack(values)[0]
        return self._coordinates.of_values(self._latents, values, self._call)[0]

    def leave_out_idle(self) -> None:
        """Leave out of the latent vector the entries that a mask excludes from the model.

        Other masked entries, such as those with a flat prior, have a posterior due to their likelihood. An entry is
        idle if the gradient of the log joint density with respect to it is zero, and another value of it gives the same
        density.
        """
        latents, loc = self._latents, self._latents.initial()
        masked = latents.masked_in({})
        with seeded(0, loc.device):
            noise = torch.randn(2 * POINTS, len(loc), dtype=loc.dtype, device=loc.device)
        points = (loc + 0.5 * noise[:POINTS]).requires_grad_()
        with torch.enable_grad():
            scores = self.joint(self.unpacked(points)[0])
            total = scores.sum() + 0 * points.sum()  # so that there is always a gradient
            (gradient,) = torch.autograd.grad(total, points)
        idle = masked & (gradient == 0).all(0)
        idle = torch.cat([_whole_events(part, idle) for part in latents.parts.values()])
        with torch.no_grad():
            others = self.joint(self.unpacked(torch.where(idle, loc + noise[POINTS:], points))[0])
        is_idle = torch.allclose(scores, others, rtol=1e-5, atol=1e-5)
        latents.leave_out(idle if is_idle else torch.zeros_like(idle), masked)
        self.centre = self.centre[~latents.idle]

    def unpacked(self, latents: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Map latent vectors, (draws, D), to values of the sites in the form of `LogJoint`; also return log |det|."""
        padded = latents.reshape(len(latents), *(1,) * self.joint.nesting, -1)
        images = None if self._coordinates is None else self._coordinates.images(self._latents, padded, self._call)
        values, log_det = self._latents.unpack(padded, images)
        return values, log_det.reshape(len(latents))


def without_blocks(model: Model) -> Model:
    """Unwrap handlers that hide sites: for `poutine.block(model, hide=["z"])` return `model`."""
    layers = []
    while isinstance(model, partial):
        inner = model.func if isinstance(model.func, partial) else model
        if len(inner.args) < 2 or not isinstance(inner.args[0], Messenger):
            break
        layers.append(inner.args[0])
        model = inner.args[1]
    for layer in reversed(layers):
        if not isinstance(layer, BlockMessenger):
            model = layer(model)
    return model


def _whole_events(part: Part, idle: Tensor) -> Tensor:
    """Restrict the idle entries of a site to those whose whole transform event is idle."""
    idle = idle[part.start : part.stop].reshape(part.shape)
    transform = part.transform
    while hasattr(transform, "base_transform"):
        transform = transform.base_transform
    event = transform.domain.event_dim
    whole = idle.reshape(*idle.shape[: idle.dim() - event], -1).all(-1)
    return whole.reshape(whole.shape + (1,) * event).expand(part.shape).flatten()
