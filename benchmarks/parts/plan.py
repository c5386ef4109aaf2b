"""Plans: the tasks, the sizes and the time of a measurement."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from parts.architecture import Architecture

TASKS = {
    "log_prob": ("MAF", "log_prob of data, no gradient: the parallel direction"),
    "train": ("MAF", "training step: loss, gradient, Adam"),
    "fit": ("MAF", "a step of `fit`, with clipping and averaging, against training steps of the others"),
    "sample": ("MAF", "sampling, no gradient: the sequential direction"),
    "sample_backward": ("MAF", "sampling with log-density, and its gradient"),
    "coupling_log_prob": ("RealNVP", "RealNVP, log_prob of data, no gradient"),
    "coupling_sample": ("RealNVP", "RealNVP, sampling, no gradient"),
    "guide": ("IAF", "IAF, a guide's training step: sampling with log-density, its gradient, Adam"),
    "spline_log_prob": ("NSF", "splines, log_prob of data, no gradient"),
    "spline_train": ("NSF", "splines, training step"),
    "spline_sample": ("NSF", "splines, sampling, no gradient"),
}
"""Family and description of each task. Parallel tasks come first, since their times predict those of D passes."""

DIMS = (6, 21, 43, 63, 784)
HIDDEN = (100, 512, 1024)
SIZES = ((6, 100), (21, 100), (43, 512), (63, 512), (784, 1024))
BATCHES = (1, 100, 1000)
LAYERS = (1, 5)
SPLINE_SIZES = ((8, 100), (63, 512), (80, 512))
SPLINE_BATCHES = (100, 256)
SPLINE_LAYERS = (5,)
GUIDE_SIZES, GUIDE_BATCHES, GUIDE_LAYERS = ((6, 64),), (16,), (3,)


@dataclass(frozen=True)
class Plan:
    """Measurements of one process, with a fixed number of threads.

    Attributes:
        threads: Number of threads, and of cores that the process may use.
        sizes: Pairs of D and the width of both hidden layers.
        batches: Batch sizes.
        layers: Numbers of layers.
        spline_sizes, spline_batches, spline_layers: The same for splines.
        guide_sizes, guide_batches, guide_layers: The same for the flow of a guide.
        tasks: Names from `TASKS`.
        peers: Names from `peers.PEERS`.
        seconds: Time for a cell, shared between the contenders.
        longest_call: Seconds; a peer whose call would take longer is extrapolated, not run.
        device: "cpu" or "cuda".
        memory: D, width and batch size of the memory measurement; None for no measurement.
        update: Whether to time the first call after a change of the weights.
    """

    threads: int = 1
    sizes: tuple[tuple[int, int], ...] = SIZES
    batches: tuple[int, ...] = BATCHES
    layers: tuple[int, ...] = LAYERS
    spline_sizes: tuple[tuple[int, int], ...] = SPLINE_SIZES
    spline_batches: tuple[int, ...] = SPLINE_BATCHES
    spline_layers: tuple[int, ...] = SPLINE_LAYERS
    guide_sizes: tuple[tuple[int, int], ...] = GUIDE_SIZES
    guide_batches: tuple[int, ...] = GUIDE_BATCHES
    guide_layers: tuple[int, ...] = GUIDE_LAYERS
    tasks: tuple[str, ...] = tuple(TASKS)
    peers: tuple[str, ...] = ()
    seconds: float = 0.6
    longest_call: float = 3.0
    device: str = "cpu"
    memory: tuple[int, int, int] | None = (63, 512, 1000)
    update: bool = True

    def architectures(self) -> list[Architecture]:
        """Architectures of all families that have a task."""
        every = itertools.chain(
            itertools.product(self.sizes, self.layers, ("MAF", "RealNVP")),
            itertools.product(self.guide_sizes, self.guide_layers, ("IAF",)),
            itertools.product(self.spline_sizes, self.spline_layers, ("NSF",)),
        )
        return [
            Architecture(family, dim, hidden, layers)
            for (dim, hidden), layers, family in every
            if self.tasks_of(family)
        ]

    def batches_of(self, family: str) -> tuple[int, ...]:
        """Batch sizes for a family."""
        return {"NSF": self.spline_batches, "IAF": self.guide_batches}.get(family, self.batches)

    def tasks_of(self, family: str) -> list[str]:
        """Tasks for a family, in the order of `TASKS`."""
        return [task for task in TASKS if task in self.tasks and TASKS[task][0] == family]

    def quick(self) -> Plan:
        """The plan with one tiny size, to check that everything runs."""
        return dataclasses.replace(
            self,
            sizes=((6, 32),),
            batches=(10,),
            layers=(2,),
            spline_sizes=((6, 32),),
            spline_batches=(10,),
            spline_layers=(2,),
            guide_sizes=((6, 32),),
            guide_batches=(10,),
            guide_layers=(2,),
            seconds=0.05,
            longest_call=1.0,
            memory=(6, 32, 100),
        )

    def full(self) -> Plan:
        """The plan with every combination of sizes."""
        return dataclasses.replace(self, sizes=tuple(itertools.product(DIMS, HIDDEN)), longest_call=60.0, seconds=2.0)
