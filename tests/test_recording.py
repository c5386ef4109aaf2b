"""A model's log joint density recorded as torch operations, and fits that use the recording."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_maf.infer import AutoIAF, TracePath_ELBO, fit_guide
from pyro_maf.infer.diagnosis.importance import Pair
from pyro_maf.infer.fitting.walk import Walk, can_walk
from pyro_maf.infer.models.model import Call
from pyro_maf.infer.models.recording import Recording, record
from pyro_maf.sweep.kernels.scalars import OPERATIONS, run
from tests.posteriors import GUIDES, SMALL, counting, regression

pytestmark = pytest.mark.usefixtures("fresh")

WEIGHT = torch.tensor([0.5, -1.0])
DATA = torch.tensor([1.0, 2.0, 4.0])


def filled(x: Tensor) -> Tensor:
    result = torch.zeros(3, len(x))
    for row in range(3):
        result[row] = x[:, 0] * row
    result.mul_(2.0)
    return (result * DATA[:, None]).sum(0) + result[1] * x[:, 1]


def read_between_changes(x: Tensor) -> Tensor:
    twice = x * 2.0
    before = twice.exp().sum(-1)
    twice.mul_(0.5)
    return before + twice.exp().sum(-1)


def factored(x: Tensor) -> Tensor:
    matrix = torch.eye(2) + 0.1 * x[:, :, None] * x[:, None, :]
    return torch.linalg.cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def weighted(x: Tensor) -> Tensor:
    return (x * WEIGHT.exp() + 0.0).square().sum(-1) * 1.0


def parted(x: Tensor) -> Tensor:
    first, second = x.split(1, -1)
    values, places = torch.cat([first, second.sin()], -1).sort(-1)
    return values[:, 0] + x.gather(-1, places)[:, 1] ** 2


def masked_by_data(x: Tensor) -> Tensor:
    return (x[:, :1] * DATA)[:, DATA > 1.5].sum(-1)


def checked(x: Tensor) -> Tensor:
    return dist.Normal(x[:, 0], x[:, 1].exp(), validate_args=True).log_prob(DATA[:, None]).sum(0)


RECORDED = (filled, read_between_changes, factored, weighted, parted, masked_by_data, checked)


def exactly(function: Callable[[Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Any]]:
    x = x.clone().requires_grad_()
    values = function(x)
    return values, list(torch.autograd.grad(values.sum(), [x, *weights], allow_unused=True))


@pytest.mark.parametrize("function", RECORDED)
def test_recorded_values_and_gradients_are_those_of_the_function(function: Callable[[Tensor], Tensor]) -> None:
    weights = [WEIGHT.requires_grad_()]
    try:
        recorded = record(function, torch.randn(5, 2), weights)
        assert recorded is not None
        for change in (0.0, 0.3):
            with torch.no_grad():
                WEIGHT.add_(change)  # as a step of an optimizer does
            x = torch.randn(5, 2)
            found = recorded(x)
            assert found is not None
            values, (gradient, of_weight) = exactly(function, x, weights)
            torch.testing.assert_close(found.values, values)
            torch.testing.assert_close(found.gradient, gradient)
            assert (found.of_weights[0] is None) == (of_weight is None)
            if of_weight is not None:
                torch.testing.assert_close(found.of_weights[0], of_weight)
    finally:
        WEIGHT.requires_grad_(False)


class Counter:
    """A function with state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.sum(-1)


def from_a_list() -> Callable[[Tensor], Tensor]:
    numbers = [1.0, 2.0, 3.0]
    return lambda x: x.sum(-1) * numbers.pop()


def not_while_recorded(x: Tensor) -> Tensor:
    if torch._C._len_torch_dispatch_stack():
        raise TypeError("no modes, please")
    return x.sum(-1)


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "draws": lambda x: (x + torch.randn(2)).sum(-1),
    "changes an argument": lambda x: (WEIGHT.add_(1.0) * x).sum(-1),
    "reads a number": lambda x: x.sum(-1) * float(x[0, 0].detach()),
    "depends on a number of rows": lambda x: x.sum(-1) * x[x > 0].sum(),
    "counts": Counter(),
    "takes from a list": from_a_list(),
    "raises": not_while_recorded,
    "is constant": lambda x: DATA.sum().expand(len(x)).clone().requires_grad_(),
}


@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
def test_functions_that_cannot_be_recorded_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    assert record(function, torch.ones(5, 2), []) is None


def test_a_first_step_that_fails_costs_no_recording() -> None:
    failing = [False]

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if failing[0] and z.requires_grad:
            raise ValueError("singular")

    walk, _ = walk_of(model, AutoIAF(model, **SMALL), ())
    failing[0] = True
    with pytest.raises(ValueError, match="singular"):
        walk.step()
    failing[0] = False
    assert math.isfinite(walk.step().loss)
    assert walk._recording is not None


def test_a_condition_with_another_outcome_is_noticed() -> None:
    recorded = record(lambda x: x.sum(-1) if x.sum() > 0 else 2 * x.sum(-1), torch.ones(5, 2), [])
    assert recorded is not None
    assert recorded(torch.ones(5, 2)) is not None
    assert recorded(-torch.ones(5, 2)) is None


def test_changed_data_are_noticed() -> None:
    data = torch.ones(2)
    recorded = record(lambda x: (x * data.exp()).sum(-1), torch.ones(5, 2), [])
    assert recorded is not None
    assert recorded.is_current
    data.add_(1.0)
    assert not recorded.is_current


# -- a step of a fit ---------------------------------------------------------------------------------------------------


def with_parameters(y: Tensor) -> None:
    scale = pyro.param("scale", lambda: torch.tensor(2.0), constraint=dist.constraints.positive)
    loc = pyro.sample("loc", dist.Normal(0.0, scale))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(loc, spread))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


MODELS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "counting": (counting, ()),
    "regression": (regression(dtype=torch.float32).model, ()),
    "with parameters": (with_parameters, (DATA,)),
}


def walk_of(model: Any, guide: Any, args: tuple[Any, ...], draws: int = 16) -> tuple[Walk, list[Tensor]]:
    guide.setup(*args)
    call = Call(model, args, {})
    pair = Pair("test", call, guide)
    assert can_walk(guide, pair.joint)
    of_model = [value.unconstrained() for name, value in pyro.get_param_store().items() if name == "scale"]
    weights = [*(each for each in guide.parameters() if each.requires_grad), *of_model]
    return Walk(call, guide, pair.joint, draws, weights), weights


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize(("model", "args"), MODELS.values(), ids=MODELS)
def test_a_walk_has_the_loss_and_the_gradient_of_the_path_objective(make: Any, model: Any, args: Any) -> None:
    guide = make(model, **SMALL, init_scale=0.3)
    walk, weights = walk_of(model, guide, args)
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.1 * torch.randn_like(weight))
    objective = TracePath_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=3)
    for seed in range(5):  # the first steps are those of the model itself
        pyro.set_rng_seed(seed)
        step = walk.step()
        ours = [None if weight.grad is None else weight.grad.clone() for weight in weights]
        for weight in weights:
            weight.grad = None
        pyro.set_rng_seed(seed)
        loss = objective.loss_and_grads(model, guide, *args)
        assert step.loss == pytest.approx(loss, rel=1e-5)
        for one, weight in zip(ours, weights, strict=True):
            torch.testing.assert_close(one, weight.grad, rtol=1e-3, atol=1e-4)


def switching() -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(DATA)):
        is_far = pyro.sample("is_far", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(loc, 1.0 + 3.0 * is_far), obs=DATA)


@pytest.mark.parametrize("plain", [counting, switching])
def test_steps_of_a_plain_model_are_recorded(monkeypatch: pytest.MonkeyPatch, plain: Callable[[], None]) -> None:
    runs = []

    def model() -> None:
        runs.append(0)
        plain()

    def runs_of_steps() -> int:
        walk, _ = walk_of(model, AutoIAF(model, **SMALL), ())
        before = len(runs)
        for _ in range(90):
            walk.step()
        return len(runs) - before

    assert runs_of_steps() < 10
    monkeypatch.setattr(Recording, "is_current", False)
    assert runs_of_steps() >= 90


def test_a_model_whose_density_changes_is_run_in_each_later_step() -> None:
    """A comparison detects changes that neither the code nor torch's operations show."""
    shift, runs = np.zeros(1), []

    def model() -> None:
        runs.append(0)
        pyro.sample("z", dist.Normal(float(shift[0]), 1.0))

    guide = AutoIAF(model, **SMALL)
    walk, _ = walk_of(model, guide, ())
    for _ in range(50):
        walk.step()
    before = len(runs)
    shift[0] = 1.0
    for _ in range(100):
        walk.step()
    assert before + 40 < len(runs) < before + 60


def test_networks_of_the_model_are_trained() -> None:
    network = nn.Linear(1, 1)

    def model() -> None:
        pyro.module("network", network)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(network(z[..., None])[..., 0], 0.1), obs=torch.tensor(2.0))

    before = network.weight.detach().clone()
    fit_guide(model, AutoIAF(model, **SMALL), steps=30, num_particles=4, progress=False)
    assert not torch.equal(network.weight, before)
    assert isinstance(record(lambda x: network(x).sum(-1), torch.randn(5, 1), list(network.parameters())), Recording)


def recursion(x: Tensor) -> Tensor:
    """A recursion of variances, with one number per draw, stacked at the end."""
    level, share = x[:, 0].exp(), torch.sigmoid(x[:, 1])
    values = [level]
    for past in torch.linspace(-1.0, 2.0, 60):
        values.append((level + 0.3 * (past - x[:, 0]) ** 2 + share * values[-1]).clamp(max=3.0))
    scales = torch.stack(values, -1).sqrt()
    return dist.Normal(x[:, :1], scales).log_prob(torch.linspace(0, 1, 61)).sum(-1)


def system(x: Tensor) -> Tensor:
    """A differential equation with two variables, whose state has draws as last dimension."""
    state = torch.stack([x[:, 0].exp(), 1 - x[:, 1]])
    rates = torch.tensor([0.5, -0.3], dtype=x.dtype)
    path = []
    for step in range(40):
        prey, predators = state.unbind()
        slope = torch.stack([prey * (1 - predators / 2), predators * (prey - 1)])
        state = torch.where(state > 4.0, state, (state + 0.1 * slope + 0.01 * rates[:, None]).clamp(min=0.1))
        if step % 10 == 9:
            path.append(state)
    return torch.stack(path).log().sum((0, 1)) - torch.cat(path, -1).mean()


def clamped(x: Tensor) -> Tensor:
    """A recursion clamped on both sides, whose gradient combines two conditions in place."""
    level = x[:, 0].exp()
    for _ in range(60):
        level = (0.9 * level + 0.1 * x[:, 1] ** 2).clamp(0.1, 2.0)
    return level.log()


def interleaved(x: Tensor) -> Tensor:
    """Values that a later kernel call needs before an earlier one does."""
    shared, number = torch.erf(x).sum(-1), x[:, 1]
    for _ in range(60):
        number = 0.9 * number + 0.1
    late, early = torch.erf(number), x[:, 1]
    for _ in range(60):
        late = 0.9 * late + shared
    for _ in range(60):
        early = 0.8 * early + shared
    return late + early


def with_changes_between(x: Tensor) -> Tensor:
    """Values between in-place changes, whose order must be preserved."""
    table, number = torch.zeros(len(x), 50), x[:, 0]
    for column in range(50):
        number = (number * 0.9 + x[:, 1] * table[:, column - 1].exp()).tanh() - 0.1 * number / (1 + number**2)
        number = torch.maximum(number, -number) + torch.rsqrt(1 + number * number)
        table[:, column] = number
        table.mul_(0.99)
    return table.sum(-1)


@pytest.mark.parametrize("function", [recursion, system, clamped, interleaved, with_changes_between])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operations_on_numbers_of_a_draw_are_fused(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    recorded = record(function, torch.randn(7, 2, generator=generator, dtype=dtype), [])
    assert recorded is not None
    code = recorded._program.__self__.code
    assert function is with_changes_between or ("run0" in code and code.count("torch.ops.aten") < 100)
    for _ in range(2):
        x = torch.randn(7, 2, generator=generator, dtype=dtype)
        found = recorded(x)
        assert found is not None
        values, (gradient,) = exactly(function, x, [])
        torch.testing.assert_close(found.values, values)
        torch.testing.assert_close(found.gradient, gradient)


def test_a_recording_with_few_operations_or_one_draw_is_not_fused() -> None:
    for function, rows in ((filled, 5), (recursion, 1)):
        recorded = record(function, torch.randn(rows, 2), [])
        assert recorded is not None
        assert "run0" not in recorded._program.__self__.code


def test_kernels_of_numbers_are_those_of_torch() -> None:
    x, y = torch.randn(2, 9).double(), torch.randn(2, 9).double().abs() + 0.1
    x[0, 0] = torch.nan
    for code, name in enumerate(OPERATIONS):
        function = getattr(
            torch, {"le": "less_equal", "lt": "less", "ge": "greater_equal", "gt": "greater"}.get(name, name)
        )
        registers = torch.stack([y if name == "pow" else x, y, x + 1, torch.zeros(2, 9).double()])[:, 0].numpy().copy()
        first, second, third = torch.tensor(registers[:3])
        run(np.array([[code, 3, 0, 1, 2]], dtype=np.int32), registers)
        if name == "where":
            expected = torch.where(first != 0, second, third)
        else:
            expected = function(first, second) if code < OPERATIONS.index("neg") else function(first)
        torch.testing.assert_close(torch.tensor(registers[3]), expected.double(), equal_nan=True, msg=name)
