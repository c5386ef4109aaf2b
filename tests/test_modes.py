"""Posteriors with several modes: their detection, and the mixture of flows that covers them."""

from __future__ import annotations

import copy
import io
import math
import pickle
import signal
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import JitTrace_ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_maf.infer import AutoIAF, TracePath_ELBO, diagnose, fit_guide, neutra, reweight
from pyro_maf.infer.fitting.fit_guide import _Run
from pyro_maf.infer.guides.mixture import FlowMixture, MixturePosterior
from pyro_maf.infer.models.model import Call
from pyro_maf.infer.start.initialization import Start, best_start, other_points
from pyro_maf.infer.start.modes import exchanges
from pyro_maf.transforms import Stack, Tails
from tests.posteriors import GUIDES, SMALL, drawn, same, steps, weights

pytestmark = pytest.mark.usefixtures("fresh")
each_guide = pytest.mark.parametrize("make", GUIDES)

CENTRES = torch.tensor([[-2.5, 0.0], [2.5, 1.0]])


def score(z: Tensor, shares: tuple[float, ...] = (0.7, 0.3), scales: tuple[float, ...] = (0.5, 0.8)) -> Tensor:
    """Log-density of a mixture of two normals in the plane."""
    centres, widths = CENTRES.to(z), torch.tensor(scales).to(z)
    parts = dist.Normal(centres, widths[:, None]).to_event(1).log_prob(z[..., None, :])
    return (parts + torch.tensor(shares).to(z).log()).logsumexp(-1)


def apart() -> None:
    """A model whose posterior is a mixture of two normals in the plane."""
    prior = dist.Normal(torch.zeros(2), 5.0).to_event(1)
    z = pyro.sample("z", prior)
    pyro.factor("score", score(z) - prior.log_prob(z))


def start(log_density: Callable[[Tensor], Tensor], dim: int = 2) -> Start:
    loc = torch.zeros(dim)
    return best_start(log_density, loc, other_points(log_density, loc, None))


def ready(make: Any = AutoIAF, model: Any = apart) -> Any:
    return make(model, **SMALL).setup()


# -- detection ---------------------------------------------------------------------------------------------------------


def test_every_relevant_mode_has_a_normal_and_a_share() -> None:
    found = start(score)
    locs = torch.stack([normal.loc for normal in found.normals])
    torch.testing.assert_close(locs, CENTRES, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.shares, torch.tensor([0.66, 0.34]), atol=0.02, rtol=0)
    assert found.missed == 0


def test_a_mode_of_hardly_any_probability_is_left_out() -> None:
    found = start(lambda z: score(z, shares=(0.9999, 0.0001)))
    assert len(found.normals) == 1
    torch.testing.assert_close(found.normals[0].loc, CENTRES[0], atol=1e-2, rtol=0)


def bent(z: Tensor) -> Tensor:
    return -0.5 * ((z[..., 0] / 2) ** 2 + ((z[..., 1] - z[..., 0] ** 2 + 2) / 0.5) ** 2)


def neck(z: Tensor) -> Tensor:
    v, x = z[..., 0], z[..., 1:]
    return dist.Normal(0.0, 3.0).log_prob(v) + dist.Normal(0.0, (v / 2).exp()[..., None]).log_prob(x).sum(-1)


def flat(z: Tensor) -> Tensor:
    """A log-concave density with a plateau, where ascents end at different points."""
    return -torch.nn.functional.softplus(4 * (z.square().sum(-1) - 4))


@pytest.mark.parametrize("log_density", [bent, neck, flat])
def test_one_mode_has_one_normal(log_density: Any) -> None:
    assert len(start(log_density).normals) == 1


def test_more_modes_than_a_guide_covers_are_counted() -> None:
    centres = torch.cartesian_prod(torch.tensor([-3.0, 0.0, 3.0]), torch.tensor([-3.0, 0.0, 3.0]))

    def grid(z: Tensor) -> Tensor:
        return dist.Normal(centres.to(z), 0.3).to_event(1).log_prob(z[..., None, :]).logsumexp(-1)

    loc = torch.zeros(2)
    found = best_start(grid, loc, centres + 0.1)
    assert len(found.normals) == 8
    assert found.missed == 1


# -- the mixture -------------------------------------------------------------------------------------------------------


@each_guide
def test_the_mixtures_density_is_exact(make: Any) -> None:
    guide = ready(make)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert guide.modes == (2, 2)
    axis = torch.linspace(-8, 8, 401)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        total = guide.log_prob({"z": grid}).exp().sum() * (axis[1] - axis[0]) ** 2
        sites, log_q = drawn(guide)
        draws = guide.rsample((4, 500))["z"]
    assert float(total) == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(guide.log_prob(sites), log_q, rtol=1e-4, atol=1e-4)
    assert draws.shape == (4, 500, 2)
    left = (draws[..., 0] < 0).double().mean(1)
    torch.testing.assert_close(left, torch.full((4,), float(guide.transform.shares[0])).double(), atol=0.08, rtol=0)


def test_draws_are_stratified() -> None:
    guide = ready()
    guide.transform.set_shares(torch.tensor([0.75, 0.25]))
    with torch.no_grad():
        counts = [int((guide.transform.draw(16)[:, 0] < 0).sum()) for _ in range(20)]
        alone = sum(int(guide.transform.draw(1)[0, 0] < 0) for _ in range(400))
    assert set(counts) == {12}
    assert 260 < alone < 340


def bound_of(guide: Any, seed: int) -> Tensor:
    """The bound from 64 draws with a fixed seed."""
    torch.manual_seed(seed)
    latent = guide.transform.draw(64)
    return (score(latent) - guide.transform.log_density(latent)).mean()


@pytest.mark.parametrize(
    ("objective", "draws", "tolerance"),
    [(RenyiELBO, 64, 1e-3), (Trace_ELBO, 40_000, 0.05), (TracePath_ELBO, 40_000, 0.05)],
)
def test_gradients_are_those_of_the_bound(objective: Any, draws: int, tolerance: float) -> None:
    """Against finite differences along the gradient; path gradients only agree on average over many draws."""
    torch.set_default_dtype(torch.float64)
    try:
        guide = AutoIAF(apart_in_double, **SMALL).setup()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for layer in guide.modules():
            if isinstance(layer, Tails):  # below 0 the gradient is that at 0, which leads back
                layer.free.abs_()
    parameters = list(guide.transform.parameters())
    elbo = objective(num_particles=draws, vectorize_particles=True, max_plate_nesting=1)
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(5)
    elbo.loss_and_grads(apart_in_double, guide)
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    size = math.sqrt(sum(float(g.square().sum()) for g in gradient))
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, g in zip(parameters, gradient, strict=True):
                parameter.add_(sign * 1e-4 * g / size)
        torch.manual_seed(5)
        losses.append(elbo.loss(apart_in_double, guide))
        with torch.no_grad():
            for parameter, g in zip(parameters, gradient, strict=True):
                parameter.sub_(sign * 1e-4 * g / size)
    slope = (losses[0] - losses[1]) / 2e-4
    assert slope == pytest.approx(size, rel=tolerance)


def apart_in_double() -> None:
    prior = dist.Normal(torch.zeros(2, dtype=torch.float64), 5.0).to_event(1)
    z = pyro.sample("z", prior)
    pyro.factor("score", score(z) - prior.log_prob(z))


def test_shares_are_those_of_the_largest_bound() -> None:
    """As a function of the share of one mode, the bound is largest at the share that was set."""
    guide = ready()
    guide.transform.set_shares(torch.tensor([0.2, 0.8]))
    torch.manual_seed(0)
    guide.weigh_modes(Call(apart, (), {}))
    share = float(guide.transform.shares[0])
    assert share == pytest.approx(0.7, abs=0.01)
    bounds = {}
    for each in (share - 0.05, share, share + 0.05):
        guide.transform.set_shares(torch.tensor([each, 1 - each]))
        with torch.no_grad():
            bounds[each] = sum(float(bound_of(guide, seed)) for seed in range(100))
    assert max(bounds, key=lambda each: bounds[each]) == share


def test_a_mode_without_a_share_costs_nothing_and_changes_nothing() -> None:
    guide = ready()
    guide.transform.set_shares(torch.tensor([0.9999, 0.0001]))
    calls = []
    guide.transform.components[1].forward_and_log_det = lambda *_: calls.append("forward")
    guide.transform.components[1].inverse_and_log_det = lambda *_: calls.append("inverse")
    with torch.no_grad():
        draws = guide.rsample((100,))
        log_q = guide.log_prob(draws)
        alone = guide.transform.components[0].inverse_and_log_det(draws["z"])
    assert not calls
    assert guide.modes == (2, 1)
    assert bool((draws["z"][:, 0] < 0).all())
    torch.testing.assert_close(log_q, dist.Normal(0.0, 1.0).log_prob(alone[0]).sum(-1) - alone[1])
    assert all(loss < 5 for loss in steps(Trace_ELBO(num_particles=4, vectorize_particles=True), apart, guide, 2))


# -- in Pyro -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [Trace_ELBO, TracePath_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, RenyiELBO],
)
@pytest.mark.parametrize("vectorised", [True, False])
def test_every_objective_supports_the_mixture(objective: Any, vectorised: bool) -> None:
    guide = ready()
    before = weights(guide)
    options: dict[str, Any] = {"num_particles": 4, "vectorize_particles": vectorised, "max_plate_nesting": 1}
    losses = steps(objective(**options, strict_enumeration_warning=False), apart, guide, 2)
    assert all(map(math.isfinite, losses))
    assert not same(before, weights(guide))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
def test_pyros_compiled_objective_supports_the_mixture() -> None:
    guide = ready()
    before = weights(guide)
    objective = JitTrace_ELBO(num_particles=4, vectorize_particles=True, ignore_jit_warnings=True)
    losses = steps(objective, apart, guide, 3)
    assert all(map(math.isfinite, losses))
    assert losses[1] != losses[2]
    assert not same(before, weights(guide))


def test_a_plain_loop_finds_the_shares() -> None:
    guide = ready()
    guide.transform.set_shares(torch.tensor([0.4, 0.6]))
    steps(Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0), apart, guide, 205)
    assert float(guide.transform.shares[0]) == pytest.approx(0.7, abs=0.1)
    assert torch.equal(pyro.get_param_store()["AutoIAF.transform$$$shares"], guide.transform.shares)


def test_fit_guide_covers_both() -> None:
    pyro.set_rng_seed(0)
    fit = fit_guide(apart, AutoIAF(apart, **SMALL), steps=200, progress=False)
    assert fit.diagnosis.elbo == pytest.approx(0.0, abs=0.02)
    assert fit.guide.modes == (2, 2)
    draws = reweight(apart, fit.guide, num_samples=4000)["z"]
    assert float((draws[:, 0] < 0).double().mean()) == pytest.approx(0.7, abs=0.03)
    assert diagnose(apart, fit.guide).ess > 9000


@pytest.fixture
def of_one_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start without ascents from further points, so that only one mode is found."""
    monkeypatch.setattr("pyro_maf.infer.start.start.other_points", lambda score, loc, prior: loc.new_empty(0, len(loc)))


@pytest.mark.usefixtures("of_one_start")
def test_a_mode_that_only_the_diagnosis_finds_is_covered_too() -> None:
    guide = AutoIAF(apart, **SMALL)
    assert guide.setup().modes.covered == 1
    fit = fit_guide(apart, guide, steps=400, progress=False)
    assert guide.modes.covered == 2
    assert fit.diagnosis.missed == ()
    assert fit.diagnosis.grade == "good"
    assert len(fit.elbo) <= 400
    pyro.set_rng_seed(1)
    assert float((guide.rsample((4000,))["z"][:, 0] < 0).double().mean()) == pytest.approx(0.7, abs=0.05)


@pytest.mark.usefixtures("of_one_start")
@pytest.mark.parametrize("is_further", [False, True])
def test_ctrl_c_ends_a_fit_that_lacks_a_mode(is_further: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first run, or twice before the first step of a later one ends."""
    runs, step = list[_Run](), _Run.step

    def pressed(run: _Run) -> None:
        if run not in runs:
            runs.append(run)
        is_time = len(runs) == 2 if is_further else len(run.elbo) == 30
        if is_time:
            for _ in range(1 + is_further):
                signal.raise_signal(signal.SIGINT)
        step(run)

    monkeypatch.setattr(_Run, "step", pressed)
    guide = AutoIAF(apart, **SMALL)
    fit = fit_guide(apart, guide, steps=400, progress=False)
    assert fit.stop_reason == "interrupted"
    assert len(runs) == 1 + is_further
    assert 0 < len(fit.elbo) < 400
    assert guide.rsample()["z"].isfinite().all()


def labels(locs: tuple[float, ...], with_shares: bool) -> Callable[[], None]:
    """A mixture model of data around these locations, in unknown shares of 1 : 2 : 3 : ..., or known equal ones."""
    generator = torch.Generator().manual_seed(0)
    counts = [20 * (1 + index * with_shares) for index in range(len(locs))]
    y = torch.cat([loc + torch.randn(count, generator=generator) for loc, count in zip(locs, counts, strict=True)])
    size = len(locs)

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(size), 5.0).to_event(1))
        parts = dist.Normal(loc[..., None, :], 1.0).log_prob(y[:, None])
        if with_shares:
            parts = parts + pyro.sample("shares", dist.Dirichlet(torch.ones(size))).log()[..., None, :]
        pyro.factor("y", parts.logsumexp(-1).sum(-1))

    return model


@pytest.mark.parametrize(
    ("locs", "with_shares", "modes"),
    [((-2.0, 2.0), False, 2), ((-4.0, 0.0, 4.0), False, 6), ((-4.0, 0.0, 4.0), True, 6)],
)
def test_every_order_of_labels_is_covered(locs: tuple[float, ...], with_shares: bool, modes: int) -> None:
    """With shares on a simplex, relabelling is not a permutation in unconstrained space."""
    pyro.set_rng_seed(0)
    guide = ready(model=labels(locs, with_shares))
    assert guide.modes == (modes, modes)
    expected = torch.full((modes,), 1 / modes)
    torch.testing.assert_close(guide.transform.shares, expected, atol=0.1 / modes, rtol=0)
    with torch.no_grad():
        draws = guide.rsample((600,))["loc"].argsort(-1)
    orders = {tuple(order) for order in draws.tolist()}
    assert len(orders) == modes


def test_axes_of_equal_length_are_labels_only_if_the_density_is_exchangeable() -> None:
    values = {"a": torch.randn(4, 3), "b": torch.randn(4, 2, 3), "c": torch.randn(4)}
    events = {name: value.shape[1:] for name, value in values.items()}

    def symmetric(values: Any) -> Tensor:
        return (values["a"] * values["b"].sum(1)).sum(1) + values["c"]

    def in_order(values: Any) -> Tensor:
        return symmetric(values) + (values["a"] * torch.arange(3)).sum(1)

    assert len(exchanges(symmetric, values, events)) == 5 + 1
    assert len(exchanges(in_order, values, events)) == 1


def test_sites_of_the_same_number_are_relabelled_jointly() -> None:
    values = {name: torch.randn(4) for name in ("m0", "s0", "m1", "s1", "m2", "s2", "other")}
    events = {name: value.shape[1:] for name, value in values.items()}

    def pairs(values: Any) -> Tensor:
        return sum((values[f"m{k}"] * values[f"s{k}"] for k in range(3)), values["other"])

    def without_the_last(values: Any) -> Tensor:
        return pairs(values) + values["m2"]

    assert len(exchanges(pairs, values, events)) == 5
    assert len(exchanges(without_the_last, values, events)) == 1
    moved = exchanges(without_the_last, values, events)[0](values)
    assert [name for name in values if not torch.equal(moved[name], values[name])] == ["m0", "s0", "m1", "s1"]


def test_modes_of_exchangeable_sites_are_all_covered() -> None:
    data = torch.cat([centre + 0.3 * torch.linspace(-1, 1, 9) for centre in (-3.0, 0.0, 3.0)])

    def model() -> None:
        means = [pyro.sample(name, dist.Normal(0.0, 4.0)) for name in ("left", "middle", "right")]
        parts = dist.Normal(torch.stack(means, -1)[..., None, :], 0.3)
        with pyro.plate("rows", len(data)):
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), parts), obs=data)

    pyro.set_rng_seed(0)
    assert ready(model=model).modes == (6, 6)


def test_quantiles_are_those_of_all_modes() -> None:
    guide = ready()
    guide.weigh_modes(Call(apart, (), {}))
    quantiles = guide.quantiles([0.1, 0.35, 0.9])["z"][:, 0]
    left, right = dist.Normal(-2.5, 0.5), dist.Normal(2.5, 0.8)
    expected = [left.icdf(torch.tensor(level / 0.7)) for level in (0.1, 0.35)]
    expected.append(right.icdf(torch.tensor((0.9 - 0.7) / 0.3)))
    torch.testing.assert_close(quantiles, torch.stack(expected), atol=0.05, rtol=0)
    assert torch.equal(guide.median()["z"], guide.quantiles(0.5)["z"])


def test_neutra_moves_between_modes() -> None:
    guide = ready()
    guide.transform.set_shares(torch.tensor([0.5, 0.5]))
    warped = neutra(apart, guide)
    kernel = pyro.infer.NUTS(warped, step_size=0.8, adapt_step_size=False, adapt_mass_matrix=False, max_tree_depth=2)
    mcmc = pyro.infer.MCMC(kernel, num_samples=100, warmup_steps=0, disable_progbar=True)
    mcmc.run()
    draws = warped.draws(mcmc.get_samples())["z"]
    assert draws.shape == (100, 2)
    left = (draws[:, 0] < 0).double()
    assert float(left.mean()) == pytest.approx(0.7, abs=0.15)
    assert int(left.diff().abs().sum()) > 10


def test_neutras_target_is_exact_at_any_noise() -> None:
    """Its integral over the noise is that of the posterior's density, here 1, even with wrong shares."""
    guide = ready()
    guide.transform.set_shares(torch.tensor([0.5, 0.5]))
    torch.manual_seed(0)
    noise = torch.randn(4000, guide.noise_dim)
    with torch.no_grad():
        sites, log_ratio = guide.sites_and_log_ratio(noise)
        log_target = score(sites["z"]) + log_ratio
        base = guide.get_noise_dist().log_prob(noise)
    assert float((log_target - base).exp().mean()) == pytest.approx(1.0, abs=0.05)
    assert sites["z"].shape == guide.sites_of(noise)["z"].shape == (4000, 2)


# -- copies ------------------------------------------------------------------------------------------------------------


def test_copies_have_all_modes() -> None:
    guide = ready()
    steps(Trace_ELBO(), apart, guide, 1)
    guide.transform.set_shares(torch.tensor([0.6, 0.4]))
    value = {"z": CENTRES}
    expected = guide.log_prob(value)
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    loaded = ready()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide)), loaded):
        assert torch.equal(twin.log_prob(value), expected)
        assert twin.modes == (2, 2)
        assert twin.rsample((3,))["z"].shape == (3, 2)


def test_a_state_with_more_modes_is_loaded_into_a_guide_with_fewer() -> None:
    many, one = ready(), AutoIAF(apart, **SMALL, init_scale=0.3).setup()
    alone = copy.deepcopy(one)
    one.load_state_dict(many.state_dict())
    assert torch.equal(one.log_prob({"z": CENTRES}), many.log_prob({"z": CENTRES}))
    assert one.modes == (2, 2)
    many.load_state_dict(alone.state_dict())
    assert torch.equal(many.log_prob({"z": CENTRES}), alone.log_prob({"z": CENTRES}))


@pytest.mark.parametrize("options", [{}, {"init_scale": 0.3}])
def test_pyros_store_restores_all_modes(options: dict[str, Any]) -> None:
    """Also into a guide with one mode."""
    guide = ready()
    steps(Trace_ELBO(), apart, guide, 1)
    guide.transform.set_shares(torch.tensor([0.6, 0.4]))
    expected = guide.log_prob({"z": CENTRES})
    state = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    other = AutoIAF(apart, **SMALL, **options).setup()
    assert torch.equal(other.log_prob({"z": CENTRES}), expected)


def test_the_mixture_distribution_expands() -> None:
    mixture: FlowMixture = ready().transform
    fn = MixturePosterior(mixture).expand(torch.Size([3, 1]))
    draws = fn.rsample((2,))
    assert draws.shape == (2, 3, 1, 2)
    assert fn.log_prob(draws).shape == (2, 3, 1)
    assert fn.log_prob(torch.zeros(2)).shape == (3, 1)


@pytest.mark.parametrize("far", [1e3, 1e16, 1e25])
def test_a_component_that_is_far_from_a_point_has_no_gradient_there(far: float) -> None:
    """Nor NaN, from 0 times an overflow, by which one outlying draw would end a loop of SVI."""
    normal, heavy = Tails(2, lighter=False), Tails(2)
    torch.nn.init.constant_(normal.free, -0.5)
    torch.nn.init.constant_(heavy.free, 0.5)
    mixture = FlowMixture([Stack([heavy]), Stack([normal])], torch.tensor([0.5, 0.5]))
    points = torch.tensor([[0.5, -0.5], [far, 0.0]], dtype=torch.float32, requires_grad=True)
    values = mixture.log_density(points)
    alone = FlowMixture([Stack([heavy])], torch.tensor([1.0])).log_density(points)
    assert values[1].item() == pytest.approx(alone[1].item() - math.log(2))
    values.sum().backward()
    for tensor in (points, normal.free, heavy.free):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
