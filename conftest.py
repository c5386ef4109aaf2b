"""What the tests and the examples in docstrings have in common."""

from __future__ import annotations

import gc
import os
import signal
from typing import Any

import pyro
import pytest
import torch

import pyro_maf


def pytest_sessionstart() -> None:
    """Compile the kernels of one precision in every other worker: in a fresh clone each would compile both."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        dtype = (torch.float32, torch.float64)[int(worker.removeprefix("gw")) % 2]
        rows = torch.randn(20, 2, dtype=dtype)
        flow = pyro_maf.MAF(2, num_layers=1, hidden_dims=[8]).to(dtype)
        pyro_maf.FlowPrior(flow).log_prob(rows).sum().backward()
        pyro_maf.fit(flow, rows, max_epochs=1, progress=False)


def pytest_collection() -> None:
    """Have no garbage collected meanwhile: there are but libraries and thousands of tests, which stay."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Collect garbage again, without a look at what was there before."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> None:
    """Ctrl-C is heard, also where the tests run in the background of a shell, which has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _fresh_start(doctest_namespace: dict[str, Any]) -> None:
    """The same seeds and an empty parameter store for every test and example; examples know torch by name."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    doctest_namespace["torch"] = torch
