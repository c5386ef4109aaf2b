"""A guide's weights in Pyro's param store: what is stated there, and what is taken from it.

The store knows weights by name, and guides of one class have one name. What another guide has entered there is none of
this one's business; what was loaded, or put back by `set_state`, is what the user wants the guide to be.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pyro
import torch
from pyro.params.param_store import param_with_module_name
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_maf.infer.refusal import RefusalError

__all__ = ["Stored", "check_place"]

Modules = Mapping[str, nn.Module]
"""Modules by their names in the store."""


def check_place(who: str, state_dict: Mapping[str, object], prefix: str) -> None:
    """Check that no weights are loaded into a guide that is not set up, and so has no place for them.

    Raises:
        ValueError: If there are some whose names begin with `prefix`.
    """
    if any(name.startswith(prefix) for name in state_dict):
        raise RefusalError(
            f"{who} expected to be set up before its weights are loaded: call guide.setup() with the model's "
            "arguments, then load_state_dict."
        )


class _Entries:
    """Which tensors guides have entered in the store, and how often it had been cleared by then."""

    def __init__(self) -> None:
        self._count = 0
        self._params: Mapping[str, Tensor] = {}
        self._entered = WeakTensorKeyDictionary()

    def now(self) -> int:
        """How often the store has been seen cleared."""
        # Clearing puts another dictionary in place; since this one is held, no other can have its address.
        if self._params is not (params := pyro.get_param_store()._params):
            self._params = params
            self._count += 1
        return self._count

    def is_of_a_guide(self, tensor: Tensor, *, since_cleared: bool) -> bool:
        """Whether a guide has entered a tensor, at any time or since the store was cleared."""
        entered = self._entered.get(tensor)
        return entered is not None and (not since_cleared or entered == self.now())

    def enter(self, name: str, tensor: Tensor) -> None:
        """Enter a tensor in the store, in place of what has its name."""
        store = pyro.get_param_store()
        if name in store:
            del store[name]
        store[name] = tensor
        self._entered[tensor] = self.now()


_entries = _Entries()


class _Weight(NamedTuple):
    """A tensor, its name in the store, and whether it is entered there and stated to Pyro."""

    name: str
    tensor: Tensor
    is_entered: bool
    is_stated: bool


class Stored:
    """What a guide has of itself in the store: its parameters, and the floating-point buffers of its `state_dict`.

    Buffers are where a guide starts: with another start the same parameters are another guide. They are entered as
    views of the same memory, and not stated to Pyro, which would train them.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, list[str]] = {}
        self._views: dict[str, Tensor] = {}
        self._entered_at = 0

    def of_a_copy(self) -> Stored:
        """The same for a copy of the guide, whose weights have yet to be entered."""
        twin = Stored()
        twin._entered_at = -1 if self._entered_at else 0
        return twin

    def take(self, who: str, modules: Modules) -> None:
        """Take the weights that are in the store without a guide having entered them.

        Args:
            who: The guide's class, for errors.
            modules: Its modules, by name.

        Raises:
            ValueError: If they are those of a guide of another architecture.
        """
        if not pyro.settings.get("module_local_params"):
            self._take(who, modules, {weight.name: weight for weight in self._weights(modules)})

    def _take(self, who: str, modules: Modules, weights: Mapping[str, _Weight]) -> None:
        known = dict(pyro.get_param_store().named_parameters())
        others = {
            name: known[name] for name in weights if known.get(name, weights[name].tensor) is not weights[name].tensor
        }
        if not any(map(self._is_loaded, others.values())):
            return
        prefixes = tuple(param_with_module_name(name, "") for name in modules)
        loaded = {
            name: value
            for name, value in known.items()
            if name.startswith(prefixes) and (name in others or name not in weights) and self._is_loaded(value)
        }
        strange = {
            name: loaded[name] for name in loaded if not _entries.is_of_a_guide(loaded[name], since_cleared=False)
        }
        loaded = strange or loaded
        missing = [name for name, weight in weights.items() if weight.is_stated and name not in known]
        wrong = [name for name in loaded if name not in weights or weights[name].tensor.shape != loaded[name].shape]
        odd = [*missing, *wrong]
        if odd and not strange:
            return  # another guide's, put back at the end of a scope
        if odd:
            raise RefusalError(
                f"{who} expected the weights of a guide that is built alike in Pyro's param store, got others "
                f"({odd[0]}): build the guide as the one that was saved, or call pyro.clear_param_store()."
            )
        for name, value in loaded.items():
            with torch.no_grad():
                weights[name].tensor.copy_(value)
            if weights[name].is_entered:
                _entries.enter(name, weights[name].tensor)

    def state(self, who: str, modules: Modules) -> None:
        """Take what was loaded, enter all weights, and tell Pyro of the parameters.

        Raises:
            ValueError: As `take`.
        """
        if pyro.settings.get("module_local_params"):
            for weight in self._weights(modules):
                if weight.is_stated:
                    _state_locally(weight.name, weight.tensor)
            return
        weights = {weight.name: weight for weight in self._weights(modules)}
        self._take(who, modules, weights)
        store, now = pyro.get_param_store(), _entries.now()
        known = dict(store.named_parameters())
        for name, tensor, is_entered, is_stated in weights.values():
            is_there = known.get(name) is tensor
            if is_entered and not (is_there and self._entered_at == now):
                _entries.enter(name, tensor)
            elif not is_entered and not is_there and name in known:
                del store[name]
            if is_stated:
                pyro.param(name, tensor)
        self._entered_at = now

    def _is_loaded(self, tensor: Tensor) -> bool:
        # For a guide that is in the store already, the tensors of another one never are, even if the store was
        # cleared and put back in between.
        return not _entries.is_of_a_guide(tensor, since_cleared=not self._entered_at)

    def _weights(self, modules: Modules) -> Iterator[_Weight]:
        for prefix, module in modules.items():
            for name, parameter in module.named_parameters():
                trained = parameter.requires_grad
                yield _Weight(param_with_module_name(prefix, name), parameter, trained, trained)
            if prefix not in self._buffers:
                self._buffers[prefix] = _buffers_of(module)
            for name in self._buffers[prefix]:
                full_name = param_with_module_name(prefix, name)
                yield _Weight(full_name, self._view(full_name, module.get_buffer(name)), True, False)

    def _view(self, name: str, buffer: Tensor) -> Tensor:
        """A leaf of a buffer's memory: the store asks its entries to require gradients."""
        view = self._views.get(name)
        if view is None or view.data_ptr() != buffer.data_ptr() or view.dtype != buffer.dtype:
            view = self._views[name] = buffer.detach()
        return view


def _buffers_of(module: nn.Module) -> list[str]:
    """Names of the floating-point buffers that are stored with a module; the store copies what is not contiguous."""
    stored, buffers = module.state_dict(), dict(module.named_buffers())
    return [name for name, value in buffers.items() if name in stored and _can_be_entered(value)]


def _can_be_entered(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and buffer.is_contiguous()


def _state_locally(name: str, parameter: Tensor) -> None:
    """The statement that Pyro's own modules make where their parameters are kept out of the store."""
    parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
    effectful(type="param")(lambda *_, **__: parameter)(name, parameter, constraint=constraints.real, name=name)
