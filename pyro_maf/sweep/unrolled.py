"""D plain passes over the network: slow, but made of ordinary differentiable operations.

It answers where the sweep cannot: double backward, `torch.func`, `vmap` and tracing. Cost: D dense passes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_maf.nn import compress_tails
from pyro_maf.sweep.plan import Direction, Plan

__all__ = ["unrolled"]


def unrolled(plan: Plan, direction: Direction, v: Tensor) -> tuple[Tensor, Tensor]:
    """Solve w_i = f(v_i; phi_i(w_<i)) for v (batch, D); returns w and the sum of its logs, (batch,)."""
    given = v[:, plan.order].T
    w: list[Tensor] = []
    log_det = torch.zeros_like(given[0])
    for i in range(plan.dim):
        known = torch.stack([*map(compress_tails, w), *[torch.zeros_like(given[0])] * (plan.dim - i)])
        parameters = _network(plan, known).unflatten(0, (plan.dim, plan.num_parameters))[i]
        value, log_derivative = direction(given[i], *parameters)
        w.append(value)
        log_det = log_det + log_derivative
    return torch.stack(w, 1)[:, plan.order.argsort()], log_det


def _network(plan: Plan, x: Tensor) -> Tensor:
    identity: Callable[[Tensor], Tensor] = lambda value: value  # noqa: E731
    activations = [*[plan.activation] * (len(plan.weights) - 1), identity]
    for weight, bias, activation in zip(plan.weights, plan.biases, activations, strict=True):
        x = activation(weight @ x + bias)
    return x
