"""Signatures that list forwarded options one by one, as `help` does, in place of `**options`."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from functools import reduce
from typing import Any

import griffe

import pyro_maf


class Options(griffe.Extension):
    """Replaces parameters of public functions and constructors by those of the signature that Python shows."""

    def __init__(self) -> None:
        super().__init__()
        for part in pyro_maf.PARTS:
            importlib.import_module(f"pyro_maf.{part}")

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Rewrite the parameters of a function that forwards its options."""
        function = None if func.is_init_method else _imported(func)
        if function is not None and _forwards(function):
            func.parameters = _parameters(func, inspect.signature(function))

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Rewrite the parameters of a constructor that forwards its options, inherited or not."""
        runtime = _imported(cls)
        if runtime is not None and _forwards(runtime.__init__):
            parameters = _parameters(cls, inspect.signature(runtime))
            cls.set_member("__init__", griffe.Function("__init__", parameters=parameters))


def _imported(item: griffe.Object) -> Any:
    """The function or class itself; None if it is private or its module is not imported."""
    module = sys.modules.get(item.module.path)
    if module is None or not item.is_public:
        return None
    return reduce(getattr, item.path.removeprefix(f"{module.__name__}.").split("."), module)


def _forwards(function: Any) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and bool(code.co_flags & inspect.CO_VARKEYWORDS)


def _parameters(owner: griffe.Object, signature: inspect.Signature) -> griffe.Parameters:
    return griffe.Parameters(
        *(
            griffe.Parameter(
                name,
                annotation=_annotation(owner, parameter),
                kind=griffe.ParameterKind[parameter.kind.name.lower()],
                default=None if parameter.default is parameter.empty else repr(parameter.default),
            )
            for name, parameter in signature.parameters.items()
        )
    )


def _annotation(owner: griffe.Object, parameter: inspect.Parameter) -> Any:
    if not isinstance(parameter.annotation, str):
        return None if parameter.annotation is parameter.empty else str(parameter.annotation)
    return griffe.safe_get_annotation(ast.parse(parameter.annotation, mode="eval").body, parent=owner)
