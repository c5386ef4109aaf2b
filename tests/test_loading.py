"""Files that are not models or are damaged: refused by a one-line error that names the file, without running code."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyro_maf
from pyro_maf import MAF
from pyro_maf.saving import MODEL, Savable, pack


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    MAF(3, batch_norm=True, num_layers=2, hidden_dims=[6], seed=3).save(path)
    return path


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["pyro_maf"])


def rewrite(path: Path, header: Any = None, state: dict[str, torch.Tensor] | None = None) -> None:
    """Rewrite a file with another architecture or with tensors replaced."""
    text = header if isinstance(header, str) else json.dumps(header_of(path) if header is None else header)
    path.write_bytes(pack({**load_file(path), **(state or {})}, MODEL, text))


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pyro_maf.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"load expected a file at {tmp_path}/none, found nothing"):
        pyro_maf.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=f"load expected a file at {tmp_path}, found a folder"):
        pyro_maf.load(str(tmp_path))
    pyro_maf.MAF(2).save(tmp_path / "model.safetensors")
    with pytest.raises(
        FileNotFoundError, match=rf"found a folder: the model in it is {tmp_path}/model\.safetensors\.$"
    ):
        pyro_maf.load(tmp_path)


def test_a_truncated_file_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:size])
        refused(saved, "damaged, truncated or not a safetensors file")
    saved.write_bytes(content + b"\0")
    refused(saved, "damaged, truncated or not a safetensors file")


def test_a_flipped_bit_in_the_header_is_refused_or_changes_nothing(saved: Path) -> None:
    content, before = saved.read_bytes(), pyro_maf.load(saved)
    (size,) = struct.unpack("<Q", content[:8])
    refusals = 0
    for place in range(0, 8 + size, 7):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 7)
        saved.write_bytes(flipped)
        try:
            assert repr(pyro_maf.load(saved)) == repr(before)
        except ValueError:
            refused(saved, "^load ")
            refusals += 1
    assert refusals > 100


def test_files_of_other_programs_are_refused(path: Path) -> None:
    save_file({"weight": torch.ones(2)}, path)
    refused(path, "found no pyro_maf architecture in .*: another program wrote it")
    path.write_text("a letter\nof two lines, and of more bytes than a header's length takes\n")
    refused(path, "damaged, truncated or not a safetensors file")
    torch.save(MAF(2).state_dict(), path)
    refused(path, "damaged, truncated or not a safetensors file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "it has format 2, this version reads up to 1"),
        ({"format": "new"}, "could not rebuild"),
        ({"class": "Sorcery"}, "Sorcery is not a known class; import the module that defines it first"),
        ({"class": "os.system", "arguments": {"command": "true"}}, "os.system is not a known class"),
        ({"class": ["MAF"]}, "could not rebuild"),
        ({"class": "ConditionalMAF"}, "could not rebuild"),
        ({"arguments": {"input_dim": 4}}, "size mismatch"),
        ({"arguments": {"input_dim": -1}}, "MAF expected input_dim of at least 1, got -1"),
        ({"arguments": {"input_dim": 10**30}}, "could not rebuild"),
        ({"arguments": {"input_dim": 3, "seed": 10**30, "order": "random"}}, "could not rebuild"),
        ({"arguments": {"input_dim": 3, "color": "red"}}, "unexpected keyword argument 'color'"),
        ({"arguments": {"input_dim": {"class": "MAF", "arguments": {"input_dim": 3}}}}, "input_dim to be an int"),
        ({"arguments": None}, "could not rebuild"),
        ({"training": None}, "could not rebuild"),
    ],
)
def test_an_architecture_that_was_tampered_with_is_refused(change: dict[str, Any], message: str, saved: Path) -> None:
    rewrite(saved, {**header_of(saved), **change})
    refused(saved, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": 1}', "[" * 100_000])
def test_an_invalid_architecture_is_refused(text: str, saved: Path) -> None:
    rewrite(saved, text)
    refused(saved, "could not rebuild")


@pytest.mark.parametrize(
    "tensors",
    [
        {"layers.1.made.order": torch.tensor([0, 0, 1])},
        {"layers.1.made.activation_index": torch.tensor(99)},
        {"layers.1.made.layers.0.weight": torch.zeros(2, 2)},
        {"layers.9.made.order": torch.tensor([0, 1, 2])},
    ],
)
def test_tensors_of_another_model_are_refused(tensors: dict[str, torch.Tensor], saved: Path) -> None:
    rewrite(saved, state=tensors)
    refused(saved, "could not rebuild")


def test_loading_runs_no_code(path: Path, saved: Path) -> None:
    witness = saved.parent / "witness"

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(witness),)

    path.write_bytes(pickle.dumps(Payload()))
    refused(path, "damaged, truncated or not a safetensors file")
    torch.save(Payload(), path)
    refused(path, "damaged, truncated or not a safetensors file")
    MAF(3).save(path)
    call = {"class": "mkdir", "arguments": {"path": str(witness)}}
    rewrite(path, {**header_of(path), "arguments": {"input_dim": 3, "order": [call]}})
    refused(path, "mkdir is not a known class")
    assert not witness.exists()
    assert all(issubclass(known, Savable) for known in pyro_maf.saving._classes.values())
