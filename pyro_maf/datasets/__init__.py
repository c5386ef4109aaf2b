"""Data to fit: tables of any kind, toys of known density, and scikit-learn's images as the paper prepares such.

What is drawn is drawn from a seed and leaves torch's global generator alone.
"""

from pyro_maf.datasets.dataset import Dataset
from pyro_maf.datasets.images import complete_patches, digits, patches
from pyro_maf.datasets.pixels import LogitPixels
from pyro_maf.datasets.tables import Table, read_table
from pyro_maf.datasets.toys import TOYS, FigureOne, Funnel, Moons, Pinwheel, Ring, Toy

__all__ = [
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
    "complete_patches",
    "digits",
    "patches",
    "read_table",
]
