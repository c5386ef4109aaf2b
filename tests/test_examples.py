"""The examples at a small size: they run, and their comparisons are right."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_maf import FlowPrior

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up their types
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vae() -> ModuleType:
    return example("vae")


@pytest.fixture(scope="module")
def empirical() -> ModuleType:
    return example("empirical_prior")


@pytest.fixture(scope="module")
def neutra() -> ModuleType:
    return example("neutra")


# -- the autoencoder ---------------------------------------------------------------------------------------------------


def test_the_digits_are_counts_cut_in_three(vae: ModuleType) -> None:
    data = vae.digits()
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1197, 200, 400]
    every = torch.cat([data.train, data.validation, data.test])
    assert (every.min(), every.max()) == (0, vae.LEVELS)
    assert torch.equal(every, every.round())


def test_both_autoencoders_start_from_the_same_networks(vae: ModuleType) -> None:
    normals, flows = (vae.make(name, vae.Settings()) for name in ("normals", "flows"))
    for part in ("encoder", "decoder"):
        for one, other in zip(getattr(normals, part).parameters(), getattr(flows, part).parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["normals", "flows"])
def test_the_scores_are_the_elbo_that_pyro_maximises(vae: ModuleType, name: str) -> None:
    """Pyro's estimate from model and guide and ours from densities are equal up to their noise."""
    autoencoder, x = vae.make(name, vae.Settings()), vae.digits().test[:20]
    elbo = pyro.infer.Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    scores = vae.score(autoencoder, x, particles=200)
    assert -elbo.loss(autoencoder.model, autoencoder.guide, x) == pytest.approx(float(scores.elbo.mean()), abs=2)
    assert torch.all(scores.bound > scores.elbo)


def test_every_part_of_the_autoencoder_is_trained(vae: ModuleType) -> None:
    settings = vae.Settings(steps=3, batch_size=20)
    autoencoder = vae.make("flows", settings)
    before = {name: weight.clone() for name, weight in autoencoder.named_parameters()}
    vae.train(autoencoder, vae.Digits(*[part[:100] for part in dataclasses.astuple(vae.digits())]))
    moved = {
        name.split(".")[0] for name, weight in autoencoder.named_parameters() if not torch.equal(weight, before[name])
    }
    assert moved == {"encoder", "decoder", "features", "learned_prior", "flow"}


def test_the_autoencoder_prints_its_table_and_writes_its_pictures(
    vae: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = vae.digits()
    small = vae.Digits(data.train[:200], data.validation[:64], data.test[:64])
    monkeypatch.setattr(vae, "digits", lambda: small)
    with vae.CONSOLE.capture() as capture:
        vae.main(["--out", str(tmp_path / "pictures"), "--steps", "20"])
    assert all(word in capture.get() for word in ("normals", "flows", "paired"))
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "vae-reconstructions.png",
        "vae-samples.png",
    ]


# -- the prior from past groups ----------------------------------------------------------------------------------------


def test_the_population_is_the_density_of_its_draws(empirical: ModuleType) -> None:
    population = empirical.Population()
    line = torch.linspace(-12, 12, 801)
    points = torch.cartesian_prod(line, 3 * line + 15)
    assert float(population.log_prob(points).exp().sum() * 3 * (24 / 800) ** 2) == pytest.approx(1, abs=1e-2)
    draws = population.sample((5000,))
    inner = dist.Normal(torch.tensor([0.0, -1.0]), 0.15).to_event(1)
    ratio = (inner.log_prob(draws) - population.log_prob(draws)).exp()
    assert abs(float(ratio.mean() - 1)) < 4 * float(ratio.std()) / len(draws) ** 0.5


def test_importance_sampling_agrees_with_the_exact_posterior_of_a_normal_prior(empirical: ModuleType) -> None:
    prior = dist.MultivariateNormal(torch.tensor([0.5, -0.5]), torch.tensor([[1.0, 0.6], [0.6, 2.0]]))
    new = empirical.groups(5, 12, seed=3)
    seen, held_out = new.rows(slice(2)), new.rows(slice(2, None))
    sampled = empirical.by_importance(prior, seen, held_out, draws=20_000)
    torch.testing.assert_close(sampled, empirical.exactly(prior, seen, held_out), atol=0.05, rtol=0)


@pytest.mark.filterwarnings("ignore:fit found heavy tails:UserWarning")
def test_a_prior_from_past_groups_predicts_new_ones_better_than_normal_priors(empirical: ModuleType) -> None:
    settings = empirical.Settings(past_groups=600, new_groups=60, held_out_rows=20, max_epochs=40, draws=1500)
    known, past, _, scores = empirical.run(settings)
    assert isinstance(known["flow"], FlowPrior)
    assert past.shape == (600, 2)
    for name in ("normal", "weak"):
        gain = scores["flow"] - scores[name]
        assert float(gain.mean()) > 3 * float(gain.std()) / len(gain) ** 0.5
    assert float((scores["the true law"] - scores["flow"]).mean()) < 0.1


def test_the_empirical_prior_prints_its_table_and_draws_its_picture(
    empirical: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = empirical.Settings(past_groups=50, new_groups=3, held_out_rows=3, max_epochs=1, draws=50)
    monkeypatch.setattr(empirical, "Settings", lambda: small)
    sampler = empirical.posterior_draws
    monkeypatch.setattr(empirical, "posterior_draws", lambda *given: sampler(*given, draws=5))
    with empirical.CONSOLE.capture() as capture:
        empirical.main(["--out", str(tmp_path / "pictures")])
    assert all(word in capture.get() for word in ("flow", "normal", "weak", "the true law"))
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["empirical-prior.png"]


# -- NUTS in the coordinates of a guide --------------------------------------------------------------------------------


def test_chains_in_either_coordinates_are_compared_and_drawn(
    neutra: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = neutra.Settings(fit_steps=20, chains=2, warmup=4, draws=8)
    monkeypatch.setattr(neutra, "Settings", lambda: small)
    with neutra.CONSOLE.capture() as capture:
        neutra.main(["--out", str(tmp_path / "pictures")])
    assert all(word in capture.get() for word in ("NUTS on neutra", "R-hat", "divergences"))
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["neutra.png"]


def test_draws_are_of_the_models_own_sites_and_summed_up_by_the_worst(neutra: ModuleType) -> None:
    torch.manual_seed(0)
    good = {"tau": torch.rand(2, 400), "theta": torch.randn(2, 400, 8)}
    rhat, size = neutra.summary(neutra.Chains(good, 0, 1.0))
    assert rhat < 1.02
    assert size > 300
    apart = {**good, "tau": good["tau"] + torch.tensor([[0.0], [5.0]])}
    rhat, size = neutra.summary(neutra.Chains(apart, 0, 1.0))
    assert rhat > 1.5
    assert size < 50
