"""Compiled code on disk: results are right whatever happens to the files, and a warning says what was wrong."""

from __future__ import annotations

import ast
import errno
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyro_maf.sweep.kernels import compiler, kernels

pytest.importorskip("numba")
ROOT = Path(__file__).parent.parent
SOURCE = "def twice(x):\n    return x + x\n\n\ndef thrice(x):\n    return x + x + x\n"


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_said", [])


@pytest.fixture(scope="module", autouse=True)
def beside_its_source() -> Iterator[None]:
    """Keep compiled code next to its source, whatever the environment says."""
    import numba

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NUMBA_CACHE_DIR", raising=False)
        patch.setattr(numba.config, "CACHE_DIR", "")
        yield


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two compiled functions."""
    folder = tmp_path_factory.mktemp("origin")
    (folder / "tiny.py").write_text(SOURCE)
    assert [answer(folder, name, 4) for name in ("twice", "thrice")] == [(8, 0), (12, 0)]
    yield folder
    del sys.modules["tiny"]


@pytest.fixture
def folder(origin: Path) -> Iterator[Path]:
    """The same folder, restored afterwards."""
    kept = origin.with_name("kept")
    shutil.copytree(origin, kept, dirs_exist_ok=True)
    yield origin
    shutil.rmtree(origin)
    kept.rename(origin)


def answer(folder: Path, name: str, x: Any) -> tuple[Any, int]:
    """Result of a function in a newly imported module, and number of its loads from disk."""
    import numba

    spec = importlib.util.spec_from_file_location("tiny", folder / "tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["tiny"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = compiler.stored(numba.njit(getattr(module, name)))
    return function(x), sum(function.stats.cache_hits.values())


def only(folder: Path, pattern: str) -> Path:
    (path,) = (folder / "__pycache__").glob(pattern)
    return path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "a stub": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "a flipped bit": flip,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "of another function": lambda path: shutil.copy(path.with_name(path.name.replace("twice-1", "thrice-5")), path),
}


def test_compiling_is_announced_once_for_each_precision(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiler._say.cache_clear()
    # Steps are counted in single precision in both cases, so arrays of both kinds occur.
    numbers, steps = np.ones(2), np.ones(1, np.float32)
    single, double = (steps, steps), (numbers, numbers, steps)
    printed = []
    for x in (single, single, double):  # each as in a newly started process
        answer(folder, "twice", x)
        printed.append(capsys.readouterr().err)
    compiler._say.cache_clear()
    answer(folder, "twice", double)
    printed.append(capsys.readouterr().err)
    assert ["single precision" in printed[0], "double precision" in printed[2]] == [True, True]
    assert [printed[1], printed[3]] == ["", ""]


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_code_is_compiled_again_with_a_warning(damage: str, kind: str, folder: Path) -> None:
    path = only(folder, f"tiny.twice*.{kind}")
    DAMAGES[damage](path)
    with pytest.warns(RuntimeWarning, match=f"compiled code in {path.parent} damaged .{path.name}") as caught:
        assert answer(folder, "twice", 4) == (8, 0)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    # Repaired, so without a warning.
    assert answer(folder, "twice", 4) == (8, 1)
    assert answer(folder, "thrice", 4) == (12, 1)


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_code_that_is_missing_is_compiled_again(kind: str, folder: Path) -> None:
    only(folder, f"tiny.twice*.{kind}").unlink()
    assert answer(folder, "twice", 4) == (8, 0)
    assert answer(folder, "twice", 4) == (8, 1)


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_files_that_cannot_be_read_or_replaced_cause_a_warning_each_time(kind: str, folder: Path) -> None:
    path = only(folder, f"tiny.twice*.{kind}")
    replace_by_folder(path)
    for _ in range(2):
        compiler._said.clear()
        with pytest.warns(RuntimeWarning, match=f"cannot read its compiled code in {path.parent} ") as caught:
            assert answer(folder, "twice", 4) == (8, 0)
        assert len(caught) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_code_that_cannot_be_written_is_used_anyway(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    before = sorted((folder / "__pycache__").iterdir())
    monkeypatch.setattr(os, "fsync", refuse)
    place = f"could not write its compiled code to {folder / '__pycache__'} .{os.strerror(number)}"
    with pytest.warns(RuntimeWarning, match=place) as caught:
        assert answer(folder, "twice", 4.5) == (9.0, 0)
    assert len(caught) == 1
    assert sorted((folder / "__pycache__").iterdir()) == before
    assert answer(folder, "twice", 4) == (8, 1)


@pytest.mark.parametrize("what", ["numba", "the sources"])
def test_code_of_another_version_is_compiled_again(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "numba":
        monkeypatch.setattr("numba.__version__", "0.0")
    else:
        monkeypatch.setattr(compiler, "_stamp", lambda: "of other sources")
    assert answer(folder, "twice", 4) == (8, 0)
    assert answer(folder, "twice", 4) == (8, 1)


def test_code_for_classes_that_are_no_longer_there_is_compiled_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpickle(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'pyro_maf.sweep.earlier'")

    with monkeypatch.context() as patch:
        patch.setattr("numba.core.caching.pickle.loads", unpickle)
        assert answer(folder, "twice", 4) == (8, 0)
    assert answer(folder, "twice", 4) == (8, 1)


def test_processes_that_compile_at_once_never_run_each_others_code(folder: Path) -> None:
    """Both number their signature 1; one is last to write the index, the other the code."""
    whole = (folder / "__pycache__").rename(folder / "whole")
    assert answer(folder, "twice", 4.5) == (9.0, 0)
    shutil.copy(only(folder, "tiny.twice*.nbc"), whole)
    shutil.rmtree(folder / "__pycache__")
    whole.rename(folder / "__pycache__")
    assert answer(folder, "twice", 4) == (8, 0)
    assert answer(folder, "twice", 4.5) == (9.0, 0)
    assert [answer(folder, "twice", x) for x in (4, 4.5)] == [(8, 1), (9.0, 1)]


def test_nothing_in_a_foreign_file_is_run(folder: Path) -> None:
    import pickle

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(folder / "witness"),)

    for path in list((folder / "__pycache__").glob("tiny.twice*")):
        path.write_bytes(pickle.dumps(Payload()))
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert answer(folder, "twice", 4) == (8, 0)
    assert not (folder / "witness").exists()


def test_the_sources_of_compiled_code_are_all_known() -> None:
    """After an edit of any of them, code is compiled anew."""
    folder, seen, ahead = Path(compiler.__file__).parent.parent, set(), ["kernels/entries"]
    while ahead:
        name = ahead.pop()
        seen.add(name)
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_maf.sweep."):
                ahead += {node.module.removeprefix("pyro_maf.sweep.").replace(".", "/")} - seen
    assert seen == {"kernels/entries", *compiler.SOURCES}


def test_compiled_code_depends_on_its_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    stamp = compiler._stamp()
    monkeypatch.setattr(compiler, "CONSTANTS", (*compiler.CONSTANTS[:-1], 3.0))
    assert compiler._stamp.__wrapped__() != stamp


PROGRAM = """
import hashlib, sys, torch, pyro_maf
torch.manual_seed(0)
flow = pyro_maf.NSF(3, num_layers=1, hidden_dims=[8])
for parameter in flow.parameters():
    parameter.data.add_(torch.randn_like(parameter))
flow.requires_grad_(sys.argv[1] == "gradients")
x = 3 * torch.randn(200, 3)
log_prob = pyro_maf.FlowPrior(flow).log_prob(x)
results = [log_prob]
if log_prob.requires_grad:
    results += torch.autograd.grad(log_prob.sum(), list(flow.parameters()))
with torch.no_grad():
    results += flow.inv(x), flow(x)
print((results[-1] - x).abs().max() > 0.1, *[hashlib.sha256(each.detach().numpy()).hexdigest() for each in results])
"""


@pytest.mark.skipif(kernels() is None, reason="no compiled kernels on this machine")
@pytest.mark.parametrize("what", ["values", pytest.param("gradients", marks=pytest.mark.slow)])
def test_the_process_that_compiles_has_the_results_of_later_ones(what: str, tmp_path: Path) -> None:
    """Log-densities, noise, samples and gradients are equal bit by bit, even with code that was never on disk."""
    kernel = kernels()
    assert kernel is not None
    cache = kernel.forward._cache
    place = tmp_path / cache._impl.locator.get_suitable_cache_subpath(kernel.__file__)
    place.mkdir()
    (place / Path(cache._cache_file._index_path).name).write_bytes(b"garbage")
    environment = {**os.environ, "PYRO_MAF_KERNEL": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    first, later = (
        subprocess.run(
            [sys.executable, "-c", PROGRAM, what], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        for _ in range(2)
    )
    assert first.stderr.count("RuntimeWarning") == 1
    assert f"found its compiled code in {place} damaged" in first.stderr
    assert "compiles its kernels" in first.stderr
    assert not later.stderr
    assert first.stdout.startswith("tensor(True)")
    assert first.stdout == later.stdout
