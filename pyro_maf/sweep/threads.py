"""Points of a batch shared out among threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["in_parts"]

LEAST_WORK = 4_000_000
"""Multiplications that are worth waking a thread for."""

_pool: ThreadPoolExecutor | None = None


def in_parts(run: Callable[[int, int], None], points: int, together: int, work: int) -> None:
    """Call run(first, end) for parts that make up 0 .. points, side by side if the work is worth it.

    `run` lets go of the interpreter's lock. As many threads take part as torch has been given.

    Args:
        run: What to do with points first .. end - 1.
        points: How many points there are.
        together: Every part but the last has a multiple of this.
        work: Multiplications for each.
    """
    if not points:
        return
    groups = -(-points // together)
    parts = max(1, min(torch.get_num_threads(), points * work // LEAST_WORK, groups))
    edges = [min(points, groups * part // parts * together) for part in range(parts + 1)]
    pieces = list(zip(edges, edges[1:], strict=False))
    waiting = [_threads().submit(run, *piece) for piece in pieces[1:]]
    run(*pieces[0])
    for future in waiting:
        future.result()


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="pyro-maf-sweep")
    return _pool


def _forget_threads() -> None:
    """A forked process has none of its parent's threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
