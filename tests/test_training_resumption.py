"""Fits that were interrupted, killed or completed resume to exactly the weights of an uninterrupted fit."""

from __future__ import annotations

import csv
import math
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import pyro_maf
from pyro_maf import IAF, MAF, FlowPrior, MAFMoG, RealNVP, fit
from pyro_maf._core.files import write_whole
from pyro_maf.training import records
from pyro_maf.training.loop import Loop
from pyro_maf.training.records import Checkpoint, CheckpointFolder, Epoch
from pyro_maf.training.state import State
from tests.fits import gaussian_rows, long_fit, same, seeded, weights

ROOT = Path(__file__).parent.parent
OPTIONS: dict[str, Any] = {"batch_size": 27, "max_epochs": 4, "learning_rate": 1e-2, "progress": False}


class Pressed(MAF):
    """A flow that presses Ctrl-C in the given training steps."""

    at: ClassVar[set[int]] = set()
    signal: ClassVar[int] = signal.SIGINT
    steps: ClassVar[int] = 0

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            Pressed.steps += 1
            if Pressed.steps in self.at:
                signal.raise_signal(Pressed.signal)
        return super().inverse_and_log_det(y, context)


class PressedInValidation(MAF):
    """A flow that presses Ctrl-C in the given validation, the first of which is that of the initial weights."""

    at: ClassVar[int | None] = None
    validations = 0

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.validations += not self.training
        if not self.training and self.validations == self.at:
            signal.raise_signal(signal.SIGINT)
        return super().inverse_and_log_det(y, context)


class Broken(MAF):
    """A flow whose loss is NaN after 8 steps."""

    steps: ClassVar[int] = 0

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse_and_log_det(y, context)
        Broken.steps += self.training
        return x, log_det * math.nan if self.training and Broken.steps > 8 else log_det


def _raise_memory_error(*_: object) -> None:
    raise MemoryError


def flow(cls: Any = MAF, **options: Any) -> Any:
    return seeded(lambda: cls(2, num_layers=2, hidden_dims=[8], **options))


def pressed(at: set[int], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    monkeypatch.setattr(Pressed, "at", at)
    monkeypatch.setattr(Pressed, "steps", 0)
    return flow(Pressed, **options)


def without_time(result: Any) -> tuple[Any, ...]:
    return result.train_loss, result.validation_loss, result.best_epoch, result.stop_reason


@pytest.mark.parametrize("options", [{}, {"batch_norm": True}, {"order": "random"}], ids=["plain", "norm", "random"])
@pytest.mark.parametrize("step", [1, 10, 14, 29])
def test_an_interrupted_fit_resumes_bit_for_bit(
    step: int, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(flow(Pressed, **options), gaussian_rows(), **OPTIONS)
    first = fit(pressed({step}, monkeypatch, **options), gaussian_rows(), folder=tmp_path, **OPTIONS)
    assert first.stop_reason == "interrupted"
    assert "resume=True goes on" in repr(first)
    other = pressed(set(), monkeypatch, **options)
    second = fit(other, gaussian_rows(), folder=tmp_path, resume=True, **OPTIONS)
    assert Pressed.steps == 40 - step
    assert same(weights(whole.density), weights(second.density))
    assert without_time(whole) == without_time(second)


@pytest.mark.filterwarnings("ignore:fit found heavy tails:UserWarning")
@pytest.mark.parametrize("make", [IAF, RealNVP, MAFMoG, lambda *a, **k: FlowPrior(MAF(*a, **k), support="positive")])
def test_every_family_resumes_bit_for_bit(make: Any, tmp_path: Path) -> None:
    rows = gaussian_rows().exp()
    whole = fit(flow(make), rows, **OPTIONS)
    fit(flow(make), rows, folder=tmp_path, **{**OPTIONS, "max_epochs": 2})
    second = fit(flow(make), rows, folder=tmp_path, resume=True, **OPTIONS)
    assert same(weights(whole.density), weights(second.density))
    assert without_time(whole) == without_time(second)


def test_a_checkpoint_holds_the_units_of_the_data(tmp_path: Path) -> None:
    result = fit(flow(), gaussian_rows().exp(), support="positive", folder=tmp_path, **OPTIONS)
    units = Checkpoint.read(tmp_path / "checkpoint.safetensors").under("density")["units.loc"]
    assert torch.equal(units, result.density.loc)
    assert units.any()


def test_it_may_be_interrupted_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit(flow(Pressed), gaussian_rows(), **OPTIONS)
    for _ in range(5):
        result = fit(pressed({7}, monkeypatch), gaussian_rows(), folder=tmp_path, resume=True, **OPTIONS)
    assert result.stop_reason == "interrupted"
    result = fit(pressed(set(), monkeypatch), gaussian_rows(), folder=tmp_path, resume=True, **OPTIONS)
    assert same(weights(whole.density), weights(result.density))


@pytest.mark.parametrize("step", [7, 14])
def test_the_signal_to_terminate_ends_the_program_with_a_checkpoint(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(flow(Pressed), gaussian_rows(), **OPTIONS)
    monkeypatch.setattr(records, "SECONDS_BETWEEN", 1e9)
    monkeypatch.setattr(Pressed, "signal", signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        fit(pressed({step}, monkeypatch), gaussian_rows(), folder=tmp_path, **OPTIONS)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not (tmp_path / ".lock").exists()
    second = fit(pressed(set(), monkeypatch), gaussian_rows(), folder=tmp_path, resume=True, **OPTIONS)
    assert Pressed.steps == 40 - step
    assert same(weights(whole.density), weights(second.density))


def test_the_starting_weights_of_the_second_call_do_not_matter(tmp_path: Path) -> None:
    whole = fit(flow(), gaussian_rows(), **OPTIONS)
    fit(flow(), gaussian_rows(), folder=tmp_path, **{**OPTIONS, "max_epochs": 1})
    torch.manual_seed(99)
    second = fit(MAF(2, num_layers=2, hidden_dims=[8]), gaussian_rows(), folder=tmp_path, resume=True, **OPTIONS)
    assert same(weights(whole.density), weights(second.density))


def test_without_a_checkpoint_it_starts_afresh(tmp_path: Path) -> None:
    whole = fit(flow(), gaussian_rows(), **OPTIONS)
    result = fit(flow(), gaussian_rows(), folder=tmp_path / "new" / "one", resume=True, **OPTIONS)
    assert without_time(whole) == without_time(result)


def test_a_completed_fit_is_returned_at_once(tmp_path: Path) -> None:
    options = {**OPTIONS, "max_epochs": 200, "patience": 2}
    ended = fit(flow(), gaussian_rows(60), folder=tmp_path, **options)
    before = (tmp_path / "log.csv").read_text()
    again = fit(flow(), gaussian_rows(60), folder=tmp_path, resume=True, **options)
    assert ended.stop_reason == "no better validation log-likelihood for 2 epochs"
    assert without_time(again) == without_time(ended)
    assert same(weights(again.density), weights(ended.density))
    assert (tmp_path / "log.csv").read_text() == before


def test_a_fit_that_cannot_continue_is_returned_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "steps", 0)
    options = {**OPTIONS, "batch_size": 68}  # 4 per epoch
    ended = fit(flow(Broken), gaussian_rows(), folder=tmp_path, **options)
    again = fit(flow(Broken), gaussian_rows(), folder=tmp_path, resume=True, **options)
    assert ended.stop_reason == "no step of epoch 3 had a finite loss and gradient"
    assert repr(without_time(again)) == repr(without_time(ended))  # NaN is not equal to itself


def test_more_patience_continues_a_stopped_fit(tmp_path: Path) -> None:
    options = {**OPTIONS, "max_epochs": 200}
    ended = fit(flow(), gaussian_rows(60), folder=tmp_path, patience=2, **options)
    again = fit(flow(), gaussian_rows(60), folder=tmp_path, patience=5, resume=True, **options)
    assert again.stop_reason == "no better validation log-likelihood for 5 epochs"
    assert again.validation_loss[: ended.epochs] == ended.validation_loss
    assert again.epochs == again.best_epoch + 5


def test_ctrl_c_in_validation_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PressedInValidation, "at", None)
    whole = fit(flow(PressedInValidation), gaussian_rows(), **OPTIONS)
    monkeypatch.setattr(PressedInValidation, "at", 2)
    first = fit(flow(PressedInValidation), gaussian_rows(), folder=tmp_path, **OPTIONS)
    assert (first.stop_reason, first.epochs) == ("interrupted", 1)
    monkeypatch.setattr(PressedInValidation, "at", None)
    second = fit(flow(PressedInValidation), gaussian_rows(), folder=tmp_path, resume=True, **OPTIONS)
    assert same(weights(whole.density), weights(second.density))
    assert without_time(whole) == without_time(second)


@pytest.mark.parametrize("step", [0, 5, 10])
def test_a_fit_that_dies_before_its_next_step_loses_nothing(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After no step, some steps of an epoch, or all of them, before its validation."""
    whole = fit(flow(Pressed), gaussian_rows(), **OPTIONS)
    save = Loop.save

    def dying(loop: Loop, taken: int) -> None:
        save(loop, taken)
        if taken == step:
            raise MemoryError

    monkeypatch.setattr(records, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(records, "MOST_OF_THE_TIME", math.inf)
    for patched_class, method, replacement in ((Loop, "save", dying), (State, "load", _raise_memory_error)):
        with monkeypatch.context() as patched:
            patched.setattr(patched_class, method, replacement)
            with pytest.raises(MemoryError):
                fit(flow(Pressed), gaussian_rows(), folder=tmp_path, resume=True, **OPTIONS)
    second = fit(flow(Pressed), gaussian_rows(), folder=tmp_path, resume=True, **OPTIONS)
    assert same(weights(whole.density), weights(second.density))
    assert without_time(whole) == without_time(second)


def test_the_log_is_never_behind_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, behind = CheckpointFolder.write, []

    def noting(folder: CheckpointFolder, written: Checkpoint) -> None:
        epochs = len(written.facts["history"])
        logged = (tmp_path / "log.csv").read_text().count("\n") - 1 if epochs else 0
        behind.append(epochs - logged)
        write(folder, written)

    monkeypatch.setattr(CheckpointFolder, "write", noting)
    fit(flow(), gaussian_rows(), folder=tmp_path, **OPTIONS)
    assert behind
    assert max(behind) == 0


def test_partial_files_of_a_killed_fit_are_removed(tmp_path: Path) -> None:
    names = ("checkpoint.safetensors", "log.csv", "model.safetensors")
    for name in (*names, "notes.txt"):
        (tmp_path / f".{name}.0123456789abcdef").write_text("half")
    (tmp_path / ".log.csv.swp").write_text("an editor's")
    fit(flow(), gaussian_rows(), folder=tmp_path, **OPTIONS)
    assert {path.name for path in tmp_path.glob(".*")} == {".notes.txt.0123456789abcdef", ".log.csv.swp"}


def test_counts_may_be_those_of_numpy(tmp_path: Path) -> None:
    options = {**OPTIONS, "max_epochs": 1, "batch_size": np.int64(27), "seed": np.int64(0)}
    fit(flow(), gaussian_rows(), folder=tmp_path, **options)
    again = fit(flow(), gaussian_rows(), folder=tmp_path, resume=True, **{**OPTIONS, "max_epochs": 1})
    assert again.epochs == 1


def test_the_home_folder_has_its_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = fit(flow(), gaussian_rows(), folder="~/fits", **{**OPTIONS, "max_epochs": 1})
    assert result.folder == tmp_path / "fits"
    assert (tmp_path / "fits" / "model.safetensors").exists()


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(flow(), gaussian_rows(), **{**OPTIONS, "max_epochs": 1})
    assert not list(tmp_path.iterdir())


def test_tensorboard_reads_each_epoch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = fit(pressed({25}, monkeypatch), gaussian_rows(), folder=tmp_path, **OPTIONS)
    assert first.epochs == 3
    result = fit(pressed(set(), monkeypatch), gaussian_rows(), folder=tmp_path, resume=True, **OPTIONS)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(Epoch._fields)
    validation = events.Scalars("validation_loss")
    assert [event.step for event in validation] == [1, 2, 3, 4]
    assert [event.value for event in validation] == pytest.approx(result.validation_loss, rel=1e-6)


def test_the_folder_holds_model_and_log(tmp_path: Path) -> None:
    result = fit(flow(), gaussian_rows(), folder=tmp_path, **OPTIONS)
    assert same(weights(pyro_maf.load(tmp_path / "model.safetensors")), weights(result.density))
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert tuple(float(row["validation_loss"]) for row in rows) == result.validation_loss
    assert tuple(float(row["train_loss"]) for row in rows) == result.train_loss
    assert [float(row["learning_rate"]) for row in rows] == [1e-2] * 4
    assert [row["skipped_steps"] for row in rows] == ["0"] * 4


def test_a_log_goes_on_where_it_was(tmp_path: Path) -> None:
    fit(flow(), gaussian_rows(), folder=tmp_path, **{**OPTIONS, "max_epochs": 2})
    before = (tmp_path / "log.csv").read_text().splitlines()
    fit(flow(), gaussian_rows(), folder=tmp_path, resume=True, **OPTIONS)
    after = (tmp_path / "log.csv").read_text().splitlines()
    assert after[:3] == before
    seconds = [float(line.split(",")[1]) for line in after[1:]]
    assert seconds == sorted(seconds)
    assert len(after) == 5


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_fit_is_not_written_over(tmp_path: Path) -> None:
    fit(flow(), gaussian_rows(), folder=tmp_path, **OPTIONS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=r"resume=True continues it, or choose another folder\.$"):
        fit(flow(), gaussian_rows(), folder=tmp_path, **OPTIONS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", ["log.csv", "model.safetensors"])
@pytest.mark.parametrize("resume", [True, False])
def test_files_that_are_not_of_a_resumable_fit_are_not_overwritten(name: str, resume: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"^fit found {name} in .*, but no checkpoint.safetensors to resume from"):
        fit(flow(), gaussian_rows(), folder=tmp_path, resume=resume, **OPTIONS)
    assert (tmp_path / name).read_text() == "mine"


def test_other_weights_frozen_are_another_fit(tmp_path: Path) -> None:
    fit(flow(), gaussian_rows(), folder=tmp_path, **{**OPTIONS, "max_epochs": 1})
    other = flow()
    other[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"^fit found a fit with another choice of frozen weights in "):
        fit(other, gaussian_rows(), folder=tmp_path, resume=True, **OPTIONS)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"batch_size": 28}, "batch_size in "),
        ({"learning_rate": 2e-2}, "learning_rate in "),
        ({"seed": 1}, "data in "),
        ({"data": gaussian_rows(seed=1)}, "data in "),
        ({"model": flow(activation="tanh")}, r'model in .* \(activation null, now "tanh"\): resume with the same'),
    ],
    ids=["batch_size", "learning_rate", "seed", "data", "model"],
)
def test_another_fit_is_not_resumed(changed: dict[str, Any], name: str, tmp_path: Path) -> None:
    asked = {"model": flow(), "data": gaussian_rows(), **OPTIONS, "folder": tmp_path}
    fit(**asked)
    with pytest.raises(ValueError, match=f"^fit found a fit with (another|other) {name}"):
        fit(**{**asked, **changed}, resume=True)


@pytest.mark.parametrize("damage", [lambda content: content[:-20], lambda content: b"", lambda content: b"{}" * 99])
def test_a_damaged_checkpoint_is_reported(damage: Any, tmp_path: Path) -> None:
    fit(flow(), gaussian_rows(), folder=tmp_path, **OPTIONS)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged, truncated or not a checkpoint"):
        fit(flow(), gaussian_rows(), folder=tmp_path, resume=True, **OPTIONS)


def test_a_model_is_no_checkpoint_and_a_later_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    flow().save(path)
    with pytest.raises(ValueError, match="not a checkpoint"):
        fit(flow(), gaussian_rows(), folder=tmp_path, resume=True, **OPTIONS)
    write_whole(path, Checkpoint({"x": torch.zeros(1)}, {"format": 99}).packed())
    with pytest.raises(ValueError, match="format 99, this version reads up to 1"):
        fit(flow(), gaussian_rows(), folder=tmp_path, resume=True, **OPTIONS)


def test_resume_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="expected the folder to resume from"):
        fit(flow(), gaussian_rows(), resume=True)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(FileExistsError):
        fit(flow(), gaussian_rows(), folder=tmp_path / "taken", **OPTIONS)
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_unused_parameter_does_not_prevent_resumption(tmp_path: Path) -> None:
    def idle() -> Any:
        model = flow()
        model.idle = torch.nn.Parameter(torch.ones(1))
        return model

    whole = fit(idle(), gaussian_rows(), **OPTIONS)
    fit(idle(), gaussian_rows(), folder=tmp_path, **{**OPTIONS, "max_epochs": 2})
    second = fit(idle(), gaussian_rows(), folder=tmp_path, resume=True, **OPTIONS)
    assert same(weights(whole.density), weights(second.density))


# -- killed ------------------------------------------------------------------------------------------------------------

PROGRAM = """
    import sys
    from tests.fits import long_fit

    print("started", flush=True)
    long_fit(sys.argv[1])
    print("ended", flush=True)
"""
KILLS = 2


def killed(folder: Path, after: float) -> bool:
    """Start the fit and kill it after a time in seconds; False if it finished before."""
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        return "ended" not in process.stdout.read()


def test_a_killed_fit_loses_nothing(tmp_path: Path) -> None:
    moments = random.Random(0)
    assert killed(tmp_path / "killed", moments.uniform(0.2, 1.0))
    for _ in range(KILLS - 1):
        killed(tmp_path / "killed", moments.uniform(0.2, 1.0))
    one, other = (long_fit(tmp_path / name) for name in ("whole", "killed"))
    assert same(weights(one.density), weights(other.density))
    assert without_time(one) == without_time(other)
    assert not list((tmp_path / "killed").glob(".*"))
