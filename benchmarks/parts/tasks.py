"""Tasks of simulation-based inference: a prior, a simulator and, where it is known, the posterior.

The first three and their constants are those of Lueckmann et al., *Benchmarking Simulation-Based Inference*, 2021;
the last is their predator-prey model with the same prior and noise, integrated by fourth-order Runge-Kutta.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sbi.utils import BoxUniform
from torch import Tensor
from torch.distributions import Distribution, Independent, LogNormal, MultivariateNormal


@dataclass(frozen=True)
class Task:
    """A prior over theta, a simulator of x, and draws of the posterior where they can be had."""

    name: str
    prior: Distribution
    simulate: Callable[[Tensor], Tensor]
    reference: Callable[[Tensor, int], Tensor] | None = None

    def simulations(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """Parameters and simulations."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            theta = self.prior.sample((rows,))
            return theta, self.simulate(theta)


def _two_moons(theta: Tensor) -> Tensor:
    angle = math.pi * (torch.rand(len(theta)) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(len(theta))
    crescent = torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)
    return crescent + _moved(theta)


def _moved(theta: Tensor) -> Tensor:
    return torch.stack([-(theta[:, 0] + theta[:, 1]).abs(), theta[:, 1] - theta[:, 0]], 1) / math.sqrt(2)


def _two_moons_reference(x: Tensor, number: int) -> Tensor:
    """Exact: the crescent that leads to x is drawn, solved for theta, and thinned to the prior's square."""
    kept: list[Tensor] = []
    while sum(map(len, kept)) < number:
        crescent = _two_moons(torch.zeros(4 * number, 2))
        total, apart = (x - crescent).unbind(1)
        total, apart = total * math.sqrt(2), apart * math.sqrt(2)
        sign = torch.where(torch.rand(len(total)) < 0.5, 1.0, -1.0)
        # |a + b| = -total and b - a = apart, for either sign of a + b.
        theta = torch.stack([-sign * total - apart, -sign * total + apart], 1) / 2
        kept.append(theta[(total <= 0) & (theta.abs() <= 1).all(1)])
    return torch.cat(kept)[:number]


def _gaussian_linear_reference(x: Tensor, number: int) -> Tensor:
    # Prior N(0, 0.1 I) and noise of the same variance.
    return x / 2 + math.sqrt(0.05) * torch.randn(number, x.shape[-1])


def _slcp(theta: Tensor) -> Tensor:
    """Four points of a bivariate normal, of five parameters: a simple likelihood, and a posterior of four modes."""
    scale = theta[:, 2:4].square()
    correlation = theta[:, 4].tanh()
    noise = torch.randn(len(theta), 4, 2)
    second = correlation[:, None] * noise[..., 0] + (1 - correlation.square()).sqrt()[:, None] * noise[..., 1]
    points = torch.stack([noise[..., 0], second], -1) * scale[:, None] + theta[:, None, :2]
    return points.flatten(1)


def _lotka_volterra(theta: Tensor) -> Tensor:
    """Ten observations of either population over 20 units of time, with log-normal noise."""
    step, state = 0.1, torch.tensor([30.0, 1.0]).expand(len(theta), 2)
    seen = []
    for index in range(200):
        if index % 20 == 0:
            seen.append(state)
        first = _growth(theta, state)
        second = _growth(theta, state + step / 2 * first)
        third = _growth(theta, state + step / 2 * second)
        fourth = _growth(theta, state + step * third)
        state = (state + step / 6 * (first + 2 * second + 2 * third + fourth)).clamp(1e-6, 1e6)
    populations = torch.stack(seen, 1).flatten(1)
    return populations.log() + 0.1 * torch.randn_like(populations)


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
    Task("SLCP", BoxUniform(-3 * torch.ones(5), 3 * torch.ones(5)), _slcp),
    Task(
        "Lotka-Volterra",
        Independent(LogNormal(torch.tensor([-0.125, -3.0, -0.125, -3.0]), torch.full((4,), 0.5)), 1),
        _lotka_volterra,
    ),
)
