"""Simulation-based calibration of `fit_guide`, and of `FlowPrior` under NUTS: ranks of the true parameters are uniform.

Of data simulated from the model, the rank of the parameter that they came from, among draws of the posterior, is
uniform. Ranks are mapped to standard normal numbers; their mean and their sum of squares are tested for each parameter,
two-sided. With exact draws all tests of one model together fail in one of a thousand seeds, the seeds here being
fixed. `pytest -m slow` runs a hundred data sets, with more power, for minutes.

Reference: Talts et al., *Validating Bayesian inference algorithms with simulation-based calibration*, 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from scipy import stats
from torch import Tensor

from pyro_maf import MAF, FlowPrior
from pyro_maf.infer import AutoIAF, fit_guide
from pyro_maf.infer.fitting import fit_guide as guide_fitting
from tests.posteriors import SMALL

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture(autouse=True)
def _few_draws_in_a_diagnosis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the diagnosis, which does not affect the draws that are ranked."""
    monkeypatch.setattr(guide_fitting, "DIAGNOSED", 1_000)


each_number = pytest.mark.parametrize("data_sets", [8, pytest.param(100, marks=pytest.mark.slow)])
DRAWS, STEPS = 400, 60
FALSE_FAILS = 1e-3


def normal(y: Tensor | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", 8):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def logistic(y: Tensor | None = None) -> None:
    x = torch.linspace(-2, 2, 20)
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 20):
        pyro.sample("y", dist.Bernoulli(logits=intercept + slope * x), obs=y)


def scores(model: Callable[..., None], names: list[str], count: int) -> Tensor:
    """Ranks over simulated data sets, transformed to standard normals, (count, names)."""
    rows = []
    for seed in range(count):
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()
        nodes: Any = poutine.trace(model).get_trace().nodes
        y = nodes["y"]["value"]
        guide: Any = fit_guide(model, AutoIAF(model, **SMALL), y, steps=STEPS, progress=False).guide
        draws = guide.rsample((DRAWS,))
        rows.append(torch.stack([(draws[name] < nodes[name]["value"]).sum() for name in names]))
    return as_normal(torch.stack(rows), DRAWS)


def as_normal(ranks: Tensor, draws: int) -> Tensor:
    """Ranks among `draws` draws transformed to standard normals, exactly so for exact draws."""
    return torch.special.ndtri((ranks + 0.5) / (draws + 1))


def least_probability(z: Tensor) -> float:
    """The smaller p-value of a test of the mean and one of the sum of squares, for independent standard normals."""
    count = len(z)
    of_mean = 2 * stats.norm.sf(abs(float(z.mean())) * count**0.5)
    squares = float((z**2).sum())
    of_spread = 2 * min(stats.chi2.cdf(squares, count), stats.chi2.sf(squares, count))
    return float(min(of_mean, of_spread))


@each_number
@pytest.mark.parametrize(
    ("model", "names"), [(normal, ["loc", "scale"]), (logistic, ["intercept", "slope"])], ids=["normal", "logistic"]
)
def test_ranks_among_draws_of_a_guide_are_uniform(model: Callable[..., None], names: list[str], data_sets: int) -> None:
    z = scores(model, names, data_sets)
    found = {name: least_probability(column) for name, column in zip(names, z.T, strict=True)}
    assert min(found.values()) > FALSE_FAILS / (2 * len(names)), found


@pytest.mark.parametrize("data_sets", [12, pytest.param(500, marks=pytest.mark.slow)])
def test_ranks_among_draws_of_nuts_with_a_flow_as_prior_are_uniform(data_sets: int) -> None:
    """One chain samples the product of all posteriors; every fourth draw is kept, which are nearly independent."""
    flow = MAF(2, **SMALL)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    prior = FlowPrior(flow, support=["real", "positive"]).requires_grad_(False)

    def groups(y: Tensor) -> None:
        with pyro.plate("groups", data_sets):
            z = pyro.sample("z", prior)
            pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    truth = prior.sample((data_sets,))
    mcmc = MCMC(NUTS(groups), num_samples=100, warmup_steps=50, disable_progbar=True)
    mcmc.run(truth + 0.5 * torch.randn_like(truth))
    draws = mcmc.get_samples()["z"][::4]
    z = as_normal((draws < truth).sum(0), len(draws))
    found = [least_probability(column) for column in z.T]
    assert min(found) > FALSE_FAILS / (2 * len(found)), found


def test_calibration_detects_guides_that_are_too_narrow_or_shifted() -> None:
    torch.manual_seed(0)
    exact = torch.randn(200, 100)
    for z in (2 * exact, exact + 1):
        assert all(least_probability(row) < FALSE_FAILS / 4 for row in z)
    assert sum(least_probability(row) < 0.05 / 2 for row in exact) < 25
