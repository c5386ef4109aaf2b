"""Densities: they integrate to 1, draws follow them, and they behave as modules."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_maf
from pyro_maf.distributions import (
    ConditionalDensity,
    ConditionalFlowPrior,
    ConditionalMADEMoG,
    ConditionalMAFMoG,
    ConditionalMixtureFlow,
    Density,
    FlowPrior,
    MADEMoG,
    MAFMoG,
    MixtureFlow,
    density,
)
from pyro_maf.flows import IAF, MAF, ConditionalIAF, ConditionalMAF, RealNVP
from pyro_maf.testing import check_density
from tests.fits import since_torch

SMALL: dict[str, Any] = {"hidden_dims": [16, 16]}


def _units(input_dim: int) -> dict[str, Tensor]:
    return {"loc": torch.linspace(-1, 1, input_dim), "scale": torch.linspace(0.5, 2, input_dim)}


def _started(density: MixtureFlow) -> MixtureFlow:
    """Add a base with three components."""
    generator = torch.Generator().manual_seed(0)
    clusters = torch.arange(3.0).repeat_interleave(200)[:, None] - 1
    density.base.start_at(clusters + 0.3 * torch.randn(600, density.input_dim, generator=generator))
    return density


DENSITIES: dict[str, Callable[[int], Density]] = {
    "MADEMoG": lambda d: MADEMoG(d, num_components=4, **SMALL),
    "MADEMoG, one component": lambda d: MADEMoG(d, num_components=1, **SMALL),
    "MADEMoG, reversed": lambda d: MADEMoG(d, order=list(range(d))[::-1], degrees="random", **SMALL),
    "MAFMoG": lambda d: MAFMoG(d, num_layers=2, num_components=3, **SMALL),
    "MAFMoG, batch norm": lambda d: MAFMoG(d, num_layers=2, batch_norm=True, order="random", **SMALL),
    "MixtureFlow": lambda d: _started(MixtureFlow(d, num_layers=2, univariate="affine", **SMALL)),
    "FlowPrior of MAF": lambda d: FlowPrior(MAF(d, num_layers=2, **SMALL), **_units(d)),
    "FlowPrior of IAF": lambda d: FlowPrior(IAF(d, num_layers=2, **SMALL), **_units(d)),
    "FlowPrior of RealNVP": lambda d: FlowPrior(RealNVP(d, num_layers=2, **SMALL), **_units(d)),
    "FlowPrior of MADEMoG": lambda d: FlowPrior(MADEMoG(d, **SMALL), **_units(d)),
}

CONDITIONAL: dict[str, Callable[[int, int], ConditionalDensity]] = {
    "ConditionalMADEMoG": lambda d, c: ConditionalMADEMoG(d, c, num_components=3, **SMALL),
    "ConditionalMAFMoG": lambda d, c: ConditionalMAFMoG(d, c, num_layers=2, num_components=3, **SMALL),
    "ConditionalMixtureFlow": lambda d, c: ConditionalMixtureFlow(d, c, num_components=2, num_layers=2, **SMALL),
    "ConditionalFlowPrior of MAF": lambda d, c: ConditionalFlowPrior(
        ConditionalMAF(d, c, num_layers=2, **SMALL), **_units(d), context_loc=torch.ones(c)
    ),
    "ConditionalFlowPrior of IAF": lambda d, c: ConditionalFlowPrior(
        ConditionalIAF(d, c, num_layers=2, **SMALL), context_scale=torch.full((c,), 2.0)
    ),
    "ConditionalFlowPrior of MADEMoG": lambda d, c: ConditionalFlowPrior(
        ConditionalMADEMoG(d, c, **SMALL), **_units(d)
    ),
}

every_density = pytest.mark.parametrize("make", DENSITIES.values(), ids=DENSITIES.keys())
every_conditional = pytest.mark.parametrize("make", CONDITIONAL.values(), ids=CONDITIONAL.keys())


def shaken(module: Any, size: float = 0.3) -> Any:
    """The module in float64 and eval mode with random parameters."""
    module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


def grid(input_dim: int, reach: float, points: int) -> tuple[Tensor, float]:
    """Points of a regular grid, (points^D, D), and the volume of each cell."""
    line = torch.linspace(-reach, reach, points, dtype=torch.float64)
    return torch.cartesian_prod(*[line] * input_dim).reshape(-1, input_dim), (2 * reach / (points - 1)) ** input_dim


# -- a density ---------------------------------------------------------------------------------------------------------


@every_density
def test_keeps_the_laws_of_densities(make: Callable[[int], Density]) -> None:
    check_density(lambda d: shaken(make(d), 0.1), dimensions=(1, 2, 4))


@every_density
@pytest.mark.parametrize(("input_dim", "reach", "points"), [(1, 60.0, 12001), (2, 20.0, 401)])
def test_integrates_to_one(make: Callable[[int], Density], input_dim: int, reach: float, points: int) -> None:
    density = shaken(make(input_dim), 0.05 if input_dim == 2 else 0.2)
    y, cell = grid(input_dim, reach, points)
    with torch.no_grad():
        assert float(density.log_prob(y).exp().sum() * cell) == pytest.approx(1, abs=2e-4)


def test_the_error_for_a_missing_context_says_what_needs_it() -> None:
    density = CONDITIONAL["ConditionalFlowPrior of MAF"](2, 1)
    for name in ("log_prob", "sample", "rsample"):
        with pytest.raises(AttributeError, match=rf"^ConditionalFlowPrior has no {name}, .* use condition\(context\)"):
            getattr(density, name)
    assert not hasattr(density, "width")


@every_conditional
def test_integrates_to_one_at_every_context(make: Callable[[int, int], ConditionalDensity]) -> None:
    density = shaken(make(1, 2), 0.1)
    contexts = torch.randn(3, 2, dtype=torch.float64)
    y, cell = grid(1, 60.0, 12001)
    with torch.no_grad():
        log_prob = density.condition(contexts).log_prob(y[:, None])
    torch.testing.assert_close(log_prob.exp().sum(0) * cell, torch.ones(3).double(), atol=2e-4, rtol=0)
    assert float((log_prob[:, 0] - log_prob[:, 1]).abs().max()) > 0.01


@every_density
def test_draws_follow_the_density_in_one_dimension(make: Callable[[int], Density]) -> None:
    density = shaken(make(1), 0.2)
    y, cell = grid(1, 60.0, 24001)
    with torch.no_grad():
        p = density.log_prob(y).exp() * cell
        draws = density.sample([20_000])
    for power in (1, 2):
        exact = (p[:, None] * y**power).sum(0)
        error = 4 * (draws**power).std(0) / math.sqrt(len(draws))
        assert torch.all((draws**power).mean(0).sub(exact).abs() < error)
    scores = density.log_prob(draws).detach()
    entropy = -(p * p.clamp(min=1e-300).div(cell).log()).sum()
    assert abs(float(scores.mean() + entropy)) < 4 * float(scores.std()) / math.sqrt(len(draws))
    # Kolmogorov-Smirnov test at the 0.1 % level.
    cdf = p.cumsum(0)[torch.searchsorted(y[:, 0].contiguous(), draws[:, 0].contiguous())].sort().values
    ranks = torch.arange(1, len(draws) + 1) / len(draws)
    assert float((cdf - ranks).abs().max()) < 1.95 / math.sqrt(len(draws)) + 1e-3


@every_density
def test_draws_follow_the_density_in_many_dimensions(make: Callable[[int], Density]) -> None:
    """E_p[q(y) / p(y)] = 1 for any density q with lighter tails, here a narrower normal."""
    density = shaken(make(4), 0.05)
    draws = density.sample([20_000])
    centre, narrow = draws.mean(0), 0.5 * draws.std(0)
    with torch.no_grad():
        ratio = (dist.Normal(centre, narrow).to_event(1).log_prob(draws) - density.log_prob(draws)).exp()
    assert abs(float(ratio.mean() - 1)) < 4 * float(ratio.std()) / math.sqrt(len(draws))


def test_a_context_reaches_the_model_in_its_units() -> None:
    inner = shaken(ConditionalMAF(2, 1, num_layers=1, **SMALL))
    units = {"context_loc": torch.tensor([3.0]).double(), "context_scale": torch.tensor([4.0]).double()}
    context, y = 3 + 4 * torch.randn(5, 1).double(), torch.randn(5, 2).double()
    given = ConditionalFlowPrior(inner, **units).condition(context)
    plain = ConditionalFlowPrior(inner).condition((context - 3) / 4)
    assert torch.equal(given.log_prob(y), plain.log_prob(y))
    assert not torch.allclose(given.log_prob(y), ConditionalFlowPrior(inner).condition(context).log_prob(y))


@every_conditional
def test_draws_follow_the_density_at_their_context(make: Callable[[int, int], ConditionalDensity]) -> None:
    density = shaken(make(2, 3), 0.1)
    context = torch.randn(3, 3, dtype=torch.float64)
    draws = density.condition(context).sample([10_000])
    assert draws.shape == (10_000, 3, 2)
    assert float((draws.mean(0)[0] - draws.mean(0)[1]).abs().max()) > 0.02
    centre, narrow = draws.mean(0), 0.5 * draws.std(0)
    with torch.no_grad():
        log_prob = density.condition(context).log_prob(draws)
        ratio = (dist.Normal(centre, narrow).to_event(1).log_prob(draws) - log_prob).exp()
    assert torch.all((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / math.sqrt(len(draws)))


# -- estimates ---------------------------------------------------------------------------------------------------------


@every_density
def test_moments_and_entropy_are_those_of_the_density(make: Callable[[int], Density]) -> None:
    density = shaken(make(1), 0.2)
    y, cell = grid(1, 60.0, 24001)
    with torch.no_grad():
        log_p = density.log_prob(y)
    p = log_p.exp() * cell
    mean = float(p @ y[:, 0])
    variance = float(p @ (y[:, 0] - mean).square())
    assert float(density.mean.detach()) == pytest.approx(mean, abs=4e-2 * variance**0.5)
    assert float(density.variance.detach()) == pytest.approx(variance, rel=0.15)
    assert float(density.stddev.detach()) == pytest.approx(variance**0.5, rel=0.08)
    assert float(density.entropy().detach()) == pytest.approx(-float(p @ log_p.clamp(min=-700)), abs=5e-2)


@every_conditional
def test_estimates_have_the_shapes_of_other_distributions(
    make: Callable[[int, int], ConditionalDensity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(density, "DRAWS", 100)
    with torch.no_grad():
        at = make(2, 3).condition(torch.randn(4, 3))
        assert at.mean.shape == at.variance.shape == at.stddev.shape == (4, 2)
        assert at.entropy().shape == (4,)
        torch.testing.assert_close(at.perplexity(), at.entropy().exp())


def test_estimates_are_repeatable_and_leave_the_random_state_alone() -> None:
    prior = FlowPrior(MAF(3, num_layers=1, **SMALL), **_units(3))
    before = torch.get_rng_state()
    assert torch.equal(prior.mean, prior.mean)
    assert torch.equal(prior.entropy(), prior.entropy())
    assert torch.equal(before, torch.get_rng_state())
    assert prior.expand([5]).mean.shape == (5, 3)


def test_entropy_can_be_trained_where_draws_carry_a_gradient() -> None:
    prior = FlowPrior(MAF(2, num_layers=1, **SMALL))
    prior.entropy().backward()
    assert any(bool(p.grad.any()) for p in prior.parameters() if p.grad is not None)
    assert not MADEMoG(2, **SMALL).entropy().requires_grad


# -- what each one is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_components", [1, 2, 7])
def test_made_mog_is_the_product_of_its_mixtures(num_components: int) -> None:
    density = shaken(MADEMoG(3, num_components=num_components, order=[2, 0, 1], **SMALL))
    y = torch.randn(50, 3, dtype=torch.float64)
    logits, mu, s = density.made(y).unflatten(-1, (3, num_components)).unbind(-2)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=logits),
        torch.distributions.Normal(mu, (5 * torch.tanh(s / 5)).exp()),
    )
    torch.testing.assert_close(density.log_prob(y), mixture.log_prob(y).sum(-1), rtol=1e-12, atol=1e-12)


def test_made_mog_depends_on_earlier_dimensions_only() -> None:
    order = [2, 0, 3, 1]
    density = shaken(MADEMoG(4, order=order, **SMALL))
    y = torch.randn(4, dtype=torch.float64)

    def parameters(value: Tensor) -> Tensor:
        return torch.stack(density.mixtures(value)).permute(1, 0, 2).flatten(1)

    depends = torch.autograd.functional.jacobian(parameters, y).abs().amax(1)[order][:, order] > 0
    assert torch.equal(depends, torch.ones(4, 4).tril(-1).bool())


def test_maf_mog_is_a_flow_on_its_base() -> None:
    density = shaken(MAFMoG(3, num_layers=2, **SMALL))
    y = torch.randn(20, 3, dtype=torch.float64)
    z = density.flow.inv(y)
    expected = density.base.log_prob(z) - density.flow.log_abs_det_jacobian(z, y)
    torch.testing.assert_close(density.log_prob(y), expected)
    assert density.base.order.tolist() == density.flow[0].order.tolist()[::-1]


@pytest.mark.parametrize("make", [MAF, IAF, RealNVP])
def test_flow_prior_is_a_transformed_normal_in_the_datas_units(make: Any) -> None:
    units = {name: value.double() for name, value in _units(3).items()}
    prior = shaken(FlowPrior(make(3, num_layers=2, **SMALL), **units))
    normal = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    affine = dist.transforms.AffineTransform(units["loc"], units["scale"], event_dim=1)
    y = torch.randn(20, 3, dtype=torch.float64)
    expected = dist.TransformedDistribution(normal, [prior.model, affine]).log_prob(y)
    torch.testing.assert_close(prior.log_prob(y), expected)


@pytest.mark.parametrize("make", [lambda: MADEMoG(4), lambda: MADEMoG(4, num_components=1), lambda: MAFMoG(4)])
def test_starts_near_the_standard_normal(make: Callable[[], Density]) -> None:
    normal = dist.Normal(torch.zeros(4), 1.0).to_event(1)
    y = normal.sample([2000])
    density = make()
    divergence = (normal.log_prob(y) - density.log_prob(y)).mean().detach()
    assert abs(float(divergence)) < 0.05


def test_components_can_become_different() -> None:
    """The mixture fits two peaks, so its components do not stay equal."""
    density = MADEMoG(1, num_components=4, **SMALL)
    sign = torch.randint(0, 2, (2000, 1)) * 2.0 - 1
    y = sign + 0.1 * torch.randn(2000, 1)
    optimizer = torch.optim.Adam(density.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -density.log_prob(y).mean()
        loss.backward()
        optimizer.step()
    exact = math.log(2) + 0.5 * math.log(2 * math.pi * math.e * 0.01)
    assert float(loss.detach()) < exact + 0.05


def test_a_component_cannot_collapse() -> None:
    density = MADEMoG(2)
    with torch.no_grad():
        density.made.last_layer.bias.fill_(-1e6)
    assert torch.all(density.mixtures(torch.zeros(2))[2] >= -5)


def test_fit_statistics_reaches_the_batch_norms_in_the_models_units() -> None:
    y = 100 + 7 * torch.randn(500, 2)
    prior = FlowPrior(MAF(2, num_layers=1, batch_norm=True, **SMALL), loc=y.mean(0), scale=y.std(0))
    again = MAF(2, num_layers=1, batch_norm=True, **SMALL)
    prior.fit_statistics(y)
    again.fit_statistics((y - y.mean(0)) / y.std(0))
    for name, buffer in again[0].named_buffers():
        torch.testing.assert_close(dict(prior.model[0].named_buffers())[name], buffer)
    mixture = MAFMoG(2, num_layers=1, batch_norm=True, **SMALL)
    mixture.fit_statistics(y)
    assert torch.all(mixture.eval().flow.inv(y).mean(0).abs() < 1e-3)


# -- shapes ------------------------------------------------------------------------------------------------------------


@every_density
@pytest.mark.parametrize("input_dim", [1, 3])
def test_shapes(make: Callable[[int], Density], input_dim: int) -> None:
    density = make(input_dim).eval()
    assert (density.batch_shape, density.event_shape, density.event_dim) == ((), (input_dim,), 1)
    wide = density.expand([5]).expand([4, 5])
    assert (wide.batch_shape, wide().shape) == ((4, 5), (4, 5, input_dim))
    assert density.log_prob(density.sample([0])).shape == (0,)
    for batch in ((), (5,), (2, 1, 5)):
        y = density.sample(batch)
        assert y.shape == (*batch, input_dim)
        assert density.log_prob(y).shape == batch
        assert wide.sample(batch).shape == (*batch, 4, 5, input_dim)
        assert wide.log_prob(y).shape == torch.broadcast_shapes(batch, (4, 5))
    torch.testing.assert_close(wide.log_prob(y), density.log_prob(y).expand(2, 4, 5))


@every_conditional
@pytest.mark.parametrize("input_dim", [1, 3])
def test_shapes_with_context(make: Callable[[int, int], ConditionalDensity], input_dim: int) -> None:
    conditional = make(input_dim, 2).double()
    one, many = torch.randn(2).double(), torch.randn(4, 1, 2).double()
    y = torch.randn(5, input_dim).double()
    assert conditional.condition(one).sample([7]).shape == (7, input_dim)
    density = conditional.condition(many)
    assert (density.batch_shape, density.event_shape) == ((4, 1), (input_dim,))
    assert density.sample([7]).shape == (7, 4, 1, input_dim)
    wide = density.expand([3, 4, 5])
    assert wide.sample([2]).shape == (2, 3, 4, 5, input_dim)
    assert wide.log_prob(y).shape == (3, 4, 5)
    log_prob = density.log_prob(y)
    assert log_prob.shape == (4, 5)
    for row, context in enumerate(many[:, 0]):
        torch.testing.assert_close(log_prob[row], conditional.condition(context).log_prob(y))
    assert conditional.condition(many[:0]).sample().shape == (0, 1, input_dim)


# -- gradients, the cache, compilation ---------------------------------------------------------------------------------


@every_density
def test_log_prob_has_the_gradient_of_value_and_parameters(make: Callable[[int], Density]) -> None:
    density = shaken(make(2), 0.05)
    y = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    parameter = [p for p in density.parameters() if p.requires_grad][-1]
    assert torch.autograd.gradcheck(lambda value, _: density.log_prob(value), (y, parameter))


@pytest.mark.parametrize("make", [MAF, IAF, RealNVP])
def test_rsample_carries_the_gradient(make: Any) -> None:
    prior = shaken(FlowPrior(make(3, num_layers=2, **SMALL), **_units(3)), 0.1)
    assert prior.has_rsample
    parameter = list(prior.parameters())[-1]

    def mean_square(_: Tensor) -> Tensor:
        torch.manual_seed(1)
        return prior.rsample([10]).square().mean()

    assert torch.autograd.gradcheck(mean_square, (parameter,))
    assert not prior.sample().requires_grad


def test_mixtures_have_no_rsample() -> None:
    for mixture in (MADEMoG(2), MAFMoG(2), FlowPrior(MADEMoG(2)), ConditionalMADEMoG(2, 1).condition(torch.ones(1))):
        assert not mixture.has_rsample
        with pytest.raises(NotImplementedError, match=f"{mixture.name} has no reparameterised draws"):
            mixture.rsample()
    conditional = ConditionalFlowPrior(ConditionalMAF(2, 1, **SMALL))
    context = torch.zeros(5, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(shaken(conditional, 0.1).float().condition(context).rsample().sum(), context)
    assert float(gradient.abs().min()) > 0


def test_an_iaf_prior_scores_its_own_draws_without_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = shaken(FlowPrior(IAF(3, num_layers=2, **SMALL), **_units(3)))
    y = prior.expand([4]).rsample()
    expected = copy.deepcopy(prior).log_prob(y.detach())

    def refuse(*_: Any) -> None:
        raise AssertionError("a sweep was run")

    monkeypatch.setattr("pyro_maf.transforms.stack.Stack.inverse_and_log_det", refuse)
    torch.testing.assert_close(prior.expand([4]).log_prob(y), expected)


@every_density
def test_never_stale(make: Callable[[int], Density]) -> None:
    density = shaken(make(2))
    y = density.sample([4])
    density.log_prob(y)
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.mul_(0.9)
        y.mul_(0.5)
    torch.testing.assert_close(density.log_prob(y), copy.deepcopy(density).log_prob(y.clone()))


@pytest.mark.parametrize("name", ["MADEMoG", pytest.param("MAFMoG", marks=since_torch(6)), "FlowPrior of MAF"])
def test_log_prob_compiles_whole(name: str) -> None:
    density = shaken(DENSITIES[name](3))
    y = torch.randn(5, 3, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler
        compiled = torch.compile(density.log_prob, fullgraph=True, backend="eager")(y)
    torch.testing.assert_close(compiled, density.log_prob(y))


@every_density
def test_autocast_changes_nothing(make: Callable[[int], Density]) -> None:
    density = make(3).eval()
    y = density.sample([4])
    expected = density.log_prob(y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert density.sample().dtype == torch.float32
        torch.testing.assert_close(density.log_prob(y), expected, rtol=0, atol=0)
        assert density.log_prob(y.bfloat16()).dtype == torch.float32


# -- a module ----------------------------------------------------------------------------------------------------------


@every_density
def test_survives_copies_and_state_dicts(make: Callable[[int], Density]) -> None:
    density = shaken(make(3))
    y = density.sample([4])
    log_prob = density.log_prob(y)
    other = make(3).double().eval()
    other.load_state_dict(density.state_dict())
    for twin in (copy.deepcopy(density), pickle.loads(pickle.dumps(density)), other):
        torch.testing.assert_close(twin.log_prob(y), log_prob, rtol=0, atol=0)
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        torch.testing.assert_close(density.log_prob(y), log_prob, rtol=0, atol=0)


@every_density
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load(make: Callable[[int], Density], dtype: torch.dtype, tmp_path: Path) -> None:
    density = shaken(make(3)).to(dtype)
    density.expand([7]).save(tmp_path / "density.safetensors")
    again = pyro_maf.load(tmp_path / "density.safetensors")
    y = density.sample([4])
    assert (type(again), again.batch_shape, again.training, y.dtype) == (type(density), (), False, dtype)
    torch.testing.assert_close(again.log_prob(y), density.log_prob(y), rtol=0, atol=0)


@every_conditional
def test_save_and_load_with_context(make: Callable[[int, int], ConditionalDensity], tmp_path: Path) -> None:
    conditional = shaken(make(2, 3))
    conditional.save(tmp_path / "density.safetensors")
    again = pyro_maf.load(tmp_path / "density.safetensors")
    context = torch.randn(4, 3, dtype=torch.float64)
    y = conditional.condition(context).sample()
    for twin in (again, copy.deepcopy(conditional), pickle.loads(pickle.dumps(conditional))):
        assert repr(twin).startswith(type(conditional).__name__)
        torch.testing.assert_close(twin.condition(context).log_prob(y), conditional.condition(context).log_prob(y))
    with pytest.raises(TypeError, match="save the conditional form"):
        conditional.condition(context).save(tmp_path / "density.safetensors")


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MADEMoG(0), ValueError, "MADEMoG expected input_dim of at least 1, got 0"),
        (lambda: MADEMoG(2, num_components=0), ValueError, "MADEMoG expected num_components of at least 1, got 0"),
        (lambda: MAFMoG(2, order=[0, 0]), ValueError, "to hold each of 0 .. 1 once"),
        (lambda: ConditionalMADEMoG(2, 0), ValueError, "ConditionalMADEMoG expected context_dim of at least 1, got 0"),
        (lambda: MADEMoG(2).log_prob(torch.zeros(3)), ValueError, r"MADEMoG expected value with last dimension 2"),
        (lambda: MADEMoG(2).log_prob(torch.zeros(2).double()), TypeError, "MADEMoG has float32 parameters, got value"),
        (lambda: MADEMoG(2).log_prob([0.0, 0.0]), TypeError, "expected value to be a torch.Tensor, got list"),
        (lambda: MADEMoG(2, context_dim=3).log_prob(torch.zeros(2)), ValueError, "expected a context .* 3"),
        (lambda: MADEMoG(2, context_dim=3)(), ValueError, r"expected a context .* 3 \(context_dim\), got none"),
        (
            lambda: ConditionalMADEMoG(2, 3).condition(torch.zeros(2)),
            ValueError,
            r"MADEMoG expected context with last dimension 3 \(context_dim\), got shape \(2,\)",
        ),
        (lambda: MADEMoG(2).expand([3]).expand([4]), ValueError, r"its own, \(3,\), broadcasts, got \(4,\)"),
        (lambda: MADEMoG(2).expand([3]).expand([]), ValueError, r"its own, \(3,\), broadcasts, got \(\)"),
        (lambda: MADEMoG(2).expand([3]).log_prob(torch.zeros(4, 2)), ValueError, r"its own, \(3,\), got \(4,\)"),
        (lambda: FlowPrior(nn.Linear(2, 2)), TypeError, "FlowPrior expected a flow or a density, got Linear"),
        (lambda: FlowPrior(ConditionalMAF(2, 1)), TypeError, "got ConditionalMAF, .* use ConditionalFlowPrior"),
        (lambda: ConditionalFlowPrior(2), TypeError, "ConditionalFlowPrior expected a flow or a density, got int"),
        (lambda: ConditionalFlowPrior(MAF(2)), ValueError, "ConditionalFlowPrior expected context_dim of at least 1"),
        (lambda: FlowPrior(MAF(2), loc=torch.zeros(3)), ValueError, r"FlowPrior expected loc with last dimension 2"),
        (lambda: FlowPrior(MAF(2), loc=torch.zeros(1, 2)), ValueError, "FlowPrior expected loc to be 2 finite numbers"),
        (lambda: FlowPrior(MAF(2), loc=torch.tensor([0.0, math.inf])), ValueError, "expected loc to be 2 finite"),
        (lambda: FlowPrior(MAF(2), scale=torch.tensor([0.0, 1.0])), ValueError, "expected scale to be positive"),
        (lambda: FlowPrior(MAF(2), context_loc=torch.zeros(1)), ValueError, "for a model that takes no context"),
    ],
)
def test_bad_input_is_refused_with_a_reason(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_noise_at_a_context_is_that_of_the_conditional_form() -> None:
    y, context = torch.randn(5, 3), torch.randn(5, 2)
    for form in (ConditionalMAFMoG(3, 2, num_layers=1), ConditionalFlowPrior(ConditionalMAF(3, 2, num_layers=1))):
        noise = form.noise(y, context)
        torch.testing.assert_close(form.condition(context).noise(y), noise)
        torch.testing.assert_close(form.condition(context[0]).noise(y[:1]), noise[:1])
        torch.testing.assert_close(form.unwrapped.noise(y, context), noise)


def test_a_density_without_a_map_to_noise_says_so() -> None:
    with pytest.raises(TypeError, match="noise expected a density with a map to noise, got Density"):
        Density(2).noise(torch.zeros(1, 2))
