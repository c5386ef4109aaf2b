"""Effects of a model's run besides its results: random numbers that it draws, and objects that it changes."""

from __future__ import annotations

import dis
import gc
import random
import sys
import sysconfig
from functools import cache
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType
from typing import Self, cast

import numpy as np
import pyro
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_maf.infer.models.model import Args, Kwargs

__all__ = ["DrawRecorder", "Watch"]

STORES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL")
INSTALLED = ("site-packages", "dist-packages")
"""Folders of other packages, which may be within that of Python's own modules."""
TAKERS = ("next", "pop", "popleft", "popitem")
"""Built-in functions that change what they are called on, and return a part of it."""


class DrawRecorder(TorchDispatchMode):
    """Mode that records the sites for which random numbers are drawn.

    A handler within a model, such as `poutine.block`, hides a site from handlers around the model, but not its draw.

    Attributes:
        sites: Their names.
        any: True if any random numbers were drawn; those of Python and numpy are noticed on exit.
        largest: Numbers in the largest tensor that was computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sites: set[str] = set()
        self.any = False
        self.largest = 1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's compiler, which takes a second to load, has no part in this

    def __enter__(self) -> Self:
        self._before = _other_states()
        return cast("Self", super().__enter__())

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.any = self.any or _other_states() != self._before

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.any = True
            if name := _site_above():
                self.sites.add(name)
        sizes = (leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.largest = max([self.largest, *sizes])
        return result


def _other_states() -> tuple[object, ...]:
    """States of the generators of Python and numpy."""
    state = np.random.get_state(legacy=False)["state"]
    return random.getstate(), state["pos"], state["key"].tobytes()


def _site_above() -> str:
    """Return the name of the site that is being drawn further up the call stack; "" if none is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is pyro.sample.__code__:
            return str(frame.f_locals["name"])
        frame = frame.f_back
    return ""


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
