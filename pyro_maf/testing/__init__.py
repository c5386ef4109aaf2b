"""Laws of transforms, densities and guides, for checking your own: each check raises if a law is broken.

A law compares with an independent computation, such as the Jacobian by autograd, up to a tolerance. Seeds are fixed, so
a run that passed passes again. Where chance plays a part, a correct density fails for at most one in a million seeds.
"""

from __future__ import annotations

from pyro_maf.testing.checks import check_transform
from pyro_maf.testing.comparison import BrokenLawError
from pyro_maf.testing.densities import check_density, check_guide

__all__ = ["BrokenLawError", "check_density", "check_guide", "check_transform"]
