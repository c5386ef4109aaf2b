"""Simulation-based calibration of `fit_guide`: ranks of true parameters among draws of the guide are uniform.

Of data simulated from the model, the rank of the parameter that they came from, among draws of the posterior, is
uniform. Ranks are mapped to standard normal numbers; their mean and their sum of squares are tested for each parameter,
two-sided. With exact guides all tests of one model together fail in one of a thousand seeds, the seeds here being
fixed. SBC_DATA_SETS=100 in the environment runs as many data sets, with more power, for minutes.

Reference: Talts et al., *Validating Bayesian inference algorithms with simulation-based calibration*, 2018.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

from pyro_maf.infer import AutoIAF, fit_guide
from tests.posteriors import SMALL

pytestmark = pytest.mark.usefixtures("fresh")

DATA_SETS = int(os.environ.get("SBC_DATA_SETS", "8"))
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
    """Ranks as standard normal numbers, (count, names), over simulated data sets."""
    rows = []
    for seed in range(count):
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()
        nodes: Any = poutine.trace(model).get_trace().nodes
        y = nodes["y"]["value"]
        guide: Any = fit_guide(model, AutoIAF(model, **SMALL), y, steps=STEPS, progress=False).guide
        draws = guide.rsample((DRAWS,))
        rows.append(torch.stack([(draws[name] < nodes[name]["value"]).sum() for name in names]))
    return torch.special.ndtri((torch.stack(rows) + 0.5) / (DRAWS + 1))


def least_probability(z: Tensor) -> float:
    """The smaller of the probabilities of a mean and of a sum of squares as extreme, of independent normal numbers."""
    count = len(z)
    of_mean = 2 * stats.norm.sf(abs(float(z.mean())) * count**0.5)
    squares = float((z**2).sum())
    of_spread = 2 * min(stats.chi2.cdf(squares, count), stats.chi2.sf(squares, count))
    return float(min(of_mean, of_spread))


@pytest.mark.parametrize(
    ("model", "names"), [(normal, ["loc", "scale"]), (logistic, ["intercept", "slope"])], ids=["normal", "logistic"]
)
def test_ranks_of_the_truth_are_uniform(model: Callable[..., None], names: list[str]) -> None:
    z = scores(model, names, DATA_SETS)
    found = {name: least_probability(column) for name, column in zip(names, z.T, strict=True)}
    assert min(found.values()) > FALSE_FAILS / (2 * len(names)), found


def test_guides_of_half_the_spread_or_a_deviation_off_would_be_found_out() -> None:
    torch.manual_seed(0)
    exact = torch.randn(200, 100)
    for z in (2 * exact, exact + 1):
        assert all(least_probability(row) < FALSE_FAILS / 4 for row in z)
    assert sum(least_probability(row) < 0.05 / 2 for row in exact) < 25
