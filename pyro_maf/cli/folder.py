"""The folder of a fit: its files, and the check before writing to it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyro_maf._core.files import CHECKPOINT, COLUMNS, FILES, MODEL, RECORD, REPORT, recover

__all__ = [
    "CHECKPOINT",
    "COLUMNS",
    "MODEL",
    "RECORD",
    "REPORT",
    "Record",
    "check_folder",
    "read_json",
    "write_json",
]


@dataclass(frozen=True)
class Record:
    """Record of a fit, in JSON values."""

    command: str
    version: str
    data: str
    rows: int
    validation_log_likelihood: float
    best_epoch: int
    epochs: int
    seconds: float
    stop_reason: str
    warnings: list[str] = field(default_factory=list)


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse to overwrite a fit without `overwrite`.

    Raises:
        ValueError: If `folder` is a file, or holds a fit that is neither to be resumed nor overwritten or that has no
            checkpoint to be resumed from, or if another
            process writes to it.
    """
    if resume and overwrite:
        raise ValueError("fit got both --resume and --overwrite: choose one.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"fit expected --folder to be a folder, got the file {folder}.")
    recover(folder)
    found = [name for name in FILES if (folder / name).exists()]
    if not found or overwrite:
        return
    if not resume:
        raise ValueError(
            f"fit found a fit in {folder} ({found[0]}): go on with it by --resume, replace it by --overwrite, or "
            "choose another folder with --folder."
        )
    if MODEL in found and CHECKPOINT not in found:
        raise ValueError(f"fit found {MODEL} in {folder}, but no {CHECKPOINT} to go on from: choose another folder.")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a file atomically."""
    from pyro_maf.saving import write_whole

    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON file; None if there is none."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"found {path} damaged: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"found {path} damaged: it holds no object.")
    return value
