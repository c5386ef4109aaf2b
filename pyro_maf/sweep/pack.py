"""A MADE laid out for the kernels, once for each version of its weights."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pyro_maf._core.torch_state import Snapshot
from pyro_maf.nn import ACTIVATIONS, MADE
from pyro_maf.sweep.plan import Array, biases_of, lay_out_biases, output_rows, weights_of

__all__ = ["Pack", "flat", "forget", "layout_of", "pack", "pack_of"]


class Pack(NamedTuple):
    """The arrays that `sequential_kernel` describes, in the order of its arguments."""

    order: Array
    weights: Array
    starts: Array
    levels: Array
    final: Array
    kind: int
    biases: Array


Layout = tuple[Array, Array, Array]

# Outside the networks, so that copies and pickles of them leave the pack behind.
_packs: weakref.WeakKeyDictionary[MADE, tuple[Snapshot, Pack]] = weakref.WeakKeyDictionary()
# A network replaces its list `ready` whenever its order or degrees change.
_layouts: weakref.WeakKeyDictionary[MADE, tuple[list[list[int]], Layout]] = weakref.WeakKeyDictionary()


def pack_of(made: MADE, own: Sequence[Tensor] | None, context: Tensor | None = None) -> Pack:
    """The pack of a network's current weights at a context, rebuilt when they have changed.

    Args:
        made: The network.
        own: Its `own_tensors`; with None nothing is cached.
        context: (batch, context_dim) or (context_dim,), or None.
    """
    if own is None:
        return _fresh(made, context)
    pack = _remembered(made, own)
    return pack if context is None else pack._replace(biases=flat(lay_out_biases(made, biases_of(made, context))))


def _remembered(made: MADE, own: Sequence[Tensor]) -> Pack:
    tensors: list[Any] = [made._buffers["order"], *own]
    known = _packs.get(made)
    if known is not None and known[0].holds_for(tensors):
        return known[1]
    # Taken before the weights are read, so that the next call detects a change in between.
    state = Snapshot.of(tensors)
    fresh = _fresh(made, None)
    if state is not None:
        _packs[made] = state, fresh
    return fresh


def forget(made: nn.Module) -> None:
    """Drop a network's pack: needed only after writes that no version counter records, as through `.data` or numpy."""
    _packs.pop(made, None)  # type: ignore[call-overload]


def pack(made: MADE, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Pack:
    """The arrays of a network with these weights and biases, as `weights_of` and `biases_of` give them."""
    every = weights[0].new_empty(sum(weight.numel() for weight in weights))
    places = every.split([weight.numel() for weight in weights])
    masked = [place.view_as(weight) for place, weight in zip(places, weights, strict=True)]
    for place, weight, layer in zip(masked, weights, made.masked_layers, strict=True):
        torch.mul(weight.detach(), layer.mask, out=place)
    if not made.is_natural:
        masked[0].copy_(masked[0][:, made.order])
        masked[-1].copy_(masked[-1][output_rows(made, made.order)])
    kind = list(ACTIVATIONS).index(made.activation)
    return Pack(made.order.numpy(), every.numpy(), *layout_of(made), kind, flat(lay_out_biases(made, biases)))


def flat(biases: Sequence[Tensor]) -> Array:
    """The biases of all layers, (units, 1 or batch)."""
    return torch.cat([bias.detach() for bias in biases]).contiguous().numpy()


def _fresh(made: MADE, context: Tensor | None) -> Pack:
    with torch.no_grad():
        return pack(made, weights_of(made), biases_of(made, context))


def layout_of(made: MADE) -> Layout:
    """`starts`, `levels` and `final` of a network's pack, computed once for its order and degrees."""
    known = _layouts.get(made)
    if known is None or known[0] is not made.ready:
        known = _layouts[made] = made.ready, _layout(made)
    return known[1]


def _layout(made: MADE) -> Layout:
    """`starts`, `levels` and `final`."""
    dim, outputs = made.input_dim, made.outputs_per_input
    widths = [dim, *made.hidden_dims, dim * outputs]
    starts = np.cumsum([0, 0, *(below * own for below, own in zip(widths[:-2], widths[1:-1], strict=True))])
    final = np.zeros((len(widths), dim + 1), np.int64)
    final[0, 1:] = np.arange(dim)
    final[1:-1, 1:] = np.reshape(made.ready, (-1, dim))
    final[-1] = outputs * np.arange(dim + 1)
    return starts, np.cumsum([0, *widths]), final
