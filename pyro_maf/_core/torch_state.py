"""State of torch: tracing, autocast, random states, changes to tensors, and gradients of a function.

torch counts in-place changes of each tensor, with exceptions. Fused optimizers write without counting, so every step of
any optimizer counts as a change of all tensors. Writes by another process to shared memory are not counted, so such
tensors never count as unchanged.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = [
    "Snapshot",
    "as_far_as_exact",
    "converted",
    "count_change",
    "generator_states",
    "gradients",
    "is_exported",
    "is_intercepted",
    "is_traced",
    "reference_tensor",
    "seeded",
    "set_generator_states",
    "uncounted_changes",
    "without_autocast",
]

Value = TypeVar("Value")
Result = TypeVar("Result")

_steps = 0


def is_traced() -> bool:
    """Return whether a `torch.func` transform or `torch.jit.trace` is active."""
    return torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def is_exported() -> bool:
    """Return whether `torch.export` is recording in its default, non-strict mode."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def is_intercepted() -> bool:
    """Return whether operations are intercepted: by tracing, compilers, forward-mode gradients or dispatch modes."""
    return (
        torch.compiler.is_compiling()
        or is_traced()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def reference_tensor(module: nn.Module, *, floating: bool = True) -> Tensor | None:
    """A floating-point tensor of the module, or None; without `floating`, one of any dtype."""
    # A manual traversal: `parameters()` is slower and cannot be compiled.
    for own in (module._parameters, module._buffers):
        for tensor in own.values():
            if tensor is not None and (not floating or tensor.is_floating_point()):
                return tensor
    for member in module._modules.values():
        if member is not None and (found := reference_tensor(member, floating=floating)) is not None:
            return found
    return None


def converted(value: Value, like: Tensor | None) -> Value:
    """Convert a value to the dtype of `like` under autocast, which may have changed it; else return it unchanged."""
    if isinstance(value, Tensor) and like is not None and _is_cast(value.device.type):
        return value.to(like.dtype)  # type: ignore[return-value]
    return value


def without_autocast(run: Callable[..., Result], *arguments: object, like: Tensor | None) -> Result:
    """Run without autocast on the device of `like`."""
    kind = "cpu" if like is None else like.device.type
    if _is_cast(kind):
        with torch.autocast(kind, enabled=False):
            return run(*arguments)
    return run(*arguments)


def as_far_as_exact(like: Tensor, value: Tensor, *, as_model: bool) -> Tensor:
    """Convert a value to the dtype of `like` if that loses nothing that matters; otherwise return it unchanged.

    With `as_model`, `like` has the model's dtype, not a finer one, and floating-point values are rounded to it.
    """
    if value.dtype == like.dtype or value.is_complex():
        return value
    if not value.is_floating_point():
        converted = value.to(like.dtype)
        return converted if torch.equal(converted.to(value.dtype), value) else value
    return value.to(like.dtype) if as_model or value.dtype == torch.float64 else value


def _is_cast(kind: str) -> bool:
    """Return whether autocast is active on a device type; asking torch about one without it, like meta, raises."""
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Context manager that seeds torch on the CPU and on `device`, and restores the random states on exit."""
    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        # Not `torch.manual_seed`, which seeds every device.
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """Return the global random states that layers draw from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generator_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the random states from `generator_states`, for devices that exist."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def count_change(*_: object) -> None:
    """Record a change to any tensors that torch does not count."""
    global _steps
    _steps += 1


def uncounted_changes() -> int:
    """Number of changes so far that torch does not count."""
    return _steps


register_optimizer_step_post_hook(count_change)


class Snapshot(NamedTuple):
    """State of tensors at one moment.

    Attributes:
        tensors: The tensors, which are compared by identity.
        marks: The number of uncounted changes so far, followed by the tensors' versions and addresses.
        storages: Storages of the tensors. While they are referenced, no other tensor can get their addresses.
    """

    tensors: Sequence[Tensor]
    marks: list[int]
    storages: list[torch.UntypedStorage]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Snapshot | None:
        """The current state of tensors, or None if one of them can change without a version count.

        These are inference tensors, tensors in shared memory, and tensors without a storage.
        """
        try:
            marks = _marks(tensors)
            storages = list(map(torch.Tensor.untyped_storage, tensors))
        except (RuntimeError, NotImplementedError):
            return None
        # torch reports every GPU storage as shared.
        if any(map(torch.UntypedStorage.is_shared, storages)) and any(map(_is_shared_on_cpu, storages)):
            return None
        return cls(tensors, marks, storages)

    def later(self, tensors: Sequence[Tensor]) -> Snapshot | None:
        """As `of`, but faster: storages at the same addresses are the same, and none of them is shared."""
        try:
            marks = _marks(tensors)
        except (RuntimeError, NotImplementedError):
            return None
        count = len(self.tensors)
        if len(tensors) != count or self.marks[1 + count :] != marks[1 + count :]:
            return Snapshot.of(tensors)
        return Snapshot(tensors, marks, self.storages)

    def holds_for(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are the same tensors, unchanged since."""
        # In this order, since inference tensors have no version but are never part of a snapshot.
        return (
            self.marks[0] == _steps
            and len(self.tensors) == len(tensors)
            and all(map(operator.is_, self.tensors, tensors))
            and self.marks == _marks(tensors)
        )


def _marks(tensors: Sequence[Tensor]) -> list[int]:
    return [_steps, *map(_version, tensors), *map(torch.Tensor.data_ptr, tensors)]


_version = operator.attrgetter("_version")


def _is_shared_on_cpu(storage: torch.UntypedStorage) -> bool:
    return storage.device.type == "cpu" and storage.is_shared()


def gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients with respect to the inputs that need one; in grad mode they can be differentiated again.

    `inputs` are tensors or None; `grads` are the gradients with respect to the function's results.
    """
    with torch.enable_grad():
        # Views, because one input may depend on another, and the gradient through that dependence is not the
        # function's.
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        results = function(*inputs)
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    # With a single variable, the log-determinant may not depend on any input that needs a gradient.
    pairs = [pair for pair in zip(results, grads, strict=True) if pair[0].requires_grad]
    outputs, by_outputs = zip(*pairs, strict=True)
    again = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(outputs, wanted, by_outputs, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in needed]
