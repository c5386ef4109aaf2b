"""Flows as guides of Pyro models: guides, an objective, fitting, and what tells whether to trust the result."""

from pyro_maf.infer.diagnosis import Diagnosis, diagnose, reweight, to_arviz
from pyro_maf.infer.guides import AutoIAF, AutoMAF, AutoRealNVP

__all__ = ["AutoIAF", "AutoMAF", "AutoRealNVP", "Diagnosis", "diagnose", "reweight", "to_arviz"]
