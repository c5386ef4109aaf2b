"""Preparation of the rows for a fit: reading and checking, splitting, standardising and rounding, in this order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_maf.distributions import (
    ConditionalDensity,
    ConditionalFlowPrior,
    ConditionalTableDensity,
    Density,
    FlowPrior,
    TableDensity,
)
from pyro_maf.distributions.context_net import ContextNet
from pyro_maf.distributions.data_units import float32_holds, float32_reaches
from pyro_maf.distributions.steps import dequantised
from pyro_maf.support import Support
from pyro_maf.tables import MappedRows, Reader, Rows, rows_of
from pyro_maf.tables.layout import TableLike
from pyro_maf.tables.moments import Moments
from pyro_maf.tables.named_rows import NamedRows, named_rows
from pyro_maf.tables.reader import Labels
from pyro_maf.tables.rows import hash_rows, repeat_as_a_whole
from pyro_maf.tables.table import Table
from pyro_maf.tables.units import Units, units_of
from pyro_maf.training.kinds import Kinds, grids_of
from pyro_maf.training.parts import Aside, divide, fractions_of, without_far_rows
from pyro_maf.training.screening import screen_data
from pyro_maf.training.start import start_at
from pyro_maf.training.state import WEIGHT_DECAY
from pyro_maf.transforms import ConditionalFlow, Flow

__all__ = ["FITTED", "Choice", "Fitted", "Model", "Prepared", "Recipe", "Trained", "Validation", "prepare"]

Model: TypeAlias = Flow | ConditionalFlow | Density | ConditionalDensity
Fitted: TypeAlias = FlowPrior | ConditionalFlowPrior | TableDensity | ConditionalTableDensity
FITTED = (FlowPrior, ConditionalFlowPrior, TableDensity, ConditionalTableDensity)
Validation: TypeAlias = float | TableLike | Table | tuple[TableLike | None, ...] | None

MENTIONED = 0.01
COARSE = 0.05
MOST_COPIES, COPIED_ROWS = 8, 2048
"""Maximum number of copies of a validation row, with different noise, and of rows in all, which are scored quickly."""


class Recipe(NamedTuple):
    """Training options that come with a default model.

    Attributes:
        batch_size: As in `fit`.
        weight_decay, relaxations, patience: As in `Schedule`.
        starts: Whether the base of the model is a mixture to be fitted to the training rows.
        joins: Whether a mixture may be put beside the model at the end.
    """

    batch_size: int = 256
    weight_decay: float = WEIGHT_DECAY
    relaxations: int = 0
    patience: int = 30
    starts: bool = False
    joins: bool = False


class Choice(NamedTuple):
    """A model for rows, and the columns that are categorical.

    Attributes:
        model: The model of the other columns, given the context and the categories one-hot.
        source: The rows, all of them numbers.
        support: The support of all columns, real for categorical ones.
        levels: Categories of each column as numbers, or None.
        named: Numeric columns that are treated as categories.
        recipe: Training options.
        net: The embedding network between the context and the model, if any.
    """

    model: Model
    source: NamedRows
    support: Support
    levels: Sequence[tuple[float, ...] | None]
    named: Sequence[int] = ()
    recipe: Recipe = Recipe()
    net: ContextNet | None = None

    @property
    def context_shape(self) -> tuple[int, ...]:
        """Shape of one row of context for the network; () without a network."""
        return () if self.net is None else tuple(self.net.shape)


class Trained(NamedTuple):
    """A density to train, its rows, and their units.

    Attributes:
        density: The density whose mean log-density is maximised.
        stored: The density whose state is stored in checkpoints: it has the same weights, and the data's units.
        training, validation: The rows.
        offsets: Nats to subtract from mean losses of the training and validation rows, to report them in the data's
            units.
    """

    density: Density
    stored: Density
    training: Rows | MappedRows
    validation: Rows
    offsets: tuple[float, float]


class Prepared(NamedTuple):
    """A density in the units of its training rows, and the rows of a fit in its dtypes.

    Attributes:
        density: The density to fit.
        spacing: Grid spacing of each column, 0 for a column without a grid; () if there are none.
        training: Training rows, in memory or on disk.
        validation: Validation rows.
        test: Test rows, or None.
        rows: Number of rows of the data.
        repeats: Number of rows that repeat an earlier one; an estimate for rows on disk.
        units: Units of the unconstrained data columns, and moments of the context columns, if any, in the training
            rows.
        generator: Generator of the order of batches.
        warnings: Possible failures, one line each.
    """

    density: Fitted
    spacing: tuple[float, ...]
    training: Rows | MappedRows
    validation: Aside
    test: Aside | None
    rows: int
    repeats: int
    units: tuple[Units, Moments | None]
    generator: torch.Generator
    warnings: list[str]

    @property
    def trained(self) -> Trained:
        """Density and rows for the loop: dequantised, and in the model's units if conversion takes time."""
        inner, validation = self.density.unwrapped, self.validation.rows
        if isinstance(inner, TableDensity):
            of_numbers = inner.prior if inner.categorical is None else inner.dequantised
            if self.spacing:  # the same noise in every epoch
                copies = max(1, min(MOST_COPIES, COPIED_ROWS // max(1, len(validation.data))))
                validation = validation.take(torch.arange(len(validation.data)).repeat(copies))
                noisy = dequantised(validation.data, self.spacing, torch.Generator().manual_seed(0))
                validation = validation._replace(data=noisy)
            return Trained(of_numbers, of_numbers, self.training, validation, (inner.steps.log_volume,) * 2)
        support = inner.units.support
        is_affine = inner.tails is None and support.name == "real"
        if is_affine or support.angles or isinstance(self.training, MappedRows):
            return Trained(inner, inner, self.training, validation, (0.0, 0.0))
        training, of_training = _standardised(self.training, inner)
        validation, of_validation = _standardised(validation, inner)
        in_model_units = FlowPrior(inner.model, **inner.embedding)
        return Trained(in_model_units, inner, training, validation, (of_training, of_validation))

    def digest(self) -> str:
        """Fingerprint of the units, the held-out rows and the weights."""
        hashed = hashlib.sha256(str(len(self.training.data)).encode())
        of_data, of_context = self.units
        training = self.training.weights if isinstance(self.training, Rows) else None
        test = () if self.test is None else self.test.rows
        for tensor in (*of_data, *(of_context or ()), *self.validation.rows, *test, training):
            if tensor is not None:
                hashed.update(tensor.numpy().tobytes())
        if isinstance(self.training, MappedRows):
            hashed.update(self.training.digest)
        return hashed.hexdigest()


def prepare(
    choice: Choice,
    validated: Validation,
    tested: float | None = None,
    *,
    dequantise: bool = True,
    weights: str | TableLike | None = None,
    dtype: torch.dtype,
    seed: int,
) -> Prepared:
    """Prepare a model and the rows for `fit`, whose `validation` and `test` are `validated` and `tested`, on the CPU.

    Raises:
        ValueError, TypeError: As in `fit`.
    """
    generator = torch.Generator().manual_seed(seed)
    model, source, support, _, named, recipe, _ = choice
    fraction, separate = _validation(choice, validated, weights)
    reader = _reader(choice, source)
    rows, kinds = _read(choice, reader, separate[0] if separate else None, dequantise=dequantise)
    tested = 0.0 if separate and tested is None else tested
    fractions = fractions_of(fraction, tested, len(rows.data), starts=recipe.starts)
    training, validation, test, repeats = divide(rows, fractions, generator, by_chance=kinds.repeat_by_chance(rows))
    sample = training.sample()
    of_data, of_context = sample.moments(support, together=len(choice.context_shape) > 1)
    unconstrained = support.unconstrain(sample.data)[0]
    of_units = units_of(of_data, unconstrained, sample.weights).with_angles(support.angles)
    units = _as_precise((of_units, of_context), rows.dtypes, dtype)
    leaves = any(part.leaves_in_float32(support) for part in (training, validation.rows, test.rows))
    density = _in_units(choice, units, kinds, sample, leaves=leaves, seed=seed)
    is_new = not isinstance(model, FITTED)
    if is_new:
        start_at(density, sample, seed, of_mixture=recipe.starts)
    prior = density.unwrapped
    in_tails = of_units.reaching(unconstrained) if is_new else []
    reach = (of_units if is_new else Units(*of_data)).reach
    warnings = [
        *_on_repeats(rows, repeats),
        *([] if separate is None else _on_shared_rows(rows, separate[0])),
        *_on_rounding(prior, units, reader),
        *kinds.lines(reader.labels, named),
        *screen_data(rows, reader, kinds.categories, [i for i, grid in enumerate(kinds.grids) if grid], in_tails),
    ]
    if isinstance(rows, Rows):
        reader.check_rounded(rows.rounded_for(prior), prior)
    validation, of_validation = without_far_rows(validation, prior, reach, reader, "validation")
    test, of_test = without_far_rows(test, prior, reach, reader, "test")
    if separate is not None:
        validation = Aside(separate[0], None).rounded_for(prior, separate[1])
    return Prepared(
        density=density,
        spacing=kinds.spacing,
        training=training.rounded_for(prior).normalised(),
        validation=validation.normalised(),
        test=test.normalised() if len(test.rows.data) else None,
        rows=len(rows.data),
        repeats=repeats,
        units=units,
        generator=generator,
        warnings=[*warnings, *of_validation, *of_test],
    )


def _read(
    choice: Choice, reader: Reader, validation: Rows | None, *, dequantise: bool
) -> tuple[Rows | MappedRows, Kinds]:
    """The rows, checked, and the kinds of their columns, also those of separate validation rows."""
    source, is_new = choice.source, not isinstance(choice.model, FITTED)
    rows = rows_of(source.data, source.context, reader, source.weights)
    if isinstance(rows, Rows):
        # Here, a density with its own units may lack a category of its context.
        reader.check_training(rows, of_context=is_new, of_draws=source.layout.form == "dict")
    kinds = Kinds(tuple(choice.levels))
    if dequantise and not isinstance(choice.model, (FlowPrior, ConditionalFlowPrior)):
        kinds = kinds._replace(grids=grids_of(rows, validation, choice.support, choice.levels))
    return rows, kinds


@torch.no_grad()
def _standardised(rows: Rows, prior: FlowPrior) -> tuple[Rows, float]:
    """Rows in the units of a prior's model, once for all epochs, and minus the mean log-volume of these units."""
    device = prior.loc.device
    z, log_volume = (each.cpu() for each in prior.units.inverse_and_log_det(rows.data.to(device)))
    context = rows.context
    context = None if context is None else prior.standardised_context(context.to(device)).cpu()
    return Rows(z, context, rows.weights), -rows.mean(log_volume)


def _validation(
    choice: Choice, validation: Validation, weights: str | TableLike | None
) -> tuple[float | None, tuple[Rows, Reader] | None]:
    """Return the fraction of rows to hold out, or the separate validation rows with their reader."""
    source = choice.source
    if validation is None or isinstance(validation, (int, float)):
        if validation is not None and not 0 < validation < 1:
            raise ValueError(f"fit expected validation as a fraction between 0 and 1, or as data, got {validation!r}.")
        return validation, None
    parts = validation if isinstance(validation, tuple) else (validation, None)
    if len(parts) not in (2, 3):
        raise ValueError(
            f"fit expected validation as data or a tuple (data, context) or (data, context, weights), got a tuple of "
            f"{len(parts)}."
        )
    data, context = cast("tuple[TableLike | Table, TableLike | None]", parts[:2])
    row_weights = cast("str | TableLike | None", parts[2] if len(parts) == 3 else None)
    if isinstance(weights, str) and row_weights is None and not isinstance(data, Table):
        row_weights = weights
    role = "validation "
    rows = named_rows("fit", data, context, row_weights, role).as_in("fit", source.layout, source.context_layout, role)
    reader = _reader(choice, rows, role)
    read = reader.read(rows.data, rows.context, rows.weights)
    if read.weights is not None:
        reader.check_some_weight(float(read.weights.sum()))
    return 0.0, (read, reader)


def _reader(choice: Choice, rows: NamedRows, role: str = "") -> Reader:
    """Return the reader of rows for a model; a simplex has one column more than the model."""
    model, support, net = choice.model, choice.support, choice.net
    one_hot = 0
    if not isinstance(model, (TableDensity, ConditionalTableDensity)):
        one_hot = sum(len(level) for level in choice.levels if level is not None)
    of_model: dict[str, Any] = {}
    if not one_hot:
        who, more = type(model).__name__, ", and 1 for a simplex" * (support.event_size - model.input_dim)
        of_context = f"context_dim of {who}" if net is None else "shape of a context"
        of_model["refused"] = f"{who}, which takes none: leave it out or build a conditional model"
        of_model["sizes"] = f"input_dim of {who}{more}", of_context
    return Reader(
        who="fit",
        width=support.event_size,
        context_width=model.context_dim - one_hot if net is None else net.size,
        labels=rows.labels,
        context_labels=rows.context_labels,
        support=support,
        role=role,
        context_shape=choice.context_shape,
        **of_model,
    )


def _as_precise(
    units: tuple[Units, Moments | None], dtypes: tuple[torch.dtype, torch.dtype], dtype: torch.dtype
) -> tuple[Units, Moments | None]:
    """Round units to float32 if both the model, of `dtype`, and the rows are float32."""
    of_data, of_context = units
    if torch.float64 not in (dtype, dtypes[0]):
        of_data = of_data.float()
    if of_context is not None and torch.float64 not in (dtype, dtypes[1]):
        of_context = of_context.float()
    return of_data, of_context


def _in_units(
    choice: Choice, units: tuple[Units, Moments | None], kinds: Kinds, training: Rows, *, leaves: bool, seed: int
) -> Fitted:
    """Return the model on its support, standardised by the training rows; a prior keeps its units.

    Categories follow the context, without standardisation. Values that leave the support in float32 stay in float64.

    Raises:
        ValueError: For a model with a batch shape.
    """
    model, support = choice.model, choice.support
    if isinstance(model, FlowPrior) and model.context_dim:
        names = ("loc", "scale", "tails", "context_loc", "context_scale")
        of_prior = {**{name: getattr(model, name) for name in names}, **model.embedding}
        return ConditionalFlowPrior(model.model, support=support.name, **of_prior)
    if isinstance(model, (FlowPrior, ConditionalFlowPrior, TableDensity, ConditionalTableDensity)):
        return model
    inner: Flow | Density = model.unwrapped if isinstance(model, (ConditionalFlow, ConditionalDensity)) else model
    of_data, of_context = units
    arguments: dict[str, Any] = kinds.units_of_numbers(of_data, support)._asdict()
    if choice.net is not None:
        arguments |= choice.net.arguments
    if inner.context_dim:
        (loc, scale), one_hot = of_context or (torch.zeros(0), torch.ones(0)), sum(kinds.num_categories)
        arguments["context_loc"] = torch.cat([loc, loc.new_zeros(one_hot)])
        arguments["context_scale"] = torch.cat([scale, scale.new_ones(one_hot)])
    arguments["support"] = kinds.support_of_numbers(support).name
    is_conditional = kinds.are_plain and inner.context_dim
    density = ConditionalFlowPrior(model, **arguments) if is_conditional else FlowPrior(inner, **arguments)
    prior = density.unwrapped
    if prior.batch_shape:
        raise ValueError(
            f"fit expected a single density, got {prior.model.name} with batch shape {tuple(prior.batch_shape)}: "
            "if that comes from a context, pass the conditional density, and context=."
        )
    if leaves:
        prior.units.widen()
    return density if kinds.are_plain else kinds.around(prior, training, seed)


def _on_repeats(rows: Rows | MappedRows, repeats: int) -> list[str]:
    """Return a message about repeated rows, unless they are few, or repeat because they have few values."""
    total = len(rows.data)
    if repeats < MENTIONED * total:
        return []
    if not repeat_as_a_whole(rows.sample()):
        return []
    return [
        f"fit found {repeats:,} of {total:,} rows to repeat an earlier one: all copies of a row are on one "
        "side of the split, for training or for validation. Draws of a chain, or resampled ones, are only as "
        "informative as the distinct rows among them."
    ]


def _on_shared_rows(rows: Rows | MappedRows, validation: Rows) -> list[str]:
    """Return a message about validation rows among the training rows, unless they are few, or have few values."""
    sample, total = rows.sample(), len(validation.data)
    dtypes = {part.data.dtype for part in (sample, validation)}
    dtype = torch.float32 if len(dtypes) > 1 else dtypes.pop()  # float32 and float64 are compared in float32

    def hashed(part: Rows) -> NDArray[np.uint64]:
        return hash_rows(Rows(part.data.to(dtype), None if part.context is None else part.context.float()))

    shared = int(np.isin(hashed(validation), hashed(sample)).sum())
    if shared < MENTIONED * total or not repeat_as_a_whole(sample):
        return []
    return [
        f"fit found {shared:,} of {total:,} validation rows among the training rows: the validation score is too high, "
        "and does not show when the flow overfits. Leave validation= out, and fit holds out rows itself."
    ]


def _on_rounding(density: FlowPrior | TableDensity, units: tuple[Units, Moments | None], reader: Reader) -> list[str]:
    """Return messages about columns of data and of context for which the dtype of the density is too coarse."""
    of_data, of_context = units
    each: list[tuple[str, Moments, Support | None, torch.dtype, Labels]] = [
        ("", Moments(of_data.loc, of_data.scale), reader.support, density.dtype, reader.labels)
    ]
    if of_context is not None:
        each.append(("context ", of_context, None, density.context_dtype, reader.context_labels))
    lines = []
    for role, (loc, scale), support, dtype, labels in each:
        if dtype == torch.float64:
            coarse = torch.finfo(dtype).eps * loc.abs() > COARSE * scale
        else:
            coarse = ~float32_holds(loc, scale, support, resolution=COARSE)
        if not coarse.any():
            continue
        column = int(coarse.int().argmax())
        value = f"{loc[column].item():.8g} +- {scale[column].item():.2g}"
        why = f"has few different values there, {value}: subtract what the rows have in common while they are"
        advice = "in float64, or fit a model in float64, model.double(), to rows in float64"
        if dtype == torch.float64:
            advice = "integers or text"
        elif not float32_reaches(loc[column].double(), scale[column].double()):
            why = f"ends at 1e-38 and 3e38, near {value}: take units of about that size, best while the rows are"
        lines.append(f"fit takes {role}{labels.column(column)} in {str(dtype)[6:]}, which {why} {advice}.")
    return lines
