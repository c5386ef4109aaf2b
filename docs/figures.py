"""Draw the figures of the documentation into docs/assets/, by `python docs/figures.py`.

The posterior takes a minute: NUTS gives the reference, and two guides are fitted with the defaults of `fit_guide`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_maf.infer import AutoIAF, fit_guide
from pyro_maf.nn import MADE

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "docs" / "assets"
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
DRAWS = 2000
GREY, BLUE, ORANGE = "0.72", "#0072b2", "#d55e00"
BEFORE, NOW, LATER, ZERO = "#9ecae1", "#d55e00", "#e8eef4", "white"


def schools() -> None:
    """Eight schools, centred: a funnel."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=EFFECTS)


def easier_schools() -> None:
    """The same, in coordinates in which NUTS mixes well."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, ERRORS), obs=EFFECTS)


def reference() -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the first school's effect and log tau by NUTS."""
    mcmc = MCMC(NUTS(easier_schools), num_samples=DRAWS, warmup_steps=500, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    return draws["mu"] + draws["tau"] * draws["z"][:, 0], draws["tau"].log()


def by_guide(guide: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the same from a fitted guide."""
    fitted = fit_guide(schools, guide, progress=False).guide
    with torch.no_grad(), pyro.plate("draws", DRAWS, dim=-2):
        draws = fitted()
    return draws["theta"].reshape(DRAWS, -1)[:, 0], draws["tau"].reshape(-1).log()


def posterior() -> Figure:
    """Draw two guides over reference draws."""
    pyro.set_rng_seed(0)
    guides = {"AutoMultivariateNormal": AutoMultivariateNormal(schools), "AutoIAF": AutoIAF(schools)}
    effect, log_tau = reference()
    figure, panels = plt.subplots(1, 2, figsize=(6, 2.7), sharex=True, sharey=True, layout="constrained")
    for axes, (name, guide), colour in zip(panels, guides.items(), (ORANGE, BLUE), strict=True):
        axes.plot(effect, log_tau, ".", markersize=3, color=GREY, label="NUTS")
        axes.plot(*by_guide(guide), ".", markersize=1.5, color=colour, label=name)
        axes.set(xlim=(-20, 40), ylim=(-4, 4), xlabel="effect of the first school", title=name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", markerscale=4, frameon=False, handletextpad=0)
    panels[0].set_ylabel("log tau")
    return figure


def sweep(dim: int = 6, units: int = 12, step: int = 3) -> Figure:
    """Draw the weights of a MADE, and those that the sweep uses before, at and after one step."""
    made = MADE(dim, [units, units], outputs_per_input=2)
    final = [[0] * dim, *made.ready]
    figure, panels = plt.subplots(1, 3, figsize=(9, 4), width_ratios=(dim, units, units), layout="constrained")
    titles = ("inputs to hidden layer 1", "hidden layer 1 to 2", f"hidden layer 2 to {2 * dim} outputs")
    for layer, (axes, mask, title) in enumerate(zip(panels, made.masks(), titles, strict=True)):
        rows = np.arange(len(mask))
        if layer < len(made.ready):
            now = (rows >= final[layer + 1][step - 1]) & (rows < final[layer + 1][step])
            before = rows < final[layer + 1][step - 1]
        else:
            before, now = rows < 2 * step, (rows >= 2 * step) & (rows < 2 * step + 2)
        _draw(axes, mask.numpy().astype(bool), before, now)
        axes.set(title=title, xticks=[], yticks=[])
        axes.title.set_fontsize(10)
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=colour) for colour in (BEFORE, NOW, LATER)]
    names = ("used in an earlier step", f"used in step {step + 1}", "to be used")
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw(axes: Axes, mask: np.ndarray[Any, Any], before: np.ndarray[Any, Any], now: np.ndarray[Any, Any]) -> None:
    image = np.ones((*mask.shape, 3))
    for rows, colour in ((before, BEFORE), (now, NOW), (~(before | now), LATER)):
        image[mask & rows[:, None]] = to_rgb(colour)
    axes.imshow(image, aspect="equal", interpolation="nearest")
    axes.set_xticks(np.arange(mask.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(mask.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.85", linewidth=0.5)
    axes.tick_params(which="minor", length=0)


def main() -> None:
    """Draw all figures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for draw in (sweep, posterior):
            draw().savefig(ASSETS / f"{draw.__name__}.png", dpi=150)


if __name__ == "__main__":
    main()
