"""Saved guides draw, score and have quantiles without model or data, and loading them runs no code."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Predictive
from torch import Tensor

import pyro_maf
from pyro_maf.infer import AutoIAF, diagnose, fit_guide, reweight
from pyro_maf.saving import MODEL, pack, unpack
from tests.posteriors import GUIDES, SMALL
from tests.test_structure import MODELS

pytestmark = pytest.mark.usefixtures("fresh")

X = torch.linspace(-1, 1, 8)
Y = 1.0 + 0.5 * X + 0.3 * torch.tensor([1.0, -1.0]).repeat(4)  # on a line, their noise would have an improper posterior


def regression(x: Tensor, y: Tensor | None = None) -> Tensor:
    """A model with sites of several supports and shapes."""
    shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    noise = pyro.sample("noise", dist.Gamma(torch.tensor(3.0), 2.0))
    slope = pyro.sample("slope", dist.Uniform(torch.tensor(-1.0), 2.0))
    with pyro.plate("groups", 2, dim=-2):
        offset = pyro.sample("offset", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x), dim=-1):
        mean = slope * x + offset[..., 0].sum(-2, keepdim=True) + shares[..., 0]
        return pyro.sample("y", dist.Normal(mean, noise), obs=y)


@pytest.fixture(scope="module")
def fitted() -> Any:
    pyro.set_rng_seed(0)
    return fit_guide(regression, AutoIAF(regression, **SMALL), X, Y, steps=5, progress=False).guide


@pytest.fixture
def guide(fitted: Any) -> Any:
    return copy.deepcopy(fitted)


def saved(guide: Any, folder: Path) -> Any:
    guide.save(folder / "guide.safetensors")
    return pyro_maf.load(folder / "guide.safetensors")


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_guide_is_the_one_that_was_saved(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)

    def model() -> None:
        pyro.sample("z", dist.Gamma(torch.tensor([2.0, 3.0], dtype=dtype), 1.0).to_event(1))

    guide = make(model, **SMALL).setup()
    again = saved(guide, tmp_path)
    torch.manual_seed(1)
    draws = guide.rsample((5,))
    torch.manual_seed(1)
    assert torch.equal(again.rsample((5,))["z"], draws["z"])
    assert draws["z"].dtype == dtype
    torch.testing.assert_close(again.log_prob(draws), guide.log_prob(draws))
    assert torch.equal(again.quantiles([0.1, 0.9])["z"], guide.quantiles([0.1, 0.9])["z"])
    assert again.log_prob({"z": torch.tensor([-1.0, 1.0], dtype=dtype)}) == -torch.inf


def test_a_guide_of_several_modes_is_saved_with_their_shares(tmp_path: Path) -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        parts = [dist.Normal(loc, 0.3).log_prob(z) for loc in (-2.0, 2.0)]
        pyro.factor("density", torch.logaddexp(parts[0], parts[1] + 1.0))

    guide = AutoIAF(model, **SMALL).setup()
    assert guide.modes.covered == 2
    again = saved(guide, tmp_path)
    torch.manual_seed(0)
    draws = guide.rsample((100,))["z"]
    torch.manual_seed(0)
    assert torch.equal(again.rsample((100,))["z"], draws)
    torch.testing.assert_close(again.log_prob({"z": draws}), guide.log_prob({"z": draws}))
    assert torch.equal(again.quantiles([0.1, 0.9])["z"], guide.quantiles([0.1, 0.9])["z"])
    assert (again()["z"].abs() > 1).all()


def test_sites_have_their_supports_shapes_and_plates(guide: Any, tmp_path: Path) -> None:
    again = saved(guide, tmp_path)
    draws = again.rsample((4,))
    shapes = {"shares": (4, 3), "noise": (4,), "slope": (4,), "offset": (4, 2, 1, 3)}
    assert {name: tuple(value.shape) for name, value in draws.items()} == shapes
    torch.testing.assert_close(again.log_prob(draws), guide.log_prob(draws, X, Y))
    assert again.median()["offset"].shape == (2, 1, 3)


def test_predictions_need_the_model_alone(guide: Any, tmp_path: Path) -> None:
    again = saved(guide, tmp_path)
    for parallel in (False, True):
        found = Predictive(regression, guide=again, num_samples=6, parallel=parallel)(torch.zeros(3))
        assert found["y"].shape[:: found["y"].dim() - 1] == (6, 3) or found["y"].numel() == 18


@pytest.mark.filterwarnings("ignore:k-hat is")
def test_a_loaded_guide_is_diagnosed_and_reweighted_as_before(guide: Any, tmp_path: Path) -> None:
    again = saved(guide, tmp_path)
    before, after = (diagnose(regression, each, X, Y, num_samples=2_000) for each in (guide, again))
    assert after.elbo == pytest.approx(before.elbo, abs=5 * (before.elbo_se + after.elbo_se))
    assert reweight(regression, again, X, Y, num_samples=50)["offset"].shape == (50, 2, 1, 3)


def test_a_loaded_guide_lends_a_new_one_its_weights_to_be_trained_further(guide: Any, tmp_path: Path) -> None:
    loaded = saved(guide, tmp_path)
    with pytest.raises(
        ValueError, match=r"got none of a loaded guide: set up a new one, and load its weights by guide\."
    ):
        fit_guide(regression, loaded, X, Y, progress=False)
    pyro.set_rng_seed(0)  # so that it has equally many modes
    again = AutoIAF(regression, **SMALL).setup(X, Y)
    again.transform.load_state_dict(loaded.transform.state_dict())
    assert all(torch.equal(value, loaded.median()[name]) for name, value in again.median().items())


def test_a_loaded_guide_can_be_saved_and_pickled_again(guide: Any, tmp_path: Path) -> None:
    again = saved(guide, tmp_path)
    again.rsample((2,))
    twice = saved(again, tmp_path)
    pickled = pickle.loads(pickle.dumps(again))
    for each in (twice, pickled):
        torch.manual_seed(0)
        draws = each.rsample((3,))["noise"]
        torch.manual_seed(0)
        assert torch.equal(draws, again.rsample((3,))["noise"])


def test_masked_entries_stay_where_they_were(tmp_path: Path) -> None:
    def model() -> None:
        pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 5), poutine.mask(mask=torch.arange(5) < 2):
            pyro.sample("z", dist.Gamma(2.0, 1.0))

    guide = AutoIAF(model, init_scale=0.3, **SMALL).setup()
    again = saved(guide, tmp_path)
    assert again.latent_dim == guide.latent_dim == 3
    torch.manual_seed(0)
    draws = guide.rsample((3,))
    torch.manual_seed(0)
    for name, value in again.rsample((3,)).items():
        torch.testing.assert_close(value, draws[name])


# -- coordinates -------------------------------------------------------------------------------------------------------

GROUP = torch.tensor([0, 2, 1, 2])


def regressions() -> None:
    """A model whose priors are products, entries and sums of earlier sites."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, torch.tensor(1.0)))
    with pyro.plate("groups", 3):
        mean = pyro.sample("mean", dist.StudentT(4.0, beta.cumsum(-1)[..., 1], scale.sqrt()))
    with pyro.plate("rows", 4):
        loc = mean[..., GROUP] + (torch.arange(8.0).reshape(4, 2) * beta).sum(-1)
        z = pyro.sample("z", dist.Normal(loc, torch.nn.functional.softplus(scale)))
        size = pyro.sample("size", dist.LogNormal(z, 0.3))
        pyro.sample("y", dist.Normal(size, 1.0), obs=torch.ones(4))


def bounded() -> None:
    """A model with supports bounded by other sites, for entries and for vectors."""
    top = pyro.sample("top", dist.LogNormal(0.0, torch.tensor(1.0)))
    ends = torch.stack([top, 2 * top], -1)
    pyro.sample("below", dist.ImproperUniform(constraints.independent(constraints.less_than(ends), 1), (), (2,)))
    with pyro.plate("rows", 3):
        part = pyro.sample("part", dist.Uniform(0.0, top + torch.arange(3)))
        pyro.sample("z", dist.Normal(0.0, 0.1 + part))


STRUCTURED = {**{name: model for name, (model, _) in MODELS.items()}, "regressions": regressions, "bounded": bounded}


def structured(model: Any) -> Any:
    guide = AutoIAF(model, init_scale=0.3, **SMALL).setup()
    with torch.no_grad():
        guide.coordinates.degree.uniform_()
    return guide


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coordinates_are_saved_with_the_prior(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pyro.set_rng_seed(0)
    guide = structured(STRUCTURED[name]).to(dtype)
    again = saved(guide, tmp_path)
    noise = torch.randn(3, 2, guide.latent_dim, dtype=dtype)
    values = again.sites_of(noise)
    close = {"rtol": 100 * torch.finfo(dtype).eps, "atol": 100 * torch.finfo(dtype).eps}
    for site, value in guide.sites_of(noise).items():
        torch.testing.assert_close(values[site], value, **close)
    torch.testing.assert_close(again.log_prob(values), guide.log_prob(values), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.sites_and_log_ratio(noise[0, 0])[1], guide.sites_and_log_ratio(noise[0, 0])[1])
    for site, value in guide.quantiles([0.1, 0.9]).items():
        torch.testing.assert_close(again.quantiles([0.1, 0.9])[site], value, **close)


@pytest.mark.parametrize("parallel", [True, False])
def test_predictions_of_a_hierarchy_need_the_model_alone(parallel: bool, tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(saved(structured(MODELS["levels"][0]), tmp_path)))
    draws = Predictive(MODELS["levels"][0], guide=again, num_samples=5, parallel=parallel)()
    assert draws["z"].shape == (5, 3, 2, 3)
    with pyro.plate("particles", 4, dim=-4):
        assert again()["z"].shape == (4, 1, 3, 2, 3)
    gradient = torch.autograd.grad(again.rsample((2,))["z"].sum(), again.coordinates.degree)[0]
    assert bool(gradient.isfinite().all())


def test_a_program_that_only_loads_needs_no_model(guide: Any, tmp_path: Path) -> None:
    guide.save(tmp_path / "guide.safetensors")
    code = "import pyro_maf, sys; print(pyro_maf.load(sys.argv[1]).rsample((7,))['shares'].shape)"
    command = [sys.executable, "-c", code, str(tmp_path / "guide.safetensors")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(pyro_maf.__file__).parent.parent)
    assert run.stdout.strip() == "torch.Size([7, 3])"


# -- guides that cannot be saved, and invalid files --------------------------------------------------------------------


def test_a_guide_that_is_not_set_up_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"AutoIAF expected to be set up before it is saved: fit it, or call"):
        AutoIAF(regression).save(tmp_path / "guide.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_amortised_guide_is_refused(tmp_path: Path) -> None:
    def model(y: Tensor) -> None:
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    guide = AutoIAF(model, encoder=lambda y: y.reshape(1), **SMALL).setup(torch.tensor(0.5))
    with pytest.raises(TypeError, match=r"AutoIAF cannot be saved: it is a function of the model's arguments, by its"):
        guide.save(tmp_path / "guide.safetensors")


def test_a_prior_that_branches_on_values_is_refused(tmp_path: Path) -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, scale if scale.sum().item() < 1e9 else 1.0))

    guide = AutoIAF(model, init_scale=0.1, **SMALL).setup()
    with pytest.raises(TypeError, match=r"cannot be saved: coordinates of z are computed with .* keep its state_dict"):
        guide.save(tmp_path / "guide.safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="set up a guide of the model and load its state_dict"):
        pickle.loads(pickle.dumps(guide)).median()
    again = AutoIAF(model, init_scale=0.1, **SMALL).setup()
    again.load_state_dict(guide.state_dict())
    assert torch.equal(again.median()["z"], guide.median()["z"])


def test_a_prior_of_other_operations_is_refused(tmp_path: Path) -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        scales = scale.new_zeros((*scale.shape, 2))
        scales[..., 0] = scale
        scales[..., 1] = 1.0
        pyro.sample("z", dist.Normal(0.0, scales).to_event(1))

    guide = AutoIAF(model, init_scale=0.1, **SMALL).setup()
    with pytest.raises(TypeError, match=r"coordinates of z are computed with .* \(the operation [a-z_]+\): keep"):
        guide.save(tmp_path / "guide.safetensors")


def edited(path: Path, change: Any) -> Path:
    """A copy of a file with another header, as an attacker could write it."""
    contents = unpack(path, MODEL)
    described = json.loads(contents.text)
    change(described["arguments"])
    other = path.with_name("other.safetensors")
    other.write_bytes(pack(contents.tensors, MODEL, json.dumps(described)))
    return other


@pytest.mark.parametrize(
    "change",
    [
        lambda arguments: arguments.update(supports=['"print"'] * 4),
        lambda arguments: arguments.update(supports=["__import__('os')"] * 4),
        lambda arguments: arguments.update(names=["a"]),
        lambda arguments: arguments.update(shapes=[[1], [2], [3], [4]]),
        lambda arguments: arguments.update(plates=[1, 2, 3, 4]),
        lambda arguments: arguments.update(idle=[10_000]),
        lambda arguments: arguments.update(event_dims="abcd"),
    ],
)
def test_foreign_descriptions_are_refused_in_one_line(guide: Any, tmp_path: Path, change: Any) -> None:
    guide.save(tmp_path / "guide.safetensors")
    path = edited(tmp_path / "guide.safetensors", change)
    with pytest.raises(ValueError, match=r"^load could not rebuild what .*other\.safetensors describes: [^\n]+$"):
        pyro_maf.load(path)


def test_a_damaged_file_is_refused(guide: Any, tmp_path: Path) -> None:
    path = tmp_path / "guide.safetensors"
    guide.save(path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        pyro_maf.load(path)


def test_foreign_operations_are_refused_in_one_line(tmp_path: Path) -> None:
    structured(MODELS["funnel"][0]).save(tmp_path / "guide.safetensors")

    def refused(change: Any, why: str) -> None:
        path = edited(tmp_path / "guide.safetensors", lambda described: change(described["prior"]["arguments"]))
        with pytest.raises(ValueError, match=why) as caught:
            pyro_maf.load(path)
        assert "\n" not in str(caught.value)

    def steps(*steps: Any) -> Any:
        return lambda prior: prior.update(steps=json.dumps(steps))

    first = {"tensor": 0}
    for name in ("bernoulli", "add_.Tensor", "nothing", "__class__", "add.__class__", "empty.memory_format", "save"):
        refused(steps([name, [first, first], {}]), "not an allowed operation")
    refused(lambda prior: prior.update(priors=[["x", 90, 91]]), "could not rebuild")
    refused(lambda prior: prior.update(priors=[["v", 0, 0]]), "could not rebuild")
    loop = [["exp", [{"tensor": number}], {}] for number in range(9, 1, -1)]
    refused(steps(*loop), "could not rebuild")
