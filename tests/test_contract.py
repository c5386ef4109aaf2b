"""The laws that every transform keeps, each one a property of everything in the registry."""

from __future__ import annotations

import copy
import io
import math
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

import pyro_maf
from pyro_maf._core.torch_state import reference_tensor
from pyro_maf.transforms import ActNorm, BatchNorm, ConditionalFlow, Flow, InverseAutoregressive, MaskedAutoregressive
from tests.registry import REGISTRY, Architecture, architectures, at_context, build

pytestmark = pytest.mark.parametrize("name", REGISTRY)
AUTOREGRESSIVE = (MaskedAutoregressive, InverseAutoregressive)
double, single = torch.float64, torch.float32
WHEN = st.sampled_from(["always", "before", "after", "never"])
"""When something holds, seen from the first call."""


def points(flow: Flow, *batch: int, scale: float = 1.0) -> Tensor:
    like = reference_tensor(flow)
    held = reference_tensor(flow, floating=False)
    kind = {"dtype": double if like is None else like.dtype, "device": None if held is None else held.device}
    return scale * torch.randn(*batch, flow.input_dim, **kind)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest distance between rows, relative to their length (or 1, where that is larger)."""
    if not wanted.numel():
        return 0.0
    found, wanted = found.detach(), wanted.detach()
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1)).max())


def fresh(flow: Flow) -> Flow:
    """A copy with the same weights and nothing remembered."""
    return copy.deepcopy(flow).with_cache(0)


def jacobian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(function, at)


# 1. Invertible


@given(a=architectures(), scale=st.sampled_from([1.0, 50.0]))
def test_inverts_in_double_precision(name: str, device: str, a: Architecture, scale: float) -> None:
    flow = at_context(build(name, a, double, device), 20).with_cache(0)
    x = points(flow, 20, scale=scale)
    assert relative_error(flow.inv(flow(x)), x) < 1e-9
    assert relative_error(flow(flow.inv(x)), x) < 1e-9


@given(a=architectures(), scale=st.sampled_from([1.0, 50.0]))
def test_inverts_in_single_precision(name: str, device: str, a: Architecture, scale: float) -> None:
    # Half the gain: four layers of scale exp(-3) on top of each other hold less of x than float32 has digits.
    flow = at_context(build(name, a, single, device, gain=0.5), 20).with_cache(0)
    x = points(flow, 20, scale=scale)
    assert relative_error(flow.inv(flow(x)), x) < 1e-4
    assert relative_error(flow(flow.inv(x)), x) < 1e-4


# 2. Triangular


@given(a=architectures())
def test_jacobian_is_triangular_in_the_order_of_each_layer(name: str, device: str, a: Architecture) -> None:
    flow = at_context(build(name, a, double, device)).with_cache(0)
    x = points(flow)
    total = jacobian(flow, x)
    product = torch.eye(a.input_dim, dtype=double, device=device)
    for layer in _layers(flow):
        own = jacobian(lambda value, layer=layer: layer(value), x)
        if isinstance(layer, AUTOREGRESSIVE) or isinstance(getattr(layer, "flow", None), AUTOREGRESSIVE):
            order = getattr(layer, "flow", layer).order
            ordered = own[order][:, order]
            assert torch.equal(ordered.triu(1), torch.zeros_like(ordered))
            assert bool((ordered.diagonal() > 0).all())
        product = own @ product
        x = layer(x).detach()
    assert torch.allclose(product, total, rtol=1e-9, atol=1e-9 * float(total.abs().max()))


@given(a=architectures(), data=st.data())
def test_changing_a_later_input_never_changes_an_earlier_output(
    name: str, device: str, a: Architecture, data: st.DataObject
) -> None:
    flow = at_context(build(name, a, double, device)).with_cache(0)
    for layer in _layers(flow):
        inner = getattr(layer, "flow", layer)
        if not isinstance(inner, AUTOREGRESSIVE):
            continue
        place = data.draw(st.integers(0, a.input_dim - 1))
        x = points(flow, 3)
        moved = x.clone()
        moved[:, inner.order[place]] += 7.0
        earlier = inner.order[:place]
        for direction in (layer, layer.inv):
            assert torch.equal(direction(x)[:, earlier], direction(moved)[:, earlier])


def _layers(flow: Flow) -> list[Flow]:
    """The layers that a flow is made of, noise to data, each one bound to the flow's context."""
    if hasattr(flow, "context"):
        return [layer if not layer.context_dim else _bound(layer, flow.context) for layer in _layers(flow.flow)]
    if hasattr(flow, "layers"):
        return [inner for layer in flow for inner in _layers(layer)]
    if hasattr(flow, "flow"):
        return [layer.inv for layer in reversed(_layers(flow.flow))]
    return [flow.with_cache(0)]


def _bound(layer: Flow, context: Tensor) -> Flow:
    return pyro_maf.transforms.Conditioned(layer, context).with_cache(0)


# 3. Log-determinant


@given(a=architectures(), inverted=st.booleans())
def test_log_det_is_that_of_the_jacobian(name: str, device: str, a: Architecture, inverted: bool) -> None:
    flow = at_context(build(name, a, double, device))
    flow = flow.inv if inverted else flow
    x = points(flow)
    # The determinant is taken of an upper or lower triangular matrix up to an order, or of a product of these.
    wanted = sum(torch.linalg.slogdet(matrix)[1] for matrix in _jacobians(flow, x))
    x, other = x[None], points(flow, 1)
    y, other_y = flow(x), fresh(flow)(other)
    assert torch.allclose(flow.log_abs_det_jacobian(x, y)[0], wanted, rtol=1e-9, atol=1e-9)
    assert torch.allclose(flow.log_abs_det_jacobian(x.clone(), y.clone())[0], wanted, rtol=1e-7, atol=1e-7)
    found = flow.log_abs_det_jacobian(other, other_y)
    assert torch.allclose(found, fresh(flow).log_abs_det_jacobian(other, other_y), rtol=1e-9, atol=1e-9)


def _jacobians(flow: Flow, x: Tensor) -> list[Tensor]:
    """Jacobians of the layers at x: their determinants are far better conditioned than that of the product."""
    found = []
    for layer in _layers(flow):
        found.append(jacobian(lambda value, layer=layer: layer(value), x))
        x = layer(x).detach()
    return found


# 4. A density


@given(a=architectures(largest=2))
@settings(max_examples=3)
def test_density_integrates_to_one(name: str, device: str, a: Architecture) -> None:
    # The tails of a random flow can lie anywhere; the grid therefore covers the image of the central part of the base,
    # and the mass expected on it is that of the base on the preimage, which is 1 up to what the grid cuts off.
    flow = at_context(build(name, a, double, device, gain=0.3)).with_cache(0)
    side = {1: 10_001, 2: 401}[a.input_dim]
    with torch.no_grad():
        reach = flow(points(flow, 20_000)).abs().amax(0) * 1.5
        axes = [torch.linspace(-float(r), float(r), side, dtype=double, device=device) for r in reach]
        grid = torch.cartesian_prod(*axes).reshape(-1, a.input_dim)
        x = flow.inv(grid)
        log_prob = -0.5 * (x**2).sum(-1) - 0.5 * a.input_dim * math.log(2 * math.pi)
        log_prob = log_prob - flow.log_abs_det_jacobian(x, grid)
        cell = math.prod(float(2 * r) / (side - 1) for r in reach)
    assert abs(float(log_prob.exp().sum()) * cell - 1) < 2e-3


# 5. Never stale


@given(
    a=architectures(largest=4), step=st.sampled_from(["optimizer", "fused", "state_dict", "x", "y", "replaced", "data"])
)
def test_results_are_never_stale(name: str, device: str, a: Architecture, step: str) -> None:
    flow = at_context(build(name, a, double, device), 5)
    x = points(flow, 5)
    y = flow(x)
    flow.log_abs_det_jacobian(x, y)
    y = flow(x)
    parameters = list(flow.parameters())
    if step == "fused" and parameters:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(parameters, lr=0.1, fused=True).step()
    elif step == "optimizer" and parameters:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        (y.sum() + flow.log_abs_det_jacobian(x, y).sum()).backward()
        optimizer.step()
    elif step == "state_dict":
        flow.load_state_dict({key: value + value.is_floating_point() * 0.1 for key, value in flow.state_dict().items()})
    elif step == "x":
        x += 0.5
    elif step == "y":
        with torch.no_grad():
            y += 0.5
    elif step == "replaced" and parameters:
        owner, key = next((m, k) for m in flow.modules() for k in m._parameters)
        setattr(owner, key, torch.nn.Parameter(getattr(owner, key).detach() + 0.1))
    elif parameters:
        for parameter in parameters:
            parameter.data += 0.1
        flow.clear_cache()
    # In the grad mode that y was made in, where something is remembered.
    wanted = fresh(flow)
    assert torch.allclose(flow.log_abs_det_jacobian(x, y), wanted.log_abs_det_jacobian(x, y), rtol=1e-9, atol=1e-9)
    assert torch.allclose(flow.inv(y), wanted.inv(y), rtol=1e-9, atol=1e-9)
    assert torch.allclose(flow(x), wanted(x), rtol=1e-9, atol=1e-9)


@given(a=architectures(largest=4), x_when=WHEN, y_when=WHEN, frozen=WHEN, context_when=WHEN, data=st.data())
@settings(max_examples=8)
def test_gradients_are_those_of_a_fresh_computation_whatever_is_frozen_and_when(
    name: str,
    device: str,
    a: Architecture,
    x_when: str,
    y_when: str,
    frozen: str,
    context_when: str,
    data: st.DataObject,
) -> None:
    """`x_when` and its like: whether a gradient is wanted before the first call, after it, or at both times."""
    inverted = data.draw(st.booleans(), "inverted")
    queries = data.draw(st.lists(st.sampled_from(["there", "back", "log_det"]), min_size=1, max_size=3), "queries")
    partly = data.draw(st.booleans(), "only every other parameter is frozen")

    def program(cache_size: int) -> tuple[list[Tensor], list[bool]]:
        flow = at_context(build(name, a, double, device), 5)
        parameters = list(flow.parameters())
        chosen = parameters[:: 1 + partly]
        member = (flow.inv if inverted else flow).with_cache(cache_size)
        torch.manual_seed(0)
        x = points(flow, 5)
        context = getattr(flow, "context", None)
        leaves = [*parameters, x] if context is None else [*parameters, x, context]
        for times in ("before", "after"):
            for parameter in chosen:
                parameter.requires_grad_(frozen not in ("always", times))
            x.requires_grad_(x_when in ("always", times))
            if context is not None:
                context.requires_grad_(context_when in ("always", times))
            if times == "before":
                y = member(x)
                if y_when != "never" and not y._is_view():
                    y.detach_()
            if y.is_leaf:
                y.requires_grad_(y_when in ("always", times))
        asked = {
            "there": lambda: member(x),
            "back": lambda: member.inv(y),
            "log_det": lambda: member.log_abs_det_jacobian(x, y),
        }
        results = [asked[query]() for query in queries]
        loss = sum((result**3).sum() for result in results)
        assert isinstance(loss, Tensor)
        wanted = [leaf for leaf in [*leaves, y] if leaf.is_leaf and leaf.requires_grad]
        gradients = [torch.zeros_like(leaf) for leaf in wanted]
        if wanted and loss.requires_grad:
            gradients = list(torch.autograd.grad(loss, wanted, materialize_grads=True, allow_unused=True))
        # Where y is still part of the graph of x, x itself is the answer to `inv`: the same function of all leaves.
        exact = [
            result.requires_grad for result, query in zip(results, queries, strict=True) if y.is_leaf or query != "back"
        ]
        return [result.detach() for result in [*results, *gradients]], exact

    found, wanted = program(1), program(0)
    assert found[1] == wanted[1]
    for one, other in zip(found[0], wanted[0], strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-6 * float(1 + other.norm()))


@given(a=architectures(largest=4))
def test_change_of_precision_leaves_nothing_stale(name: str, device: str, a: Architecture) -> None:
    flow = at_context(build(name, a, single, device), 5)
    x = points(flow, 5)
    y = flow(x)
    flow.double()
    assert torch.equal(flow.inv(y.double()), fresh(flow).inv(y.double()))
    flow.float()
    assert torch.equal(flow.inv(y), fresh(flow).inv(y))


@given(a=architectures(largest=4))
def test_train_and_eval_are_kept_apart(name: str, device: str, a: Architecture) -> None:
    flow = at_context(build(name, a, double, device), 5).eval()
    x = points(flow, 5)
    y = flow(x)
    expected = fresh(flow).train().inv(y)
    flow.train()
    found = flow.inv(y)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


@given(a=architectures(largest=4))
def test_cache_saves_the_inverse(name: str, device: str, a: Architecture) -> None:
    flow = at_context(build(name, a, double, device), 5)
    x = points(flow, 5)
    y = flow(x)
    assert flow.inv(y) is x
    assert flow.with_cache(0).inv(y) is not x
    y = points(flow, 5)
    x = flow.inv(y)
    assert flow(x) is y


@given(a=architectures(largest=4))
def test_cache_keeps_no_tensor_alive(name: str, device: str, a: Architecture) -> None:
    flow = at_context(build(name, a, double, device), 5)
    x = points(flow, 5)
    y = flow(x)
    flow.inv(y)
    watched = [weakref.ref(x), weakref.ref(y)]
    del x, y
    assert [ref() for ref in watched] == [None, None]
    assert flow._cache._pair is None


# 6. Trains in the obvious loop


@given(a=architectures(largest=4))
def test_trains_on_the_same_full_batch(name: str, device: str, a: Architecture) -> None:
    flow = at_context(build(name, a, double, device), 8).train()
    data = points(flow, 8)
    parameters = list(flow.parameters())
    optimizer = torch.optim.Adam(parameters, 1e-3) if parameters else None
    for _ in range(3):
        x = flow.inv(data)
        loss = (x**2).sum() + flow.log_abs_det_jacobian(x, data).sum()
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert bool(torch.isfinite(loss))


@given(a=architectures(largest=4))
def test_gradients_accumulate_over_one_batch(name: str, device: str, a: Architecture) -> None:
    flow = at_context(build(name, a, double, device), 8)
    data = points(flow, 8)
    parameters = list(flow.parameters())
    if not parameters:
        return

    def loss() -> Tensor:
        x = flow.inv(data)
        return (x**2).sum() + flow.log_abs_det_jacobian(x, data).sum()

    loss().backward()
    once = [parameter.grad.clone() for parameter in parameters]
    first, second = loss(), loss()
    first.backward()
    second.backward(retain_graph=True)
    second.backward()
    for parameter, grad in zip(parameters, once, strict=True):
        assert torch.allclose(parameter.grad, 4 * grad, rtol=1e-7, atol=1e-9)


@given(a=architectures(largest=4))
def test_scoring_a_sample_has_the_gradient_of_a_fresh_computation(name: str, device: str, a: Architecture) -> None:
    flow = at_context(build(name, a, double, device), 8)
    parameters = list(flow.parameters())
    if not parameters:
        return
    noise = points(flow, 8)

    def gradients(cached: bool) -> list[Tensor | None]:
        member = flow.with_cache(int(cached))
        y = member(noise)
        x = member.inv(y)
        loss = (x**2).sum() + member.log_abs_det_jacobian(x, y).sum() + (y**3).sum()
        return list(torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True))

    for found, wanted in zip(gradients(True), gradients(False), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6 * float(1 + wanted.norm()))


@given(a=architectures(largest=4))
def test_two_losses_from_one_sample(name: str, device: str, a: Architecture) -> None:
    flow = at_context(build(name, a, double, device), 8)
    if not list(flow.parameters()):
        return
    with torch.no_grad():
        y = flow(points(flow, 8))
    first, second = flow.inv(y).sum(), flow.inv(y).pow(2).sum()
    first.backward()
    second.backward()
    y = flow(points(flow, 8))
    x = flow.inv(y)
    (y.sum() + flow.log_abs_det_jacobian(x, y).sum()).backward(retain_graph=True)
    (y.sum() + flow.log_abs_det_jacobian(x, y).sum()).backward()


@given(a=architectures(largest=4))
def test_runs_without_gradients_and_in_lower_precision_contexts(name: str, device: str, a: Architecture) -> None:
    flow = at_context(build(name, a, single, device, gain=0.5), 8)
    x = points(flow, 8).to(single)
    wanted = flow(x).detach()
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16)):
        with context:
            y = flow(x)
            back = flow.inv(y.clone())
            log_det = flow.log_abs_det_jacobian(x, y)
        assert relative_error(y, wanted) < 1e-5  # kernels and torch round differently; bfloat16 would be off by 1e-2
        assert y.dtype == back.dtype == log_det.dtype == single
        assert relative_error(back, x) < 1e-4


# 7. Gradients


@given(a=architectures(largest=4), inverted=st.booleans())
@settings(max_examples=3)
def test_first_and_second_derivatives(name: str, device: str, a: Architecture, inverted: bool) -> None:
    if a.activation in ("relu", "leaky_relu", "elu"):
        a = Architecture(**{**vars(a), "activation": "tanh"})  # finite differences need a smooth function
    a = Architecture(
        **{**vars(a), "num_layers": min(2, a.num_layers), "hidden_dims": [min(4, h) for h in a.hidden_dims[:2]]}
    )
    flow = at_context(build(name, a, double, device, gain=0.5), 2)
    names = [key for key, _ in flow.named_parameters()] + (["context"] if hasattr(flow, "context") else [])
    tensors = dict([*flow.named_parameters(), *flow.named_buffers()])
    values = [tensors[key].detach().clone().requires_grad_() for key in names]
    x = points(flow, 2, scale=0.7).requires_grad_()
    module = _Both(flow, inverted)

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        swapped = {f"flow.{key}": value for key, value in zip(names, values, strict=True)}
        return functional_call(module, swapped, (x,))

    assert torch.autograd.gradcheck(function, (x, *values))
    assert torch.autograd.gradgradcheck(lambda x: function(x, *values), (x,))


class _Both(torch.nn.Module):
    """A flow's result and log-determinant in one call."""

    def __init__(self, flow: Flow, inverted: bool) -> None:
        super().__init__()
        self.flow, self.inverted = flow, inverted

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.inverse_and_log_det(value) if self.inverted else self.flow.forward_and_log_det(value)


# 8. A good module


@given(a=architectures(), after_use=st.booleans())
def test_copies_pickles_and_moves_through_a_state_dict(
    name: str, device: str, a: Architecture, after_use: bool
) -> None:
    unbound = build(name, a, double, device)
    torch.manual_seed(a.seed)
    flow = at_context(unbound, 5)
    x = points(flow, 5)
    y = flow(x)
    if not after_use:
        flow.clear_cache()
    context = getattr(flow, "context", None)
    for twin in (copy.deepcopy(unbound), pickle.loads(pickle.dumps(unbound))):
        assert torch.equal(_at(twin, context)(x), y)
    file = io.BytesIO()
    torch.save(unbound.state_dict(), file)
    file.seek(0)
    torch.manual_seed(a.seed + 1)
    other = REGISTRY[name](Architecture(**{**vars(a), "seed": a.seed + 1})).to(device=device, dtype=double).eval()
    if "order" not in str(_differences(unbound, other)):
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(_at(other, context)(x), y)


def _differences(one: torch.nn.Module, other: torch.nn.Module) -> list[str]:
    """Keys whose shapes differ: such a state is refused, by torch itself."""
    shapes = [{key: value.shape for key, value in module.state_dict().items()} for module in (one, other)]
    return [f"order: {key}" for key in shapes[0] if shapes[0][key] != shapes[1].get(key)]


def _at(flow: Flow | ConditionalFlow, context: Tensor | None) -> Flow:
    return flow if context is None else flow.condition(context)  # type: ignore[union-attr,return-value]


@given(a=architectures())
def test_saves_and_loads(name: str, device: str, a: Architecture, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("saved") / "flow.safetensors"
    for dtype in (double, single):
        flow = build(name, a, dtype, device)
        flow.save(path)
        loaded = pyro_maf.load(path)
        assert type(loaded) is type(flow)
        assert not loaded.training
        for (key, value), (other_key, other) in zip(
            flow.state_dict().items(), loaded.state_dict().items(), strict=True
        ):
            assert key == other_key
            assert value.dtype == other.dtype
            assert torch.equal(value.cpu(), other)


@given(a=architectures())
def test_inverse_is_a_module_with_the_same_parameters(name: str, device: str, a: Architecture) -> None:
    flow = at_context(build(name, a, double, device))
    assert flow.inv.inv is flow
    assert [id(p) for p in flow.inv.parameters()] == [id(p) for p in flow.parameters()]
    assert len(flow.inv.state_dict()) == len(flow.state_dict())
    moved = copy.deepcopy(flow.inv).float()
    assert all(p.dtype == single for p in moved.parameters())


# 9. Batches


@given(a=architectures(largest=5), batch=st.lists(st.integers(0, 3), max_size=3), inverted=st.booleans())
def test_any_batch_shape(name: str, device: str, a: Architecture, batch: list[int], inverted: bool) -> None:
    flow = at_context(build(name, a, double, device))
    flow = (flow.inv if inverted else flow).with_cache(0)
    x = points(flow, *batch)
    y = flow(x)
    log_det = flow.log_abs_det_jacobian(x, y)
    assert y.shape == x.shape
    assert log_det.shape == x.shape[:-1]
    rows = x.reshape(-1, a.input_dim)
    one_by_one = [flow(row) for row in rows]
    if one_by_one:
        assert torch.allclose(torch.stack(one_by_one), y.reshape(-1, a.input_dim), rtol=1e-9, atol=1e-9)


@given(a=architectures(largest=5), inverted=st.booleans())
def test_context_broadcasts(name: str, device: str, a: Architecture, inverted: bool) -> None:
    flow = build(name, a, double, device)
    if isinstance(flow, Flow):
        return
    context = torch.randn(4, 1, a.context_dim, dtype=double, device=device)
    bound = flow.condition(context)
    bound = bound.inv if inverted else bound
    x = points(bound, 3)
    y = bound(x)
    assert y.shape == (4, 3, a.input_dim)
    assert bound.log_abs_det_jacobian(x, y).shape == (4, 3)
    for row in range(4):
        at_one = flow.condition(context[row, 0])
        at_one = at_one.inv if inverted else at_one
        assert torch.allclose(at_one(x), y[row], rtol=1e-9, atol=1e-9)


@given(a=architectures(largest=4), inverted=st.booleans())
@settings(max_examples=5)
def test_vmap_and_jacrev(name: str, device: str, a: Architecture, inverted: bool) -> None:
    flow = at_context(build(name, a, double, device))
    flow = flow.inv if inverted else flow
    x = points(flow, 3)
    assert torch.allclose(vmap(flow)(x), flow(x), rtol=1e-9, atol=1e-9)
    assert torch.allclose(jacrev(flow)(x[0]), jacobian(flow, x[0]), rtol=1e-7, atol=1e-9)


# 10. Starts as the identity


@given(a=architectures())
def test_starts_as_the_identity(name: str, device: str, a: Architecture) -> None:
    torch.manual_seed(a.seed)
    flow = REGISTRY[name](a).to(device=device, dtype=double).eval()
    if any(isinstance(member, pyro_maf.transforms.Permute) for member in flow.modules()):
        return
    flow = at_context(flow)
    x = points(flow, 5)
    # A fresh batch norm divides by sqrt(1 + 1e-5).
    tolerance = 1e-4 if any(isinstance(member, BatchNorm) for member in flow.modules()) else 1e-12
    assert relative_error(flow(x), x) < tolerance
    assert relative_error(flow.inv(x), x) < tolerance
    assert not any(isinstance(member, ActNorm) and member.initialized for member in flow.modules())


# Bad input


@given(a=architectures(largest=5))
@settings(max_examples=3)
def test_says_what_is_wrong_with_an_input(name: str, device: str, a: Architecture) -> None:
    flow = at_context(build(name, a, double, device))
    wide = torch.zeros(3, a.input_dim + 1, dtype=double, device=device)
    for direction in (flow, flow.inv):
        with pytest.raises(ValueError, match=rf"expected .* last dimension {a.input_dim} \(input_dim\), got shape"):
            direction(wide)
    if reference_tensor(flow) is not None:
        with pytest.raises(TypeError, match="has float64 parameters, got x of float32"):
            flow(points(flow, 3).float())
    with pytest.raises(TypeError, match=r"expected x to be a torch\.Tensor, got list"):
        flow([0.0] * a.input_dim)
    elsewhere = copy.deepcopy(flow).to("meta")
    x = points(flow, 3)
    for member, value in ((elsewhere, x), (flow, x.to("meta"))):
        where = f"on {next(iter(member.state_dict().values())).device}, got \\w on {value.device}"
        for direction in (member, member.inv, member.with_cache(0)):
            with pytest.raises(ValueError, match=rf"{where}: move one of them with \.to\(device\)"):
                direction(value)
