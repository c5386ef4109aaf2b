r"""Masked autoregressive flows for Pyro.

MAF, its inverse (IAF) and RealNVP as Pyro transforms with exact log-determinants: guides for variational inference,
learned priors, and density estimators. Every flow maps noise x to data y; densities are in nats.
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
        FlowPrior,
        MADEMoG,
        MAFMoG,
    )
    from pyro_maf.flows import IAF, MAF, ConditionalIAF, ConditionalMAF, ConditionalRealNVP, RealNVP
    from pyro_maf.nn import MADE
    from pyro_maf.saving import load
    from pyro_maf.training import fit

__all__ = [
    "IAF",
    "MADE",
    "MAF",
    "ConditionalFlowPrior",
    "ConditionalIAF",
    "ConditionalMADEMoG",
    "ConditionalMAF",
    "ConditionalMAFMoG",
    "ConditionalRealNVP",
    "FlowPrior",
    "MADEMoG",
    "MAFMoG",
    "RealNVP",
    "fit",
    "infer",
    "load",
]
__version__ = "0.1.0"

HOMES = {
    "distributions": "ConditionalFlowPrior ConditionalMADEMoG ConditionalMAFMoG FlowPrior MADEMoG MAFMoG",
    "flows": "IAF MAF ConditionalIAF ConditionalMAF ConditionalRealNVP RealNVP",
    "nn": "MADE",
    "saving": "load",
    "training": "fit",
}
"""Where the names above are from. Each is imported when it is first asked for: with it comes torch, for which the
command line should not wait before it shows its help."""

PARTS = (
    "datasets",
    "distributions",
    "experiments",
    "flows",
    "infer",
    "nn",
    "plotting",
    "report",
    "training",
    "transforms",
)
"""Modules that need no import of their own."""


def __getattr__(name: str) -> Any:
    if name in PARTS:
        return importlib.import_module(f"pyro_maf.{name}")
    for home, names in HOMES.items():
        if name in names.split():
            value = globals()[name] = getattr(importlib.import_module(f"pyro_maf.{home}"), name)
            return value
    raise AttributeError(f"module 'pyro_maf' has no attribute {name!r}{_hint(name)}", name=name)


def _hint(name: str) -> str:
    """Where a name is that is looked for here, for instance one that is a part's own, or that is spelled otherwise."""
    if name.startswith("_"):
        return ""
    for part in PARTS:
        for public in importlib.import_module(f"pyro_maf.{part}").__all__:
            if public.lower() == name.lower():
                return f": it is pyro_maf.{public if public in __all__ else f'{part}.{public}'}"
    return ""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *PARTS})
