"""The device that tests run on, and how hypothesis draws."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pyro
import pytest
import torch
from hypothesis import HealthCheck, settings

# Before anything imports Triton, which asks once: without a device its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Examples are drawn anew from the test's own code alone, so a run that passed passes again; compiling a first kernel or
# a busy machine is no failure.
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
        "--device", choices=("cpu", "cuda"), default="cpu", help="where tests that take a device run, by default cpu"
    )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device of `--device`."""
    name: str = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("--device cuda: torch finds no CUDA device on this machine")
    return name


@pytest.fixture
def fresh() -> Iterator[None]:
    """Pyro without parameters, and a seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
