"""Posteriors with exact draws: closed-form densities, models without data, and posteriors tabulated on a grid."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from parts.dynamics import predator_prey
from parts.posteriors import Posterior

DRAWS = 10_000
CELLS = {1: 20_000, 2: 1_000, 3: 160}
"""Number of grid cells along each axis, by the number of axes."""
Sample = Callable[[np.random.Generator, int], np.ndarray]
LogDensity = Callable[[Tensor], Tensor]
Model = Callable[..., Any]


def closed_form(name: str, dim: int, prior_scale: float, log_density: LogDensity, sample: Sample) -> Posterior:
    """An unnormalised density of a vector z, as a model: a wide normal prior, and a factor that corrects for it."""

    def model() -> None:
        prior = dist.Normal(torch.zeros(dim), prior_scale).to_event(1)
        z = pyro.sample("z", prior)
        pyro.factor("density", log_density(z) - prior.log_prob(z))

    columns = tuple(f"z[{index + 1}]" for index in range(dim))
    return Posterior(name, model, (), columns, sample(np.random.default_rng(0), DRAWS))


def mixture(name: str, prior_scale: float, centres: Any, scales: Any, weights: Any) -> Posterior:
    """A mixture of isotropic normals."""
    locs, sds, shares = (torch.as_tensor(each, dtype=torch.float32) for each in (centres, scales, weights))

    def log_density(z: Tensor) -> Tensor:
        parts = dist.Normal(locs, sds[:, None]).to_event(1).log_prob(z[..., None, :])
        return (parts + shares.log()).logsumexp(-1)

    def sample(rng: np.random.Generator, count: int) -> np.ndarray:
        which = rng.choice(len(shares), count, p=np.asarray(weights))
        return locs.numpy()[which] + sds.numpy()[which, None] * rng.normal(size=(count, locs.shape[1]))

    return closed_form(name, locs.shape[1], prior_scale, log_density, sample)


def ring(name: str, radius: float, width: float, dim: int = 2) -> Posterior:
    """A density that depends only on the distance from the origin: a ring or a shell."""

    def log_density(z: Tensor) -> Tensor:
        return -((z.norm(dim=-1) - radius) ** 2) / (2 * width**2)

    def sample(rng: np.random.Generator, count: int) -> np.ndarray:
        radii = np.linspace(max(1e-6, radius - 8 * width), radius + 8 * width, 100_001)
        density = radii ** (dim - 1) * np.exp(-((radii - radius) ** 2) / (2 * width**2))
        direction = rng.normal(size=(count, dim))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        return rng.choice(radii, count, p=density / density.sum())[:, None] * direction

    return closed_form(name, dim, 2 * radius, log_density, sample)


def prior(name: str, model: Model, columns: tuple[str, ...]) -> Posterior:
    """A model without data: its posterior is its prior."""
    pyro.set_rng_seed(0)
    with torch.no_grad(), pyro.plate("_draws", DRAWS, dim=-2):
        nodes = poutine.trace(model).get_trace().nodes.values()
    sites = {node["name"]: node["value"] for node in nodes if node["type"] == "sample"}
    posterior = Posterior(name, model, (), columns, np.zeros((0, len(columns))))
    return Posterior(name, model, (), columns, posterior.table(sites))


def tabulated(
    name: str, model: Model, bounds: Mapping[str, tuple[float, float]], *, exchangeable: bool = False
) -> Posterior:
    """A model of up to three scalar latent variables, whose posterior within bounds is tabulated on a grid.

    Exchangeable variables are tabulated in ascending order only, and their draws permuted.
    """
    columns = tuple(bounds)
    cells = CELLS[len(columns)]
    steps = [(high - low) / cells for low, high in bounds.values()]
    axes = [
        low + step * (torch.arange(cells, dtype=torch.float64) + 0.5)
        for (low, _), step in zip(bounds.values(), steps, strict=True)
    ]
    points = torch.cartesian_prod(*axes).reshape(-1, len(columns))
    if exchangeable:
        points = points[(points.diff(dim=1) > 0).all(1)]
    scores = torch.cat([_log_joint(model, columns, block) for block in points.split(100_000)])
    rng = np.random.default_rng(0)
    which = rng.choice(len(points), DRAWS, p=scores.softmax(0).numpy())
    jitter = (rng.random((DRAWS, len(columns))) - 0.5) * np.array(steps)
    draws = points[which].numpy() + jitter
    return Posterior(name, model, (), columns, rng.permuted(draws, axis=1) if exchangeable else draws)


def _log_joint(model: Model, columns: tuple[str, ...], points: Tensor) -> Tensor:
    data = {column: points[:, index, None] for index, column in enumerate(columns)}
    with pyro.plate("_points", len(points), dim=-2):
        trace = poutine.trace(poutine.condition(model, data=data)).get_trace()
    trace.compute_log_prob()
    terms = [node["log_prob"] for node in trace.nodes.values() if node["type"] == "sample"]
    rows = (torch.broadcast_to(term, (*torch.broadcast_shapes(term.shape, (len(points), 1)),)) for term in terms)
    return torch.stack([each.sum(1) for each in rows]).sum(0)


def banana(name: str, bend: float, width: float) -> Posterior:
    """A parabola with normal noise around it."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(bend * (x**2 - 1), width))

    return prior(name, model, ("x", "y"))


def funnel(dim: int) -> Posterior:
    """Neal's funnel, centred: a log-variance, and dim - 1 normals of that variance."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        with pyro.plate("numbers", dim - 1):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    return prior(f"funnel_{dim}", model, ("v", *(f"x[{index}]" for index in range(1, dim))))


def simple(name: str, fn: Callable[[], Any], size: int) -> Posterior:
    """A model with a single site."""
    columns = tuple(f"z[{index}]" for index in range(1, size + 1)) if size else ("z",)
    return prior(name, lambda: pyro.sample("z", fn()), columns)


def hierarchy(groups: int, spread: float, noise: float = 1.0) -> Posterior:
    """Group means around a common mean. Given tau the posterior is normal; that of tau is tabulated."""
    rng = np.random.default_rng(groups)
    y = torch.tensor(1.0 + spread * rng.normal(size=groups) + noise * rng.normal(size=groups), dtype=torch.float32)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(2.0))
        with pyro.plate("groups", groups):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, noise), obs=y)

    data = y.double().numpy()
    taus = np.exp(np.linspace(math.log(1e-4), math.log(100.0), 40_001))  # a grid of log tau
    variance = noise**2 + taus**2
    precision = groups / variance + 1 / 25
    mean = data.sum() / variance / precision
    log_p = -0.5 * groups * np.log(variance) - 0.5 * np.log(precision) + 0.5 * precision * mean**2
    log_p += -0.5 * (data**2).sum() / variance - np.log1p((taus / 2) ** 2) + np.log(taus)
    weights = np.exp(log_p - log_p.max())
    which = rng.choice(len(taus), DRAWS, p=weights / weights.sum())
    tau = taus[which]
    mu = mean[which] + rng.normal(size=DRAWS) / np.sqrt(precision[which])
    shrink = tau[:, None] ** 2 / (tau[:, None] ** 2 + noise**2)
    theta = shrink * data + (1 - shrink) * mu[:, None] + np.sqrt(shrink) * noise * rng.normal(size=(DRAWS, groups))
    columns = ("mu", "tau", *(f"theta[{index}]" for index in range(1, groups + 1)))
    return Posterior(f"hierarchy_{groups}", model, (), columns, np.column_stack([mu, tau, theta]))


def horseshoe(size: int) -> Posterior:
    """Normal means with centred horseshoe priors, independent given tau; lambda and tau are tabulated."""
    rng = np.random.default_rng(size)
    truth = np.where(np.arange(size) < max(1, size // 5), 5.0, 0.0)
    y = torch.tensor(truth + rng.normal(size=size), dtype=torch.float32)

    def model() -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        with pyro.plate("means", size):
            scale = pyro.sample("lam", dist.HalfCauchy(1.0))
            beta = pyro.sample("beta", dist.Normal(0.0, scale * tau))
            pyro.sample("y", dist.Normal(beta, 1.0), obs=y)

    data = y.double().numpy()
    logs = np.linspace(-12, 12, 601)
    prior_log = logs - np.log1p(np.exp(2 * logs))
    variance = 1 + np.exp(2 * (logs[:, None] + logs[None, :]))  # (tau, lambda)
    terms = -0.5 * (np.log(variance)[..., None] + data**2 / variance[..., None]) + prior_log[None, :, None]
    largest = terms.max(1, keepdims=True)
    log_p = prior_log + (np.log(np.exp(terms - largest).sum(1)) + largest[:, 0]).sum(-1)
    which = rng.choice(len(logs), DRAWS, p=np.exp(log_p - log_p.max()) / np.exp(log_p - log_p.max()).sum())
    shares = np.exp(terms - largest).cumsum(1)
    places = [(shares[which, :, j] < rng.random(DRAWS)[:, None] * shares[which, -1:, j]).sum(1) for j in range(size)]
    step = logs[1] - logs[0]
    log_tau = logs[which] + step * (rng.random(DRAWS) - 0.5)
    log_lam = logs[np.stack(places, 1)] + step * (rng.random((DRAWS, size)) - 0.5)
    shrink = 1 / (1 + np.exp(-2 * (log_lam + log_tau[:, None])))
    beta = shrink * data + np.sqrt(shrink) * rng.normal(size=(DRAWS, size))
    columns = ("tau", *(f"{site}[{index}]" for site in ("lam", "beta") for index in range(1, size + 1)))
    return Posterior(f"horseshoe_{size}", model, (), columns, np.column_stack([np.exp(log_tau), np.exp(log_lam), beta]))


def regression(
    name: str, units: Any, correlation: float = 0.0, rows: int = 60, prior_scale: float = 100.0
) -> Posterior:
    """A linear regression with known noise variance and wide priors, whose posterior is normal."""
    rng, rows = np.random.default_rng(0), 60
    units = np.asarray(units, dtype=float)
    x = rng.normal(size=(rows, len(units)))
    x = (math.sqrt(1 - correlation) * x + math.sqrt(correlation) * x[:, :1]) * units
    y = x @ (1 / units) + rng.normal(size=rows)
    design, data = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)

    def model() -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(len(units)), prior_scale).to_event(1))
        with pyro.plate("rows", rows):
            pyro.sample("y", dist.Normal((beta * design).sum(-1), 1.0), obs=data)

    precision = design.double().numpy().T @ design.double().numpy() + np.eye(len(units)) / prior_scale**2
    mean = np.linalg.solve(precision, design.double().numpy().T @ data.double().numpy())
    draws = mean + np.linalg.solve(np.linalg.cholesky(precision).T, rng.normal(size=(len(units), DRAWS))).T
    return Posterior(name, model, (), tuple(f"beta[{index + 1}]" for index in range(len(units))), draws)


class Likelihood:
    """Data, and their distribution as a function of the latent variables, passed by name."""

    def __init__(self, data: Any, distribution: Callable[..., Any]) -> None:
        self.data = torch.as_tensor(data, dtype=torch.float32)
        self.distribution = distribution


def observed(
    name: str, bounds: Mapping[str, tuple[float, float]], priors: Mapping[str, Any], likelihood: Any
) -> Posterior:
    """A model of scalars with independent priors and this likelihood."""
    data = likelihood.data

    def model() -> None:
        values = {site: pyro.sample(site, fn) for site, fn in priors.items()}
        with pyro.plate("rows", len(data)):
            pyro.sample("data", likelihood.distribution(**values), obs=data)

    return tabulated(name, model, bounds)


def _noise(seed: int, size: int) -> Tensor:
    return torch.as_tensor(np.random.default_rng(seed).normal(size=size), dtype=torch.float32)


def _normals(rows: int) -> Posterior:
    data = Likelihood(2.0 + 3.0 * _noise(1, rows), lambda loc, scale: dist.Normal(loc, scale))
    priors = {"loc": dist.Normal(0.0, 10.0), "scale": dist.HalfNormal(10.0)}
    return observed(f"normal_{rows}_rows", {"loc": (-40, 40), "scale": (1e-3, 45)}, priors, data)


def _switching(components: int) -> Posterior:
    """A mixture of equal weights with exchangeable means: each permutation of them is a mode."""
    centres = torch.linspace(-2.0, 2.0, components)
    data = torch.cat([centre + 0.6 * _noise(index, 15) for index, centre in enumerate(centres)])

    def model() -> None:
        means = [pyro.sample(f"m{index}", dist.Normal(0.0, 4.0)) for index in range(components)]
        parts = dist.Normal(torch.stack(means, -1), 0.6)
        with pyro.plate("rows", len(data)):
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.ones(components)), parts), obs=data)

    bounds = {f"m{index}": (-4.5, 4.5) for index in range(components)}
    return tabulated(f"switching_{components}", model, bounds, exchangeable=True)


def _logistic(separated: bool) -> Posterior:
    x = torch.linspace(-2, 2, 12)
    y = (x > 0.1).float() if separated else torch.tensor([0.0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1])
    data = Likelihood(y, lambda a, b: dist.Bernoulli(logits=a + b * x))
    priors = {"a": dist.Normal(0.0, 10.0), "b": dist.Normal(0.0, 10.0)}
    return observed(f"logistic{'_separated' * separated}", {"a": (-40, 40), "b": (-15, 55)}, priors, data)


def _waves() -> Posterior:
    """A sine wave of unknown frequency, with many local modes, one of which dominates."""
    t = torch.linspace(0, 4, 30)
    data = Likelihood(torch.sin(3.0 * t) + 0.4 * _noise(2, 30), lambda w, a: dist.Normal(a * torch.sin(w * t), 0.4))
    priors = {"w": dist.Uniform(0.0, 12.0), "a": dist.Normal(0.0, 2.0)}
    return observed("frequency", {"w": (0.0, 12.0), "a": (-4, 4)}, priors, data)


def _decay() -> Posterior:
    t = torch.linspace(0, 3, 15)
    data = Likelihood(
        2 * torch.exp(-0.7 * t) + 0.3 * _noise(3, 15), lambda a, k: dist.Normal(a * torch.exp(-k * t), 0.3)
    )
    priors = {"a": dist.HalfNormal(5.0), "k": dist.HalfNormal(3.0)}
    return observed("decay", {"a": (1e-3, 8), "k": (1e-3, 8)}, priors, data)


def _mixture_prior() -> Posterior:
    data = Likelihood(0.3 + 0.5 * _noise(4, 3), lambda z: dist.Normal(z, 0.8))
    parts = dist.Normal(torch.tensor([-1.5, 1.5]), torch.tensor([0.3, 0.6]))
    prior_of_z = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.6, 0.4])), parts)
    return observed("mixture_prior", {"z": (-5, 6)}, {"z": prior_of_z}, data)


def _pair(name: str, data: Any, scale: float, of: Callable[[Tensor, Tensor], Tensor], reach: float) -> Posterior:
    """Two standard normals, of which a function is observed with noise."""
    priors = {"a": dist.Normal(0.0, 1.0), "b": dist.Normal(0.0, 1.0)}
    bounds = {"a": (-reach, reach), "b": (-reach, reach)}
    return observed(name, bounds, priors, Likelihood(data, lambda a, b: dist.Normal(of(a, b), scale)))


def _correlated(dim: int, correlation: float) -> Posterior:
    factor = torch.linalg.cholesky(correlation * torch.ones(dim, dim) + (1 - correlation) * torch.eye(dim))
    return simple(f"normal_{dim}", lambda: dist.MultivariateNormal(torch.zeros(dim), scale_tril=factor), dim)


def _student(dim: int, freedom: float) -> Posterior:
    return simple(
        f"student_{dim}_{freedom:g}", lambda: dist.MultivariateStudentT(freedom, torch.zeros(dim), torch.eye(dim)), dim
    )


_MAKERS: dict[str, Callable[[], Posterior]] = {
    "normal_2": lambda: _correlated(2, 0.95),
    "normal_20": lambda: _correlated(20, 0.8),
    "units": lambda: simple(
        "units", lambda: dist.Normal(torch.zeros(6), 10 ** torch.linspace(-3, 3, 6)).to_event(1), 6
    ),
    "student_2_5": lambda: _student(2, 5.0),
    "student_5_3": lambda: _student(5, 3.0),
    "student_2_2": lambda: _student(2, 2.0),
    "laplace": lambda: simple("laplace", lambda: dist.Laplace(torch.zeros(4), 1.0).to_event(1), 4),
    "gumbel": lambda: simple("gumbel", lambda: dist.Gumbel(torch.zeros(3), 1.0).to_event(1), 3),
    "gamma": lambda: simple("gamma", lambda: dist.Gamma(torch.tensor([0.5, 1.0, 5.0]), 1.0).to_event(1), 3),
    "beta": lambda: simple(
        "beta", lambda: dist.Beta(torch.tensor([0.5, 2.0]), torch.tensor([0.5, 5.0])).to_event(1), 2
    ),
    "shares": lambda: simple("shares", lambda: dist.Dirichlet(torch.tensor([0.8, 2.0, 5.0, 1.0])), 4),
    "lognormal": lambda: simple("lognormal", lambda: dist.LogNormal(torch.zeros(3), 1.5).to_event(1), 3),
    "uniform": lambda: simple("uniform", lambda: dist.Uniform(torch.zeros(2), 1.0).to_event(1), 2),
    "banana": lambda: banana("banana", 1.0, 0.5),
    "banana_thin": lambda: banana("banana_thin", 2.0, 0.1),
    "funnel_2": lambda: funnel(2),
    "funnel_10": lambda: funnel(10),
    "funnel_100": lambda: funnel(100),
    "ring": lambda: ring("ring", 2.0, 0.2),
    "ring_wide": lambda: ring("ring_wide", 1.0, 0.4),
    "shell": lambda: ring("shell", 2.0, 0.3, dim=3),
    "two_modes": lambda: mixture("two_modes", 5.0, [[-3, -3], [3, 3]], [0.7, 0.7], [0.5, 0.5]),
    "two_modes_unequal": lambda: mixture("two_modes_unequal", 5.0, [[-3, 0], [3, 1]], [0.5, 0.8], [0.85, 0.15]),
    "two_modes_near": lambda: mixture("two_modes_near", 5.0, [[-1.2, 0], [1.2, 0]], [0.7, 0.7], [0.5, 0.5]),
    "two_modes_sharp": lambda: mixture("two_modes_sharp", 5.0, [[-2, 0], [2, 0]], [0.05, 1.0], [0.3, 0.7]),
    "two_modes_10": lambda: mixture("two_modes_10", 5.0, [[-1.5] * 10, [1.5] * 10], [0.7, 0.7], [0.5, 0.5]),
    "four_modes": lambda: mixture(
        "four_modes", 5.0, [[-3, -3], [-3, 3], [3, -3], [3, 3]], [0.6] * 4, [0.4, 0.3, 0.2, 0.1]
    ),
    "spike_and_slab": lambda: mixture("spike_and_slab", 5.0, [[0, 0], [0, 0]], [0.1, 3.0], [0.5, 0.5]),
    "switching_2": lambda: _switching(2),
    "switching_3": lambda: _switching(3),
    "hierarchy_5": lambda: hierarchy(5, 0.5),
    "hierarchy_50": lambda: hierarchy(50, 0.3),
    "hierarchy_200": lambda: hierarchy(200, 0.3),
    "horseshoe_5": lambda: horseshoe(5),
    "horseshoe_20": lambda: horseshoe(20),
    "regression": lambda: regression("regression", [1.0] * 5),
    "regression_unscaled": lambda: regression("regression_unscaled", [1.0, 1e3, 1e-2, 50.0], prior_scale=1e4),
    "regression_correlated": lambda: regression("regression_correlated", [1.0] * 20, correlation=0.95),
    "normal_3_rows": lambda: _normals(3),
    "normal_30_rows": lambda: _normals(30),
    "logistic": lambda: _logistic(separated=False),
    "logistic_separated": lambda: _logistic(separated=True),
    "frequency": _waves,
    "decay": _decay,
    "mixture_prior": _mixture_prior,
    "product": lambda: _pair("product", [1.0, 1.2], 0.3, lambda a, b: a * b, 6.0),
    "square": lambda: _pair("square", [1.5, 1.4], 0.4, lambda a, b: a**2 + 0.2 * b, 6.0),
    "distance": lambda: _pair("distance", [1.0], 0.1, lambda a, b: (a**2 + b**2).sqrt(), 6.0),
    "cauchy_two_rows": lambda: observed(
        "cauchy_two_rows",
        {"loc": (-60, 60)},
        {"loc": dist.Normal(0.0, 20.0)},
        Likelihood([-5.0, 5.0], lambda loc: dist.Cauchy(loc, 1.0)),
    ),
    "counts": lambda: observed(
        "counts",
        {"rate": (1e-4, 8)},
        {"rate": dist.Gamma(2.0, 1.0)},
        Likelihood([0.0, 2, 1, 0], lambda rate: dist.Poisson(rate)),
    ),
    "predator_prey": predator_prey,
}
TOYS = {name: functools.cache(make) for name, make in _MAKERS.items()}
"""Cached functions without arguments that return a posterior with exact draws, by name."""
