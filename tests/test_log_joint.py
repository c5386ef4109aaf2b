"""The log joint density of many draws at once, and the normal approximation from which a guide starts."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_maf.infer.models.log_joint import LogJoint
from pyro_maf.infer.models.model import Call
from pyro_maf.infer.start.initialization import best_normal
from tests.posteriors import regression

pytestmark = pytest.mark.usefixtures("fresh")


def joint_of(model: Any, values: dict[str, Tensor], *args: Any) -> LogJoint:
    example = poutine.trace(model).get_trace(*args)
    return LogJoint(Call(model, args), example).settle(values)


def one_by_one(model: Any, values: dict[str, Tensor], *args: Any) -> Tensor:
    """Log joint density by Pyro's handlers, one run per draw, without the padding of plates."""
    shapes = {name: poutine.trace(model).get_trace(*args).nodes[name]["value"].shape for name in values}
    scores = []
    for row in range(len(next(iter(values.values())))):
        data = {name: value[row].reshape(shapes[name]) for name, value in values.items()}
        scores.append(poutine.trace(poutine.condition(model, data)).get_trace(*args).log_prob_sum())
    return torch.stack(scores)


def nested() -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("columns", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, scale))
        with pyro.plate("rows", 4, dim=-1):
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("y", dist.Normal(b, scale), obs=torch.zeros(3, 4))


def test_scores_draws_of_nested_plates_as_single_runs_do() -> None:
    values = {
        "scale": torch.rand(6, 1, 1, 1, 1) + 0.5,
        "a": torch.randn(6, 1, 1, 3, 1),
        "b": torch.randn(6, 1, 1, 3, 4),
    }
    joint = joint_of(nested, values)
    assert (joint.nesting, joint.is_vectorised, joint.is_random) == (4, True, False)
    torch.testing.assert_close(joint(values), one_by_one(nested, values), rtol=1e-5, atol=1e-5)


def branching() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(1.0 if z > 0 else -1.0, 1.0), obs=torch.tensor(0.3))


def picking() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z[0], 0.1), obs=torch.tensor(0.3))


def filling() -> None:
    """A model that writes into a tensor."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    loc = torch.zeros(4)
    loc[1:] += z
    pyro.sample("y", dist.Normal(loc, 0.1).to_event(1), obs=torch.ones(4))


def counting() -> None:
    """A multinomial model, which writes where a mask is true."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Multinomial(5, z.softmax(0)), obs=torch.tensor([3.0, 0.0, 2.0]))


def correlating() -> None:
    """A model with a matrix that is validated as positive definite, which it is only for z in (-1, 1)."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 0.1).to_event(1))
    covariance = torch.eye(2)
    covariance[0, 1] = covariance[1, 0] = z[0]
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance), obs=torch.tensor([0.3, 0.2]))


@pytest.mark.parametrize(
    ("model", "event", "is_vectorised"),
    [(branching, (), False), (picking, (3,), True), (filling, (3,), True), (counting, (3,), True)],
)
def test_a_model_that_does_not_broadcast_is_mapped_over_draws_or_run_for_each(
    model: Any, event: tuple[int, ...], is_vectorised: bool
) -> None:
    """Models that raise on a batch, score something else, or write into a tensor."""
    values = {"z": torch.randn(5, 1, 1, *event)}
    joint = joint_of(model, values)
    assert (joint.broadcasts, joint.is_vectorised) == (False, is_vectorised)
    torch.testing.assert_close(joint(values), one_by_one(model, values))


def test_draws_that_a_distribution_refuses_are_minus_infinity_in_a_run_for_all() -> None:
    z = torch.tensor([[0.5, 0.0, 0.0], [-0.3, 1.0, 2.0], [1.5, 0.0, 0.0]]).reshape(3, 1, 1, 3)
    joint = joint_of(correlating, {"z": z})
    assert (joint.broadcasts, joint.is_vectorised) == (False, True)
    with pyro.validation_enabled():
        found = joint.together({"z": z})
    torch.testing.assert_close(found[:2], one_by_one(correlating, {"z": z[:2]}))
    assert found[2] == -math.inf


def fussy() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if bool((z > 2).any()):
        raise ValueError("too large")
    pyro.sample("y", dist.Normal(z.sqrt(), 1.0, validate_args=False), obs=torch.tensor(0.3))


def test_draws_that_the_model_cannot_score_are_minus_infinity_and_the_others_are_not() -> None:
    joint = joint_of(fussy, {"z": torch.tensor([0.5, 1.0]).reshape(2, 1, 1)})
    scores = joint({"z": torch.tensor([0.5, -1.0, 3.0, 1.0, 5.0]).reshape(5, 1, 1)})
    assert joint.is_vectorised
    assert scores.isfinite().tolist() == [True, False, False, True, False]
    assert bool((scores[~scores.isfinite()] == -math.inf).all())


def test_an_error_for_every_draw_is_raised() -> None:
    pyro.set_rng_seed(1)
    with pytest.raises(ValueError, match="too large"):
        joint_of(fussy, {"z": torch.tensor([3.0, 5.0]).reshape(2, 1, 1)})


def subsampling(data: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(data), subsample_size=3) as rows:
        pyro.sample("y", dist.Normal(z, 1.0), obs=data[rows])


def test_rows_that_a_plate_subsamples_are_the_same_in_every_call() -> None:
    data, values = 10 * torch.randn(100), {"z": torch.randn(4, 1, 1, 1)}
    joint = joint_of(subsampling, values, data)
    assert (joint.is_vectorised, joint.is_random) == (True, False)
    torch.testing.assert_close(joint(values), joint(values), rtol=0, atol=0)


def test_random_choices_of_the_model_are_detected() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + torch.randn(()), 1.0), obs=torch.tensor(0.3))

    assert joint_of(model, {"z": torch.randn(4, 1, 1)}).is_random


def test_scoring_leaves_the_random_state_alone() -> None:
    values = {"z": torch.randn(4, 1, 1, 1)}
    joint = joint_of(subsampling, values, torch.randn(10))
    before = torch.get_rng_state()
    joint(values)
    assert torch.equal(before, torch.get_rng_state())


# -- the start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [(1.0, 1.0, 1.0), (1.0, 2000.0, 0.01)])
@pytest.mark.parametrize("vectorised", [True, False])
def test_a_normal_posterior_is_found_exactly(units: tuple[float, ...], vectorised: bool) -> None:
    known = regression(units=units)
    exact = torch.distributions.MultivariateNormal(known.mean, known.covariance)
    normal = best_normal(exact.log_prob, torch.zeros(3, dtype=torch.float64), vectorised=vectorised)
    assert known.distance(*normal) < 1e-6
    torch.testing.assert_close(normal.scale_tril, normal.scale_tril.tril(), rtol=0, atol=0)


def test_the_same_normal_is_found_again_and_the_random_state_left_alone() -> None:
    def funnel(v: Tensor) -> Tensor:
        return dist.Normal(0.0, 3.0).log_prob(v[:, 0]) + dist.Normal(0.0, (v[:, :1] / 2).exp()).log_prob(v[:, 1:]).sum(
            1
        )

    before = torch.get_rng_state()
    first, second = (best_normal(funnel, torch.ones(4)) for _ in range(2))
    assert torch.equal(first.loc, second.loc)
    assert torch.equal(first.scale_tril, second.scale_tril)
    assert torch.equal(before, torch.get_rng_state())


def elbo_of(log_density: Any, loc: Tensor, scale_tril: Tensor) -> float:
    normal = torch.distributions.MultivariateNormal(loc, scale_tril=scale_tril)
    draws = normal.sample(torch.Size([4000]))
    return float((log_density(draws) - normal.log_prob(draws)).mean())


def test_the_ascent_stops_before_the_neck_of_a_funnel() -> None:
    """The mode of ten scales is at v0 = -45, where there is hardly any probability."""

    def funnel(v: Tensor) -> Tensor:
        return dist.Normal(0.0, 3.0).log_prob(v[:, 0]) + dist.Normal(0.0, (v[:, :1] / 2).exp()).log_prob(v[:, 1:]).sum(
            1
        )

    found = best_normal(funnel, torch.zeros(11))
    assert abs(float(found.loc[0])) < 6
    assert elbo_of(funnel, *found) > elbo_of(funnel, torch.zeros(11), torch.eye(11)) - 0.1


def test_the_ascent_leaves_saddle_points() -> None:
    def wells(v: Tensor) -> Tensor:
        return -((v[:, 0] ** 2 - 9) ** 2) / 8 - v[:, 1] ** 2 / 2

    found = best_normal(wells, torch.tensor([0.01, 1.0]))
    assert abs(abs(float(found.loc[0])) - 3) < 0.1
    assert abs(float(found.loc[1])) < 0.1


def test_the_ascent_uses_gradients_in_many_dimensions() -> None:
    scales = torch.logspace(-0.5, 0.5, 250, dtype=torch.float64)
    loc = torch.linspace(-3, 3, 250, dtype=torch.float64)
    density = dist.Normal(loc, scales).to_event(1)
    found = best_normal(density.log_prob, torch.zeros(250, dtype=torch.float64))
    assert float(((found.loc - loc) / scales).abs().max()) < 0.5
    assert elbo_of(density.log_prob, *found) > -120  # the best isotropic normal at the mode has -144


class Once(torch.autograd.Function):
    """-x^2 / 2, differentiable only once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return -(x**2) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return -x * gradient


def test_the_ascent_uses_gradients_without_second_derivatives() -> None:
    found = best_normal(lambda v: Once.apply(v - 2).sum(-1), torch.zeros(2))
    assert float((found.loc - 2).abs().max()) < 0.1
    assert elbo_of(lambda v: dist.Normal(2.0, 1.0).log_prob(v).sum(-1), *found) > -0.1


def test_second_derivatives_that_are_not_finite_are_not_used() -> None:
    """The second derivative of torch.logaddexp is NaN where one term is far below the other."""

    def wells(v: Tensor) -> Tensor:
        return torch.logaddexp(*(dist.Normal(mode, 1.0).log_prob(v[:, 0]) for mode in (-8.0, 8.0)))

    assert float(best_normal(wells, torch.tensor([-7.2])).loc) == pytest.approx(-8.0, abs=0.1)


@pytest.mark.parametrize("score", [-math.inf, math.nan])
def test_without_scorable_draws_the_start_is_narrow_and_unchanged(score: float) -> None:
    loc = torch.tensor([1.0, -1.0])
    found = best_normal(lambda v: v.sum(-1) * 0 + score, loc)
    torch.testing.assert_close(found.loc, loc)
    torch.testing.assert_close(found.scale_tril, 0.1 * torch.eye(2))


def test_draws_for_which_a_model_raises_take_one_more_run() -> None:
    """If a run for all draws raises, a map over them finds which; bisection would take a run for each."""
    runs = 0

    def model() -> None:
        nonlocal runs
        runs += 1
        z = pyro.sample("z", dist.Normal(torch.tensor(1.0), 0.1))
        pyro.sample("y", dist.Normal(0.0, z), obs=torch.tensor(0.3))

    joint = joint_of(model, {"z": torch.tensor([0.5, 1.0]).reshape(2, 1, 1)})
    values = {"z": torch.linspace(-1.0, 1.0, 64).reshape(64, 1, 1)}
    with pyro.validation_enabled():
        joint(values)
        runs = 0
        found = joint(values)
    assert runs == 2
    assert found.isfinite().tolist() == (values["z"] > 0).flatten().tolist()
