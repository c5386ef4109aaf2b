"""Columns of angles: densities are periodic and integrate to 1 over a turn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import pyro_maf
from pyro_maf import MAF, NSF, ConditionalMAF, ConditionalNSF, FlowPrior, fit, fit_prior
from pyro_maf.cli.commands import app
from pyro_maf.distributions import AngleFlow, TableDensity
from pyro_maf.support import Support
from tests.test_distributions import shaken

TURN = 2 * math.pi
ENDS = pytest.mark.filterwarnings("ignore:fit (reached max_epochs|has its best epoch|left)")


def winds(rows: int = 600) -> Tensor:
    """Directions in degrees around north, where 0 equals 360, speeds that depend on them, and directions aloft."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.remainder(40 * torch.randn(rows, generator=generator), 360)
    speed = 5 + 3 * (direction * math.pi / 180).cos() + 0.3 * torch.randn(rows, generator=generator)
    aloft = torch.remainder(direction + 20 + 10 * torch.randn(rows, generator=generator), 360)
    return torch.stack([direction, speed, aloft], 1)


def density(context_dim: int = 0, flow: bool = True) -> AngleFlow:
    torch.manual_seed(0)
    of_others = NSF(1, context_dim=4 + context_dim, num_layers=2, hidden_dims=[8]) if flow else None
    made = AngleFlow(of_others, [0, 2] if flow else [0, 1], context_dim=context_dim, hidden_dims=[16])
    return shaken(made.double(), 0.15)


@pytest.mark.parametrize("name", ["angle", "angle(0, 360)", "angle(-5, 1)"])
def test_angles_map_to_radians_and_back(name: str) -> None:
    support = Support("FlowPrior", [name, "real"], 2)
    assert support.angles == (0,)
    z = torch.tensor([[-math.pi, 1.0], [0.0, 2.0], [3.0, 3.0], [10.0, 4.0], [-4.0, 5.0]], dtype=torch.float64)
    y, log_det = support.constrain(z)
    interval = support.constraint.cseq[0].base_constraint  # type: ignore[attr-defined]
    low, high = interval.lower_bound, interval.upper_bound
    assert ((y[:, 0] >= low) & (y[:, 0] < high)).all()
    again, other = support.unconstrain(y + torch.tensor([high - low, 0.0], dtype=y.dtype))
    assert torch.allclose(again[:, 0].cos(), z[:, 0].cos())
    assert torch.allclose(again[:, 0].sin(), z[:, 0].sin())
    assert torch.allclose(log_det, torch.full((5,), math.log((high - low) / TURN), dtype=torch.float64))
    assert torch.equal(log_det, other)
    assert not support.outside(y * 100).any()
    float32, _ = support.constrain(torch.full((1, 2), math.pi - 1e-7))
    assert float32[0, 0] < high


@pytest.mark.parametrize("flow", [True, False])
def test_the_density_is_periodic_and_integrates_to_one(flow: bool) -> None:
    made = density(flow=flow)
    circle = (torch.arange(200, dtype=torch.float64) + 0.5) / 200 * TURN - math.pi
    if flow:
        line = torch.linspace(-10, 10, 161, dtype=torch.float64)
        rows = torch.cartesian_prod(circle[4::8], line, circle[4::8])
        volume = (TURN / 25) ** 2 * 20 / 160
    else:
        rows, volume = torch.cartesian_prod(circle, circle), (TURN / 200) ** 2
    with torch.no_grad():
        log_prob = torch.cat([made.log_prob(part) for part in rows.split(2**17)])
    assert float(log_prob.exp().sum()) * volume == pytest.approx(1, abs=1e-4)
    some = rows[:: len(rows) // 50]
    for column in made.angles:
        turned = some + TURN * torch.nn.functional.one_hot(torch.tensor(column), made.input_dim).double()
        torch.testing.assert_close(made.log_prob(turned), made.log_prob(some))
    # Smooth where a turn ends, without a jump in value or slope.
    ends = torch.zeros(2, made.input_dim, dtype=torch.float64)
    ends[:, 0] = torch.tensor([-math.pi + 1e-9, math.pi - 1e-9])
    ends.requires_grad_()
    value = made.log_prob(ends)
    (slope,) = torch.autograd.grad(value.sum(), ends)
    assert abs(value[0] - value[1]) < 1e-6
    assert torch.allclose(slope[0], slope[1], atol=1e-6)


def test_draws_have_the_density_and_noise_is_normal() -> None:
    made = density(context_dim=1)
    context = torch.tensor([0.7], dtype=torch.float64)
    torch.manual_seed(0)
    draws = made.draw(torch.Size([2500]), context)
    assert ((draws[:, [0, 2]] >= -math.pi) & (draws[:, [0, 2]] < math.pi)).all()
    noise = made.noise(draws, context.expand(2500, 1)).detach()
    assert noise.mean(0).abs().max() < 0.07
    assert (noise.std(0) - 1).abs().max() < 0.05
    assert torch.corrcoef(noise.T).triu(1).abs().max() < 0.07
    gradients = torch.autograd.grad(made.log_density(draws[:9], context).sum(), list(made.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradients_are_those_of_finite_differences() -> None:
    made = density(context_dim=1)
    rows = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    context = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(made.log_density, (rows, context))


@ENDS
def test_a_fit_learns_a_distribution_across_zero_degrees(tmp_path: Path) -> None:
    frame = pd.DataFrame(winds().double().numpy(), columns=["direction", "speed", "aloft"])
    support = {"direction": "angle(0, 360)", "aloft": "angle(0, 360)"}
    result = fit(frame, support=support, max_epochs=30, progress=False, seed=1)
    drawn = result.sample(800)
    assert isinstance(drawn, pd.DataFrame)
    assert drawn["direction"].between(0, 360, inclusive="left").all()
    apart = (drawn["aloft"] - drawn["direction"] + 180) % 360 - 180
    assert abs(apart.mean() - 20) < 3
    assert apart.std() < 20
    north = torch.tensor([[359.999, 8.0, 20.0], [0.001, 8.0, 20.0], [180.0, 8.0, 20.0], [-0.001, 8.0, 380.0]])
    scores = result.score(north.double())
    assert abs(scores[0] - scores[1]) < 1e-3
    assert torch.allclose(scores[0], scores[3], atol=1e-3)
    assert scores[1] > scores[2] + 3
    # The exact distribution: wrapped normals of 40 and 10 degrees, and a normal speed.
    truth = -math.log(40 * 10 * 0.3) - 1.5 * math.log(TURN * math.e)
    assert result.score(frame).mean() > truth - 0.4
    result.density.save(tmp_path / "winds.safetensors")
    again = pyro_maf.load(tmp_path / "winds.safetensors")
    assert torch.equal(again.log_prob(north.double()), result.density.log_prob(north.double()))  # type: ignore[union-attr]
    assert result.comparison is not None
    assert result.comparison.baselines[0].gain > 0.5


@ENDS
def test_angles_go_with_contexts_categories_and_flows_of_the_user() -> None:
    rows = winds(300)
    support = ["angle(0, 360)", "real", "angle(0, 360)"]
    quick: dict[str, Any] = {"max_epochs": 1, "progress": False, "batch_size": 64}
    flow = ConditionalMAF(1, 4, num_layers=1, hidden_dims=[8])
    assert fit(flow, rows, support=support, **quick).score(rows).isfinite().all()
    given = fit(ConditionalNSF(1, 5), rows, context=rows[:, :1].sqrt(), support=support, **quick)
    assert given.sample(4, rows[:1, :1]).shape == (4, 3)  # type: ignore[union-attr]
    only = fit_prior(rows[:, [0, 2]], support="angle(0, 360)", **quick)
    assert isinstance(only, FlowPrior)
    assert ((only.sample((100,)) >= 0) & (only.sample((100,)) < 360)).all()
    frame = pd.DataFrame(rows.numpy(), columns=["direction", "speed", "aloft"]).round(1)
    frame["season"] = ["winter", "summer"] * 150
    with pytest.warns(UserWarning, match="grid in column 'speed'"):
        table = fit(frame, support={"direction": "angle(0, 360)", "aloft": "angle(0, 360)"}, **quick)
    assert isinstance(table.density, TableDensity)
    assert table.score(frame).isfinite().all()
    assert set(table.sample(20)["season"]) <= {"winter", "summer"}  # type: ignore[call-overload, index]


def test_flows_that_are_not_periodic_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected an AngleFlow, .* of columns \[1\] on angle, got MAF"):
        FlowPrior(MAF(2), support=["real", "angle"])
    with pytest.raises(ValueError, match=r"input_dim 1, as 2 columns are angles.*got input_dim 3 and context_dim 0"):
        fit(MAF(3), winds(50), support=["angle(0, 360)", "real", "angle(0, 360)"])
    with pytest.raises(ValueError, match="flow of context_dim 2"):
        AngleFlow(MAF(2), [0])
    with pytest.raises(ValueError, match="expected support to be one of"):
        Support("fit", "angle(3, 1)", 2)


@ENDS
def test_the_command_fits_angles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pd.DataFrame(winds(200).numpy(), columns=["direction", "speed", "aloft"]).to_csv("winds.csv", index=False)
    support = "direction=angle(0,360),aloft=angle(0,360)"
    options = ["--support", support, "--max-epochs", "1", "--folder", "fit", "--flow", "maf", "--num-layers", "1"]
    for command in (["fit", "winds.csv", *options], ["sample", "fit", "-n", "5", "--out", "drawn.csv"]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    assert pd.read_csv("drawn.csv")["direction"].between(0, 360, inclusive="left").all()
