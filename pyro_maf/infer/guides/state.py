"""The state of a guide: its weights in Pyro's param store, and the part of its prototype that is pickled.

The store identifies weights by name, and guides of the same class have the same name. A guide ignores the entries of
another guide; weights that the user loaded, or restored by `set_state`, are used.
"""

from __future__ import annotations

import copy
import hashlib
import weakref
from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import numpy as np
import pyro
import torch
from pyro.distributions import Delta
from pyro.params.param_store import param_with_module_name
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_maf.infer.guides.annealing import anneal
from pyro_maf.infer.guides.path_gradient import detached
from pyro_maf.infer.models.latents import Latents
from pyro_maf.infer.models.model import Args, Kwargs, RefusalError, Site, Trace, latent_sites

__all__ = ["StoredWeights", "bare_latents", "bare_trace", "check_is_set_up", "digest_of"]

Modules = Mapping[str, nn.Module]
"""Modules by their names in the store."""


def digest_of(args: Args, kwargs: Kwargs) -> str:
    """Digest of the numbers among a model's arguments: tensors and arrays, also in tuples, lists and dictionaries."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            numbers = leaf.detach().cpu().reshape(-1).view(torch.uint8)
            digest.update(f"{leaf.dtype} {leaf.shape}".encode() + numbers.numpy().tobytes())
        elif isinstance(leaf, np.ndarray):
            digest.update(f"{leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
        elif isinstance(leaf, (bool, int, float, str)):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def check_is_set_up(who: str, state_dict: Mapping[str, object], prefix: str) -> None:
    """Check that no weights are loaded into a guide that is not set up, and so lacks the parameters for them.

    Raises:
        ValueError: If there are any whose names begin with `prefix`.
    """
    if any(name.startswith(prefix) for name in state_dict):
        raise RefusalError(
            f"{who} expected to be set up before its weights are loaded: call guide.setup() with the model's "
            "arguments, then load_state_dict."
        )


class _Record:
    """Record of the tensors that guides have entered in the store, and of the times it was cleared."""

    def __init__(self) -> None:
        self._count = 0
        self._params: Mapping[str, Tensor] = {}
        self._entered = WeakTensorKeyDictionary()

    def now(self) -> int:
        """Number of times that the store was seen cleared."""
        # Clearing replaces the dictionary; since this one is referenced, no other can have its address.
        if self._params is not (params := pyro.get_param_store()._params):
            self._params = params
            self._count += 1
        return self._count

    def is_of_a_guide(self, tensor: Tensor, *, since_cleared: bool) -> bool:
        """Return whether a guide has entered a tensor, at any time or since the store was cleared."""
        entered = self._entered.get(tensor)
        return entered is not None and (not since_cleared or entered == self.now())

    def enter(self, name: str, tensor: Tensor) -> None:
        """Enter a tensor in the store, replacing any entry with the same name."""
        store = pyro.get_param_store()
        if name in store:
            del store[name]
        store[name] = tensor
        self._entered[tensor] = self.now()


_record = _Record()


class _Weight(NamedTuple):
    """A tensor, its name in the store, and whether it is to be entered there and registered with Pyro."""

    name: str
    tensor: Tensor
    is_entered: bool
    is_registered: bool


class StoredWeights:
    """Entries of a guide in the store: its parameters, and the floating-point buffers in its `state_dict`.

    Buffers hold the initialization: with another one, the same parameters are another guide. They are entered as views
    of the same memory, and not registered with Pyro, which would train them.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, list[str]] = {}
        self._views: dict[str, Tensor] = {}
        self._entered_at = 0
        self._is_annealed = False

    def of_a_copy(self) -> StoredWeights:
        """Return the entries of a copy of the guide, whose weights have yet to be entered."""
        twin = StoredWeights()
        twin._entered_at = -1 if self._entered_at else 0
        return twin

    def load(self, who: str, modules: Modules) -> None:
        """Load the weights in the store that no guide has entered.

        Args:
            who: The guide's class, for error messages.
            modules: Its modules, by name.

        Raises:
            ValueError: If they belong to a guide with another architecture.
        """
        if not pyro.settings.get("module_local_params"):
            self._load(who, modules, {weight.name: weight for weight in self._weights(modules)})

    def _load(self, who: str, modules: Modules, weights: Mapping[str, _Weight]) -> None:
        entries = dict(pyro.get_param_store().named_parameters())
        others = {
            name: entries[name]
            for name, weight in weights.items()
            if entries.get(name, weight.tensor) is not weight.tensor
        }
        if not any(map(self._is_loaded, others.values())):
            return
        prefixes = tuple(param_with_module_name(name, "") for name in modules)
        loaded = {
            name: value
            for name, value in entries.items()
            if name.startswith(prefixes) and (name in others or name not in weights) and self._is_loaded(value)
        }
        foreign = {
            name: value for name, value in loaded.items() if not _record.is_of_a_guide(value, since_cleared=False)
        }
        loaded = foreign or loaded
        missing = [name for name, weight in weights.items() if weight.is_registered and name not in entries]
        wrong = [name for name in loaded if name not in weights or weights[name].tensor.shape != loaded[name].shape]
        mismatches = [*missing, *wrong]
        if mismatches and not foreign:
            return  # another guide's weights, restored at the end of a scope
        if mismatches:
            raise RefusalError(
                f"{who} expected the weights of a guide that is built alike in Pyro's param store, got others "
                f"({mismatches[0]}): build the guide as the one that was saved, or call pyro.clear_param_store()."
            )
        for name, value in loaded.items():
            with torch.no_grad():
                weights[name].tensor.copy_(value)
            if weights[name].is_entered:
                _record.enter(name, weights[name].tensor)

    def loaded(self, module: str) -> dict[str, Tensor]:
        """Return the weights of a module in the store that no guide has entered, by their names in the module."""
        if pyro.settings.get("module_local_params"):
            return {}
        prefix = param_with_module_name(module, "")
        entries = dict(pyro.get_param_store().named_parameters())
        return {
            name.removeprefix(prefix): value
            for name, value in entries.items()
            if name.startswith(prefix) and self._is_loaded(value)
        }

    def register(self, who: str, modules: Modules, *, anneals: bool) -> None:
        """Load weights from the store, enter all weights, register the parameters with Pyro, and perhaps anneal them.

        Raises:
            ValueError: As `load`.
        """
        if anneals and not self._is_annealed:
            anneal(weight.tensor for weight in self._weights(modules) if weight.is_registered)
            self._is_annealed = True
        if pyro.settings.get("module_local_params"):
            for weight in self._weights(modules):
                if weight.is_registered:
                    _register_locally(weight.name, weight.tensor)
            return
        weights = {weight.name: weight for weight in self._weights(modules)}
        self._load(who, modules, weights)
        store, now = pyro.get_param_store(), _record.now()
        entries = dict(store.named_parameters())
        for name, tensor, is_entered, is_registered in weights.values():
            is_there = entries.get(name) is tensor
            if is_entered and not (is_there and self._entered_at == now):
                _record.enter(name, tensor)
            elif not is_entered and not is_there and name in entries:
                del store[name]
            if is_registered:
                pyro.param(name, tensor)
        self._entered_at = now

    def _is_loaded(self, tensor: Tensor) -> bool:
        # Once a guide is in the store, tensors of another guide never become its weights, even if the store was cleared
        # and restored in between.
        return not _record.is_of_a_guide(tensor, since_cleared=not self._entered_at)

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
        """Return a leaf that shares a buffer's memory, since the store makes its entries require gradients."""
        view = self._views.get(name)
        if view is None or view.data_ptr() != buffer.data_ptr() or view.dtype != buffer.dtype:
            view = self._views[name] = buffer.detach()
        return view


def _buffers_of(module: nn.Module) -> list[str]:
    """Names of a module's persistent, contiguous floating-point buffers; the store would copy other ones."""
    stored, buffers = module.state_dict(), dict(module.named_buffers())
    return [name for name, value in buffers.items() if name in stored and _can_be_entered(value)]


def _can_be_entered(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and buffer.is_contiguous()


def _register_locally(name: str, parameter: Tensor) -> None:
    """Register a parameter like Pyro's modules under `module_local_params`, without the store."""
    vars(parameter)["unconstrained"] = weakref.ref(parameter)
    effectful(type="param")(lambda *_, **__: parameter)(name, parameter, constraint=constraints.real, name=name)


def bare_latents(latents: Latents) -> Latents:
    """Strip a layout of the model's tensors, which may be parameters or part of its graph."""
    twin = copy.copy(latents)
    twin.parts = {
        name: part._replace(site=_bare_site(part.site), transform=detached(part.transform, []))
        for name, part in latents.parts.items()
    }
    return twin


def bare_trace(trace: Trace) -> Trace:
    """Reduce a trace to its latent sites."""
    twin = Trace()
    for name, site in latent_sites(trace).items():
        twin.add_node(name, **_bare_site(site))
    return twin


def _bare_site(site: Site) -> Site:
    """Copy a site with its value and a distribution of the same shapes, without the distribution's parameters."""
    value = site["value"].detach().clone()
    shapes = Delta(value, event_dim=site["fn"].event_dim)
    scale, mask = (detached(site[name], []) for name in ("scale", "mask"))
    twin = {**site, "fn": shapes, "value": value, "args": (), "kwargs": {}, "scale": scale, "mask": mask}
    return cast("Site", twin)
