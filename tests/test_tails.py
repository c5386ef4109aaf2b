"""Tails with learned weights: their distribution, precision far out, and training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, StudentT

from pyro_maf.sweep.kernels import kernels as compiled_kernels
from pyro_maf.transforms import Tails


def tails(right: float, left: float, dtype: torch.dtype = torch.float64, dim: int = 1) -> Tails:
    """A layer with these tail weights."""
    layer = Tails(dim).to(dtype)
    with torch.no_grad():
        layer.free.copy_(2 * torch.atanh(torch.tensor([[right], [left]], dtype=torch.float64) / 2))
    return layer


def log_density(layer: Tails, y: Tensor) -> Tensor:
    x, log_det = layer.inverse_and_log_det(y[:, None])
    return Normal(0.0, 1.0).log_prob(x[:, 0]) - log_det


@torch.no_grad()
@pytest.mark.parametrize(("freedom", "nats"), [(1.0, 0.02), (2.0, 4e-3), (3.0, 4e-3), (10.0, 4e-3)])
def test_a_normal_variable_becomes_students_t(freedom: float, nats: float) -> None:
    layer = tails(1 / freedom, 1 / freedom)
    # Far out the log-density falls like Student's t, by 1 + freedom times log y.
    far = torch.tensor([1e4, 1e5], dtype=torch.float64)
    slope = log_density(layer, far).diff() / far.log().diff()
    assert abs(float(slope) + 1 + freedom) < 0.1
    y = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    # Wallace's constant, the scale of the normal variable, is near 1 and left to the preceding layers.
    scale = (8 * freedom + 3) / (8 * freedom + 1)
    scaled, log_det = layer.inverse_and_log_det(y[:, None])
    actual = Normal(0.0, 1.0).log_prob(scaled[:, 0] / scale) - log_det - math.log(scale)
    expected = StudentT(torch.tensor(freedom, dtype=torch.float64)).log_prob(y)
    assert (
        abs(float(torch.trapezoid(expected.exp() * (expected - actual), y))) < nats
    )  # 0.04 for a normal and 3 degrees of freedom


def test_sides_have_weights_of_their_own() -> None:
    x = torch.tensor([[-2.0], [2.0]], dtype=torch.float64)
    heavy, light = tails(0.3, -0.3)(x).flatten().tolist()[::-1]
    assert heavy > 2.2
    assert -2 < light < -1.6


@pytest.mark.parametrize("weight", [-1.99, -0.3, -1e-6, 0.0, 1e-6, 0.3, 1.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_exact_far_out_in_either_direction(weight: float, dtype: torch.dtype, device: str) -> None:
    layer = tails(weight, -weight, dtype).to(device).with_cache(0)
    x = torch.cat([torch.linspace(-60, 60, 1001), torch.tensor([0.0, 1e-20, 1e4, -1e4])])[:, None].to(device, dtype)
    allowed = 1e-12 if dtype == torch.float64 else 1e-4
    for direction in (layer, layer.inv):
        y = direction(x)
        assert bool(y.isfinite().all())
        assert bool((direction.inv(y) - x).abs().le(allowed * x.abs().clamp(min=1e-20)).all())
        assert bool(direction.log_abs_det_jacobian(x, y).isfinite().all())


@torch.no_grad()
def test_the_map_continues_as_its_tangent() -> None:
    for layer in (tails(1.0, 1.0), tails(-1.0, -1.0)):
        edge = 8.0 if float(layer.free.detach()[0]) > 0 else math.sqrt(math.expm1(64))
        x = edge * torch.tensor([[1 - 1e-9], [1 + 1e-9], [2.0]], dtype=torch.float64)
        y, log_det = layer.forward_and_log_det(x)
        assert float(log_det.diff().abs().max()) < 1e-6
        assert float((y[2] - y[0]) / (x[2] - x[0]) / log_det[0].exp()) == pytest.approx(1, rel=1e-6)


def test_nan_passes_and_rows_beside_it_do_not_change() -> None:
    layer = tails(0.4, -0.4, dim=2)
    x = torch.tensor([[0.5, -3.0], [torch.nan, 1.0]], dtype=torch.float64)
    for direction in (layer.forward_and_log_det, layer.inverse_and_log_det):
        y, log_det = direction(x)
        alone, log_det_alone = direction(x[:1])
        assert y.isnan().tolist() == [[False, False], [True, False]]
        assert log_det.isnan().tolist() == [False, True]
        assert torch.allclose(y[:1], alone, rtol=1e-12)
        assert torch.allclose(log_det[:1], log_det_alone, rtol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.5, -0.5, 1.9])
def test_gradients_in_closed_form_are_those_of_differentiation(weight: float, device: str) -> None:
    layer = tails(weight, -weight, dim=3).to(device)
    x = torch.tensor([[-4.0, -0.1, 1e-3], [0.3, 3.0, -20.0]], dtype=torch.float64, device=device).requires_grad_()
    for direction in (layer.forward_and_log_det, layer.inverse_and_log_det):
        y, log_det = direction(x)
        loss = y.square().sum() + log_det.sum()
        closed = torch.autograd.grad(loss, [x, layer.free], retain_graph=True)
        differentiated = torch.autograd.grad(loss, [x, layer.free], create_graph=True)
        for actual, expected in zip(closed, differentiated, strict=True):
            assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-11)
        assert float(closed[1].abs().min()) > 0  # also at 0, where a weight can get either sign


@pytest.mark.parametrize("weight", [0.1, -0.1])
@pytest.mark.parametrize("engine", ["compiled", "torch"])
def test_gradients_are_finite_where_squares_overflow(
    weight: float, engine: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In single precision, beyond the point where the map continues as its tangent."""
    if engine == "torch":
        monkeypatch.setattr("pyro_maf.transforms.tails.kernels", lambda: None)
    layer = tails(weight, -weight, dim=2).float().to(device)
    for far, direction in ((1e25, layer.inverse_and_log_det), (1e9, layer.forward_and_log_det)):
        x = torch.tensor([[far, -far]], device=device, requires_grad=True)
        y, log_det = direction(x)
        assert bool(y.isfinite().any())
        for value in (y[y.isfinite()].sum() / far, log_det.sum()):
            for gradient in torch.autograd.grad(value, [x, layer.free], retain_graph=True):
                assert bool(gradient.isfinite().all())


def test_a_gradient_through_both_directions_counts_each_once() -> None:
    layer = tails(1.0, 1.0)
    noise = torch.tensor([[4.0]], dtype=torch.float64)

    def loss(free: Tensor, noise: Tensor) -> Tensor:
        y, _ = torch.func.functional_call(_Direction(layer, False), {"layer.free": free}, (noise,))
        x, log_det = torch.func.functional_call(_Direction(layer, True), {"layer.free": free}, (0.9 * y,))
        return x.sum() + log_det.sum()

    assert torch.autograd.gradcheck(loss, (layer.free.detach().requires_grad_(), noise))


class _Direction(torch.nn.Module):
    """A direction of a layer as a module."""

    def __init__(self, layer: Tails, inverse: bool) -> None:
        super().__init__()
        self.layer, self.inverse = layer, inverse

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.inverse_and_log_det(x) if self.inverse else self.layer.forward_and_log_det(x)


@pytest.mark.parametrize("direction", ["forward_and_log_det", "inverse_and_log_det"])
def test_tails_that_may_not_be_lighter_stay_normal_and_find_back(direction: str) -> None:
    x = torch.tensor([[-2.0], [3.0]], dtype=torch.float64)
    layer = Tails(1, lighter=False).double()
    torch.nn.init.constant_(layer.free, -0.3)
    y, log_det = getattr(layer, direction)(x)
    assert torch.equal(y, x)
    (found,) = torch.autograd.grad(y.square().sum() + log_det.sum(), layer.free)
    other = Tails(1).double()
    y, log_det = getattr(other, direction)(x)
    torch.testing.assert_close(found, torch.autograd.grad(y.square().sum() + log_det.sum(), other.free)[0])
    assert float(found.abs().min()) > 0


def test_refuses_units_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"Tails expected scale of shape \(2,\), got \(3,\)"):
        Tails(2, scale=torch.ones(3))
    with pytest.raises(ValueError, match=r"Tails expected a positive scale, got a minimum of 0"):
        Tails(2, scale=torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3), (100, 3), (2, 50, 3), (3,)])
def test_both_engines_agree(dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = Tails(3, loc=torch.tensor([0.0, 1.0, -5.0]), scale=torch.tensor([1.0, 0.1, 40.0])).to(dtype)
    torch.nn.init.normal_(layer.free, std=0.5)
    x = (10 * torch.randn(shape, dtype=dtype)).requires_grad_()
    actual = []
    for kernels in (compiled_kernels, lambda: None):
        monkeypatch.setattr("pyro_maf.transforms.tails.kernels", kernels)
        for direction in (layer.forward_and_log_det, layer.inverse_and_log_det):
            y, log_det = direction(x)
            loss = y.tanh().sum() + log_det.sum()
            actual.append([y, log_det, *torch.autograd.grad(loss, [x, layer.free])])
    allowed = 1e-11 if dtype == torch.float64 else 2e-5
    for compiled, expected in zip(actual[:2], actual[2:], strict=True):
        for one, other in zip(compiled, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=allowed, atol=allowed)
