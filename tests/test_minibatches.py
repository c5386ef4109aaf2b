"""Models whose plates subsample: all rows are scored, or a message says why not."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_maf.infer import AutoIAF, diagnose, fit_guide, neutra, reweight, to_arviz
from pyro_maf.infer.fitting import fit_guide as guide_fitting
from pyro_maf.infer.models.log_joint import LogJoint
from pyro_maf.infer.models.model import Call
from tests.posteriors import GUIDES, SMALL, steps

pytestmark = pytest.mark.usefixtures("fresh")
QUICK: dict[str, Any] = {"steps": 5, "num_particles": 2, "progress": False}
TABLE = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))


# -- models that subsample n and m of their rows, or none --------------------------------------------------------------


def rows(n: int | None = None, m: int | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 7, subsample_size=n) as i:
        pyro.sample("y", dist.Normal(loc, 1.0), obs=TABLE[i, 0])


def nested(n: int | None = None, m: int | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 7, subsample_size=n, dim=-2) as i:
        pyro.sample("each", dist.Normal(loc, 2.0), obs=TABLE[i, :1])
        with pyro.plate("columns", 5, subsample_size=m, dim=-1) as j:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=TABLE[i][:, j])


def apart(n: int | None = None, m: int | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("whole", dist.Normal(loc, 3.0), obs=torch.tensor(0.5))
    with pyro.plate("rows", 7, subsample_size=n) as i:
        pyro.sample("x", dist.Normal(loc, 1.0), obs=TABLE[i, 0])
    with pyro.plate("columns", 5, subsample_size=m) as j:
        pyro.sample("y", dist.Normal(loc, 2.0), obs=TABLE[0, j])


def crossed(n: int | None = None, m: int | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    rows = pyro.plate("rows", 7, subsample_size=n, dim=-2)
    columns = pyro.plate("columns", 5, subsample_size=m, dim=-1)
    with rows as i:
        pyro.sample("x", dist.Normal(loc, 1.0), obs=TABLE[i, :1])
    with columns as j:
        pyro.sample("y", dist.Normal(loc, 2.0), obs=TABLE[0, j])
    with rows, columns:
        pyro.factor("both", loc * TABLE[i][:, j])


def sequential(n: int | None = None, m: int | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    for i in pyro.plate("rows", 7, subsample_size=n):
        with pyro.plate(f"columns {i}", 5, subsample_size=None):
            pyro.sample(f"y {i}", dist.Normal(loc, 1.0), obs=TABLE[int(i)])


def by_hand(n: int | None = None, m: int | None = None) -> None:
    """A model that subsamples by `pyro.subsample`, numpy and a factor."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 7, subsample_size=n):
        y = pyro.subsample(TABLE, event_dim=1)
        pyro.factor("y", dist.Normal(loc, 1.0).log_prob(y.select(-1, 0)))
    with pyro.plate("columns", 5, subsample_size=m) as j:
        pyro.sample("z", dist.Normal(loc, 2.0), obs=torch.as_tensor(TABLE[0].numpy()[j.numpy()]))


def by_mask(n: int | None = None, m: int | None = None) -> None:
    """A model that subsamples by a mask, in the order of the data."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 7, subsample_size=n) as i:
        pyro.sample("y", dist.Normal(loc, 1.0), obs=TABLE[torch.isin(torch.arange(7), i), 0])


MODELS = (rows, nested, apart, crossed, sequential, by_hand, by_mask)


def joint_of(model: Any, values: dict[str, Tensor]) -> LogJoint:
    with pyro.poutine.block():
        example = poutine.trace(model).get_trace()
    return LogJoint(Call(model), example).settle(values)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
@pytest.mark.parametrize(("n", "m"), [(1, 5), (3, 2), (2, 4), (6, 3), (7, 5)])
def test_minibatches_add_up_to_all_rows(model: Any, n: int, m: int) -> None:
    values = {"loc": torch.randn(4).reshape(4, *(1,) * (4 if model in (nested, crossed) else 3))}
    whole, joint = joint_of(model, values), joint_of(partial(model, n, m), values)
    assert (joint.partial, joint.is_random, joint.is_vectorised) == ("", False, True)
    torch.testing.assert_close(joint(values), whole(values), rtol=1e-5, atol=1e-5)


def test_independent_plates_subsample_in_parallel() -> None:
    joint = joint_of(partial(apart, 1, 1), {"loc": torch.randn(2, 1, 1, 1)})
    assert len(list(joint._minibatches)) == 7


def test_a_sample_of_minibatches_represents_the_rest() -> None:
    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 100, subsample_size=3) as i:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.ones(100)[i])

    values = {"loc": torch.randn(4, 1, 1, 1)}
    few = LogJoint(Call(model), poutine.trace(model).get_trace(), most_minibatches=2).settle(values)
    torch.testing.assert_close(few(values), joint_of(model, values)(values), rtol=1e-5, atol=1e-4)


# -- the verdict -------------------------------------------------------------------------------------------------------


def of_rows(y: Tensor, size: int | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y), subsample_size=size) as i:
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y[i])


def exact(y: Tensor, size: int | None = None) -> None:
    """The posterior of `of_rows`."""
    pyro.sample("loc", dist.Normal(y.sum() / (1 + len(y)), (1 + len(y)) ** -0.5))


@pytest.mark.parametrize("seed", range(3))
def test_the_exact_posterior_is_good_whatever_the_minibatch(seed: int) -> None:
    pyro.set_rng_seed(seed)
    y = 3 + torch.randn(50)
    covariance = torch.eye(50) + torch.ones(50, 50)
    evidence = float(torch.distributions.MultivariateNormal(torch.zeros(50), covariance).log_prob(y))
    found = diagnose(of_rows, exact, y, 7, num_samples=1000)
    assert found.ess > 999
    assert "is good" in found.verdict
    assert found.elbo == pytest.approx(evidence, abs=2e-3)
    draws = reweight(of_rows, exact, y, 7, num_samples=1000)["loc"]
    assert float(draws.mean()) == pytest.approx(float(y.sum() / 51), abs=0.02)


def test_a_fit_on_minibatches_ends_with_a_verdict_about_all_rows() -> None:
    y = 3 + torch.randn(50)
    fit = fit_guide(of_rows, AutoIAF(of_rows, **SMALL), y, 10, **QUICK)
    assert fit.diagnosis.ess > 9900
    assert fit.diagnosis.elbo == pytest.approx(diagnose(of_rows, fit.guide, y).elbo, abs=0.01)


def test_neutra_on_minibatches_has_the_density_of_all_rows() -> None:
    y = 3 + torch.randn(20)
    guide = AutoIAF(of_rows, **SMALL).setup(y)
    noise = torch.randn(1)
    found = []
    for size in (None, 7, 7):
        warped = neutra(partial(of_rows, size=size), guide)
        data = {"AutoIAF_shared_latent": noise}
        found.append(poutine.trace(poutine.condition(warped, data)).get_trace(y).log_prob_sum())
    torch.testing.assert_close(found[1:], [found[0], found[0]], rtol=1e-5, atol=1e-4)
    mcmc = MCMC(NUTS(warped), num_samples=30, warmup_steps=10, disable_progbar=True)
    mcmc.run(y)
    draws = warped.draws(mcmc.get_samples())["loc"]
    assert float(draws.mean()) == pytest.approx(float(y.sum() / 21), abs=0.2)


OUTSIDE: dict[str, tuple[Any, str]] = {
    "handed": (
        lambda i: pyro.plate("rows", 40, subsample=torch.arange(5)),
        r"plate rows gets 5 of its 40 rows as subsample=",
    ),
    "not looked at": (
        lambda i: pyro.plate("rows", 40, subsample_size=5),
        r"plate rows draws 5 of its 40 rows, but the model ignores which",
    ),
}


@pytest.mark.parametrize(("plate", "reason"), OUTSIDE.values(), ids=OUTSIDE)
def test_data_that_are_already_a_minibatch_get_no_verdict(plate: Any, reason: str) -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with plate(0):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    y = torch.randn(5)
    guide = AutoIAF(model, **SMALL)
    found = fit_guide(model, guide, y, **QUICK).diagnosis
    assert math.isnan(found.k_hat)
    assert found.verdict.startswith(f"No verdict: {reason}")
    assert repr(found) == f"Diagnosis({found.verdict})"
    assert not found.can_be_reweighted
    for function in (reweight, to_arviz):
        with pytest.raises(ValueError, match=f"{function.__name__} cannot score the model as a whole: {reason}"):
            function(model, guide, y)
    with pytest.raises(ValueError, match=f"neutra cannot score the model as a whole: {reason}"):
        neutra(model, guide)(y)


def test_a_plate_outside_the_model_gets_no_verdict() -> None:
    plate = pyro.plate("rows", 40, subsample_size=5)

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with plate as i:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[i])

    assert "plate rows is outside the model" in diagnose(model, exact, torch.randn(40)).verdict


def test_minibatches_of_varying_size_get_no_verdict() -> None:
    sizes = iter(range(1, 100))

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 200, subsample_size=next(sizes)) as i:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[i])

    with pytest.raises(ValueError, match="differs from run to run"):
        diagnose(model, lambda y: pyro.sample("loc", dist.Normal(0.0, 1.0)), torch.randn(200))


# -- latent variables of rows ------------------------------------------------------------------------------------------


def local(y: Tensor, size: int | None = 4) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
    with plates(y, size) as i:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), scale), obs=y[i])


def plates(y: Tensor, size: int | None = 4) -> Any:
    return pyro.plate("groups", len(y), subsample_size=size)


@pytest.mark.parametrize("make", GUIDES)
def test_latent_variables_of_a_minibatch_are_refused_with_what_to_do(make: Any) -> None:
    message = rf"{make.__name__} expected .*got z in plate groups with 4 of its 10 rows: pass encoder=.*create_plates="
    with pytest.raises(ValueError, match=message):
        make(local, **SMALL).setup(torch.randn(10))


@pytest.mark.parametrize("make", GUIDES)
def test_created_plates_make_latent_variables_of_all_rows(make: Any) -> None:
    y = torch.linspace(-6, 6, 10)
    guide = make(local, create_plates=plates, **SMALL)
    steps(Trace_ELBO(num_particles=2, vectorize_particles=True), local, guide, 3, y)
    assert guide.latent_dim == 21
    assert guide.median(y)["z"].shape == (10, 2)
    torch.testing.assert_close(guide.median(y)["z"].sum(-1), y * 18 / 19, atol=0.7, rtol=0)
    assert guide.rsample((3,), y)["z"].shape == (3, 10, 2)
    assert guide.log_prob(guide.rsample((3,), y), y).shape == (3,)
    trace: Any = poutine.trace(guide).get_trace(y)
    assert trace.nodes["z"]["value"].shape == (4, 2)
    assert diagnose(local, guide, y, num_samples=1000).elbo == pytest.approx(
        diagnose(partial(local, size=None), make_full(guide), y, num_samples=1000).elbo, abs=0.2
    )


def make_full(guide: Any) -> Any:
    """A guide of all rows at once with the draws of a minibatch guide."""

    def full(y: Tensor) -> None:
        latent = pyro.sample("latent", guide.get_posterior(y), infer={"is_auxiliary": True})
        for part, unconstrained in guide.latents.split(latent):
            value, log_det = guide.latents.mapped(part, unconstrained)
            name, event_dim = part.site["name"], part.site["fn"].event_dim
            with pyro.plate("groups", 10) if name == "z" else pyro.poutine.messenger.Messenger():
                pyro.sample(name, dist.Delta(value, log_density=-log_det, event_dim=event_dim))

    return full


def test_the_bound_of_minibatches_stays_below_the_evidence() -> None:
    y = torch.linspace(-3, 3, 12)

    def model(y: Tensor) -> None:
        with plates(y) as i:
            z = pyro.sample("z", dist.Normal(0.0, 3.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])

    evidence = float(dist.Normal(0.0, 10**0.5).log_prob(y).sum())
    fit = fit_guide(model, AutoIAF(model, create_plates=plates, **SMALL), y, **QUICK)
    assert evidence - 0.1 < fit.diagnosis.elbo < evidence + 0.01
    torch.testing.assert_close(fit.guide.median(y)["z"], 0.9 * y, atol=0.3, rtol=0)


def test_a_guide_that_draws_for_a_minibatch_alone_gets_no_verdict() -> None:
    y = torch.randn(10)
    network = nn.Linear(1, 2)

    def model(y: Tensor) -> None:
        with plates(y) as i:
            z = pyro.sample("z", dist.Normal(0.0, 3.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])

    amortised = AutoIAF(model, encoder=lambda y: network(y[:4, None]), create_plates=plates, **SMALL)
    for guide in (amortised, AutoNormal(model, create_plates=plates)):
        found = fit_guide(model, guide, y, **QUICK).diagnosis
        assert "latent site z is drawn for 4 of the 10 rows of plate groups" in found.verdict


def test_a_long_diagnosis_weighs_fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide_fitting, "MOST_DIAGNOSED", 5 * 15 * 2_000)  # five runs, each with 15 values and indices
    fit = fit_guide(of_rows, AutoIAF(of_rows, **SMALL), torch.randn(35), 7, **QUICK)
    assert fit.diagnosis.num_samples == pytest.approx(2_000, rel=0.2)
