"""The pair (x, y) that a flow computed last, kept for as long as it is certain to be right."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_maf.changes import Snapshot

__all__ = ["Pair", "caching_is_possible"]


def caching_is_possible() -> bool:
    """False where tensors have no lasting identity: under compile, `torch.func` and inference mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.is_inference_mode_enabled()
    )


class Pair:
    """One input, the output that a module made of it, and their log-determinant.

    The pair lives as long as the output does. It is valid for the same tensor objects at the same versions, the same
    parameters and buffers at the same versions, and the same train/eval and grad modes. A backward through its graph
    retires it, so that no graph is walked a second time.
    """

    def __init__(
        self, module: nn.Module, given: Tensor, made: Tensor, log_det: Tensor, forget: Callable[[Any], None]
    ) -> None:
        self._state = _state(module)
        self._given = given
        self._made = weakref.ref(made, forget)
        self._versions = given._version, made._version
        self._log_det: Tensor | None = log_det
        # The hooks hold this list alone: they must keep neither the pair nor its tensors alive.
        self._retired: list[bool] = []
        for tensor in (made, log_det):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(_Retire(self._retired))

    def given_for(self, module: nn.Module, made: Tensor) -> Tensor | None:
        """The input that gave `made`, or None if that is not certain."""
        return self._given if self._made() is made and self._holds(module, made) else None

    def log_det_of(self, module: nn.Module, given: Tensor, made: Tensor) -> Tensor | None:
        """The log-determinant of (given, made), or None if that is not certain.

        One that carries a graph is handed out once: two losses may then be differentiated one after the other.
        """
        if self._log_det is None or not self.joins(module, given, made):
            return None
        log_det = self._log_det
        if log_det.requires_grad:
            self._log_det = None
        return log_det

    def joins(self, module: nn.Module, given: Tensor, made: Tensor) -> bool:
        """Whether `made` is certain to be what the module makes of `given`."""
        return self._given is given and self._made() is made and self._holds(module, made)

    def _holds(self, module: nn.Module, made: Tensor) -> bool:
        return (
            not self._retired and self._versions == (self._given._version, made._version) and self._same_state(module)
        )

    def _same_state(self, module: nn.Module) -> bool:
        (modes, before), (modes_now, now) = self._state, _state(module)
        return modes == modes_now and before.holds_for(now)


class _Retire:
    def __init__(self, retired: list[bool]) -> None:
        self._retired = retired

    def __call__(self, *_: Any) -> None:
        self._retired.append(True)


def _state(module: nn.Module) -> tuple[list[bool], Snapshot]:
    """All that the module's map depends on: modes and tensors."""
    tensors: list[Any] = []
    modes, members = [torch.is_grad_enabled()], [module]
    for member in members:  # grows as it is walked
        modes.append(member.training)
        if member._parameters:
            tensors += member._parameters.values()
        if member._buffers:
            tensors += member._buffers.values()
        if member._modules:
            members += [child for child in member._modules.values() if child is not None]
    return modes, Snapshot.of(tensors)
