"""The command line: fit a density to a table, score rows, draw samples, say what a model is.

Everything that takes long to import, torch first, is imported by the command that needs it.
"""

from pyro_maf.cli.app import app, main

__all__ = ["app", "main"]
