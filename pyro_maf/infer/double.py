"""Log-density in float64 of a model that was written for float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Score", "in_double", "widened"]

Score = Callable[[Tensor], Tensor]
"""Log-density of latent vectors: (rows, D) to (rows,)."""

CLOSE = 1e-2


class _Promoting(TorchFunctionMode):
    """Type promotion of mixed products, as of sums: float32 times float64 is float64, matrix products included."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        dtypes: set[torch.dtype] = set()
        _collect((*args, *kwargs.values()), dtypes)
        if dtypes >= {torch.float32, torch.float64} and not _writes(func, kwargs):
            args = _promoted(args)
            kwargs = {name: _promoted(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _writes(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """True if a function writes into one of its arguments; written into a float64 copy, that would be lost."""
    name = getattr(func, "__name__", "")
    return "out" in kwargs or (name.endswith("_") and not name.endswith("__")) or name.startswith(("__i", "__set"))


def _collect(value: Any, dtypes: set[torch.dtype]) -> None:
    if isinstance(value, Tensor):
        dtypes.add(value.dtype)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _collect(item, dtypes)


def _promoted(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    if type(value) in (tuple, list):
        return type(value)(_promoted(item) for item in value)
    return value


def widened(tensor: Tensor) -> Tensor:
    """Convert a tensor to float64, on its device or, if the device has no float64, on the CPU."""
    try:
        return tensor.double()
    except (TypeError, RuntimeError):
        return tensor.cpu().double()


def in_double(score: Score, loc: Tensor) -> Score | None:
    """Return the log-density for latent vectors in float64, or None if the model cannot be run so.

    Data and parameters of the model stay float32; everything computed from them and the latents is float64.

    Args:
        score: Log-density of latent vectors in the dtype of `loc`.
        loc: The point at which both are compared, (D,).
    """
    wide = widened(loc)
    if loc.dtype == torch.float64 or wide.device != loc.device:
        return None

    def promoted(latents: Tensor) -> Tensor:
        with _Promoting():
            return score(latents).double()

    try:
        with torch.no_grad():
            found, expected = promoted(wide[None]), score(loc[None])
    except Exception:  # a model not written for float64 may fail in any way
        return None
    same = torch.allclose(found.to(expected), expected, rtol=CLOSE, atol=CLOSE * len(loc))
    return promoted if same else None
