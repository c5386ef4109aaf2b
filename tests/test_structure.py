"""Partially centred coordinates for sites whose prior depends on other latent sites."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import Tensor
from torch.distributions import AffineTransform, ExpTransform, SigmoidTransform, biject_to

from pyro_maf.infer import AutoIAF, AutoRealNVP, TracePath_ELBO, diagnose, fit_guide, neutra, reweight
from pyro_maf.infer.models.location_scale import location_and_scale
from tests.posteriors import SMALL, bound, drawn

GROUPS = 6
ERRORS = torch.tensor([0.02, 0.02, 0.02, 20.0, 20.0, 20.0])
Y = torch.tensor([1.0, -0.5, 0.3, 2.0, -4.0, 1.0])


def hierarchy() -> None:
    """Three groups with precise data, best centred, and three with uninformative data."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(2.0)))
    with pyro.plate("groups", GROUPS):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=Y)


def funnel(size: int = 3) -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(size), (v / 2).exp()[..., None]).to_event(1))


def chain() -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    z: Any = 0.0
    for step in pyro.markov(range(4)):
        z = pyro.sample(f"z{step}", dist.StudentT(4.0, z, scale))
        pyro.sample(f"y{step}", dist.Normal(z, 0.5), obs=torch.tensor(float(step)))


def levels() -> None:
    """A model with scales of scales, masks, nested plates and positive sites."""
    top = pyro.sample("top", dist.Gamma(2.0, 2.0))
    with pyro.plate("outer", 3, dim=-2):
        scale = pyro.sample("scale", dist.HalfCauchy(top))
        rate = pyro.sample("rate", dist.Gamma(2.0, top).mask(torch.tensor(True)))
        size = pyro.sample("size", dist.LogNormal(rate.log(), 0.3))
        with pyro.plate("inner", 2, dim=-1):
            z = pyro.sample("z", dist.Laplace(size[..., None].expand(*size.shape, 3), scale[..., None]).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(3, 2, 3))


def processes() -> None:
    """Gaussian processes with latent kernels, real and positive, two of them in a plate."""
    size = pyro.sample("size", dist.LogNormal(0.0, torch.tensor(0.5)))[..., None, None]
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))[..., None]
    apart = (torch.arange(3.0)[:, None] - torch.arange(3.0)).square()
    kernel = size * (-apart / (1 + size)).exp() + 0.01 * torch.eye(3)
    f = pyro.sample("f", dist.MultivariateNormal(loc + torch.zeros(3), kernel).mask(True))
    with pyro.plate("outputs", 2):
        pyro.sample("g", dist.MultivariateStudentT(5.0, torch.zeros(3), torch.linalg.cholesky(kernel)))
    process = dist.MultivariateNormal(f, precision_matrix=torch.linalg.inv(kernel))
    pyro.sample("h", dist.TransformedDistribution(process, [AffineTransform(0.0, -2.0), ExpTransform()]))


def transformed() -> None:
    """Sites whose location and scale come from transforms of their distribution."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, torch.tensor(0.5)))
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    unit = dist.Normal(torch.zeros_like(loc), 1.0)
    pyro.sample("affine", dist.TransformedDistribution(unit, [AffineTransform(loc, -scale)]))
    pyro.sample("share", dist.TransformedDistribution(dist.Normal(loc, scale), [SigmoidTransform()]))
    steps = pyro.sample("steps", dist.Normal(0.0, scale[..., None]).expand([*scale.shape, 4]).to_event(1))
    with pyro.plate("rows", 2):
        pyro.sample("walk", dist.Laplace(steps.cumsum(-1)[..., 3], 1.0))


def shapes() -> None:
    """Positive sites and simplexes with latent concentrations."""
    shape = pyro.sample("shape", dist.LogNormal(0.0, torch.tensor(0.5)))
    with pyro.plate("rows", 2):
        pyro.sample("rate", dist.Gamma(shape, 2.0))
        pyro.sample("time", dist.InverseGamma(1 + shape, 2.0))
        pyro.sample("part", dist.Beta(shape, 3.0))
        pyro.sample("shares", dist.Dirichlet(shape[..., None] * torch.tensor([1.0, 2.0, 0.5])))


def schools() -> None:
    """Groups as a vector with a prior that does not broadcast over draws."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(2.0)))
    theta = pyro.sample("theta", dist.Normal(mu, tau).expand([GROUPS]).to_event(1))
    pyro.sample("y", dist.Normal(theta, ERRORS).to_event(1), obs=Y)


def mapped_process() -> None:
    """A process by products and entries that support a single draw only, after a plate."""
    size = pyro.sample("size", dist.LogNormal(0.0, torch.tensor(0.5)).expand([3]).to_event(1))
    with pyro.plate("loadings", 2):
        loading = pyro.sample("loading", dist.Normal(size.sum(), size[0]))
    factor = torch.eye(3) + torch.stack([0 * loading[0], *loading])[:, None] * torch.tensor([1.0, 0.0, 0.0])
    f = pyro.sample("f", dist.MultivariateNormal(size, scale_tril=size[:, None] * factor))
    pyro.sample("y", dist.Normal(f, 1.0).to_event(1), obs=torch.zeros(3))


MODELS: dict[str, tuple[Callable[[], None], list[str]]] = {
    "hierarchy": (hierarchy, ["theta"]),
    "funnel": (funnel, ["x"]),
    "chain": (chain, ["z0", "z1", "z2", "z3"]),
    "levels": (levels, ["scale", "rate", "size", "z"]),
    "processes": (processes, ["f", "g", "h"]),
    "transformed": (transformed, ["affine", "share", "steps", "walk"]),
    "shapes": (shapes, ["rate", "time", "part", "shares"]),
    "schools": (schools, ["theta"]),
    "mapped_process": (mapped_process, ["loading", "f"]),
}


def guide_of(model: Callable[..., Any], seed: int = 0, **options: Any) -> Any:
    """An initialised guide with random weights and degrees of centring."""
    pyro.set_rng_seed(seed)
    guide = AutoRealNVP(model, **(SMALL | options)).setup()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return guide


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_detected_automatically(name: str) -> None:
    model, names = MODELS[name]
    assert guide_of(model, init_scale=0.1).coordinates.names == names


CONCENTRATIONS = (
    dist.Gamma(0.7, 3.0),
    dist.InverseGamma(2.5, 0.2),
    dist.Beta(0.8, 3.0),
    dist.Dirichlet(torch.tensor([3.0, 0.8, 5.0, 1.0])),
)


@pytest.mark.parametrize("fn", CONCENTRATIONS)
def test_location_and_scale_of_a_concentration_are_those_of_unconstrained_draws(fn: Any) -> None:
    prior = location_and_scale(fn)
    draws = biject_to(fn.support).inv(fn.sample((100_000,)))
    assert prior is not None
    torch.testing.assert_close(prior.loc, draws.mean(0), atol=0.03, rtol=0.0)
    torch.testing.assert_close(prior.scale.tensor, draws.std(0), atol=0.0, rtol=0.03)


@pytest.mark.parametrize("name", MODELS)
def test_the_density_is_that_of_the_draws(name: str) -> None:
    model, _ = MODELS[name]
    guide = guide_of(model, init_scale=0.3)
    guide.double()
    values, log_q = drawn(guide)
    torch.testing.assert_close(guide.log_prob(values), log_q, rtol=1e-5, atol=1e-4)

    # With the Jacobian of the map from noise to the unconstrained vector.
    noise = torch.randn(guide.latent_dim, dtype=torch.float64)

    def vector(u: Tensor) -> Tensor:
        values = guide.sites_of(u)
        if "shares" in values:  # the last of which is determined by the others
            values["shares"] = values["shares"][..., :-1]
        return torch.cat([value.flatten() for value in values.values()])

    log_det = torch.linalg.slogdet(torch.autograd.functional.jacobian(vector, noise)).logabsdet
    log_base = guide.get_base_dist().log_prob(noise)
    torch.testing.assert_close(guide.log_prob(guide.sites_of(noise)), log_base - log_det, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(guide.sites_and_log_ratio(noise)[1], log_det, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_many_draws_equal_single_runs(name: str) -> None:
    model, _ = MODELS[name]
    guide = guide_of(model, init_scale=0.1)
    noise = torch.randn(2, 3, guide.latent_dim)
    together = guide.sites_of(noise)
    for index in ((0, 0), (1, 2)):
        for site, value in guide.sites_of(noise[index]).items():
            torch.testing.assert_close(together[site][index], value, rtol=1e-4, atol=1e-5)
    assert guide.log_prob(together).shape == (2, 3)
    with pyro.plate("particles", 5, dim=-4):
        values, _ = drawn(guide)
    assert all(values[site].shape[0] == 5 for site in together)


def test_a_model_that_does_not_broadcast_has_the_coordinates_of_one_that_does() -> None:
    guide, other = (AutoIAF(model, **SMALL).setup() for model in (hierarchy, schools))
    assert other.coordinates.way != guide.coordinates.way
    for name, value in guide.coordinates.state_dict().items():
        torch.testing.assert_close(other.coordinates.state_dict()[name], value, rtol=0.02, atol=0.02)
    other.load_state_dict(guide.state_dict())
    noise = torch.randn(2, 3, guide.latent_dim)
    values = guide.sites_of(noise)
    torch.testing.assert_close(other.sites_of(noise), values)
    torch.testing.assert_close(other.log_prob(values), guide.log_prob(values), rtol=1e-4, atol=1e-4)
    gradients = [
        torch.autograd.grad(each.sites_of(noise)["theta"].sum(), [*each.parameters()]) for each in (guide, other)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_a_prior_that_writes_into_tensors_has_the_coordinates_of_each_draw() -> None:
    def model() -> None:
        tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
        scale = torch.zeros(2)
        scale[0], scale[1] = tau[0], tau[0] + tau[1]
        pyro.sample("z", dist.Normal(0.0, scale).to_event(1))

    guide = guide_of(model, init_scale=0.1)
    assert guide.coordinates.names == ["z"]
    noise = torch.randn(3, 4)
    together = guide.sites_of(noise)
    for index in range(3):
        for site, value in guide.sites_of(noise[index]).items():
            torch.testing.assert_close(together[site][index], value)


def test_degrees_begin_where_data_are() -> None:
    guide = AutoIAF(hierarchy, **SMALL).setup()
    degrees = guide.coordinates.degree.detach()
    assert bool((degrees[:3] > 0.9).all()), degrees
    assert bool((degrees[3:] < 0.1).all()), degrees


def test_degrees_of_a_process_begin_where_data_are() -> None:
    """The data are informative about the sum of a process's values, but not about their differences."""

    def model() -> None:
        size = pyro.sample("size", dist.LogNormal(0.0, 0.1))[..., None, None]
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(3), size * (torch.ones(3, 3) + 1e-3 * torch.eye(3))))
        pyro.sample("y", dist.Normal(f.mean(-1), 0.05), obs=torch.tensor(0.5))

    degrees = AutoIAF(model, **SMALL).setup().coordinates.degree.detach()
    assert degrees[0] > 0.9, degrees
    assert bool((degrees[1:] < 0.3).all()), degrees


def test_the_start_does_not_depend_on_where_the_data_are() -> None:
    """Steps of a fixed size would stop half-way to data far from 0."""
    x = torch.arange(-2.0, 3.0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        slopes = 6.0 + 0.5 * torch.randn(12, 1)
        y = 14 * torch.randn(12, 1) + slopes * x + 4 * torch.randn(12, 5)

    def growth(far: float) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1000.0).expand([2]).to_event(1))
        scale = pyro.sample("scale", dist.HalfCauchy(torch.tensor([20.0, 5.0])).to_event(1))
        noise = pyro.sample("noise", dist.HalfCauchy(20.0))
        with pyro.plate("animals", 12, dim=-2):
            level = pyro.sample("level", dist.Normal(loc[..., 0], scale[..., 0]))
            slope = pyro.sample("slope", dist.Normal(loc[..., 1], scale[..., 1]))
            with pyro.plate("times", 5, dim=-1):
                pyro.sample("y", dist.Normal(level + slope * x, noise), obs=y + far)

    near, far = (bound(partial(growth, shift), AutoIAF(partial(growth, shift)).setup()) for shift in (0.0, 300.0))
    assert far == pytest.approx(near, abs=1.0)


@pytest.mark.parametrize("shape", [[], [1]])
def test_draws_at_which_the_model_raises_have_the_usual_scale(shape: list[int]) -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, torch.where(scale > 2.0, -scale, scale)).expand(shape).to_event())
        pyro.sample("w", dist.Normal(z.sum() if shape else z, scale))

    guide = guide_of(model, init_scale=1.0).double()
    noise = torch.randn(40, 3, dtype=torch.float64)
    values, log_ratio = guide.sites_of(noise), guide.sites_and_log_ratio(noise)[1]
    assert 0 < int((values["scale"] > 2.0).sum()) < 40
    torch.testing.assert_close(guide.log_prob(values), guide.get_base_dist().log_prob(noise) - log_ratio)
    for index in range(40):
        alone = guide.sites_of(noise[index])
        assert all(torch.allclose(value[index], alone[name]) for name, value in values.items())
    assert bool(guide.rsample((1000,))["w"].isfinite().all())


def test_coordinates_of_a_normal_hierarchy_do_not_depend_on_its_scale() -> None:
    """With normal data, the posterior in these coordinates given mu and tau is the same normal for all mu and tau."""
    errors, y = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, -0.5, 3.0])

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(2.0)))
        with pyro.plate("groups", 3):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, errors), obs=y)

    guide = AutoIAF(model, **SMALL).setup()
    places = []
    for mu, tau in ((0.0, 0.3), (1.0, 1.0), (-2.0, 4.0)):
        variance = 1 / (1 / tau**2 + errors**-2)
        mean = variance * (mu / tau**2 + y / errors**2)
        theta = torch.stack([mean, mean + variance.sqrt()])
        values = {"mu": torch.full((2,), mu), "tau": torch.full((2,), tau), "theta": theta}
        places.append(guide.coordinates.of_values(guide.latents, values, guide._first_call)[0][:, 2:].detach())
    for place in places[1:]:
        torch.testing.assert_close(place, places[0], rtol=0.05, atol=0.05)


def test_coordinates_of_a_process_are_standard_normal_given_its_kernel() -> None:
    """With normal data, for any location and kernel: the mean is 0 and the covariance is the identity."""
    y, errors = torch.tensor([1.0, -0.5, 3.0, 2.0]), torch.tensor([0.3, 1.0, 2.0, 0.1])
    apart = (torch.arange(4.0)[:, None] - torch.arange(4.0)).square()

    def kernel(size: Tensor) -> Tensor:
        return size * (-apart / (1 + size)).exp() + 1e-4 * torch.eye(4).to(size)

    def model() -> None:
        size = pyro.sample("size", dist.LogNormal(0.0, torch.tensor(0.5)))[..., None, None]
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))[..., None]
        f = pyro.sample("f", dist.MultivariateNormal(loc + torch.zeros(4), kernel(size)))
        pyro.sample("y", dist.Normal(f, errors).to_event(1), obs=y)

    guide = AutoIAF(model, **SMALL).setup()
    for size, loc in ((0.3, 0.0), (1.0, 2.0), (4.0, -1.0)):
        inverse = torch.linalg.inv(kernel(torch.tensor(size, dtype=torch.float64)))
        covariance = torch.linalg.inv(inverse + errors.double().square().reciprocal().diag())
        mean = covariance @ (inverse @ torch.full((4,), loc).double() + y / errors.square())
        f = torch.cat([mean[None], mean + torch.linalg.cholesky(covariance).mT]).float()
        values = {"size": torch.full((5,), size), "loc": torch.full((5,), loc), "f": f}
        place = guide.coordinates.of_values(guide.latents, values, guide._first_call)[0][:, 2:].detach()
        torch.testing.assert_close(place, torch.cat([torch.zeros(1, 4), torch.eye(4)]), rtol=0.0, atol=0.02)


def test_models_without_such_sites_have_no_coordinates() -> None:
    def plain() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor(1.0))

    guide = AutoIAF(plain, **SMALL).setup()
    assert guide.coordinates is None
    assert not any("coordinates" in name for name in guide.state_dict())


def test_a_prior_that_draws_by_itself_is_left_as_it_is() -> None:
    def model() -> None:
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        pyro.sample("z", dist.Normal(torch.randn(()), tau))

    assert AutoIAF(model, init_scale=0.1, **SMALL).setup().coordinates is None


def test_a_model_that_takes_one_draw_at_a_time_is_left_as_it_is() -> None:
    def model() -> None:
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(0.0, tau.item() * torch.ones(3)))
        pyro.sample("w", dist.Normal(0.0, tau.reshape(())))

    guide = AutoIAF(model, init_scale=0.1, **SMALL).setup()
    assert guide.coordinates is None
    assert guide.rsample((4,))["z"].shape == (4, 3)


@pytest.mark.parametrize("objective", [Trace_ELBO, TracePath_ELBO])
@pytest.mark.parametrize("vectorised", [True, False])
def test_trains_degrees_in_plain_inference(objective: Any, vectorised: bool) -> None:
    pyro.set_rng_seed(0)
    guide = AutoIAF(hierarchy, init_scale=0.1, **SMALL).setup()
    before = guide.coordinates.degree.detach().clone()
    elbo = objective(num_particles=4, vectorize_particles=vectorised, max_plate_nesting=1)
    svi = SVI(hierarchy, guide, pyro.optim.ClippedAdam({"lr": 0.01}), elbo)
    losses = [svi.step() for _ in range(20)]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert not torch.equal(before, guide.coordinates.degree)
    assert any(name.endswith("degree") for name in pyro.get_param_store()), list(pyro.get_param_store())


def test_the_bound_has_the_gradient_of_differences() -> None:
    guide = guide_of(hierarchy, init_scale=0.1)
    guide.double()
    degree = guide.coordinates.degree

    def loss() -> Tensor:
        pyro.set_rng_seed(3)
        return Trace_ELBO(num_particles=5).differentiable_loss(hierarchy, guide)

    (gradient,) = torch.autograd.grad(loss(), degree)
    for entry in (0, 4):
        losses = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                degree[entry] += step
                losses.append(float(loss()))
                degree[entry] -= step
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(float(gradient[entry]), rel=1e-3, abs=1e-3)


def test_a_centred_funnel_is_exact() -> None:
    pyro.set_rng_seed(0)
    fit = fit_guide(funnel, AutoIAF(funnel, **SMALL), steps=200, progress=False)
    assert fit.diagnosis.elbo == pytest.approx(0.0, abs=0.02)
    assert fit.diagnosis.ess > 9_500
    draws = reweight(funnel, fit.guide, num_samples=1000)
    assert float(draws["v"].std()) == pytest.approx(3.0, abs=0.4)
    assert diagnose(funnel, fit.guide, num_samples=1000).ess > 950


def test_collapsed_scales_have_a_finite_bound() -> None:
    guide = guide_of(hierarchy, init_scale=0.1)
    with torch.no_grad():
        guide.coordinates.degree.fill_(1 - 1e-6)  # so that v is many scales from its mean
    vector = guide.latents.initial().clone()
    vector[0], vector[1] = 1.0, -39.0
    vector[2:] = 0.7
    values, log_det = guide.latents.unpack(vector, guide.coordinates.images(guide.latents, vector, guide._first_call))
    assert bool((values["theta"] == values["mu"]).all())  # by rounding
    trace = poutine.trace(poutine.condition(hierarchy, data=values)).get_trace()
    assert bool(trace.log_prob_sum() + log_det < -1e4)


@pytest.mark.parametrize("hierarchy", [hierarchy, schools])
def test_neutra_and_predictive_have_the_same_coordinates(hierarchy: Callable[[], None]) -> None:
    guide = AutoIAF(hierarchy, **SMALL).setup()
    warped = neutra(hierarchy, guide)
    noise = torch.randn(guide.latent_dim)
    trace = poutine.trace(poutine.condition(warped, data={f"{guide.name}_shared_latent": noise})).get_trace()
    values = guide.sites_of(noise)
    expected = poutine.trace(poutine.condition(hierarchy, data=values)).get_trace().log_prob_sum()
    expected = expected + guide.sites_and_log_ratio(noise)[1]
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-4, atol=1e-3)
    draws = warped.draws({f"{guide.name}_shared_latent": torch.randn(5, guide.latent_dim)})
    assert draws["theta"].shape == (5, GROUPS)
    assert Predictive(hierarchy, guide=guide, num_samples=7)()["theta"].shape[0] == 7
    if hierarchy is not schools:
        assert Predictive(hierarchy, guide=guide, num_samples=7, parallel=True)()["theta"].shape[0] == 7


def test_arguments_of_the_model_reach_its_prior() -> None:
    def model(shift: float = 0.0) -> None:
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        pyro.sample("z", dist.Normal(shift, tau))

    guide = guide_of(model, init_scale=0.1)
    with torch.no_grad():
        guide.coordinates.degree.zero_()
    noise = torch.randn(4, 2)
    here, there = guide.sites_of(noise), guide.sites_of(noise, 10.0)
    torch.testing.assert_close(there["z"] - here["z"], torch.full((4,), 10.0))
    torch.testing.assert_close(guide.log_prob(here), guide.log_prob(there, 10.0), rtol=1e-4, atol=1e-3)


def test_copies_and_weights() -> None:
    guide = guide_of(hierarchy, init_scale=0.1)
    noise = torch.randn(3, guide.latent_dim)
    other = AutoRealNVP(hierarchy, init_scale=0.1, **SMALL).setup()
    other.load_state_dict(guide.state_dict())
    for twin in (copy.deepcopy(guide), other):
        torch.testing.assert_close(twin.sites_of(noise), guide.sites_of(noise))
        assert twin.coordinates is not guide.coordinates


def test_a_pickled_guide_says_that_its_model_is_missing() -> None:
    twin = pickle.loads(pickle.dumps(guide_of(hierarchy, init_scale=0.1)))
    with pytest.raises(ValueError, match="theta"):
        twin.rsample((3,))


def test_outside_of_the_support_the_density_is_zero() -> None:
    guide = guide_of(hierarchy, init_scale=0.1)
    values = {name: value.detach() for name, value in guide.rsample((2,)).items()}
    values["tau"][1] = -1.0
    log_prob = guide.log_prob(values)
    assert bool(log_prob[0].isfinite())
    assert log_prob[1] == -torch.inf


def test_masked_entries_stay_out() -> None:
    mask = torch.tensor([True, False, True])

    def model() -> None:
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("rows", 3), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(0.0, tau))

    guide = guide_of(model, init_scale=0.3)
    assert guide.latent_dim == 3
    guide.double()
    values, log_q = drawn(guide)
    torch.testing.assert_close(guide.log_prob(values), log_q, rtol=1e-5, atol=1e-4)
    assert bool(values["z"][1] == guide.latents.values["z"][1])


def test_sites_that_are_conditionally_normal_stay_out_of_the_flow() -> None:
    """Each rate of a hierarchy with normal data is; none is with counts or under a Laplace prior."""

    def model(family: Callable[..., Any], likelihood: Callable[[Tensor], Any]) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(2.0)))
        with pyro.plate("groups", 4):
            theta = pyro.sample("theta", family(mu, tau))
            pyro.sample("y", likelihood(theta), obs=torch.arange(4.0))

    pyro.set_rng_seed(0)
    normal, counts = (lambda theta: dist.Normal(theta, 2.0)), (lambda theta: dist.Poisson(theta.exp()))
    guide = AutoIAF(model, **SMALL).setup(dist.Normal, normal)
    assert guide.coordinates.normal == ["theta"]
    assert guide.transform[0].variables.tolist() == [0, 1, 2, 3, 4]
    before = guide.coordinates.degree.clone()
    fit = fit_guide(model, guide, dist.Normal, normal, progress=False)
    assert fit.diagnosis.ess > 0.97 * fit.diagnosis.num_samples
    assert torch.equal(before, guide.coordinates.degree)
    for arguments in ((dist.Normal, counts), (dist.Laplace, normal)):
        assert AutoIAF(model, **SMALL).setup(*arguments).coordinates.normal == []
