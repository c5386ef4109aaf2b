"""Detection of tracing, under which control flow must not depend on tensor values."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["is_exported", "is_looked_into", "is_traced"]


def is_traced() -> bool:
    """Return whether a `torch.func` transform or `torch.jit.trace` is active."""
    return torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def is_exported() -> bool:
    """Return whether `torch.export` is recording in its default, non-strict mode."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def is_looked_into() -> bool:
    """Return whether operations are intercepted: by tracing, compilers, forward-mode gradients or dispatch modes."""
    return (
        torch.compiler.is_compiling()
        or is_traced()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )
