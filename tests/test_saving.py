"""Saving flows and densities: loading restores them, and files are written atomically."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyro_maf
from pyro_maf import (
    IAF,
    MAF,
    ConditionalIAF,
    ConditionalMADEMoG,
    ConditionalMAF,
    ConditionalMAFMoG,
    ConditionalRealNVP,
    FlowPrior,
    MADEMoG,
    MAFMoG,
    RealNVP,
    transforms,
)
from pyro_maf.distributions import ConditionalFlowPrior, MixtureFlow
from pyro_maf.transforms import ActNorm, BatchNorm, ConditionalFlow, Permute, Stack

TINY: dict[str, Any] = {"hidden_dims": [6], "seed": 3}
DEEP: dict[str, Any] = {**TINY, "num_layers": 2}
UNITS = {"loc": torch.tensor([1.0, 2.0, 3.0]), "scale": torch.tensor([0.5, 1.0, 2.0])}

SAVABLE: dict[str, Callable[[], Any]] = {
    "MaskedAutoregressive": lambda: transforms.MaskedAutoregressive(3, order=[2, 0, 1], degrees="random", **TINY),
    "InverseAutoregressive": lambda: transforms.InverseAutoregressive(3, activation="silu", **TINY),
    "Coupling": lambda: transforms.Coupling(3, mask=torch.tensor([True, False, False])),
    "BatchNorm": lambda: BatchNorm(3),
    "ActNorm": lambda: ActNorm(3),
    "Permute": lambda: Permute(np.array([2, 0, 1])),
    "LowerTriangularAffine": lambda: transforms.LowerTriangularAffine(3, loc=torch.ones(3), scale_tril=torch.eye(3)),
    "MAF": lambda: MAF(3, order="random", batch_norm=True, **DEEP),
    "IAF": lambda: IAF(3, order=[[0, 2, 1], [1, 0, 2]], activation="tanh", **DEEP),
    "RealNVP": lambda: RealNVP(3, networks="separate", **DEEP),
    "an inverse": lambda: MAF(3, batch_norm=True, **DEEP).inv,
    "stacks in a stack": lambda: Stack([Stack([MAF(3, **DEEP), Permute([1, 2, 0])]).inv, Stack([ActNorm(3)])]),
    "ConditionalFlow": lambda: ConditionalFlow(Stack([BatchNorm(3), MAF(3, context_dim=2, **DEEP)])),
    "ConditionalMAF": lambda: ConditionalMAF(3, 2, batch_norm=True, **DEEP),
    "ConditionalIAF": lambda: ConditionalIAF(3, 2, degrees="random", **DEEP),
    "ConditionalRealNVP": lambda: ConditionalRealNVP(3, 2, order="random", **DEEP),
    "MADEMoG": lambda: MADEMoG(3, num_components=2, **TINY),
    "MAFMoG": lambda: MAFMoG(3, num_components=2, batch_norm=True, **DEEP),
    "MixtureFlow": lambda: MixtureFlow(3, num_components=2, batch_norm=True, **DEEP),
    "FlowPrior of a stack": lambda: FlowPrior(Stack([IAF(3, **DEEP).inv, Permute([2, 1, 0])]), **UNITS),
    "FlowPrior of a density": lambda: FlowPrior(MAFMoG(3, **DEEP), **UNITS),
    "ConditionalMADEMoG": lambda: ConditionalMADEMoG(3, 2, order=(1, 0, 2), **TINY),
    "ConditionalMAFMoG": lambda: ConditionalMAFMoG(3, 2, **DEEP),
    "ConditionalFlowPrior": lambda: ConditionalFlowPrior(
        ConditionalMAF(3, 2, **DEEP), **UNITS, context_loc=torch.ones(2), context_scale=torch.tensor([2.0, 3.0])
    ),
}


def drawn(module: Any) -> Any:
    """The module with random parameters and statistics."""
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.copy_(0.3 * torch.randn(tensor.shape))
        for member in module.modules():
            if isinstance(member, BatchNorm):
                member.variance.add_(torch.rand(3))
    return module


def values(module: Any) -> list[torch.Tensor]:
    """Results of the module at some points, in its dtype."""
    kind = next((tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()), torch.float32)
    torch.manual_seed(5)
    x, context = torch.randn(4, 3, dtype=kind), torch.randn(4, 2, dtype=kind)
    module = module.condition(context) if hasattr(module, "condition") else module
    return [module.log_prob(x)] if hasattr(module, "log_prob") else [module(x), module.inv(x.clone())]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    MAF(3, batch_norm=True, **DEEP).save(path)
    return path


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["pyro_maf"])


# Saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SAVABLE)
def test_loading_restores_what_was_saved(name: str, dtype: torch.dtype, path: Path) -> None:
    module = drawn(SAVABLE[name]()).to(dtype).eval()
    module.save(str(path))
    torch.manual_seed(17)
    again = pyro_maf.load(path)
    assert (type(again), repr(again)) == (type(module), repr(module))
    stored = module.state_dict()
    assert list(again.state_dict()) == list(stored)
    assert all(value.dtype == stored[key].dtype for key, value in again.state_dict().items())
    assert all(torch.equal(value, stored[key]) for key, value in again.state_dict().items())
    assert all(map(torch.equal, values(again), values(module)))
    assert [parameter.requires_grad for parameter in again.parameters()] == [True] * len(list(module.parameters()))
    again.save(path.with_suffix(".again"))
    assert path.read_bytes() == path.with_suffix(".again").read_bytes()


def test_a_number_from_the_middle_of_a_table_is_saved(path: Path) -> None:
    norm = ActNorm(1)
    norm.loc.data = torch.tensor([[1.0, 2.0]])[:, 1]
    norm.save(path)
    assert pyro_maf.load(path).loc.item() == 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["MAF", "an inverse", "ConditionalFlow", "FlowPrior of a density"])
def test_training_modes_are_restored(name: str, training: bool, path: Path) -> None:
    module = SAVABLE[name]()
    getattr(module, "flow", module).train(training)
    frozen = next((member for member in module.modules() if isinstance(member, BatchNorm)), module)
    frozen.eval()
    module.save(path)
    assert [member.training for member in pyro_maf.load(path).modules()] == [m.training for m in module.modules()]


def test_a_layer_that_occurs_twice_is_saved_twice(path: Path) -> None:
    layer = drawn(MAF(3, **DEEP))
    Stack([layer, layer]).save(path)
    again = pyro_maf.load(path)
    assert all(member.training for member in again.modules())
    assert all(map(torch.equal, values(again), values(Stack([layer, layer]))))


def test_sizes_of_numpy_and_any_sequence_are_kept(path: Path) -> None:
    flow = MAF(
        np.int64(3), num_layers=np.int32(2), hidden_dims=np.array([6, 5]), order=range(3), batch_norm=np.bool_(True)
    )
    flow.save(path)
    assert repr(pyro_maf.load(path)) == repr(flow)
    arguments = header_of(path)["arguments"]
    assert arguments == {"input_dim": 3, "num_layers": 2, "hidden_dims": [6, 5], "order": [0, 1, 2], "batch_norm": True}


def test_arguments_that_change_later_are_saved_as_they_were(path: Path) -> None:
    hidden, layers, mask = [6], [ActNorm(2)], np.array([True, True, False])
    made = [MAF(2, num_layers=1, hidden_dims=hidden), Stack(layers), transforms.Coupling(3, mask=mask)]
    hidden.append(7)
    layers.append(ActNorm(2))
    mask[:] = [True, False, False]
    for flow in made:
        flow.save(path)
        assert repr(pyro_maf.load(path)) == repr(flow)


def test_loading_knows_classes_that_a_program_derives(path: Path) -> None:
    class Quiet(MAF):
        pass

    Quiet(2, **DEEP).save(path)
    assert type(pyro_maf.load(path)) is Quiet


def test_a_class_of_the_same_name_does_not_replace_another(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_maf.saving._classes", dict(pyro_maf.saving._classes))
    impostor = type("MAF", (MAF,), {"__module__": "elsewhere"})
    assert type(pyro_maf.load(saved)) is MAF
    with pytest.raises(TypeError, match="MAF cannot be saved: its name is that of a class of pyro_maf"):
        impostor(2, **DEEP).save(saved)


# Atomic writes


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync"])
def test_a_failed_write_leaves_the_old_file(broken: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(broken, fail)
    for path in (saved, saved.with_name("other")):
        with pytest.raises(OSError, match="No space left"):
            IAF(4, **DEEP).save(path)
    assert os.listdir(saved.parent) == [saved.name]
    assert saved.read_bytes() == before


def test_a_file_replaces_another_and_can_be_read_as_any_other(saved: Path) -> None:
    IAF(4, **DEEP).save(saved)
    assert type(pyro_maf.load(saved)) is IAF
    assert os.listdir(saved.parent) == [saved.name]
    (saved.parent / "plain").write_text("")
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE((saved.parent / "plain").stat().st_mode)


def test_saving_where_no_file_can_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"save expected an existing folder for flow, got {tmp_path}/none"):
        MAF(2, **DEEP).save(tmp_path / "none" / "flow")
    with pytest.raises(IsADirectoryError, match=f"save expected a file name, got the folder {tmp_path}"):
        MAF(2, **DEEP).save(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("around", [lambda flow: flow, lambda flow: Stack([Stack([flow]).inv]), FlowPrior])
@pytest.mark.parametrize("make", [ConditionalMAF, ConditionalMADEMoG])
def test_a_flow_conditioned_on_a_context_is_not_saved(make: Any, around: Callable[[Any], Any], path: Path) -> None:
    conditioned = make(3, 2, **TINY).condition(torch.zeros(4, 2))
    if make is ConditionalMADEMoG and around is not FlowPrior:
        around = torch.nn.Identity()
    with pytest.raises(TypeError, match=r"cannot be saved: save the conditional .* and condition it anew") as caught:
        around(conditioned).save(path)
    assert "\n" not in str(caught.value)
    assert not path.exists()


def test_an_argument_that_json_does_not_hold_is_named(path: Path) -> None:
    class Wavy(ActNorm):
        def __init__(self, wave: Any) -> None:
            super().__init__(2)

    with pytest.raises(TypeError, match="Wavy cannot be saved: its argument wave is ufunc, which JSON does not hold"):
        Wavy(np.sin).save(path)
    assert not path.exists()


@pytest.mark.parametrize("path", [3, None, ["flow.safetensors"]])
def test_load_refuses_invalid_paths(path: object) -> None:
    with pytest.raises(TypeError, match="load expected the path of a file, got"):
        pyro_maf.load(path)  # type: ignore[arg-type]
