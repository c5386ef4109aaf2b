"""Caches are never stale, however weights change: in place, in inference mode, by threads or processes."""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.utils.parametrize as parametrize
from pyro import distributions as dist
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

from pyro_maf import IAF, MAF, ConditionalMAF, FlowPrior, RealNVP
from pyro_maf._core.torch_state import Snapshot
from pyro_maf.transforms import Flow, LowerTriangularAffine, Permute, Stack
from pyro_maf.transforms.cache import Cache
from pyro_maf.transforms.triangular import Head

STACKS = [MAF, IAF, RealNVP]
every_stack = pytest.mark.parametrize("make", STACKS)


def stack(make: Callable[..., Flow] = MAF, seed: int = 0) -> Flow:
    torch.manual_seed(seed)
    return altered(make(4, num_layers=2, hidden_dims=[8, 8]))


@torch.no_grad()
def altered(flow: Flow) -> Flow:
    for parameter in flow.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return flow


def results(flow: Flow, x: Tensor) -> list[Tensor]:
    return [flow(x), flow.inv(x), flow.log_abs_det_jacobian(x, x)]


def assert_fresh(flow: Flow, x: Tensor) -> None:
    fresh = copy.deepcopy(flow).with_cache(0)
    assert all(map(torch.allclose, results(flow, x), results(fresh, x)))


# Weights


@every_stack
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_perturbed_scored_and_restored(make: Callable[..., Flow], seed: int) -> None:
    """As in evolution strategies and Laplace approximations, where new weights reuse the memory of old ones."""
    flow, x = stack(make, seed), torch.randn(9, 4)
    start = parameters_to_vector(flow.parameters()).clone()
    for _ in range(30):
        vector_to_parameters(start + 0.1 * torch.randn_like(start), flow.parameters())
        assert_fresh(flow, x)
        vector_to_parameters(start, flow.parameters())
    rows = start + 0.1 * torch.randn(3, len(start))
    for row in (0, 1, 2, 1):  # which share memory
        vector_to_parameters(rows[row], flow.parameters())
        assert_fresh(flow, x)


def _assign(flow: Flow, change: Callable[[Tensor], Tensor]) -> None:
    for parameter in flow.parameters():
        parameter.data = change(parameter.data)


def _swap(flow: Flow) -> None:
    for module in flow.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                torch.utils.swap_tensors(module._parameters[name], nn.Parameter(parameter.detach() + 0.1))


def _average(flow: Flow) -> None:
    average = AveragedModel(flow)
    average.update_parameters(flow)
    x = torch.randn(9, 4)
    results(average.module, x)
    average.update_parameters(altered(copy.deepcopy(flow)))
    assert_fresh(average.module, x)


def _other_state(flow: Flow) -> dict[str, Tensor]:
    state = flow.state_dict()
    return {key: value + 0.1 if value.is_floating_point() else value.clone() for key, value in state.items()}


def _empty(flow: Flow) -> None:
    state = _other_state(flow)
    flow.to_empty(device="cpu").load_state_dict(state)


def _reload(flow: Flow, **options: Any) -> None:
    flow.load_state_dict(_other_state(flow), **options)


def _reload_from_meta(flow: Flow) -> None:
    state = _other_state(flow)
    flow.to("meta").load_state_dict(state, assign=True)


def _reload_swapped(flow: Flow) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        _reload(flow)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CHANGES: list[Callable[[Flow], Any]] = [
    altered,
    _swap,
    _average,
    _empty,
    _reload,
    lambda flow: _reload(flow, assign=True),
    _reload_from_meta,
    _reload_swapped,
    lambda flow: _assign(flow, lambda data: data + 0.1),
    lambda flow: _assign(flow, lambda data: data.flip(0).clone()),
    lambda flow: torch._foreach_add_([p.detach() for p in flow.parameters()], 0.1),
    lambda flow: [p.detach().set_(p.detach() + 0.1) for p in flow.parameters()],
    lambda flow: [p.detach().untyped_storage().resize_(4 * p.numel()) for p in flow.parameters()],
    lambda flow: flow.double().float(),
    lambda flow: altered(flow.share_memory()),
]


@every_stack
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_every_way_to_change_the_weights_is_noticed(make: Callable[..., Flow], change: Callable[[Flow], Any]) -> None:
    flow, x = stack(make), torch.randn(9, 4)
    y = flow(x)
    log_det = flow.log_abs_det_jacobian(x, y)
    change(flow)
    fresh = copy.deepcopy(flow).with_cache(0)
    assert torch.allclose(flow.inv(y), fresh.inv(y), atol=1e-6)
    assert torch.allclose(flow.log_abs_det_jacobian(x, y), fresh.log_abs_det_jacobian(x, y), atol=1e-6)
    assert log_det.shape == (9,)
    assert_fresh(flow, x)


@pytest.mark.parametrize(
    "make", [MAF, RealNVP, lambda d: Stack([Permute(range(d)[::-1]), LowerTriangularAffine(d), Head(d)])]
)
def test_a_state_that_is_loaded_in_inference_mode_is_trained_further(make: Callable[[int], Flow]) -> None:
    flow, x = make(25), torch.randn(9, 25, requires_grad=True)
    with torch.inference_mode():
        flow.load_state_dict(_other_state(flow))
    for direction in (flow, flow.inv):
        direction(x).sum().backward()
        torch.func.vmap(direction)(x).sum().backward()


def test_a_prior_with_tails_that_is_loaded_in_inference_mode_has_gradients() -> None:
    prior = FlowPrior(MAF(2), tails=torch.full((2, 2), 0.3))
    with torch.inference_mode():
        prior.load_state_dict(prior.state_dict())
    y = torch.randn(3, 2, requires_grad=True)
    prior.log_prob(y).sum().backward()
    torch.func.vmap(prior.log_prob)(y).sum().backward()


@every_stack
@torch.no_grad()
def test_weights_replaced_for_one_call_are_used_there_only(make: Callable[..., Flow]) -> None:
    flow, x = stack(make), torch.randn(9, 4)
    own = dict(flow.named_parameters())
    lent = {name: value + 0.1 for name, value in own.items()}
    other = copy.deepcopy(flow)
    other.load_state_dict(lent, strict=False)
    y = flow(x)
    assert torch.allclose(functional_call(flow, lent, (x,)), other(x))
    assert torch.allclose(flow.inv(y), copy.deepcopy(flow).inv(y))
    assert torch.allclose(functional_call(flow, lent, (x,)), other(x))


@every_stack
@pytest.mark.parametrize("end", ["x", "y"])
@torch.no_grad()
def test_new_data_of_a_cached_tensor_is_noticed(make: Callable[..., Flow], end: str) -> None:
    flow, x = stack(make), torch.randn(9, 4)
    y = flow(x)
    changed = x if end == "x" else y
    for _ in range(5):
        changed.data = changed + 0.5
    fresh = copy.deepcopy(flow).with_cache(0)
    assert torch.allclose(flow.inv(y), fresh.inv(y))
    assert torch.allclose(flow.log_abs_det_jacobian(x, y), fresh.log_abs_det_jacobian(x, y))
    assert torch.allclose(flow(x), fresh(x))


@every_stack
@torch.no_grad()
def test_weights_that_are_no_parameters(make: Callable[..., Flow]) -> None:
    """As of a hypernetwork, and of a network whose weights have a prior."""
    flow, x = stack(make), torch.randn(9, 4)
    layers = [member for member in flow.modules() if isinstance(member, nn.Linear)]
    for layer in layers:
        weight = layer.weight.detach()
        del layer.weight
        layer.weight = weight  # type: ignore[assignment]
    y = flow(x)
    assert flow.inv(y) is x
    for layer in layers:
        layer.weight = layer.weight + 0.1  # type: ignore[assignment]
    fresh = copy.deepcopy(flow).with_cache(0)
    assert torch.allclose(flow.inv(y), fresh.inv(y), atol=1e-6)
    assert_fresh(flow, x)
    y = flow(x)
    for layer in layers:
        to_pyro_module_(layer)
        layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand(layer.weight.shape).to_event(2))  # type: ignore[assignment]
    for _ in range(2):
        assert not torch.allclose(flow.inv(y), x, atol=1e-3)
        y = flow(x)


@torch.no_grad()
def test_a_mask_is_a_weight() -> None:
    flow, x = stack(), torch.randn(9, 4)
    flow(x)
    flow[0].made.layers[1].mask.mul_(torch.rand(8, 8) < 0.5)
    assert_fresh(flow, x)


@torch.no_grad()
def test_memory_of_weights_that_are_gone_is_free() -> None:
    flow, x = stack(), torch.randn(9, 4)
    y = flow(x)
    lain_in = [weakref.ref(parameter.untyped_storage()) for parameter in flow.parameters()]
    assert all(ref() is not None for ref in lain_in)
    flow.double()
    assert [ref() for ref in lain_in if ref() is not None] == []
    flow.float()
    lain_in = [weakref.ref(parameter.untyped_storage()) for parameter in flow.parameters()]
    y = flow(x)
    _assign(flow, torch.clone)
    flow(x)
    assert [ref() for ref in lain_in if ref() is not None] == []
    assert y.shape == x.shape


@every_stack
@torch.no_grad()
def test_a_prior_lets_go_with_its_flow(make: Callable[..., Flow]) -> None:
    prior = FlowPrior(stack(make))
    y = prior.sample((9,))
    prior.log_prob(y)
    for parameter in prior.parameters():
        parameter.data += 0.1
    prior.model.clear_cache()  # type: ignore[union-attr,operator]
    assert torch.allclose(prior.log_prob(y), copy.deepcopy(prior).log_prob(y), atol=1e-5)
    lain_in = [weakref.ref(parameter.untyped_storage()) for parameter in prior.parameters()]
    prior.double()
    assert [ref() for ref in lain_in if ref() is not None] == []


# Memory that others write to


@every_stack
@torch.no_grad()
def test_shared_weights_are_never_taken_for_unchanged(make: Callable[..., Flow]) -> None:
    flow, x = stack(make).share_memory(), torch.randn(9, 4)
    y = flow(x)
    for parameter in flow.parameters():
        parameter.numpy()[...] += 0.1  # does not increase the version, like writes of another process
    fresh = copy.deepcopy(flow)
    assert torch.allclose(flow.inv(y), fresh.inv(y))
    assert_fresh(flow, x)


def _alter_shared(flow: Flow) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1)


@torch.no_grad()
def test_another_process_changes_the_weights() -> None:
    flow, x = stack().share_memory(), torch.randn(9, 4)
    before = flow.inv(x)
    process = mp.get_context("fork").Process(target=_alter_shared, args=(flow,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert not torch.allclose(flow.inv(x), before)
    assert_fresh(flow, x)


def test_tensors_without_version_counters_have_no_snapshot() -> None:
    with torch.inference_mode():
        uncounted = torch.zeros(3)
    for tensor in (uncounted, torch.zeros(3).share_memory_(), torch.eye(3).to_sparse()):
        assert Snapshot.of([torch.zeros(2), tensor]) is None
    assert not Snapshot.of([torch.zeros(3)]).holds_for([uncounted])  # type: ignore[union-attr]


# Inference mode


@contextmanager
def inside(yes: bool) -> Iterator[None]:
    with torch.inference_mode(yes), torch.no_grad():
        yield


@pytest.mark.parametrize("computed", [False, True])
@every_stack
def test_inference_mode_on_any_side(make: Callable[..., Flow], computed: bool) -> None:
    places = [(flow_in, x_in, used_in) for flow_in in (0, 1) for x_in in (0, 1) for used_in in (0, 1)]
    for flow_in, x_in, used_in in places:
        with inside(bool(flow_in)):
            flow = stack(make)
            if computed:
                for layer in [member for member in flow.modules() if isinstance(member, nn.Linear)]:
                    parametrize.register_parametrization(layer, "weight", nn.Identity())
        with inside(bool(x_in)):
            x = torch.linspace(-1, 1, 36).reshape(9, 4)
        with inside(bool(used_in)):
            expected = results(stack(make), x.clone())
            for _ in range(2):
                actual = results(flow, x)
                assert all(map(torch.allclose, actual, expected))
                y = flow(x)
                assert torch.allclose(flow.inv(y), x, atol=1e-5)
                x = x.clone()
        with torch.no_grad():
            assert torch.allclose(flow.inv(y), x, atol=1e-5)  # what was computed there, here


@pytest.mark.parametrize("used_in", [0, 1])
def test_priors_and_contexts_of_inference_mode(used_in: int) -> None:
    with torch.inference_mode():
        context, prior = torch.zeros(2), FlowPrior(IAF(3, num_layers=1))
        permuted = Permute([1, 0])
    with inside(bool(used_in)):
        assert prior.log_prob(prior.sample((5,))).isfinite().all()
        at = ConditionalMAF(3, 2, num_layers=1).condition(context)
        y = at(torch.zeros(5, 3))
        assert torch.equal(at.inv(y), torch.zeros(5, 3))
        assert permuted.inv(permuted(torch.ones(5, 2))).shape == (5, 2)


def test_with_a_gradient_the_error_is_that_of_torch() -> None:
    with torch.inference_mode():
        flow = stack()
        prior = FlowPrior(flow)
    for call in (lambda: flow(torch.zeros(9, 4)), lambda: prior.log_prob(torch.zeros(9, 4)), prior.rsample):
        with pytest.raises(RuntimeError, match=r"inference mode.*Inference tensors cannot be saved for backward"):
            call()
    assert flow.requires_grad_(False).inv(torch.zeros(9, 4)).isfinite().all()


# Gradients


@every_stack
def test_a_score_of_what_a_frozen_flow_drew_has_its_gradient(make: Callable[..., Flow]) -> None:
    prior = FlowPrior(stack(make)).requires_grad_(False)
    y = prior.rsample((3,)).requires_grad_()
    (actual,) = torch.autograd.grad(prior.log_prob(y).sum() + (y**2).sum(), y)
    (expected,) = torch.autograd.grad(copy.deepcopy(prior).log_prob(y).sum() + (y**2).sum(), y)
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


@every_stack
def test_who_asks_for_the_gradient_of_a_draw_gets_all_of_it(make: Callable[..., Flow]) -> None:
    flow, x = stack(make), torch.randn(9, 4)
    gradients: list[Tensor] = []
    for member in (flow, flow.with_cache(0)):
        for hooked in (False, True):
            y = member(x)
            if hooked:
                y.register_hook(gradients.append)
            y.retain_grad()
            ((member.inv(y) ** 3).sum() + member.log_abs_det_jacobian(x, y).sum()).backward()
            assert y.grad is not None
            gradients.append(y.grad)
    assert len(gradients) == 6
    assert all(torch.allclose(gradient, gradients[-1], rtol=1e-4, atol=1e-5) for gradient in gradients)


def test_nothing_with_a_gradient_comes_out_of_no_grad() -> None:
    flow, x = stack(), torch.randn(9, 4, requires_grad=True)
    with torch.no_grad():
        assert not flow.inv(flow(x)).requires_grad


# Threads


def test_threads_that_share_a_flow_find_no_entry_of_another() -> None:
    prior = FlowPrior(IAF(4, num_layers=2, hidden_dims=[8])).requires_grad_(False)
    altered(prior.model)  # type: ignore[arg-type]
    plain = FlowPrior(prior.model.with_cache(0), loc=prior.loc, scale=prior.scale)  # type: ignore[union-attr]
    errors: list[str] = []

    @torch.no_grad()
    def draw_and_score() -> None:
        for _ in range(60):
            try:
                y = prior.sample((5,))
                if not torch.allclose(prior.log_prob(y), plain.log_prob(y.clone()), atol=1e-4):
                    errors.append("another density")
            except (AttributeError, TypeError, RuntimeError) as error:
                errors.append(repr(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=draw_and_score) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []


def test_an_entry_that_another_thread_drops_midway(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, x = stack(), torch.randn(9, 4)
    y = flow(x)

    def dropped_meanwhile(*_: object) -> None:
        flow._cache.clear()

    monkeypatch.setattr(Cache, "_holds", dropped_meanwhile)
    fresh = copy.deepcopy(flow).with_cache(0)
    assert torch.allclose(flow.log_abs_det_jacobian(x, y), fresh.log_abs_det_jacobian(x, y))
    y = flow(x)
    assert torch.allclose(flow.inv(y), fresh.inv(y))
