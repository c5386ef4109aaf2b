"""Speed of density, sampling and gradients, against Pyro, zuko, nflows, normflows and flowjax.

    python benchmarks/directions.py            # the sizes of the table in README.md, with one thread and with two
    python benchmarks/directions.py --quick    # a tiny size, to check that everything runs
    python benchmarks/directions.py --sizes 63,512 --batches 100 --layers 1 --tasks sample --threads 1

A complete run writes its results, a table and a plot to benchmarks/results and the table to benchmarks/README.md; any
other run writes to --out, or to a temporary folder. README.md explains how to read them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from parts import picture, report, worker
from parts.peers import PEERS, versions
from parts.plan import BATCHES, LAYERS, TASKS, Plan

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results", HERE / "README.md"
THREADS = (1, 2)
# More threads are measured only to see whether they help, for which one layer with affine maps is enough.
LAYERS_OF_MORE_THREADS = (1,)
# A deep stack large enough to be worth sharing between threads.
DEEP: dict[str, Any] = {"sizes": ((63, 512),), "batches": (1000,), "layers": (5,), "tasks": ("train", "fit")}


def main(arguments: list[str] | None = None) -> None:
    """Measure and report, or report stored results."""
    options = parse(arguments)
    whole = options.out is None and not (options.quick or chosen(options))
    folder = RESULTS if whole else Path(options.out or tempfile.mkdtemp(prefix="directions-"))
    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / f"directions{'' if options.device == 'cpu' else '-' + options.device}.json"
    if options.render:
        results = json.loads(stored.read_text(encoding="utf-8"))
    else:
        results = measure(plans(options))
        write(stored, json.dumps(results, indent=1))
    write(stored.with_suffix(".md"), report.summary(results) + "\n" + report.details(results))
    picture.draw(results, stored.with_suffix(".png"))
    if whole and options.device == "cpu":
        report.put_between_markers(README, report.summary(results))
    print(report.summary(results))
    print(f"Results, table and picture are in {folder}.")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="a tiny size, few repetitions")
    which.add_argument("--full", action="store_true", help="every combination of D, H and batch size: hours")
    parser.add_argument("--threads", type=int, nargs="+", default=None, metavar="N", help=f"default: {THREADS}")
    parser.add_argument("--sizes", type=size, nargs="+", metavar="D,H", help="default: those of the table")
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help=f"default: {BATCHES}")
    parser.add_argument("--layers", type=int, nargs="+", metavar="L", help=f"default: {LAYERS}; 1 with more threads")
    parser.add_argument("--tasks", choices=TASKS, nargs="+", help="default: all")
    parser.add_argument("--peers", choices=PEERS, nargs="*", help="default: all")
    parser.add_argument("--seconds", type=float, help=f"time per cell; default: {Plan.seconds}")
    parser.add_argument(
        "--longest-call",
        type=float,
        metavar="SECONDS",
        help=f"a peer whose call would take longer is extrapolated, not run; default: {Plan.longest_call}",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", metavar="FOLDER", help="where results go")
    parser.add_argument("--render", action="store_true", help="only render table and plot from stored results")
    return parser.parse_args(arguments)


def size(text: str) -> tuple[int, int]:
    """D and H from "D,H"."""
    dim, hidden = map(int, text.split(","))
    return dim, hidden


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """The plan's fields that the command line sets; empty for a complete run."""
    names = ("sizes", "batches", "layers", "tasks", "peers")
    fields = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    # Sizes on the command line apply to splines and guides as well.
    shared = itertools.product(("spline", "guide"), ("sizes", "batches", "layers"))
    fields |= {f"{family}_{name}": fields[name] for family, name in shared if name in fields}
    return {name: tuple(values) for name, values in fields.items()}


def plans(options: argparse.Namespace) -> list[Plan]:
    """Plans for each number of threads; only the first includes memory and updates."""
    plan = Plan(peers=tuple(PEERS), device=options.device)
    plan = plan.full() if options.full else plan.quick() if options.quick else plan
    fields = chosen(options)
    limits = {"seconds": options.seconds, "longest_call": options.longest_call}
    fields |= {name: value for name, value in limits.items() if value is not None}
    plan = dataclasses.replace(plan, **fields)
    if options.device != "cpu" or (options.tasks and "sample_backward" not in options.tasks):
        plan = dataclasses.replace(plan, memory=None)
    if options.tasks and "sample" not in options.tasks:
        plan = dataclasses.replace(plan, update=False)
    threads = options.threads or ((1,) if options.quick else THREADS)
    first, *others = (dataclasses.replace(plan, threads=count) for count in threads)
    for_threads: dict[str, Any] = {"memory": None, "update": False}
    is_deep_too = not (chosen(options) or options.full or options.quick)
    if not (options.layers or options.full or options.quick):
        for_threads["layers"] = LAYERS_OF_MORE_THREADS
    if not options.tasks:
        for_threads["tasks"] = tuple(task for task in TASKS if TASKS[task][0] in ("MAF", "RealNVP"))
    others = [dataclasses.replace(other, **for_threads) for other in others]
    return [first, *others, *(dataclasses.replace(other, **DEEP) for other in others if is_deep_too)]


def measure(plans: list[Plan]) -> dict[str, Any]:
    """Measure the plans one after another, printing each cell."""
    results: dict[str, Any] = {"about": about(plans[0].device), "missing": [], "cells": [], "updates": []}
    results["memory"] = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for plan in plans:
        if plan.threads > cores:
            results["missing"].append(f"{plan.threads} threads are left out: there are {cores} cores.")
            continue
        for kind, content in worker.results(plan):
            if kind == "cell":
                results["cells"].append(content)
                print(report.line(content), file=sys.stderr, flush=True)
            elif kind == "update":
                results["updates"].append(content)
            elif kind == "memory":
                results["memory"] = content
            elif content not in results["missing"]:
                results["missing"].append(content)
                print(content, file=sys.stderr, flush=True)
    return results


def about(device: str = "cpu") -> dict[str, Any]:
    """Date, machine and versions of this run."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    if device == "cuda":
        processor = f"{torch.cuda.get_device_name()}, {processor}"
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": versions(),
    }


def write(path: Path, text: str) -> None:
    """Write a file atomically."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    main()
