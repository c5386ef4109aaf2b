"""Cache of the pair (x, y) that a flow computed last, valid only while nothing that it depends on has changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pyro_maf._core.module_state import Structure
from pyro_maf._core.torch_state import Snapshot

__all__ = ["Cache", "caching_is_possible"]

Now: TypeAlias = Callable[[], Structure]
"""The module's current structure."""


def caching_is_possible() -> bool:
    """False where tensors have no lasting identity: under compile, `torch.func` and inference mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.is_inference_mode_enabled()
    )


class Cache:
    """Cache of one input of a module, the output for it, and their log-determinant.

    The pair lives as long as the output does. It is valid for the same tensor objects at the same versions, the same
    structure of the module with the same numbers in its tensors, the same grad mode, and as long as the same ones of
    these tensors require a gradient. A backward through its graph retires it, so that no graph is traversed twice.

    The cache does not refer to the module, which owns it. It is neither copied nor pickled with that: a module's
    `__getstate__` puts an empty one in its place.
    """

    def __init__(self) -> None:
        self._pair: Pair | None = None
        # The last ones, since others are taken faster after them.
        self._structure: Structure | None = None
        self._snapshot: Snapshot | None = None

    def structure(self, module: nn.Module) -> Structure:
        """The module's current structure."""
        structure = self._structure = Structure.of(module, self._structure)
        return structure

    def store(self, structure: Structure, x: Tensor, y: Tensor, log_det: Tensor) -> None:
        """Store a pair that a module of this structure computed, unless numbers can change without a version count."""
        # An output that is its input has no identity of its own, by which the cache could recognise it.
        if y is x or y.is_inference() or x.is_inference():
            return
        tensors = structure.tensors
        self._snapshot = Snapshot.of(tensors) if self._snapshot is None else self._snapshot.later(tensors)
        if self._snapshot is None:
            return
        owner = weakref.ref(self)  # the callback must keep neither cache nor pair alive

        def release(output: object) -> None:
            if (cache := owner()) is not None:
                cache._release(output)

        self._pair = Pair(structure, self._snapshot, x, y, log_det, release)

    def input_of(self, module: nn.Module, y: Tensor) -> Tensor | None:
        """The input with output `y`; or None if that is not certain, and the pair is dropped."""
        pair = self._pair  # read once: another thread may replace it
        x = None if pair is None else pair.input_of(partial(self.structure, module), y)
        if x is None:
            self._pair = None
        return x

    def log_det_of(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        """The log-determinant of (x, y), whichever of them is the input, or None if that is not certain.

        One with a graph is returned once only, so that two losses can be differentiated one after the other.
        """
        pair = self._pair
        if pair is None:
            return None
        now = partial(self.structure, module)
        log_det = pair.log_det_of(now, x, y)
        return pair.log_det_of(now, y, x) if log_det is None else log_det

    def joins(self, module: nn.Module, x: Tensor, y: Tensor) -> bool:
        """Return whether `y` is certain to be the module's output for `x`."""
        pair = self._pair
        return pair is not None and pair.joins(partial(self.structure, module), x, y)

    def _release(self, output: object) -> None:
        """Drop the pair if `output` is the weak reference to its output."""
        pair = self._pair
        if pair is not None and pair.output is output:
            self._pair = None

    def clear(self) -> None:
        """Drop the pair, and the storages of the module's parameters and buffers, which may have moved."""
        self._pair = self._structure = self._snapshot = None


class Pair:
    """Input, weak reference to the output, log-determinant, and the module's state in which they belong together."""

    def __init__(
        self,
        structure: Structure,
        snapshot: Snapshot,
        x: Tensor,
        y: Tensor,
        log_det: Tensor,
        release: Callable[[object], None],
    ) -> None:
        self._structure, self._snapshot, self._graph = structure, snapshot, _graph(structure)
        self._input = x
        self.output = weakref.ref(y, release)
        self._ends = _ends(x, y)
        # Holding the storages ensures that no other tensor gets the same address.
        self._storages = x.untyped_storage(), y.untyped_storage()
        # In a list, whose `pop` is atomic: only one of several threads gets it.
        self._log_dets = [log_det]
        # The hooks hold this list alone: they must keep neither the pair nor its tensors alive.
        self._retired: list[bool] = []
        retired = self._retired
        for node in {y.grad_fn, log_det.grad_fn} - {None}:
            node.register_prehook(lambda *_: retired.append(True))  # type: ignore[union-attr]

    def input_of(self, now: Now, y: Tensor) -> Tensor | None:
        """As `Cache.input_of`."""
        x = self._input
        if self.output() is not y or (x.requires_grad and not torch.is_grad_enabled()):
            return None
        return x if self._holds(now, y) and not _is_watched(y) else None

    def log_det_of(self, now: Now, x: Tensor, y: Tensor) -> Tensor | None:
        """As `Cache.log_det_of`."""
        if not self._log_dets or not self.joins(now, x, y) or _is_watched(y):
            return None
        try:
            log_det = self._log_dets.pop()
        except IndexError:  # another thread was first
            return None
        if not log_det.requires_grad:
            self._log_dets.append(log_det)
        return log_det

    def joins(self, now: Now, x: Tensor, y: Tensor) -> bool:
        """As `Cache.joins`."""
        return self._input is x and self.output() is y and self._holds(now, y)

    def _holds(self, now: Now, y: Tensor) -> bool:
        if self._retired or self._ends != _ends(self._input, y):
            return False
        structure = now()
        return (
            self._structure == structure
            and self._snapshot.holds_for(structure.tensors)
            and self._graph == _graph(structure)
        )


def _graph(structure: Structure) -> list[bool]:
    """The grad mode, and `requires_grad` of each tensor where that matters."""
    is_enabled = torch.is_grad_enabled()
    return [is_enabled, *map(_requires_grad, structure.tensors)] if is_enabled else [is_enabled]


_requires_grad = attrgetter("requires_grad")


def _ends(x: Tensor, y: Tensor) -> tuple[int | bool, ...]:
    """Marks of a pair that change when either end is written to or becomes part of another graph."""
    return (x._version, y._version, x.data_ptr(), y.data_ptr(), x.requires_grad, y.requires_grad, x.is_leaf, y.is_leaf)


def _is_watched(y: Tensor) -> bool:
    """Return whether the gradient at an output is observed, which a cached result would bypass."""
    return y.retains_grad or bool(y._backward_hooks)
