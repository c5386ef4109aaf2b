"""Runs of layers as one compiled program: results equal those of torch layer by layer, and which layers qualify."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from pyro_maf import IAF, MAF, ConditionalFlowPrior, FlowPrior, RealNVP
from pyro_maf.sweep import threads
from pyro_maf.sweep.kernels import kernels
from pyro_maf.transforms import (
    ActNorm,
    BatchNorm,
    Coupling,
    Flow,
    LowerTriangularAffine,
    MaskedAutoregressive,
    Permute,
    Stack,
)
from pyro_maf.transforms.low_rank import LowRankHead
from pyro_maf.transforms.triangular import Head
from tests.registry import Architecture, architectures, build
from tests.test_sweep import TOLERANCE, in_torch, largest_difference

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiled kernels on this machine")

NAMES = (
    "MaskedAutoregressive",
    "ConditionalInverseAutoregressive",
    "Coupling",
    "Coupling separate",
    "ConditionalCoupling",
    "MAF",
    "MAF batch norm",
    "IAF",
    "RealNVP",
    "Stack",
    "Stack with affine layers",
    "ConditionalMAF",
    "ConditionalIAF",
    "ConditionalRealNVP",
    "MaskedAutoregressive spline",
    "InverseAutoregressive spline",
    "Coupling spline",
    "RealNVP spline",
    "ConditionalNSF",
    "MaskedAutoregressive of rank 3",
    "ConditionalInverseAutoregressive of rank 3",
)
SMALL = Architecture(4, 2, 3, [9, 17], "tanh", "random", 0)
double = torch.float64
BATCHES: list[tuple[int, ...]] = [(), (0,), (1,), (3,), (2, 4), (113,), (300,)]


def results(
    flow: Flow, inverse: bool, v: Tensor, context: Tensor | None, tensors: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, log-determinant, and gradients of a function of both."""
    direction = flow.inverse_and_log_det if inverse else flow.forward_and_log_det
    w, log_det = direction(v, context if flow.context_dim else None)
    loss = w.sin().sum() + log_det.square().sum()
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
    return w.detach(), log_det.detach(), list(gradients)


@pytest.mark.parametrize("dtype", [torch.float32, double])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", NAMES)
@given(
    a=architectures(largest=7),
    batch=st.sampled_from(BATCHES),
    shared=st.booleans(),
    scale=st.sampled_from([1.0, 30.0]),
)
def test_a_program_agrees_with_torch(
    name: str, inverse: bool, dtype: torch.dtype, a: Architecture, batch: tuple[int, ...], shared: bool, scale: float
) -> None:
    built: Any = build(name, a, dtype, "cpu", gain=0.3)
    flow = getattr(built, "flow", built)
    v = (scale * torch.randn(*batch, a.input_dim, dtype=dtype)).requires_grad_()
    context = torch.randn(*(() if shared else batch), a.context_dim, dtype=dtype, requires_grad=True)
    tensors = [v, context, *flow.parameters()]
    w, log_det, gradients = results(flow, inverse, v, context, tensors)
    with torch.no_grad():
        direction = flow.inverse_and_log_det if inverse else flow.forward_and_log_det
        values = direction(v, context if flow.context_dim else None)
    with in_torch():
        wanted_w, wanted_log_det, expected = results(flow, inverse, v, context, tensors)
    layers = a.num_layers * a.input_dim
    for one, log in ((w, log_det), values):
        assert one.shape == wanted_w.shape
        assert log.shape == wanted_log_det.shape
        assert largest_difference(one, wanted_w) < 10 * layers * TOLERANCE[dtype]
        assert largest_difference(log[..., None], wanted_log_det[..., None]) < 10 * layers * TOLERANCE[dtype]
    if dtype == double:
        for gradient, other in zip(gradients, expected, strict=True):
            assert gradient.shape == other.shape
            assert torch.allclose(gradient, other, rtol=1e-9, atol=1e-9 * float(1 + other.norm()))


def is_one_program(log_det: Tensor) -> bool:
    return type(log_det.grad_fn).__name__ == "_LayersBackward"


@pytest.mark.parametrize("make", [MAF, IAF, RealNVP])
def test_a_stack_is_one_operation_in_either_direction(make: Callable[..., Stack]) -> None:
    flow = make(4, num_layers=3, hidden_dims=[8])
    x = torch.randn(5, 4)
    assert is_one_program(flow.forward_and_log_det(x)[1])
    assert is_one_program(flow.inverse_and_log_det(x)[1])


def test_a_mixed_stack_is_one_operation() -> None:
    permute = Permute([2, 0, 1, 3])
    inner = Stack([permute, IAF(4, num_layers=2, hidden_dims=[8]).inv, Coupling(4, hidden_dims=[5, 6])])
    flow = Stack([MAF(4, num_layers=2, hidden_dims=[8]), permute, inner, permute])
    y = torch.randn(5, 4)
    assert is_one_program(flow.inverse_and_log_det(y)[1])
    assert is_one_program(flow.forward_and_log_det(y)[1])
    assert not is_one_program(Stack([flow, flow, LowRankHead(4, 2)]).inverse_and_log_det(y)[1])
    assert torch.allclose(flow.inv(flow(y).clone()), y, atol=1e-5)


@pytest.mark.parametrize("layer", [BatchNorm, ActNorm, LowerTriangularAffine, Head])
def test_affine_layers_do_not_cut_a_run(layer: type[Flow]) -> None:
    maf = MAF(4, num_layers=2, hidden_dims=[8])
    flow, y = Stack([maf, layer(4), maf]), torch.randn(5, 4)
    sets_itself = layer in (BatchNorm, ActNorm)
    assert is_one_program(flow.forward_and_log_det(y)[1])
    assert is_one_program(flow.inverse_and_log_det(y)[1]) != sets_itself
    assert is_one_program(flow.inverse_and_log_det(y)[1]) == (layer is not BatchNorm)  # set by the first batch
    assert is_one_program(flow.eval().inverse_and_log_det(y)[1])
    assert is_one_program(flow.train().inverse_and_log_det(y)[1]) == (layer is not BatchNorm)
    assert torch.allclose(flow.eval().inv(flow(y).clone()), y, atol=1e-5)


@pytest.mark.parametrize("inverse", [False, True])
def test_affine_layers_are_never_stale(inverse: bool) -> None:
    flow: Any = build("Stack with affine layers", SMALL, double, "cpu")
    v = torch.randn(9, 4, dtype=double)

    def result(of: Flow) -> Tensor:
        with torch.no_grad():
            return (of.inverse_and_log_det if inverse else of.forward_and_log_det)(v)[0]

    with torch.inference_mode():  # results of inference mode belong to no graph, but do not prevent later ones
        before = result(flow).clone()
    flow.forward_and_log_det(v)[0].sum().backward()
    for name, tensor in [*flow.named_parameters(), *flow.named_buffers()]:
        if tensor.is_floating_point() and "mask" not in name:
            with torch.no_grad():
                tensor.mul_(1.1)
            after = result(flow)
            assert torch.equal(after, result(copy.deepcopy(flow)))
            assert not torch.allclose(after, before)
            with in_torch():
                assert torch.allclose(after, result(flow))
            before = after


@pytest.mark.parametrize("way", ["hook", "parametrization", "frozen", "gradient of a buffer"])
def test_user_defined_affine_layers_are_called(way: str) -> None:
    flow: Any = Stack([MAF(4, num_layers=2, hidden_dims=[8]), ActNorm(4), BatchNorm(4)]).eval()
    if way == "hook":
        prune.l1_unstructured(flow[1], "log_scale", 2)
    elif way == "parametrization":
        parametrize.register_parametrization(flow[1], "log_scale", nn.Softplus())
    elif way == "frozen":
        flow[1].loc.requires_grad_(False)
    else:
        flow[2].variance.requires_grad_()
    v = torch.randn(9, 4)
    tensors = [tensor for tensor in (*flow.parameters(), *flow.buffers()) if tensor.requires_grad]
    for _ in range(2):
        actual = results(flow, True, v, None, tensors)
        with in_torch():
            expected = results(flow, True, v, None, tensors)
        for one, other in zip((*actual[:2], *actual[2]), (*expected[:2], *expected[2]), strict=True):
            assert torch.allclose(one, other, atol=1e-4)
        with torch.no_grad():
            (flow[1].parametrizations.log_scale.original if way == "parametrization" else flow[1].loc).add_(0.5)


def test_a_weight_changed_before_the_backward_is_noticed() -> None:
    flow = MAF(4, num_layers=2, hidden_dims=[8])
    loss = flow.inverse_and_log_det(torch.randn(5, 4))[1].sum()
    with torch.no_grad():
        flow[0].made.layers[0].weight.mul_(2)  # type: ignore[union-attr,index,operator]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_is_freed_after_its_backward() -> None:
    loss = MAF(4, num_layers=2, hidden_dims=[8]).inverse_and_log_det(torch.randn(5, 4))[1].sum()
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("frozen", ["inputs", "weights", "all but the last"])
@pytest.mark.parametrize("name", ["MAF", "RealNVP", "ConditionalRealNVP"])
def test_gradients_of_a_part_of_the_tensors(name: str, frozen: str) -> None:
    built: Any = build(name, SMALL, double, "cpu")
    flow = getattr(built, "flow", built)
    parameters = list(flow.parameters())
    for parameter in parameters[: -1 if frozen == "all but the last" else None]:
        parameter.requires_grad_(frozen == "inputs")
    v = torch.randn(30, 4, dtype=double, requires_grad=frozen == "weights")
    context = torch.randn(30, 2, dtype=double)
    tensors = [tensor for tensor in (v, *parameters) if tensor.requires_grad]
    actual = results(flow, True, v, context, tensors)
    with in_torch():
        expected = results(flow, True, v, context, tensors)
    assert all(map(torch.allclose, (*actual[:2], *actual[2]), (*expected[:2], *expected[2])))


def test_tensors_of_any_layout_are_read() -> None:
    layer = MaskedAutoregressive(4, hidden_dims=[6]).double()
    with torch.no_grad():
        for linear in layer.made.masked_layers:
            linear.weight = nn.Parameter(torch.randn(linear.weight.T.shape, dtype=double).T)
            linear.bias = nn.Parameter(torch.randn(1, dtype=double).expand(linear.bias.shape))
    v = torch.randn(4, 9, dtype=double).T
    tensors = list(layer.parameters())
    actual = results(layer, True, v, None, tensors)
    with in_torch():
        expected = results(layer, True, v, None, tensors)
    assert all(map(torch.allclose, (*actual[:2], *actual[2]), (*expected[:2], *expected[2])))


def test_a_user_defined_mask_is_respected() -> None:
    layer = MaskedAutoregressive(4, hidden_dims=[6], activation="tanh").double()
    v = torch.randn(9, 4, dtype=double)
    nn.init.normal_(layer.made.last_layer.weight)
    before = layer.inverse_and_log_det(v)[0]
    assert is_one_program(layer.inverse_and_log_det(v)[1])
    with torch.no_grad():
        layer.made.masked_layers[1].mask[:, 0] = 0
    assert not is_one_program(layer.inverse_and_log_det(v)[1])
    found = layer.inverse_and_log_det(v)[0]
    with in_torch():
        assert torch.equal(found, layer.inverse_and_log_det(v)[0])
    assert not torch.allclose(found, before)


def test_a_program_follows_a_change_of_its_layers() -> None:
    flow: Any = build("RealNVP", SMALL, double, "cpu")
    v = torch.randn(9, 4, dtype=double)

    def assert_fresh() -> None:
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(flow.inverse_and_log_det(v)[0], copy.deepcopy(flow).inverse_and_log_det(v)[0])

    assert_fresh()
    flow[0].networks[0].temper()
    assert_fresh()
    flow[1].networks[0] = copy.deepcopy(flow[0].networks[0])
    assert_fresh()
    flow.layers[2] = Permute([1, 0, 3, 2])
    assert_fresh()
    flow[0].networks[0].layers[0].weight.data.mul_(2)
    flow.clear_cache()
    assert_fresh()


def test_programs_are_freed_with_their_flows() -> None:
    flow = MAF(3, num_layers=2, hidden_dims=[8])
    with torch.no_grad():
        flow.inverse_and_log_det(torch.randn(4, 3))
    assert flow._programs
    assert not copy.deepcopy(flow)._programs
    ref = weakref.ref(next(iter(flow._programs.values())))
    gc.disable()
    try:
        del flow
        assert ref() is None
    finally:
        gc.enable()


def test_inputs_of_a_wrong_width_or_dtype_are_refused_as_in_torch() -> None:
    flow = RealNVP(4, num_layers=2, hidden_dims=[8], context_dim=2)
    v, context = torch.randn(5, 4), torch.randn(5, 2)
    for wrong in ((v[:, :3], context), (v.double(), context), (v, context[:, :1]), (v, context.double())):
        with pytest.raises((RuntimeError, IndexError)):
            flow.inverse_and_log_det(*wrong)


def test_layers_that_do_not_fit_together_are_refused() -> None:
    flow = RealNVP(4, num_layers=2, hidden_dims=[8, 9])
    flow[0].networks[0].layers[1] = nn.Linear(7, 9)  # type: ignore[union-attr,index,operator]
    with pytest.raises(RuntimeError):
        flow.inverse_and_log_det(torch.randn(5, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("points", [2, 30])
def test_non_finite_values_stay_in_their_row(points: int, bad: float) -> None:
    flow = build("RealNVP", SMALL, torch.float32, "cpu")
    v = torch.randn(points, 4)
    expected = flow.inverse_and_log_det(v)[0].detach()  # type: ignore[operator]
    v[1, 2] = bad
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            w = flow.inverse_and_log_det(v)[0].detach()  # type: ignore[operator]
        assert not torch.isfinite(w[1]).all()
        rest = [row for row in range(points) if row != 1]
        assert torch.allclose(w[rest], expected[rest], atol=1e-6)


@given(parts=st.integers(2, 5), points=st.integers(1, 700))
def test_points_are_divided_among_threads(parts: int, points: int) -> None:
    flow: Any = build("RealNVP", SMALL, double, "cpu")
    v = torch.randn(points, 4, dtype=double, requires_grad=True)
    tensors = [v, *flow.parameters()]
    expected = results(flow, True, v, None, tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "LEAST_WORK", 1)
        patch.setattr(torch, "get_num_threads", lambda: parts)
        actual = results(flow, True, v, None, tensors)
    for one, other in zip((*actual[:2], *actual[2]), (*expected[:2], *expected[2]), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12 * float(1 + other.norm()))


UNITS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "units": lambda: {"loc": torch.full((4,), 3.0, dtype=double), "scale": torch.tensor([2.0, 0.1, 1.0, 5.0]).double()},
    "positive": lambda: {"support": "positive"},
}


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("name", ["MAF", "RealNVP", "ConditionalMAF", "ConditionalRealNVP"])
def test_a_log_density_is_that_of_torch(name: str, units: str) -> None:
    built: Any = build(name, SMALL, double, "cpu", gain=0.3)
    flow, is_conditional = getattr(built, "flow", built), hasattr(built, "flow")
    prior: Any = (ConditionalFlowPrior if is_conditional else FlowPrior)(flow, **UNITS[units]())
    context = torch.randn(6, SMALL.context_dim, dtype=double, requires_grad=True)
    value = torch.rand(6, 4, dtype=double).add_(0.1).requires_grad_()
    tensors = [value, *flow.parameters(), *([context] if is_conditional else [])]

    def derivatives() -> list[Tensor]:
        density = (prior.condition(context) if is_conditional else prior).log_prob(value)
        loss = density.sin().sum()
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), tensors)
        with torch.no_grad():
            again = (prior.condition(context) if is_conditional else prior).log_prob(value)
        return [density, again, *first, *second]

    actual = derivatives()
    with in_torch():
        expected = derivatives()
    for one, other in zip(actual, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9 * float(1 + other.detach().norm()))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("Conditional")])
def test_many_points_at_one_context_are_as_at_a_context_each(name: str) -> None:
    torch.manual_seed(0)
    flow: Any = build(name, SMALL, double, "cpu", gain=0.3).unwrapped
    for _ in range(2):  # and once more with other weights
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.mul_(1.1)
            points, context = (
                torch.randn(40, 2, flow.input_dim, dtype=double),
                torch.randn(1, flow.context_dim, dtype=double),
            )
            for direction in (flow.forward_and_log_det, flow.inverse_and_log_det):
                for at_once, each in zip(
                    direction(points, context), direction(points, context.repeat(40, 2, 1)), strict=True
                ):
                    torch.testing.assert_close(at_once, each, rtol=1e-9, atol=1e-11)


def test_a_log_density_is_one_operation() -> None:
    prior = FlowPrior(MAF(4, num_layers=2, hidden_dims=[8]), scale=torch.full((4,), 2.0))
    assert type(prior.log_prob(torch.randn(5, 4)).grad_fn).__name__ == "_LayersBackward"


def test_a_log_density_follows_a_change_of_its_units() -> None:
    prior = FlowPrior(MAF(4, num_layers=2, hidden_dims=[8]))
    value = torch.randn(5, 4)
    before = prior.log_prob(value)
    with torch.no_grad():
        prior.units.scale.mul_(2)
    found = prior.log_prob(value)
    assert not torch.allclose(found, before)
    with in_torch():
        assert torch.allclose(found, prior.log_prob(value))


@pytest.mark.parametrize("change", ["hook", "activation", "layer", "weights"])
def test_a_log_density_follows_a_change_of_its_flow(change: str) -> None:
    flow: Any = build("MAF", SMALL, double, "cpu", gain=0.3)
    prior, value, calls = FlowPrior(flow), torch.randn(5, 4, dtype=double), []
    with torch.no_grad():
        before = prior.log_prob(value)
        if change == "hook":
            flow[0].made.layers[1].register_forward_hook(lambda *_: calls.append(1))
        elif change == "activation":
            flow[0].made.activation = "relu"
        elif change == "layer":
            flow.layers[1] = copy.deepcopy(flow[0])
        else:
            flow[1].made.layers[0].weight.mul_(2)
        found = prior.log_prob(value)
        with in_torch():
            assert torch.allclose(found, prior.log_prob(value))
    assert bool(calls) == (change == "hook")
    assert change == "hook" or not torch.allclose(found, before)


def test_the_number_of_torch_threads_is_restored() -> None:
    prior = FlowPrior(MAF(4, num_layers=2, hidden_dims=[8]))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        (-prior.log_prob(torch.randn(5, 4)).mean()).backward()
        assert torch.get_num_threads() == 3
        with pytest.raises(RuntimeError), threads.OneThread():
            torch.zeros(torch.get_num_threads() + 1).view(3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["MAF", "IAF", "MaskedAutoregressive", "Coupling", "NSF", "Tails"])
def test_second_derivatives_through_both_directions_count_each_once(name: str) -> None:
    flow: Any = build(name, SMALL, double, "cpu")
    x = torch.randn(5, flow.input_dim, dtype=double)
    weights = list(flow.parameters())

    def gradients(again: bool) -> list[Tensor]:
        y, _ = flow.forward_and_log_det(x)
        actual, log_det = flow.inverse_and_log_det(9 * y)
        loss = actual.square().sum() + log_det.sum()
        return list(torch.autograd.grad(loss, weights, create_graph=again, materialize_grads=True, allow_unused=True))

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-8, atol=1e-9 * float(1 + expected.norm()))
