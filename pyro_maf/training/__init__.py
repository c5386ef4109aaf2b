"""Fitting flows, densities and priors to data by maximum likelihood.

Lightning Fabric starts the processes of a distributed fit; nothing else imports it.
"""

from pyro_maf.training.fitting import fit
from pyro_maf.training.prior import fit_prior
from pyro_maf.training.result import FitResult
from pyro_maf.training.scores import LogLikelihood

__all__ = ["FitResult", "LogLikelihood", "fit", "fit_prior"]
