"""Layers that keep statistics of the data: batch norm and act norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_maf import MAF, RealNVP
from pyro_maf.transforms import ActNorm, BatchNorm, Flow

double = torch.float64


def shaken(flow: Any, size: float = 0.5) -> Any:
    """The layer in float64 with random parameters."""
    flow.double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(size * torch.randn(parameter.shape, dtype=double))
    return flow


def data(rows: int = 50, columns: int = 3) -> Tensor:
    return 7 + 5 * torch.randn(rows, columns, dtype=double)


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    return y.mean(0), y.var(0, correction=0)


def normalized(layer: BatchNorm, y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """The paper's formula."""
    return layer.log_gamma.exp() * (y - mean) / (variance + 1e-5).sqrt() + layer.beta


def log_det(layer: BatchNorm, variance: Tensor) -> Tensor:
    return (0.5 * (variance + 1e-5).log() - layer.log_gamma).sum()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


# Batch norm


def test_batch_norm_trains_on_the_statistics_of_the_batch() -> None:
    layer = shaken(BatchNorm(3)).train()
    y = data()
    mean, variance = moments(y)
    x = layer.inv(y)
    close(x, normalized(layer, y, mean, variance))
    close(layer.log_abs_det_jacobian(x, y), log_det(layer, variance).expand(50))
    close(layer.mean, 0.1 * mean)
    close(layer.variance, 0.9 + 0.1 * variance)
    # Statistics of a batch of any shape are over all its rows.
    close(layer.inv(y.view(5, 10, 3)), x.view(5, 10, 3))
    close(layer.mean, (0.09 + 0.1) * mean)


def test_batch_norm_uses_stored_statistics_in_eval_mode() -> None:
    layer = shaken(BatchNorm(3)).train()
    for _ in range(3):
        layer.inv(data())
    mean, variance = layer.mean.clone(), layer.variance.clone()
    x = data()
    y = layer(x)
    close(normalized(layer, y, mean, variance), x)
    close(layer.eval().inv(x), normalized(layer, x, mean, variance))
    close(layer.log_abs_det_jacobian(x, y), log_det(layer, variance).expand(50))
    close(layer.inv(x[0]), normalized(layer, x[0], mean, variance))
    assert torch.equal(layer.mean, mean)
    assert torch.equal(layer.variance, variance)


def test_batch_norm_takes_exact_statistics_of_the_training_set() -> None:
    layer = BatchNorm(3).double().eval()
    y = data(1000)
    layer.fit_statistics(y)
    mean, variance = moments(layer.inv(y))
    close(mean, torch.zeros(3).double())
    torch.testing.assert_close(variance, torch.ones(3).double(), rtol=1e-5, atol=0)
    close(layer.mean, y.mean(0))
    close(layer.variance, y.var(0, correction=0))
    assert all(parameter.grad_fn is None for parameter in (layer.mean, layer.variance))


def test_batch_norm_differentiates_the_statistics_of_the_batch() -> None:
    layer = shaken(BatchNorm(2)).train().with_cache(0)
    y = data(4, 2).requires_grad_()

    def both(y: Tensor) -> tuple[Tensor, Tensor]:
        return layer.inverse_and_log_det(y)

    assert torch.autograd.gradcheck(both, (y,))
    # A shifted batch has the same output.
    shifted = torch.autograd.functional.jvp(layer.inv, y, torch.ones_like(y))[1]
    close(shifted, torch.zeros_like(shifted))


@pytest.mark.parametrize("cache_size", [0, 1])
@pytest.mark.parametrize("make", [BatchNorm, lambda d: RealNVP(d, batch_norm=True), lambda d: MAF(d, batch_norm=True)])
def test_a_batch_in_training_has_the_log_det_of_its_own_statistics(
    make: Callable[[int], Flow], cache_size: int
) -> None:
    flow = shaken(make(3), 0.05).train().with_cache(cache_size)
    y = data()
    expected = flow.inverse_and_log_det(y)[1]
    x = flow.inv(y)
    for _ in range(2):
        close(flow.log_abs_det_jacobian(x, y), expected)
    close(flow.log_abs_det_jacobian(x.clone(), y.clone()), expected)


@pytest.mark.parametrize("shape", [(2,), (1, 2), (1, 1, 2)])
def test_batch_norm_refuses_to_train_on_a_single_row(shape: tuple[int, ...]) -> None:
    layer = BatchNorm(2)
    with pytest.raises(ValueError, match=r"BatchNorm expected at least 2 rows in training mode, got 1: call \.eval"):
        layer.inv(torch.zeros(shape))
    assert layer.inv(torch.zeros(0, 2)).shape == (0, 2)
    assert layer.eval().inv(torch.zeros(shape)).shape == shape


# Act norm


def test_act_norm_is_set_by_the_first_batch_of_data() -> None:
    layer = ActNorm(3).double()
    x = data()
    assert torch.equal(layer(x), x)  # noise: nothing to learn from
    assert torch.equal(layer.inv(x[0]), x[0])  # has no deviation
    assert torch.equal(layer.eval().inv(x), x)
    y = data()
    noise = layer.train().inv(y)
    close(noise.mean(0), torch.zeros(3).double())
    close(noise.std(0), torch.ones(3).double())
    close(layer.log_abs_det_jacobian(noise, y), y.std(0).log().sum().expand(50))
    close(layer(noise.clone()), y)
    later = layer.inv(2 * y)
    close(later, (2 * y - y.mean(0)) / y.std(0))
    layer.fit_statistics(x)
    close(layer.inv(2 * y), later)


def test_act_norm_is_initialised_only_once() -> None:
    layer = ActNorm(3).double()
    before = layer.with_cache(0)
    layer.inv(data())
    loaded = ActNorm(3).double()
    loaded.load_state_dict(layer.state_dict())
    for other in (before, loaded, layer.with_cache(0)):
        other.inv(100 + data())
        close(other.loc, layer.loc)
        assert float(layer.loc.detach().max()) < 50


def test_act_norm_of_a_constant_is_finite() -> None:
    layer = ActNorm(2)
    y = torch.tensor([[1.0, 3.0], [2.0, 3.0]])
    assert bool(layer.inv(y).isfinite().all())
    assert float(layer.inv(y)[0, 1].detach()) == 0


@pytest.mark.parametrize("make", [ActNorm, BatchNorm])
def test_statistics_of_unfit_data_are_refused(make: type[Flow]) -> None:
    layer = make(2)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for rows, error, message in (
        (torch.zeros(10, 4), ValueError, r"expected y with last dimension 2 \(input_dim\), got shape \(10, 4\)"),
        (torch.zeros(10, 2).double(), TypeError, "has float32 parameters, got y of float64"),
        (torch.zeros(1, 2), ValueError, "expected at least 2 rows of data, got 1"),
        (torch.zeros(0, 2), ValueError, "expected at least 2 rows of data, got 0"),
    ):
        with pytest.raises(error, match=f"{make.__name__} {message}"):
            layer.fit_statistics(rows)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
