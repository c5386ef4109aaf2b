"""A run of layers as a program: the state of its modules, its tables, and its weights in the kernels' order."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from pyro_maf._core.memory_pool import empty
from pyro_maf._core.torch_state import Snapshot
from pyro_maf.nn import MADE, MLP
from pyro_maf.nn.weights import current, is_hooked, is_read
from pyro_maf.sweep.builder import TableBuilder, gain_of, map_of
from pyro_maf.sweep.kernels import loaded
from pyro_maf.sweep.layout import LANES, MAPS, Array, Step, Triangular

__all__ = ["Program", "Programs", "Reading", "is_ordinary"]

ORDINARY = (nn.Parameter, Tensor)
"""Tensor types whose entries are in memory, unlike those of some subclasses."""
CHUNK = 240
"""Maximum number of points that pass through the layers together: an odd number of cache lines, since rows whose
distance is a power of two compete for the same lines."""


class Reading(NamedTuple):
    """State of a run's modules: what the layout of a program depends on, and the tensors that it reads.

    Attributes:
        fixed: Tensors that determine the layout, compared by identity.
        marks: Numbers and shapes that determine the layout.
        tensors: Weight, bias and context weight of each level; the tensors of triangular layers.
    """

    fixed: list[Tensor]
    marks: list[object]
    tensors: list[Tensor]

    @classmethod
    def of(cls, steps: Sequence[Step | Triangular]) -> Reading | None:
        """The current state; None if a module's weights do not describe all it does, or its type is not supported."""
        reading = cls([], [], [])
        try:
            taken = all(reading._add(step) for step in steps)
        except RuntimeError:  # inference tensors have no version
            return None
        return reading if taken else None

    def _add(self, step: Step | Triangular) -> bool:
        fixed, marks = self.fixed, self.marks
        if isinstance(step, Triangular):
            marks += step.inverse, step.log_sign, step.gain, tuple(tensor.shape for tensor in step.tensors)
            self.tensors.extend(step.tensors)
            return True
        fixed += step.seen, step.moved
        marks += step.seen._version, step.moved._version, len(step.networks)
        marks += step.inverse, step.log_sign, step.sequential
        if step.networks:
            if type(step.univariate) not in MAPS:
                return False
            marks.append(map_of(step.univariate))
        for network in step.networks:
            if type(network) not in (MADE, MLP) or is_hooked(network):
                return False
            modules = network._modules
            context = iter(modules["context_layers"]._modules.values())  # type: ignore[union-attr]
            layers = modules["layers"]._modules.values()  # type: ignore[union-attr]
            marks += network.activation, len(layers)
            for layer in layers:
                if not self._add_level(layer, next(context, None), masked=type(network) is MADE):
                    return False
            head: Any = modules.get("head")
            if head is not None:
                if not is_read(head):
                    return False
                self.tensors.extend((current(head).weight, head.bias))
                marks += head.weight.shape, head.bias.shape
        return True

    def _add_level(self, layer: Any, context: Any, *, masked: bool) -> bool:
        mask = layer._buffers.get("mask")
        if (masked and mask is None) or not is_read(layer) or (context is not None and not is_read(context)):
            return False
        parameters = current(layer)._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        weight = layer.weight if weight is None else weight
        if bias is None and (bias := layer.bias) is None:
            bias = weight.new_zeros(layer.out_features)
        self.tensors.append(weight)
        self.tensors.append(bias)
        self.marks.append(weight.shape)
        self.marks.append(bias.shape)
        if mask is None:
            self.marks.append(gain_of(layer))
        else:
            self.fixed.append(mask)
            self.marks.append(mask._version)
        if context is not None:
            weight = current(context).weight
            self.tensors.append(weight)
            self.marks.append(weight.shape)
        return True

    def is_uniform(self) -> bool:
        """Return whether all tensors are ordinary and have the same dtype."""
        dtype = self.tensors[0].dtype
        return all(is_ordinary(tensor, dtype) for tensor in self.tensors)

    def holds_for(self, other: Reading) -> bool:
        """Return whether a program for this state is valid for the other."""
        return (
            len(self.fixed) == len(other.fixed)
            and all(map(operator.is_, self.fixed, other.fixed))
            and self.marks == other.marks
        )


def is_ordinary(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a tensor is an ordinary CPU tensor of this dtype."""
    return tensor.dtype is dtype and tensor.is_cpu and type(tensor) in ORDINARY


class Pack(NamedTuple):
    """Masked weights of a run in the order of its tables, stored in the memory of a tensor, and the biases."""

    memory: Tensor
    weights: Array
    biases: Array


class Program:
    """A run of layers, laid out for a state of its modules.

    `context_dim` is 0 for no context.

    Raises:
        UnfitError: For masks that are not staircases, and for networks whose layers do not fit together.
    """

    def __init__(self, reading: Reading, steps: Sequence[Step | Triangular], dim: int, context_dim: int) -> None:
        builder = TableBuilder(dim, context_dim, reading.tensors)
        for step in steps:
            builder.add(step)
        self.reading = reading._replace(tensors=[])
        self.dim, self.context_dim = dim, context_dim
        self.tables = builder.tables()
        sizes = [tensor.numel() for tensor in reading.tensors]
        self.of_weights = [place for place, tensor in enumerate(reading.tensors) if tensor.dim() > 1]
        self.size, self.offsets = sum(sizes), np.cumsum([0, *sizes])
        self.rows = int(self.tables.layers["rows"].sum()) + dim + context_dim + LANES
        self.num_weights, self.num_biases = builder.weights, builder.biases
        self.work = int(self.tables.seen.sum())
        """Multiplications a point."""
        self.every_matrix = np.ones(len(self.tables.matrices), bool)
        self.shift = self._shift()
        self.sizes = [*sizes, self.shift + self.num_weights - self.size]
        """Numbers of entries of the tensors, and of the rest of the memory for their gradients and packed ones."""
        self._packed: tuple[Snapshot, Pack] | None = None

    def _shift(self) -> int:
        """Offset of packed gradients behind those of the tensors, if both share memory.

        With it `unpack`, matrix by matrix, overwrites no entry that it has yet to read.
        """
        matrices, ends = self.tables.matrices, self.offsets[1:]
        written = np.maximum(ends[matrices["weight"]], ends[matrices["addend"]])
        unread = np.minimum.accumulate(matrices["start"][::-1])[::-1]
        return LANES * -(-max(0, int((written - unread).max())) // LANES)

    def chunk_of(self, points: int) -> int:
        """Number of points that pass through the layers together: chunks of about equal size."""
        chunks = max(1, -(-points // CHUNK))
        return LANES * (-(-points // (chunks * LANES)) | 1)

    def fits(self, v: Tensor, context: Tensor | None) -> bool:
        """Return whether inputs have the right widths and dtype, with a context if the layers see one."""
        if not v.dim() or v.shape[-1] != self.dim:
            return False
        if context is None:
            return not self.context_dim
        return is_ordinary(context, v.dtype) and context.shape[-1:] == (self.context_dim,)

    def room_for_gradients(self, like: Tensor, memory: Array | None = None) -> tuple[Array, Array]:
        """Uninitialised arrays for the gradients w.r.t. packed weights, possibly in `memory`, and biases."""
        weights = empty(self.num_weights, like).numpy() if memory is None else memory
        return weights, np.empty(self.num_biases + LANES, weights.dtype)

    def pack(self, tensors: Sequence[Tensor]) -> Pack:
        """Pack the tensors' current values."""
        whole = list(map(Tensor.contiguous, tensors))  # must stay alive while their memory is read
        addresses = np.array(list(map(Tensor.data_ptr, whole)), np.int64)
        memory = empty(self.num_weights + LANES, tensors[0])  # Adam steps process whole vectors
        weights = memory.numpy()
        biases = np.empty(self.num_biases + LANES, weights.dtype)
        loaded().pack(addresses, self.tables, weights, biases)
        return Pack(memory, weights, biases)

    def remembered(self, tensors: Sequence[Tensor]) -> Pack:
        """The pack of the tensors, rebuilt only if one of them has changed."""
        packed = self._packed
        if packed is not None and packed[0].holds_for(tensors):
            return packed[1]
        # Taken before the weights are read, so that the next call detects a change made in between.
        state = Snapshot.of(tensors)
        pack = self.pack([tensor.detach() for tensor in tensors])
        self._packed = None if state is None else (state, pack)
        return pack


Programs: TypeAlias = dict[object, Program]
"""Programs of a flow's runs, by place. A program holds none of the modules."""
