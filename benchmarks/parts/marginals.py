"""Plot of posterior marginals: reference draws and a few guides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from parts.posteriors import Posterior

BINS = 50
MOST = 12
"""Maximum number of columns in the plot."""
SHOWN = {"AutoIAF, fit_guide": "C3", "AutoIAF": "C0", "AutoMultivariateNormal": "C1", "AutoIAFNormal": "C2"}
REFERENCE = "reference"


def panels(posterior: Posterior) -> dict[str, Any]:
    """Columns of the plot, their bin edges, and the histograms of the reference draws."""
    return {
        "columns": list(posterior.columns[:MOST]),
        "edges": edges(posterior)[:MOST].tolist(),
        "histograms": {REFERENCE: histograms(posterior, posterior.draws)},
    }


def edges(posterior: Posterior) -> np.ndarray:
    """Bin edges of each column, (columns, bins + 1), which leave out extreme draws."""
    low, high = np.quantile(posterior.draws, [0.002, 0.998], axis=0)
    margin = 0.1 * (high - low)
    return np.linspace(low - margin, high + margin, BINS + 1, axis=1)


def histograms(posterior: Posterior, draws: np.ndarray) -> list[list[float]]:
    """Density histograms of draws, for each column of the plot."""
    rows = []
    for column, ends in list(zip(draws.T, edges(posterior), strict=True))[:MOST]:
        counts, _ = np.histogram(column[np.isfinite(column)], ends)
        rows.append([float(f"{density:.4g}") for density in counts / (len(column) * (ends[1] - ends[0]))])
    return rows


def draw(posteriors: dict[str, Any], path: Path) -> bool:
    """Plot a row of panels for each posterior, a panel for each parameter.

    Returns:
        Whether there was anything to plot.
    """
    if not posteriors:
        return False
    width = max(len(each["columns"]) for each in posteriors.values())
    figure = Figure(figsize=(1.6 * width, 2.1 * len(posteriors)), layout="constrained")
    rows = figure.subplots(len(posteriors), width, squeeze=False)
    for panels, (name, results) in zip(rows, posteriors.items(), strict=True):
        for index, panel in enumerate(panels):
            if index < len(results["columns"]):
                _panel(panel, results, index)
            else:
                panel.set_axis_off()
        panels[0].set_ylabel(name, fontsize=8)
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    return True


def _panel(panel: Any, results: dict[str, Any], index: int) -> None:
    ends = results["edges"][index]
    heights = results["histograms"][REFERENCE][index]
    panel.stairs(heights, ends, fill=True, color="0.82", label="reference draws")
    for name, colour in SHOWN.items():
        if name in results["histograms"]:
            panel.stairs(results["histograms"][name][index], ends, color=colour, linewidth=1, label=name)
    panel.set_title(results["columns"][index], fontsize=8)
    # The peak of a collapsed guide is cut off, as it would dwarf all else.
    panel.set(ylim=(0, 2 * max(heights)), yticks=[])
    panel.tick_params(labelsize=6)
    panel.spines[["top", "right", "left"]].set_visible(False)
