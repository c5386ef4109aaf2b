r"""Mixture of flows, one for each mode of a posterior, with an exact density and shares set from the evidence.

q(v) = sum_k s_k q_k(v). Each draw comes from one component. Components are trained by the gradients of their own
draws. The shares have no such path gradient, since changing a share moves draws from one mode to another. They are set
to maximise E[log q(v)] under the posterior, by importance weights of draws of all components; for modes far apart, that
is the evidence of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import cast

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_maf._core.torch_state import is_traced
from pyro_maf.infer.guides.path_gradient import PathGradient
from pyro_maf.infer.models.double_precision import scored
from pyro_maf.infer.models.model import FAILURES, Call
from pyro_maf.infer.models.posterior import Posterior
from pyro_maf.infer.start.modes import NEGLIGIBLE
from pyro_maf.infer.start.normal import truncated
from pyro_maf.transforms import Stack

__all__ = ["FlowMixture", "MixturePosterior", "Shares"]

Shape = torch.Size | list[int] | tuple[int, ...]

ROUNDS = 100
"""Maximum number of iterations of expectation maximisation, each of which costs a product of (draws, components)."""
SETTLED = 1e-5
EVERY, DRAWS = 100, 256
"""Number of a guide's draws in training between two updates, and of weighted draws of each mode in an update."""
RATE = 0.5
"""Fraction of the way that an update moves the shares, which averages the noise of the last updates."""
FINAL_DRAWS = 4096
FAR = 1e6
"""Difference of log-densities, in nats, beyond which the smaller component is left out: its share is exactly 0."""


class FlowMixture(nn.Module):
    r"""A mixture of flows, each from standard normal noise.

    Components with a share below a thousandth are ignored: they cost nothing in draws and densities.

    Args:
        components: The flows.
        shares: The share of each flow, (components,); they sum to one.

    Attributes:
        input_dim: D.
        noise_dim: D + 1: the noise of a component, and a standard normal number that selects it.
        shares: The share of each component, (components,): a buffer, set by `set_shares`.
    """

    shares: Tensor

    def __init__(self, components: Sequence[Stack], shares: Tensor) -> None:
        super().__init__()
        self.components = nn.ModuleList(components)
        self.input_dim = components[0].input_dim
        self.noise_dim = self.input_dim + 1
        self.register_buffer("shares", shares.clone())
        self._covered: tuple[tuple[int, int], dict[int, float]] = ((0, 0), {})

    @property
    def covered(self) -> dict[int, float]:
        """The components that are not ignored, with their shares, which sum to one."""
        # As Python numbers, re-read only when the buffer has changed, so that a draw on a GPU need not synchronise.
        mark = (id(self.shares), self.shares._version)
        if self._covered[0] != mark:
            shares = self.shares.tolist()
            taking = {index: share for index, share in enumerate(shares) if share >= NEGLIGIBLE}
            total = sum(taking.values())
            self._covered = mark, {index: share / total for index, share in taking.items()}
        return self._covered[1]

    @property
    def heaviest(self) -> Stack:
        """The component with the largest share."""
        return self._component(int(self.shares.argmax()))

    def draw(self, count: int) -> Tensor:
        """Draw vectors, (count, D), with gradient, stratified over the components by their shares."""
        noise = torch.randn(count, self.input_dim, dtype=self.shares.dtype, device=self.shares.device)
        offset = 0.5 if is_traced() else float(torch.rand(()))
        edges = [math.ceil(count * edge - offset) for edge in accumulate(self.covered.values())]
        edges[-1] = count
        pieces, start = [], 0
        for index, edge in zip(self.covered, edges, strict=True):
            if edge > start:
                pieces.append(self._component(index).forward_and_log_det(noise[start:edge])[0])
            start = max(start, edge)
        return torch.cat(pieces)[torch.randperm(count, device=noise.device)]

    def of_noise(self, noise: Tensor) -> Tensor:
        r"""Map noise (\*batch, D + 1) to vectors (\*batch, D); for standard normal noise they are draws."""
        rows = noise.reshape(-1, self.noise_dim)
        levels = torch.special.ndtr(rows[:, -1].detach().double())
        edges = torch.tensor(list(accumulate(self.covered.values()))[:-1], dtype=levels.dtype, device=levels.device)
        picked = torch.tensor(list(self.covered), device=levels.device)[torch.searchsorted(edges, levels, right=True)]
        return self._mapped(rows[:, :-1], picked).reshape(*noise.shape[:-1], self.input_dim)

    def log_density(self, latent: Tensor) -> Tensor:
        r"""Log-density of vectors (\*batch, D) in nats, (\*batch,)."""
        covered = self.covered
        rows = latent.reshape(-1, self.input_dim)
        logs = torch.stack([self._log_density_of(index, rows) + math.log(share) for index, share in covered.items()])
        if logs.requires_grad and not is_traced():
            logs = self._of_near_rows(rows, logs)
        return logs.logsumexp(0).reshape(latent.shape[:-1])

    @torch.no_grad()
    def evident_shares(self, log_density: Callable[[Tensor], Tensor], draws: int) -> Tensor | None:
        """Return the shares that maximise the expected log-density under the posterior, (components,).

        They are estimated by truncated importance weights of draws of every component, including ignored ones. None if
        no draw could be scored.

        Args:
            log_density: Log-density of the posterior, up to a constant: (rows, D) to (rows,).
            draws: Number of draws of each component.
        """
        count = len(self.components)
        noise = torch.randn(count * draws, self.input_dim, dtype=self.shares.dtype, device=self.shares.device)
        latent = self._mapped(noise, torch.arange(count, device=noise.device).repeat_interleave(draws))
        logs = torch.stack([self._log_density_of(index, latent) for index in range(count)], 1).double()
        log_q = logs.logsumexp(1)
        log_weights = scored(log_density, latent, log_q).double() - log_q
        usable = log_weights.isfinite()
        if not usable.any():
            return None
        logs, log_weights = logs[usable], log_weights[usable]
        weights = truncated(log_weights).softmax(0)
        shares = torch.full((count,), 1 / count, dtype=torch.float64, device=logs.device)
        for _ in range(ROUNDS):
            before = shares
            shares = weights @ (logs + shares.log()).softmax(1)
            if float((shares - before).abs().max()) < SETTLED:
                break
        return shares.to(self.shares)

    def set_shares(self, shares: Tensor) -> None:
        """Set the shares in place, so that Pyro's store has them too."""
        with torch.no_grad():
            self.shares.copy_(shares)

    def _component(self, index: int) -> Stack:
        return cast("Stack", self.components[index])

    def _mapped(self, noise: Tensor, picked: Tensor) -> Tensor:
        """Map noise (rows, D) by the component selected for each row."""
        order, pieces = [], []
        for index in picked.unique().tolist():
            rows = (picked == index).nonzero()[:, 0]
            order.append(rows)
            pieces.append(self._component(index).forward_and_log_det(noise[rows])[0])
        return torch.cat(pieces)[torch.cat(order).argsort()]

    def _of_near_rows(self, rows: Tensor, logs: Tensor) -> Tensor:
        """The same log-densities, (components, rows), without the graph of components where they are negligible.

        The gradient of values that overflow there, like z^3 in the tails, would be 0 times infinity.
        """
        values = logs.detach()
        is_near = values >= values.amax(0) - FAR
        if bool(is_near.all()):
            return logs
        pieces = []
        for each, (index, share), near in zip(values, self.covered.items(), is_near, strict=True):
            of_near = self._log_density_of(index, rows[near]) + math.log(share)
            pieces.append(each.masked_scatter(near, of_near))
        return torch.stack(pieces)

    def _log_density_of(self, index: int, latent: Tensor) -> Tensor:
        noise, log_det = self._component(index).inverse_and_log_det(latent)
        scores = -0.5 * (noise.square().sum(-1) + self.input_dim * math.log(2 * math.pi)) - log_det
        return torch.where(scores.isnan(), -torch.inf, scores)


class MixturePosterior(PathGradient, TorchDistribution):
    """The distribution of vectors drawn from a mixture of flows.

    Args:
        mixture: The mixture.
        batch_shape: Shape of independent draws.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (as torch declares it)
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, mixture: FlowMixture, batch_shape: torch.Size = torch.Size()) -> None:  # noqa: B008
        self.mixture = mixture
        super().__init__(batch_shape, torch.Size([mixture.input_dim]), validate_args=False)

    def expand(self, batch_shape: Shape, _instance: Distribution | None = None) -> MixturePosterior:
        """Return the same distribution with this batch shape."""
        return MixturePosterior(self.mixture, torch.Size(batch_shape))

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Draw vectors with gradient, stratified over the components."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.mixture.draw(shape[:-1].numel()).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats."""
        shape = torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        return self.mixture.log_density(value).expand(shape)


class Shares:
    """Updates of the shares of a mixture from the evidence of its modes.

    An update takes a few hundred draws of each mode, scored by the model in one run.
    """

    def __init__(self) -> None:
        self._draws = 0
        self._last: Call | None = None
        self._posterior: Posterior | None = None

    def count(self, mixture: FlowMixture, call: Call, posterior_of: Callable[[Call], Posterior]) -> None:
        """Count a draw in training, and update the shares if that is due."""
        if not torch.is_grad_enabled() or is_traced() or not next(mixture.parameters()).requires_grad:
            return
        self._draws += 1
        if self._draws % EVERY == 0:
            self._update(mixture, self._posterior_for(call, posterior_of), DRAWS, RATE)

    def settle(self, mixture: FlowMixture, call: Call, posterior_of: Callable[[Call], Posterior]) -> None:
        """Set the shares from many draws, after training."""
        self._update(mixture, self._posterior_for(call, posterior_of), FINAL_DRAWS, 1.0)

    def _posterior_for(self, call: Call, posterior_of: Callable[[Call], Posterior]) -> Posterior | None:
        """Return the posterior for these arguments, of which the last is cached; None if it cannot be scored."""
        if self._posterior is None or not call.has_arguments_of(self._last):
            try:
                with poutine.block():  # an update must be invisible to handlers around the guide
                    self._posterior = posterior_of(call)
            except FAILURES:
                return None
            self._last = call
        return self._posterior if self._posterior.is_complete else None

    def _update(self, mixture: FlowMixture, posterior: Posterior | None, draws: int, rate: float) -> None:
        if posterior is None:
            return
        with torch.no_grad(), poutine.block():
            shares = mixture.evident_shares(posterior, draws)
            if shares is not None:
                mixture.set_shares(shares if rate == 1.0 else mixture.shares.lerp(shares, rate))
