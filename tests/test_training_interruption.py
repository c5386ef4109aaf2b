"""Ctrl-C during a fit: the first ends it, a second aborts it, and neither loses progress."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from pyro_maf import fit
from pyro_maf.training import result as result_module
from pyro_maf.training.state import State
from tests.fits import QUICK, Hooked, gaussian_rows, mean_log_prob, same, small_maf, weights

ROOT = Path(__file__).parent.parent


def pressing(at: int, times: int = 1) -> Callable[[int, Tensor], Tensor]:
    """A callback that presses Ctrl-C in one step."""

    def at_step(step: int, log_det: Tensor) -> Tensor:
        for _ in range(times if step == at else 0):
            signal.raise_signal(signal.SIGINT)
        return log_det

    return at_step


def test_ctrl_c_ends_a_fit_with_the_best_so_far() -> None:
    started, validation = threading.Event(), gaussian_rows(50, seed=1)

    def at_step(step: int, log_det: Tensor) -> Tensor:
        started.set()
        return log_det

    def press() -> None:
        started.wait(60)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    threading.Thread(target=press).start()
    endless = {"max_epochs": 10**9, "patience": 10**9, "progress": False}
    result = fit(Hooked(at_step), gaussian_rows(), validation=validation, **endless)
    assert result.stop_reason == "interrupted"
    assert result.validation_log_likelihood == -min(result.validation_loss)
    assert mean_log_prob(result.density, validation) == pytest.approx(result.validation_log_likelihood, rel=1e-12)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("is_at_end", [True, False])
def test_ctrl_c_at_the_comparison_or_before_leaves_the_result(
    is_at_end: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compared(*_: object, **__: object) -> str:
        signal.raise_signal(signal.SIGINT)
        return "compared"

    monkeypatch.setattr(result_module, "compare", compared)
    model = Hooked(pressing(at=0 if is_at_end else 3))
    result = fit(model, gaussian_rows(), batch_size=27, max_epochs=2, progress="always")
    assert result.interrupted != is_at_end
    assert "compared" not in capsys.readouterr().err


def test_ctrl_c_ends_an_epoch_halfway() -> None:
    model = Hooked(pressing(at=14))
    result = fit(model, gaussian_rows(), batch_size=27, max_epochs=3, progress=False)
    assert (model.steps, result.epochs, result.stop_reason) == (14, 2, "interrupted")
    assert "stopped: interrupted" in repr(result)


def test_ctrl_c_during_validation_ends_a_fit_there() -> None:
    class Pressed(Hooked):
        validations = 0

        def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            self.validations += not self.training
            if self.validations == 3:  # the first is of the initial weights
                signal.raise_signal(signal.SIGINT)
            return super().inverse_and_log_det(y, context)

    model = Pressed(pressing(at=-1))
    result = fit(model, gaussian_rows(), batch_size=27, max_epochs=5, progress=False)
    assert (model.steps, result.epochs, result.stop_reason) == (20, 2, "interrupted")


def test_a_second_ctrl_c_raises_and_leaves_the_best() -> None:
    model, twin = Hooked(pressing(at=25, times=2)), Hooked(pressing(at=-1))
    twin.load_state_dict(model.state_dict())
    options = {"batch_size": 27, "learning_rate": 1e-2, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        fit(model, gaussian_rows(), max_epochs=5, **options)
    assert fit(twin, gaussian_rows(), max_epochs=2, **options).best_epoch == 2
    assert model.steps == 25
    assert not model.training
    assert same(weights(model), weights(twin))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_end_of_a_fit_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = State.restore_best

    def pressed(state: State) -> None:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        restore(state)

    monkeypatch.setattr(State, "restore_best", pressed)
    result = fit(small_maf(), gaussian_rows(), **QUICK)
    assert result.stop_reason == "reached max_epochs (3)"


def test_ctrl_c_twice_ends_a_program_as_it_always_does() -> None:
    program = """
        import os, signal, time, torch
        from pyro_maf import MAF, fit

        class Pressed(MAF):
            def inverse_and_log_det(self, y, context=None):
                while self.training:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.05)
                return super().inverse_and_log_det(y, context)

        try:
            fit(Pressed(2, num_layers=1), torch.randn(100, 2), batch_size=10, progress="always")
        finally:
            print("cleaned up")
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    # Not always -SIGINT, since imports by torch at exit may replace the exception.
    assert ended.returncode != 0
    assert ended.stdout == "cleaned up\n"
    assert ended.stderr.strip().endswith("KeyboardInterrupt")


def test_a_fit_without_a_folder_leaves_the_signal_to_terminate_alone() -> None:
    handlers = []

    def at_step(step: int, log_det: Tensor) -> Tensor:
        handlers.append(signal.getsignal(signal.SIGTERM))
        return log_det

    fit(Hooked(at_step), gaussian_rows(), **{**QUICK, "max_epochs": 1})
    assert set(handlers) == {signal.SIG_DFL}
