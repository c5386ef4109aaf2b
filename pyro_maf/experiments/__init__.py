"""The paper's experiments: its models by name, its settings, and its comparison on any data."""

from pyro_maf.experiments.candidates import ROWS, Candidate, candidates
from pyro_maf.experiments.comparison import Comparison, compare
from pyro_maf.experiments.gaussian import fit_gaussian
from pyro_maf.experiments.models import FLOWS, build
from pyro_maf.experiments.partition import divide
from pyro_maf.experiments.scores import Estimate, Score
from pyro_maf.experiments.settings import SETTINGS, Settings

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
    "fit_gaussian",
]
