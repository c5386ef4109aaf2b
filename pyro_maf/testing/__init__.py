"""Laws of transforms, densities and guides, to hold your own to: each raises where it is broken.

A law compares with an independent computation, such as the Jacobian by autograd, up to a tolerance. Seeds are fixed, so
a run that passed passes again; where chance has a part, at most one of a million seeds fails a correct density.
"""

from __future__ import annotations

from pyro_maf.testing.checks import check_transform
from pyro_maf.testing.comparison import BrokenLawError
from pyro_maf.testing.densities import check_density, check_guide

__all__ = ["BrokenLawError", "check_density", "check_guide", "check_transform"]
