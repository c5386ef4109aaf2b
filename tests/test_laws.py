"""The laws as users call them: what breaks one is named, with how much and where; what is right passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

from pyro_maf import MAF, NSF, ConditionalMAF, FlowPrior, MADEMoG
from pyro_maf.infer import AutoIAF
from pyro_maf.testing import BrokenLawError, check_density, check_guide, check_transform, transforms
from pyro_maf.transforms import ActNorm, Flow
from tests.posteriors import GUIDES, SMALL

pytestmark = pytest.mark.usefixtures("fresh")
SIZE: dict[str, Any] = {"num_layers": 1, "hidden_dims": [8], "activation": "tanh"}


class Scale(Flow):
    """y = exp(a) x, whose parts subclasses get wrong."""

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim)
        self.log_scale = nn.Parameter(torch.zeros(input_dim))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.log_scale.sum().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y / self.log_scale.exp(), self.log_scale.sum().expand(y.shape[:-1])


class NotInverse(Scale):
    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return 1.001 * y / self.log_scale.exp(), self.log_scale.sum().expand(y.shape[:-1])


class WrongSign(Scale):
    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse_and_log_det(y)
        return x, -log_det


class NoGradient(Scale):
    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward_and_log_det(x)
        return y, log_det.detach()


class Unbatched(Scale):
    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.log_scale.sum()


class Forgetful(Scale):
    """Its scale is no parameter, and stays behind."""

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim)
        self.extra = float(torch.rand(()))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward_and_log_det(x)
        return y + self.extra, log_det

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().inverse_and_log_det(y - self.extra)


@pytest.mark.parametrize(
    "make",
    [Scale, ActNorm, lambda d: MAF(d, **SIZE), lambda d: ConditionalMAF(d, 2, **SIZE)],
    ids=["Scale", "ActNorm", "MAF", "ConditionalMAF"],
)
def test_transforms_that_are_right_pass(make: Callable[[int], Any]) -> None:
    check_transform(make, dimensions=(2,))


def test_a_difference_that_straddles_a_knot_is_no_wrong_derivative() -> None:
    check_transform(lambda d: NSF(d, **SIZE), dimensions=(2,), seed=734698)


def test_a_network_of_many_parameters_takes_seconds() -> None:
    started = time.process_time()
    transforms.has_derivatives(MAF(2).double().eval())
    assert time.process_time() - started < 10  # parameter by parameter it takes minutes


class Heavy(Flow):
    """y = sinh(1.5 x): its rarest draws are five hundred times as far out as most."""

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (1.5 * x).sinh(), (1.5 * (1.5 * x).cosh()).log().sum(-1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = y.asinh() / 1.5
        return x, (1.5 * (1.5 * x).cosh()).log().sum(-1)


@pytest.mark.parametrize("input_dim", [1, 2])
def test_integrals_refine_where_the_density_is(input_dim: int) -> None:
    torch.manual_seed(0)
    transforms.integrates_to_one(Heavy(input_dim))


BROKEN = {
    NotInverse: r'NotInverse\(2\) breaks the law "starts as the identity": got .*off by 0\.001, allowed are 1e-12',
    WrongSign: r'^WrongSign\(2\) breaks the law "has the log-determinant of its Jacobian": got .*, at the input .',
    NoGradient: r'NoGradient\(2\) breaks the law "has the derivatives of differences, from x to y": Jacobian mismatch',
    Unbatched: r'breaks the law "takes batches of any shape, such as \(0,\)": shapes are \(0, 2\) and \(\) for x of',
    Forgetful: r'Forgetful\(2\) breaks the law "can be copied, by (save|state_dict)"',
}


@pytest.mark.parametrize(("make", "message"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_law_is_named_with_its_error_and_where(make: type[Flow], message: str) -> None:
    with pytest.raises(BrokenLawError, match=message):
        check_transform(make, dimensions=(2,), identity=make is not Forgetful)


def test_a_transform_in_place_of_its_class_is_refused() -> None:
    with pytest.raises(TypeError, match=r"builds a transform .* got MAF\(2\): pass the class MAF, or lambda d: MAF"):
        check_transform(MAF(2, **SIZE))  # type: ignore[arg-type]


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    check_transform(Scale, dimensions=(1,))
    check_density(lambda d: dist.Normal(torch.zeros(d), 1.0).to_event(1), dimensions=(1,))
    assert torch.equal(torch.get_rng_state(), before)


# -- densities ---------------------------------------------------------------------------------------------------------


class Lifted(FlowPrior):
    def log_prob(self, value: Any) -> Tensor:
        return super().log_prob(value) + 0.01


class Wide(FlowPrior):
    def sample(self, sample_shape: Any = ()) -> Tensor:
        return 1.1 * super().sample(sample_shape)


DENSITIES: dict[str, Callable[[int], Any]] = {
    "normal": lambda d: dist.Normal(torch.zeros(d), 1.0).to_event(1),
    "gamma": lambda d: dist.Gamma(torch.full((d,), 2.0), 1.0).to_event(1),
    "heavy": lambda d: dist.StudentT(2.0, torch.zeros(d), 1.0).to_event(1),
    "simplex": lambda d: dist.Dirichlet(torch.full((d + 1,), 2.0)),
    "mixture": lambda d: MADEMoG(d, hidden_dims=[8]),
    "shares": lambda d: FlowPrior(MAF(d, **SIZE), support="unit_interval"),
}


@pytest.mark.parametrize("make", DENSITIES.values(), ids=DENSITIES)
def test_densities_that_are_right_pass(make: Callable[[int], Any]) -> None:
    check_density(make)


@pytest.mark.parametrize(("kind", "law"), [(Lifted, "integrates to 1"), (Wide, "draws from its density")])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_densities_that_are_wrong_are_found_out(kind: Any, law: str, dimensions: int) -> None:
    with pytest.raises(BrokenLawError, match=rf'^{kind.__name__} breaks the law "{law}": off by'):
        check_density(lambda d: kind(MAF(d, **SIZE)), dimensions=[dimensions])


# -- guides ------------------------------------------------------------------------------------------------------------


def model() -> None:
    scale = pyro.sample("scale", dist.Gamma(3.0, 1.0))
    pyro.sample("z", dist.Normal(torch.zeros(2), scale[..., None]).to_event(1))


def independent() -> None:
    pyro.sample("scale", dist.Gamma(3.0, 1.0))
    pyro.sample("z", dist.Normal(1.0, 2.0))


@pytest.mark.parametrize("make", [*GUIDES, AutoNormal, AutoMultivariateNormal])
def test_guides_that_are_right_pass(make: Any) -> None:
    check_guide(model, lambda model: make(model, **(SMALL if make in GUIDES else {})))


def test_an_evidence_that_differs_by_a_tenth_of_a_nat_is_refused() -> None:
    with pytest.raises(BrokenLawError, match=r'"estimates the evidence": off by 0\.(1|09)'):
        check_guide(independent, AutoIAF, log_evidence=0.1)


def test_a_guide_that_leaves_out_a_site_is_found_out() -> None:
    with pytest.raises(BrokenLawError, match=r"^AutoNormal breaks the law .* z of the model is not drawn"):
        check_guide(model, lambda model: AutoNormal(poutine.block(model, hide=["z"])))
