"""The laws as users call them: violations are reported with size and place, and correct objects pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution, TransformModule
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.distributions.transforms import (
    ComposeTransform,
    ExpTransform,
    SigmoidTransform,
    SoftmaxTransform,
    StickBreakingTransform,
)

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
    """A transform whose scale is not a parameter, so it is not moved or saved."""

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
def test_correct_transforms_pass(make: Callable[[int], Any]) -> None:
    check_transform(make, dimensions=(2,))


def test_a_finite_difference_across_a_knot_is_not_an_error() -> None:
    check_transform(lambda d: NSF(d, **SIZE), dimensions=(2,), seed=734698)


def test_a_network_of_many_parameters_takes_seconds() -> None:
    started = time.process_time()
    transforms.has_derivatives(MAF(2).double().eval())
    assert time.process_time() - started < 10  # parameter by parameter this would take minutes


class Heavy(Flow):
    """y = sinh(1.5 x), whose rarest draws are five hundred times as far out as most."""

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
def test_a_broken_law_is_named_with_its_error_and_place(make: type[Flow], message: str) -> None:
    with pytest.raises(BrokenLawError, match=message):
        check_transform(make, dimensions=(2,), identity=make is not Forgetful)


# -- transforms of torch and Pyro --------------------------------------------------------------------------------------


class Stretch(TransformModule):
    """y = exp(a) x, whose parts subclasses get wrong."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, input_dim: int) -> None:
        super().__init__(cache_size=1)
        self.a = nn.Parameter(torch.zeros(input_dim))

    def _call(self, x: Tensor) -> Tensor:
        return x * self.a.exp()

    def _inverse(self, y: Tensor) -> Tensor:
        return y / self.a.exp()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a.sum().expand(x.shape[:-1])


class Mirrored(Stretch):
    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -super().log_abs_det_jacobian(x, y)


class Beside(Stretch):
    def _inverse(self, y: Tensor) -> Tensor:
        return super()._inverse(y) + 0.01


class ByColumn(Stretch):
    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a.expand(x.shape)


class OfTheBatch(Stretch):
    def _call(self, x: Tensor) -> Tensor:
        return super()._call(x if x.dim() < 2 else x - x.mean(0))


class Stored(Stretch):
    def _call(self, x: Tensor) -> Tensor:
        self.stored = x
        return x + x**3

    def _inverse(self, y: Tensor) -> Tensor:
        return self.stored

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return (1 + 3 * self.stored**2).log().sum(-1)


class Widened(Stretch):
    def _call(self, x: Tensor) -> Tensor:
        return super()._call(x).double()


class Univariate(Stretch):
    domain = codomain = constraints.real


class Signed(Stretch):
    codomain = constraints.independent(constraints.positive, 1)


class Detached(Stretch):
    def _call(self, x: Tensor) -> Tensor:
        return x * self.a.exp().detach()


class Noisy(Stretch):
    def _call(self, x: Tensor) -> Tensor:
        return super()._call(x) + 0.1 * torch.randn_like(x)


class Unfinished(Stretch):
    log_abs_det_jacobian = Transform.log_abs_det_jacobian  # type: ignore[assignment]


WRONG: dict[Callable[[int], Any], str] = {
    Mirrored: '"has the log-determinant of its Jacobian": got .*, at the input',
    Beside: r'"inverts, x to y and back": .* off by 0\.01',
    ByColumn: r"for x of \(2,\) and a domain of event_dim 1 log_abs_det_jacobian is of \(2,\), not \(\)",
    OfTheBatch: '"maps batches of its domain to its codomain": got',
    Stored: '"remembers nothing that is wrong": got',
    Widened: r"y and log_abs_det_jacobian are torch\.float64 and torch\.float32, x torch\.float32",
    Univariate: r"event_dim 0 log_abs_det_jacobian is of \(4,\), not \(4, 2\)",
    Signed: "y = .* is not in IndependentConstraint",
    Detached: '"has the derivatives of differences, from x to y": Jacobian mismatch',
    Noisy: '"maps batches of its domain to its codomain": got',
    Unfinished: "it is bijective and has no log_abs_det_jacobian",
    pyro_transforms.neural_autoregressive: '"remembers nothing that is wrong"',
    pyro_transforms.sylvester: '"has the log-determinant of its Jacobian"',
    lambda d: pyro_transforms.ELUTransform(): "is not in GreaterThan",
}


@pytest.mark.parametrize(("make", "message"), WRONG.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_wrong_transforms_of_other_packages_are_detected(make: Callable[[int], Any], message: str) -> None:
    with pytest.raises(BrokenLawError, match=message):
        check_transform(make, dimensions=(2,))


RIGHT: dict[str, Callable[[int], Any]] = {
    "module": Stretch,
    "spline": pyro_transforms.Spline,
    "no inverse": pyro_transforms.Planar,
    "random": pyro_transforms.permute,
    "coupling": lambda d: pyro_transforms.affine_coupling(d, hidden_dims=[4]),
    "more outputs": lambda d: StickBreakingTransform(),
    "not bijective": lambda d: SoftmaxTransform(),
    "numbers": lambda d: ExpTransform(),
    "composed": lambda d: ComposeTransform([pyro_transforms.Spline(d), SigmoidTransform()]),
}


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_correct_transforms_of_other_packages_pass(make: Callable[[int], Any]) -> None:
    check_transform(make, dimensions=(2,))


def test_conditional_transforms_of_others_are_to_be_conditioned() -> None:
    with pytest.raises(TypeError, match=r"got ConditionalPlanar: condition a conditional one"):
        check_transform(lambda d: pyro_transforms.conditional_planar(d, 2))


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


class Plain(TorchDistribution):
    """Standard normal, with methods that subclasses get wrong."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, input_dim: int, batch_shape: Any = ()) -> None:
        super().__init__(torch.Size(batch_shape), torch.Size([input_dim]))

    def expand(self, batch_shape: Any, _instance: object = None) -> Any:
        return type(self)(self.event_shape[0], batch_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.randn(*sample_shape, *self.batch_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return dist.Normal(0.0, 1.0).log_prob(value).sum(-1)


class Repeated(Plain):
    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Unseeded(Plain):
    def sample(self, sample_shape: Any = ()) -> Tensor:
        generator = torch.Generator()
        generator.seed()
        return torch.randn(*sample_shape, *self.batch_shape, *self.event_shape, generator=generator)


class Constant(Plain):
    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value.detach()) + 0 * value.sum(-1)


class Mixed(Plain):
    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value).double()


class Narrow(Plain):
    def expand(self, batch_shape: Any, _instance: object = None) -> Any:
        return self


class Positive(Plain):
    support = constraints.independent(constraints.positive, 1)


class Numbers(Plain):
    support = constraints.real


DENSITIES: dict[str, Callable[[int], Any]] = {
    "normal": lambda d: dist.Normal(torch.zeros(d), 1.0).to_event(1),
    "gamma": lambda d: dist.Gamma(torch.full((d,), 2.0), 1.0).to_event(1),
    "heavy": lambda d: dist.StudentT(2.0, torch.zeros(d), 1.0).to_event(1),
    "simplex": lambda d: dist.Dirichlet(torch.full((d + 1,), 2.0)),
    "mixture": lambda d: MADEMoG(d, hidden_dims=[8]),
    "shares": lambda d: FlowPrior(MAF(d, **SIZE), support="unit_interval"),
}


@pytest.mark.parametrize("make", DENSITIES.values(), ids=DENSITIES)
def test_correct_densities_pass(make: Callable[[int], Any]) -> None:
    check_density(make)


FAULTS = {
    Repeated: '"draws by the seed of torch": it draws the same numbers twice',
    Unseeded: '"draws by the seed of torch": draws differ after the same seed',
    Constant: '"has the gradient of differences": off by',
    Mixed: r"draws are torch\.float32, their log-densities torch\.float64",
    Narrow: r"expand\(\[3\]\) draws \(3,\), not \(3, 3\)",
    Positive: r"it draws \[.*\], outside of its support",
    Numbers: r"the support Real\(\) has event_dim 0, the event_shape is \(3,\)",
}


@pytest.mark.parametrize(("kind", "message"), FAULTS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_errors_of_densities_of_any_dimension_are_detected(kind: Any, message: str) -> None:
    check_density(Plain, dimensions=[3])
    with pytest.raises(BrokenLawError, match=message):
        check_density(kind, dimensions=[3])


@pytest.mark.parametrize(("kind", "law"), [(Lifted, "integrates to 1"), (Wide, "draws from its density")])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_wrong_densities_are_detected(kind: Any, law: str, dimensions: int) -> None:
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
def test_correct_guides_pass(make: Any) -> None:
    check_guide(model, lambda model: make(model, **(SMALL if make in GUIDES else {})))


def test_an_evidence_that_differs_by_a_tenth_of_a_nat_is_refused() -> None:
    with pytest.raises(BrokenLawError, match=r'"estimates the evidence": off by 0\.(1|09)'):
        check_guide(independent, AutoIAF, log_evidence=0.1)


def test_a_guide_that_omits_a_site_is_detected() -> None:
    with pytest.raises(BrokenLawError, match=r"^AutoNormal breaks the law .* z of the model is not drawn"):
        check_guide(model, lambda model: AutoNormal(poutine.block(model, hide=["z"])))


def plates() -> None:
    scale = pyro.sample("scale", dist.Gamma(3.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("z", dist.Normal(0.0, scale))


class ByHand(pyro.nn.PyroModule):
    """A guide for `plates`, whose sites subclasses get wrong."""

    def __init__(self, model: object) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))

    def scale(self) -> None:
        pyro.sample("scale", dist.LogNormal(self.loc[0], 0.5))

    def forward(self) -> None:
        self.scale()
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(self.loc[1], 1.0))


class Outside(ByHand):
    def scale(self) -> None:
        pyro.sample("scale", dist.Normal(self.loc[0] - 5, 0.1))


class Shaped(ByHand):
    def scale(self) -> None:
        pyro.sample("scale", dist.LogNormal(self.loc[:1], 0.5))


class More(ByHand):
    def scale(self) -> None:
        super().scale()
        pyro.sample("more", dist.Normal(0.0, 1.0))


class Same(ByHand):
    def scale(self) -> None:
        torch.manual_seed(0)
        super().scale()


class Unreached(ByHand):
    def __init__(self, model: object) -> None:
        super().__init__(model)
        self.other = nn.Parameter(torch.zeros(()))


WRONG_GUIDES = {
    Outside: "scale is outside of its support",
    Shaped: r"scale has shape and dtype \(\(1,\), torch\.float32\), the model's \(\(\), torch\.float32\)",
    More: "more is neither in the model nor marked as is_auxiliary",
    Same: '"draws anew each time": scale, z are the same in two draws',
    Unreached: "no gradient reaches other",
}


@pytest.mark.parametrize(("make", "message"), WRONG_GUIDES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_wrong_guides_are_detected(make: Any, message: str) -> None:
    check_guide(plates, ByHand)
    with pytest.raises(BrokenLawError, match=message):
        check_guide(plates, make)
