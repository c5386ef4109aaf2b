"""NUTS in the coordinates of a guide's noise."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoNormal

from pyro_maf.infer import neutra
from tests.posteriors import GAMMA, GUIDES, SMALL, counting

pytestmark = pytest.mark.usefixtures("fresh")
AutoIAF = GUIDES[1]


def rows() -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 2, dim=-2):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        with pyro.plate("rows", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(2, 3))


def shaken(guide: Any) -> Any:
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return guide


def test_draws_are_of_the_posterior_whatever_the_guide() -> None:
    warped = neutra(counting, shaken(AutoIAF(counting, **SMALL).setup()))
    mcmc = MCMC(NUTS(warped), num_samples=200, warmup_steps=40, disable_progbar=True)
    mcmc.run()
    draws = warped.draws(mcmc.get_samples())["rate"]
    assert draws.shape == (200,)
    error = float(GAMMA.stddev) / 80**0.5
    assert float(draws.mean()) == pytest.approx(float(GAMMA.mean), abs=4 * error)
    assert float(draws.std()) == pytest.approx(float(GAMMA.stddev), rel=0.3)


@pytest.mark.parametrize("make", GUIDES)
def test_the_density_of_noise_is_that_of_its_sites_and_the_log_determinant(make: Any) -> None:
    guide = shaken(make(rows, **SMALL, init_scale=0.3).setup())
    warped = neutra(rows, guide)
    noise = torch.randn(guide.latent_dim)
    (name,) = [name for name in poutine.trace(warped).get_trace().nodes if name.endswith("_shared_latent")]
    trace: Any = poutine.trace(poutine.condition(warped, {name: noise})).get_trace()
    sites = warped.draws({name: noise})
    joint = poutine.trace(poutine.condition(rows, sites)).get_trace().log_prob_sum()
    normal = dist.Normal(torch.zeros(guide.latent_dim), 1.0).log_prob(noise).sum()
    torch.testing.assert_close(trace.log_prob_sum(), joint + normal - guide.log_prob(sites), rtol=1e-4, atol=1e-3)


def test_draws_have_the_shapes_of_the_sites() -> None:
    guide = AutoIAF(rows, **SMALL, init_scale=0.3).setup()
    warped = neutra(rows, guide)
    expected = {"loc": (), "scale": (2, 1), "z": (2, 3)}
    for batch in ((), (5,), (2, 5)):
        draws = warped.draws({"AutoIAF_shared_latent": torch.randn(*batch, guide.latent_dim)})
        assert {name: tuple(value.shape) for name, value in draws.items()} == {
            name: batch + shape for name, shape in expected.items()
        }


def test_chains_keep_their_dimension() -> None:
    warped = neutra(rows, AutoIAF(rows, **SMALL).setup())
    mcmc = MCMC(NUTS(warped, max_tree_depth=2), num_samples=4, warmup_steps=4, disable_progbar=True)
    mcmc.run()
    assert warped.draws(mcmc.get_samples(group_by_chain=True))["z"].shape == (1, 4, 2, 3)


def test_a_warped_model_returns_what_the_model_does_and_takes_its_arguments() -> None:
    def model(shift: float, *, scale: float) -> Any:
        return pyro.sample("z", dist.Normal(shift, scale)), shift

    guide = AutoIAF(model, **SMALL).setup(1.0, scale=2.0)
    value, shift = neutra(model, guide)(1.0, scale=2.0)
    assert (value.shape, shift) == ((), 1.0)


def test_the_weights_of_a_guide_are_held_fixed() -> None:
    guide = AutoIAF(counting, **SMALL).setup()
    neutra(counting, guide)
    assert not any(parameter.requires_grad for parameter in guide.parameters())


def test_a_guide_of_another_class_is_refused() -> None:
    with pytest.raises(TypeError, match=r"neutra expected a guide of pyro_maf\.infer, got AutoNormal"):
        neutra(counting, AutoNormal(counting))  # type: ignore[arg-type]


def test_a_guide_that_is_not_set_up_is_refused() -> None:
    with pytest.raises(ValueError, match="neutra expected a guide that is set up and fitted: call fit_guide first"):
        neutra(counting, AutoIAF(counting))


def test_a_guide_with_an_encoder_is_refused() -> None:
    guide = AutoIAF(counting, encoder=lambda: torch.ones(2), **SMALL).setup()
    with pytest.raises(ValueError, match="neutra expected a guide without an encoder"):
        neutra(counting, guide)
