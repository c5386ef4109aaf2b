"""Rows per second of training, ours against each peer, at the paper's networks; and what `fit` adds to its steps."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import pyro_maf
from parts import peers
from parts.architecture import Architecture
from parts.peers import OURS
from parts.peers.base import UnsupportedError

SIZES = ((6, 100), (8, 100), (21, 512), (43, 512), (63, 512), (784, 1024))
"""D and H of the paper's sets, POWER to MNIST."""
LAYERS, BATCH = 5, 100
STEPS_OF_FIT = 40
WARM_UP = 3


def measure(size: tuple[int, int], names: list[str], seconds: float) -> dict[str, Any]:
    """Training steps of a MAF of five layers with two hidden ones each, in turns; then two epochs of `fit`."""
    dim, hidden = size
    architecture = Architecture("MAF", dim, hidden, LAYERS)
    flow = architecture.flow()
    found, _ = peers.find(names)
    contenders = {}
    for name, make in found.items():
        try:
            peer = make(architecture, flow, torch.device("cpu"))
        except UnsupportedError:
            continue
        peer.set_training(True)
        batches = itertools.cycle([peer.prepare(torch.randn(BATCH, dim)) for _ in range(4)])
        contenders[name] = lambda peer=peer, batches=batches: peer.train_step(next(batches))
    times = _in_turns(contenders, seconds)
    ours = times[OURS]
    return {
        "D": dim,
        "H": hidden,
        "rows_per_second": {name: BATCH / statistics.median(own) for name, own in times.items()},
        "ratio": {
            name: statistics.median(its / our for its, our in zip(own, ours, strict=True))
            for name, own in times.items()
            if name != OURS
        },
        "fit_rows_per_second": _rows_per_second_of_fit(flow, dim),
    }


def _in_turns(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Processor seconds of each call, one of each after another: those of others who use the machine do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    ends = time.monotonic() + seconds
    rounds = itertools.count(-WARM_UP)
    while (index := next(rounds)) <= 0 or time.monotonic() < ends:
        for name, call in calls.items():
            started = time.process_time()
            call()
            if index >= 0:
                times[name].append(time.process_time() - started)
    return times


def _rows_per_second_of_fit(flow: Any, dim: int) -> float:
    """Training rows per processor second of `fit`: averaging, bookkeeping, and a tenth as many rows of validation."""
    rows = torch.randn(STEPS_OF_FIT * BATCH, dim)
    held_out = torch.randn(len(rows) // 10, dim)
    seconds = []
    for epochs in (1, 1, 3):
        started = time.process_time()
        pyro_maf.fit(
            flow, rows, validation=held_out, batch_size=BATCH, max_epochs=epochs, learning_rate=1e-6, progress=False
        )
        seconds.append(time.process_time() - started)
    # What is paid once, and not for every epoch, is in both.
    return 2 * len(rows) / (seconds[2] - seconds[1])
