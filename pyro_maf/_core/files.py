"""Files written whole or not at all, and the folder of a fit: its files, its lock, its replacement by a new one."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = [
    "BOARD",
    "CHECKPOINT",
    "FILES",
    "LOG",
    "MODEL",
    "RECORD",
    "REPORT",
    "held",
    "recover",
    "remove_unfinished",
    "replaced",
    "try_to_write",
    "write_whole",
    "writing_whole",
]

CHECKPOINT, LOG, MODEL, BOARD = "checkpoint.safetensors", "log.csv", "model.safetensors", "tensorboard"
"""Files that `pyro_maf.fit` writes."""

RECORD, REPORT = "fit.json", "report.html"
"""Files that the command adds: record and report of the fit."""

FILES = (MODEL, CHECKPOINT, LOG, RECORD, REPORT)

LOCK = ".lock"
LOCKED_BYTE = 2**20
"""Position of the lock on Windows, beyond the line in the file, which other processes need to read."""
ASIDE = ".replaced-"
TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
UNLOCKABLE = (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of file systems without locks, mostly network file systems."""

TOKEN_BYTES = 8
"""Random bytes in the temporary name of a file that is being written."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically, with `writing_whole`."""
    with writing_whole(path) as file:
        file.write(content)


@contextmanager
def writing_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing under a temporary name, and rename it at the end: `path` is never half-written."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save expected an existing folder for {path.name}, got {path.parent}.")
    if path.is_dir():
        raise IsADirectoryError(f"save expected a file name, got the folder {path}.")
    # Not a file from `tempfile`, which only its owner can read.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(TOKEN_BYTES)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            # The error of a full disk names no file, and others name the temporary one.
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        raise


def try_to_write(path: Path, content: bytes) -> bool:
    """Write a file atomically, or warn if that fails: a full disk should not end hours of work."""
    try:
        write_whole(path, content)
    except OSError as error:
        warnings.warn(
            f"fit could not write {path}: {error.strerror or error}. It continues without that file.", stacklevel=2
        )
        return False
    return True


def remove_unfinished(path: Path) -> None:
    """Remove temporary files of `path` left behind by a killed process."""
    token = "[0-9a-f]" * (2 * TOKEN_BYTES)
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.{token}"):
        temporary.unlink(missing_ok=True)


@dataclass
class _Hold:
    """A folder that a thread of this process writes to, and how many times the thread has entered it."""

    thread: int
    times: int = 0
    lock: IO[bytes] | None = None


_holds: dict[Path, _Hold] = {}
_guard = threading.Lock()


@contextmanager
def held(folder: Path, *, make: bool = True) -> Iterator[None]:
    """Context manager with exclusive write access to `folder` for this thread; re-entrant.

    The operating system releases the lock when a process ends, even if it is killed. Unless `make`, the folder is
    locked at the first entry at which it exists.

    Raises:
        ValueError: If another thread or process holds the folder; the message says which.
        OSError: If the folder is not writable, or a file exists at its path.
    """
    key = folder.resolve()
    with _guard:
        hold = _holds.setdefault(key, _Hold(threading.get_ident()))
        if hold.thread != threading.get_ident():
            raise _taken(folder, "another thread of this process")
        hold.times += 1
    try:
        if hold.lock is None and (make or folder.is_dir()):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise type(error)(f"fit expected a folder at {folder}, found a file there: choose another.") from None
            hold.lock = _lock(folder)
        yield
    finally:
        with _guard:
            hold.times -= 1
            if not hold.times:
                del _holds[key]
                _release(folder, hold.lock)


def _lock(folder: Path) -> IO[bytes] | None:
    """The locked file of a folder; None if the file system has no locks."""
    path = folder / LOCK
    while True:
        try:
            file = open(path, "a+b")  # noqa: SIM115 (it stays open for as long as the folder is held)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from None
        try:
            _lock_file(file)
            # The previous holder may have removed the file after it was opened; others would then lock a new one.
            if _is(path, file):
                _sign(file)
                return file
        except OSError as error:
            file.seek(0)
            holder = "".join(filter(str.isprintable, file.read(200).decode(errors="replace")))
            file.close()
            if error.errno in TAKEN:
                raise _taken(folder, holder or "another process") from None
            if error.errno not in UNLOCKABLE:
                raise
            warnings.warn(
                f"fit cannot lock {folder}: {error.strerror}. Take care that no other fit writes there.", stacklevel=5
            )
            return None
        file.close()


def _lock_file(file: IO[bytes]) -> None:
    if sys.platform == "win32":
        file.seek(LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is(path: Path, file: IO[bytes]) -> bool:
    """Return whether an open file is the one at `path`."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    return False


def _sign(file: IO[bytes]) -> None:
    """Write a line that names the holder, for processes that try to lock the folder."""
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
    file.flush()


def _release(folder: Path, lock: IO[bytes] | None) -> None:
    if lock is None:
        return
    # Removed while still locked, so that it cannot be another process's; Windows cannot remove open files.
    with suppress(OSError):
        (folder / LOCK).unlink()
    lock.close()


def _taken(folder: Path, holder: str) -> ValueError:
    return ValueError(
        f"fit found another fit at work in {folder} ({holder}): wait until it has ended, or choose another folder."
    )


@contextmanager
def replaced(folder: Path) -> Iterator[None]:
    """Set the fit in `folder` aside while the context is active; without a new checkpoint, restore it then or later."""
    old = [folder / name for name in (CHECKPOINT, *FILES, BOARD) if (folder / name).exists()]
    aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=folder))
    try:
        # The checkpoint is moved first and restored last, so that a checkpoint in the folder is always the new one.
        for path in dict.fromkeys(old):
            path.rename(aside / path.name)
        yield
    finally:
        recover(folder)


def recover(folder: Path) -> None:
    """Restore a fit that was set aside for a new one, if the latter was killed before its first checkpoint."""
    asides = sorted(folder.glob(f"{ASIDE}*"))
    with held(folder) if asides else nullcontext():
        for aside in asides:
            if not (folder / CHECKPOINT).exists():
                for path in sorted(aside.iterdir(), key=lambda path: path.name == CHECKPOINT):
                    path.rename(folder / path.name)
            shutil.rmtree(aside)
