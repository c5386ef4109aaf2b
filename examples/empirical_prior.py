"""A prior learned from past groups, for a new group with few data.

Each group is a regression, y = a + b x + noise, and the coefficients (a, b) of the groups follow a law that is far from
normal: a banana, b = a^2 - 1 and a little. `fit_prior` learns it from the least-squares estimates of 1,000 past
groups. Then come 300 new groups with two rows each, and 50 rows more that are held out to be predicted.

What it shows: with the learned prior the held-out rows are predicted better than with a normal prior of the mean and
covariance of the same estimates, the usual empirical Bayes, and much better than with a weak prior, which knows nothing
of past groups. The true law as the prior shows how much more there was to gain. With the flow and with the true law,
draws of the prior are weighted by importance; with a normal prior the posterior has a closed form, which is used.

Run with `python examples/empirical_prior.py --out demo`. Takes about three quarters of a minute on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import MCMC, NUTS
from pyro.infer.importance import vectorized_importance_weights
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyro_maf import fit_prior
from pyro_maf.experiments import estimate

CONSOLE = Console()
NOISE = 0.5
WINDOW = ((-4.0, 4.0), (-3.5, 9.0))


@dataclass(frozen=True)
class Settings:
    """Number of groups and of rows in each; maximum number of epochs, and number of draws of a posterior."""

    past_groups: int = 1000
    past_rows: int = 30
    new_groups: int = 300
    new_rows: int = 2
    held_out_rows: int = 50
    max_epochs: int = 1000
    draws: int = 5_000


@dataclass(frozen=True)
class Groups:
    """Coefficients (groups, 2), hidden from the models, and x and y of each row, (groups, rows)."""

    coefficients: Tensor
    x: Tensor
    y: Tensor

    def rows(self, part: slice) -> Groups:
        """The same groups with some of their rows."""
        return Groups(self.coefficients, self.x[:, part], self.y[:, part])


class Population(dist.TorchDistribution):
    """The law of the coefficients: a ~ Normal(0, 1.2), b | a ~ Normal(a^2 - 1, 0.3)."""

    support = dist.constraints.real_vector
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, batch_shape: Sequence[int] = ()) -> None:
        super().__init__(torch.Size(batch_shape), torch.Size([2]))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        a, noise = torch.randn(2, *sample_shape, *self.batch_shape)
        a = 1.2 * a
        return torch.stack([a, a.square() - 1 + 0.3 * noise], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        a, b = value.unbind(-1)
        return dist.Normal(0.0, 1.2).log_prob(a) + dist.Normal(a.square() - 1, 0.3).log_prob(b)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Population:
        return Population(batch_shape)


def groups(count: int, rows: int, seed: int) -> Groups:
    """Groups of the population."""
    pyro.set_rng_seed(seed)
    coefficients = Population().sample((count,))
    x = 2 * torch.rand(count, rows) - 1
    mean = coefficients[:, :1] + coefficients[:, 1:] * x
    return Groups(coefficients, x, mean + NOISE * torch.randn(count, rows))


def design(x: Tensor) -> Tensor:
    """The columns 1 and x."""
    return torch.stack([torch.ones_like(x), x], -1)


def estimates(past: Groups) -> Tensor:
    """Least squares in each group, (groups, 2)."""
    return torch.linalg.lstsq(design(past.x), past.y.unsqueeze(-1)).solution.squeeze(-1)


def model(prior: Any, x: Tensor, y: Tensor) -> None:
    """One group."""
    coefficients = pyro.sample("coefficients", prior)
    mean = coefficients[..., 0] + coefficients[..., 1] * x
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def by_importance(prior: Any, seen: Groups, held_out: Groups, draws: int) -> Tensor:
    """Mean log predictive density of each group's held-out rows, with draws of the prior weighted by likelihood.

    log p(y* | y) is log sum_k w_k p(y* | coefficients_k), with weights w_k in proportion to p(y | coefficients_k).
    """
    scores = []

    def guide(*_: Any) -> None:
        pyro.sample("coefficients", prior)

    for x, y, new_x, new_y in zip(seen.x, seen.y, held_out.x, held_out.y, strict=True):
        log_w, trace, _ = vectorized_importance_weights(
            model, guide, prior, x, y, num_samples=draws, max_plate_nesting=1
        )
        coefficients = trace.nodes["coefficients"]["value"].reshape(draws, 2)
        log_p = dist.Normal(coefficients @ design(new_x).T, NOISE).log_prob(new_y)
        scores.append((log_w.log_softmax(0).unsqueeze(-1) + log_p).logsumexp(0).mean())
    return torch.stack(scores)


def exactly(prior: dist.MultivariateNormal, seen: Groups, held_out: Groups) -> Tensor:
    """The same for a normal prior, whose posterior is normal."""
    observed, new = design(seen.x), design(held_out.x)
    precision = prior.precision_matrix + observed.mT @ observed / NOISE**2
    covariance = torch.linalg.inv(precision)
    pull = (prior.precision_matrix @ prior.mean).unsqueeze(-1) + observed.mT @ seen.y.unsqueeze(-1) / NOISE**2
    mean = (new @ covariance @ pull).squeeze(-1)
    variance = NOISE**2 + torch.einsum("gni,gij,gnj->gn", new, covariance, new)
    return dist.Normal(mean, variance.sqrt()).log_prob(held_out.y).mean(-1)


def priors(past: Tensor, settings: Settings) -> dict[str, Any]:
    """Priors of the coefficients of a new group, from the estimates of past ones, by name."""
    return {
        "flow": fit_prior(past, max_epochs=settings.max_epochs),
        "normal": dist.MultivariateNormal(past.mean(0), past.T.cov()),
        "weak": dist.MultivariateNormal(torch.zeros(2), 100 * torch.eye(2)),
        "the true law": Population(),
    }


@torch.no_grad()
def score(by_name: dict[str, Any], new: Groups, settings: Settings) -> dict[str, Tensor]:
    """Mean log predictive density in nats per held-out row, of each new group."""
    seen, held_out = new.rows(slice(settings.new_rows)), new.rows(slice(settings.new_rows, None))
    scores = {}
    for name, prior in by_name.items():
        pyro.set_rng_seed(0)
        if isinstance(prior, dist.MultivariateNormal):
            scores[name] = exactly(prior, seen, held_out)
        else:
            scores[name] = by_importance(prior, seen, held_out, settings.draws)
    return scores


def table(scores: dict[str, Tensor]) -> Table:
    """Scores of the priors, and the paired gain of the flow over each."""
    shown = Table(title="New groups: nats per held-out row, with two standard errors over groups")
    shown.add_column("prior")
    shown.add_column("log predictive density", justify="right")
    shown.add_column("gain of the flow, paired", justify="right")
    for name, its in scores.items():
        shown.add_row(name, str(estimate(its)), "" if name == "flow" else str(estimate(scores["flow"] - its)))
    return shown


def posterior_draws(prior: Any, x: Tensor, y: Tensor, draws: int = 200) -> Tensor:
    """Draws of one group's coefficients by NUTS, (draws, 2)."""
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=draws, warmup_steps=draws, disable_progbar=True)
    mcmc.run(prior, x, y)
    return mcmc.get_samples()["coefficients"]


def draw(by_name: dict[str, Any], past: Tensor, new: Groups) -> Figure:
    """Each prior with past estimates, and the posterior of the first new group by NUTS."""
    figure = Figure(figsize=(3.4 * len(by_name), 3.8), dpi=150, layout="constrained")
    grid = torch.cartesian_prod(*(torch.linspace(*ends, 150) for ends in WINDOW))
    a, b = (column.reshape(150, 150) for column in grid.T)
    for axes, (name, prior) in zip(figure.subplots(1, len(by_name), sharey=True), by_name.items(), strict=True):
        with torch.no_grad():
            density = prior.log_prob(grid).exp().reshape(150, 150)
        draws = posterior_draws(prior, new.x[0], new.y[0])
        axes.plot(*past.T, ".", color="0.75", markersize=2, label="past estimates")
        levels = (density.max() * torch.tensor([0.03, 0.1, 0.3, 0.6, 0.9])).tolist()
        axes.contour(a.numpy(), b.numpy(), density.numpy(), levels=levels, cmap="viridis", linewidths=0.8)
        axes.plot(*draws.T, ".", color="tab:orange", markersize=2, label="posterior of a new group")
        axes.plot(*new.coefficients[0], "*", color="black", markersize=10, label="its true coefficients")
        axes.set(title=f"prior: {name}", xlabel="a", xlim=WINDOW[0], ylim=WINDOW[1])
    figure.axes[0].set_ylabel("b")
    figure.axes[0].legend(loc="upper center", fontsize=7)
    return figure


def run(settings: Settings) -> tuple[dict[str, Any], Tensor, Groups, dict[str, Tensor]]:
    """Return the priors, the past estimates, the new groups, and the scores of the priors on these."""
    past = estimates(groups(settings.past_groups, settings.past_rows, seed=0))
    new = groups(settings.new_groups, settings.new_rows + settings.held_out_rows, seed=1)
    by_name = priors(past, settings)
    return by_name, past, new, score(by_name, new, settings)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, predict, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the picture (default: demo)")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    settings = Settings()
    by_name, past, new, scores = run(settings)
    path = out / "empirical-prior.png"
    draw(by_name, past, new.rows(slice(settings.new_rows))).savefig(path)
    CONSOLE.print(table(scores))
    CONSOLE.print(f"wrote {path}; {time.monotonic() - started:.0f} s in all", soft_wrap=True)


if __name__ == "__main__":
    main()
