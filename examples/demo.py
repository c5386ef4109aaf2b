"""Fit the paper's models to its Figure 1 density and to image patches; print a table and draw pictures.

Run with `make demo`, or `python examples/demo.py --out demo`. Takes about a minute and a half on two cores.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pyro_maf import MAF, RealNVP, plotting
from pyro_maf.datasets import Dataset, FigureOne, complete_patches, patches
from pyro_maf.distributions import FlowPrior, MAFMoG
from pyro_maf.training import FitResult, fit
from pyro_maf.transforms import LowerTriangularAffine

CONSOLE = Console()
NOISE = "the noise that each model maps the data to"
WINDOW = ((-3.5, 8.0), (-6.0, 6.0))


@dataclass(frozen=True)
class Task:
    """A set of data, the models for it, and how long to fit them."""

    data: Dataset
    models: dict[str, Callable[[], Any]]
    epochs: dict[str, int]
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class Score:
    """Mean test log-likelihood in nats, two standard errors of it, and how many seconds the fit took."""

    mean: float
    error: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.error:.2f}"


def figure_one(toy: FigureOne) -> Task:
    """The toy. The layer next to the data has the order (x1, x2), in which p(x2 | x1) has two modes."""
    widths = [64, 64]
    return Task(
        data=toy.dataset(train=20_000, validation=5_000, test=10_000),
        models={
            "MADE": lambda: MAF(2, num_layers=1, hidden_dims=widths),
            "RealNVP (5)": lambda: RealNVP(2, num_layers=5, hidden_dims=widths),
            "MAF (5)": lambda: MAF(2, num_layers=5, hidden_dims=widths),
            "MAF MoG (5)": lambda: MAFMoG(2, num_layers=5, hidden_dims=widths),
        },
        epochs={"MADE": 8, "RealNVP (5)": 20, "MAF (5)": 20, "MAF MoG (5)": 10},
        batch_size=500,
        learning_rate=5e-3,
    )


def image_patches() -> Task:
    """The patches, with the order of the pixels reversed from layer to layer."""
    widths = [128, 128]
    return Task(
        data=patches(train=20_000, validation=2_000, test=5_000),
        models={
            "MADE": lambda: MAF(63, num_layers=1, hidden_dims=widths),
            "RealNVP (5)": lambda: RealNVP(63, num_layers=5, hidden_dims=widths),
            "MAF (5)": lambda: MAF(63, num_layers=5, hidden_dims=widths),
            "MAF MoG (5)": lambda: MAFMoG(63, num_layers=5, hidden_dims=widths),
        },
        epochs={"MADE": 20, "RealNVP (5)": 20, "MAF (5)": 20, "MAF MoG (5)": 15},
        batch_size=256,
        learning_rate=2e-3,
    )


def gaussian(data: Dataset) -> FlowPrior:
    """The full-rank Gaussian of greatest likelihood, in closed form: mean and covariance of the training rows."""
    rows = data.train.double()
    factor = torch.linalg.cholesky(torch.cov(rows.T, correction=0))
    return FlowPrior(LowerTriangularAffine(data.input_dim, loc=rows.mean(0).float(), scale_tril=factor.float()))


def score(density: Any, data: Dataset, seconds: float = 0.0) -> Score:
    """How well a density predicts the test rows."""
    with torch.no_grad():
        log_prob = density.log_prob(data.test)
    return Score(log_prob.mean().item(), 2 * log_prob.std().item() / math.sqrt(len(log_prob)), seconds)


def run(task: Task) -> tuple[dict[str, Any], dict[str, Score], dict[str, FitResult]]:
    """Fit every model of a task, and score it as it comes."""
    CONSOLE.rule(f"{task.data.name}: {len(task.data.train):,} rows of {task.data.input_dim} dimensions")
    started = time.monotonic()
    densities: dict[str, Any] = {"Gaussian": gaussian(task.data)}
    scores = {"Gaussian": score(densities["Gaussian"], task.data, time.monotonic() - started)}
    results: dict[str, FitResult] = {}
    for name, make in task.models.items():
        CONSOLE.print(f"fitting {name}, {task.epochs[name]} epochs")
        torch.manual_seed(0)
        results[name] = fit(
            make(),
            task.data.train,
            validation=task.data.validation,
            batch_size=task.batch_size,
            max_epochs=task.epochs[name],
            learning_rate=task.learning_rate,
        )
        densities[name] = results[name].density
        scores[name] = score(densities[name], task.data, results[name].seconds)
        CONSOLE.print(f"{name}: test log-likelihood {scores[name]} nats, {results[name].seconds:.0f} s")
    return densities, scores, results


def table(columns: dict[str, dict[str, Score]], exact: Score) -> Table:
    """The models' scores side by side, as in the paper's Table 1."""
    shown = Table(title="Mean test log-likelihood in nats, with two standard errors")
    shown.add_column("")
    for name in columns:
        shown.add_column(name, justify="right")
        shown.add_column("fit, s", justify="right", style="dim")
    best = {name: max(scores, key=lambda model: scores[model].mean) for name, scores in columns.items()}
    for model in next(iter(columns.values())):
        cells = [model]
        for name, scores in columns.items():
            text = str(scores[model])
            cells += [f"[bold]{text}[/bold]" if model == best[name] else text, f"{scores[model].seconds:.0f}"]
        shown.add_row(*cells)
    shown.add_section()
    shown.add_row("the true density", str(exact), "", "unknown", "")
    return shown


def draw_figure_one(out: Path, task: Task, toy: FigureOne, densities: dict[str, Any], results: Any) -> None:
    """Samples, noise, contours and losses of the toy."""
    samples = {name: drawn(density, 4000) for name, density in densities.items()}
    exact = {"True density": toy, **densities}
    title = "Figure 1's density"
    save(plotting.scatter(task.data.test, samples, title=f"{title}: data and samples"), out / "figure1-samples.png")
    save(plotting.noise(densities, task.data.test, title=f"{title}: {NOISE}"), out / "figure1-noise.png")
    save(plotting.contours(exact, WINDOW, title=f"{title}: the true one and the models"), out / "figure1-contours.png")
    marks = {"true density, same rows": -toy.log_prob(task.data.validation).mean().item()}
    save(plotting.losses(results, marks=marks, title=f"{title}: losses of validation"), out / "figure1-losses.png")


def draw_patches(out: Path, task: Task, densities: dict[str, Any], results: Any) -> None:
    """Samples, noise and losses of the patches."""
    rows = {"Data": task.data.test[:64], **{name: drawn(density, 64) for name, density in densities.items()}}
    pictures = {name: complete_patches(sample) for name, sample in rows.items()}
    save(plotting.image_grid(pictures, title="Image patches: data and samples"), out / "patches-samples.png")
    figure = plotting.noise(densities, task.data.test, dims=(27, 28), title=f"Image patches: {NOISE}")
    save(figure, out / "patches-noise.png")
    save(plotting.losses(results, title="Image patches: losses of validation"), out / "patches-losses.png")


def drawn(density: Any, rows: int) -> torch.Tensor:
    """Samples that are the same every time."""
    torch.manual_seed(0)
    return density.sample((rows,))


def save(figure: Any, path: Path) -> None:
    """Write a picture, and say so."""
    figure.savefig(path)
    CONSOLE.print(f"wrote {path}", soft_wrap=True)


def verdict(toy: FigureOne, true: Score, scores: dict[str, Score]) -> str:
    """What the exact entropy says of the toy's scores."""
    short = {name: true.mean - scores[name].mean for name in ("MAF (5)", "MADE")}
    return (
        f"Figure 1's density has entropy log(2 pi e) + log 2 = {toy.entropy:.4f} nats, so no model can expect more "
        f"than {-toy.entropy:.4f}. On these test points the true density has {true.mean:.4f}; MAF (5) is "
        f"{short['MAF (5)']:.4f} nats short of that, and MADE, in the order (x1, x2), {short['MADE']:.4f}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures (default: demo)")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    toy = FigureOne()
    tasks = (figure_one(toy), image_patches())
    (toy_densities, toy_scores, toy_results), (densities, scores, results) = (run(task) for task in tasks)
    CONSOLE.rule("pictures")
    draw_figure_one(out, tasks[0], toy, toy_densities, toy_results)
    draw_patches(out, tasks[1], densities, results)
    CONSOLE.rule("table")
    true = score(toy, tasks[0].data)
    names = [f"{task.data.name} ({task.data.input_dim})" for task in tasks]
    CONSOLE.print(table(dict(zip(names, (toy_scores, scores), strict=True)), true))
    CONSOLE.print(verdict(toy, true, toy_scores))
    CONSOLE.print(f"{time.monotonic() - started:.0f} s in all; pictures in {out}")


if __name__ == "__main__":
    main()
