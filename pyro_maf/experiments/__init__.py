"""The paper's experiments: its models by name, its settings, and its comparison on any data."""

from pyro_maf.experiments.candidates import ROWS, SETTINGS, Candidate, Settings, candidates
from pyro_maf.experiments.comparison import compare, divide
from pyro_maf.experiments.gaussian import fit_gaussian
from pyro_maf.experiments.models import FLOWS, build
from pyro_maf.experiments.results import Comparison, Estimate, Score, estimate

__all__ = [
    "FLOWS",
    "ROWS",
    "SETTINGS",
    "Candidate",
    "Comparison",
    "Estimate",
    "Score",
    "Settings",
    "build",
    "candidates",
    "compare",
    "divide",
    "estimate",
    "fit_gaussian",
]
