"""Loading of the compiled kernels: on first use, from numba's on-disk cache if they have been compiled before."""

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
    """The module of kernels, or None if they are unavailable and the torch sweep takes over."""
    if os.environ.get(SWITCH) == "torch":
        return None
    try:
        from pyro_maf.sweep import kernel
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        # numba raises RuntimeError if it has no folder for compiled code. Sources may be missing, too; and with
        # NUMBA_DISABLE_JIT, or in a later numba, the attributes that the cache relies on.
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
