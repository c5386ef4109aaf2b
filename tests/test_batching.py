"""Explanations why a model cannot be vectorised over draws: the site, its shape, and the expected shape."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

from pyro_maf.infer import AutoIAF
from pyro_maf.infer.models.broadcasting import why_alone
from pyro_maf.infer.models.model import Call
from tests.posteriors import SMALL

pytestmark = pytest.mark.usefixtures("fresh")
X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
T = torch.linspace(0.1, 2.0, 5)


def regression_by(mean: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("rows", 20):
            pyro.sample("y", dist.Normal(mean(w), scale), obs=torch.zeros(20))

    return model


def indexed_from_the_left() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z[0], 0.5), obs=torch.tensor(1.0))


def stacked_on_the_left() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(torch.stack([a * t for t in T]), 1.0).to_event(1), obs=torch.ones(5))


def branching() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a if a > 0 else -a, 1.0), obs=torch.tensor(1.0))


class Linear(PyroModule[torch.nn.Module]):  # type: ignore[misc]
    """A Bayesian layer that supports the weights of a single draw only, outside the rows' plate."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[torch.nn.Linear](3, 1, bias=False)
        self.layer.weight = PyroSample(dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))

    def forward(self) -> None:
        mean = self.layer(X).squeeze(-1)
        with pyro.plate("rows", 20):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.zeros(20))


def numbers() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.tensor(-0.5 * a.item() ** 2))


def mixing() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(a.mean(), 1.0), obs=torch.tensor(1.0))


SLOW: dict[str, tuple[Callable[[], None], str]] = {
    "matrix product": (
        regression_by(lambda w: X @ w),
        r"raises RuntimeError before site y, whose batch shape should be \(7, 20\) \(there w has shape \(7, 1, 3\), "
        r"alone \(3,\); there scale has shape \(7, 1\), alone \(\)\): ",
    ),
    "a dimension too many": (
        regression_by(lambda w: (X * w[..., None, :]).sum(-1)),
        r"site y has batch shape \(7, 7, 20\), expected \(7, 20\)",
    ),
    "an entry from the left": (indexed_from_the_left, r"site y has batch shape \(10,\), expected \(7,\)"),
    "a stack on the left": (stacked_on_the_left, r"site y has batch shape \(5,\), expected \(7,\)"),
    "a branch": (
        branching,
        r"raises RuntimeError before site y, whose .* \(7,\) .* a has shape \(7,\), alone \(\)\): Boolean",
    ),
    "a layer before its plate": (
        Linear(),
        r"raises RuntimeError before site y, whose batch shape should be \(7, 20\) \(there layer.weight has shape "
        r"\(7, 1, 1, 3\), alone \(1, 3\)\): ",
    ),
    "numbers of Python": (numbers, r"raises RuntimeError before site f, whose batch shape should be \(7,\) "),
    "draws mixed": (
        mixing,
        r"site y has a different density than for each draw alone \(there a has shape \(7,\), alone \(\)\)",
    ),
}


@pytest.mark.parametrize("make", [AutoIAF, AutoNormal])
@pytest.mark.parametrize(("model", "expected"), SLOW.values(), ids=SLOW)
def test_the_site_is_named_with_its_shape(make: Any, model: Any, expected: str) -> None:
    # Without the start, which takes seconds for a model that takes one draw at a time.
    guide = make(model, **(SMALL | {"init_scale": 0.1} if make is AutoIAF else {}))
    call = Call(model)
    drawn = call.of(guide).trace()
    found = why_alone(call, guide, drawn, call.replayed(drawn))
    assert found.startswith("with 7 draws at once ")
    assert "\n" not in found
    assert re.search(expected, found), found
