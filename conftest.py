"""What the tests and the examples in docstrings have in common."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_start(doctest_namespace: dict[str, Any]) -> None:
    """The same seeds and an empty parameter store for every test and example; examples know torch by name."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    doctest_namespace["torch"] = torch
