"""The version of the package, without an import of all that is in it."""

from __future__ import annotations

import sys

__all__ = ["version"]


def version() -> str:
    """The version of this package, which is there since this module is."""
    return str(sys.modules[__name__.partition(".")[0]].__version__)
