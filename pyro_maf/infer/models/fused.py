"""Fusion of a recorded program's scalar operations for each draw: one call instead of thousands.

A model that steps through time, such as a recursion of variances or a differential equation, computes with one number
per draw at a time, and so does its gradient. Such an operation takes torch some microseconds, a hundredth of which is
arithmetic. Here operations are rows of a table that a kernel processes, with a register of all draws for each number.
Stacking numbers and splitting tensors is done in advance, by the same operations on the addresses of numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from operator import getitem
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from pyro_maf.sweep.kernels import kernels

__all__ = ["compiled", "note_shape"]

aten = torch.ops.aten
LEAST, LEAST_OF_RUN = 200, 16
"""Minimum number of operations worth fusing, and of operations in one call of the kernel."""
MOST, MOST_LOADED = 16, 4_096
"""Maximum number of numbers per draw for which an operation is fused, and of numbers that are loaded together."""
OVERLOADS = ("default", "self", "Tensor", "Scalar", "Tensor_Scalar", "Tensor_Tensor", "int", "dim", "dim_IntList")
RENAMED = {"rsub": "sub", "clamp_min": "maximum", "clamp_max": "minimum", "logical_and": "mul", "logical_or": "maximum"}
"""Operations that are expressed by others; conditions are 0 and 1."""
CONDITIONS = ("le", "lt", "ge", "gt", "logical_and", "logical_or")
TAKES = ("select", "slice", "getitem")
"""Operations that return a part of a tensor."""
VIEWS = ("view", "_unsafe_view", "reshape")
MOVES = (*TAKES, *VIEWS, "stack", "cat", "select_backward", "slice_backward", "expand", "squeeze", "unsqueeze")
"""Operations that return numbers of their arguments, or zeros."""


def note_shape(node: fx.Node, tensor: Tensor) -> None:
    """Record the shape and dtype of a node's result, from which `compiled` decides what can be fused."""
    node.meta["shape"], node.meta["dtype"] = tensor.shape, tensor.dtype


def compiled(graph: fx.Graph, argument: Tensor, constants: Mapping[fx.Node, Tensor]) -> fx.GraphModule:
    """Compile a graph, fusing operations on single numbers of a draw if there are many.

    Args:
        graph: A graph whose nodes were recorded by `note_shape`; those with `meta["is_ordered"]` read or change memory
            that others change, and keep their order.
        argument: An argument of the recorded function, (draws, D).
        constants: Values of its constants.
    """
    strided = any(node.target is aten.as_strided.default for node in graph.nodes)  # uses the recorded strides
    if strided or len(graph.nodes) < LEAST or argument.device.type != "cpu" or len(argument) == 1 or kernels() is None:
        return fx.GraphModule({}, graph)
    draws = _Draws(len(argument), argument.dtype)
    candidates = [node for node in graph.nodes if not node.meta.get("is_ordered") and draws.place(node)]
    arithmetic = {node for node in candidates if draws.compute(node)}
    moves = [node for node in candidates if draws.move(node)]
    while True:
        fused = _fused(arithmetic, moves)
        runs = _runs(graph, fused)
        sizes = Counter(runs[node] for node in arithmetic)
        small = {node for node in fused if sizes[runs[node]] < LEAST_OF_RUN}
        if not small:
            break
        arithmetic, moves = arithmetic - small, [node for node in moves if node not in small]
    if len(arithmetic) < LEAST:
        return fx.GraphModule({}, graph)
    return _Fusion(graph, draws, runs, fused, constants).module(argument)


def _fused(arithmetic: Set[fx.Node], moves: Sequence[fx.Node]) -> set[fx.Node]:
    """Arithmetic, the parts of tensors that it uses, and the tensors that its results are combined into."""
    fused = set(arithmetic)
    for node in reversed(moves):
        if _name(node) in TAKES and any(user in fused for user in node.users):
            fused.add(node)
    for node in moves:
        if all(each in fused for each in _inputs(node)):
            fused.add(node)
    return fused


def _runs(graph: fx.Graph, fused: Set[fx.Node]) -> dict[fx.Node, int]:
    """The run that contains a fused operation; for other operations the last run that they need; -1 for none."""
    runs: dict[fx.Node, int] = {}
    last = -1  # run of the operations that keep their order
    for node in graph.nodes:
        inputs = _inputs(node) if node in fused else node.all_input_nodes
        needs = [runs[each] + (node in fused and each not in fused) for each in inputs]
        is_ordered = node.meta.get("is_ordered", False) or node.op == "output"
        runs[node] = max(0 if node in fused else last if is_ordered else -1, *needs, -1)
        last = runs[node] if is_ordered else last
    return runs


def _name(node: fx.Node) -> str:
    """The operation's name in torch; "" for others."""
    if node.target is getitem:
        return "getitem" if _first(node).target is aten.unbind.int else ""
    name, _, overload = str(node.target).removeprefix("aten.").partition(".")
    return name if overload in OVERLOADS and node.op == "call_function" and not node.kwargs else ""


def _first(node: fx.Node) -> fx.Node:
    return cast("fx.Node", node.args[0])


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operation depends on; for a part of an unbound tensor, that tensor."""
    return _first(node).all_input_nodes if _name(node) == "getitem" else node.all_input_nodes


def _moved(node: fx.Node, numbers: Mapping[fx.Node, Tensor]) -> Tensor:
    """The result of an operation that moves numbers, applied to these numbers instead of its inputs."""
    if _name(node) == "getitem":
        dim = cast("tuple[int, ...]", _first(node).args[1:])
        return numbers[_first(_first(node))].unbind(*dim)[cast("int", node.args[1])]
    operation = aten.reshape.default if _name(node) in VIEWS else cast("Callable[..., Tensor]", node.target)
    return cast("Tensor", operation(*fx.node.map_arg(node.args, numbers.get)))


class _Block(NamedTuple):
    """Consecutive registers of a tensor with draws in one dimension, which is counted from the right."""

    first: int
    shape: tuple[int, ...]
    place: int

    @property
    def registers(self) -> range:
        """Numbers of the registers."""
        return range(self.first, self.first + torch.Size(self.shape).numel() // self.shape[-self.place])

    def of(self, registers: Tensor) -> Tensor:
        """View these registers among all, (registers, draws), as the tensor."""
        return self._shaped(registers[self.first : self.registers.stop])

    def addresses(self) -> Tensor:
        """Address of each of the tensor's numbers among those of all registers."""
        draws = self.shape[-self.place]
        return self._shaped(torch.arange(self.first * draws, self.registers.stop * draws))

    def _shaped(self, numbers: Tensor) -> Tensor:
        axis = len(self.shape) - self.place
        last = (*self.shape[:axis], *self.shape[axis + 1 :], self.shape[axis])
        return numbers.view(last).movedim(-1, axis)


class _Draws(NamedTuple):
    """Number of draws, and dtype of their numbers, which determine what can be fused."""

    number: int
    dtype: torch.dtype

    def place(self, node: fx.Node) -> int:
        """Position of a tensor's draw dimension, counted from the right; 0 if there is none, or it is ambiguous."""
        if node.meta.get("dtype") not in (self.dtype, torch.bool):
            return 0
        shape = list(node.meta["shape"])
        return len(shape) - shape.index(self.number) if shape.count(self.number) == 1 else 0

    def compute(self, node: fx.Node) -> bool:
        """Return whether an operation is arithmetic on at most 16 numbers per draw."""
        from pyro_maf.sweep.kernels.scalars import OPERATIONS

        name, shape = _name(node), node.meta["shape"]
        is_condition = node.meta["dtype"] == torch.bool
        if (name != "clamp" and RENAMED.get(name, name) not in OPERATIONS) or shape.numel() > MOST * self.number:
            return False
        if is_condition != (name in CONDITIONS) or (len(node.args) > 2 and name not in ("where", "clamp")):
            return False
        return all(self._is_operand(each, self.place(node)) for each in node.all_input_nodes)

    def _is_operand(self, node: fx.Node, place: int) -> bool:
        """Return whether a tensor has numbers for each draw in this dimension, or is shared by all draws."""
        shape = node.meta.get("shape")
        if shape is None or (len(shape) and node.meta["dtype"] not in (self.dtype, torch.bool)):
            return False
        return self.place(node) == place or len(shape) < place or shape[len(shape) - place] == 1

    def move(self, node: fx.Node) -> bool:
        """Return whether an operation moves numbers of each draw to the same draw in its result."""
        name, inputs = _name(node), _inputs(node)
        if name not in MOVES or not all(map(self.place, inputs)):
            return False
        sizes = [each.meta["shape"].numel() for each in inputs]
        if name in TAKES and (sizes[0] > MOST_LOADED * self.number or inputs[0].meta.get("is_ordered")):
            return False
        blocks = [_Block(1, each.meta["shape"], self.place(each)) for each in inputs]  # after the block of zeros
        moved = _moved(node, {each: block.addresses() for each, block in zip(inputs, blocks, strict=True)})
        moved = moved.movedim(-self.place(node), -1)
        is_in_order = (moved - moved[..., :1] == torch.arange(self.number)) & (moved[..., :1] % self.number == 0)
        return bool((is_in_order | (moved == 0)).all())


class _Fusion:
    """A graph in which runs replace fused operations."""

    def __init__(
        self,
        graph: fx.Graph,
        draws: _Draws,
        runs: Mapping[fx.Node, int],
        fused: Set[fx.Node],
        constants: Mapping[fx.Node, Tensor],
    ) -> None:
        self._graph, self._draws, self._runs, self._fused, self._constants = graph, draws, runs, fused, constants
        self._count = 1  # the first register holds zeros
        self._addresses: dict[fx.Node, Tensor] = {}
        self._operands: dict[object, Tensor] = {}
        self._rows: list[list[Tensor]] = [[] for _ in range(1 + max(runs.values()))]
        self._loads: list[list[tuple[fx.Node, _Block]]] = [[] for _ in self._rows]
        self._fixed: list[tuple[Tensor, _Block]] = []
        for node in sorted((each for each in graph.nodes if each in fused), key=runs.__getitem__):  # to load in time
            if _name(node) in MOVES:
                inputs = {each: self._operand(each, node, draws.place(each)) for each in _inputs(node)}
                self._addresses[node] = _moved(node, inputs)
            else:
                self._addresses[node] = self._computed(node, draws.place(node))

    def module(self, argument: Tensor) -> fx.GraphModule:
        """Compose the graph: the runs, and after each run the operations that depend on it but on no later one."""
        registers = argument.new_zeros(self._count, self._draws.number)
        for value, block in self._fixed:
            block.of(registers).copy_(value)
        graph, modules = fx.Graph(), {}
        at: dict[fx.Node, fx.Node] = {}
        for run in range(-1, len(self._rows)):
            here = [node for node in self._graph.nodes if self._runs[node] == run]
            if run >= 0:
                read = [node for node in here if node in self._fused and not all(map(self._is_fused, node.users))]
                stores = [(self._addresses[node], node.meta["dtype"]) for node in read]
                loads = [block.of(registers) for _, block in self._loads[run]]
                modules[f"run{run}"] = _Run(registers, self._rows[run], loads, stores)
                results = graph.call_module(f"run{run}", tuple(at[node] for node, _ in self._loads[run]))
                at |= {node: graph.call_function(getitem, (results, index)) for index, node in enumerate(read)}
            for node in here:
                if not self._is_fused(node):
                    at[node] = graph.node_copy(node, at.__getitem__)
        return fx.GraphModule(modules, graph)

    def _is_fused(self, node: fx.Node) -> bool:
        parts: Collection[fx.Node] = node.users if node.target is aten.unbind.int else (node,)
        return all(each in self._fused for each in parts)

    def _computed(self, node: fx.Node, place: int) -> Tensor:
        """Add the rows that compute an operation, and return the addresses of its result."""
        name = _name(node)
        args = [None if each is None else self._operand(each, node, place) for each in node.args]
        if name == "clamp":
            result = args[0]
            for operation, end in zip(("maximum", "minimum"), args[1:], strict=False):
                result = result if end is None else self._row(operation, node, place, result, end)
            return cast("Tensor", result)
        if name == "pow" and node.args[1] == 2:
            name, args = "mul", [args[0], args[0]]
        return self._row(RENAMED.get(name, name), node, place, *(reversed(args) if name == "rsub" else args))

    def _row(self, operation: str, node: fx.Node, place: int, *operands: Tensor | None) -> Tensor:
        """Add a row for each number of an operation's result."""
        from pyro_maf.sweep.kernels.scalars import OPERATIONS

        block = self._block(node.meta["shape"], place)
        result = torch.tensor(block.registers)
        columns = [
            cast("Tensor", each).broadcast_to(block.shape).select(-place, 0).flatten() // self._draws.number
            for each in (*operands, *2 * operands[:1])[:3]
        ]
        code = torch.full_like(result, OPERATIONS.index(operation))
        self._rows[self._runs[node]].append(torch.stack([code, result, *columns], -1))
        return block.addresses()

    def _operand(self, value: object, user: fx.Node, place: int) -> Tensor:
        """Addresses of a fused operation's argument, with draws in this dimension; a run loads unfused arguments."""
        if value in self._fused:
            return self._addresses[cast("fx.Node", value)]
        if (value, place) in self._operands:
            return self._operands[value, place]
        shape = tuple(value.meta["shape"]) if isinstance(value, fx.Node) else ()
        shape = (*(1,) * (place - len(shape)), *shape)
        axis = len(shape) - place
        block = self._block((*shape[:axis], self._draws.number, *shape[axis + 1 :]), place)
        if not isinstance(value, fx.Node):
            self._fixed.append((torch.tensor(value, dtype=torch.float64), block))
        elif value in self._constants:
            self._fixed.append((self._constants[value], block))
        else:
            self._loads[self._runs[user]].append((value, block))
        self._operands[value, place] = block.addresses()
        return self._operands[value, place]

    def _block(self, shape: Sequence[int], place: int) -> _Block:
        block = _Block(self._count, tuple(shape), place)
        self._count = block.registers.stop
        return block


class _Run(nn.Module):
    """A run of fused operations, as a function from the tensors that it loads to a list of results.

    Args:
        registers: Numbers of all runs, (registers, draws).
        rows: The operations.
        loads: Views of the registers for each tensor.
        stores: Addresses and dtype of each result.
    """

    def __init__(
        self,
        registers: Tensor,
        rows: Sequence[Tensor],
        loads: Sequence[Tensor],
        stores: Sequence[tuple[Tensor, torch.dtype]],
    ) -> None:
        super().__init__()
        self._registers, self._numbers = registers, registers.numpy()
        self._code = torch.cat([torch.empty(0, 5, dtype=torch.int64), *rows]).numpy().astype(np.int32)
        self._loads, self._stores = loads, stores

    def forward(self, *values: Tensor) -> list[Tensor]:
        """Load the values, run the operations, and return copies of the results."""
        from pyro_maf.sweep.kernels.scalars import run

        for block, value in zip(self._loads, values, strict=True):
            block.copy_(value)
        run(self._code, self._numbers)
        return [self._registers.take(addresses).to(dtype) for addresses, dtype in self._stores]
