"""AutoMAF, AutoIAF and AutoRealNVP as guides in Pyro."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import init_to_value
from pyro.optim.clipped_adam import ClippedAdam as PyroClippedAdam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_maf import IAF, MAF, FlowPrior, load
from pyro_maf.infer import AutoIAF, TracePath_ELBO, fit_guide
from pyro_maf.infer.guides import annealing
from pyro_maf.infer.guides.path_gradient import GradientLimit
from tests.posteriors import (
    COUNTS,
    GAMMA,
    GUIDES,
    SMALL,
    bound,
    counting,
    drawn,
    normal_of,
    regression,
    same,
    steps,
    weights,
)

pytestmark = pytest.mark.usefixtures("fresh")
each_guide = pytest.mark.parametrize("make", GUIDES)
UNSEARCHED: dict[str, Any] = {**SMALL, "init_scale": 0.3}
"""Options without the search for a start, for tests that do not depend on it, whose time it would dominate."""


def shaken(guide: Any, gain: float = 0.3) -> Any:
    """Move the guide's parameters, as if trained."""
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(gain * torch.randn_like(parameter) / max(1, parameter.shape[-1]) ** 0.5)
    return guide


# -- models of every shape ---------------------------------------------------------------------------------------------


def scalar() -> None:
    pyro.sample("z", dist.Gamma(2.0, 1.0))


def several() -> None:
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    share = pyro.sample("share", dist.Beta(2.0, 3.0))
    vector = pyro.sample("vector", dist.Normal(torch.zeros(3), scale[..., None]).to_event(1))
    pyro.sample("y", dist.Normal(share * vector.sum(-1), scale), obs=torch.tensor(0.5))


def shapes_of_events() -> None:
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    ordered = dist.transforms.OrderedTransform()
    pyro.sample("ordered", dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), ordered))
    pyro.sample("correlation", dist.LKJCholesky(3, 2.0))
    above = pyro.sample("above", dist.ImproperUniform(constraints.greater_than(2.0), (), ()))
    pyro.sample("y", dist.Normal(above, 1.0), obs=torch.tensor(3.0))


def plates() -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        v = pyro.sample("v", dist.Dirichlet(torch.ones(2)))
        pyro.sample("y", dist.Normal(z + v[..., 0], 1.0), obs=torch.arange(3.0))


def nested() -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("columns", 2, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, scale))
        with pyro.plate("rows", 3, dim=-1):
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("y", dist.Normal(b, scale), obs=torch.ones(2, 3))


def flat() -> None:
    z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    pyro.sample("y", dist.Normal(z, torch.tensor([0.5, 2.0])).to_event(1), obs=torch.tensor([1.0, -1.0]))


def double() -> None:
    loc = torch.zeros(2, dtype=torch.float64)
    z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
    pyro.sample("scale", dist.LogNormal(z[..., 0], 1.0))


MODELS: dict[str, tuple[Callable[[], None], dict[str, tuple[int, ...]]]] = {
    "scalar": (scalar, {"z": ()}),
    "several": (several, {"scale": (), "share": (), "vector": (3,)}),
    "events": (
        shapes_of_events,
        {"simplex": (3,), "ordered": (3,), "correlation": (3, 3), "above": ()},
    ),
    "plates": (plates, {"loc": (), "z": (3,), "v": (3, 2)}),
    "nested": (nested, {"scale": (), "a": (2, 1), "b": (2, 3)}),
    "flat": (flat, {"z": (2,)}),
    "double": (double, {"z": (2,), "scale": ()}),
}
# Guides differ only in the flow.
in_turn = pytest.mark.parametrize(
    ("make", "model", "shapes"), [(GUIDES[i % 3], *known) for i, known in enumerate(MODELS.values())], ids=MODELS
)


def supports(model: Any, guide: Any) -> dict[str, Any]:
    trace: Any = poutine.trace(poutine.replay(model, trace=poutine.trace(guide).get_trace())).get_trace()
    return {name: trace.nodes[name]["fn"].support for name in trace.stochastic_nodes if name in guide()}


@in_turn
def test_takes_models_of_every_shape(make: Any, model: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    guide = shaken(make(model, **SMALL).setup())
    sites, log_q = drawn(guide)
    batch = guide.rsample((4, 2))
    assert {name: tuple(value.shape) for name, value in sites.items() if name in shapes} == shapes
    assert {name: tuple(value.shape) for name, value in batch.items()} == {n: (4, 2, *s) for n, s in shapes.items()}
    assert {name: tuple(value.shape) for name, value in guide.median().items()} == shapes
    quantiles = guide.quantiles([0.1, 0.5, 0.9])
    assert {name: tuple(value.shape) for name, value in quantiles.items()} == {n: (3, *s) for n, s in shapes.items()}
    # The entrywise medians of a simplex or Cholesky factor need not be one.
    mixed = ("simplex", "v", "correlation")
    for name, support in supports(model, guide).items():
        for value in (sites[name], batch[name], *([] if name in mixed else [guide.median()[name]])):
            assert bool(support.check(value).all()), name
    # `log_prob` agrees with the trace that drew the points.
    torch.testing.assert_close(guide.log_prob(sites), log_q, rtol=2e-3, atol=2e-3)
    assert guide.log_prob(batch).shape == (4, 2)
    for value in batch.values():
        value.sum().backward(retain_graph=True)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in guide.transform.parameters())


@in_turn
def test_trains_on_models_of_every_shape(make: Any, model: Any, shapes: Any) -> None:
    """From the optimizer's first step on, and with a particle plate that was absent at set-up."""
    guide = make(model, **UNSEARCHED)
    nesting = 2 if model is nested else 1
    objective = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=nesting)
    losses = steps(objective, model, guide, 2)
    assert all(map(math.isfinite, losses))
    before = weights(guide)
    steps(objective, model, guide, 1)
    assert not same(before, weights(guide))


# -- setting up --------------------------------------------------------------------------------------------------------


@each_guide
def test_parameters_exist_before_an_optimizer_does(make: Any) -> None:
    """Unlike Pyro's AutoIAFNormal, which has none before its first call."""
    guide = make(counting, **SMALL).setup()
    before = weights(guide)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        Trace_ELBO().differentiable_loss(counting, guide).backward()
        optimizer.step()
    assert before
    assert not same(before, weights(guide))


@each_guide
def test_the_first_call_sets_up(make: Any) -> None:
    guide = make(counting, **SMALL)
    assert [*guide.parameters()] == []
    assert guide()["rate"].shape == ()
    assert [*guide.parameters()] != []


def test_setting_up_again_changes_nothing() -> None:
    guide = AutoIAF(counting, **SMALL).setup()
    before = [*map(id, guide.parameters())]
    assert guide.setup() is guide
    assert [*map(id, guide.parameters())] == before


def test_init_loc_fn_is_where_a_guide_with_a_scale_starts() -> None:
    """Unlike Pyro's AutoIAFNormal, which ignores `init_loc_fn`."""
    values = {"scale": torch.tensor(3.0), "share": torch.tensor(0.9), "vector": torch.tensor([1.0, 2.0, 3.0])}
    guide = AutoIAF(several, init_loc_fn=init_to_value(values=values), init_scale=1e-3, **SMALL).setup()
    for name, value in guide.median().items():
        torch.testing.assert_close(value, values[name], rtol=1e-2, atol=1e-2)
    _, factor = normal_of(guide)
    torch.testing.assert_close(factor, 1e-3 * torch.eye(5), rtol=1e-2, atol=1e-5)


def test_init_loc_fn_is_where_the_ascent_begins() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        pyro.factor("wells", torch.logaddexp(dist.Normal(-8.0, 1.0).log_prob(z), dist.Normal(8.0, 1.0).log_prob(z)))

    for mode in (-8.0, 8.0):
        guide = AutoIAF(model, init_loc_fn=init_to_value(values={"z": torch.tensor(mode * 0.9)}), **SMALL)
        assert float(guide.setup().median()["z"]) == pytest.approx(mode, abs=0.1)


@each_guide
@pytest.mark.parametrize("units", [(1.0, 1.0, 1.0), (1.0, 2000.0, 0.01)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fresh_guide_is_a_normal_posterior(make: Any, units: tuple[float, ...], dtype: torch.dtype) -> None:
    known = regression(units=units, dtype=dtype)
    guide = make(known.model, **SMALL).setup()
    assert {parameter.dtype for parameter in guide.parameters()} == {dtype}
    assert known.distance(*normal_of(guide)) < (1e-4 if dtype == torch.float32 else 1e-8)


def test_a_failed_set_up_can_be_tried_again() -> None:
    def model(fails: bool) -> None:
        if fails:
            raise RuntimeError("no data yet")
        counting()

    guide = AutoIAF(model, **SMALL)
    with pytest.raises(RuntimeError, match="no data yet"):
        guide.setup(True)
    assert guide(False)["rate"].shape == ()


def test_a_model_that_does_not_broadcast_is_set_up_nevertheless() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = z[0] if z[1] > -5 else z[0] - 1
        pyro.sample("y", dist.Normal(loc, 0.5), obs=torch.tensor(1.0))

    loc, factor = normal_of(AutoIAF(model, **SMALL).setup())
    torch.testing.assert_close(loc, torch.tensor([0.8, 0.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(factor @ factor.T, torch.diag(torch.tensor([0.2, 1.0])), atol=1e-3, rtol=0)


def test_arguments_are_the_models() -> None:
    def model(y: Tensor, *, scale: float) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z, scale), obs=y)

    guide, y = AutoIAF(model, **SMALL), torch.tensor([1.0, 3.0])
    assert math.isfinite(steps(Trace_ELBO(), model, guide, 1, y, scale=0.1)[0])
    assert float(guide.median(y, scale=0.1)["z"]) == pytest.approx(2.0, abs=0.05)


@each_guide
def test_attributes_are_those_of_pyros_guides(make: Any) -> None:
    guide = make(several, **UNSEARCHED).setup()
    assert guide.get_posterior().event_shape == (guide.latent_dim,) == (5,)
    assert guide.sample_latent().shape == (5,)
    torch.testing.assert_close(guide.get_base_dist().mean, torch.zeros(5))


# -- objectives --------------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "Trace": Trace_ELBO(),
    "Trace vectorised": Trace_ELBO(num_particles=3, vectorize_particles=True),
    "MeanField": TraceMeanField_ELBO(),
    "Renyi": RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True),
    "Graph": TraceGraph_ELBO(),
}


@pytest.mark.filterwarnings("ignore:.*TraceMeanField_ELBO:UserWarning")
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@each_guide
def test_trains_with_pyros_objectives(make: Any, objective: Any) -> None:
    guide = make(plates, **SMALL, init_scale=0.05)
    before = bound(plates, guide)
    steps(objective, plates, guide, 15)
    assert bound(plates, guide) > before + 0.2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@each_guide
def test_trains_with_a_compiled_objective(make: Any) -> None:
    guide = make(plates, **SMALL, init_scale=0.05)
    before = bound(plates, guide)
    steps(JitTrace_ELBO(ignore_jit_warnings=True), plates, guide, 15)
    assert bound(plates, guide) > before + 0.2


@pytest.mark.parametrize("objective", [Trace_ELBO, TracePath_ELBO])
@each_guide
def test_a_step_inverts_its_draws_once_for_the_path_gradient(
    monkeypatch: pytest.MonkeyPatch, make: Any, objective: Any
) -> None:
    guide = make(plates, **UNSEARCHED).setup()
    pulled: list[int] = []
    pull = type(guide.transform).inverse_and_log_det
    monkeypatch.setattr(type(guide.transform), "inverse_and_log_det", lambda *args: pulled.append(1) or pull(*args))
    objective(num_particles=4, vectorize_particles=True, max_plate_nesting=1).loss_and_grads(plates, guide)
    assert len(pulled) == 1


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("objective", [Trace_ELBO, TraceGraph_ELBO, TracePath_ELBO])
def test_the_gradient_vanishes_at_the_posterior(objective: Any, vectorised: bool) -> None:
    def normal() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    guide = AutoIAF(normal, **SMALL).setup()
    objective(num_particles=4, vectorize_particles=vectorised, max_plate_nesting=0).loss_and_grads(normal, guide)
    gradients = torch.cat([each.grad.flatten() for each in guide.parameters() if each.grad is not None])
    assert len(gradients) > 100
    assert float(gradients.abs().max()) < 1e-3


def test_an_outlying_gradient_is_clipped() -> None:
    limit = GradientLimit()
    usual = torch.ones(32, 2) * torch.tensor([1.0, 0.0])
    odd = torch.tensor([[1.0, 0.0], [800.0, 100.0], [math.nan, 0.0], [-1.0, math.inf]])
    unlike = limit(0, (torch.tensor([[900.0, 1.0], [math.inf, 1.0]]),))[0]  # nothing is usual yet
    assert torch.equal(unlike, torch.tensor([[900.0, 1.0], [0.0, 0.0]]))
    limit = GradientLimit()
    for _ in range(2):
        assert torch.equal(limit(0, (usual,))[0], usual)
    limited = limit(0, (odd,))[0]  # nothing is usual yet of the second entry
    assert torch.allclose(limited, torch.tensor([[1.0, 0.0], [8.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))


def by_hand(optimizer: torch.optim.Optimizer, weight: Tensor, count: int) -> float:
    """Distance that `count` steps with a gradient of 1 move a weight."""
    before = weight.detach().clone()
    for _ in range(count):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return float((before - weight.detach()).mean())


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("make", [partial(torch.optim.SGD, lr=2.0**-10), partial(PyroClippedAdam, lr=2.0**-10)])
def test_steps_shorten_at_a_constant_rate(make: Any, local: bool) -> None:
    """Adam's steps, as long as the learning rate for any gradient, would move a guide away from the posterior."""
    with pyro.settings.context(module_local_params=local):
        guide = AutoIAF(counting, **UNSEARCHED)
        guide()
        trained, other = next(guide.parameters()), nn.Parameter(torch.zeros(2))
        optimizers = make([trained]), make([other])
        first, second = by_hand(optimizers[0], trained, 1_000), by_hand(optimizers[0], trained, 1_000)
        assert first == pytest.approx(2.0**-10 * 1_000 * (3**0.5 - 1), rel=1e-3)
        assert first + second == pytest.approx(2.0**-10 * 1_000 * (5**0.5 - 1), rel=1e-3)
        assert by_hand(optimizers[1], other, 1_000) == pytest.approx(2.0**-10 * 1_000, rel=1e-3)


def test_steps_with_an_encoder_stay_whole() -> None:
    guide = AutoIAF(by_row, encoder=lambda y: y[:, None], create_plates=lambda y: pyro.plate("rows", len(y)), **SMALL)
    guide(torch.zeros(3))
    weight = next(guide.parameters())
    assert by_hand(torch.optim.SGD([weight], lr=2.0**-10), weight, 1_000) == pytest.approx(2.0**-10 * 1_000, rel=1e-3)


def test_a_copy_begins_with_whole_steps_again() -> None:
    guide = AutoIAF(counting, **UNSEARCHED)
    guide()
    weight = next(guide.parameters())
    by_hand(torch.optim.SGD([weight], lr=1e-3), weight, 500)
    for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        twin()
        first = next(twin.parameters())
        assert by_hand(torch.optim.SGD([first], lr=1e-3), first, 1) == pytest.approx(1e-3, rel=1e-3)
    assert by_hand(torch.optim.SGD([weight], lr=1e-3), weight, 1) == pytest.approx(1e-3 / 2**0.5, rel=1e-3)


def test_freed_weights_are_not_kept_alive() -> None:
    weight = nn.Parameter(torch.zeros(2))
    annealing.anneal([weight])
    before = len(annealing._annealed)
    del weight
    assert len(annealing._annealed) == before - 1


@each_guide
def test_the_bound_rises_to_the_evidence(make: Any) -> None:
    """A gamma posterior, where a flow is better than a log-normal."""
    guide = make(counting, **SMALL)
    objective = Trace_ELBO(num_particles=16, vectorize_particles=True)
    steps(objective, counting, guide, 50)
    prior = torch.distributions.Gamma(2.0, 1.0)
    rate = torch.tensor(3.0)
    evidence = float(prior.log_prob(rate) + dist.Poisson(rate).log_prob(COUNTS).sum() - GAMMA.log_prob(rate))
    assert evidence - 0.02 < bound(counting, guide) < evidence + 0.01


# -- discrete sites ----------------------------------------------------------------------------------------------------


def mixture() -> None:
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).to_event(1))
    with pyro.plate("rows", 4):
        which = pyro.sample("which", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(loc[..., which], 0.5), obs=torch.tensor([-2.5, -1.5, 1.5, 2.5]))


def mixture_to_be_drawn() -> None:
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).to_event(1))
    which = pyro.sample("which", dist.Categorical(torch.ones(2) / 2))
    pyro.sample("y", dist.Normal(loc[..., which], 0.5), obs=torch.tensor(1.5))


def test_an_error_in_a_step_of_pyro_is_one_line() -> None:
    with pytest.raises(ValueError, match="AutoIAF found no latent variables") as raised:
        steps(Trace_ELBO(), lambda: None, AutoIAF(lambda: None), 1)
    assert len(str(raised.value).splitlines()) == 1


@each_guide
def test_a_discrete_site_is_named_with_what_to_do(make: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"{make.__name__} .*discrete site which: .* infer={{'enumerate': 'parallel'}}, in fit_guide"
    ):
        make(mixture_to_be_drawn).setup()


@each_guide
@pytest.mark.parametrize(
    ("site", "expected"),
    [
        (dist.Poisson(3.0), "discrete site z, whose infinitely many values"),
        (dist.Geometric(0.3).expand([2]).to_event(1), "discrete site z, whose infinitely many values"),
        (dist.Delta(torch.tensor(1.0)), r"site z of Delta, .* pyro\.deterministic"),
        (dist.Delta(torch.zeros(2)).mask(torch.tensor(True)).to_event(1), r"site z of Delta, .* pyro\.deterministic"),
    ],
)
def test_a_site_that_no_guide_can_have_is_refused_with_advice_that_works(make: Any, site: Any, expected: str) -> None:
    def model() -> None:
        pyro.sample("z", site)
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=rf"^{make.__name__} expected .*{expected}"):
        make(model, **SMALL).setup()


@each_guide
def test_a_discrete_site_can_be_hidden_and_summed_out(make: Any) -> None:
    guide = make(poutine.block(mixture, hide=["which"]), **SMALL, init_scale=0.1)
    objective = TraceEnum_ELBO(num_particles=5, max_plate_nesting=1)
    losses = steps(objective, mixture, guide, 40)
    assert sum(losses[-10:]) < sum(losses[:10])
    assert sorted(guide.median()) == ["loc"]


@each_guide
def test_a_discrete_site_that_is_summed_out_needs_no_hiding(make: Any) -> None:
    guides = [make(model, **SMALL).setup() for model in (mixture, poutine.block(mixture, hide=["which"]))]
    one, other = (guide.median()["loc"] for guide in guides)
    torch.testing.assert_close(one, other)
    steps(TraceEnum_ELBO(max_plate_nesting=1), mixture, guides[0], 2)


# -- quantiles, draws and densities ------------------------------------------------------------------------------------


@each_guide
def test_quantiles_are_exact_where_they_are_known(make: Any) -> None:
    """For a log-normal posterior, which an untrained guide matches. Pyro's AutoIAFNormal has no quantiles."""
    loc, scale = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 1.5])
    guide = make(lambda: pyro.sample("z", dist.LogNormal(loc, scale).to_event(1)), **SMALL).setup()
    expected = torch.tensor([0.05, 0.5, 0.95])
    actual = guide.quantiles(expected)["z"]
    torch.testing.assert_close(actual, dist.LogNormal(loc, scale).icdf(expected[:, None]), rtol=0.02, atol=0)
    torch.testing.assert_close(guide.median()["z"], loc.exp(), rtol=0.01, atol=0)


@each_guide
def test_quantiles_are_those_of_draws(make: Any) -> None:
    guide = shaken(make(several, **UNSEARCHED).setup())
    draws = guide.rsample((20_000,))
    for name, found in guide.quantiles([0.2, 0.8]).items():
        share = (draws[name][:, None] < found).float().mean(0)
        torch.testing.assert_close(
            share, torch.tensor([0.2, 0.8]).reshape(2, *[1] * (found.dim() - 1)).expand_as(found), atol=0.02, rtol=0
        )


def mixing() -> None:
    """Sites whose maps mix or reverse coordinates."""
    pyro.sample("shares", dist.Dirichlet(torch.tensor([3.0, 3.0, 3.0])))
    ordered = dist.transforms.OrderedTransform()
    pyro.sample("cuts", dist.TransformedDistribution(dist.Normal(torch.zeros(4), 1.0).to_event(1), ordered))
    pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    pyro.sample("below", dist.ImproperUniform(constraints.less_than(2.0), (), ()))
    with pyro.plate("rows", 2):
        pyro.sample("parts", dist.Dirichlet(torch.ones(2)))


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_are_marginal_on_every_support(seed: int) -> None:
    pyro.set_rng_seed(seed)
    guide = shaken(AutoIAF(mixing, init_scale=0.5, **SMALL).setup(), gain=0.2)
    levels = torch.tensor([0.05, 0.5, 0.95])
    draws = guide.rsample((20_000,))
    for name, found in guide.quantiles(levels).items():
        share = (draws[name][:, None] < found).float().mean(0)
        # Entries fixed to 0 or 1 equal all their quantiles.
        share = torch.where((found[2] - found[0]).abs() < 1e-6, levels.reshape(-1, *[1] * (found.dim() - 1)), share)
        torch.testing.assert_close(
            share, levels.reshape(-1, *[1] * (found.dim() - 1)).expand_as(share), atol=0.02, rtol=0, msg=name
        )
        assert bool((found.diff(dim=0) >= 0).all())
        torch.testing.assert_close(guide.median()[name], found[1])


def test_quantiles_of_shares_are_those_of_their_beta() -> None:
    """For a Dirichlet posterior, which an untrained guide approximates: each share is Beta(30, 60)."""
    guide = AutoIAF(lambda: pyro.sample("shares", dist.Dirichlet(torch.full((3,), 30.0))), **SMALL).setup()
    found = guide.quantiles([0.05, 0.95])["shares"]
    expected = torch.tensor([0.25416, 0.41674])[:, None].expand(2, 3)
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_quantiles_of_any_shape_of_levels() -> None:
    guide = AutoIAF(several, **UNSEARCHED).setup()
    levels = torch.tensor([[0.1, 0.9], [0.5, 0.2]])
    found = guide.quantiles(levels)["vector"]
    assert found.shape == (2, 2, 3)
    torch.testing.assert_close(found[1, 0], guide.quantiles(0.5)["vector"])


@pytest.mark.parametrize("levels", [[1.5], [-0.1], [0.5, math.nan], torch.tensor(2.0), 7])
def test_quantiles_out_of_range_are_refused(levels: Any) -> None:
    with pytest.raises(ValueError, match=r"AutoIAF expected quantiles from 0 to 1, got (1.5|-0.1|nan|2|7)\.$"):
        AutoIAF(counting, **SMALL).quantiles(levels)


def test_quantiles_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match="AutoIAF expected quantiles to be numbers from 0 to 1, got 'median'"):
        AutoIAF(counting, **SMALL).quantiles("median")


@each_guide
def test_quantiles_are_repeatable_and_leave_the_random_state_alone(make: Any) -> None:
    guide = shaken(make(several, **UNSEARCHED).setup())
    before = torch.get_rng_state()
    assert same(guide.quantiles([0.1, 0.9]), guide.quantiles([0.1, 0.9]))
    assert same(guide.median(), guide.median())
    assert torch.equal(before, torch.get_rng_state())
    assert not any(value.requires_grad for value in guide.median().values())


@each_guide
def test_density_is_a_change_of_variables(make: Any) -> None:
    """With the Jacobian from noise to sites, in double precision."""
    guide = shaken(make(double, **UNSEARCHED).setup())
    noise = torch.randn(3, dtype=torch.float64)

    def sites(u: Tensor) -> Tensor:
        found = guide.sites_of(u)
        return torch.cat([found["z"], found["scale"][None]])

    jacobian = torch.autograd.functional.jacobian(sites, noise)
    expected = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).log_prob(noise).sum() - jacobian.slogdet()[1]
    torch.testing.assert_close(guide.log_prob(guide.sites_of(noise)), expected, rtol=1e-9, atol=1e-9)


@each_guide
def test_density_integrates_to_one(make: Any) -> None:
    guide = shaken(make(scalar, **SMALL).setup())
    log_z = torch.linspace(-80, 80, 100_001, dtype=torch.float64).float()  # its tails may be those of Student's t
    with torch.no_grad():
        density = guide.log_prob({"z": log_z.exp()}).exp() * log_z.exp()
    assert float(torch.trapezoid(density, log_z)) == pytest.approx(1.0, abs=2e-3)


@each_guide
def test_a_single_draw_has_the_shape_of_the_site(make: Any) -> None:
    guide = make(several, **UNSEARCHED).setup()
    expected = {"scale": (), "share": (), "vector": (3,)}
    for sites in (guide.rsample(), guide.sites_of(torch.zeros(5)), guide.quantiles(torch.tensor(0.5))):
        assert {name: tuple(value.shape) for name, value in sites.items()} == expected


@pytest.mark.parametrize("shape", [5, 2.5, "ab", None])
def test_a_sample_shape_that_is_not_a_sequence_is_refused(shape: Any) -> None:
    with pytest.raises(TypeError, match=r"AutoIAF expected sample_shape to be a sequence of ints such as \(5,\), got"):
        AutoIAF(counting, **SMALL).rsample(shape)


def test_numbers_arrays_and_ints_have_a_density() -> None:
    guide = shaken(AutoIAF(several, **UNSEARCHED).setup())
    tensors = {"scale": torch.tensor(2.0), "share": torch.tensor(0.5), "vector": torch.tensor([1.0, 0.0, -1.0])}
    expected = guide.log_prob(tensors)
    numbers = {"scale": 2, "share": 0.5, "vector": np.array([1.0, 0.0, -1.0])}
    lists = {"scale": torch.tensor(2), "share": np.float64(0.5), "vector": [1, 0, -1]}
    for values in (numbers, lists):
        torch.testing.assert_close(guide.log_prob(values), expected, rtol=0, atol=0)
    many = guide.log_prob({**numbers, "share": [0.5, 0.2]})
    assert many.shape == (2,)
    torch.testing.assert_close(many[0], expected)


def test_a_density_is_zero_outside_of_the_support() -> None:
    guide = shaken(AutoIAF(several, **UNSEARCHED).setup())
    values = {
        "scale": torch.tensor([1.0, -1.0, 0.0, 1.0]),
        "share": torch.tensor([0.5, 0.5, 0.5, 1.5]),
        "vector": [0.0] * 3,
    }
    found = guide.log_prob(values)
    assert found.isfinite().tolist() == [True, False, False, False]
    assert bool((found[1:] == -torch.inf).all())
    found[0].backward()
    assert all(bool(p.grad.isfinite().all()) for p in guide.parameters() if p.grad is not None)
    shares = AutoIAF(mixing, **UNSEARCHED).setup()
    draws = {name: value.detach() for name, value in shares.rsample((3,)).items()}
    assert bool(shares.log_prob(draws).isfinite().all())
    assert shares.log_prob({**draws, "shares": 2 * draws["shares"]}).tolist() == [-math.inf] * 3


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"scale": "wide"}, TypeError, "numbers for scale, got 'wide'"),
        ({"scale": torch.tensor(1.0).double()}, TypeError, "float32 parameters, got scale of float64: convert it with"),
        ({"vector": torch.zeros(2)}, ValueError, r"vector of shape \(\*batch, 3\), got \(2,\)"),
        ({"vector": 1.0}, ValueError, r"vector of shape \(\*batch, 3\), got \(\)"),
        (
            {"scale": torch.ones(2), "share": torch.ones(3)},
            ValueError,
            r"broadcast, got \(2,\) of scale, \(3,\) of s",
        ),
    ],
)
def test_values_that_do_not_fit_are_named(changed: Any, error: Any, message: str) -> None:
    values = {"scale": torch.tensor(1.0), "share": torch.tensor(0.5), "vector": torch.zeros(3)}
    with pytest.raises(error, match=f"AutoIAF .*{message}") as raised:
        AutoIAF(several, **UNSEARCHED).log_prob({**values, **changed})
    assert "\n" not in str(raised.value)


def test_values_without_names_are_refused() -> None:
    with pytest.raises(TypeError, match="AutoIAF expected values of the sites by name, as a dictionary, got Tensor"):
        AutoIAF(several, **UNSEARCHED).log_prob(torch.zeros(5))


@each_guide
def test_a_missing_site_of_a_density_is_named(make: Any) -> None:
    guide = make(several, **UNSEARCHED).setup()
    with pytest.raises(ValueError, match=r"values of every site, got none of \['share', 'vector'\]"):
        guide.log_prob({"scale": torch.tensor(1.0)})


# -- copies ------------------------------------------------------------------------------------------------------------


@each_guide
def test_a_deep_copy_and_the_original_train_independently(make: Any) -> None:
    guide = make(counting, **UNSEARCHED)
    steps(Trace_ELBO(), counting, guide, 2)
    twin = copy.deepcopy(guide)
    assert same(weights(guide), weights(twin))
    before = weights(guide)
    steps(Trace_ELBO(), counting, twin, 2)
    assert same(before, weights(guide))
    assert not same(before, weights(twin))
    before = weights(twin)
    steps(Trace_ELBO(), counting, guide, 2)
    assert same(before, weights(twin))


def test_a_guide_that_is_not_set_up_can_be_copied() -> None:
    guide = AutoIAF(counting, **SMALL)
    twin = copy.deepcopy(guide)
    assert twin()["rate"].shape == guide()["rate"].shape == ()


@each_guide
def test_a_pickled_guide_draws_as_before(make: Any) -> None:
    guide = shaken(make(counting, **UNSEARCHED).setup())
    twin = pickle.loads(pickle.dumps(guide))
    assert same(guide.median(), twin.median())
    assert guide()["rate"].shape == twin()["rate"].shape == ()
    torch.testing.assert_close(twin.log_prob({"rate": torch.tensor(3.0)}), guide.log_prob({"rate": torch.tensor(3.0)}))


USES: dict[str, Callable[[Any], object]] = {
    "SVI": lambda guide: steps(Trace_ELBO(), counting, guide, 2),
    "SVI of the path": lambda guide: steps(TracePath_ELBO(), counting, guide, 2),
    "fit_guide": lambda guide: fit_guide(counting, guide, steps=3, num_particles=2, progress=False),
    "rsample": lambda guide: guide.rsample((3,)),
    "quantiles": lambda guide: guide.quantiles([0.5]),
    "a call": lambda guide: guide(),
    "a graph": lambda guide: guide.rsample((3,))["rate"].sum().backward(),
}


def stored_and_loaded(guide: Any) -> Any:
    stored = io.BytesIO()
    torch.save(guide, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


@pytest.mark.parametrize("size", [2, 30])
def test_the_map_of_a_guide_is_saved_and_loaded(size: int, tmp_path: Path) -> None:
    guide = AutoIAF(lambda: pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1)), **SMALL).setup()
    shaken(guide)
    guide.transform.save(tmp_path / "map")
    noise = torch.randn(5, size)
    assert torch.equal(load(tmp_path / "map")(noise), guide.transform(noise))


@pytest.mark.parametrize("copied", [stored_and_loaded, copy.deepcopy], ids=["saved", "deep-copied"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
@each_guide
def test_a_used_guide_can_be_copied_and_both_train_on(make: Any, use: Any, copied: Any) -> None:
    guide = make(counting, **SMALL, init_scale=0.3).setup()
    use(guide)
    twin = copied(guide)
    rate = {"rate": torch.tensor([1.0, 3.0])}
    assert same(guide.median(), twin.median())
    torch.testing.assert_close(twin.log_prob(rate), guide.log_prob(rate), rtol=0, atol=0)
    for one, other in ((guide, twin), (twin, guide)):
        before, kept = weights(one), weights(other)
        steps(Trace_ELBO(), counting, one, 1)
        assert not same(before, weights(one))
        assert same(kept, weights(other))


def conditioned_on_parameters(y: Tensor) -> None:
    """Parameters occur in distributions and supports, so the model's draws carry its graph."""
    concentration = pyro.param("concentration", torch.tensor([2.0, 3.0]), constraint=constraints.positive)
    share = pyro.sample("share", dist.Dirichlet(concentration))
    loc = pyro.sample("loc", dist.Normal(pyro.param("centre", torch.tensor(0.0)), 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc + share[..., 0], 1.0), obs=y)


def test_a_model_with_parameters_and_data_is_not_pickled() -> None:
    y = torch.arange(100_000.0) % 7
    guide = AutoIAF(
        conditioned_on_parameters,
        init_loc_fn=lambda site: _start_of(site),
        init_scale=0.1,
        num_layers=1,
        hidden_dims=[4],
    )
    steps(Trace_ELBO(), conditioned_on_parameters, guide, 2, y)
    pickled = pickle.dumps(guide)
    assert len(pickled) < 20_000  # the data has 400,000 bytes
    assert same(guide.median(y), pickle.loads(pickled).median(y))
    steps(Trace_ELBO(), conditioned_on_parameters, pickle.loads(pickled), 1, y)


def _start_of(site: Any) -> Tensor:
    return init_to_value(site, values={"share": torch.tensor([0.4, 0.6]), "loc": torch.tensor(1.0)})


def test_an_unpickled_guide_without_set_up_raises_a_clear_error() -> None:
    twin = pickle.loads(pickle.dumps(AutoIAF(counting, **SMALL)))
    with pytest.raises(ValueError, match=r"^AutoIAF expected a model to set itself up .* guide\.setup\(\).*\.$"):
        twin()


@pytest.mark.parametrize("make", [lambda: MAF(2, num_layers=1), lambda: FlowPrior(IAF(2, num_layers=1))])
def test_flows_and_densities_registered_with_pyro_can_be_pickled(make: Any) -> None:
    module = make()
    pyro.module("module", module)
    twin = pickle.loads(pickle.dumps(module))
    assert same(weights(module), weights(twin))
    assert same(weights(module), weights(copy.deepcopy(module)))


def shares_of(bound: Tensor) -> None:
    v = pyro.sample("v", dist.Uniform(torch.zeros(()), bound))
    pyro.sample("y", dist.Normal(v, 1.0), obs=torch.tensor(0.3))


def on_a_latent() -> None:
    shares_of(pyro.sample("u", dist.Uniform(0.0, 1.0)))


def on_a_parameter() -> None:
    shares_of(pyro.param("u", torch.tensor(2.0)))


def far_below_a_latent() -> None:
    u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("v", dist.ImproperUniform(constraints.independent(constraints.greater_than(u.exp()), 1), (), (2,)))


def within_an_angle() -> None:
    u = pyro.sample("u", dist.Uniform(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("v", dist.Uniform(-u, 2 * u))


@pytest.mark.parametrize("model", [on_a_latent, on_a_parameter, far_below_a_latent, within_an_angle])
def test_draws_follow_a_support_that_moves(model: Any) -> None:
    """Unlike NUTS, which silently uses the support of its first run."""
    pyro.set_rng_seed(0)
    guide = AutoIAF(model, **UNSEARCHED)
    steps(Trace_ELBO(), model, guide, 1)
    steps(Trace_ELBO(num_particles=3, vectorize_particles=True), model, guide, 1)
    with torch.no_grad():
        values = guide.rsample((500,))
        alone = [guide.log_prob({name: value[index] for name, value in values.items()}) for index in range(3)]
    assert torch.allclose(guide.log_prob(values)[:3], torch.stack(alone), atol=1e-4)
    for index in range(20):
        trace = poutine.trace(poutine.condition(model, {name: value[index] for name, value in values.items()}))
        assert torch.as_tensor(trace.get_trace().log_prob_sum()).isfinite()


def test_the_density_of_a_guide_of_a_support_that_moves() -> None:
    guide = AutoIAF(on_a_latent, **SMALL).setup()
    u, v = torch.tensor([0.5, 0.5, 0.2]), torch.tensor([0.4, 0.6, 0.3])
    assert guide.log_prob({"u": u, "v": v}).isfinite().tolist() == [True, False, False]
    grid = torch.linspace(0.0005, 0.9995, 1000)
    u, v = torch.meshgrid(grid, grid, indexing="ij")
    assert abs(float(guide.log_prob({"u": u, "v": v}).detach().exp().mean()) - 1) < 0.02


def test_a_support_that_moves_is_fitted() -> None:
    """The evidence of v given u uniform on [0, u] and u on [0, 1] is the mean of the likelihood at -log v."""
    fit = fit_guide(on_a_latent, AutoIAF(on_a_latent), progress=False)
    v = torch.linspace(0.00005, 0.99995, 10_000, dtype=torch.float64)
    exact = (-v.log() * dist.Normal(v, 1.0).log_prob(torch.tensor(0.3)).exp()).mean().log()
    assert fit.diagnosis.grade == "good"
    assert abs(fit.diagnosis.log_evidence - float(exact)) < 0.02


def test_a_support_that_moves_in_a_model_of_one_draw_is_refused_in_one_line() -> None:
    def model() -> None:
        u = pyro.sample("u", dist.Uniform(0.0, 1.0))
        shares_of(u if float(u) > 0.5 else 2 * u)

    with pytest.raises(ValueError, match=r"^AutoIAF expected a model .* since the support of v depends on .*\.$"):
        AutoIAF(model, **SMALL).setup()


def test_supports_of_constant_tensors_are_accepted() -> None:
    def model() -> None:
        with pyro.plate("rows", 2):
            pyro.sample("v", dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0])))

    assert AutoIAF(model, **SMALL).setup().median()["v"].shape == (2,)


# -- Pyro's store ------------------------------------------------------------------------------------------------------


def through_a_file(folder: Path) -> None:
    pyro.get_param_store().save(str(folder / "weights"))
    pyro.clear_param_store()
    pyro.get_param_store().load(str(folder / "weights"))


def through_the_state(folder: Path) -> None:
    state = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)


@pytest.mark.parametrize("way", [through_a_file, through_the_state])
@each_guide
def test_a_new_guide_has_the_weights_of_the_store(make: Any, way: Any, tmp_path: Path) -> None:
    """Wherever both start, since the start belongs to the weights."""
    guide = shaken(make(counting, **SMALL, init_scale=0.2).setup())
    steps(Trace_ELBO(), counting, guide, 2)
    expected, kept = guide.median(), weights(guide)
    way(tmp_path)
    called, read = (make(counting, **SMALL, init_scale=0.7) for _ in range(2))
    called()
    assert same(expected, called.median())
    if way is through_a_file:
        pyro.get_param_store().load(str(tmp_path / "weights"))
    assert same(expected, read.median()) == (way is through_a_file)
    steps(Trace_ELBO(), counting, called, 1)
    assert not same(kept, weights(called))
    assert same(kept, weights(guide))


@each_guide
def test_a_guide_in_use_goes_back_to_what_was_saved(make: Any, tmp_path: Path) -> None:
    guide = shaken(make(counting, **SMALL).setup())
    guide()
    state, expected = copy.deepcopy(pyro.get_param_store().get_state()), weights(guide)
    pyro.get_param_store().save(str(tmp_path / "weights"))
    for restore in (
        lambda: pyro.get_param_store().set_state(copy.deepcopy(state)),
        lambda: pyro.get_param_store().load(str(tmp_path / "weights")),
    ):
        steps(Trace_ELBO(), counting, guide, 1)
        assert not same(expected, weights(guide))
        restore()
        guide()
        assert same(expected, weights(guide))
    steps(Trace_ELBO(), counting, guide, 1)  # and trains on
    assert not same(expected, weights(guide))


def test_saving_the_store_does_not_affect_other_guides(tmp_path: Path) -> None:
    guides = [shaken(AutoIAF(counting, **UNSEARCHED).setup()) for _ in range(2)]
    for guide in guides:
        guide()
    for _ in range(2):
        for guide, other in (guides, guides[::-1]):
            kept = weights(guide)
            other()
            pyro.get_param_store().save(str(tmp_path / "weights"))
            pickle.dumps(other)
            with pyro.get_param_store().scope():
                counting()
            guide()
            assert same(kept, weights(guide))


def test_a_scope_gives_no_weights_to_a_guide_of_another_model() -> None:
    AutoIAF(counting, **SMALL).setup()()
    with pyro.get_param_store().scope():
        counting()
    known = regression()
    guide = AutoIAF(known.model, **SMALL)
    guide()
    assert known.distance(*normal_of(guide)) < 1e-8


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"hidden_dims": [5]}, {"hidden_dims": [8, 8]}])
def test_weights_of_a_guide_that_is_built_otherwise_are_refused(options: Any, tmp_path: Path) -> None:
    AutoIAF(counting, **UNSEARCHED).setup()()
    through_a_file(tmp_path)
    with pytest.raises(ValueError, match=r"^AutoIAF expected the weights of a guide that is built alike .*\.$"):
        AutoIAF(counting, **{**UNSEARCHED, **options})()


def test_an_encoder_comes_from_the_store_too(tmp_path: Path) -> None:
    def guide() -> Any:
        torch.manual_seed(len(pyro.get_param_store()))
        return AutoIAF(of_data, encoder=Summary(), **SMALL)

    y, trained = torch.tensor([1.0, 2.0, 4.0]), guide()
    steps(Trace_ELBO(), of_data, trained, 2, y)
    expected = trained.median(y)
    through_a_file(tmp_path)
    assert same(expected, guide().median(y))


@each_guide
def test_weights_load_into_a_guide_that_is_set_up(make: Any) -> None:
    """The start is part of the state, so a guide with another start becomes the same guide."""
    guide = shaken(make(counting, **SMALL).setup())
    stored = io.BytesIO()
    torch.save(guide.state_dict(), stored)
    stored.seek(0)
    other = make(counting, **SMALL, init_scale=0.3).setup()
    assert not same(guide.median(), other.median())
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert same(guide.median(), other.median())


@each_guide
def test_weights_for_a_guide_that_is_not_set_up_are_refused_in_one_line(make: Any) -> None:
    state = make(counting, **UNSEARCHED).setup().state_dict()
    with pytest.raises(ValueError, match=rf"^{make.__name__} expected to be set up before .*guide.setup\(\) .*\.$"):
        make(counting, **UNSEARCHED).load_state_dict(state)
    fresh = make(counting, **UNSEARCHED)
    fresh.load_state_dict(make(counting, **UNSEARCHED).state_dict())  # which has none
    assert fresh.setup().state_dict().keys() == state.keys()


@each_guide
def test_methods_that_need_the_models_arguments_raise_until_the_guide_is_set_up(make: Any) -> None:
    def model(y: Tensor) -> None:
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    guide = make(model, **SMALL)
    expected = rf"{make.__name__} expected the arguments of the model, model\(y\), since it is not set up yet: .*'y'"
    for call in (guide.median, guide.rsample, guide, lambda: guide.quantiles([0.5])):
        with pytest.raises(TypeError, match=expected):
            call()
    guide.setup(torch.tensor(0.5))
    assert guide.median()["z"].shape == ()


@each_guide
def test_two_guides_of_one_name_train_independently(make: Any) -> None:
    """Pyro's store identifies parameters by name, and both guides have the same name."""
    guides = [make(counting, **UNSEARCHED) for _ in range(2)]
    runs = [SVI(counting, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()) for guide in guides]
    for _ in range(3):
        for guide, other, run in zip(guides, guides[::-1], runs, strict=True):
            own, before = weights(guide), weights(other)
            run.step()
            assert own == {} or not same(own, weights(guide))
            assert same(before, weights(other))


@each_guide
def test_a_new_guide_starts_afresh_whatever_the_store_holds(make: Any) -> None:
    old = make(counting, **SMALL)
    steps(Trace_ELBO(), counting, shaken(old.setup(), gain=3.0), 2)
    kept = weights(old)
    known = regression()
    steps(Trace_ELBO(), known.model, new := make(known.model, **SMALL), 1)
    fresh_guide = make(known.model, **SMALL).setup()
    fresh_guide()
    assert known.distance(*normal_of(fresh_guide)) < 1e-8
    assert same(kept, weights(old))
    assert new.latent_dim == 3


# -- amortised ---------------------------------------------------------------------------------------------------------


class Summary(nn.Module):
    """An encoder that summarises the data in one context for all latent variables."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 4)

    def forward(self, y: Tensor) -> Tensor:
        return self.linear(torch.stack([y.mean(), y.std()]))


def of_data(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_a_context_of_all_data_steers_all_latent_variables() -> None:
    encoder = Summary()
    guide = AutoIAF(of_data, encoder=encoder, **SMALL)
    low, high = torch.tensor([-2.0, -1.0, -1.5]), torch.tensor([2.0, 1.0, 1.5, 1.2])
    svi = SVI(of_data, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(num_particles=8, vectorize_particles=True))
    before = encoder.linear.weight.detach().clone()
    for _ in range(90):
        svi.step(low)
        svi.step(high)
    assert not torch.equal(before, encoder.linear.weight)
    assert float(guide.median(low)["z"]) == pytest.approx(-4.5 / 4, abs=0.25)
    assert float(guide.median(high)["z"]) == pytest.approx(5.7 / 5, abs=0.25)


def by_row(y: Tensor, size: int | None = None) -> None:
    with pyro.plate("rows", len(y), subsample_size=size) as rows:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        pyro.sample("y", dist.Normal(z.sum(-1) + share, 0.5), obs=y[rows])


@each_guide
def test_a_context_by_row_serves_batches_of_any_size(make: Any) -> None:
    encoder = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 3))
    guide = make(by_row, encoder=encoder, create_plates=lambda y: pyro.plate("rows", len(y)), **SMALL)
    svi = SVI(by_row, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(num_particles=2, vectorize_particles=True))
    for size in (5, 3, 7):
        assert math.isfinite(svi.step(torch.randn(size)))
        assert guide.latent_dim == 3
    y = torch.randn(6)
    sites, log_q = drawn(guide, y)
    assert (sites["z"].shape, sites["share"].shape) == ((6, 2), (6,))
    log_prob = guide.log_prob(sites, y)
    assert log_prob.shape == (6,)
    torch.testing.assert_close(log_prob.sum(), log_q, rtol=1e-3, atol=1e-3)
    assert guide.median(y)["z"].shape == (6, 2)
    assert guide.quantiles([0.1, 0.9], y)["share"].shape == (2, 6)
    assert guide.rsample((4,), y)["z"].shape == (4, 6, 2)


@each_guide
def test_a_context_by_row_within_subsamples(make: Any) -> None:
    network, everything = nn.Linear(1, 3), torch.randn(20)

    def model(y: Tensor) -> None:
        with pyro.plate("rows", 20, subsample=torch.arange(5)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def create_plates(y: Tensor) -> Any:
        return pyro.plate("rows", 20, subsample=torch.arange(5))

    guide = make(model, encoder=lambda y: network(y[:, None]), create_plates=create_plates, **SMALL)
    optimizer = pyro.optim.Adam({"lr": 0.02})
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    assert all(math.isfinite(svi.step(everything[start : start + 5])) for start in (0, 5, 10, 15))
    sites, log_q = drawn(guide, everything[:5])
    # Five rows represent twenty.
    log_prob = guide.log_prob(sites, everything[:5])
    torch.testing.assert_close(4 * log_prob.sum(), log_q, rtol=1e-3, atol=1e-3)


def test_a_context_for_rows_that_a_site_is_not_in_is_refused() -> None:
    def model(y: Tensor) -> None:
        pyro.sample("loc", dist.Normal(0.0, 1.0))
        by_row(y)

    with pytest.raises(ValueError, match=r"every site in plates of shape \(5,\).*got loc in \(\)"):
        AutoIAF(model, encoder=lambda y: y[:, None]).setup(torch.randn(5))


# -- data in subsamples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "by_plates"), [*((make, True) for make in GUIDES), (AutoIAF, False)])
def test_trains_on_subsamples_of_the_data(make: Any, by_plates: bool) -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y), subsample_size=20) as rows:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[rows])

    y = 3 + torch.randn(200)
    create = {"create_plates": lambda y: pyro.plate("rows", len(y), subsample_size=20)} if by_plates else {}
    guide = make(model, **SMALL, **create)
    objective = Trace_ELBO(num_particles=4, vectorize_particles=True)
    steps(objective, model, guide, 30, y)
    assert float(guide.median(y)["loc"]) == pytest.approx(float(y.mean()), abs=0.25)


# -- failures for single draws -----------------------------------------------------------------------------------------


class Steep(torch.autograd.Function):
    """A function with value zero, and an infinite gradient for arguments above 1.5."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x > 1.5, torch.inf, 0.0)


@pytest.mark.filterwarnings("ignore:Encountered:UserWarning")
@pytest.mark.parametrize("bad", [Steep.apply, lambda z: torch.where(z > 1.5, torch.nan, 0.0) * z], ids=["inf", "nan"])
@each_guide
def test_one_bad_draw_leaves_the_parameters_finite(make: Any, bad: Any) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(bad(z), 1.0, validate_args=False), obs=torch.tensor(0.0))

    guide = make(model, **SMALL, init_scale=1.0)
    steps(Trace_ELBO(num_particles=20, vectorize_particles=True), model, guide, 5)
    assert all(bool(parameter.isfinite().all()) for parameter in guide.parameters())
    assert bool(guide.median()["z"].isfinite())


@pytest.mark.parametrize("point", [-1000.0, 1000.0])
@each_guide
def test_extreme_scales_and_shares_do_not_raise(make: Any, point: float) -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        pyro.sample("y", dist.Normal(share, scale), obs=torch.tensor(1.0))

    guide = make(model, **SMALL, init_scale=0.1).setup()
    with torch.no_grad():
        guide.transform(torch.zeros(2))
        for name, buffer in guide.named_buffers():
            if name.endswith(".loc"):
                buffer.fill_(point)
    loss = Trace_ELBO().loss_and_grads(model, guide)
    assert not math.isnan(loss)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in guide.parameters())


# -- wrong arguments ---------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "layers": ({"num_layers": -1}, ValueError, "num_layers of at least 1, got -1"),
    "no layers": ({"num_layers": 0}, ValueError, "num_layers of at least 1, got 0"),
    "half a layer": ({"num_layers": 1.5}, TypeError, "num_layers to be an int, got 1.5"),
    "width": ({"hidden_dims": [8, 0]}, ValueError, "hidden_dims of at least 1, got 0"),
    "one width": ({"hidden_dims": 8}, TypeError, "hidden_dims to be a sequence of ints"),
    "scale": ({"init_scale": 0.0}, ValueError, "init_scale above 0 and finite, got 0.0"),
    "infinite scale": ({"init_scale": math.inf}, ValueError, "init_scale above 0 and finite, got inf"),
}


@pytest.mark.parametrize(("options", "error", "message"), WRONG.values(), ids=WRONG)
@each_guide
def test_wrong_options_are_named(make: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        make(counting, **options)
    assert str(raised.value).startswith(make.__name__)
    assert "\n" not in str(raised.value)


@each_guide
def test_an_unknown_option_is_refused_and_the_close_one_named(make: Any) -> None:
    message = (
        rf"^{make.__name__} takes model, [a-z_, ]*: got an unexpected keyword argument 'hidden_dim': use hidden_dims\.$"
    )
    with pytest.raises(TypeError, match=message):
        make(scalar, hidden_dim=[8])
    assert {"num_layers", "hidden_dims", "activation", "encoder"} <= set(inspect.signature(make).parameters)


@each_guide
@pytest.mark.parametrize("activation", ["tanh", "softplus"])
def test_a_guide_has_the_activation_that_it_is_built_with(make: Any, activation: str) -> None:
    guide = make(scalar, activation=activation, **UNSEARCHED).setup()
    assert {part.activation for part in guide.transform.modules() if hasattr(part, "activation")} == {activation}
    with pytest.raises(ValueError, match=f"^{make.__name__} expected activation to be one of relu, .*, got 'cosine'"):
        make(scalar, activation="cosine")


@each_guide
def test_a_model_that_cannot_be_called_is_refused(make: Any) -> None:
    with pytest.raises(TypeError, match=f"{make.__name__} expected a model to call, got int"):
        make(3)


@each_guide
def test_a_model_without_latent_variables_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=f"{make.__name__} found no latent variables"):
        make(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))).setup()


@pytest.mark.parametrize("context", [3.0, torch.tensor(1.0)])
def test_an_encoder_that_returns_no_features_is_refused(context: Any) -> None:
    with pytest.raises(ValueError, match=r"AutoIAF expected encoder to return a tensor \(\*rows, features\), got"):
        AutoIAF(counting, encoder=lambda: context).setup()


def test_an_encoder_without_its_arguments_is_named() -> None:
    guide = AutoIAF(of_data, encoder=Summary(), **SMALL).setup(torch.ones(3))
    with pytest.raises(TypeError, match=r"AutoIAF expected the arguments of the model for its encoder, encoder\("):
        guide.rsample((10,))


def test_a_support_without_a_bijection_is_named() -> None:
    class _Ring(constraints.Constraint):
        event_dim = 1

        def check(self, value: Tensor) -> Tensor:
            return (value.norm(dim=-1) - 1).abs() < 0.1

    points = dist.ImproperUniform(_Ring(), (), (2,))
    with pytest.raises(ValueError, match=r"AutoIAF has no map .* site point, Ring.*poutine\.reparam"):
        AutoIAF(lambda: pyro.sample("point", points)).setup()


# -- tails -------------------------------------------------------------------------------------------------------------


def test_tails_are_those_of_the_posterior() -> None:
    """Two Student's t distributions of three degrees of freedom, whose tails have weight 1/3."""

    def model() -> None:
        pyro.sample("z", dist.StudentT(3.0, torch.tensor([0.0, 40.0]), torch.tensor([1.0, 0.1])).to_event(1))

    fit = fit_guide(model, AutoIAF(model, **SMALL), steps=200, progress=False)
    assert fit.diagnosis.k_hat < 0.5
    weights_of_tails = 2 * torch.tanh(fit.guide.transform[-1].free.detach() / 2)
    assert float(weights_of_tails.min()) > 0.1
    assert float(weights_of_tails.max()) < 0.7
