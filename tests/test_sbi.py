"""Flows as density estimators of the package sbi."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_maf.sbi
from pyro_maf.nn import compress_tails
from pyro_maf.sbi import FlowEstimator, likelihood_nn, posterior_nn

TINY = {"num_layers": 2, "hidden_dims": [8]}
every_flow = pytest.mark.parametrize("flow", ["nsf", "maf", "iaf", "realnvp"])


def simulations(rows: int = 60, dim: int = 2, features: int = 3) -> tuple[Tensor, Tensor]:
    """Parameters and simulations with different scales."""
    generator = torch.Generator().manual_seed(0)
    theta = 5 + 0.1 * torch.randn(rows, dim, generator=generator)
    return theta, 1e3 * torch.randn(rows, features, generator=generator) + theta[:, :1]


def shaken(estimator: FlowEstimator) -> FlowEstimator:
    """The estimator with random parameters, so that conditions matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in estimator.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return estimator


@every_flow
def test_shapes_are_those_of_the_protocol(flow: str) -> None:
    theta, x = simulations()
    estimator = posterior_nn(flow, **TINY)(theta, x)
    assert estimator.input_shape == (2,)
    assert estimator.condition_shape == (3,)
    assert estimator.log_prob(theta[:4], x[:4]).shape == (1, 4)
    assert estimator.log_prob(theta[:12].reshape(3, 4, 2), x[:4]).shape == (3, 4)
    assert estimator.log_prob(theta[:5][:, None], x[:1]).shape == (5, 1)
    assert estimator.log_prob(theta[:5][:, None], x[:4]).shape == (5, 4)
    assert estimator.loss(theta[:4], x[:4]).shape == (4,)
    assert estimator.sample(torch.Size([7]), x[:4]).shape == (7, 4, 2)
    assert estimator.sample(torch.Size([7, 2]), x[:1]).shape == (7, 2, 1, 2)
    draws, log_prob = estimator.sample_and_log_prob(torch.Size([7]), x[:4])
    assert draws.shape == (7, 4, 2)
    assert torch.equal(log_prob, estimator.log_prob(draws, x[:4]))


@every_flow
def test_each_condition_has_its_density_and_its_draws(flow: str) -> None:
    theta, x = simulations()
    estimator = shaken(posterior_nn(flow, **TINY)(theta, x))
    rows = theta[:12].reshape(3, 4, 2)
    together = estimator.log_prob(rows, x[:4])
    alone = torch.cat([estimator.log_prob(rows[:, i : i + 1], x[i : i + 1]) for i in range(4)], 1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    at_samples = estimator.log_prob(rows, x[:4].expand(3, 4, 3))
    torch.testing.assert_close(together, at_samples, rtol=1e-4, atol=1e-4)
    draws = estimator.sample(torch.Size([4000]), x[:4])
    means = torch.stack([estimator.sample(torch.Size([4000]), x[i : i + 1]).mean((0, 1)) for i in range(4)])
    error = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - means).abs() < 6 * error).all()


@every_flow
def test_conditioned_estimators_are_distributions_of_pyro(flow: str) -> None:
    theta, x = simulations()
    estimator = shaken(likelihood_nn(flow, **TINY)(theta, x))

    def model(rows: Tensor) -> None:
        at = pyro.sample("theta", dist.Normal(theta.mean(0), 0.1).to_event(1))
        with pyro.plate("rows", len(rows)):
            pyro.sample("x", estimator.condition(at), obs=rows)

    trace = pyro.poutine.trace(pyro.poutine.condition(model, {"theta": theta[0]})).get_trace(x[:4])
    trace.compute_log_prob()
    expected = estimator.log_prob(x[:4, None], theta[:1])[:, 0]
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected, rtol=1e-4, atol=1e-4)
    assert estimator.condition(theta[:5]).sample().shape == (5, 3)
    with pytest.raises(ValueError, match="condition"):
        estimator.condition(theta[:, :1])


@every_flow
def test_noise_comes_back_from_the_parameters(flow: str) -> None:
    theta, x = simulations()
    estimator = shaken(posterior_nn(flow, **TINY)(theta, x))
    noise = estimator.inverse_transform(theta[:5, None], x[:4])
    assert noise.shape == (5, 4, 2)
    torch.testing.assert_close(noise[:, 2], estimator.inverse_transform(theta[:5], x[2]), rtol=1e-3, atol=1e-3)


def test_density_starts_as_the_normal_of_the_simulations() -> None:
    theta, x = simulations(500)
    estimator = posterior_nn("maf", **TINY)(theta, x)
    normal = torch.distributions.Normal(theta.mean(0), theta.std(0, correction=0))
    torch.testing.assert_close(estimator.log_prob(theta, x)[0], normal.log_prob(theta).sum(-1), rtol=1e-3, atol=1e-3)


def test_draws_are_inside_the_support() -> None:
    theta = torch.rand(80, 2)
    estimator = shaken(posterior_nn("maf", support=["unit_interval", "positive"], **TINY)(theta, theta))
    draws = estimator.sample(torch.Size([500]), theta[:2])
    assert (draws > 0).all()
    assert (draws[..., 0] < 1).all()
    assert estimator.log_prob(torch.tensor([[1.5, 0.5]]), theta[:1]).item() == -torch.inf
    uniform = dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1)
    builder = posterior_nn("maf", support=uniform.support, **TINY)
    assert uniform.support.check(shaken(builder(theta, theta)).sample(torch.Size([500]), theta[:2])).all()
    with pytest.raises(ValueError, match="expected values inside the support"):
        posterior_nn("maf", support="positive", **TINY)(theta - 0.5, theta)
    with pytest.raises(ValueError, match=r"'unit_interval', got \[5\."):
        posterior_nn("maf", support="unit_interval", **TINY)(theta + 5, theta)


def test_draws_of_a_prior_may_be_on_its_bounds() -> None:
    prior = dist.Uniform(torch.full((2,), 1000.0), 1001.0).to_event(1)  # one of 16,000 float32 draws is on a bound
    theta = prior.sample((60,))
    theta[:2] = torch.tensor([[1000.0, 1001.0], [1001.0, 1000.0]])
    estimator = posterior_nn("maf", support=prior.support, **TINY)(theta, theta)
    assert estimator.log_prob(theta, theta).isfinite().all()
    assert estimator.log_prob(torch.tensor([[1000.5, 1001.1]]), theta[:1]).item() == -torch.inf


def test_statistics_of_a_condition_are_learned_beside_it() -> None:
    theta, x = simulations()
    estimator = shaken(posterior_nn("maf", **TINY)(theta, x))
    assert estimator.embedding_net(x)[:, : x.shape[1]].equal(compress_tails(x))
    estimator.loss(theta, x).mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in estimator.embedding_net.parameters())


def test_conditions_far_from_all_simulations_do_not_blow_up() -> None:
    theta, x = simulations()
    estimator = shaken(posterior_nn("maf", **TINY)(theta, x))
    near, far = (estimator.log_prob(theta, x[:1] + factor * x.std(0))[0] for factor in (2.0, 1e5))
    assert (far > near - 1e3).all()


def test_images_pass_an_embedding_that_trains_with_the_flow() -> None:
    theta, _ = simulations()
    x = 100 + torch.randn(60, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))
    estimator = shaken(posterior_nn("maf", embedding_net=network, **TINY)(theta, x))
    assert estimator.sample(torch.Size([3]), x[:2]).shape == (3, 2, 2)
    estimator.loss(theta, x).mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in network.parameters())


@pytest.mark.parametrize("shape", [(3, 4), (12,)])
def test_an_embedding_may_mask_what_is_missing(shape: tuple[int, ...]) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.nan_to_num(0.0).flatten(1)

    theta, _ = simulations()
    x = 5 + 2 * torch.randn(60, *shape, generator=torch.Generator().manual_seed(0))
    x[::3, -1] = torch.nan
    estimator = posterior_nn("maf", embedding_net=Masked(), **TINY)(theta, x)
    seen = estimator.net.features(x.flatten(1))
    assert seen.isfinite().all()
    assert seen.std().item() == pytest.approx(1.0, abs=0.2)
    assert shaken(estimator).sample(torch.Size([3]), x[:2]).isfinite().all()
    with pytest.raises(ValueError, match="an embedding_net that masks what is missing, got NaN or infinity in row 0"):
        posterior_nn("maf", **TINY)(theta, x)


def test_likelihoods_model_the_simulations() -> None:
    theta, x = simulations()
    estimator = likelihood_nn("nsf", **TINY)(theta, x[:, :1])
    assert estimator.input_shape == (1,)
    assert estimator.condition_shape == (2,)
    assert estimator.log_prob(x[:4, :1], theta[:4]).shape == (1, 4)


def test_copies_compute_the_same() -> None:
    theta, x = simulations()
    estimator = shaken(posterior_nn("nsf", **TINY)(theta, x))
    expected = estimator.log_prob(theta, x)
    for twin in (copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator))):
        assert torch.equal(twin.log_prob(theta, x), expected)


def test_bad_arguments_are_refused() -> None:
    theta, x = simulations()
    with pytest.raises(ValueError, match="posterior_nn expected flow"):
        posterior_nn("naf")
    with pytest.raises(ValueError, match="expected vectors"):
        likelihood_nn(**TINY)(theta, x[:, :, None])
    with pytest.raises(ValueError, match="expected a condition in each row"):
        posterior_nn(**TINY)(theta, x[:, 0])
    with pytest.raises(TypeError, match="is a density, for sbi's NPE and NLE"):
        posterior_nn("maf", **TINY)(theta, x)([theta, x])
    with pytest.raises(ValueError, match="FMPE and NPSE train a vector field"):  # which begin with such a call
        posterior_nn("maf", **TINY)(theta, x).log_prob(theta, x[:2])
    with pytest.raises(
        TypeError, match="posterior_nn builds flows: NPE_A, which passes num_components, trains a mixture"
    ):
        posterior_nn(**TINY)(theta, x, num_components=10)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="as many inputs as conditions"):
        posterior_nn("maf", **TINY)(theta, x).log_prob(theta[:3], x[:4])


@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
def test_posterior_by_sbi_is_the_exact_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # sbi logs to the working directory
    # theta ~ N(0, I), x ~ N(theta, 0.5^2 I): the posterior is N(0.8 x, 0.2 I).
    from sbi.inference import NPE

    torch.manual_seed(0)
    prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    theta = prior.sample((4000,))
    x = theta + 0.5 * torch.randn_like(theta)
    inference = NPE(prior, density_estimator=pyro_maf.sbi.posterior_nn("maf", **TINY), show_progress_bars=False)
    inference.append_simulations(theta, x).train(max_num_epochs=20, training_batch_size=50, learning_rate=5e-3)
    at = torch.tensor([[1.0, -1.0]])
    draws = inference.build_posterior().sample((5000,), x=at, show_progress_bars=False)
    assert ((draws.mean(0) - 0.8 * at[0]).abs() < 0.1).all()
    assert ((draws.std(0) - 0.2**0.5).abs() < 0.1).all()  # the prior's is 1; a fit to so few rows is off by 0.05


def test_weights_are_averaged_in_eval_mode() -> None:
    theta, x = simulations()
    estimator = posterior_nn("maf", **TINY)(theta, x)
    optimizer, steps = torch.optim.SGD(estimator.parameters(), lr=0.1), []
    for _ in range(3):
        estimator.train()
        optimizer.zero_grad()
        estimator.loss(theta, x).mean().backward()
        optimizer.step()
        steps.append(torch.nn.utils.parameters_to_vector(estimator.parameters()).detach())
        estimator.eval()
    average = torch.nn.utils.parameters_to_vector(estimator.parameters()).detach()
    assert not average.equal(steps[-1])
    assert (average - steps[-1]).norm() < (steps[-2] - steps[-1]).norm()
    assert copy.deepcopy(estimator).train().log_prob(theta, x).equal(estimator.log_prob(theta, x))
    best = copy.deepcopy(estimator.state_dict())
    assert torch.nn.utils.parameters_to_vector(estimator.train().parameters()).equal(steps[-1])
    estimator.eval().load_state_dict(best)
    assert torch.nn.utils.parameters_to_vector(estimator.train().parameters()).equal(average)
