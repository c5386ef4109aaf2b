"""Where the files of the archive are, and what is said of one that is not there or is not what it should be."""

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
"""What the readers of numpy, pyarrow, h5py and gzip raise at a file that is not what they expect."""


def find(root: str | os.PathLike[str], *names: str) -> Path | None:
    """The first of the files `names` that is under `root`, if any is."""
    return next((path for path in (Path(root) / name for name in names) if path.is_file()), None)


def locate(who: str, root: str | os.PathLike[str], *names: str, source: str) -> Path:
    """The first of the files `names` that is under `root`.

    Args:
        who: The loader that asks.
        root: The folder that holds one folder a set.
        names: Paths under `root`, the one to have by default first.
        source: Where to get it.

    Raises:
        FileNotFoundError: If there is none: which was expected, where it is to be had, where to put it.
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
    """Say in one line which file it was that could not be read.

    Args:
        who: The loader that reads.
        path: The file.
        kind: What it should be, with its article.

    Raises:
        ValueError: If the file is empty, or the block that reads it finds it damaged or foreign.
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
    """Refuse to load a pickle unless that was asked for.

    Args:
        who: The loader that reads.
        path: The pickle.
        allowed: Whether the user trusts it.
        instead: What runs no code, and where to get it.

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
    """Say in one line which pickle it was that could not be loaded.

    Raises:
        ValueError: If the block that loads it fails, in any way: what a damaged pickle raises depends on its bytes.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{who} expected {path} to be a pickle that can be loaded here, got {type(error).__name__}: {_line(error)}."
        ) from None


def _line(error: Exception) -> str:
    """What an error says, in one line of bearable length."""
    return " ".join(str(error).split())[:LONGEST_REASON].rstrip(".")
