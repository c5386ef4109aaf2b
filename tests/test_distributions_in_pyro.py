"""Densities where Pyro expects a distribution: in plates and handlers, as models, guides and priors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_maf.distributions import ConditionalFlowPrior, ConditionalMAFMoG, Density, FlowPrior, MADEMoG
from pyro_maf.flows import IAF, MAF, ConditionalMAF
from tests.test_distributions import SMALL, every_density, shaken


@every_density
def test_is_a_module_and_a_distribution(make: Callable[[int], Density]) -> None:
    density = make(2)
    assert isinstance(density, nn.Module)
    assert isinstance(density, dist.TorchDistribution)
    assert density().shape == (2,)
    assert density.support is dist.constraints.real_vector
    assert density.eval().training is density.expand([2]).training is False
    assert repr(density).startswith(density.name)
    assert all(parameter.requires_grad for parameter in density.parameters())


@every_density
def test_an_expanded_density_shares_parameters(make: Callable[[int], Density]) -> None:
    density = make(2)
    twin = density.expand([3])
    assert [*map(id, twin.parameters())] == [*map(id, density.parameters())]
    twin.double()
    assert density.sample().dtype == torch.float64
    assert density.batch_shape == ()


@every_density
def test_in_a_plate_with_masks_and_handlers(make: Callable[[int], Density]) -> None:
    density = shaken(make(2))
    y = density.sample([5])
    keep = torch.arange(5) < 3

    def model() -> None:
        with pyro.plate("rows", 5), pyro.poutine.scale(scale=2.0):
            pyro.sample("y", density.mask(keep), obs=y)

    trace = pyro.poutine.trace(model).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), 2 * density.log_prob(y[:3]).sum())
    event = density.expand([5]).to_event(1)
    assert (event.batch_shape, event.event_shape) == ((), (5, 2))
    torch.testing.assert_close(event.log_prob(y), density.log_prob(y).sum())
    drawn = pyro.poutine.trace(lambda: pyro.sample("y", density.expand([5]).to_event(1))).get_trace()
    assert drawn.nodes["y"]["value"].shape == (5, 2)


def test_trains_by_svi_as_a_model_of_data() -> None:
    data = torch.randn(200, 2) * torch.tensor([0.2, 2.0]) + 1
    density = MADEMoG(2, num_components=2, **SMALL)

    def model() -> None:
        pyro.module("density", density)
        with pyro.plate("rows", len(data), subsample_size=100) as rows:
            pyro.sample("y", density, obs=data[rows])

    before = float(density.log_prob(data).mean().detach())
    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(60):
        svi.step()
    assert float(density.log_prob(data).mean().detach()) > before + 0.5


@pytest.mark.parametrize("make", [MAF, IAF])
def test_trains_by_svi_as_a_guide(make: Any) -> None:
    target = dist.Normal(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 1.5])).to_event(1)
    prior = FlowPrior(make(2, num_layers=1, **SMALL))

    def guide() -> None:
        pyro.module("prior", prior)
        pyro.sample("z", prior)

    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
    svi = SVI(lambda: pyro.sample("z", target), guide, pyro.optim.Adam({"lr": 0.03}), elbo)
    for _ in range(100):
        svi.step()
    assert elbo.loss(lambda: pyro.sample("z", target), guide) < 0.1


@pytest.mark.parametrize("make", [MADEMoG, lambda d: FlowPrior(MAF(d, num_layers=1, **SMALL))])
def test_nuts_takes_it_for_a_prior(make: Callable[[int], Density]) -> None:
    """An untrained density is nearly the standard normal prior, under which the posterior is known."""
    prior = make(2)
    observed = torch.tensor([1.0, -1.0])

    def model() -> None:
        z = pyro.sample("z", prior)
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=observed)

    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=100, warmup_steps=30, disable_progbar=True)
    mcmc.run()
    torch.testing.assert_close(mcmc.get_samples()["z"].mean(0), 0.8 * observed, atol=0.2, rtol=0)


def test_a_conditional_density_in_a_model() -> None:
    conditional = ConditionalMAFMoG(2, 3, num_layers=1, **SMALL)

    def model(context: Tensor) -> None:
        pyro.module("density", conditional)
        with pyro.plate("rows", len(context)):
            pyro.sample("y", conditional.condition(context))

    trace = pyro.poutine.trace(model).get_trace(torch.randn(5, 3))
    trace.compute_log_prob()
    assert trace.nodes["y"]["log_prob"].shape == (5,)
    assert any(name.startswith("density$$$") for name in pyro.get_param_store())


def test_a_flow_at_a_context_makes_a_prior_with_a_batch_shape() -> None:
    flow = shaken(ConditionalMAF(2, 3, num_layers=1, **SMALL))
    context = torch.randn(5, 3, dtype=torch.float64)
    prior = FlowPrior(flow.condition(context))
    y = prior.sample()
    assert (prior.batch_shape, y.shape) == ((5,), (5, 2))
    torch.testing.assert_close(prior.log_prob(y), ConditionalFlowPrior(flow).condition(context).log_prob(y))
