"""Packages of the `train` extra: imported late, with an error of one line if one is missing."""

from __future__ import annotations

from importlib import import_module

__all__ = ["require"]

DISTRIBUTIONS = {"sklearn": "scikit-learn", "lightning_fabric": "lightning-fabric"}
"""Names of distributions that differ from the name of their package."""


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
