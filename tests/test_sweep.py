"""The sweep: kernels, torch and D network passes agree, including where one of them is not available."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_maf import MAF
from pyro_maf.nn import compress_tails
from pyro_maf.sweep import function, threads
from pyro_maf.sweep.kernels import kernels
from pyro_maf.testing.subjects import at_context
from pyro_maf.transforms import ConditionalMaskedAutoregressive, Flow
from tests.registry import Architecture, architectures, build

LAYERS = (
    "MaskedAutoregressive",
    "InverseAutoregressive",
    "ConditionalMaskedAutoregressive",
    "ConditionalInverseAutoregressive",
)
SPLINES = ("MaskedAutoregressive spline", "InverseAutoregressive spline", "MaskedAutoregressive of rank 3")
Run = Callable[..., tuple[str, str]]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
needs_kernels = pytest.mark.skipif(kernels() is None, reason="no compiled kernels on this machine")


@contextmanager
def in_torch() -> Iterator[None]:
    """Disable the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, "kernels", lambda: None)
        yield


def slow_direction(flow: Flow) -> Any:
    """The sequential direction and its log-determinant."""
    return flow.forward_and_log_det if flow.fast == "inverse" else flow.inverse_and_log_det


def fast_direction(flow: Flow) -> Any:
    """The parallel direction."""
    return flow.inverse_and_log_det if flow.fast == "inverse" else flow.forward_and_log_det


every_direction = pytest.mark.parametrize("direction", [slow_direction, fast_direction])


def naive(flow: Any, v: Tensor) -> Tensor:
    """The sequential direction by D passes of the whole network."""
    layer, context = getattr(flow, "flow", flow), getattr(flow, "context", None)
    direction = layer.univariate.forward if layer.fast == "inverse" else layer.univariate.inverse
    w = torch.zeros_like(v)
    for i in layer.order:
        w[..., i] = direction(v, layer.made(w, context))[0][..., i]
    return w


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    """Largest distance between rows, relative to their length if that exceeds 1."""
    if not wanted.numel():
        return 0.0
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1)).max())


@needs_kernels
@every_direction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
@given(a=architectures(), points=st.sampled_from([1, 7, 8, 150]), scale=st.sampled_from([1.0, 50.0]))
def test_kernels_agree_with_torch(
    name: str, dtype: torch.dtype, direction: Any, a: Architecture, points: int, scale: float
) -> None:
    flow = at_context(build(name, a, dtype, "cpu", gain=0.5), points)
    v = scale * torch.randn(points, a.input_dim, dtype=dtype)
    with torch.no_grad():
        w, log_det = direction(flow)(v)
        with in_torch():
            expected, wanted_log_det = direction(flow)(v)
    kept, kept_log_det = direction(flow)(v)
    for one, log in ((w, log_det), (kept.detach(), kept_log_det.detach())):
        assert largest_difference(one, expected) < TOLERANCE[dtype]
        # The log-scale of each variable is rounded separately.
        assert largest_difference(log[:, None], wanted_log_det[:, None]) < a.input_dim * TOLERANCE[dtype]


@pytest.mark.parametrize("name", [*LAYERS, *SPLINES])
@given(a=architectures(largest=6))
def test_torch_agrees_with_d_plain_passes(name: str, a: Architecture) -> None:
    flow = at_context(build(name, a, torch.float64, "cpu"), 9)
    v = torch.randn(9, a.input_dim, dtype=torch.float64)
    with torch.no_grad(), in_torch():
        assert largest_difference(slow_direction(flow)(v)[0], naive(flow, v)) < 1e-12


@needs_kernels
@every_direction
@pytest.mark.parametrize("order", ["reverse", "random"])
def test_networks_of_many_units_agree_with_torch(order: str, direction: Any) -> None:
    """Enough units that products and derivatives are computed in blocks."""
    flow = build("MaskedAutoregressive", Architecture(7, 1, 1, [270, 530], "tanh", order, 0), torch.float64, "cpu", 0.5)
    v = torch.randn(40, 7, dtype=torch.float64, requires_grad=True)

    def results() -> list[Tensor]:
        with torch.no_grad():
            known = direction(flow)(v)
        w, log_det = direction(flow)(v)
        loss = w.sin().sum() + log_det.square().sum()
        return [*known, w.detach(), *torch.autograd.grad(loss, [v, *flow.parameters()])]

    actual = results()
    with in_torch():
        expected = results()
    for one, other in zip(actual, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9 * float(1 + other.norm()))


@needs_kernels
@pytest.mark.parametrize("points", [3, 30])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_pass_through(bad: float, points: int) -> None:
    a = Architecture(5, 1, 1, [16, 16], "relu", "random", 0)
    flow = build("MaskedAutoregressive", a, torch.float32, "cpu")
    v = torch.randn(points, 5)
    v[1, flow.order[1]] = bad
    with torch.no_grad():
        w = flow.forward_and_log_det(v)[0]
        with in_torch():
            expected = flow.forward_and_log_det(v)[0]
    assert not torch.isfinite(w[1]).all()
    assert torch.allclose(w, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    rest = [row for row in range(points) if row != 1]
    assert torch.isfinite(w[rest]).all()


@needs_kernels
def test_a_pack_is_never_stale() -> None:
    flow = build("MAF", Architecture(4, 1, 2, [8], "tanh", "reverse", 0), torch.float64, "cpu")
    x = torch.randn(20, 4, dtype=torch.float64)

    def assert_fresh() -> None:
        with torch.no_grad():
            assert torch.equal(flow(x), copy.deepcopy(flow)(x))

    assert_fresh()
    for fused in (False, True):
        optimizer = torch.optim.Adam(flow.parameters(), 0.1, fused=fused)
        flow.inv(x).square().sum().backward()
        optimizer.step()
        assert_fresh()
    flow.load_state_dict({key: value + 0.1 * value.is_floating_point() for key, value in flow.state_dict().items()})
    assert_fresh()
    with torch.no_grad():
        flow[0].made.layers[0].weight.mul_(0.5)
    assert_fresh()
    flow[1].made.layers[0].bias = torch.nn.Parameter(torch.ones(8, dtype=torch.float64))
    assert_fresh()
    flow[0].made.layers[1].weight.data.add_(0.3)
    flow.clear_cache()
    assert_fresh()
    flow.float().double()
    assert_fresh()


@needs_kernels
def test_a_weight_computed_from_others_is_never_stale() -> None:
    flow = build("MaskedAutoregressive", Architecture(4, 1, 1, [8], "tanh", "reverse", 0), torch.float64, "cpu")
    torch.nn.utils.parametrizations.weight_norm(flow.made.layers[0])
    x = torch.randn(20, 4, dtype=torch.float64)
    for _ in range(2):
        for context in (torch.enable_grad, torch.no_grad):
            with context():
                found = flow.forward_and_log_det(x)[0]
                with in_torch():
                    assert torch.allclose(found, flow.forward_and_log_det(x)[0], rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            flow.made.layers[0].parametrizations.weight.original0.mul_(0.5)


@needs_kernels
@settings(max_examples=5)
@given(parts=st.integers(2, 5), points=st.integers(1, 400))
def test_points_are_divided_among_threads(parts: int, points: int) -> None:
    a = Architecture(5, 1, 1, [16, 16], "silu", "random", 0)
    flow = build("MaskedAutoregressive", a, torch.float64, "cpu")
    v = torch.randn(points, 5, dtype=torch.float64, requires_grad=True)

    def results() -> list[Tensor]:
        w, log_det = flow.forward_and_log_det(v)
        return [w.detach(), log_det.detach(), *torch.autograd.grad((w.sum() + log_det).sum(), [v, *flow.parameters()])]

    expected = results()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "LEAST_WORK", 1)
        patch.setattr(torch, "get_num_threads", lambda: parts)
        actual = results()
    for one, other in zip(actual, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@needs_kernels
def test_several_callers_at_once() -> None:
    flow = build("MAF", Architecture(6, 1, 2, [32, 32], "relu", "reverse", 0), torch.float64, "cpu")
    batches = [torch.randn(50 + 10 * index, 6, dtype=torch.float64) for index in range(6)]
    with torch.no_grad():
        expected = [flow.forward_and_log_det(x)[0] for x in batches]
    actual: list[Any] = [None] * len(batches)

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                actual[index] = flow.forward_and_log_det(batches[index])[0]

    callers = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("parallel", [True, False])
def test_blocks_are_divided_among_available_threads(
    alone: bool, parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "LEAST_WORK", 1)
    if not parallel:
        monkeypatch.setattr(threads, "_parallel", lambda: None)
    before = torch.get_num_threads()
    takers: set[int] = set()
    both = threading.Barrier(2, timeout=20)

    def part(first: int, end: int) -> tuple[int, int]:
        both.wait()
        takers.add(threading.get_ident())
        return first, end

    def interrupted(first: int, end: int) -> None:
        if end == 10:
            raise KeyboardInterrupt

    torch.set_num_threads(2)
    try:
        with threads.OneThread() if alone else nullcontext():
            assert threads.in_parts(part, 10, 1, 1) == [(0, 5), (5, 10)]
            with pytest.raises(KeyboardInterrupt):
                threads.in_parts(interrupted, 10, 1, 1)
    finally:
        torch.set_num_threads(before)
    assert len(takers) == 2


FORKED = """
import os, torch
from pyro_maf import MAF
from pyro_maf.sweep import threads

def walk():
    with torch.no_grad():
        MAF(3)(torch.randn(500, 3))

threads.LEAST_WORK = 1
torch.set_num_threads(2)
walk()
if not (child := os.fork()):
    walk()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
FORKED_BEFORE = """
import multiprocessing, torch

def walk():
    from pyro_maf import MAF
    from pyro_maf.sweep import threads
    threads.LEAST_WORK = 1
    with torch.no_grad():
        MAF(3)(torch.randn(500, 3))

torch.set_num_threads(2)
torch.randn(1_000_000).exp()
child = multiprocessing.get_context("fork").Process(target=walk)
child.start()
child.join()
print(child.exitcode)
"""


FORKS = """
import json, os, sys, traceback, pyro, torch
for line in sys.stdin:
    code, environment, *paths = json.loads(line)
    if not (child := os.fork()):
        os.environ.update(environment)
        for stream, path in enumerate(paths, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    print(flush=True)
"""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[subprocess.Popen[str]]:
    """An interpreter with torch and pyro imported, which runs code in forks of itself: they need not import these."""
    threads_are_meant = "ignore:This process:DeprecationWarning"  # of Python from 3.12 on, at a fork with threads
    command = [sys.executable, "-W", threads_are_meant, "-c", FORKS]
    environment = {**os.environ, "PYRO_MAF_KERNEL": ""}
    pipe, root = subprocess.PIPE, Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        yield process


@pytest.fixture
def run(interpreter: subprocess.Popen[str], tmp_path: Path) -> Run:
    """Output and messages of code in an interpreter that has not imported this package."""
    paths = tmp_path / "stdout", tmp_path / "stderr"

    def answer(code: str, **environment: str) -> tuple[str, str]:
        assert interpreter.stdin is not None
        assert interpreter.stdout is not None
        print(json.dumps([code, environment, *map(str, paths)]), file=interpreter.stdin, flush=True)
        interpreter.stdout.readline()
        out, err = (path.read_text() for path in paths)
        return out, err

    return answer


@pytest.mark.parametrize(("code", "printed"), [(FORKED, "7"), (FORKED_BEFORE, "0")])
def test_a_forked_process_has_threads_of_its_own(code: str, printed: str, run: Run) -> None:
    assert run(code) == (f"{printed}\n", "")


SAMPLE = "import sys, torch, pyro_maf\nwith torch.no_grad(): pyro_maf.MAF(2, hidden_dims=[4])(torch.zeros(3, 2))\n"
HAS_NUMBA = "print('numba' in sys.modules)"


def test_the_environment_can_ask_for_torch(run: Run) -> None:
    out, messages = run(SAMPLE + HAS_NUMBA, PYRO_MAF_KERNEL="torch")
    assert out.strip() == "False"
    assert messages == ""


def test_without_numba_torch_is_used_with_one_warning(run: Run) -> None:
    hidden = "import sys; sys.modules['numba'] = None\n"
    _, messages = run(hidden + SAMPLE + "with torch.no_grad(): pyro_maf.MAF(2)(torch.zeros(3, 2))")
    assert messages.count("RuntimeWarning") == 1
    assert "slower" in messages


def test_without_a_folder_for_compiled_code_torch_is_used_with_one_warning(run: Run) -> None:
    unwritable = (
        "from numba.core import caching\n"
        "for locator in (caching.CacheImpl._locator_classes):\n"
        "    locator.from_function = classmethod(lambda cls, function, path: None)\n"
    )
    _, messages = run(unwritable + SAMPLE)
    assert messages.count("RuntimeWarning") == 1
    assert "cannot be compiled" in messages


def test_without_compilation_torch_is_used_with_one_warning(run: Run) -> None:
    _, messages = run(SAMPLE, NUMBA_DISABLE_JIT="1")
    assert messages.count("RuntimeWarning") == 1
    assert "cannot be compiled" in messages


def test_memory_does_not_grow_with_the_dimension() -> None:
    """The graph of a sweep stores one set of activations, whatever the number of variables."""
    sizes = {}
    for dim in (4, 32):
        flow = MAF(dim, num_layers=1, hidden_dims=[64, 64]).double()
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            flow(torch.randn(2000, dim, dtype=torch.float64))
        sizes[dim] = sum(kept.values())
    rows = {dim: 2 * (dim + 128 + 2 * dim) + 2 * dim for dim in sizes}
    assert sizes[32] / sizes[4] < 1.2 * rows[32] / rows[4]


def test_a_sweep_sees_the_network_as_the_parallel_direction_does() -> None:
    layer = ConditionalMaskedAutoregressive(3, 2, hidden_dims=[8]).double()
    torch.nn.init.normal_(layer.flow.made.last_layer.weight)
    context = torch.randn(2, dtype=torch.float64)
    v = 10 * torch.randn(40, 3, dtype=torch.float64)
    flow = layer.condition(context)
    with torch.no_grad():
        w = flow.forward_and_log_det(v)[0]
        parameters = layer.flow.made(w, context)
        assert not torch.equal(compress_tails(w), w)
        assert torch.allclose(layer.flow.univariate.forward(v, parameters)[0], w, rtol=1e-12, atol=1e-12)


@every_direction
@pytest.mark.parametrize("name", LAYERS)
@given(a=architectures(largest=6), frozen=st.sampled_from(["none", "weights", "all but one", "inputs"]))
def test_compiled_layers_agree_with_plain_operations(name: str, direction: Any, a: Architecture, frozen: str) -> None:
    flow = build(name, a, torch.float64, "cpu", gain=0.5)
    layer = getattr(flow, "flow", flow)
    parameters = list(layer.parameters())
    for parameter in parameters[1 if frozen == "all but one" else 0 :]:
        parameter.requires_grad_(frozen in ("none", "inputs"))
    v = (3 * torch.randn(2, 4, a.input_dim, dtype=torch.float64)).requires_grad_(frozen != "inputs")
    context = torch.randn(4, a.context_dim, dtype=torch.float64, requires_grad=frozen != "inputs")
    expected = [tensor for tensor in (v, context, *parameters) if tensor.requires_grad]

    def results() -> tuple[Tensor, Tensor]:
        return direction(layer)(v, context if layer.context_dim else None)  # type: ignore[no-any-return]

    def derivatives() -> list[Tensor]:
        w, log_det = results()
        loss = w.sin().sum() + log_det.square().sum()
        first = torch.autograd.grad(loss, expected, create_graph=True, materialize_grads=True, allow_unused=True)
        slope = sum(one.square().sum() for one in first)
        second = torch.autograd.grad(slope, expected, materialize_grads=True, allow_unused=True)
        once = torch.autograd.grad(results()[0].sin().sum(), expected, materialize_grads=True, allow_unused=True)
        return [w, log_det, *first, *second, *once]

    with in_torch():
        plain = derivatives()
    actual = derivatives()
    assert "_Layers" in str([node for node, _ in results()[1].grad_fn.next_functions] + [results()[1].grad_fn])
    for one, other in zip(actual, plain, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-8 * float(1 + other.detach().norm()))
