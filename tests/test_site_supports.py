"""Maps to the supports of sites: bijections with exact log-determinants that can be described for saving."""

from __future__ import annotations

import json
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_maf.infer import AutoIAF, fit_guide
from pyro_maf.infer.models.supports import described_support, support_map, support_of
from tests.posteriors import SMALL

pytestmark = pytest.mark.usefixtures("fresh")

MATRICES: dict[str, tuple[Constraint, int]] = {
    "lower_cholesky": (constraints.lower_cholesky, 6),
    "positive_definite": (constraints.positive_definite, 6),
}


@pytest.mark.parametrize(("support", "numbers"), MATRICES.values(), ids=MATRICES)
def test_maps_to_matrices_have_exact_log_determinants(support: Constraint, numbers: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, numbers, dtype=torch.float64)
    transform = support_map(support)
    y = transform(x)
    assert support.check(y).all()
    assert y.shape[1:] == transform.forward_shape(x.shape)[1:] == (3, 3)
    assert transform.inverse_shape(y.shape) == x.shape
    torch.testing.assert_close(transform.inv(y), x)
    rows, columns = torch.tril_indices(3, 3)
    for one in x:
        jacobian = torch.autograd.functional.jacobian(lambda v: transform(v)[rows, columns], one)
        log_det = transform.log_abs_det_jacobian(one, transform(one))
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det)


def mixture(part: Any, **options: Any) -> Any:
    return lambda: pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.4, 0.6])), part), **options)


def matrices() -> None:
    """A Wishart prior, which torch warns about whenever it is sampled."""
    z = pyro.sample("z", dist.ImproperUniform(constraints.positive_definite, (), (2, 2)))
    pyro.factor("density", torch.distributions.Wishart(torch.tensor(6.0), torch.eye(2)).log_prob(z))


PRIORS: dict[str, Any] = {
    "normal": mixture(dist.Normal(torch.tensor([-0.5, 0.5]), 1.0)),
    "gamma": mixture(dist.Gamma(torch.tensor([2.0, 4.0]), 1.0)),
    "beta": mixture(dist.Beta(torch.tensor([2.0, 4.0]), 3.0)),
    "simplex": mixture(dist.Dirichlet(torch.tensor([[2.0, 3.0, 4.0], [4.0, 3.0, 2.0]]))),
    "vectors": mixture(dist.Normal(torch.zeros(2, 3), torch.tensor([[1.0], [2.0]])).to_event(1)),
    "matrices": matrices,
}


@pytest.mark.parametrize("model", PRIORS.values(), ids=PRIORS)
def test_mixtures_and_matrices_have_guides_with_a_right_bound(model: Any) -> None:
    """Without data the evidence is 1, and draws lie in the support."""
    pyro.set_rng_seed(0)
    fit = fit_guide(model, AutoIAF(model, **SMALL), steps=50, progress=False)
    assert -0.6 < fit.diagnosis.elbo <= 4 * fit.diagnosis.elbo_se
    assert abs(fit.diagnosis.log_evidence) < 0.1
    draws = fit.guide.rsample((50,))
    assert fit.guide.log_prob(draws).isfinite().all()
    assert fit.guide.quantiles([0.1, 0.9])["z"].shape[1:] == draws["z"].shape[1:]


SPARSE: dict[str, Any] = {
    "gamma": dist.Gamma(0.1, 0.1),
    "inverse gamma": dist.InverseGamma(0.1, 0.1),
    "beta": dist.Beta(0.1, 0.1),
    "dirichlet": dist.Dirichlet(torch.full((3,), 0.1)),
    "half-Cauchy": dist.HalfCauchy(1.0),
    "uniform": dist.Uniform(torch.tensor(-1.0), torch.tensor(2.0)),
    "vector": dist.Gamma(torch.full((2,), 0.1), 1.0).to_event(1),
}


@pytest.mark.parametrize("fn", SPARSE.values(), ids=SPARSE)
def test_the_density_falls_where_values_no_longer_change(fn: Any) -> None:
    """If it were constant there, its integral and the bound would be infinite."""
    latents = AutoIAF(lambda: pyro.sample("z", fn), **SMALL).setup().latents
    far = torch.tensor([60.0, 120.0, 240.0, 1e4])[:, None]
    for direction in torch.cat([torch.eye(latents.size), -torch.eye(latents.size)]):
        values, log_det = latents.unpack(far * direction)
        densities = fn.log_prob(values["z"]) + log_det
        assert bool(((densities.diff() < -30) | (densities[1:] < -1e6)).all())


@pytest.mark.parametrize("name", ["gamma", "beta", "dirichlet"])
def test_a_sparse_prior_has_a_right_bound(name: str) -> None:
    """Except for the few per cent of probability closer to an edge than float32 can represent."""

    def model() -> None:
        pyro.sample("z", SPARSE[name])

    pyro.set_rng_seed(0)
    fit = fit_guide(model, AutoIAF(model, **SMALL), steps=400, progress=False)
    assert -0.5 < fit.diagnosis.log_evidence < 0.1


SUPPORTS: tuple[Constraint, ...] = (
    constraints.real,
    constraints.positive,
    constraints.unit_interval,
    constraints.simplex,
    constraints.corr_cholesky,
    constraints.corr_matrix,
    constraints.ordered_vector,
    constraints.positive_definite,
    constraints.interval(-1.0, 2.0),
    constraints.greater_than(torch.tensor([0.5, 1.5])),
    constraints.independent(constraints.less_than(3.0), 2),
    dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Gamma(torch.ones(2), 1.0)).support,
)


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_supports_are_described_by_plain_values(support: Constraint) -> None:
    again = support_of(json.loads(json.dumps(described_support(support))))
    x = torch.randn(4, 1, 2)
    x = torch.randn(4, 3) if again.event_dim and not isinstance(again, constraints.independent) else x
    assert torch.equal(support_map(again)(x), support_map(support)(x))


@pytest.mark.parametrize("described", ["print", {"name": "real"}, {"name": "exec"}, 3, {"independent": "os"}])
def test_other_descriptions_are_refused(described: Any) -> None:
    with pytest.raises((LookupError, TypeError, ValueError)):
        support_of(described)


def test_a_support_without_description_is_named() -> None:
    with pytest.raises(TypeError, match="the support Sphere has no description"):
        described_support(constraints.sphere)
