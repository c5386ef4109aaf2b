"""The Triton kernels agree with the sweep in torch, on a CUDA device or interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_maf.nn import ACTIVATIONS, MADE
from pyro_maf.sweep.torch_engine.sweep import TorchSweep, plan_of
from pyro_maf.univariate import Affine

pytest.importorskip("triton", minversion="3.2", reason="Triton has wheels for Linux alone, and comes with torch")

COMPILES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pyro_maf.sweep.torch_engine import triton as triton_sweep
from pyro_maf.sweep.torch_engine.triton import TILES, _tiles

FLOATS = ["v", "weights", "biases", "w", "log_det", "tape", "before", "dw_dphi", "slopes", "delta", "total_w"]
KINDS = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(["starts", "levels", "final"], "*i32") | {"order": "*i64"}
CONSTANTS = dict(inverse=True, bound=3.0, bulk=3.0, kind=1, top=3, outputs_per_input=2)
for kernel in (triton_sweep.walk, triton_sweep.walk_back):
    constants = CONSTANTS | dict(zip(["tile", "rows", "few", "block"], _tiles(1)[1]))
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    kinds = {name: "constexpr" if name in constants else KINDS.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    triton.compile(ASTSource(kernel, kinds, places), target=GPUTarget("cuda", 90, 32))
"""


def engines(made: MADE, *, inverse: bool, context: Tensor | None = None) -> tuple[TorchSweep, TorchSweep]:
    """The engine in torch, in float64, and the kernels."""
    from pyro_maf.sweep.torch_engine.triton import TritonSweep

    direction = Affine().inverse if inverse else Affine().forward
    with torch.no_grad():
        plan = plan_of(made, context)
        exact = plan._replace(
            weights=tuple(weight.double() for weight in plan.weights), biases=tuple(b.double() for b in plan.biases)
        )
    return TorchSweep(exact, direction), TritonSweep(plan, direction, made, inverse)


def random_made(device: str, input_dim: int, **options: Any) -> MADE:
    torch.manual_seed(input_dim)
    made = MADE(input_dim, outputs_per_input=2, **options).to(device)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return made


def both_walks(engine: TorchSweep, v: Tensor, grad_w: Tensor, grad_log_det: Tensor) -> list[Tensor]:
    w, log_det, kept = engine.forward(v)
    grad_v, grad_weights, units, _ = engine.adjoint(v, w, kept, grad_w.clone(), grad_log_det)
    return [w, log_det, grad_v, *grad_weights, *units]


def check(made: MADE, points: int, *, inverse: bool, context: Tensor | None = None) -> None:
    exact, kernels = engines(made, inverse=inverse, context=context)
    device = made.layers[0].weight.device
    v, grad_w = 3 * torch.randn(2, points, made.input_dim, device=device)
    grad_log_det = torch.randn(points, device=device)
    with torch.no_grad():
        expected = both_walks(exact, v.double(), grad_w.double(), grad_log_det.double())
        results = both_walks(kernels, v, grad_w, grad_log_det)
    for result, want in zip(results, expected, strict=True):
        assert result.shape == want.shape
        assert float((result - want).norm()) <= 1e-6 * max(1.0, float(want.norm()))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_agrees_with_the_torch_sweep(device: str, activation: str, inverse: bool) -> None:
    made = random_made(device, 3, hidden_dims=[11, 4], activation=activation, order=[2, 0, 1])
    check(made, 3, inverse=inverse)


@pytest.mark.parametrize(
    ("input_dim", "hidden_dims"), [(1, [5]), (4, []), (7, [3]), (2, [3, 4, 5])], ids=["one", "linear", "narrow", "deep"]
)
def test_agrees_for_networks_of_every_shape(device: str, input_dim: int, hidden_dims: list[int]) -> None:
    check(random_made(device, input_dim, hidden_dims=hidden_dims), 5, inverse=True)


def test_agrees_at_a_context_of_each_point(device: str) -> None:
    made = random_made(device, 3, hidden_dims=[6], context_dim=2)
    check(made, 5, inverse=False, context=torch.randn(5, 2, device=device))
    check(made, 5, inverse=False, context=torch.randn(2, device=device))


@pytest.mark.parametrize("points", [0, 300])
def test_agrees_for_no_and_for_many_points(device: str, points: int) -> None:
    check(random_made(device, 1, hidden_dims=[3]), points, inverse=True)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy warns of 0 * infinity
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_stay_in_their_row(device: str, bad: float) -> None:
    made = random_made(device, 3, hidden_dims=[6])
    exact, kernels = engines(made, inverse=True)
    v = torch.randn(4, 3, device=device)
    v[1, 0] = bad
    with torch.no_grad():
        (want, want_log_det, _), (w, log_det, _) = exact.forward(v.double()), kernels.forward(v)
    for result, expected in ((w, want), (log_det, want_log_det)):
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.allclose(result.double(), expected, rtol=1e-5, equal_nan=True)


def test_kernels_compile_without_a_device() -> None:
    """The compiler refuses code that the interpreter accepts, such as a name with two shapes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
