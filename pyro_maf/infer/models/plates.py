"""Plates of a model, and the minibatches that together score all rows of subsampling plates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyro_maf.infer.models.model import (
    Args,
    Frame,
    Kwargs,
    Site,
    Trace,
    is_subsample,
    sample_sites,
)

__all__ = [
    "Minibatch",
    "PartialRowsError",
    "frames_of",
    "joined",
    "minibatches_of",
    "nesting_of",
    "subsampled",
]

SHAPE_ONLY = ("__get__", "__len__", "__hash__", "size", "dim", "numel")
"""Functions that depend on a tensor's shape but not on its values."""


class PartialRowsError(Exception):
    """Raised with a clause that explains why the rows that a plate leaves out cannot be scored."""


class Subsampled(NamedTuple):
    """A plate that draws `batch` of `size` rows."""

    size: int
    batch: int


def frames_of(site: Site) -> list[Frame]:
    """Return the vectorised plates around a site."""
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def subsampled(site: Site) -> list[Frame]:
    """Return the plates around a site, vectorised or not, that subsample in this run."""
    return [frame for frame in site["cond_indep_stack"] if frame.full_size not in (None, frame.size)]


def nesting_of(trace: Trace) -> int:
    """Number of dimensions, from the right, of the plates of a trace."""
    frames = (frame for site in sample_sites(trace).values() for frame in site["cond_indep_stack"])
    return max((-frame.dim for frame in frames if frame.dim is not None), default=0)


class Minibatch(Messenger):
    r"""Handler of one run: sets the rows of each plate, and weights each site by its share of the whole.

    Args:
        rows: The rows of each plate.
        weights: For each plate the weight of each of its rows, replacing Pyro's factor size / batch. By default the
            rows represent all, and Pyro's factor is used.
        share: Maps a set of plates to one over the number of runs with the same rows of these plates.
    """

    def __init__(
        self,
        rows: Mapping[str, Tensor],
        weights: Mapping[str, Tensor] | None = None,
        share: Callable[[frozenset[str]], float] = lambda plates: 1.0,
    ) -> None:
        super().__init__()
        self._rows, self._weights, self._share = rows, weights, share

    def _pyro_sample(self, msg: Site) -> None:
        if not is_subsample(msg) or msg["value"] is not None:
            return
        name, plate = msg["name"], msg["fn"]
        if name in self._rows and len(self._rows[name]) == min(plate.subsample_size or plate.size, plate.size):
            msg["value"], msg["done"] = self._rows[name].to(plate.device), True
        elif self._weights is not None and plate.subsample_size is not None and plate.subsample_size < plate.size:
            raise PartialRowsError(f"plate {name} comes with another size from run to run")

    def weight(self, frames: Iterable[Frame]) -> Tensor | float:
        """Weight of the log-density of a site in these plates, in the shape of the plates."""
        weights = self._weights or {}
        inside = [frame for frame in frames if frame.name in weights]
        weight: Tensor | float = self._share(frozenset(frame.name for frame in inside))
        for frame in inside:
            rows = weights[frame.name]
            if frame.dim is None:  # a sequential plate, whose counter starts at one
                weight = weight * float(rows[frame.counter - 1])
            else:
                weight = weight * rows.reshape(-1, *(1,) * (-frame.dim - 1))
        return weight

    def of_these_rows(self, value: Tensor, dims: Mapping[str, int]) -> Tensor:
        """Select the rows of this run from a value of all rows, whose plates are at these dimensions."""
        for name, dim in dims.items():
            value = value.index_select(dim, self._rows[name].to(value.device))
        return value


def _covering(
    plates: Mapping[str, Subsampled], together: Iterable[frozenset[str]], most: float, like: Tensor
) -> list[Minibatch]:
    """Return runs of a model that together cover every row of its plates once.

    A row that the last minibatch of a plate shares with another has half its weight in each. Plates without a common
    site iterate in parallel, so that the number of runs is the largest of theirs; others iterate in all combinations.

    Args:
        plates: The subsampling plates.
        together: The sets of such plates around single sites.
        most, like: As in `minibatches_of`.
    """
    parts = {name: _split(plate, most, like) for name, plate in plates.items()}
    groups = joined([*together, *(frozenset([name]) for name in plates)])
    combinations = [list(product(*(parts[name] for name in sorted(group)))) for group in groups]
    count = max(map(len, combinations), default=1)

    def share(run: int, inside: frozenset[str]) -> float:
        for group, chosen in zip(groups, combinations, strict=True):
            if inside and inside <= group:
                times = len(range(run % len(chosen), count, len(chosen)))
                return 1 / times / math.prod(len(parts[name]) for name in group - inside)
        return 1 / count

    minibatches = []
    for run in range(count):
        rows: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for group, chosen in zip(groups, combinations, strict=True):
            for name, part in zip(sorted(group), chosen[run % len(chosen)], strict=True):
                rows[name], weights[name] = part
        minibatches.append(Minibatch(rows, weights, partial(share, run)))
    return minibatches


def _split(plate: Subsampled, most: float, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Split a plate into minibatches of rows, in random order, with their weights."""
    # Random, since rows are often sorted, and some of the minibatches may have to represent the others.
    order = torch.randperm(plate.size, generator=torch.Generator().manual_seed(0))
    starts = [min(start, plate.size - plate.batch) for start in range(0, plate.size, plate.batch)]
    starts = starts[: int(min(most, len(starts)))]
    times = torch.zeros(plate.size)
    for start in starts:
        times[start : start + plate.batch] += 1
    scale = plate.batch / int((times > 0).sum())
    minibatches = []
    for start in starts:
        part = slice(start, start + plate.batch)
        rows, places = order[part].sort()  # a model may select them by a mask
        minibatches.append((rows, (scale / times[part])[places].to(like)))
    return minibatches


def joined(sets: Iterable[frozenset[str]]) -> list[frozenset[str]]:
    """Merge sets that have an element in common."""
    result: list[frozenset[str]] = []
    for each in sets:
        apart = [other for other in result if not other & each]
        result = [*apart, each.union(*(other for other in result if other & each))] if each else result
    return result


def minibatches_of(
    run: Callable[[], Trace], sites: Iterable[Site], like: Tensor, most: float
) -> tuple[list[Minibatch], str]:
    """Return the minibatches that score all rows of a model, and "".

    If its rows cannot be chosen, return one minibatch that represents all, and the reason as a clause; if no plate
    subsamples, a single minibatch.

    Args:
        run: A function that runs the model.
        sites: Its sites, from a trace.
        like: A tensor with the dtype and device of the weights.
        most: Maximum number of minibatches of a plate; if there are more, these represent the others.
    """
    if not any(map(subsampled, sites)):
        return [Minibatch({})], ""
    recorder = _SubsampleRecorder()
    with recorder, _UseRecorder(recorder):
        trace = run()
    frames = [subsampled(site) for site in sample_sites(trace).values()]
    plates = {frame.name: Subsampled(int(frame.full_size or 0), int(frame.size)) for each in frames for frame in each}
    try:
        recorder.check(plates)
    except PartialRowsError as reason:
        return [Minibatch(recorder.rows)], str(reason)
    return _covering(plates, (frozenset(frame.name for frame in each) for each in frames), most, like), ""


class _SubsampleRecorder(Messenger):
    """Handler that records the plates that draw their rows, and which of these indices the model uses."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Tensor] = {}
        self.used: set[str] = set()
        self._partial: set[str] = set()
        self._passed: set[str] = set()

    def _pyro_sample(self, msg: Site) -> None:
        if is_subsample(msg) and msg["value"] is not None:
            self._passed.add(msg["name"])

    def _pyro_post_sample(self, msg: Site) -> None:
        if is_subsample(msg):
            self.rows[msg["name"]] = msg["value"]
            if len(msg["value"]) < msg["fn"].size:
                self._partial.add(msg["name"])

    def check(self, plates: Mapping[str, Subsampled]) -> None:
        """Raise if the rows of a plate are not drawn by the model."""
        for name, plate in plates.items():
            part = f"{plate.batch} of its {plate.size} rows"
            if name not in self.rows:
                raise PartialRowsError(f"plate {name} is outside the model, with {part}")
            if name in self._passed:
                raise PartialRowsError(f"plate {name} gets {part} as subsample=")
            if name not in self.used:
                raise PartialRowsError(f"plate {name} draws {part}, but the model ignores which")
        if empty := sorted(self._partial - plates.keys()):
            raise PartialRowsError(f"plate {empty[0]} subsamples, and no site is in it")


class _UseRecorder(TorchFunctionMode):
    """Mode that records which plates' indices enter a torch function, such as `data[rows]`."""

    def __init__(self, recorder: _SubsampleRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in SHAPE_ONLY:
            inputs = {id(value) for value in tree_leaves((args, kwargs))}
            self._recorder.used.update(name for name, rows in self._recorder.rows.items() if id(rows) in inputs)
        return func(*args, **kwargs)
