"""The paper's models by name, its settings, and the comparison of models on a set of data."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_maf import ConditionalMAF, MAFMoG, RealNVP, load
from pyro_maf.distributions import ConditionalFlowPrior, FlowPrior
from pyro_maf.experiments import FLOWS, build, fit_gaussian
from pyro_maf.transforms import ConditionalFlow


def in_units(model):
    conditional = hasattr(model, "condition")
    return (ConditionalFlowPrior if conditional else FlowPrior)(model)


@pytest.mark.parametrize("flow", FLOWS)
def test_every_name_builds_a_model_that_scores_draws_and_is_saved(flow, tmp_path):
    density = in_units(build(flow, 3, num_layers=2, hidden_dims=[8]))
    y = density.sample((5,))
    assert density.log_prob(y).isfinite().all()
    density.save(tmp_path / "model.safetensors")
    torch.testing.assert_close(load(tmp_path / "model.safetensors").log_prob(y), density.log_prob(y))


@pytest.mark.parametrize("flow", FLOWS)
def test_every_name_has_a_conditional_form(flow, tmp_path):
    density = in_units(build(flow, 3, context_dim=2, num_layers=2, hidden_dims=[8]))
    context = torch.randn(5, 2)
    y = density.condition(context).sample()
    assert density.condition(context).log_prob(y).shape == (5,)
    density.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors").condition(context)
    torch.testing.assert_close(again.log_prob(y), density.condition(context).log_prob(y))


def test_options_reach_the_model():
    flow = build("realnvp", 4, num_layers=3, hidden_dims=[7], activation="tanh", batch_norm=True, networks="separate")
    assert isinstance(flow, RealNVP)
    assert len(flow) == 6
    assert len(flow[1].networks) == 2
    assert flow[1].networks[0].hidden_dims == (7,)
    assert flow[1].networks[0].activation == "tanh"
    made = build("made", 4, context_dim=2, num_layers=9, degrees="random", seed=5)
    assert isinstance(made, ConditionalMAF)
    assert len(made.flow) == 1
    assert made.flow[0].order.tolist() == [0, 1, 2, 3]
    assert not torch.equal(made.flow[0].made.degrees_0, build("made", 4, context_dim=2).flow[0].made.degrees_0)
    assert isinstance(build("maf-mog", 4), MAFMoG)


def test_weights_follow_the_seed_and_the_global_state_is_left_alone():
    before = torch.random.get_rng_state()
    first, again, other = (build("maf", 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    weight = "layers.0.made.layers.0.weight"
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_the_conditional_gaussian_moves_with_the_context():
    model = build("gaussian", 2, context_dim=1)
    assert isinstance(model, ConditionalFlow)
    with torch.no_grad():
        model.flow[1].networks[0].context_layers[0].weight.copy_(torch.tensor([[3.0], [-1.0], [0.0], [0.0]]))
    assert model.condition(torch.tensor([2.0]))(torch.zeros(2)).tolist() == [6.0, -2.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flow": "nsf"}, "build expected flow to be one of maf, iaf"),
        ({"input_dim": 0}, "build expected input_dim of at least 1, got 0"),
        ({"context_dim": -1}, "build expected context_dim of at least 0, got -1"),
        ({"seed": -1}, "build expected seed of at least 0, got -1"),
    ],
)
def test_what_can_not_be_built_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        build(**{"flow": "maf", "input_dim": 2} | options)


def test_the_gaussian_has_the_mean_and_covariance_of_the_rows():
    rows = torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64) + 5
    density = fit_gaussian(rows)
    exact = MultivariateNormal(rows.mean(0), torch.cov(rows.T, correction=0))
    torch.testing.assert_close(density.log_prob(rows), exact.log_prob(rows))


def test_the_gaussian_given_a_class_has_its_mean_and_the_covariance_within_classes():
    label = torch.arange(60) % 3
    rows = torch.randn(60, 2, dtype=torch.float64) + torch.tensor([[0.0, 9.0], [4.0, 4.0], [-7.0, 1.0]])[label]
    context = torch.nn.functional.one_hot(label).double()
    means = torch.stack([rows[label == index].mean(0) for index in range(3)])
    exact = MultivariateNormal(means[label], torch.cov((rows - means[label]).T, correction=0))
    density = fit_gaussian(rows, context).condition(context)
    torch.testing.assert_close(density.log_prob(rows), exact.log_prob(rows))


def test_a_gaussian_without_a_density_is_refused():
    rows = torch.randn(50, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="got 50 rows in which column 1 follows from those before it"):
        fit_gaussian(rows[:, [0, 0, 1]])
