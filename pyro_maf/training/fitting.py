"""Fitting a flow or a density to data."""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from pyro_maf._core.checks import check_above_zero, check_positive, check_seed
from pyro_maf._core.files import MODEL, try_to_write
from pyro_maf._core.interruption import Interruption
from pyro_maf._core.messages import require
from pyro_maf._core.processes import Processes
from pyro_maf._core.progress import check_progress, will_show
from pyro_maf._core.torch_state import seeded
from pyro_maf.distributions import ConditionalDensity, Density, TableDensity
from pyro_maf.distributions.context_net import BATCH_NORMS
from pyro_maf.saving import describe, packed
from pyro_maf.support import SupportLike
from pyro_maf.sweep import OneThread
from pyro_maf.tables.layout import Layout, TableLike
from pyro_maf.tables.named_rows import NamedRows, named_rows
from pyro_maf.tables.table import Table
from pyro_maf.training.baselines import fitted_rows
from pyro_maf.training.batches import Batches
from pyro_maf.training.choice import CHOSEN, RELAXATIONS, DefaultFlow, choose
from pyro_maf.training.loop import Loop
from pyro_maf.training.mixture_beside import Joined, with_mixture
from pyro_maf.training.preparation import Choice, Fitted, Model, Prepared, Recipe, Validation, prepare
from pyro_maf.training.records import CheckpointFolder, checkpoints
from pyro_maf.training.result import FitResult
from pyro_maf.training.scores import log_likelihood_of
from pyro_maf.training.screening import announce, screen_ending
from pyro_maf.training.state import Schedule, State
from pyro_maf.transforms import BatchNorm, ConditionalFlow, Flow

__all__ = ["fit"]

VALIDATION_BATCH = 2048


@torch.inference_mode(False)
def fit(
    model: Model | DefaultFlow | TableLike | Table | None = None,
    data: TableLike | Table | None = None,
    *,
    context: TableLike | None = None,
    context_net: nn.Module | None = None,
    weights: str | TableLike | None = None,
    support: SupportLike | None = None,
    validation: Validation = None,
    test: float | None = None,
    dequantise: bool = True,
    batch_size: int | None = None,
    max_epochs: int = 1000,
    patience: int | None = None,
    learning_rate: float = 2e-3,
    max_grad_norm: float = 5.0,
    weight_decay: float | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    devices: int = 1,
    progress: bool | str = True,
) -> FitResult:
    r"""Fit a flow or a density to data by maximum likelihood: `fit(model, data)`, or `fit(data)` with a default flow.

    Maximises mean_n log p(y_n | c_n), where p is the density of T(loc + scale z), z ~ model, and T maps to the support.
    loc and scale are the mean and standard deviation of the training rows before T, with outliers moved to a fence: 10
    standard deviations, as estimated from the quartiles, from the median. A context is standardised likewise, but with
    a fence only against isolated outliers. Adam takes steps on batches. After each epoch, an average of the weights
    over about the last two epochs is scored on the validation rows. The learning rate is halved when that score stalls.
    The fit ends after `patience` epochs without a better score, or earlier if only the training score keeps improving,
    and returns the best average. With 1,000 rows or more, as many rows again are held out for a test score, on which no
    choice is based.

    The model is trained in place, in its own dtype and on its own device, and left in eval mode with its best weights.
    On a CPU, the same call with the same initial weights has bitwise the same result. The global random states are
    unchanged.

    With a `folder`, a fit can be resumed. After Ctrl-C, or SIGTERM, which ends the program once a checkpoint is
    written, nothing is lost; after a crash or power failure the last second or, if a checkpoint takes long to write,
    twenty times as long. The same call with `resume=True` continues to the weights of an uninterrupted fit (on a CPU,
    bit for bit).

    Processes started by torchrun, on one machine or several, fit the model together: each takes a part of every batch,
    and `batch_size` is the total. Every process returns the result.

    Args:
        model: A flow, a density, or a conditional form of either. A `FlowPrior` keeps its units, and is a density of
            all columns. The default, chosen from the numbers of rows and columns, is an `NSF` or, for up to a few
            hundred rows, a `MixtureFlow`, with weight decay and batch size chosen accordingly. If a data frame has
            categorical columns, the model describes the other columns; its context is that of the fit, if any, followed
            by the categories one-hot, one feature each.
        data: Rows (N, D), at least 10 of them: a tensor, an array, a data frame or nested lists of finite numbers; a
            dictionary of tensors or arrays (N, ...), such as the draws of a posterior, which are concatenated as
            columns; or a `Table` of `pyro_maf.datasets.read_table`, with its context, whose columns and rows are named
            in messages. Data are rounded to the model's dtype after standardisation, not before: if float32 does not
            resolve a thousandth of a column's scale, the density of a float32 model takes and returns float64. A
            `numpy.memmap` of more than 512 MiB is streamed; at most some 262,144 of its rows are held out, and units
            and batch norm statistics use some 65,536.
        context: Rows (N, C) of the same kinds, for a model with `context_dim` > 0. Text or categorical columns of a
            data frame are one-hot encoded, one feature per category. With a `context_net` also images, series or sets,
            as an array (N, *shape).
        context_net: An embedding network from standardised contexts (rows, *shape) to features (rows, F): a torch
            module that is trained with the model, whose `context_dim` is then F. The entries of an image or a set,
            whose shape has several axes, share their units. Pass it to `load(path, context_net=...)` too.
        weights: Weight of each row, (N,), a number of times that the row counts: numbers of at least 0, of which only
            ratios matter; or the name of the data column that holds them, which is then removed from the data. They are
            used in training and validation losses, early stopping, units and warnings, but not in batch norm
            statistics. A row of weight 2 counts as two copies; a row of weight 0 is left out. By default 1.
        support: The support of the data: "real", "positive", "unit_interval", a pair of bounds such as (18, None) or
            (-90, 90), "angle" (radians) or "angle(0, 360)", "ordered", "simplex", or a constraint, as in `FlowPrior`; a
            sequence of these, except "simplex", with one per column; or a dictionary by name of column or entry,
            {"income": "positive", "age": (0, 120)}, in which others are real. By default "real", or that of a
            `FlowPrior`. Angles precede the other columns, in an `AngleFlow`; a flow sees their cosines and sines as the
            last features of its context.
        validation: The fraction of the rows to hold out at random for validation, between 0 and 1; by default 0.1,
            raised for few rows to hold out 16, up to a third, unless the fit starts at a mixture. Or rows like `data`,
            whose columns are matched by name if they have names; or a tuple (data, context), for a model with a context
            that is not among the columns of the data; or (data, context, weights), with None for a missing one. A
            fraction refers to distinct rows: all copies of a row, with its context, are either training or validation
            rows.
        test: The fraction of the rows to hold out for the test log-likelihood, `FitResult.test`. They affect neither
            weights nor epoch nor units. By default, with 1,000 rows of data or more, as many as for validation, but at
            most half of the rest; none with fewer rows, or if `validation` is rows, since then other test rows probably
            exist, for `FitResult.score`. 0 for none.
        dequantise: Whether to detect discrete columns: columns whose values repeat on a grid, counted or rounded, and,
            as categories, columns of text, truth values or categories in a data frame and, without a model, columns
            with up to 10 distinct numbers. The result is then a `TableDensity`: its log-likelihoods are
            log-probabilities in these columns, which a warning names, and its draws lie on the grid. In training,
            numbers are dequantised by uniform noise within their steps, drawn anew in each epoch, so that the losses
            are upper bounds of the negative log-likelihood. False for a density of all columns as real numbers.
        batch_size: Approximate number of rows in a batch; batches of an epoch are equal in size. By default 256;
            without a model a 128th of the rows, but 32 to 256.
        max_epochs: Maximum number of epochs.
        patience: Number of epochs without a better validation log-likelihood after which to stop. After a quarter of
            it, the learning rate is halved. By default 30; without a model 16 for 4,096 rows or more.
        learning_rate: Initial learning rate of Adam.
        max_grad_norm: Norm to which the gradient of a step is clipped.
        weight_decay: Initial weight decay, which is divided by 10 up to twice when the validation loss stalls. By
            default 1e-6; without a model, chosen from the number of rows.
        seed: Seed of the split and of the order of the batches.
        folder: Folder of the fit: `checkpoint.safetensors`, to resume from; `log.csv`, with one line per epoch, and the
            same for TensorBoard if that is installed; at the end `model.safetensors`, for `pyro_maf.load`. It is
            created if necessary, and shared by all processes. A folder that contains any of these files raises an
            error, unless there is a checkpoint to resume or it is to be overwritten; so does one that another fit is
            writing to.
        resume: Resume from the checkpoint in `folder`, if any. The model, the data and the options must be the same,
            except `max_epochs` and `patience`, which may be raised, and the options below.
        overwrite: Replace the fit in `folder`, if any. It remains until the first checkpoint of this one.
        devices: Number of processes on this machine, each on a different GPU if the model is on one. The others are
            started by running the program again, which must reach this call without help.
        progress: A bar on stderr: True on a terminal or in a notebook, False never, "always" in any case.

    Returns:
        The density in the data's units, the losses in nats, and the reason for stopping. Ctrl-C ends it early, with the
        best result so far; a second Ctrl-C raises KeyboardInterrupt and leaves the model with its best weights.

    Warns:
        UserWarning: About silent failures of a density, one line each, with the column and a remedy: few distinct
            values, a value that many rows share, columns that follow from others, heavy tails, a context that spans
            orders of magnitude; at the end, a best epoch of 0, and `max_epochs` reached while the score was still
            improving. `FitResult.warnings` holds these. Also after 5 successive steps without a finite loss and
            gradient: the fit continues from the best weights with half the learning rate. And if a file can no longer
            be written: the fit continues without it.

    Cost:
        Per epoch, one `log_prob` with its gradient for each training row and one without for each validation row; for
        an `IAF` each is one sweep per layer. With batch norm, another pass over the training rows for its statistics.

    Raises:
        TypeError: For a model that is not a flow or density, or data that are not numeric.
        ValueError: For data that are not finite, do not vary in a column, lie outside the support or on its boundary
            (the message has the row and column), have too few rows or the wrong width; for a context that is missing,
            superfluous or of another length; for weights that are negative, not finite, all 0 or of another length; for
            options out of range; for a folder with a fit that is not to be resumed, or one with other settings.
        ModuleNotFoundError: For several processes without the `all` extra.

    Example:
        >>> from pyro_maf import MAF
        >>> data = 100 + 5 * torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> result = fit(MAF(2, num_layers=1), data, max_epochs=3, progress=False)
        >>> result.stop_reason, len(result.validation_loss)
        ('reached max_epochs (3)', 3)
        >>> result.density.log_prob(data).shape, result.density.sample((4,)).shape
        (torch.Size([500]), torch.Size([4, 2]))

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017, section 4.
    """
    chosen: Model | DefaultFlow = CHOSEN
    if data is None and not isinstance(model, (DefaultFlow, nn.Module, type)):
        data = cast("TableLike | Table", model)
    elif model is not None:
        if not isinstance(model, DefaultFlow):
            _first_weight(model, data)
        chosen = cast("Model | DefaultFlow", model)
    source = named_rows("fit", cast("TableLike | Table", data), context, weights)
    source.check_apart("fit")
    choice = choose(chosen, source, support, context_net=context_net, dequantise=dequantise, seed=seed)
    recipe = choice.recipe
    if batch_size is not None:
        recipe = recipe._replace(batch_size=batch_size)
    if patience is not None:
        recipe = recipe._replace(patience=patience)
    if weight_decay is not None:
        recipe = recipe._replace(weight_decay=weight_decay, relaxations=RELAXATIONS)
    options = _Options(
        recipe, max_epochs, learning_rate, max_grad_norm, seed, folder, resume, overwrite, devices, progress
    )
    weight = _first_weight(choice.model, data)
    with OneThread(_largest_product(choice, recipe.batch_size)):
        prepared = prepare(
            choice, validation, test, dequantise=dequantise, weights=weights, dtype=weight.dtype, seed=int(options.seed)
        )
        return _train(prepared, choice.source, weight, options)


@dataclass(frozen=True)
class _Options:
    """Options of `fit`, checked."""

    recipe: Recipe
    max_epochs: int
    learning_rate: float
    max_grad_norm: float
    seed: int
    folder: str | os.PathLike[str] | None
    resume: bool
    overwrite: bool
    devices: int
    progress: bool | str

    def __post_init__(self) -> None:
        check_positive("fit", "batch_size", self.recipe.batch_size)
        check_positive("fit", "patience", self.recipe.patience)
        for name in ("max_epochs", "devices"):
            check_positive("fit", name, getattr(self, name))
        check_above_zero("fit", "learning_rate", self.learning_rate, finite=True)
        check_above_zero("fit", "max_grad_norm", self.max_grad_norm)
        if self.recipe.weight_decay:
            check_above_zero("fit", "weight_decay", self.recipe.weight_decay, finite=True)
        check_seed("fit", self.seed)
        check_progress("fit", self.progress)
        if self.resume and self.overwrite:
            raise ValueError("fit got both resume and overwrite: choose one.")
        if self.resume and self.folder is None:
            raise ValueError("fit expected the folder to resume from, got resume=True without one.")
        if self.overwrite and self.folder is None:
            raise ValueError("fit expected the folder to overwrite a fit in, got overwrite=True without one.")
        if Processes(self.devices).are_several:
            require("fit", "lightning_fabric")

    def settings(self, prepared: Prepared, dtype: torch.dtype) -> dict[str, object]:
        """Settings that a resumed fit must share."""
        density = prepared.density
        frozen = [name for name, weight in density.named_parameters() if not weight.requires_grad]
        return {
            "model": describe(density),
            "precision": str(dtype),
            "data": prepared.digest(),
            "seed": self.seed,
            "batch_size": self.recipe.batch_size,
            "weight_decay": self.recipe.weight_decay,
            "relaxations": self.recipe.relaxations,
            "learning_rate": self.learning_rate,
            "max_grad_norm": self.max_grad_norm,
            "choice of frozen weights": frozen or None,
        }


def _train(prepared: Prepared, source: NamedRows, weight: Tensor, options: _Options) -> FitResult:
    """Train a density on prepared rows, with the dtype and device of `weight`."""
    density, processes = prepared.density, Processes(options.devices)
    layout, context_layout = source.layout, source.context_layout
    if not isinstance(density.unwrapped, TableDensity):  # which draws in the dtypes of a data frame
        layout = layout._replace(dtypes=())
    if processes.is_first:
        announce(prepared.warnings)
    trained = prepared.trained
    batches = Batches(trained.training, options.recipe.batch_size, prepared.generator, processes, prepared.spacing)
    _check_batches(density, batches, options.recipe.batch_size, processes)
    settings = {} if options.folder is None else options.settings(prepared, weight.dtype)
    if layout.names or context_layout.names:
        # Not among the settings: a resumed fit may have the same table without names.
        density.name_columns(layout, context_layout)
    where = {"resume": options.resume, "overwrite": options.overwrite, "is_first": processes.is_first}
    with (
        checkpoints(options.folder, settings, **where) as folder,
        Interruption(defers_termination=folder is not None) as interruption,
        _untouched_random_states(weight.device, int(options.seed)),
        torch.autocast(weight.device.type, enabled=False),
    ):
        loop = Loop(
            trained,
            batches,
            Batches(trained.validation, VALIDATION_BATCH, None, processes),
            schedule=Schedule(
                options.learning_rate,
                options.recipe.patience,
                options.recipe.weight_decay,
                options.recipe.relaxations,
            ),
            max_epochs=options.max_epochs,
            max_grad_norm=options.max_grad_norm,
            interruption=interruption,
            processes=processes,
            folder=folder,
            doubts=options.recipe.starts,
        )
        loop.run(options.progress)
        density.eval()
        joined = with_mixture(prepared) if options.recipe.joins else Joined(density)
        prepared = prepared._replace(density=joined.density)
        if folder is not None and processes.is_first:
            try_to_write(folder.folder / MODEL, packed(prepared.density))
    processes.wait()
    result = _result(loop.state, prepared, layout, context_layout, options, joined, folder)
    if processes.is_first:
        announce(result.warnings[len(prepared.warnings) :])
        if will_show(options.progress) and not result.interrupted:
            with suppress(KeyboardInterrupt):  # this takes seconds, in which the fit must not be lost
                if result.comparison is not None:
                    print(result.comparison, file=sys.stderr)
                    announce(result.comparison.warnings)
    return result


def _result(
    state: State,
    prepared: Prepared,
    layout: Layout,
    context_layout: Layout,
    options: _Options,
    joined: Joined,
    folder: CheckpointFolder | None,
) -> FitResult:
    """Return the result of a fit that ended in `state`."""
    schedule, stopped, test = state.schedule, state.reason, prepared.test
    losses = tuple(epoch.validation_loss for epoch in state.history)
    # If the fit started at a mixture, a best epoch of 0 is not a failure.
    ends_as_it_began = options.recipe.starts and not schedule.best_epoch
    endings = (
        []
        if ends_as_it_began
        else screen_ending(losses, schedule, has_more=stopped is None, has_skipped=state.skipped > 0)
    )
    return FitResult(
        density=prepared.density,
        train_loss=tuple(epoch.train_loss for epoch in state.history),
        validation_loss=losses,
        best_epoch=schedule.best_epoch,
        validation_log_likelihood=_score(prepared, -schedule.best, doubts=options.recipe.starts or bool(joined.lines)),
        seconds=state.seconds,
        stop_reason=stopped or f"reached max_epochs ({options.max_epochs})",
        interrupted=state.interrupted,
        validation_rows=prepared.validation.rows,
        validation_places=prepared.validation.places,
        test=None if test is None else log_likelihood_of(prepared.density, test.rows),
        test_rows=None if test is None else test.rows,
        test_places=None if test is None else test.places,
        training_rows=fitted_rows(prepared.training, prepared.density),
        gaussians=joined.gaussians,
        rows=prepared.rows,
        skipped_steps=state.skipped,
        folder=None if folder is None else folder.folder,
        warnings=(*prepared.warnings, *endings, *joined.lines),
        repeats=prepared.repeats,
        layout=layout,
        context_layout=context_layout,
    )


def _score(prepared: Prepared, best: float, *, doubts: bool) -> float:
    """Mean log-likelihood of the validation rows: the best one of the fit, unless that has another meaning."""
    if not (prepared.spacing or doubts):
        return best
    return log_likelihood_of(prepared.density, prepared.validation.rows).mean


def _first_weight(model: object, data: object) -> Tensor:
    """Return the weight whose dtype and device are the fit's."""
    if not isinstance(model, (Flow, ConditionalFlow, Density, ConditionalDensity)):
        raise TypeError(f"fit expected a flow or a density, got {type(model).__name__}.{_advice(model, data)}")
    for weight in model.parameters():
        if weight.requires_grad:
            return weight
    raise ValueError(f"fit expected a model with weights to train, got {type(model).__name__} with none.")


def _largest_product(choice: Choice, rows: int) -> int:
    """Multiplications of a batch of rows with the largest weight, counting each place of an image or a set."""
    sizes = [weight.numel() for weight in choice.model.parameters()]
    if choice.net is not None:
        places = math.prod(choice.context_shape[1:])
        sizes += [places * weight.numel() for weight in choice.net.parameters()]
    return rows * max(sizes)


def _advice(model: object, data: object) -> str:
    """Advice for a value that is not a model."""
    if isinstance(model, type):
        return f" {model.__name__} is a class: build one of it, with a size, as fit(MAF(2), data)."
    return " The model comes first: fit(model, data)." if isinstance(data, nn.Module) else ""


def _check_batches(density: Fitted, batches: Batches, batch_size: int, processes: Processes) -> None:
    if batches.smallest < processes.count:
        raise ValueError(
            f"fit expected a row of each batch for every process, got {batches.smallest} rows for "
            f"{processes.count} processes."
        )
    if batches.smallest < 2 and any(isinstance(member, (BatchNorm, BATCH_NORMS)) for member in density.modules()):
        raise ValueError(
            f"fit expected batches of at least 2 rows for a model with batch norm, "
            f"got {len(batches.rows.data)} training rows and batch_size {batch_size}."
        )


@contextmanager
def _untouched_random_states(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch for layers that draw numbers, and restore all global random states on exit."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with seeded(seed, device):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
