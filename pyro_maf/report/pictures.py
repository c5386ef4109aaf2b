"""The pictures of a report, each with a text alternative."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_maf import plotting
from pyro_maf.report.examination import Examination
from pyro_maf.report.kolmogorov import distance_between, distance_to_uniform

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyro_maf.training import FitResult

__all__ = ["Picture", "log_densities", "losses", "marginals", "noise", "pairs"]

MOST_MARGINALS = 24
MOST_NOISE = 12
MOST_PAIRS = 6
CORRELATED_COLUMNS = 1000
"""Maximum number of columns among which the most correlated are searched: the cost is quadratic."""
LONGEST_NAME = 24
ABREAST = 2
"""Number of panels side by side: legible on a phone."""
DPI = 96


@dataclass(frozen=True)
class Picture:
    """A picture for an HTML page.

    Attributes:
        source: The picture as a data: URL.
        alt: Text alternative.
        note: What it leaves out; "" for nothing.
    """

    source: str
    alt: str
    note: str = ""


def losses(result: FitResult) -> Picture:
    """Draw training and validation losses."""
    figure = plotting.losses({"validation": result})
    return _embedded(figure, f"Losses in training and validation over {result.epochs} epochs.")


def marginals(examination: Examination) -> Picture:
    """Draw histograms of columns of data and samples."""
    data, samples, names = examination.data, examination.samples, examination.names
    shown, note = _foremost(distance_between(data, samples), MOST_MARGINALS, "whose data and samples differ most")
    figure = plotting.marginals(data[:, shown], samples[:, shown], names=_drawn(names, shown), columns=ABREAST)
    return _embedded(figure, f"Histograms of data and samples of {_listed(names, shown)}.", note)


def noise(u: Tensor, names: list[str]) -> tuple[Picture, Picture]:
    """Draw PIT histograms and QQ plots of the columns of noise."""
    distances = distance_to_uniform(torch.special.ndtr(u))
    shown, note = _foremost(distances, MOST_NOISE, "that are furthest from uniform", "panels")
    listed, drawn = _listed(names, shown), _drawn(names, shown)
    return (
        _embedded(
            plotting.pit(u[:, shown], names=drawn, columns=ABREAST), f"PIT histograms of the noise of {listed}.", note
        ),
        _embedded(
            plotting.qq(u[:, shown], names=drawn, columns=ABREAST), f"Normal QQ plots of the noise of {listed}.", note
        ),
    )


def pairs(examination: Examination) -> Picture:
    """Draw every pair of a few columns of data and samples."""
    data, samples, names = examination.data, examination.samples, examination.names
    shown = _most_correlated(data[:, :CORRELATED_COLUMNS])
    note = ""
    if len(shown) < len(names):
        among = f" of the first {CORRELATED_COLUMNS:,}" if len(names) > CORRELATED_COLUMNS else ""
        note = f"{len(shown)} of {len(names):,} columns, the most correlated{among}: {_listed(names, shown)}."
    figure = plotting.pairs(data[:, shown], samples[:, shown], names=_drawn(names, shown))
    return _embedded(figure, f"Data over samples for every pair of {_listed(names, shown)}.", note)


def log_densities(examination: Examination) -> Picture:
    """Draw histograms of the log-densities of data and samples."""
    heights = {"data": examination.log_prob, "samples": examination.samples_log_prob}
    return _embedded(plotting.log_densities(heights), "Histograms of the log-densities of data and of samples.")


def _foremost(score: Tensor, most: int, which: str, what: str = "columns") -> tuple[list[int], str]:
    """Return the indices of the highest scores, ascending, and a note on those left out."""
    if len(score) <= most:
        return list(range(len(score))), ""
    return sorted(score.topk(most).indices.tolist()), f"{most} of {len(score):,} {what}, those {which}."


def _most_correlated(data: Tensor) -> list[int]:
    """Select correlated columns: the most correlated pair, then repeatedly the one most correlated with any of them.

    If there are few columns, all of them in their order.
    """
    width = data.shape[1]
    if width <= MOST_PAIRS:
        return list(range(width))
    if len(data) < 2:
        return list(range(MOST_PAIRS))
    correlation = torch.corrcoef(data.T).abs().nan_to_num(0.0).fill_diagonal_(-1.0)
    shown = [int(correlation.amax(0).argmax())]
    while len(shown) < MOST_PAIRS:
        nearness = correlation[shown].amax(0)
        nearness[shown] = -1.0
        shown.append(int(nearness.argmax()))
    return sorted(shown)


def _drawn(names: Sequence[str], shown: Sequence[int]) -> list[str]:
    """Escape names for matplotlib, and shorten them to fit a panel."""
    drawn = []
    for index in shown:
        name = "".join(letter if letter.isprintable() else " " for letter in names[index])
        name = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
        drawn.append(name.replace("$", r"\$"))
    return drawn


def _listed(names: Sequence[str], shown: Sequence[int]) -> str:
    return ", ".join(names[index] for index in shown)


def _embedded(figure: Figure, alt: str, note: str = "") -> Picture:
    """Embed a figure as SVG with text elements, byte for byte reproducible."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pyro_maf"}), warnings.catch_warnings():
        # A warning about glyphs missing from matplotlib's font: the browser's have them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="svg", dpi=DPI, metadata={"Date": None})
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/svg+xml;base64,{encoded}", alt, note)
