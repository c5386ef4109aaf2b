"""Runs of a model for many draws at once under torch's `vmap`, in which it sees one draw."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar, cast
from unittest.mock import patch

import torch
from pyro.ops import special
from torch import Tensor
from torch.distributions import constraints, distribution
from torch.overrides import TorchFunctionMode

from pyro_maf.infer.models.model import Args, Kwargs

__all__ = ["mapped"]

Results = TypeVar("Results")

COPIES = (torch.clone, Tensor.clone)
CREATED = (
    *(torch.zeros, torch.ones, torch.empty, torch.full, torch.eye),
    *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor),
)
"""Functions that create a tensor, into which a model may write."""


def mapped(
    function: Callable[[Mapping[str, Tensor]], Results], values: Mapping[str, Tensor], *, writes: bool = False
) -> tuple[Results, Tensor]:
    """Apply a function of a single draw to several draws at once, under `vmap`.

    Args:
        function: Maps the value of each site at one draw to tensors in tuples and dictionaries.
        values: The value of each site, draws along the first dimension.
        writes: Whether the function writes into tensors that it creates; each draw then has its own.

    Returns:
        The results, draws along the first dimension, and a mask over the draws, (draws,): false where the validation of
        a distribution would raise.
    """

    def of_one(one: Mapping[str, Tensor], zero: Tensor) -> tuple[Results, Tensor]:
        with _OneDraw(zero if writes else None) as run:
            results = function(one)
        return results, run.is_valid

    first = next(iter(values.values()))
    zeros = torch.zeros(len(first), dtype=torch.uint8, device=first.device)
    with patch.object(special, "_SafeLog", _Log), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # for operations that run row by row
        return torch.func.vmap(of_one, randomness="same")(dict(values), zeros)


CHECKS = (constraints.__file__, distribution.__file__)
"""Files of the validation of distributions."""


class _OneDraw(TorchFunctionMode):
    """Mode for what differs between one draw and many under `vmap`.

    The validation of distributions raises nothing, nor does a Cholesky factorization: since either may fail for a
    single draw, its outcome is recorded as a tensor.

    Args:
        zero: Zero, (), one for each draw. It is added to new tensors, so that writes into them can differ by draw. None
            if that is not needed.

    Attributes:
        is_valid: True if all checks have passed, ().
    """

    def __init__(self, zero: Tensor | None) -> None:
        super().__init__()
        self._zero = zero
        self.is_valid = torch.ones((), dtype=torch.bool)

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        # The check of a matrix, first whether it is square and symmetric, reads its outcome; torch 2.4 reads any.
        if func is torch._is_all_true or (func is Tensor.__bool__ and _is_within(*CHECKS)):
            self._record(args[0])
            return True
        if getattr(func, "__self__", None) is Tensor.data:
            return cast("Tensor", args[0]).detach()
        if func is torch.linalg.cholesky:
            factor, failed = torch.linalg.cholesky_ex(*cast("tuple[Tensor]", args), **cast("dict[str, bool]", kwargs))
            self._record(failed == 0)
            return factor
        if func is Tensor.__setitem__ and _is_mask(args[1]) and not kwargs:
            target, mask, number = cast("tuple[Tensor, Tensor, float | Tensor]", args)
            if not isinstance(number, Tensor) or number.dim() == 0:  # as in multinomial densities: `x[mask] = 0`
                mask = mask.reshape(mask.shape + (1,) * (target.dim() - mask.dim()))
                return target.masked_fill_(mask, number)
        result = func(*args, **kwargs)
        if self._zero is not None and func in (*CREATED, *COPIES) and isinstance(result, Tensor):
            return result ^ self._zero.bool() if result.dtype == torch.bool else result + self._zero.to(result.dtype)
        return result

    def _record(self, outcome: object) -> None:
        if isinstance(outcome, Tensor):
            self.is_valid = self.is_valid.to(outcome.device) & outcome.all()


class _Log:
    """Logarithm with a bounded gradient, replacing the one in Pyro's sums over discrete sites, which `vmap` rejects."""

    @staticmethod
    def apply(x: Tensor) -> Tensor:
        """Return log(x), with the gradient 1 / max(x, eps)."""
        least = torch.finfo(x.dtype).eps
        is_plain = x > least
        bounded = x.detach().log() + (x - x.detach()) / least
        return torch.where(is_plain, x.where(is_plain, torch.ones_like(x)).log(), bounded)


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _is_within(*filenames: str) -> bool:
    """Return whether the code that calls a torch function is in one of these files."""
    return sys._getframe(2).f_code.co_filename in filenames
