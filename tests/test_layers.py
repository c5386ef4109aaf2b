"""Formulas of individual layers, in addition to the laws of all layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_maf.nn import compress_tails
from pyro_maf.transforms import (
    ConditionalCoupling,
    ConditionalInverseAutoregressive,
    ConditionalLowerTriangularAffine,
    ConditionalMaskedAutoregressive,
    Coupling,
    LowerTriangularAffine,
    MaskedAutoregressive,
    Permute,
)
from pyro_maf.transforms.partial import Partial
from pyro_maf.univariate import Affine

double = torch.float64


def shaken(flow: Any, size: float = 0.5) -> Any:
    """The layer in float64 with random parameters."""
    flow.double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(size * torch.randn(parameter.shape, dtype=double))
    return flow


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


# The map of one dimension


def test_affine_map_has_a_bounded_scale_and_an_exact_inverse() -> None:
    x, shift, a = torch.randn(3, 1000, dtype=double) * torch.tensor([[50.0], [5.0], [20.0]])
    y, log_derivative = Affine().forward(x, torch.stack([shift, a], -1))
    alpha = 3 * torch.tanh(a / 3)
    close(y, x * alpha.exp() + shift * (alpha / 2).exp())
    close(log_derivative, alpha)
    back, same = Affine().inverse(y, torch.stack([shift, a], -1))
    close(back, x)
    assert torch.equal(same, log_derivative)
    assert torch.equal(Affine().forward(x, torch.zeros(1000, 2, dtype=double))[0], x)


# Permutation and full-rank affine map


def test_permute_reorders_the_dimensions() -> None:
    layer = Permute(torch.tensor([2, 0, 1]))
    x = torch.tensor([[10.0, 11.0, 12.0]])
    assert layer(x).tolist() == [[12.0, 10.0, 11.0]]
    assert layer.inv(layer(x).clone()).tolist() == x.tolist()
    assert layer.log_abs_det_jacobian(x, layer(x)).tolist() == [0.0]
    other = Permute([0, 1, 2])
    other.load_state_dict(layer.state_dict())
    assert other.inv(other(x).clone()).tolist() == x.tolist()
    with pytest.raises(ValueError, match=r"Permute expected permutation to hold each of 0 \.\. 2 once"):
        other.load_state_dict({"permutation": torch.tensor([2, 2, 1])})


@pytest.mark.parametrize("given", ["loc", "scale_tril", "both"])
def test_lower_triangular_affine_is_a_multivariate_normal(given: str) -> None:
    arguments = {"loc": torch.randn(4, dtype=double), "scale_tril": torch.randn(4, 4, dtype=double).tril()}
    arguments["scale_tril"].diagonal().exp_()
    arguments = {name: value for name, value in arguments.items() if given in (name, "both")}
    layer = LowerTriangularAffine(4, **arguments)
    expected = {"loc": torch.zeros(4).double(), "scale_tril": torch.eye(4).double()} | arguments
    y = 3 * torch.randn(20, 4, dtype=double)
    standard = dist.Normal(torch.zeros(4).double(), 1.0).to_event(1)
    actual = dist.TransformedDistribution(standard, [layer]).log_prob(y)
    torch.testing.assert_close(actual, dist.MultivariateNormal(**expected).log_prob(y))
    x = torch.randn(20, 4, dtype=double)
    torch.testing.assert_close(layer(x), expected["loc"] + x @ expected["scale_tril"].T)


def test_lower_triangular_affine_follows_its_context() -> None:
    start = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    layer = ConditionalLowerTriangularAffine(2, 3, scale_tril=start, hidden_dims=[8], activation="tanh")
    x = torch.randn(6, 2)
    torch.testing.assert_close(layer.condition(torch.randn(6, 3))(x), x @ start.T)
    shaken(layer)
    contexts, zero, units = torch.randn(6, 3).double(), torch.zeros(2).double(), torch.eye(2).double()
    locations = layer.condition(contexts)(zero)
    factors = torch.stack([layer.condition(contexts)(unit) - locations for unit in units], -1)
    normal = dist.MultivariateNormal(locations, scale_tril=factors)
    y = torch.randn(6, 2, dtype=double)
    base = dist.Normal(zero, 1.0).to_event(1)
    found = dist.TransformedDistribution(base, [layer.condition(contexts)]).log_prob(y)
    torch.testing.assert_close(found, normal.log_prob(y))
    assert float(factors.detach().std(0)[[0, 1, 1], [0, 0, 1]].min()) > 0.01


# Coupling


def mu_and_alpha(layer: Coupling, x: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's mu and alpha, recovered from the map y = x exp(alpha) + mu."""
    moved = ~layer.mask
    zeros = layer(torch.where(moved, 0.0, x))[..., moved]
    ones = layer(torch.where(moved, 1.0, x))[..., moved]
    return zeros, (ones - zeros).log()


@pytest.mark.parametrize("networks", ["joint", "separate"])
@pytest.mark.parametrize("mask", [None, [True, False, False, True, False], [False] * 5])
def test_coupling_transforms_the_unmasked_dimensions(mask: Any, networks: str) -> None:
    layer = shaken(Coupling(5, mask=mask, networks=networks, hidden_dims=[8]))
    kept = torch.tensor([True, False, True, False, True] if mask is None else mask)
    x, other = torch.randn(2, 6, 5, dtype=double)
    y = layer(x)
    assert torch.equal(y[:, kept], x[:, kept])
    assert not bool((y[:, ~kept] == x[:, ~kept]).any())
    mu, alpha = mu_and_alpha(layer, x)
    close(y[:, ~kept], x[:, ~kept] * alpha.exp() + mu)
    close(layer.log_abs_det_jacobian(x, y), alpha.sum(-1))
    # They depend on the dimensions that pass through, and only on these.
    for actual, expected in zip(mu_and_alpha(layer, torch.where(kept, x, other)), (mu, alpha), strict=True):
        close(actual, expected)
    assert torch.equal(alpha.std(0) > 1e-12, kept.any().expand(alpha.shape[1]))


def test_separate_networks_are_tanh_for_alpha_and_relu_for_mu() -> None:
    layer = shaken(Coupling(4, hidden_dims=[8, 6], networks="separate"))
    x = 3 * torch.randn(50, 4, dtype=double)
    outputs = []
    for network, activation in zip(layer.networks, (nn.ReLU(), nn.Tanh()), strict=True):
        first, second, last = network.layers
        outputs.append(last(activation(second(activation(first(compress_tails(x[:, [0, 2]])))))))
    alpha = 3 * torch.tanh(outputs[1] / 3)
    found = mu_and_alpha(layer, x)
    close(found[0], outputs[0] * (alpha / 2).exp())
    close(found[1], alpha)
    assert [member.activation for member in Coupling(4, networks="separate", activation="elu").networks] == [
        "elu",
        "tanh",
    ]


# Conditional layers


@pytest.mark.parametrize("make", [ConditionalMaskedAutoregressive, ConditionalInverseAutoregressive])
def test_autoregressive_layers_follow_their_context(make: Any) -> None:
    layer = shaken(make(3, 2, hidden_dims=[8], activation="tanh", order=[1, 2, 0]))
    x, context = torch.randn(3, dtype=double), torch.randn(2, dtype=double)
    slopes = torch.autograd.functional.jacobian(lambda context: layer.condition(context)(x), context)
    assert bool((slopes != 0).all())


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Coupling(0), ValueError, "Coupling expected input_dim of at least 1, got 0"),
        (lambda: Permute([0, 2]), ValueError, r"Permute expected permutation to hold each of 0 \.\. 1 once"),
        (lambda: Permute([0.0, 1.0]), ValueError, r"Permute expected permutation to be a permutation of 0 \.\. 1"),
        (lambda: Coupling(3, mask=[True]), ValueError, r"expected a mask of 3 booleans, got shape \(1,\)"),
        (lambda: Coupling(2, mask=[True, True]), ValueError, "expected a mask with at least one False"),
        (lambda: Coupling(2, mask=torch.tensor([0.3, 0.0])), ValueError, "expected a mask of 2 booleans"),
        (lambda: Coupling(2, networks="three"), ValueError, "expected networks to be one of joint, separate"),
        (lambda: Coupling(2, hidden_dims=[0]), ValueError, "expected every width in hidden_dims of at least 1"),
        (lambda: LowerTriangularAffine(2, loc=torch.zeros(3)), ValueError, r"expected loc of shape \(2,\), got \(3,\)"),
        (lambda: LowerTriangularAffine(2, scale_tril=torch.eye(3)), ValueError, r"expected scale_tril of shape \(2, 2"),
        (lambda: LowerTriangularAffine(2, scale_tril=-torch.eye(2)), ValueError, "expected a positive diagonal"),
        (lambda: LowerTriangularAffine(2, scale_tril=torch.ones(2, 2)), ValueError, "expected scale_tril to be lower"),
        (lambda: MaskedAutoregressive(2, order=[0]), ValueError, r"expected order to be a permutation of 0 \.\. 1"),
        (lambda: ConditionalCoupling(2, 0), ValueError, "ConditionalCoupling expected context_dim of at"),
        (lambda: ConditionalCoupling(2, 3).condition([0.0] * 3), TypeError, "expected context to be a torch"),
        (
            lambda: ConditionalCoupling(2, 3).condition(torch.zeros(4, 3))(torch.zeros(5, 2)),
            ValueError,
            r"expected x and context with batch shapes that broadcast, got \(5,\) and \(4,\)",
        ),
    ],
)
def test_bad_input_is_refused_with_a_reason(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_partial_flow_refuses_other_variables() -> None:
    flow = Permute([1, 0])
    for variables in ([0], [0, 3], [-1, 0]):
        with pytest.raises(ValueError, match="Partial expected 2 variables of 0 to 2"):
            Partial(3, flow, variables)
    with pytest.raises(ValueError, match="Partial expected distinct variables"):
        Partial(3, flow, [1, 1])
