"""The log joint density of a model at given values of its latent sites, for many draws at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_maf.randomness import seeded

__all__ = ["FAILURES", "LogJoint", "latent_sites", "nesting_of", "total_by_draw"]

FAILURES = (ValueError, ArithmeticError, RuntimeError)
"""What models and distributions raise where a value can not be scored, linear algebra included."""

SPARE = 2
"""Dimensions left free between a model's plates and that of the draws, for plates that are open around a call."""

Values = Mapping[str, Tensor]
"""The value of each latent site, draws along the first dimension."""


class LogJoint:
    r"""log p(x, z) in nats, for the data x that a model is called with and draws z of its latent sites.

    All draws are scored by one run of the model inside a plate where the model allows that, and one after another where
    it does not, which is found out by trying. Random numbers that the model draws itself, such as which rows a plate
    subsamples, are the same in every call.

    Args:
        model: The model.
        example: A trace of it, for the shapes of its sites and the dimensions of its plates.
        args, kwargs: What it is called with.

    Attributes:
        nesting: How many dimensions, from the right, are for the model's own plates.
        is_vectorised: Whether one run scores many draws; set by `settle`.
        is_random: Whether the model draws more than is seen, such as hidden discrete sites; set by `settle`.

    Shapes:
        The value of a site of shape `(*plates, *event)` is `(draws, *plates, *event)`, plates padded with ones to
        `nesting` dimensions; the result is (draws,): minus infinity where the density is not a number, and where the
        model raises.
    """

    def __init__(
        self, model: Callable[..., Any], example: poutine.Trace, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._model, self._args, self._kwargs = model, args, kwargs
        self._shapes = {name: site["value"].shape for name, site in latent_sites(example).items()}
        self.nesting = nesting_of(example) + SPARE
        self.is_vectorised = True
        self.is_random = False
        self._subsamples = any(
            frame.full_size not in (None, frame.size) for site in example.nodes.values() for frame in frames_of(site)
        )

    def __call__(self, values: Values) -> Tensor:
        """log p(x, z) in nats, (draws,), at values of the latent sites."""
        count = _count(values)
        try:
            scored = self._together(values) if self.is_vectorised else self._in_turn(values)
        except FAILURES:
            if count == 1:
                return next(iter(values.values())).new_full((1,), -torch.inf)
            halves = (slice(count // 2), slice(count // 2, count))
            return torch.cat([self({name: value[half] for name, value in values.items()}) for half in halves])
        return torch.where(scored.isnan() | (scored == torch.inf), -torch.inf, scored)

    def settle(self, values: Values) -> LogJoint:
        """Decide between one run for all draws and one for each, by trying both on a few; returns itself.

        Raises:
            Exception: Whatever the model raises, where it does so for every one of them.
        """
        alone, error = [], None
        for index in range(_count(values)):
            one = {name: value[index : index + 1] for name, value in values.items()}
            try:
                alone.append(self._in_turn(one))
            except FAILURES as failure:
                alone.append(next(iter(one.values())).new_full((1,), torch.nan))
                error = failure
        expected = torch.cat(alone)
        usable = expected.isfinite()
        if error is not None and not usable.any():
            raise error
        try:
            found = self._together({name: value[usable] for name, value in values.items()})
        except Exception:  # a model that was never meant for a batch may fail in any way
            self.is_vectorised = False
        else:
            self.is_vectorised = torch.allclose(found, expected[usable], rtol=1e-3, atol=1e-3)
        self.is_random = not self._subsamples and self._differs(values)
        return self

    def _differs(self, values: Values) -> bool:
        """Whether another seed gives the first draw another density."""
        one = {name: value[:1] for name, value in values.items()}
        try:
            found = [self._in_turn(one, seed) for seed in (0, 1)]
        except FAILURES:
            return False
        first, second = found
        return not torch.allclose(first, second, rtol=1e-5, atol=1e-5, equal_nan=True)

    def _together(self, values: Values) -> Tensor:
        draws = _count(values)
        with pyro.plate("_draws", draws, dim=-self.nesting - 1):
            trace = self._run(values)
        return total_by_draw(trace, (draws, *(1,) * self.nesting))

    def _in_turn(self, values: Values, seed: int = 0) -> Tensor:
        rows = range(_count(values))
        shaped = [{name: value[row].reshape(self._shapes[name]) for name, value in values.items()} for row in rows]
        return torch.stack([torch.as_tensor(self._run(row, seed).log_prob_sum()) for row in shaped])

    def _run(self, values: Values, seed: int = 0) -> poutine.Trace:
        with seeded(seed, next(iter(values.values())).device):
            conditioned = poutine.trace(poutine.condition(self._model, data=dict(values)))
            trace = conditioned.get_trace(*self._args, **self._kwargs)
        with pyro.settings.context(validate_poutine=False):  # which warns of what minus infinity says here
            trace.compute_log_prob()
        return trace


def _count(values: Values) -> int:
    return len(next(iter(values.values())))


def latent_sites(trace: Any) -> dict[str, Any]:
    """The latent sites of a trace by name, without the indices of subsamples."""
    return {name: site for name, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)}


def frames_of(site: Any) -> list[Any]:
    """The vectorised plates around a site of a trace."""
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized] if site["type"] == "sample" else []


def nesting_of(trace: poutine.Trace) -> int:
    """How many dimensions, from the right, the plates of a trace take."""
    return max((-frame.dim for site in trace.nodes.values() for frame in frames_of(site)), default=0)


def total_by_draw(trace: Any, plates: tuple[int, ...]) -> Tensor:
    """Log-density of all sites of a trace, (plates[0],), whose other plates are those of a model."""
    parts = [site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample"]
    parts = [part.expand(torch.broadcast_shapes(part.shape, plates)) for part in map(torch.as_tensor, parts)]
    return torch.stack([part.reshape(plates[0], -1).sum(1) for part in parts]).sum(0)
