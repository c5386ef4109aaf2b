"""Times of several contenders for the same work, taken in turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

BURST = 0.004
"""Seconds for which a contender is called again and again before it is the next one's turn."""
LONGEST_BURST = 200
ROUNDS = 15
LONG = 1.0
"""Seconds of a call from which on it is not repeated."""


@dataclass
class Contender:
    """One who does the work.

    Attributes:
        name: Who.
        call: Does the work once, to its end.
        predicted: Seconds that a call should take, where that is known beforehand.
        needs: Bytes of memory that a call should take, likewise.
        compiles: Whether the first call compiles something.
    """

    name: str
    call: Callable[[], Any]
    predicted: float | None = None
    needs: int | None = None
    compiles: bool = False


@dataclass
class Times:
    """What was measured of one contender, in seconds.

    Attributes:
        rounds: The times of single calls, by the number of the round.
        predicted: What was expected of a call; all there is for one that was not run.
        note: Why it was not run, or "" if it was.
    """

    rounds: dict[int, list[float]] = field(default_factory=dict)
    predicted: float | None = None
    note: str = ""

    @property
    def measured(self) -> bool:
        """Whether it was run at all."""
        return bool(self.rounds)

    @property
    def repetitions(self) -> int:
        """Number of calls."""
        return sum(map(len, self.rounds.values()))

    @property
    def minimum(self) -> float:
        """The fastest call, or what was predicted of it."""
        return min(map(min, self.rounds.values())) if self.measured else self._expected()

    @property
    def median(self) -> float:
        """The median call, or what was predicted of it."""
        return statistics.median(itertools.chain(*self.rounds.values())) if self.measured else self._expected()

    def _expected(self) -> float:
        return float("nan") if self.predicted is None else self.predicted


def paired_ratio(times: Times, other: Times) -> float:
    """How many times as long a call takes as one of another contender: the median over the rounds of both.

    A ratio of minima would favour whoever was called more often.
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

    Each is called once before, unmeasured: what is compiled at first use is compiled then. So is the first call of each
    turn, since what others did meanwhile tells in it: caches are cold, and `fit` packs its weights anew after a step of
    anybody's optimizer, which takes 180 ms in place of 24 at (784, 1024). One whose calls are so long that a few use up
    its share of the time takes part in the first rounds only, but in one at least. Where nothing is compiled and a call
    takes a second and more, as predicted, that first one is the only one.

    Args:
        contenders: Who.
        seconds: Time for all of them together, exceeded only by what a single call of each takes.
        longest_call: A contender whose call is predicted to take longer than this is not run.
        memory: One that is predicted to need more bytes than this is not run either.
        rounds: The largest number of turns of each.
    """
    times = {contender.name: Times(predicted=contender.predicted) for contender in contenders}
    lengths: dict[str, float] = {}
    running = []
    for contender in contenders:
        own = times[contender.name]
        own.note = _reason_not_to_run(contender, longest_call, memory)
        if own.note:
            continue
        first = once(contender.call)
        if contender.predicted is not None and not contender.compiles and first > LONG:
            own.rounds[0] = [first]
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
    """Seconds that one call takes."""
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
