"""Whether torch records operations rather than values, so that no result may decide what comes next."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["is_exported", "is_looked_into", "is_traced"]


def is_traced() -> bool:
    """Whether `torch.func` or a trace records each operation."""
    return torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def is_exported() -> bool:
    """Whether `torch.export` records the operations themselves, as it does unless asked to be strict."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def is_looked_into() -> bool:
    """Whether anything does: compilers, forward derivatives and dispatch modes too."""
    return (
        torch.compiler.is_compiling()
        or is_traced()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )
