"""Amortised inference on the problem of Pyro's tutorial `svi_flow_guide`: zuko's conditional flow against `AutoIAF`.

One guide is fitted to sixty-four posteriors of three variables. Each log evidence is an integral over one variable, so
the Kullback-Leibler divergence from guide to posterior, log evidence minus ELBO, is exact up to the error of the ELBO.

Run with `python benchmarks/amortised.py`: about four minutes on one core, with the `bench` extra.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
import zuko
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor

from pyro_maf.infer import AutoIAF, diagnose, fit_guide

SETS, POINTS, VARIANCE = 64, 5, 0.01
Guide = Callable[[Tensor], object]


def covariances(z3: Tensor) -> Tensor:
    """Covariances of the points, (*batch, 2, 2)."""
    rho, one = 0.99 * z3.tanh(), torch.ones_like(z3)
    return VARIANCE * torch.stack([one, rho, rho, one], -1).unflatten(-1, (2, 2))


def model(x: Tensor) -> None:
    with pyro.plate("sets", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        points = dist.MultivariateNormal(z[..., None, :2], covariances(z[..., None, 2]))
        pyro.sample("x", points.expand([*z.shape[:-1], POINTS]).to_event(1), obs=x)


def log_evidence(x: Tensor) -> Tensor:
    """Log evidence of each set in nats, (sets,), by quadrature over z3, given which everything is normal."""
    z3 = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    mean, of_one = x.double().mean(-2), covariances(z3)
    of_mean, zero = of_one / POINTS, torch.zeros(2, dtype=torch.float64)
    within = dist.MultivariateNormal(zero, of_one).log_prob((x.double() - mean[:, None])[:, :, None]).sum(1)
    within = within - dist.MultivariateNormal(zero, of_mean).log_prob(zero)
    between = dist.MultivariateNormal(zero, of_mean + torch.eye(2, dtype=torch.float64)).log_prob(mean[:, None])
    return (dist.Normal(0.0, 1.0).log_prob(z3) + within + between).logsumexp(-1) + (z3[1] - z3[0]).log()


def moments(x: Tensor) -> Tensor:
    """Summary statistics: means, and second moments of the standardised deviations, (sets, 4)."""
    mean = x.mean(-2)
    a, b = ((x - mean[..., None, :]) / VARIANCE**0.5).unbind(-1)
    return torch.cat([mean, torch.stack([(a * b).mean(-1), (a**2 + b**2).mean(-1)], -1)], -1)


def coordinates(x: Tensor) -> Tensor:
    """Flattened points, as in the tutorial, (sets, 10)."""
    return x.flatten(-2)


def by_zuko(x: Tensor, encoder: Callable[[Tensor], Tensor], steps: int) -> Guide:
    """Fit the tutorial's flow with its options and its loop."""
    flow = zuko.flows.NSF(3, encoder(x).shape[-1], transforms=1, hidden_features=(256, 256))
    flow.transform = flow.transform.inv

    def guide(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("sets", len(x)):
            pyro.sample("z", ZukoToPyro(flow(encoder(x))))

    optimizer = ClippedAdam({"lr": 1e-3, "clip_norm": 10.0})
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=16, vectorize_particles=True))
    for _ in range(steps):
        svi.step(x)
    return guide


def by_auto_iaf(x: Tensor, encoder: Callable[[Tensor], Tensor], steps: int) -> Guide:
    """Fit `AutoIAF` with its defaults."""
    guide = AutoIAF(model, encoder=encoder)
    fit_guide(model, guide, x, steps=steps, num_particles=8, progress=False)
    return guide


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit each guide; print its divergence from the posteriors and its time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="steps of each guide; default: 4,096 for zuko, 3,000 for ours")
    steps = parser.parse_args(arguments).steps
    pyro.set_rng_seed(0)
    z = torch.randn(SETS, 3)
    x = dist.MultivariateNormal(z[:, None, :2].expand(-1, POINTS, -1), covariances(z[:, None, 2])).sample()
    evidence = log_evidence(x).sum().item()
    print("guide, encoder: mean KL divergence from a posterior in nats, k-hat of all 64, CPU seconds")
    for method, default in ((by_zuko, 4096), (by_auto_iaf, 3000)):
        for encoder in (coordinates, moments):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            started = time.process_time()
            guide = method(x, encoder, steps or default)
            seconds = time.process_time() - started
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                diagnosis = diagnose(model, guide, x)
            gap = (evidence - diagnosis.elbo) / SETS
            print(f"{method.__name__}, {encoder.__name__}: {gap:.3f}, {diagnosis.k_hat:.2f}, {seconds:.1f}", flush=True)


if __name__ == "__main__":
    main()
