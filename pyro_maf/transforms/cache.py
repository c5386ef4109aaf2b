"""Cache of the last pair (x, y) that a flow computed, valid only while nothing it depends on has changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor, nn

from pyro_maf._core.module_state import Structure
from pyro_maf._core.torch_state import Snapshot

__all__ = ["Cache", "caching_is_possible"]


def caching_is_possible() -> bool:
    """Return whether tensors have a lasting identity: not under compile, `torch.func` or inference mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.is_inference_mode_enabled()
    )


class Cache:
    """Cache of one input of a module, its output and their log-determinant.

    The pair lives as long as the output. It is valid for the same tensor objects at the same versions, while the
    module has the same structure and parameter values, the grad mode is the same, and the same tensors require a
    gradient. A backward pass through its graph retires it, so that no graph is traversed twice.

    The cache holds no reference to the module that owns it, and is neither copied nor pickled with it: the module's
    `__getstate__` replaces it by an empty one.
    """

    def __init__(self) -> None:
        self._pair: Pair | None = None
        # Reused, because the next ones are computed faster from them.
        self._structure: Structure | None = None
        self._snapshot: Snapshot | None = None

    def structure(self, module: nn.Module) -> Structure:
        """The module's current structure."""
        structure = self._structure = Structure.of(module, self._structure)
        return structure

    def store(self, structure: Structure, x: Tensor, y: Tensor, log_det: Tensor) -> None:
        """Store a pair computed by a module of this structure, unless values can change without a version count."""
        # An output that is also the input has no identity by which the cache could recognise it.
        if y is x or y.is_inference() or x.is_inference():
            return
        tensors = structure.tensors
        self._snapshot = Snapshot.of(tensors) if self._snapshot is None else self._snapshot.later(tensors)
        if self._snapshot is None:
            return
        owner = weakref.ref(self)  # the callback must not keep the cache or the pair alive

        def release(output: object) -> None:
            if (cache := owner()) is not None:
                cache._release(output)

        self._pair = Pair(structure, self._snapshot, x, y, log_det, release)

    def input_of(self, module: nn.Module, y: Tensor) -> Tensor | None:
        """The input that gave `y`, or None, dropping the pair, if that is not certain."""
        pair = self._pair  # read once: another thread may replace it
        if (
            pair is not None
            and self._matches(pair, module, pair.input, y)
            and (torch.is_grad_enabled() or not pair.input.requires_grad)
            and not _is_watched(y)
        ):
            return pair.input
        self._pair = None
        return None

    def log_det_of(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        """The log-determinant of (x, y), whichever of them is the input, or None if that is not certain.

        One with a graph is returned only once, so that two losses can be differentiated one after the other.
        """
        pair = self._pair
        if pair is None or not pair.log_dets:
            return None
        x, y = (x, y) if pair.input is x else (y, x)
        if not self._matches(pair, module, x, y) or _is_watched(y):
            return None
        try:
            log_det = pair.log_dets.pop()
        except IndexError:  # another thread took it first
            return None
        if not log_det.requires_grad:
            pair.log_dets.append(log_det)
        return log_det

    def joins(self, module: nn.Module, x: Tensor, y: Tensor) -> bool:
        """Return whether `y` is certainly the module's output for `x`."""
        pair = self._pair
        return pair is not None and self._matches(pair, module, x, y)

    def _matches(self, pair: Pair, module: nn.Module, x: Tensor, y: Tensor) -> bool:
        return pair.input is x and pair.output() is y and self._holds(pair, module, y)

    def _holds(self, pair: Pair, module: nn.Module, y: Tensor) -> bool:
        """Return whether nothing that a pair with this output depends on has changed."""
        if pair.retired or pair.ends != _ends(pair.input, y):
            return False
        structure = self.structure(module)
        return (
            pair.structure == structure
            and pair.snapshot.holds_for(structure.tensors)
            and pair.graph == _graph(structure)
        )

    def _release(self, output: object) -> None:
        """Drop the pair if `output` is the weak reference to its output."""
        pair = self._pair
        if pair is not None and pair.output is output:
            self._pair = None

    def clear(self) -> None:
        """Drop the pair and the storages of the module's parameters and buffers, which may have moved."""
        self._pair = self._structure = self._snapshot = None


class Pair:
    """Input, weak reference to the output, log-determinant, and the state of the module they were computed in."""

    def __init__(
        self,
        structure: Structure,
        snapshot: Snapshot,
        x: Tensor,
        y: Tensor,
        log_det: Tensor,
        release: Callable[[object], None],
    ) -> None:
        self.structure, self.snapshot, self.graph = structure, snapshot, _graph(structure)
        self.input, self.output = x, weakref.ref(y, release)
        self.ends = _ends(x, y)
        # Holding the storages ensures that no other tensor gets the same address.
        self._storages = x.untyped_storage(), y.untyped_storage()
        # In a list, whose `pop` is atomic: only one of several threads gets it.
        self.log_dets = [log_det]
        # The hooks reference only this list, so that they keep neither the pair nor its tensors alive.
        self.retired = retired = list[bool]()
        for node in {y.grad_fn, log_det.grad_fn} - {None}:
            node.register_prehook(lambda *_: retired.append(True))  # type: ignore[union-attr]


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
