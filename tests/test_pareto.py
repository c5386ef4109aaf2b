"""Pareto-smoothed importance sampling, against arviz and on heavy-tailed weights."""

from __future__ import annotations

import math
import warnings
from importlib import import_module

import numpy as np
import pytest
import torch

from pyro_maf.infer.diagnosis.pareto import fit_pareto, smoothed_log_weights


@pytest.mark.parametrize("size", [100, 784, 4096])
@pytest.mark.parametrize("spread", [0.01, 0.3, 1.0, 5.0])
def test_smoothed_weights_agree_with_arviz(size: int, spread: float) -> None:
    """For sample sizes with a whole tail length, which arviz rounds up and from version 1 on down."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    generator = torch.Generator().manual_seed(size)
    log_weights = spread * torch.randn(size, generator=generator, dtype=torch.float64)
    smooth, k_hat = smoothed_log_weights(log_weights)
    with np.errstate(over="ignore"):
        if "psislw" in vars(arviz):
            expected, expected_k_hat = arviz.psislw(log_weights.numpy())
        else:  # from arviz 1 on, of the negative log weights
            expected, expected_k_hat = import_module("arviz_stats.base").array_stats.psislw(-log_weights.numpy())
    assert k_hat == pytest.approx(float(expected_k_hat), abs=1e-9)
    assert (k_hat >= 1) == (spread == 5)
    if k_hat < 1:
        torch.testing.assert_close(smooth, torch.as_tensor(np.asarray(expected)), rtol=0, atol=1e-9)
    else:  # without a mean there are no quantiles, so weights are bounded by the square root of n times the mean
        bounded = log_weights.clamp(max=float(log_weights.logsumexp(0)) - 0.5 * math.log(size))
        torch.testing.assert_close(smooth, bounded.log_softmax(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("size", "tail"), [(102, 21), (777, 84), (4000, 190)])
def test_the_length_of_the_tail_is_rounded_up(size: int, tail: int) -> None:
    log_weights = torch.linspace(0.5, 1.0, size, dtype=torch.float64).log()
    shifts = smoothed_log_weights(log_weights)[0] - log_weights
    assert int(((shifts - shifts[0]).abs() > 1e-9).sum()) == tail - 1  # the largest weight bounds its quantile


@pytest.mark.parametrize("shape", [-0.4, 0.0, 0.3, 0.9])
def test_the_shape_of_a_tail_is_estimated(shape: float) -> None:
    quantiles = (torch.arange(5_000, dtype=torch.float64) + 0.5) / 5_000
    excesses = -torch.log1p(-quantiles) if shape == 0 else ((1 - quantiles) ** -shape - 1) / shape
    estimate, scale = fit_pareto(3 * excesses)
    assert estimate == pytest.approx(shape, abs=0.02)
    assert scale == pytest.approx(3.0, rel=0.05)


def test_equal_weights_have_no_tail() -> None:
    smooth, k_hat = smoothed_log_weights(torch.full((200,), -7.0, dtype=torch.float64))
    assert k_hat == -math.inf
    torch.testing.assert_close(smooth, torch.full_like(smooth, -math.log(200)))
