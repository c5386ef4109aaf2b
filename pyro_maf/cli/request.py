"""Conversion of the options of `fit` to arguments of `pyro_maf.fit`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_maf.cli.options import read

if TYPE_CHECKING:
    from pyro_maf.datasets import Table

__all__ = ["check_asked", "model_of", "support_of", "validation_of"]

LAYERED = ("maf", "iaf", "realnvp", "maf-mog")
DEFAULT_LAYERS = 5


def check_asked(flow: str, layers: int | None, hidden: list[str] | None, device: str, devices: int, data: str) -> None:
    """Refuse options without effect, and devices that are not available."""
    import torch

    if layers is not None and flow not in LAYERED:
        raise ValueError(f"fit got --num-layers for {flow}, which has no number of layers to choose: leave it out.")
    if hidden and flow == "gaussian":
        raise ValueError("fit got --hidden-dims for gaussian, which has no hidden layers: leave it out.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("fit got --device cuda, but torch finds no CUDA device: leave it out.")
    if devices > 1 and (data == "-" or Path(data).is_fifo()):
        raise ValueError("fit expected a file for several --devices, as each process reads it, got a pipe.")


def validation_of(asked: str, table: Table, **text: Any) -> float | Table:
    """Return the fraction of validation rows, or the table of them."""
    from pyro_maf.tables.cells import number_in

    part = number_in(asked)
    if not math.isnan(part):
        return part
    return read(asked, columns=table.columns, dtype=table.data.dtype.name, **text)


def support_of(asked: list[str], names: Sequence[str]) -> str | list[str] | None:
    """Return the support for `pyro_maf.fit`: one for all columns, or one for each."""
    plain = [item for item in asked if "=" not in item]
    by_name = dict(item.split("=", 1) for item in asked if "=" in item)
    if not by_name:
        return (plain[0] if len(plain) == 1 else plain) or None
    unknown = [name for name in by_name if name not in names]
    if unknown or len(plain) > 1:
        problem = f"no column {unknown[0]!r}" if unknown else f"{len(plain)} for all other columns"
        raise ValueError(f"fit got --support {','.join(asked)}, with {problem}: the columns are {', '.join(names)}.")
    return [by_name.get(name, plain[0] if plain else "real") for name in names]


def model_of(
    flow: str, table: Table, support: str | list[str] | None, layers: int | None, hidden: list[str], seed: int
) -> Any:
    """Build the model to train.

    Raises:
        ValueError: For invalid sizes.
    """
    from pyro_maf.experiments import build

    if not all(width.isdecimal() for width in hidden):
        raise ValueError(f"fit expected --hidden-dims as widths such as 128,128, got {','.join(hidden)}.")
    return build(
        flow,
        # On a simplex the last column follows from the others.
        len(table.names) - (support == "simplex"),
        context_dim=len(table.context_names),
        hidden_dims=[int(width) for width in hidden] or None,
        seed=seed,
        num_layers=DEFAULT_LAYERS if layers is None else layers,
    )
