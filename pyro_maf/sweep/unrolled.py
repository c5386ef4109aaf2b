"""D plain passes over the network: slow, but made of ordinary differentiable operations.

It answers where the sweep cannot: double backward, `torch.func`, `vmap` and tracing. Cost: D dense passes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_maf.nn import compress_tails
from pyro_maf.sweep.plan import Plan, ScalarMap

__all__ = ["unrolled"]


def unrolled(plan: Plan, scalar_map: ScalarMap, v: Tensor) -> tuple[Tensor, Tensor]:
    """Solve w_i = f(v_i; phi_i(w_<i)) for v (D, batch); returns w and the log-derivatives, each (D, batch)."""
    w: list[Tensor] = []
    logs: list[Tensor] = []
    for i in range(plan.dim):
        known = torch.stack([*map(compress_tails, w), *[torch.zeros_like(v[0])] * (plan.dim - i)])
        parameters = _network(plan, known).unflatten(0, (plan.dim, plan.num_parameters))[i]
        value, log_derivative = scalar_map(v[i], *parameters)
        w.append(value)
        logs.append(log_derivative)
    return torch.stack(w), torch.stack(logs)


def _network(plan: Plan, x: Tensor) -> Tensor:
    identity: Callable[[Tensor], Tensor] = lambda value: value  # noqa: E731
    activations = [*[plan.activation] * (len(plan.weights) - 1), identity]
    for weight, bias, activation in zip(plan.weights, plan.biases, activations, strict=True):
        x = activation(weight @ x + bias)
    return x
