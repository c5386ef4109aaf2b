"""Memory for large temporary tensors, reused instead of being returned to the system."""

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
"""Bytes from which on memory is pooled; allocators keep smaller blocks themselves."""
MOST, MOST_BYTES = 8, 2**28
"""Maximum number of pooled arrays, and their maximum total size in bytes."""
LINE = 64
"""Bytes in a cache line, to which tensors are aligned, like torch's own: a kernel's vector that spans two lines takes
twice as long to load."""
FREE = 2
"""References to an array that is not in use: the local variable, and the argument of `getrefcount`."""

_arrays: list[NDArray[Any]] = []


def empty(size: int, like: Tensor) -> Tensor:
    """A tensor (size,) on the CPU with arbitrary entries, with the dtype of `like`, float32 or float64.

    An allocator returns megabytes to the system as soon as they are free, and the system clears memory it hands out:
    for the weights of five layers of 512 units and their gradient, that takes 2 of a training step's 13 ms. So some
    arrays are kept here, and reused once no tensor refers to them.
    """
    dtype = DTYPES[like.dtype]
    if size * dtype.itemsize < SMALLEST:
        return like.new_empty(size)
    # The least recently used array comes first, which is the right one if several sizes alternate.
    for place in range(len(_arrays)):
        try:
            array = _arrays.pop(place)  # atomic: another thread gets another array
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
