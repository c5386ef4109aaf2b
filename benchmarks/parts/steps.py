"""Times of a guide's steps, and variance of its gradients."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from parts.guides import NESTING, PARTICLES, started, stepper
from parts.posteriors import Posterior
from pyro_maf.infer import TracePath_ELBO

SEEDS = 100
REPETITIONS = 300
WARM_UP = 20


class DensityELBO(Trace_ELBO):
    """`Trace_ELBO` as for other guides: the entropy term keeps the gradient through the density's parameters."""

    def _get_trace(self, *arguments: Any) -> Any:
        traces = super()._get_trace(*arguments)
        for site in traces[1].nodes.values():
            if "score_parts" in site:
                site["score_parts"] = site["score_parts"]._replace(entropy_term=site["log_prob"])
        return traces


OBJECTIVES = {"Trace_ELBO": DensityELBO, "TracePath_ELBO": TracePath_ELBO}


def gradients(posterior: Posterior, guide: Any, seeds: int = SEEDS, repetitions: int = REPETITIONS) -> dict[str, Any]:
    """Variance of a guide's gradient, summed over parameters, and its time, for both objectives."""
    calls = {name: _gradient(posterior, guide, objective) for name, objective in OBJECTIVES.items()}
    variances = {}
    for name, call in calls.items():
        samples = []
        for seed in range(seeds):
            pyro.set_rng_seed(seed)
            samples.append(call())
        variances[name] = float(torch.stack(samples).double().var(0).sum())
    milliseconds = in_turns(calls, repetitions)
    return {name: {"variance": variances[name], "ms": milliseconds[name]} for name in calls}


def _gradient(posterior: Posterior, guide: Any, objective: type[Trace_ELBO]) -> Callable[[], Tensor]:
    elbo = objective(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=NESTING)
    parameters = list(guide.parameters())

    def call() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        elbo.loss_and_grads(posterior.model, guide, *posterior.args)
        return torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])

    return call


def step_times(posterior: Posterior, names: tuple[str, ...], repetitions: int = REPETITIONS) -> dict[str, float]:
    """Milliseconds of an SVI step of untrained guides, timed in turns."""
    guides = {name: started(name, posterior)[0] for name in names}
    steppers = {name: stepper(posterior, guide) for name, guide in guides.items()}
    return in_turns({name: lambda svi=svi: svi.step(*posterior.args) for name, svi in steppers.items()}, repetitions)


def in_turns(calls: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Median milliseconds of each call, timed in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(-WARM_UP, repetitions):
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            if repetition >= 0:
                times[name].append(1e3 * (time.perf_counter() - before))
    return {name: statistics.median(each) for name, each in times.items()}
