"""Densities under `torch.compile` and `torch.func`, in the parallel directions."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, stack_module_state, vmap

from pyro_maf import IAF, MAF, ConditionalMAF, RealNVP
from pyro_maf.transforms import Flow
from tests.fits import since_torch
from tests.test_pyro_conventions import TINY, double, normal, shaken

SHALLOW = {**TINY, "num_layers": 1}
every_flow = pytest.mark.parametrize("which", range(4), ids=["MAF", "RealNVP", "inverse of IAF", "ConditionalMAF"])


class Score(nn.Module):
    """Log-density of a flow with a standard normal base, without validation, which branches on data."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, y: Tensor) -> Tensor:
        base = normal(self.flow.input_dim, validate_args=False).to_event(1)
        return dist.TransformedDistribution(base, [self.flow], validate_args=False).log_prob(y)


def parallel_flows() -> list[Any]:
    """Flows whose density takes one parallel pass."""
    iaf = shaken(IAF(3, **SHALLOW)).inv
    at_a_context = shaken(ConditionalMAF(3, 2, **SHALLOW)).condition(torch.randn(2, dtype=double))
    return [shaken(MAF(3, **TINY)), shaken(RealNVP(3, **TINY)), iaf, at_a_context]


@since_torch(13)  # torch 2.7 does not trace a flow that creates its inverse
@every_flow
def test_compiles_in_one_graph_with_its_gradient(which: int) -> None:
    torch._dynamo.reset()
    score = Score(parallel_flows()[which])
    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")  # eager mode runs the first half
    tensors = list(score.parameters())
    for _ in range(2):
        y = torch.randn(5, 3, dtype=double, requires_grad=True)
        actual, expected = compiled(y), score(y)
        torch.testing.assert_close(actual, expected)
        slopes = (torch.autograd.grad(value.sum(), [y, *tensors]) for value in (actual, expected))
        torch.testing.assert_close(*slopes)
        with torch.no_grad():
            tensors[0].mul_(1.5)


@every_flow
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # from torch's forward mode
def test_derivatives_by_torch_func(which: int) -> None:
    """The score of each row and its Jacobian, and the gradient of each log-density with respect to the parameters."""
    score = Score(parallel_flows()[which])
    y = torch.randn(4, 3, dtype=double)
    rows = [row.clone().requires_grad_() for row in y]
    parameters = dict(score.named_parameters())
    slopes = torch.stack([torch.autograd.grad(score(row), row)[0] for row in rows])
    torch.testing.assert_close(vmap(grad(score))(y), slopes)
    bends = torch.stack([torch.autograd.functional.hessian(score, row) for row in rows])
    for second in (hessian(score), jacrev(grad(score)), jacfwd(grad(score))):
        torch.testing.assert_close(vmap(second)(y), bends)
    by_row = vmap(grad(lambda values, row: functional_call(score, values, (row,))), in_dims=(None, 0))(parameters, y)
    for index, row in enumerate(rows):
        expected = torch.autograd.grad(score(row), list(parameters.values()))
        torch.testing.assert_close([slope[index] for slope in by_row.values()], list(expected))


def test_an_ensemble_is_one_call() -> None:
    members = [Score(shaken(MAF(3, **TINY))) for _ in range(3)]
    y = torch.randn(4, 3, dtype=double)
    parameters, buffers = stack_module_state(members)
    found = vmap(lambda p, b: functional_call(members[0], (p, b), (y,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([member(y) for member in members]))
