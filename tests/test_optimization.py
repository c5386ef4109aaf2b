"""Adam in one call of torch: the steps of `torch.optim.Adam`, and gradients clipped as torch clips them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pyro_maf._core import optimization
from pyro_maf._core.optimization import Adam, clip
from pyro_maf._core.torch_state import Snapshot

SHAPES = ((3, 4), (5,), (2, 2, 2))


def drawn(seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [True, False])
def test_steps_are_those_of_torch(fused: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr(optimization, "FUSED", ())
    weights = drawn(0, dtype)
    twins = [nn.Parameter(weight.clone()) for weight in weights]
    theirs = torch.optim.Adam(twins, weight_decay=1e-2, fused=fused)
    ours = Adam(weights, weight_decay=1e-2)
    for number in range(1, 6):
        gradients: list[Tensor | None] = [*drawn(number, dtype)]
        if number in (1, 3):
            gradients[1] = None
        for twin, gradient in zip(twins, gradients, strict=True):
            twin.grad = gradient
        theirs.param_groups[0]["lr"] = 1e-2 / number
        theirs.step()
        ours.step(gradients, 1e-2 / number)
    assert all(torch.equal(weight, twin) for weight, twin in zip(weights, twins, strict=True))


def test_the_optimizer_resumes_from_its_state() -> None:
    weights = drawn(0, torch.float64)
    twins = [weight.clone() for weight in weights]
    whole, first, second = Adam(weights), Adam(twins), Adam(twins)
    for number in range(1, 5):
        whole.step(drawn(number, torch.float64), 1e-2)
        if number == 3:
            for mine, its in zip(second.states, first.states, strict=True):
                for name, tensor in mine.items():
                    tensor.copy_(its[name])
        (first if number < 3 else second).step(drawn(number, torch.float64), 1e-2)
    assert all(torch.equal(weight, twin) for weight, twin in zip(weights, twins, strict=True))


def test_weights_of_two_dtypes_are_stepped_together() -> None:
    weights = [torch.ones(2), torch.ones(3, dtype=torch.float64)]
    Adam(weights).step([torch.ones(2), -torch.ones(3, dtype=torch.float64)], 0.5)
    assert torch.allclose(weights[0], torch.tensor(0.5))
    assert torch.allclose(weights[1], torch.tensor(1.5, dtype=torch.float64))


def test_a_step_counts_as_a_change_of_the_weights() -> None:
    weights = drawn(0, torch.float32)
    before = Snapshot.of(weights)
    Adam(weights).step(drawn(1, torch.float32), 1e-2)
    assert before is not None
    assert not before.holds_for(weights)


@pytest.mark.parametrize("most", [0.5, 1e9])
def test_gradients_are_clipped_as_torch_clips_them(most: float) -> None:
    gradients, twins = drawn(0, torch.float32), [nn.Parameter(weight) for weight in drawn(0, torch.float32)]
    for twin in twins:
        twin.grad = twin.detach().clone()
    norm = nn.utils.clip_grad_norm_(twins, most)
    assert clip([*gradients, None], most) == float(norm)
    assert all(twin.grad is not None and torch.equal(twin.grad, g) for twin, g in zip(twins, gradients, strict=True))
    assert clip([None], most) == 0.0
