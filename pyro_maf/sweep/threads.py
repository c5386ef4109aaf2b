"""Points of a batch divided among threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["Alone", "in_parts"]

Result = TypeVar("Result")

LEAST_WORK = 16_000_000
"""Minimum number of multiplications for each thread: another begins some 160 us late, as long as 9 million take."""

_pool: ThreadPoolExecutor | None = None


def in_parts(run: Callable[[int, int], Result], points: int, together: int, work: int) -> list[Result]:
    """Results of run(first, end) for parts that cover 0 .. points, in parallel if the work is worth it.

    `run` releases the interpreter's lock. At most `torch.get_num_threads()` threads take part.

    Args:
        run: Processes points first .. end - 1.
        points: Number of points.
        together: Granularity: the size of every part but the last is a multiple of this.
        work: Multiplications per point.
    """
    if not points:
        return []
    groups = -(-points // together)
    parts = max(1, min(torch.get_num_threads(), points * work // LEAST_WORK, groups))
    if parts == 1:
        return [run(0, points)]
    edges = [min(points, groups * part // parts * together) for part in range(parts + 1)]
    pieces = list(zip(edges, edges[1:], strict=False))
    waiting = [_threads().submit(run, *piece) for piece in pieces[1:]]
    return [run(*pieces[0]), *[future.result() for future in waiting]]


class Alone:
    """Context in which torch computes with one thread.

    For small operations between the walks: OpenMP's threads, once woken for one, spin for milliseconds on the
    processors that the next walk's threads are to have. At (63, 512), five layers and 1,000 points a training step with
    two threads took 80 ms of processor time instead of 45, and longer than with one.
    """

    def __enter__(self) -> None:
        self._threads = torch.get_num_threads()
        if self._threads > 1:
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self._threads > 1:
            torch.set_num_threads(self._threads)


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="pyro-maf-sweep")
    return _pool


def _forget_threads() -> None:
    """Drop the pool in a forked process, which has none of its parent's threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
