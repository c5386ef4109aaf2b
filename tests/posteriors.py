"""Models with exactly known posteriors, and helpers for tests of guides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_maf.infer import AutoIAF, AutoMAF, AutoRealNVP

GUIDES: tuple[Any, ...] = (AutoMAF, AutoIAF, AutoRealNVP)
SMALL: dict[str, Any] = {"num_layers": 1, "hidden_dims": [8]}


class Known(NamedTuple):
    """A model of a latent vector `z`, and its normal posterior."""

    model: Callable[..., Any]
    mean: Tensor
    covariance: Tensor

    def distance(self, loc: Tensor, scale_tril: Tensor) -> float:
        """Kullback-Leibler divergence from a normal to the posterior, in nats."""
        normal = torch.distributions.MultivariateNormal(loc.double(), scale_tril=scale_tril.double())
        exact = torch.distributions.MultivariateNormal(self.mean.double(), self.covariance.double())
        return float(torch.distributions.kl_divergence(normal, exact))


def regression(*, units: tuple[float, ...] = (1.0, 1.0, 1.0), dtype: torch.dtype = torch.float64) -> Known:
    """A linear regression with correlated predictors in these units, which has a normal posterior."""
    generator = torch.Generator().manual_seed(1)
    predictors = torch.randn(20, len(units), generator=generator, dtype=torch.float64)
    predictors[:, 1:] += predictors[:, :1]
    predictors = predictors * torch.tensor(units, dtype=torch.float64)
    y = predictors @ (1 / torch.tensor(units, dtype=torch.float64)) + torch.randn(
        20, generator=generator, dtype=torch.float64
    )
    prior_scale = 10 / torch.tensor(units, dtype=torch.float64)
    covariance = (predictors.T @ predictors / 0.25 + torch.diag(prior_scale**-2)).inverse()
    mean = covariance @ (predictors.T @ y / 0.25)
    predictors, y, prior_scale = predictors.to(dtype), y.to(dtype), prior_scale.to(dtype)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros_like(prior_scale), prior_scale).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal((z * predictors).sum(-1), 0.5), obs=y)

    return Known(model, mean, covariance)


COUNTS = torch.tensor([3.0, 5.0, 2.0, 6.0])
GAMMA = torch.distributions.Gamma(2 + COUNTS.sum(), 1.0 + len(COUNTS))
"""Posterior of the rate of `counting`."""


def counting() -> None:
    """Poisson counts with a gamma prior on the rate, which have a gamma posterior."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(COUNTS)):
        pyro.sample("y", dist.Poisson(rate), obs=COUNTS)


def normal_of(guide: Any) -> tuple[Tensor, Tensor]:
    """Location and scale factor of a guide with a linear map, which is a normal."""
    like = next(guide.parameters())
    with torch.no_grad():
        loc = guide.transform(like.new_zeros(guide.latent_dim))
        factor = guide.transform(torch.eye(guide.latent_dim).to(like)).T - loc[:, None]
    return loc, factor


def steps(objective: Any, model: Callable[..., Any], guide: Any, count: int, *args: Any, **kwargs: Any) -> list[float]:
    """Losses of `count` steps of Pyro's SVI."""
    svi = pyro.infer.SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.01}), objective)
    return [svi.step(*args, **kwargs) for _ in range(count)]


def bound(model: Callable[..., Any], guide: Any) -> float:
    """Evidence lower bound in nats, from 1,000 draws with a fixed seed."""
    pyro.set_rng_seed(1)
    with torch.no_grad():
        return -pyro.infer.Trace_ELBO(num_particles=1000, vectorize_particles=True).loss(model, guide)


def drawn(guide: Any, *args: Any, **kwargs: Any) -> tuple[dict[str, Tensor], Tensor]:
    """A draw of a guide by tracing: the value of each site, and the log-density of the trace."""
    trace: Any = poutine.trace(guide).get_trace(*args, **kwargs)
    sites = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}
    return {name: value for name, value in sites.items() if not name.startswith("_")}, trace.log_prob_sum()


def weights(guide: Any) -> dict[str, Tensor]:
    """Copies of a guide's parameters."""
    return {name: parameter.detach().clone() for name, parameter in guide.named_parameters()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two dictionaries of tensors are exactly equal."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
