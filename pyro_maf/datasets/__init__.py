"""Data to fit: any table of numbers, the paper's sets from local files, exact toy densities, scikit-learn's images.

All random draws use a seed and leave the global generators unchanged.
"""

from pyro_maf.datasets.archive import ARCHIVE, bsds300, cifar10, gas, hepmass, miniboone, mnist, power
from pyro_maf.datasets.dataset import Dataset, LogitPixels
from pyro_maf.datasets.images import complete_patches, digits, patches
from pyro_maf.datasets.toys import TOYS, FigureOne, Funnel, Moons, Pinwheel, Ring, Toy
from pyro_maf.tables.table import Table, read_table

__all__ = [
    "ARCHIVE",
    "TOYS",
    "Dataset",
    "FigureOne",
    "Funnel",
    "LogitPixels",
    "Moons",
    "Pinwheel",
    "Ring",
    "Table",
    "Toy",
    "bsds300",
    "cifar10",
    "complete_patches",
    "digits",
    "gas",
    "hepmass",
    "miniboone",
    "mnist",
    "patches",
    "power",
    "read_table",
]
