"""Plates of a model: minibatches that together score all rows, and why a model fails inside a plate of draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import product
from typing import NamedTuple

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyro_maf.infer.models.model import (
    Args,
    Call,
    Frame,
    Guide,
    Kwargs,
    Site,
    Trace,
    is_subsample,
    latent_sites,
    sample_sites,
)

__all__ = [
    "Minibatch",
    "Minibatches",
    "PartialRowsError",
    "frames_of",
    "joined",
    "minibatches_of",
    "nesting_of",
    "subsampled",
    "why_alone",
]

SHAPE_ONLY = ("__get__", "__len__", "__hash__", "size", "dim", "numel")
"""Functions that depend on a tensor's shape and not on its values."""

DRAWS = 7
"""Number of draws of the trial: unlikely to equal any size of a model."""
SHOWN = 2
"""Maximum number of latent sites whose shapes are shown."""
LONGEST = 120
"""Maximum number of characters quoted from an error."""


class PartialRowsError(Exception):
    """Raised with a clause that says why the rows that a plate leaves out cannot be scored."""


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
        weights: For each plate the weight of each of its rows, in place of Pyro's factor size / batch. Without,
            the rows stand for all, and Pyro's factor stays.
        share: For a set of plates, one over the number of runs with the same rows of these plates.
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
            if frame.dim is None:  # one row after another, counted from one
                weight = weight * float(rows[frame.counter - 1])
            else:
                weight = weight * rows.reshape(-1, *(1,) * (-frame.dim - 1))
        return weight

    def of_these_rows(self, value: Tensor, dims: Mapping[str, int]) -> Tensor:
        """Select the rows of this run from a value of all rows, with plates at these dimensions of the value."""
        for name, dim in dims.items():
            value = value.index_select(dim, self._rows[name].to(value.device))
        return value


class Minibatches:
    """Runs of a model that together cover every row of its plates once.

    A row that the last minibatch of a plate shares with another has half its weight in each. Plates without a common
    site iterate side by side, so that the number of runs is the largest of theirs; others in all combinations.

    Args:
        plates: The size of each plate that subsamples, and that of its minibatch.
        together: The sets of such plates around single sites.
        most: Maximum number of minibatches of a plate; of more, these stand for those left out.
        like: A tensor of the dtype and device of the weights.
    """

    def __init__(
        self, plates: Mapping[str, Subsampled], together: Iterable[frozenset[str]], most: float, like: Tensor
    ) -> None:
        self._plates = {name: _split(plate, most, like) for name, plate in plates.items()}
        self._groups = joined([*together, *(frozenset([name]) for name in plates)])
        self._combinations = [
            list(product(*(range(len(self._plates[name])) for name in sorted(group)))) for group in self._groups
        ]
        self.count = max(map(len, self._combinations), default=1)

    def __iter__(self) -> Iterator[Minibatch]:
        for run in range(self.count):
            chosen = {
                name: self._plates[name][index]
                for group, combinations in zip(self._groups, self._combinations, strict=True)
                for name, index in zip(sorted(group), combinations[run % len(combinations)], strict=True)
            }
            rows = {name: pair[0] for name, pair in chosen.items()}
            weights = {name: pair[1] for name, pair in chosen.items()}
            yield Minibatch(rows, weights, partial(self._share, run))

    def _share(self, run: int, plates: frozenset[str]) -> float:
        for group, combinations in zip(self._groups, self._combinations, strict=True):
            if plates and plates <= group:
                times = len(range(run % len(combinations), self.count, len(combinations)))
                return 1 / times / math.prod(len(self._plates[name]) for name in group - plates)
        return 1 / self.count


def _split(plate: Subsampled, most: float, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Split a plate into minibatches: rows, in random order, and their weights."""
    # Random, since rows are often sorted, and a part of the minibatches may have to stand for the others.
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
    run: Callable[[], Trace], sites: Iterable[Site], like: Tensor, most: float = math.inf
) -> tuple[Iterable[Minibatch], str]:
    """Return the minibatches that score all rows of a model, and "".

    If its rows cannot be chosen, return one minibatch that stands for all, and the reason as a clause; if no plate
    subsamples, a single one.

    Args:
        run: A function that runs the model.
        sites: Its sites, from a trace.
        like, most: As in `Minibatches`.
    """
    if not any(map(subsampled, sites)):
        return (Minibatch({}),), ""
    recorder = _SubsampleRecorder()
    with recorder, _UseRecorder(recorder):
        trace = run()
    frames = [subsampled(site) for site in sample_sites(trace).values()]
    plates = {frame.name: Subsampled(int(frame.full_size or 0), int(frame.size)) for each in frames for frame in each}
    try:
        recorder.check(plates)
    except PartialRowsError as reason:
        return (Minibatch(recorder.rows),), str(reason)
    return Minibatches(plates, (frozenset(frame.name for frame in each) for each in frames), most, like), ""


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
                raise PartialRowsError(f"plate {name} stands outside the model, with {part}")
            if name in self._passed:
                raise PartialRowsError(f"plate {name} is handed {part} as subsample=")
            if name not in self.used:
                raise PartialRowsError(f"plate {name} draws {part}, but the model does not look at which")
        if empty := sorted(self._partial - plates.keys()):
            raise PartialRowsError(f"plate {empty[0]} subsamples, and no site is in it")


class _UseRecorder(TorchFunctionMode):
    """Mode that records which plates' indices enter a function of torch, such as that of `data[rows]`."""

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


@torch.no_grad()
def why_alone(call: Call, guide: Guide, drawn: Trace, single: Trace) -> str:
    """Describe the failure of a model that is run for several draws of its guide at once, and name the site.

    Args:
        call: The model with its arguments.
        guide: Its guide.
        drawn, single: Traces of the guide for one draw, and of the model with its values.

    Returns:
        A clause such as "with 7 draws at once site y has batch shape (7, 1, 20), expected (7, 20)"; "" if nothing
        fails, as for a density that is NaN in any case.
    """
    trial = _Trial(single, max(nesting_of(single), nesting_of(drawn)))
    try:
        with trial.plate():
            draws = call.of(guide).trace()
            with trial:
                many = call.replayed(draws)
        failure = trial.wrong_shape() or trial.wrong_density(call, many)
    except Exception as error:  # a model that was never meant for a batch may fail in any way
        failure = trial.wrong_shape() or trial.raised(error)
    return f"with {DRAWS} draws at once {failure}" if failure else ""


class _Trial(Messenger):
    """Handler of a run inside a plate of draws: records its sample sites, and compares them with those of one draw.

    Args:
        single: A trace of the model for one draw.
        nesting: Number of dimensions of the plates of model and guide.
    """

    def __init__(self, single: Trace, nesting: int) -> None:
        super().__init__()
        self._single, self._latents, self._nesting = sample_sites(single), latent_sites(single), nesting
        self._batches: dict[str, torch.Size] = {}
        self._values: dict[str, torch.Size] = {}

    def plate(self) -> pyro.plate:
        """Return the plate of the draws."""
        return pyro.plate("_draws", DRAWS, dim=-self._nesting - 1)

    def _pyro_sample(self, msg: Site) -> None:
        if hasattr(msg["fn"], "batch_shape"):
            self._batches[msg["name"]] = msg["fn"].batch_shape

    def _pyro_post_sample(self, msg: Site) -> None:
        if isinstance(msg["value"], Tensor):
            self._values[msg["name"]] = msg["value"].shape

    def wrong_shape(self) -> str:
        """Name the sites whose batch shape does not broadcast to the expected one; "" if there are none."""
        return " and ".join(
            f"site {name} has batch shape {tuple(batch)}, expected {tuple(expected)}"
            for name, batch in self._batches.items()
            if name in self._single and not _broadcasts(batch, expected := self._expected(name))
        )

    def wrong_density(self, call: Call, many: Trace) -> str:
        """Name the sites whose log-density differs between all draws together and the first of them alone."""
        sites = sample_sites(many)
        shapes = {name: site["value"].shape for name, site in self._latents.items()}
        alone = call.conditioned({name: _first(sites[name]["value"]).reshape(shapes[name]) for name in shapes})
        for trace in (alone, many):
            trace.compute_log_prob()
        wrong = [
            name
            for name, site in sample_sites(alone).items()
            if name in sites
            and not torch.allclose(
                _first(sites[name]["log_prob"]).sum(), site["log_prob_sum"], rtol=1e-3, atol=1e-3, equal_nan=True
            )
        ]
        number = "site {} has" if len(wrong) == 1 else "sites {} have"
        return (
            f"{number.format(', '.join(wrong))} another density than for each draw alone{self._shapes()}"
            if wrong
            else ""
        )

    def raised(self, error: Exception) -> str:
        """Say which error the model raised, and before which site."""
        missing = (
            name
            for name, site in self._single.items()
            if hasattr(site["fn"], "batch_shape") and name not in self._values
        )
        name = next(missing, None)
        before = f" before site {name}, whose batch shape should be {tuple(self._expected(name))}" if name else ""
        message = str(error).partition("\n")[0][:LONGEST].rstrip(".")
        return f"it raises {type(error).__name__}{before}{self._shapes()}: {message}"

    def _expected(self, name: str) -> torch.Size:
        """Return the expected batch shape of a site for several draws."""
        alone = self._single[name]["fn"].batch_shape
        return torch.Size([DRAWS, *[1] * (self._nesting - len(alone)), *alone])

    def _shapes(self) -> str:
        """Format the shapes of the last latent sites of the run, together and alone, in brackets."""
        run = [(name, site) for name, site in self._latents.items() if name in self._values]
        shapes = [
            f"there {name} has shape {tuple(self._values[name])}, alone {tuple(site['value'].shape)}"
            for name, site in run[-SHOWN:]
        ]
        return f" ({'; '.join(shapes)})" if shapes else ""


def _first(draws: Tensor) -> Tensor:
    """Return the first of several draws, which may be one for all."""
    return draws.expand(DRAWS, *draws.shape[1:])[0]


def _broadcasts(batch: torch.Size, expected: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(batch, expected) == expected
    except RuntimeError:
        return False
