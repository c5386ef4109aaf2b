"""The data sets of the paper, from a folder that is laid out as the published archive is: a folder a set.

Nothing is downloaded: each loader reads local files, names a missing one and its source, and prepares rows as the
published code does, so that the same files yield the same rows.

Reference:
    Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017,
    section 4.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType

from pyro_maf._core.checks import check_choice
from pyro_maf.datasets.archive.mnist_cifar10 import cifar10, mnist
from pyro_maf.datasets.archive.uci_bsds300 import bsds300, gas, hepmass, miniboone, power
from pyro_maf.datasets.dataset import Dataset

__all__ = ["ARCHIVE", "bsds300", "cifar10", "gas", "hepmass", "load_dataset", "miniboone", "mnist", "power"]

ARCHIVE: Mapping[str, Callable[..., Dataset]] = MappingProxyType(
    {
        "power": power,
        "gas": gas,
        "hepmass": hepmass,
        "miniboone": miniboone,
        "bsds300": bsds300,
        "mnist": mnist,
        "cifar10": cifar10,
    }
)
"""The loaders by name, in the paper's order. Each takes the root folder; those of `PICKLED`, `allow_pickle` too."""

PICKLED = ("gas", "mnist", "cifar10")


def load_dataset(name: str, root: str | os.PathLike[str], *, allow_pickle: bool = False) -> Dataset:
    r"""Load one of the paper's data sets by name.

    Args:
        name: power, gas, hepmass, miniboone, bsds300, mnist or cifar10.
        root: The folder with one folder for each set.
        allow_pickle: Load a pickle of gas, mnist or cifar10 if there is no other form; that runs any
            code in it.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: As the loader of that name; ValueError for another name.

    Example:
        >>> import pathlib, tempfile, numpy
        >>> with tempfile.TemporaryDirectory() as root:
        ...     pathlib.Path(root, "miniboone").mkdir()
        ...     numpy.save(pathlib.Path(root, "miniboone", "data.npy"), numpy.random.rand(100, 43))
        ...     data = load_dataset("miniboone", root)
        >>> data.name, data.input_dim, data.context_dim
        ('MINIBOONE', 43, 0)
    """
    loader = ARCHIVE[check_choice("load_dataset", "name", name, ARCHIVE)]
    return loader(root, allow_pickle=allow_pickle) if name in PICKLED else loader(root)
