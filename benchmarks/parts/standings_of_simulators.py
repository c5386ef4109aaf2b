"""Tables and plot of the results of posterior estimators for simulators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from parts import report

BASELINE = "sbi nsf"
HEADS = ("estimator", "C2ST", "log q, nats", f"over {BASELINE}", "training, CPU s", "epochs", "10,000 draws, CPU s")
COLOURS = {
    "pyro-maf nsf": "#0072b2",
    "pyro-maf nsf, support": "#009e73",
    "pyro-maf maf": "#56b4e9",
    "sbi nsf": "#d55e00",
    "sbi maf": "#e69f00",
    "sbi zuko_nsf": "0.55",
}

Cell = dict[str, Any]


def table(results: dict[str, Any]) -> str:
    """Markdown tables, one for each cell."""
    parts = [report.about_line(results)]
    for cell in ordered(results["cells"]):
        size = f"{cell['dimensions']} parameters, {cell['simulations']:,} simulations, seed {cell['seed']}"
        parts.append(f"**{cell['task']}** ({size})")
        parts.append(report.table(HEADS, _rows(cell)))
    return "\n\n".join(parts) + "\n"


def ordered(cells: list[Cell]) -> list[Cell]:
    """Cells sorted by task in order of first appearance, then by size and seed."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    return sorted(cells, key=lambda cell: (tasks.index(cell["task"]), cell["simulations"], cell["seed"]))


def _rows(cell: Cell) -> Iterator[list[str]]:
    for name, figures in cell["estimators"].items():
        yield [
            name,
            f"{np.mean(figures['c2st']):.3f}",
            f"{figures['log_prob']:.3f}",
            "" if name == BASELINE else f"{figures['gain']:+.3f} ± {figures['gain_se']:.3f}",
            f"{figures['training_seconds']:.1f}",
            str(figures["epochs"]),
            f"{figures['sampling_seconds']:.4f}",
        ]


def draw(cells: list[Cell], path: Path) -> None:
    """Plot C2ST, training and sampling time: a dot per cell and estimator, small for few simulations."""
    rows = ordered(cells)
    tasks = list(dict.fromkeys(cell["task"] for cell in rows))
    figure = Figure(figsize=(8, 0.7 * len(tasks) + 1.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    titles = ("C2ST (0.5 is the posterior)", "training, CPU s", "10,000 draws, CPU s")
    for panel, key, title in zip(panels, ("c2st", "training_seconds", "sampling_seconds"), titles, strict=True):
        for cell in rows:
            for name, figures in cell["estimators"].items():
                height = tasks.index(cell["task"]) + 0.12 * (list(COLOURS).index(name) - 2.5)
                size = 3 if cell["simulations"] < 5_000 else 7
                panel.plot(np.mean(figures[key]), height, "o", markersize=size, color=COLOURS[name], alpha=0.8)
        panel.set_title(title, fontsize=10)
        panel.set_yticks(range(len(tasks)), tasks)
        panel.spines[["top", "right"]].set_visible(False)
        if key == "c2st":
            panel.set_xlim(0.48, 1.01)
        else:
            panel.set_xscale("log")
    panels[0].invert_yaxis()
    handles = [panels[0].plot([], [], "o", color=colour, label=name)[0] for name, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(COLOURS) // 2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
