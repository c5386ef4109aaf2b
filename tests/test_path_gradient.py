"""The path gradient of the evidence lower bound, against the full gradient and its score term."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

from pyro_maf import IAF, ConditionalIAF
from pyro_maf.infer import TracePath_ELBO
from tests.posteriors import GUIDES, SMALL, bound, counting, regression, steps

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.usefixtures("fresh")


def density_elbo(**options: Any) -> Any:
    """`Trace_ELBO` as for other guides, whose entropy term keeps the gradient through the density's parameters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        from parts.steps import DensityELBO
    return DensityELBO(**options)


def shake(parameters: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.2 * torch.randn_like(parameter))


def trained(guide: Callable[[], Any]) -> list[Tensor]:
    """Trainable parameters of a guide, as Pyro finds them."""
    trace: Any = poutine.trace(guide, param_only=True).get_trace()
    return [site["value"].unconstrained() for site in trace.nodes.values() if site["type"] == "param"]


def gradients(objective: Any, model: Any, guide: Any, parameters: list[Tensor]) -> tuple[float, list[Tensor]]:
    for parameter in parameters:
        parameter.grad = None
    pyro.set_rng_seed(3)
    loss = objective.loss_and_grads(model, guide)
    return loss, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


def scores(guide: Any, parameters: list[Tensor], particles: int) -> list[Tensor]:
    """Gradient of log q with respect to its parameters at fixed draws, those of `gradients`."""
    pyro.set_rng_seed(3)
    with pyro.plate("particles", particles, dim=-3):
        trace: Any = poutine.trace(guide).get_trace()
    total = torch.zeros(())
    for site in trace.nodes.values():
        if site["type"] == "sample" and not isinstance(site["fn"], dist.Delta):
            site["value"] = site["value"].detach()
            log_prob = site["fn"].log_prob(site["value"]) * site["scale"]
            total = total + (log_prob if site["mask"] is None else log_prob * site["mask"]).sum()
    found = torch.autograd.grad(total / particles, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def largest(found: list[Tensor]) -> float:
    return max(float(each.abs().max()) for each in found if each.numel())


def differ_by_the_score(model: Any, guide: Any, particles: int = 3) -> None:
    """Values are equal, and gradients differ by the score, which has mean zero, draw by draw."""
    parameters = trained(guide)
    shake(parameters)
    options: dict[str, Any] = {"num_particles": particles, "vectorize_particles": True, "max_plate_nesting": 2}
    loss, total = gradients(density_elbo(**options), model, guide, parameters)
    path_loss, path = gradients(TracePath_ELBO(**options), model, guide, parameters)
    assert path_loss == pytest.approx(loss, rel=1e-5, abs=1e-5)
    found = [a - b for a, b in zip(total, path, strict=True)]
    expected = scores(guide, parameters, particles)
    assert largest(expected) > 1e-3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * max(1.0, abs(loss)))


@pytest.mark.parametrize("make", [*GUIDES, AutoMultivariateNormal, AutoNormal])
def test_gradients_differ_from_the_usual_ones_by_the_score(make: Any) -> None:
    known = regression()
    guide = make(known.model, **SMALL) if make in GUIDES else make(known.model)
    guide()
    differ_by_the_score(known.model, guide.double())


@pytest.mark.parametrize("make", GUIDES)
def test_guides_have_their_path_gradient_under_trace_elbo_too(make: Any) -> None:
    known = regression()
    guide = make(known.model, **SMALL)
    guide()
    parameters = trained(guide.double())
    shake(parameters)
    options: dict[str, Any] = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2}
    loss, usual = gradients(Trace_ELBO(**options), known.model, guide, parameters)
    path_loss, path = gradients(TracePath_ELBO(**options), known.model, guide, parameters)
    assert path_loss == pytest.approx(loss, rel=1e-9)
    assert largest(path) > 1e-3
    for one, other in zip(usual, path, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", GUIDES)
def test_constrained_sites_carry_their_change_of_variables(make: Any) -> None:
    guide = make(counting, **SMALL)
    guide.setup()
    differ_by_the_score(counting, guide)


def two_sites() -> None:
    pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4):
        pyro.sample("b", dist.Normal(0.0, 1.0))


def guide_of_two() -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.5))
    scale = pyro.param("scale", lambda: torch.tensor(2.0), constraint=dist.constraints.positive)
    rows = pyro.param("rows_loc", lambda: torch.arange(4.0))
    pyro.sample("a", dist.Normal(loc, scale))
    with pyro.plate("rows", 4), poutine.scale(scale=3.0), poutine.mask(mask=torch.tensor([True, True, False, True])):
        pyro.sample("b", dist.Normal(rows, scale))


def test_scales_and_masks_of_a_guide_are_kept() -> None:
    differ_by_the_score(two_sites, guide_of_two)


def test_a_context_is_held_fixed_with_the_parameters_it_came_from() -> None:
    flow, network = ConditionalIAF(2, 3, num_layers=1, hidden_dims=[8]), nn.Linear(1, 3)

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.module("network", network)
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [flow.condition(network(torch.ones(1)))]))

    differ_by_the_score(model, guide)


def no_gradient_in(model: Any, guide: Any, atol: float) -> None:
    parameters = trained(guide)
    options: dict[str, Any] = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}
    _, usual = gradients(density_elbo(**options), model, guide, parameters)
    _, path = gradients(TracePath_ELBO(**options), model, guide, parameters)
    assert largest(usual) > 0.1
    assert largest(path) < atol


@pytest.mark.parametrize("make", GUIDES)
def test_a_guide_that_is_the_posterior_has_no_gradient_whatever_it_draws(make: Any) -> None:
    known = regression()
    no_gradient_in(known.model, make(known.model, **SMALL).setup(), atol=1e-4)


def test_a_full_rank_normal_of_pyro_that_is_the_posterior_has_no_gradient() -> None:
    known = regression()
    guide = AutoMultivariateNormal(known.model)
    guide()
    guide.double()
    factor = torch.linalg.cholesky(known.covariance)
    guide.loc = nn.Parameter(known.mean)
    guide.scale = factor.diagonal()
    guide.scale_tril = factor / factor.diagonal()[:, None]
    no_gradient_in(known.model, guide, atol=1e-8)


def test_normal_parameters_that_are_the_posterior_have_no_gradient() -> None:
    target = dist.Normal(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0])).to_event(1)

    def guide() -> None:
        loc = pyro.param("loc", lambda: torch.tensor([1.0, -1.0]))
        scale = pyro.param("scale", lambda: torch.tensor([0.5, 2.0]), constraint=dist.constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    no_gradient_in(lambda: pyro.sample("z", target), guide, atol=1e-5)


def test_a_flow_that_is_the_posterior_has_no_gradient() -> None:
    flow = IAF(2, num_layers=2, hidden_dims=[8]).double()
    shake([*flow.parameters()])
    base = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    copy = IAF(2, num_layers=2, hidden_dims=[8]).double().requires_grad_(False)
    copy.load_state_dict(flow.state_dict())
    no_gradient_in(lambda: pyro.sample("z", dist.TransformedDistribution(base, [copy])), guide, atol=1e-8)


class OneWay(dist.TransformModule):
    """A flow whose inverse fails."""

    domain = codomain = dist.constraints.real_vector
    bijective = True

    def __init__(self) -> None:
        super().__init__(cache_size=1)
        self.shift = nn.Parameter(torch.zeros(2))
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)

    def _call(self, x: Tensor) -> Tensor:
        return x * self.fixed + self.shift

    def _inverse(self, y: Tensor) -> Tensor:
        raise RuntimeError("this flow knows no inverse")

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros(x.shape[:-1])


def standard() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def test_parameters_train_on_afterwards() -> None:
    flow = IAF(2, num_layers=1, hidden_dims=[8]).eval()
    next(flow.parameters()).requires_grad_(False)
    expected = [parameter.requires_grad for parameter in flow.parameters()]

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow]))

    TracePath_ELBO().loss_and_grads(standard, guide)
    assert [parameter.requires_grad for parameter in flow.parameters()] == expected


def test_parameters_train_on_after_an_error() -> None:
    flow = OneWay().eval()

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow]))

    assert isinstance(Trace_ELBO().loss_and_grads(standard, guide), float)
    with pytest.raises(RuntimeError, match="knows no inverse"):
        TracePath_ELBO().loss_and_grads(standard, guide)
    assert [parameter.requires_grad for parameter in flow.parameters()] == [True, False]


def test_a_site_that_is_not_reparameterised_is_named() -> None:
    def model() -> None:
        pyro.sample("coin", dist.Bernoulli(0.5))

    def guide() -> None:
        pyro.sample("coin", dist.Bernoulli(pyro.param("p", lambda: torch.tensor(0.3))))

    with pytest.raises(NotImplementedError, match="reparameterised sites, got coin of Bernoulli: use Trace_ELBO"):
        TracePath_ELBO().loss_and_grads(model, guide)


def test_the_mean_over_many_draws_is_that_of_the_usual_gradient() -> None:
    """For a gamma posterior and a normal guide far from it."""
    guide = AutoNormal(counting, init_scale=0.5)
    guide()
    parameters = trained(guide)
    options: dict[str, Any] = {"num_particles": 20_000, "vectorize_particles": True, "max_plate_nesting": 1}
    _, usual = gradients(Trace_ELBO(**options), counting, guide, parameters)
    _, path = gradients(TracePath_ELBO(**options), counting, guide, parameters)
    for one, other in zip(usual, path, strict=True):
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("vectorised", [True, False])
def test_trains_in_pyros_inference(vectorised: bool) -> None:
    guide = GUIDES[1](counting, **SMALL, init_scale=0.1)
    objective = TracePath_ELBO(num_particles=4, vectorize_particles=vectorised)
    before = bound(counting, guide)
    steps(objective, counting, guide, 30)
    assert bound(counting, guide) > before + 0.2


def test_optimizers_of_torch_take_its_loss() -> None:
    guide = GUIDES[1](counting, **SMALL).setup()
    TracePath_ELBO().differentiable_loss(counting, guide).backward()
    assert any(bool(parameter.grad.any()) for parameter in guide.parameters() if parameter.grad is not None)
