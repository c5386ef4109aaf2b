"""Options and fixtures of all tests: the device, hypothesis's settings, and Pyro's global state."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pyro
import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton reads this when it is imported; without a device its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Examples depend only on the test's code, so results are reproducible. There is no deadline, since a first call may
# compile a kernel.
settings.register_profile(
    "pyro_maf",
    derandomize=True,
    deadline=None,
    max_examples=12,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("pyro_maf")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device of the tests that take one; default: cpu"
    )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device that `--device` selects."""
    name: str = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("--device cuda: torch finds no CUDA device on this machine")
    return name


@pytest.fixture
def fresh() -> Iterator[None]:
    """An empty parameter store and a fixed seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
