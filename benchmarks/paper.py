"""The paper's comparison: its models and the default of `fit`, against the published figures and against peers.

    python benchmarks/paper.py FOLDER                        # .npz files with train, val and test, or images and labels
    python benchmarks/paper.py --root ARCHIVE POWER GAS      # the paper's own sets
    python benchmarks/paper.py FOLDER --only protein --steps 4000
    python benchmarks/paper.py --speed --figure-one          # rows per second of training; Figure 1

Fits are stored in --fits and never repeated, so an interrupted run can be resumed. The results of each data set are
merged into those of --out. README.md explains how to read them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
from directions import README, RESULTS, about, write
from parts import contest, digits, figure_one, recipes, report, rivals, sets, speed, standings

from pyro_maf import datasets
from pyro_maf.datasets import Dataset
from pyro_maf.experiments import ROWS, candidates, compare

PAPER_EPOCHS = 1000
EMPTY: dict[str, Any] = {"about": None, "sets": {}, "speed": [], "figure_one": None}


def main(arguments: list[str] | None = None) -> None:
    """Fit and measure, writing results after each fit."""
    options = parse(arguments)
    if not (options.names or options.speed or options.figure_one or options.render):
        print("Nothing to do: name a folder of data, --root with the paper's data sets, --speed or --figure-one.")
        return
    pyro.enable_validation(False)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    stored = options.out / "paper.json"
    results = EMPTY | (json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {})
    for change in changes(options):
        results = merged(results, change) | {"about": about()}
        write(stored, json.dumps(results, indent=1))
    write(stored.with_suffix(".md"), standings.everything(results))
    if options.out == RESULTS:
        report.put_between_markers(README, standings.everything(results), report.PAPER)
    print(standings.everything(results))
    print(f"Results and pictures are in {options.out}.")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="folders of .npz files, or with --root names of the paper's data sets")
    parser.add_argument("--root", type=Path, help="folder of the paper's archive")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="data sets of the folder, or Patches; default: all")
    models = [contest.DEFAULT.name, *ROWS]
    parser.add_argument("--models", nargs="+", choices=models, default=models, metavar="MODEL", help="default: all")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2], help="numbers of hidden layers; default: 1 2")
    parser.add_argument("--units", type=int, help="maximum units of a hidden layer; default: the paper's")
    parser.add_argument("--rows", type=int, help="maximum number of training rows; default: all")
    parser.add_argument("--steps", type=int, help=f"maximum steps of a fit; default: {PAPER_EPOCHS:,} epochs")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of all models; default: %(default)g")
    parser.add_argument("--peers", nargs="*", choices=rivals.RIVALS, default=list(rivals.RIVALS), help="default: all")
    parser.add_argument(
        "--recipes", nargs="*", choices=recipes.RECIPES, default=list(recipes.RECIPES), help="default: all"
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds of default and recipes; default: %(default)s")
    parser.add_argument("--weight-decay", type=float, help="initial weight decay of all models; default: that of fit")
    parser.add_argument("--blind", action="store_true", help="ignore the context of data sets that have one")
    parser.add_argument("--speed", action="store_true", help="measure training rows per second")
    parser.add_argument("--figure-one", action="store_true", help="draw Figure 1")
    parser.add_argument("--render", action="store_true", help="only render tables from the results in --out")
    parser.add_argument("--quick", action="store_true", help="tiny networks, to check that everything runs")
    parser.add_argument(
        "--fits", type=Path, default=Path("paper-fits"), help="where fits are stored; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where results go")
    return parser.parse_args(arguments)


def changes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Changes to the results, as they are measured."""
    if options.figure_one:
        epochs, rows = (2, 2000) if options.quick else (20, 20_000)
        yield {"figure_one": figure_one.run(options.out, epochs, rows)}
    if options.speed:
        cells = []
        for size in [(3, 8)] if options.quick else speed.SIZES:
            cells.append(speed.measure(size, ["zuko", "nflows", "pyro", "normflows"], 0.2 if options.quick else 30.0))
            yield {"speed": cells}
    if options.names:
        warm_up()
    for data in chosen(options):
        yield from fitted(data, options)


def chosen(options: argparse.Namespace) -> Iterator[Dataset]:
    """The data sets selected; one with a context comes without it first."""
    if options.root is not None:
        available = sets.published(options.root, options.names)
    else:
        available = (data for name in options.names for data in [*sets.stored(Path(name)), *extra(options)])
    for data in available:
        if options.only is None or data.name in options.only:
            data = sets.shortened(data, options.rows)
            yield sets.without_context(data)
            if data.context_dim and not options.blind:
                yield data


def extra(options: argparse.Namespace) -> list[Dataset]:
    """Patches of photographs, which scikit-learn ships."""
    return [] if options.quick else [datasets.patches(train=options.rows or 30_000)]


def fitted(data: Dataset, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results of a data set after each fit."""
    name = f"{data.name}, given the class" if data.context_dim else data.name
    units = 8 if options.quick else sets.units(data, options.units)
    steps = math.ceil(len(data.train) / contest.BATCH)
    epochs = max(1, round(options.steps / steps)) if options.steps else PAPER_EPOCHS
    settings = f"{len(data.train)}-{epochs}-{options.rate:g}" + f"-{options.weight_decay}" * bool(options.weight_decay)
    models = [model for model in options.models if model != contest.DEFAULT.name]
    blind = options.fits / f"{data.name}-{settings}".replace(" ", "-")
    ours = candidates(models, hidden_dims=[(units,) * depth for depth in options.depths]) if models else ()
    plan = contest.Plan(
        (*[contest.DEFAULT] * (len(models) < len(options.models)), *ours),
        tuple(options.peers),
        epochs=epochs,
        rate=options.rate,
        folder=options.fits / f"{name}-{settings}".replace(", ", "-").replace(" ", "-"),
        blind=blind if data.context_dim else None,
        recipes=tuple(options.recipes),
        seeds=options.seeds,
        weight_decay=options.weight_decay,
    )
    for section in contest.run(data, plan):
        last = section["tried"][-1]
        print(
            f"{name}: {last['who']} {last['model']} {last['hidden']}: {last['mean']:.3f}", file=sys.stderr, flush=True
        )
        yield {"sets": {name: section}}
    if data.context_dim and data.pixels is not None:
        digits.draw(data, plan, options.out / "paper-digits.png")


def merged(results: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """The results with a change, which replaces earlier results of the same data set only."""
    if "sets" in change:
        return results | {"sets": results["sets"] | change["sets"]}
    return results | change


def warm_up() -> None:
    """Run a tiny fit, so that one-time loading is in no measured time."""
    compare(datasets.FigureOne().dataset(100, 20, 20), candidates(["MADE"]), max_epochs=1, progress=False)


if __name__ == "__main__":
    main()
