"""Options that one constructor forwards to another: in signatures, in errors, and by name.

A constructor with `**layer` forwards them to its class attribute `layer_class`; one with `**network`, to
`network_class`. Each option is thus declared, with its default, only by the class that uses it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from inspect import Parameter, Signature
from typing import get_args, get_type_hints

__all__ = ["OBJECTS", "ClassSignature", "named_arguments", "show_options", "signature_of"]

OBJECTS: dict[str, type] = {}
"""Classes with options of their own, by the name of the option that takes an instance."""


class ClassSignature:
    """`__signature__` of a class with forwarded options, for `help` and completion; instances have none."""

    def __get__(self, instance: object | None, cls: type) -> Signature:
        """The signature of the class."""
        if instance is not None:
            raise AttributeError(f"{cls.__name__} object has no attribute '__signature__'")
        return signature_of(cls)


def show_options(cls: type) -> None:
    """Set the signature of a class's constructor, which Pyro shows as that of a distribution."""
    first = Parameter("self", Parameter.POSITIONAL_ONLY)
    signature = Signature([first, *signature_of(cls).parameters.values()])
    vars(cls)["__init__"].__signature__ = signature


# Not functools.cache, which compilers cannot trace.
_signatures: dict[type, Signature] = {}


def signature_of(cls: type) -> Signature:
    """Signature of a class, in which forwarded options replace `**layer`.

    These are keyword arguments of `layer_class`: all that the constructor itself lacks, or those among them that the
    typed dictionary in its annotation, `Unpack[...]`, has.
    """
    if cls not in _signatures:
        _signatures[cls] = _with_options(cls)
    return _signatures[cls]


def _with_options(cls: type) -> Signature:
    constructor = inspect.getattr_static(cls, "__init__")
    _, *parameters = inspect.signature(constructor).parameters.values()
    if not parameters or parameters[-1].kind is not Parameter.VAR_KEYWORD:
        return Signature(parameters)
    *explicit, rest = parameters
    target = getattr(cls, f"{rest.name}_class", None)
    if target is None:
        return Signature(parameters)
    taken = {parameter.name for parameter in explicit}
    typed = get_args(get_type_hints(constructor)[rest.name])
    return Signature(
        [
            *explicit,
            *(
                option.replace(kind=Parameter.KEYWORD_ONLY)
                for name, option in signature_of(target).parameters.items()
                if name not in taken
                and (name in typed[0].__annotations__ if typed else option.kind is Parameter.KEYWORD_ONLY)
            ),
        ]
    )


def named_arguments(cls: type, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
    """Arguments of a constructor by name, including forwarded ones.

    Raises:
        TypeError: For an option that neither the class nor the class it forwards to accepts.
    """
    signature = signature_of(cls)
    try:
        arguments = signature.bind_partial(*args, **kwargs).arguments
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "no arguments"
        unknown = next((name for name in kwargs if name not in signature.parameters), "")
        uses = [
            f"{option}={of.__name__}({unknown}={kwargs[unknown]!r})"
            for option, of in OBJECTS.items()
            if option in signature.parameters and unknown in signature_of(of).parameters
        ] or get_close_matches(unknown, signature.parameters, n=1)
        raise TypeError(f"{cls.__name__} takes {takes}: {error}{''.join(f': use {use}' for use in uses)}.") from None
    for parameter in signature.parameters.values():
        if parameter.kind is Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments
