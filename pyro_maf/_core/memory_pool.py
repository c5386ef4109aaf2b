"""Memory for large temporary tensors, used again and again instead of returned to the system."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["empty"]

DTYPES: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}
SMALLEST = 2**17
"""Bytes from which on memory is held: less than that an allocator holds itself."""
MOST, MOST_BYTES = 8, 2**28
"""Number of pieces of memory that are held at most, and their size in all."""
LINE = 64
"""Bytes of a line of the processor's cache, where a tensor begins, as torch's own do: a vector of the kernels that lies
in two lines takes as long as two."""
FREE = 2
"""References to an array that nobody else refers to: the local variable, and the argument of `getrefcount`."""

_arrays: list[NDArray[Any]] = []


def empty(size: int, like: Tensor) -> Tensor:
    """A tensor (size,) on the CPU with arbitrary entries, of the dtype of `like`, float32 or float64.

    An allocator gives megabytes back to the system as soon as they are free, and the system clears what it gives out:
    for the weights of five layers of 512 units and their gradient that takes two of a training step's 13 ms. So some
    arrays are held here, and given out again when no tensor refers to one any more.
    """
    dtype = DTYPES[like.dtype]
    if size * dtype.itemsize < SMALLEST:
        return like.new_empty(size)
    # The one that was used longest ago is first: that is whose turn it is, where some sizes follow each other.
    for place in range(len(_arrays)):
        try:
            array = _arrays.pop(place)  # atomic: another thread gets another
        except IndexError:
            break
        if array.size == size and array.dtype == dtype and sys.getrefcount(array) == FREE:
            _arrays.append(array)
            return torch.from_numpy(array)
        _arrays.insert(place, array)
    spacious = np.empty(size + LINE // dtype.itemsize, dtype)
    first = -spacious.ctypes.data % LINE // dtype.itemsize
    array = spacious[first : first + size]
    _arrays.append(array)
    while len(_arrays) > MOST or sum(each.nbytes for each in _arrays) > MOST_BYTES:
        del _arrays[:1]
    return torch.from_numpy(array)
