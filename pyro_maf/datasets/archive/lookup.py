"""Location of the archive's files, and errors for a missing or damaged one."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["ZENODO", "ask_first", "find", "locate", "reading", "unpickling"]

ZENODO = "data.tar.gz of https://zenodo.org/records/1161203 (Preprocessed datasets for MAF experiments)"
LONGEST_REASON = 160
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OSError, EOFError, MemoryError, zlib.error)
"""Errors of the readers of numpy, pyarrow, h5py and gzip for a file of another format."""


def find(root: str | os.PathLike[str], *names: str) -> Path | None:
    """Return the first of the files `names` under `root`, or None."""
    return next((path for path in (Path(root) / name for name in names) if path.is_file()), None)


def locate(who: str, root: str | os.PathLike[str], *names: str, source: str) -> Path:
    """Return the first of the files `names` under `root`.

    Args:
        who: The loader, for errors.
        root: The folder with one folder for each set.
        names: Paths under `root`, the preferred one first.
        source: Where to get it.

    Raises:
        FileNotFoundError: If there is none, with the expected path and its source.
    """
    path = find(root, *names)
    if path is not None:
        return path
    wanted = Path(root) / names[0]
    others = "".join(f" or {Path(name).name}" for name in names[1:])
    found = "a folder" if wanted.is_dir() else "nothing"
    raise FileNotFoundError(
        f"{who} expected a file at {wanted}{others}, found {found}: get it from {source} and put it there."
    )


@contextmanager
def reading(who: str, path: Path, kind: str) -> Iterator[None]:
    """Convert errors of a reader to one line that names the file.

    Args:
        who: The loader that reads.
        path: The file.
        kind: Its expected format, with an article.

    Raises:
        ValueError: If the file is empty, or the block that reads it fails: it is damaged or of another format.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{who} expected {path} to be {kind}, got an empty file.")
    try:
        yield
    except UNREADABLE as error:
        raise ValueError(
            f"{who} expected {path} to be {kind}, got one that is damaged, truncated or of another format: "
            f"{_line(error)}."
        ) from None


def ask_first(who: str, path: Path, allowed: bool, instead: str) -> None:
    """Refuse to load a pickle unless the user allows it.

    Args:
        who: The loader that reads.
        path: The pickle.
        allowed: True if the user trusts it.
        instead: The format that runs no code, and its source.

    Raises:
        ValueError: If it is not allowed.
    """
    if not allowed:
        raise ValueError(
            f"{who} expected files that can not run code, got the pickle {path} alone: "
            f"pass allow_pickle=True if you trust it, or get {instead}."
        )


@contextmanager
def unpickling(who: str, path: Path) -> Iterator[None]:
    """Convert errors of loading a pickle to one line that names it.

    Raises:
        ValueError: If the block that loads it fails, in any way: the error of a damaged pickle depends on its bytes.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{who} expected {path} to be a pickle that can be loaded here, got {type(error).__name__}: {_line(error)}."
        ) from None


def _line(error: Exception) -> str:
    """Shorten an error message to one line."""
    return " ".join(str(error).split())[:LONGEST_REASON].rstrip(".")
