"""Networks whose training steps do not grow with their width."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_maf import IAF, MAF, RealNVP
from pyro_maf.nn import MADE, MLP
from pyro_maf.nn.layers import Tempered, gain_of
from pyro_maf.transforms.triangular import Head

FLOWS: tuple[Any, ...] = (MAF, IAF, RealNVP)


def temper(module: nn.Module) -> nn.Module:
    """The module with all its networks tempered."""
    for part in module.modules():
        if isinstance(part, Tempered):
            part.temper()
    return module


def wide(make: Any) -> Any:
    """A flow with wide networks and random weights."""
    torch.manual_seed(0)
    flow = make(48, num_layers=2, hidden_dims=[192, 192])
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.05)
    return flow


def computed(flow: Any, x: Tensor) -> list[Tensor]:
    """Results of both directions, and parameter gradients through both."""
    flow.zero_grad()
    y = flow(x)
    z = flow.inv(x)
    (y.square().sum() + flow.log_abs_det_jacobian(x, y).sum() + z.square().sum()).backward()
    return [y.detach(), z.detach(), *(parameter.grad for parameter in flow.parameters())]


def test_a_gain_is_a_power_of_two_and_one_for_few_inputs() -> None:
    assert [gain_of(inputs) for inputs in (0, 1, 16, 22, 32, 60, 200, 1600)] == [
        *[1.0] * 4,
        1 / 2,
        1 / 4,
        1 / 16,
        1 / 128,
    ]


@pytest.mark.parametrize("make", FLOWS)
def test_a_tempered_flow_computes_the_same_to_the_last_bit(make: Any) -> None:
    plain = wide(make)
    tempered: Any = temper(copy.deepcopy(plain))
    gains = {
        f"{name}.layers.{index}.weight": gain
        for name, part in tempered.named_modules()
        if isinstance(part, Tempered)
        for index, gain in enumerate(part._gains())
    }
    assert min(gains.values()) == 0.25
    x = torch.randn(7, 48)
    expected, found = computed(plain, x), computed(tempered, x)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    for (name, _), left, right in zip(plain.named_parameters(), found[2:], expected[2:], strict=True):
        torch.testing.assert_close(left, right * gains.get(name, 1.0))


@pytest.mark.parametrize("make", FLOWS)
def test_narrow_networks_stay_as_they_are(make: Any) -> None:
    flow = make(16, hidden_dims=[64, 64])
    before = copy.deepcopy(flow.state_dict())
    after = temper(flow).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("make", FLOWS)
def test_stored_weights_bring_their_gains(make: Any) -> None:
    """Between tempered networks and ordinary ones, in all combinations."""
    plain, tempered = wide(make), temper(wide(make))
    x = torch.randn(3, 48)
    for stored in (plain, tempered):
        for fresh in (make(48, num_layers=2, hidden_dims=[192, 192]), temper(wide(make))):
            fresh.load_state_dict(stored.state_dict())
            assert torch.equal(fresh(x), plain(x))
            assert torch.equal(fresh.inv(x), plain.inv(x))


def test_a_stored_head_brings_its_gain() -> None:
    torch.manual_seed(0)
    heads = [Head(64, loc=torch.zeros(64), scale_tril=torch.eye(64)) for _ in range(2)]
    nn.init.normal_(heads[0].free, std=0.1)
    x = torch.randn(3, 64)
    heads[1].load_state_dict(heads[0].state_dict())
    assert torch.equal(heads[1](x), heads[0](x))
    old = {name: value for name, value in heads[0].state_dict().items() if name != "gain"}
    old["free"] = torch.cat([old["free"][:128], old["free"][128:] * 0.25])
    heads[1].load_state_dict(old)
    assert torch.equal(heads[1](x), heads[0](x))


def moved_by_a_step(module: Any, size: int) -> float:
    """Distance that the outputs at typical inputs move in the third step of Adam towards a distant target."""
    torch.manual_seed(1)
    x = torch.randn(32, size)
    target = torch.randn(size)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    before = x
    for _ in range(3):
        optimizer.zero_grad()
        y = module(x)
        y = y[..., 0] if y.dim() == 3 else y
        moved, before = float((y - before).detach().square().mean().sqrt()), y.detach()
        ((y - 100 * x.sum(1, keepdim=True) * target) ** 2).mean().backward()
        optimizer.step()
    return moved


def networks(size: int) -> dict[str, Any]:
    hidden = [4 * size, 4 * size]
    mades: list[Any] = [MADE(size, hidden, activation="elu"), MLP(size, hidden, size, activation="elu")]
    for network in mades:
        network.zero_output()
    return {
        "MADE": temper(mades[0]),
        "MLP": temper(mades[1]),
        "Head": Head(size, loc=torch.zeros(size), scale_tril=torch.eye(size)),
    }


@pytest.mark.parametrize("name", ["MADE", "MLP", "Head"])
def test_a_step_of_adam_moves_a_wide_network_no_further_than_a_narrow_one(name: str) -> None:
    few, many = (moved_by_a_step(networks(size)[name], size) for size in (16, 128))
    assert many < 1.5 * few
    assert many > 0.2 * few
