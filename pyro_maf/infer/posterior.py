"""Posterior of the latent vector of a guide, up to its normalising constant."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_maf.infer.initialization import Normal, best_normal, best_of
from pyro_maf.infer.latents import Latents
from pyro_maf.infer.log_joint import FAILURES, LogJoint, is_enumerated, without_blocks
from pyro_maf.infer.masks import idle_entries, masked_in_vector
from pyro_maf.infer.model import Call, Trace, latent_sites

__all__ = ["start_of"]

PRIOR_DRAWS = 64
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
