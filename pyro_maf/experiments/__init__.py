"""The paper's experiments: its models by name, its settings, and its comparison on any data."""

from pyro_maf.experiments.gaussian import fit_gaussian
from pyro_maf.experiments.models import FLOWS, build

__all__ = ["FLOWS", "build", "fit_gaussian"]
