"""Packages of the `train` extra: imported late, and named in one line where they are missing."""

from __future__ import annotations

from importlib import import_module

__all__ = ["require"]

DISTRIBUTIONS = {"sklearn": "scikit-learn"}
"""What is installed where that has another name than what is imported."""


def require(who: str, *packages: str) -> None:
    """Raise unless these packages can be imported.

    Args:
        who: The function that needs them.
        packages: By the names that they are imported by.

    Raises:
        ModuleNotFoundError: For the first that is not installed, with what to do.

    Example:
        >>> require("fit", "numpy", "no_such_package")
        Traceback (most recent call last):
            ...
        ModuleNotFoundError: fit needs no_such_package, which is not installed: pip install pyro-maf[train].
    """
    for package in packages:
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:  # the package is there, and is broken
                raise
            raise ModuleNotFoundError(
                f"{who} needs {DISTRIBUTIONS.get(package, package)}, which is not installed: "
                "pip install pyro-maf[train].",
                name=package,
            ) from None
