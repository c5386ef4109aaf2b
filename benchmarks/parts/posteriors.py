"""Posteriors with reference draws from long chains, and their Pyro models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Posterior:
    """A model, its arguments, and reference draws from its posterior.

    Attributes:
        name: Name of the posterior.
        model: Pyro model that can be vectorised over draws by a plate.
        args: Arguments of the model.
        columns: Names of the parameters, such as "tau" or "theta[3]", counted from one.
        draws: Reference draws, (rows, columns).
        derived: Function of the model's sites that adds those that only `columns` name.
    """

    name: str
    model: Callable[..., Any]
    args: Arguments
    columns: tuple[str, ...]
    draws: np.ndarray
    derived: Callable[..., Mapping[str, Tensor]] | None = None

    @property
    def scales(self) -> np.ndarray:
        """Standard deviation of each column."""
        return self.draws.std(0)

    @property
    def has_columns_of_sites(self) -> bool:
        """Whether every column is an entry of a site."""
        return self.derived is None

    def table(self, sites: Mapping[str, Tensor]) -> np.ndarray:
        """Table of the columns' values, (rows, columns), from values of the sites whose first dimension is draws."""
        sites = sites if self.derived is None else self.derived(sites, *self.args)
        return np.stack([self._column(sites, name) for name in self.columns], 1)

    def _column(self, sites: Mapping[str, Tensor], name: str) -> np.ndarray:
        site, _, index = name.rstrip("]").partition("[")
        flat = sites[site].detach().double().flatten(1) if sites[site].dim() > 1 else sites[site].double()[:, None]
        return flat[:, int(index) - 1 if index else 0].numpy()


class Flat(dist.ImproperUniform):
    """Lebesgue measure. Its draw, which Pyro's guides need once for shapes and initial values, is the image of zero."""

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 (as in Pyro)
        return torch.distributions.transform_to(self.support)(torch.zeros(self.shape(sample_shape)))


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """Eight effects around a common mean, with a funnel in tau."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def autoregression(past: Tensor, y: Tensor) -> None:
    """Autoregression of a time series on its last K values, (T, K)."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([past.shape[-1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("times", len(y)):
        pyro.sample("y", dist.Normal(alpha + (beta * past).sum(-1), sigma), obs=y)


def regression(x: Tensor, y: Tensor) -> None:
    """Least squares with a flat prior on the coefficients."""
    beta = pyro.sample("beta", Flat(dist.constraints.real_vector, (), (x.shape[-1],)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal((beta * x).sum(-1), sigma), obs=y)


def gaussian_process(x: Tensor, k: Tensor) -> None:
    """Counts whose log-rates are a Gaussian process at a few points."""
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    pyro.sample("k", dist.Poisson(_process(rho, alpha, z, x).exp()).to_event(1), obs=k)


def _process(rho: Tensor, alpha: Tensor, z: Tensor, x: Tensor) -> Tensor:
    squares = (x[:, None] - x) ** 2
    kernel = (alpha**2)[..., None, None] * torch.exp(-squares / (2 * rho[..., None, None] ** 2))
    factor, _ = torch.linalg.cholesky_ex(kernel + 1e-5 * torch.eye(len(x)))
    return (factor @ z[..., None])[..., 0]


def _process_columns(sites: Mapping[str, Tensor], x: Tensor, k: Tensor) -> Mapping[str, Tensor]:
    count = len(sites["z"])
    rho, alpha = (sites[name].double().reshape(count) for name in ("rho", "alpha"))
    return {"rho": rho, "alpha": alpha, "f": _process(rho, alpha, sites["z"].double().reshape(count, -1), x)}


def volatility(y: Tensor, first: Tensor) -> None:
    """GARCH(1, 1): the variance of a series depends on the last value and the last variance."""
    mu = pyro.sample("mu", Flat(dist.constraints.real, (), ()))
    level = pyro.sample("alpha0", Flat(dist.constraints.positive, (), ()))
    shock = pyro.sample("alpha1", Flat(dist.constraints.unit_interval, (), ()))
    share = pyro.sample("share", Flat(dist.constraints.unit_interval, (), ()))  # of what alpha1 leaves to beta1
    pyro.factor("triangle", torch.log1p(-shock))
    variance = first**2 + 0 * mu
    scales = [variance.sqrt()]
    for past in y[:-1]:
        variance = level + shock * (past - mu) ** 2 + share * (1 - shock) * variance
        scales.append(variance.sqrt())
    pyro.sample("y", dist.Normal(mu[..., None], torch.stack(scales, -1)).to_event(1), obs=y)


def _volatility_columns(sites: Mapping[str, Tensor], *args: Tensor) -> Mapping[str, Tensor]:
    return {**sites, "beta1": sites["share"] * (1 - sites["alpha1"])}


def _schools_data(data: Mapping[str, Tensor]) -> Arguments:
    return data["y"], data["sigma"]


def _series_data(data: Mapping[str, Tensor]) -> Arguments:
    y, lags = data["y"], int(data["K"])
    return torch.stack([y[lags - lag : len(y) - lag] for lag in range(1, lags + 1)], 1), y[lags:]


def _kidscore_data(data: Mapping[str, Tensor]) -> Arguments:
    school, iq = data["mom_hs"], data["mom_iq"]
    return torch.stack([torch.ones_like(iq), school, iq, school * iq], 1), data["kid_score"]


def _process_data(data: Mapping[str, Tensor]) -> Arguments:
    return data["x"], data["k"]


def _volatility_data(data: Mapping[str, Tensor]) -> Arguments:
    return data["y"], data["sigma1"]


MODELS: dict[str, tuple[Callable[..., None], Callable[[Mapping[str, Tensor]], Arguments]]] = {
    "eight_schools_centered": (eight_schools, _schools_data),
    "arK": (autoregression, _series_data),
    "kidscore_interaction": (regression, _kidscore_data),
    "gp_pois_regr": (gaussian_process, _process_data),
    "garch11": (volatility, _volatility_data),
}
"""Each supported model, by name, and a function from the data to its arguments."""

DERIVED = {"gp_pois_regr": _process_columns, "garch11": _volatility_columns}
"""Functions for columns that are computed from the sites."""


def stored(folder: Path) -> Iterator[Posterior | str]:
    """The posteriors of a folder, and a message for each file without a model of its name."""
    for path in sorted(folder.glob("*.npz")):
        if path.stem not in MODELS:
            yield f"{path.name} is skipped: no model of that name in parts/posteriors.py."
            continue
        model, arguments = MODELS[path.stem]
        with np.load(path) as arrays:
            data = {
                name.removeprefix("data_"): torch.as_tensor(array, dtype=torch.float32)
                for name, array in arrays.items()
                if name.startswith("data_")
            }
            columns = tuple(str(name) for name in arrays["names"])
            yield Posterior(path.stem, model, arguments(data), columns, arrays["draws"], DERIVED.get(path.stem))
