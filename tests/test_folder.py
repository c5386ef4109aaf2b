"""The folder of a fit: one fit at a time writes there, and an old fit remains until a new one has begun."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pyro_maf
from pyro_maf import MAF, fit
from pyro_maf._core import files
from pyro_maf._core.files import CHECKPOINT, FILES, RECORD, held, recover, replaced
from pyro_maf.cli.commands import app
from pyro_maf.training.loop import Loop
from tests.fits import gaussian_rows, same, seeded, weights

OPTIONS: dict[str, Any] = {"batch_size": 50, "max_epochs": 1, "progress": False}
HOLD = """
import pathlib, sys
from pyro_maf._core.files import held
with held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def flow(**options: Any) -> Any:
    return seeded(lambda: MAF(2, num_layers=1, hidden_dims=[4], **options))


def contents(at: Path) -> dict[str, bytes]:
    return {str(path.relative_to(at)): path.read_bytes() for path in at.rglob("*") if path.is_file()}


@contextmanager
def another_process(at: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that locks a folder until it is told to end, or killed."""
    command = [sys.executable, "-c", HOLD, str(at)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


# -- one at a time -----------------------------------------------------------------------------------------------------


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for at in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=rf"^fit expected a folder at {at}, found a file there: choose another\.$"):
            fit(flow(), gaussian_rows(), folder=at)


def test_a_second_process_is_refused_until_the_first_has_ended_or_was_killed(tmp_path: Path) -> None:
    at = tmp_path / "fit"
    with another_process(at) as process:
        with pytest.raises(ValueError, match=rf"another fit at work in {at} \(process {process.pid} on .*, since "):
            fit(flow(), gaussian_rows(100), folder=at, **OPTIONS)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(contents(at)) == [".lock"]
    fit(flow(), gaussian_rows(100), folder=at, **OPTIONS)
    assert not list(at.glob(".*"))
    with another_process(at) as process:
        for asked in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match="another fit at work"):
                fit(flow(), gaussian_rows(100), folder=at, **OPTIONS, **asked)
        for asked in (["--overwrite"], ["--resume"]):
            result = CliRunner().invoke(app, ["fit", "none.csv", "--folder", str(at), *asked])
            assert result.exit_code == 2
            assert f"another fit at work in {at} (process {process.pid}" in " ".join(result.stderr.split())
        process.communicate()
    assert not list(at.glob(".*"))


def test_a_second_thread_is_refused(tmp_path: Path) -> None:
    refusals = []

    def intrude() -> None:
        with pytest.raises(ValueError, match=r"another fit at work in .*another thread of this process") as caught:
            fit(flow(), gaussian_rows(100), folder=tmp_path, resume=True, **OPTIONS)
        refusals.append(str(caught.value))

    with held(tmp_path):
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
    assert len(refusals) == 1
    assert fit(flow(), gaussian_rows(100), folder=tmp_path, resume=True, **OPTIONS).epochs == 1


def test_the_process_that_locks_a_folder_can_fit_in_it(tmp_path: Path) -> None:
    at = tmp_path / "fit"
    with held(at, make=False):
        assert not at.exists()
        with held(at):
            assert (at / ".lock").exists()
        assert (at / ".lock").exists()
    assert not list(at.iterdir())


def test_a_lock_file_removed_while_being_opened_is_not_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The previous owner releases the folder between our opening the lock file and locking it."""
    lock, opened = files._lock_file, []

    def late(file: Any) -> None:
        opened.append(file)
        if len(opened) == 1:
            (tmp_path / ".lock").unlink()
        lock(file)

    monkeypatch.setattr(files, "_lock_file", late)
    with held(tmp_path):
        assert len(opened) == 2
        assert os.path.samestat((tmp_path / ".lock").stat(), os.fstat(opened[1].fileno()))


def test_file_systems_without_locks_cause_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "_lock_file", refuse)
    with pytest.warns(UserWarning, match=f"fit cannot lock {tmp_path}: No locks available"):
        fit(flow(), gaussian_rows(100), folder=tmp_path, **OPTIONS)
    assert (tmp_path / CHECKPOINT).exists()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("pyro_maf._core.files.open", refuse, raising=False)
    with pytest.raises(PermissionError, match=f"Permission denied: '{tmp_path}'"):
        fit(flow(), gaussian_rows(100), folder=tmp_path, **OPTIONS)
    assert not list(tmp_path.iterdir())


# -- an old fit gives way ----------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    fit(flow(), gaussian_rows(100), folder=tmp_path / "fit", **OPTIONS)
    for name in (RECORD, "notes.txt"):
        (tmp_path / "fit" / name).write_text("old")
    return tmp_path / "fit"


def test_a_fit_is_overwritten_with_all_its_files(old: Path) -> None:
    result = fit(flow(activation="tanh"), gaussian_rows(100), folder=old, overwrite=True, **OPTIONS)
    assert same(weights(pyro_maf.load(old / "model.safetensors")), weights(result.density))
    assert {path.name for path in old.iterdir() if path.is_file()} == {*FILES[:3], "notes.txt"}
    again = fit(flow(activation="tanh"), gaussian_rows(100), folder=old, resume=True, **OPTIONS)
    assert same(weights(again.density), weights(result.density))


def test_an_old_fit_stays_until_a_new_one_has_a_checkpoint(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = contents(old), []

    def killed(loop: Loop, taken: int) -> None:
        seen.append(contents(old))  # as after a kill
        raise MemoryError

    monkeypatch.setattr(Loop, "save", killed)
    with pytest.raises(MemoryError):
        fit(flow(activation="tanh"), gaussian_rows(100), folder=old, overwrite=True, **OPTIONS)
    (at_the_kill,) = seen
    assert at_the_kill.pop(".lock")
    assert at_the_kill == before
    assert contents(old) == before


def test_an_old_fit_is_restored_if_the_new_one_cannot_be_written(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(old)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fit(flow(activation="tanh"), gaussian_rows(100), folder=old, overwrite=True, **OPTIONS)
    assert contents(old) == before


@pytest.mark.parametrize("moves", range(5))
def test_a_kill_while_an_old_fit_is_set_aside_loses_nothing(
    moves: int, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a second kill while it is restored; the next call finds it."""
    before, rename = contents(old), Path.rename

    def dying(after: int) -> Any:
        left = iter(range(after))

        def move(path: Path, target: Path) -> Path:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return rename(path, target)

        return move

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dying(moves))
        patched.setattr(files, "recover", lambda at: None)
        with pytest.raises(KeyboardInterrupt), replaced(old):
            raise KeyboardInterrupt
    assert len(list(old.glob(".replaced-*"))) == 1
    for after in range(moves):
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", dying(min(1, after)))
            with pytest.raises(KeyboardInterrupt):
                recover(old)
    with pytest.raises(ValueError, match="fit found a fit in"):
        fit(flow(), gaussian_rows(100), folder=old, **OPTIONS)
    assert contents(old) == before


def test_an_old_fit_is_removed_once_a_new_one_has_begun(old: Path) -> None:
    (old / ".replaced-abc").mkdir()
    (old / ".replaced-abc" / "model.safetensors").write_text("older")
    before = (old / "model.safetensors").read_bytes()
    recover(old)
    assert (old / "model.safetensors").read_bytes() == before
    assert not list(old.glob(".*"))


def test_a_command_restores_an_old_fit(old: Path) -> None:
    (old / RECORD).unlink()
    aside = old / ".replaced-abc"
    aside.mkdir()
    for name in FILES[:3]:
        (old / name).rename(aside / name)
    result = CliRunner().invoke(app, ["info", str(old)])
    assert result.exit_code == 0
    assert (old / "model.safetensors").exists()
    assert not list(old.glob(".*"))


@pytest.mark.parametrize("asked", [{"overwrite": True}, {"overwrite": True, "resume": True, "folder": "fit"}])
def test_overwrite_needs_a_folder_and_excludes_resume(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected the folder to overwrite|both resume and overwrite"):
        fit(flow(), gaussian_rows(100), **asked)
