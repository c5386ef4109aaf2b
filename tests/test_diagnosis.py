"""Diagnosis of guides: k-hat, verdicts, reweighting, and conversion to arviz."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_maf.infer import AutoIAF, Diagnosis, diagnose, fit_guide, neutra, reweight, to_arviz
from pyro_maf.infer.diagnosis.pareto import smoothed_log_weights
from tests.posteriors import GUIDES, SMALL, counting, regression

pytestmark = pytest.mark.usefixtures("fresh")


def standard(size: int = 3) -> None:
    pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))


def normal(loc: float = 0.0, scale: float = 1.0, size: int = 3) -> Any:
    return lambda: pyro.sample("z", dist.Normal(torch.full((size,), loc), scale).to_event(1))


@pytest.mark.parametrize("make", GUIDES)
def test_a_guide_that_is_the_posterior_is_good(make: Any) -> None:
    known = regression()
    found = diagnose(known.model, make(known.model, **SMALL), num_samples=4000)
    assert found.k_hat < 0.5
    assert found.ess > 3990
    assert found.elbo_se < 1e-3
    assert (found.num_samples, found.unscored) == (4000, 0)
    assert "is good" in found.verdict


def test_the_bound_is_the_evidence_where_the_guide_is_the_posterior() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.5))

    found = diagnose(model, lambda: pyro.sample("z", dist.Normal(0.75, 0.5**0.5)))
    assert found.elbo == pytest.approx(float(dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.5))), abs=1e-5)


def test_the_bound_and_its_error_are_those_of_the_draws() -> None:
    """KL(N(0.5, 1) || N(0, 1)) in three dimensions, and the variance of log p/q, 3 * 0.5^2."""
    found = diagnose(standard, normal(0.5))
    assert found.elbo == pytest.approx(-3 * 0.125, abs=4 * found.elbo_se)
    assert found.elbo_se == pytest.approx((3 * 0.25 / 10_000) ** 0.5, rel=0.05)
    assert found.ess == pytest.approx(10_000 * math.exp(-0.75), rel=0.1)


def test_a_guide_that_is_far_too_narrow_is_worthless() -> None:
    found = diagnose(standard, normal(scale=0.2))
    assert found.k_hat > 0.7
    assert found.ess < 2000
    assert "poor" in found.verdict or "worthless" in found.verdict


@pytest.mark.parametrize(
    ("k_hat", "ess", "unscored", "words"),
    [
        (-math.inf, 1000.0, 0, "is good"),
        (0.49, 980.0, 0, "is good"),
        (0.49, 100.0, 0, "is usable: 100 % of the probability is misplaced"),
        (0.5, 900.0, 0, "is usable: 17 % of the probability is misplaced"),
        (0.49, 99.0, 0, "only 99 of 1000 draws count"),
        (0.65, 10.0, 0, "only 10 of 1000 draws count"),
        (0.65, 995.0, 0, "weights hardly differ, so the guide is good"),
        (1.97, 980.0, 0, "weights hardly differ, so the guide is good"),
        (0.7, 10.0, 0, "is poor"),
        (1.1, 800.0, 0, "is poor"),
        (1.0, 10.0, 0, "is worthless"),
        (math.inf, 10.0, 0, "is worthless"),
        (0.1, 10.0, 501, "could not score most draws"),
    ],
)
def test_verdicts_are_sentences(k_hat: float, ess: float, unscored: int, words: str) -> None:
    found = Diagnosis(k_hat=k_hat, ess=ess, elbo=-1.0, elbo_se=0.1, num_samples=1000, unscored=unscored)
    assert words in found.verdict
    assert found.verdict.endswith(".")
    assert found.verdict in repr(found)
    assert (f"{unscored} draws could not be scored" in repr(found)) == (unscored > 0)


def test_a_good_verdict_says_that_weights_hardly_differ_only_if_they_do() -> None:
    found = Diagnosis(k_hat=0.54, ess=800.0, elbo=-1.0, elbo_se=0.1, num_samples=1000, misplaced=0.071)
    assert found.grade == "good"
    assert found.verdict.startswith("The guide is good: 7.1 % of the probability is misplaced, so that its draws")
    assert "usable" not in found.verdict


def test_k_hat_of_weights_that_hardly_differ_is_explained_rather_than_shown() -> None:
    found = Diagnosis(k_hat=1.08, ess=9978.0, elbo=-1.0, elbo_se=0.1, num_samples=10_000, misplaced=0.014)
    assert found.grade == "good"
    assert "99.8 % of the draws are effective and 1.4 % of the probability is misplaced" in found.verdict
    assert "k-hat 1.08 is the shape of the tail of these weights, not its size" in found.verdict
    assert repr(found).count("k-hat") == 1  # in the verdict, but not among the figures
    assert repr(replace(found, k_hat=0.3)).count("k-hat 0.30") == 2


@pytest.mark.parametrize(
    ("k_hat", "ess", "expected"), [(0.69, 10.0, True), (0.7, 940.0, False), (0.9, 975.0, True), (math.inf, 1.0, False)]
)
def test_weights_that_hardly_differ_need_no_light_tail_to_reweight_by(k_hat: float, ess: float, expected: bool) -> None:
    found = Diagnosis(k_hat=k_hat, ess=ess, elbo=-1.0, elbo_se=0.1, num_samples=1000, unscored=0)
    assert found.can_be_reweighted is expected


def test_log_evidence_and_misplaced_probability_are_those_of_the_model() -> None:
    """Normals half a standard deviation apart have a total variation distance of 2 Phi(0.25) - 1."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.5))

    pyro.set_rng_seed(0)
    found = diagnose(model, lambda: pyro.sample("z", dist.Normal(0.75 + 0.5 * 0.5**0.5, 0.5**0.5)))
    evidence = float(dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.5)))
    assert abs(found.log_evidence - evidence) < 4 * found.log_evidence_se < 0.03
    assert found.elbo < found.log_evidence
    assert found.misplaced == pytest.approx(2 * float(dist.Normal(0.0, 1.0).cdf(torch.tensor(0.25))) - 1, abs=0.02)
    assert found.grade == "usable"
    assert f"log evidence {found.log_evidence:.3f}" in repr(found)


def test_the_evidence_counts_draws_that_cannot_be_scored_as_outside_of_the_support() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("half", torch.where(z > 0, 0.0, -torch.inf))

    pyro.set_rng_seed(0)
    found = diagnose(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
    assert found.log_evidence == pytest.approx(math.log(0.5), abs=0.05)
    assert found.misplaced == pytest.approx(0.5, abs=0.02)


def test_an_improper_posterior_is_reported(recwarn: pytest.WarningsRecorder) -> None:
    """Its draws diverge with equal weights, here to an ELBO of 8e36 nats."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", 0.6 * z[..., 0] ** 2)

    fit = fit_guide(model, AutoIAF(model, **SMALL), steps=200, progress=False)
    assert fit.diagnosis.grade == "none"
    assert fit.diagnosis.verdict.startswith("No verdict: the posterior seems to be improper")
    assert "effective" not in repr(fit)
    assert not [each for each in recwarn if "Encountered" in str(each.message)]


@pytest.mark.parametrize("where", [0.0, 1e5])
@pytest.mark.parametrize("heavy", [False, True])
def test_heavy_tails_and_data_far_away_are_not_improper(where: float, heavy: bool) -> None:
    prior = dist.Cauchy(0.0, 1.0) if heavy else dist.ImproperUniform(dist.constraints.real, (), ())

    def model() -> None:
        z = pyro.sample("z", prior)
        pyro.sample("y", dist.Normal(z, 3.0), obs=torch.tensor(where))

    found = diagnose(model, lambda: pyro.sample("z", dist.Normal(where, 3.0)))
    assert found.grade in ("good", "usable")


def test_the_error_of_k_hat_is_its_spread_between_sets_of_draws() -> None:
    """Ten thousand weights u^-0.4 of uniform u have a tail of shape 0.4."""
    pyro.set_rng_seed(0)
    shapes = torch.tensor([smoothed_log_weights(-0.4 * torch.rand(10_000).log())[1] for _ in range(30)])
    error = Diagnosis(k_hat=0.4, num_samples=10_000).k_hat_se
    assert float(shapes.mean()) == pytest.approx(0.4, abs=0.05)
    assert error == pytest.approx(float(shapes.std()), rel=0.4)


def test_a_wrong_guide_with_a_light_tail_is_not_called_good() -> None:
    """A normal that is too wide has bounded weights, though a classifier recognises three of five of its draws."""
    found = diagnose(standard, normal(scale=1.5))
    assert found.k_hat < 0.5
    assert found.grade == "usable"


def positive(raises: bool) -> Any:
    """A half-normal density with real support, whose negative values cannot be scored."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, z.sqrt(), validate_args=raises), obs=torch.tensor(0.5))

    return model


@pytest.mark.parametrize("raises", [True, False])
def test_draws_that_the_model_cannot_score_are_counted_and_left_out(raises: bool) -> None:
    pyro.set_rng_seed(2)

    def guide() -> None:
        pyro.sample("z", dist.Normal(1.0, 1.0))

    found = diagnose(positive(raises), guide, num_samples=400)
    assert found.unscored == pytest.approx(400 * 0.159, abs=30)
    assert math.isfinite(found.elbo)
    assert f"{found.unscored} draws could not be scored" in repr(found)
    draws = reweight(positive(raises), guide, num_samples=50)["z"]
    assert bool((draws > 0).all())


def test_a_guide_that_leaves_out_a_site_is_refused() -> None:
    def model() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    for name, function in {"diagnose": diagnose, "reweight": reweight, "to_arviz": to_arviz}.items():
        with pytest.raises(ValueError, match=rf"{name} expected a guide of every latent site, got none of b:"):
            function(model, lambda: pyro.sample("a", dist.Normal(0.0, 1.0)))


def test_a_guide_of_sites_that_the_model_does_not_have_is_refused() -> None:
    """Without their density in the model, the bound would exceed the evidence."""

    def larger(y: Tensor | None = None) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(0.01))
        pyro.sample("y", dist.Normal(loc, scale), obs=y)

    def smaller(y: Tensor) -> None:
        pyro.sample("y", dist.Normal(pyro.sample("loc", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    y = torch.tensor(0.5)
    of_other_model, of_other_arguments = AutoIAF(larger, **SMALL), AutoIAF(larger, **SMALL)
    of_other_model.setup(y)
    of_other_arguments.setup()
    for name, function in {"diagnose": diagnose, "reweight": reweight, "to_arviz": to_arviz}.items():
        with pytest.raises(ValueError, match=rf"{name} expected a guide of only .* latent sites, .* draws scale: "):
            function(smaller, of_other_model, y)
        with pytest.raises(ValueError, match=rf"{name} expected a guide of only .* latent sites, .* draws y: "):
            function(larger, of_other_arguments, y)
    for call in (lambda: fit_guide(smaller, of_other_model, y, steps=1), lambda: neutra(smaller, of_other_model)(y)):
        with pytest.raises(ValueError, match=r"expected a guide of only the model's latent sites"):
            call()


def test_rounding_of_a_large_likelihood_does_not_excuse_a_wrong_guide() -> None:
    """The density of a million rows is rounded by a few nats, which must not excuse a wrong guide."""
    pyro.set_rng_seed(3)
    y = torch.tensor([0.9, -1.1, 1.6, -1.4])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=250_000.0), pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide() -> None:
        pyro.sample("z", dist.Normal(7e-4, 1e-3))  # the posterior is N(0, 0.001)

    found = diagnose(model, guide)
    assert found.ess == pytest.approx(10_000 * math.exp(-0.49), rel=0.1)
    assert abs(float(reweight(model, guide)["z"].mean())) < 1.5e-4


def test_a_guide_of_data_of_another_size_is_refused_in_one_line() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    def indexed(y: Tensor) -> None:
        with pyro.plate("rows", len(y)) as rows:
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y[rows])

    guide = AutoIAF(model, **SMALL).setup(torch.zeros(7))
    for name, function in {"diagnose": diagnose, "reweight": reweight}.items():
        expected = (
            rf"^{name} expected a guide whose site z has the shape \(4,\), .* got \(7,\): make another guide .*\.$"
        )
        with pytest.raises(ValueError, match=expected):
            function(model, guide, torch.zeros(4))
        with pytest.raises(ValueError, match=expected):
            function(indexed, guide, torch.zeros(4))


ANGLES: dict[str, Any] = {
    "one": dist.VonMises(0.0, 1.0),
    "of a plate": dist.VonMises(0.0, 1.0).expand([3]).to_event(1),
    "two": dist.SineBivariateVonMises(*[torch.tensor(0.0)] * 2, *[torch.tensor(1.0)] * 2, torch.tensor(0.1)),
}


@pytest.mark.parametrize("prior", ANGLES.values(), ids=ANGLES)
def test_draws_over_many_turns_of_an_angle_get_no_verdict(prior: Any) -> None:
    """All turns have the same density, so the bound over n of them is too high by log n."""

    def model() -> None:
        pyro.sample("angle", prior)

    def guide(scale: float) -> Any:
        shape = prior.batch_shape + prior.event_shape
        return lambda: pyro.sample("angle", dist.Normal(torch.zeros(shape), scale).to_event(len(prior.event_shape)))

    found = diagnose(model, guide(100.0))
    assert found.reason.startswith("site angle is an angle, and the guide's draws take more than one turn of it")
    with pytest.raises(ValueError, match=r"reweight .* site angle is an angle, .* Uniform\(-pi, pi\)"):
        reweight(model, guide(100.0))
    assert diagnose(model, guide(0.3)).elbo < 0  # within one turn


def test_an_angle_of_one_turn_by_the_advice_has_the_right_bound() -> None:
    pyro.set_rng_seed(0)

    def model() -> None:
        angle = pyro.sample("angle", dist.Uniform(-math.pi, math.pi))
        pyro.factor("density", dist.VonMises(0.0, 1.0).log_prob(angle) + math.log(2 * math.pi))

    found = fit_guide(model, AutoIAF(model, **SMALL), steps=100, progress=False).diagnosis
    assert found.elbo == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize("count", [0, 99])
def test_too_few_draws_are_refused(count: int) -> None:
    for name, function in {"diagnose": diagnose, "to_arviz": to_arviz}.items():
        with pytest.raises(ValueError, match=f"{name} expected num_samples of at least 100, got {count}"):
            function(standard, normal(), num_samples=count)


# -- every kind of model -----------------------------------------------------------------------------------------------


def rows(y: Tensor, *, scale: float = 1.0) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 2, dim=-2), pyro.plate("rows", len(y), dim=-1):
        z = pyro.sample("z", dist.Normal(loc, scale))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y.expand(2, -1))


def test_plates_and_arguments_are_the_models() -> None:
    y = torch.tensor([0.5, -0.5, 1.0])
    guide = AutoNormal(rows)
    found = diagnose(rows, guide, y, scale=0.5, num_samples=500)
    assert math.isfinite(found.elbo)
    draws = reweight(rows, GUIDES[1](rows, **SMALL), y, scale=0.5, num_samples=200)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {"loc": (200,), "z": (200, 2, 3)}


def test_a_model_that_takes_no_batch_is_scored_all_the_same() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(1.0 if z[0] > 100 else 0.0, 1.0), obs=torch.tensor(0.0))

    found = diagnose(model, normal(0.5), num_samples=300)
    expected = -3 * 0.125 + float(dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0)))
    assert found.elbo == pytest.approx(expected, abs=4 * found.elbo_se)


def test_scales_and_masks_of_a_model_count() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2), poutine.scale(scale=3.0), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([1.0, 100.0]))

    found = diagnose(model, lambda: pyro.sample("z", dist.Normal(0.75, 0.5)))
    assert found.ess == pytest.approx(10_000, rel=1e-3)
    assert found.elbo_se < 1e-4


def test_a_guide_with_auxiliary_sites_is_weighed_by_its_joint_density() -> None:
    def guide() -> None:
        u = pyro.sample("u", dist.Normal(0.0, 0.6), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u / 0.6, log_density=math.log(0.6)))

    found = diagnose(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), guide)
    assert abs(found.elbo) < 1e-5


# -- reweighting -------------------------------------------------------------------------------------------------------


def test_reweighting_corrects_mean_and_deviation() -> None:
    pyro.set_rng_seed(4)
    draws = reweight(standard, normal(0.3, 1.2), num_samples=8000)["z"]
    assert draws.shape == (8000, 3)
    torch.testing.assert_close(draws.mean(0), torch.zeros(3), atol=0.04, rtol=0)
    torch.testing.assert_close(draws.std(0), torch.ones(3), atol=0.04, rtol=0)


def test_reweighting_a_hopeless_guide_warns() -> None:
    with pytest.warns(UserWarning, match="reweighting cannot correct this guide"):
        reweight(standard, normal(6.0, 0.2), num_samples=100)


def test_reweighting_does_not_warn_of_a_heavy_tail_without_weight() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("tail", 1e-4 * torch.exp(0.45 * z**2))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    assert diagnose(model, guide, num_samples=400).k_hat > 0.7
    assert reweight(model, guide, num_samples=100)["z"].shape == (100,)


def test_reweighting_needs_a_draw_that_can_be_scored() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, torch.where(z > 50, 1.0, torch.nan), validate_args=False), obs=torch.ones(()))

    with pytest.raises(ValueError, match="reweight found no draw of the guide that the model can score"):
        reweight(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), num_samples=100)


def test_reweighted_draws_come_in_random_order() -> None:
    draws = reweight(standard, normal(0.3, 1.2), num_samples=2000)["z"][:, 0]
    assert abs(float(torch.stack([draws[:-1], draws[1:]]).corrcoef()[0, 1])) < 0.1


# -- arviz -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*GUIDES, AutoNormal])
def test_draws_become_inference_data(make: Any) -> None:
    y = torch.tensor([0.5, -0.5, 1.0])
    guide = make(rows, **SMALL) if make in GUIDES else make(rows)
    data = to_arviz(rows, guide, y, num_samples=300)
    assert type(data).__name__ in ("InferenceData", "DataTree")
    assert {name: value.shape for name, value in data.posterior.items()} == {"loc": (1, 300), "z": (1, 300, 2, 3)}
    assert data.sample_stats["log_weight"].shape == (1, 300)
    assert float((2.718281828 ** data.sample_stats["log_weight"]).sum()) == pytest.approx(1.0, rel=1e-4)
    assert {"k_hat", "elbo", "verdict"} <= data.posterior.attrs.keys()
    density = dist.Normal(torch.tensor(data.posterior["z"].values), 1.0).log_prob(y.expand(2, -1))
    assert torch.allclose(torch.tensor(data.log_likelihood["y"].values), density, atol=1e-5)
    assert data.observed_data["y"].shape == (2, 3)


def in_python(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    shift = 1.0 if float(loc) > 0 else -1.0  # so the model is run for each draw
    pyro.factor("penalty", -loc.abs())
    pyro.deterministic("twice", 2 * loc)
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(loc, 1.0).mask(y > 0), obs=y)
        pyro.sample("zero", dist.Normal(shift * loc, 1.0).expand([3]), obs=torch.zeros(3))


def test_rows_of_models_that_do_not_broadcast_have_log_likelihoods_too() -> None:
    y = torch.tensor([0.5, -0.5, 1.0])
    data = to_arviz(in_python, AutoNormal(in_python), y, num_samples=100)
    loc = torch.tensor(data.posterior["loc"].values)[..., None]
    expected = dist.Normal(loc, 1.0).log_prob(y) * (y > 0)
    assert set(data.log_likelihood.data_vars) == set(data.observed_data.data_vars) == {"y", "zero"}
    assert torch.allclose(torch.tensor(data.log_likelihood["y"].values), expected, atol=1e-5)


def test_arviz_leaves_rows_out_by_the_draws_of_a_guide() -> None:
    import arviz

    pyro.set_rng_seed(0)
    y = torch.randn(40) + 1.0

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    data = to_arviz(model, lambda: pyro.sample("mean", dist.Normal(y.sum() / 41, 41**-0.5)))
    exact = dist.Normal((y.sum() - y) / 40, (1 + 1 / 40) ** 0.5).log_prob(y).sum()
    found = arviz.loo(data)
    elpd = found.elpd if hasattr(found, "elpd") else found.elpd_loo  # before arviz 1
    assert float(elpd) == pytest.approx(float(exact), abs=0.05)


def test_a_fresh_guide_of_a_skewed_posterior_says_how_good_it_is() -> None:
    found = diagnose(counting, GUIDES[1](counting, **SMALL))
    assert found.k_hat < 0.7
    assert found.num_samples == 100_000  # more draws than requested, since k-hat of 10,000 is near 0.5
    assert 50_000 < found.ess < 100_000


def test_weights_that_differ_by_hundreds_of_nats_are_judged_without_a_warning() -> None:
    log_weights, k_hat = smoothed_log_weights(100 * torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    assert k_hat > 1
    assert float(log_weights.exp().sum()) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(4))
def test_a_few_large_weights_do_not_decide_the_verdict(seed: int) -> None:
    """Its weights are equal except for a dozen, whose fitted tail shape reaches 5; below them it is 0.2 to 0.5."""
    prior, wide = dist.StudentT(1.5, 0.0, 1.0), dist.Normal(0.0, 1.5)
    pyro.set_rng_seed(seed)
    found = diagnose(lambda: pyro.sample("z", prior), lambda: pyro.sample("z", wide))
    grid = torch.linspace(-400.0, 400.0, 800_001, dtype=torch.float64)
    apart = (prior.log_prob(grid).exp() - wide.log_prob(grid).exp()).abs()
    assert found.k_hat > 1
    assert found.misplaced == pytest.approx(0.5 * float(torch.trapezoid(apart, grid)), abs=0.03)
    assert found.log_evidence == pytest.approx(0.0, abs=0.1)


def test_more_draws_decide_where_k_hat_is_within_its_error_of_the_cuts() -> None:
    """Weights exp(0.7 z) for exponential z have a tail of shape 0.7, exp(0.05 z) for a wider one 0.14."""

    def model() -> None:
        pyro.sample("z", dist.Exponential(0.3))

    def rival() -> None:
        pyro.sample("z", dist.Exponential(1.0))

    pyro.set_rng_seed(1)
    found = diagnose(model, rival)
    assert found.num_samples == 100_000
    assert found.k_hat == pytest.approx(0.7, abs=0.1)
    assert diagnose(model, lambda: pyro.sample("z", dist.Exponential(0.35))).num_samples == 10_000
