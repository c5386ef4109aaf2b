"""Walks through a model's prior: a step at each latent site, in the order of the model, for one draw or many."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_maf.infer.models.latents import Latents, Part
from pyro_maf.infer.models.mapped import mapped
from pyro_maf.infer.models.model import FAILURES, Call, Site

__all__ = ["WAYS", "Step", "Way", "run_with", "walk"]

Rule = Callable[[str, TorchDistribution], Tensor]
"""Maps a latent site's name and its distribution in this run to its value."""

Pieces = Mapping[str, Tensor]
"""The unconstrained value of each site."""

Results = dict[str, tuple[Tensor, Tensor]]
"""Two tensors for each site."""

Step = Callable[[Part, Tensor, TorchDistribution | None], tuple[Tensor, tuple[Tensor, Tensor]]]
"""Maps a site's part of a vector, and its distribution if it has one, to its value and the results of the step."""

Way = tuple[bool, bool]
"""A way to run a model for many draws: whether under `vmap`, and whether it then writes into tensors."""

WAYS: tuple[Way, ...] = ((False, False), (True, False), (True, True))


def walk(latents: Latents, vectors: Tensor, call: Call, step: Step, way: Way, strict: bool = False) -> Results:
    """Take a step at each site of vectors, in the shape that `Latents.split` takes; return the results of all steps.

    Draws are batch dimensions, or the model and the step are run under `vmap` and see one draw at a time.

    Args:
        latents: The layout of the latent vector.
        vectors: The vectors.
        call: The model with its arguments.
        step: The step; its results start with the dimensions of its part of the vectors.
        way: How the model is run for many draws.
        strict: Whether to raise an error of the model. If not, sites after it have no distribution, at that draw.
    """
    pieces = {part.site["name"]: piece for part, piece in latents.split(vectors)}
    walk_together = partial(_walk_once, latents, call, step)
    is_mapped, writes = way
    if not is_mapped or vectors.dim() == 1:
        return _halved(walk_together, pieces, len(vectors) if vectors.dim() > 1 + latents.nesting else 1, strict)

    def walk_each(pieces: Pieces, strict: bool) -> Results:
        if all(len(piece) == 1 for piece in pieces.values()):
            alone = walk_together({name: piece[0] for name, piece in pieces.items()}, strict)
            return {name: (one[None], other[None]) for name, (one, other) in alone.items()}
        results, is_valid = mapped(walk_together, pieces, writes=writes)
        if not bool(is_valid.all()):
            raise ValueError("the prior is not a distribution at some draws")
        return results

    lead = vectors.shape[:-1]
    pieces = {name: piece.reshape(-1, *latents.parts[name].shape) for name, piece in pieces.items()}
    results = _halved(walk_each, pieces, lead.numel(), strict)
    leads = {name: lead[: max(0, len(lead) - len(latents.parts[name].plates))] for name in results}
    return {
        name: (one.reshape(leads[name] + one.shape[1:]), other.reshape(leads[name] + other.shape[1:]))
        for name, (one, other) in results.items()
    }


def _walk_once(latents: Latents, call: Call, step: Step, pieces: Pieces, strict: bool = True) -> Results:
    """Walk in one run of the model."""
    results: Results = {}

    def value_of(name: str, fn: TorchDistribution | None) -> Tensor:
        value, results[name] = step(latents.parts[name], pieces[name], fn)
        return value

    try:
        run_with(call, pieces, value_of)
    except FAILURES:
        if strict:
            raise
    for name in pieces.keys() - results.keys():  # also if a branch of the model lacks a site
        value_of(name, None)
    return results


def _halved(walk: Callable[[Pieces, bool], Results], pieces: Pieces, draws: int, strict: bool) -> Results:
    """Walk for all draws together or, if the model raises, for each half of them."""
    try:
        return walk(pieces, strict or draws > 1)
    except FAILURES:
        if strict:
            raise
    halves = ({name: piece.tensor_split(2)[half] for name, piece in pieces.items()} for half in (0, 1))
    sizes = (draws + 1) // 2, draws // 2
    first, second = (_halved(walk, half, size, strict) for half, size in zip(halves, sizes, strict=True))
    return {
        name: (torch.cat([one, second[name][0]]), torch.cat([other, second[name][1]]))
        for name, (one, other) in first.items()
    }


class _AllValuedError(Exception):
    """Raised in a run of a model once all latent sites have values: the rest of it is not needed."""


class _Walk(Messenger):
    """Handler that sets the values of latent sites by a rule, in the order of the model."""

    def __init__(self, names: Collection[str], rule: Rule) -> None:
        super().__init__()
        self._missing, self._rule = set(names), rule

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self._missing and not msg["is_observed"]:
            self._missing.remove(msg["name"])
            msg["value"], msg["done"] = self._rule(msg["name"], msg["fn"]), True
            if not self._missing:
                raise _AllValuedError


def run_with(call: Call, names: Collection[str], rule: Rule) -> None:
    """Run a model up to its last latent site, hidden from outer handlers, with values of latent sites from a rule."""
    with poutine.block(), suppress(_AllValuedError), _Walk(names, rule):
        call()
