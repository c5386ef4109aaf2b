"""Maximum-likelihood training of a run of layers by its kernels, without torch."""

from __future__ import annotations

import math
import operator

import numpy as np
import torch
from torch import Tensor

from pyro_maf._core.memory_pool import empty
from pyro_maf._core.optimization import Adam, WeightAverage
from pyro_maf._core.torch_state import count_change, uncounted_changes
from pyro_maf.sweep.function import Run, add_up
from pyro_maf.sweep.kernels import loaded
from pyro_maf.sweep.layout import LANES, Array
from pyro_maf.sweep.threads import in_parts

__all__ = ["Descent"]

TAPE = 2**20
"""Size in bytes of a tape that stays in the processor's cache between the forward and the backward walk."""
PASSES = 3
"""Number of products with each weight: forward, back to its inputs, and for its gradient."""


class Descent:
    """Gradients of a run's log-density with respect to its weights, and Adam steps along them.

    The points go forward and back a few chunks at a time, and the weights stay packed from step to step: entries that
    are masked out are never touched.

    Args:
        run: The layers, from standardised values to noise.
        weights: Flat tensor. The run's tensors are consecutive views of it; `SPARE` more entries follow.
    """

    SPARE = LANES

    def __init__(self, run: Run, weights: Tensor) -> None:
        self._run, self._weights = run, weights
        self._flat = weights.numpy()
        self._packed: tuple[list[int], tuple[Array, Array]] | None = None
        self._parts: list[tuple[Array, Array]] = []

    def differentiate(self, v: Tensor, context: Tensor | None, constant: float, factors: Tensor) -> float | None:
        """Weighted sum of `Run.log_density`, with `factors` of shape (batch,); its gradient is stored here."""
        if (inputs := self._run.inputs(v, context)) is None:
            return None
        program, kernels, pack = self._run.program, loaded(), self._pack()
        values, of_each, count = inputs[0].contiguous().numpy(), factors.numpy(), v.shape[0]
        contexts = values[:, :0] if inputs[1] is None else inputs[1].contiguous().numpy()
        chunk, nothing = program.chunk_of(count), values[:, :0]

        def walk(first: int, end: int) -> tuple[float, tuple[Array, Array]]:
            try:
                gradients = idle.pop()  # atomic: another thread gets another array
            except IndexError:
                gradients = program.room_for_gradients(v)
            rows, total = program.rows, 0.0
            chunks = min(-(-(end - first) // chunk), max(1, TAPE // (rows * chunk * v.element_size())))
            tape = empty(chunks * rows * chunk, v).numpy().reshape(-1, chunk)
            noise, densities = np.empty((chunks * chunk, program.dim), tape.dtype), np.empty(chunks * chunk, tape.dtype)
            for start in range(first, end, len(noise)):
                here = slice(start, min(start + len(noise), end))
                size = rows, 0, here.stop - start
                x, w, density = (values[here], contexts[here]), noise[: size[2]], densities[: size[2]]
                kernels.forward(program.tables, pack, x, *size, constant, tape, (w, density))
                total += float(of_each[here] @ density)
                grads = (w, of_each[here]), True, (nothing, nothing), gradients
                kernels.backward(program.tables, pack[0], *size, tape, *grads, program.every_matrix, start > first)
            return total, gradients

        idle, self._parts = self._parts, []
        parts = in_parts(walk, count, chunk, PASSES * program.work)
        self._parts = [gradients for _, gradients in parts]
        return sum(total for total, _ in parts)

    def packed_gradient(self) -> list[Tensor]:
        """The last gradient, as `step` reads it, for modification in place."""
        add_up(self._parts)
        return list(map(torch.from_numpy, self._parts[0]))

    def step(self, adam: Adam, average: WeightAverage, learning_rate: float, max_norm: float) -> bool:
        """Take a step along the last gradient, clipped to a norm, if it is finite; return whether it was."""
        if self._packed is None:
            raise RuntimeError("Descent expected a gradient before a step.")
        add_up(self._parts)
        program, (marks, pack) = self._run.program, self._packed
        (state,), values = adam.states, average.values[0]
        arrays = state["exp_avg"].numpy(), state["exp_avg_sq"].numpy(), values.numpy()
        network = program.tables, program.offsets, *self._parts[0]
        settings, steps = (*adam.settings(learning_rate), average.share), adam.steps.numpy()
        norm = loaded().adam_step(*network, max_norm, settings, self._flat, arrays, steps, *pack)
        if not math.isfinite(norm):
            return False
        average.taken += 1
        count_change()
        self._packed = [uncounted_changes(), *marks[1:]], pack
        return True

    def _pack(self) -> tuple[Array, Array]:
        """The packed weights and biases, packed again only if they were changed from outside."""
        marks = [uncounted_changes(), self._weights._version, *map(_version, self._run.tensors)]
        if self._packed is None or self._packed[0] != marks:
            pack = self._run.program.pack(self._run.tensors)
            self._packed = marks, (pack.weights, pack.biases)
        return self._packed[1]


_version = operator.attrgetter("_version")
