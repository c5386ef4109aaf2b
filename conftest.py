"""What the tests and the examples in docstrings have in common."""

from __future__ import annotations

import signal
from typing import Any

import pyro
import pytest
import torch


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
