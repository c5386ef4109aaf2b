"""Estimated training cost of the paper's data sets, from the measured speed and their sizes, and on an assumed GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

from parts.report import table
from parts.speed import BATCH, LAYERS

EPOCHS = 100
"""A round number, since early stopping determines how many a fit takes."""

LAUNCH, PEAK, BANDWIDTH = 5e-6, 20e12, 1.5e12
"""Assumed GPU: seconds between kernel launches, float32 operations per second and bytes per second."""
KERNELS_A_LAYER = 100
"""Approximate number of kernels per layer of a training step, clipping included, as counted by `torch.profiler`."""
PASSES_OVER_WEIGHTS = 16
"""Number of reads and writes of all weights in a step: masks, products, gradients, Adam."""


class Cost(NamedTuple):
    """D, units of each of two hidden layers, and training rows of a data set, and the cost of a MAF (5) for it."""

    dim: int
    hidden: int
    rows: int

    @property
    def weights(self) -> int:
        """Number of weights of a MAF of five layers."""
        return LAYERS * (self.dim * self.hidden + self.hidden**2 + 2 * self.hidden * self.dim)

    @property
    def operations(self) -> int:
        """Operations of a training step per row: a multiplication and an addition per weight, in three products."""
        return 6 * self.weights

    def gpu_step(self, batch: int) -> float:
        """Seconds of a training step on the assumed GPU, bound by launches or by operations and memory."""
        arithmetic = batch * self.operations / PEAK
        memory = 4 * PASSES_OVER_WEIGHTS * self.weights / BANDWIDTH
        return max(LAYERS * KERNELS_A_LAYER * LAUNCH, arithmetic + memory)


SETS = {
    "POWER": Cost(6, 100, 1_659_917),
    "GAS": Cost(8, 100, 852_174),
    "HEPMASS": Cost(21, 512, 315_123),
    "MINIBOONE": Cost(43, 512, 29_556),
    "BSDS300": Cost(63, 512, 1_000_000),
    "MNIST": Cost(784, 1024, 50_000),
}
"""The paper's data sets and networks."""


def costs(cells: list[dict[str, Any]]) -> str:
    """Table of the data sets whose network was measured."""
    speeds = {(cell["D"], cell["H"]): cell["fit_rows_per_second"] for cell in cells}
    rows = []
    for name, cost in SETS.items():
        if (cost.dim, cost.hidden) not in speeds:
            continue
        speed = speeds[cost.dim, cost.hidden]
        epoch = cost.rows / speed
        gpu = [cost.rows / batch * cost.gpu_step(batch) for batch in (BATCH, 10 * BATCH)]
        rows.append(
            [
                name,
                f"{cost.dim}, {cost.hidden}",
                f"{cost.rows:,}",
                f"{cost.operations / 1e6:,.1f}",
                f"{speed * cost.operations / 1e9:,.1f}",
                f"{epoch:,.0f}",
                f"{EPOCHS * epoch / 3600:,.1f}",
                *(f"~{seconds:,.1f}" for seconds in gpu),
            ]
        )
    if not rows:
        return ""
    heading = ["", "D, H", "rows", "MFLOP a row", "GFLOP/s", "s an epoch", f"h, {EPOCHS} epochs"]
    heading += [f"GPU, s an epoch, batch {batch:,}" for batch in (BATCH, 10 * BATCH)]
    title = "**What the paper's sets cost**: MAF (5) by `fit` on one thread of this machine; ~ estimated, not measured"
    return f"{title}\n\n{table(heading, rows)}"
