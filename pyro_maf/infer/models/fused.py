"""Fusion of a recorded program's operations on single numbers of a draw: one call in place of thousands.

A model that steps through time, as a recursion of variances or a differential equation, computes with one number of
each draw at a time, and so does its gradient. Such an operation takes torch some microseconds, of which the arithmetic
is a hundredth. Here they are rows of a table that a kernel walks through, with a register of all draws for each number;
stacking numbers and taking them apart is done in advance, on the places of registers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from operator import getitem
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from pyro_maf.sweep.kernels import kernels

__all__ = ["compiled", "note_shape"]

aten = torch.ops.aten
LEAST, LEAST_OF_RUN = 200, 16
"""Minimum number of operations worth fusing, and of those in one call of the kernel."""
MOST, MOST_LOADED = 16, 4_096
"""Maximum number of numbers of a draw that an operation is fused for, and of those that are loaded together."""
OVERLOADS = ("default", "self", "Tensor", "Scalar", "Tensor_Scalar", "Tensor_Tensor")
RENAMED = {"rsub": "sub", "clamp": "maximum", "clamp_min": "maximum", "clamp_max": "minimum"}
"""Operations that are written as others."""
CONDITIONS = ("le", "lt", "ge", "gt")
TAKES = ("select", "slice", "getitem")
"""Operations that return a part of a tensor."""
PADS = ("select_backward", "slice_backward")
"""Operations that return a tensor of zeros but for a part."""
JOINS = ("stack", "cat", *PADS, "view", "_unsafe_view", "reshape", "expand", "squeeze", "unsqueeze")

ALONG = ("stack", "cat", *PADS)
"""Those along a dimension of their result."""

Places = np.ndarray
"""Registers of the numbers of a draw, in the shape of a tensor without its dimension of draws."""


def note_shape(node: fx.Node, tensor: Tensor) -> None:
    """Note the shape and dtype of a node's result, by which `compiled` sees what can be fused."""
    node.meta["shape"], node.meta["dtype"] = tensor.shape, tensor.dtype


def compiled(graph: fx.Graph, argument: Tensor, constants: Mapping[fx.Node, Tensor]) -> fx.GraphModule:
    """Compile a graph; operations on single numbers of a draw are fused, if there are many.

    Args:
        graph: A graph whose nodes have been noted by `note_shape`; those with `meta["is_ordered"]` read or change what
            others change, and stay in their order.
        argument: An argument of the function that it is of, (draws, D).
        constants: Values of its constants.
    """
    strided = any(node.target is aten.as_strided.default for node in graph.nodes)  # by the strides of the recorded run
    if strided or len(graph.nodes) < LEAST or argument.device.type != "cpu" or len(argument) == 1 or kernels() is None:
        return fx.GraphModule({}, graph)
    alone: set[fx.Node] = set()
    while True:
        fusible = _Fusible(graph, argument, alone)
        runs = _runs(graph, fusible.nodes)
        sizes = Counter(runs[node] for node in fusible.arithmetic)
        small = {node for node in fusible.nodes if sizes[runs[node]] < LEAST_OF_RUN}
        if not small:
            break
        alone |= small
    if len(fusible.arithmetic) < LEAST:
        return fx.GraphModule({}, graph)
    return _Fusion(graph, runs, fusible.nodes, argument, constants).module()


def _name(node: fx.Node) -> str:
    """The operation's name in torch; "" for others."""
    if node.target is getitem:
        return "getitem"
    name, _, overload = str(node.target).removeprefix("aten.").partition(".")
    is_known = overload in (*OVERLOADS, "int", "dim", "dim_IntList") and node.op == "call_function"
    return name if is_known and not node.kwargs else ""


def _whole(node: fx.Node) -> fx.Node:
    """The tensor that a part is taken from."""
    return _first(_first(node)) if node.target is getitem else _first(node)


def _draws_from_right(shape: Sequence[int], draws: int) -> int:
    """Place of the dimension of draws, the last being 1; 0 if there is none, or another one of that size."""
    return len(shape) - list(shape).index(draws) if list(shape).count(draws) == 1 else 0


class _Fusible:
    """The operations of a graph that can be fused.

    Attributes:
        arithmetic: Those on at most 16 numbers of a draw.
        nodes: These, and those that stack such numbers or take them apart.
    """

    def __init__(self, graph: fx.Graph, argument: Tensor, alone: Set[fx.Node]) -> None:
        self._draws, self._dtype = len(argument), argument.dtype
        candidates = [
            node for node in graph.nodes if node not in alone and not node.meta.get("is_ordered") and self._place(node)
        ]
        self.arithmetic = {node for node in candidates if self._is_arithmetic(node)}
        self.nodes = set(self.arithmetic)
        for node in reversed(candidates):
            if self._is_take(node) and any(user in self.nodes for user in node.users):
                self.nodes.add(node)
        for node in candidates:
            if self._is_join(node) or (self._is_take(node) and _whole(node) in self.nodes):
                self.nodes.add(node)

    def _place(self, node: fx.Node) -> int:
        is_known = node.meta.get("dtype") in (self._dtype, torch.bool)
        return _draws_from_right(node.meta["shape"], self._draws) if is_known else 0

    def _is_arithmetic(self, node: fx.Node) -> bool:
        from pyro_maf.sweep.kernels.scalars import OPERATIONS

        name, shape = _name(node), node.meta["shape"]
        is_condition = node.meta["dtype"] == torch.bool
        if RENAMED.get(name, name) not in OPERATIONS or shape.numel() > MOST * self._draws:
            return False
        if is_condition != (name in CONDITIONS) or (len(node.args) > 2 and name not in ("where", "clamp")):
            return False
        return all(self._is_argument(each, self._place(node)) for each in node.all_input_nodes)

    def _is_argument(self, value: fx.Node, place: int) -> bool:
        """True if a tensor has numbers of each draw in this dimension, or of all draws."""
        shape = value.meta.get("shape")
        if shape is None or (len(shape) and value.meta["dtype"] not in (self._dtype, torch.bool)):
            return False
        return self._place(value) == place or len(shape) < place or shape[len(shape) - place] == 1

    def _is_take(self, node: fx.Node) -> bool:
        if _name(node) not in TAKES or (node.target is getitem and _first(node).target is not aten.unbind.int):
            return False
        whole = _whole(node)
        shape, place = whole.meta.get("shape", torch.Size()), self._place(whole)
        is_small = bool(place) and shape.numel() <= MOST_LOADED * self._draws
        return is_small and not whole.meta.get("is_ordered") and _axis(node) != len(shape) - place

    def _is_join(self, node: fx.Node) -> bool:
        parts, name, shape = node.all_input_nodes, _name(node), node.meta["shape"]
        if name not in JOINS or not all(each in self.nodes for each in parts):
            return False
        if name in ALONG:
            return _axis(node) != len(shape) - self._place(node)
        before = parts[0].meta["shape"]
        if name == "expand":
            return self._place(parts[0]) == self._place(node)
        return before[: -self._place(parts[0])].numel() == shape[: -self._place(node)].numel()


def _first(node: fx.Node) -> fx.Node:
    return cast("fx.Node", node.args[0])


def _axis(node: fx.Node) -> int:
    """The dimension along which tensors are put together or taken apart."""
    args = _first(node).args if node.target is getitem else node.args
    index = 2 if _name(node) in PADS else 1
    axis = cast("int", args[index]) if len(args) > index else 0
    return axis % len((node if _name(node) in ALONG else _whole(node)).meta["shape"])


def _runs(graph: fx.Graph, fused: Set[fx.Node]) -> dict[fx.Node, int]:
    """The run that a fused operation is in, and for others the last one that they need; -1 for none."""
    runs: dict[fx.Node, int] = {}
    last = -1  # of those that stay in their order
    for node in graph.nodes:
        inputs = [_whole(node)] if node.target is getitem and node in fused else node.all_input_nodes
        needs = [runs[each] + (node in fused and each not in fused) for each in inputs]
        is_ordered = node.meta.get("is_ordered", False) or node.op == "output"
        runs[node] = max(0 if node in fused else last if is_ordered else -1, *needs, -1)
        last = runs[node] if is_ordered else last
    return runs


class _Layout(NamedTuple):
    """Registers of a tensor, its shape, and the place of the dimension of draws from the right; 0 for none."""

    registers: Places
    shape: torch.Size
    place: int


class _Fusion:
    """A graph with runs of fused operations in place of these."""

    def __init__(
        self,
        graph: fx.Graph,
        runs: Mapping[fx.Node, int],
        fused: Set[fx.Node],
        argument: Tensor,
        constants: Mapping[fx.Node, Tensor],
    ) -> None:
        self._graph, self._runs, self._fused, self._constants = graph, runs, fused, constants
        self._argument = argument
        self._places: dict[object, Places] = {}
        self._count = 0
        count = 1 + max(runs.values())
        self._steps: list[list[tuple[int, ...]]] = [[] for _ in range(count)]
        self._loads: list[list[tuple[fx.Node, _Layout]]] = [[] for _ in range(count)]
        self._fixed: list[tuple[Tensor, _Layout]] = []
        for node in graph.nodes:
            if node in fused:
                self._places[node] = self._put(node)

    def module(self) -> fx.GraphModule:
        """Compose the graph: runs, and after each the operations that need it and no later one."""
        registers = self._argument.new_empty(self._count, len(self._argument))
        for value, layout in self._fixed:
            registers[layout.registers.ravel()] = _by_number(value, layout.place).to(registers)
        graph, modules = fx.Graph(), {}
        at: dict[fx.Node, fx.Node] = {}
        for run in range(-1, len(self._steps)):
            here = [node for node in self._graph.nodes if self._runs[node] == run]
            if run >= 0:
                read = [n for n in here if n in self._fused and not all(map(self._is_fused, n.users))]
                stores = [(_Layout(self._places[n], n.meta["shape"], self._place(n)), n.meta["dtype"]) for n in read]
                loads = [layout for _, layout in self._loads[run]]
                modules[f"run{run}"] = _Run(registers, self._steps[run], loads, stores)
                results = graph.call_module(f"run{run}", tuple(at[node] for node, _ in self._loads[run]))
                at |= {node: graph.call_function(getitem, (results, index)) for index, node in enumerate(read)}
            for node in here:
                if not self._is_fused(node):
                    at[node] = graph.node_copy(node, at.__getitem__)
        return fx.GraphModule(modules, graph)

    def _place(self, node: fx.Node) -> int:
        return _draws_from_right(node.meta["shape"], len(self._argument))

    def _is_fused(self, node: fx.Node) -> bool:
        parts = node.users if node.target is aten.unbind.int else (node,)
        return all(each in self._fused for each in parts)

    def _put(self, node: fx.Node) -> Places:
        """Add what computes a fused operation, and return the registers of its result."""
        name, run, shape = _name(node), self._runs[node], node.meta["shape"]
        own = _without(shape, self._place(node))
        if name not in (*TAKES, *JOINS):
            return self._compute(node, name, run, own)
        whole = node if name in ALONG else _whole(node)
        axis = _axis(node) if name in (*TAKES, *ALONG) else 0
        axis -= axis > len(whole.meta["shape"]) - self._place(whole)  # in the shape without the dimension of draws
        if name in ("stack", "cat"):
            parts = [self._places[each] for each in cast("Sequence[fx.Node]", node.args[0])]
            return (np.stack if name == "stack" else np.concatenate)(parts, axis)
        if name in PADS:
            places = np.full(own, self._read(0.0, run, self._place(node)))
            start, *end = cast("Sequence[int]", node.args[3:])
            index: int | slice = start if name == "select_backward" else slice(start, *end)
            places[(slice(None),) * axis + (index,)] = self._places[node.args[0]]
            return places
        places = self._read(whole, run, self._place(whole))
        if name == "slice":
            return places[(slice(None),) * axis + (slice(*cast("Sequence[int]", node.args[2:] or (None,))),)]
        if name in TAKES:
            return places.take(cast("int", node.args[-1]), axis)
        return np.broadcast_to(places, own) if name == "expand" else places.reshape(own)

    def _compute(self, node: fx.Node, name: str, run: int, shape: tuple[int, ...]) -> Places:
        from pyro_maf.sweep.kernels.scalars import OPERATIONS

        args = [self._read(each, run, self._place(node)) for each in node.args if each is not None]
        if name == "pow" and node.args[1] == 2:
            name, args = "mul", [args[0], args[0]]
        if name == "rsub":
            args.reverse()
        steps = [(RENAMED.get(name, name), args)]
        if name == "clamp":
            ends = zip(("maximum", "minimum"), node.args[1:], strict=False)
            place = self._place(node)
            steps = [(each, [args[0], self._read(end, run, place)]) for each, end in ends if end is not None]
        result: Places | None = None
        for operation, values in steps:
            taken = values if result is None else [result, *values[1:]]
            result = self._new(math.prod(shape)).reshape(shape)
            columns = [np.broadcast_to(each, shape).ravel() for each in (*taken, taken[0], taken[0])[:3]]
            code = OPERATIONS.index(operation)
            self._steps[run] += [(code, *map(int, row)) for row in zip(result.ravel(), *columns, strict=True)]
        return args[0] if result is None else result

    def _read(self, value: object, run: int, place: int) -> Places:
        """The registers of an argument of an operation; a run loads what is not fused."""
        if value in self._fused:
            return self._places[value]
        is_node = isinstance(value, fx.Node)
        shape = cast("fx.Node", value).meta["shape"] if is_node else torch.Size()
        of_draws = place if is_node and self._place(cast("fx.Node", value)) == place else 0
        if (value, of_draws, place) in self._places:
            return self._places[value, of_draws, place]
        own = _without(shape, place)
        places = self._places[value, of_draws, place] = self._new(math.prod(own)).reshape(own)
        layout = _Layout(places, shape, of_draws)
        if not is_node:
            self._fixed.append((torch.tensor(value, dtype=torch.float64), layout))
        elif value in self._constants:
            self._fixed.append((self._constants[cast("fx.Node", value)], layout))
        else:
            self._loads[run].append((cast("fx.Node", value), layout))
        return places

    def _new(self, number: int) -> Places:
        self._count += number
        return np.arange(self._count - number, self._count)


def _without(shape: Sequence[int], place: int) -> tuple[int, ...]:
    """A shape without the dimension at this place from the right, if there is one."""
    first = len(shape) - place
    return (*shape[:first], *shape[first + 1 :]) if place and first >= 0 else tuple(shape)


def _by_number(value: Tensor, place: int) -> Tensor:
    """Numbers of draws, (numbers, draws), or of all draws, (numbers, 1)."""
    return value.movedim(-place, -1).reshape(-1, value.shape[-place]) if place else value.reshape(-1, 1)


class _Run(nn.Module):
    """A run of fused operations, as a function of the tensors that it loads, to a list of results."""

    def __init__(
        self,
        registers: Tensor,
        steps: Sequence[tuple[int, ...]],
        loads: Sequence[_Layout],
        stores: Sequence[tuple[_Layout, torch.dtype]],
    ) -> None:
        super().__init__()
        self._registers, self._numbers = registers, registers.numpy()
        self._code = np.array(steps, dtype=np.int32).reshape(-1, 5)
        # Registers that are loaded are consecutive: a view of them.
        self._loads = [(registers[places.min() : places.max() + 1], place) for places, _, place in loads]
        self._stores = [(torch.tensor(places.ravel()), shape, place, dtype) for (places, shape, place), dtype in stores]

    def forward(self, *values: Tensor) -> list[Tensor]:
        """Load the values, run the operations, and return copies of the results."""
        from pyro_maf.sweep.kernels.scalars import run

        for value, (block, place) in zip(values, self._loads, strict=True):
            block.copy_(_by_number(value, place))
        run(self._code, self._numbers)
        return [self._laid_out(*store) for store in self._stores]

    def _laid_out(self, places: Tensor, shape: torch.Size, place: int, dtype: torch.dtype) -> Tensor:
        draws = self._registers.shape[1]
        before = shape[:-place].numel()
        numbers = self._registers[places].view(before, len(places) // before, draws)
        return numbers.transpose(1, 2).reshape(shape).to(dtype)
