"""Guides and NUTS on posteriors with reference or exact draws, with the same number of model evaluations.

    python benchmarks/guides.py FOLDER                     # everything: several hours on one core
    python benchmarks/guides.py FOLDER --targets arK ring --guides AutoIAF AutoNormal --seeds 0 1 2 --out guides
    python benchmarks/guides.py --guides "AutoIAF, fit_guide" --out guides       # only the toys with exact draws

FOLDER holds a file NAME.npz for each posterior, with the `names` of its parameters, reference `draws` and the data of
the model as `data_*`. The supported names are in parts/posteriors.py, toys with exact draws in parts/toys.py. Results
are merged into those of --out, by default benchmarks/results, so an interrupted run can be resumed, and later runs can
add targets, guides and seeds. README.md explains how to read them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
from directions import RESULTS, about, write
from parts import accuracy, marginals, standings_of_guides, steps
from parts.guides import CONTENDERS, FITTED, PARTICLES, STEPS, drawn, fit
from parts.posteriors import Posterior, stored
from parts.toys import TOYS

SAME_SIZE = ("AutoIAF", "AutoIAFNormal")
"""Two guides with equally many layers of the same widths, whose steps are timed in turns."""


def main(arguments: list[str] | None = None) -> None:
    """Fit and measure every guide, store the results, print tables and draw marginals."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "guides.json"
    results: dict[str, Any] = {"about": about(), "particles": PARTICLES, "posteriors": {}}
    if path.exists():
        results["posteriors"] = json.loads(path.read_text(encoding="utf-8"))["posteriors"]
    with pyro.validation_enabled(False):
        measure(results, options, path)
    text = standings_of_guides.tables(results["posteriors"])
    write(options.out / "guides.md", text)
    pictured = {name: section for name, section in results["posteriors"].items() if "histograms" in section}
    marginals.draw(pictured, options.out / "guides.png")
    print(text)
    print(f"Results, tables and picture are in {options.out}.")


def measure(results: dict[str, Any], options: argparse.Namespace, path: Path) -> None:
    """Run the fits that have no results yet, and write results after each fit."""
    for posterior in targets(options):
        section = results["posteriors"].setdefault(posterior.name, new_section(posterior))
        for name in options.guides:
            for seed in options.seeds:
                add(section, posterior, name, seed, options)
                write(path, json.dumps(results))
        if options.costs and "gradients" not in section:
            section |= costs(posterior, options.steps)
            write(path, json.dumps(results))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="folder of posteriors with reference draws")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="default: all of FOLDER and all toys")
    parser.add_argument("--steps", type=int, help=f"default: {STEPS:,}, or as many as fit_guide needs")
    parser.add_argument(
        "--guides", choices=CONTENDERS, nargs="+", default=list(CONTENDERS), metavar="NAME", help="default: all"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--again", action="store_true", help="repeat fits that have results")
    parser.add_argument("--costs", action="store_true", help="also measure times of steps and variances of gradients")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=RESULTS, help="where results are merged")
    return parser.parse_args(arguments)


def targets(options: argparse.Namespace) -> Iterator[Posterior]:
    """The posteriors selected, reporting files without a model."""
    chosen = options.targets
    for posterior in [] if options.folder is None else stored(options.folder):
        if isinstance(posterior, str):
            print(posterior)
        elif chosen is None or posterior.name in chosen:
            yield posterior
    for name, make in TOYS.items():
        if chosen is None or name in chosen:
            yield make()


def new_section(posterior: Posterior) -> dict[str, Any]:
    """Results of a posterior before any fit."""
    section: dict[str, Any] = {
        "dimensions": len(posterior.columns),
        "c2st_of_references": accuracy.agreement_of_references(posterior),
        "guides": {},
    }
    if posterior.name not in TOYS:
        section |= marginals.panels(posterior)
    return section


def add(section: dict[str, Any], posterior: Posterior, name: str, seed: int, options: argparse.Namespace) -> None:
    """Fit a guide and add it to the results of a posterior, unless it is there already."""
    fits = section["guides"].setdefault(name, {})
    if str(seed) in fits and not options.again:
        return
    try:
        fitted = fit(name, posterior, options.steps, seed)
        draws = drawn(posterior, fitted)
    except Exception as error:  # a failure is a result too
        fits[str(seed)] = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
    else:
        figures = accuracy.measure(posterior, fitted.guide, fitted.diagnosis, draws)
        fits[str(seed)] = figures | {"start": fitted.start, "seconds": fitted.seconds, "steps": fitted.steps}
        if fitted.clock:
            fits[str(seed)]["errors_in_time"] = accuracy.errors_in_time(posterior, draws, fitted.clock)
        if name in marginals.SHOWN and seed == options.seeds[0] and "histograms" in section:
            section["histograms"][name] = marginals.histograms(posterior, draws)
    print(f"{posterior.name}, {name}, seed {seed}: {one_line(fits[str(seed)])}", file=sys.stderr, flush=True)


def one_line(fit: dict[str, Any]) -> str:
    """One-line summary of a fit."""
    if "error" in fit:
        return str(fit["error"])
    figures = f"C2ST {fit['c2st']:.3f}, err {fit['err']:.3f}, k-hat {fit['k_hat']:.2f}, ELBO {fit['elbo']:.3f}"
    return f"{figures}, {fit['start'] + fit['seconds']:.1f} s, {fit['steps']} steps. {fit['verdict']}"


def costs(posterior: Posterior, count: int | None) -> dict[str, Any]:
    """Times of steps, and variances of the gradients of fitted guides."""
    repetitions = min(steps.REPETITIONS, count or steps.REPETITIONS)
    seeds = min(steps.SEEDS, count or steps.SEEDS)
    gradients = {
        name: steps.gradients(posterior, fit(name, posterior, count).guide, seeds, repetitions)
        for name in ("AutoIAF", FITTED)
    }
    return {"gradients": gradients, "step_ms": steps.step_times(posterior, SAME_SIZE, repetitions)}


if __name__ == "__main__":
    main()
