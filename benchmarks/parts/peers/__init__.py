"""This package and its peers behind a common interface."""

from __future__ import annotations

import importlib
import importlib.metadata

# Not `import pyro`, whose name `parts.peers.pyro` takes once it is imported.
from pyro import enable_validation

from parts.peers.base import Peer, UnsupportedError

__all__ = ["OURS", "PEERS", "Peer", "UnsupportedError", "find", "versions"]

OURS = "pyro-maf"
PEERS = {
    "pyro": "pyro-ppl",
    "zuko": "zuko",
    "nflows": "nflows",
    "normflows": "normflows",
    "flowjax": "flowjax",
}
"""Peers and the distributions that install them."""


def find(names: list[str]) -> tuple[dict[str, type[Peer]], dict[str, str]]:
    """Classes of the installed packages, ours first, and a message for each peer that is not installed."""
    from parts.peers.ours import Ours

    # Not every peer validates arguments, so none of them should.
    enable_validation(False)
    classes: dict[str, type[Peer]] = {OURS: Ours}
    missing = {}
    for name in names:
        try:
            # `parts.peers.flowjax` holds the class Flowjax, and likewise for the others.
            classes[name] = getattr(importlib.import_module(f"parts.peers.{name}"), name.capitalize())
        except ImportError as error:
            missing[name] = f"{name} is left out: it is not installed here ({error})."
    return classes, missing


def versions() -> dict[str, str]:
    """Installed versions of all packages that are compared or needed."""
    installed = {}
    for name in ("torch", "numpy", "numba", "jax", *PEERS.values()):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
