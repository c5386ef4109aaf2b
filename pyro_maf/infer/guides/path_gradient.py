"""The path gradient of the evidence lower bound."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from pyro import poutine
from pyro.distributions import Delta, TransformedDistribution
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer import Trace_ELBO
from pyro.infer.util import torch_item
from pyro.util import warn_if_nan
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyro_maf.infer.models.enumeration import is_enumerated, log_densities
from pyro_maf.infer.models.model import (
    Args,
    Call,
    Guide,
    Kwargs,
    Model,
    Site,
    Trace,
    latent_sites,
    layers_of,
    sample_sites,
)

__all__ = ["FlowPosterior", "GradientLimit", "PathGradient", "TracePath_ELBO", "detached", "frozen"]

T = TypeVar("T")
LIMIT, RATE, FIRST = 4.0, 0.02, 64


class TracePath_ELBO(Trace_ELBO):  # noqa: N801 (Pyro's way to name objectives)
    r"""The evidence lower bound with its path gradient, whose variance vanishes as the guide nears the posterior.

    With z = t(u; phi), the gradient of E[log p(x, z) - log q(z; phi)] with respect to phi is
    E[(d/dz)(log p(x, z) - log q(z)) dz/dphi]: the gradient of log q with respect to its parameters has mean zero, and
    is left out. If q is the posterior, the bracket is zero for every draw, not only on average. Far from it,
    `Trace_ELBO` may have a smaller variance.

    Guides of this package have this gradient under `Trace_ELBO` too; here, so do those of Pyro.

    Takes the arguments of `Trace_ELBO`, such as `num_particles` and `vectorize_particles`, and has the same value.
    Discrete sites of the model with `infer={"enumerate": "parallel"}` that the guide leaves out are summed out, as in
    `TraceEnum_ELBO`.

    Cost:
        In addition to a step of `Trace_ELBO`, the density of the draws as a function of only the draws: for a flow its
        inverse, which is one pass or one sweep per layer, and the gradient of that with respect to the draws.

    Raises:
        NotImplementedError: For a guide with a site that is not reparameterised, or whose parameters cannot be
            separated from its value.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro_maf.infer import AutoIAF
        >>> def model():
        ...     pyro.sample("z", dist.Gamma(2.0, 1.0))
        >>> elbo = TracePath_ELBO(num_particles=8, vectorize_particles=True)
        >>> svi = SVI(model, AutoIAF(model), pyro.optim.ClippedAdam({"lr": 1e-2}), elbo)
        >>> isinstance(svi.step(), float)
        True

    Reference:
        Roeder, Wu & Duvenaud, *Sticking the Landing*, 2017; Vaitl et al., *Gradients should stay on path*, 2022.
    """

    _last_model: Model | None = None
    _enumerates = False

    def _get_traces(self, model: Model, guide: Guide, args: Args, kwargs: Kwargs) -> Iterator[tuple[Trace, Trace]]:
        if self._last_model != model:
            self._last_model, self._enumerates = model, _has_enumerated(Call(model, args, kwargs), guide)
        if self._enumerates and self.max_plate_nesting == math.inf:
            self._guess_max_plate_nesting(model, guide, args, kwargs)
        yield from super()._get_traces(model, guide, args, kwargs)

    def _get_trace(self, model: Model, guide: Guide, args: Args, kwargs: Kwargs) -> tuple[Trace, Trace]:
        if self._enumerates:
            model = poutine.enum(model, first_available_dim=-1 - self.max_plate_nesting)
        return super()._get_trace(model, guide, args, kwargs)

    def _log_joints(self, model_trace: Trace) -> list[Tensor]:
        """Return the terms that sum to the log joint density, each a single number."""
        if self._enumerates:
            return [log_density.sum() for log_density in log_densities(model_trace)]
        model_trace.compute_log_prob()
        return [site["log_prob_sum"] for site in sample_sites(model_trace).values()]

    def loss(self, model: Model, guide: Guide, *args: object, **kwargs: object) -> float:
        """Return the negative bound in nats, from `num_particles` draws."""
        loss = 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            log_joint = sum(map(torch_item, self._log_joints(model_trace)))
            loss += float(torch_item(guide_trace.log_prob_sum()) - log_joint) / self.num_particles
        warn_if_nan(torch.as_tensor(loss), "loss")
        return loss

    def _differentiable_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[float, Tensor | float]:
        elbo = 0.0
        surrogate: Tensor | float = 0.0
        for log_joint in self._log_joints(model_trace):
            elbo += torch_item(log_joint)
            surrogate = surrogate + log_joint
        for site in sample_sites(guide_trace).values():
            elbo -= torch_item(site["log_prob_sum"])
            surrogate = surrogate - _path_log_prob(site)
        return -elbo, -surrogate


class PathGradient(TorchDistributionMixin):
    """A distribution whose entropy has its path gradient in Pyro's objectives, as in `TracePath_ELBO`.

    `Trace_ELBO` takes the entropy's gradient from `score_parts`, which lets a distribution choose its estimator. For
    others, and if nothing is reparameterised, it is the gradient of `log_prob`.
    """

    def score_parts(self, x: Tensor, *args: object, **kwargs: object) -> ScoreParts:
        """Return the log-density, and the same as a function of only the value, for the entropy term."""
        log_prob = self.log_prob(x)
        is_path = x.requires_grad and torch.is_grad_enabled()
        entropy = _along_path(self, x) if is_path else log_prob
        return ScoreParts(log_prob, 0, entropy)  # type: ignore[arg-type]  # as Pyro's own do


class FlowPosterior(PathGradient, TransformedDistribution):  # type: ignore[misc]
    """The distribution of vectors that a flow maps noise to."""


def _has_enumerated(call: Call, guide: Guide) -> bool:
    """Return whether a model has discrete sites to sum out that its guide lacks; the random state is unchanged."""
    with torch.random.fork_rng(), poutine.block():
        guide_trace = call.of(guide).trace()
        sites = latent_sites(call.replayed(guide_trace))
    return any(is_enumerated(site) for name, site in sites.items() if name not in guide_trace)


def _path_log_prob(site: Site) -> Tensor:
    """Return the log-density of a site's value, as a function of only the value."""
    fn, value = site["fn"], site["value"]
    if not isinstance(value, Tensor) or not (value.requires_grad or site["log_prob_sum"].requires_grad):
        return site["log_prob_sum"]
    if isinstance(_innermost(fn), Delta):
        return site["log_prob_sum"]  # the density of a change of variables, without parameters
    if not fn.has_rsample:
        raise NotImplementedError(
            f"TracePath_ELBO expected reparameterised sites, got {site['name']} of {type(fn).__name__}: use Trace_ELBO."
        )
    if isinstance(_innermost(fn), PathGradient):
        return site["score_parts"].entropy_term.sum()
    log_prob, scale, mask = _along_path(fn, value), site["scale"], site["mask"]
    if mask is not None:
        log_prob = torch.where(torch.as_tensor(mask, device=log_prob.device), log_prob, 0.0)
    return (log_prob * scale).sum()


def _along_path(fn: Distribution, value: Tensor) -> Tensor:
    """Return the log-density of a value as a function of only the value."""
    modules: list[nn.Module] = []
    twin = detached(fn, modules)
    with frozen([parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]):
        # A new tensor with the same values, so that no cache links it to the parameters that it was computed from.
        return twin.log_prob(value.view_as(value))


def _innermost(fn: Distribution) -> Distribution:
    """Return the distribution within wrappers that do not transform its values."""
    return next(layer for layer in layers_of(fn) if hasattr(layer, "transforms") or not hasattr(layer, "base_dist"))


@contextmanager
def frozen(weights: Sequence[Tensor]) -> Iterator[None]:
    """Context manager that disables gradients with respect to weights."""
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def detached(value: T, modules: list[nn.Module]) -> T:
    """Copy tensors, distributions and transforms without gradient; collect the modules they contain."""
    return cast("T", _detached(value, modules))


def _detached(value: object, modules: list[nn.Module]) -> object:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_detached(item, modules) for item in value)
    if isinstance(value, nn.Module):
        modules.append(value)
        if not any(buffer.requires_grad for buffer in value.buffers()):
            return value
        twin = copy.copy(value)
        twin._buffers = {name: detached(buffer, modules) for name, buffer in value._buffers.items()}
        return twin
    if isinstance(value, (Distribution, Transform)):
        frozen = copy.copy(value)
        attributes = value.__dict__.items()
        frozen.__dict__.update({name: _detached(item, modules) for name, item in attributes if name != "_inv"})
        return frozen
    return value


class GradientLimit:
    r"""Limit of the gradients of a guide's draws: finite, and not far beyond their usual size.

    Adam's steps are in units of the usual gradient: a single, far larger one moves every weight by some thirty learning
    rates. The path gradient of a guide near the posterior is small except for rare draws. So the gradient of a draw is
    limited, entry by entry, to 4 sqrt(draws) times the usual one: a single draw then moves the mean over all draws by
    at most about four times the mean's usual size. A gradient that is not finite is set to 0. The first 64 draws define
    what is usual.
    """

    def __init__(self) -> None:
        self._usual: Tensor | None = None
        self._draws = 0

    def __call__(self, output: int, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        r"""Return the gradients of an operation's outputs, with that of the draws, (\*batch, D), limited."""
        gradient = gradients[output]
        if gradient is None or not gradient.numel():
            return gradients
        rows = gradient.reshape(-1, gradient.shape[-1])
        usual = self._usual
        if usual is None or usual.shape != rows.shape[1:] or usual.device != rows.device:
            usual, self._draws = rows.new_full(rows.shape[1:], math.inf), 0
        limit = LIMIT if self._draws >= FIRST else math.inf
        shares = (limit * math.sqrt(len(rows)) / (rows.abs() / usual).amax(-1, keepdim=True)).clamp(max=1.0)
        rows = torch.where(shares > 0, rows * shares, 0.0)
        mean = rows.abs().mean(0)
        self._draws += len(rows)
        usual = torch.where(usual.isinf(), mean, usual.lerp(mean, max(RATE, len(rows) / self._draws)))
        self._usual = torch.where(usual > 0, usual, math.inf)
        return *gradients[:output], rows.view_as(gradient), *gradients[output + 1 :]
