"""Checkpoints of a fit, from which a resumed fit reaches bitwise the same weights, and its log, one line per epoch.

A checkpoint is a safetensors file with JSON in its header, like a saved model: nothing in it can run code.
"""

from __future__ import annotations

import csv
import io
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from torch import Tensor

from pyro_maf._core.files import (
    BOARD,
    CHECKPOINT,
    FILES,
    LOG,
    held,
    recover,
    remove_unfinished,
    replaced,
    try_to_write,
    write_whole,
)
from pyro_maf.saving import Kind, pack, unpack

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Checkpoint", "CheckpointFolder", "Epoch", "Log", "check_unused", "checkpoints"]

FORMAT = 1
Facts: TypeAlias = dict[str, Any]
"""JSON values by name."""
REMEDY = "It was not changed: restore a copy of it, overwrite it, or choose another folder to start again."
FILE = Kind("pyro_maf.fit", "checkpoint", "fit", REMEDY)
SECONDS_BETWEEN = 1.0
MOST_OF_THE_TIME = 1 / 20


class Checkpoint(NamedTuple):
    """State of a fit at one moment: tensors, and the settings, position and losses as JSON values, by name."""

    tensors: dict[str, Tensor]
    facts: Facts

    def packed(self) -> bytes:
        """Return the content of the file."""
        return pack(self.tensors, FILE, json.dumps({"format": FORMAT, **self.facts}))

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read a file; raise if it is damaged, not a checkpoint, or from a later version."""
        contents = unpack(path, FILE)
        try:
            facts = json.loads(contents.text)
            later = facts["format"] > FORMAT
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"fit found {path} damaged: its text is no JSON with a format ({error}). {REMEDY}"
            ) from None
        if later:
            raise ValueError(f"fit found {path} with format {facts['format']}, this version reads up to {FORMAT}.")
        return cls(contents.tensors, facts)

    def check(self, path: Path, like: Checkpoint) -> None:
        """Check that the checkpoint has the form of `like`, one of this fit; that of another fit or version differs.

        Raises:
            ValueError: For the first entry that is missing, superfluous or of another form.
        """
        facts = self.facts
        wrong = [
            name for name, example in like.facts.items() if name not in facts or not _is_like(facts[name], example)
        ]
        # Not the random states of a GPU: the checkpoint may have been written on another device.
        expected, present = (
            {name: tensor.shape for name, tensor in each.tensors.items() if name != "global/cuda"}
            for each in (like, self)
        )
        wrong += sorted(expected.keys() ^ present.keys())
        wrong += [name for name in expected.keys() & present.keys() if expected[name] != present[name]]
        if wrong:
            raise ValueError(
                f"fit cannot resume from {path}: its {wrong[0]} is missing or belongs to another fit: another version "
                f"or another model wrote it. {REMEDY}"
            )

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with `prefix/`, without that prefix."""
        return {
            name.removeprefix(f"{prefix}/"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{prefix}/")
        }


class CheckpointFolder:
    """Checkpoints of a fit in a folder: frequent, but at most 5 % of the time.

    Args:
        folder: The folder, locked by the process that writes.
        settings: The settings that a resumed fit must share.
        resume, overwrite: As in `fit`.
        is_first: Whether this process writes.

    Attributes:
        path: Path of the checkpoint.
        checkpoint: The checkpoint to resume from, or None.

    Raises:
        ValueError: If there is a fit that is not to be resumed, is damaged, has other settings or lacks its checkpoint;
            the message says which.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, object], *, resume: bool, overwrite: bool, is_first: bool
    ) -> None:
        self.folder = folder
        self.checkpoint: Checkpoint | None = None
        # Counts may be numpy scalars.
        self._settings = json.loads(json.dumps(settings, default=int))
        self.path = folder / CHECKPOINT
        self._next = 0.0
        self._has_written = False
        self._overwrites = overwrite
        if is_first:
            recover(folder)
        if resume and self.path.exists():
            self.checkpoint = Checkpoint.read(self.path)
            self._check_settings(self.checkpoint.facts.get("settings"))
            self._has_written = True
        if not is_first:
            return
        if self.checkpoint is None and not overwrite:
            check_unused(folder, resume=False)
        for name in FILES:
            remove_unfinished(folder / name)

    @property
    def is_due(self) -> bool:
        """True if the next checkpoint is due."""
        return time.monotonic() >= self._next

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint now; if that fails, the first one raises and later ones warn."""
        began = time.monotonic()
        checkpoint.facts["settings"] = self._settings
        if self._has_written:
            try_to_write(self.path, checkpoint.packed())
        else:
            content = checkpoint.packed()
            with replaced(self.folder) if self._overwrites else nullcontext():
                write_whole(self.path, content)
            self._has_written = True
        ended = time.monotonic()
        self._next = ended + max(SECONDS_BETWEEN, (ended - began) / MOST_OF_THE_TIME)

    def _check_settings(self, before: object) -> None:
        if not isinstance(before, dict):
            raise ValueError(f"fit found {self.path} without the settings of its fit. {REMEDY}")
        for name, value in self._settings.items():
            if before.get(name) != value and name == "data":
                raise ValueError(
                    f"fit found a fit with other data in {self.folder} (other rows, weights or validation rows): "
                    "resume with the same table, weights, seed and validation, or choose another folder."
                )
            if before.get(name) != value:
                raise ValueError(
                    f"fit found a fit with another {name} in {self.folder} "
                    f"({_difference(before.get(name), value)}): resume with the same, or choose another folder."
                )


def check_unused(folder: Path, *, resume: bool) -> None:
    """Raise if a folder holds a fit, unless it is one to resume.

    Raises:
        ValueError: If there is a checkpoint that is not to be resumed, or another file of a fit without one.
    """
    files = [name for name in FILES if (folder / name).exists()]
    if CHECKPOINT in files and not resume:
        raise ValueError(
            f"fit found a fit in {folder}: overwrite=True or --overwrite replaces it, --resume or resume=True "
            "continues it, or choose another folder."
        )
    if files and CHECKPOINT not in files:
        raise ValueError(
            f"fit found {files[0]} in {folder}, but no {CHECKPOINT} to resume from: overwrite it by overwrite=True "
            "or --overwrite, or choose another folder."
        )


@contextmanager
def checkpoints(
    folder: str | os.PathLike[str] | None,
    settings: Mapping[str, object],
    *,
    resume: bool,
    overwrite: bool,
    is_first: bool,
) -> Iterator[CheckpointFolder | None]:
    """Context manager that yields a fit's checkpoints in `folder`, under a lock, or None without a folder.

    Raises:
        ValueError: As `CheckpointFolder`, and if another process writes there.
        OSError: If the folder is not writable.
    """
    if folder is None:
        yield None
        return
    path = Path(folder).expanduser()
    with held(path) if is_first else nullcontext():
        yield CheckpointFolder(path, settings, resume=resume, overwrite=overwrite, is_first=is_first)


class Epoch(NamedTuple):
    """Record of an epoch.

    Attributes:
        seconds: Time since the fit started, without interruptions.
        train_loss, validation_loss: Losses in nats.
        learning_rate: Learning rate of its steps.
        skipped_steps: Number of steps skipped so far.
    """

    seconds: float
    train_loss: float
    validation_loss: float
    learning_rate: float
    skipped_steps: int


class Log:
    """Log of a fit in its folder: `log.csv`, and the same for TensorBoard if that is installed.

    The file is rewritten completely at each epoch, so that it agrees with the fit even after resuming.

    Args:
        folder: The folder of the fit.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG
        self._events = folder / BOARD
        self._has_board = find_spec("tensorboard") is not None
        self._board: SummaryWriter | None = None

    def write(self, history: Sequence[Epoch]) -> None:
        """Write the epochs so far, the last of which is new."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["epoch", *Epoch._fields])
        rows.writerows([number, *epoch] for number, epoch in enumerate(history, 1))
        try_to_write(self._path, text.getvalue().encode())
        if self._has_board:
            self._write_to_board(len(history), history[-1])

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self._board is not None:
            self._board.close()

    def _write_to_board(self, number: int, epoch: Epoch) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            if self._board is None:
                # Not before its first checkpoint: until then, a fit leaves the folder unchanged. Later entries are
                # purged.
                self._board = SummaryWriter(str(self._events), purge_step=number)
            for name, value in epoch._asdict().items():
                self._board.add_scalar(name, value, number)
            self._board.flush()
        except OSError as error:
            self._has_board, self._board = False, None
            warnings.warn(f"fit could not write to {self._events}: {error}. It continues without them.", stacklevel=2)


def _is_like(value: object, example: object) -> bool:
    """Compare JSON with an example: a list of one item allows any number of items, None allows a string or None."""
    if isinstance(example, dict):
        if not isinstance(value, dict):
            return False
        return value.keys() == example.keys() and all(_is_like(value[name], example[name]) for name in example)
    if isinstance(example, (list, tuple)):
        examples = example * len(value) if isinstance(value, list) and len(example) == 1 else example
        return isinstance(value, list) and len(value) == len(examples) and all(map(_is_like, value, examples))
    if example is None:
        return value is None or isinstance(value, str)
    if isinstance(example, int):
        return type(value) is int and value >= 0
    return type(value) in (int, float) if isinstance(example, float) else type(value) is type(example)


def _difference(before: object, now: object) -> str:
    """Description of the first difference between two settings, with the name of the innermost entry."""
    if isinstance(before, dict) and isinstance(now, dict):
        name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
        inner = _difference(before.get(name), now.get(name))
        return inner if isinstance(now.get(name), dict) else f"{name} {inner}"
    return f"{_short(before)}, now {_short(now)}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
