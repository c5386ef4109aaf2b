r"""Normalizing flows for Pyro.

MAF, its inverse (IAF), RealNVP and neural spline flows as Pyro transforms with exact log-determinants: guides for
variational inference, learned priors, and density estimators. Every flow maps noise x to data y; densities are in nats.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_maf import infer
    from pyro_maf.distributions import (
        ConditionalFlowPrior,
        ConditionalMADEMoG,
        ConditionalMAFMoG,
        ConditionalMixtureFlow,
        FlowPrior,
        MADEMoG,
        MAFMoG,
        MixtureFlow,
    )
    from pyro_maf.flows import (
        IAF,
        MAF,
        NSF,
        ConditionalIAF,
        ConditionalMAF,
        ConditionalNSF,
        ConditionalRealNVP,
        RealNVP,
    )
    from pyro_maf.nn import MADE
    from pyro_maf.saving import load
    from pyro_maf.training import fit, fit_prior

__all__ = [
    "IAF",
    "MADE",
    "MAF",
    "NSF",
    "ConditionalFlowPrior",
    "ConditionalIAF",
    "ConditionalMADEMoG",
    "ConditionalMAF",
    "ConditionalMAFMoG",
    "ConditionalMixtureFlow",
    "ConditionalNSF",
    "ConditionalRealNVP",
    "FlowPrior",
    "MADEMoG",
    "MAFMoG",
    "MixtureFlow",
    "RealNVP",
    "fit",
    "fit_prior",
    "infer",
    "load",
]
__version__ = "0.2.0"

HOMES = ("saving", "nn", "flows", "distributions", "training")
"""Modules of the names above, each of which imports the preceding ones. They are imported on first access, because they
import torch, and `pyro-maf --help` should not wait for it."""

PARTS = (
    "datasets",
    "distributions",
    "experiments",
    "flows",
    "infer",
    "nn",
    "plotting",
    "report",
    "testing",
    "training",
    "transforms",
    "univariate",
)
"""Modules that are imported on first access."""


def __getattr__(name: str) -> Any:
    if name in PARTS:
        return importlib.import_module(f"pyro_maf.{name}")
    for home in HOMES if name in __all__ else ():
        if name in (module := importlib.import_module(f"pyro_maf.{home}")).__all__:
            value = globals()[name] = getattr(module, name)
            return value
    raise AttributeError(f"module 'pyro_maf' has no attribute {name!r}{_hint(name)}", name=name)


def _hint(name: str) -> str:
    """Hint for a missing name: the module that has it, or its correct capitalisation."""
    if name.startswith("_"):
        return ""
    for part in PARTS:
        for public in importlib.import_module(f"pyro_maf.{part}").__all__:
            if public.lower() == name.lower():
                return f": it is pyro_maf.{public if public in __all__ else f'{part}.{public}'}"
    return ""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *PARTS})
