"""The compiled engine: walks over the tables of a run of layers, for CPUs, compiled by numba.

Compiled on first use, or loaded from the on-disk cache.
"""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType

__all__ = ["kernels", "loaded"]

SWITCH = "PYRO_MAF_KERNEL"


@functools.cache
def kernels() -> ModuleType | None:
    """The module of the kernels, or None if they are unavailable and torch is used instead."""
    if os.environ.get(SWITCH) == "torch":
        return None
    try:
        from pyro_maf.sweep.kernels import entries
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        # numba raises RuntimeError if it has no folder for compiled code. Sources may be missing, too; and so may, with
        # NUMBA_DISABLE_JIT or in a later numba, the attributes that the cache relies on.
        reason = " ".join(str(error).split())
        warnings.warn(
            f"pyro-maf computes in torch, which is slower: its kernels cannot be compiled here ({reason}). "
            f"Set {SWITCH}=torch to be spared this warning.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return entries


@functools.cache
def loaded() -> ModuleType:
    """The module of the kernels, for callers that require it."""
    if (module := kernels()) is None:
        raise RuntimeError("pyro-maf expected its compiled kernels, got none.")
    return module
