"""Starts of guides: convergence of the ascent, float64, and posteriors where the curvature at the mode misleads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_maf.infer import AutoIAF, fit_guide
from pyro_maf.infer.models.double_precision import in_double, scored, widened
from pyro_maf.infer.start import initialization
from pyro_maf.infer.start.initialization import best_normal
from tests.posteriors import SMALL, bound, regression

pytestmark = pytest.mark.usefixtures("fresh")


def years(batched: bool = True) -> Callable[[], None]:
    """A trend over uncentred calendar years, with nearly collinear intercept and slope."""
    t = torch.arange(1950.0, 2010.0)
    y = 0.02 * (t - 1980) + 15 + 0.1 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    design = torch.stack([torch.ones(60), t], 1)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), torch.tensor([1000.0, 10.0])).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(10.0)))
        with pyro.plate("rows", 60):
            pyro.sample("y", dist.Normal((w * design).sum(-1) if batched else design @ w, scale), obs=y)

    return model


def unscaled(batched: bool = True) -> Callable[[], None]:
    """A regression on predictors with scales from 1e-3 to 1e5, one of them far from 0."""
    generator = torch.Generator().manual_seed(0)
    units = torch.tensor([1.0, 1e3, 1e-3, 1e5])
    x = (torch.randn(100, 4, generator=generator) + torch.tensor([0.0, 1000.0, 0.0, 0.0])) * units
    y = x @ (1 / units) + 0.3 * torch.randn(100, generator=generator)

    def model() -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 1000.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1e4 / units).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(torch.tensor(10.0)))
        with pyro.plate("rows", 100):
            pyro.sample("y", dist.Normal(intercept + ((w * x).sum(-1) if batched else x @ w), scale), obs=y)

    return model


def counts_along_a_line() -> None:
    """A Gaussian process with Poisson counts."""
    x = torch.linspace(0, 10, 40)
    covariance = torch.exp(-0.5 * ((x[:, None] - x) / 1.5) ** 2) + 1e-4 * torch.eye(40)
    rate = torch.exp(1 + torch.sin(x))
    y = torch.poisson(rate, generator=torch.Generator().manual_seed(0))
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(40), covariance))
    level = pyro.sample("level", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Poisson((f + level[..., None]).exp()).to_event(1), obs=y)


STEEP: dict[str, tuple[Callable[[], None], float]] = {
    "years": (years(), 31.8),
    "unscaled": (unscaled(), -96.5),
    "process": (counts_along_a_line, -88.9),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("model", "expected"), STEEP.values(), ids=STEEP)
def test_the_ascent_goes_on_until_it_has_converged(model: Any, expected: float, seed: int) -> None:
    pyro.set_rng_seed(seed)
    guide = AutoIAF(model, **SMALL).setup()
    found = bound(model, guide)
    assert next(guide.parameters()).dtype == torch.float32
    assert found == pytest.approx(expected, abs=2.0)


def bound_alone(model: Any, guide: Any) -> float:
    """`bound` for a model that must be run for each draw."""
    pyro.set_rng_seed(1)
    with torch.no_grad():
        return -pyro.infer.Trace_ELBO(num_particles=100).loss(model, guide)


@pytest.mark.parametrize(("make", "expected"), [(years, 31.8), (unscaled, -96.5)])
def test_a_matrix_product_with_float32_data_is_computed_in_float64(make: Any, expected: float) -> None:
    model = make(batched=False)
    assert bound_alone(model, AutoIAF(model, **SMALL).setup()) == pytest.approx(expected, abs=2.0)


def test_a_model_run_for_each_draw_is_run_a_few_hundred_times() -> None:
    runs = []
    model = unscaled(batched=False)

    def counted() -> None:
        runs.append(1)
        model()

    AutoIAF(counted, **SMALL).setup()
    assert len(runs) < 450


def test_a_model_run_for_each_draw_starts_from_the_dominant_mode() -> None:
    """From the prior's median the ascent leads to a minor mode."""
    runs = []

    def model() -> None:
        runs.append(1)
        z = pyro.sample("z", dist.Normal(0.0, 5.0))
        value = 0.0 if z.item() > 100 else z
        minor, major = dist.Normal(-1.0, 0.3).log_prob(value) - 4, dist.Normal(6.0, 0.5).log_prob(value)
        pyro.factor("y", torch.logaddexp(minor, major))

    pyro.set_rng_seed(0)
    guide = AutoIAF(model, **SMALL).setup()
    assert float(guide.median()["z"]) == pytest.approx(5.94, abs=0.1)
    assert len(runs) < 450


@pytest.mark.parametrize("seed", [0, 1])
def test_a_hierarchy_starts_with_a_scale_of_high_posterior_probability(seed: int) -> None:
    """A normal by the curvature at the mode, in the neck of the funnel, is some hundred nats worse."""
    y = 1 + 0.3 * torch.randn(200, generator=torch.Generator().manual_seed(1))

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        scale = pyro.sample("scale", dist.HalfCauchy(torch.tensor(2.0)))
        with pyro.plate("groups", 200):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(loc, scale)), 1.0), obs=y)

    pyro.set_rng_seed(seed)
    guide = AutoIAF(model, **SMALL).setup()
    scale = guide.rsample((1000,))["scale"].detach()
    assert 0.02 < float(scale.median()) < 0.5
    with torch.no_grad():
        assert -pyro.infer.Trace_ELBO(num_particles=100, vectorize_particles=True).loss(model, guide) > -235


def a_tone() -> None:
    """A sinusoid of unknown frequency, with a mode for every frequency in the noise, a hundred times lower."""
    t = torch.linspace(0, 10, 60)
    noise = torch.randn(60, generator=torch.Generator().manual_seed(0))
    y = 1.5 * torch.sin(2 * torch.pi * 0.45 * t + 0.6) + 0.5 * noise
    size = pyro.sample("size", dist.HalfNormal(2.0))
    frequency = pyro.sample("frequency", dist.Uniform(0.05, 2.0))
    phase = pyro.sample("phase", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("times", 60):
        pyro.sample("y", dist.Normal(size * torch.sin(2 * torch.pi * frequency * t + phase), scale), obs=y)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_start_is_at_the_dominant_mode(seed: int) -> None:
    pyro.set_rng_seed(seed)
    guide = AutoIAF(a_tone, **SMALL).setup()
    assert float(guide.median()["frequency"]) == pytest.approx(0.45, abs=0.02)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_funnel_starts_in_the_bulk_of_its_probability(seed: int) -> None:
    """The ascent passes the best start on its way to a mode with hardly any probability."""

    def funnel() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(9), (v / 2).exp()[..., None]).to_event(1))

    pyro.set_rng_seed(seed)
    assert bound(funnel, AutoIAF(funnel, **SMALL).setup()) > -5


# -- float64 -----------------------------------------------------------------------------------------------------------


def test_results_of_float64_latents_and_float32_data_are_float64() -> None:
    x, number = torch.randn(5, 3), torch.tensor(1 / 3)
    dtypes = []

    def score(rows: Tensor) -> Tensor:
        total = (x @ rows[0]).sum() + torch.linalg.solve(x.T @ x, rows[0]).sum() + (rows[:, 0].sum() * x).sum()
        stacked = torch.stack([total, number])
        dtypes.append({each.dtype for each in (total, stacked, torch.nn.functional.linear(rows, x))})
        return total.expand(len(rows))

    loc = torch.randn(3)
    wide = in_double(score, loc)
    assert wide is not None
    assert dtypes[0] == {torch.float64}
    exact = float(score(loc[None])[0])
    assert float(wide(loc.double()[None])[0]) == pytest.approx(exact, rel=1e-4)
    assert wide(torch.stack([loc, loc]).double()).dtype == torch.float64


def test_in_place_writes_work_in_float64() -> None:
    def score(rows: Tensor) -> Tensor:
        total = torch.zeros(len(rows))
        total.add_(rows.sum(1).float())
        total[:1] = rows[:1].sum(1)
        total += rows[:, 0]
        return total

    wide = in_double(score, torch.tensor([1.0, 2.0]))
    assert wide is not None
    assert wide(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)).tolist() == [4.0, 10.0]


def refuses(rows: Tensor) -> Tensor:
    if rows.dtype == torch.float64:
        raise TypeError("float32 alone")
    return -0.5 * (rows - 1).square().sum(-1)


def other(rows: Tensor) -> Tensor:
    return (-0.5 if rows.dtype == torch.float32 else 3.0) * (rows - 1).square().sum(-1)


@pytest.mark.parametrize("score", [refuses, other])
def test_if_float64_fails_the_latents_dtype_is_used(score: Any) -> None:
    assert in_double(score, torch.zeros(3)) is None
    found = best_normal(score, torch.zeros(3))
    assert found.loc.dtype == torch.float32
    torch.testing.assert_close(found.loc, torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.scale_tril, torch.eye(3), atol=1e-3, rtol=0)


def test_a_device_without_float64_keeps_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnSuchADevice(Tensor):
        def double(self, *args: Any, **kwargs: Any) -> Tensor:
            raise TypeError("this device has no float64")

        def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.as_subclass(Tensor)

    tensor = torch.ones(2).as_subclass(OnSuchADevice)
    assert widened(tensor).dtype == torch.float64
    monkeypatch.setattr(initialization, "in_double", lambda score, loc: None)
    known = regression(dtype=torch.float32)
    guide = AutoIAF(known.model, **SMALL).setup()
    with torch.no_grad():
        loc = guide.transform(torch.zeros(3))
    torch.testing.assert_close(loc.double(), known.mean, atol=1e-2, rtol=1e-2)


def test_a_normal_that_float32_cannot_hold_is_not_used() -> None:
    """Its location lies between two float32 numbers, further from either than the posterior's width."""

    def score(rows: Tensor) -> Tensor:
        return -0.5 * ((rows - 100_000.003).double() / 1e-4).square().sum(-1).to(rows)

    found = best_normal(score, torch.full((1,), 100_000.0))
    assert bool(found.loc.isfinite().all())
    draws = found.loc + found.scale_tril[0] * torch.randn(1000, 1)
    assert bool(score(draws).isfinite().all())


def test_a_draw_that_fails_only_in_float32_does_not_rule_out_float64() -> None:
    """Such as by a Cholesky factorisation; rounding in float32 also moves the mode."""

    def score(rows: Tensor) -> Tensor:
        narrow = rows.dtype == torch.float32
        scores = -0.5 * (rows - (1.004 if narrow else 1.0)).square().sum(-1) / 0.01
        return torch.where((rows[:, 0] > 1.15) & torch.tensor(narrow), -torch.inf, scores)

    found = best_normal(score, torch.zeros(2))
    torch.testing.assert_close(found.loc, torch.ones(2), atol=1e-4, rtol=0)


def test_a_density_without_curvature_has_a_start() -> None:
    """The Hessian of a Laplace log-density is zero and cannot be inverted."""

    def model() -> None:
        pyro.sample("z", dist.Laplace(torch.zeros(4), 1.0).to_event(1))

    guide = AutoIAF(model, **SMALL).setup()
    assert bound(model, guide) > -2


def rounding_far_out(points: Tensor) -> Tensor:
    """A normal log-density with arbitrary values far out, as for a covariance that is singular there."""
    noise = 1e9 * torch.sin(1e18 * points[:, 0])
    return -points.square().sum(1) / 2 + torch.where(points[:, 0] < -4.0, noise, 0.0)


@pytest.mark.parametrize("start", [-3.5, 3.5])
def test_an_ascent_does_not_climb_rounding(start: float) -> None:
    normal = best_normal(rounding_far_out, torch.tensor([start, 1.0], dtype=torch.float64))
    assert float(normal.loc.abs().max()) < 0.1
    assert float((normal.scale_tril - torch.eye(2)).abs().max()) < 0.1


def test_weights_due_to_rounding_are_ignored() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-5.0, 0.0], [2.0, 0.5], [-8.0, 1.0]], dtype=torch.float64)
    far = points[:, 0] < -4.0
    log_densities = scored(lambda points: rounding_far_out(points).abs(), points, -points.square().sum(1) / 2)
    assert torch.equal(log_densities.isinf(), far)


def test_a_factor_model_whose_density_is_rounding_at_small_scales_is_fitted() -> None:
    """For small scales the capacitance matrix loses its identity to rounding, and densities are up to e^1e28."""
    generator = torch.Generator().manual_seed(24)
    factors, noise = torch.randn(30, 1, generator=generator), torch.randn(30, 4, generator=generator)
    data = factors * torch.tensor([1.0, -0.8, 0.6, 0.5]) + 0.4 * noise

    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(torch.ones(4)).to_event(1))
        with pyro.plate("rows", 30):
            fn = dist.LowRankMultivariateNormal(torch.zeros(4), w[..., None, :, None], scale.square().unsqueeze(-2))
            pyro.sample("y", fn, obs=data)

    pyro.set_rng_seed(0)
    guide = AutoIAF(model)
    fit = fit_guide(model, guide, steps=400, progress=False)
    assert guide.modes == (2, 2)  # w and -w
    assert fit.diagnosis.grade in ("good", "usable")


def test_draws_that_leave_their_support_when_their_digits_change_are_weighed() -> None:
    shares = dist.Dirichlet(torch.ones(3)).sample(torch.Size([100]))

    def score(shares: Tensor) -> Tensor:
        return (50 * shares[:, 0]).where((shares.sum(-1) - 1).abs() < 1e-6, -torch.inf)

    assert torch.equal(scored(score, shares, torch.zeros(100)), score(shares))
