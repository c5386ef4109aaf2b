"""Multithreading: points of a batch divided among threads, torch's own if these are awake; and limits for torch's."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["OneThread", "in_parts", "most_threads"]

Result = TypeVar("Result")

LEAST_WORK = 16_000_000
"""Minimum number of multiplications per thread: a second thread starts some 160 us late, the time of 9 million."""

SHARED_WORK = 2**30
"""Multiplications in the largest product of a step from which on torch's threads are worth their synchronisation."""

CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_pool: ThreadPoolExecutor | None = None
_is_forked = False


class _Local(threading.local):
    """Torch's number of threads before the outermost `OneThread` of this thread; 0 outside."""

    outside = 0


_local = _Local()


def most_threads() -> int:
    """Maximum number of threads: torch's or, inside `OneThread`, its previous number."""
    return _local.outside or torch.get_num_threads()


def in_parts(run: Callable[[int, int], Result], points: int, together: int, work: int) -> list[Result]:
    """Results of run(first, end) for parts that cover 0 .. points, in parallel if the work is worth it.

    `run` releases the interpreter's lock. The size of every part but the last is a multiple of `together`; `work` is
    the number of multiplications per point.
    """
    if not points:
        return []
    groups = -(-points // together)
    parts = min(points * work // LEAST_WORK, groups)
    if parts < 2 or (parts := min(parts, most_threads())) < 2:
        return [run(0, points)]
    edges = [min(points, groups * part // parts * together) for part in range(parts + 1)]
    waiting = enumerate(zip(edges, edges[1:], strict=False))
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def take(_: object = None) -> None:
        try:
            for part, piece in waiting:  # shared by all threads, so that each part is taken once
                results[part] = run(*piece)
        except BaseException as error:  # even Ctrl-C, which would be lost in a call from C
            errors.append(error)

    _in_threads(take, parts)
    if errors:
        raise errors[0]
    return [results[part] for part in range(parts)]


def _in_threads(take: Callable[[object], None], threads: int) -> None:
    """Call a function in `threads` threads, including this one."""
    if torch.get_num_threads() > 1 and not _is_forked and (parallel := _parallel()) is not None:
        parallel(CALLBACK(take), None, threads, 0)
        return
    others = [_threads().submit(take, None) for _ in range(threads - 1)]
    take(None)
    for other in others:
        if not other.cancel():  # a thread that starts late finds nothing to do
            other.result()


class OneThread:
    """Context manager in which torch uses one thread; the compiled engine may use as many as before.

    OpenMP's threads wait for one another at the end of each operation. If another process is busy, they wait some
    milliseconds until the system has given each its turn. On two cores, one of them busy, a step of a MADE at (63, 128)
    and 256 points took 20 times as long with two threads as with one; only products of 4 10^9 multiplications were
    even. And once woken for a small operation, they spin for milliseconds on the processors that the next walk's
    threads need.

    Args:
        work: Number of multiplications in the largest product; from 2^30 on, nothing changes.
    """

    def __init__(self, work: float = 0) -> None:
        self._is_worth_it = work < SHARED_WORK

    def __enter__(self) -> None:
        self._threads, self._outside = torch.get_num_threads(), _local.outside
        if self._is_worth_it and self._threads > 1:
            _local.outside = self._threads
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self._is_worth_it and self._threads > 1:
            _local.outside = self._outside
            torch.set_num_threads(self._threads)


@functools.cache
def _parallel() -> Callable[..., None] | None:
    """The function that runs another in the threads of torch's operations, or None if these are not GNU OpenMP's.

    After an operation, torch's threads spin for milliseconds, waiting for the next. Other threads on the same
    processors would start only after they give up: with two of them, a step with the gradient through samples at (63,
    512) and 1,000 points took as long as with one, but 0.64 of that in torch's threads. Not available in a process of
    `multiprocessing`, which may have been forked before this module could register a handler.
    """
    if multiprocessing.parent_process() is not None:
        return None
    try:
        return ctypes.CDLL(torch._C.__file__).GOMP_parallel  # from the libraries that torch itself is linked to
    except (OSError, AttributeError):
        return None


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="pyro-maf-sweep")
    return _pool


def _forget_threads() -> None:
    """Drop the pool in a forked process, which lacks its parent's threads: OpenMP would wait for its own."""
    global _pool, _is_forked
    _pool, _is_forked = None, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
