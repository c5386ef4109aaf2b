"""Guides of posteriors with reference draws: this package's against Pyro's, with the same steps and particles.

    python benchmarks/guides.py FOLDER                  # up to half an hour on one core
    python benchmarks/guides.py FOLDER --steps 100 --guides AutoIAF AutoNormal --out guides

FOLDER holds a file NAME.npz for each posterior, with `names` of its parameters, reference `draws` and the data of the
model as `data_*`; parts/posteriors.py says which are known. A run with no options but FOLDER, --out apart, is one whose
results are worth keeping; they are written to benchmarks/results only then. README.md says how to read them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyro
from directions import RESULTS, about, write
from parts import accuracy, marginals, steps
from parts.guides import FITTED, GUIDES, PARTICLES, STEPS, fit
from parts.posteriors import Posterior, stored
from rich.console import Console
from rich.table import Table

COLUMNS = ("err", "C2ST", "k-hat", "ELBO, nats", "quantile error", "start, s", "steps", "ms a step")
SAME_SIZE = ("AutoIAF", "AutoIAFNormal")
"""Two guides with the same number of layers and the same widths: their steps are compared in turns."""


def main(arguments: list[str] | None = None) -> None:
    """Fit, measure, show."""
    options = parse(arguments)
    if options.folder is None:
        print("Nothing to do: name a folder of posteriors with reference draws.")
        return
    whole = options.out is None and options.steps is None and options.guides == list(GUIDES)
    folder = RESULTS if whole else Path(options.out or tempfile.mkdtemp(prefix="guides-"))
    folder.mkdir(parents=True, exist_ok=True)
    pyro.enable_validation(False)
    results: dict[str, Any] = {"about": about(), "particles": PARTICLES, "posteriors": {}}
    console = Console(width=140)
    for posterior in stored(options.folder):
        if isinstance(posterior, str):
            print(posterior)
            continue
        found = measure(posterior, options.guides, options.steps)
        results["posteriors"][posterior.name] = found
        write(folder / "guides.json", json.dumps(results, indent=1))
        console.print(table(posterior.name, found))
        for line in costs(found):
            print(line)
    marginals.draw(results["posteriors"], folder / "guides.png")
    print(f"Results and picture are in {folder}.")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of the posteriors")
    parser.add_argument("--steps", type=int, help=f"default: {STEPS:,}, and what fit_guide takes")
    parser.add_argument(
        "--guides", choices=GUIDES, nargs="+", default=list(GUIDES), metavar="NAME", help="default: all"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where results go")
    return parser.parse_args(arguments)


def measure(posterior: Posterior, names: list[str], count: int | None) -> dict[str, Any]:
    """All there is to say of one posterior's guides, and how it goes."""
    results: dict[str, Any] = {
        "columns": posterior.columns,
        "c2st_of_references": accuracy.agreement_of_references(posterior),
        "guides": {},
        "gradients": {},
        "edges": marginals.edges(posterior).tolist(),
        "histograms": {marginals.REFERENCE: marginals.histograms(posterior, posterior.draws)},
    }
    repetitions = min(steps.REPETITIONS, count or steps.REPETITIONS)
    seeds = min(steps.SEEDS, count or steps.SEEDS)
    for name in names:
        fitted = fit(name, posterior, count)
        draws = accuracy.drawn(posterior, fitted.guide)
        own = accuracy.measure(posterior, fitted.guide, draws)
        own |= {"start": fitted.start, "steps": fitted.steps, "ms": 1e3 * fitted.seconds / fitted.steps}
        results["guides"][name] = own
        if name in marginals.SHOWN:
            results["histograms"][name] = marginals.histograms(posterior, draws)
        if name in ("AutoIAF", FITTED):
            results["gradients"][name] = steps.gradients(posterior, fitted.guide, seeds, repetitions)
        print(f"{posterior.name}, {name}: C2ST {own['c2st']:.3f}", file=sys.stderr, flush=True)
    if set(SAME_SIZE) <= set(names):
        results["step_ms"] = steps.step_times(posterior, SAME_SIZE, repetitions)
    return results


def table(name: str, results: dict[str, Any]) -> Table:
    """The guides of one posterior."""
    shown = Table(title=f"{name}: two sets of reference draws have C2ST {results['c2st_of_references']:.3f}")
    shown.add_column("guide")
    for column in COLUMNS:
        shown.add_column(column, justify="right")
    for guide, own in results["guides"].items():
        shown.add_row(guide, *cells(own))
    return shown


def cells(own: dict[str, float]) -> list[str]:
    """A guide's figures."""
    return [
        f"{own['err']:.3f}",
        f"{own['c2st']:.3f}",
        f"{own['k_hat']:.2f}",
        f"{own['elbo']:.3f} ± {own['elbo_se']:.3f}",
        f"{own['quantile_error']:.3f}",
        f"{own['start']:.2f}",
        f"{own['steps']:.0f}",
        f"{own['ms']:.2f}",
    ]


def costs(results: dict[str, Any]) -> list[str]:
    """What steps and gradients cost, a line each."""
    lines = []
    for guide, objectives in results["gradients"].items():
        plain, path = objectives["Trace_ELBO"], objectives["TracePath_ELBO"]
        lines.append(
            f"{guide}, fitted: variance of the gradient {plain['variance']:.4g} with Trace_ELBO, "
            f"{path['variance']:.4g} with TracePath_ELBO ({plain['variance'] / path['variance']:.1f} times less); "
            f"loss and gradient {plain['ms']:.2f} and {path['ms']:.2f} ms ({path['ms'] / plain['ms']:.2f} times)"
        )
    if "step_ms" in results:
        ours, theirs = (results["step_ms"][name] for name in SAME_SIZE)
        lines.append(
            f"A step of SVI: {SAME_SIZE[0]} {ours:.2f} ms, {SAME_SIZE[1]} {theirs:.2f} ms ({ours / theirs:.2f})"
        )
    return lines


if __name__ == "__main__":
    main()
