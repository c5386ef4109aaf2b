"""Defects of the autoregressive flow and the permutation of Pyro 1.9.2, which ours must not have.

The tests use the two builders, and only methods that Pyro's transforms have too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_maf import transforms
from tests.fits import since_torch


def autoregressive(input_dim: int, hidden_dims: Sequence[int] = (16,)) -> Any:
    return transforms.InverseAutoregressive(input_dim, hidden_dims=hidden_dims)


def permute(permutation: Tensor) -> Any:
    return transforms.Permute(permutation)


def shaken(flow: Any, gain: float = 0.5) -> Any:
    """The flow with random weights, as if trained."""
    with torch.no_grad():
        for parameter in flow.parameters():
            fan_in = parameter.shape[1] if parameter.dim() == 2 else 4
            parameter.copy_(gain * torch.randn(parameter.shape) / fan_in**0.5)
    return flow


def density_of(flow: Any, input_dim: int = 3, **kwargs: Any) -> Any:
    base = dist.Normal(torch.zeros(input_dim, dtype=torch.float64), 1.0, **kwargs).to_event(1)
    return dist.TransformedDistribution(base, [flow], **kwargs)


def test_score_of_a_sample_follows_the_parameters() -> None:
    """Pyro's cache ignores weights, so a sample keeps the density under the weights that it was drawn with."""
    flow = shaken(autoregressive(3).double())
    density = density_of(flow)
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1)
    y = density.rsample([4])
    density.log_prob(y).mean().backward()
    optimizer.step()
    torch.testing.assert_close(density.log_prob(y), density.log_prob(y.clone()), rtol=1e-9, atol=1e-9)


def test_trains_on_the_same_tensor_repeatedly() -> None:
    """Pyro's cache returns a result of the previous step, whose graph is freed, so the second backward fails."""
    flow = shaken(autoregressive(3).double())
    data = 1 + 0.5 * torch.randn(50, 3, dtype=torch.float64)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        loss = -density_of(flow).log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


def test_can_be_copied_after_use() -> None:
    """Pyro's cache is copied along, but torch does not copy tensors with a graph."""
    flow = shaken(autoregressive(3).double())
    x = torch.randn(4, 3, dtype=torch.float64)
    y = flow(x)
    torch.testing.assert_close(copy.deepcopy(flow)(x.clone()), y, rtol=0, atol=0)


def test_inverts_in_double_precision_under_a_single_precision_default() -> None:
    """Pyro's inverse starts from zeros of the default dtype."""
    assert torch.get_default_dtype() == torch.float32
    flow = shaken(autoregressive(3).double())
    x = torch.randn(4, 3, dtype=torch.float64)
    back = flow.inv(flow(x).clone())
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)


def test_hidden_layers_may_be_narrower_than_the_input() -> None:
    """Pyro refuses them, though even with a bottleneck the last output sees every input before it."""
    flow = shaken(autoregressive(5, [3]).double())
    jacobian = torch.autograd.functional.jacobian(flow, torch.full((5,), 0.5, dtype=torch.float64))
    assert bool((jacobian.tril() == jacobian).all())
    assert int((jacobian[-1] != 0).sum()) >= 4


@since_torch(6)
def test_density_compiles_in_one_graph() -> None:
    """In the parallel direction and without validation, which branches on data."""
    flow = shaken(autoregressive(3).double())
    density = density_of(flow.inv, validate_args=False)
    y = torch.randn(4, 3, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(density.log_prob, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(y), density.log_prob(y))


def test_inverted_layers_keep_their_parameters() -> None:
    """Pyro's inverse is not a module, so a stack of them registers, trains and saves no weights."""
    layers = [shaken(autoregressive(3).double()) for _ in range(2)]
    inverted = dist.ComposeTransformModule([layer.inv for layer in layers])
    expected = {id(parameter) for layer in layers for parameter in layer.parameters()}
    assert {id(parameter) for parameter in inverted.parameters()} == expected
    assert len(inverted.state_dict()) == sum(len(layer.state_dict()) for layer in layers)


def test_permutation_is_saved() -> None:
    """Pyro's is not a module, so weights load silently after another permutation, which is another density."""

    def build(permutation: list[int]) -> Any:
        return dist.ComposeTransformModule([autoregressive(3).double(), permute(torch.tensor(permutation))])

    stored, other = shaken(build([2, 0, 1])), build([1, 2, 0])
    other.load_state_dict(stored.state_dict())
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(other(x), stored(x), rtol=0, atol=0)
    torch.testing.assert_close(other.inv(x), stored.inv(x), rtol=0, atol=0)


@pytest.mark.parametrize("width", [2, 4])
def test_a_wrong_width_is_named(width: int) -> None:
    """Pyro's error is about mat1 and mat2."""
    flow = autoregressive(3)
    for direction in (flow, flow.inv):
        with pytest.raises(ValueError, match=rf"expected . with last dimension 3 .*, got shape \(7, {width}\)"):
            direction(torch.zeros(7, width))


def test_single_precision_round_trip_in_the_tails() -> None:
    """Pyro clamps a log-scale a by a + (bound - a), which loses precision in float32 for large a."""
    flow = shaken(autoregressive(5, [32, 32]), gain=2.0)
    x = 50 * torch.randn(1000, 5)
    with torch.no_grad():
        back = flow.inv(flow(x).clone())
    assert float(((back - x).norm(dim=-1) / x.norm(dim=-1)).max()) < 1e-4
