"""Discrete sites that are summed out, and random choices of a model that a guide does not have."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import Tensor, nn

from pyro_maf.infer import AutoIAF, TracePath_ELBO, diagnose, fit_guide, neutra, reweight, to_arviz
from pyro_maf.infer.models.log_joint import LogJoint
from pyro_maf.infer.models.model import Call
from pyro_maf.infer.models.posterior import without_blocks
from tests.posteriors import GUIDES, SMALL

pytestmark = pytest.mark.usefixtures("fresh")
QUICK: dict[str, Any] = {"num_particles": 4, "progress": False}
ENUM: Any = {"enumerate": "parallel"}
Y = torch.tensor([0.8, 5.1, 1.3, 1.1, 4.6, 0.4, 0.9, 1.2])
LOGITS = torch.tensor([0.8, 0.2]).log()


# -- models, each with the same one whose sites are summed by hand -----------------------------------------------------


def mixture(rows: int | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(Y), subsample_size=rows) as i:
        z = pyro.sample("z", dist.Bernoulli(0.2), infer=ENUM)
        pyro.sample("y", dist.Normal(mu + 4.0 * z, 0.5), obs=Y[i])


def summed(rows: int | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(Y), subsample_size=rows) as i:
        components = dist.Normal(mu[..., None] + torch.tensor([0.0, 4.0]), 0.5)
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(logits=LOGITS), components), obs=Y[i])


def global_switch(rows: int | None = None) -> None:
    """One discrete variable for all rows."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    z = pyro.sample("z", dist.Bernoulli(0.2), infer=ENUM)
    with pyro.plate("rows", len(Y)):
        pyro.sample("y", dist.Normal(mu + 4.0 * z, 2.0), obs=Y)


def global_summed(rows: int | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    each = dist.Normal(mu[..., None, None] + torch.tensor([0.0, 4.0])[:, None], 2.0).log_prob(Y).sum(-1)
    pyro.factor("y", (LOGITS + each).logsumexp(-1))


def two_plates(rows: int | None = None) -> None:
    """A discrete variable for each group and each of its rows, some of which are masked."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    mask = torch.tensor([[True, True], [True, False], [True, True], [False, True]])
    with pyro.plate("groups", 4, dim=-2, subsample_size=rows) as i:
        a = pyro.sample("a", dist.Bernoulli(0.2), infer=ENUM)
        with pyro.plate("members", 2, dim=-1), poutine.mask(mask=mask[i]):
            b = pyro.sample("b", dist.Bernoulli(0.5), infer=ENUM)
            pyro.sample("y", dist.Normal(mu + 2.0 * a + 2.0 * b, 1.0), obs=Y.reshape(4, 2)[i])


def two_plates_summed(rows: int | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    mask = torch.tensor([[True, True], [True, False], [True, True], [False, True]])
    shift = torch.tensor([[0.0, 2.0], [2.0, 4.0]])  # by a, b
    score = dist.Normal(mu[..., None, None, None, None] + shift, 1.0).log_prob(Y.reshape(4, 2, 1, 1))
    score = (score + torch.tensor(0.5).log()).logsumexp(-1)  # groups, members, a
    score = torch.where(mask[..., None], score, 0.0).sum(-2)
    pyro.factor("y", (LOGITS + score).logsumexp(-1).sum(-1))


def chain(rows: int | None = None) -> None:
    """A hidden Markov model."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    stay = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    z: Any = 0
    for t in pyro.markov(range(4)):
        z = pyro.sample(f"z{t}", dist.Categorical(stay[z]), infer=ENUM)
        pyro.sample(f"y{t}", dist.Normal(mu + 4.0 * z, 0.5), obs=Y[t])


def chain_summed(rows: int | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    stay = torch.tensor([[0.9, 0.1], [0.3, 0.7]]).log()
    forward: Any = stay[0]
    for t in range(4):
        forward = forward if t == 0 else (forward[..., None] + stay).logsumexp(-2)
        forward = forward + dist.Normal(mu[..., None] + torch.tensor([0.0, 4.0]), 0.5).log_prob(Y[t])
    pyro.factor("y", forward.logsumexp(-1))


PAIRS = {
    "mixture": (mixture, summed, 3),
    "global": (global_switch, global_summed, None),
    "two plates": (two_plates, two_plates_summed, 3),
    "chain": (chain, chain_summed, None),
}


def density_of(model: Any, values: Tensor, *args: Any) -> tuple[LogJoint, Tensor]:
    joint = LogJoint(Call(model, args), poutine.trace(model).get_trace(*args))
    shaped = {"mu": values.reshape(-1, *(1,) * joint.nesting)}
    return joint, joint.settle(shaped)(shaped)


@pytest.mark.parametrize(("model", "by_hand", "rows"), PAIRS.values(), ids=PAIRS)
def test_sums_over_discrete_sites_are_exact(model: Any, by_hand: Any, rows: int | None) -> None:
    values = torch.tensor([-1.0, 0.5, 1.0, 3.0, 8.0])
    _, expected = density_of(by_hand, values)
    for size in {None, rows}:
        joint, found = density_of(model, values, size)
        assert (joint.enumerated, joint.is_random, joint.partial) == (True, False, "")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_discrete_sites_that_do_not_broadcast_are_summed_by_a_map_over_draws() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(Y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2), infer=ENUM)
            pyro.sample("y", dist.Normal(mu[z], 1.0), obs=Y)

    joint = LogJoint(Call(model), poutine.trace(model).get_trace())
    values = torch.randn(3, 2)
    found = joint.settle({"mu": values.reshape(3, 1, 1, 1, 2)})({"mu": values.reshape(3, 1, 1, 1, 2)})
    each = dist.Normal(values[:, :, None], 1.0).log_prob(Y) + torch.tensor(0.5).log()
    expected = each.logsumexp(1).sum(-1) + dist.Normal(0.0, 1.0).log_prob(values).sum(-1)
    assert (joint.broadcasts, joint.is_vectorised) == (False, True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def truth() -> tuple[float, float]:
    """Posterior mean and deviation of `mu` in `mixture`."""
    grid = torch.linspace(-3, 8, 2001)
    weights = density_of(summed, grid)[1].softmax(0)
    mean = float((weights * grid).sum())
    return mean, float((weights * (grid - mean) ** 2).sum() ** 0.5)


# -- fits and verdicts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "annotated"), [(0, True), (1, False)])
def test_a_mixture_is_fitted_with_its_discrete_sites_summed_out(seed: int, annotated: bool) -> None:
    pyro.set_rng_seed(seed)

    @config_enumerate
    def by_default() -> None:
        poutine.infer_config(mixture, config_fn=lambda site: {})()

    model = mixture if annotated else by_default
    guide = AutoIAF(poutine.block(model, hide=["z"]), **SMALL)
    fit = fit_guide(model, guide, steps=20, **QUICK)
    mean, deviation = truth()
    draws = guide.rsample((4000,))["mu"].detach()
    assert float(draws.mean()) == pytest.approx(mean, abs=0.3 * deviation)
    assert float(draws.std()) == pytest.approx(deviation, rel=0.25)
    assert fit.diagnosis.elbo == pytest.approx(diagnose(summed, guide).elbo, abs=0.02)
    assert fit.diagnosis.can_be_reweighted


def test_every_scoring_function_sums_out_discrete_sites() -> None:
    guide = AutoIAF(poutine.block(mixture, hide=["z"]), **SMALL).setup()
    mean, deviation = truth()
    for size in (None, 3):
        draws = reweight(mixture, guide, size, num_samples=4000)["mu"]
        assert float(draws.mean()) == pytest.approx(mean, abs=0.1 * deviation)
        assert diagnose(mixture, guide, size).elbo == pytest.approx(diagnose(summed, guide).elbo, abs=0.02)
    data = to_arviz(mixture, guide, num_samples=100)
    assert set(data.posterior) == {"mu"}
    assert not hasattr(data, "log_likelihood")  # rows share the site that is summed out
    noise = {"AutoIAF_shared_latent": torch.zeros(1)}
    mcmc = MCMC(NUTS(neutra(mixture, guide), max_tree_depth=3), num_samples=40, warmup_steps=10, disable_progbar=True)
    mcmc.run()
    assert set(mcmc.get_samples()) == noise.keys()
    assert float(guide.sites_of(mcmc.get_samples()["AutoIAF_shared_latent"])["mu"].mean()) == pytest.approx(
        mean, abs=deviation
    )
    warped = neutra(partial(mixture, 3), guide)
    found = poutine.trace(poutine.condition(warped, noise)).get_trace().log_prob_sum()
    expected = poutine.trace(poutine.condition(neutra(summed, guide), noise)).get_trace().log_prob_sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("make", GUIDES)
def test_the_start_is_that_of_the_marginalised_model(make: Any) -> None:
    whole = make(summed, **SMALL).setup()
    for hide in ({"hide": ["z"]}, {"expose": ["mu"]}):
        blocked = make(poutine.block(mixture, **hide), **SMALL).setup()
        noise = torch.tensor([[-1.0], [0.0], [1.0]])
        for left, right in zip(blocked.sites_of(noise)["mu"], whole.sites_of(noise)["mu"], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


def test_guides_of_pyro_are_fitted_and_judged() -> None:
    guide = AutoNormal(poutine.block(mixture, hide=["z"]))
    fit = fit_guide(mixture, guide, steps=150, learning_rate=0.1, **QUICK)
    mean, deviation = truth()
    assert float(guide.median()["mu"]) == pytest.approx(mean, abs=deviation)
    assert fit.diagnosis.elbo <= diagnose(summed, AutoIAF(summed, **SMALL)).elbo + 0.05


# -- the objective -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorised", [True, False])
def test_the_path_gradient_has_the_bound_of_enumeration(vectorised: bool) -> None:
    guide = AutoIAF(poutine.block(mixture, hide=["z"]), **SMALL).setup()
    found = []
    for model, objective in ((mixture, TracePath_ELBO), (mixture, TraceEnum_ELBO), (summed, TracePath_ELBO)):
        pyro.set_rng_seed(3)
        elbo = objective(num_particles=5, vectorize_particles=vectorised, max_plate_nesting=1)
        loss = elbo.loss(model, guide)
        pyro.set_rng_seed(3)
        assert elbo.loss_and_grads(model, guide) == pytest.approx(loss, abs=1e-3)
        gradient = torch.cat([parameter.grad.flatten() for parameter in guide.parameters()])
        guide.zero_grad()
        found.append((loss, gradient))
    assert [loss for loss, _ in found] == pytest.approx([found[0][0]] * 3, abs=1e-3)
    torch.testing.assert_close(found[0][1], found[2][1], rtol=1e-3, atol=1e-3)


def test_one_objective_serves_models_with_and_without_discrete_sites() -> None:
    guide, elbo = AutoIAF(summed, **SMALL).setup(), TracePath_ELBO()
    losses = []
    for model in (summed, mixture, summed):
        pyro.set_rng_seed(2)
        losses.append(SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), elbo).step())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)


# -- draws that no guide has -------------------------------------------------------------------------------------------

Z = dist.Bernoulli(0.2)


def hides_inside() -> None:
    with poutine.block(hide=["z"]):
        mixture()


def hides_behind_a_lambda() -> None:
    (lambda: poutine.block(mixture, expose=["mu", "y", "rows"])())()


def hides_a_normal() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with poutine.block():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu + z, 1.0), obs=torch.tensor(0.3))


HIDDEN = (poutine.block(mixture, hide=["z"]), poutine.block(mixture, expose=["mu"]), hides_inside, hides_a_normal)


@pytest.mark.parametrize("model", [*HIDDEN, hides_behind_a_lambda])
def test_a_site_that_is_hidden_and_drawn_is_refused_by_name(model: Any) -> None:
    guide = AutoIAF(model, **SMALL)
    message = r"expected a model that draws only the sites of its guide, got draws of the hidden site z: .*block"
    with pytest.raises(ValueError, match=f"fit_guide {message}"):
        fit_guide(model, guide, steps=5, **QUICK)
    for function in (diagnose, reweight, to_arviz):
        with pytest.raises(ValueError, match=f"{function.__name__} {message}"):
            function(model, guide)
    with pytest.raises(ValueError, match=f"neutra {message}") as raised:
        poutine.trace(neutra(model, guide)).get_trace()
    assert "\n" not in str(raised.value)


DROPOUT = nn.Dropout(0.5)
RANDOM = {
    "torch": lambda: torch.randn(()),
    "numpy": lambda: float(np.random.randn()),
    "python": lambda: random.gauss(0.0, 1.0),
    "a rare event": lambda: float(torch.rand(()) < 0.5),
    "a distribution": lambda: torch.distributions.Normal(0.0, 1.0).sample(),
    "dropout": lambda: DROPOUT(torch.ones(3)).sum(),
}


@pytest.mark.parametrize("draw", RANDOM.values(), ids=RANDOM)
def test_other_random_numbers_in_a_model_are_refused(draw: Any) -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        pyro.sample("y", dist.Normal(mu + draw(), 1.0), obs=torch.tensor(0.3))

    with pytest.raises(ValueError, match="fit_guide expected a model whose density depends on its sites only"):
        fit_guide(model, AutoIAF(model, **SMALL), steps=5, **QUICK)


def test_random_numbers_without_effect_are_accepted() -> None:
    """Such as those of a parameter's initial value."""

    def model() -> None:
        loc = pyro.param("loc", torch.randn(()))
        mu = pyro.sample("mu", dist.Normal(loc, 5.0))
        pyro.deterministic("prediction", mu + torch.randn(()))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(0.3))

    assert fit_guide(model, AutoIAF(model, **SMALL), steps=5, **QUICK).diagnosis.ess > 5000


def test_a_discrete_site_that_is_not_enumerated_is_refused_by_name() -> None:
    def model(how: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        z = pyro.sample("z", Z, infer=how)
        pyro.sample("y", dist.Normal(mu + z, 1.0), obs=torch.tensor(0.3))

    for how in ({}, {"enumerate": "sequential"}, {"enumerate": "parallel", "num_samples": 10}):
        guide = AutoIAF(poutine.block(model, hide=["z"]), **SMALL)
        with pytest.raises(ValueError, match=r"expected a guide of every latent site, got none of z: .*enumerate"):
            fit_guide(model, guide, how, steps=5, **QUICK)


def test_a_guide_of_the_discrete_site_is_weighed_with_it() -> None:
    def guide() -> None:
        mu = pyro.sample("mu", dist.Normal(1.0, 0.2))
        with pyro.plate("rows", len(Y)):
            pyro.sample("z", dist.Bernoulli(logits=16 * (Y - mu - 2) + LOGITS[1] - LOGITS[0]))

    found = diagnose(mixture, guide, num_samples=2000)
    expected = diagnose(summed, lambda: pyro.sample("mu", dist.Normal(1.0, 0.2)), num_samples=2000)
    assert found.elbo == pytest.approx(expected.elbo, abs=4 * (found.elbo_se + expected.elbo_se))


def test_different_scales_of_summed_sites_are_refused() -> None:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        z = pyro.sample("z", Z, infer=ENUM)
        with pyro.plate("rows", len(Y), subsample_size=3) as i:
            pyro.sample("y", dist.Normal(mu + z, 1.0), obs=Y[i])

    guide = AutoIAF(poutine.block(model, hide=["z"]), init_scale=1.0, **SMALL)
    with pytest.raises(
        ValueError, match=r"one scale for all sites that depend on a discrete one, got 1 at z, 2\.66667 at y"
    ):
        fit_guide(model, guide, steps=5, **QUICK)


def test_block_handlers_around_a_model_are_removed_and_others_kept() -> None:
    model = poutine.block(poutine.scale(poutine.block(mixture, hide=["z"]), scale=2.0), expose=["mu"])
    trace: Any = poutine.trace(without_blocks(model)).get_trace()
    assert {"mu", "z", "y"} <= trace.nodes.keys()
    assert trace.nodes["y"]["scale"] == 2.0
    bound = partial(mixture, 3)
    assert without_blocks(bound) is bound
    assert without_blocks(mixture) is mixture


def test_a_guide_in_a_guide_list_is_initialised_as_usual() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(0.3))

    guide = AutoGuideList(model)
    guide.append(AutoIAF(poutine.block(model, expose=["a"]), **SMALL))
    guide.append(AutoNormal(poutine.block(model, hide=["a"])))
    loss = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert loss == pytest.approx(2.0, abs=10)
    assert fit_guide(model, guide, steps=5, **QUICK).diagnosis.elbo < 0
