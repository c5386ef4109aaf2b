"""The guides to compare, the loop that fits them, and NUTS with as many model evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
import zuko
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions.transforms import ComposeTransformModule, affine_coupling, permute
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.optim import ClippedAdam

from parts.posteriors import Posterior
from parts.standings_of_guides import CHAIN, CONSTANT, FITTED
from pyro_maf.infer import AutoIAF, AutoMAF, AutoRealNVP, Diagnosis, diagnose, fit_guide

WIDTHS = [64, 64]
LAYERS = 3
COUPLINGS = 6
STEPS = 4_000
PARTICLES = 16
NESTING = 1
FIRST_RATE, LAST_RATE = 1e-2, 5e-4


def couplings(dim: int) -> ComposeTransformModule:
    """Pyro's RealNVP, with random permutations between layers, as Pyro's documentation advises."""
    layers: list[Any] = []
    for index in range(COUPLINGS):
        layers += [permute(dim)] if index else []
        layers.append(affine_coupling(dim, hidden_dims=WIDTHS))
    return ComposeTransformModule(layers)


class AutoZuko(AutoContinuous):
    """zuko's neural spline flow as a guide, inverted as in Pyro's tutorial, so that draws take one pass per layer."""

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self.flow = zuko.flows.NSF(self.latent_dim, transforms=LAYERS, hidden_features=WIDTHS)
        self.flow.transform = self.flow.transform.inv

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The flow as a Pyro distribution."""
        return ZukoToPyro(self.flow())


GUIDES: dict[str, Callable[[Any], Any]] = {
    "AutoIAF": AutoIAF,
    FITTED: AutoIAF,
    CONSTANT: AutoIAF,
    "AutoMAF": AutoMAF,
    "AutoRealNVP": AutoRealNVP,
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal": lambda model: AutoIAFNormal(model, hidden_dim=WIDTHS, num_transforms=LAYERS),
    "AutoNormalizingFlow": lambda model: AutoNormalizingFlow(model, couplings),
    "ZukoToPyro NSF": AutoZuko,
}
CONTENDERS = (*GUIDES, CHAIN)
DIAGNOSED = 10_000
WARM_UP = 500
"""Number of warm-up draws of a chain, which are discarded."""


class Fit(NamedTuple):
    """A fitted guide or a chain.

    Attributes:
        guide: The guide; None for a chain.
        diagnosis: The guide's diagnosis; an empty one for a chain.
        draws: Draws of a chain, by site; empty for a guide.
        start, seconds: Processor seconds of initialisation and of the steps.
        steps: Number of steps of a guide, or of model evaluations of a chain.
        clock: Processor seconds until each draw of a chain, warm-up included; empty for a guide.
    """

    guide: Any
    diagnosis: Diagnosis
    draws: dict[str, torch.Tensor]
    start: float
    seconds: float
    steps: int
    clock: Sequence[float] = ()


def fit(name: str, posterior: Posterior, steps: int | None, seed: int = 0) -> Fit:
    """Initialise and fit a guide; `steps` is the number for the plain loop and the maximum for `fit_guide`."""
    if name == CHAIN:
        return chain(posterior, PARTICLES * (steps or STEPS), seed)
    guide, start = started(name, posterior, seed)
    before = time.process_time()
    if name == FITTED:
        limit = {} if steps is None else {"steps": steps}
        result = fit_guide(posterior.model, guide, *posterior.args, progress=False, **limit)
        return Fit(guide, result.diagnosis, {}, start, time.process_time() - before, len(result.elbo))
    taken = steps or STEPS
    svi = stepper(posterior, guide, taken, falls=name != CONSTANT)
    for _ in range(taken):
        svi.step(*posterior.args)
    seconds = time.process_time() - before
    return Fit(
        guide, diagnose(posterior.model, guide, *posterior.args, num_samples=DIAGNOSED), {}, start, seconds, taken
    )


class _SpentError(Exception):
    """Raised when a chain has used up its model evaluations."""


def chain(posterior: Posterior, evaluations: int, seed: int = 0) -> Fit:
    """A NUTS chain that ends after `evaluations` model evaluations, or earlier with 10,000 draws."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    count, draws, clock = 0, [], []

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count > evaluations:
            raise _SpentError
        return posterior.model(*args)

    def keep(kernel: NUTS, values: dict[str, torch.Tensor], stage: str, _: int) -> None:
        if not stage.lower().startswith("warm"):
            draws.append({name: kernel.transforms[name].inv(value) for name, value in values.items()})
            clock.append(time.process_time() - before)

    before = time.process_time()
    mcmc = MCMC(NUTS(counted), num_samples=DIAGNOSED, warmup_steps=WARM_UP, disable_progbar=True, hook_fn=keep)
    with suppress(_SpentError):
        mcmc.run(*posterior.args)
    sites = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]} if draws else {}
    seconds = time.process_time() - before
    return Fit(None, Diagnosis(reason="a chain"), sites, 0.0, seconds, min(count, evaluations), clock)


@torch.no_grad()
def drawn(posterior: Posterior, fitted: Fit, count: int = DIAGNOSED) -> np.ndarray:
    """Draws of a guide with a fixed seed, (count, columns), or those of a chain."""
    if fitted.guide is None:
        return posterior.table(fitted.draws) if fitted.draws else np.full((1, len(posterior.columns)), np.nan)
    pyro.set_rng_seed(1)
    with pyro.plate("_draws", count, dim=-2):
        sites = fitted.guide(*posterior.args)
    return posterior.table(sites)


def started(name: str, posterior: Posterior, seed: int = 0) -> tuple[Any, float]:
    """A guide initialised by one call, and the processor seconds of that call."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = GUIDES[name](posterior.model)
    before = time.process_time()
    with torch.no_grad():
        guide(*posterior.args)
    return guide, time.process_time() - before


def stepper(posterior: Posterior, guide: Any, steps: int = STEPS, *, falls: bool = True) -> SVI:
    """SVI of the plain loop, with a learning rate that decays over `steps` or stays constant."""
    decay = (LAST_RATE / FIRST_RATE) ** (1 / steps) if falls else 1.0
    elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=NESTING)
    return SVI(posterior.model, guide, ClippedAdam({"lr": FIRST_RATE, "lrd": decay}), elbo)
