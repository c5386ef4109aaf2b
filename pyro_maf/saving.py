"""Saving and loading: one safetensors file with the weights, and the architecture as JSON in its header.

Loading a file runs no code from it. The header names a class of this package, or a subclass that the program has
imported, and its constructor arguments as plain values. A digest covers weights and header: a file with a flipped bit,
or without a digest, is rejected.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn

from pyro_maf._core import files
from pyro_maf._core.files import write_whole
from pyro_maf._core.options import ClassSignature, named_arguments, show_options

__all__ = [
    "Contents",
    "Kind",
    "Savable",
    "describe",
    "drop_weak_references",
    "load",
    "pack",
    "packed",
    "unpack",
]

FORMAT = 1
KEY = "pyro_maf"
DIGEST = "digest"
SUPPLIED = "supplied"
LENGTH = struct.Struct("<Q")
"""Length of a safetensors header, in bytes; a multiple of the size of this field, so that the tensors are aligned."""


class Kind(NamedTuple):
    """A kind of file that this package writes.

    Attributes:
        key: Key of the text in the header.
        name: Name of the kind, used in messages; so are the next two.
        reader: Function that reads such files.
        remedy: Advice about a damaged file.
    """

    key: str
    name: str
    reader: str
    remedy: str


MODEL = Kind(KEY, "safetensors file", "load", "It was not changed: restore a copy of it, or save the model again.")
_classes: dict[str, type[Savable]] = {}


class Savable:
    """A module that records its constructor arguments, which define its architecture.

    Arguments are numbers, strings, booleans, None, sequences of these, integer tensors or arrays, and other savable
    modules. Floating-point tensors are initial values of entries in the state_dict and are not recorded.
    """

    _arguments: dict[str, object]
    _unsavable: ClassVar[str] = ""
    """Advice for a class that cannot be saved."""
    _supplied: ClassVar[tuple[str, ...]] = ()
    """Arguments that may be user-defined modules; a file holds only their weights."""
    __signature__ = ClassSignature()

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        if not _shadows_our_class(cls):
            _classes[cls.__name__] = cls
        if "__init__" in vars(cls):
            show_options(cls)

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Create an instance that holds its constructor's arguments."""
        self = super().__new__(cls)
        # Copies: the caller may change a list or an array later.
        arguments = named_arguments(cls, args, kwargs)
        self.__dict__["_arguments"] = {name: _frozen(value) for name, value in arguments.items()}
        return self

    @property
    def architecture(self) -> dict[str, object]:
        """Arguments that build a module of this architecture: the constructor's, unless a class overrides this."""
        return self._arguments

    def __copy__(self) -> Self:
        # Not the default, which prepares for pickling: a copy may be taken in the middle of a training step.
        twin = object.__new__(type(self))
        twin.__dict__.update(getattr(self, "__getstate__", lambda: self.__dict__)())
        return twin

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[object, ...]:
        if isinstance(self, nn.Module):
            drop_weak_references(self)
        return super().__reduce_ex__(protocol)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and architecture to `path`, atomically.

        Args:
            path: A file, by convention with suffix .safetensors. An existing file is replaced once all is written.

        Raises:
            FileNotFoundError: If its folder does not exist.
            TypeError: If a constructor argument cannot be saved, or for a flow or density at one context.
        """
        write_whole(Path(path), packed(self))


def packed(module: Savable) -> bytes:
    """Content of the file that `Savable.save` writes.

    Raises:
        TypeError: As `Savable.save`.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"save expected a torch module, got {type(module).__name__}.")
    training = [name for name, member in module.named_modules(remove_duplicate=False) if member.training]
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    header = {"format": FORMAT, "training": training, "frozen": frozen, **describe(module)}
    return pack(module.state_dict(), MODEL, json.dumps(header))


def drop_weak_references(module: nn.Module) -> None:
    """Remove the weak references that Pyro's parameter store attaches to parameters, which cannot be pickled."""
    for parameter in module.parameters():
        parameter.__dict__.pop("unconstrained", None)


def load(path: str | os.PathLike[str], *, context_net: nn.Module | None = None) -> Any:
    """Load a saved flow, conditional flow, density or guide, on the CPU, with the dtype and modes it was saved with.

    Parameters that were frozen with `requires_grad_(False)` are frozen again.

    Args:
        path: The file.
        context_net: The embedding network of a density that was fitted with one, built as for the fit. The file holds
            its weights, which are loaded into it, but no code. A network whose class derives from
            `pyro_maf.saving.Savable` is rebuilt from the file instead.

    Raises:
        TypeError: If `path` is not a path.
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, truncated, foreign or from a later version; the message says which. Also if
            `context_net` is missing, superfluous or differs from that of the fit.

    Example:
        >>> import os, tempfile, pyro_maf
        >>> flow = pyro_maf.MAF(3, num_layers=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     flow.save(os.path.join(folder, "flow.safetensors"))
        ...     again = pyro_maf.load(os.path.join(folder, "flow.safetensors"))
        >>> type(again).__name__
        'MAF'
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"load expected the path of a file, got {path!r}.")
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        of_fit = path / files.MODEL
        advice = f": the model in it is {of_fit}" if of_fit.is_file() else ""
        raise FileNotFoundError(f"load expected a file at {path}, found {found}{advice}.")
    contents = unpack(path, MODEL)
    return _rebuild(path, contents, {} if context_net is None else {"context_net": context_net})


class Contents(NamedTuple):
    """Contents of a file that `pack` wrote.

    Attributes:
        text: Text in the header.
        tensors: Tensors by name.
    """

    text: str
    tensors: dict[str, Tensor]


def pack(tensors: Mapping[str, Tensor], kind: Kind, text: str) -> bytes:
    """Content of a safetensors file with `tensors`, and with `text` and a digest of everything in its header."""
    from safetensors.torch import save

    # Copies, because tensors in a file may not share memory, and a single number may have a stride of more than 1.
    whole = torch.contiguous_format
    copies = {name: tensor.detach().cpu().clone(memory_format=whole) for name, tensor in tensors.items()}
    content = save(copies, {kind.key: text})
    # safetensors writes two header entries in arbitrary order, so the same module could give two different files.
    (size,) = LENGTH.unpack_from(content)
    header = json.loads(content[LENGTH.size : LENGTH.size + size])
    header["__metadata__"][DIGEST] = _digest(text, copies)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % LENGTH.size)
    return b"".join([LENGTH.pack(len(encoded)), encoded, memoryview(content)[LENGTH.size + size :]])


def unpack(path: Path, kind: Kind) -> Contents:
    """Read a file that `pack` wrote.

    Raises:
        ValueError: If it cannot be read, is damaged or foreign; the message says which.
        ModuleNotFoundError: Without safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except PermissionError as error:
        raise ValueError(f"{kind.reader} cannot read {path}: {error.strerror or error}.") from None
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{kind.reader} found {path} damaged, truncated or not a {kind.name}: {reason}. {kind.remedy}"
        ) from None
    if kind.key not in metadata:
        raise ValueError(
            f"{kind.reader} found no {kind.key} architecture in {path}: another program wrote it, or it is not a "
            f"{kind.name}."
        )
    text = metadata[kind.key]
    if len(metadata) == 1:
        raise ValueError(
            f"{kind.reader} found no digest in {path}: another program, or a version before 0.2.0, wrote it."
        )
    if metadata.get(DIGEST) != _digest(text, tensors):
        raise ValueError(f"{kind.reader} found {path} damaged: its content is not what was written. {kind.remedy}")
    return Contents(text, tensors)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 digest of the text and the tensors. Cost: about a second per gigabyte."""
    hashed = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _rebuild(path: Path, contents: Contents, supplied: Mapping[str, nn.Module]) -> nn.Module:
    state = contents.tensors
    try:
        header = json.loads(contents.text)
        if header["format"] > FORMAT:
            raise ValueError(f"it has format {header['format']}, this version reads up to {FORMAT}")
        left = dict(supplied)
        module = _build(header, left)
        if left:
            raise ValueError(f"it was saved without the {next(iter(left))} that load got: leave it out")
        _take_dtypes(module, state)
        module.load_state_dict(state)
        for name, member in module.named_modules():
            member.training = name in header["training"]
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name not in header.get("frozen", ()))
        return module
    except (LookupError, ArithmeticError, TypeError, ValueError, RuntimeError, AttributeError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"load could not rebuild what {path} describes: {reason}") from None


def _take_dtypes(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Convert a module's tensors to the dtypes in `state`, and tensors that are not saved to the most frequent one."""
    floating = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    if not floating:
        return
    module.to(max(floating, key=floating.count))
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in state and tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)


def describe(module: Savable) -> dict[str, object]:
    """The architecture of a module, as JSON values.

    Raises:
        TypeError: As `Savable.save`.
    """
    if module._unsavable:
        raise TypeError(f"{type(module).__name__} cannot be saved: {module._unsavable}.")
    if _shadows_our_class(type(module)):
        raise TypeError(f"{type(module).__name__} cannot be saved: its name is that of a class of {KEY}.")
    arguments = {
        name: {SUPPLIED: name, "class": type(value).__name__}
        if name in module._supplied and isinstance(value, nn.Module) and not isinstance(value, Savable)
        else _encode(type(module).__name__, name, value)
        for name, value in module.architecture.items()
    }
    return {"class": type(module).__name__, "arguments": arguments}


def _shadows_our_class(cls: type[Savable]) -> bool:
    """Return whether a class from elsewhere shares its name with one of this package, which files cannot resolve."""
    ours, its = (each.__module__.partition(".")[0] == KEY for each in (_classes.get(cls.__name__, cls), cls))
    return ours and not its


def _frozen(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, Tensor) and not value.is_floating_point():
        return value.clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def _encode(who: str, name: str, value: object) -> object:
    if isinstance(value, Savable):
        return describe(value)
    if isinstance(value, (np.ndarray, np.generic)):
        value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value.item()
    if isinstance(value, Tensor):
        return None if value.is_floating_point() else value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Sequence, nn.ModuleList)):
        return [_encode(who, name, item) for item in value]
    raise TypeError(f"{who} cannot be saved: its argument {name} is {type(value).__name__}, which JSON does not hold.")


def _build(description: dict[str, Any], supplied: dict[str, nn.Module]) -> Any:
    """Build the object that a file describes; modules that the file does not hold are taken from `supplied`."""
    name = description["class"]
    if (argument := description.get(SUPPLIED)) is not None:
        if argument not in supplied:
            raise ValueError(
                f"it was saved with {argument} of class {name}, of which a file holds only the weights: build it as "
                f"for the fit and pass it, load(path, {argument}=...)"
            )
        return supplied.pop(argument)
    if name not in _classes:
        # A program that only loads may not have imported all classes of this package; these two modules import them.
        for room in ("distributions", "infer"):
            importlib.import_module(f"{KEY}.{room}")
    if name not in _classes:
        raise ValueError(f"{name} is not a known class; import the module that defines it first")
    return _classes[name](**{key: _decode(value, supplied) for key, value in description["arguments"].items()})


def _decode(value: Any, supplied: dict[str, nn.Module]) -> Any:
    if isinstance(value, dict):
        return _build(value, supplied)
    if isinstance(value, list):
        return [_decode(item, supplied) for item in value]
    return value
