"""Fitting a guide to a model by stochastic variational inference."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Generic, TypeVar, cast

from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

from pyro_maf._core.checks import check_above_zero, check_positive
from pyro_maf._core.interruption import Interruption
from pyro_maf._core.optimization import Adam, WeightAverage, clip
from pyro_maf._core.progress import Bar, bar, check_progress
from pyro_maf.infer.diagnosis.diagnosis import Diagnosis, diagnose
from pyro_maf.infer.diagnosis.importance import Pair
from pyro_maf.infer.diagnosis.missed_modes import LEAST
from pyro_maf.infer.diagnosis.propriety import IMPROPER
from pyro_maf.infer.fitting.convergence import BestWeights, Schedule
from pyro_maf.infer.fitting.walk import Step, Walk, can_walk
from pyro_maf.infer.guides.auto_flow import AutoFlow
from pyro_maf.infer.guides.path_gradient import TracePath_ELBO
from pyro_maf.infer.guides.saved import SavedGuide
from pyro_maf.infer.models.broadcasting import why_alone
from pyro_maf.infer.models.model import (
    FAILURES,
    Call,
    Guide,
    Model,
    check_call,
    check_pair,
    show_runs,
    without_empty_tables,
)
from pyro_maf.infer.start.initialization import ALONE as SET_UP_RUNS

__all__ = ["GuideFit", "fit_guide"]

AnyGuide = TypeVar("AnyGuide", bound=Guide)

OPTIONS = ("steps", "num_particles", "learning_rate", "progress")
ADVICE = (
    "Draws come first: index and reduce from the right, such as (X * w).sum(-1) or w[..., 0].",
    "Compute with tensors, as by torch.where, instead of reading latent variables by if, float or .item().",
)
"""Advice about a model that has to be run for each draw: if `vmap` could run it for all draws, and if not."""
INTERRUPTED = "interrupted"
MOST_FAILURES = 50
FAILURES_TO_RETREAT = 10
CLIP = 4.0
AVERAGED_STEPS = 100
RECENT = 100
FEW_PARTICLES, MOST_PARTICLES, NUMBERS = 32, 128, 2**16
"""Limits of the default number of particles, and of their log-probabilities; more would take noticeable time."""
ALONE = 4
"""Number of particles if the model has to be run for each."""
DIAGNOSED, MOST_DIAGNOSED = 10_000, 1_000_000_000
"""Number of draws in the diagnosis, and its maximum number of log-probabilities if a thousand draws have fewer."""
DIAGNOSED_BY_STEP, LEAST_DIAGNOSED = 2, 200
"""Draws in the diagnosis per step, and their minimum, if the model has to be run for each draw."""


@dataclass(frozen=True, repr=False)
class GuideFit(Generic[AnyGuide]):
    """A fitted guide, with its loss history, the reason for stopping and a diagnosis.

    Attributes:
        guide: The guide, with its weights averaged over the best window.
        elbo: The evidence lower bound of each step in nats, from that step's draws and weights.
        diagnosis: Diagnosis of the returned guide.
        seconds: Duration of the fit.
        stop_reason: Reason for stopping, in words.
        skipped_steps: Number of steps skipped because the model raised, or loss or gradient were not finite.
        retreats: Number of times that the fit returned to its best weights, with half the learning rate.
        run_alone: Why the model had to be run for each draw, and the site that shows it; otherwise "".
    """

    guide: AnyGuide
    elbo: tuple[float, ...]
    diagnosis: Diagnosis
    seconds: float
    stop_reason: str
    skipped_steps: int = 0
    retreats: int = 0
    run_alone: str = ""

    def __repr__(self) -> str:
        steps = f"{len(self.elbo)} steps in {self.seconds:.1f} s"
        if self.skipped_steps:
            steps += f", {self.skipped_steps} steps without a finite loss and gradient skipped"
        end = self.stop_reason
        if self.retreats:
            end += f"; went back to the best weights {self.retreats} times, with half the learning rate"
        if self.run_alone:
            end += "; the model was run for each draw"
        return (
            f"GuideFit({type(self.guide).__name__}, {steps};\n"
            f"  stopped: {end};\n"
            f"  {self._bound()};\n"
            f"  {self._verdict()})"
        )

    def _bound(self) -> str:
        figures = self.diagnosis
        if figures.reason:
            return f"ELBO about {fmean(self.elbo[-RECENT:]):.3f} nats in the last steps" if self.elbo else "no ELBO"
        draws = f"effective sample size {figures.ess:.0f} of {figures.num_samples}"
        return f"ELBO {figures.elbo:.3f} +- {figures.elbo_se:.3f} nats, {draws}"

    def _verdict(self) -> str:
        """The verdict, shortened to a line; `diagnosis` has the full text."""
        verdict = self.diagnosis.verdict.rstrip(".")
        if self.diagnosis.reason or self.diagnosis.grade == "usable":  # how far, and what to do
            return verdict
        caveat = f"; {self.diagnosis.caveat}" if self.diagnosis.caveat else ""
        return verdict.removesuffix(caveat).partition(": ")[0] + caveat


def fit_guide(
    model: Model,
    guide: AnyGuide,
    *args: object,
    steps: int = 10_000,
    num_particles: int | None = None,
    learning_rate: float = 1e-2,
    progress: bool | str = True,
    **kwargs: object,
) -> GuideFit[AnyGuide]:
    r"""Fit a guide, and the parameters of the model if it has any, until the evidence lower bound stops rising.

    Adam uses the path gradient for guides of this package, and that of `Trace_ELBO` for others. The learning rate warms
    up, is halved whenever the bound over a window of steps does not improve on the best before it by more than its
    standard error, and falls in any case over the last 30 % of `steps`. After five halvings the bound has converged. A
    window is the last eighth of all steps, at least 100. If 99 % of its draws are effective, the rate is halved too,
    and at 99.9 % nothing is left to gain. If the guide is more than 5 nats from the posterior, judged by the spread of
    the log weights, the rate is halved when a window gains less than a twentieth of the remainder. If parameters of the
    model are fitted too, the posterior moves, and only the bound decides.

    Gradients are clipped to four times their usual norm. Draws that the model cannot score are left out of a step, and
    steps whose loss or gradient is not finite are skipped. After ten of these in a row, or if the bound falls far below
    its best, the fit continues from its best weights at half the rate; after fifty it ends with them. The result has
    the weights averaged over the best window. If the diagnosis finds modes that a guide of this package lacks, the
    guide gets a component for each and the fit continues, unless the guide has an `init_loc_fn`.

    Args:
        model: A Pyro model.
        guide: Its guide: one of this package, of Pyro, or your own.
        *args, **kwargs: Arguments of model and guide. If an argument has the name of an option below, fit
            `functools.partial(model, steps=...)` with a guide of that.
        steps: Maximum number of steps.
        num_particles: Draws per step: by default 128, or fewer, at least 32, if they have more than 65,536
            log-probabilities. All in one run if the model allows that, otherwise at most four.
        learning_rate: Maximum learning rate.
        progress: True shows a bar on a terminal or in a notebook, False never, "always" in any case.

    Returns:
        A `GuideFit`. Ctrl-C ends it early, with the best result so far; during the final diagnosis, without a verdict.

    Cost:
        A step is one run of guide and model, and one of their gradients; the diagnosis is ten thousand draws, in
        batches. If the model has to be run for each draw, a step takes up to four runs, the set-up some 300, and the
        diagnosis two per step, at least 200.

    Warns:
        UserWarning: If the model has to be run for each draw, with the reason and the sites that show it. If a guide of
            this package was set up with other data, in which case it is set up again.

    Raises:
        ValueError: For options out of range, or a guide without parameters.
        TypeError: For a guide's class instead of a guide, if model and guide are swapped, or if the model does not
            accept the arguments.
        Exception: The error of the model, if it raises one in each of the first fifty steps.
        ArithmeticError: If loss or gradient are not finite in each of the first fifty steps.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_maf.infer import AutoIAF
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> y = torch.tensor([0.5, -0.2, 0.1])
        >>> fit = fit_guide(model, AutoIAF(model), y, steps=100, progress=False)
        >>> fit.stop_reason, fit.diagnosis.k_hat < 0.7
        ('reached steps (100)', True)

    Reference:
        Roeder, Wu & Duvenaud, *Sticking the Landing*, 2017; Dhaka et al., *Robust, accurate stochastic optimization for
        variational inference*, 2020.
    """
    started = time.monotonic()
    call = Call(model, args, kwargs)
    _check(call, guide, steps, num_particles, learning_rate, progress)
    with (
        ExitStack() as threads,
        _quiet_pyro(),
        bar(progress, "{task.description} {task.completed}", "{task.fields[elbo]}") as shown,
    ):
        with show_runs(shown, "setting up, run", SET_UP_RUNS, elbo=""):
            if isinstance(guide, AutoFlow):
                if guide.renew(*args, **kwargs):
                    what = f"fit_guide sets {type(guide).__name__} up again, since it was set up with other data."
                    warnings.warn(what, UserWarning, stacklevel=2)
                guide.setup(*args, **kwargs)  # not in a trace, which would lengthen its error messages
                threads.enter_context(guide.threads(num_particles or FEW_PARTICLES))
            run = _Run(call, guide, num_particles, Schedule(learning_rate, steps))
        if run.alone:
            advice = ADVICE[not run.is_vectorised]
            what = f"fit_guide runs the model for each draw, which is slow: {run.alone}. {advice}"
            warnings.warn(what, UserWarning, stacklevel=2)
        runs, left = [run], steps
        reason, diagnosis = run.to_the_end(steps, shown), run.diagnosed(shown)
        try:
            while reason != INTERRUPTED and runs[-1].failure is None:
                left -= len(runs[-1].elbo)
                if not left or not _covers_missed(guide, diagnosis, call):
                    break
                runs.append(_Run(call, guide, num_particles, Schedule(learning_rate, left)))
                reason, diagnosis = runs[-1].to_the_end(left, shown), runs[-1].diagnosed(shown)
        except KeyboardInterrupt:  # before the first step of a further run
            reason = INTERRUPTED
    if run.failure is not None and diagnosis.reason != IMPROPER:
        raise run.failure
    return GuideFit(
        guide=guide,
        elbo=tuple(bound for run in runs for bound in run.elbo),
        diagnosis=diagnosis,
        seconds=time.monotonic() - started,
        stop_reason="nothing to converge to" if diagnosis.reason == IMPROPER else reason,
        skipped_steps=sum(run.skipped for run in runs),
        retreats=sum(run.retreats for run in runs),
        run_alone=run.alone,
    )


def _covers_missed(guide: Guide, diagnosis: Diagnosis, call: Call) -> bool:
    """Add the modes that the diagnosis finds missing to a guide of this package; return True if any were added."""
    modes = [region.values for region in diagnosis.missed if region.is_mode and region.share > LEAST]
    return isinstance(guide, AutoFlow) and guide.cover(modes, call)


def _check(
    call: Call, guide: Guide, steps: int, num_particles: int | None, learning_rate: float, progress: object
) -> None:
    check_pair("fit_guide", call.program, guide)
    check_positive("fit_guide", "steps", steps)
    if num_particles is not None:
        check_positive("fit_guide", "num_particles", num_particles)
    check_above_zero("fit_guide", "learning_rate", learning_rate, finite=True)
    check_progress("fit_guide", progress)
    check_call("fit_guide", call, OPTIONS)


class _Run:
    """State and steps of a fit."""

    def __init__(self, call: Call, guide: Guide, num_particles: int | None, schedule: Schedule) -> None:
        self._call, self._guide = call, guide
        self._pair = Pair("fit_guide", call, guide)
        joint = self._pair.joint
        affordable = max(FEW_PARTICLES, min(MOST_PARTICLES, NUMBERS // self._pair.numbers))
        self.num_particles = num_particles or affordable
        walks = can_walk(guide, joint)
        self.is_vectorised = joint.is_vectorised
        self.alone = "" if walks or joint.broadcasts else why_alone(call, guide, *self._pair.traces)
        objective = (
            TracePath_ELBO if isinstance(guide, AutoFlow) else TraceEnum_ELBO if joint.enumerated else Trace_ELBO
        )
        # Pass max_plate_nesting explicitly; Pyro would otherwise guess it and print a warning.
        self._objective = objective(
            num_particles=self.num_particles if joint.broadcasts else min(self.num_particles, ALONE),
            vectorize_particles=joint.broadcasts,
            max_plate_nesting=self._pair.nesting,
        )
        self._parameters = self._find_parameters()
        self._walk: Walk | None = None
        if walks:
            self._walk = Walk(call, cast("AutoFlow", guide), joint, self.num_particles, self._parameters)
        # While the model's parameters move, so does the posterior: draws may be effective far from the maximum.
        of_guide = {id(each) for each in guide.parameters()} if isinstance(guide, AutoFlow) else set()
        self._weights_tell = of_guide.issuperset(map(id, self._parameters))
        self._optimizer = Adam(self._parameters)
        self._usual_norm = math.inf
        self._failures = 0
        self._average = WeightAverage(self._parameters, AVERAGED_STEPS)
        self._best = BestWeights(self._parameters)
        self._schedule = schedule
        self.elbo: list[float] = []
        self.skipped = 0
        self.retreats = 0
        self.failure: Exception | None = None
        self._is_abandoned = False
        self._end = ""

    def _find_parameters(self) -> list[Tensor]:
        call, failure = self._call, None
        with poutine.trace(param_only=True) as capture:
            for _ in range(FAILURES_TO_RETREAT):  # a model may raise for some draws
                try:
                    self._objective.loss(call.program, self._guide, *call.args, **call.kwargs)
                    break
                except FAILURES as error:
                    failure = error
        leaves = [_leaf(site["value"]) for site in capture.trace.nodes.values() if site["type"] == "param"]
        if isinstance(self._guide, AutoFlow):
            leaves += self._guide.parameters()
        parameters = list({id(leaf): leaf for leaf in leaves if leaf.requires_grad}.values())
        if not parameters:
            advice = ""
            if isinstance(self._guide, SavedGuide):
                advice = " of a loaded guide: set up a new one, and load its weights by "
                advice += "guide.transform.load_state_dict(loaded.transform.state_dict())"
            raise failure or ValueError(f"fit_guide expected a guide with parameters to train, got none{advice}.")
        return parameters

    def to_the_end(self, steps: int, shown: Bar) -> str:
        """Take steps until there is a reason to stop, which is returned; set the guide to its averaged weights."""
        shown.show("step", 0, steps, elbo="")
        with Interruption() as interruption:
            try:
                return self._steps(steps, interruption, shown)
            finally:
                interruption.settle()
                self._settle()

    def _steps(self, steps: int, interruption: Interruption, shown: Bar) -> str:
        for _ in range(steps):
            try:
                self.step()
            except KeyboardInterrupt:
                if not self.elbo:
                    raise
                self._is_abandoned = True
                return INTERRUPTED
            if shown.is_due and self.elbo:
                shown.show("step", len(self.elbo), steps, elbo=f"ELBO {fmean(self.elbo[-RECENT:]):.3f} nats")
            if interruption.requested:
                return INTERRUPTED
            if reason := self._end or self._schedule.stop_reason:
                return reason
        return f"reached steps ({steps})"

    def diagnosed(self, shown: Bar) -> Diagnosis:
        """Diagnose the guide; without a verdict if interrupted."""
        draws = max(1_000, min(DIAGNOSED, MOST_DIAGNOSED // (self._pair.joint.runs * self._pair.numbers)))
        if not self.is_vectorised:
            draws = min(draws, max(LEAST_DIAGNOSED, DIAGNOSED_BY_STEP * len(self.elbo) // self._pair.joint.runs))
        try:
            if not self._is_abandoned:
                call = self._call
                with show_runs(shown, "diagnosis, run", draws, elbo=""):
                    return diagnose(call.program, self._guide, *call.args, num_samples=draws, **call.kwargs)
        except KeyboardInterrupt:
            pass  # the fitted weights must not be lost, here and below
        except FAILURES as error:
            return Diagnosis(reason=f"the model raised {type(error).__name__} for draws of the guide")
        return Diagnosis(reason="interrupted; call diagnose(model, guide)")

    def step(self) -> None:
        """Take one step, or skip it if it fails."""
        for parameter in self._parameters:
            parameter.grad = None
        try:
            loss, log_weights = self._loss_and_gradients()
        except FAILURES as error:
            self._skip(error)
            return
        gradients = [parameter.grad for parameter in self._parameters]
        limit = CLIP * self._usual_norm
        norm = clip(gradients, limit)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._skip(None)
            return
        self._failures = 0
        self.elbo.append(-loss)
        if self._best.step(loss):
            self._retreat()
            return
        norm = min(norm, limit)
        self._usual_norm = norm if self._usual_norm == math.inf else 0.98 * self._usual_norm + 0.02 * norm
        self._optimizer.step(gradients, self._schedule.learning_rate)
        self._average.add()
        if self._schedule.step(loss, log_weights if self._weights_tell else None):
            self._average.record_best()

    def _loss_and_gradients(self) -> Step:
        """Set the gradients of a step; return its loss and, if known, the log weights of its draws."""
        if self._walk is not None:
            return self._walk.step()
        call = self._call
        return Step(float(self._objective.loss_and_grads(call.program, self._guide, *call.args, **call.kwargs)), None)

    def _skip(self, error: Exception | None) -> None:
        """Skip a step that raised an error, or whose loss or gradient was not finite."""
        self.skipped += 1
        self._failures += 1
        if self._failures % FAILURES_TO_RETREAT == 0:
            self._retreat()
        if self._failures < MOST_FAILURES:
            return
        what = "no step was finite" if error is None else f"the model raised {type(error).__name__}"
        self._end = f"{what} {MOST_FAILURES} times in a row"
        if not self.elbo:
            names = ", ".join(self._pair.unscored_sites())
            where = f", nor a finite density of {names}" if names else ""
            self.failure = error or ArithmeticError(
                f"fit_guide got no finite loss and gradient in {MOST_FAILURES} steps in a row{where}: look for NaN in "
                "the data, scale them, or choose another starting point by the guide's init_loc_fn."
            )

    def _retreat(self) -> None:
        """Continue from the best weights at half the rate, with the optimizer's moments reset."""
        self._best.restore()
        self._optimizer.reset()
        self._usual_norm = math.inf
        self._schedule.restart()
        self._average.restart()
        self.retreats += 1

    def _settle(self) -> None:
        """Set the guide to its averaged weights."""
        if self._best.has_fallen():
            self._retreat()
        if self._schedule.ends_as_good_as_any():
            self._average.record_best()
        self._average.use_best()
        if isinstance(self._guide, AutoFlow):
            self._guide.weigh_modes(self._call)


@contextmanager
def _quiet_pyro() -> Iterator[None]:
    """Context manager without empty tables of sites, and without Pyro's warnings about infinite densities."""
    with without_empty_tables(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Encountered (NaN|[+-]?inf)", UserWarning)
        yield


def _leaf(value: object) -> Tensor:
    """Return the trained leaf of a parameter; with `module_local_params` Pyro registers some without a constraint."""
    return cast("Tensor", value.unconstrained() if hasattr(value, "unconstrained") else value)
