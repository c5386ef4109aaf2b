"""A fit as it stands, in one file: enough to go on from there to the very same weights.

The file is safetensors with JSON in its header, as that of a model: nothing in it can run code.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_maf.saving import pack, remove_unfinished, unpack, write_whole

__all__ = ["LOG", "MODEL", "Checkpoint", "Keeper", "generator_states", "set_generator_states"]

CHECKPOINT, LOG, MODEL = "checkpoint.safetensors", "log.csv", "model.safetensors"
"""What lies in the folder of a fit."""

FORMAT = 1
KEY = "pyro_maf.fit"
SECONDS_BETWEEN = 1.0
MOST_OF_THE_TIME = 1 / 20


class Checkpoint(NamedTuple):
    """What a fit is made of at one moment.

    Attributes:
        tensors: Weights, optimizer, average and random states, by name.
        facts: Whatever JSON holds: the settings, the position, the losses.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def write(self, path: Path) -> None:
        """Put it at `path`, whole or not at all."""
        write_whole(path, pack(self.tensors, KEY, json.dumps({"format": FORMAT, **self.facts})))

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """What lies at `path`.

        Raises:
            ValueError: If it is damaged, foreign or from a later version.
        """
        contents = unpack(path, KEY, "fit", "checkpoint")
        try:
            facts = json.loads(contents.text)
            later = facts["format"] > FORMAT
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"fit found {path} damaged: its facts are no JSON with a format ({error}).") from None
        if later:
            raise ValueError(f"fit found {path} with format {facts['format']}, this version reads up to {FORMAT}.")
        if not contents.has_digest:
            raise ValueError(
                f"fit found no digest in {path}, as an earlier version or another program wrote it: choose another folder."
            )
        return cls(contents.tensors, facts)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix/`, by the rest of their names."""
        return {
            name.removeprefix(f"{prefix}/"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}/")
        }


class Keeper:
    """Keeps a fit in a folder: often, but not for more than a twentieth of the time.

    Args:
        folder: Where to; it is made if need be.
        settings: What must be the same when the fit is taken up again.
        resume: Whether a fit that is there already is to be taken up.
        is_first: Whether this is the process that writes.

    Attributes:
        found: The checkpoint to go on from, or None.

    Raises:
        ValueError: If there is a fit that is not to be resumed, or one that is damaged, has other settings or has lost
            its checkpoint; the message says which.
        FileExistsError: If `folder` is a file.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, resume: bool, is_first: bool = True) -> None:
        self.folder = folder
        self.found: Checkpoint | None = None
        # Counts may be numpy's.
        self._settings = json.loads(json.dumps(settings, default=int))
        self._path = folder / CHECKPOINT
        self._next = 0.0
        if resume and self._path.exists():
            self.found = Checkpoint.read(self._path)
            self._check_settings(self.found.facts["settings"])
        if not is_first:
            return
        if self.found is None:
            self._check_unused()
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CHECKPOINT, LOG, MODEL):
            remove_unfinished(folder / name)

    @property
    def is_due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() >= self._next

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint now."""
        began = time.monotonic()
        checkpoint.facts["settings"] = self._settings
        checkpoint.write(self._path)
        ended = time.monotonic()
        self._next = ended + max(SECONDS_BETWEEN, (ended - began) / MOST_OF_THE_TIME)

    def _check_unused(self) -> None:
        if self._path.exists():
            raise ValueError(
                f"fit found a fit in {self.folder}: resume=True goes on with it, or choose another folder."
            )
        for name in (LOG, MODEL):
            if (self.folder / name).exists():
                raise ValueError(
                    f"fit found {name} in {self.folder}, but no {CHECKPOINT} to go on from: choose another folder."
                )

    def _check_settings(self, before: dict[str, Any]) -> None:
        for name, value in self._settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"fit found a fit with another {name} in {self.folder} ({_short(before.get(name))}, "
                    f"now {_short(value)}): resume with the same, or choose another folder."
                )


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The global random states that layers draw from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generator_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Put what `generator_states` gave back in place, as far as there is such a device."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
