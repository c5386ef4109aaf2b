"""Limit on the memory that a module may allocate while it is built from a description without a digest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import TypeVar

from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Allowance"]

PER_STORED = 100
"""Elements computed per element stored. Building this package's modules takes 15 at most."""
PER_OPERATION = 64
"""Elements charged per operation on top of its result's, so that an endless loop ends."""
SLACK = 2**21
"""Elements that any file may allocate: some megabytes."""
SIZED = (
    *("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "zeros"),
    *("constant_pad_nd", "expand", "repeat", "repeat_interleave", "tile", "tril_indices", "triu_indices"),
)
"""Operations whose integers are sizes of the result, by name; those of a tensor may begin with `new_`."""


class Allowance(TorchFunctionMode):
    """Context manager that limits torch to about the work of building a module with these weights.

    A file of a few bytes can describe a network of gigabytes. An operation that would exceed the allowance by
    broadcasting its arguments, or by the sizes that it requests, is refused before it allocates anything. (torch's
    shape functions and its meta device would load a computer algebra system of 40 MiB for that.)

    Args:
        stored: The weights in the file.

    Raises:
        ValueError: In place of an operation that would exceed the allowance.

    Cost: some microseconds an operation.

    Example:
        >>> import torch
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
        function: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run the operation if the allowance covers it."""
        kwargs = kwargs or {}
        self._check(_at_most(function, [args, kwargs]))
        result = function(*args, **kwargs)
        self._left -= PER_OPERATION + sum(tensor.numel() for tensor in _leaves(result, Tensor))
        self._check(0)
        return result

    def _check(self, elements: int) -> None:
        if elements > self._left:
            raise ValueError(f"its architecture takes far more memory than the {self._stored} numbers in the file")


def _at_most(function: Callable[..., object], arguments: object) -> int:
    """Upper bound on the number of elements of a result."""
    shapes = [reversed(tensor.shape) for tensor in _leaves(arguments, Tensor)]
    size = math.prod(map(max, zip_longest(*shapes, fillvalue=1)))
    name = getattr(function, "__name__", "").partition(".")[0].removeprefix("new_")
    if name == "diag_embed":
        return size**2
    if name not in SIZED:
        return size
    asked = size * math.prod(max(1, number) for number in _leaves(arguments, int))
    return asked**2 if name == "eye" else asked


Leaf = TypeVar("Leaf")


def _leaves(value: object, kind: type[Leaf]) -> Iterator[Leaf]:
    """The values of one kind in nested sequences and dictionaries."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item, kind)
