"""Fits with all weights in one tensor: results equal those of fits without, and no trace remains afterwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_maf import MAF, MADEMoG, RealNVP, fit
from pyro_maf._core.optimization import Adam, WeightAverage
from pyro_maf._core.processes import Processes
from pyro_maf.distributions import FlowPrior
from pyro_maf.sweep import threads
from pyro_maf.sweep.kernels import kernels
from pyro_maf.tables import Rows
from pyro_maf.training import loop
from pyro_maf.training.objective import JoinedLikelihood, MaximumLikelihood, objective_of
from pyro_maf.training.records import Checkpoint
from pyro_maf.transforms import ActNorm, LowerTriangularAffine, Stack

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiled kernels on this machine")

double = torch.float64
OPTIONS = {"max_epochs": 3, "batch_size": 40, "progress": False}


def small(family: Callable[..., Any] = MAF, **options: Any) -> Any:
    torch.manual_seed(0)
    return family(3, num_layers=2, hidden_dims=[8], **options)


FLOWS: dict[str, Callable[[], Any]] = {
    "MAF": small,
    "RealNVP": lambda: small(RealNVP, activation="tanh"),
    "conditional": lambda: small(context_dim=2),
    "double": lambda: small().double(),
    "act norm": lambda: Stack([ActNorm(3), small(), ActNorm(3), LowerTriangularAffine(3)]),
}


def rows(density: FlowPrior, count: int = 30) -> Rows:
    dtype = density.dtype
    context = torch.randn(count, density.context_dim, dtype=dtype) if density.context_dim else None
    return Rows(torch.randn(count, 3, dtype=dtype).exp(), context)


def seen(density: Any) -> dict[str, Tensor]:
    """The state with masked weights set to 0, since autograd lets these decay without any effect."""
    state = density.state_dict()
    masks = {name.replace("mask", "weight"): tensor for name, tensor in density.named_buffers() if "mask" in name}
    return {name: (tensor * (masks[name] != 0) if name in masks else tensor).double() for name, tensor in state.items()}


def descent(objective: MaximumLikelihood, batch: Rows) -> tuple[float, int, Tensor]:
    """Loss, number of rows, and gradient of a step as averaged by Adam, 0 at masked entries."""
    adam, average = Adam(objective.weights, betas=(0.0, 0.999)), WeightAverage(objective.weights, 4)
    taken = objective.descend(batch, adam, average, 0.0, math.inf)
    assert taken is not None
    return float(taken[0]), taken[1], adam.states[0]["exp_avg"]


@pytest.mark.parametrize("support", ["real", "positive"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("flow", FLOWS)
def test_a_step_is_that_of_autograd(flow: str, weighted: bool, support: str) -> None:
    density = FlowPrior(FLOWS[flow](), support=support)
    batch = rows(density)
    if weighted:
        batch = batch._replace(weights=torch.rand(30) + 0.5)
    for parameter in density.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    expected = MaximumLikelihood(density, Processes()).step(batch)
    objective = objective_of(density, Processes())
    assert type(objective) is JoinedLikelihood
    loss, count, actual = descent(objective, batch)
    tolerance = 1e-10 if flow == "double" else 1e-5
    assert loss == pytest.approx(float(expected.loss), rel=tolerance)
    assert count == expected.rows == 30
    for part, gradient in zip(objective.split([actual]), expected.gradients, strict=True):
        assert gradient is not None
        assert torch.allclose(part, gradient, rtol=tolerance, atol=tolerance * float(1 + gradient.norm()))


def test_a_step_in_torch_has_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    density = FlowPrior(small())
    objective, batch = objective_of(density, Processes()), rows(density)
    *actual, gradient = descent(objective, batch)
    monkeypatch.setattr("pyro_maf.sweep.function.Run.inputs", lambda *_: None)
    *expected, by_torch = descent(objective, batch)
    assert actual == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(gradient, by_torch, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in density.parameters())


@pytest.mark.parametrize("limit", [1e-2, 10.0])
@pytest.mark.parametrize("flow", FLOWS)
def test_a_fit_is_that_of_autograd(flow: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(300, 3, generator=generator, dtype=double)
    context = torch.randn(300, 2, generator=generator, dtype=double) if flow == "conditional" else None
    if flow != "double":
        data, context = data.float(), None if context is None else context.float()
    actual = fit(FLOWS[flow](), data, context=context, max_grad_norm=limit, **OPTIONS)
    monkeypatch.setattr(loop, "objective_of", MaximumLikelihood)
    expected = fit(FLOWS[flow](), data, context=context, max_grad_norm=limit, **OPTIONS)
    tolerance = 1e-8 if flow == "double" else 2e-3
    assert actual.validation_loss == pytest.approx(expected.validation_loss, rel=tolerance)
    assert actual.train_loss == pytest.approx(expected.train_loss, rel=tolerance)
    theirs = seen(expected.density)
    for name, tensor in seen(actual.density).items():
        assert torch.allclose(tensor, theirs[name], rtol=tolerance, atol=tolerance), name


def test_weights_are_tensors_of_their_own_after_a_fit() -> None:
    flow = small()
    parameters = list(flow.parameters())
    fit(flow, torch.randn(100, 3), **OPTIONS)
    assert all(map(lambda one, other: one is other, flow.parameters(), parameters))
    assert len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == len(parameters)
    assert all(parameter.untyped_storage().nbytes() == 4 * parameter.numel() for parameter in parameters)
    assert all(parameter.grad is None and parameter.is_leaf for parameter in parameters)


def test_a_checkpoint_is_that_of_a_fit_by_autograd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.randn(100, 3)
    fit(small(), data, folder=tmp_path / "joined", **OPTIONS)
    monkeypatch.setattr(loop, "objective_of", MaximumLikelihood)
    fit(small(), data, folder=tmp_path / "plain", **OPTIONS)
    actual, expected = (Checkpoint.read(next((tmp_path / name).glob("checkpoint*"))) for name in ("joined", "plain"))
    assert {name: tensor.shape for name, tensor in actual.tensors.items()} == {
        name: tensor.shape for name, tensor in expected.tensors.items()
    }
    assert torch.equal(actual.tensors["optimizer/3/step"], expected.tensors["optimizer/3/step"])
    monkeypatch.undo()
    for name in ("joined", "plain"):
        resumed = fit(small(), data, folder=tmp_path / name, resume=True, **{**OPTIONS, "max_epochs": 5})
        assert len(resumed.validation_loss) == 5


def _hook(density: Any) -> None:
    next(density.parameters()).register_hook(lambda gradient: gradient)


def _freeze(density: Any) -> None:
    next(density.parameters()).requires_grad_(False)


ORDINARY: dict[str, Callable[[], Any]] = {
    "batch norm": lambda: FlowPrior(small(batch_norm=True)),
    "mixture": lambda: FlowPrior(MADEMoG(3)),
    "not a prior": lambda: MADEMoG(3),
    "hook": lambda: FlowPrior(small()),
    "frozen": lambda: FlowPrior(small()),
}


@pytest.mark.parametrize("why", ORDINARY)
def test_other_densities_are_differentiated_by_autograd(why: str) -> None:
    density = ORDINARY[why]()
    {"hook": _hook, "frozen": _freeze}.get(why, lambda _: None)(density)
    assert type(objective_of(density, Processes())) is MaximumLikelihood


def test_validation_sees_the_averaged_weights() -> None:
    density, value = FlowPrior(small()), torch.randn(20, 3)
    objective = objective_of(density, Processes())
    (whole,) = objective.weights

    def scores() -> Tensor:
        with torch.no_grad():
            return density.log_density(value)

    before = scores()
    average = loop.State(density, objective, loop.Batches(rows(density), 10, None, Processes()), loop.Schedule(1.0, 4))
    average.average.values[0].add_(0.1)
    average.average.swap()
    assert not torch.allclose(scores(), before)
    average.average.swap()
    assert torch.allclose(scores(), before)
    objective.close()
    assert torch.equal(whole[:8], density.model.layers[-1].made.layers[0].weight.flatten()[:8])  # type: ignore[union-attr,index,operator]


@pytest.mark.parametrize("flow", FLOWS)
def test_a_step_of_adam_is_that_of_torch(flow: str) -> None:
    density = FlowPrior(FLOWS[flow]())
    batches = [rows(density) for _ in range(3)]
    plain = MaximumLikelihood(copy.deepcopy(density), Processes())
    objective = objective_of(density, Processes())
    states = []
    for each in (plain, objective):
        adam, average = Adam(each.weights, 0.1), WeightAverage(each.weights, 4)
        for number, batch in enumerate(batches):
            if number == 2:  # others may change the weights
                with torch.no_grad():
                    next(each.density.parameters()).add_(0.1)
            assert each.descend(batch, adam, average, 0.01, 0.5) is not None
        moments = [[state[name] for state in adam.states] for name in ("exp_avg", "exp_avg_sq")]
        split = [each.split(tensors) for tensors in (each.weights, average.values, *moments)]
        states.append([tensor for tensors in split for tensor in tensors])
        assert float(adam.states[0]["step"]) == average.taken == 3
    tolerance = 1e-9 if flow == "double" else 1e-4
    touched = [moment != 0 for moment in objective.split(moments[0])]
    for number, (one, other) in enumerate(zip(*states, strict=True)):
        where = touched[number % len(touched)]
        assert torch.allclose(one[where], other[where], rtol=tolerance, atol=tolerance)


def test_steps_of_several_sizes_by_several_threads_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    density = FlowPrior(small().double())
    batches = [rows(density, count) for count in (700, 1, 230, 700, 699)]
    weights = []
    for parts in (1, 3):
        monkeypatch.setattr(threads, "LEAST_WORK", 1 if parts > 1 else 10**12)
        monkeypatch.setattr(torch, "get_num_threads", lambda parts=parts: parts)
        objective = objective_of(copy.deepcopy(density), Processes())
        adam, average = Adam(objective.weights), WeightAverage(objective.weights, 4)
        for batch in batches:
            assert objective.descend(batch, adam, average, 0.01, 1.0) is not None
        weights.append(objective.weights[0])
    assert torch.allclose(*weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_step_that_is_not_finite_changes_nothing(value: float) -> None:
    objective = objective_of(density := FlowPrior(small()), Processes())
    adam, average = Adam(objective.weights), WeightAverage(objective.weights, 4)
    batch = rows(density)
    assert objective.descend(batch, adam, average, 0.01, 1.0) is not None
    tensors = [*objective.weights, *adam.states[0].values(), *average.values]
    before = [tensor.clone() for tensor in tensors]
    batch.data[3, 1] = value
    assert objective.descend(batch, adam, average, 0.01, 1.0) is None
    assert all(map(torch.equal, tensors, before))
    assert average.taken == 1
