"""Compiled code on disk: numba's own cache, but for what it takes on trust.

numba runs whatever its files hold: of one that is cut short it raises what unpickling raises, at each call; one in
which a bit has changed may compute anything. Here every file ends in a seal, the digest of its name and content, and
none is unpickled whose seal is broken. Such a file costs a warning and the time to compile, after which it is whole
again.
"""

from __future__ import annotations

import functools
import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

from pyro_maf.saving import write_whole

__all__ = ["stored"]

SOURCES = ("elementwise", "kernel", "pack", "products")
"""The modules that compiled code is made of. numba itself looks at the one that a function is in."""
SEAL = hashlib.sha256().digest_size


def stored(dispatcher: Any) -> Any:
    """A function of numba's with its compiled code on disk, in place of `njit(cache=True)`.

    Raises:
        RuntimeError: Of numba's, where it finds no folder to write to.
    """
    # What `njit(cache=True)` sets; numba has no public way to put another cache there.
    dispatcher._cache = _Cache(dispatcher.py_func)
    return dispatcher


class _Cache(FunctionCache):
    """The cache of one function, for all its signatures."""

    def __init__(self, py_func: Any) -> None:
        super().__init__(py_func)
        stamp = (_stamp(), self._impl.locator.get_source_stamp())
        self._cache_file = _SealedFiles(self.cache_path, self._impl.filename_base, stamp)

    def save_overload(self, signature: Any, data: Any) -> None:
        """Write compiled code to disk, where there is room."""
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _warn(f"could not write its compiled code to {self.cache_path} ({error.strerror})")


class _SealedFiles(IndexDataCacheFile):
    """The files of one function: an index of its signatures, and the code for each."""

    def load(self, key: Any) -> Any:
        """The code for a signature, or None."""
        found = super().load(key)
        # Of processes that compile at once, two may take the same number for the code of different signatures.
        return found[1] if found is not None and found[0] == key else None

    def save(self, key: Any, data: Any) -> None:
        """Write the code for a signature."""
        super().save(key, (key, data))

    def _load_index(self) -> dict[Any, str]:
        return super()._load_index() if _is_sound(Path(self._index_path)) else {}

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
    """Whether a file is there with its seal; a warning where it is there without."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    except OSError as error:
        _warn(f"can not read its compiled code in {path.parent} ({path.name}: {error.strerror})")
        return False
    # numba unpickles what comes before the seal and does not look further.
    if content[-SEAL:] == _seal(path, content[:-SEAL]):
        return True
    _warn(f"found its compiled code in {path.parent} damaged ({path.name})")
    return False


@functools.cache
def _stamp() -> str:
    """A number that other sources, or another compiler, would not have."""
    folder = resources.files("pyro_maf.sweep")
    hashed = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for name in SOURCES:
        hashed.update(folder.joinpath(f"{name}.py").read_bytes())
    return hashed.hexdigest()


_said: list[str] = []


def _warn(what: str) -> None:
    """Say what is wrong, once for all functions of a process."""
    if not _said:
        _said.append(what)
        warnings.warn(
            f"pyro-maf {what}: it compiles again, in about half a minute. Should this come again, remove that folder, "
            "or set PYRO_MAF_KERNEL=torch to do without.",
            RuntimeWarning,
            stacklevel=2,
        )
