"""The search for modes that a guide misses: it finds them with their probability, and no spurious ones."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_maf.infer import AutoIAF, diagnose, fit_guide
from tests.posteriors import SMALL, regression

pytestmark = pytest.mark.usefixtures("fresh")

WEIGHTS = torch.tensor([0.7, 0.3])
CENTRES = torch.tensor([[-3.0, 0.0], [3.0, 1.0]])


def two_modes() -> None:
    prior = dist.Normal(torch.zeros(2), 5.0).to_event(1)
    z = pyro.sample("z", prior)
    parts = dist.Normal(CENTRES, 0.5).to_event(1).log_prob(z[..., None, :]) + WEIGHTS.log()
    pyro.factor("density", parts.logsumexp(-1) - prior.log_prob(z))


def normal(index: int) -> Any:
    return lambda: pyro.sample("z", dist.Normal(CENTRES[index], 0.5).to_event(1))


@pytest.mark.parametrize("index", [0, 1])
def test_the_other_of_two_modes_is_found_with_its_share(index: int) -> None:
    """The guide's importance weights are equal, so they do not reveal the other mode."""
    found = diagnose(two_modes, normal(index))
    assert found.ess > 9_999
    (mode,) = found.missed
    assert mode.is_mode
    assert mode.share == pytest.approx(float(WEIGHTS[1 - index]), abs=0.03)
    torch.testing.assert_close(mode.values["z"], CENTRES[1 - index], atol=0.05, rtol=0)
    assert found.grade == "poor"
    assert f"misses {100 * mode.share:.0f} % of the posterior, near z = (" in found.verdict


def test_a_mode_that_only_standard_deviations_depend_on_is_named() -> None:
    """It holds 0.2 % at 60 deviations, so that the posterior's deviation is 2.9 times the guide's."""

    def model() -> None:
        prior = dist.Normal(0.0, 20.0)
        z = pyro.sample("z", prior)
        parts = [dist.Normal(loc, 0.5).log_prob(z) + math.log(share) for loc, share in ((0.0, 0.998), (30.0, 0.002))]
        pyro.factor("density", torch.stack(parts).logsumexp(0) - prior.log_prob(z))

    found = diagnose(model, lambda: pyro.sample("z", dist.Normal(0.0, 0.5)))
    assert found.grade == "good"
    assert "; 0.2 % of the posterior, near z = 30, is so far away that standard deviations" in found.verdict


def test_a_guide_that_covers_only_a_spike_is_detected() -> None:
    """The guide covers a spike, which hides the slab around it; both have their mode at 0."""

    def model() -> None:
        prior = dist.Normal(torch.zeros(2), 5.0).to_event(1)
        z = pyro.sample("z", prior)
        parts = [dist.Normal(torch.zeros(2), scale).to_event(1).log_prob(z) for scale in (0.1, 3.0)]
        pyro.factor("density", torch.stack(parts).logsumexp(0) - prior.log_prob(z))

    (around,) = diagnose(model, lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 0.1).to_event(1))).missed
    assert around.share == pytest.approx(0.5, abs=0.1)
    assert not around.is_mode


def test_missing_tails_are_not_reported_as_a_mode() -> None:
    def model() -> None:
        pyro.sample("z", dist.MultivariateStudentT(3.0, torch.zeros(2), torch.eye(2)))

    pyro.set_rng_seed(0)
    found = diagnose(model, lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)))
    assert not found.missed[0].is_mode
    assert found.verdict.startswith("The guide is too narrow: ")


def test_a_sharp_mode_is_found_though_few_ascents_lead_to_it() -> None:
    def model() -> None:
        prior = dist.Normal(torch.zeros(2), 5.0).to_event(1)
        z = pyro.sample("z", prior)
        sharp = dist.Normal(torch.tensor([-2.0, 0.0]), 0.05).to_event(1).log_prob(z)
        broad = dist.Normal(torch.tensor([2.0, 0.0]), 1.0).to_event(1).log_prob(z)
        pyro.factor("density", torch.logaddexp(sharp, broad) - prior.log_prob(z))

    found = diagnose(model, lambda: pyro.sample("z", dist.Normal(torch.tensor([2.0, 0.0]), 1.0).to_event(1)))
    assert found.missed[0].share == pytest.approx(0.5, abs=0.05)


def test_a_guide_of_both_modes_misses_none() -> None:
    def guide() -> None:
        which = pyro.sample("which", dist.Categorical(WEIGHTS), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(CENTRES[which], 0.5).to_event(1))

    assert diagnose(two_modes, guide).missed == ()


def test_label_switching_is_named() -> None:
    y = torch.cat([torch.linspace(-2.5, -1.5, 10), torch.linspace(1.5, 2.5, 10)])

    def model() -> None:
        with pyro.plate("components", 2):
            means = pyro.sample("means", dist.Normal(0.0, 4.0))
        parts = dist.Normal(means[..., None, :], 0.5)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts), obs=y)

    found = diagnose(model, AutoNormal(model, init_loc_fn=lambda site: torch.tensor([-2.0, 2.0])))
    assert len(found.missed) == 1
    assert found.missed[0].values["means"].shape == (2,)
    assert found.missed[0].share > 0.4


def test_a_site_on_a_bounded_support_is_named_on_it() -> None:
    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(1.0, 0.1))
        parts = torch.stack([dist.Normal(1.0, 0.1).log_prob(rate), dist.Normal(9.0, 0.1).log_prob(rate)])
        pyro.factor("density", parts.logsumexp(0))

    (mode,) = diagnose(model, lambda: pyro.sample("rate", dist.Normal(1.0, 0.1))).missed
    assert float(mode.values["rate"]) == pytest.approx(9, abs=0.1)


def funnel() -> None:
    scale = pyro.sample("scale", dist.Normal(0.0, 2.0))
    with pyro.plate("numbers", 4):
        pyro.sample("x", dist.Normal(0.0, scale.exp()))


def skewed() -> None:
    pyro.sample("z", dist.Gamma(torch.tensor([0.7, 2.0]), 1.0).to_event(1))


def heavy() -> None:
    pyro.sample("z", dist.StudentT(2.0, torch.zeros(3), 1.0).to_event(1))


@pytest.mark.parametrize("model", [funnel, skewed, heavy], ids=lambda model: model.__name__)
def test_exact_draws_of_a_unimodal_posterior_miss_no_mode(model: Any) -> None:
    """The posterior is the prior, whose draws miss nothing, though a funnel's density is highest far out."""
    pyro.set_rng_seed(1)
    assert diagnose(model, model).missed == ()


def test_a_fitted_regression_misses_no_mode() -> None:
    known = regression()
    assert fit_guide(known.model, AutoIAF(known.model, **SMALL), steps=20, progress=False).diagnosis.missed == ()


def test_discrete_sites_and_minibatches_are_summed_over_in_the_search() -> None:
    """Minibatches observe the square of a number, with outliers, so its sign is undetermined."""
    y = 4.0 + 0.1 * torch.randn(20)

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y), subsample_size=5) as rows:
            off = pyro.sample("off", dist.Bernoulli(0.1), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(z**2, 0.5 + 5 * off), obs=y[rows])

    guide = AutoIAF(poutine.block(model, hide=["off"]), init_loc_fn=lambda site: torch.tensor(2.0), **SMALL)
    (mode,) = diagnose(model, guide, y).missed
    assert float(mode.values["z"]) == pytest.approx(-2, abs=0.05)
    assert mode.share == pytest.approx(0.5, abs=0.05)


# -- where there is no search ------------------------------------------------------------------------------------------


def in_turn() -> None:
    """A model with two modes that must be run for each draw."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    square = z[0] ** 2 if z[1] > -50 else -z[0]
    pyro.sample("y", dist.Normal(square, 0.5), obs=torch.tensor(4.0))


@pytest.mark.filterwarnings("ignore:fit_guide runs the model for each draw")
def test_without_broadcasting_the_verdict_says_that_there_was_no_search() -> None:
    fit = fit_guide(in_turn, AutoIAF(in_turn, **SMALL), steps=100, progress=False)
    clause = "other modes were not looked for, since the model is run draw by draw"
    assert fit.run_alone
    assert fit.diagnosis.grade in ("good", "usable")
    assert fit.diagnosis.verdict.endswith(f"; {clause}.")
    assert f"; {clause})" in repr(fit).splitlines()[3]


def test_beyond_200_latent_variables_a_verdict_says_that_there_was_no_search() -> None:
    def many() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(201), 1.0).to_event(1))

    found = diagnose(many, many)
    assert found.grade == "good"
    assert "other modes were not looked for, since there are more than 200 latent variables" in found.verdict
    assert "looked for" not in diagnose(two_modes, normal(0)).verdict
