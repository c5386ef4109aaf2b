"""Measurements of a plan in one process: a cell holds the times of all contenders for one task and size."""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from parts.architecture import Architecture, check_same_network, dense_pass
from parts.peers import OURS, Peer, UnsupportedError
from parts.peers.ours import Ours
from parts.plan import TASKS, Plan
from parts.timing import Contender, Times, once, paired_ratio, take_turns

DENSE = "dense pass"
METHODS = {
    "log_prob": "log_prob",
    "train": "train_step",
    "fit": "fit_step",
    "sample": "sample",
    "sample_backward": "sample_and_differentiate",
    "coupling_log_prob": "log_prob",
    "coupling_sample": "sample",
    "guide": "guide_step",
    "spline_log_prob": "log_prob",
    "spline_train": "train_step",
    "spline_sample": "sample",
}
PARALLEL_TWIN = {"sample": "log_prob", "sample_backward": "train", "spline_sample": "spline_log_prob"}
"""The parallel task whose time, multiplied by D, predicts that of a sequential task done by D passes."""
TRAINING = ("train", "fit", "sample_backward", "guide", "spline_train")
AFFINE = "affine"
"""Our flow of the same size with affine maps in place of splines."""
SHARE_OF_MEMORY = 0.5
INPUTS = 3
UPDATES, UPDATE_BATCH = 30, 100

Cell = dict[str, Any]


def cells(plan: Plan, peers: dict[str, type[Peer]], memory: float) -> Iterator[Cell]:
    """Measure the plan, cell by cell.

    Args:
        plan: Sizes, tasks and limits.
        peers: Classes of the peers, by name.
        memory: Bytes of free memory.
    """
    for architecture in plan.architectures():
        flow = architecture.flow()
        built: dict[str, Peer] = {}
        notes = {}
        for name, peer in peers.items():
            if architecture.family not in peer.families:
                continue
            try:
                built[name] = peer(architecture, flow, torch.device(plan.device))
            except UnsupportedError as reason:
                notes[name] = f"has no such flow: {reason}"
                continue
            if architecture.family != "NSF":  # each package parametrises splines differently
                check_same_network(flow, built[name].outputs, name)
        if architecture.family == "NSF":
            affine = architecture._replace(family="MAF")
            built[AFFINE] = Ours(affine, affine.flow(), torch.device(plan.device))
        dense = dense_pass(flow, torch.device(plan.device))
        for batch in plan.batches_of(architecture.family):
            fastest: dict[tuple[str, str], float] = {}
            for task in plan.tasks_of(architecture.family):
                contenders = [
                    _contender(name, peer, task, batch, fastest.get((name, PARALLEL_TWIN.get(task, ""))))
                    for name, peer in built.items()
                ]
                contenders.append(Contender(DENSE, _on_noise(dense, architecture, batch, plan.device)))
                times = take_turns(
                    contenders,
                    seconds=plan.seconds,
                    longest_call=plan.longest_call,
                    memory=SHARE_OF_MEMORY * memory,
                )
                fastest.update({(name, task): each.minimum for name, each in times.items()})
                yield {
                    "threads": plan.threads,
                    "task": task,
                    "D": architecture.dim,
                    "H": architecture.hidden,
                    "layers": architecture.layers,
                    "batch": batch,
                    "times": {name: _entry(each, times) for name, each in times.items()},
                    "notes": notes,
                }
        del built
        gc.collect()


def updates(plan: Plan) -> Iterator[dict[str, Any]]:
    """Time of the first call after all weights changed, against the next call."""
    for dim, hidden in plan.sizes:
        architecture = Architecture("MAF", dim, hidden, 1)
        ours = Ours(architecture, architecture.flow(), torch.device(plan.device))
        batch = min(UPDATE_BATCH, max(plan.batches))
        sample = _contender(OURS, ours, "sample", batch, None).call
        first, warm = [], []
        for _ in range(UPDATES + 1):
            ours.change_weights()
            first.append(once(sample))
            warm.append(once(sample))
        first, warm = first[1:], warm[1:]  # the very first call may compile
        yield {
            "threads": plan.threads,
            "D": dim,
            "H": hidden,
            "batch": batch,
            "first": statistics.median(first),
            "warm": statistics.median(warm),
            "ratio": statistics.median(a / b for a, b in zip(first, warm, strict=True)),
        }


def _contender(name: str, peer: Peer, task: str, batch: int, one_pass: float | None) -> Contender:
    peer.set_training(task in TRAINING)
    method = getattr(peer, METHODS[task])
    inputs = itertools.cycle(_inputs(peer, peer.architecture.dim, batch))
    contender = Contender(name, lambda: method(next(inputs)), compiles=peer.compiles)
    if one_pass is not None and name not in (OURS, AFFINE):
        contender.predicted = peer.architecture.dim * one_pass
        if task == "sample_backward":
            contender.needs = peer.architecture.dim * peer.architecture.layers * peer.bytes_per_pass(batch)
    return contender


def _inputs(peer: Peer, dim: int, batch: int) -> list[Any]:
    """Several inputs to cycle through, since some packages cache results for the last one."""
    generator = torch.Generator().manual_seed(1)
    return [peer.prepare(torch.randn(batch, dim, generator=generator)) for _ in range(INPUTS)]


def _on_noise(dense: Callable[..., None], architecture: Architecture, batch: int, device: str) -> Callable[[], None]:
    noise = torch.randn(batch, architecture.dim, generator=torch.Generator().manual_seed(1)).to(device)

    def run() -> None:
        with torch.no_grad():
            dense(noise)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def _entry(each: Times, times: dict[str, Times]) -> dict[str, Any]:
    return {
        "measured": each.measured,
        "minimum": each.minimum,
        "median": each.median,
        "repetitions": each.repetitions,
        "predicted": each.predicted,
        "over_ours": paired_ratio(each, times[OURS]),
        "over_dense": paired_ratio(each, times[DENSE]),
        "note": each.note,
    }


def describe(task: str) -> str:
    """Description of a task."""
    return TASKS[task][1]
