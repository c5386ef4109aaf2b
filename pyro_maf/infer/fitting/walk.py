"""Loss and gradients for a step of a guide's fit, in one walk over guide and model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

import torch
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor

from pyro_maf.infer.guides.auto_flow import AutoFlow
from pyro_maf.infer.guides.path_gradient import frozen
from pyro_maf.infer.models.double_precision import (
    Score,
    in_double,
    is_resolved,
    nudged,
    promoted,
    stand_out,
    widened,
)
from pyro_maf.infer.models.log_joint import LogJoint
from pyro_maf.infer.models.model import FAILURES, Call, Guide
from pyro_maf.infer.models.recording import Derivatives, Recording, plain_derivatives, record

__all__ = ["Step", "Walk", "can_walk"]

CHECKED = 100
"""Number of steps between two comparisons of the recorded log joint density with the model's."""
FIRST = 3
"""Number of initial steps that are compared as well."""
RECORDINGS = 3
"""Maximum number of recordings; a new one is made if the model raised, or its data have changed."""


class Step(NamedTuple):
    """Loss of a step in nats, and the log weights log p(x, z) - log q(z) of its draws, (draws,), or None."""

    loss: float
    log_weights: Tensor | None


def can_walk(guide: Guide, joint: LogJoint) -> bool:
    """Return whether a step of a guide can be a `Walk`: one run of the model scores all draws and all rows."""
    return (
        isinstance(guide, AutoFlow)
        and not guide.is_amortised
        and not guide.latents.shapes_of_all_rows
        and joint.is_vectorised
        and joint.runs == 1
        and not joint.partial
        and not am_i_wrapped()
    )


class Walk:
    r"""The evidence lower bound with its path gradient, without traces of guide and model.

    The guide draws latent vectors v. The log joint density as a function of v, and its gradient, are recorded as a
    plain sequence of torch operations if possible (`record`), which skips Pyro's overhead; otherwise the model is run.
    The recording is compared with runs of the model, at first and every 100 steps. Loss and gradients are those of
    `TracePath_ELBO`.

    If the model cannot score some draws, because it raises or its density is NaN or zero there, the others are draws of
    the guide restricted to the region where it can. The loss is then the divergence of the restricted guide from the
    posterior, plus minus the log of that region's probability. The path of a draw does not see the region's edge, so
    the gradient is a score-function estimate: the mean of (l - E[l] - 1) d log q over the region, with l = log q - log
    p, plus that of d log q over all draws.

    Args:
        call: The model with its arguments.
        guide: A guide of this package.
        joint: Log joint density of its model, accepted by `can_walk`.
        draws: Number of draws per step.
        weights: The weights of guide and model that are trained.
    """

    def __init__(self, call: Call, guide: AutoFlow, joint: LogJoint, draws: int, weights: Sequence[Tensor]) -> None:
        self._call, self._guide, self._joint, self._draws = call, guide, joint, draws
        self._weights = list(weights)
        self._recording: Recording | None = None
        self._wide: Score | None = None
        self._recordings = 0
        self._steps = count()

    def step(self) -> Step:
        """Set the gradients of the weights to those of a step's loss; return the step."""
        with torch.enable_grad():
            latent = self._guide.draw(self._draws, self._call)
            with frozen(self._weights):
                log_q = self._guide.log_density(latent, self._call)
        try:
            derivatives = self._derivatives(latent.detach())
        except FAILURES:
            values = self._scores(latent.detach())
            if not _in_part(values):
                raise
            return self._partial_step(latent.detach(), values)
        derivatives = self._resolved(latent.detach(), derivatives, log_q.detach())
        if _in_part(derivatives.values):
            return self._partial_step(latent.detach(), derivatives.values)
        share = 1 / self._draws
        with torch.no_grad():
            log_weights = derivatives.values - log_q.detach()
            for weight, gradient in zip(self._weights, derivatives.of_weights, strict=True):
                weight.grad = None if gradient is None else -share * gradient
        torch.autograd.backward([latent, log_q], [-share * derivatives.gradient, torch.full_like(log_q, share)])
        return Step(-float(log_weights.mean()), log_weights)

    def _resolved(self, latent: Tensor, derivatives: Derivatives, log_q: Tensor) -> Derivatives:
        """Continue in float64 if rounding makes a weight far larger than others; if it still does, drop that draw."""
        log_weights = derivatives.values - log_q
        if not stand_out(log_weights):
            return derivatives
        resolved = is_resolved(derivatives.values, self._scores(nudged(latent)))
        if not bool(resolved.all()) and self._wide is None:
            self._wide = in_double(self._in_dtype, latent[log_weights.median(0).indices])
            if self._wide is not None:
                self._recording, self._recordings = None, 0
                return self._resolved(latent, plain_derivatives(self._log_joint, latent, self._weights), log_q)
        return derivatives._replace(values=derivatives.values.where(resolved, -torch.inf))

    def _partial_step(self, latent: Tensor, values: Tensor) -> Step:
        """A step with the draws that the model can score; the log weights of the others are minus infinity."""
        is_scored = values.isfinite()
        with torch.enable_grad():
            log_q = self._guide.log_density(latent, self._call)
            inside = log_q[is_scored]
            gaps = (inside - values[is_scored]).detach()
            # The density depends on weights of the model and of the guide's coordinates.
            total = ((gaps - gaps.mean() - 1) * inside - self._log_joint(latent[is_scored])).mean() + log_q.mean()
            gradients = torch.autograd.grad(total, self._weights, allow_unused=True)
        for weight, gradient in zip(self._weights, gradients, strict=True):
            weight.grad = gradient
        log_weights = torch.full_like(values, -torch.inf)
        log_weights[is_scored] = -gaps
        return Step(float(gaps.mean()) - 2 * math.log(float(is_scored.double().mean())), log_weights)

    @torch.no_grad()
    def _scores(self, latent: Tensor) -> Tensor:
        """Log joint density, minus infinity where the model raises."""

        def score(latent: Tensor) -> Tensor:
            values, log_det = self._unpacked(latent)
            return self._joint(values) + log_det

        return score(latent) if self._wide is None else promoted(score)(widened(latent)).to(latent.dtype)

    def _derivatives(self, latent: Tensor) -> Derivatives:
        """Log joint density and its gradients."""
        step = next(self._steps)
        is_checked = step < FIRST or step % CHECKED == 0
        if self._recording is not None and not self._recording.is_current:
            self._recording = None
        if self._recording is None and self._recordings < RECORDINGS:
            self._recordings += 1
            self._recording, is_checked = record(self._log_joint, latent, self._weights), True
        found = None if self._recording is None else self._recording(latent)
        if found is None or is_checked:
            expected = plain_derivatives(self._log_joint, latent, self._weights)
            if found is not None and not _agree(found, expected):
                self._recording, self._recordings = None, RECORDINGS
            return expected
        return found

    def _log_joint(self, latent: Tensor) -> Tensor:
        return self._in_dtype(latent) if self._wide is None else self._wide(widened(latent)).to(latent.dtype)

    def _in_dtype(self, latent: Tensor) -> Tensor:
        values, log_det = self._unpacked(latent)
        return self._joint.together(values) + log_det

    def _unpacked(self, latent: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        padded = latent.reshape(len(latent), *(1,) * self._joint.nesting, -1)
        values, log_det = self._guide.unpacked(padded, self._call)
        return values, log_det.reshape(len(latent))


def _in_part(values: Tensor) -> bool:
    """Return whether some draws, at least two, have a finite density and others do not."""
    return 2 <= int(values.isfinite().sum()) < len(values)


def _agree(found: Derivatives, expected: Derivatives) -> bool:
    """Return whether two results are equal up to rounding, including gradients."""
    ours, theirs = ((*each[:2], *each.of_weights) for each in (found, expected))
    return all(map(_is_close, ours, theirs))


def _is_close(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if other.dim() > 1:  # rounding is relative to the largest entry of a draw's gradient
        size = 1 + other.abs().amax(-1, keepdim=True).nan_to_num(nan=0.0, posinf=0.0)
        one, other = one / size, other / size
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3, equal_nan=True)
