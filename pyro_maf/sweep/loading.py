"""The compiled kernels: loaded when first needed, from numba's cache on disk where they have been compiled before."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from pathlib import Path
from typing import Any

__all__ = ["kernels"]

SWITCH = "PYRO_MAF_KERNEL"


@functools.cache
def kernels() -> Any:
    """The module of kernels, or None where the torch sweep has to answer."""
    if os.environ.get(SWITCH) == "torch":
        return None
    try:
        from pyro_maf.sweep import kernel
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        # numba says RuntimeError where it finds no folder to keep compiled code in. Sources may be missing, too; and
        # with NUMBA_DISABLE_JIT, or in a numba to come, there is not what the cache holds on to.
        reason = " ".join(str(error).split())
        warnings.warn(
            f"pyro-maf sweeps in torch, which is slower: its kernels can not be compiled here ({reason}). "
            f"Set {SWITCH}=torch to be spared this warning.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    if not _compiled_before(kernel):
        print("pyro-maf compiles its sweep for this machine, once: about half a minute.", file=sys.stderr)
    return kernel


def _compiled_before(kernel: Any) -> bool:
    folder = Path(kernel.forward_rows.stats.cache_path)
    return any(folder.glob("kernel.*-*.nbi"))
