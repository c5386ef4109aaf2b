"""Activations in place, and their derivatives in one operation each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_maf.nn import ACTIVATIONS

__all__ = ["activate", "differentiate"]

_aten: Any = torch.ops.aten

IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
    "elu": lambda z: F.elu(z, inplace=True),
    "leaky_relu": lambda z: F.leaky_relu(z, inplace=True),
}
"""Activations whose derivative follows from their value, so that the pre-activation need not be saved."""

BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, value: _aten.threshold_backward(grad, value, 0),
    "tanh": _aten.tanh_backward,
    "sigmoid": _aten.sigmoid_backward,
    "elu": lambda grad, value: _aten.elu_backward(grad, 1, 1, 1, True, value),
    "leaky_relu": lambda grad, value: _aten.leaky_relu_backward(grad, value, 0.01, True),
    "silu": _aten.silu_backward,
    "gelu": _aten.gelu_backward,
    "softplus": lambda grad, z: _aten.softplus_backward(grad, z, 1, 20),
}
"""Gradient w.r.t. the pre-activation from the gradient w.r.t. the activation; uses the activation's value, or the
pre-activation for silu, gelu and softplus."""


def activate(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """Activation of z, which may be overwritten, and the tensor that `differentiate` needs."""
    if name in IN_PLACE:
        value = IN_PLACE[name](z)
        return value, value
    return ACTIVATIONS[name](z), z


def differentiate(name: str, grad: Tensor, kept: Tensor) -> Tensor:
    """Gradient with respect to the pre-activation from the gradient with respect to the activation."""
    return BACKWARD[name](grad, kept)
