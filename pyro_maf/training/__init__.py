"""Fitting flows, densities and priors to data by maximum likelihood.

Lightning runs the loop. It is imported by the first call of `fit`, never by `import pyro_maf`.
"""

from pyro_maf.training.fitting import fit
from pyro_maf.training.prior import fit_prior
from pyro_maf.training.result import FitResult

__all__ = ["FitResult", "fit", "fit_prior"]
