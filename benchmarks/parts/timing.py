"""Times of several contenders for the same work, taken in turns so that disturbances affect all of them."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

BURST = 0.004
"""Seconds of repeated calls in one contender's turn."""
LONGEST_BURST = 200
ROUNDS = 15
LONG = 1.0
"""Seconds of a call above which it is not repeated."""


@dataclass
class Contender:
    """An implementation of the work to time.

    Attributes:
        name: Name of the package or method.
        call: Function that does the work once and returns when it is done.
        predicted: Predicted seconds of a call, if any.
        needs: Predicted bytes of memory of a call, if any.
        compiles: Whether the first call compiles something.
    """

    name: str
    call: Callable[[], Any]
    predicted: float | None = None
    needs: int | None = None
    compiles: bool = False


@dataclass
class Times:
    """Times of one contender, in seconds.

    Attributes:
        rounds: Times of single calls, by round.
        predicted: Predicted time of a call, if any; used for a contender that was not run.
        note: Reason for not running it, or "".
    """

    rounds: dict[int, list[float]] = field(default_factory=dict)
    predicted: float | None = None
    note: str = ""

    @property
    def measured(self) -> bool:
        """Whether it was run."""
        return bool(self.rounds)

    @property
    def repetitions(self) -> int:
        """Number of calls."""
        return sum(map(len, self.rounds.values()))

    @property
    def minimum(self) -> float:
        """Time of the fastest call, or the prediction."""
        return min(map(min, self.rounds.values())) if self.measured else self._expected()

    @property
    def median(self) -> float:
        """Median time of a call, or the prediction."""
        return statistics.median(itertools.chain(*self.rounds.values())) if self.measured else self._expected()

    def _expected(self) -> float:
        return float("nan") if self.predicted is None else self.predicted


def paired_ratio(times: Times, other: Times) -> float:
    """Median over common rounds of the ratio of median times; without common rounds, the ratio of medians.

    A ratio of minima would favour the contender with more calls.
    """
    common = times.rounds.keys() & other.rounds.keys()
    if not common:
        return times.median / other.median
    return statistics.median(
        statistics.median(times.rounds[index]) / statistics.median(other.rounds[index]) for index in common
    )


def take_turns(
    contenders: Sequence[Contender],
    *,
    seconds: float,
    longest_call: float,
    memory: float = float("inf"),
    rounds: int = ROUNDS,
) -> dict[str, Times]:
    """Time every contender, in turns.

    Each contender is called once beforehand, unmeasured, to compile. The first call of each turn is not measured
    either, since it pays for the other contenders: caches are cold, and `fit` repacks its weights after a step of any
    optimizer, 180 ms instead of 24 at (784, 1024). A contender with long calls takes part in the first rounds only, but
    in at least one. If nothing is compiled and a predicted call takes more than a second, its first call is the only
    one and counts.

    Args:
        contenders: The contenders.
        seconds: Time for all contenders together, except that each has at least one round.
        longest_call: Seconds; a contender whose predicted time is longer is not run.
        memory: Bytes; a contender that is predicted to need more is not run.
        rounds: Maximum number of turns of each contender.

    Returns:
        Times of each contender, by name.
    """
    times = {contender.name: Times(predicted=contender.predicted) for contender in contenders}
    lengths: dict[str, float] = {}
    running = []
    for contender in contenders:
        measured = times[contender.name]
        measured.note = _reason_not_to_run(contender, longest_call, memory)
        if measured.note:
            continue
        first = once(contender.call)
        if contender.predicted is not None and not contender.compiles and first > LONG:
            measured.rounds[0] = [first]
        else:
            lengths[contender.name] = once(contender.call)
            running.append(contender)
    share = seconds / max(1, len(running))
    spent = dict.fromkeys(lengths, 0.0)
    for index in range(rounds):
        for contender in running:
            name = contender.name
            if index == 0 or spent[name] + max(BURST, lengths[name]) <= share:
                calls = min(LONGEST_BURST, max(1, round(BURST / lengths[name])))
                times[name].rounds[index] = burst = _burst(contender.call, calls)
                spent[name] += lengths[name] + sum(burst)
    return times


def once(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _reason_not_to_run(contender: Contender, longest_call: float, memory: float) -> str:
    if contender.needs is not None and contender.needs > memory:
        return f"not run: would keep about {contender.needs / 2**30:.0f} GiB for its gradient"
    if contender.predicted is not None and contender.predicted > longest_call:
        return f"not run: a call would take about {contender.predicted:.0f} s"
    return ""


def _burst(call: Callable[[], Any], calls: int) -> list[float]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        call()
        return [once(call) for _ in range(calls)]
    finally:
        if collecting:
            gc.enable()
