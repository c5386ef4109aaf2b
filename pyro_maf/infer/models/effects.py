"""Effects of Python code on objects that outlive it, without which a recording of its tensors' operations is not it."""

from __future__ import annotations

import dis
import gc
import sys
import sysconfig
from functools import cache
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType

__all__ = ["Watch"]

STORES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL")
INSTALLED = ("site-packages", "dist-packages")
"""Folders of other packages, which may be within that of Python's own modules."""
TAKERS = ("next", "pop", "popleft", "popitem")
"""Built-in functions that change what they are called on, and return a part of it."""


class Watch:
    """Watch over the Python code that runs while entered, for effects on objects that outlive it.

    Attributes:
        has_effects: True if code that is not torch's, Pyro's, Python's or this package's has some.
    """

    def __init__(self) -> None:
        self.has_effects = False

    def __enter__(self) -> Watch:
        # Finalizers of garbage are no part of what is watched.
        self._collects = gc.isenabled()
        gc.disable()
        self._before = sys.getprofile()
        if self._before is None:
            sys.setprofile(self._see)
        else:  # a profiler takes its place
            self.has_effects = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is None:
            sys.setprofile(None)
        if self._collects:
            gc.enable()

    def _see(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            self.has_effects |= _has_effects(frame.f_code)
        elif event == "c_call" and getattr(argument, "__name__", "") in TAKERS:
            self.has_effects |= not _is_library(frame.f_code.co_filename)


@cache
def _has_effects(code: CodeType) -> bool:
    """True if code assigns to attributes, except to those of a new object, or to names of an outer scope."""
    if _is_library(code.co_filename):
        return False
    instructions = [(each.opname, each.argval) for each in dis.get_instructions(code)]
    is_new = code.co_name in ("__init__", "__new__", "__post_init__")
    return any(
        (name in STORES and not is_new) or (name in ("STORE_DEREF", "DELETE_DEREF") and value in code.co_freevars)
        for name, value in instructions
    )


@cache
def _is_library(filename: str) -> bool:
    packages, standard = _library_folders()
    is_standard = filename.startswith(("<frozen", *standard)) and not any(name in filename for name in INSTALLED)
    return is_standard or filename.startswith(packages)


@cache
def _library_folders() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The folders of torch, Pyro, what it sums discrete sites out by and this package, and Python's own modules."""
    packages = [Path(str(import_module(name).__file__)).parent for name in ("torch", "pyro", "opt_einsum")]
    standard = [path for name, path in sysconfig.get_paths().items() if "stdlib" in name]
    return tuple(f"{folder}/" for folder in (*packages, Path(__file__).parents[1])), tuple(
        f"{path}/" for path in standard
    )
