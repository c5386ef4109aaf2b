"""What the paper's own sets cost, on paper: measured training speed times their sizes, and an estimate for a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

from parts.report import table
from parts.speed import BATCH, LAYERS

EPOCHS = 100
"""A round number: how many a fit takes is up to its early stopping."""

LAUNCH, PEAK, BANDWIDTH = 5e-6, 20e12, 1.5e12
"""Assumed of a GPU: seconds between the starts of two kernels, float32 operations and bytes a second."""
KERNELS_A_LAYER = 100
"""About as many as `torch.profiler` counts of one layer in a training step, clipping included."""
PASSES_OVER_WEIGHTS = 16
"""How often a step reads or writes numbers as many as there are weights: masks, products, gradients, Adam."""


class Cost(NamedTuple):
    """Of a set: D, units of two hidden layers, training rows."""

    dim: int
    hidden: int
    rows: int

    @property
    def weights(self) -> int:
        """Of a MAF of five layers."""
        return LAYERS * (self.dim * self.hidden + self.hidden**2 + 2 * self.hidden * self.dim)

    @property
    def operations(self) -> int:
        """Of a row's training step: a multiplication and an addition for each weight, three times over."""
        return 6 * self.weights

    def gpu_step(self, batch: int) -> float:
        """Seconds of a training step on the assumed GPU: the slower of its starts, its operations and its memory."""
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
"""The paper's sets and networks."""


def costs(cells: list[dict[str, Any]]) -> str:
    """A row for each set whose network was measured."""
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
