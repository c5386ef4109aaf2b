"""Guides with hundreds of latent variables: their affine head, start and memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_maf.infer import AutoIAF
from pyro_maf.infer.start.normal import wide_start
from pyro_maf.transforms.low_rank import LowRankHead
from tests.posteriors import SMALL, bound

SIZE = 202


def normal_posterior(precision: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
    """An unnormalised normal log-density with this precision, and the maximum bound without the noise's entropy."""
    loc = torch.linspace(-1, 1, len(precision))

    def score(rows: Tensor) -> Tensor:
        away = rows - loc.to(rows)
        return -0.5 * ((away @ precision.to(rows)) * away).sum(-1)

    return score, -0.5 * len(precision) - 0.5 * float(torch.linalg.slogdet(precision.double()).logabsdet)


def gap(precision: Tensor) -> tuple[float, LowRankHead]:
    """Nats by which the initial normal is below the maximum bound, and its head."""
    score, best = normal_posterior(precision)
    start = wide_start(score, torch.stack([torch.zeros(len(precision)), torch.full((len(precision),), -2.0)]))
    head = LowRankHead(len(precision), start.directions.shape[-1], **start._asdict())
    noise = torch.randn(2000, len(precision), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        y, log_det = head.forward_and_log_det(torch.cat([noise, -noise]))
        return best - float((score(y) + log_det).mean()), head


def test_a_few_directions_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(SIZE, 3, generator=generator)
    scale = torch.logspace(-1, 1, SIZE)
    precision = (torch.eye(SIZE) + factors @ factors.T) / scale / scale[:, None]
    assert gap(precision)[0] < 1.0


def test_as_many_directions_as_data_have_are_found() -> None:
    """For a regression, whose precisions spread over a range without a few dominant ones."""
    rows = torch.randn(2 * SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    assert gap(torch.eye(SIZE) + rows.T @ rows / 4)[0] < 1.0


def test_a_chain_is_found() -> None:
    beside = torch.full((SIZE - 1,), -1.0)
    precision = 2.1 * torch.eye(SIZE) + torch.diag(beside, 1) + torch.diag(beside, -1)
    nats, head = gap(precision)
    assert nats < 1.0
    assert head.free.numel() < 5 * SIZE + 6_000


def model() -> None:
    """Rates of many groups, half of them with data."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(2.0)))
    with pyro.plate("groups", SIZE):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        errors = torch.tensor([0.1, 5.0]).repeat(SIZE // 2)
        pyro.sample("y", dist.Normal(theta, errors), obs=torch.linspace(-1, 3, SIZE))


def test_many_latent_variables_start_near_the_posterior_and_stay_there() -> None:
    pyro.set_rng_seed(0)
    guide = AutoIAF(model).setup()
    assert isinstance(guide.transform[-1], LowRankHead)
    first = bound(model, guide)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    losses = [svi.step() for _ in range(40)]
    assert max(losses) < -first + 60
    assert bound(model, guide) > first - 2.0


@pytest.mark.parametrize("size", [500, 2000])
def test_memory_is_linear(size: int) -> None:
    def wide() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))

    guide = AutoIAF(wide, init_scale=0.1).setup()
    numbers = sum(tensor.numel() for tensor in (*guide.parameters(), *guide.buffers()))
    assert numbers < 5_000 * size
    assert guide.rsample((3,))["z"].shape == (3, size)
    assert math.isfinite(float(guide.log_prob({"z": torch.zeros(size)}).detach()))


def test_a_context_has_a_dense_head() -> None:
    def amortised(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(210), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    guide = AutoIAF(amortised, encoder=lambda y: y.reshape(1), **SMALL).setup(torch.tensor(0.5))
    assert guide.rsample((2,), torch.tensor(1.0))["z"].shape == (2, 210)


def test_a_head_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"LowRankHead expected scale of shape \(3,\), got \(2,\)"):
        LowRankHead(3, scale=torch.ones(2))
    with pytest.raises(ValueError, match="LowRankHead expected positive stretches"):
        LowRankHead(3, 3, stretches=torch.tensor([1.0, 0.0, 1.0]))


def test_directions_stay_orthonormal_in_a_wider_dtype() -> None:
    directions = torch.linalg.qr(torch.randn(30, 4)).Q
    head = LowRankHead(30, 4, directions=directions, stretches=torch.rand(4) + 0.5).double()
    with torch.no_grad():
        head.free.normal_()
    x = torch.randn(5, 30, dtype=torch.float64)
    y, log_det = head.forward_and_log_det(x)
    back, _ = head.inverse_and_log_det(y)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    jacobian = torch.autograd.functional.jacobian(lambda u: head.forward_and_log_det(u)[0], x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_det[0])
