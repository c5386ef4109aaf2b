"""Masked networks: dependencies of outputs on inputs, values of layers, and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pyro_maf.nn import ACTIVATIONS, MADE, MLP, MaskedLinear, compress_tails, default_hidden_dims, degrees, masks
from pyro_maf.transforms import ConditionalMaskedAutoregressive, MaskedAutoregressive

double = torch.float64
MODULES: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "tanh": nn.Tanh(),
    "elu": nn.ELU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "leaky_relu": nn.LeakyReLU(),
    "softplus": nn.Softplus(),
    "sigmoid": nn.Sigmoid(),
}
widths = st.lists(st.integers(1, 40), max_size=3)


@st.composite
def architectures(draw: Any) -> dict[str, Any]:
    """Arguments of a MADE."""
    size = draw(st.integers(1, 10))
    return {
        "input_dim": size,
        "hidden_dims": draw(widths),
        "outputs_per_input": draw(st.integers(1, 3)),
        "context_dim": draw(st.integers(0, 2)),
        "activation": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "order": draw(st.permutations(range(size))),
        "degrees": draw(st.sampled_from(["sequential", "random"])),
        "seed": draw(st.integers(0, 1000)),
    }


# Degrees


@given(size=st.integers(2, 20), hidden=widths, lowest=st.integers(0, 1))
def test_sequential_degrees_are_spread_evenly(size: int, hidden: list[int], lowest: int) -> None:
    levels = size - lowest
    for width, layer in zip(hidden, degrees(size, hidden, lowest=lowest), strict=True):
        assert (layer.dtype, layer.shape) == (torch.int64, (width,))
        if width >= levels:
            assert set(layer.bincount(minlength=size)[lowest:].tolist()) <= {width // levels, -(-width // levels)}
        else:
            steps = layer.diff(prepend=torch.tensor([lowest - 1])).tolist()
            assert set(steps) <= {levels // width, -(-levels // width)}
        assert int(layer[-1]) == size - 1


@given(size=st.integers(2, 20), hidden=widths, lowest=st.integers(0, 1), seed=st.integers(0, 1000))
def test_random_degrees_are_sorted_and_reach_every_input(size: int, hidden: list[int], lowest: int, seed: int) -> None:
    before = torch.random.get_rng_state()
    layers = degrees(size, hidden, kind="random", lowest=lowest, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(map(torch.equal, degrees(size, hidden, kind="random", lowest=lowest, seed=seed), layers))
    for width, layer in zip(hidden, layers, strict=True):
        assert (layer.dtype, layer.shape) == (torch.int64, (width,))
        assert layer.tolist() == sorted(layer.tolist())
        assert lowest <= int(layer[0]) <= int(layer[-1]) == size - 1


def test_random_degrees_are_uniform() -> None:
    one, other = degrees(7, [6000, 6000], kind="random", lowest=0, seed=1)
    assert not torch.equal(one, other)
    deviation = (6000 / 7 * 6 / 7) ** 0.5
    assert float((one.bincount() - 6000 / 7).abs().max()) < 4 * deviation


# Masks


@given(a=architectures())
def test_an_output_depends_on_earlier_inputs_only(a: dict[str, Any]) -> None:
    size, hidden, outputs, lowest = a["input_dim"], a["hidden_dims"], a["outputs_per_input"], int(not a["context_dim"])
    units = degrees(size, hidden, kind=a["degrees"], lowest=lowest, seed=a["seed"])
    layers = masks(a["order"], units, outputs)
    assert [layer.shape for layer in layers] == list(zip([*hidden, size * outputs], [size, *hidden], strict=True))
    seen = torch.eye(size, dtype=double)
    for layer in layers:
        assert layer.dtype == torch.bool
        seen = (layer.to(double) @ seen).clamp(max=1)
    each = seen.view(size, outputs, size)
    assert torch.equal(each, each[:, :1].expand_as(each))
    found = each[a["order"], 0][:, a["order"]]
    earlier = torch.ones(size, size, dtype=double).tril(-1)
    assert bool((found <= earlier).all())
    # The last output sees all inputs before it whatever the widths; with units of all degrees in each layer, so do all.
    assert torch.equal(found[-1], earlier[-1])
    if a["degrees"] == "sequential" and min(hidden, default=size) >= size - lowest:
        assert torch.equal(found, earlier)


# Masked layers


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masked_linear_is_a_linear_layer_with_masked_weights(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]]).to(dtype)
    layer = MaskedLinear(mask).double()
    x = torch.randn(4, 5, 3, dtype=double)
    kept = mask.to(double)
    torch.testing.assert_close(layer(x), x @ (layer.weight * kept).T + layer.bias, rtol=1e-14, atol=1e-14)
    layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad != 0, kept.bool())
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_masked_linear_is_initialised_by_its_number_of_inputs() -> None:
    layer = MaskedLinear(torch.ones(3, 4000).mul(torch.arange(4000) < torch.tensor([[4000], [1000], [0]])))
    largest = layer.weight.detach().abs().amax(1) * torch.tensor([4000.0, 1000.0, 1.0]).sqrt()
    assert bool(((largest <= 1.0001) & (largest > 0.99)).all())
    assert float(layer.weight.detach().mean().abs()) < 0.05
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not bool((layer.weight == before).any())


# MADE


@given(a=architectures())
def test_gradients_exist_for_earlier_inputs_only(a: dict[str, Any]) -> None:
    made = MADE(**a).double()
    context = torch.randn(a["context_dim"], dtype=double) if a["context_dim"] else None
    x = 3 * torch.randn(made.input_dim, dtype=double)
    slopes = torch.autograd.functional.jacobian(lambda value: made(value, context), x)
    assert slopes.shape == (made.input_dim, made.outputs_per_input, made.input_dim)
    ordered = slopes[made.order][..., made.order].permute(1, 0, 2)
    assert torch.equal(ordered.tril(-1), ordered)
    if a["activation"] not in ("relu", "gelu", "silu"):  # whose slope can vanish
        assert bool((ordered[:, -1, :-1] != 0).all())


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_made_composes_its_layers(activation: str, context_dim: int) -> None:
    made = MADE(3, [7, 6], outputs_per_input=2, context_dim=context_dim, activation=activation).double()
    x, context = 4 * torch.randn(50, 3, dtype=double), torch.randn(50, context_dim, dtype=double)
    expected = compress_tails(x)
    for index, (layer, mask) in enumerate(zip(made.masked_layers, made.masks(), strict=True)):
        expected = expected @ (layer.weight * mask).T + layer.bias
        if context_dim:
            expected = expected + context @ made.context_layers[index].weight.T
        expected = MODULES[activation](expected) if index < 2 else expected
    given = (x, context) if context_dim else (x,)
    torch.testing.assert_close(made(*given), expected.view(50, 3, 2), rtol=1e-12, atol=1e-12)
    made.zero_output()
    assert not bool(made(*given).any())


@pytest.mark.parametrize("hidden", [[], [1], [8, 8]], ids=str)
def test_one_dimension_has_a_constant_or_follows_the_context(hidden: list[int]) -> None:
    x = torch.randn(6, 1, dtype=double)
    constant = MADE(1, hidden, outputs_per_input=2).double()(x)
    assert torch.equal(constant, constant[:1].expand(6, 1, 2))
    assert bool((constant != 0).all())
    made = MADE(1, hidden, outputs_per_input=2, context_dim=3, activation="tanh").double()
    contexts = torch.randn(6, 3, dtype=double)
    following = made(x, contexts)
    assert torch.equal(following, made(x + 1, contexts))
    assert len(following[:, 0, 0].detach().unique()) == 6


def test_every_unit_sees_every_feature_of_the_context() -> None:
    made = MADE(4, [9, 8], outputs_per_input=2, context_dim=3, activation="tanh", order=[2, 0, 3, 1]).double()
    x, context = torch.randn(4, dtype=double), torch.randn(3, dtype=double)
    (made(x, context) * torch.randn(4, 2, dtype=double)).sum().backward()
    assert [tuple(layer.weight.shape) for layer in made.context_layers] == [(9, 3), (8, 3), (8, 3)]
    assert all(bool((layer.weight.grad != 0).all()) for layer in made.context_layers)

    def first(context: Tensor) -> Tensor:
        return made(x, context)[2, 0]

    # The first output has no input before it, but hidden units between it and the context.
    assert bool((torch.autograd.functional.jacobian(first, context) != 0).all())
    assert bool((torch.autograd.functional.hessian(first, context) != 0).all())


def test_context_broadcasts_over_the_batch() -> None:
    made = MADE(3, [8], outputs_per_input=2, context_dim=2).double()
    x, contexts = torch.randn(5, 3, dtype=double), torch.randn(4, 1, 2, dtype=double)
    outputs = made(x, contexts)
    assert outputs.shape == (4, 5, 3, 2)
    for row, context in zip(outputs, contexts, strict=True):
        torch.testing.assert_close(made(x, context[0]), row)


def test_state_dict_holds_order_and_degrees() -> None:
    """A network with another order or degrees becomes the stored map by loading its state, in both directions."""
    stored = MaskedAutoregressive(5, hidden_dims=[9, 7], order=[3, 1, 4, 0, 2], degrees="random", seed=1).double()
    for parameter in stored.parameters():
        nn.init.normal_(parameter, std=0.5)
    other = MaskedAutoregressive(5, hidden_dims=[9, 7], degrees="random", seed=2).double()
    assert not torch.equal(other.made.hidden_degrees[0], stored.made.hidden_degrees[0])
    other.load_state_dict(stored.state_dict())
    x = torch.randn(20, 5, dtype=double)
    torch.testing.assert_close(other.inv(x), stored.inv(x), rtol=0, atol=0)
    torch.testing.assert_close(other(x), stored(x), rtol=0, atol=0)
    assert other.order.tolist() == [3, 1, 4, 0, 2]
    assert all(map(torch.equal, other.made.hidden_degrees, stored.made.hidden_degrees))


@pytest.mark.parametrize("context_dim", [0, 2])
def test_outputs_of_low_rank_are_those_of_a_product_of_weights(context_dim: int) -> None:
    made = MADE(4, [9], outputs_per_input=7, context_dim=context_dim, order=[2, 0, 3, 1]).double()
    made.set_rank(3)
    full = MADE(4, [9], outputs_per_input=7, context_dim=context_dim, order=[2, 0, 3, 1]).double()
    full.load_state_dict(of_full_rank(made))
    x, context = torch.randn(5, 4, dtype=double), torch.randn(5, 2, dtype=double) if context_dim else None
    torch.testing.assert_close(made(x, context), full(x, context))


def of_full_rank(made: Any) -> dict[str, Tensor]:
    """The state of the same network with a full-rank last layer."""
    state = made.state_dict()
    matrix, bias = state.pop("head.weight"), state.pop("head.bias").flatten()
    for name in ("layers.1.weight", "layers.1.bias", "context_layers.1.weight"):
        if name in state:
            state[name] = (matrix @ state[name].reshape(4, 3, -1)).flatten(0, 1)
    state["layers.1.bias"] = state["layers.1.bias"].flatten() + bias
    return state


@pytest.mark.parametrize("rank", [None, 3])
def test_a_state_keeps_its_rank(rank: int | None) -> None:
    """Either form loads a state of the other, since files may predate the rule that chooses the form."""
    stored, other = (ConditionalMaskedAutoregressive(4, 2, hidden_dims=[9], univariate="spline").double() for _ in "ab")
    stored.flow.made.set_rank(rank)
    other.flow.made.set_rank(None if rank else 5)
    for parameter in stored.parameters():
        nn.init.normal_(parameter, std=0.3)
    other.load_state_dict(stored.state_dict())
    x, context = torch.randn(20, 4, dtype=double), torch.randn(2, dtype=double)
    assert torch.equal(other.condition(context)(x), stored.condition(context)(x))
    assert torch.equal(other.condition(context).inv(x), stored.condition(context).inv(x))


@pytest.mark.parametrize("strict", [True, False])
def test_state_of_another_activation_is_refused(strict: bool) -> None:
    state = MaskedAutoregressive(3, hidden_dims=[8], activation="tanh").state_dict()
    other = MaskedAutoregressive(3, hidden_dims=[8])
    with pytest.raises(RuntimeError, match="activation of made: 'tanh' was stored, 'relu' is built here"):
        other.load_state_dict(state, strict=strict)
    state["made.activation_index"] = torch.tensor(len(ACTIVATIONS))
    with pytest.raises(RuntimeError, match=r"activation of made: .* was stored, 'relu' is built here"):
        other.load_state_dict(state, strict=strict)


# MLP, tails, widths


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("input_dim", [0, 3])
def test_mlp_composes_its_layers(input_dim: int, context_dim: int) -> None:
    mlp = MLP(input_dim, [7, 5], 4, context_dim=context_dim, activation="elu").double()
    x, context = 4 * torch.randn(6, input_dim, dtype=double), torch.randn(6, context_dim, dtype=double)
    expected = compress_tails(x)
    for index, layer in enumerate(mlp.layers):
        expected = expected @ layer.weight.T + layer.bias
        expected = expected + context @ mlp.context_layers[index].weight.T if context_dim else expected
        expected = nn.functional.elu(expected) if index < 2 else expected
    actual = mlp(x, context if context_dim else None)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert (float(actual.detach().std(0).max()) < 1e-12) == (input_dim + context_dim == 0)


def test_tails_are_compressed_smoothly_and_in_order() -> None:
    x = torch.linspace(-60, 60, 120_001, dtype=double, requires_grad=True)
    y = compress_tails(x)
    size = x.detach().abs()
    expected = torch.where(size <= 3, size, 3 + (1 + (size - 3).clamp(min=0)).log()) * x.detach().sign()
    torch.testing.assert_close(y.detach(), expected, rtol=1e-14, atol=1e-14)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, 1 / (1 + (size - 3).clamp(min=0)), rtol=1e-12, atol=0)
    extremes = compress_tails(torch.tensor([-torch.inf, torch.inf, torch.nan]))
    assert torch.equal(extremes[:2], torch.tensor([-torch.inf, torch.inf]))
    assert bool(extremes[2].isnan())


def test_default_widths_are_eight_a_dimension_within_bounds() -> None:
    assert [default_hidden_dims(size)[0] for size in (1, 8, 9, 64, 65)] == [64, 64, 72, 512, 512]
    assert MADE(9).hidden_dims == default_hidden_dims(9) == (72, 72)


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: degrees(3, [4, 0]), ValueError, "degrees expected every width in hidden_dims of at least 1, got 0"),
        (lambda: degrees(3, [4], kind="even"), ValueError, "degrees expected kind to be one of sequential, random"),
        (lambda: degrees(3, [4], lowest=2), ValueError, "degrees expected lowest to be 0 or 1, got 2"),
        (lambda: masks([0, 0, 1], []), ValueError, r"masks expected order to hold each of 0 \.\. 2 once"),
        (lambda: MaskedLinear(torch.ones(3)), ValueError, r"MaskedLinear expected mask to be a matrix, got shape"),
        (lambda: MADE(0), ValueError, "MADE expected input_dim of at least 1, got 0"),
        (lambda: MADE(2.5), TypeError, r"MADE expected input_dim to be an int, got 2\.5"),
        (lambda: MADE(3, 16), TypeError, r"hidden_dims to be a sequence of ints such as \(64, 64\), got 16"),
        (lambda: MADE(3, np.int64(16)), TypeError, "MADE expected hidden_dims to be a sequence of ints"),
        (lambda: MADE(3, outputs_per_input=0), ValueError, "MADE expected outputs_per_input of at least 1, got 0"),
        (lambda: MADE(3, activation="ReLU"), ValueError, "MADE expected activation to be one of relu"),
        (lambda: MADE(3, order=[0, 1]), ValueError, r"MADE expected order to be a permutation of 0 \.\. 2"),
        (lambda: MADE(3, order=[1, 2, 3]), ValueError, r"MADE expected order to hold each of 0 \.\. 2 once"),
        (lambda: MADE(3, order="reverse"), ValueError, r"MADE expected order to be a permutation of 0 \.\. 2"),
        (lambda: MADE(3)(torch.zeros(7, 4)), ValueError, r"MADE expected x with last dimension 3 \(input_dim\), got"),
        (lambda: MADE(3)(torch.zeros(3).double()), TypeError, "MADE has float32 parameters, got x of float64"),
        (lambda: MADE(3)([0.0] * 3), TypeError, r"MADE expected x to be a torch\.Tensor, got list"),
        (lambda: MADE(3)(torch.zeros(3), torch.zeros(1)), ValueError, "MADE was built without context_dim"),
        (lambda: MADE(3, context_dim=2)(torch.zeros(3)), ValueError, r"a context with last dimension 2 .*, got none"),
        (lambda: MADE(3, context_dim=2)(torch.zeros(3), torch.zeros(3)), ValueError, "context with last dimension 2"),
        (lambda: MADE(3, context_dim=2)(torch.zeros(3), torch.zeros(2).double()), TypeError, "got context of float64"),
        (lambda: MLP(3, [8], 1, activation="sin"), ValueError, "MLP expected activation to be one of"),
        (lambda: MLP(3, [8], 1)(torch.zeros(2)), ValueError, r"MLP expected x with last dimension 3 \(input_dim\)"),
    ],
)
def test_bad_input_is_refused_with_a_reason(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_feature_of_the_context_starts_with_about_the_weight_of_an_input():
    made = MADE(400, [300, 300], context_dim=10)
    with torch.no_grad():
        for layer, context_layer in zip(made.layers, made.context_layers, strict=True):
            # The last units see most inputs.
            of_inputs = layer.weight[-50:][layer.mask[-50:] == 1].square().mean().item()
            assert context_layer.weight[-50:].square().mean().item() == pytest.approx(of_inputs, rel=0.2)
        # Without inputs, the weights of the context are larger.
        assert MLP(0, [300], 2, context_dim=10).context_layers[0].weight.abs().max() > 0.3
