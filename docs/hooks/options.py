"""Signatures that show forwarded options one by one, as `help` does, in place of `**options`."""

from __future__ import annotations

import importlib
import inspect
from functools import reduce
from typing import Any

import griffe


class Options(griffe.Extension):
    """Replaces the keyword arguments that a function forwards by those of the signature that Python shows."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Rewrite the parameters of a function or constructor with `**options`."""
        forwarded = [each.name for each in func.parameters if each.kind is griffe.ParameterKind.var_keyword]
        owner = func.parent if func.name == "__init__" else func
        if not forwarded or owner is None or not owner.is_public:
            return
        module = importlib.import_module(owner.module.path)
        names = owner.path.removeprefix(f"{module.__name__}.").split(".")
        shown = inspect.signature(reduce(getattr, names, module)).parameters
        if forwarded[0] in shown:
            return
        del func.parameters[forwarded[0]]
        for name, parameter in shown.items():
            if name not in func.parameters:
                func.parameters.add(_keyword(parameter))


def _keyword(parameter: inspect.Parameter) -> griffe.Parameter:
    default = None if parameter.default is inspect.Parameter.empty else repr(parameter.default)
    kind = griffe.ParameterKind.keyword_only
    return griffe.Parameter(parameter.name, annotation=str(parameter.annotation), kind=kind, default=default)
