"""How much a module may allocate while it is built from a description that no digest vouches for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Allowance"]

PER_STORED = 100
"""Elements computed per element stored. Building what this package has takes 15 at most."""
PER_OPERATION = 64
"""Elements that an operation counts for on top of its result's, so that a loop without end has one."""
SLACK = 2**21
"""Elements that any file may take: some megabytes."""


class Allowance(TorchFunctionMode):
    """While entered, torch computes about as much as it takes to build a module with these weights, and no more.

    A file of a few bytes can describe a network of gigabytes. What would exceed the allowance is refused before it is
    allocated: its size is that which torch works out on the meta device.

    Args:
        stored: The weights that the file holds.

    Raises:
        ValueError: In place of the operation that would exceed it.

    Cost: some microseconds an operation; a shape is worked out only where the result might be too large.

    Example:
        >>> with Allowance([torch.zeros(3)]):
        ...     torch.zeros(10**9)
        Traceback (most recent call last):
        ...
        ValueError: its architecture takes far more memory than the 3 numbers in the file
    """

    def __init__(self, stored: Iterable[Tensor]) -> None:
        super().__init__()
        sizes = [tensor.numel() for tensor in stored]
        self._stored = sum(sizes)
        self._left = PER_STORED * (self._stored + PER_OPERATION * len(sizes)) + SLACK

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation where it can be afforded."""
        kwargs = kwargs or {}
        if _at_most([args, kwargs]) > self._left:
            self._spend(_on_meta(function, args, kwargs))
        result = function(*args, **kwargs)
        self._spend(result)
        return result

    def _spend(self, result: Any) -> None:
        self._left -= PER_OPERATION + sum(leaf.numel() for leaf in _leaves(result) if isinstance(leaf, Tensor))
        if self._left < 0:
            raise ValueError(f"its architecture takes far more memory than the {self._stored} numbers in the file")


def _at_most(arguments: Any) -> int:
    """A bound on the elements of a result: sizes broadcast, repeat, or span a square, but do not add up to more."""
    sizes = [leaf.numel() if isinstance(leaf, Tensor) else leaf**2 for leaf in _leaves(arguments)]
    return math.prod(max(1, size) for size in sizes)


def _leaves(value: Any) -> Iterator[Tensor | int]:
    if isinstance(value, Tensor) or type(value) is int:
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)


def _on_meta(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result without its numbers, or None where that can not be had without them."""
    kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "generator", "out")}
    try:
        with torch.device("meta"):
            return function(*_to_meta(args), **_to_meta(kwargs))
    except (RuntimeError, NotImplementedError, TypeError):
        return None


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {name: _to_meta(item) for name, item in value.items()}
    return type(value)(map(_to_meta, value)) if type(value) in (list, tuple) else value
