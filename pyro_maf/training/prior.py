"""Fitting a prior to draws or data."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import TypedDict, TypeVar, Unpack, cast

from torch import nn

from pyro_maf.distributions import ConditionalFlowPrior, FlowPrior
from pyro_maf.support import SupportLike
from pyro_maf.tables.layout import TableLike
from pyro_maf.tables.table import Table
from pyro_maf.training.choice import DefaultFlow
from pyro_maf.training.fitting import fit
from pyro_maf.training.preparation import Model, Validation

__all__ = ["FitOptions", "fit_prior"]

F = TypeVar("F", bound=Callable[..., object])


class FitOptions(TypedDict, total=False):
    """Options of `pyro_maf.fit` that `fit_prior` forwards to it."""

    context_net: nn.Module | None
    weights: str | TableLike | None
    validation: Validation
    batch_size: int | None
    max_epochs: int
    patience: int | None
    learning_rate: float
    max_grad_norm: float
    weight_decay: float | None
    folder: str | os.PathLike[str] | None
    resume: bool
    overwrite: bool
    devices: int
    progress: bool | str


def _with_signature_of_options(function: F) -> F:
    """Make `help` list each of `FitOptions`, with the default of `fit`."""
    signature = inspect.signature(function)
    options = [inspect.signature(fit).parameters[name] for name in FitOptions.__annotations__]
    parameters = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    function.__dict__["__signature__"] = signature.replace(parameters=[*parameters, *options])
    return function


@_with_signature_of_options
def fit_prior(
    data: TableLike | Table,
    flow: Model | None = None,
    *,
    support: SupportLike | None = None,
    context: TableLike | None = None,
    seed: int = 0,
    **options: Unpack[FitOptions],
) -> FlowPrior | ConditionalFlowPrior:
    r"""Fit a prior to draws or data by maximum likelihood, with `pyro_maf.fit`, for use in a model.

    The prior is frozen: inference neither trains it nor computes gradients with respect to its weights. To train it
    further with a model, unfreeze it by `prior.requires_grad_(True)` and register it there by
    `pyro.module("prior", prior)`. No rows are held out for testing, since the score would not be returned.

    Args:
        data: Rows (N, D), or (N, D + 1) for a simplex: a tensor, an array, a data frame or nested lists. Or the draws
            of a posterior, `mcmc.get_samples()`: a dictionary of tensors (N, ...), which are concatenated as columns
            and which `prior.unpack(value)` splits again.
        flow: A flow, a density, a conditional form of either, or a prior to fit further; it is trained and frozen in
            place. By default an `NSF` whose size is chosen from the numbers of rows and columns, with the dtype and
            device of `data` if that is a floating-point tensor, and otherwise with torch's default dtype.
        support: As in `FlowPrior`; by default "real", or that of `flow` if it is a prior. Or a dictionary by name of
            column or site, {"scale": "positive"}, in which columns left out are real.
        context: Rows (N, C) that the distribution of the data depends on, or (N, *shape) with a `context_net`; by
            default none.
        seed: As in `pyro_maf.fit`; also the seed of the initial weights of the default flow.
        options: Other options of `pyro_maf.fit`, such as `max_epochs`. With a `folder`, the model stored there is not
            frozen.

    Returns:
        A `FlowPrior`, or with a context a `ConditionalFlowPrior`, in eval mode.

    Cost: as `pyro_maf.fit`.

    Raises:
        TypeError: As `pyro_maf.fit`.
        ValueError: As `pyro_maf.fit`, for instance for data outside the support or on its boundary.

    Example:
        >>> waits = torch.distributions.Exponential(torch.tensor([1.0, 0.1])).sample((200,))
        >>> prior = fit_prior(waits, support="positive", max_epochs=2, progress=False)
        >>> prior.support.check(prior.sample((5,)))
        tensor([True, True, True, True, True])
    """
    model = DefaultFlow(has_rsample=True) if flow is None else flow
    result = fit(model, data, context=context, support=support, seed=seed, dequantise=False, test=0.0, **options)
    return cast("FlowPrior | ConditionalFlowPrior", result.density.requires_grad_(False))
