"""The paper's experiments: its models by name, its settings, and its comparison on any data."""

from pyro_maf.experiments.models import FLOWS, build

__all__ = ["FLOWS", "build"]
