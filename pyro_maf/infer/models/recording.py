"""Recording of functions of tensors as plain sequences of torch operations, with or without the gradient."""

from __future__ import annotations

import dis
import gc
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from operator import getitem
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pyro_maf._core.torch_state import is_intercepted
from pyro_maf.infer.models.fused import compiled, note_shape
from pyro_maf.infer.models.model import Args, Kwargs

__all__ = ["Derivatives", "Recording", "UnrecordedError", "operations_of", "plain_derivatives", "record"]

aten = torch.ops.aten
ALIASES = (aten.detach.default, aten.alias.default)
"""Operations that return their argument if no gradient is recorded."""
READ = aten._local_scalar_dense.default
"""The operation by which a program reads a number."""
UNCERTAIN = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
OF_SHAPE = (
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
"""Operations whose result depends only on the shape of their argument."""
OUT_OF_PLACE = {aten.logical_and_.default: aten.logical_and.default}
"""In-place operations on conditions, as in the gradient of a clamp, and their out-of-place equivalents."""
GATHER = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
"""Operations whose output shape depends on values only if an index is a mask."""

STORES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL")
INSTALLED = ("site-packages", "dist-packages")
"""Folders of other packages, which may be inside that of Python's standard library."""
TAKERS = ("next", "pop", "popleft", "popitem")
"""Built-in functions that change the object they are called on, and return a part of it."""

Program = Callable[..., tuple[Tensor | None, ...]]
Function = Callable[[Tensor], Tensor]
"""A function of one tensor, (rows, D), to (rows,)."""


class Derivatives(NamedTuple):
    r"""Values of a function, (rows,), and the gradients of their sum.

    Attributes:
        values: (rows,).
        gradient: With respect to the argument, (rows, D).
        of_weights: With respect to each weight; None for weights that the function does not use.
    """

    values: Tensor
    gradient: Tensor
    of_weights: list[Tensor | None]


class Recording:
    """A function and its gradient as a sequence of operations, for arguments of one shape.

    Everything that does not depend on the argument or on the weights is computed once. A function cannot be recorded if
    it draws random numbers, changes a tensor or an object that exists outside of it, or has an output whose shape
    depends on values. If it reads whether a condition holds, as the validation of a distribution's arguments does, the
    recording is for that outcome, and calls with another outcome return None.
    """

    def __init__(self, entries: Sequence[_Entry], inputs: Sequence[Tensor], outputs: Sequence[Tensor | None]) -> None:
        self._weights = list(inputs[1:])
        builder = _Builder(entries, inputs)
        self._has_conditions = builder.build([each for each in outputs if each is not None])
        self._program = builder.program(inputs[0])
        self._constants = builder.constants
        self._used = [each is not None for each in outputs[2:]]
        self._externals = builder.externals
        self._versions = [tensor._version for tensor in self._externals]

    @property
    def is_current(self) -> bool:
        """False once an external tensor that the function reads has changed."""
        return self._versions == [tensor._version for tensor in self._externals]

    @torch.inference_mode()  # makes an operation a tenth cheaper than without gradients
    def __call__(self, argument: Tensor) -> Derivatives | None:
        """Return values and gradients; None if a condition differs from the recorded one."""
        holds, values, gradient, *others = self._program(argument, *self._weights, *self._constants)
        if self._has_conditions and not holds:
            return None
        found = iter(others)
        of_weights = [next(found) if is_used else None for is_used in self._used]
        return Derivatives(cast("Tensor", values), cast("Tensor", gradient), of_weights)


def record(function: Function, argument: Tensor, weights: Sequence[Tensor]) -> Recording | None:
    """Record a function at an argument; return None if it cannot be recorded.

    Args:
        function: The function.
        argument: (rows, D), without gradient.
        weights: Tensors that change from call to call.
    """
    if is_intercepted():
        return None
    argument = argument.detach().requires_grad_()
    recorder = _Recorder()
    try:
        with _Watch() as watch, torch.enable_grad(), recorder:
            values = function(argument)
            found = torch.autograd.grad(values.sum(), [argument, *weights], allow_unused=True)
        if watch.has_effects or found[0] is None:
            return None
        return Recording(recorder.entries, [argument, *weights], [values, *found])
    except Exception:  # recording may fail in any way, and errors of the function show in a plain run
        return None


def plain_derivatives(function: Function, argument: Tensor, weights: Sequence[Tensor]) -> Derivatives:
    """Values and gradients of a function, in the form of a recording's, by a plain run."""
    argument = argument.detach().requires_grad_()
    with torch.enable_grad():
        values = function(argument)
        total = values.sum() + 0.0 * argument.sum()  # so that there is always a gradient
        gradient, *others = torch.autograd.grad(total, [argument, *weights], allow_unused=True)
    return Derivatives(values.detach(), gradient, list(others))


class UnrecordedError(Exception):
    """Raised if a function cannot be recorded."""


def operations_of(function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> tuple[fx.Graph, list[Tensor]]:
    """Record a function of some tensors, for their shapes and without its gradient.

    Returns:
        Its graph, with placeholders for the inputs and then the constants, and the constants.

    Raises:
        UnrecordedError: If it draws random numbers, changes a tensor outside of it, reads a number from a tensor, or
            has a shape that depends on values.
    """
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        outputs = function()
    builder = _Builder(recorder.entries, inputs)
    builder.build(outputs)
    return builder.graph, builder.constants


class _Entry(NamedTuple):
    """An operation with its arguments and results."""

    operation: OpOverload
    args: Args
    kwargs: Kwargs
    result: object

    @property
    def inputs(self) -> Iterator[Tensor]:
        return (leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor))

    @property
    def outputs(self) -> Iterator[Tensor]:
        return (leaf for leaf in tree_leaves(self.result) if isinstance(leaf, Tensor))

    def takes(self, tensor: Tensor) -> bool:
        """Return whether a tensor is one of the arguments, like the result of an in-place operation."""
        return any(tensor is each for each in self.inputs)

    @property
    def changed(self) -> Iterator[Tensor]:
        """The tensors that it changes in place."""
        values = dict(zip((each.name for each in self.operation._schema.arguments), self.args, strict=False))
        values |= self.kwargs
        for argument in self.operation._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from (leaf for leaf in tree_leaves(values.get(argument.name)) if isinstance(leaf, Tensor))


class _Recorder(TorchDispatchMode):
    """Mode that records every operation below autograd, and thus those of a gradient too."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[_Entry] = []  # references to all tensors, so that no two have the same identity

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's compiler, which takes a second to load, is not involved

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UnrecordedError
        result = func(*args, **kwargs)
        self.entries.append(_Entry(func, args, kwargs, result))
        return result


class _Builder:
    """Builder of a program from the operations that depend on its inputs; the others are constants.

    Repeated operations are merged, unlike in a tracer: many of a model's small ones are.
    """

    def __init__(self, entries: Sequence[_Entry], inputs: Sequence[Tensor]) -> None:
        entries = self._entries = _out_of_place(entries)
        self.graph = fx.Graph()
        self._nodes = {id(each): self._noted(f"x{index}", each) for index, each in enumerate(inputs)}
        self._constants: dict[int, tuple[fx.Node, Tensor]] = {}
        self._equal: dict[str, fx.Node] = {}
        self._conditions: list[fx.Node] = []
        self._effects: set[fx.Node] = set()
        self._changed = {_storage(tensor) for entry in entries for tensor in entry.changed}
        inside = {id(tensor) for entry in entries for tensor in entry.outputs if not entry.takes(tensor)}
        outside = {id(each): each for entry in entries for each in entry.inputs if id(each) not in inside}
        self.externals = [each for key, each in outside.items() if key not in self._nodes]
        if self._changed & {_storage(each) for each in (*inputs, *self.externals)}:
            raise UnrecordedError

    @property
    def constants(self) -> list[Tensor]:
        """Values of the graph's constants, in the order of their placeholders."""
        return [tensor for _, tensor in self._constants.values()]

    def build(self, outputs: Sequence[Tensor]) -> bool:
        """Build the graph of the conditions and these outputs; return whether there are conditions."""
        for entry in self._entries:
            if self._is_live(entry):
                self._add(entry)
        holds = self._all_hold()
        self.graph.output((holds, *map(self._node, outputs)))
        for node in reversed(self.graph.nodes):
            if node.op == "call_function" and not node.users and node not in self._effects:
                self.graph.erase_node(node)
        return holds is not None

    def program(self, argument: Tensor) -> Program:
        """Compile the graph for arguments of this shape."""
        return cast("Program", compiled(self.graph, argument, dict(self._constants.values())).forward)

    def _is_live(self, entry: _Entry) -> bool:
        if self._is_of_changed(entry):
            return True
        return entry.operation not in OF_SHAPE and any(id(each) in self._nodes for each in entry.inputs)

    def _is_of_changed(self, entry: _Entry) -> bool:
        """Return whether an operation reads or writes memory that is changed in place."""
        return any(_storage(each) in self._changed for each in (*entry.inputs, *entry.outputs))

    def _add(self, entry: _Entry) -> None:
        operation, result = entry.operation, entry.result
        if operation is READ:
            self._add_condition(entry)
            return
        if any(tag in operation.tags for tag in UNCERTAIN) and not (operation in GATHER and self._is_by_number(entry)):
            raise UnrecordedError
        is_pure = isinstance(result, Tensor) and not self._is_of_changed(entry)
        if operation in ALIASES:
            self._nodes[id(result)] = self._node(cast("Tensor", entry.args[0]))
            return
        args, kwargs = tree_map(self._argument, (tuple(entry.args), dict(entry.kwargs)))
        key = f"{operation} {args} {kwargs}"
        node = self._equal.get(key) if is_pure else None
        if node is None:
            node = self.graph.call_function(operation, args, kwargs)
        if result is None or operation._schema.is_mutable:  # for instance a check of errors
            self._effects.add(node)
        node.meta["is_ordered"] = node in self._effects or self._is_of_changed(entry)
        if isinstance(result, Tensor):
            note_shape(node, result)
            self._nodes[id(result)] = node
            self._equal[key] = node
        elif result is not None:
            self._add_parts(node, result)

    def _add_parts(self, node: fx.Node, parts: object) -> None:
        if not isinstance(parts, (list, tuple)):
            raise UnrecordedError
        for index, part in enumerate(parts):
            if isinstance(part, Tensor):
                taken = self.graph.call_function(getitem, (node, index))
                note_shape(taken, part)
                self._nodes.setdefault(id(part), taken)

    def _is_by_number(self, entry: _Entry) -> bool:
        """Return whether no index of a gather is a mask that depends on the inputs."""
        masks = (each for each in entry.inputs if each.dtype in (torch.bool, torch.uint8))
        return not any(id(each) in self._nodes for each in masks)

    def _add_condition(self, entry: _Entry) -> None:
        tensor = cast("Tensor", entry.args[0])
        if tensor.dtype != torch.bool:
            raise UnrecordedError
        node = self._node(tensor)
        self._conditions.append(node if entry.result else self.graph.call_function(aten.logical_not.default, (node,)))

    def _all_hold(self) -> fx.Node | None:
        if not self._conditions:
            return None
        flat = [self.graph.call_function(aten.reshape.default, (node, [1])) for node in dict.fromkeys(self._conditions)]
        return self.graph.call_function(aten.all.default, (self.graph.call_function(aten.cat.default, (flat,)),))

    def _argument(self, value: object) -> object:
        return self._node(value) if isinstance(value, Tensor) else value

    def _node(self, tensor: Tensor) -> fx.Node:
        if id(tensor) in self._nodes:
            return self._nodes[id(tensor)]
        if id(tensor) not in self._constants:
            node = self._noted(f"c{len(self._constants)}", tensor)
            self._constants[id(tensor)] = node, tensor.detach()
        return self._constants[id(tensor)][0]

    def _noted(self, name: str, tensor: Tensor) -> fx.Node:
        """Create a placeholder."""
        node = self.graph.placeholder(name)
        note_shape(node, tensor)
        return node


def _out_of_place(entries: Sequence[_Entry]) -> list[_Entry]:
    """Replace in-place operations on conditions without views by out-of-place ones, which can be fused."""
    tensors: dict[int, set[int]] = defaultdict(set)
    for entry in entries:
        for each in (*entry.inputs, *entry.outputs):
            tensors[_storage(each)].add(id(each))
    return [
        entry._replace(operation=OUT_OF_PLACE[entry.operation])
        if entry.operation in OUT_OF_PLACE and all(len(tensors[_storage(each)]) == 1 for each in entry.changed)
        else entry
        for entry in entries
    ]


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # for instance for a sparse tensor
        raise UnrecordedError from None


class _Watch:
    """Watch over the Python code that runs inside the context, for effects on objects that outlive it.

    Attributes:
        has_effects: True if code outside of torch, Pyro, Python and this package has any.
    """

    def __init__(self) -> None:
        self.has_effects = False

    def __enter__(self) -> _Watch:
        # Finalizers of garbage do not belong to the watched code.
        self._collects = gc.isenabled()
        gc.disable()
        self._before = sys.getprofile()
        if self._before is None:
            sys.setprofile(self._see)
        else:  # a profiler is active
            self.has_effects = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is None:
            sys.setprofile(None)
        if self._collects:
            gc.enable()

    def _see(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            self.has_effects |= _has_effects(frame.f_code)
        elif event == "c_call" and getattr(argument, "__name__", "") in TAKERS:
            self.has_effects |= not _is_library(frame.f_code.co_filename)


@cache
def _has_effects(code: CodeType) -> bool:
    """Return whether code assigns to attributes, except to those of a new object, or to names of an outer scope."""
    if _is_library(code.co_filename):
        return False
    instructions = [(each.opname, each.argval) for each in dis.get_instructions(code)]
    is_new = code.co_name in ("__init__", "__new__", "__post_init__")
    return any(
        (name in STORES and not is_new) or (name in ("STORE_DEREF", "DELETE_DEREF") and value in code.co_freevars)
        for name, value in instructions
    )


@cache
def _is_library(filename: str) -> bool:
    packages, standard = _library_folders()
    is_standard = filename.startswith(("<frozen", *standard)) and not any(name in filename for name in INSTALLED)
    return is_standard or filename.startswith(packages)


@cache
def _library_folders() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Folders of torch, Pyro, its package for summing out discrete sites, this package and the standard library."""
    packages = [Path(str(import_module(name).__file__)).parent for name in ("torch", "pyro", "opt_einsum")]
    standard = [path for name, path in sysconfig.get_paths().items() if "stdlib" in name]
    return tuple(f"{folder}/" for folder in (*packages, Path(__file__).parents[1])), tuple(
        f"{path}/" for path in standard
    )
