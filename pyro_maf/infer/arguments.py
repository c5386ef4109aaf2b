"""Checks of the arguments of a model and its guide, before either is run."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyro import poutine
from pyro.distributions import Unit
from pyro.infer.autoguide import AutoGuide
from torch import nn

from pyro_maf.infer.refusal import RefusalError

__all__ = ["check_call", "check_observes_nothing", "check_pair", "check_set_up_call"]

FORMER: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr", "rate", "step_size"),
    "num_particles": ("num_samples", "particles", "n_particles", "num_draws"),
    "num_samples": ("n", "samples", "draws", "num_draws", "num_particles", "n_samples"),
    "progress": ("progress_bar", "progressbar", "verbose", "disable_progbar"),
    "steps": ("num_steps", "n_steps", "max_steps", "iterations", "num_iterations", "n_iter", "epochs", "max_epochs"),
}
"""Names of the options elsewhere, by Pyro and others."""


def check_pair(who: str, model: Any, guide: Any) -> None:
    """Check that a model and its guide are both there, and in this order.

    Raises:
        TypeError: If one cannot be called, or is a class, or if the two are swapped.
    """
    if isinstance(model, AutoGuide) and not isinstance(guide, AutoGuide):
        raise TypeError(
            f"{who} expected a model and then its guide, got {type(model).__name__}, a guide, in place of the model: "
            f"call {who}(model, guide)."
        )
    if isinstance(guide, type):
        raise TypeError(f"{who} expected a guide, got the class {guide.__name__}: make one, {guide.__name__}(model).")
    for role, program in (("a model", model), ("a guide", guide)):
        if not callable(program):
            raise TypeError(f"{who} expected {role} to call, got {type(program).__name__}.")


def check_observes_nothing(who: str, guide_trace: poutine.Trace, model_trace: poutine.Trace) -> None:
    """Check that a guide is not a model: that none of its sites is observed.

    Raises:
        ValueError: If one of them is observed.
    """
    for name, site in guide_trace.nodes.items():
        if site["type"] != "sample" or not site["is_observed"] or name in model_trace.nodes:
            continue
        infer = site["infer"] or {}
        if not (isinstance(site["fn"], Unit) or infer.keys() & {"is_auxiliary", "_deterministic"}):
            raise RefusalError(
                f"{who} expected a model and then its guide, which observes nothing, got one that observes {name}: "
                f"if the two are swapped, call {who}(model, guide)."
            )


def check_call(
    who: str, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: Sequence[str]
) -> None:
    """Check that a model takes the arguments that are passed on to it.

    Args:
        who: The function that passes them on.
        model: The model.
        args, kwargs: Its arguments.
        options: The options of `who`, for which a keyword may have been meant.

    Raises:
        TypeError: If it does not.
    """
    signature = _signature(model)
    try:
        if signature is not None:
            signature.bind(*args, **kwargs)
    except TypeError as error:
        names = list(signature.parameters) if signature is not None else []
        unknown = next((name for name in kwargs if name not in names), None)
        if unknown is None:
            raise TypeError(
                f"{who} expected the arguments of the model, model({', '.join(names)}), after the guide: {error}."
            ) from None
        meant = _meant(unknown, options)
        advice = f"use {meant}" if meant else f"the options are {', '.join(options)}"
        raise TypeError(
            f"{who} expected an option of its own or an argument of the model, model({', '.join(names)}), "
            f"got {unknown}: {advice}."
        ) from None


def check_set_up_call(who: str, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that a guide is called with its model's arguments where it has yet to see its latent sites.

    Raises:
        TypeError: If it is not.
    """
    signature = _signature(model)
    if signature is None:
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{who} expected the arguments of the model, model({', '.join(signature.parameters)}), since it is not set "
            f"up yet: {error}; call fit_guide, or guide.setup() with these."
        ) from None


def _meant(name: str, options: Sequence[str]) -> str | None:
    """Return the option that has this name elsewhere, or a similar spelling."""
    former = [option for option in options if name in FORMER.get(option, ())]
    return next(iter([*former, *difflib.get_close_matches(name, options, n=1, cutoff=0.7)]), None)


def _signature(model: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature of a model, or None if it has none."""
    try:
        return inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):
        return None
