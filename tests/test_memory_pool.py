"""Reused memory: never while it is referenced."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pyro_maf import MAF, FlowPrior
from pyro_maf._core import memory_pool
from pyro_maf._core.memory_pool import empty
from pyro_maf.sweep import function, program

SIZE = 2**16
like = torch.zeros(1)


def test_referenced_memory_is_not_reused() -> None:
    held = [empty(SIZE, like).fill_(number) for number in range(2 * memory_pool.MOST)]
    view = empty(SIZE, like).fill_(-1)[5:9].view(2, 2)
    array = empty(SIZE, like).fill_(-2).numpy()
    for _ in range(20):
        empty(SIZE, like).fill_(torch.nan)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(held))
    assert bool((view == -1).all())
    assert (array == -2).all()


def test_dtypes_and_sizes_are_kept_apart() -> None:
    for dtype in (torch.float32, torch.float64):
        for size in (1, SIZE, SIZE + 1):
            for _ in range(3):
                tensor = empty(size, like.to(dtype))
                assert (tensor.dtype, tensor.shape) == (dtype, (size,))
                assert tensor.data_ptr() % memory_pool.LINE == 0


def test_the_pool_respects_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_pool, "MOST_BYTES", 3 * 4 * SIZE)
    memory_pool._arrays.clear()
    held = [empty(SIZE, like) for _ in range(5)]
    assert len(held) == 5
    assert len(memory_pool._arrays) <= 3


def test_threads_do_not_share_memory() -> None:
    def write(number: int) -> bool:
        return all(bool((empty(SIZE, like).fill_(number) == number).all()) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(write, range(8)))


def test_retained_gradients_are_not_overwritten() -> None:
    prior, value = FlowPrior(MAF(6, num_layers=2, hidden_dims=[128, 128])), torch.randn(50, 6)
    kept = []
    for number in range(4):
        prior.zero_grad()
        (-prior.log_prob(value + number).mean()).backward()
        kept.append([(parameter.grad, parameter.grad.clone()) for parameter in prior.parameters()])  # type: ignore[union-attr]
    assert all(torch.equal(gradient, copy) for pairs in kept for gradient, copy in pairs)  # type: ignore[arg-type]
    losses = [prior.log_prob(value + number).sum() for number in range(3)]
    actual = [torch.autograd.grad(loss, list(prior.parameters())) for loss in losses]
    for number, gradients in enumerate(actual):
        expected = torch.autograd.grad(prior.log_prob(value + number).sum(), list(prior.parameters()))
        assert all(map(torch.equal, gradients, expected))


def test_a_step_takes_memory_for_packed_weights_tape_and_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def recorded(size: int, like: torch.Tensor) -> torch.Tensor:
        sizes.append(size)
        return empty(size, like)

    for module in (function, program):
        monkeypatch.setattr(module, "empty", recorded)
    prior = FlowPrior(MAF(6, num_layers=5, hidden_dims=[128, 128]))
    (-prior.log_prob(torch.randn(50, 6)).mean()).backward()
    packed, _, gradients = sizes
    assert gradients < 1.3 * packed  # the parameters' gradients and the packed ones share it
