"""Exemption from autocast: a network rounded to a lower precision would be a different density."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["as_far_as_exact", "converted", "exactly", "like_of"]

Result = TypeVar("Result")


def like_of(module: nn.Module, *, floating: bool = True) -> Tensor | None:
    """A floating-point tensor of the module, or None; without `floating`, one of any dtype."""
    # Traversed by hand: `parameters()` is slower and cannot be compiled.
    waiting: list[Any] = [module]
    while waiting:
        member = waiting.pop()
        for own in (member._parameters, member._buffers):
            for tensor in own.values():
                if tensor is not None and (not floating or tensor.is_floating_point()):
                    return tensor
        waiting += member._modules.values()
    return None


def converted(value: Any, like: Tensor | None) -> Any:
    """Convert a value to the dtype of `like` under autocast, which may have changed it; else return it unchanged."""
    if isinstance(value, Tensor) and like is not None and _is_cast(value.device.type):
        return value.to(like.dtype)
    return value


def exactly(run: Callable[..., Result], *arguments: Any, like: Tensor | None) -> Result:
    """Run without autocast on the device of `like`."""
    kind = "cpu" if like is None else like.device.type
    if _is_cast(kind):
        with torch.autocast(kind, enabled=False):
            return run(*arguments)
    return run(*arguments)


def as_far_as_exact(like: Tensor, value: Tensor, *, as_model: bool) -> Tensor:
    """Convert a value to the dtype of `like` if that loses nothing that matters; otherwise return it unchanged.

    Args:
        like: A tensor like the density's values or context.
        value: A tensor of any dtype.
        as_model: Whether `like` has the model's dtype, to which floating-point values are rounded, not a finer one.
    """
    if value.dtype == like.dtype or value.is_complex():
        return value
    if not value.is_floating_point():
        converted = value.to(like.dtype)
        return converted if torch.equal(converted.to(value.dtype), value) else value
    return value.to(like.dtype) if as_model or value.dtype == torch.float64 else value


def _is_cast(kind: str) -> bool:
    """Return whether autocast is active on a device type; a query for one without, such as meta, would raise."""
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)
