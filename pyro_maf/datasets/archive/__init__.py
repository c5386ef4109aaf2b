"""The data sets of the paper, from a folder laid out like the published archive, with one folder per set.

Nothing is downloaded: each loader reads local files, reports a missing file and its source, and prepares rows like the
published code, so that the same files give the same rows.

Reference:
    Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017,
    section 4.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType

from pyro_maf.datasets.archive.mnist_cifar10 import cifar10, mnist
from pyro_maf.datasets.archive.uci_bsds300 import bsds300, gas, hepmass, miniboone, power
from pyro_maf.datasets.dataset import Dataset

__all__ = ["ARCHIVE", "bsds300", "cifar10", "gas", "hepmass", "miniboone", "mnist", "power"]

ARCHIVE: Mapping[str, Callable[[str | os.PathLike[str]], Dataset]] = MappingProxyType(
    {each.__name__: each for each in (power, gas, hepmass, miniboone, bsds300, mnist, cifar10)}
)
"""The loaders by name, in the paper's order; each takes the root folder."""
