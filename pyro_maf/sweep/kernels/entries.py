"""The kernels that Python calls."""

from pyro_maf.sweep.kernels.parallel import backward, forward
from pyro_maf.sweep.kernels.step import descend, differentiate_normal, normal, pack, unpack
from pyro_maf.sweep.kernels.tails import bend, bend_back

__all__ = ["backward", "bend", "bend_back", "descend", "differentiate_normal", "forward", "normal", "pack", "unpack"]
