"""Latent sites with masked entries."""

from __future__ import annotations

import io
import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_maf.infer import AutoIAF, diagnose, fit_guide, neutra, reweight
from tests.posteriors import GUIDES, SMALL

pytestmark = pytest.mark.usefixtures("fresh")
QUICK: dict[str, Any] = {"num_particles": 4, "progress": False}
Y = torch.tensor([2.1, 3.4, 3.9, 2.6])
SEEN = torch.tensor([True, False, True, False])


def missing(seen: Tensor = SEEN) -> None:
    """Half of the rows are missing: Pyro has a latent variable for every row, and masks those of observed ones."""
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(Y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=Y, obs_mask=seen)


def padded() -> None:
    """Rows whose latent variable and observation are masked together."""
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(Y)), poutine.mask(mask=SEEN):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y)


def by_distribution() -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    z = pyro.sample("z", dist.Normal(loc.unsqueeze(-1).expand(*loc.shape, 4), 1.0).mask(SEEN).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).mask(SEEN).to_event(1), obs=Y)


def positive() -> None:
    """Masked sites with other supports, a scale and a simplex, whose maps change the volume."""
    with pyro.plate("rows", len(Y)), poutine.mask(mask=SEEN):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        share = pyro.sample("share", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
        pyro.sample("y", dist.Normal(share[..., 0], scale), obs=Y)


def positive_of_the_seen() -> None:
    with pyro.plate("rows", int(SEEN.sum())):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        share = pyro.sample("share", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
        pyro.sample("y", dist.Normal(share[..., 0], scale), obs=Y[SEEN])


def evidence(variance: float) -> float:
    seen = Y[SEEN]
    covariance = variance * torch.eye(len(seen)) + 9.0 * torch.ones(len(seen), len(seen))
    return float(torch.distributions.MultivariateNormal(torch.zeros(len(seen)), covariance).log_prob(seen))


MODELS = {"missing": (missing, 3, evidence(1.0)), "padded": (padded, 3, evidence(2.0))}
MODELS["by distribution"] = (by_distribution, 3, evidence(2.0))


@pytest.mark.parametrize(("model", "size", "expected"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("make", GUIDES)
def test_masked_entries_are_no_part_of_a_guide(make: Any, model: Any, size: int, expected: float) -> None:
    guide = make(model, **SMALL).setup()
    assert guide.latent_dim == size
    found = diagnose(model, guide, num_samples=1000)
    assert found.elbo == pytest.approx(expected, abs=0.02)
    assert found.k_hat < 0.7 or found.ess > 990
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), Trace_ELBO(num_particles=50, vectorize_particles=True))
    assert -svi.step() == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_are_missing_are_imputed(seed: int) -> None:
    pyro.set_rng_seed(seed)
    fit = fit_guide(missing, AutoIAF(missing, **SMALL), steps=10, **QUICK)
    assert fit.diagnosis.elbo == pytest.approx(evidence(1.0), abs=0.05)
    draws = {name: value.detach() for name, value in fit.guide.rsample((4000,)).items()}
    precision = 2 + 1 / 9
    assert float(draws["loc"].mean()) == pytest.approx(float(Y[SEEN].sum()) / precision, abs=0.1)
    sd = draws["y_unobserved"].std(0)
    torch.testing.assert_close(sd[~SEEN], torch.full((2,), (1 + 1 / precision) ** 0.5), atol=0.1, rtol=0)
    assert not sd[SEEN].any()
    assert reweight(missing, fit.guide, num_samples=100)["y_unobserved"].shape == (100, 4)


def test_masked_entries_have_no_log_determinant() -> None:
    found = diagnose(positive, AutoIAF(positive, **SMALL), num_samples=4000)
    expected = diagnose(positive_of_the_seen, AutoIAF(positive_of_the_seen, **SMALL), num_samples=4000)
    assert found.elbo == pytest.approx(expected.elbo, abs=0.1)
    guide = AutoIAF(positive, **SMALL).setup()
    draws = guide.rsample((5,))
    assert {name: tuple(value.shape) for name, value in draws.items()} == {"scale": (5, 4), "share": (5, 4, 3)}
    assert guide.log_prob(draws).shape == (5,)
    # log q of a draw, by `log_prob` and by a trace.
    trace: Any = poutine.trace(guide).get_trace()
    sites = {name: trace.nodes[name]["value"] for name in ("scale", "share")}
    torch.testing.assert_close(guide.log_prob(sites), trace.log_prob_sum(), rtol=1e-4, atol=1e-4)


def test_neutra_has_the_density_of_the_unmasked_entries() -> None:
    guide = AutoIAF(positive, init_scale=0.5, **SMALL).setup()
    noise = torch.randn(guide.latent_dim)
    warped = neutra(positive, guide)
    found = poutine.trace(poutine.condition(warped, {"AutoIAF_shared_latent": noise})).get_trace().log_prob_sum()
    sites = guide.sites_of(noise)
    joint = poutine.trace(poutine.condition(positive, sites)).get_trace().log_prob_sum()
    normal = dist.Normal(torch.zeros(guide.latent_dim), 1.0).log_prob(noise).sum()
    torch.testing.assert_close(found, joint + normal - guide.log_prob(sites), rtol=1e-4, atol=1e-4)


def test_a_masked_prior_with_likelihood_is_not_masked_out() -> None:
    """A prior masked away leaves the likelihood, a proper posterior."""

    def model() -> None:
        with poutine.mask(mask=False):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=torch.tensor([1.0, -1.0]))

    guide = AutoIAF(model, **SMALL).setup()
    assert guide.latent_dim == 2
    draws = guide.rsample((2000,))["z"]
    torch.testing.assert_close(draws.mean(0), torch.tensor([1.0, -1.0]), atol=0.1, rtol=0)
    torch.testing.assert_close(draws.std(0), torch.full((2,), 0.5), atol=0.1, rtol=0)
    assert diagnose(model, guide).elbo == pytest.approx(0.0, abs=0.01)
    assert abs(diagnose(model, AutoNormal(model, init_scale=0.5)).elbo) < 20


def test_masked_entries_in_the_likelihood_are_kept() -> None:
    def model() -> None:
        with pyro.plate("rows", 3), poutine.mask(mask=torch.tensor([True, False, False])):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z[..., :2].sum(-1), 0.5), obs=torch.tensor(1.0))

    assert AutoIAF(model, **SMALL).setup().latent_dim == 2


def test_a_mask_around_everything_leaves_nothing_to_fit() -> None:
    def model() -> None:
        with poutine.mask(mask=False):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="AutoIAF found no latent variables in the model that are not masked"):
        AutoIAF(model, **SMALL).setup()


def test_a_mask_of_true_masks_nothing() -> None:
    guide = AutoIAF(partial(missing, torch.zeros(4, dtype=torch.bool)), **SMALL).setup()
    assert guide.latent_dim == 5


def test_other_masks_than_those_of_the_set_up_are_refused_or_set_up_anew() -> None:
    guide = AutoIAF(missing, **SMALL).setup(SEEN)
    for function in (diagnose, reweight):
        with pytest.raises(ValueError, match="expected latent sites masked as in the guide's set-up"):
            function(missing, guide, ~SEEN)
    with pytest.warns(UserWarning, match="sets AutoIAF up again, since it was set up with other data"):
        fit_guide(missing, guide, ~SEEN, steps=5, **QUICK)
    assert math.isfinite(diagnose(missing, guide, ~SEEN).elbo)


def test_rows_with_guides_of_their_own_cannot_be_masked() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)), poutine.mask(mask=SEEN):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"AutoIAF expected latent sites without a mask if rows .* got z"):
        AutoIAF(model, encoder=lambda y: y[:, None], **SMALL).setup(Y)


def test_a_guide_that_scores_masked_entries_gets_no_verdict() -> None:
    found = diagnose(missing, AutoNormal(missing, init_scale=0.5))
    assert math.isnan(found.elbo)
    assert "site y_unobserved is masked in the model, and the guide scores it" in found.verdict

    def guide(seen: Tensor = SEEN) -> None:
        pyro.sample("loc", dist.Normal(2.8, 0.7))
        with pyro.plate("rows", 4), poutine.mask(mask=~seen):
            pyro.sample("y_unobserved", dist.Normal(2.8, 1.2))

    assert diagnose(missing, guide).elbo < evidence(1.0)


def test_a_copy_in_another_process_leaves_the_same_entries_out() -> None:
    guide = AutoIAF(missing, **SMALL).setup()
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert diagnose(missing, twin, num_samples=500).elbo == pytest.approx(evidence(1.0), abs=0.05)
