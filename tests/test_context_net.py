"""Embedding networks for contexts, trained jointly with a conditional flow."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyro_maf
from pyro_maf import ConditionalFlowPrior, ConditionalMAF, FlowPrior, fit, fit_prior, load
from pyro_maf.distributions import ConditionalTableDensity
from pyro_maf.training import FitResult

ONCE = {"max_epochs": 2, "progress": False, "batch_size": 64}


class DeepSet(nn.Module):
    """A network applied to each point of a set, averaged over points."""

    def __init__(self, coordinates: int, features: int) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(coordinates, 16), nn.ReLU(), nn.Linear(16, features))

    def forward(self, points: Tensor) -> Tensor:
        return self.each(points).mean(1)


def images(rows: int = 600, size: int = 8) -> tuple[Tensor, Tensor]:
    """Positions of a bright spot, and noisy images of it, (rows, 1, size, size), with a constant margin."""
    generator = torch.Generator().manual_seed(0)
    places = 0.3 + 0.4 * torch.rand(rows, 2, generator=generator)
    axis = torch.linspace(0, 1, size)
    x, y = ((axis[None] - places[:, i : i + 1]).square() / 0.02 for i in (0, 1))
    pictures = torch.exp(-x[:, None] - y[:, :, None]) + 0.02 * torch.randn(rows, size, size, generator=generator)
    pictures[:, 0] = pictures[:, -1] = 0.0
    return places, 100 + 50 * pictures[:, None]


def convolutions(features: int = 6, *, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    between = [nn.BatchNorm2d(4)] if norm else []
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), *between, nn.ReLU(), nn.Flatten(), nn.Linear(64, features)
    )


def small(context_dim: int = 6) -> ConditionalMAF:
    torch.manual_seed(1)
    return ConditionalMAF(2, context_dim, num_layers=1, hidden_dims=[16])


def test_a_posterior_given_images_is_learned() -> None:
    """The image shows where the spot is; units per pixel would amplify the noise of the margin."""
    places, pictures = images()
    result = fit(
        small(), places, context=pictures, context_net=convolutions(), max_epochs=60, seed=1, progress=False, test=0.1
    )
    assert isinstance(result.density, ConditionalFlowPrior)
    without = fit(places, max_epochs=60, progress=False, test=0.1)
    assert result.test is not None
    assert without.test is not None
    assert result.test.mean > without.test.mean + 2.0
    new, seen = (part[-5:] for part in images(605))
    draws = result.density.condition(seen).sample((400,))
    assert draws.shape == (400, 5, 2)
    assert (draws.mean(0) - new).abs().max() < 0.1
    assert result.score(new, seen).shape == (5,)
    assert isinstance(drawn := result.sample(7, seen[0]), Tensor)
    assert drawn.shape == (7, 2)
    assert len(result.sample(5, seen)) == 5
    assert torch.allclose(result.score(new, seen), result.density.condition(seen).log_prob(new))
    assert not [line for line in result.warnings if "context" in line]


def test_sets_have_a_context_of_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(300, 1, generator=generator)
    sets = means[:, None] + 0.5 * torch.randn(300, 20, 1, generator=generator)
    result = fit(means, context=sets, context_net=DeepSet(1, 4), max_epochs=30, progress=False)
    assert result.score(means, sets).mean() > fit(means, max_epochs=5, progress=False).score(means).mean() + 0.7
    shuffled = sets[:, torch.randperm(20, generator=generator)]
    assert torch.allclose(result.score(means, sets), result.score(means, shuffled), atol=1e-3)


def test_gradients_reach_every_weight_of_the_network() -> None:
    places, pictures = images(20)
    prior = ConditionalFlowPrior(small(), context_net=convolutions(), context_shape=(1, 8, 8))
    with torch.no_grad():
        for weight in prior.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    prior.condition(pictures / 100).log_prob(places).sum().backward()
    gradients = [weight.grad for weight in prior.density.context_net.parameters()]  # type: ignore[union-attr]
    assert len(gradients) == 4
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_the_context_is_a_batch_of_any_shape() -> None:
    prior = ConditionalFlowPrior(small(), context_net=convolutions(), context_shape=(1, 8, 8))
    pictures = images(6)[1]
    assert prior.context_dim == 64
    for shape in [(), (6,), (2, 3), (0,)]:
        at = prior.condition(pictures[: int(np.prod(shape))].reshape(*shape, 1, 8, 8))
        assert at.sample((5,)).shape == (5, *shape, 2)
        assert at.log_prob(torch.zeros(2)).shape == shape
    flat = prior.condition(pictures.flatten(1)).log_prob(torch.zeros(2))
    assert torch.equal(flat, prior.condition(pictures).log_prob(torch.zeros(2)))


def fitted(folder: Path | None = None, epochs: int = 2, **options: bool) -> FitResult:
    places, pictures = images(200)
    net = convolutions(norm=True)
    return fit(
        small(),
        places,
        context=pictures,
        context_net=net,
        max_epochs=epochs,
        folder=folder,
        seed=3,
        progress=False,
        **options,  # type: ignore[arg-type]
    )


def test_a_file_holds_the_weights_and_takes_the_network_again(tmp_path: Path) -> None:
    places, pictures = images(20)
    density = fitted(tmp_path / "fit").density
    path = tmp_path / "fit" / "model.safetensors"
    again = load(path, context_net=convolutions(norm=True))
    at, before = again.condition(pictures), density.condition(pictures)
    assert torch.equal(at.log_prob(places), before.log_prob(places))
    with pytest.raises(ValueError, match=r"saved with context_net of class Sequential, .* load\(path, context_net="):
        load(path)
    with pytest.raises(ValueError, match="could not rebuild"):
        load(path, context_net=convolutions())
    plain = tmp_path / "plain.safetensors"
    FlowPrior(pyro_maf.MAF(2, num_layers=1)).save(plain)
    with pytest.raises(ValueError, match="without the context_net that load got"):
        load(plain, context_net=convolutions())
    for twin in (copy.deepcopy(density), pickle.loads(pickle.dumps(density))):
        assert torch.equal(twin.condition(pictures).log_prob(places), before.log_prob(places))


def test_a_resumed_fit_has_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = fitted(epochs=4)
    fitted(tmp_path / "fit", epochs=2)
    resumed = fitted(tmp_path / "fit", epochs=4, resume=True)
    assert resumed.validation_loss == whole.validation_loss
    for name, tensor in whole.density.state_dict().items():
        assert torch.equal(tensor, resumed.density.state_dict()[name]), name


def test_batch_norms_have_the_statistics_of_the_averaged_weights() -> None:
    """Running statistics are those of other weights, which no epoch was validated with."""
    result = fitted()
    net = result.density.unwrapped.context_net  # type: ignore[union-attr]
    assert net is not None
    assert not net.training
    _, pictures = images(200)
    held_out = set(result.validation_places.tolist())  # type: ignore[union-attr]
    rows = [row for row in range(200) if row not in held_out]
    standard = result.density.unwrapped.standardised_context(pictures[rows].flatten(1))
    with torch.no_grad():
        inputs = net.net[0](standard.reshape(-1, 1, 8, 8))  # type: ignore[index]
    assert torch.allclose(net.net[1].running_mean, inputs.mean((0, 2, 3)), atol=1e-3)  # type: ignore[index]


def test_units_are_of_all_entries_of_an_image_and_of_each_column() -> None:
    places, pictures = images(100)
    prior = fit_prior(places, small(), context=pictures, context_net=convolutions(), **ONCE)
    assert isinstance(prior, ConditionalFlowPrior)
    loc, scale = prior.density.context_loc, prior.density.context_scale
    assert len(loc.unique()) == len(scale.unique()) == 1
    assert abs(loc[0] - pictures.mean()) < 3
    assert abs(scale[0] - pictures.std()) < 3
    columns = (
        places * torch.tensor([1.0, 1e3]) * (1 + 0.3 * torch.rand(100, 2, generator=torch.Generator().manual_seed(0)))
    )
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    prior = fit_prior(places, small(3), context=columns, context_net=net, **ONCE)
    assert prior.unwrapped.context_scale.tolist() == pytest.approx(columns.std(0).tolist(), rel=0.05)
    assert prior.condition(columns).log_prob(places).shape == (100,)
    further = fit(prior.requires_grad_(True), places, context=columns, **ONCE).density
    assert further is prior or further.unwrapped.context_net.net is net  # type: ignore[union-attr]


def test_tables_with_categories_and_grids_take_a_network() -> None:
    pandas = pytest.importorskip("pandas")
    places, pictures = images(200)
    frame = pandas.DataFrame({"x": places[:, 0].numpy(), "y": (places[:, 1] * 40).round().numpy()})
    frame["side"] = np.where(places[:, 0] > 0.5, "right", "left")
    with pytest.warns(UserWarning, match="grid"):
        result = fit(frame, context=pictures, context_net=convolutions(), max_epochs=40, progress=False)
    assert isinstance(result.density, ConditionalTableDensity)
    assert result.score(frame, pictures).isfinite().all()
    assert set(result.sample(9, pictures[:9])["side"]) <= {"left", "right"}  # type: ignore[index, call-overload]
    index = torch.tensor((frame["side"] == "right").to_numpy(float))[:, None].float()
    categorical = result.density.unwrapped.categorical
    assert categorical is not None
    assert categorical.context_dim == 6
    log_prob = categorical.log_density(index, result.density.unwrapped.features(pictures.flatten(1)))
    assert log_prob.mean() > -0.4  # -0.69 without the image


def test_validation_rows_and_a_fixed_prior_take_images_too() -> None:
    places, pictures = images(120)
    validation = (places[100:], pictures[100:])
    result = fit(
        small(),
        places[:100],
        context=pictures[:100].numpy(),
        context_net=convolutions(),
        validation=validation,
        **ONCE,
    )
    again = fit(result.density, places, context=pictures, **ONCE)
    assert again.density is result.density


def test_networks_that_do_not_fit_are_refused() -> None:
    places, pictures = images(50)
    with pytest.raises(ValueError, match=r"context_dim 6, the number of features of context_net, got context_dim 5"):
        fit(small(5), places, context=pictures, context_net=convolutions(), **ONCE)
    with pytest.raises(ValueError, match=r"expected context_net to take contexts of shape \('rows', 7\)"):
        fit(places, context=pictures[:, 0, 0, :7], context_net=convolutions(), **ONCE)
    with pytest.raises(ValueError, match=r"to features \(rows, C\), got \(2, 1, 8, 8\) from Identity"):
        fit(places, context=pictures, context_net=nn.Identity(), **ONCE)
    with pytest.raises(ValueError, match="expected a context for context_net, got none"):
        fit(places, context_net=convolutions(), **ONCE)
    with pytest.raises(TypeError, match="context_net to be a torch module, got int"):
        fit(places, context=pictures, context_net=5, **ONCE)  # type: ignore[arg-type]
    prior = fit_prior(places, context=pictures[:, 0, 1, :2], **ONCE).requires_grad_(True)
    with pytest.raises(ValueError, match="got context_net with a ConditionalFlowPrior"):
        fit(prior, places, context=pictures, context_net=convolutions(), **ONCE)
    with pytest.raises(ValueError, match=r"context with last dimension 64 \(the entries of a context of shape"):
        ConditionalFlowPrior(small(), context_net=convolutions(), context_shape=(1, 8, 8)).condition(torch.zeros(9, 9))
    with pytest.raises(ValueError, match="context_net"):
        fit(places, context=pictures, **ONCE)


def test_the_network_follows_the_model(device: str) -> None:
    places, pictures = images(60)
    density = fit(small().to(device), places, context=pictures, context_net=convolutions().double(), **ONCE).density
    assert {(weight.dtype, weight.device.type) for weight in density.parameters()} == {(torch.float32, device)}
