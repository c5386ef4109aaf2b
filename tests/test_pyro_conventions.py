"""Flows as transforms in Pyro: in distributions, modules, handlers and inference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms as pyro_transforms
from pyro.distributions.conditional import ConditionalComposeTransformModule
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.reparam import TransformReparam
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.func import jacrev, vmap

from pyro_maf import IAF, MAF, ConditionalIAF, RealNVP
from pyro_maf.testing.subjects import at_context
from pyro_maf.transforms import ConditionalFlow, Flow
from tests.registry import REGISTRY, Architecture, build

CONDITIONAL = [name for name in REGISTRY if name.startswith("Conditional")]
every_transform = pytest.mark.parametrize("name", REGISTRY)
either_way = pytest.mark.parametrize("inverted", [False, True], ids=["flow", "inverse"])
two_sizes = pytest.mark.parametrize("input_dim", [2, 5])
double = torch.float64
TINY: dict[str, Any] = {"num_layers": 2, "hidden_dims": [8], "activation": "tanh"}


def unbound(name: str, input_dim: int = 3) -> Flow | ConditionalFlow:
    a = Architecture(input_dim, 2, 2, [8], "tanh", "random", seed=input_dim)
    return build(name, a, double, "cpu", gain=0.7)


def bound(name: str, input_dim: int = 3, inverted: bool = False) -> Flow:
    flow = at_context(unbound(name, input_dim))
    return flow.inv if inverted else flow


def shaken(flow: Any) -> Any:
    """The flow in float64 with random parameters."""
    flow = flow.double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=double))
    return flow


def normal(*shape: int, **kwargs: Any) -> Any:
    """A batch of independent standard normals with scalar events."""
    return dist.Normal(torch.zeros(shape, dtype=double), torch.ones(shape, dtype=double), **kwargs)


def transformed(flow: Any, *batch: int) -> Any:
    return dist.TransformedDistribution(normal(*batch, flow.input_dim).to_event(1), [flow])


# The requirements of Pyro's own tests of transforms


@every_transform
@either_way
def test_attributes_are_those_of_a_transform(name: str, inverted: bool) -> None:
    flow = bound(name, inverted=inverted)
    assert isinstance(flow, dist.TransformModule)
    assert (flow.domain, flow.codomain) == (constraints.real_vector, constraints.real_vector)
    assert flow.event_dim == flow.domain.event_dim == flow.codomain.event_dim == 1
    assert flow.bijective
    assert {flow: "it"}[flow.inv.inv] == "it"
    assert flow != bound(name, inverted=inverted)


@every_transform
@two_sizes
def test_inverts_with_one_log_det(name: str, input_dim: int) -> None:
    """`_call` and `_inverse` bypass the cache."""
    flow = bound(name, input_dim)
    x = normal(input_dim).sample([10])
    y = flow._call(x)
    back = flow._inverse(y)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    log_dets = flow.log_abs_det_jacobian(x, y), flow.log_abs_det_jacobian(back, y)
    torch.testing.assert_close(*log_dets, rtol=0, atol=1e-9)
    torch.testing.assert_close(flow.inv.log_abs_det_jacobian(y, x), -log_dets[0])


@every_transform
@two_sizes
@either_way
def test_log_det_is_that_of_finite_differences(name: str, input_dim: int, inverted: bool) -> None:
    flow = bound(name, input_dim, inverted)
    x = normal(input_dim).sample()
    step = 1e-5 * torch.eye(input_dim, dtype=double)
    rows = (flow(x + step) - flow(x - step)) / 2e-5
    torch.testing.assert_close(flow.log_abs_det_jacobian(x, flow(x)), rows.T.slogdet()[1], rtol=0, atol=1e-6)


@every_transform
@either_way
@pytest.mark.parametrize("batch", [(), (3,), (3, 4), (3, 4, 5)], ids=str)
def test_shapes(name: str, inverted: bool, batch: tuple[int, ...]) -> None:
    flow = bound(name, inverted=inverted)
    # A base with scalar events, which the distribution turns into vectors.
    density = dist.TransformedDistribution(normal(*batch, 3), [flow])
    assert (density.batch_shape, density.event_shape) == (batch, (3,))
    assert flow.forward_shape(torch.Size(batch + (3,))) == flow.inverse_shape(torch.Size(batch + (3,))) == batch + (3,)
    y = density.sample([2])
    assert y.shape == (2, *batch, 3)
    assert density.log_prob(y).shape == (2, *batch)
    with pytest.raises(ValueError, match=r"expected a last dimension of 3 \(input_dim\), got shape"):
        dist.TransformedDistribution(normal(*batch, 4), [flow])


@every_transform
@either_way
def test_cache_can_be_set_on_and_off(name: str, inverted: bool) -> None:
    flow = bound(name, inverted=inverted)
    without = flow.with_cache(0)
    assert flow.with_cache(1) is flow
    assert [*map(id, without.parameters())] == [*map(id, flow.parameters())]
    y = transformed(flow).rsample([4])
    torch.testing.assert_close(transformed(without).log_prob(y), transformed(flow).log_prob(y))
    assert without.with_cache(1)._cache_size == without.inv.with_cache(1)._cache_size == 1
    with pytest.raises(ValueError, match="expected cache_size 0 or 1, got 2"):
        flow.with_cache(2)


# In distributions


@every_transform
@either_way
def test_density_is_the_change_of_variables(name: str, inverted: bool) -> None:
    flow = bound(name, inverted=inverted)
    y = normal(3).sample([4])
    backward = vmap(jacrev(flow.inv))(y)
    expected = normal(3).to_event(1).log_prob(flow.inv(y)) + backward.slogdet()[1]
    torch.testing.assert_close(transformed(flow).log_prob(y), expected, rtol=1e-7, atol=1e-9)


@every_transform
@either_way
def test_expands_and_joins_events(name: str, inverted: bool) -> None:
    density = transformed(bound(name, inverted=inverted))
    wide = density.expand([5]).expand([4, 5])
    y = wide.rsample([2])
    assert (wide.batch_shape, y.shape) == ((4, 5), (2, 4, 5, 3))
    rows = density.log_prob(y)
    torch.testing.assert_close(wide.log_prob(y), rows)
    torch.testing.assert_close(wide.to_event(1).log_prob(y), rows.sum(-1))
    keep = torch.rand(4, 5) < 0.5
    torch.testing.assert_close(wide.mask(keep).log_prob(y), rows * keep)


@every_transform
def test_reparameterized_sample_and_its_score(name: str) -> None:
    """Score and gradient of a sample equal those of an uncached copy."""
    flow = bound(name)
    parameters = list(flow.parameters())
    density = transformed(flow)
    y = density.rsample([6])
    assert density.has_rsample
    assert y.requires_grad == bool(parameters)
    own, copied = density.log_prob(y), density.log_prob(y.clone())
    torch.testing.assert_close(own, copied, rtol=1e-9, atol=1e-9)
    if parameters:
        of_own, of_copied = (
            torch.autograd.grad(score.sum(), parameters, retain_graph=True, materialize_grads=True, allow_unused=True)
            for score in (own, copied)
        )
        torch.testing.assert_close(of_own, of_copied, rtol=1e-7, atol=1e-8)


@either_way
def test_composes_with_pyros_transforms(inverted: bool) -> None:
    """Between elementwise transforms, log-determinants add up, and the support is that of the last."""
    flow = bound("MAF", inverted=inverted)
    before = pyro_transforms.AffineTransform(1.0, 2.0)
    density = dist.TransformedDistribution(normal(3), [before, flow, pyro_transforms.SigmoidTransform()])
    y = density.sample([7])
    assert bool(density.support.check(y).all())
    assert bool(((y > 0) & (y < 1)).all())
    free = torch.logit(y)
    x = flow.inv(free)
    expected = dist.Normal(torch.ones(3, dtype=double), 2.0).log_prob(x).sum(-1) - flow.log_abs_det_jacobian(x, free)
    torch.testing.assert_close(density.log_prob(y), expected - (y * (1 - y)).log().sum(-1))


@either_way
@pytest.mark.parametrize("cache_size", [0, 1])
def test_in_a_compose_transform_module(inverted: bool, cache_size: int) -> None:
    parts = [bound("MAF", inverted=inverted), bound("Permute"), bound("IAF", inverted=not inverted)]
    composed = dist.ComposeTransformModule(parts).with_cache(cache_size)
    assert len(list(composed.parameters())) == sum(len(list(part.parameters())) for part in parts)
    x = normal(3).sample([4])
    y = composed(x)
    torch.testing.assert_close(composed.inv(y), x)
    one_by_one = dist.TransformedDistribution(normal(3), parts)
    joint = dist.TransformedDistribution(normal(3), [composed])
    torch.testing.assert_close(joint.log_prob(y), one_by_one.log_prob(y.clone()))


# Contexts


@pytest.mark.parametrize("name", CONDITIONAL)
@either_way
def test_conditional_transformed_distribution(name: str, inverted: bool) -> None:
    flow = unbound(name)
    conditional = dist.ConditionalTransformedDistribution(normal(3).to_event(1), [flow.inv if inverted else flow])
    assert isinstance(flow, dist.ConditionalTransformModule)
    assert len(list(flow.inv.parameters())) == len(list(flow.parameters())) > 0
    context = torch.randn(5, 2, dtype=double)
    density = conditional.condition(context)
    y = density.sample([4])
    assert (density.batch_shape, density.event_shape, y.shape) == ((5,), (3,), (4, 5, 3))
    score = density.log_prob(y)
    for row in range(5):
        alone = conditional.condition(context[row])
        assert alone.batch_shape == ()
        torch.testing.assert_close(alone.log_prob(y[:, row]), score[:, row], rtol=1e-9, atol=1e-9)


def test_conditional_and_plain_transforms_compose() -> None:
    plain, given = bound("MAF"), unbound("ConditionalIAF")
    stack = ConditionalComposeTransformModule([plain, given.inv], cache_size=1)
    assert len(list(stack.parameters())) == len(list(plain.parameters())) + len(list(given.parameters()))
    context = torch.randn(5, 2, dtype=double)
    y = normal(3).sample([5])
    actual = dist.ConditionalTransformedDistribution(normal(3), [stack]).condition(context).log_prob(y)
    expected = dist.ConditionalTransformedDistribution(normal(3), [plain, given.inv]).condition(context).log_prob(y)
    torch.testing.assert_close(actual, expected)


# Pyro modules


@pytest.mark.parametrize(
    "make",
    [lambda: bound("MAF"), lambda: bound("MAF").inv, lambda: unbound("ConditionalMAF")],
    ids=["flow", "inverse", "conditional"],
)
def test_registers_and_restores_by_name(make: Callable[[], nn.Module], tmp_path: Any) -> None:
    flow, store = make(), pyro.get_param_store()
    assert pyro.module("flow", flow) is flow
    assert {name.removeprefix("flow$$$") for name in store} == {name for name, _ in flow.named_parameters()}
    store.save(tmp_path / "store")
    expected = _scores(flow)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(2)
    assert not torch.allclose(_scores(flow), expected)
    pyro.clear_param_store()
    store.load(tmp_path / "store")
    pyro.module("flow", flow, update_module_params=True)
    torch.testing.assert_close(_scores(flow), expected)


def _scores(flow: Any) -> Tensor:
    own = flow if isinstance(flow, Flow) else flow.condition(torch.ones(2, dtype=double))
    return transformed(own).log_prob(torch.linspace(-1, 1, 12, dtype=double).reshape(4, 3)).detach()


def test_lives_in_a_pyro_module() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.flow = bound("IAF")

        def forward(self) -> Tensor:
            with pyro.plate("rows", 4):
                return pyro.sample("z", transformed(self.flow))

    model = Model()
    trace = poutine.trace(model).get_trace()
    assert {name for name, _ in model.named_parameters()} == {f"flow.{key}" for key, _ in model.flow.named_parameters()}
    torch.testing.assert_close(trace.log_prob_sum(), transformed(model.flow).log_prob(trace.nodes["z"]["value"]).sum())
    assert Predictive(model, num_samples=7)()["z"].shape == (7, 4, 3)
    assert Predictive(model, num_samples=7, parallel=True)()["z"].shape == (7, 4, 3)


# Under handlers


@pytest.mark.parametrize("name", ["MAF", "IAF", "RealNVP", "Stack"])
@either_way
def test_under_handlers(name: str, inverted: bool) -> None:
    density = transformed(bound(name, inverted=inverted))
    keep = torch.arange(4) < 3

    def model() -> Tensor:
        with pyro.plate("rows", 4), poutine.mask(mask=keep), poutine.scale(scale=2.0):
            return pyro.sample("y", density)

    trace = poutine.trace(model).get_trace()
    y = trace.nodes["y"]["value"]
    expected = 2 * density.log_prob(y.detach().clone())[:3].sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace()
    assert replayed.nodes["y"]["value"] is y
    torch.testing.assert_close(replayed.log_prob_sum(), expected)
    conditioned = poutine.trace(poutine.condition(model, {"y": y})).get_trace()
    assert conditioned.nodes["y"]["is_observed"]
    torch.testing.assert_close(conditioned.log_prob_sum(), expected)
    free = poutine.trace(poutine.uncondition(poutine.condition(model, {"y": y}))).get_trace()
    assert not free.nodes["y"]["is_observed"]
    assert "y" not in poutine.trace(poutine.block(model, hide=["y"])).get_trace().nodes


def test_reparameterizes_into_its_base() -> None:
    flow = bound("IAF")
    model = poutine.reparam(lambda: pyro.sample("y", transformed(flow)), config={"y": TransformReparam()})
    nodes = poutine.trace(model).get_trace().nodes
    torch.testing.assert_close(nodes["y"]["value"], flow(nodes["y_base"]["value"].clone()))


# In inference


CORRELATED = torch.tensor([[1.0, 0.9], [0.9, 1.5]], dtype=double)


@pytest.mark.parametrize("make", [IAF, RealNVP])
def test_a_guide_with_vectorized_particles_finds_a_correlated_normal(make: Any) -> None:
    flow = make(2, **TINY).double()
    target = dist.MultivariateNormal(torch.tensor([1.0, -1.0], dtype=double), CORRELATED)

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("z", transformed(flow))

    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
    svi = SVI(lambda: pyro.sample("z", target), guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = [svi.step() for _ in range(150)]
    assert all(map(math.isfinite, losses))
    # The target is normalised, so the loss is a divergence, 3.7 at the start and 0 at best.
    assert sum(losses[:5]) / 5 > 1
    assert sum(losses[-30:]) / 30 < 0.1


def test_an_amortized_guide_on_subsampled_rows() -> None:
    """z ~ N(0, 1), x ~ N(z, 1/2): given x, z is normal about 0.8 x with variance 0.2."""
    data = torch.randn(40, 2, dtype=double)
    flow = ConditionalIAF(2, 2, num_layers=1, hidden_dims=[16]).double()
    guide_of = dist.ConditionalTransformedDistribution(normal(2).to_event(1), [flow])

    def model() -> None:
        with pyro.plate("rows", 40, subsample_size=10) as rows:
            z = pyro.sample("z", normal(2).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=data[rows])

    def guide() -> None:
        pyro.module("flow", flow)
        with pyro.plate("rows", 40, subsample_size=10) as rows:
            pyro.sample("z", guide_of.condition(data[rows]))

    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = [svi.step() for _ in range(200)]
    assert all(map(math.isfinite, losses))
    z = guide_of.condition(data).sample([1000])
    assert float((z.mean(0) - 0.8 * data).abs().mean()) < 0.1
    assert float((z.var(0) - 0.2).abs().mean()) < 0.05


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(num_particles=2),
        TraceGraph_ELBO(),
        TraceMeanField_ELBO(),
        RenyiELBO(alpha=0.5, num_particles=4, vectorize_particles=True),
        ReweightedWakeSleep(num_particles=4, model_has_params=False, vectorize_particles=True),
    ],
    ids=lambda elbo: type(elbo).__name__,
)
@either_way
def test_every_objective_supports_a_flow_as_prior_and_guide(elbo: Any, inverted: bool) -> None:
    prior = transformed(bound("MAF", inverted=inverted))
    flow = bound("IAF", inverted=inverted)

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("z", transformed(flow))

    svi = SVI(lambda: pyro.sample("z", prior), guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    before = [parameter.detach().clone() for parameter in flow.parameters()]
    for _ in range(3):
        loss = svi.step()
        assert all(map(math.isfinite, loss if isinstance(loss, tuple) else (loss,)))
    moved = [bool((parameter != old).any()) for parameter, old in zip(flow.parameters(), before, strict=True)]
    assert all(moved)


@either_way
@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")  # warning of Pyro
def test_the_jit_objective_trains_a_guide(inverted: bool) -> None:
    """torch.jit traces the objective once, with or without the sequential direction."""
    target = dist.MultivariateNormal(torch.tensor([1.0, -1.0], dtype=double), CORRELATED)
    flow = IAF(2, **TINY).double()
    flow = flow.inv if inverted else flow

    def guide() -> None:
        pyro.module("flow", flow)
        pyro.sample("z", transformed(flow))

    elbo = JitTrace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0, ignore_jit_warnings=True)
    svi = SVI(lambda: pyro.sample("z", target), guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = [svi.step() for _ in range(100)]
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])


@pytest.mark.parametrize("make", [MAF, IAF, RealNVP])
def test_nuts_takes_a_transformed_distribution_for_a_prior(make: Any) -> None:
    prior = transformed(shaken(make(2, **TINY)))
    observed = torch.tensor([1.0, -1.0], dtype=double)

    def model() -> None:
        z = pyro.sample("z", prior)
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=observed)

    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=150, warmup_steps=50, disable_progbar=True)
    mcmc.run()
    axis = torch.linspace(-3, 3, 121, dtype=double)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        weights = (prior.log_prob(grid) + dist.Normal(grid, 0.5).to_event(1).log_prob(observed)).softmax(0)
    torch.testing.assert_close(mcmc.get_samples()["z"].mean(0), weights @ grid, rtol=0, atol=0.2)
