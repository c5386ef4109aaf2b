"""Texts of messages: quoting, shortening, lists, and missing packages."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

__all__ = ["MOST_LISTED", "listed", "quoted", "require", "shown"]

LONGEST_TEXT = 60
MOST_LISTED = 10


def shown(text: str, most: int = LONGEST_TEXT) -> str:
    """Escape control characters in a text, and shorten it to `most` characters."""
    cut = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in cut)


def quoted(text: str) -> str:
    """Quote a text, escaped and shortened."""
    return repr(text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…")


def listed(names: Sequence[str]) -> str:
    """Names separated by commas: all, or the first ones and the last of many."""
    if len(names) <= MOST_LISTED:
        return ", ".join(map(shown, names))
    return f"{', '.join(map(shown, names[: MOST_LISTED - 1]))}, ... {shown(names[-1])}"


DISTRIBUTIONS = {"sklearn": "scikit-learn", "lightning_fabric": "lightning-fabric"}
"""Names of distributions that differ from the names of their packages."""


EXTRAS = {"matplotlib": "plot", "typer": "cli", "pyarrow": "cli", "jinja2": "cli", "sbi": "sbi"}
"""The extra of this package that installs a package; `all` has the others."""


def require(who: str, *packages: str) -> None:
    """Raise a ModuleNotFoundError that says what to install if one of these packages cannot be imported."""
    for package in packages:
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:  # the package exists but is broken
                raise
            raise ModuleNotFoundError(
                f"{who} needs {DISTRIBUTIONS.get(package, package)}, which is not installed: "
                f"pip install pyro-maf[{EXTRAS.get(package, 'all')}].",
                name=package,
            ) from None
