"""The default flow of a fit, and the categorical columns that a flow takes as context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pyro_maf._core.checks import check_seed
from pyro_maf._core.torch_state import seeded
from pyro_maf.distributions import (
    AngleFlow,
    ConditionalFlowPrior,
    ConditionalTableDensity,
    Density,
    FlowPrior,
    TableDensity,
)
from pyro_maf.distributions.context_net import ContextNet
from pyro_maf.distributions.mixture_flow import MixtureFlow
from pyro_maf.distributions.named_density import NamedDensity
from pyro_maf.flows import MAF, NSF
from pyro_maf.nn import default_hidden_dims
from pyro_maf.support import Support, SupportLike
from pyro_maf.tables import is_mapped
from pyro_maf.tables.layout import NAMELESS, TableLike, number_of_columns, number_of_rows, numbers
from pyro_maf.tables.named_rows import NamedRows
from pyro_maf.tables.reader import row_shape
from pyro_maf.training.kinds import few_values
from pyro_maf.training.preparation import FITTED, Choice, Model, Recipe
from pyro_maf.transforms import Flow
from pyro_maf.univariate import Spline

__all__ = ["CHOSEN", "DefaultFlow", "choose", "default_model"]

MIXTURE_ROWS = 300
"""Maximum number of rows for which the flow's base is a mixture of Gaussians; with more, it learns as much without one,
in a third of the time."""
WIDTH = 128
"""Minimum number of units in a hidden layer; a step with 64 takes nearly as long."""
LAYERS, MANY_ROWS = (2, 3, 5), 5_000
"""Numbers of layers: with a mixture as base, with fewer rows than this, and with more."""
SMOOTH_ROWS = 2_000
"""Number of rows from which on networks have SiLU units, without a context; with one, from `MANY_ROWS` on. They end at
a higher density, by several nats if there are many columns. With fewer rows, ReLU networks learn repeated values,
clusters and regressions sooner."""
BINS, FEW_BINS, WIDE = 8, 4, 40
"""Number of columns from which on layers have half the bins, and there are at most three: their last product, with
3 K + 1 outputs per column, takes most of the time. With few rows, the bins are halved from half as many columns on,
since more bins overfit."""
LEAST_BATCH, MOST_BATCH, BATCHES, FEW_EPOCHS = 32, 256, 128, 16
"""Batches have 32 to 256 rows, about 128 batches per epoch: a step with a quarter of the rows takes little more than a
quarter of the time, and gains nearly as much. With that many batches, patience is 16 epochs."""
PRECISION, MOST_DECAY, RELAXATIONS = 3.0, 0.1, 2
"""The initial weight decay is that of a normal prior with this precision on the weights. It is divided by 10, twice,
when the validation loss stalls: the size of a table does not tell how sharp its density is. Going from strong to weak
decay is a single fit, in which each decay starts where the previous one ended."""


@dataclass(frozen=True)
class DefaultFlow:
    """The flow that `fit` chooses from the data, except for what is set here.

    Attributes:
        num_layers: Number of layers.
        hidden_dims: Widths of the hidden layers of each network.
        dtype, device: By default those of the data if it is a floating-point tensor, otherwise torch's.
        has_rsample: Whether draws must have a gradient, which rules out a mixture.
    """

    num_layers: int | None = None
    hidden_dims: Sequence[int] | None = None
    dtype: torch.dtype | None = None
    device: str | None = None
    has_rsample: bool = False


CHOSEN = DefaultFlow()


def choose(
    model: Model | DefaultFlow,
    source: NamedRows,
    support: SupportLike | None,
    *,
    context_net: nn.Module | None = None,
    dequantise: bool,
    seed: int,
) -> Choice:
    """Choose what the arguments of `fit` leave open.

    Args:
        model, support, context_net, dequantise, seed: As in `fit`.
        source: Data and context.

    Raises:
        ValueError: For a model whose sizes do not match the columns, or a table with only categories.
    """
    inner = getattr(model, "unwrapped", model)
    source = source.with_context_coded("fit", inner.context_layout if isinstance(inner, NamedDensity) else NAMELESS)
    if isinstance(model, (TableDensity, ConditionalTableDensity)) and dequantise:
        rows = source.coded_as("fit", cast(TableDensity, model.unwrapped).layout)
    else:
        rows = source.coded("fit") if dequantise else source
    if rows.layout.in_categories and not dequantise:
        name = rows.layout.labels[rows.layout.in_categories[0]]
        raise ValueError(f"fit expected data of numbers, got categories in column {name!r}: drop it or encode it.")
    if isinstance(support, Mapping):
        columns = number_of_columns("fit", "data", rows.data)
        support = rows.layout.spread("fit", "support", support, "real", columns)
    net = _embedding(model, rows, context_net)
    if isinstance(model, DefaultFlow):
        return _without_model(model, rows, support, net, dequantise=dequantise, seed=seed)
    if isinstance(model, (TableDensity, ConditionalTableDensity)):
        return _of_table(model, rows, support)._replace(net=net)
    model = _around_flow(model, rows, support, seed)
    categories = [each for each in rows.layout.categories if each is not None]
    are_numbers = all(isinstance(value, bool) for each in categories for value in each)
    if are_numbers and model.input_dim == len(rows.layout.categories):
        rows, categories = source, []  # truth values, which are numbers too
    if not categories:
        if net is not None and not isinstance(model, FITTED) and model.context_dim != net.features:
            raise ValueError(
                f"fit expected a {type(model).__name__} of context_dim {net.features}, the number of features of "
                f"context_net, got context_dim {model.context_dim}."
            )
        on_support = _support(model, support, model.input_dim, ())
        return Choice(model, rows, on_support, [None] * on_support.event_size, net=net)
    levels = _levels(rows)
    _check_sizes(model, rows, net)
    return Choice(model, rows, _support(model, support, len(levels), levels), levels, net=net)


def _requested(rows: NamedRows, support: SupportLike | None) -> Support:
    """The requested support of all columns, real by default."""
    return Support("fit", "real" if support is None else support, number_of_columns("fit", "data", rows.data))


def _angles(support: Support, levels: Sequence[object]) -> list[int]:
    """Indices of the columns of angles among the numeric columns."""
    if not any(levels):
        return list(support.angles)
    numeric = [column for column, level in enumerate(levels) if not level]
    return [place for place, column in enumerate(numeric) if column in support.angles]


def _around_flow(model: Model, rows: NamedRows, support: SupportLike | None, seed: int) -> Model:
    """The density of angles around a flow of the other columns, or the model itself if there are no angles."""
    inner = cast("Flow | Density", getattr(model, "unwrapped", model))
    if support is None or (isinstance(inner, Density) and inner.angles):
        return model
    angles = _angles(_requested(rows, support), rows.layout.categories)
    if not angles or isinstance(model, FITTED):
        return model
    expected = number_of_columns("fit", "data", rows.data) - len(rows.layout.in_categories) - len(angles)
    context_dim = inner.context_dim - 2 * len(angles)
    if inner.input_dim != expected or context_dim < 0:
        raise ValueError(
            f"fit expected a {type(model).__name__} of input_dim {expected}, as {len(angles)} columns are angles, "
            f"whose cosines and sines are the last {2 * len(angles)} features of its context, got input_dim "
            f"{inner.input_dim} and context_dim {inner.context_dim}: build it so, or leave it out, fit(data)."
        )
    with seeded(seed):
        return AngleFlow(inner, angles, context_dim=context_dim)


def _embedding(model: Model | DefaultFlow, rows: NamedRows, context_net: nn.Module | None) -> ContextNet | None:
    """The embedding network of a fit, for contexts of this shape, or that of a prior that has one."""
    inner = getattr(model, "unwrapped", model)
    inner = inner.prior if isinstance(inner, TableDensity) else inner
    shape = () if rows.context is None else row_shape("fit", "context", rows.context)
    if context_net is None and isinstance(inner, FlowPrior):
        return inner.context_net
    if context_net is None:
        if len(shape) > 1:
            raise ValueError(
                f"fit expected context of shape (rows, columns), got {('rows', *shape)}: flatten its rows, or pass "
                "context_net, a network that maps them to features."
            )
        return None
    if isinstance(inner, FlowPrior):
        raise ValueError(
            f"fit got context_net with a {type(model).__name__}, which was built for its context: leave it out, or "
            "pass the model inside, model.unwrapped.model."
        )
    if rows.context is None:
        raise ValueError("fit expected a context for context_net, got none.")
    return ContextNet("fit", context_net, shape)


def _number_of_features(rows: NamedRows, net: ContextNet | None) -> int:
    """Number of features of the context that a model sees."""
    if net is not None:
        return net.features
    return 0 if rows.context is None else number_of_columns("fit", "context", rows.context)


def _without_model(
    default: DefaultFlow,
    rows: NamedRows,
    support: SupportLike | None,
    net: ContextNet | None,
    *,
    dequantise: bool,
    seed: int,
) -> Choice:
    """The default model of the columns that are not categorical."""
    width, requested = number_of_columns("fit", "data", rows.data), _requested(rows, support)
    levels = _levels(rows) if rows.layout.in_categories else [None] * width
    named: list[int] = []
    if dequantise and not is_mapped(rows.data):
        found = few_values(numbers("fit", "data", rows.data).reshape(-1, width))
        found = [level if requested.name_of(column) == "real" else None for column, level in enumerate(found)]
        both = [level or other for level, other in zip(levels, found, strict=True)]
        if not all(both):
            named = [i for i, level in enumerate(levels) if level is None and both[i] is not None]
            levels = both
    context = _number_of_features(rows, net)
    one_hot = sum(len(level) for level in levels if level is not None)
    count = sum(level is None for level in levels)
    is_simplex = count == width and requested.event_size > width
    if is_simplex and count < 2:
        raise ValueError(f"fit expected data with at least 2 columns for a simplex, got {count}.")
    dim = count - is_simplex
    angles = _angles(requested, levels)
    flow, recipe = default_model(
        max(1, dim - len(angles)),
        number_of_rows(rows.data),
        context + one_hot + 2 * len(angles),
        default=default,
        seed=seed,
        data=rows.data,
    )
    model: MAF | MixtureFlow | AngleFlow = flow
    if angles:
        with seeded(seed):
            of_others = flow if dim > len(angles) else None
            model = AngleFlow(of_others, angles, context_dim=context + one_hot).to(next(flow.parameters()))
    on_support = _support(model, support, width if any(levels) else model.input_dim, levels)
    each = levels if any(levels) else [None] * on_support.event_size
    return Choice(model, rows, on_support, each, named, recipe, net)


def _of_table(model: TableDensity | ConditionalTableDensity, rows: NamedRows, support: SupportLike | None) -> Choice:
    """The density of a table, unchanged."""
    table = model.unwrapped
    of_prior = table.prior.units.support
    names = iter([of_prior.name_of(number) for number in range(len(table.numeric))])
    present = Support("fit", ["real" if level else next(names) for level in table.levels], table.input_dim)
    if support is not None and Support("fit", support, table.input_dim).name != present.name:
        raise ValueError(f"fit expected support {present.name!r}, that of the {type(model).__name__}, got {support!r}.")
    return Choice(model, rows, present, table.levels)


def _levels(rows: NamedRows) -> list[tuple[float, ...] | None]:
    """Numbers of the categories of each column, or None."""
    categories = rows.layout.categories
    levels = [None if each is None else tuple(map(float, range(len(each)))) for each in categories]
    if all(levels):
        raise ValueError("fit expected a column of numbers besides the categories, got none.")
    return levels


def _check_sizes(model: Model, rows: NamedRows, net: ContextNet | None) -> None:
    """Raise if the sizes of a model do not match the numeric columns and the categories."""
    texts, width = rows.layout.in_categories, len(rows.layout.categories)
    one_hot = sum(len(rows.layout.categories[i] or ()) for i in texts)
    context = _number_of_features(rows, net)
    if (model.input_dim, model.context_dim) == (width - len(texts), context + one_hot):
        return
    names = ", ".join(repr(rows.layout.labels[i]) for i in texts[:3]) + ", ..." * (len(texts) > 3)
    raise ValueError(
        f"fit expected a {type(model).__name__} of input_dim {width - len(texts)} and context_dim {context + one_hot}, "
        f"as {names} hold{'s' * (len(texts) == 1)} categories, which the flow sees as {one_hot} one-hot features, got "
        f"input_dim {model.input_dim} and context_dim {model.context_dim}: build it so, or leave it out, fit(data)."
    )


def _support(
    model: Model, requested: SupportLike | None, dim: int, levels: Sequence[tuple[float, ...] | None]
) -> Support:
    """Return the requested support, by default that of the model."""
    inner = model.density if isinstance(model, ConditionalFlowPrior) else model
    present = inner.units.support if isinstance(inner, FlowPrior) and not any(levels) else None
    if requested is None:
        return Support("fit", "real", dim) if present is None else present
    support = Support("fit", requested, dim)
    wrong = [i for i, level in enumerate(levels) if level and support.name_of(i) != "real"]
    if wrong and not isinstance(support.name, str):
        raise ValueError(f"fit expected support 'real' of a column of categories, got {support.name_of(wrong[0])!r}.")
    if wrong:  # a single support for all columns refers to the numeric ones
        support = Support("fit", ["real" if level else support.name_of(i) for i, level in enumerate(levels)], dim)
    if present is not None and present.name != support.name:
        raise ValueError(
            f"fit expected support {present.name!r}, that of the {type(model).__name__}, got {support.name!r}."
        )
    return support


def default_model(
    columns: int,
    rows: int,
    context_dim: int = 0,
    *,
    default: DefaultFlow = CHOSEN,
    seed: int,
    data: TableLike | None = None,
) -> tuple[MAF | MixtureFlow, Recipe]:
    """Default model and training recipe for a table with these numbers of rows and columns.

    The global random state is unchanged.

    Args:
        columns: Number of columns, or one less on a simplex.
        rows: Number of rows.
        context_dim: Number of context features.
        default: Settings that are not to be chosen.
        seed: Seed of the initial weights.
        data: The rows; if they are a floating-point tensor, the model has its dtype and device.

    Example:
        >>> default_model(3, 100, seed=0)[0].name, default_model(3, 100_000, seed=0)[0].name
        ('MixtureFlow', 'NSF')
    """
    check_seed("fit", seed)
    # Without a context, the networks of a single column have no inputs.
    sees_others = columns > 1 or context_dim > 0
    starts = sees_others and rows <= MIXTURE_ROWS and not default.has_rsample
    has_many_rows = rows >= MANY_ROWS
    num_layers = default.num_layers
    if num_layers is None:
        num_layers = LAYERS[0 if starts else 2 if has_many_rows and columns < WIDE else 1]
    univariate = Spline(num_bins=BINS if columns < (WIDE if has_many_rows else WIDE / 2) else FEW_BINS)
    if not sees_others:
        hidden_dims: Sequence[int] = ()
    elif default.hidden_dims is None:
        hidden_dims = [max(WIDTH, units) for units in default_hidden_dims(columns)]
    else:
        hidden_dims = default.hidden_dims
    build: type[MAF | MixtureFlow] = MixtureFlow if starts else NSF
    with seeded(seed):
        model = build(
            columns,
            num_layers=num_layers,
            context_dim=context_dim,
            univariate=univariate,
            hidden_dims=hidden_dims,
            activation="silu" if rows >= (MANY_ROWS if context_dim else SMOOTH_ROWS) else "relu",
            linear=sees_others and not starts,
        )
    like = next(iter(data.values()), None) if isinstance(data, Mapping) else data
    if isinstance(like, Tensor) and like.dtype in (torch.float32, torch.float64):
        model = model.to(like)
    model = model.to(device=default.device, dtype=default.dtype)
    batch_size = max(LEAST_BATCH, min(MOST_BATCH, rows // BATCHES))
    recipe = Recipe(
        batch_size=batch_size,
        weight_decay=min(MOST_DECAY, PRECISION / max(1, rows)),
        relaxations=RELAXATIONS,
        patience=FEW_EPOCHS if rows >= BATCHES * LEAST_BATCH else Recipe().patience,
        starts=starts,
        joins=not default.has_rsample,
    )
    return model, recipe
