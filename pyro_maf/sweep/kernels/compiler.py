"""numba's compiler, set up so that a kernel is the same code in the process that compiles it and in later ones.

By default, numba optimises each function with those that it calls, for its own use, and links it as a weak symbol into
its callers, to be optimised again with them. Wherever LLVM does not inline it, the process that compiles runs the
former code, and a process that loads the callers from disk the latter, which differs in the last digits. Here, all that
a kernel calls is private to it, and optimised as part of it alone. That takes half the time, too.
"""

from __future__ import annotations

from typing import Any, TypeVar

import llvmlite.binding as llvm
from numba import njit
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

from pyro_maf.sweep.kernels.cache import stored

__all__ = ["INNER", "entry", "inner"]

Function = TypeVar("Function")


class _Kernel(JITCodeLibrary):
    """Code of a function that Python calls, with all that it calls."""

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if function.linkage == llvm.Linkage.linkonce_odr:
                function.linkage = "internal"
        super()._optimize_final_module()


class _Part(JITCodeLibrary):
    """Code of a function that other kernels call."""

    def _optimize_final_module(self) -> None:
        """Leave it to the kernels."""

    def _finalize_final_module(self) -> None:
        """Hand over to the engine nothing but the variables that numba sets when it has compiled a function."""
        whole = self._final_module
        names = [variable.name for variable in whole.global_variables if variable.name.startswith("_ZN08NumbaEnv")]
        self._final_module = llvm.parse_assembly("\n".join(f'@"{name}" = common global i8* null' for name in names))
        super()._finalize_final_module()
        self._final_module = whole


class _KernelCompiler(Compiler):
    library: type[JITCodeLibrary] = _Kernel

    def compile_extra(self, func: Any) -> Any:
        """Compile a function into a library of this class."""
        self.state.library = self.library(self.state.targetctx.codegen(), func.__qualname__)
        self.state.library.enable_object_caching()
        return super().compile_extra(func)


class _PartCompiler(_KernelCompiler):
    library = _Part


# Not the full fastmath: infinities and NaNs must pass through.
COMMON: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
INNER = {**COMMON, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": _PartCompiler}
"""Compiler options of functions that other kernels call."""


def entry(function: Any) -> Any:
    """Compile a function that Python calls, once for each machine; it releases the interpreter's lock."""
    return stored(njit(**COMMON, nogil=True, pipeline_class=_KernelCompiler)(function))


def inner(function: Function) -> Function:
    """Compile a function that other kernels call, as part of each of them."""
    compiled: Any = njit(**INNER)(function)
    return compiled
