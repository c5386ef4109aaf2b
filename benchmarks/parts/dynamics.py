"""A predator-prey equation with eight parameters, whose posterior has spurious modes far from the dominant one.

Its reference draws come from a population of Metropolis chains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from parts.posteriors import Posterior

CHAINS, MOVES, LAST_MOVES = 4_000, 10, 150
YEARS, STEPS = 20, 5
COLUMNS = ("birth", "hunt", "death", "feed", "prey", "hunters", "error_prey", "error_hunters")
TRUTH = (0.55, 0.028, 0.8, 0.024, 33.0, 6.0)
LOC = torch.tensor([1.0, 0.05, 1.0, 0.05, 20.0, 20.0, 0.3, 0.3]).log()
SCALE = torch.tensor([0.5] * 4 + [1.0] * 4)


def predator_prey() -> Posterior:
    """Two populations with unknown rates, initial sizes and observation errors, all with log-normal priors."""
    noise = np.random.default_rng(0).normal(size=(2, YEARS))
    data = populations(*map(torch.tensor, TRUTH)) + 0.25 * torch.as_tensor(noise, dtype=torch.float32)

    def model() -> None:
        *rates, error, other_error = (
            pyro.sample(column, dist.LogNormal(loc, scale))
            for column, loc, scale in zip(COLUMNS, LOC, SCALE, strict=True)
        )
        prey, hunters = populations(*(rate.squeeze(-1) if rate.dim() else rate for rate in rates))
        with pyro.plate("years", YEARS):
            pyro.sample("log_prey", dist.Normal(prey, error), obs=data[0])
            pyro.sample("log_hunters", dist.Normal(hunters, other_error), obs=data[1])

    def log_likelihood(logs: Tensor) -> Tensor:
        *rates, error, other_error = logs.exp().unbind(1)
        expected, errors = populations(*rates), torch.stack([error, other_error])[..., None]
        return dist.Normal(expected, errors, validate_args=False).log_prob(data[:, None]).sum((0, 2))

    return Posterior("predator_prey", model, (), COLUMNS, sampled(LOC.double(), SCALE.double(), log_likelihood))


def populations(birth: Any, hunt: Any, death: Any, feed: Any, prey: Any, hunters: Any) -> Tensor:
    """Logarithms of both populations after each year, (2, *batch, 20), by the classical Runge-Kutta method."""
    state, rows, step = torch.stack([prey, hunters]).log(), [], 1 / STEPS

    def change(state: Tensor) -> Tensor:
        prey, hunters = state.clamp(max=20.0).exp()
        return torch.stack([birth - hunt * hunters, feed * prey - death])

    for index in range(1, YEARS * STEPS + 1):
        first = change(state)
        second = change(state + step / 2 * first)
        third = change(state + step / 2 * second)
        fourth = change(state + step * third)
        state = state + step / 6 * (first + 2 * second + 2 * third + fourth)
        if index % STEPS == 0:
            rows.append(state)
    return torch.stack(rows, -1)


@torch.no_grad()
def sampled(loc: Tensor, scale: Tensor, log_likelihood: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Posterior draws of positive parameters with log-normal priors, (chains, columns), by sequential Monte Carlo.

    Metropolis chains start from the prior and pass through tempered likelihoods. Importance weights determine each next
    power and resample the chains, so that every mode keeps its posterior mass. Proposals have the population's
    covariance.
    """
    generator = torch.Generator().manual_seed(0)
    prior = dist.Normal(loc, scale).to_event(1)
    noise = lambda width: torch.randn(CHAINS, width, generator=generator, dtype=loc.dtype)  # noqa: E731
    uniform = lambda: torch.rand(CHAINS, 1, generator=generator, dtype=loc.dtype)  # noqa: E731
    logs, power = loc + scale * noise(len(loc)), 0.0
    likelihood = log_likelihood(logs).nan_to_num(nan=-math.inf)
    while power < 1:
        for share in 0.8 ** np.arange(80):
            weights = (share * (1 - power) * likelihood).softmax(0)
            if float(1 / weights.square().sum()) > CHAINS / 2:
                break
        power = 1.0 if share == 1 else power + float(share) * (1 - power)
        chosen = torch.multinomial(weights, CHAINS, replacement=True, generator=generator)
        logs, likelihood = logs[chosen], likelihood[chosen]
        for _ in range(LAST_MOVES if power == 1 else MOVES):
            factor = torch.linalg.cholesky(torch.cov(logs.T))
            there = logs + 3.5 / math.sqrt(len(loc)) * uniform() * (noise(len(loc)) @ factor.T)
            likelihood_there = log_likelihood(there).nan_to_num(nan=-math.inf)
            gain = prior.log_prob(there) - prior.log_prob(logs) + power * (likelihood_there - likelihood)
            accepted = uniform()[:, 0].log() < gain
            logs, likelihood = logs.where(~accepted[:, None], there), likelihood.where(~accepted, likelihood_there)
    return logs.exp().numpy()
