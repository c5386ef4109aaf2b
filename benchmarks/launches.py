"""Cost of launching kernels on a GPU: eager calls against one CUDA graph.

    python benchmarks/launches.py            # a table, in milliseconds
    python benchmarks/launches.py --sizes 6,100 --batches 100

It times a training step (loss, gradient, clipping, Adam), both directions without a gradient, and the sequential
direction with its gradient, in Triton and, without the gradient, as D steps of torch operations.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from parts.architecture import Architecture
from torch import Tensor

from pyro_maf import FlowPrior
from pyro_maf.sweep.torch_engine import layers as layers

LAYERS = 5
REPETITIONS = 40
SLOW = 0.05
"""Seconds of a call above which it is timed only three times."""
LEARNING_RATE = 1e-6

Call = Callable[[], Any]


def main() -> None:
    """Print a table of times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["6,100", "63,512"], metavar="D,H")
    parser.add_argument("--batches", nargs="+", type=int, default=[100, 1000, 10_000], metavar="B")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("launches.py is left out: torch finds no CUDA device here.")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {LAYERS} layers, ms\n")
    print("| D, H, batch | what | eager | one graph |\n| --- | --- | ---: | ---: |")
    for size in options.sizes:
        dim, hidden = map(int, size.split(","))
        for batch in options.batches:
            for what, call in calls(dim, hidden, batch).items():
                print(f"| {dim}, {hidden}, {batch} | {what} | {row(call, what)} |", flush=True)


def calls(dim: int, hidden: int, batch: int) -> dict[str, Call]:
    """The calls to time, by name."""
    flow = Architecture("MAF", dim, hidden, LAYERS).flow().cuda()
    prior = FlowPrior(flow)
    data = torch.randn(batch, dim, device="cuda")
    weights = list(flow.parameters())
    optimizer = torch.optim.Adam(weights, LEARNING_RATE, fused=True, capturable=True)

    def train() -> None:
        optimizer.zero_grad(set_to_none=False)
        (-prior.log_prob(data).mean()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 5.0)
        optimizer.step()

    def sample_backward() -> None:
        optimizer.zero_grad(set_to_none=False)
        sample = flow(data)
        (0.5 * sample.square().sum(-1) - flow.log_abs_det_jacobian(data, sample)).mean().backward()

    @torch.no_grad()
    def parallel() -> Tensor:
        return flow.with_cache(0).inv(data)

    @torch.no_grad()
    def sequential() -> Tensor:
        return flow.with_cache(0)(data)

    return {
        "training step": train,
        "parallel": parallel,
        "sequential, Triton": sequential,
        "sequential, torch": sequential,
        "sequential and gradient, Triton": sample_backward,
    }


def row(call: Call, what: str) -> str:
    """Eager and graph time of a call, as table cells."""
    with in_torch() if what.endswith("torch") else nullcontext():
        eager = milliseconds(call)
        graph = "" if what.endswith("torch") else f"{milliseconds(captured(call)):.2f}"
    return f"{eager:.2f} | {graph}"


@contextmanager
def in_torch() -> Iterator[None]:
    """Disable the Triton kernels."""
    with mock.patch.object(layers, "_has_triton", return_value=False):
        yield


def captured(call: Call) -> Call:
    """Capture the call as one CUDA graph, after three warm-up calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def milliseconds(call: Call) -> float:
    """Median time of a call on the device, after three warm-up calls."""
    times: list[float] = []
    for _ in range(REPETITIONS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        if len(times) > 5 and times[-1] > 1e3 * SLOW:
            break
    return statistics.median(times[3:])


if __name__ == "__main__":
    main()
