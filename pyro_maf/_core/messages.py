"""Texts of messages: names quoted and shortened, lists, and packages that are missing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

__all__ = ["MOST_LISTED", "listed", "quoted", "require", "shown"]

LONGEST_TEXT = 60
MOST_LISTED = 10


def shown(text: str, most: int = LONGEST_TEXT) -> str:
    r"""Escape control characters in a text, and shorten it to `most` characters.

    Example:
        >>> shown("a\x1b[2Jb"), shown("a" * 9, most=4)
        ('a\\x1b[2Jb', 'aaa…')
    """
    cut = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in cut)


def quoted(text: str) -> str:
    """Quote a text, escaped and shortened."""
    return repr(text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…")


def listed(names: Sequence[str]) -> str:
    """Names separated by commas: all, or the first ones and the last of many.

    Example:
        >>> listed("ab"), listed("abcdefghijklmn")
        ('a, b', 'a, b, c, d, e, f, g, h, i, ... n')
    """
    if len(names) <= MOST_LISTED:
        return ", ".join(map(shown, names))
    return f"{', '.join(map(shown, names[: MOST_LISTED - 1]))}, ... {shown(names[-1])}"


DISTRIBUTIONS = {"sklearn": "scikit-learn", "lightning_fabric": "lightning-fabric"}
"""Names of distributions that differ from the name of their package."""


EXTRAS = {"matplotlib": "plot", "typer": "cli", "pyarrow": "cli", "jinja2": "cli", "sbi": "sbi"}
"""The extra of this package that installs a package; `all` has the others."""


def require(who: str, *packages: str) -> None:
    """Raise unless these packages can be imported.

    Args:
        who: The function that needs them.
        packages: Their import names.

    Raises:
        ModuleNotFoundError: For the first that is not installed; the message says what to install.

    Example:
        >>> require("fit", "numpy", "no_such_package")
        Traceback (most recent call last):
            ...
        ModuleNotFoundError: fit needs no_such_package, which is not installed: pip install pyro-maf[all].
    """
    for package in packages:
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:  # the package is there, and is broken
                raise
            raise ModuleNotFoundError(
                f"{who} needs {DISTRIBUTIONS.get(package, package)}, which is not installed: "
                f"pip install pyro-maf[{EXTRAS.get(package, 'all')}].",
                name=package,
            ) from None
