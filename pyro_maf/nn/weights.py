"""Weights of a network, whether they are parameters, results of parametrizations and hooks, or hidden behind a call.

A masked layer computes M * W x + b. If W and b are parameters of the layer, or are computed from others by
`torch.nn.utils.parametrize` or by the hooks of `weight_norm`, `spectral_norm` and `prune`, a sweep reads them from the
layer. With other hooks or a user-defined `forward`, the network is called once per variable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pyro_maf.nn import MADE, MLP, MaskedLinear
from pyro_maf.nn.layers import BlockLinear, Linear

__all__ = ["current", "is_called", "is_hooked", "is_read", "outputs_of", "walk_by_calls"]

Module = TypeVar("Module", bound=nn.Module)

WEIGHT_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)
"""Hooks that set a weight before a call and do nothing else."""
PLAIN = (MaskedLinear, BlockLinear, Linear, nn.Linear)
PLAIN_FORWARDS = tuple(layer.forward for layer in PLAIN)


def is_called(made: MADE) -> bool:
    """Return whether the network has to be called, because its weights do not describe all that a call does.

    Raises:
        TypeError: For a layer without a mask, since the dependencies among variables would be unknown.
    """
    for layer in made.layers:
        if not isinstance(getattr(layer, "mask", None), Tensor):
            raise TypeError(
                f"{type(made).__name__} expected layers that are MaskedLinear, got {type(layer).__name__}: "
                "change a weight by torch.nn.utils.parametrize, which leaves the mask in place."
            )
    # Torch 2.4 can compile a comparison of classes but not of functions.
    is_changed = type(made) is not MADE and any(
        getattr(type(made), name) is not getattr(MADE, name) for name in ("forward", "parameters_of", "run")
    )
    return (
        is_changed
        or is_hooked(made)
        or not all(map(is_read, made.layers))
        or not (made.head is None or is_read(made.head))
    )


def current(module: Module) -> Module:
    """The module, after running the hooks that set its weights before a call; to read weights without a call."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WEIGHT_HOOKS):
            hook(module, ())
    return module


def outputs_of(network: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    """Outputs of an `MLP`, or of a module in its place; an `MLP` without hooks runs unchecked."""
    if type(network) is MLP and not is_hooked(network):
        return network.run(x, context)
    outputs: Tensor = network(x, context)
    return outputs


def walk_by_calls(
    order: Tensor, network: Callable[[Tensor], Tensor], step: Callable[[int, Tensor], Tensor], like: Tensor
) -> Tensor:
    """Solve for the variables one at a time, like `walk` of `sweep.torch_engine`, by D calls; return w, (batch, D).

    Args:
        order: The variables, first to last.
        network: Maps w, (batch, D), with 0 for the variables yet to come, to parameters, (batch, D, P).
        step: Maps the position of a variable in the order, and its parameters (P, batch), to its w, (batch,), `like`.
    """
    # By position, since an exported program cannot have constant tensors.
    place, zeros, w = order.argsort(), torch.zeros_like(like), list[Tensor]()
    for i in range(len(order)):
        partial = torch.stack([*w, *[zeros] * (len(order) - i)], -1)[:, place]
        w.append(step(i, network(partial)[:, order][:, i].T))
    return torch.stack(w, -1)[:, place]


def is_hooked(module: nn.Module) -> bool:
    """Return whether a call of the module does more than its class's `forward`."""
    attributes = module.__dict__
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
    )


def is_read(layer: nn.Module) -> bool:
    """Return whether a linear layer's weight, mask, gain and bias describe all that a call of it does."""
    if not is_hooked(layer):
        return type(layer) in PLAIN or type(layer).forward in PLAIN_FORWARDS
    others = [hook for hook in layer._forward_pre_hooks.values() if not isinstance(hook, WEIGHT_HOOKS)]
    return type(layer).forward in PLAIN_FORWARDS and not (
        others or layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks or "forward" in vars(layer)
    )
