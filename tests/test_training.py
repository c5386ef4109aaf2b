"""Fitting: learning, reproducibility, side effects, stopping and output."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import pickle
import random
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal
from torch.nn.utils import parameters_to_vector

from pyro_maf import (
    IAF,
    MAF,
    ConditionalFlowPrior,
    ConditionalIAF,
    ConditionalMADEMoG,
    ConditionalMAF,
    ConditionalMAFMoG,
    ConditionalRealNVP,
    FlowPrior,
    MADEMoG,
    MAFMoG,
    RealNVP,
    fit,
)
from pyro_maf._core import progress as progress_module
from pyro_maf._core.progress import shows
from pyro_maf.sweep import threads
from pyro_maf.sweep.threads import most_threads
from pyro_maf.training import FitResult
from pyro_maf.training.records import Epoch
from pyro_maf.training.state import Schedule, overfitting
from pyro_maf.transforms import ActNorm, LowerTriangularAffine, MaskedAutoregressive, Permute, Stack
from tests.fits import GAUSSIAN, QUICK, SMALL, Hooked, gaussian_rows, mean_log_prob, same, seeded, small_maf, weights

ROOT = Path(__file__).parent.parent
FAMILIES: dict[str, Callable[[], Any]] = {
    "MAF": lambda: MAF(2, **SMALL),
    "IAF": lambda: IAF(2, **SMALL),
    "RealNVP": lambda: RealNVP(2, **SMALL),
    "MAF, batch norm": lambda: MAF(2, batch_norm=True, **SMALL),
    "IAF, batch norm": lambda: IAF(2, batch_norm=True, **SMALL),
    "RealNVP, batch norm": lambda: RealNVP(2, batch_norm=True, **SMALL),
    "inverse of IAF": lambda: IAF(2, **SMALL).inv,
    "Stack with ActNorm": lambda: Stack(
        [ActNorm(2), MaskedAutoregressive(2, hidden_dims=[16]), Permute([1, 0]), ActNorm(2)]
    ),
    "LowerTriangularAffine": lambda: LowerTriangularAffine(2),
    "MADEMoG": lambda: MADEMoG(2, hidden_dims=[16], num_components=3),
    "MAFMoG": lambda: MAFMoG(2, num_components=3, **SMALL),
    "MAFMoG, batch norm": lambda: MAFMoG(2, num_components=3, batch_norm=True, **SMALL),
    "FlowPrior": lambda: FlowPrior(MAF(2, **SMALL), loc=torch.tensor([2.0, -1.0]), scale=torch.tensor([1.5, 1.0])),
}
CONDITIONAL_FAMILIES: dict[str, Callable[[], Any]] = {
    "ConditionalMAF": lambda: ConditionalMAF(2, 1, **SMALL),
    "ConditionalIAF": lambda: ConditionalIAF(2, 1, **SMALL),
    "ConditionalRealNVP": lambda: ConditionalRealNVP(2, 1, **SMALL),
    "ConditionalMAF, batch norm": lambda: ConditionalMAF(2, 1, batch_norm=True, **SMALL),
    "ConditionalMADEMoG": lambda: ConditionalMADEMoG(2, 1, hidden_dims=[16], num_components=3),
    "ConditionalMAFMoG": lambda: ConditionalMAFMoG(2, 1, num_components=3, **SMALL),
    "ConditionalFlowPrior": lambda: ConditionalFlowPrior(
        ConditionalMAF(2, 1, **SMALL), scale=torch.tensor([2.0, 2.0]), context_scale=torch.tensor([10.0])
    ),
    "MAF that asks for a context": lambda: MAF(2, context_dim=1, **SMALL),
    "FlowPrior that asks for a context": lambda: FlowPrior(MAF(2, context_dim=1, **SMALL)),
}


# -- learning ----------------------------------------------------------------------------------------------------------


def test_a_correlated_gaussian_is_learnt() -> None:
    test = gaussian_rows(4000, seed=1)
    model = seeded(lambda: MAF(2, **SMALL).double())
    result = fit(model, gaussian_rows(4000), max_epochs=12, learning_rate=5e-3, progress=False)
    exact = GAUSSIAN.log_prob(test).mean().item()
    assert exact - 0.01 < mean_log_prob(result.density, test) < exact + 0.001
    drawn = result.density.sample((20_000,))
    assert torch.allclose(drawn.mean(0), GAUSSIAN.mean, atol=0.1)
    assert torch.allclose(drawn.T.cov(), GAUSSIAN.covariance_matrix, atol=0.1)


def test_a_conditional_gaussian_is_learnt() -> None:
    context = 50 + 20 * torch.randn(3000, 1, dtype=torch.float64)
    data = 7 - 0.3 * context + 2 * torch.randn(3000, 1, dtype=torch.float64)
    train, test = slice(0, 2000), slice(2000, None)
    model = seeded(lambda: ConditionalMAF(1, 1, **SMALL).double())
    result = fit(model, data[train], context=context[train], max_epochs=12, learning_rate=5e-3, progress=False)
    exact = Normal(7 - 0.3 * context[test, 0], 2.0).log_prob(data[test, 0]).mean().item()
    assert exact - 0.02 < mean_log_prob(result.density.condition(context[test]), data[test]) < exact + 0.01


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_family_learns_and_keeps_its_best(make: Callable[[], Any]) -> None:
    model, validation = seeded(make).double(), gaussian_rows(100, seed=1)
    result = fit(
        model, gaussian_rows(), validation=validation, batch_size=50, max_epochs=15, learning_rate=2e-2, progress=False
    )
    assert result.validation_log_likelihood > GAUSSIAN.log_prob(validation).mean() - 0.2
    assert result.validation_log_likelihood == -min(result.validation_loss)
    assert result.validation_loss[result.best_epoch - 1] == min(result.validation_loss)
    assert mean_log_prob(result.density, validation) == pytest.approx(result.validation_log_likelihood, rel=1e-12)
    assert not any(member.training for member in (*result.density.modules(), *model.modules()))
    assert result.density is model or result.density.model is model


@pytest.mark.parametrize("make", CONDITIONAL_FAMILIES.values(), ids=CONDITIONAL_FAMILIES.keys())
def test_every_conditional_family_learns_and_keeps_its_best(make: Callable[[], Any]) -> None:
    context, new = 10 * torch.randn(300, 1).double(), 10 * torch.randn(100, 1).double()
    data, validation = gaussian_rows() + context, gaussian_rows(100, seed=1) + new
    result = fit(
        seeded(make).double(),
        data,
        context=context,
        validation=(validation, new),
        batch_size=50,
        max_epochs=20,
        learning_rate=2e-2,
        progress=False,
    )
    # Without the context, the best density is a Gaussian with the marginal covariance.
    unconditional = MultivariateNormal(data.mean(0), data.T.cov()).log_prob(validation).mean()
    assert isinstance(result.density, ConditionalFlowPrior)
    assert result.validation_log_likelihood > unconditional + 0.5
    assert result.validation_log_likelihood == -min(result.validation_loss)
    fitted = mean_log_prob(result.density.condition(new), validation)
    assert fitted == pytest.approx(result.validation_log_likelihood, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_model_keeps_its_dtype_and_device(dtype: torch.dtype, device: str) -> None:
    model = small_maf().to(device=device, dtype=dtype)
    result = fit(model, gaussian_rows(), **QUICK)
    value = gaussian_rows(5).to(device=device, dtype=dtype)
    assert {tensor.dtype for tensor in result.density.state_dict().values() if tensor.is_floating_point()} == {dtype}
    assert {tensor.device.type for tensor in result.density.state_dict().values()} == {device}
    assert result.density.log_prob(value).dtype == result.density.sample().dtype == dtype


def test_parameters_that_are_frozen_stay() -> None:
    model = seeded(lambda: MAF(2, **SMALL).double())
    model[0].requires_grad_(False)
    before = weights(model)
    fit(model, gaussian_rows(), learning_rate=1e-2, **QUICK)
    after = weights(model)
    moved = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"1"}


def test_existing_gradients_are_not_added_and_none_remain() -> None:
    model, twin = small_maf(), small_maf()
    for weight in twin.parameters():
        weight.grad = torch.ones_like(weight)
    fitted = [fit(each, gaussian_rows(), **QUICK) for each in (model, twin)]
    assert fitted[0].train_loss == fitted[1].train_loss
    assert all(weight.grad is None for weight in (*model.parameters(), *twin.parameters()))


def test_a_fit_may_be_taken_up_again() -> None:
    model, validation = small_maf(), gaussian_rows(100, seed=1)
    first = fit(model, gaussian_rows(), validation=validation, **QUICK)
    second = fit(first.density, gaussian_rows(), validation=validation, learning_rate=1e-2, **QUICK)
    assert second.density is first.density
    assert second.validation_log_likelihood > first.validation_log_likelihood + 0.1


def test_batch_norm_ends_with_the_statistics_of_the_training_rows() -> None:
    rows = gaussian_rows()
    model = seeded(lambda: MAF(2, batch_norm=True, **SMALL).double())
    density = fit(model, rows, validation=gaussian_rows(50, seed=1), learning_rate=1e-2, **QUICK).density
    ended = weights(density)
    density.fit_statistics(rows)
    assert same(weights(density), ended)


def test_act_norm_starts_with_the_statistics_of_the_training_rows() -> None:
    model = ActNorm(2).double()
    fit(model, gaussian_rows(), batch_size=10, max_epochs=1, learning_rate=1e-12, progress=False)
    # Statistics of standardised rows: mean 0 and, with one row less, a standard deviation of almost 1.
    assert model.loc.abs().max() < 1e-9
    assert model.log_scale.exp().tolist() == pytest.approx([math.sqrt(270 / 269)] * 2, rel=1e-9)


def test_layers_of_users_are_in_eval_mode_while_they_are_validated() -> None:
    modes: list[bool] = []

    class Noting(Permute):
        def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            modes.append(self.training)
            return super().inverse_and_log_det(y, context)

    fit(Stack([Noting([1, 0]), ActNorm(2)]).double(), gaussian_rows(), batch_size=90, max_epochs=1, progress=False)
    assert modes[-4:] == [True, True, True, False]


def test_modes_without_effect_are_not_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    model, modes = small_maf(), list[bool]()
    train = type(model[0]).train
    monkeypatch.setattr(type(model[0]), "train", lambda self, mode=True: modes.append(mode) or train(self, mode))
    fit(model, gaussian_rows(), **QUICK)
    assert set(modes) == {False}
    assert not model.training


def test_averaged_weights_are_validated_and_training_goes_on_with_its_own() -> None:
    trained: list[Tensor] = []
    validated: list[Tensor] = []

    class Watched(Hooked):
        def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            (trained if self.training else validated).append(parameters_to_vector(self.parameters()).detach())
            return super().inverse_and_log_det(y, context)

    rate = 1e-2
    model = seeded(lambda: Watched(lambda step, log_det: log_det))
    fit(model, gaussian_rows(), batch_size=27, max_epochs=10, learning_rate=rate, progress=False)
    steps = [(after - before).abs().max().item() for before, after in zip(trained, trained[1:], strict=False)]
    lags = [(trained[10 * epoch] - validated[epoch]).abs().max().item() for epoch in range(10)]
    assert (len(trained), len(validated)) == (100, 11)
    # A step of Adam hardly exceeds the learning rate; an average lags behind by several steps.
    assert max(steps) < 1.5 * rate
    assert lags[0] == 0
    assert min(lags[5:]) > 2 * rate


# -- reproducibility and side effects ----------------------------------------------------------------------------------


def noisy() -> Any:
    """A layer that uses random numbers in training, like dropout."""
    return Hooked(lambda step, log_det: log_det + 0.01 * torch.randn_like(log_det))


@pytest.mark.parametrize("make", [lambda: MAF(2, batch_norm=True, **SMALL), noisy], ids=["MAF", "noisy"])
def test_the_same_call_gives_the_same_result(make: Callable[[], Any]) -> None:
    model = seeded(make)
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    one = fit(model, gaussian_rows(), **QUICK)
    torch.manual_seed(123)
    other = fit(twin, gaussian_rows(), **QUICK)
    assert (one.train_loss, one.validation_loss) == (other.train_loss, other.validation_loss)
    assert same(weights(one.density), weights(other.density))
    assert fit(third, gaussian_rows(), seed=1, **QUICK).train_loss != one.train_loss


def test_global_random_states_are_left_alone() -> None:
    def draw(step: int, log_det: Tensor) -> Tensor:
        return log_det + 0.01 * (torch.randn_like(log_det) + random.random() + np.random.rand())

    model = Hooked(draw)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    fit(model, gaussian_rows(), **QUICK)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_nothing_is_printed_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    environment, handlers = dict(os.environ), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for progress in (False, True):
        fit(small_maf(), gaussian_rows(), **{**QUICK, "progress": progress})
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert dict(os.environ) == environment
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_modes_of_the_caller_change_nothing(mode: Callable[[], Any]) -> None:
    model, twin = small_maf().float(), small_maf().float()
    plain = fit(model, gaussian_rows(), **QUICK)
    with mode():
        result = fit(twin, gaussian_rows(), **QUICK)
    assert result.validation_loss == plain.validation_loss
    result.density.rsample((3,)).sum().backward()


def test_a_fit_may_run_outside_the_main_thread() -> None:
    results: list[FitResult] = []
    thread = threading.Thread(target=lambda: results.append(fit(small_maf(), gaussian_rows(), **QUICK)))
    thread.start()
    thread.join()
    assert results[0].validation_loss == fit(small_maf(), gaussian_rows(), **QUICK).validation_loss


def test_a_fitted_density_can_be_copied_and_pickled() -> None:
    density, rows = fit(small_maf(), gaussian_rows(), **QUICK).density, gaussian_rows(5)
    for twin in (copy.deepcopy(density), pickle.loads(pickle.dumps(density))):
        assert torch.equal(twin.log_prob(rows), density.log_prob(rows))


# -- stopping ----------------------------------------------------------------------------------------------------------


def test_a_fit_ends_when_it_stops_improving() -> None:
    result = fit(small_maf(), gaussian_rows(), learning_rate=0.3, patience=4, batch_size=50, progress=False)
    assert result.stop_reason == "no better validation log-likelihood for 4 epochs"
    assert result.epochs == result.best_epoch + 4 < 1000
    assert -result.validation_log_likelihood == min(result.validation_loss) < result.validation_loss[-1]


def test_it_ends_after_the_last_epoch() -> None:
    result = fit(small_maf(), gaussian_rows(), **QUICK)
    assert result.stop_reason == "reached max_epochs (3)"
    assert (result.epochs, len(result.train_loss), result.skipped_steps) == (3, 3, 0)
    assert result.seconds > 0


def test_the_learning_rate_is_halved_after_a_quarter_of_the_patience() -> None:
    schedule = Schedule(learning_rate=1.0, patience=8)
    rates = []
    for epoch, loss in enumerate([2.0, 1.0, 1.5, math.nan, 1.5, 1.0, 1.5, 1.5, 1.5, 1.5]):
        assert schedule.reason is None
        schedule.improves(epoch, loss)
        rates.append(schedule.learning_rate)
    assert rates == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625]
    assert (schedule.best, schedule.best_epoch) == (1.0, 1)
    assert schedule.reason == "no better validation log-likelihood for 8 epochs"


def test_the_weight_decay_falls_before_the_learning_rate() -> None:
    schedule = Schedule(learning_rate=1.0, patience=4, weight_decay=0.1, relaxations=2)
    rates = []
    for epoch, loss in enumerate([2.0, 1.0, 1.5, 1.5, 1.5]):
        schedule.improves(epoch, loss)
        rates.append((schedule.learning_rate, round(schedule.weight_decay, 9)))
    assert rates == [(1, 0.1), (1, 0.1), (1, 0.01), (1, 0.001), (0.5, 0.001)]


def test_initial_weights_that_are_the_best_are_returned() -> None:
    model = small_maf()
    given = weights(model)
    result = fit(model, gaussian_rows(), validation=gaussian_rows(20) + 1e200, **QUICK)
    assert (result.best_epoch, result.validation_log_likelihood) == (0, -math.inf)
    assert same(weights(model), given)


BAD_STEPS = {
    "loss": lambda log_det: log_det * math.nan,
    "infinite loss": lambda log_det: log_det - math.inf,
    # Its value is log_det, and its derivative 0 * inf.
    "gradient": lambda log_det: log_det + ((log_det - log_det.detach()).abs() + 0.0).sqrt(),
}


@pytest.mark.parametrize("spoil", BAD_STEPS.values(), ids=BAD_STEPS.keys())
def test_steps_that_are_not_finite_are_skipped(spoil: Callable[[Tensor], Tensor]) -> None:
    model = Hooked(lambda step, log_det: spoil(log_det) if step % 4 == 0 else log_det)
    result = fit(model, gaussian_rows(), batch_size=27, max_epochs=3, learning_rate=1e-2, progress=False)
    assert (model.steps, result.skipped_steps) == (30, 7)
    assert all(math.isfinite(loss) for loss in (*result.train_loss, *result.validation_loss))
    assert result.best_epoch > 0
    assert "7 steps without a finite loss and gradient skipped" in repr(result)


def test_it_ends_when_no_step_is_finite() -> None:
    model = Hooked(lambda step, log_det: log_det * math.nan if step > 10 else log_det)
    with pytest.warns(UserWarning, match="skipped 5 steps in a row"):
        result = fit(model, gaussian_rows(), batch_size=27, max_epochs=5, progress=False)
    assert result.stop_reason == "no step of epoch 2 had a finite loss and gradient"
    assert (result.epochs, result.skipped_steps) == (2, 10)
    assert math.isnan(result.train_loss[1])
    assert math.isfinite(result.validation_log_likelihood)


def test_after_several_failed_steps_it_continues_from_the_best_weights_at_a_lower_rate() -> None:
    taken: list[Tensor] = []

    def at_step(step: int, log_det: Tensor) -> Tensor:
        taken.append(model.state_dict()["made.layers.0.weight"].clone())
        return log_det * math.nan if 24 <= step < 29 else log_det

    model = Hooked(at_step)
    with pytest.warns(UserWarning, match=r"best weights so far, with a learning rate of 0\.005"):
        result = fit(model, gaussian_rows(), batch_size=27, max_epochs=4, learning_rate=1e-2, progress=False)
    assert (result.skipped_steps, result.epochs) == (5, 4)
    assert torch.equal(taken[23], taken[27])
    assert not torch.equal(taken[27], taken[28])
    assert all(math.isfinite(loss) for loss in (*result.train_loss, *result.validation_loss))


def test_a_fit_without_any_finite_step_ends_before_its_epoch_does() -> None:
    model = Hooked(lambda step, log_det: log_det * math.nan)
    with pytest.warns(UserWarning, match="skipped 5 steps in a row"):
        result = fit(model, gaussian_rows(), batch_size=1, max_epochs=5, progress=False)
    assert (result.epochs, result.skipped_steps) == (1, 55)
    assert result.stop_reason == "no step had a finite loss and gradient, however low the learning rate"


# -- output ------------------------------------------------------------------------------------------------------------


def test_the_bar_shows_epoch_losses_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    with pytest.warns(UserWarning, match="^fit is behind a simpler density, Gaussian"):  # after three epochs
        result = fit(small_maf(), gaussian_rows(), **{**QUICK, "progress": "always"})
    out, err = capsys.readouterr()
    losses = f"train {result.train_loss[-1]:.3f}  val {result.validation_loss[-1]:.3f}"
    best = f"best {-result.validation_log_likelihood:.3f}"
    assert out == ""
    assert re.search(rf"epoch 3 ━+ {losses}  {best} \d:\d\d:\d\d at most 00:00", err)


class Cell:
    """Outputs of a notebook cell, as `display` of IPython adds and updates them."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, str]] = []
        self.replaced = 0

    def display(self, data: dict[str, str], *, raw: bool, display_id: bool) -> Cell:
        assert raw
        assert display_id
        self.outputs.append(data)
        return self

    def update(self, data: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.outputs[-1] = data
        self.replaced += 1


def test_a_notebook_keeps_the_last_state_of_a_bar_as_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rich's notebook bar is a widget, which is empty in a stored notebook and adds another empty output."""
    cell = Cell()
    monkeypatch.setattr("IPython.display.display", cell.display)
    console = Console(stderr=True, force_jupyter=True)
    with progress_module.bar(
        "always", "{task.description} {task.completed}", "{task.fields[loss]}", console=console
    ) as bar:
        for step in range(1, 1_001):
            bar.show("step", step, 1_000, loss=f"loss {step}")
    assert cell.replaced < 50
    assert [set(output) for output in cell.outputs] == [{"text/plain"}]
    assert re.fullmatch(r"step 1000 ━+ loss 1000 \d:\d\d:\d\d at most 00:00", cell.outputs[0]["text/plain"])
    assert capsys.readouterr() == ("", "")


def test_the_bar_is_for_terminals_and_notebooks_that_have_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "find_spec", lambda name: object())
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    terminal, file = Console(stderr=True, force_terminal=True), Console(stderr=True, force_terminal=False)
    notebook = Console(stderr=True, force_terminal=False, force_jupyter=True)
    assert [shows(True, console) for console in (terminal, notebook, file)] == [True, True, False]
    assert [shows("always", console) for console in (terminal, notebook, file)] == [True, True, True]
    assert [shows(False, console) for console in (terminal, notebook, file)] == [False, False, False]
    monkeypatch.setattr(progress_module, "find_spec", lambda name: None)
    assert [shows(True, console) for console in (terminal, notebook)] == [True, False]
    assert not shows("always", notebook)


def test_the_bar_is_not_for_a_pipe_that_is_to_be_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    pipe = Console(file=io.StringIO())
    assert pipe.is_terminal
    assert not shows(True, pipe)


def test_the_result_has_a_one_line_summary() -> None:
    parts: dict[str, Any] = {"density": None, "train_loss": (3.0, 2.0), "validation_loss": (2.5, 2.25)}
    result = FitResult(
        **parts, best_epoch=2, validation_log_likelihood=-2.25, seconds=1.25, stop_reason="reached max_epochs (2)"
    )
    assert repr(result) == (
        "FitResult(validation log-likelihood -2.250 nats, of rows that chose the epoch; best epoch 2 of 2, 1.2 s; "
        "stopped: reached max_epochs (2))"
    )
    assert result.epochs == 2


@pytest.mark.parametrize("end", ["", "error", "Ctrl-C"])
def test_torch_has_one_thread_in_a_fit_of_small_operations(end: str) -> None:
    numbers = []

    def at_step(step: int, log_det: Tensor) -> Tensor:
        numbers.append((torch.get_num_threads(), most_threads()))
        if step == 2 and end == "error":
            raise RuntimeError("of the model")
        if step == 2 and end == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return log_det

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises((RuntimeError, KeyboardInterrupt)) if end else contextlib.nullcontext():
            fit(Hooked(at_step), gaussian_rows(), batch_size=50, max_epochs=1, progress=False)
        assert set(numbers) == {(1, 3)}  # the compiled engine may have them
        assert torch.get_num_threads() == most_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_torch_has_its_threads_in_a_fit_of_large_products(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = []

    def at_step(step: int, log_det: Tensor) -> Tensor:
        numbers.append(torch.get_num_threads())
        return log_det

    monkeypatch.setattr(threads, "SHARED_WORK", 50 * 8 * 2)  # batches of 50 rows and 8 units of 2 inputs
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        fit(Hooked(at_step), gaussian_rows(), batch_size=50, max_epochs=1, progress=False)
        assert set(numbers) == {3}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("train", "validation", "ends"),
    [
        ([-0.1 * epoch for epoch in range(25)], [3.0, 2.0, 1.0, *(1.0 + 0.01 * epoch for epoch in range(1, 23))], 13),
        ([-0.1 * epoch for epoch in range(25)], [1.0, *(2.0 + 0.1 * (-1) ** epoch for epoch in range(24))], None),
        ([0.0] * 3 + [0.5] * 22, [3.0, 2.0, 1.0, *(1.0 + 0.01 * epoch for epoch in range(1, 23))], None),
        ([-0.1 * epoch for epoch in range(25)], [-0.1 * epoch for epoch in range(25)], None),
        ([-0.1 * epoch for epoch in range(25)], [math.nan] * 25, None),
    ],
    ids=["overfitting", "noise", "disturbance", "gains", "not a number"],
)
def test_a_fit_ends_when_only_the_training_loss_improves(
    train: list[float], validation: list[float], ends: int | None
) -> None:
    history = [Epoch(0.0, *losses, 0.1, 0) for losses in zip(train, validation, strict=True)]
    reasons = [overfitting(history[:count], patience=30) for count in range(1, 26)]
    assert reasons == [None] * 25 if ends is None else [bool(each) for each in reasons].index(True) + 1 == ends
