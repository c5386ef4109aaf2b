"""Options that a class forwards: in its signature, errors and saved files."""

from __future__ import annotations

import copy
import inspect
import pickle
import pydoc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_maf
from pyro_maf import (
    IAF,
    MADE,
    MAF,
    NSF,
    ConditionalFlowPrior,
    ConditionalIAF,
    ConditionalMADEMoG,
    ConditionalMAF,
    ConditionalMAFMoG,
    ConditionalNSF,
    ConditionalRealNVP,
    FlowPrior,
    MADEMoG,
    MAFMoG,
    RealNVP,
    transforms,
)
from pyro_maf.distributions import ConditionalMixtureFlow, MixtureFlow
from pyro_maf.nn import MADEOptions, NetworkOptions

NETWORK = {"hidden_dims": None, "activation": "relu"}
MASKED = {**NETWORK, "degrees": "sequential", "seed": 0}
NETWORK_OF_LAYER = {**MASKED, "order": None}
LAYER = {**NETWORK_OF_LAYER, "univariate": "affine"}
STACK = {"num_layers": 5, "order": "reverse", "batch_norm": False}
MASKED_STACK = {**MASKED, **STACK, "linear": False}
FLOW = {**MASKED_STACK, "univariate": "affine"}
COUPLING = {**NETWORK, "mask": None, "univariate": "affine", "networks": "joint"}
AFFINE = {**NETWORK, "loc": None, "scale_tril": None}
PRIOR = {
    "support": "real",
    "loc": None,
    "scale": None,
    "tails": None,
    "columns": (),
    "context_loc": None,
    "context_scale": None,
    "context_net": None,
    "context_shape": (),
    "context_columns": (),
    "context_labels": (),
}
WITH_CONTEXT_DIM: dict[type, dict[str, Any]] = {
    MADE: {**NETWORK_OF_LAYER, "outputs_per_input": 1},
    MAF: FLOW,
    NSF: {**FLOW, "univariate": "spline"},
    IAF: FLOW,
    RealNVP: {**NETWORK, **STACK, "univariate": "affine", "networks": "joint", "seed": 0},
    MADEMoG: {**NETWORK_OF_LAYER, "num_components": 10},
    MAFMoG: {**MASKED_STACK, "num_components": 10},
    MixtureFlow: {**FLOW, "univariate": "spline", "num_components": 1, "num_beside": 0},
    transforms.MaskedAutoregressive: LAYER,
    transforms.InverseAutoregressive: LAYER,
    transforms.Coupling: COUPLING,
    transforms.LowerTriangularAffine: AFFINE,
}
CONDITIONAL: dict[type, type] = {
    ConditionalMAF: MAF,
    ConditionalNSF: NSF,
    ConditionalIAF: IAF,
    ConditionalRealNVP: RealNVP,
    ConditionalMADEMoG: MADEMoG,
    ConditionalMAFMoG: MAFMoG,
    ConditionalMixtureFlow: MixtureFlow,
    transforms.ConditionalMaskedAutoregressive: transforms.MaskedAutoregressive,
    transforms.ConditionalInverseAutoregressive: transforms.InverseAutoregressive,
    transforms.ConditionalCoupling: transforms.Coupling,
    transforms.ConditionalLowerTriangularAffine: transforms.LowerTriangularAffine,
}
OPTIONS = {
    **{cls: {**options, "context_dim": 0} for cls, options in WITH_CONTEXT_DIM.items()},
    **{cls: WITH_CONTEXT_DIM[plain] for cls, plain in CONDITIONAL.items()},
    FlowPrior: PRIOR,
    ConditionalFlowPrior: PRIOR,
}
each = pytest.mark.parametrize("cls", OPTIONS, ids=lambda cls: cls.__name__)


def built(cls: type, **options: Any) -> Any:
    """An instance of a class for three dimensions and, if conditional, two context features."""
    if cls is FlowPrior:
        return FlowPrior(MAF(3, num_layers=1), **options)
    if cls is ConditionalFlowPrior:
        return ConditionalFlowPrior(ConditionalMAF(3, 2, num_layers=1), **options)
    return cls(3, *([2] if cls in CONDITIONAL else []), **options)


@each
def test_a_signature_shows_every_option_with_its_default(cls: type) -> None:
    parameters = inspect.signature(cls).parameters.values()
    defaults = {
        parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty
    }
    assert defaults == OPTIONS[cls]
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters)
    assert all(parameter.annotation is not parameter.empty for parameter in parameters)


@each
def test_help_and_the_docstring_name_every_option(cls: type) -> None:
    heading = pydoc.plain(pydoc.render_doc(cls))
    for option in OPTIONS[cls]:
        assert f"{option}: " in heading
        assert option in (cls.__doc__ or "")


@each
def test_an_unknown_option_is_refused_in_one_line(cls: type) -> None:
    with pytest.raises(TypeError, match=rf"^{cls.__name__}\b.*'hidden_dim'[^\n]*$"):
        built(cls, hidden_dim=[8])


@pytest.mark.parametrize("cls", [NSF, ConditionalMAF, MixtureFlow, transforms.Coupling])
def test_the_error_for_a_spline_option_points_to_the_spline(cls: type) -> None:
    with pytest.raises(TypeError, match=r"'num_bins': use univariate=Spline\(num_bins=6\)\.$"):
        built(cls, num_bins=6)


def test_an_option_of_layers_is_one_of_stacks_and_conditional_forms() -> None:
    class Named(transforms.MaskedAutoregressive):
        def __init__(self, input_dim: int, *, context_dim: int = 0, activation: str = "tanh", **options: Any) -> None:
            super().__init__(input_dim, context_dim=context_dim, activation=activation, **options)

    class Stacked(MAF):
        layer_class = Named

    class ConditionalStacked(transforms.ConditionalForm):
        flow_class = Stacked

    assert inspect.signature(Stacked).parameters["activation"].default == "tanh"
    assert inspect.signature(ConditionalStacked).parameters["activation"].default == "tanh"
    assert ConditionalStacked(3, 2, num_layers=1).flow[0].made.activation == "tanh"


def test_an_option_of_another_network_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^RealNVP takes .*'degrees'"):
        RealNVP(3, degrees="random")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^ConditionalMAF takes .*: too many positional arguments"):
        ConditionalMAF(3, 2, [8])  # type: ignore[call-arg, misc]


def test_instances_have_the_signature_of_their_calls() -> None:
    assert list(inspect.signature(MAF(3, num_layers=1)).parameters) == ["x"]
    assert not hasattr(ConditionalMAF(3, 2, num_layers=1), "__signature__")


@pytest.mark.parametrize("options", [NetworkOptions, MADEOptions])
def test_typed_options_are_those_of_the_network(options: Any) -> None:
    assert {*inspect.get_annotations(MADE.__init__)} >= {*options.__annotations__}
    assert {*MASKED} == {*MADEOptions.__annotations__}


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize(
    "make",
    [
        lambda: MAF(3, num_layers=2, hidden_dims=[5], degrees="random", seed=3),
        lambda: ConditionalRealNVP(3, 2, num_layers=1, activation="elu", networks="separate"),
        lambda: MAFMoG(3, num_layers=2, hidden_dims=[4, 4], num_components=2, seed=5, order="random"),
        lambda: transforms.ConditionalMaskedAutoregressive(3, 2, hidden_dims=[7], order=[2, 0, 1]),
        lambda: ConditionalFlowPrior(ConditionalMAF(3, 2, num_layers=1), support=["real", "positive", "real"]),
    ],
)
def test_forwarded_options_are_part_of_the_architecture(
    make: Callable[[], Any], copied: Callable[[Any], Any], tmp_path: Path
) -> None:
    module = make()
    copied(module).save(tmp_path / "model.safetensors")
    again = pyro_maf.load(tmp_path / "model.safetensors")
    assert repr(again) == repr(module)
    assert again.architecture == module.architecture or "model" in module.architecture
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_the_options_of_a_user_defined_class_are_recorded_by_name(tmp_path: Path) -> None:
    class Deep(MAF):
        def __init__(self, input_dim: int, **options: Any) -> None:
            super().__init__(input_dim, num_layers=9, **options)

    Deep(2, hidden_dims=[3]).save(tmp_path / "deep.safetensors")
    assert list(inspect.signature(Deep).parameters) == ["input_dim", "options"]
    assert len(pyro_maf.load(tmp_path / "deep.safetensors")) == 9
