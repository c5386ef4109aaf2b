"""Damaged files are refused by a one-line error that names them, or change nothing; none is deleted or used."""

from __future__ import annotations

import errno
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load, save, save_file
from torch import Tensor

import pyro_maf
from pyro_maf import MAF, fit
from pyro_maf._core.files import write_whole
from pyro_maf.training.records import Checkpoint
from tests.fits import gaussian_rows, same, seeded, weights

OPTIONS: dict[str, Any] = {"batch_size": 50, "learning_rate": 1e-2, "progress": False}
JUNK: tuple[Any, ...] = (None, True, -1, 3, 1.5, 10**30, "x", [], {}, [1], {"a": 1}, "NaN")
NAMES = ("checkpoint.safetensors", "log.csv", "model.safetensors")
LENGTH = struct.Struct("<Q")


def flow(**options: Any) -> Any:
    return seeded(lambda: MAF(2, num_layers=1, hidden_dims=[4], **options))


def resumed(folder: Path, **options: Any) -> Any:
    return fit(flow(), gaussian_rows(100), folder=folder, resume=True, **{**OPTIONS, "max_epochs": 2, **options})


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origin")
    fit(flow(), gaussian_rows(100), folder=folder, max_epochs=1, **OPTIONS)
    return folder


@pytest.fixture
def folder(origin: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(origin, tmp_path / "fit"))


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    (size,) = LENGTH.unpack_from(content)
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: dict[str, Any], numbers: bytes) -> bytes:
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return LENGTH.pack(len(encoded)) + encoded + numbers


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all entries in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(deeper for key, item in inner for deeper in places(item, (*place, key)))]


def changed(value: Any, chance: random.Random) -> Any:
    """The JSON value with an entry removed, or replaced by one of another type."""
    value = json.loads(json.dumps(value))
    *way, last = chance.choice(places(value)[1:])
    at = value
    for key in way:
        at = at[key]
    if chance.random() < 0.4:
        del at[last]
    else:
        at[last] = chance.choice([junk for junk in JUNK if type(junk) is not type(at[last])])
    return value


def flipped(content: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def blotted(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    end = min(len(content), at + chance.choice([1, 8, 64, 512]))
    return content[:at] + chance.choice([bytes(end - at), chance.randbytes(end - at)]) + content[end:]


def rewritten(content: bytes, chance: random.Random) -> bytes:
    """A file as rewritten by another program, which may omit the digest or a tensor."""
    header, numbers = parts(content)
    (key, text) = next(item for item in header["__metadata__"].items() if item[0] != "digest")
    how = chance.randrange(4)
    if how == 0:
        header["__metadata__"][key] = json.dumps(changed(json.loads(text), chance))
    elif how == 1:
        header["__metadata__"][key] = f'{text[:-1]}, "{chance.choice(list(json.loads(text)))}": null}}'
    elif how == 2:
        header = changed(header, chance)
    else:
        tensors = load(content)
        del tensors[chance.choice(list(tensors))]
        return save(tensors, {key: text})
    return joined(header, numbers)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": lambda content, chance: content[: chance.randrange(len(content))],
    "flipped": flipped,
    "blotted": blotted,
    "longer": lambda content, chance: content + chance.randbytes(8),
    "rewritten": rewritten,
}


def damages(how: str, content: bytes, count: int) -> Iterator[bytes]:
    """Damaged versions of `content`, the same at each call."""
    chance = random.Random(how)
    some = (DAMAGES[how](content, chance) for _ in range(2 * count))
    return islice((damaged for damaged in some if damaged != content), count)


def is_refused(path: Path, damaged: bytes, run: Callable[[], Any]) -> bool:
    """Whether a call on a damaged file raises a one-line error and leaves the file unchanged."""
    path.write_bytes(damaged)
    try:
        run()
    except ValueError as error:
        return str(path) in str(error) and "\n" not in str(error) and path.read_bytes() == damaged
    return False


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_refused_whole(how: str, folder: Path) -> None:
    path = folder / "checkpoint.safetensors"
    log = (folder / "log.csv").read_bytes()
    for damaged in damages(how, path.read_bytes(), 40):
        assert is_refused(path, damaged, lambda: resumed(folder).density)
    assert (folder / "log.csv").read_bytes() == log
    assert {file.name for file in folder.glob("*.*")} == {*NAMES}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_model_is_refused(how: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    for damaged in damages(how, path.read_bytes(), 60):
        assert is_refused(path, damaged, lambda: pyro_maf.load(path))


def test_no_bit_of_the_weights_flips_unnoticed(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    _, numbers = parts(content)
    before = content[: len(content) - len(numbers)]
    for bit in range(0, 8 * len(numbers), 37):
        damaged = bytearray(numbers)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(before + damaged)
        with pytest.raises(ValueError, match="damaged: its content is not what was written"):
            pyro_maf.load(path)


@pytest.mark.parametrize(("name", "key"), [("model", "pyro_maf"), ("checkpoint", "pyro_maf.fit")])
def test_a_file_without_a_digest_is_refused(name: str, key: str, folder: Path) -> None:
    path = folder / f"{name}.safetensors"
    header, _ = parts(path.read_bytes())
    save_file(load(path.read_bytes()), path, {key: header["__metadata__"][key]})
    with pytest.raises(ValueError, match=f"^(load|fit) found no digest in .*{name}.safetensors: another program"):
        pyro_maf.load(path) if name == "model" else resumed(folder)


@pytest.mark.parametrize("seed", range(3))
def test_a_checkpoint_that_this_fit_would_not_write_is_refused(seed: int, folder: Path) -> None:
    """As another version of this package might write it: valid, but with other contents."""
    path, chance = folder / "checkpoint.safetensors", random.Random(seed)
    found = Checkpoint.read(path)
    for _ in range(10):
        facts, tensors = dict(found.facts), dict(found.tensors)
        del facts["format"]
        name = chance.choice(sorted(tensors))
        how = chance.randrange(3)
        if how == 0:
            removed = chance.choice(sorted(facts))
            del facts[removed]
        elif how == 1:
            del tensors[name]
        else:
            tensors[name] = tensors[name].unsqueeze(0)
        write_whole(path, Checkpoint(tensors, facts).packed())
        assert is_refused(path, path.read_bytes(), lambda: resumed(folder).density)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_checkpoint_of_another_device_is_resumed(device: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_cuda(_: torch.device) -> dict[str, Tensor]:
        return {"cpu": torch.get_rng_state(), "cuda": torch.zeros(16, dtype=torch.uint8)}

    if device == "cpu":  # the fit that resumes, not the one that wrote it
        path = folder / "checkpoint.safetensors"
        found = Checkpoint.read(path)
        write_whole(path, Checkpoint({**found.tensors, "global/cuda": torch.zeros(16)}, found.facts).packed())
    else:
        monkeypatch.setattr("pyro_maf.training.state.generator_states", with_cuda)
    assert resumed(folder).epochs == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("taken", "3"),
        ("taken", -1),
        ("averaged", 1.5),
        ("seconds", None),
        ("history", [[1.0, 2.0]]),
        ("history", [[1.0, 2.0, 3.0, 4.0, "5"]]),
        ("skipped", [0, 0]),
        ("schedule", {"learning_rate": 1e-2}),
        ("stop_reason", 4),
        ("settings", []),
    ],
)
def test_metadata_of_another_form_is_refused(name: str, value: Any, folder: Path) -> None:
    path = folder / "checkpoint.safetensors"
    found = Checkpoint.read(path)
    write_whole(path, Checkpoint(found.tensors, {**found.facts, name: value}).packed())
    with pytest.raises(ValueError, match=f"^fit .*{name}") as caught:
        resumed(folder)
    assert str(path) in str(caught.value)


def test_files_in_each_others_place_are_refused(folder: Path) -> None:
    model, checkpoint, log = (folder / name for name in ("model.safetensors", "checkpoint.safetensors", "log.csv"))
    with pytest.raises(ValueError, match=f"found no pyro_maf architecture in {checkpoint}"):
        pyro_maf.load(checkpoint)
    for other in (model, log):
        shutil.copy(other, checkpoint)
        with pytest.raises(ValueError, match=f"^fit found .*{checkpoint}.* not a checkpoint"):
            resumed(folder)
    checkpoint.unlink()
    checkpoint.mkdir()
    with pytest.raises(ValueError, match=f"^fit found {checkpoint} damaged, truncated or not a checkpoint"):
        resumed(folder)


def test_a_checkpoint_of_another_precision_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r'fit with another precision .*"torch.float32", now "torch.float64"'):
        fit(flow().double(), gaussian_rows(100), folder=folder, resume=True, max_epochs=2, **OPTIONS)


# -- no room on the disk -----------------------------------------------------------------------------------------------


def full(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a disk that is full after a number of files."""
    written = iter(range(10**6))

    def fsync(_: int) -> None:
        if next(written) >= at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)


@pytest.mark.parametrize("at", [1, 3])
def test_a_full_disk_ends_no_fit_under_way(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit(flow(), gaussian_rows(100), max_epochs=3, **OPTIONS)
    folder = tmp_path / "fit"
    with monkeypatch.context() as patched:
        full(at, patched)
        with pytest.warns(UserWarning, match="^fit could not write") as caught:
            result = fit(flow(), gaussian_rows(100), folder=folder, max_epochs=3, **OPTIONS)
    messages = [str(warning.message) for warning in caught]
    assert all(
        any(f"could not write {folder / name}: No space left" in line for line in messages) for name in NAMES[at:]
    )
    assert same(weights(result.density), weights(whole.density))
    assert not list(folder.glob(".*"))
    again = fit(flow(), gaussian_rows(100), folder=folder, max_epochs=3, resume=True, **OPTIONS)
    assert same(weights(again.density), weights(whole.density))
    assert same(weights(pyro_maf.load(folder / "model.safetensors")), weights(whole.density))


class Removing(MAF):
    """A flow that removes a folder during training."""

    at: ClassVar[Path]

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            shutil.rmtree(self.at, ignore_errors=True)
        return super().inverse_and_log_det(y, context)


def test_a_folder_that_disappears_ends_no_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Removing, "at", tmp_path / "fit", raising=False)
    monkeypatch.setattr("pyro_maf.training.records.find_spec", lambda name: None)  # TensorBoard writes in a thread
    model = seeded(lambda: Removing(2, num_layers=1, hidden_dims=[4]))
    with pytest.warns(UserWarning, match=f"fit could not write {tmp_path}/fit/.*: save expected an existing folder"):
        result = fit(model, gaussian_rows(100), folder=tmp_path / "fit", max_epochs=2, **OPTIONS)
    assert result.epochs == 2


@pytest.mark.parametrize("how", ["load", "resume"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(
    how: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("safetensors.safe_open", refuse)
    with pytest.raises(ValueError, match=r"cannot read .*\.safetensors: Permission denied\.$"):
        pyro_maf.load(folder / "model.safetensors") if how == "load" else resumed(folder)


def test_a_damaged_checkpoint_can_be_overwritten(folder: Path) -> None:
    (folder / "checkpoint.safetensors").write_bytes(b"damaged")
    fit(flow(), gaussian_rows(100), folder=folder, overwrite=True, max_epochs=1, **OPTIONS)
    assert resumed(folder).epochs == 2


def test_a_board_that_cannot_be_written_ends_no_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorboard.SummaryWriter, "flush", refuse)
    with pytest.warns(UserWarning, match=f"fit could not write to {tmp_path}/tensorboard: .*No space left") as caught:
        assert fit(flow(), gaussian_rows(100), folder=tmp_path, max_epochs=3, **OPTIONS).epochs == 3
    assert len([warning for warning in caught if "tensorboard" in str(warning.message)]) == 1
    assert pyro_maf.load(tmp_path / "model.safetensors")


def test_a_disk_that_is_full_from_the_start_refuses_a_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(0, monkeypatch)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/checkpoint.safetensors'"):
        fit(flow(), gaussian_rows(100), folder=tmp_path, max_epochs=1, **OPTIONS)
    assert not list(tmp_path.iterdir())
