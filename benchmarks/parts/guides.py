"""The guides that are compared, and the loop that fits them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions.transforms import ComposeTransformModule, affine_coupling, permute
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow
from pyro.optim import ClippedAdam

from parts.posteriors import Posterior
from pyro_maf.infer import AutoIAF, AutoMAF, AutoRealNVP, fit_guide

WIDTHS = [64, 64]
LAYERS = 3
COUPLINGS = 6
STEPS = 4_000
PARTICLES = 16
NESTING = 1
FIRST_RATE, LAST_RATE = 1e-2, 5e-4


def couplings(dim: int) -> ComposeTransformModule:
    """Pyro's RealNVP: the dimensions are permuted between layers, as Pyro's own documentation advises."""
    layers: list[Any] = []
    for index in range(COUPLINGS):
        layers += [permute(dim)] if index else []
        layers.append(affine_coupling(dim, hidden_dims=WIDTHS))
    return ComposeTransformModule(layers)


FITTED = "AutoIAF, fit_guide"
GUIDES: dict[str, Callable[[Any], Any]] = {
    "AutoIAF": AutoIAF,
    FITTED: AutoIAF,
    "AutoMAF": AutoMAF,
    "AutoRealNVP": AutoRealNVP,
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, hidden_dim=WIDTHS, num_transforms=LAYERS),
    "AutoNormalizingFlow": lambda model: AutoNormalizingFlow(model, couplings),
}


class Fit(NamedTuple):
    """A fitted guide, processor seconds for its start and for its steps, and how many these were."""

    guide: Any
    start: float
    seconds: float
    steps: int


def fit(name: str, posterior: Posterior, steps: int | None) -> Fit:
    """Start a guide and fit it; `steps` are those of the plain loop, or the most of `fit_guide`, if given."""
    guide, start = started(name, posterior)
    before = time.process_time()
    if name == FITTED:
        limit = {} if steps is None else {"steps": steps}
        result = fit_guide(posterior.model, guide, *posterior.args, progress=False, **limit)
        taken = len(result.elbo)
    else:
        taken = steps or STEPS
        svi = stepper(posterior, guide, taken)
        for _ in range(taken):
            svi.step(*posterior.args)
    return Fit(guide, start, time.process_time() - before, taken)


def started(name: str, posterior: Posterior) -> tuple[Any, float]:
    """A guide that has been called once, and the processor seconds that took."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = GUIDES[name](posterior.model)
    before = time.process_time()
    with torch.no_grad():
        guide(*posterior.args)
    return guide, time.process_time() - before


def stepper(posterior: Posterior, guide: Any, steps: int = STEPS) -> SVI:
    """The plain loop's SVI: the learning rate falls from first to last over `steps`."""
    decay = (LAST_RATE / FIRST_RATE) ** (1 / steps)
    elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=NESTING)
    return SVI(posterior.model, guide, ClippedAdam({"lr": FIRST_RATE, "lrd": decay}), elbo)
