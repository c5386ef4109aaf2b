"""Checks of arguments at public entry points.

Each error names the caller, what was expected, what it got and, where it helps, what to do.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "InputError",
    "check_above_zero",
    "check_choice",
    "check_context",
    "check_event",
    "check_permutation",
    "check_positive",
    "check_seed",
    "check_shape",
    "check_sizes",
]


class InputError(ValueError):
    """Error about rows or columns of a table; its message is complete without the attributes.

    Attributes:
        row: Index of the first such row in the table, from 0; None if it is not about a row.
        column: Index of the first such column, from 0; None if it is not about a column.

    Example:
        >>> error = InputError("fit expected finite data, got nan in row 4, column 1.", row=4, column=1)
        >>> error.row, error.column
        (4, 1)
    """

    def __init__(self, message: str, *, row: int | None = None, column: int | None = None) -> None:
        super().__init__(message)
        self.row = row
        self.column = column


def check_positive(who: str, name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int; raise if it is not an int or is below `least`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{who} expected {name} to be an int, got {value!r}.") from None
    if value < least:
        raise ValueError(f"{who} expected {name} of at least {least}, got {value}.")
    return int(value)


def check_seed(who: str, seed: Any, name: str = "seed") -> int:
    """Return a seed as an int; raise if some torch generator does not accept it."""
    if check_positive(who, name, seed, least=0) >= 2**63:
        raise ValueError(f"{who} expected {name} below 2**63, got {seed}.")
    return int(seed)


def check_above_zero(who: str, name: str, value: Any, *, finite: bool = False) -> None:
    """Raise if `value` is not a number above 0 or, with `finite`, is infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{who} expected {name} to be a number, got {value!r}.")
    if math.isnan(value) or value <= 0 or (finite and math.isinf(value)):
        raise ValueError(f"{who} expected {name} above 0{' and finite' if finite else ''}, got {value}.")


def check_sizes(who: str, name: str, values: Iterable[int] | int) -> tuple[int, ...]:
    """Return layer widths as a tuple of positive ints."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{who} expected {name} to be a sequence of ints such as (64, 64), got {values!r}.")
    return tuple(check_positive(who, f"every width in {name}", value) for value in values)


def check_shape(who: str, name: str, values: Iterable[int] | int) -> torch.Size:
    """Return the shape of a batch of draws, () for a single one."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{who} expected {name} to be a sequence of ints such as (5,), got {values!r}.")
    return torch.Size([check_positive(who, f"every size in {name}", value, least=0) for value in values])


def check_choice(who: str, name: str, value: Any, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`; otherwise raise."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{who} expected {name} to be one of {', '.join(choices)}, got {value!r}.")
    return value


def check_permutation(who: str, name: str, value: Any, size: int | None = None) -> Tensor:
    """Return `value` as an int64 tensor; raise unless it holds each of 0 .. size - 1 once."""
    try:
        permutation = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        permutation = torch.empty(0, 0)
    size = permutation.numel() if size is None else size
    if permutation.is_floating_point() or permutation.shape != (size,):
        raise ValueError(f"{who} expected {name} to be a permutation of 0 .. {size - 1}, got {value!r}.")
    if not torch.equal(permutation.sort().values.cpu(), torch.arange(size)):
        raise ValueError(f"{who} expected {name} to hold each of 0 .. {size - 1} once, got {permutation.tolist()}.")
    return permutation.to(torch.int64)


def check_event(who: str, name: str, value: Any, size: int, size_name: str, like: Tensor | None = None) -> Tensor:
    """Check a tensor of events: its last dimension and, with `like`, its device and, except for indices, its dtype."""
    if not isinstance(value, Tensor):
        of_frame = ".to_numpy()" if hasattr(value, "to_numpy") else ""
        dtype = "" if like is None or not like.is_floating_point() else f", dtype=torch.{_short(like.dtype)}"
        raise TypeError(
            f"{who} expected {name} to be a torch.Tensor, got {type(value).__name__}: "
            f"convert it with torch.tensor({name}{of_frame}{dtype})."
        )
    if value.dim() == 0 or value.shape[-1] != size:
        raise ValueError(
            f"{who} expected {name} with last dimension {size} ({size_name}), got shape {tuple(value.shape)}."
        )
    if like is not None and value.dtype != like.dtype and like.is_floating_point():
        # Only floating-point dtypes are suggested: a module cannot be converted to another.
        other = f" or the flow with .to(torch.{_short(value.dtype)})" if value.is_floating_point() else ""
        raise TypeError(
            f"{who} has {_short(like.dtype)} parameters, got {name} of {_short(value.dtype)}: "
            f"convert {name} with .to(torch.{_short(like.dtype)}){other}."
        )
    if like is not None and value.device != like.device:
        held = "has its parameters on" if like.is_floating_point() else "is on"
        raise ValueError(
            f"{who} {held} {like.device}, got {name} on {value.device}: move one of them with .to(device)."
        )
    return value


def check_context(who: str, context: object, context_dim: int, like: Tensor | None = None, *, advice: str = "") -> None:
    """Raise for a missing, superfluous or invalid context; `advice` ends the sentence about a missing one."""
    if context is None and context_dim:
        raise ValueError(f"{who} expected a context with last dimension {context_dim} (context_dim), got none{advice}.")
    if context is not None and not context_dim:
        raise ValueError(f"{who} was built without context_dim and takes no context.")
    if context is not None:
        check_event(who, "context", context, context_dim, "context_dim", like)


def check_takes_gradient(module: nn.Module, like: Tensor | None) -> None:
    """Raise if a gradient is needed for parameters created in inference mode: torch would silently lose some.

    `like` is one of the module's tensors, or None.
    """
    # The test cannot be compiled, and no compiler runs with inference tensors.
    if like is None or torch.compiler.is_compiling() or not like.is_inference() or not torch.is_grad_enabled():
        return
    if any(parameter.requires_grad for parameter in module.parameters()):
        who = type(module).__name__
        raise RuntimeError(
            f"{who} was built in inference mode, so its parameters take no gradient (Inference tensors "
            "cannot be saved for backward): build it outside of torch.inference_mode, or call it under torch.no_grad."
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
