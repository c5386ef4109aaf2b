"""Tasks of simulation-based inference: a prior, a simulator, and draws of the exact posterior.

The first three and their constants are those of Lueckmann et al., *Benchmarking Simulation-Based Inference*, 2021;
the last is their predator-prey model with the same prior and noise, integrated by fourth-order Runge-Kutta.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro.distributions import MultivariateStudentT
from sbi.utils import BoxUniform
from torch import Tensor
from torch.distributions import Distribution, Independent, LogNormal, MultivariateNormal

PROPOSALS = 2**18
LOTKA_VOLTERRA_PRIOR = LogNormal(torch.tensor([-0.125, -3.0, -0.125, -3.0]), torch.full((4,), 0.5))


@dataclass(frozen=True)
class Task:
    """A prior over theta, a simulator of x, and a sampler of the exact posterior at one x, (1, size of x)."""

    name: str
    prior: Distribution
    simulate: Callable[[Tensor], Tensor]
    reference: Callable[[Tensor, int], Tensor]

    def simulations(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """Parameters and simulations, (rows, ...) both."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            theta = self.prior.sample((rows,))
            return theta, self.simulate(theta)


def _by_rejection(propose: Callable[[int], tuple[Tensor, Tensor]], number: int) -> Tensor:
    """Rejection sampling from proposals and their log-weights, until there are enough draws."""
    draws, weights = propose(PROPOSALS)
    while (weights - weights.max()).exp().sum() < 1.2 * number:
        more = propose(PROPOSALS)
        draws, weights = torch.cat([draws, more[0]]), torch.cat([weights, more[1]])
    return draws[torch.rand(len(draws)) < (weights - weights.max()).exp()][:number].float()


def _two_moons(theta: Tensor) -> Tensor:
    angle = math.pi * (torch.rand(len(theta)) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(len(theta))
    crescent = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)
    return crescent + _moved(theta)


def _moved(theta: Tensor) -> Tensor:
    return torch.stack([-(theta[:, 0] + theta[:, 1]).abs(), theta[:, 1] - theta[:, 0]], 1) / math.sqrt(2)


def _two_moons_reference(x: Tensor, number: int) -> Tensor:
    """Draw the crescent, solve for the theta that leads to x, and reject draws outside the prior's square."""
    accepted: list[Tensor] = []
    while sum(map(len, accepted)) < number:
        crescent = _two_moons(torch.zeros(4 * number, 2))
        total, apart = (x - crescent).unbind(1)
        total, apart = total * math.sqrt(2), apart * math.sqrt(2)
        sign = torch.where(torch.rand(len(total)) < 0.5, 1.0, -1.0)
        # |a + b| = -total and b - a = apart, for either sign of a + b.
        theta = torch.stack([-sign * total - apart, -sign * total + apart], 1) / 2
        accepted.append(theta[(total <= 0) & (theta.abs() <= 1).all(1)])
    return torch.cat(accepted)[:number]


def _gaussian_linear_reference(x: Tensor, number: int) -> Tensor:
    # Prior and noise are both N(0, 0.1 I).
    return x / 2 + math.sqrt(0.05) * torch.randn(number, x.shape[-1])


def _slcp(theta: Tensor) -> Tensor:
    """Four points of a bivariate normal with five parameters: a simple likelihood with a posterior of four modes."""
    scale = theta[:, 2:4].square()
    correlation = theta[:, 4].tanh()
    noise = torch.randn(len(theta), 4, 2)
    second = correlation[:, None] * noise[..., 0] + (1 - correlation.square()).sqrt()[:, None] * noise[..., 1]
    points = torch.stack([noise[..., 0], second], -1) * scale[:, None] + theta[:, None, :2]
    return points.flatten(1)


def _slcp_reference(x: Tensor, number: int) -> Tensor:
    """Rejection sampling: scales and correlation from the prior, and the mean from its conditional, a normal."""
    points = x.double().reshape(4, 2)
    centre = points.mean(0)
    scatter = (points - centre).T @ (points - centre)

    def propose(rows: int) -> tuple[Tensor, Tensor]:
        shape = 6 * torch.rand(rows, 3, dtype=torch.float64) - 3
        scale, correlation = shape[:, :2].square(), shape[:, 2].tanh()
        one, two = scale.unbind(1)
        root = (1 - correlation.square()).sqrt()
        noise = torch.randn(rows, 2, dtype=torch.float64) / 2
        second = correlation * noise[:, 0] + root * noise[:, 1]
        mean = centre + scale * torch.stack([noise[:, 0], second], 1)
        cross = 2 * correlation * scatter[0, 1] / (one * two)
        distance = (scatter[0, 0] / one.square() - cross + scatter[1, 1] / two.square()) / root.square()
        weights = -3 * (one * two * root).log() - distance / 2
        inside = (mean.abs() <= 3).all(1)
        return torch.cat([mean, shape], 1)[inside], weights[inside]

    return _by_rejection(propose, number)


def _lotka_volterra(theta: Tensor) -> Tensor:
    """Logarithms of ten noisy observations of each population over 20 units of time."""
    populations = _log_populations(theta)
    return populations + 0.1 * torch.randn_like(populations)


def _lotka_volterra_reference(x: Tensor, number: int) -> Tensor:
    """Rejection sampling from a t distribution at the mode, which Gauss-Newton steps find from the best prior draw."""
    x, prior = x.double(), LOTKA_VOLTERRA_PRIOR.base_dist
    loc, scale = prior.loc.double(), prior.scale.double()

    def residuals(log_theta: Tensor) -> Tensor:
        return torch.cat([(_log_populations(log_theta.exp()) - x) / 0.1, (log_theta - loc) / scale], 1)

    starts = loc + scale * torch.randn(1_000, 4, dtype=torch.float64)
    mode = starts[residuals(starts).square().sum(1).argmin()]
    moves = 1e-5 * torch.eye(4, dtype=torch.float64)
    for _ in range(20):
        at = residuals(torch.cat([mode + moves, mode - moves, mode[None]]))
        jacobian = (at[:4] - at[4:8]) / 2e-5
        information = jacobian @ jacobian.T
        mode = mode - torch.linalg.solve(information, jacobian @ at[8])
    proposal = MultivariateStudentT(5.0, mode, torch.linalg.cholesky(information.inverse()))

    def propose(rows: int) -> tuple[Tensor, Tensor]:
        log_theta = proposal.sample((rows // 16,))
        return log_theta.exp(), -residuals(log_theta).square().sum(1) / 2 - proposal.log_prob(log_theta)

    return _by_rejection(propose, number)


def _log_populations(theta: Tensor) -> Tensor:
    """Log-populations at ten times, (rows, 20), with the two populations of each time adjacent."""
    step, state = 0.1, theta.new_tensor([30.0, 1.0]).expand(len(theta), 2)
    seen = []
    for index in range(200):
        if index % 20 == 0:
            seen.append(state)
        first = _growth(theta, state)
        second = _growth(theta, state + step / 2 * first)
        third = _growth(theta, state + step / 2 * second)
        fourth = _growth(theta, state + step * third)
        state = (state + step / 6 * (first + 2 * second + 2 * third + fourth)).clamp(1e-6, 1e6)
    return torch.stack(seen, 1).flatten(1).log()


def _growth(theta: Tensor, state: Tensor) -> Tensor:
    prey, predator = state.unbind(1)
    a, b, c, d = theta.unbind(1)
    return torch.stack([a * prey - b * prey * predator, -c * predator + d * prey * predator], 1)


TASKS = (
    Task("two moons", BoxUniform(-torch.ones(2), torch.ones(2)), _two_moons, _two_moons_reference),
    Task(
        "Gaussian linear",
        MultivariateNormal(torch.zeros(10), 0.1 * torch.eye(10)),
        lambda theta: theta + math.sqrt(0.1) * torch.randn_like(theta),
        _gaussian_linear_reference,
    ),
    Task("SLCP", BoxUniform(-3 * torch.ones(5), 3 * torch.ones(5)), _slcp, _slcp_reference),
    Task("Lotka-Volterra", Independent(LOTKA_VOLTERRA_PRIOR, 1), _lotka_volterra, _lotka_volterra_reference),
)
