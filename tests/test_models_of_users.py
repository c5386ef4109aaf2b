"""Models as users write them, which NUTS can sample: guides are set up, fitted, sampled and used by NUTS."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyro_maf.infer import AutoIAF, diagnose, fit_guide, neutra
from tests.posteriors import SMALL

pytestmark = pytest.mark.usefixtures("fresh")
Y = torch.randn(12, generator=torch.Generator().manual_seed(0))
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))


def observed(loc: Any, scale: Any = 1.0, obs: Tensor = Y, **options: Any) -> None:
    with pyro.plate("rows", 12):
        pyro.sample("y", dist.Normal(loc, scale, **options), obs=obs)


def weights(size: int = 3) -> Tensor:
    return pyro.sample("w", dist.Normal(torch.zeros(size), 1.0).to_event(1))


def not_a_number_in_half_of_the_space() -> None:
    observed(pyro.sample("z", dist.Normal(0.0, 1.0)).log(), validate_args=False)


def impossible_at_the_prior_median() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("edge", torch.where(z > 0.5, 0.0, -torch.inf))
    observed(z)


def raising_in_half_of_the_space() -> None:
    observed(0.0, pyro.sample("z", dist.Normal(1.0, 1.0)))


def with_rows_not_seen() -> None:
    loc, scale = pyro.sample("loc", dist.Normal(0.0, 1.0)), pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("rows", 12):
        pyro.sample("y", dist.Normal(loc, scale), obs=Y, obs_mask=torch.arange(12) % 5 != 0)


def with_an_empty_site() -> None:
    pyro.sample("none", dist.Normal(torch.zeros(0), 1.0).to_event(1))
    observed(pyro.sample("z", dist.Normal(0.0, 1.0)))


def of_float64_data() -> None:
    observed(X.double() @ weights().double(), obs=Y.double())


def writing_into_a_tensor() -> None:
    w, loc = weights(2), torch.zeros(12)
    loc[:5] += w[0]
    loc[5:] += w[1]
    observed(loc)


def of_ordered_levels() -> None:
    cuts = dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.transforms.OrderedTransform()
    )
    levels = dist.OrderedLogistic(X @ weights(), pyro.sample("cuts", cuts))
    with pyro.plate("rows", 12):
        pyro.sample("y", levels, obs=torch.arange(12) % 3)


def with_a_discrete_site() -> None:
    w = weights(2)
    with pyro.plate("rows", 12):
        which = pyro.sample("which", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(w[which], 0.5), obs=Y)


def branching() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observed(z, 1.0 if z > 0 else 2.0)


def with_sequential_plates() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    for row in pyro.plate("rows", 3):
        x = pyro.sample(f"x_{row}", dist.Normal(z, 1.0))
        pyro.sample(f"y_{row}", dist.Normal(x, 1.0), obs=Y[row])


class Network(PyroModule[nn.Module]):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](3, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))

    def forward(self) -> None:
        observed(self.layer(X).squeeze(-1))


MODELS: dict[str, Callable[[], None]] = {
    model.__name__: model
    for model in (
        not_a_number_in_half_of_the_space,
        impossible_at_the_prior_median,
        raising_in_half_of_the_space,
        with_rows_not_seen,
        with_an_empty_site,
        of_float64_data,
        writing_into_a_tensor,
        of_ordered_levels,
        with_a_discrete_site,
        branching,
        with_sequential_plates,
    )
}


@pytest.mark.filterwarnings("ignore:fit_guide runs the model for each draw")
@pytest.mark.filterwarnings("ignore:Singular sample detected")
@pytest.mark.parametrize("model", [*MODELS.values(), Network()], ids=[*MODELS, "Network"])
def test_every_model_is_supported(model: Any) -> None:
    pyro.set_rng_seed(0)
    guide = AutoIAF(model, **SMALL)
    fit = fit_guide(model, guide, steps=5, progress=False)
    assert fit.skipped_steps == 0
    assert fit.diagnosis.reason == ""
    draws = guide.rsample((50,))
    assert all(bool(value.isfinite().all()) for value in draws.values())
    assert guide.quantiles([0.1, 0.9]).keys() == draws.keys()
    if model is not raising_in_half_of_the_space:  # Pyro does not score draws for which the model raises
        Predictive(model, guide=guide, num_samples=2)()
        MCMC(NUTS(neutra(model, guide), max_tree_depth=2), 2, 2, disable_progbar=True).run()


def with_a_site_in_some_runs() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if z > 0:
        observed(pyro.sample("w", dist.Normal(z, 1.0)))


def test_a_site_that_only_some_runs_have_is_refused_in_one_line() -> None:
    """NUTS either ignores such a site in other runs or redraws it."""
    guide = AutoIAF(with_a_site_in_some_runs, **SMALL)
    with pytest.raises(ValueError, match=r"^AutoIAF expected a model with the same sites in every run, got .* w .*\.$"):
        guide.setup()


def raising_for_most_draws() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if float(z) < 0.5:
        raise ValueError("z is low")


# The first draw is impossible, or the next two, or none.
@pytest.mark.parametrize("seed", [4, 0, 1])
def test_a_draw_at_which_the_model_raises_counts_as_impossible(seed: int) -> None:
    start = init_to_value(values={"z": torch.tensor(0.6)})
    guide = AutoNormal(raising_for_most_draws, init_loc_fn=start, init_scale=1.0)
    guide()
    pyro.set_rng_seed(seed)
    diagnosis = diagnose(raising_for_most_draws, guide, num_samples=400)
    assert diagnosis.unscored > 100
    assert abs(diagnosis.log_evidence - math.log(0.3085)) < 0.2
