"""Guides and NUTS on posteriors with reference draws or exact ones, with the same evaluations of the model.

    python benchmarks/guides.py FOLDER                     # everything: some hours on one core
    python benchmarks/guides.py FOLDER --targets arK ring --guides AutoIAF AutoNormal --seeds 0 1 2 --out guides
    python benchmarks/guides.py --guides "AutoIAF, fit_guide" --out guides       # the toys with exact draws alone

FOLDER holds a file NAME.npz for each posterior, with `names` of its parameters, reference `draws` and the data of the
model as `data_*`; parts/posteriors.py says which are known. parts/toys.py has those with exact draws. Results are
merged into what the folder of results has: a run that was ended goes on where it was, and others may add targets,
guides and seeds. Without --out that folder is benchmarks/results. README.md says how to read them.
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
"""Two guides with the same number of layers and the same widths: their steps are compared in turns."""


def main(arguments: list[str] | None = None) -> None:
    """Fit, measure, show."""
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
    pictured = {name: found for name, found in results["posteriors"].items() if "histograms" in found}
    marginals.draw(pictured, options.out / "guides.png")
    print(text)
    print(f"Results, tables and picture are in {options.out}.")


def measure(results: dict[str, Any], options: argparse.Namespace, path: Path) -> None:
    """Fit what there are no results of, and write them after each fit."""
    for posterior in targets(options):
        found = results["posteriors"].setdefault(posterior.name, described(posterior))
        for name in options.guides:
            for seed in options.seeds:
                add(found, posterior, name, seed, options)
                write(path, json.dumps(results))
        if options.costs and "gradients" not in found:
            found |= costs(posterior, options.steps)
            write(path, json.dumps(results))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of posteriors with reference draws")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="default: all of FOLDER and all toys")
    parser.add_argument("--steps", type=int, help=f"default: {STEPS:,}, and what fit_guide takes")
    parser.add_argument(
        "--guides", choices=CONTENDERS, nargs="+", default=list(CONTENDERS), metavar="NAME", help="default: all"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--again", action="store_true", help="measure again what there are results of")
    parser.add_argument("--costs", action="store_true", help="also times of steps, and variances of gradients")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=RESULTS, help="where results are merged")
    return parser.parse_args(arguments)


def targets(options: argparse.Namespace) -> Iterator[Posterior]:
    """The posteriors that are asked for."""
    chosen = options.targets
    for posterior in [] if options.folder is None else stored(options.folder):
        if isinstance(posterior, str):
            print(posterior)
        elif chosen is None or posterior.name in chosen:
            yield posterior
    for name, make in TOYS.items():
        if chosen is None or name in chosen:
            yield make()


def described(posterior: Posterior) -> dict[str, Any]:
    """What there is to say of a posterior before any guide."""
    found: dict[str, Any] = {
        "dimensions": len(posterior.columns),
        "c2st_of_references": accuracy.agreement_of_references(posterior),
        "guides": {},
    }
    if posterior.name not in TOYS:
        found |= marginals.panels(posterior)
    return found


def add(found: dict[str, Any], posterior: Posterior, name: str, seed: int, options: argparse.Namespace) -> None:
    """Add a fit to the results of a posterior, unless they have it."""
    fits = found["guides"].setdefault(name, {})
    if str(seed) in fits and not options.again:
        return
    try:
        fitted = fit(name, posterior, options.steps, seed)
        draws = drawn(posterior, fitted)
    except Exception as error:  # whatever ends a fit is its result
        fits[str(seed)] = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
    else:
        own = accuracy.measure(posterior, fitted.guide, fitted.diagnosis, draws)
        fits[str(seed)] = own | {"start": fitted.start, "seconds": fitted.seconds, "steps": fitted.steps}
        if fitted.clock:
            fits[str(seed)]["errors_in_time"] = accuracy.errors_in_time(posterior, draws, fitted.clock)
        if name in marginals.SHOWN and seed == options.seeds[0] and "histograms" in found:
            found["histograms"][name] = marginals.histograms(posterior, draws)
    print(f"{posterior.name}, {name}, seed {seed}: {brief(fits[str(seed)])}", file=sys.stderr, flush=True)


def brief(own: dict[str, Any]) -> str:
    """A fit in a line."""
    if "error" in own:
        return str(own["error"])
    figures = f"C2ST {own['c2st']:.3f}, err {own['err']:.3f}, k-hat {own['k_hat']:.2f}, ELBO {own['elbo']:.3f}"
    return f"{figures}, {own['start'] + own['seconds']:.1f} s, {own['steps']} steps. {own['verdict']}"


def costs(posterior: Posterior, count: int | None) -> dict[str, Any]:
    """What steps cost, and how noisy gradients of fitted guides are."""
    repetitions = min(steps.REPETITIONS, count or steps.REPETITIONS)
    seeds = min(steps.SEEDS, count or steps.SEEDS)
    gradients = {
        name: steps.gradients(posterior, fit(name, posterior, count).guide, seeds, repetitions)
        for name in ("AutoIAF", FITTED)
    }
    return {"gradients": gradients, "step_ms": steps.step_times(posterior, SAME_SIZE, repetitions)}


if __name__ == "__main__":
    main()
