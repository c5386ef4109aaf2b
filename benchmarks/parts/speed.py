"""Training rows per second for the paper's networks, against each peer, and for whole epochs of `fit`."""

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
"""D and H for the paper's data sets, POWER to MNIST."""
LAYERS, BATCH = 5, 100
STEPS_OF_FIT = 40
WARM_UP = 3


def measure(size: tuple[int, int], names: list[str], seconds: float) -> dict[str, Any]:
    """Speed of a MAF of five layers with two hidden layers each: training steps in turns, then epochs of `fit`."""
    dim, hidden = size
    architecture = Architecture("MAF", dim, hidden, LAYERS)
    flow = architecture.flow()
    classes, _ = peers.find(names)
    contenders = {}
    for name, make in classes.items():
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
        "rows_per_second": {name: BATCH / statistics.median(seconds) for name, seconds in times.items()},
        "ratio": {
            name: statistics.median(one / other for one, other in zip(seconds, ours, strict=True))
            for name, seconds in times.items()
            if name != OURS
        },
        "fit_rows_per_second": _rows_per_second_of_fit(flow, dim),
    }


def _in_turns(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Processor seconds of each call, in turns; processor time excludes other users of the machine."""
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
    """Training rows per processor second of `fit`, including its averaging and a tenth as many validation rows."""
    rows = torch.randn(STEPS_OF_FIT * BATCH, dim)
    held_out = torch.randn(len(rows) // 10, dim)
    seconds = []
    for epochs in (1, 1, 3):
        started = time.process_time()
        pyro_maf.fit(
            flow, rows, validation=held_out, batch_size=BATCH, max_epochs=epochs, learning_rate=1e-6, progress=False
        )
        seconds.append(time.process_time() - started)
    # The difference between three epochs and one leaves out the cost of the first call and of preparation.
    return 2 * len(rows) / (seconds[2] - seconds[1])
