"""Fitting a guide: accuracy, stopping, robustness, output and errors."""

from __future__ import annotations

import math
import signal
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from torch import Tensor, nn

from pyro_maf._core import progress as progress_module
from pyro_maf.infer import Diagnosis, GuideFit, diagnose, fit_guide, neutra, reweight, to_arviz
from pyro_maf.infer.fitting import fit_guide as guide_fitting
from pyro_maf.infer.fitting.convergence import Schedule
from tests.posteriors import GAMMA, GUIDES, SMALL, counting, regression, same, steps, weights

pytestmark = pytest.mark.usefixtures("fresh")
QUICK: dict[str, Any] = {"num_particles": 8, "progress": False}
AutoMAF, AutoIAF, AutoRealNVP = GUIDES


@pytest.fixture(autouse=True)
def _few_diagnosed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a tenth of the draws in a diagnosis, which most tests do not examine."""
    monkeypatch.setattr(guide_fitting, "DIAGNOSED", 1_000)


@pytest.fixture
def _all_diagnosed(_few_diagnosed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide_fitting, "DIAGNOSED", DIAGNOSED)


DIAGNOSED = guide_fitting.DIAGNOSED
of_the_verdict = pytest.mark.usefixtures("_all_diagnosed")


class Counted:
    """A model that calls a function in one of its runs."""

    def __init__(self, at: float, action: Any, model: Any = counting) -> None:
        self.runs = 0
        self._at, self._action, self._model = at, action, model

    def __call__(self) -> None:
        self.runs += 1
        if self.runs >= self._at:
            self._action(self)
        self._model()


def in_turn() -> None:
    """A model that must be run for each draw."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    loc = z[0] if z[1] > -5 else z[0] - 1
    pyro.sample("y", dist.Normal(loc, 0.5), obs=torch.tensor(1.0))


alone = pytest.warns(
    UserWarning, match="fit_guide runs the model for each draw, which is slow: with 7 draws at once it"
)


@of_the_verdict
def test_finds_a_normal_posterior_from_a_poor_start() -> None:
    known = regression()
    sd = known.covariance.diagonal().sqrt()
    away = init_to_value(values={"z": known.mean + sd * torch.tensor([1.0, -1.0, 1.0])})
    guide = AutoIAF(known.model, init_loc_fn=away, init_scale=0.15, **SMALL)
    fit = fit_guide(known.model, guide, steps=300, learning_rate=0.03, **QUICK)
    assert fit.guide is guide
    draws = guide.rsample((20_000,))["z"].detach()
    assert bool(((draws.mean(0) - known.mean).abs() < 0.15 * sd).all())
    torch.testing.assert_close(draws.T.corrcoef(), known_correlation(known.covariance), atol=0.06, rtol=0)
    torch.testing.assert_close(draws.std(0), sd, rtol=0.08, atol=0)
    assert fit.diagnosis.k_hat < 0.7


def known_correlation(covariance: Tensor) -> Tensor:
    sd = covariance.diagonal().sqrt()
    return covariance / sd / sd[:, None]


@of_the_verdict
def test_finds_a_gamma_posterior() -> None:
    fit = fit_guide(counting, AutoIAF(counting, **SMALL), steps=150, **QUICK)
    draws = fit.guide.rsample((20_000,))["rate"].detach()
    assert float(draws.mean()) == pytest.approx(float(GAMMA.mean), rel=0.02)
    assert float(draws.std()) == pytest.approx(float(GAMMA.stddev), rel=0.04)
    assert fit.diagnosis.ess > 0.98 * fit.diagnosis.num_samples


# -- stopping ----------------------------------------------------------------------------------------------------------


def standard() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))


def test_stops_once_the_bound_has_converged() -> None:
    """A guide that starts as the posterior stops after six windows of 100 steps without a gain."""

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.0)), 1.0))

    fit = fit_guide(standard, guide, num_particles=1, progress=False)
    assert fit.stop_reason == "the evidence lower bound has converged"
    assert 500 < len(fit.elbo) < 1_500
    assert abs(float(pyro.param("loc").detach())) < 0.05


@of_the_verdict
@pytest.mark.parametrize("make", GUIDES)
def test_stops_when_steps_are_reached(make: Any) -> None:
    fit = fit_guide(counting, make(counting, **SMALL), steps=7, **QUICK)
    assert fit.stop_reason == "reached steps (7)"
    assert (len(fit.elbo), fit.skipped_steps) == (7, 0)
    assert fit.seconds > 0
    assert repr(fit).startswith(f"GuideFit({make.__name__}, 7 steps in ")
    lines = repr(fit).splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= 100
    assert f"ELBO {fit.diagnosis.elbo:.3f}" in lines[2]
    assert f"k-hat {fit.diagnosis.k_hat:.2f} is good" in lines[3]
    assert "stopped: reached steps (7)" in repr(fit)


def test_a_fit_without_a_verdict_prints_four_lines_too() -> None:
    nan = math.nan
    diagnosis = Diagnosis(nan, nan, nan, nan, num_samples=0, unscored=0, reason="the data are a minibatch")
    for retreats in (0, 3):
        lines = repr(GuideFit(None, (-1.0, -3.0), diagnosis, 1.0, "interrupted", 7, retreats)).splitlines()
        assert len(lines) == 4
        assert max(map(len, lines)) <= 120
        assert lines[2:] == ["  ELBO about -2.000 nats in the last steps;", "  No verdict: the data are a minibatch)"]


@of_the_verdict
def test_ctrl_c_ends_a_fit_with_its_current_state() -> None:
    model = Counted(math.inf, lambda model: None)
    guide = AutoIAF(model, **SMALL).setup()
    before = weights(guide)

    def press(self: Counted) -> None:
        self._at = math.inf
        signal.raise_signal(signal.SIGINT)

    model._action, model._at = press, model.runs + 40
    fit = fit_guide(model, guide, steps=10_000, **QUICK)
    assert fit.stop_reason == "interrupted"
    assert 0 < len(fit.elbo) < 60
    assert any(not torch.equal(value, before[name]) for name, value in weights(guide).items())
    assert fit.diagnosis.k_hat < 0.7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("model", [counting, in_turn])
def test_ctrl_c_in_the_diagnosis_returns_the_fit_without_a_verdict(model: Any) -> None:
    at_once = model is counting
    with_gradient: list[int] = []

    def press_after_the_steps(counted: Counted) -> None:
        if torch.is_grad_enabled():
            with_gradient.append(counted.runs)
        elif len(with_gradient) >= (20 if at_once else 80):
            counted._at = math.inf
            signal.raise_signal(signal.SIGINT)

    counted = Counted(0, press_after_the_steps, model)
    guide = AutoIAF(counted, **SMALL).setup()
    with_gradient.clear()
    with nullcontext() if at_once else alone:
        fit = fit_guide(counted, guide, steps=20, **QUICK)
    assert len(fit.elbo) == 20
    assert fit.stop_reason == "reached steps (20)"
    assert fit.diagnosis.verdict == "No verdict: interrupted; call diagnose(model, guide)."
    assert "No verdict: interrupted" in repr(fit)
    assert math.isnan(fit.diagnosis.k_hat)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert diagnose(counted, guide, num_samples=100).ess > 50


def press_twice(model: Counted) -> None:
    if torch.is_grad_enabled():
        model._at = math.inf
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_returns_the_fit_at_once() -> None:
    model = Counted(math.inf, press_twice)
    guide = AutoIAF(model, **SMALL).setup()
    model._at = model.runs + 40
    fit = fit_guide(model, guide, steps=10_000, **QUICK)
    assert 0 < len(fit.elbo) < 60
    assert (fit.stop_reason, fit.diagnosis.reason) == ("interrupted", "interrupted; call diagnose(model, guide)")
    assert all(bool(value.isfinite().all()) for value in weights(guide).values())


def test_a_second_ctrl_c_before_the_first_step_is_over_ends_the_fit() -> None:
    model = Counted(math.inf, lambda model: None)
    guide = AutoIAF(model, **SMALL).setup()
    with_gradient: list[int] = []

    def press_at_the_first_step(model: Counted) -> None:
        with_gradient.append(model.runs)
        if len(with_gradient) > 3:  # after the runs that inspect the model
            press_twice(model)

    model._action, model._at = press_at_the_first_step, 0
    with pytest.raises(KeyboardInterrupt):
        fit_guide(model, guide, steps=10_000, **QUICK)


def test_the_learning_rate_warms_up_is_halved_and_ends() -> None:
    schedule = Schedule(0.01, steps=100_000)
    rates = []
    while not schedule.stop_reason:
        rates.append(schedule.learning_rate)
        schedule.step(float(len(rates) % 2))
    assert rates[0] == pytest.approx(0.01 / 50)
    assert max(rates) == 0.01
    assert rates[-1] == pytest.approx(0.01 / 16)
    assert len(rates) == 6 * 100


def test_slow_gains_are_assessed_over_longer_windows() -> None:
    schedule = Schedule(0.01, steps=100_000)
    windows, begun = [], 0
    for step in range(5_000):
        if schedule.step(-0.001 * step):
            windows.append(step + 1 - begun)
            begun = step + 1
    assert windows[0] == 100
    assert windows == sorted(windows)
    assert windows[-1] == pytest.approx(begun / 8, abs=1)
    assert not schedule.stop_reason
    assert schedule.learning_rate == 0.01


def test_an_outlying_draw_does_not_end_a_fit() -> None:
    schedule = Schedule(0.01, steps=100_000)
    for step in range(1_000):
        schedule.step(1e6 if step % 97 == 5 else -0.01 * step)
    assert schedule.learning_rate == 0.01


@pytest.mark.parametrize(
    ("spread", "steps", "reason"), [(0.02, 100, "of the draws are effective"), (0.07, 500, "bound")]
)
def test_the_schedule_ends_when_the_draws_are_effective(spread: float, steps: int, reason: str) -> None:
    """Even if the bound still gains."""
    schedule, good = Schedule(0.01, steps=100_000), []
    while not schedule.stop_reason:
        good.append(schedule.step(float(-len(good)), spread * torch.randn(32)))
    assert len(good) == steps
    assert reason in schedule.stop_reason
    assert good[-1]


@pytest.mark.parametrize(("nats", "share", "ends"), [(30.0, 0.03, True), (30.0, 0.1, False), (2.0, 0.03, False)])
def test_far_from_the_posterior_gains_are_relative_to_the_distance(nats: float, share: float, ends: bool) -> None:
    """Log weights with a standard deviation of s are s^2 / 2 nats away; a few outliers change nothing."""
    generator = torch.Generator().manual_seed(0)
    schedule = Schedule(0.01, steps=100_000)
    for step in range(600):
        weights = (2 * nats) ** 0.5 * torch.randn(32, generator=generator)
        weights[0] -= 1e4 * (step % 5 == 0)
        schedule.step(-share * nats * step / 100, weights)
    assert bool(schedule.stop_reason) == ends
    assert (schedule.learning_rate == 0.01) != ends


@of_the_verdict
def test_a_normal_posterior_takes_few_steps() -> None:
    known = regression(dtype=torch.float32)
    fit = fit_guide(known.model, AutoIAF(known.model), progress=False)
    assert len(fit.elbo) <= 400
    assert fit.diagnosis.ess > 0.999 * fit.diagnosis.num_samples


def test_the_learning_rate_stays_while_the_bound_rises_and_falls_at_the_end() -> None:
    schedule = Schedule(0.01, steps=4_000)
    rates, good = [], False
    for step in range(4_000):
        rates.append(schedule.learning_rate)
        good = schedule.step(float(-step)) or good
    assert rates[50] == rates[2_790] == 0.01
    assert rates[-1] == pytest.approx(0.01 / 32, rel=0.01)
    assert not schedule.stop_reason
    assert good


def rising(steps: int) -> float:
    """Final value of a weight that moves steadily towards a distant optimum."""
    pyro.clear_param_store()

    def model() -> None:
        pyro.sample("z", dist.Normal(1000.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.0)), 1.0))

    fit_guide(model, guide, steps=steps, num_particles=1, progress=False)
    return float(pyro.param("loc").detach())


def test_a_fit_that_is_cut_short_keeps_its_last_steps() -> None:
    """While the bound rises more steps are better, even if they end within a window of 200."""
    found = [rising(steps) for steps in (200, 260, 390)]
    assert found == sorted(found)
    assert found[2] > 1.5 * found[0]


# -- robustness --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Encountered:UserWarning")
@pytest.mark.parametrize("how", ["raises", "nan"])
def test_steps_that_fail_are_skipped_and_counted(how: str) -> None:
    failures = []

    def fails(model: Counted) -> None:
        if model.runs % 10 == 0 and model.runs < 40 and torch.is_grad_enabled():  # before the diagnosis
            failures.append(model.runs)
            if how == "raises":
                raise ValueError("singular")
            pyro.sample("bad", dist.Normal(math.nan, 1.0, validate_args=False), obs=torch.tensor(0.0))

    model = Counted(0, lambda model: None)
    guide = AutoIAF(model, **SMALL).setup()
    model._action = fails
    model.runs = -50  # well after the runs that inspect the model before the first step
    fit = fit_guide(model, guide, steps=100, **QUICK)
    assert fit.skipped_steps == len(failures) > 3
    assert len(fit.elbo) == 100 - fit.skipped_steps
    assert all(map(math.isfinite, fit.elbo))
    assert all(bool(parameter.isfinite().all()) for parameter in guide.parameters())
    assert "steps without a finite loss and gradient skipped" in repr(fit)


def test_an_error_in_every_run_of_the_model_is_raised() -> None:
    def fails(model: Counted) -> None:
        if torch.is_grad_enabled():
            raise ValueError("always singular")

    model = Counted(math.inf, fails)
    guide = AutoIAF(model, **SMALL).setup()
    model._at = 0
    with pytest.raises(ValueError, match="always singular"):
        fit_guide(model, guide, steps=100, **QUICK)


@pytest.mark.filterwarnings("ignore:Encountered:UserWarning")
def test_a_bound_that_is_never_finite_is_an_error() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(math.nan, 1.0, validate_args=False), obs=torch.tensor(0.0))

    with pytest.raises(ArithmeticError, match="50 steps in a row, nor a finite density of y: look for NaN in the data"):
        fit_guide(model, AutoIAF(model, init_scale=1.0, **SMALL), steps=100, **QUICK)


@pytest.mark.filterwarnings("ignore:Encountered:UserWarning")
@pytest.mark.parametrize("how", ["raises", "is never finite"])
def test_a_fit_that_fails_midway_ends_with_its_best_weights(how: str) -> None:
    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.tensor(3.0)), 1.0))

    def fails(model: Counted) -> None:
        if model.runs < 540:
            pyro.param("loc").data.fill_(1e3)  # as after a far too long step
        if how == "raises":
            raise ValueError("singular from now on")
        pyro.sample("bad", dist.Normal(math.nan, 1.0, validate_args=False), obs=torch.tensor(0.0))

    model = Counted(500, fails, standard)
    fit = fit_guide(model, guide, steps=1_000, learning_rate=0.05, num_particles=1, progress=False)
    assert abs(float(pyro.param("loc").detach())) < 0.2
    what = "the model raised ValueError" if how == "raises" else "no step was finite"
    assert fit.stop_reason == f"{what} 50 times in a row"
    assert 400 < len(fit.elbo) < 500
    assert "No verdict: the model raised ValueError" in fit.diagnosis.verdict or how != "raises"


@pytest.mark.filterwarnings("ignore:Encountered:UserWarning")
@pytest.mark.parametrize("how", ["explodes", "is not a number"])
def test_a_diverging_fit_returns_to_its_best_weights_at_half_the_rate(how: str) -> None:
    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.tensor(3.0)), 1.0))

    def leads_astray(model: Counted) -> None:
        model._at = math.inf
        pyro.param("loc").data.fill_(1e4 if how == "explodes" else math.nan)

    model = Counted(300, leads_astray, standard)
    fit = fit_guide(model, guide, steps=600, learning_rate=0.05, num_particles=1, progress=False)
    assert fit.retreats == 1
    assert abs(float(pyro.param("loc").detach())) < 0.2
    assert "went back to the best weights 1 times, with half the learning rate" in repr(fit)


def test_the_learning_rate_is_halved_and_warms_up_again_on_a_retreat() -> None:
    schedule = Schedule(0.01, steps=100_000)
    for _ in range(100):
        schedule.step(1.0)
    schedule.restart()
    assert schedule.learning_rate == pytest.approx(0.005 / 50)
    for _ in range(60):
        schedule.step(1.0)
    assert schedule.learning_rate == 0.005


def test_an_ordinary_fit_never_retreats() -> None:
    fit = fit_guide(counting, AutoIAF(counting, init_scale=0.01, **SMALL), steps=300, **QUICK)
    assert (fit.retreats, fit.skipped_steps) == (0, 0)


# -- many latent variables ---------------------------------------------------------------------------------------------


def hierarchy(groups: int) -> Any:
    """Group means around a common mean, with an unknown scale."""
    y = 1 + 0.3 * torch.randn(groups, generator=torch.Generator().manual_seed(1))

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        scale = pyro.sample("scale", dist.HalfCauchy(torch.tensor(2.0)))
        with pyro.plate("groups", groups):
            z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    return model


def funnel(size: int) -> Any:
    """Neal's funnel: the log-variance of all variables but one is that one."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", size - 1):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    return model


def horseshoe(size: int) -> Any:
    """A regression with many weights, most of which are 0, each with its own scale."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, size, generator=generator)
    y = x[:, 0] * 2 - x[:, 1] + torch.randn(60, generator=generator)

    def model() -> None:
        common = pyro.sample("common", dist.HalfCauchy(torch.tensor(1.0)))
        own = pyro.sample("own", dist.HalfCauchy(torch.ones(size)).to_event(1))
        w = pyro.sample("w", dist.Normal(torch.zeros(size), own * common[..., None]).to_event(1))
        with pyro.plate("rows", 60):
            pyro.sample("y", dist.Normal((w * x).sum(-1), 1.0), obs=y)

    return model


MANY: dict[str, tuple[Any, float]] = {
    "funnel": (funnel(100), -6.0),
    "horseshoe": (horseshoe(50), -160.0),
}


@pytest.mark.parametrize(("model", "least"), MANY.values(), ids=MANY)
def test_the_default_rate_suits_a_hundred_latent_variables(model: Any, least: float) -> None:
    fit = fit_guide(model, AutoIAF(model), steps=60, **QUICK)
    assert (fit.skipped_steps, fit.retreats) == (0, 0)
    bounds = [median(fit.elbo[start : start + 10]) for start in range(0, 60, 10)]
    assert min(bounds) > bounds[0] - 10
    assert bounds[-1] > least


@pytest.mark.parametrize("make", GUIDES)
def test_a_plain_loop_at_the_usual_rate_is_stable_with_a_hundred_latent_variables(make: Any) -> None:
    model = hierarchy(100)
    loss = pyro.infer.Trace_ELBO(num_particles=4, vectorize_particles=True)
    losses = steps(loss, model, make(model, num_layers=2, init_scale=0.1), 40)
    assert max(losses) < losses[0] + 20
    assert losses[-1] < losses[0] - 20


def test_fits_guides_of_pyro() -> None:
    near = init_to_value(values={"rate": torch.tensor(3.0)})
    fit = fit_guide(counting, AutoNormal(counting, init_loc_fn=near), steps=200, learning_rate=0.05, **QUICK)
    assert float(fit.guide.median()["rate"]) == pytest.approx(float(GAMMA.mean), rel=0.05)
    assert repr(fit).startswith("GuideFit(AutoNormal, 200 steps")


def test_fits_guides_that_are_functions() -> None:
    def guide() -> None:
        shape = pyro.param("shape", lambda: torch.tensor(5.0), constraint=dist.constraints.positive)
        rate = pyro.param("rate_of", lambda: torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("rate", dist.Gamma(shape, rate))

    fit = fit_guide(counting, guide, steps=300, learning_rate=0.05, **QUICK)
    mean = pyro.param("shape") / pyro.param("rate_of")
    assert float(mean.detach()) == pytest.approx(float(GAMMA.mean), rel=0.05)
    assert repr(fit).startswith("GuideFit(function, 300 steps")


def test_parameters_of_the_model_are_fitted_too() -> None:
    y = torch.tensor([1.0, 3.0])

    def model() -> None:
        loc = pyro.param("loc", lambda: torch.tensor(1.5))
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    fit_guide(model, AutoIAF(model, **SMALL), steps=200, learning_rate=0.05, **QUICK)
    assert float(pyro.param("loc").detach()) == pytest.approx(2.0, abs=0.1)


def test_effective_draws_do_not_end_a_fit_while_parameters_of_the_model_move() -> None:
    """The posterior given any scale is normal, so all draws are effective before the scale is fitted."""
    y = torch.tensor(2.0) + 0.5 * torch.linspace(-1.7, 1.7, 200)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        scale = pyro.param("scale", torch.tensor(3.0), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    fit = fit_guide(model, AutoIAF(model, **SMALL), progress=False)
    assert "converged" in fit.stop_reason
    assert pyro.param("scale").item() == pytest.approx(float(y.std()), rel=0.01)


def test_a_model_that_does_not_broadcast_is_fitted_nevertheless() -> None:
    guide = AutoIAF(in_turn, **SMALL)
    with alone as warned:
        fit = fit_guide(in_turn, guide, steps=30, progress=False)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert "before site y, whose batch shape should be (7,)" in str(warned[0].message)
    assert "z has shape (7, 2), alone (2,)" in str(warned[0].message)
    assert str(warned[0].message).endswith("by if, float or .item().")
    assert fit.run_alone in str(warned[0].message)
    assert "the model was run for each draw" in repr(fit)
    assert fit.skipped_steps == 0
    torch.testing.assert_close(guide.median()["z"], torch.tensor([0.8, 0.0]), atol=0.1, rtol=0)


def test_the_error_for_minibatches_that_do_not_broadcast_advises_to() -> None:
    rows = torch.linspace(-1.0, 1.0, 9).reshape(3, 3)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("rows", 3, subsample_size=2) as index:
            pyro.sample("y", dist.Normal(rows[index] @ w, 1.0), obs=torch.zeros(2))

    with pytest.warns(UserWarning, match=r"slow: with 7 draws at once .* Draws come first: index and reduce from the"):
        fit_guide(model, AutoIAF(model, init_scale=0.1, **SMALL), steps=1, **QUICK)


@of_the_verdict
def test_a_guide_that_was_set_up_with_other_data_is_set_up_anew() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, 0.1), obs=y)

    guide = AutoIAF(model, **SMALL)
    y = torch.tensor([0.1, -0.1, 0.0])
    fit_guide(model, guide, y, steps=5, **QUICK)
    weights = [parameter.clone() for parameter in guide.parameters()]
    fit_guide(model, guide, y.clone(), steps=1, **QUICK)
    assert all(torch.allclose(one, other, atol=0.05) for one, other in zip(weights, guide.parameters(), strict=True))
    with pytest.warns(UserWarning, match=r"^fit_guide sets AutoIAF up again, since it was set up with other data\.$"):
        fit = fit_guide(model, guide, y[:2] + 30, steps=5, **QUICK)
    torch.testing.assert_close(guide.median(y[:2] + 30)["loc"], torch.tensor(30.0), atol=0.1, rtol=0)
    assert fit.diagnosis.grade == "good"


@of_the_verdict
def test_a_model_that_broadcasts_causes_no_message() -> None:
    fit = fit_guide(counting, AutoIAF(counting, **SMALL), steps=5, **QUICK)
    assert fit.run_alone == ""
    assert "for each draw" not in repr(fit)
    assert fit.diagnosis.num_samples >= 10_000


@of_the_verdict
@pytest.mark.parametrize(("steps", "least"), [(10, 200), (105, 210)])
def test_overhead_is_proportional_to_the_number_of_steps(steps: int, least: int) -> None:
    model = Counted(math.inf, lambda model: None, in_turn)
    guide = AutoIAF(model, **SMALL).setup()
    assert model.runs < 450
    before = model.runs
    with alone:
        fit = fit_guide(model, guide, steps=steps, progress=False)
    assert fit.diagnosis.num_samples == least
    assert model.runs - before < 4 * steps + least + 60


@of_the_verdict
def test_arguments_are_the_models_and_amortised_guides_are_fitted() -> None:
    def model(y: Tensor, *, scale: float) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z, scale), obs=y)

    network = nn.Linear(1, 2)
    guide = AutoIAF(model, encoder=lambda y, scale: network(y.mean(0, keepdim=True)), **SMALL)
    y = torch.tensor([1.0, 2.0])
    fit = fit_guide(model, guide, y, scale=1.0, steps=150, learning_rate=0.05, **QUICK)
    assert float(guide.median(y, scale=1.0)["z"]) == pytest.approx(1.0, abs=0.1)
    # Not k-hat, which is uninformative for nearly equal weights.
    assert fit.diagnosis.ess > 0.97 * fit.diagnosis.num_samples


def test_the_same_seed_is_the_same_fit() -> None:
    fits = []
    for _ in range(2):
        pyro.set_rng_seed(5)
        fits.append(fit_guide(counting, AutoIAF(counting, **SMALL), steps=20, **QUICK))
    assert fits[0].elbo == fits[1].elbo


# -- output ------------------------------------------------------------------------------------------------------------


def test_a_bar_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    fit_guide(counting, AutoIAF(counting, **SMALL), steps=5, num_particles=2, progress="always")
    shown = capsys.readouterr()
    assert "step" in shown.err
    assert shown.out == ""


def test_a_bar_is_shown_over_the_runs_before_and_after_the_steps_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_UPDATES", 0.0)
    with alone:
        fit_guide(in_turn, AutoIAF(in_turn, **SMALL), steps=5, progress="always")
    shown = capsys.readouterr()
    for what in ("setting up, run", "step 5", "diagnosis, run 20"):
        assert what in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("progress", [False, True])
def test_no_bar_is_shown_without_a_terminal(capsys: pytest.CaptureFixture[str], progress: bool) -> None:
    fit_guide(counting, AutoIAF(counting, **SMALL), steps=5, num_particles=2, progress=progress)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoIAF])
def test_pyro_logs_nothing(caplog: pytest.LogCaptureFixture, guide_class: Any) -> None:
    with caplog.at_level("INFO"):
        fit_guide(counting, guide_class(counting), steps=5, num_particles=2, progress=False)
    assert not caplog.records


# -- wrong arguments ---------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "steps": ({"steps": 0}, ValueError, "steps of at least 1, got 0"),
    "half a step": ({"steps": 1.5}, TypeError, "steps to be an int, got 1.5"),
    "particles": ({"num_particles": 0}, ValueError, "num_particles of at least 1, got 0"),
    "rate": ({"learning_rate": 0.0}, ValueError, "learning_rate above 0 and finite, got 0.0"),
    "infinite rate": ({"learning_rate": math.inf}, ValueError, "learning_rate above 0 and finite, got inf"),
    "named rate": ({"learning_rate": "fast"}, TypeError, "learning_rate to be a number, got 'fast'"),
    "progress": ({"progress": "often"}, ValueError, "progress to be True, False or \"always\", got 'often'"),
}


@pytest.mark.parametrize(("options", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        fit_guide(counting, AutoIAF(counting, **SMALL), **options)
    assert str(raised.value).startswith("fit_guide expected")


def of_data(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lr", "use learning_rate"),
        ("num_steps", "use steps"),
        ("num_samples", "use num_particles"),
        ("learningrate", "use learning_rate"),
        ("colour", "the options are steps, num_particles, learning_rate, progress"),
    ],
)
def test_an_option_by_another_name_is_named(name: str, meant: str) -> None:
    kwargs: dict[str, Any] = {name: 3}
    with pytest.raises(TypeError) as raised:
        fit_guide(of_data, AutoIAF(of_data), torch.zeros(2), **kwargs)
    assert str(raised.value) == (
        f"fit_guide expected an option of its own or an argument of the model, model(y), got {name}: {meant}."
    )


def test_keywords_of_the_model_are_passed_on_whatever_their_name() -> None:
    def model(*, lr: float) -> None:
        pyro.sample("z", dist.Normal(lr, 1.0))

    fit = fit_guide(model, AutoIAF(model, **SMALL), lr=5.0, steps=3, **QUICK)
    assert float(fit.guide.median()["z"]) == pytest.approx(5.0, abs=0.2)


def test_a_keyword_of_the_model_that_an_option_has_is_passed_by_a_partial_function() -> None:
    def model(y: Tensor, *, steps: float) -> None:
        pyro.sample("z", dist.Normal(y.sum() + steps, 1.0))

    y = torch.ones(2)
    with pytest.raises(
        TypeError, match=r"'steps'; this is an option of .*functools\.partial\(model, steps=\.\.\.\) as"
    ):
        fit_guide(model, AutoIAF(model, **SMALL), y, steps=3)
    of_five = partial(model, steps=5.0)
    fit = fit_guide(of_five, AutoIAF(of_five, **SMALL), y, steps=3, **QUICK)
    assert float(fit.guide.median(y)["z"]) == pytest.approx(7.0, abs=0.2)


def test_a_misspelt_option_that_the_model_takes_is_named() -> None:
    def model(**options: float) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    typo: dict[str, Any] = {"leraning_rate": 0.1}
    with pytest.warns(UserWarning, match="takes any keyword: was learning_rate meant") as warned:
        fit_guide(model, AutoIAF(model, **SMALL), steps=1, **QUICK, **typo)
    assert warned[0].filename == __file__


class Module(nn.Module):
    def forward(self, y: Tensor) -> None:
        of_data(y)


@pytest.mark.parametrize("model", [of_data, Module(), partial(of_data)])
def test_missing_arguments_of_the_model_are_named(model: Any) -> None:
    with pytest.raises(TypeError, match=r"fit_guide expected the arguments of the model, model\(y\).*argument: 'y'\.$"):
        fit_guide(model, AutoIAF(model))


@pytest.mark.parametrize("ask", [fit_guide, diagnose, reweight, to_arviz, neutra])
def test_swapped_model_and_guide_are_recognised(ask: Any) -> None:
    with pytest.raises(
        TypeError, match=r"expected a model and then its guide, got AutoIAF, a guide, .*\(model, guide\)"
    ):
        ask(AutoIAF(counting, **SMALL).setup(), counting)


@pytest.mark.parametrize("ask", [fit_guide, diagnose, reweight])
def test_swapped_functions_are_recognised_by_their_observations(ask: Any) -> None:
    def guide() -> None:
        rate = pyro.sample("rate", dist.Gamma(pyro.param("shape", torch.tensor(2.0)), 1.0))
        pyro.deterministic("log_rate", rate.log())

    with pytest.raises(ValueError, match=r"which observes nothing, got one that observes y: .*\(model, guide\)\.$"):
        ask(guide, counting)
    assert diagnose(counting, guide, num_samples=100).num_samples == 100


def fails(site: str | None) -> None:
    if site is not None:
        pyro.sample(site, dist.Normal(0.0, 1.0))
    raise ValueError("no data yet")


def test_empty_tables_are_removed_from_errors_of_the_model() -> None:
    for ask in (fit_guide, diagnose):
        for guide in (AutoIAF(partial(fails, None)), AutoNormal(partial(fails, None))):
            with pytest.raises(ValueError, match=r"\Ano data yet\Z"):
                ask(partial(fails, None), guide)
    with pytest.raises(ValueError, match=r"\Ano data yet\Z"):
        AutoIAF(partial(fails, None)).setup()


def test_tensors_in_errors_of_the_model_are_abbreviated() -> None:
    def model() -> None:
        raise ValueError("outside:\n" + "\n".join(map(str, range(300))))

    with pytest.raises(ValueError, match=r"\Aoutside:\n0\n1\n2\n3\n4\n\.\.\. \(301 lines\)\Z"):
        fit_guide(model, AutoNormal(model))


def test_tables_of_sites_are_kept_in_errors_of_the_model() -> None:
    with pytest.raises(ValueError, match=r"(?s)\Ano data yet\nTrace Shapes:.*before dist"):
        fit_guide(partial(fails, "before"), AutoIAF(partial(fails, "before")))


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoMultivariateNormal, AutoIAF])
def test_parameters_outside_of_pyros_store_are_trained(guide_class: Any) -> None:
    with pyro.settings.context(module_local_params=True):
        guide = guide_class(counting, init_scale=0.5)
        guide()
        before = weights(guide)
        fit = fit_guide(counting, guide, steps=20, **QUICK)
        assert len(fit.elbo) == 20
        assert not same(before, weights(guide))
        if guide_class is AutoIAF:
            before = weights(guide)
            steps(Trace_ELBO(), counting, guide, 2)
            assert not same(before, weights(guide))
    assert len(pyro.get_param_store()) == 0


def test_a_class_in_place_of_a_guide_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"fit_guide expected a guide, got the class AutoIAF: make one, AutoIAF\(model\)"
    ):
        fit_guide(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), AutoIAF)


def test_a_guide_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="fit_guide expected a guide with parameters to train, got none"):
        fit_guide(counting, lambda: pyro.sample("rate", dist.Gamma(2.0, 1.0)), **QUICK)


def test_a_guide_that_leaves_out_a_site_is_refused() -> None:
    def model() -> None:
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="fit_guide expected a guide of every latent site, got none of b"):
        fit_guide(model, lambda: pyro.sample("a", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0)), **QUICK)


SHAPES = dist.Gamma(0.5, 1.0), dist.StudentT(2.0), dist.Beta(0.5, 0.5)


# With a single variable guides differ only by the network, which has no input.
@of_the_verdict
@pytest.mark.parametrize(
    ("guide_class", "fn"),
    [*((AutoIAF, fn) for fn in SHAPES), (AutoRealNVP, SHAPES[0])],
)
def test_a_single_latent_variable_has_any_shape(guide_class: Any, fn: Any) -> None:
    """Affine layers of one variable compose to an affine map, which misplaces 12 % of the probability."""
    pyro.set_rng_seed(0)
    model = lambda: pyro.sample("z", fn)  # noqa: E731
    diagnosis = fit_guide(model, guide_class(model), steps=600, progress=False).diagnosis
    assert diagnosis.grade == "good"
    assert diagnosis.misplaced < 0.02


@pytest.mark.parametrize(("rows", "expected"), [(10, 1), (20_000, 3)])
def test_torch_has_one_thread_for_a_model_of_small_operations(rows: int, expected: int) -> None:
    numbers = []

    def model() -> None:
        numbers.append(torch.get_num_threads())
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", rows):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.zeros(rows))

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        guide = AutoIAF(model, num_layers=1, hidden_dims=[8])
        fit_guide(model, guide, steps=2, progress=False)
        assert (numbers[0], set(numbers[1:])) == (3, {expected})
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
