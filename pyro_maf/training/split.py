"""The two parts of the data of a fit, for training and for validation, and their units."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_maf.distributions import ConditionalFlowPrior, FlowPrior
from pyro_maf.distributions.units import float32_holds
from pyro_maf.support import Support
from pyro_maf.training.batches import Batches
from pyro_maf.training.data import (
    Rows,
    check_rounded,
    check_training,
    column_labels,
    divide,
    measured,
    read_rows,
    strays,
)
from pyro_maf.training.processes import Processes
from pyro_maf.training.repeats import copies_of, repeat_as_a_whole
from pyro_maf.training.stored import StoredBatches, StoredRows, is_stored
from pyro_maf.training.units import Units

__all__ = ["Parts", "in_units_of", "read_parts"]

VALIDATION_FRACTION = 0.1
MENTIONED = 0.01
COARSE = 0.05
FAR = 1000.0


class Parts(NamedTuple):
    """Training and validation rows, with their units.

    Attributes:
        training: Rows in memory, or on disk.
        held_out: Validation rows.
        units: Units of the unconstrained columns of the training data.
        context_units: Units of the columns of its context, if any.
        generator: Generator of the order of batches.
        repeats: Number of rows that repeat an earlier one; an estimate for rows on disk.
        stray: True if some values leave the support when rounded to float32.
        whole: All rows, if they are in memory and not yet rounded.
        places: Indices of the validation rows in the data, from 0; None if they were passed separately.
        left_out: Indices in the data, from 0, of rows that are too far out for validation, and unused.
    """

    training: Rows | StoredRows
    held_out: Rows
    units: Units
    context_units: Units | None
    generator: torch.Generator
    repeats: int
    stray: bool
    whole: Rows | None = None
    places: Tensor | None = None
    left_out: Sequence[int] = ()

    def rounded(self, density: FlowPrior | ConditionalFlowPrior, data: Any, context: Any) -> Parts:
        """Round the rows to the dtypes of `density`, after their units have been computed from the exact ones.

        Args:
            density: The density, in their units.
            data, context: Their sources, for the columns' names.

        Raises:
            ValueError: For values too far out for the model's dtype.
        """
        prior = density.unwrapped
        dtypes = density.dtype, density.context_dtype
        held_out, training = self.held_out.rounded(dtypes), self.training
        if isinstance(training, StoredRows):
            training.round_for(prior)
        else:
            check_rounded((training if self.whole is None else self.whole).rounded(dtypes), prior, data, context)
            training = training.rounded(dtypes)
        check_rounded(held_out, prior, data, context, "validation ")
        return self._replace(training=training, held_out=held_out, whole=None)._without_far_rows(prior)

    def _without_far_rows(self, prior: FlowPrior) -> Parts:
        """Drop held-out validation rows that lie over a thousand scales from the bulk.

        The log-likelihood of one would outweigh that of all others, and select the epoch. Rows that were passed as
        `validation` stay.
        """
        far = (prior.standardised(self.held_out.data).abs() > FAR).any(1)
        if self.places is None or far.all() or not far.any():
            return self
        return self._replace(
            held_out=self.held_out.take(~far), places=self.places[~far], left_out=self.places[far].tolist()
        )

    @property
    def omissions(self) -> list[str]:
        """Return a line on the rows that are left out, if any."""
        if not self.left_out:
            return []
        return [
            f"fit left {len(self.left_out):,} of the validation rows out, the first of them row {min(self.left_out)}: "
            "over 1,000 scales from the bulk, one would outweigh all others in the choice of the best epoch. Look at "
            "them, and give rows that count as validation=."
        ]

    def remarks(self, density: FlowPrior | ConditionalFlowPrior, data: Any, context: Any) -> list[str]:
        """Remarks on the rows, a line each: the number of repeats, and columns that `density` has to round coarsely.

        Args:
            density, data, context: As in `rounded`, which comes after.
        """
        support = density.unwrapped.units.support
        return [
            *self._on_repeats(),
            *_on_rounding("", self.units, support, density.dtype, data),
            *_on_rounding("context ", self.context_units, None, density.context_dtype, context),
        ]

    def _on_repeats(self) -> list[str]:
        """Return a line on rows that repeat, unless they are few, or repeat because their values are few."""
        if isinstance(self.training, StoredRows):
            total, some = len(self.training.data), self.training.read(0)
        else:
            some = self.training if self.whole is None else self.whole
            total = len(some.data)
        if self.repeats < MENTIONED * total or not repeat_as_a_whole(some):
            return []
        return [
            f"fit found {self.repeats:,} of {total:,} rows to repeat an earlier one: all copies of a row are on one "
            "side of the divide, for training or for validation. Draws of a chain, or resampled ones, tell as much as "
            "the distinct rows among them."
        ]

    def batches(self, size: int, processes: Processes) -> Batches | StoredBatches:
        """Return the training rows in batches."""
        deal: Any = StoredBatches if isinstance(self.training, StoredRows) else Batches
        return deal(self.training, size, self.generator, processes)

    @property
    def total(self) -> int:
        """Number of rows of data, for training and, unless passed separately, for validation."""
        in_memory = not isinstance(self.training, StoredRows) and self.places is not None
        return len(self.training.data) + (len(self.held_out.data) + len(self.left_out) if in_memory else 0)

    def digest(self) -> str:
        """Fingerprint of the moments and the validation rows."""
        hashed = hashlib.sha256(str(len(self.training.data)).encode())
        for tensor in (*self.units, *(self.context_units or ()), *self.held_out):
            if tensor is not None:
                hashed.update(tensor.numpy().tobytes())
        return hashed.hexdigest()


def read_parts(
    model: Any, data: Any, context: Any, validation: Any, support: Support, *, dtype: torch.dtype, seed: int
) -> Parts:
    """Split the arguments of `fit` into training and validation rows, on the CPU and in their original precision.

    Args:
        model, data, context, validation, seed: As in `fit`.
        support: The support of the data.
        dtype: Dtype of the model.

    Raises:
        ValueError, TypeError: As in `fit`.
    """
    generator = torch.Generator().manual_seed(seed)
    fraction, given = _validation(validation)
    if given is not None:
        given = read_rows(model, *given, support=support, role="validation ")
    if is_stored(data):
        stored = StoredRows(model, data, context, support=support, dtype=dtype, fraction=fraction, seed=seed)
        units = _as_precise(stored.measured(), stored.stored_dtypes, dtype)
        held_out = stored.held_out() if given is None else given
        places = stored.places if given is None else None
        return Parts(stored, held_out, *units, generator, stored.repeats, stored.stray, places=places)
    rows = read_rows(model, data, context, support=support)
    check_training(rows, data, context)
    copies = copies_of(rows)
    training, places = rows, None
    if given is None:
        others, places = divide(rows, fraction, generator, copies)
        training, given = rows.take(others), rows.take(places)
    units = _as_precise(measured(training, support), training.dtypes, dtype)
    repeats = len(rows.data) - copies.distinct
    return Parts(training, given, *units, generator, repeats, strays(rows.data, support), rows, places)


def _as_precise(
    units: tuple[Units, Units | None], dtypes: tuple[torch.dtype, torch.dtype], dtype: torch.dtype
) -> tuple[Units, Units | None]:
    """Round units to float32 where both the model, of `dtype`, and the rows are of float32."""
    of_data, of_context = units
    if torch.float64 not in (dtype, dtypes[0]):
        of_data = of_data.float()
    if of_context is not None and torch.float64 not in (dtype, dtypes[1]):
        of_context = of_context.float()
    return of_data, of_context


def in_units_of(parts: Parts, model: Any, support: Support) -> FlowPrior | ConditionalFlowPrior:
    """Return the model on its support, standardised by the training rows; a prior keeps its units.

    Raises:
        ValueError: For a model with a batch shape.
    """
    if isinstance(model, FlowPrior) and model.context_dim:
        units = {name: getattr(model, name) for name in ("loc", "scale", "context_loc", "context_scale")}
        return ConditionalFlowPrior(model.model, support=support.name, **units)
    if isinstance(model, (FlowPrior, ConditionalFlowPrior)):
        return model
    density = _in_new_units(parts, model, support)
    if parts.stray:
        density.unwrapped.units.widen()
    return density


def _in_new_units(parts: Parts, model: Any, support: Support) -> FlowPrior | ConditionalFlowPrior:
    loc, scale = parts.units
    if parts.context_units is None:
        prior = FlowPrior(model, support=support.name, loc=loc, scale=scale)
        if prior.batch_shape:
            raise ValueError(
                f"fit expected a single density, got {model.name} with batch shape {tuple(prior.batch_shape)}: "
                "where that is of a context, leave the condition out and give it as context=."
            )
        return prior
    context_loc, context_scale = parts.context_units
    return ConditionalFlowPrior(
        model, support=support.name, loc=loc, scale=scale, context_loc=context_loc, context_scale=context_scale
    )


def _on_rounding(role: str, units: Units | None, support: Support | None, dtype: torch.dtype, value: Any) -> list[str]:
    """Return a line on columns for which the dtype of the density's values is too coarse."""
    if units is None or dtype == torch.float64:
        return []
    coarse = (~float32_holds(*units, support, resolution=COARSE)).nonzero()[:1, 0].tolist()
    return [
        f"fit takes {role}{column_labels(value, len(units.loc))[column]} in float32, which has few different values "
        f"there, {units.loc[column].item():.8g} +- {units.scale[column].item():.2g}: subtract what the rows have in "
        "common while they are in float64, or fit a model in float64, model.double(), to rows in float64."
        for column in coarse
    ]


def _validation(validation: Any) -> tuple[float, tuple[Any, Any] | None]:
    """Return the fraction of validation rows, or the validation rows that were passed."""
    if validation is None or isinstance(validation, (int, float)):
        fraction = VALIDATION_FRACTION if validation is None else float(validation)
        if not 0 < fraction < 1:
            raise ValueError(f"fit expected validation as a part between 0 and 1, or as data, got {validation!r}.")
        return fraction, None
    given = validation if isinstance(validation, tuple) else (validation, None)
    if len(given) != 2:
        raise ValueError(f"fit expected validation as data or a tuple (data, context), got a tuple of {len(given)}.")
    return 0.0, given
