"""The laws of transforms, as property tests of every transform in the registry."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import pyro_maf
from pyro_maf._core.torch_state import reference_tensor
from pyro_maf.testing import transforms as laws
from pyro_maf.testing.subjects import at_context, fresh, layers_of, points
from pyro_maf.transforms import ActNorm, Flow
from tests.registry import REGISTRY, Architecture, architectures, build

pytestmark = pytest.mark.parametrize("name", REGISTRY)
double, single = torch.float64, torch.float32
few = settings(max_examples=4)
"""Settings for laws that depend on the kind of a layer more than on its sizes."""
WHEN = st.sampled_from(["always", "before", "after", "never"])
"""When a condition holds, relative to the first call."""


# 1. Invertible


@given(a=architectures(), scale=st.sampled_from([1.0, 50.0]))
def test_inverts_in_double_precision(name: str, device: str, a: Architecture, scale: float) -> None:
    laws.inverts(at_context(build(name, a, double, device), 20), scale)


@given(a=architectures(), scale=st.sampled_from([1.0, 50.0]))
@example(a=Architecture(11, 2, 4, [], "relu", "reverse", 18), scale=50.0)  # steep maps
@example(a=Architecture(5, 2, 4, [], "relu", "reverse", 13), scale=50.0)
def test_inverts_in_single_precision(name: str, device: str, a: Architecture, scale: float) -> None:
    # Half the gain, since four layers with scale exp(-3) would lose more of x than float32 can represent.
    laws.inverts(at_context(build(name, a, single, device, gain=0.5), 20), scale)


# 2. Triangular


@given(a=architectures())
@settings(max_examples=6)
def test_jacobian_is_triangular_in_the_order_of_each_layer(name: str, device: str, a: Architecture) -> None:
    laws.is_triangular(at_context(build(name, a, double, device)))


@given(a=architectures(), data=st.data())
def test_changing_a_later_input_never_changes_an_earlier_output(
    name: str, device: str, a: Architecture, data: st.DataObject
) -> None:
    flow = at_context(build(name, a, double, device)).with_cache(0)
    for layer in layers_of(flow):
        inner = getattr(layer, "flow", layer)
        if not isinstance(inner, laws.AUTOREGRESSIVE):
            continue
        place = data.draw(st.integers(0, a.input_dim - 1))
        x = points(flow, 3)
        moved = x.clone()
        moved[:, inner.order[place]] += 7.0
        earlier = inner.order[:place]
        for direction in (layer, layer.inv):
            assert torch.equal(direction(x)[:, earlier], direction(moved)[:, earlier])


# 3. Log-determinant


@given(a=architectures(), inverted=st.booleans())
@settings(max_examples=6)
def test_log_det_is_that_of_the_jacobian(name: str, device: str, a: Architecture, inverted: bool) -> None:
    flow = at_context(build(name, a, double, device))
    laws.has_the_log_det_of_its_jacobian(flow.inv if inverted else flow)


# 4. A density


@given(a=architectures(largest=2))
@settings(max_examples=3)
def test_density_integrates_to_one(name: str, device: str, a: Architecture) -> None:
    laws.integrates_to_one(at_context(build(name, a, double, device, gain=0.3)))


# 5. Never stale


@given(a=architectures(largest=4), step=st.sampled_from(laws.STEPS))
def test_results_are_never_stale(name: str, device: str, a: Architecture, step: str) -> None:
    laws.is_never_stale(at_context(build(name, a, double, device), 5), step)


@given(a=architectures(largest=4), x_when=WHEN, y_when=WHEN, frozen=WHEN, context_when=WHEN, data=st.data())
@settings(max_examples=8)
def test_gradients_equal_those_without_a_cache_whatever_requires_grad(
    name: str,
    device: str,
    a: Architecture,
    x_when: str,
    y_when: str,
    frozen: str,
    context_when: str,
    data: st.DataObject,
) -> None:
    """`x_when` etc. say whether a tensor requires a gradient before the first call, after it, or both."""
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
        calls = {
            "there": lambda: member(x),
            "back": lambda: member.inv(y),
            "log_det": lambda: member.log_abs_det_jacobian(x, y),
        }
        results = [calls[query]() for query in queries]
        loss = sum((result**3).sum() for result in results)
        assert isinstance(loss, Tensor)
        wanted = [leaf for leaf in [*leaves, y] if leaf.is_leaf and leaf.requires_grad]
        gradients = [torch.zeros_like(leaf) for leaf in wanted]
        if wanted and loss.requires_grad:
            gradients = list(torch.autograd.grad(loss, wanted, materialize_grads=True, allow_unused=True))
        # If y is still part of the graph of x, `inv` may return x itself, the same function of all leaves.
        exact = [
            result.requires_grad for result, query in zip(results, queries, strict=True) if y.is_leaf or query != "back"
        ]
        return [result.detach() for result in [*results, *gradients]], exact

    actual, expected = program(1), program(0)
    assert actual[1] == expected[1]
    for one, other in zip(actual[0], expected[0], strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-6 * float(1 + other.norm()))


@given(a=architectures(largest=4))
@few
def test_change_of_precision_leaves_nothing_stale(name: str, device: str, a: Architecture) -> None:
    flow = at_context(build(name, a, single, device), 5)
    x = points(flow, 5)
    y = flow(x)
    flow.double()
    assert torch.equal(flow.inv(y.double()), fresh(flow).inv(y.double()))
    flow.float()
    assert torch.equal(flow.inv(y), fresh(flow).inv(y))


@given(a=architectures(largest=4))
@few
def test_train_and_eval_mode_do_not_share_the_cache(name: str, device: str, a: Architecture) -> None:
    flow = at_context(build(name, a, double, device), 5).eval()
    x = points(flow, 5)
    y = flow(x)
    expected = fresh(flow).train().inv(y)
    flow.train()
    assert torch.allclose(flow.inv(y), expected, rtol=1e-9, atol=1e-9)


@given(a=architectures(largest=4))
@few
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
@few
def test_cache_keeps_no_tensor_alive(name: str, device: str, a: Architecture) -> None:
    flow = at_context(build(name, a, double, device), 5)
    laws.keeps_no_tensor_alive(flow)
    assert flow._cache._pair is None


# 6. Trains in the obvious loop


@pytest.mark.parametrize(
    "law", [laws.trains_on_one_batch, laws.scores_its_own_draws, laws.gives_two_losses_of_one_draw]
)
@given(a=architectures(largest=4))
@few
def test_trains_in_the_obvious_loop(name: str, device: str, a: Architecture, law: Callable[[Flow], None]) -> None:
    law(at_context(build(name, a, double, device), 8))


@given(a=architectures(largest=4))
@few
def test_runs_without_gradients_and_in_lower_precision_contexts(name: str, device: str, a: Architecture) -> None:
    laws.runs_in_every_mode(at_context(build(name, a, single, device, gain=0.5), 8))


# 7. Gradients


@given(a=architectures(largest=3), inverted=st.booleans())
@settings(max_examples=3)
def test_first_and_second_derivatives(name: str, device: str, a: Architecture, inverted: bool) -> None:
    if a.activation in ("relu", "leaky_relu", "elu"):
        a = replace(a, activation="tanh")  # finite differences need a smooth function
    a = replace(a, num_layers=min(2, a.num_layers), hidden_dims=[min(3, h) for h in a.hidden_dims[:2]])
    laws.has_derivatives(at_context(build(name, a, double, device, gain=0.5), 2), inverted)


# 8. A good module


@given(a=architectures())
@few
def test_copies_pickles_and_moves_through_a_state_dict(name: str, device: str, a: Architecture) -> None:
    flow = build(name, a, double, device)
    torch.manual_seed(a.seed + 1)
    other = REGISTRY[name](replace(a, seed=a.seed + 1)).to(device=device, dtype=double).eval()
    shapes = [{key: value.shape for key, value in module.state_dict().items()} for module in (flow, other)]
    laws.can_be_copied(flow, other if shapes[0] == shapes[1] else None)  # torch refuses other shapes


@given(a=architectures())
@few
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
@few
def test_inverse_is_a_module_with_the_same_parameters(name: str, device: str, a: Architecture) -> None:
    flow = at_context(build(name, a, double, device))
    assert flow.inv.inv is flow
    assert [id(p) for p in flow.inv.parameters()] == [id(p) for p in flow.parameters()]
    assert len(flow.inv.state_dict()) == len(flow.state_dict())
    moved = copy.deepcopy(flow.inv).float()
    assert all(p.dtype == single for p in moved.parameters())


# 9. Batches


@given(a=architectures(largest=5), batch=st.lists(st.integers(0, 3), max_size=3))
def test_any_batch_shape(name: str, device: str, a: Architecture, batch: list[int]) -> None:
    laws.takes_any_batch(at_context(build(name, a, double, device)), *batch)


@given(a=architectures(largest=5))
@few
def test_context_broadcasts(name: str, device: str, a: Architecture) -> None:
    laws.broadcasts_its_context(build(name, a, double, device))


@given(a=architectures(largest=4))
@settings(max_examples=5)
def test_vmap_and_jacrev(name: str, device: str, a: Architecture) -> None:
    laws.can_be_vectorised(at_context(build(name, a, double, device)))


# 10. Starts as the identity


@given(a=architectures())
@settings(max_examples=6)
def test_starts_as_the_identity(name: str, device: str, a: Architecture) -> None:
    torch.manual_seed(a.seed)
    flow = REGISTRY[name](a).to(device=device, dtype=double).eval()
    if any(isinstance(member, pyro_maf.transforms.Permute) for member in flow.modules()):
        return
    flow = at_context(flow)
    laws.starts_as_the_identity(flow)
    assert not any(isinstance(member, ActNorm) and member.initialized for member in flow.modules())


# Bad input


@given(a=architectures(largest=5))
@settings(max_examples=3)
def test_wrong_inputs_raise_clear_errors(name: str, device: str, a: Architecture) -> None:
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
