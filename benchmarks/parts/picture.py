"""Plot of the cost of the sequential direction against D, for D passes, the peers and this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from parts.cells import DENSE
from parts.peers import OURS, PEERS

LIMIT = 0.5
TASK = "sample"


def draw(results: dict[str, Any], path: Path) -> bool:
    """Plot the time over that of one dense pass, a panel per batch size, for the fewest layers and threads measured.

    Returns:
        Whether there was anything to plot.
    """
    cells = [cell for cell in results["cells"] if cell["task"] == TASK]
    if not cells:
        return False
    threads, layers = (min(cell[key] for cell in cells) for key in ("threads", "layers"))
    cells = [cell for cell in cells if (cell["threads"], cell["layers"]) == (threads, layers)]
    batches = sorted({cell["batch"] for cell in cells})
    # A figure that is not pyplot's needs no display.
    figure = Figure(figsize=(1 + 3 * len(batches), 3.8), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)
    for panel, batch in zip(panels[0], batches, strict=True):
        _panel(panel, [cell for cell in cells if cell["batch"] == batch])
        panel.set_title(f"batch {batch:,}", fontsize=10)
        panel.set_xlabel("dimensions D")
    panels[0][0].set_ylabel("time / one dense pass")
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), fontsize=9, frameon=False, loc="outside lower center", ncols=4
    )
    figure.suptitle(
        f"Sampling from a MAF: {layers} layer{'s' * (layers > 1)}, {threads} thread{'s' * (threads > 1)}, float32; "
        "hollow: predicted",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    return True


def _panel(panel: Any, cells: list[dict[str, Any]]) -> None:
    # Of several widths for one D, plot the widest.
    by_dim = {cell["D"]: cell for cell in sorted(cells, key=lambda cell: cell["H"])}
    dims = sorted(by_dim)
    panel.plot(dims, dims, color="0.6", linestyle="--", linewidth=1, label="D passes")
    for colour, name in enumerate(PEERS):
        _line(panel, name, by_dim, dims, color=f"C{colour + 1}", linewidth=1, markersize=4)
    _line(panel, OURS, by_dim, dims, color="C0", linewidth=2.5, markersize=6)
    panel.axhline(LIMIT, color="0.3", linestyle=":", linewidth=1, label="the limit: half a dense pass")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(dims, [f"{dim}" for dim in dims], fontsize=8)
    panel.minorticks_off()
    panel.spines[["top", "right"]].set_visible(False)


def _line(panel: Any, name: str, by_dim: dict[int, dict[str, Any]], dims: list[int], **style: Any) -> None:
    points = [(dim, by_dim[dim]["times"][name]) for dim in dims if name in by_dim[dim]["times"] and name != DENSE]
    if not points:
        return
    places, heights = [dim for dim, _ in points], [entry["over_dense"] for _, entry in points]
    panel.plot(places, heights, color=style["color"], linewidth=style["linewidth"], label=name)
    for dim, entry in points:
        face = style["color"] if entry["measured"] else "white"
        panel.plot(
            dim, entry["over_dense"], "o", color=style["color"], markerfacecolor=face, markersize=style["markersize"]
        )
