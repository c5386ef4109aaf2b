"""Random numbers that a model draws beside its visible sites."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pyro
import torch
from torch.overrides import TorchFunctionMode

__all__ = ["Draws"]


class Draws(TorchFunctionMode):
    """Mode that records the sites for which random numbers are drawn.

    A handler within a model, such as `poutine.block`, hides a site from handlers around the model, but not its draw
    from the random state.

    Attributes:
        sites: Their names.
        any: True if any random numbers were drawn; set on exit.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.sites: set[str] = set()
        self.any = False

    def __enter__(self) -> Draws:
        self._before = self._all_states()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.any = bool(self.sites) or self._all_states() != self._before

    def _all_states(self) -> tuple[object, ...]:
        numpy = np.random.get_state(legacy=False)["state"]
        return (*self._states(), random.getstate(), numpy["pos"], numpy["key"].tobytes())

    def _states(self) -> tuple[bytes, ...]:
        """Return the states of torch's generators."""
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return tuple(state.numpy().tobytes() for state in states)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self._states()
        result = func(*args, **(kwargs or {}))
        if self._states() != before and (name := _site_above()):
            self.sites.add(name)
        return result


def _site_above() -> str:
    """Return the name of the site that is being drawn further up the call stack; "" if none is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is pyro.sample.__code__:
            return str(frame.f_locals["name"])
        frame = frame.f_back
    return ""
