"""Stacks: their layers, orders, contexts, representation and errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_maf import IAF, MAF, ConditionalIAF, ConditionalMAF, ConditionalRealNVP, FlowPrior, RealNVP
from pyro_maf.transforms import (
    ActNorm,
    BatchNorm,
    ConditionalFlow,
    Flow,
    LowerTriangularAffine,
    MaskedAutoregressive,
    Permute,
    Stack,
)

double = torch.float64
TINY: dict[str, Any] = {"num_layers": 3, "hidden_dims": [8]}
every_family = pytest.mark.parametrize("make", [MAF, IAF, RealNVP])
every_conditional = pytest.mark.parametrize("make", [ConditionalMAF, ConditionalIAF, ConditionalRealNVP])


def shaken(flow: Any, size: float = 0.3) -> Any:
    """The flow in float64 with random parameters."""
    flow.double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(size * torch.randn(parameter.shape, dtype=double))
    return flow


def orders(flow: Any) -> list[list[int]]:
    """The order of each layer, or mask of a coupling, from noise to data."""
    return [getattr(layer, "mask", getattr(layer, "order", None)).int().tolist() for layer in flow]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


# Stacks


def test_a_stack_composes_its_layers() -> None:
    layers = [shaken(MAF(3, **TINY)), Permute([2, 0, 1]), shaken(ActNorm(3)), shaken(IAF(3, **TINY)).inv]
    flow = Stack(layers).eval()
    assert (len(flow), list(flow), flow[1], flow[-1]) == (4, layers, layers[1], layers[3])
    x = torch.randn(5, 3, dtype=double)
    y, total = x, torch.zeros(5).double()
    for layer in layers:
        total = total + layer.log_abs_det_jacobian(y, layer(y))
        y = layer(y)
    close(flow(x), y)
    close(flow.log_abs_det_jacobian(x, y), total)
    close(flow.inv(y), x)
    assert len(list(flow.parameters())) == sum(len(list(layer.parameters())) for layer in layers)
    nested = Stack([Stack(layers[:2]), Stack(layers[2:])]).eval()
    close(nested(x), y)
    close(nested.inv.log_abs_det_jacobian(y, x), -total)


def test_a_stack_is_a_transform_of_vectors() -> None:
    for flow in (Stack([ActNorm(2)]), MAF(2), IAF(2).inv, RealNVP(2), ConditionalMAF(2, 1).condition(torch.ones(1))):
        assert flow.domain == flow.codomain == constraints.real_vector
        assert (flow.event_dim, flow.bijective, flow.sign) == (1, True, 1)
        without = flow.with_cache(0)
        x = torch.randn(4, 2)
        assert without.inv(without(x)) is not x
        assert list(map(id, without.parameters())) == list(map(id, flow.parameters()))


def test_layers_with_and_without_context_mix() -> None:
    stack = shaken(Stack([MaskedAutoregressive(3, context_dim=2), Permute([1, 0, 2]), LowerTriangularAffine(3)]))
    assert (stack.context_dim, ConditionalFlow(stack).context_dim) == (2, 2)
    contexts, x = torch.randn(4, 1, 2, dtype=double), torch.randn(5, 3, dtype=double)
    y = ConditionalFlow(stack).condition(contexts)(x)
    assert y.shape == (4, 5, 3)
    for row, context in zip(y, contexts, strict=True):
        close(stack[2](stack[1](ConditionalFlow(stack[0]).condition(context[0])(x))), row)
    with pytest.raises(ValueError, match=r"Stack expected a context with last dimension 2 \(context_dim\), got none"):
        stack(x)


def test_a_stack_of_flows_at_a_context_has_its_batch_shape() -> None:
    at_contexts = shaken(ConditionalMAF(3, 2, **TINY)).condition(torch.randn(4, 2, dtype=double))
    flow = Stack([shaken(MAF(3, **TINY)), at_contexts])
    assert flow.forward_shape(torch.Size([3])) == flow.inverse_shape(torch.Size([1, 3])) == (4, 3)
    prior = FlowPrior(flow)
    y = prior.sample([5])
    assert (prior.batch_shape, y.shape, prior.log_prob(y).shape) == ((4,), (5, 4, 3), (5, 4))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))])
def test_a_copy_of_an_inverse_is_the_inverse_of_its_inverse(copied: Callable[[Flow], Flow]) -> None:
    inverse = copied(MAF(2, **TINY).inv)
    assert inverse.inv.inv is inverse
    stack = copied(Stack([IAF(2, **TINY).inv]))
    assert stack[0].inv.inv is stack[0]


# Statistics


@pytest.mark.parametrize("context_dim", [0, 2])
@every_family
def test_statistics_are_set_layer_by_layer(make: Any, context_dim: int) -> None:
    flow = shaken(make(3, batch_norm=True, context_dim=context_dim, **TINY)).train()
    y, context = 7 + 5 * torch.randn(400, 3, dtype=double), torch.randn(400, context_dim, dtype=double)
    given = (y, context) if context_dim else (y,)
    whole = ConditionalFlow(flow) if context_dim else flow
    whole.fit_statistics(*given)
    flow.eval()
    for layer in reversed(list(flow)):
        if isinstance(layer, BatchNorm):
            close(layer.mean, y.mean(0).detach())
            close(layer.variance, y.var(0, correction=0).detach())
            normalized = (layer.inv(y) - layer.beta) / layer.log_gamma.exp()
            close(normalized.mean(0), torch.zeros(3).double())
            torch.testing.assert_close(normalized.var(0, correction=0), torch.ones(3).double(), rtol=0.01, atol=0)
        y = layer.inverse_and_log_det(y, context if layer.context_dim else None)[0]


def test_statistics_leave_modes_and_gradients_alone() -> None:
    flow = Stack([ActNorm(2), BatchNorm(2), Stack([BatchNorm(2)])]).train()
    flow[1].eval()
    modes = [member.training for member in flow.modules()]
    flow.fit_statistics(5 + torch.randn(50, 2))
    assert [member.training for member in flow.modules()] == modes
    assert all(parameter.grad is None and parameter.is_leaf for parameter in flow.parameters())
    torch.testing.assert_close(flow.eval().inv(5 + torch.randn(9000, 2)).std(0), torch.ones(2), rtol=0.5, atol=0)


def test_statistics_of_unfit_data_are_refused() -> None:
    flow, rows = MAF(2, batch_norm=True, **TINY), torch.zeros(10, 2)
    for arguments, message in (
        ((torch.zeros(10, 4),), r"MAF expected y with last dimension 2 \(input_dim\), got shape \(10, 4\)"),
        ((rows[:1],), "MAF expected at least 2 rows of data, got 1"),
        ((rows, rows), "MAF was built without context_dim and takes no context"),
    ):
        with pytest.raises(ValueError, match=message):
            flow.fit_statistics(*arguments)
    conditional = ConditionalMAF(2, 3, batch_norm=True, **TINY)
    for context in (None, torch.zeros(10, 2)):
        with pytest.raises(ValueError, match=r"MAF expected (a )?context with last dimension 3 \(context_dim\), got"):
            conditional.fit_statistics(rows, context)


# Orders


@pytest.mark.parametrize("make", [MAF, IAF])
def test_orders_alternate_from_the_data_back_to_the_noise(make: Any) -> None:
    forwards, backwards = [0, 1, 2, 3], [3, 2, 1, 0]
    assert orders(make(4, num_layers=2, hidden_dims=[8])) == [backwards, forwards]
    assert orders(make(4, **TINY)) == [forwards, backwards, forwards]


def test_masks_alternate_from_the_data_back_to_the_noise() -> None:
    even, odd = [1, 0, 1], [0, 1, 0]
    assert orders(RealNVP(3, **TINY)) == [even, odd, even]
    assert orders(RealNVP(3, num_layers=2, hidden_dims=[8])) == [odd, even]
    # Dimensions that pass through next to the data are transformed in the preceding layer, also for explicit orders.
    assert orders(RealNVP(3, order=[1, 2, 0], **TINY)) == [[1, 1, 0], [0, 0, 1], [1, 1, 0]]


@every_family
def test_random_orders_are_those_of_their_seed(make: Any) -> None:
    before = torch.random.get_rng_state()
    one = orders(make(6, order="random", seed=3, **TINY))
    torch.random.set_rng_state(before)
    again = make(6, order="random", seed=3, **TINY)
    assert orders(again) == one
    assert one != orders(make(6, order="random", seed=4, **TINY))
    assert len({tuple(order) for order in one}) > 1
    other = make(6, order="random", seed=4, **TINY)
    other.load_state_dict(again.state_dict())
    assert orders(other) == one
    x = torch.randn(5, 6)
    assert torch.equal(other(x), again(x))


@pytest.mark.parametrize("given", [list, tuple, np.array, torch.tensor])
@pytest.mark.parametrize("make", [MAF, IAF])
def test_orders_can_be_given(make: Any, given: Any) -> None:
    each = [[2, 0, 1], [0, 1, 2], [1, 0, 2]]
    assert orders(make(3, order=given(each), **TINY)) == each
    assert orders(make(3, order=given([2, 0, 1]), **TINY)) == [[2, 0, 1]] * 3


def test_random_degrees_differ_from_layer_to_layer() -> None:
    flow = MAF(20, num_layers=2, hidden_dims=[50], degrees="random", seed=1)
    one, other = (layer.made.hidden_degrees[0] for layer in flow)
    assert not torch.equal(one, other)
    again = MAF(20, num_layers=2, hidden_dims=[50], degrees="random", seed=1)
    assert torch.equal(again[0].made.hidden_degrees[0], one)


@every_family
def test_batch_norm_follows_every_layer_seen_from_the_data(make: Any) -> None:
    flow = make(3, batch_norm=True, **TINY)
    kinds = [isinstance(layer, BatchNorm) for layer in flow]
    assert kinds == [True, False] * 3
    assert [type(layer) for layer in flow][1::2] == [type(layer) for layer in make(3, **TINY)]


# Context


@every_conditional
def test_a_conditional_stack_is_a_flow_at_each_context(make: Any) -> None:
    flow = shaken(make(3, 2, batch_norm=True, **TINY)).eval()
    assert (flow.input_dim, flow.context_dim) == (3, 2)
    contexts, x = torch.randn(5, 2, dtype=double, requires_grad=True), torch.randn(5, 3, dtype=double)
    y = flow.condition(contexts)(x)
    close(flow.condition(contexts).inv(y.detach()), x)
    for row in range(5):
        close(flow.condition(contexts[row])(x[row]), y[row])
    (slopes,) = torch.autograd.grad((y * torch.randn(5, 3).double()).sum(), contexts)
    assert bool((slopes != 0).all())
    assert not torch.equal(flow.condition(contexts[0])(x[0]), flow.condition(contexts[1])(x[0]))


# Representation


@pytest.mark.parametrize(
    ("flow", "fast", "says"),
    [
        (MAF(3, **TINY), "inverse", "log_prob of data is one parallel pass, sampling one sequential sweep"),
        (MAF(3, **TINY).inv, "forward", "Inverse of MAF"),
        (IAF(3, **TINY), "forward", "sampling is one parallel pass, log_prob of data one sequential sweep"),
        (RealNVP(3, batch_norm=True, **TINY), "both", "log_prob and sampling are one parallel pass each"),
        (Stack([MAF(3, **TINY), IAF(3, **TINY).inv]), "inverse", "log_prob of data is one parallel pass"),
        (Stack([MAF(3, **TINY), Stack([IAF(3, **TINY)])]), None, "log_prob and sampling take sequential sweeps"),
        (Stack([MAF(3), IAF(3), IAF(3)]), "forward", "log_prob and sampling take sequential sweeps"),
    ],
    ids=["MAF", "its inverse", "IAF", "RealNVP", "two of one kind", "nested of two kinds", "of two kinds"],
)
def test_the_fast_direction_is_stated(flow: Flow, fast: str | None, says: str) -> None:
    assert fast in (flow.fast, None)
    assert says in repr(flow).splitlines()[0]


def test_repr_shows_architecture_and_size() -> None:
    flow = ConditionalMAF(3, 2, num_layers=2, hidden_dims=[16, 8], activation="tanh", batch_norm=True)
    lines = repr(flow).splitlines()
    count = sum(parameter.numel() for parameter in flow.parameters())
    assert lines[0].startswith(f"ConditionalMAF(input_dim=3, context_dim=2, {count:,} parameters; ")
    assert lines[1:] == [
        "  (0): BatchNorm(3)",
        "  (1): MaskedAutoregressive(3 -> 16 -> 8 -> 6, tanh)",
        "  (2): BatchNorm(3)",
        "  (3): MaskedAutoregressive(3 -> 16 -> 8 -> 6, tanh)",
    ]
    nested = repr(Stack([RealNVP(3, num_layers=1, hidden_dims=[9]), ActNorm(3)])).splitlines()
    assert nested[2:] == ["    (0): Coupling(2 -> 9 -> 2, relu)", "  (1): ActNorm(3)"]


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Stack([]), ValueError, "Stack expected at least one layer, got none"),
        (lambda: Stack([nn.Linear(2, 2)]), TypeError, "Stack expected flows, got Linear"),
        (lambda: Stack([ConditionalMAF(2, 1)]), TypeError, "Stack expected flows, got ConditionalMAF"),
        (lambda: Stack([ActNorm(2), ActNorm(3)]), ValueError, r"Stack expected layers of one input_dim, got \[2, 3\]"),
        (lambda: Stack([IAF(2, context_dim=c) for c in (1, 0, 2)]), ValueError, r"one context_dim, got \[1, 2\]"),
        (lambda: MAF(0), ValueError, "MAF expected input_dim of at least 1, got 0"),
        (lambda: RealNVP(2, num_layers=0), ValueError, "RealNVP expected num_layers of at least 1, got 0"),
        (lambda: MAF(2, order="natural"), ValueError, 'MAF expected order "reverse", "random", or permutations, got'),
        (lambda: MAF(2, order=None), ValueError, 'MAF expected order "reverse", "random", or permutations, got None'),
        (lambda: MAF(2, order=1), ValueError, 'MAF expected order "reverse", "random", or permutations, got 1'),
        (lambda: IAF(2, order=[[0, 1], [1]]), ValueError, 'IAF expected order "reverse", "random", or permutations'),
        (lambda: IAF(2, order=[0, 2]), ValueError, r"IAF expected order to hold each of 0 \.\. 1 once, got \[0, 2\]"),
        (lambda: RealNVP(2, order=[[0, 1]]), ValueError, "RealNVP expected one order for each of 5 layers, got 1"),
        (lambda: MAF(3, order=[[0, 1]] * 5), ValueError, r"MAF expected every order to be a permutation of 0 \.\. 2"),
        (lambda: ConditionalMAF(2, 0), ValueError, "ConditionalMAF expected context_dim of at least 1, got 0"),
        (lambda: ConditionalIAF(2, 1).condition(torch.zeros(2)), ValueError, "IAF expected context with last dim"),
        (lambda: IAF(2, context_dim=1)(torch.zeros(2)), ValueError, "IAF expected a context with last dimension 1"),
    ],
)
def test_bad_input_is_refused_with_a_reason(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@every_family
@pytest.mark.parametrize("seed", [None, "a", 0.5])
def test_a_seed_that_is_not_an_int_is_refused(make: Callable[..., Stack], seed: object) -> None:
    with pytest.raises(TypeError, match=f"{make.__name__} expected seed to be an int, got {seed!r}"):
        make(3, seed=seed)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_direction_without_log_determinant_is_named(rows: int) -> None:
    class Shift(Flow):
        def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return x + 1

    with pytest.raises(TypeError, match="Shift expected forward_and_log_det to return a pair"):
        Shift(3)(torch.zeros(rows, 3))
    with pytest.raises(NotImplementedError, match="Shift has no method inverse_and_log_det, from data to noise"):
        Shift(3).inv(torch.zeros(rows, 3))
