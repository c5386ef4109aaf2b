"""Pyro models and guides: their types, their runs, and errors about those that cannot be handled."""

from __future__ import annotations

import difflib
import inspect
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypedDict, cast

from pyro import poutine
from pyro.distributions import TorchDistribution, Unit
from pyro.distributions.score_parts import ScoreParts
from pyro.infer.autoguide import AutoGuide
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame as Frame
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_maf._core.progress import Bar

__all__ = [
    "FAILURES",
    "Args",
    "Call",
    "Frame",
    "Guide",
    "Kwargs",
    "Model",
    "RefusalError",
    "Site",
    "Trace",
    "check_call",
    "check_encoder_call",
    "check_observes_nothing",
    "check_pair",
    "check_set_up_call",
    "data_sites",
    "is_subsample",
    "latent_sites",
    "layers_of",
    "report_run",
    "sample_sites",
    "show_runs",
    "without_empty_tables",
]

Model = Callable[..., object]
"""A Pyro model."""

Guide = Callable[..., object]
"""A guide of a model, called with the same arguments."""

Args = tuple[object, ...]
Kwargs = Mapping[str, object]

FAILURES = (ValueError, ArithmeticError, RuntimeError)
"""Errors of models and distributions for a value that cannot be scored, including linear algebra."""

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr", "rate", "step_size"),
    "num_particles": ("num_samples", "particles", "n_particles", "num_draws"),
    "num_samples": ("n", "samples", "draws", "num_draws", "num_particles", "n_samples"),
    "progress": ("progress_bar", "progressbar", "verbose", "disable_progbar"),
    "steps": ("num_steps", "n_steps", "max_steps", "iterations", "num_iterations", "n_iter", "epochs", "max_epochs"),
}
"""Names of the options in Pyro and other libraries."""

TABLE = "\nTrace Shapes:"
MOST_LINES = 6
EMPTY = ("Param Sites:", "Sample Sites:")


class Site(TypedDict):
    """A sample site of a trace, or the message of a sample statement on its way through handlers.

    Some entries exist only at times: a message has no value before its draw, a site no log-probabilities before
    `Trace.compute_log_prob`, and no packed ones before `Trace.pack_tensors`.
    """

    type: str
    name: str
    fn: TorchDistribution
    value: Tensor
    done: bool
    is_observed: bool
    infer: Mapping[str, object] | None
    scale: float | Tensor
    mask: bool | Tensor | None
    cond_indep_stack: tuple[Frame, ...]
    log_prob: Tensor
    log_prob_sum: Tensor
    unscaled_log_prob: Tensor
    packed: Site
    score_parts: ScoreParts


def sample_sites(trace: Trace) -> dict[str, Site]:
    """Return the sample sites of a trace by name, including observed ones and the indices of subsamples."""
    nodes = cast("Mapping[str, Site]", trace.nodes)
    return {name: site for name, site in nodes.items() if site["type"] == "sample"}


def latent_sites(trace: Trace) -> dict[str, Site]:
    """Return the latent sites of a trace by name, without the indices of subsamples."""
    sites = sample_sites(trace)
    return {name: site for name, site in sites.items() if not site["is_observed"] and not is_subsample(site)}


def data_sites(trace: Trace) -> dict[str, Site]:
    """Return the sites of a trace that observe data, without `pyro.factor` and `pyro.deterministic`."""
    observed = {name: site for name, site in sample_sites(trace).items() if site["is_observed"]}
    return {
        name: site
        for name, site in observed.items()
        if not (is_subsample(site) or isinstance(site["fn"], Unit) or "_deterministic" in (site["infer"] or {}))
    }


def is_subsample(site: Site) -> bool:
    """Return whether a site draws the indices of a subsampling plate."""
    return site_is_subsample(cast("Message[..., object]", site))


def layers_of(fn: Distribution) -> Iterator[Distribution]:
    """Iterate over a distribution and those that it wraps as `base_dist`, from the outermost inwards."""
    layer: Distribution | None = fn
    while layer is not None:
        yield layer
        layer = getattr(layer, "base_dist", None)


@dataclass(frozen=True)
class Call:
    """A model or a guide, with the arguments that it is called with.

    Args:
        program: The model or guide.
        args, kwargs: Its arguments.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> call = Call(lambda scale: pyro.sample("z", dist.Normal(0.0, scale)), (2.0,))
        >>> list(latent_sites(call.trace()))
        ['z']
    """

    program: Model
    args: Args = ()
    kwargs: Kwargs = field(default_factory=dict)

    def __call__(self) -> object:
        """Run the program."""
        return self.program(*self.args, **self.kwargs)

    def of(self, program: Model) -> Call:
        """Return the call of another program with the same arguments, such as a model's guide."""
        return Call(program, self.args, self.kwargs)

    def has_arguments_of(self, other: Call | None) -> bool:
        """Return whether the arguments of another call are the same objects."""
        if other is None:
            return False
        ours, theirs = ([*call.args, *call.kwargs, *call.kwargs.values()] for call in (self, other))
        return len(ours) == len(theirs) and all(map(operator.is_, ours, theirs))

    def trace(self) -> Trace:
        """Trace of a run."""
        return poutine.trace(self.program).get_trace(*self.args, **self.kwargs)

    def replayed(self, trace: Trace) -> Trace:
        """Trace of a run with the latent values of another trace."""
        return self.of(poutine.replay(self.program, trace=trace)).trace()

    def conditioned(self, values: Mapping[str, Tensor]) -> Trace:
        """Trace of a run in which some sites are observed with these values."""
        return self.of(poutine.condition(self.program, data=dict(values))).trace()


_callback: ContextVar[Callable[[], None] | None] = ContextVar("_callback", default=None)
"""Called after each run of a model for a single draw."""


@contextmanager
def show_runs(bar: Bar, what: str, total: int, **fields: str) -> Iterator[None]:
    """Show the runs of a model for single draws as a line of `bar` while the context is active.

    Args:
        bar: The bar.
        what: Name of the line.
        total: Expected number of runs.
        fields: Further fields of the texts.
    """
    count, is_shown = 0, False

    def show() -> None:
        nonlocal count, is_shown
        count += 1
        if bar.is_due:
            is_shown = True
            bar.show(what, min(count, total), total, **fields)

    token = _callback.set(show)
    try:
        yield
    finally:
        _callback.reset(token)
    if is_shown:
        bar.show(what, count, count, **fields)


def report_run() -> None:
    """Report a run of a model for a single draw."""
    callback = _callback.get()
    if callback is not None:
        callback()


class RefusalError(ValueError):
    r"""A `ValueError` about the structure of a model or a guide, without Pyro's table of shapes.

    Pyro adds such a table to every error that is raised while a program is traced.

    Example:
        >>> str(RefusalError("AutoIAF found no latent variables.\nTrace Shapes:\n Param Sites:\nSample Sites:"))
        'AutoIAF found no latent variables.'
    """

    def __str__(self) -> str:
        return super().__str__().partition(TABLE)[0]


@contextmanager
def without_empty_tables() -> Iterator[None]:
    """Context manager that removes empty tables of shapes from error messages, and shortens long tensors in them."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        message = error.args[0] if len(error.args) == 1 else None
        if isinstance(message, str):
            text, *tables = message.split(TABLE)
            error.args = (TABLE.join([_shortened(text), *(table for table in tables if not _is_empty(table))]),)
        raise


def _shortened(text: str) -> str:
    """Shorten a text of more than a few lines, such as the hundreds of a tensor of draws."""
    lines = text.splitlines()
    return text if len(lines) <= MOST_LINES else "\n".join([*lines[:MOST_LINES], f"... ({len(lines)} lines)"])


def _is_empty(table: str) -> bool:
    return all(line.strip() in EMPTY for line in table.strip().splitlines())


def check_pair(who: str, model: object, guide: object) -> None:
    """Check that a model and its guide are both callable, and in this order.

    Raises:
        TypeError: If one cannot be called or is a class, or if the two are swapped.
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


def check_observes_nothing(who: str, guide_trace: Trace, model_trace: Trace) -> None:
    """Check that a guide is not a model: none of its sites may be observed.

    Raises:
        ValueError: If one of them is.
    """
    for name, site in data_sites(guide_trace).items():
        if name not in model_trace and "is_auxiliary" not in (site["infer"] or {}):
            raise RefusalError(
                f"{who} expected a model and then its guide, which observes nothing, got one that observes {name}: "
                f"if the two are swapped, call {who}(model, guide)."
            )


def check_call(who: str, call: Call, options: Sequence[str]) -> None:
    """Check that a model accepts the arguments that are passed on to it.

    Args:
        who: The function that passes them on.
        call: The model with its arguments.
        options: The options of `who`, one of which a keyword may have been meant for.

    Raises:
        TypeError: If it does not.

    Warns:
        UserWarning: If it accepts any keyword, and one is spelt much like an option.
    """
    if (mismatch := _mismatch(call)) is None:
        _warn_of_misspelling(who, call, options)
        return
    names, error = mismatch
    unknown = next((name for name in call.kwargs if name not in names), None)
    if unknown is None:
        taken = next((f"{name}=..." for name in options if name in names and f"'{name}'" in str(error)), "")
        advice = f"; this is an option of {who}, so use functools.partial(model, {taken}) as the model" if taken else ""
        raise _wrong_arguments(who, mismatch, "after the guide", advice)
    option = _option_meant(unknown, options)
    advice = f"use {option}" if option else f"the options are {', '.join(options)}"
    raise TypeError(
        f"{who} expected an option of its own or an argument of the model, model({', '.join(names)}), "
        f"got {unknown}: {advice}."
    )


def _warn_of_misspelling(who: str, call: Call, options: Sequence[str]) -> None:
    """Warn about a keyword that is spelt much like an option and that the model accepts, since it accepts any."""
    parameters = _signature(call.program)
    for name in call.kwargs:
        close = difflib.get_close_matches(name, options, n=1, cutoff=0.85)
        if close and parameters is not None and name not in parameters.parameters:
            warnings.warn(
                f"{who} passes {name} on to the model, which takes any keyword: was {close[0]} meant?",
                UserWarning,
                stacklevel=5,
            )


def check_set_up_call(who: str, call: Call) -> None:
    """Check that a guide that is not yet set up is called with its model's arguments.

    Raises:
        TypeError: If it is not.
    """
    if mismatch := _mismatch(call):
        advice = "; call fit_guide, or guide.setup() with these"
        raise _wrong_arguments(who, mismatch, "since it is not set up yet", advice)


def check_encoder_call(who: str, call: Call) -> None:
    """Check that the encoder of a guide, the program of a call, accepts its arguments.

    Raises:
        TypeError: If it does not.
    """
    if mismatch := _mismatch(call):
        raise _wrong_arguments(
            who, mismatch, "as in rsample((1000,), *args)", program="the model for its encoder, encoder"
        )


def _wrong_arguments(
    who: str,
    mismatch: tuple[Sequence[str], TypeError],
    where: str,
    advice: str = "",
    *,
    program: str = "the model, model",
) -> TypeError:
    """Error for arguments that a model, or an encoder, does not accept."""
    names, error = mismatch
    return TypeError(f"{who} expected the arguments of {program}({', '.join(names)}), {where}: {error}{advice}.")


def _signature(model: Model) -> inspect.Signature | None:
    """Return the signature of a model, or None if it has none."""
    try:
        return inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):
        return None


def _mismatch(call: Call) -> tuple[list[str], TypeError] | None:
    """Return the names of a model's arguments and the error, if it does not accept those of a call."""
    if (signature := _signature(call.program)) is None:
        return None
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        return list(signature.parameters), error
    return None


def _option_meant(name: str, options: Sequence[str]) -> str | None:
    """Return the option that has this name elsewhere, or is spelt similarly."""
    same = [option for option in options if name in OTHER_NAMES.get(option, ())]
    return next(iter([*same, *difflib.get_close_matches(name, options, n=1, cutoff=0.7)]), None)
