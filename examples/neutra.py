"""Eight schools, centred: NUTS in the coordinates of a guide's noise against NUTS in those of the model.

The effects theta_j ~ Normal(mu, tau) of eight schools and their spread tau make a funnel: where tau is small the
effects lie close together, and steps that suit the rest of the posterior are too long. NUTS diverges there and visits
the neck too seldom. An `AutoIAF` fitted to the posterior maps the funnel to something near a standard normal, and
`neutra` returns the model in those coordinates for NUTS, which is exact with any guide.

What it shows: with the same warm-up and draws, the chains in the guide's coordinates agree, with R-hat under 1.01, and
yield some twenty times as many effective draws a second as those in the coordinates of the model, which have not mixed.
Some divergences remain in both.

Run with `python examples/neutra.py --out demo`. Takes two to three minutes on one core.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import MCMC, NUTS
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyro_maf.infer import AutoIAF, GuideFit, fit_guide, neutra

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # an announcement of arviz's next version
    import arviz

CONSOLE = Console(width=110)
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

Draws = dict[str, Tensor]
"""The value of each site, (chains, draws, *site)."""


@dataclass(frozen=True)
class Settings:
    """Steps of the guide's fit, and number and length of the chains."""

    fit_steps: int = 4_000
    chains: int = 4
    warmup: int = 300
    draws: int = 500


@dataclass(frozen=True)
class Chains:
    """Draws of some chains, their number of divergences, and their duration."""

    draws: Draws
    divergences: int
    seconds: float


def model(effects: Tensor, errors: Tensor) -> None:
    """The schools' true effects, their mean and their spread."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(effects)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effects", dist.Normal(theta, errors), obs=effects)


def run(target: Callable[..., None], settings: Settings) -> Chains:
    """Run NUTS from several seeds, one chain after another."""
    samples, divergences = [], 0
    started = time.monotonic()
    for chain in range(settings.chains):
        pyro.set_rng_seed(chain)
        kernel = NUTS(target, jit_compile=True, ignore_jit_warnings=True)
        mcmc = MCMC(kernel, num_samples=settings.draws, warmup_steps=settings.warmup, disable_progbar=True)
        with warnings.catch_warnings():
            # Pyro compiles by torch.jit, which torch has deprecated.
            warnings.filterwarnings("ignore", message=".*torch.jit")
            mcmc.run(EFFECTS, ERRORS)
        samples.append(mcmc.get_samples())
        divergences += sum(map(len, mcmc.diagnostics()["divergences"].values()))
    draws = {name: torch.stack([each[name] for each in samples]) for name in samples[0]}
    return Chains(draws, divergences, time.monotonic() - started)


def compare(settings: Settings) -> tuple[GuideFit[AutoIAF], dict[str, Chains]]:
    """Fit the guide, and run the chains in both coordinates."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoIAF(model)
    fit = fit_guide(model, guide, EFFECTS, ERRORS, steps=settings.fit_steps, progress=False)
    CONSOLE.print(fit)
    warped = neutra(model, guide)
    chains = run(warped, settings)
    with_guide = Chains(warped.draws(chains.draws), chains.divergences, chains.seconds)
    return fit, {"NUTS on neutra": with_guide, "NUTS": run(model, settings)}


def summary(chains: Chains) -> tuple[float, float]:
    """The largest R-hat of any latent variable, and the smallest effective sample size, of bulk and tails."""
    data = arviz.convert_to_dataset({name: value.numpy() for name, value in chains.draws.items()})
    rhat = arviz.rhat(data)
    sizes = [arviz.ess(data, method=method) for method in ("bulk", "tail")]
    largest = max(float(rhat[name].max()) for name in chains.draws)
    smallest = min(float(each[name].min()) for each in sizes for name in chains.draws)
    return largest, smallest


def table(fit: GuideFit[AutoIAF], every: dict[str, Chains], settings: Settings) -> Table:
    """Effective sample size (ESS), also per second, of the worst latent variable of each set of chains."""
    shown = Table(
        title=f"{settings.chains} chains, {settings.warmup} steps of warm-up, {settings.draws} draws; "
        f"the fit of the guide took {fit.seconds:.0f} s"
    )
    for column in ("", "R-hat", "ESS", "seconds", "ESS/s", "with the fit", "divergences"):
        shown.add_column(column, justify="right" if column else "left")
    for name, chains in every.items():
        rhat, size = summary(chains)
        whole = chains.seconds + (fit.seconds if name != "NUTS" else 0.0)
        figures = [f"{rhat:.3f}", f"{size:.0f}", f"{chains.seconds:.0f}"]
        shown.add_row(name, *figures, f"{size / chains.seconds:.2f}", f"{size / whole:.2f}", f"{chains.divergences}")
    return shown


def draw(every: dict[str, Chains]) -> Figure:
    """The funnel: the first school's effect against log tau."""
    figure = Figure(figsize=(4.2 * len(every), 4.2), dpi=150, layout="constrained")
    panels: Any = figure.subplots(1, len(every), sharex=True, sharey=True)
    for panel, (name, chains) in zip(panels, every.items(), strict=True):
        for theta, tau in zip(chains.draws["theta"], chains.draws["tau"], strict=True):
            panel.plot(theta[:, 0], tau.log(), ".", markersize=2.5, alpha=0.6)
        panel.set(title=f"{name}: {chains.divergences} divergences", xlabel="theta_1")
    panels[0].set_ylabel("log tau")
    figure.suptitle("Eight schools: a colour for each chain")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, sample, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the picture (default: demo)")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    settings = Settings()
    fit, every = compare(settings)
    path = out / "neutra.png"
    draw(every).savefig(path)
    CONSOLE.print(table(fit, every, settings))
    CONSOLE.print(f"wrote {path}; {time.monotonic() - started:.0f} s in all", soft_wrap=True)


if __name__ == "__main__":
    main()
