"""Plots of the losses of fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pyro_maf.plotting.axes import COLOURS, GREY, new_panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyro_maf.training import FitResult

__all__ = ["losses"]


@styled
def losses(results: Mapping[str, FitResult], *, marks: Mapping[str, float] | None = None, title: str = "") -> Figure:
    """Validation and training loss of each fit against its epochs.

    The axis of losses leaves out the first tenth of the epochs, so that the final losses can be distinguished.

    Args:
        results: Results of `pyro_maf.fit`, by name.
        marks: Losses to compare with, in nats, by name, such as that of the true density on the validation rows.
        title: Title of the figure.

    Raises:
        ValueError: If there are no results.
        ModuleNotFoundError: Without the `train` extra.

    Example:
        >>> from pyro_maf.training import FitResult
        >>> result = FitResult(None, (2.0, 1.5, 1.3), (1.9, 1.5, 1.4), 3, -1.4, 0.1, "reached max_epochs (3)")
        >>> losses({"MAF": result}).axes[0].get_xlabel()
        'epoch'
    """
    if not results:
        raise ValueError("losses expected at least one result, got none.")
    figure, (axes,) = new_panels(1, title, width=5.5, height=3.6)
    marks = marks or {}
    shown = list(marks.values())
    for colour, (name, result) in zip(itertools.cycle(COLOURS), results.items(), strict=False):
        epochs = range(1, result.epochs + 1)
        axes.plot(epochs, result.validation_loss, color=colour, label=name)
        axes.plot(epochs, result.train_loss, color=colour, linestyle=":", linewidth=1.0)
        started = slice(math.ceil(result.epochs / 10), None)
        shown += filter(math.isfinite, (*result.validation_loss[started], *result.train_loss[started]))
    for dashes, (name, value) in zip(itertools.cycle(("--", "-.")), marks.items(), strict=False):
        axes.axhline(value, color="black", linewidth=0.8, linestyle=dashes, label=name)
    axes.plot([], [], color=GREY, linestyle=":", linewidth=1.0, label="in training")
    axes.set(xlabel="epoch", ylabel="negative log-likelihood in nats")
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    margin = 0.05 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
