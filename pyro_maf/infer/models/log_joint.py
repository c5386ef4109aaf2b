"""Log joint density of a model as a function of its latent sites, for many draws at once."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Self, cast

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.models.enumeration import is_enumerated, log_densities, total_by_draw
from pyro_maf.infer.models.mapped import mapped
from pyro_maf.infer.models.model import (
    FAILURES,
    Args,
    Call,
    Kwargs,
    RefusalError,
    Site,
    Trace,
    data_sites,
    latent_sites,
    report_run,
    sample_sites,
)
from pyro_maf.infer.models.plates import (
    Minibatch,
    PartialRowsError,
    frames_of,
    minibatches_of,
    nesting_of,
    subsampled,
)

__all__ = ["LogJoint"]

SEEDS = 8
"""Number of seeds with which a model that draws random numbers is run, to test whether its density depends on them."""

LARGEST = 50_000
"""Size of the largest tensor of a run from which on `vmap` saves nothing, and takes memory for every draw."""

MOST_NUMBERS = 2**24
"""Maximum size of a tensor in a run for many draws, without gradients."""

MOST_TERMS = 10**8
"""Maximum number of log-densities of rows, for all draws."""

MOST_ALONE = 64
"""Maximum number of draws of the prior by separate runs."""

SPARE = 2
"""Number of dimensions left free between a model's plates and the draws, for plates that are open around a call."""

Values = Mapping[str, Tensor]
"""The value of each latent site, draws along the first dimension."""

Scorer = Callable[[Values, Minibatch], Tensor]
"""Log joint density of several draws, (draws,), with the rows of a minibatch."""


class LogJoint:
    r"""log p(x, z) in nats, for the data x that a model is called with and draws z of its latent sites.

    All draws are scored by one run of the model: inside a plate if a trial shows that the model allows that, otherwise
    under torch's `vmap`, in which the model sees a single draw. If neither works, for instance because Python reads the
    value of a latent variable, it is run for one draw after another. Discrete sites that are enumerated in parallel are
    summed out. If plates subsample, runs over minibatches add up to all rows. Random numbers that the model draws
    itself are the same in every call.

    Args:
        call: The model with its arguments.
        example: A trace of it, for the shapes of its sites and the dimensions of its plates.
        shapes: The shape of the value of each latent site, by default of those in `example` that are not enumerated.
            Within subsampling plates it may cover all rows.
        most_minibatches: Maximum number of minibatches of a subsampling plate; if there are more, these represent the
            rest.

    Attributes:
        nesting: Number of dimensions, from the right, of the model's plates.
        is_vectorised: True if one run scores many draws; set by `settle`.
        broadcasts: True if that run is inside a plate, as in Pyro's objectives with vectorised particles; set by
            `settle`.
        is_random: True if the density depends on random numbers outside of visible sites; set by `settle`.
        hidden: Names of the sites that the model draws but hides from handlers around it; set by `settle`.
        enumerated: True if there are sites to sum out.
        partial: Why only the rows of one minibatch are scored; "" if all rows are.
        runs: Number of runs of the model that score all rows.
        numbers: Number of log-probabilities per draw in memory at a time; set by `settle`.

    Shapes:
        The value of a site of shape `(*plates, *event)` is `(draws, *plates, *event)`, with plates padded by ones to
        `nesting` dimensions. The result is (draws,): minus infinity where the density is NaN or the model raises.
    """

    def __init__(
        self,
        call: Call,
        example: Trace,
        *,
        shapes: Mapping[str, torch.Size] | None = None,
        most_minibatches: float = math.inf,
    ) -> None:
        self._call = call
        latents = self._latents = latent_sites(example)
        if shapes is None:
            shapes = {name: site["value"].shape for name, site in latents.items() if not is_enumerated(site)}
        self._shapes = shapes
        self._plate_dims = {name: _plate_dims(site) for name, site in data_sites(example).items()}
        self.enumerated = any(is_enumerated(site) for name, site in latents.items() if name not in shapes)
        self.nesting = nesting_of(example) + SPARE
        self.is_vectorised = self.broadcasts = True
        self._score: Scorer = self._together
        self._maps_failures: bool | None = None
        self._changing: set[str] = set()
        self._largest = 1
        self.is_random = False
        self.hidden: tuple[str, ...] = ()
        self.numbers = 1
        values = {name: site["value"] for name, site in latents.items() if name in shapes}
        self._like = next(iter(values.values()))
        self._minibatches, self.partial = minibatches_of(
            lambda: self._run(values), sample_sites(example).values(), self._like, most_minibatches
        )
        self.runs = len(self._minibatches)
        self._all_rows = {name: _of_all_rows(latents[name], shapes[name]) for name in values}
        if not self.partial:
            self.partial = _within_subsamples(latents, self._all_rows)

    def __call__(self, values: Values) -> Tensor:
        """Return log p(x, z) in nats, (draws,), at values of the latent sites."""
        count = _count(values)
        most = max(1, MOST_NUMBERS // self._largest)
        if count > most and not torch.is_grad_enabled():
            return torch.cat([self(_draws(values, slice(at, at + most))) for at in range(0, count, most)])
        try:
            scored = self.together(values)
        except FAILURES:
            if count == 1:
                return next(iter(values.values())).new_full((1,), -torch.inf)
            scored = self._of_failures(values)
        return torch.where(scored.isnan() | (scored == torch.inf), -torch.inf, scored)

    def _of_failures(self, values: Values) -> Tensor:
        """Log joint density of draws, (draws,), for some of which the model raises."""
        if self._maps_failures:
            with suppress(*FAILURES):
                return self._total(self._mapped, values)
        half = _count(values) // 2
        scored = torch.cat([self(_draws(values, part)) for part in (slice(half), slice(half, None))])
        if self._maps_failures is None and self._score == self._together:
            self._maps_failures = self._largest <= LARGEST and _agrees(
                partial(self._total, self._mapped, values), scored.detach()
            )
        return scored

    def together(self, values: Values) -> Tensor:
        """Return log p(x, z) in nats, (draws,), from one run for all draws, with NaN and errors as they are."""
        return self._total(self._score, values)

    @torch.no_grad()
    def can_score(self, values: Values) -> bool:
        """Return whether the density at values of one draw, (1, ...), is finite, by a run for that draw."""
        try:
            return bool(self._in_turn(values, self._minibatches[0]).isfinite())
        except FAILURES:
            return False

    @torch.no_grad()
    def log_likelihood(self, values: Values) -> dict[str, Tensor]:
        r"""Return log p(x_i | z) in nats of the observed sites, (draws, \*plates), without the scales of handlers.

        Empty if the rows have no separate densities because sites are summed out, are not scored by one run, or have
        more than 10^8 densities in all.
        """
        if self.enumerated or self.partial or self.runs > 1 or _count(values) * self.numbers > MOST_TERMS:
            return {}
        size = max(1, MOST_NUMBERS // max(self.numbers, self._largest)) if self.broadcasts else 1
        parts = [self._by_row(_draws(values, slice(at, at + size))) for at in range(0, _count(values), size)]
        return {name: torch.cat([part[name] for part in parts]) for name in self._plate_dims}

    def _by_row(self, values: Values) -> dict[str, Tensor]:
        """Compute `log_likelihood` by one run."""
        draws, (minibatch,) = _count(values), self._minibatches
        if self.broadcasts:
            trace = self._scored_together(values, minibatch)
        else:
            trace = self._scored(self._single(values), minibatch)
        terms, sites = {}, sample_sites(trace)
        for name, depth in self._plate_dims.items():
            term = scale_and_mask(sites[name]["unscaled_log_prob"], mask=sites[name]["mask"])
            term = term.expand(torch.broadcast_shapes(term.shape, (draws, *(1,) * self.nesting)))
            terms[name] = term.reshape(draws, *term.shape[term.dim() - depth :])
        return terms

    def check_sites(self, who: str) -> None:
        """Check that all runs for one draw so far had the same sites.

        Raises:
            ValueError: If a site was only in some of them, so that the others lack its density.
        """
        for name in sorted(self._changing):
            raise RefusalError(
                f"{who} expected a model with the same sites in every run, got one with {name} in some only: draw it "
                "in every run, and use it where it applies."
            )

    def returned(self, values: Values) -> object:
        """Return value of the model at values of one draw, (1, ...), with the rows of the first minibatch."""
        return self._scored(self._single(_draws(values, 0)), self._minibatches[0]).nodes["_RETURN"]["value"]

    def prior_draws(self, count: int) -> dict[str, Tensor]:
        r"""Draw the latent sites from the prior, (count, \*site); without broadcasting at most 64, by separate runs.

        Raises:
            RuntimeError: If a value has fewer rows than expected, for instance those of a minibatch.
        """
        with seeded(0, self._like.device), poutine.block():
            if not self.broadcasts:
                draws = [sample_sites(self._call.trace()) for _ in range(min(count, MOST_ALONE))]
                return {name: torch.stack([sites[name]["value"] for sites in draws]) for name in self._shapes}
            with pyro.plate("_draws", count, dim=-self.nesting - 1):
                sites = sample_sites(self._call.trace())
        return {name: sites[name]["value"].reshape(count, *shape) for name, shape in self._shapes.items()}

    def settle(self, values: Values) -> LogJoint:
        """Choose between one run for all draws and separate runs, by trying both on a few draws; return self.

        Raises:
            Exception: The error of the model, if it raises one for every draw in the trial.
        """
        try:
            return self._settled(values)
        except PartialRowsError as reason:
            self._minibatches, self.partial, self.runs = [Minibatch({})], str(reason), 1
            return self._settled(values)

    def _settled(self, values: Values) -> LogJoint:
        alone, error = [], None
        for index in range(_count(values)):
            try:
                alone.append(self._in_turn(_draws(values, slice(index, index + 1)), self._minibatches[0]))
            except FAILURES as failure:
                alone.append(self._like.new_full((1,), torch.nan))
                error = failure
        expected = torch.cat(alone)
        usable = expected.isfinite()
        if error is not None and not usable.any():
            raise error
        index = int(usable.int().argmax())
        self._test_randomness(_draws(values, slice(index, index + 1)))
        if usable.any():
            values, expected = _draws(values, usable), expected[usable]
        batched: tuple[Scorer, ...] = (self._together,)
        if self._largest <= LARGEST:
            batched += (self._mapped, partial(self._mapped, writes=True))
        agreeing = (each for each in batched if _agrees(partial(each, values, self._minibatches[0]), expected))
        self._score = next(agreeing, self._in_turn)
        self.broadcasts, self.is_vectorised = self._score == self._together, self._score != self._in_turn
        return self

    def _test_randomness(self, one: Values) -> None:
        """Set `hidden` and `is_random`, the latter if the density of one draw differs between seeds."""
        recorder = _DrawRecorder()
        try:
            with recorder:
                first = self._in_turn(one, self._minibatches[0])
            self.hidden = tuple(sorted(recorder.sites))
            self._largest = recorder.largest
            seeds = range(1, SEEDS if recorder.any else 2)
            others = (self._in_turn(one, self._minibatches[0], seed) for seed in seeds)
            differs = any(not torch.allclose(first, other, rtol=1e-5, atol=1e-5, equal_nan=True) for other in others)
        except FAILURES:
            differs = False
        self.is_random = differs or bool(self.hidden)

    def _total(self, score: Scorer, values: Values) -> Tensor:
        """Sum over the runs that score all rows."""
        terms = []
        for minibatch in self._minibatches:
            terms.append(score(values, minibatch))
            if self.runs > 1 and score != self._in_turn:
                report_run()
        return _sum(terms)

    def _together(self, values: Values, minibatch: Minibatch) -> Tensor:
        trace = self._scored_together(values, minibatch)
        return total_by_draw(log_densities(trace, minibatch.weight), (_count(values), *(1,) * self.nesting))

    def _scored_together(self, values: Values, minibatch: Minibatch) -> Trace:
        with pyro.plate("_draws", _count(values), dim=-self.nesting - 1):
            return self._scored(values, minibatch)

    def _mapped(self, values: Values, minibatch: Minibatch, writes: bool = False) -> Tensor:
        scores, is_valid = mapped(lambda one: self._score_of_one(one, minibatch), values, writes=writes)
        return torch.where(is_valid, scores, -torch.inf)

    def _in_turn(self, values: Values, minibatch: Minibatch, seed: int = 0) -> Tensor:
        scores = []
        for row in range(_count(values)):
            scores.append(self._score_of_one(_draws(values, row), minibatch, seed))
            report_run()
        return torch.stack(scores)

    def _score_of_one(self, values: Values, minibatch: Minibatch, seed: int = 0) -> Tensor:
        trace = self._scored(self._single(values), minibatch, seed)
        self._changing.update(self._shapes.keys() - trace.nodes, latent_sites(trace).keys() - self._latents)
        self.numbers = max(self.numbers, sum(site["log_prob"].numel() for site in sample_sites(trace).values()))
        return _sum(part.sum() for part in log_densities(trace, minibatch.weight))

    def _single(self, values: Values) -> dict[str, Tensor]:
        """Return the values of one draw in the shapes of their sites."""
        return {name: value.reshape(self._shapes[name]) for name, value in values.items()}

    def _scored(self, values: Values, minibatch: Minibatch, seed: int = 0) -> Trace:
        inside = {name: minibatch.of_these_rows(value, self._all_rows.get(name, {})) for name, value in values.items()}
        with minibatch:
            trace = self._run(inside, seed)
        with pyro.settings.context(validate_poutine=False):  # which would warn where minus infinity is the right answer
            trace.compute_log_prob()
        return trace

    def _run(self, values: Values, seed: int = 0) -> Trace:
        model = poutine.condition(self._call.program, data=dict(values))
        if self.enumerated:  # along dimensions to the left of that of the draws
            model = poutine.enum(model, first_available_dim=-self.nesting - 2)
        with seeded(seed, self._like.device):
            return self._call.of(model).trace()


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Sum at least one tensor."""
    first, *rest = terms
    return sum(rest, first)


def _agrees(score: Callable[[], Tensor], expected: Tensor) -> bool:
    """Return whether scores of all draws together are as expected."""
    try:
        return torch.allclose(score(), expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    except PartialRowsError:
        raise
    except Exception:  # a model not written for a batch may fail in any way
        return False


def _draws(values: Values, index: slice | Tensor | int) -> dict[str, Tensor]:
    """Select some draws."""
    return {name: value[index] for name, value in values.items()}


def _count(values: Values) -> int:
    return len(next(iter(values.values())))


def _plate_dims(site: Site) -> int:
    """Number of dimensions of the rows of an observed site."""
    return max(site["value"].dim() - site["fn"].event_dim, *(-frame.dim for frame in frames_of(site)), 0)  # type: ignore[operator]


def _of_all_rows(site: Site, shape: torch.Size) -> dict[str, int]:
    """Map each subsampling plate for which a value of this shape has all rows to its dimension."""
    dims = ((frame, frame.dim - site["fn"].event_dim) for frame in subsampled(site) if frame.dim is not None)
    return {frame.name: dim for frame, dim in dims if shape[dim] == frame.full_size}


def _within_subsamples(latents: Mapping[str, Site], all_rows: Mapping[str, Mapping[str, int]]) -> str:
    """Describe a site and plate whose values cover only one minibatch; "" if there are none."""
    for name, dims in all_rows.items():
        for frame in subsampled(latents[name]):
            if frame.name not in dims:
                return (
                    f"latent site {name} is drawn for {frame.size} of the {frame.full_size} rows of plate {frame.name}"
                )
    return ""


class _DrawRecorder(TorchDispatchMode):
    """Mode that records the sites for which random numbers are drawn.

    A handler within a model, such as `poutine.block`, hides a site from handlers around the model, but not its draw.

    Attributes:
        sites: Names of these sites.
        any: True if any random numbers were drawn; those of Python and numpy are detected on exit.
        largest: Size of the largest tensor that was computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sites: set[str] = set()
        self.any = False
        self.largest = 1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's compiler, which takes a second to load, is not involved

    def __enter__(self) -> Self:
        self._before = _other_states()
        return cast("Self", super().__enter__())

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.any = self.any or _other_states() != self._before

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.any = True
            if name := _site_above():
                self.sites.add(name)
        sizes = (leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.largest = max([self.largest, *sizes])
        return result


def _other_states() -> tuple[object, ...]:
    """States of the random generators of Python and numpy."""
    state = np.random.get_state(legacy=False)["state"]
    return random.getstate(), state["pos"], state["key"].tobytes()


def _site_above() -> str:
    """Return the name of the site that is being drawn further up the call stack; "" if none is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is pyro.sample.__code__:
            return str(frame.f_locals["name"])
        frame = frame.f_back
    return ""
