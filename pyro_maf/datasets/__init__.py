"""Data to fit: two-dimensional toys of known density, and scikit-learn's images as the paper prepares such.

Everything is drawn from a seed and leaves torch's global generator alone.
"""

from pyro_maf.datasets.dataset import Dataset
from pyro_maf.datasets.images import complete_patches, digits, patches
from pyro_maf.datasets.pixels import LogitPixels
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
    "Toy",
    "complete_patches",
    "digits",
    "patches",
]
