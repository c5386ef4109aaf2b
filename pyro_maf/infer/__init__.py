"""Flows as guides of Pyro models: guides, an objective, fitting, and the diagnosis of the result."""

from pyro_maf.infer.diagnosis import Diagnosis, diagnose, reweight, to_arviz
from pyro_maf.infer.guide_fitting import GuideFit, fit_guide
from pyro_maf.infer.guides import AutoIAF, AutoMAF, AutoRealNVP
from pyro_maf.infer.neutra import NeuTra, neutra
from pyro_maf.infer.path_gradient import TracePath_ELBO
from pyro_maf.infer.saved_guide import SavedGuide

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
