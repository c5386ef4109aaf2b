"""Parametrised weights and module hooks: both directions behave as if the layers were called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from pyro_maf import IAF, MAF, ConditionalMAF, MADEMoG, RealNVP
from pyro_maf.nn import MaskedLinear
from pyro_maf.testing.subjects import at_context
from pyro_maf.transforms import (
    ActNorm,
    BatchNorm,
    ConditionalMaskedAutoregressive,
    Flow,
    LowerTriangularAffine,
    Stack,
)
from tests.registry import Architecture, build

double = torch.float64


class LowRank(nn.Module):
    """Parametrisation W + A B, as in LoRA."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(0.3 * torch.randn(weight.shape[0], 1, dtype=weight.dtype))
        self.b = nn.Parameter(0.3 * torch.randn(1, weight.shape[1], dtype=weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


class Rounded(MaskedLinear):
    """A user-defined layer."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (8 * self.weight).tanh() / 8 * self.mask, self.bias)


def low_rank(layer: Any) -> None:
    layer.requires_grad_(False)
    parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))


def old_weight_norm(layer: Any) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layer)


def pruned(layer: Any) -> None:
    prune.random_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "bias", 0.3)


def own_class(layer: Any) -> None:
    layer.__class__ = Rounded


def own_forward(layer: Any) -> None:
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 0.1


def no_bias(layer: Any) -> None:
    layer.bias = None


IN_THE_WEIGHT: list[Callable[[Any], Any]] = [
    low_rank,
    parametrizations.weight_norm,
    lambda layer: parametrizations.spectral_norm(layer).eval(),
    old_weight_norm,
    lambda layer: spectral_norm(layer).eval(),
    pruned,
    no_bias,
]
IN_THE_CALL: list[Callable[[Any], Any]] = [
    own_class,
    own_forward,
    lambda layer: layer.register_forward_hook(lambda module, args, output: 0.7 * output),
    lambda layer: layer.register_forward_pre_hook(lambda module, args: 0.7 * args[0]),
]
NAMES = ["MaskedAutoregressive", "InverseAutoregressive", "ConditionalMaskedAutoregressive"]
NETWORK = Architecture(4, 2, 1, [6, 5], "tanh", "reverse", 0)


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def by_calls(layer: Any, v: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """The sequential direction by D calls of the network, one for each variable."""
    inner, context = getattr(layer, "flow", layer), getattr(layer, "context", None)
    direction = inner.univariate.inverse if inverse else inner.univariate.forward
    w: Tensor = torch.zeros_like(v)
    sequential = (inner.fast == "inverse") != inverse
    for i in inner.order:
        result, logs = direction(v, inner.made(w if sequential else v, context))
        w = torch.where(torch.arange(v.shape[-1]) == i, result, w)
    return w, logs.sum(-1)


def assert_as_by_calls(layer: Flow) -> None:
    """Compare values without gradients twice, since they may be cached, and then values and gradients."""
    for inverse in (False, True):
        direction = layer.inverse_and_log_det if inverse else layer.forward_and_log_det
        for rows in (3, 20):
            v = torch.randn(rows, 4, dtype=double, requires_grad=True)
            with torch.no_grad():
                expected = by_calls(layer, v, inverse)
                for _ in range(2):
                    assert all(map(torch.allclose, direction(v), expected))
        parameters, gradients = trained(layer), []
        for w, log_det in (direction(v), by_calls(layer, v, inverse)):
            assert w.requires_grad
            gradients.append(
                torch.autograd.grad(
                    w.square().sum() + log_det.sum(), parameters, allow_unused=True, materialize_grads=True
                )
            )
        assert all(map(torch.allclose, *gradients))
        assert any(bool(gradient.any()) for gradient in gradients[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [*IN_THE_WEIGHT, *IN_THE_CALL])
def test_both_directions_equal_calls_of_the_layers(name: str, change: Callable[[Any], Any]) -> None:
    layer = at_context(build(name, NETWORK, double, "cpu"), 20)
    layer = layer if name != NAMES[2] else type(layer)(layer.flow, layer.context[0])  # type: ignore[operator]
    with torch.no_grad():
        layer(torch.randn(9, 4, dtype=double))
    made = getattr(layer, "flow", layer).made
    change(made.layers[0])
    change(made.layers[-1])
    assert_as_by_calls(layer)
    with torch.no_grad():
        for parameter in trained(layer):
            parameter.mul_(1.5)
    assert_as_by_calls(layer)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_the_network_itself_run(name: str) -> None:
    layer = at_context(build(name, NETWORK, double, "cpu"))
    made = getattr(layer, "flow", layer).made
    x = torch.randn(9, 4, dtype=double)
    before = layer(x).detach()
    y = layer(x)
    handle = made.register_forward_hook(lambda module, args, output: 0.5 * output)
    assert not torch.allclose(layer.inv(y), x)
    assert_as_by_calls(layer)
    y = layer(x)
    assert not torch.allclose(y, before)
    handle.remove()
    assert not torch.allclose(layer.inv(y), x)
    assert torch.allclose(layer(x), before)


@pytest.mark.parametrize("change", [parametrizations.weight_norm, old_weight_norm, pruned, own_forward, IN_THE_CALL[2]])
def test_heads_of_outputs_are_as_other_layers(change: Callable[[Any], Any]) -> None:
    layer = at_context(build("MaskedAutoregressive of rank 3", NETWORK, double, "cpu"))
    change(layer.made.head)
    assert_as_by_calls(layer)


@pytest.mark.parametrize("name", NAMES[:2])
def test_hooks_on_gradients_run(name: str) -> None:
    layer = at_context(build(name, NETWORK, double, "cpu"))
    seen: list[Tensor] = []
    layer.made.last_layer.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    for direction in (layer, layer.inv):
        direction(torch.randn(9, 4, dtype=double, requires_grad=True)).sum().backward()
        assert seen
        seen.clear()


@pytest.mark.parametrize("make", [MAF, IAF, RealNVP])
def test_a_frozen_stack_with_low_rank_weights_trains(make: Callable[..., Flow]) -> None:
    flow = make(3, num_layers=2, hidden_dims=[8]).requires_grad_(False)
    x = torch.randn(6, 3)
    flow.inv(flow(x))
    for layer in [member for member in flow.modules() if isinstance(member, nn.Linear)]:
        low_rank(layer)
    y = flow(x)
    for value in (y, flow.inv(x), flow.log_abs_det_jacobian(x.clone(), y.detach())):
        gradients = torch.autograd.grad(value.square().sum(), list(trained(flow)), allow_unused=True)
        assert any(gradient is not None and bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("change", [*IN_THE_WEIGHT, *IN_THE_CALL])
def test_samples_of_a_mixture_follow_its_conditionals(change: Callable[[Any], Any]) -> None:
    density = MADEMoG(2, hidden_dims=[8], num_components=1).double()
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.copy_(torch.randn_like(parameter))
    change(density.made.layers[0])
    y = density.sample((20_000,))
    with torch.no_grad():
        _, mu, log_sigma = density.mixtures(y)
        standard = ((y[..., None] - mu) / log_sigma.exp()).squeeze(-1)
    assert standard.mean(0).abs().max() < 0.04
    assert (standard.std(0) - 1).abs().max() < 0.04


def test_a_user_defined_network_in_a_coupling() -> None:
    flow = RealNVP(4, num_layers=1, hidden_dims=[8])
    flow[0].networks[0].register_forward_hook(lambda module, args, output: output + 0.3)
    x = torch.randn(5, 4)
    assert torch.allclose(flow.inv(flow(x).clone()), x, atol=1e-6)
    assert not torch.allclose(flow(x), x)

    class Constant(nn.Module):
        def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
            return x.new_ones(*x.shape[:-1], 4)

    flow[0].networks[0] = Constant()
    assert torch.allclose(flow.inv(flow(x).clone()), x, atol=1e-6)


def test_layers_of_a_context_are_hooked_too() -> None:
    flow = ConditionalMAF(3, 2, num_layers=1, hidden_dims=[8]).requires_grad_(False)
    low_rank(flow.flow[0].made.context_layers[0])
    low_rank(flow.flow[0].made.last_layer)
    with torch.no_grad():
        for parameter in trained(flow):
            parameter.normal_()
    at = flow.condition(torch.randn(2))
    for value in (at(torch.randn(9, 3)), at.inv(torch.randn(9, 3))):
        assert all(bool(gradient.any()) for gradient in torch.autograd.grad(value.square().sum(), trained(flow)))


def test_a_layer_without_a_mask_is_refused() -> None:
    layer = ConditionalMaskedAutoregressive(3, 2, hidden_dims=[8])
    layer.flow.made.layers[0] = nn.Linear(3, 8)
    flow = layer.condition(torch.zeros(2))
    for direction in (flow, flow.inv):
        with pytest.raises(TypeError, match=r"MADE expected layers that are MaskedLinear, got Linear: .*parametrize"):
            direction(torch.zeros(5, 3))


def old_norms(layer: nn.Module, key: str) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layer, key)


@pytest.mark.parametrize("change", [old_norms, lambda layer, key: prune.random_unstructured(layer, key, 1)])
@pytest.mark.parametrize("make", [ActNorm, BatchNorm, LowerTriangularAffine])
def test_transforms_run_hooks_on_their_own_parameters(make: Any, change: Callable[..., Any]) -> None:
    layer, plain = make(3).eval(), make(3).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    for key, _ in plain.named_parameters():
        change(layer, key)
    flow, x = Stack([layer]), torch.randn(5, 3)
    flow(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)
        found = [flow(x), flow.inv(x)]
        for hook in layer._forward_pre_hooks.values():
            hook(layer, ())
        for key, parameter in plain.named_parameters():
            parameter.copy_(getattr(layer, key))
    assert all(map(torch.allclose, found, [plain(x), plain.inv(x)]))
