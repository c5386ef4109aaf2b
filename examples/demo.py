"""Fit the paper's models to its Figure 1 density and to image patches; print a table and draw figures.

Run with `make demo`, or `python examples/demo.py --out demo`. Takes about a minute and a half on two cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from pyro_maf import MAF, RealNVP, plotting
from pyro_maf.datasets import Dataset, FigureOne, complete_patches, patches
from pyro_maf.distributions import Density, MAFMoG
from pyro_maf.experiments import Estimate, estimate, fit_gaussian
from pyro_maf.training import FitResult, fit
from pyro_maf.transforms import Flow

CONSOLE = Console()
NOISE = "the noise to which each model maps the data"
WINDOW = ((-3.5, 8.0), (-6.0, 6.0))


@dataclass(frozen=True)
class Task:
    """A data set, its models, and the options of their fits."""

    data: Dataset
    models: dict[str, Callable[[], Flow | Density]]
    epochs: dict[str, int]
    batch_size: int
    learning_rate: float


def figure_one(toy: FigureOne) -> Task:
    """Task of the toy. The layer next to the data has the order (x1, x2), in which p(x2 | x1) has two modes."""
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
    """Task of the patches, with the order of the pixels reversed from layer to layer."""
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


def score(density: Density | FigureOne, data: Dataset) -> Estimate:
    """Mean test log-likelihood in nats, with two standard errors."""
    with torch.no_grad():
        return estimate(density.log_prob(data.test))


def run(task: Task) -> tuple[dict[str, Density], dict[str, Estimate], dict[str, FitResult]]:
    """Fit and score every model of a task."""
    CONSOLE.rule(f"{task.data.name}: {len(task.data.train):,} rows of {task.data.input_dim} dimensions")
    densities: dict[str, Density] = {"Gaussian": fit_gaussian(task.data.train)}
    scores = {"Gaussian": score(densities["Gaussian"], task.data)}
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
        scores[name] = score(densities[name], task.data)
        CONSOLE.print(f"{name}: test log-likelihood {scores[name]} nats, {results[name].seconds:.0f} s")
    return densities, scores, results


def table(columns: dict[str, tuple[dict[str, Estimate], dict[str, FitResult]]], exact: Estimate) -> Table:
    """The models' scores side by side, as in the paper's Table 1, and the duration of their fits."""
    shown = Table(title="Mean test log-likelihood in nats, with two standard errors")
    shown.add_column("")
    for name in columns:
        shown.add_column(name, justify="right")
        shown.add_column("fit, s", justify="right", style="dim")
    for model in next(iter(columns.values()))[0]:
        cells = [model]
        for scores, results in columns.values():
            is_best = scores[model].mean == max(score.mean for score in scores.values())
            cells += [f"[bold]{scores[model]}[/bold]" if is_best else str(scores[model])]
            cells += [f"{results[model].seconds:.0f}" if model in results else ""]
        shown.add_row(*cells)
    shown.add_section()
    shown.add_row("the true density", str(exact), "", "unknown", "")
    return shown


def draw_figure_one(
    out: Path, task: Task, toy: FigureOne, densities: dict[str, Density], results: dict[str, FitResult]
) -> None:
    """Draw samples, noise, contours and losses of the toy."""
    samples = {name: drawn(density, 4000) for name, density in densities.items()}
    exact: dict[str, FigureOne | Density] = {"True density": toy, **densities}
    title = "Figure 1's density"
    save(plotting.scatter(task.data.test, samples, title=f"{title}: data and samples"), out / "figure1-samples.png")
    save(plotting.noise(densities, task.data.test, title=f"{title}: {NOISE}"), out / "figure1-noise.png")
    save(plotting.contours(exact, WINDOW, title=f"{title}: the true one and the models"), out / "figure1-contours.png")
    marks = {"true density, same rows": -toy.log_prob(task.data.validation).mean().item()}
    save(plotting.losses(results, marks=marks, title=f"{title}: validation losses"), out / "figure1-losses.png")


def draw_patches(out: Path, task: Task, densities: dict[str, Density], results: dict[str, FitResult]) -> None:
    """Draw samples, noise and losses of the patches."""
    rows = {"Data": task.data.test[:64], **{name: drawn(density, 64) for name, density in densities.items()}}
    images = {name: complete_patches(sample) for name, sample in rows.items()}
    save(plotting.image_grid(images, title="Image patches: data and samples"), out / "patches-samples.png")
    figure = plotting.noise(densities, task.data.test, dims=(27, 28), title=f"Image patches: {NOISE}")
    save(figure, out / "patches-noise.png")
    save(plotting.losses(results, title="Image patches: validation losses"), out / "patches-losses.png")


def drawn(density: Density, rows: int) -> torch.Tensor:
    """Draw samples, the same every time."""
    torch.manual_seed(0)
    return density.sample((rows,))


def save(figure: Figure, path: Path) -> None:
    """Write a figure, and print its path."""
    figure.savefig(path)
    CONSOLE.print(f"wrote {path}", soft_wrap=True)


def verdict(toy: FigureOne, true: Estimate, scores: dict[str, Estimate]) -> str:
    """Compare the toy's scores with its exact entropy."""
    short = {name: true.mean - scores[name].mean for name in ("MAF (5)", "MADE")}
    return (
        f"Figure 1's density has entropy log(2 pi e) + log 2 = {toy.entropy:.4f} nats, so no model can expect more "
        f"than {-toy.entropy:.4f}. On these test points the true density has {true.mean:.4f}; MAF (5) is "
        f"{short['MAF (5)']:.4f} nats short of that, and MADE, in the order (x1, x2), {short['MADE']:.4f}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the figures (default: demo)")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    toy = FigureOne()
    tasks = (figure_one(toy), image_patches())
    (toy_densities, toy_scores, toy_results), (densities, scores, results) = (run(task) for task in tasks)
    CONSOLE.rule("figures")
    draw_figure_one(out, tasks[0], toy, toy_densities, toy_results)
    draw_patches(out, tasks[1], densities, results)
    CONSOLE.rule("table")
    true = score(toy, tasks[0].data)
    names = [f"{task.data.name} ({task.data.input_dim})" for task in tasks]
    columns = zip(names, ((toy_scores, toy_results), (scores, results)), strict=True)
    CONSOLE.print(table(dict(columns), true))
    CONSOLE.print(verdict(toy, true, toy_scores))
    CONSOLE.print(f"{time.monotonic() - started:.0f} s in all; figures in {out}")


if __name__ == "__main__":
    main()
