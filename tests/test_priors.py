"""Flow priors on their supports, fitted to draws, and in inference: SVI, NUTS, importance sampling, plates."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_type_hints

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS, SVI, EmpiricalMarginal, Importance, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import biject_to

import pyro_maf
from pyro_maf import IAF, MAF, ConditionalMAF, FlowPrior, MADEMoG, MAFMoG, fit, fit_prior
from pyro_maf.distributions import ConditionalFlowPrior
from pyro_maf.support import Columns, Support
from pyro_maf.training.prior import FitOptions
from pyro_maf.transforms import Permute, Stack
from tests.fits import SHARED, same, weights
from tests.test_distributions import SMALL, shaken

QUICK: dict[str, Any] = {"max_epochs": 2, "progress": False}
MIXED = ["real", "positive", "unit_interval"]
BOUNDS = [(5.0, 7.0), (-3.0, None), (None, -0.5)]
SUPPORTS: dict[str, Any] = {name: name for name in ("real", "positive", "unit_interval", "simplex")}
SUPPORTS |= {"mixed": MIXED, "bounds": BOUNDS, "ordered": ["positive", "ordered", "ordered"]}
every_support = pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS.keys())


def prior_on(support: Any, input_dim: int = 3, make: Any = MAF, size: float = 0.1, **options: Any) -> FlowPrior:
    return shaken(FlowPrior(make(input_dim, num_layers=2, **SMALL), support=support, **options), size)


def conditional_on(support: Any, input_dim: int = 3) -> ConditionalFlowPrior:
    flow = ConditionalMAF(input_dim, 2, num_layers=2, **SMALL)
    return shaken(ConditionalFlowPrior(flow, support=support, loc=torch.full((input_dim,), 0.3)), 0.1)


def rows_on(support: Any, rows: int = 100) -> Tensor:
    return prior_on(support, size=0.3).float().sample((rows,))


# -- a density on its support ------------------------------------------------------------------------------------------


def grid_of(support: Any) -> tuple[Tensor, Tensor]:
    """Points in the support on a regular grid in unconstrained space, and the volume of each."""
    z = torch.linspace(-12, 12, 241, dtype=torch.float64)
    step = float(z[1] - z[0])
    line = {
        "real": (z, torch.full_like(z, step)),
        "positive": (z.exp(), z.exp() * step),
        "unit_interval": (z.sigmoid(), z.sigmoid() * (-z).sigmoid() * step),
    }
    if support == "simplex":
        # For the triangle y_1 + y_2 < 1: y_1 = a, y_2 = (1 - a) b.
        (a, volume) = line["unit_interval"]
        y = torch.stack([a[:, None].expand(-1, 241), (1 - a)[:, None] * a, (1 - a)[:, None] * (1 - a)], -1)
        return y.flatten(0, 1), (volume[:, None] * (1 - a)[:, None] * volume).flatten()
    if support == ["ordered"] * 2:
        y = torch.stack([z[:, None].expand(-1, 241), z[:, None] + z.exp()], -1)
        return y.flatten(0, 1), (step * z.exp() * step).repeat(241)
    points, volumes = zip(*(line[name] for name in support), strict=True)
    return (
        torch.cartesian_prod(*points).reshape(-1, len(support)),
        torch.cartesian_prod(*volumes).reshape(-1, len(support)).prod(-1),
    )


@pytest.mark.parametrize("make", [MAF, IAF, lambda d, **_: MADEMoG(d, **SMALL)])
@pytest.mark.parametrize(
    "support",
    [["positive"], ["unit_interval"], ["real", "positive"], ["unit_interval", "positive"], "simplex", ["ordered"] * 2],
)
def test_integrates_to_one_on_its_support(support: Any, make: Any) -> None:
    input_dim = 2 if support == "simplex" else len(support)
    prior = prior_on(support, input_dim, make, loc=torch.full((input_dim,), 0.3), scale=torch.full((input_dim,), 0.7))
    y, volume = grid_of(support)
    with torch.no_grad():
        assert float((prior.log_prob(y).exp() * volume).sum()) == pytest.approx(1, abs=1e-3)


def test_integrates_to_one_on_the_simplex_as_a_distribution_of_its_first_entries() -> None:
    """On a regular grid of y_1 and y_2, and against the density by torch."""
    line = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    y = torch.cartesian_prod(line, line)
    y = y[y.sum(-1) < 1 - 1e-9]
    prior = prior_on("simplex", 2)
    with torch.no_grad():
        total = prior.log_prob(torch.cat([y, 1 - y.sum(-1, keepdim=True)], -1)).exp().sum() / 400**2
    assert float(total) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("support", ["positive", ["real", "unit_interval"], "simplex"])
def test_a_conditional_prior_integrates_to_one_at_every_context(support: Any) -> None:
    input_dim = 1 if support == "positive" else 2
    y, volume = grid_of(["positive"] if support == "positive" else support)
    contexts = torch.randn(2, 2, dtype=torch.float64)
    with torch.no_grad():
        log_prob = conditional_on(support, input_dim).condition(contexts).log_prob(y[:, None])
    torch.testing.assert_close((log_prob.exp() * volume[:, None]).sum(0), torch.ones(2).double(), atol=1e-3, rtol=0)


@every_support
def test_is_a_transformed_distribution_through_the_map_that_pyro_uses(support: Any) -> None:
    prior = prior_on(support)
    plain = FlowPrior(prior.model)
    through = biject_to(prior.support)
    z = torch.randn(50, 3, dtype=torch.float64)
    y = through(z)
    log_det = through.log_abs_det_jacobian(z, y)
    expected = plain.log_prob(z) - (log_det.sum(-1) if log_det.dim() > 1 else log_det)
    torch.testing.assert_close(prior.log_prob(y), expected)
    assert prior.support.event_dim == 1
    assert prior.event_shape == y.shape[-1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_support
def test_extreme_draws_are_strictly_inside_the_support(support: Any, dtype: torch.dtype) -> None:
    prior = prior_on(support, scale=torch.full((3,), 1e4)).to(dtype)
    y = prior.sample((500,))
    assert y.dtype == dtype
    assert prior.support.check(y).all()
    assert y.isfinite().all()
    assert prior.log_prob(y.clone()).isfinite().all()
    assert prior.log_prob(y).isfinite().all()
    if support != "real":
        assert torch.equal(prior.units.support.outside(y), torch.zeros(500, dtype=torch.bool))


@pytest.mark.parametrize(
    ("support", "inside", "outside"),
    [
        ("positive", [0.5, 2.0, 1e-3], [[0.0, 1.0, 1.0], [1.0, -1.0, 1.0], [1.0, 1.0, math.inf]]),
        ("unit_interval", [0.5, 0.1, 0.9], [[0.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.5]]),
        ("simplex", [0.1, 0.2, 0.3, 0.4], [[0.0, 0.5, 0.25, 0.25], [0.5, 0.5, 0.5, 0.5], [-0.5, 0.5, 0.5, 0.5]]),
        (MIXED, [-3.0, 2.0, 0.3], [[0.0, 0.0, 0.5], [0.0, 1.0, 1.0], [0.0, -1.0, 2.0]]),
        ("ordered", [-1.0, 2.0, 2.1], [[2.0, 2.0, 3.0], [1.0, 0.0, 3.0], [1.0, 2.0, math.inf]]),
        (BOUNDS, [6.5, 2.0, -7.0], [[5.0, 2.0, -7.0], [6.5, -3.5, -7.0], [6.5, 2.0, -0.5]]),
    ],
)
@pytest.mark.parametrize("make", [MAF, IAF, lambda d, **_: MADEMoG(d, **SMALL)])
def test_outside_the_density_is_zero_and_no_gradient_is_nan(support: Any, inside: Any, outside: Any, make: Any) -> None:
    prior = prior_on(support, make=make)
    y = torch.tensor([inside, *outside], dtype=torch.float64, requires_grad=True)
    log_prob = prior.log_prob(y)
    assert log_prob[0].isfinite()
    assert log_prob[1:].tolist() == [-math.inf] * 3
    log_prob.sum().backward()
    assert y.grad.isfinite().all()
    assert y.grad[0].abs().min() > 0
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in prior.parameters())
    alone = torch.tensor(inside, dtype=torch.float64, requires_grad=True)
    prior.log_prob(alone).backward()
    torch.testing.assert_close(y.grad[0], alone.grad)
    assert prior.log_prob(torch.full_like(alone, math.nan)).isnan()


@pytest.mark.parametrize("support", ["positive", "simplex", MIXED, BOUNDS])
def test_gradients_are_those_of_finite_differences(support: Any) -> None:
    prior = prior_on(support)
    z = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    through = biject_to(prior.support)
    assert torch.autograd.gradcheck(lambda z: prior.log_prob(through(z)), (z,))

    def drawn(_: Tensor) -> Tensor:
        torch.manual_seed(1)
        return prior.rsample((4,)).square().mean()

    assert torch.autograd.gradcheck(drawn, (list(prior.parameters())[-1],))


@pytest.mark.parametrize("support", ["positive", "simplex", MIXED])
def test_an_iaf_scores_its_own_draws_without_a_sweep(support: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = prior_on(support, make=IAF)
    y = prior.expand([4]).rsample()
    expected = copy.deepcopy(prior).log_prob(y.detach())

    def refuse(*_: Any) -> None:
        raise AssertionError("a sweep was run")

    monkeypatch.setattr("pyro_maf.transforms.autoregressive.solve", refuse)
    torch.testing.assert_close(prior.expand([4]).log_prob(y), expected)


@every_support
def test_compiles_whole_and_under_vmap(support: Any) -> None:
    prior = prior_on(support)
    y = prior.sample((4,))
    expected = prior.log_prob(y.clone())
    torch._dynamo.reset()  # since compilation in other tests counts against its limit
    torch.testing.assert_close(torch.compile(prior.log_prob, fullgraph=True, backend="eager")(y), expected)
    torch.testing.assert_close(torch.func.vmap(prior.log_prob)(y), expected)


# -- forms of a support ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (constraints.real, "real"),
        (constraints.real_vector, "real"),
        (constraints.positive, "positive"),
        (constraints.independent(constraints.positive, 1), "positive"),
        (constraints.greater_than(0.0), "positive"),
        (constraints.nonnegative, "positive"),
        (dist.Gamma(torch.ones(2), 1.0).to_event(1).support, "positive"),
        (constraints.half_open_interval(0.0, 1.0), "unit_interval"),
        (constraints.unit_interval, "unit_interval"),
        (constraints.interval(0.0, 1.0), "unit_interval"),
        (constraints.greater_than(1.0), "greater_than(1.0)"),
        (constraints.less_than(-2.0), "less_than(-2.0)"),
        (constraints.interval(-90.0, 90.0), "interval(-90.0, 90.0)"),
        ("interval(0,120)", "interval(0.0, 120.0)"),
        ((0, 120), "interval(0.0, 120.0)"),
        ((0, None), "positive"),
        ((np.float32(0.5), np.int64(2)), "interval(0.5, 2.0)"),
        ((0, 1), "unit_interval"),
        ([(None, 5), (18, math.inf)], ("less_than(5.0)", "greater_than(18.0)")),
        (constraints.simplex, "simplex"),
        (["positive", "positive"], "positive"),
        (constraints.ordered_vector, "ordered"),
        (["ordered(a)", "ordered(a)"], "ordered"),
        ([constraints.real, "unit_interval"], ("real", "unit_interval")),
        (FlowPrior(MAF(2), support=["real", "positive"]).support, ("real", "positive")),
        (dist.Uniform(0.0, torch.ones(2)).to_event(1).support, "unit_interval"),
        (constraints.greater_than(torch.tensor(1.0)), "greater_than(1.0)"),
        (
            constraints.independent(constraints.less_than(torch.tensor([1.0, 2.0])), 1),
            ("less_than(1.0)", "less_than(2.0)"),
        ),
        (
            constraints.cat([constraints.interval(torch.zeros(1), 3.0), constraints.positive], -1, [1, 1]),
            ("interval(0.0, 3.0)", "positive"),
        ),
    ],
)
def test_constraints_are_known_by_name(given: Any, name: Any, tmp_path: Path) -> None:
    prior = prior_on(given, 2)
    assert prior.units.support.name == name
    prior.save(tmp_path / "prior")
    again = pyro_maf.load(tmp_path / "prior")
    assert again.units.support.name == name
    y = prior.sample((5,))
    assert torch.equal(again.log_prob(y.clone()), prior.log_prob(y.clone()))
    assert again.support.check(y).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_far_out_stay_strictly_between_bounds(dtype: torch.dtype) -> None:
    support = Support("FlowPrior", [(1000.0, 1001.0), (0.1, 0.3), (1e6, None), (None, 1e-3)], 4)
    for z in (-1e4, -40.0, 0.0, 40.0, 1e4):
        y, log_det = support.constrain(torch.full((4,), z, dtype=dtype))
        assert not support.outside(y), (z, y)
        assert not log_det.isnan()
    y, log_det = support.constrain(torch.linspace(-2, 2, 4, dtype=torch.float64))
    z, back = support.unconstrain(y)
    torch.testing.assert_close((z, back), (torch.linspace(-2, 2, 4, dtype=torch.float64), log_det))


def test_bounds_that_float32_cannot_hold_have_draws_of_float64() -> None:
    prior = FlowPrior(MAF(2, num_layers=1), support=(5.4e6, 5.4e6 + 1))
    assert (prior.dtype, FlowPrior(MAF(2), support=(0, 120)).dtype) == (torch.float64, torch.float32)
    assert (prior.sample((50,)).std(0) > 0.1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "support", ["positive", "unit_interval", "simplex", "ordered", (0.1, 0.3), (5, None), (None, 5)]
)
def test_gradients_far_out_are_finite(support: Any, dtype: torch.dtype) -> None:
    support = Support("FlowPrior", support, 2)
    z = torch.cartesian_prod(*torch.tensor([-1e30, -800.0, -100.0, 0.0, 100.0, 800.0, 1e30], dtype=dtype).expand(2, 7))
    y, log_det = support.constrain(z.requires_grad_())
    assert y.isfinite().all()
    (grad,) = torch.autograd.grad(y.log1p().sum() + log_det.sum(), z)
    assert grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:fit found values on a grid")
def test_a_fit_keeps_to_the_bounds_of_its_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    latitude = 180 * torch.rand(600, generator=generator) - 90
    age = (18 + 10 * torch.rand(600, generator=generator).neg().log1p().neg()).round() + 1
    rows = {"latitude": latitude, "age": age, "x": torch.randn(600, generator=generator)}
    support = {"latitude": (-90, 90), "age": (18, None)}
    result = pyro_maf.fit(rows, support=support, max_epochs=2, progress=False)
    drawn = cast("dict[str, Tensor]", result.sample(1000))
    assert float(drawn["latitude"].abs().max()) < 90
    assert float(drawn["age"].min()) > 18
    assert result.score({**rows, "latitude": latitude + 200}).isinf().any()
    with pytest.raises(ValueError, match=r"numbers between -10 and 10, both excluded in column 'latitude'"):
        pyro_maf.fit(rows, support={"latitude": (-10, 10)}, max_epochs=1, progress=False)


def test_the_constraint_of_mixed_columns() -> None:
    support = prior_on(["positive", "positive", "real"]).support
    assert isinstance(support, Columns)
    assert (support.event_dim, support.is_discrete) == (1, False)
    y = torch.tensor([[1.0, 2.0, -3.0], [1.0, -2.0, 3.0]])
    assert support.check(y).tolist() == [True, False]
    assert support.check(y[0]).item() is True
    through = biject_to(support)
    torch.testing.assert_close(through(through.inv(y[0])), y[0])
    assert through.log_abs_det_jacobian(through.inv(y[:1]), y[:1]).shape == (1,)
    assert "lengths=[2, 1]" in repr(support)


def test_groups_of_ordered_columns_are_told_apart(tmp_path: Path) -> None:
    names = ["ordered(low)", "ordered(low)", "ordered(high)", "ordered(high)", "real", "ordered", "ordered", "ordered"]
    support = Support("FlowPrior", names, 8)
    assert support.name == (*["ordered"] * 2, *["ordered(2)"] * 2, "real", *["ordered(3)"] * 3)
    assert Support("FlowPrior", support.constraint, 8).name == support.name
    y = prior_on(names, 8).sample((300,))
    steps = y.diff(dim=-1)
    assert (steps[:, [0, 2, 5, 6]] > 0).all()
    assert all((steps[:, place] < 0).any() for place in (1, 3, 4))
    frame = pd.DataFrame(y[:, [5, 0, 6]].sort(-1).values.numpy(), columns=["q10", "q50", "q90"])
    by_name = {"q10": "ordered", "q50": "ordered", "q90": "ordered"}
    result = fit(frame, support=by_name, max_epochs=2, progress=False)
    assert (result.sample(200).diff(axis=1).iloc[:, 1:] > 0).all(axis=None)  # type: ignore[union-attr, call-arg]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "negative",
            "expected support to be one of real, positive, unit_interval, ordered, angle, simplex, .* got 'negative'",
        ),
        (constraints.greater_than(torch.tensor([1.0, 2.0, 3.0])), r"for each of 2 columns, got \['greater_than\(1"),
        (constraints.interval(torch.tensor([0.0, 1.0]), 1.0), r"got \(1\.0, 1\.0\)"),
        ((5, 5), r"a pair of bounds \(low, high\), .* got \(5, 5\)"),
        ("interval(2, one)", r"got 'interval\(2, one\)'"),
        (constraints.nonnegative_integer, "expected support to be one of"),
        (constraints.independent(constraints.positive, 2), "expected support to be one of"),
        (None, "got None"),
        (
            ["real"],
            r"expected support with real, positive, unit_interval, ordered for each of 2 columns, got \['real'\]",
        ),
        (["real", "simplex"], "support simplex for all columns or none, got it for 1 of 2"),
        (["real", "ordered"], "columns of support ordered side by side, two or more"),
    ],
)
def test_other_supports_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        FlowPrior(MAF(2), support=given)
    assert "\n" not in str(caught.value)


def test_a_support_within_another_is_refused() -> None:
    inner = FlowPrior(MAF(2, **SMALL), support="simplex")
    with pytest.raises(
        ValueError, match=r"of real vectors, got FlowPrior with support Simplex\(\): give FlowPrior that"
    ):
        FlowPrior(inner)


# -- a good module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_support
def test_copies_are_the_same_prior(support: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    prior = prior_on(support).to(dtype).requires_grad_(False)
    y = prior.sample((5,))
    expected = prior.log_prob(y.clone())
    prior.save(tmp_path / "prior")
    for twin in (pyro_maf.load(tmp_path / "prior"), copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
        assert torch.equal(twin.log_prob(y.clone()), expected)
        assert (twin.event_shape, repr(twin)) == (prior.event_shape, repr(prior))
        assert not any(weight.requires_grad for weight in twin.parameters())
        assert biject_to(twin.support)(torch.zeros(3, dtype=dtype)).dtype == dtype
    wide = prior.expand([2, 5])
    assert wide.sample().shape == (2, *y.shape)
    torch.testing.assert_close(wide.log_prob(y), expected.expand(2, 5))


@every_support
def test_a_conditional_prior_keeps_its_support(support: Any, tmp_path: Path) -> None:
    conditional = conditional_on(support)
    conditional.save(tmp_path / "prior")
    context = torch.randn(5, 2, dtype=torch.float64)
    at = conditional.condition(context)
    y = at.sample()
    assert (at.batch_shape, at.event_shape) == ((5,), y.shape[1:])
    assert at.support.check(y).all()
    again = pyro_maf.load(tmp_path / "prior").condition(context)
    assert torch.equal(again.log_prob(y), at.log_prob(y))
    assert at.expand([2, 5]).sample().shape == (2, *y.shape)


def test_widths_are_checked_for_the_support() -> None:
    with pytest.raises(ValueError, match=r"FlowPrior expected value with last dimension 4 \(event_shape\), got .*3"):
        FlowPrior(MAF(3), support="simplex").log_prob(torch.full((3,), 1 / 3))


# -- from draws --------------------------------------------------------------------------------------------------------


@every_support
def test_fit_prior_returns_a_frozen_prior_on_the_support_and_is_repeatable(support: Any) -> None:
    data = rows_on(support)
    state = torch.get_rng_state()
    prior, again = (fit_prior(data, support=support, seed=3, **QUICK) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(weights(prior), weights(again))
    assert (type(prior), prior.event_shape, prior.training) == (FlowPrior, data.shape[1:], False)
    assert not any(weight.requires_grad for weight in prior.parameters())
    assert prior.support.check(prior.sample((50,))).all()
    assert not same(weights(prior), weights(fit_prior(data, support=support, seed=4, **QUICK)))


def test_fit_prior_has_the_options_of_fit() -> None:
    shown, of_fit = (dict(inspect.signature(function).parameters) for function in (fit_prior, pyro_maf.fit))
    assert list(shown)[:2] == ["data", "flow"]
    # A prior is a joint density of all columns, its draws come first, and it has no test score.
    assert shown.keys() - {"flow"} == of_fit.keys() - {"model", "dequantise", "test"}
    assert all(shown[name].default == of_fit[name].default for name in shown.keys() - {"flow", "data"})
    types = get_type_hints(pyro_maf.fit)
    assert all(types[name] == its_type for name, its_type in get_type_hints(FitOptions).items())


def test_fit_learns_in_the_units_of_unconstrained_data() -> None:
    """The standardised logarithm of log-normal data is the flow's initial distribution."""
    truth = dist.LogNormal(torch.tensor([5.0, -3.0]).double(), torch.tensor([2.0, 0.1]).double()).to_event(1)
    torch.manual_seed(1)
    data, test = truth.sample((400,)), truth.sample((2000,))
    prior = fit_prior(data, support="positive", max_epochs=1, learning_rate=1e-6, progress=False)
    assert prior.loc.dtype == torch.float64
    torch.testing.assert_close(prior.loc, torch.tensor([5.0, -3.0]).double(), atol=0.3, rtol=0)
    torch.testing.assert_close(prior.scale, torch.tensor([2.0, 0.1]).double(), atol=0, rtol=0.1)
    assert float((truth.log_prob(test) - prior.log_prob(test)).mean()) < 0.02


@pytest.mark.parametrize(
    "make",
    [
        lambda: MAF(3, num_layers=1, **SMALL),
        lambda: MAF(3, num_layers=1, batch_norm=True, **SMALL),
        lambda: MAFMoG(3, num_layers=1, **SMALL),
        lambda: FlowPrior(MAF(3, num_layers=1, **SMALL), support=MIXED),
    ],
)
def test_fit_takes_flows_densities_and_priors(make: Callable[[], Any]) -> None:
    given = make()
    prior = fit_prior(rows_on(MIXED), given, support=MIXED, **QUICK)
    assert prior is given or prior.model is given
    assert prior.units.support.name == tuple(MIXED)
    assert not any(weight.requires_grad for weight in given.parameters())


@pytest.mark.parametrize("flow", [None, lambda: ConditionalMAF(3, 2, **SMALL), lambda: conditional_on(MIXED).float()])
def test_fit_with_a_context(flow: Any) -> None:
    context = torch.randn(100, 2)
    given = flow and flow()
    prior = fit_prior(rows_on(MIXED), given, support=MIXED, context=context, **QUICK)
    assert isinstance(prior, ConditionalFlowPrior)
    assert not any(weight.requires_grad for weight in prior.parameters())
    at = prior.condition(context[:4])
    assert at.support.check(at.sample()).all()


@pytest.mark.filterwarnings(SHARED)
def test_fit_takes_arrays_frames_lists_and_validation_rows() -> None:
    data = rows_on("positive")
    for given in (data.numpy(), pd.DataFrame(data.numpy()), data.tolist(), data[:, 0]):
        prior = fit_prior(given, support="positive", validation=0.2, **QUICK)
        assert (prior.loc.dtype, prior.event_shape[0]) == (torch.float32, 1 if given is data[:, 0] else prior.input_dim)
    prior = fit_prior(data, support="positive", validation=data[:20], **QUICK)
    assert torch.equal(prior.noise(pd.DataFrame(data.numpy())), prior.noise(data))
    with pytest.raises(ValueError, match=r"expected validation data of numbers above 0 in column 1 .* in row 0"):
        fit_prior(data, support="positive", validation=data[:20] * torch.tensor([1.0, -1.0, 1.0]), **QUICK)


def _spoilt(support: Any, row: int, column: int, value: float) -> Tensor:
    data = rows_on(support)
    data[row, column] = value
    return data


@pytest.mark.parametrize(
    ("support", "data", "message"),
    [
        ("positive", ("positive", 7, 1, 0.0), r"numbers above 0 in column 1 \(support positive\), got 0.0 in row 7"),
        ("positive", ("positive", 7, 1, -2.0), r"got -2.0 in row 7 \(1 of 100 rows"),
        (
            "unit_interval",
            ("unit_interval", 3, 2, 1.0),
            r"between 0 and 1, both excluded in column 2 .*got 1.0 in row 3",
        ),
        (MIXED, (MIXED, 4, 2, 0.0), r"in column 2 \(support unit_interval\), got 0.0 in row 4"),
        (
            SUPPORTS["ordered"],
            (SUPPORTS["ordered"], 5, 2, -1e9),
            r"numbers that increase from column to column in column 2 \(support ordered\), got -1000000000.0 in row 5",
        ),
        ("simplex", ("simplex", 5, 0, 0.0), r"numbers above 0 in column 0 \(support simplex\), got 0.0 in row 5"),
        ("simplex", ("simplex", 5, 0, 1.5), r"rows that sum to 1 \(support simplex\), got .* in row 5 \(1 of 100"),
    ],
)
def test_fit_refuses_data_that_is_not_inside(support: Any, data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        fit_prior(_spoilt(*data), support=support)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda d: fit_prior(d, FlowPrior(MAF(3)), support="positive"),
            "expected support 'real', that of the Flow",
        ),
        (lambda d: fit_prior(d, MAF(2), support="positive"), r"data of shape \(rows, 2\)"),
        (lambda d: fit_prior(d, MAF(3), support="simplex"), r"shape \(rows, 4\), 4 .* and 1 for a simplex"),
        (lambda d: fit_prior(d[:, :1] * 0 + 1, support="simplex"), "at least 2 columns for a simplex, got 1"),
        (
            lambda d: fit_prior(d[:, 0, None, None], support="positive"),
            r"shape \(rows, columns\), got \(100, 1, 1\)",
        ),
        (lambda d: fit_prior(d, support=["real"]), "for each of 3 columns"),
        (lambda d: fit_prior(np.zeros((0, 3))), r"got \(0, 3\)"),
        (lambda d: fit_prior(d, seed=-1), "expected seed of at least 0, got -1"),
    ],
)
def test_fit_refuses_inconsistent_arguments(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(rows_on("positive"))


# -- inference ---------------------------------------------------------------------------------------------------------
#
# The prior of a rate is log-normal, by a flow that starts as the identity; the data are Poisson counts.

COUNTS = torch.tensor([3.0, 4.0, 2.0, 5.0])


def rate_prior() -> FlowPrior:
    return FlowPrior(MAF(1, num_layers=1, **SMALL), support="positive", scale=torch.tensor([0.5])).requires_grad_(False)


def exact_rate() -> tuple[float, float]:
    """Mean and standard deviation of the rate given COUNTS, by quadrature."""
    rate = torch.linspace(0.01, 15, 15_000, dtype=torch.float64)
    log_joint = dist.LogNormal(0.0, 0.5).log_prob(rate) + dist.Poisson(rate[:, None]).log_prob(COUNTS).sum(-1)
    p = log_joint.softmax(0)
    mean = (p * rate).sum()
    return float(mean), float((p * (rate - mean) ** 2).sum().sqrt())


def rates(prior: FlowPrior) -> None:
    rate = pyro.sample("rate", prior)[..., 0]
    with pyro.plate("counts", len(COUNTS)):
        pyro.sample("y", dist.Poisson(rate), obs=COUNTS)


def test_nuts_finds_the_posterior() -> None:
    prior = rate_prior()
    mcmc = MCMC(NUTS(rates), num_samples=250, warmup_steps=80, disable_progbar=True)
    mcmc.run(prior)
    draws = mcmc.get_samples()["rate"]
    mean, deviation = exact_rate()
    assert draws.min() > 0
    assert float(draws.mean()) == pytest.approx(mean, abs=0.2)
    assert float(draws.std()) == pytest.approx(deviation, abs=0.15)
    assert all(weight.grad is None for weight in prior.parameters())


@pytest.mark.parametrize("support", ["simplex", MIXED])
def test_nuts_walks_on_every_support(support: Any) -> None:
    prior = prior_on(support).requires_grad_(False)

    def model() -> None:
        y = pyro.sample("y", prior)
        pyro.sample("seen", dist.Normal(y, 0.1).to_event(1), obs=torch.full_like(y, 0.3))

    kernel = NUTS(model, max_tree_depth=3)
    mcmc = MCMC(kernel, num_samples=30, warmup_steps=30, disable_progbar=True)
    mcmc.run()
    assert prior.support.check(mcmc.get_samples()["y"]).all()


def test_importance_sampling_finds_the_posterior() -> None:
    posterior = Importance(rates, num_samples=1500).run(rate_prior())
    marginal = EmpiricalMarginal(posterior, sites="rate")
    mean, deviation = exact_rate()
    assert float(marginal.mean) == pytest.approx(mean, abs=0.15)
    assert float(marginal.variance.sqrt()) == pytest.approx(deviation, abs=0.15)


@pytest.mark.parametrize("make", [MAF, IAF])
def test_svi_finds_the_posterior_with_a_prior_as_the_guide(make: Any) -> None:
    """A frozen prior in the model and a trained one as guide, with vectorised particles."""
    prior, posterior = rate_prior(), FlowPrior(make(1, num_layers=1, **SMALL), support="positive")

    def guide(_: FlowPrior) -> None:
        pyro.module("posterior", posterior)
        pyro.sample("rate", posterior)

    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(rates, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), elbo)
    before = weights(prior)
    for _ in range(150):
        svi.step(prior)
    mean, deviation = exact_rate()
    draws = posterior.sample((4000,))
    assert float(draws.mean()) == pytest.approx(mean, abs=0.15)
    assert float(draws.std()) == pytest.approx(deviation, abs=0.15)
    assert same(weights(prior), before)
    assert all(weight.grad is None for weight in prior.parameters())


@every_support
def test_svi_in_a_plate_with_an_autoguide(support: Any) -> None:
    prior = prior_on(support).float().requires_grad_(False)
    data = rows_on(support, 6)

    def model() -> None:
        with pyro.plate("rows", len(data), subsample_size=4) as index:
            y = pyro.sample("y", prior)
            pyro.sample("seen", dist.Normal(y, 0.5).to_event(1), obs=data[index])

    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    assert all(math.isfinite(svi.step()) for _ in range(3))
    assert prior.support.check(guide()["y"]).all()


def test_a_frozen_prior_stays_and_an_unfrozen_one_trains() -> None:
    """Empirical Bayes: with `pyro.module`, an unfrozen prior is fitted to the data."""
    data = 5 + torch.randn(50, 2)
    prior = fit_prior(torch.randn(200, 2), MAF(2, num_layers=1, **SMALL), **QUICK)

    def model() -> None:
        pyro.module("prior", prior)
        with pyro.plate("rows", len(data)):
            z = pyro.sample("z", prior)
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=data)

    def guide() -> None:
        with pyro.plate("rows", len(data)):
            pyro.sample("z", dist.Normal((data + 1) / 2, 0.7).to_event(1))

    def run(steps: int) -> float:
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        for _ in range(steps):
            svi.step()
        with torch.no_grad():
            return float(prior.log_prob(data).mean())

    before, frozen = weights(prior), run(2)
    assert same(weights(prior), before)
    assert not any(name.startswith("prior") for name in pyro.get_param_store())
    prior.requires_grad_(True)
    assert run(60) > frozen + 1
    assert any(name.startswith("prior$$$") for name in pyro.get_param_store())


@pytest.mark.parametrize("support", ["positive", "simplex"])
def test_a_conditional_prior_in_a_model(support: Any) -> None:
    conditional = conditional_on(support).float()
    context = torch.randn(6, 2)

    def model() -> None:
        pyro.module("prior", conditional)
        with pyro.plate("rows", len(context)):
            y = pyro.sample("y", conditional.condition(context))
            pyro.sample("seen", dist.Normal(y, 0.5).to_event(1), obs=torch.full_like(y, 0.2))

    before = weights(conditional)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.02}), elbo)
    assert all(math.isfinite(svi.step()) for _ in range(3))
    assert not same(weights(conditional), before)


def test_a_prior_of_permutations_alone_lies_on_their_device() -> None:
    prior = FlowPrior(Stack([Permute([1, 2, 0])]).to("meta"))
    assert prior.loc.device.type == "meta"
    with pytest.raises(ValueError, match="FlowPrior has its parameters on meta, got value on cpu"):
        prior.log_prob(torch.zeros(5, 3))
