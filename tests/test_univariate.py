"""Univariate maps: the spline at its knots, at the edges of its box and beyond, and against zuko's spline."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from zuko.transforms import MonotonicRQSTransform

import pyro_maf
from pyro_maf import MAF, NSF, FlowPrior, RealNVP, fit, fit_prior
from pyro_maf.sweep.kernels import kernels
from pyro_maf.transforms import Conditioned, Coupling, MaskedAutoregressive
from pyro_maf.univariate import Affine, Spline, UnivariateMap, univariate_map
from tests.test_sweep import in_torch

double = torch.float64
SPLINES = [Spline(), Spline(num_bins=2), Spline(num_bins=16, bound=2.0)]
every_spline = pytest.mark.parametrize("spline", SPLINES, ids=repr)
MAPS: list[UnivariateMap] = [Affine(), *SPLINES]
needs_kernels = pytest.mark.skipif(kernels() is None, reason="no compiled kernels on this machine")
every_map = pytest.mark.parametrize("univariate", MAPS, ids=repr)


def outputs(univariate: UnivariateMap, rows: int, size: float = 2.0, dtype: torch.dtype = double) -> Tensor:
    """Random network outputs for each row; at this size, most knots of a spline move."""
    return size * torch.randn(rows, univariate.num_parameters, dtype=dtype)


def knots_of(spline: Spline, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Knots of the spline on both sides, (rows, K + 1), and slopes there, without the affine map."""
    width, height, slope = spline._bins(phi[..., 2:])
    left = -torch.full_like(phi[..., :1], spline.bound)
    return torch.cat([left, width], -1).cumsum(-1), torch.cat([left, height], -1).cumsum(-1), slope


@every_map
def test_maps_start_as_the_identity(univariate: UnivariateMap) -> None:
    x = torch.tensor([-60.0, -3.0, -2.9, 0.0, 1.0, 3.0, 7.0])
    phi = torch.zeros(len(x), univariate.num_parameters)
    for direction in (univariate.forward, univariate.inverse):
        y, log_derivative = direction(x, phi)
        torch.testing.assert_close(y, x, rtol=0, atol=1e-6)
        torch.testing.assert_close(log_derivative, torch.zeros_like(x), rtol=0, atol=1e-6)


@every_map
def test_maps_invert_and_their_derivatives_are_those_of_autograd(univariate: UnivariateMap) -> None:
    phi = outputs(univariate, 2_000)
    x = (4 * torch.randn(2_000, dtype=double)).requires_grad_()
    y, log_derivative = univariate.forward(x, phi)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_derivative, slope.log(), rtol=0, atol=1e-9)
    again, of_inverse = univariate.inverse(y.detach(), phi)
    torch.testing.assert_close(again, x.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(of_inverse, log_derivative.detach(), rtol=0, atol=1e-8)


@every_map
def test_gradients_of_both_orders(univariate: UnivariateMap) -> None:
    v = (2 * torch.randn(12, dtype=double)).requires_grad_()
    phi = outputs(univariate, 12).requires_grad_()
    for direction in (univariate.forward, univariate.inverse):
        assert torch.autograd.gradcheck(direction, (v, phi))
        assert torch.autograd.gradgradcheck(direction, (v[:3], phi[:3]))


@every_spline
def test_a_spline_inverts_at_every_knot_and_at_the_edges_of_its_box(spline: Spline) -> None:
    phi = torch.cat([torch.zeros(50, 2, dtype=double), outputs(spline, 50)[:, 2:]], -1)
    before, after, slope = knots_of(spline, phi)
    for at in range(spline.num_bins + 1):
        x, log_derivative = spline.inverse(before[:, at], phi)
        torch.testing.assert_close(x, after[:, at], rtol=0, atol=1e-12)
        torch.testing.assert_close(log_derivative, -slope[:, at].log(), rtol=0, atol=1e-9)
        torch.testing.assert_close(spline.forward(x, phi)[0], before[:, at], rtol=0, atol=1e-9)


@every_spline
def test_a_spline_is_the_identity_beyond_its_box_with_finite_gradients(spline: Spline) -> None:
    v = torch.tensor([-1e30, -50.0, -spline.bound, spline.bound, 50.0, 1e30]).requires_grad_()
    phi = outputs(spline, 6, dtype=torch.float32)
    phi[:, :2] = 0
    phi.requires_grad_()
    for direction in (spline.forward, spline.inverse):
        w, log_derivative = direction(v, phi)
        assert torch.equal(w, v)
        assert not log_derivative.any()
        grad_v, grad_phi = torch.autograd.grad(w.sum() + log_derivative.sum(), (v, phi))
        assert torch.equal(grad_v, torch.ones(6))
        assert torch.isfinite(grad_phi[1:5]).all()
        assert not grad_phi[:, 2:].any()


@every_map
def test_not_a_number_and_infinity_pass_through(univariate: UnivariateMap) -> None:
    v = torch.tensor([math.nan, math.inf, -math.inf])
    for direction in (univariate.forward, univariate.inverse):
        w, _ = direction(v, torch.zeros(3, univariate.num_parameters))
        assert w[0].isnan()
        assert torch.equal(w[1:], v[1:])


@every_spline
def test_single_precision_inverts_whatever_the_outputs(spline: Spline) -> None:
    """Even for networks with large weights, since chords and slopes at the knots are bounded."""
    phi = outputs(spline, 20_000, size=30.0, dtype=torch.float32)
    phi[:, :2] = 0
    v = 1.5 * spline.bound * (2 * torch.rand(20_000) - 1)
    for there, back in ((spline.forward, spline.inverse), (spline.inverse, spline.forward)):
        w, log_derivative = there(v, phi)
        assert torch.isfinite(log_derivative).all()
        torch.testing.assert_close(back(w, phi)[0], v, rtol=1e-4, atol=1e-4)


def as_flow(univariate: UnivariateMap, dtype: torch.dtype) -> Coupling:
    """A univariate map as a flow whose context is phi, which both engines can apply."""
    outputs = univariate.num_parameters
    flow = Coupling(1, mask=[False], context_dim=outputs, hidden_dims=[2 * outputs], univariate=univariate).to(dtype)
    (network,) = flow.networks
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()
        pair = torch.cat([torch.eye(outputs), -torch.eye(outputs)])
        network.context_layers[0].weight.copy_(pair)  # type: ignore[union-attr,index,operator]
        network.layers[-1].weight.copy_(pair.T)  # type: ignore[union-attr,index,operator]
    return flow


def through(flow: Coupling, v: Tensor, phi: Tensor, *, inverse: bool) -> list[Tensor]:
    """Result, log-derivative, and gradients of a function of both with respect to v and phi."""
    v, phi = v.clone().requires_grad_(), phi.clone().requires_grad_()
    w, log_derivative = (flow.inverse_and_log_det if inverse else flow.forward_and_log_det)(v[:, None], phi)
    total = 0.7 * w.sum() + log_derivative.sum()
    return [w.detach()[:, 0], log_derivative.detach(), *torch.autograd.grad(total, (v, phi))]


@needs_kernels
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("size", [0.0, 2.0, 30.0])
@every_map
def test_engines_agree_inside_the_box_at_its_edges_and_beyond(
    univariate: UnivariateMap, size: float, inverse: bool
) -> None:
    phi = outputs(univariate, 400, size)
    phi[:100, 2:] = phi[:1, 2:]  # equal bins, with slopes beyond a limit that two chords share
    phi[100:200, 2:-7] = 0
    phi[100:200, -7:] = 40
    v = 3 * torch.randn(400, dtype=double)
    v[:6] = torch.tensor([1e4, -1e4, 50.0, -50.0, 3.1, -3.1])
    flow = as_flow(univariate, double)
    actual = through(flow, v, phi, inverse=inverse)
    with in_torch():
        expected = through(flow, v, phi, inverse=inverse)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-10)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, double])
@every_spline
def test_engines_agree_at_every_knot(spline: Spline, dtype: torch.dtype) -> None:
    """Gradients too are finite there, although log q' has a kink, where rounding decides which side's they are."""
    phi = outputs(spline, 50, dtype=dtype)
    phi[:, :2] = 0
    data, noise, _ = knots_of(spline, phi)
    flow = as_flow(spline, dtype)
    for knots, inverse in ((data, True), (noise, False)):
        for at in range(spline.num_bins + 1):
            actual = through(flow, knots[:, at], phi, inverse=inverse)
            with in_torch():
                expected = through(flow, knots[:, at], phi, inverse=inverse)
            assert all(bool(torch.isfinite(each).all()) for each in actual)
            for one, other in zip(actual[:2], expected[:2], strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-11 if dtype == double else 1e-4)


@needs_kernels
@pytest.mark.parametrize("size", [1.0, 5.0])
@every_map
def test_the_kernels_are_as_accurate_as_torch_in_single_precision(univariate: UnivariateMap, size: float) -> None:
    phi, v = outputs(univariate, 3_000, size, dtype=torch.float32), 3 * torch.randn(3_000)
    for inverse in (False, True):
        flow = as_flow(univariate, torch.float32)
        found = through(flow, v, phi, inverse=inverse)
        with in_torch():
            torchs = through(flow, v, phi, inverse=inverse)
            exact = through(flow.double(), v.double(), phi.double(), inverse=inverse)
        for one, other, truth in zip(found, torchs, exact, strict=True):
            # Not the largest, since gradients jump at kinks of log q'.
            error, usual, size = (each.abs().flatten().quantile(0.99) for each in (one - truth, other - truth, truth))
            assert float(error) < 2 * float(usual) + 1e-6 * float(size)


@needs_kernels
@pytest.mark.parametrize("size", [1.0, 5.0, 30.0])
@every_map
def test_the_kernels_invert_as_well_as_torch_in_single_precision(univariate: UnivariateMap, size: float) -> None:
    phi, v = outputs(univariate, 3_000, size, dtype=torch.float32), 3 * torch.randn(3_000)
    flow = Conditioned(as_flow(univariate, torch.float32), phi).with_cache(0)

    def errors() -> Tensor:
        x = v[:, None]
        return torch.stack([flow.inv(flow(x)) - x, flow(flow.inv(x)) - x]).square().mean(1).sqrt()

    with torch.no_grad():
        found = errors()
        with in_torch():
            torchs = errors()
    assert (found < 1.5 * torchs).all()


@pytest.mark.parametrize("engine", [nullcontext, in_torch])
def test_the_rounding_of_a_scale_cancels_in_the_inverse(engine: Callable[[], AbstractContextManager[None]]) -> None:
    phi, v = outputs(Affine(), 3_000, 5.0, dtype=torch.float32), torch.randn(3_000, 1)
    phi[:, 0] = 0
    with torch.no_grad(), engine():
        flow = Conditioned(as_flow(Affine(), torch.float32), phi).with_cache(0)
        for there, back in ((flow, flow.inv), (flow.inv, flow)):
            error = (back(there(v)) / v - 1).square().mean().sqrt()
            assert error < 0.5 * torch.finfo(torch.float32).eps  # four roundings


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, double])
@every_map
def test_what_is_not_finite_passes_through_both_engines_alike(univariate: UnivariateMap, dtype: torch.dtype) -> None:
    v = torch.tensor([math.nan, math.inf, -math.inf, 0.5, 0.5, 0.5, 0.5], dtype=dtype)
    phi = outputs(univariate, 7, dtype=dtype)
    phi[3, 0], phi[4], phi[5, -1], phi[6, 1:] = math.inf, math.nan, math.nan, math.inf
    flow = as_flow(univariate, dtype)
    for direction in (flow.forward_and_log_det, flow.inverse_and_log_det):
        actual = direction(v[:, None], phi)
        with in_torch():
            expected = direction(v[:, None], phi)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_spline_makes_no_tensor_of_another_precision() -> None:
    """Some devices do not have float64."""
    spline, phi = Spline(), outputs(Spline(), 5, dtype=torch.float32).requires_grad_()
    made: set[torch.dtype] = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            made.update({result.dtype} if isinstance(result, Tensor) else set())
            return result

    with Watch():
        for direction in (spline.forward, spline.inverse):
            w, log_derivative = direction(torch.randn(5), phi)
            (w.sum() + log_derivative.sum()).backward()
    assert double not in made


def test_a_spline_agrees_with_that_of_zuko() -> None:
    spline = Spline(num_bins=6, bound=4.0)
    phi = torch.cat([torch.zeros(500, 2, dtype=double), outputs(spline, 500)[:, 2:]], -1)
    width, height, slope = spline._bins(phi[:, 2:])
    # zuko bounds its parameters by a softsign at the logarithm of this slope.
    least = -math.log(1e-3)
    logits = [size.log() - size.log().mean(-1, keepdim=True) for size in (width, height)]
    widths, heights = (value / (1 - (2 * value / least).abs()) for value in logits)
    inner = slope[:, 1:-1].log()
    theirs = MonotonicRQSTransform(widths, heights, inner / (1 - (inner / least).abs()), bound=4.0, slope=1e-3)
    z = 5 * (2 * torch.rand(500, dtype=double) - 1)
    x, log_derivative = spline.inverse(z, phi)
    expected, ladj = theirs.call_and_ladj(z)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(-log_derivative, ladj, rtol=0, atol=1e-9)
    torch.testing.assert_close(spline.forward(x, phi)[0], theirs.inv(expected), rtol=0, atol=1e-9)


def test_one_column_with_two_modes_is_no_gaussian() -> None:
    torch.manual_seed(0)
    modes = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-2.0, 2.0]), 0.3))
    train, test = modes.sample([2_000, 1]), modes.sample([5_000, 1])
    expected = modes.log_prob(test[:, 0]).mean()
    flow = NSF(1, num_layers=4, hidden_dims=[4])
    result = fit(flow, train, max_epochs=60, learning_rate=3e-2, seed=0, progress=False)
    assert float(result.score(test).mean()) > float(expected) - 0.08
    gaussian = dist.Normal(train.mean(), train.std()).log_prob(test).mean()
    assert float(result.score(test).mean()) > float(gaussian) + 0.5


def test_float32_inverts_a_trained_spline_flow_at_and_far_from_the_data() -> None:
    torch.manual_seed(0)
    angle = 6.3 * torch.rand(1_000)
    ring = torch.stack([angle.cos(), angle.sin()], -1) * (2 + 0.1 * torch.randn(1_000, 1))
    nsf = NSF(2, num_layers=3, hidden_dims=[32])
    result = fit(nsf, ring, max_epochs=30, learning_rate=5e-3, seed=0, progress=False)
    flow = next(each for each in result.density.modules() if isinstance(each, NSF)).with_cache(0)
    for scale in (1.0, 50.0):
        x = scale * torch.randn(1_000, 2)
        with torch.no_grad():
            for again in (flow.inv(flow(x)), flow(flow.inv(x))):
                error = (again - x).norm(dim=-1) / x.norm(dim=-1).clamp(min=1)
                assert float(error.max()) < 1e-4


@pytest.mark.parametrize("univariate", ["spline", Spline(num_bins=4)], ids=repr)
def test_a_flow_remembers_its_map(univariate: str | Spline, tmp_path: object) -> None:
    flow = MAF(3, num_layers=1, hidden_dims=[8], univariate=univariate)
    path = f"{tmp_path}/flow.safetensors"
    flow.save(path)
    again = pyro_maf.load(path)
    assert repr(again[0].univariate) == repr(flow[0].univariate)
    x = torch.randn(4, 3)
    assert torch.equal(again(x), flow(x))


@pytest.mark.parametrize("rank", [8, None])
def test_a_wide_spline_flow_has_outputs_of_rank_8_unless_it_was_saved_without(rank: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    flow, x = NSF(40, num_layers=1, hidden_dims=[256]), torch.randn(4, 40)
    assert "40 -> 256 -> 320 -> 1000" in repr(flow)
    assert torch.allclose(flow.inv(x), x, atol=1e-5)
    if rank is None:
        flow[0].made.set_rank(None)
    flow.save(tmp_path / "flow.safetensors")
    again = pyro_maf.load(tmp_path / "flow.safetensors")
    assert repr(again) == repr(flow)
    assert torch.equal(again(x), flow(x))


@pytest.mark.parametrize("make", [NSF, RealNVP], ids=lambda make: make.__name__)
def test_a_state_of_another_spline_is_refused(make: type[NSF] | type[RealNVP]) -> None:
    """Including another bound, which no weight's shape shows."""
    state = make(2, univariate=Spline(8, 5.0)).state_dict()
    with pytest.raises(
        RuntimeError, match=r"map of layers.0: one with settings \[8, 5000\] was stored, Spline\(num_bins=8, bound=3\)"
    ):
        make(2, univariate="spline").load_state_dict(state)
    make(2, univariate=Spline(8, 5.0)).double().load_state_dict(state)


def test_a_prior_of_one_column_is_no_gaussian_by_default() -> None:
    torch.manual_seed(0)
    two = torch.cat([torch.randn(300, 1) - 4, torch.randn(300, 1) + 4])
    prior = fit_prior(two, learning_rate=3e-2, max_epochs=60, progress=False)
    assert float((prior.sample([4_000]).abs() < 1).float().mean()) < 0.05  # 0.2 for a normal distribution


def test_a_flow_shows_its_spline() -> None:
    assert "Spline(num_bins=4, bound=3)" in repr(MAF(2, univariate=Spline(num_bins=4)))
    assert "Affine" not in repr(MAF(2))


def test_a_prior_takes_a_spline_flow() -> None:
    torch.manual_seed(0)
    prior = fit_prior(torch.randn(300, 2), NSF(2, num_layers=1, hidden_dims=[8]), max_epochs=2, progress=False)
    assert isinstance(prior, FlowPrior)
    assert prior.sample([7]).shape == (7, 2)
    assert prior.log_prob(prior.sample([7])).shape == (7,)


def test_bad_options_are_refused_in_a_line() -> None:
    with pytest.raises(ValueError, match=r"^MAF expected univariate to be one of affine, spline, got 'cubic'\.$"):
        univariate_map("MAF", "cubic")
    with pytest.raises(ValueError, match=r"^MaskedAutoregressive expected univariate to be one of affine, spline, got"):
        MaskedAutoregressive(2, univariate="rqs")
    with pytest.raises(TypeError, match=r"^MaskedAutoregressive expected univariate to be a map or its name, got 3\.$"):
        MaskedAutoregressive(2, univariate=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^Spline expected num_bins of at least 2, got 1\.$"):
        Spline(num_bins=1)
    with pytest.raises(ValueError, match=r"^Spline expected bound above 0 and finite, got -1\.$"):
        Spline(bound=-1)
    with pytest.raises(ValueError, match=r'^Coupling expected networks="joint" for Spline'):
        RealNVP(3, univariate="spline", networks="separate")
    assert isinstance(Coupling(3).univariate, Affine)
