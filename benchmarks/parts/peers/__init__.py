"""Us and the others, each behind the same few methods."""

from __future__ import annotations

import importlib
import importlib.metadata

# Not pyro itself: once it is imported, that is the name of a module of this package.
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
"""The peers and the distributions that install them."""


def find(names: list[str]) -> tuple[dict[str, type[Peer]], dict[str, str]]:
    """The peers that are installed, us first, and a line about each that is not."""
    from parts.peers.ours import Ours

    # Nobody checks what a distribution is given: not all of them would.
    enable_validation(False)
    found: dict[str, type[Peer]] = {OURS: Ours}
    missing = {}
    for name in names:
        try:
            # `parts.peers.flowjax` holds the class Flowjax, and likewise for the others.
            found[name] = getattr(importlib.import_module(f"parts.peers.{name}"), name.capitalize())
        except ImportError as error:
            missing[name] = f"{name} is left out: it is not installed here ({error})."
    return found, missing


def versions() -> dict[str, str]:
    """The installed version of everything that takes part."""
    found = {}
    for name in ("torch", "numpy", "numba", "jax", *PEERS.values()):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
