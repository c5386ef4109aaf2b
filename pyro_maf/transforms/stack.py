"""Composition of flows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_maf._core.module_state import Structure
from pyro_maf._core.torch_state import is_intercepted
from pyro_maf.sweep import Run, Step, Triangular
from pyro_maf.transforms.autoregressive import InverseAutoregressive, MaskedAutoregressive
from pyro_maf.transforms.base import Flow, Inverse
from pyro_maf.transforms.coupling import Coupling
from pyro_maf.transforms.normalization import ActNorm, BatchNorm
from pyro_maf.transforms.permute import Permute
from pyro_maf.transforms.triangular import Head, LowerTriangularAffine
from pyro_maf.univariate import Affine

__all__ = ["Stack"]

NORMALIZING, TRIANGULAR = (ActNorm, BatchNorm), (Head, LowerTriangularAffine)
COMPILED = (Coupling, InverseAutoregressive, MaskedAutoregressive, Permute, *NORMALIZING, *TRIANGULAR)
"""Layers that a compiled program can run together: exactly these classes, since a subclass may compute differently."""


class Stack(Flow):
    r"""Composition of flows: y = t_L(... t_1(x)), with the sum of their log-determinants.

    Args:
        layers: From noise to data, with the same D; those that take a context have the same `context_dim`.

    Raises:
        ValueError: For no layers, or layers that disagree on a width.

    Example:
        >>> from pyro_maf.transforms import ActNorm, Permute
        >>> flow = Stack([ActNorm(3), Permute([2, 1, 0])])
        >>> len(flow), flow[1].permutation.tolist()
        (2, [2, 1, 0])
    """

    def __init__(self, layers: Sequence[Flow]) -> None:
        layers = list(layers)
        if not layers:
            raise ValueError(f"{type(self).__name__} expected at least one layer, got none.")
        for layer in layers:
            if not isinstance(layer, Flow):
                raise TypeError(f"{type(self).__name__} expected flows, got {type(layer).__name__}.")
        for size in ("input_dim", "context_dim"):
            found = {getattr(layer, size) for layer in layers} - ({0} if size == "context_dim" else set())
            if len(found) > 1:
                raise ValueError(f"{type(self).__name__} expected layers of one {size}, got {sorted(found)}.")
        super().__init__(layers[0].input_dim, max(layer.context_dim for layer in layers))
        self.layers = nn.ModuleList(layers)
        self._prepared: dict[bool, tuple[Structure, list[object], list[_Turn]]] = {}

    @property
    def fast(self) -> str:  # type: ignore[override]
        """The direction in which all layers are fast, or else that in which most are."""
        speeds = [layer.fast for layer in self if layer.fast != "both"]
        if not speeds:
            return "both"
        return max(("inverse", "forward"), key=speeds.count)

    @property
    def is_by_row(self) -> bool:  # type: ignore[override]
        """True if all layers are by row."""
        return all(layer.is_by_row for layer in self)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Flow]:
        return iter(self._modules["layers"]._modules.values())  # type: ignore[union-attr,arg-type]

    def __getitem__(self, index: int) -> Flow:
        return self.layers[index]  # type: ignore[return-value]

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the output: the input's, mapped by each layer in turn."""
        shape = super().forward_shape(shape)
        for layer in self:
            shape = layer.forward_shape(shape)
        return shape

    def _fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        modes = [(member, member.training) for member in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                for layer in reversed(list(self)):
                    of_layer = context if layer.context_dim else None
                    layer.fit_statistics(y, of_layer)
                    y = layer.inverse_and_log_det(y, of_layer)[0]
        finally:
            for member, training in modes:
                member.training = training

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the layers in turn, noise to data; return y and the sum of their log |det dy/dx|."""
        return self._through_rows(False, x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the layers' inverses in turn, data to noise; return x and the sum of their log |det dy/dx|."""
        return self._through_rows(True, y, context)

    def _through_rows(self, inverse: bool, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Apply the layers in turn, flattening a batch of several dimensions once rather than in every layer."""
        if value.dim() > 2 and context is None and self.is_by_row:
            output, log_det = self._through_rows(inverse, value.flatten(0, -2), None)
            batch = value.shape[:-1]
            return output.unflatten(0, batch), log_det.unflatten(0, batch)
        total = None
        for turn in self._turns(inverse)[1]:
            value, log_det = turn.applied(value, context)
            total = log_det if total is None else total + log_det
        return value, total  # type: ignore[return-value]

    def run(self, inverse: bool) -> Run | None:
        """The run that covers a whole direction, if one compiled program can apply it."""
        return self._structure_and_run(inverse)[1]

    def _compiled(self, value: Tensor, inverse: bool) -> tuple[Structure | None, tuple[Tensor, Tensor] | None]:
        structure, run = self._structure_and_run(inverse)
        return structure, None if run is None else run(value, None)

    def _structure_and_run(self, inverse: bool) -> tuple[Structure | None, Run | None]:
        structure, turns = self._turns(inverse) if _is_unchanged(type(self)) else (None, [])
        return structure, turns[0].run if len(turns) == 1 else None

    def _turns(self, inverse: bool) -> tuple[Structure | None, list[_Turn]]:
        """The structure and the turns of a direction, prepared again when structure or tensor types have changed."""
        if is_intercepted():
            return None, [_Turn([part], None) for part in _parts(self, inverse)]
        # Taken first, so that the next call notices a change made in between.
        structure = self._cache.structure(self)
        kinds = structure.kinds()
        if (before := self._prepared.get(inverse)) is not None and before[0] == structure and before[1] == kinds:
            return structure, before[2]
        runs = enumerate(_runs(_parts(self, inverse)))
        turns = [_Turn(layers, self._run((inverse, place), steps)) for place, (layers, steps) in runs]
        if kinds is not None and structure.is_plain:
            self._prepared[inverse] = structure, kinds, turns
        return structure, turns

    def _run(self, place: object, steps: Sequence[Step | Triangular]) -> Run | None:
        return Run.of(self._programs, place, steps, self.input_dim) if any(step.networks for step in steps) else None

    def _forget(self) -> None:
        super()._forget()
        self._prepared.clear()

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_prepared": {}}

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.parameters())
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        fast = {
            "inverse": "log_prob of data is one parallel pass, sampling one sequential sweep",
            "forward": "sampling is one parallel pass, log_prob of data one sequential sweep",
            "both": "log_prob and sampling are one parallel pass each",
        }[self.fast]
        if {"inverse", "forward"} <= _speeds(self):
            fast = "log_prob and sampling take sequential sweeps"
        described = (_describe(layer).replace("\n", "\n  ") for layer in self)
        layers = "".join(f"\n  ({index}): {layer}" for index, layer in enumerate(described))
        return f"{self.name}(input_dim={self.input_dim}{context}, {parameters:,} parameters; {fast}){layers}"


class _Part(NamedTuple):
    """One layer, its direction, and the sign of its log-determinant."""

    flow: Flow
    inverse: bool
    log_sign: int

    def steps(self) -> list[Step | Triangular] | None:
        """Steps of a compiled program, or None if it does not support the layer."""
        steps = self.flow.program_steps(self.inverse) if type(self.flow) in COMPILED else None
        if steps is None or self.log_sign > 0:
            return None if steps is None else list(steps)
        return [step._replace(log_sign=-step.log_sign) for step in steps]


class _Turn(NamedTuple):
    """Layers that are applied at once if they form a run of a compiled program, otherwise one after another."""

    layers: list[_Part]
    run: Run | None

    def applied(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the last layer's output and the sum of the log-determinants."""
        if self.run is not None:
            compiled = self.run(value, context)
            if compiled is not None:
                return compiled
        total = None
        for flow, inverse, log_sign in self.layers:
            direction = flow.inverse_and_log_det if inverse else flow.forward_and_log_det
            value, log_det = direction(value, context if flow.context_dim else None)
            log_det = log_det if log_sign > 0 else -log_det
            total = log_det if total is None else total + log_det
        return value, total  # type: ignore[return-value]


def _parts(stack: Stack, inverse: bool, log_sign: int = 1) -> Iterator[_Part]:
    """The layers of a stack, including those of nested stacks, in the order of a direction."""
    layers: Iterable[Flow] = stack.layers  # type: ignore[assignment]  # not the stack, which torch 2.4 cannot trace
    for flow in reversed(list(layers)) if inverse else layers:
        backward, sign = inverse, log_sign
        while type(flow) is Inverse:
            flow, backward, sign = flow.flow, not backward, -sign
        kind = type(flow)
        if isinstance(flow, Stack) and _is_unchanged(kind):
            yield from _parts(flow, backward, sign)
            continue
        yield _Part(flow, backward, sign)


def _is_unchanged(kind: type[Flow]) -> bool:
    """Return whether a subclass keeps both directions of `Stack`."""
    return (
        kind.forward_and_log_det is Stack.forward_and_log_det and kind.inverse_and_log_det is Stack.inverse_and_log_det
    )


def _runs(parts: Iterator[_Part]) -> Iterator[tuple[list[_Part], list[Step | Triangular]]]:
    """Split layers into maximal runs for a compiled program, with their steps, and single other layers."""
    for is_taken, group in itertools.groupby(
        ((part, part.steps()) for part in parts), lambda pair: pair[1] is not None
    ):
        pairs = list(group)
        if is_taken:
            yield [part for part, _ in pairs], [step for _, steps in pairs for step in steps or ()]
        else:
            yield from (([part], []) for part, _ in pairs)


def _speeds(flow: Flow) -> set[str]:
    """Fast directions of all layers, including those of nested stacks."""
    return {speed for layer in flow for speed in _speeds(layer)} if isinstance(flow, Stack) else {flow.fast}


def _describe(layer: Flow) -> str:
    network = getattr(layer, "made", None) or next(iter(getattr(layer, "networks", [])), None)
    if network is None:
        return repr(layer)
    widths = [network.input_dim, *network.hidden_dims, network.layers[-1].out_features]
    if (head := getattr(network, "head", None)) is not None:
        widths.append(head.bias.numel())
    univariate = getattr(layer, "univariate", None)
    spline = "" if univariate is None or isinstance(univariate, Affine) else f", {univariate!r}"
    return f"{layer.name}({' -> '.join(map(str, widths))}, {network.activation}{spline})"
