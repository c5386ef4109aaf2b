"""The log joint density of a model at given values of its latent sites, for many draws at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_maf.infer.enumeration import is_enumerated, log_densities
from pyro_maf.infer.hidden import Draws
from pyro_maf.infer.minibatches import Minibatch, Minibatches, PartialRowsError, frames_of, minibatches_of, subsampled
from pyro_maf.infer.runs import noticed
from pyro_maf.randomness import seeded

__all__ = ["FAILURES", "LogJoint", "latent_sites", "nesting_of", "total_by_draw"]

FAILURES = (ValueError, ArithmeticError, RuntimeError)
"""What models and distributions raise where a value can not be scored, linear algebra included."""

SEEDS = 8
"""From how many a model is run that draws random numbers, to see whether its density depends on them."""

SPARE = 2
"""Dimensions left free between a model's plates and that of the draws, for plates that are open around a call."""

Values = Mapping[str, Tensor]
"""The value of each latent site, draws along the first dimension."""


class LogJoint:
    r"""log p(x, z) in nats, for the data x that a model is called with and draws z of its latent sites.

    All draws are scored by one run of the model inside a plate where the model allows that, and one after another where
    it does not, which is found out by trying. Discrete sites that are enumerated in parallel are summed out. Where
    plates subsample, runs over minibatches add up to all rows. Random numbers that the model draws itself are the same
    in every call.

    Args:
        model: The model.
        example: A trace of it, for the shapes of its sites and the dimensions of its plates.
        args, kwargs: What it is called with.
        shapes: The shape of the value of each latent site, by default of those in `example` that are not enumerated.
            Within plates that subsample it may be that of all rows.
        most_minibatches: The most minibatches of a plate that subsamples; beyond it, they stand for the rest.

    Attributes:
        nesting: How many dimensions, from the right, are for the model's own plates.
        is_vectorised: Whether one run scores many draws; set by `settle`.
        is_random: Whether the model draws more than is seen, such as hidden discrete sites; set by `settle`.
        hidden: The names of sites that it draws and that are not to be seen from outside; set by `settle`.
        enumerated: Whether there are sites to sum out.
        partial: Why not all rows are scored, but those of one minibatch in their place; "" where all are.
        runs: How many runs of the model score all rows.
        numbers: How many log-probabilities one draw takes at a time; set by `settle`.

    Shapes:
        The value of a site of shape `(*plates, *event)` is `(draws, *plates, *event)`, plates padded with ones to
        `nesting` dimensions; the result is (draws,): minus infinity where the density is not a number, and where the
        model raises.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        example: poutine.Trace,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        shapes: Mapping[str, torch.Size] | None = None,
        most_minibatches: float = math.inf,
    ) -> None:
        self._model, self._args, self._kwargs = model, args, kwargs
        latents = latent_sites(example)
        if shapes is None:
            shapes = {name: site["value"].shape for name, site in latents.items() if not is_enumerated(site)}
        self._shapes = shapes
        self.enumerated = any(is_enumerated(site) for name, site in latents.items() if name not in shapes)
        self.nesting = nesting_of(example) + SPARE
        self.is_vectorised = True
        self.is_random = False
        self.hidden: tuple[str, ...] = ()
        self.numbers = 1
        values = {name: site["value"] for name, site in latents.items() if name in shapes}
        self._like = next(iter(values.values()))
        self._minibatches, self.partial = minibatches_of(
            lambda: self._run(values), example.nodes.values(), self._like, most_minibatches
        )
        self.runs = self._minibatches.count if isinstance(self._minibatches, Minibatches) else 1
        self._all_rows = {name: _of_all_rows(latents[name], shapes[name]) for name in values}
        if not self.partial:
            self.partial = _within_subsamples(latents, self._all_rows)

    def __call__(self, values: Values) -> Tensor:
        """log p(x, z) in nats, (draws,), at values of the latent sites."""
        count = _count(values)
        try:
            score = self._together if self.is_vectorised else self._in_turn
            scored = score(values, self._minibatches)
        except FAILURES:
            if count == 1:
                return next(iter(values.values())).new_full((1,), -torch.inf)
            halves = (slice(count // 2), slice(count // 2, count))
            return torch.cat([self({name: value[half] for name, value in values.items()}) for half in halves])
        return torch.where(scored.isnan() | (scored == torch.inf), -torch.inf, scored)

    def returned(self, values: Values) -> Any:
        """What the model returns at values of one draw, (1, ...), with the rows of a first minibatch."""
        one = {name: value[0].reshape(self._shapes[name]) for name, value in values.items()}
        trace: Any = self._scored(one, next(iter(self._minibatches)))
        return trace.nodes["_RETURN"]["value"]

    def prior_draws(self, count: int) -> dict[str, Tensor]:
        r"""Draws of the latent sites from the prior, (count, \*site), of a model that scores many draws in one run.

        Raises:
            RuntimeError: If a value has not the rows that it is to have, as those of a minibatch.
        """
        plate = pyro.plate("_draws", count, dim=-self.nesting - 1)
        with seeded(0, self._like.device), pyro.poutine.block(), plate:
            trace: Any = poutine.trace(self._model).get_trace(*self._args, **self._kwargs)
        return {name: trace.nodes[name]["value"].reshape(count, *shape) for name, shape in self._shapes.items()}

    def settle(self, values: Values) -> LogJoint:
        """Decide between one run for all draws and one for each, by trying both on a few; returns itself.

        Raises:
            Exception: Whatever the model raises, where it does so for every one of them.
        """
        try:
            return self._settled(values)
        except PartialRowsError as reason:
            self._minibatches, self.partial, self.runs = (Minibatch({}),), str(reason), 1
            return self._settled(values)

    def _settled(self, values: Values) -> LogJoint:
        first = list(islice(self._minibatches, 1))
        alone, error = [], None
        for index in range(_count(values)):
            one = {name: value[index : index + 1] for name, value in values.items()}
            try:
                alone.append(self._in_turn(one, first))
            except FAILURES as failure:
                alone.append(next(iter(one.values())).new_full((1,), torch.nan))
                error = failure
        expected = torch.cat(alone)
        usable = expected.isfinite()
        if error is not None and not usable.any():
            raise error
        try:
            found = self._together({name: value[usable] for name, value in values.items()}, first)
        except PartialRowsError:
            raise
        except Exception:  # a model that was never meant for a batch may fail in any way
            self.is_vectorised = False
        else:
            self.is_vectorised = torch.allclose(found, expected[usable], rtol=1e-3, atol=1e-3)
        index = int(usable.int().argmax())
        self._look_for_draws({name: value[index : index + 1] for name, value in values.items()}, first)
        return self

    def _look_for_draws(self, one: Values, minibatches: Iterable[Minibatch]) -> None:
        """Set `hidden` and `is_random`: whether another seed gives values of one draw another density."""
        draws = Draws(next(iter(one.values())).device)
        try:
            with draws:
                first = self._in_turn(one, minibatches)
            self.hidden = tuple(sorted(draws.sites))
            seeds = range(1, SEEDS if draws.any else 2)
            others = (self._in_turn(one, minibatches, seed) for seed in seeds)
            differs = any(not torch.allclose(first, other, rtol=1e-5, atol=1e-5, equal_nan=True) for other in others)
        except FAILURES:
            differs = False
        self.is_random = differs or bool(self.hidden)

    def _together(self, values: Values, minibatches: Iterable[Minibatch]) -> Tensor:
        draws = _count(values)
        plates = (draws, *(1,) * self.nesting)

        def score(minibatch: Minibatch) -> Tensor:
            with pyro.plate("_draws", draws, dim=-self.nesting - 1):
                trace = self._scored(values, minibatch)
            if self.runs > 1:
                noticed()
            return total_by_draw(log_densities(trace, minibatch.weight), plates)

        return _sum(map(score, minibatches))

    def _in_turn(self, values: Values, minibatches: Iterable[Minibatch], seed: int = 0) -> Tensor:
        def score(row: int, minibatch: Minibatch) -> Tensor:
            one = {name: value[row].reshape(self._shapes[name]) for name, value in values.items()}
            trace: Any = self._scored(one, minibatch, seed)
            sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
            self.numbers = max(self.numbers, sum(site["log_prob"].numel() for site in sites))
            noticed()
            return _sum(part.sum() for part in log_densities(trace, minibatch.weight))

        minibatches = tuple(minibatches)
        return torch.stack([_sum(score(row, each) for each in minibatches) for row in range(_count(values))])

    def _scored(self, values: Values, minibatch: Minibatch, seed: int = 0) -> poutine.Trace:
        inside = {name: minibatch.of_these_rows(value, self._all_rows.get(name, {})) for name, value in values.items()}
        with minibatch:
            trace = self._run(inside, seed)
        with pyro.settings.context(validate_poutine=False):  # which warns of what minus infinity says here
            trace.compute_log_prob()
        return trace

    def _run(self, values: Values, seed: int = 0) -> poutine.Trace:
        model = poutine.condition(self._model, data=dict(values))
        if self.enumerated:  # along dimensions on the left of that of the draws
            model = poutine.enum(model, first_available_dim=-self.nesting - 2)
        with seeded(seed, next(iter(values.values())).device):
            return poutine.trace(model).get_trace(*self._args, **self._kwargs)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    first, *rest = terms
    return sum(rest, first)


def _count(values: Values) -> int:
    return len(next(iter(values.values())))


def latent_sites(trace: Any) -> dict[str, Any]:
    """The latent sites of a trace by name, without the indices of subsamples."""
    return {name: site for name, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)}


def nesting_of(trace: poutine.Trace) -> int:
    """How many dimensions, from the right, the plates of a trace take."""
    return max((-frame.dim for site in trace.nodes.values() for frame in frames_of(site)), default=0)


def _of_all_rows(site: Any, shape: torch.Size) -> dict[str, int]:
    """The plates around a site that subsample, where a value of this shape has all their rows: at which dimension."""
    dims = {frame.name: (frame.dim - site["fn"].event_dim, frame.full_size) for frame in frames_of(site)}
    partial = {frame.name for frame in subsampled(site)}
    return {name: dim for name, (dim, size) in dims.items() if name in partial and shape[dim] == size}


def _within_subsamples(latents: Mapping[str, Any], all_rows: Mapping[str, Mapping[str, int]]) -> str:
    """Where values are those of one minibatch, which site and plate this is; "" elsewhere."""
    for name, dims in all_rows.items():
        for frame in subsampled(latents[name]):
            if frame.name not in dims:
                return (
                    f"latent site {name} is drawn for {frame.size} of the {frame.full_size} rows of plate {frame.name}"
                )
    return ""


def total_by_draw(parts: Sequence[Tensor], plates: tuple[int, ...]) -> Tensor:
    """The sum of log densities, (plates[0],), whose other plates are those of a model."""
    parts = [part.reshape(part.shape[max(0, part.dim() - len(plates)) :]) for part in parts]
    parts = [part.expand(torch.broadcast_shapes(part.shape, plates)) for part in parts]
    return torch.stack([part.reshape(plates[0], -1).sum(1) for part in parts]).sum(0)
