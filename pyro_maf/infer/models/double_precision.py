"""Evaluation of a model in float64 although its data and parameters are float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map, tree_map_only

from pyro_maf.infer.models.model import Args, Kwargs

__all__ = ["Score", "in_double", "is_resolved", "nudged", "promoted", "scored", "stand_out", "widened"]

Score = Callable[[Tensor], Tensor]
"""Log-density of latent vectors: (rows, D) to (rows,)."""

Numbers = TypeVar("Numbers")

CLOSE = 1e-2
"""Maximum difference between log-densities in float64 and in float32, in nats per dimension and relative."""


LAST_DIGITS, RESOLVED = 8, 1e-3
"""A change of numbers, in rounding errors, and the relative change of a log-density that it may cause, at least a
nat."""
FAR = 10.0
"""Difference from the median, in nats, beyond which the weight of a draw stands out."""


def nudged(numbers: Tensor) -> Tensor:
    """Change the last digits of numbers."""
    return numbers * (1 + LAST_DIGITS * torch.finfo(numbers.dtype).eps)


def is_resolved(values: Tensor, again: Tensor) -> Tensor:
    """Test whether log-densities, (rows,), are close to those of nudged numbers; boolean.

    If a covariance is numerically singular, they may differ by anything, such as a million nats.
    """
    return (again - values).abs() <= (RESOLVED * values.abs()).clamp(min=1.0)


def stand_out(log_weights: Tensor) -> bool:
    """Return whether some log weights are so far above the others that they may be due to rounding."""
    return bool((log_weights > log_weights.nan_to_num(nan=-torch.inf).median() + FAR).any())


def scored(score: Callable[[Numbers], Tensor], numbers: Numbers, log_q: Tensor) -> Tensor:
    """Return log-densities of draws, (rows,), in nats; minus infinity where only rounding makes weights stand out.

    Args:
        score: Log-density of draws whose numbers are all tensors.
        numbers: The draws.
        log_q: Their log-density under the guide, (rows,).
    """
    values = score(numbers)
    if stand_out(values - log_q):
        for _ in range(2):  # rounding may reproduce the same value once
            numbers = cast("Numbers", tree_map(nudged, numbers))
            again = score(numbers)
            # A draw nudged off its support, such as a simplex whose sum is no longer 1, is not informative.
            values = values.where(is_resolved(values, again) | ~again.isfinite(), -torch.inf)
    return values


class _Promoting(TorchFunctionMode):
    """Type promotion in products as in sums: float32 times float64 is float64, including matrix products."""

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if _dtypes((*args, *kwargs.values())) >= {torch.float32, torch.float64} and not _writes(func, kwargs):
            args, kwargs = tree_map_only(Tensor, _promoted, (args, kwargs))
        return func(*args, **kwargs)


def _dtypes(values: Iterable[object]) -> set[torch.dtype]:
    """Dtypes of the tensors among an operation's arguments, including lists of them; torch's own traversal is slow."""
    found = set()
    for value in values:
        if isinstance(value, Tensor):
            found.add(value.dtype)
        elif isinstance(value, (tuple, list)):
            found |= _dtypes(value)
    return found


def _promoted(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype == torch.float32 else tensor


def _writes(func: Callable[..., object], kwargs: Kwargs) -> bool:
    """Return whether a function writes into one of its arguments; in a float64 copy, that would be lost."""
    name = getattr(func, "__name__", "")
    return "out" in kwargs or (name.endswith("_") and not name.endswith("__")) or name.startswith(("__i", "__set"))


def widened(tensor: Tensor) -> Tensor:
    """Convert a tensor to float64, on its device or, if the device has no float64, on the CPU."""
    try:
        return tensor.double()
    except (TypeError, RuntimeError):
        return tensor.cpu().double()


def promoted(score: Callable[[Numbers], Tensor]) -> Callable[[Numbers], Tensor]:
    """Return a function that computes everything that depends on float64 numbers in float64."""

    def double(numbers: Numbers) -> Tensor:
        with _Promoting():
            return score(numbers).double()

    return double


def in_double(score: Score, loc: Tensor) -> Score | None:
    """Return the log-density for latent vectors in float64, or None if the model does not support it.

    Data and parameters of the model stay float32; everything computed from them and the latents is float64.

    Args:
        score: Log-density of latent vectors in the dtype of `loc`.
        loc: The point at which the two are compared, (D,).
    """
    wide = widened(loc)
    if loc.dtype == torch.float64 or wide.device != loc.device:
        return None

    double = promoted(score)
    try:
        with torch.no_grad():
            result, expected = double(wide[None]), score(loc[None])
    except Exception:  # a model not written for float64 may fail in any way
        return None
    same = torch.allclose(result.to(expected), expected, rtol=CLOSE, atol=CLOSE * len(loc))
    return double if same else None
