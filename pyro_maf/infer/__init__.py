"""Flows as guides of Pyro models: guides, an objective, fitting, and diagnosis of the result."""

from pyro_maf.infer.diagnosis.diagnosis import Diagnosis, diagnose, reweight, to_arviz
from pyro_maf.infer.fitting.fit_guide import GuideFit, fit_guide
from pyro_maf.infer.guides.auto_flow import AutoIAF, AutoMAF, AutoRealNVP
from pyro_maf.infer.guides.path_gradient import TracePath_ELBO
from pyro_maf.infer.guides.saved import SavedGuide
from pyro_maf.infer.neutra import NeuTra, neutra

__all__ = [
    "AutoIAF",
    "AutoMAF",
    "AutoRealNVP",
    "Diagnosis",
    "GuideFit",
    "NeuTra",
    "SavedGuide",
    "TracePath_ELBO",
    "diagnose",
    "fit_guide",
    "neutra",
    "reweight",
    "to_arviz",
]
