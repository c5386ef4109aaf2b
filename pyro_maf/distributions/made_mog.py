"""A masked network whose conditionals are mixtures of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from pyro_maf._core.checks import check_positive
from pyro_maf.distributions.density import ConditionalDensityForm, Density
from pyro_maf.nn import MADE, MADEOptions
from pyro_maf.nn.weights import is_called, walk_by_calls
from pyro_maf.sweep import plan_of, walk
from pyro_maf.univariate import soft_bound

__all__ = ["ConditionalMADEMoG", "MADEMoG"]

BOUND = 5.0
"""Bound on |log sigma|, in nats."""

WITHIN = 0.5
"""Fraction of an initial mixture's variance within its components; the rest is between their means."""

SMALL = 0.1
"""Factor on the last layer's initial weights, so that a new density hardly depends on its inputs."""


class MADEMoG(Density):
    r"""MADE with mixtures of Gaussians: p(y) = prod_i sum_k pi_ik N(y_i; mu_ik, sigma_ik^2).

    The weights, means and deviations of dimension i are outputs of a single MADE at y_<i, where "< i" refers to
    `order`. pi = softmax(a), and log sigma = b tanh(s / b) with b = 5, so that no component can collapse onto a point.
    Starts near the standard normal, as a mixture of components with distinct means.

    Args:
        input_dim: D.
        num_components: K, the number of components of each conditional.
        hidden_dims, activation, order, context_dim, degrees, seed: As in `MaskedAutoregressive`; weights are drawn from
            torch's global generator. With a context, use `ConditionalMADEMoG`.

    Shapes:
        Values are (\*batch, D), log-densities (\*batch,) in nats.

    Cost:
        `log_prob`: one dense pass. `sample`: one sequential sweep, about half the multiplications of a dense pass.
        Sampling picks components, so there is no `rsample`.

    Raises:
        ValueError: For non-positive sizes, unknown names, an order that is not a permutation, values of the wrong
            width.
        TypeError: For values whose dtype differs from that of the parameters.

    Example:
        >>> density = MADEMoG(3, hidden_dims=[16], num_components=4)
        >>> y = density.sample([5])
        >>> y.shape, density.log_prob(y).shape
        (torch.Size([5, 3]), torch.Size([5]))

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017, section 4.1.
    """

    network_class = MADE

    def __init__(
        self,
        input_dim: int,
        *,
        num_components: int = 10,
        order: Sequence[int] | Tensor | None = None,
        context_dim: int = 0,
        **network: Unpack[MADEOptions],
    ) -> None:
        super().__init__(input_dim, context_dim)
        self.num_components = check_positive(self.name, "num_components", num_components)
        outputs = 3 * self.num_components
        self.made = MADE(input_dim, outputs_per_input=outputs, context_dim=context_dim, order=order, **network)
        self._start_near_normal()

    @property
    def order(self) -> Tensor:
        """Indices of the dimensions, first to last."""
        return self.made.order

    def mixtures(self, value: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        r"""Parameters log pi, mu and log sigma of every dimension's mixture at `value`, each (\*batch, D, K)."""
        logits, mu, s = self.made(value, context).unflatten(-1, (3, self.num_components)).unbind(-2)
        return logits.log_softmax(-1), mu, _log_sigma(s)

    def log_density(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Log-density (\*batch,) in nats, unchecked; one dense pass."""
        log_pi, mu, log_sigma = self.mixtures(value, context)
        standard = (value.unsqueeze(-1) - mu) * torch.exp(-log_sigma)
        log_normal = -0.5 * (standard.square() + math.log(2 * math.pi)) - log_sigma
        return (log_pi + log_normal).logsumexp(-1).sum(-1)

    def noise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Noise u_i = Phi^-1(F_i(y_i | y_<i)), (rows, D), with F_i the conditional distribution function."""
        log_pi, mu, log_sigma = self.mixtures(y, context)
        # erfc keeps its relative precision in the tail, where torch.special.ndtr rounds to 0.
        standard = ((y[..., None] - mu) * (-log_sigma).exp()).double() / math.sqrt(2)
        below = (log_pi.double().exp() * torch.erfc(-standard)).sum(-1) / 2
        above = (log_pi.double().exp() * torch.erfc(standard)).sum(-1) / 2
        return torch.where(below < above, torch.special.ndtri(below), -torch.special.ndtri(above)).to(y.dtype)

    def draw(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        r"""Draws (\*shape, D), unchecked and without gradient; one sweep."""
        with torch.no_grad():
            if context is not None and context.dim() > 1:
                context = context.expand(*shape, -1).reshape(-1, context.shape[-1])
            rows, like = shape.numel(), self.made.masked_layers[-1].mask
            normal = torch.randn(self.input_dim, rows, dtype=like.dtype, device=like.device)
            # The argmax of logits plus Gumbel noise has the softmax probabilities.
            gumbel = -like.new_empty(self.input_dim, self.num_components, rows).exponential_().log()

            def draw(i: int, parameters: Tensor) -> Tensor:
                logits, mu, s = parameters.view(3, self.num_components, rows)
                component = (logits + gumbel[i]).argmax(0, keepdim=True)
                mu, s = mu.gather(0, component)[0], s.gather(0, component)[0]
                return mu + _log_sigma(s).exp() * normal[i]

            if is_called(self.made):
                y = walk_by_calls(self.order, lambda known: self.made(known, context), draw, normal[0])
                return y.reshape(*shape, self.input_dim)
            y = walk(plan_of(self.made, context), draw, rows).w
            return y.T[:, self.order.argsort()].reshape(*shape, self.input_dim)

    def _start_near_normal(self) -> None:
        means, log_sigma = _normal_mixture(self.num_components)
        start = torch.cat([torch.zeros_like(means), means, torch.full_like(means, log_sigma)])
        with torch.no_grad():
            for layer in (self.made.layers[-1], *self.made.context_layers[-1:]):
                layer.weight.mul_(SMALL)
            self.made.last_layer.bias.copy_(start.repeat(self.input_dim))

    def __repr__(self) -> str:
        widths = [self.input_dim, *self.made.hidden_dims, self.made.last_layer.out_features]
        network = f"{' -> '.join(map(str, widths))}, {self.made.activation}"
        return f"{super().__repr__()[:-1]}; {self.num_components} components, {network})"


class ConditionalMADEMoG(ConditionalDensityForm):
    r"""A `MADEMoG` whose network sees a context: `condition(context)` is a density.

    Args:
        input_dim: D.
        context_dim: Number of context features, at least 1; a context of another width raises.
        num_components, hidden_dims, activation, order, degrees, seed: As in `MADEMoG`.

    Shapes:
        context is (\*batch or (), context_dim) and broadcasts with values, (\*batch, D).

    Example:
        >>> density = ConditionalMADEMoG(3, 2, hidden_dims=[16])
        >>> density.condition(torch.zeros(7, 2)).sample().shape
        torch.Size([7, 3])

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017, section 3.4.
    """

    density_class = MADEMoG


def _log_sigma(s: Tensor) -> Tensor:
    return soft_bound(s, BOUND)


def _normal_mixture(num_components: int) -> tuple[Tensor, float]:
    """Means, and the s of the common sigma, of an equal-weight mixture close to standard normal: mean 0, variance 1."""
    if num_components == 1:
        return torch.zeros(1), 0.0
    means = torch.special.ndtri((torch.arange(num_components) + 0.5) / num_components)
    means = means * math.sqrt((1 - WITHIN) / means.square().mean().item())
    return means, BOUND * math.atanh(0.5 * math.log(WITHIN) / BOUND)
