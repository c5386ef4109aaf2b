"""The paper's experiments: its models by name, its settings, and its comparison on any data."""

from pyro_maf.experiments.comparison import compare, divide
from pyro_maf.experiments.models import FLOWS, ROWS, SETTINGS, Candidate, Settings, build, candidates, fit_gaussian
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
