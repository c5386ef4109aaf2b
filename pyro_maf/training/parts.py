"""The two parts of the data of a fit, for training and for validation, and the units they come in."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch

from pyro_maf.distributions import ConditionalFlowPrior, FlowPrior
from pyro_maf.distributions.support import Support
from pyro_maf.training.batches import Batches
from pyro_maf.training.data import Rows, check_training, read_rows, split
from pyro_maf.training.processes import Processes
from pyro_maf.training.stored import StoredBatches, StoredRows, is_stored
from pyro_maf.training.units import Units, units_of

__all__ = ["Parts", "in_units_of", "read_parts"]

VALIDATION_FRACTION = 0.1


class Parts(NamedTuple):
    """What a model is fitted to.

    Attributes:
        training: Rows in memory, or on disk.
        held_out: Rows to validate with.
        units: Of the unconstrained columns of the training data.
        context_units: Of those of its context, where there is one.
        generator: What draws the order of batches.
    """

    training: Rows | StoredRows
    held_out: Rows
    units: Units
    context_units: Units | None
    generator: torch.Generator

    def batches(self, size: int, processes: Processes) -> Batches | StoredBatches:
        """The training rows in batches."""
        deal: Any = StoredBatches if isinstance(self.training, StoredRows) else Batches
        return deal(self.training, size, self.generator, processes)

    def digest(self) -> str:
        """A number that data of other moments, or with other validation rows, would not have."""
        hashed = hashlib.sha256(str(len(self.training.data)).encode())
        for tensor in (*self.units, *(self.context_units or ()), *self.held_out):
            if tensor is not None:
                hashed.update(tensor.numpy().tobytes())
        return hashed.hexdigest()


def read_parts(
    model: Any, data: Any, context: Any, validation: Any, support: Support, *, dtype: torch.dtype, seed: int
) -> Parts:
    """The parts of what was given to `fit`, which says what they may be, in `dtype` and on the CPU.

    Raises:
        ValueError, TypeError: As in `fit`.
    """
    generator = torch.Generator().manual_seed(seed)
    fraction, given = _validation(validation)
    known: dict[str, Any] = {"support": support, "dtype": dtype}
    training: Rows | StoredRows
    if is_stored(data):
        training = StoredRows(model, data, context, fraction=fraction, seed=seed, **known)
        units = training.measured()
        held_out = training.held_out() if given is None else read_rows(model, *given, **known, role="validation ")
        return Parts(training, held_out, *units, generator)
    rows = read_rows(model, data, context, **known)
    check_training(rows, data, context)
    if given is None:
        training, held_out = split(rows, fraction, generator)
    else:
        training, held_out = rows, read_rows(model, *given, **known, role="validation ")
    context_units = None if training.context is None else units_of(training.context)
    return Parts(training, held_out, units_of(support.unconstrain(training.data)[0]), context_units, generator)


def in_units_of(parts: Parts, model: Any, support: Support) -> FlowPrior | ConditionalFlowPrior:
    """The model on its support, standardised by the training rows; a prior keeps the units it has.

    Raises:
        ValueError: For a model with a batch shape.
    """
    if isinstance(model, FlowPrior) and model.context_dim:
        units = {name: getattr(model, name) for name in ("loc", "scale", "context_loc", "context_scale")}
        return ConditionalFlowPrior(model.model, support=support.name, **units)
    if isinstance(model, (FlowPrior, ConditionalFlowPrior)):
        return model
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


def _validation(validation: Any) -> tuple[float, tuple[Any, Any] | None]:
    """What fraction of the rows to set aside, and else what rows were given."""
    if validation is None or isinstance(validation, (int, float)):
        fraction = VALIDATION_FRACTION if validation is None else float(validation)
        if not 0 < fraction < 1:
            raise ValueError(f"fit expected validation as a part between 0 and 1, or as data, got {validation!r}.")
        return fraction, None
    given = validation if isinstance(validation, tuple) else (validation, None)
    if len(given) != 2:
        raise ValueError(f"fit expected validation as data or a tuple (data, context), got a tuple of {len(given)}.")
    return 0.0, given
