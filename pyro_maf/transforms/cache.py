"""Cache of the pair (x, y) that a flow computed last, valid only while nothing that it depends on has changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_maf._core.torch_state import Snapshot

__all__ = ["Pair", "caching_is_possible", "forget"]


def caching_is_possible() -> bool:
    """False where tensors have no lasting identity: under compile, `torch.func` and inference mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.is_inference_mode_enabled()
    )


class Pair:
    """One input, the module's output for it, and their log-determinant.

    The pair lives as long as the output does. It is valid for the same tensor objects at the same versions, the same
    parameters and buffers at the same versions, the same train/eval and grad modes, and as long as the same ones
    of these tensors require a gradient. A backward through its graph retires it, so that no graph is traversed twice.
    """

    def __init__(
        self, state: _State, given: Tensor, made: Tensor, log_det: Tensor, forget: Callable[[Any], None]
    ) -> None:
        self._state = state
        self._given = given
        self._made = weakref.ref(made, forget)
        self._ends = _ends(given, made)
        # Holding the storages ensures that no other tensor gets the same address.
        self._storages = given.untyped_storage(), made.untyped_storage()
        # In a list, whose `pop` is atomic: only one of several threads gets it.
        self._log_dets = [log_det]
        # The hooks hold this list alone: they must keep neither the pair nor its tensors alive.
        self._retired: list[bool] = []
        for tensor in (made, log_det):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(_Retire(self._retired))

    @classmethod
    def of(
        cls, module: nn.Module, given: Tensor, made: Tensor, log_det: Tensor, forget: Callable[[Any], None]
    ) -> Pair | None:
        """The pair, or None if something that it depends on can change without a version count."""
        if made.is_inference() or given.is_inference() or (state := _state(module)) is None:
            return None
        return cls(state, given, made, log_det, forget)

    def given_for(self, module: nn.Module, made: Tensor) -> Tensor | None:
        """The input with output `made`, or None if that is not certain."""
        given = self._given
        if self._made() is not made or (given.requires_grad and not torch.is_grad_enabled()):
            return None
        return given if self._holds(module, made) and not _is_watched(made) else None

    def log_det_of(self, module: nn.Module, given: Tensor, made: Tensor) -> Tensor | None:
        """The log-determinant of (given, made), or None if that is not certain.

        One with a graph is returned once only, so that two losses can be differentiated one after the other.
        """
        if not self._log_dets or not self.joins(module, given, made) or _is_watched(made):
            return None
        try:
            log_det = self._log_dets.pop()
        except IndexError:  # another thread was first
            return None
        if not log_det.requires_grad:
            self._log_dets.append(log_det)
        return log_det

    def joins(self, module: nn.Module, given: Tensor, made: Tensor) -> bool:
        """Return whether `made` is certain to be the module's output for `given`."""
        return self._given is given and self._made() is made and self._holds(module, made)

    def _holds(self, module: nn.Module, made: Tensor) -> bool:
        return not self._retired and self._ends == _ends(self._given, made) and self._state.holds_for(module)


class _Retire:
    def __init__(self, retired: list[bool]) -> None:
        self._retired = retired

    def __call__(self, *_: Any) -> None:
        self._retired.append(True)


class _State(NamedTuple):
    """State that a module's map depends on, and which of its tensors are part of a graph."""

    modes: list[object]
    tensors: Snapshot
    graph: list[bool]

    def holds_for(self, module: nn.Module) -> bool:
        """Return whether the module is still in this state."""
        modes, tensors = _parts(module)
        return self.modes == modes and self.tensors.holds_for(tensors) and self.graph == _graph(tensors)


# The last snapshot of each module: comparing with it is faster than taking another.
_snapshots: weakref.WeakKeyDictionary[nn.Module, Snapshot] = weakref.WeakKeyDictionary()


def forget(module: nn.Module) -> None:
    """Release the storages of a module's parameters and buffers after these have moved."""
    _snapshots.pop(module, None)


def _state(module: nn.Module) -> _State | None:
    modes, tensors = _parts(module)
    snapshot = _snapshots.get(module)
    if snapshot is None or not snapshot.holds_for(tensors):
        snapshot = Snapshot.of(tensors)
        if snapshot is None:
            return None
        _snapshots[module] = snapshot
    return _State(modes, snapshot, _graph(tensors))


def _parts(module: nn.Module) -> tuple[list[object], list[Tensor]]:
    """The grad mode, the train/eval mode and the hooks of each module in it, and all parameters and buffers."""
    tensors: list[Tensor | None] = []
    modes: list[object] = [torch.is_grad_enabled()]
    members: list[nn.Module | None] = [module]
    for member in members:  # grows as it is walked
        if member is None:
            continue
        own = member.__dict__  # the fastest access to a module's members
        modes.append(own["training"])
        if parameters := own["_parameters"]:
            tensors += parameters.values()
        if buffers := own["_buffers"]:
            tensors += buffers.values()
        if children := own["_modules"]:
            members += children.values()
        elif len(parameters) < 2 and isinstance(member, nn.Linear):
            for name in {"weight", "bias"} - parameters.keys():
                # A tensor in place of a parameter; or a property that is drawn at each access and never the same again.
                replaced = own.get(name)
                tensors.append(replaced)
                modes.append(name if isinstance(replaced, Tensor) else object())
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            modes += *own["_forward_hooks"], *own["_forward_pre_hooks"]
    return modes, [tensor for tensor in tensors if tensor is not None]


def _graph(tensors: list[Tensor]) -> list[bool]:
    """`requires_grad` and `is_leaf` of each tensor; nothing in no-grad mode, where they do not matter."""
    if not torch.is_grad_enabled():
        return []
    return [*[tensor.requires_grad for tensor in tensors], *[tensor.is_leaf for tensor in tensors]]


def _ends(given: Tensor, made: Tensor) -> tuple[int | bool, ...]:
    """Marks of a pair that change when either end is written to or becomes part of another graph."""
    return (
        given._version,
        made._version,
        given.data_ptr(),
        made.data_ptr(),
        given.requires_grad,
        made.requires_grad,
        given.is_leaf,
        made.is_leaf,
    )


def _is_watched(made: Tensor) -> bool:
    """Return whether the gradient at an output is observed, which a cached result would bypass."""
    return made.retains_grad or bool(made._backward_hooks)
