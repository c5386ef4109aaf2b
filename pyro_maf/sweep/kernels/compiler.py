"""numba's compiler, configured so that a kernel is the same code in the process that compiles it and in later ones.

By default, numba optimises each function together with its callees, and links it as a weak symbol into its callers,
where it is optimised again. If LLVM does not inline it, the process that compiles runs the former code, and a process
that loads the callers from disk runs the latter, which differs in the last digits. Here, everything that a kernel calls
is private to it, and optimised only as part of it. That also takes half the time.

numba runs whatever its files on disk hold: a truncated one raises an unpickling error at each call, and one with a
flipped bit may compute anything. Here every file ends in a seal, the digest of its name and content, and no file with a
broken seal is unpickled. Such a file costs a warning and a recompilation, which restores it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import llvmlite.binding as llvm
import numba
from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

from pyro_maf._core.files import write_whole
from pyro_maf.univariate import Affine, Spline

__all__ = ["INNER", "entry", "inner", "stored"]

KERNELS = ["compiler", "elementwise", "products", "univariate", "walks"]
SOURCES = ("layout", *(f"kernels/{name}" for name in KERNELS))
"""Modules that the compiled code is built from; numba itself checks only the module of the function."""
CONSTANTS = Affine.BOUND, Spline.GAIN, Spline.STEEPEST, Spline.LOG_SLOPE
"""Constants of other modules that the compiled code contains."""
SEAL = hashlib.sha256().digest_size
Function = TypeVar("Function")


class _Kernel(JITCodeLibrary):
    """Code of a function that Python calls, with all its callees."""

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if function.linkage == llvm.Linkage.linkonce_odr:
                function.linkage = "internal"
        super()._optimize_final_module()


class _Part(JITCodeLibrary):
    """Code of a function that other kernels call."""

    def _optimize_final_module(self) -> None:
        """Do nothing: the kernels optimise it."""

    def _finalize_final_module(self) -> None:
        """Pass to the engine only the variables that numba sets after compiling a function."""
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


# Not the full fastmath, since infinities and NaNs must propagate.
COMMON: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
INNER = {**COMMON, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": _PartCompiler}
"""Compiler options of functions that other kernels call."""


def entry(function: Any) -> Any:
    """Compile a function that Python calls, once per machine; it releases the interpreter's lock."""
    return stored(njit(**COMMON, nogil=True, pipeline_class=_KernelCompiler)(function))


def inner(function: Function) -> Function:
    """Compile a function that other kernels call, as part of each of them."""
    compiled: Any = njit(**INNER)(function)
    return compiled


# -- compiled code on disk --------------------------------------------------------------------------------------------


def stored(dispatcher: Any) -> Any:
    """Cache a numba function's compiled code on disk, instead of `njit(cache=True)`.

    Raises:
        RuntimeError: From numba, if there is no writable folder.
    """
    # The attribute that `njit(cache=True)` sets; numba has no public way to install another cache.
    dispatcher._cache = _Cache(dispatcher.py_func)
    return dispatcher


class _Cache(FunctionCache):
    """The cache of one function, for all its signatures."""

    def __init__(self, py_func: Any) -> None:
        super().__init__(py_func)
        stamp = (_stamp(), self._impl.locator.get_source_stamp())
        self._cache_file = _SealedFiles(self.cache_path, self._impl.filename_base, stamp)

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """The compiled code for a signature, or None after announcing that it is about to be compiled."""
        code = super().load_overload(signature, target_context)
        if code is None:
            # Judged by its arrays: both precisions have float64 tables, and both count steps in float32.
            single, double = (str(signature).lower().count(f"array({kind}") for kind in ("float32", "float64"))
            _say("single" if single > double else "double")
        return code

    def save_overload(self, signature: Any, data: Any) -> None:
        """Write compiled code to disk; warn if that fails."""
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _warn(f"could not write its compiled code to {self.cache_path} ({error.strerror})")


class _SealedFiles(IndexDataCacheFile):
    """The files of one function: an index of its signatures, and the code for each."""

    def load(self, key: Any) -> Any:
        """The code for a signature, or None."""
        found = super().load(key)
        # Processes that compile at the same time may use the same number for the code of different signatures.
        return found[1] if found is not None and found[0] == key else None

    def save(self, key: Any, data: Any) -> None:
        """Write the code for a signature."""
        super().save(key, (key, data))

    def _load_index(self) -> dict[Any, str]:
        if not _is_sound(Path(self._index_path)):
            return {}
        try:
            return super()._load_index()
        except (ImportError, AttributeError):  # signatures of other sources, with classes that no longer exist
            return {}

    def _load_data(self, name: str) -> Any:
        path = Path(self._data_path(name))
        if not _is_sound(path):
            raise FileNotFoundError(path)
        return super()._load_data(name)

    @contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[io.BytesIO]:
        path, file = Path(filepath), io.BytesIO()
        yield file
        content = file.getvalue()
        write_whole(path, content + _seal(path, content))


def _seal(path: Path, content: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + content).digest()


def _is_sound(path: Path) -> bool:
    """Return whether a file exists with a valid seal; warn if it exists without one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    except OSError as error:
        _warn(f"cannot read its compiled code in {path.parent} ({path.name}: {error.strerror})")
        return False
    # numba unpickles what precedes the seal and reads no further.
    if content[-SEAL:] == _seal(path, content[:-SEAL]):
        return True
    _warn(f"found its compiled code in {path.parent} damaged ({path.name})")
    return False


@functools.cache
def _stamp() -> str:
    """Fingerprint of the sources and of the compiler's version."""
    folder = resources.files("pyro_maf.sweep")
    hashed = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {CONSTANTS}".encode())
    for name in SOURCES:
        hashed.update(folder.joinpath(f"{name}.py").read_bytes())
    return hashed.hexdigest()


@functools.cache
def _say(precision: str) -> None:
    """Announce once per precision that the kernels are compiled."""
    print(
        f"pyro-maf compiles its kernels for this machine and {precision} precision, once: about 15 seconds.",
        file=sys.stderr,
    )


_said: list[str] = []


def _warn(what: str) -> None:
    """Warn once per process, for all functions."""
    if not _said:
        _said.append(what)
        warnings.warn(
            f"pyro-maf {what}: it compiles again, in about 15 seconds. Should this come again, remove that folder, "
            "or set PYRO_MAF_KERNEL=torch to do without.",
            RuntimeWarning,
            stacklevel=2,
        )
