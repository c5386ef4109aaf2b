"""Laws of densities and guides."""

from __future__ import annotations

import copy
import math
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.distributions import Distribution, biject_to

from pyro_maf._core.torch_state import seeded
from pyro_maf.infer import fit_guide
from pyro_maf.infer.models.model import Model, is_subsample
from pyro_maf.saving import Savable, load
from pyro_maf.testing.comparison import BrokenLawError, close, name_of, within

__all__ = ["check_density", "check_guide"]

DRAWS = 100_000
FALSE_FAILS = 1e-6
"""Fraction of seeds for which a law about draws may fail a correct density."""


def check_density(make: Callable[[int], Distribution], *, dimensions: Sequence[int] = (1, 2, 5), seed: int = 0) -> None:
    r"""Check a density of vectors against the laws.

    Its draws lie in its support, follow torch's seed and have finite scores; shapes are those of batches of events;
    gradients match finite differences; copies and saved files give the same scores. In one and two dimensions, the
    density integrates to 1, to 2e-3 on a grid, and the distribution function of 100,000 draws, along each axis and the
    diagonals, matches the density up to 2e-3 and the bound of Dvoretzky, Kiefer and Wolfowitz: a correct density fails
    for at most one in a million seeds. A scale that is off by a tenth, or a location off by a twentieth of a standard
    deviation, is detected.

    Args:
        make: Function of D that builds the density, a distribution with event shape (D,) and a continuous support.
        dimensions: The values of D to test; the integral and the draws need one of at most 2.
        seed: Seed of the draws; the global generator is unchanged.

    Raises:
        BrokenLawError: For the first law that is broken, by how much.

    Example:
        >>> import pyro.distributions as dist
        >>> check_density(lambda d: dist.Gamma(torch.ones(d), 1.0).to_event(1))
    """
    for input_dim in dimensions:
        density = make(input_dim)
        with seeded(seed), torch.no_grad():
            has_scores_of_its_draws(density)
            draws_by_the_seed(density)
            has_a_gradient(density)
            can_be_copied(density)
            if _free_dim(density) <= 2:
                has_draws_that_follow_it(density)


def has_scores_of_its_draws(density: Distribution) -> None:
    """Draws of any batch lie in the support and have finite log-densities of the batch's shape, alone or together."""
    law, who, support = "scores its draws", name_of(density), cast(Any, density.support)
    if support.event_dim != len(density.event_shape):
        raise BrokenLawError(
            who,
            law,
            f"the support {support} has event_dim {support.event_dim}, the event_shape is {tuple(density.event_shape)}",
        )
    for shape in ((), (4, 3)):
        y = density.sample(torch.Size(shape))
        score = density.log_prob(y)
        if y.shape != (*shape, *density.event_shape) or score.shape != torch.Size(shape):
            raise BrokenLawError(who, law, f"shapes are {tuple(y.shape)} and {tuple(score.shape)}")
        if y.dtype != score.dtype:
            raise BrokenLawError(who, law, f"draws are {y.dtype}, their log-densities {score.dtype}")
        for role, wrong in (("outside of its support", ~support.check(y)), ("of no finite density", ~score.isfinite())):
            if bool(wrong.any()):
                raise BrokenLawError(who, law, f"it draws {y[wrong][0].tolist()}, {role}, {support}")
    close(law, density, density.log_prob(y[0]), score[0], 1e-5, y[0])
    several = density.expand(torch.Size([3]))
    close(law, density, several.log_prob(y), score, 1e-5, y)
    if several.sample().shape != y[0].shape:
        raise BrokenLawError(who, law, f"expand([3]) draws {tuple(several.sample().shape)}, not {tuple(y[0].shape)}")


def draws_by_the_seed(density: Distribution) -> None:
    """Draws are determined by torch's seed, and differ from call to call."""
    state = torch.get_rng_state()
    first, second = density.sample(torch.Size([3])), density.sample(torch.Size([3]))
    torch.set_rng_state(state)
    for how, is_broken in (
        ("draws differ after the same seed", not density.sample(torch.Size([3])).equal(first)),
        ("it draws the same numbers twice", second.equal(first)),
    ):
        if is_broken:
            raise BrokenLawError(name_of(density), "draws by the seed of torch", how)


def has_a_gradient(density: Distribution) -> None:
    """The gradient of the log-density matches finite differences at most draws; a difference may straddle a kink."""
    law, free = "has the gradient of differences", biject_to(density.support)
    z = free.inv(density.sample(torch.Size([50])))
    step = torch.finfo(z.dtype).eps ** (1 / 3) * torch.randn_like(z)
    there = density.log_prob(free(z + step)) - density.log_prob(free(z - step))
    with torch.enable_grad():
        z.requires_grad_()
        score = density.log_prob(free(z))
        if not score.requires_grad:
            raise BrokenLawError(name_of(density), law, "log_prob of a value has no gradient")
        gradient = torch.autograd.grad(score.sum(), z)[0]
    size = step.norm(dim=-1) * (1 + gradient.norm(dim=-1))
    error = (there / 2 - (gradient * step).sum(-1)).abs() / size
    within(law, density, error.median(), 0.02)


def can_be_copied(density: Distribution) -> None:
    """Copies, pickles and files give the same scores."""
    y = density.sample(torch.Size([5]))
    twins = {"deepcopy": copy.deepcopy(density), "pickle": pickle.loads(pickle.dumps(density))}
    if isinstance(density, Savable):
        with tempfile.TemporaryDirectory() as folder:
            density.save(path := Path(folder) / "density.safetensors")
            twins["save"] = load(path).to(y.device)
    for way, twin in twins.items():
        close(f"can be copied, by {way}", density, twin.log_prob(y), density.log_prob(y), 0.0, y)


def has_draws_that_follow_it(density: Distribution) -> None:
    """The density integrates to 1, and the distribution function of the draws along lines matches it."""
    free = biject_to(density.support)
    draws = free.inv(density.sample(torch.Size([DRAWS]))).double()
    grid, cells = _grid_about(draws)
    y = free(grid)
    like = density.sample()
    mass = (density.log_prob(y.to(like)) + free.log_abs_det_jacobian(grid, y)).exp() * cells
    within("integrates to 1", density, (mass.sum() - 1).abs(), 2e-3)
    centre, scale = draws.median(0).values, (draws - draws.median(0).values).abs().median(0).values
    lines = [line.to(draws) for line in torch.eye(draws.shape[1])]
    lines += [torch.tensor([1.0, side]).to(draws) for side in (1, -1) if draws.shape[1] == 2]
    bound = math.sqrt(math.log(2 * len(lines) / FALSE_FAILS) / (2 * DRAWS)) + 2e-3
    for line in lines:
        along, places = ((values - centre) / scale @ line for values in (draws, grid))
        order = places.argsort()
        places, exact = places[order], mass[order].cumsum(0)
        ends = torch.linspace(0, len(order) - 1, 1000).long()
        empirical = torch.searchsorted(along.sort().values, places[ends], right=True) / DRAWS
        within("draws from its density", density, (empirical - exact[ends]).abs().max(), bound)


def _grid_about(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Points that extend beyond all draws, dense in their bulk, (n, D), and the volume of each point's cell, (n,)."""
    side = {1: 40_001, 2: 601}[draws.shape[1]]
    axes, widths = [], []
    for column in draws.T:
        centre = column.median()
        scale = (column - centre).abs().median()
        reach = float(torch.asinh(3 * (column - centre).abs().max() / scale))
        t = torch.linspace(-reach, reach, side, dtype=column.dtype, device=column.device)
        axes.append(centre + scale * t.sinh())
        widths.append(scale * t.cosh() * 2 * reach / (side - 1))
    cells = torch.cartesian_prod(*widths).reshape(-1, draws.shape[1]).prod(-1)
    return torch.cartesian_prod(*axes).reshape(-1, draws.shape[1]), cells


def _free_dim(density: Distribution) -> int:
    """Number of unconstrained dimensions, one less than D for a simplex."""
    return int(biject_to(density.support).inverse_shape(density.event_shape)[0])


def check_guide(
    model: Model,
    make: Callable[[Model], Any],
    *args: object,
    log_evidence: float | None = None,
    seed: int = 0,
    **kwargs: object,
) -> None:
    """Check a guide against the laws, for one model.

    It draws every latent variable and no other, with new values each time, with the model's shape and dtype, within the
    support and with a finite density under the model. If it has `log_prob`, that of a draw equals the density of the
    trace it came from, to 2e-3. Steps of SVI, also with vectorised particles, reach its parameters and leave them
    finite. With `log_evidence` the guide is fitted, and its importance-weighted estimate must be within five standard
    errors; for a k-hat below 0.5, a correct guide fails for about one in a million seeds. An error in the guide's
    density, which no other comparison shows, shifts that estimate.

    Args:
        model: The Pyro model.
        make: Function of the model that builds the guide.
        *args, **kwargs: Arguments of the model.
        log_evidence: The model's log-evidence in nats, if known; for a model without data it is 0.
        seed: Seed of draws and steps.

    Raises:
        BrokenLawError: For the first law that is broken, by how much.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_maf.infer import AutoIAF
        >>> rates = lambda: pyro.sample("rates", dist.Gamma(torch.ones(2), 1.0).to_event(1))
        >>> check_guide(rates, AutoIAF, log_evidence=0.0)
    """
    with seeded(seed), pyro.get_param_store().scope():
        guide = make(model)
        draws_every_site(model, guide, *args, **kwargs)
        takes_steps(model, guide, *args, **kwargs)
        draws_every_site(model, guide, *args, **kwargs)
        if log_evidence is not None:
            estimates_the_evidence(model, guide, log_evidence, *args, **kwargs)


def draws_every_site(model: Model, guide: Any, *args: object, **kwargs: object) -> None:
    """A draw has every latent site, shaped as in the model, within its support, and its density is the trace's."""
    law, who = "draws every latent variable", type(guide).__name__
    trace, again = (cast(Any, poutine.trace(guide).get_trace(*args, **kwargs)) for _ in range(2))
    random = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not (site["is_observed"] or isinstance(site["fn"], Delta) or is_subsample(site))
    ]
    if random and all(again.nodes[name]["value"].equal(trace.nodes[name]["value"]) for name in random):
        raise BrokenLawError(who, "draws anew each time", f"{', '.join(random)} are the same in two draws")
    prior: Any = poutine.trace(model).get_trace(*args, **kwargs)
    with pyro.validation_enabled(False):  # about consequences of a value outside its support
        replayed: Any = poutine.trace(poutine.replay(model, trace=trace)).get_trace(*args, **kwargs)
        replayed.compute_log_prob()
    latent = [name for name in replayed.stochastic_nodes if not is_subsample(replayed.nodes[name])]
    if missing := [name for name in latent if name not in trace.nodes]:
        raise BrokenLawError(who, law, f"{', '.join(missing)} of the model is not drawn")
    others = [name for name in random if name not in prior.nodes and not trace.nodes[name]["infer"].get("is_auxiliary")]
    if others:
        raise BrokenLawError(who, law, f"{', '.join(others)} is neither in the model nor marked as is_auxiliary")
    for name in latent:
        site, own = replayed.nodes[name], prior.nodes[name]["value"]
        found, wanted = ((tuple(value.shape), value.dtype) for value in (site["value"], own))
        if found != wanted:
            raise BrokenLawError(who, law, f"{name} has shape and dtype {found}, the model's {wanted}")
        inside = bool(site["fn"].support.check(site["value"]).all())
        if not (inside and bool(site["log_prob"].isfinite().all())):
            raise BrokenLawError(
                who, law, f"{name} is outside of its support, or of density 0, at {site['value'].tolist()}"
            )
    if hasattr(guide, "log_prob"):
        sites = {name: trace.nodes[name]["value"] for name in latent}
        score = guide.log_prob(sites, *args, **kwargs).detach()
        close("scores the draws of its traces", guide, score, torch.as_tensor(trace.log_prob_sum()).detach(), 2e-3)


def takes_steps(model: Model, guide: Any, *args: object, **kwargs: object) -> None:
    """Steps of SVI, with one particle and with vectorised ones, change parameters and leave them finite."""
    law, who = "takes steps of SVI", type(guide).__name__
    for particles in (1, 3):
        objective = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1)
        before = [value.detach().clone() for value in guide.parameters()]
        loss = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 1e-2}), objective).step(*args, **kwargs)
        after = list(guide.parameters())
        if not (math.isfinite(loss) and all(bool(value.isfinite().all()) for value in after)):
            raise BrokenLawError(who, law, f"the loss of {particles} particles is {loss}, or a parameter is not finite")
        if len(before) == len(after) and all(map(torch.equal, before, after)):
            raise BrokenLawError(who, law, f"no parameter changes in a step with {particles} particles")
    named = guide.named_parameters()
    if unreached := [name for name, value in named if value.requires_grad and value.grad is None]:
        raise BrokenLawError(who, law, f"no gradient reaches {', '.join(unreached)}")


def estimates_the_evidence(model: Model, guide: Any, log_evidence: float, *args: object, **kwargs: Any) -> None:
    """The importance-weighted estimate of a fitted guide is within five standard errors and 1e-3 nats of the truth."""
    diagnosis = fit_guide(model, guide, *args, steps=300, progress=False, **kwargs).diagnosis
    if not diagnosis.can_be_reweighted:
        raise ValueError(
            f"check_guide expected a model to which {type(guide).__name__} can be fitted, "
            f"got k-hat {diagnosis.k_hat:.2f}: leave log_evidence out, or choose a simpler model."
        )
    off = torch.tensor(abs(diagnosis.log_evidence - log_evidence))
    within("estimates the evidence", guide, off, 5 * diagnosis.log_evidence_se + 1e-3)
