"""Peak memory of sampling and its gradient, in one process per contender, which prints the bytes.

    python -m parts.memory D H ROWS NAME [NAME ...]

NAME is one of `peers.PEERS`, "pyro-maf", or "D passes" for the plain loop.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from parts.architecture import Architecture, network_of
from parts.peers import OURS, find
from pyro_maf.transforms import Stack

LOOP = "D passes"
# The allocator returns memory at once, so that freed blocks, once reused, do not hide later growth.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def measured(names: list[str], dim: int, hidden: int, batch: int) -> dict[str, int]:
    """Peak growth in bytes of each contender's process; contenders that fail are left out."""
    command = [sys.executable, "-m", "parts.memory", *map(str, (dim, hidden, batch)), OURS, LOOP, *names]
    folder, environment = Path(__file__).resolve().parents[1], os.environ | ALLOCATOR
    process = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    lines = (line.rsplit(maxsplit=1) for line in process.stdout.splitlines())
    return {name: int(grown) for name, grown in lines}


def d_passes(flow: Stack) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The usual sampling loop: one network pass per dimension, of which a single output is used."""

    def run(noise: Tensor) -> tuple[Tensor, Tensor]:
        total = noise.new_zeros(len(noise))
        for layer in flow:
            columns = list(torch.zeros_like(noise).unbind(-1))
            for index in layer.order.tolist():
                outputs = network_of(layer).parameters_of(torch.stack(columns, -1))[:, index]
                columns[index], log_derivative = layer.univariate.forward(noise[:, index], outputs)
                total = total + log_derivative
            noise = torch.stack(columns, -1)
        return noise, total

    return run


def growth(work: Callable[[], object]) -> int:
    """Peak growth of this process in bytes during a call."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        # The peak cannot be reset, so only the first call can be measured.
        before = _largest_so_far()
        work()
        return _largest_so_far() - before
    work()  # compiles, and fills caches
    gc.collect()
    _trim()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return _status("VmHWM") - before


def _largest_so_far() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def _trim() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


def main(dim: int, hidden: int, batch: int, names: list[str]) -> None:
    """Print the bytes of each contender, measured in a fork of this process, so that shared imports do not count."""
    for name in names:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            print(name, _grown(name, dim, hidden, batch), flush=True)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)


def _grown(name: str, dim: int, hidden: int, batch: int) -> int:
    """Peak growth in bytes of one contender in this process."""
    torch.set_num_threads(1)
    architecture = Architecture("MAF", dim, hidden, 1)
    flow = architecture.flow()
    noise = torch.randn(batch, dim)
    if name == LOOP:
        run = d_passes(flow)

        def work() -> None:
            flow.zero_grad()
            data, log_det = run(noise)
            (0.5 * data.square().sum(-1) - log_det).mean().backward()

    else:
        peers, _ = find([name] if name != OURS else [])
        peer = peers[name](architecture, flow, torch.device("cpu"))
        # Pyro caches the result for a tensor and cannot differentiate it twice.
        inputs = itertools.cycle([peer.prepare(noise), peer.prepare(noise)])

        def work() -> None:
            peer.sample_and_differentiate(next(inputs))

    return growth(work)


if __name__ == "__main__":
    sizes = [int(number) for number in sys.argv[1:4]]
    main(sizes[0], sizes[1], sizes[2], sys.argv[4:])
