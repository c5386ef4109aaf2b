"""Structure of the package: layers and their imports, lengths of modules, public names and docstrings."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import pyro_maf

PACKAGE = Path(pyro_maf.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))

LAYERS = (
    "_core",
    "saving",
    "constrained",
    "support",
    "univariate",
    "nn",
    "sweep.layout",
    "sweep.kernels",
    "sweep.torch_engine",
    "sweep",
    "transforms",
    "flows",
    "tables",
    "distributions",
    "infer.models",
    "infer.start",
    "infer.guides",
    "infer.diagnosis",
    "infer.fitting",
    "infer",
    "training",
    "sbi",
    "testing",
    "datasets",
    "plotting",
    "report",
    "experiments",
    "cli",
)
"""From the bottom up: a module imports from its own layer and those below."""

TOP_LEVEL = ("__init__", "__main__")
"""Modules that import from any layer."""

LAZY = ("lightning_fabric", "torch._dynamo", "matplotlib", "numba", "sklearn", "pandas", "pyarrow", "h5py")
"""Packages that `import pyro_maf` does not import."""

PUBLIC = {
    "pyro_maf": """MAF IAF RealNVP ConditionalMAF ConditionalIAF ConditionalRealNVP MADE MADEMoG MAFMoG FlowPrior
        fit fit_prior load""",
    "pyro_maf.nn": "MaskedLinear MADE degrees masks",
    "pyro_maf.transforms": """MaskedAutoregressive InverseAutoregressive Coupling BatchNorm ActNorm Permute
        LowerTriangularAffine Tails ConditionalMaskedAutoregressive ConditionalInverseAutoregressive
        ConditionalCoupling ConditionalLowerTriangularAffine""",
    "pyro_maf.distributions": "MADEMoG MAFMoG FlowPrior ConditionalMADEMoG ConditionalMAFMoG ConditionalFlowPrior",
    "pyro_maf.infer": "AutoMAF AutoIAF AutoRealNVP fit_guide diagnose reweight to_arviz neutra TracePath_ELBO",
    "pyro_maf.training": "fit fit_prior",
    "pyro_maf.sbi": "posterior_nn likelihood_nn FlowEstimator",
    "pyro_maf.datasets": "ARCHIVE power gas hepmass miniboone bsds300 mnist cifar10",
    "pyro_maf.plotting": "contours image_grid log_densities losses marginals noise pairs pit qq scatter",
    "pyro_maf.report": "write_report",
    "pyro_maf.testing": "check_transform check_density check_guide BrokenLawError",
}


def layer_of(path: Path) -> str:
    """The layer of a module: its folder, or its own name directly under the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return layer_in(parts) or parts[0]


def layer_in(parts: Sequence[str]) -> str:
    """The narrowest layer that contains a dotted name, given by its parts, or ""."""
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in LAYERS), "")


def imported(path: Path) -> Iterator[str]:
    """The layers that a module imports from, anywhere in its code; "" for the package itself."""
    package = ("pyro_maf", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            base = ".".join(filter(None, (start, node.module)))
            names = [f"{base}.{alias.name}" if base == "pyro_maf" else base for alias in node.names]
        for name in names:
            head, *rest = name.split(".")
            if head == "pyro_maf":
                yield layer_in(rest)


PROGRAM = f"""
import sys, torch, pyro_maf
print([name for name in {LAZY} if name in sys.modules])
flow = pyro_maf.MAF(2, num_layers=1)
pyro_maf.fit(flow, torch.randn(50, 2), max_epochs=1, progress=False)
print([name for name in ("lightning_fabric", "lightning", "torch._dynamo", "sympy") if name in sys.modules])
print([getattr(pyro_maf, name).__name__ for name in pyro_maf.PARTS])
"""


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """Lines that a fresh interpreter prints about the package."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_every_module_belongs_to_a_layer() -> None:
    assert {layer_of(path) for path in MODULES} <= {*LAYERS, *TOP_LEVEL}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_down(layer: str) -> None:
    # The topmost layer may import the package itself.
    allowed = (*LAYERS[: LAYERS.index(layer) + 1], *([""] if layer == LAYERS[-1] else []))
    upward = [
        f"{path.relative_to(ROOT)} imports from {name or 'the package itself'}"
        for path in MODULES
        if layer_of(path) == layer
        for name in imported(path)
        if name not in allowed
    ]
    assert upward == []


def test_imports_of_every_form_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    module = tmp_path / "nn" / "made.py"
    module.parent.mkdir()
    module.write_text(
        "import pyro_maf\nimport pyro_maf.flows\nfrom pyro_maf import load, training\nfrom ..sweep.layout import Step\n"
        "def late():\n    from pyro_maf.infer import guide\n    from . import masks\n    from .. import cli\n"
        "import pyro_maf.infer.start.modes\n"
    )
    assert sorted(imported(module)) == [
        "",
        "",
        "cli",
        "flows",
        "infer",
        "infer.start",
        "nn",
        "sweep.layout",
        "training",
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AutoIAF", "it is pyro_maf.infer.AutoIAF"),
        ("fit_guide", "it is pyro_maf.infer.fit_guide"),
        ("autoiaf", "it is pyro_maf.infer.AutoIAF"),
        ("realnvp", "it is pyro_maf.RealNVP"),
        ("MaskedAutoregressive", "it is pyro_maf.transforms.MaskedAutoregressive"),
        ("MaskedLinear", "it is pyro_maf.nn.MaskedLinear"),
        ("miniboone", "it is pyro_maf.datasets.miniboone"),
    ],
)
def test_the_error_for_a_name_of_a_subpackage_says_where_it_is(name: str, message: str) -> None:
    with pytest.raises(AttributeError, match=rf"^module 'pyro_maf' has no attribute '{name}': {message}$"):
        getattr(pyro_maf, name)


def test_an_unknown_name_raises_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'pyro_maf' has no attribute 'nonsense'$"):
        _ = pyro_maf.nonsense
    assert not hasattr(pyro_maf, "__nothing__")


def test_import_does_not_import_heavy_packages(printed: list[str]) -> None:
    assert printed[0] == "[]"


def test_a_fit_imports_neither_a_trainer_nor_the_compiler_of_torch(printed: list[str]) -> None:
    assert printed[1] == "[]"


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_exist(module: str) -> None:
    imported_module = importlib.import_module(module)
    for name in PUBLIC[module].split():
        assert hasattr(imported_module, name), f"{module} has no {name}"
        assert name in imported_module.__all__
        assert name in dir(imported_module)


def test_subpackages_are_attributes_of_the_package(printed: list[str]) -> None:
    assert printed[2] == str([f"pyro_maf.{name}" for name in pyro_maf.PARTS])
    with pytest.raises(AttributeError, match="module 'pyro_maf' has no attribute 'Maf'"):
        getattr(pyro_maf, "Maf")  # noqa: B009


def test_everything_public_is_documented() -> None:
    for module in PUBLIC:
        imported_module = importlib.import_module(module)
        for name in imported_module.__all__:
            value = getattr(imported_module, name)
            assert not callable(value) or value.__doc__, f"{module}.{name} has no docstring"


def test_types_are_published() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_begin_with_a_noun_or_an_imperative(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = (ast.get_docstring(node) or "-").split()[0]
            assert first not in ("What", "Where", "Whether", "Those", "Who"), f"{path.name}: {ast.get_docstring(node)}"
