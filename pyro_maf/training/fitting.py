"""Fitting a flow or a density to data."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_maf.checks import check_above_zero, check_positive
from pyro_maf.distributions import ConditionalDensity, ConditionalFlowPrior, Density, FlowPrior
from pyro_maf.distributions.support import Support
from pyro_maf.interruption import Interruption
from pyro_maf.showing import check_progress
from pyro_maf.training.batches import Batches
from pyro_maf.training.data import Rows, check_training, read_rows, split, units_of
from pyro_maf.training.result import FitResult
from pyro_maf.training.schedule import Schedule
from pyro_maf.transforms import BatchNorm, ConditionalFlow, Flow

__all__ = ["fit"]

VALIDATION_FRACTION = 0.1
VALIDATION_BATCH = 2048


@torch.inference_mode(False)
def fit(
    model: Flow | ConditionalFlow | Density | ConditionalDensity,
    data: Any,
    *,
    context: Any = None,
    support: str | Constraint | Sequence[str | Constraint] | None = None,
    validation: Any = None,
    batch_size: int = 256,
    max_epochs: int = 1000,
    patience: int = 30,
    learning_rate: float = 2e-3,
    max_grad_norm: float = 5.0,
    seed: int = 0,
    progress: bool | str = True,
) -> FitResult:
    r"""Fit a flow or a density to data by maximum likelihood.

    Maximises mean_n log p(y_n | c_n) with p the density of T(loc + scale z), z ~ model, where T maps to the support,
    and loc and scale are the mean and standard deviation of the training rows before T; a context is standardised
    likewise. Adam steps on batches; after each epoch an average of the weights over the last two epochs or so is scored
    on the validation rows. The learning rate is halved when that score stalls, the fit ends when it has stalled for
    good, and the best average is kept.

    The model is trained in place, in its own dtype and on its own device, and left in eval mode with its best weights.
    Given the same weights to start from, the same call gives the same result to the last bit on a CPU. The global
    random states are left as they were.

    Args:
        model: A flow, a density, or a conditional form of either. A `FlowPrior` keeps the units it has.
        data: Rows (N, D): a tensor, an array, a data frame or nested lists of finite numbers, at least 10 rows.
        context: Rows (N, C) of the same kinds, for a model with `context_dim` > 0.
        support: Where the data lie: "real", "positive", "unit_interval", "simplex", or a sequence with one of the first
            three for each column, or constraints, as `FlowPrior` takes it. By default "real" or that of a `FlowPrior`.
        validation: The part of the rows to set aside at random for validation, between 0 and 1, by default a tenth;
            or rows like `data`; or a tuple (data, context) of such for a model with a context.
        batch_size: Rows in a batch, give or take: an epoch is cut into equal ones.
        max_epochs: The most passes over the training rows.
        patience: Epochs without a better validation log-likelihood after which to end. After a quarter of it the
            learning rate is halved.
        learning_rate: Adam's, to begin with.
        max_grad_norm: Norm that the gradient of a step is cut down to.
        seed: Of the split and of the order of the batches.
        progress: A bar on stderr: True where that is a terminal or a notebook, False never, "always" in any case.

    Returns:
        A `FitResult`: the density in the data's own units, the losses in nats, why it ended. Ctrl-C ends it early, with
        the best so far; a second Ctrl-C raises KeyboardInterrupt, with the model's best weights in place.

    Cost:
        An epoch takes one `log_prob` with its gradient for each training row and one without for each validation row:
        for an `IAF` that is a sweep a layer. With batch norm, another pass over the training rows for its statistics.

    Raises:
        TypeError: For a model that is no flow or density, or data that is not numeric.
        ValueError: For data that is not finite, does not vary in a column, has too few rows or the wrong width; for a
            context missing, superfluous or of another length; for data outside the support or on its boundary, with the
            row and column; for options out of range.
        ModuleNotFoundError: Without the `train` extra.

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
    started = time.monotonic()
    weight = _first_weight(model)
    _check_options(batch_size, max_epochs, patience, seed, progress)
    check_above_zero("fit", "learning_rate", learning_rate, finite=True)
    check_above_zero("fit", "max_grad_norm", max_grad_norm)
    lightning = _lightning_parts()
    generator = torch.Generator().manual_seed(seed)
    known = _support(model, support)
    training, held_out = _read(model, data, context, known, validation, weight.dtype, generator)
    density = _in_units_of(training, model, known)
    batches = Batches(training.to(weight.device), batch_size, generator)
    _check_batches(model, batches, batch_size)
    schedule = Schedule(learning_rate, patience)
    with (
        Interruption() as interruption,
        _untouched_random_states(weight.device, seed),
        torch.autocast(weight.device.type, enabled=False),
    ):
        module = lightning.MaximumLikelihood(
            density.density if isinstance(density, ConditionalDensity) else density,
            batches,
            Batches(held_out.to(weight.device), VALIDATION_BATCH),
            schedule=schedule,
            max_grad_norm=max_grad_norm,
            interruption=interruption,
        )
        lightning.maximise(module, max_epochs=max_epochs, progress=progress)
    return FitResult(
        density=density.eval(),
        train_loss=tuple(module.train_loss),
        validation_loss=tuple(module.validation_loss),
        best_epoch=schedule.best_epoch,
        validation_log_likelihood=-schedule.best,
        seconds=time.monotonic() - started,
        stop_reason=module.stop_reason or f"reached max_epochs ({max_epochs})",
        skipped_steps=module.skipped_steps,
    )


def _first_weight(model: Any) -> Tensor:
    """The weight whose dtype and device decide."""
    if not isinstance(model, (Flow, ConditionalFlow, Density, ConditionalDensity)):
        raise TypeError(f"fit expected a flow or a density, got {type(model).__name__}.")
    for weight in model.parameters():
        if weight.requires_grad:
            return weight
    raise ValueError(f"fit expected a model with weights to train, got {type(model).__name__} with none.")


def _check_options(batch_size: Any, max_epochs: Any, patience: Any, seed: Any, progress: Any) -> None:
    for name, value in (("batch_size", batch_size), ("max_epochs", max_epochs), ("patience", patience)):
        check_positive("fit", name, value)
    if check_positive("fit", "seed", seed, least=0) >= 2**63:
        raise ValueError(f"fit expected seed below 2**63, got {seed}.")
    check_progress("fit", progress)


def _check_batches(model: Any, batches: Batches, batch_size: int) -> None:
    if batches.smallest < 2 and any(isinstance(member, BatchNorm) for member in model.modules()):
        raise ValueError(
            f"fit expected batches of at least 2 rows for a model with batch norm, "
            f"got {len(batches.rows.data)} training rows and batch_size {batch_size}."
        )


def _support(model: Any, given: Any) -> Support:
    """The support that was asked for, or else the model's own."""
    inner = model.density if isinstance(model, ConditionalFlowPrior) else model
    own = inner.units.support if isinstance(inner, FlowPrior) else None
    if given is None:
        return Support("fit", "real", model.input_dim) if own is None else own
    asked = Support("fit", given, model.input_dim)
    if own is not None and own.name != asked.name:
        raise ValueError(f"fit expected support {own.name!r}, that of the {type(model).__name__}, got {asked.name!r}.")
    return asked


def _read(
    model: Any,
    data: Any,
    context: Any,
    support: Support,
    validation: Any,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Rows, Rows]:
    """Training and validation rows."""
    rows = read_rows(model, data, context, support=support, dtype=dtype)
    check_training(rows, data, context)
    if validation is None or isinstance(validation, (int, float)):
        fraction = VALIDATION_FRACTION if validation is None else float(validation)
        if not 0 < fraction < 1:
            raise ValueError(f"fit expected validation as a part between 0 and 1, or as data, got {validation!r}.")
        return split(rows, fraction, generator)
    given = validation if isinstance(validation, tuple) else (validation, None)
    if len(given) != 2:
        raise ValueError(f"fit expected validation as data or a tuple (data, context), got a tuple of {len(given)}.")
    return rows, read_rows(model, *given, support=support, dtype=dtype, role="validation ")


def _in_units_of(training: Rows, model: Any, support: Support) -> FlowPrior | ConditionalFlowPrior:
    """The model on its support, standardised by the training rows."""
    if isinstance(model, FlowPrior) and model.context_dim:
        units = {name: getattr(model, name) for name in ("loc", "scale", "context_loc", "context_scale")}
        return ConditionalFlowPrior(model.model, support=support.name, **units)
    if isinstance(model, (FlowPrior, ConditionalFlowPrior)):
        return model
    loc, scale = units_of(support.unconstrain(training.data)[0])
    if training.context is None:
        prior = FlowPrior(model, support=support.name, loc=loc, scale=scale)
        if prior.batch_shape:
            raise ValueError(
                f"fit expected a single density, got {model.name} with batch shape {tuple(prior.batch_shape)}: "
                "where that is of a context, leave the condition out and give it as context=."
            )
        return prior
    context_loc, context_scale = units_of(training.context)
    return ConditionalFlowPrior(
        model, support=support.name, loc=loc, scale=scale, context_loc=context_loc, context_scale=context_scale
    )


def _lightning_parts() -> ModuleType:
    try:
        from pyro_maf.training import maximum_likelihood
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("lightning", "rich"):
            raise
        raise ModuleNotFoundError(
            f"fit needs {package}, which is not installed: pip install pyro-maf[train].", name=package
        ) from None
    return maximum_likelihood


@contextmanager
def _untouched_random_states(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch for layers that draw numbers, and leave every global random state as it was."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            torch.default_generator.manual_seed(seed)
            for one in cuda:
                with torch.cuda.device(one):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
