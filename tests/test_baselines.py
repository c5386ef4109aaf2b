"""Gain of a flow over simple densities of the same rows, in the same units, and a warning if there is none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sklearn.neighbors import KernelDensity
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_maf import MAF, ConditionalMAF, fit
from pyro_maf.report import write_report
from pyro_maf.training import FitResult
from pyro_maf.training.baselines import Comparison
from tests.fits import seeded

SMALL: dict[str, Any] = {"num_layers": 1, "hidden_dims": [8]}
NOTHING: dict[str, Any] = {"max_epochs": 1, "learning_rate": 1e-9, "progress": False}


def clusters(rows: int = 2000) -> Tensor:
    noise = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))
    return 100 + 20 * (noise / 5 + torch.tensor([[-1.0, 0.0], [1.0, 1.0]]).repeat(rows // 2, 1))


def maf(dim: int = 2) -> MAF:
    return seeded(lambda: MAF(dim, **SMALL))


def compared(result: FitResult) -> tuple[Comparison, dict[str, float]]:
    comparison = result.comparison
    assert comparison is not None
    return comparison, {each.name: each.mean for each in comparison.baselines}


def test_baselines_are_those_of_closed_form_and_of_scikit_learn() -> None:
    rows = clusters()
    result = fit(maf(), rows, **NOTHING)
    comparison, means = compared(result)
    training, test = (part.data.double() for part in (result.training_rows, result.test_rows))  # type: ignore[union-attr]
    assert (comparison.role, comparison.rows, len(training)) == ("test", 200, 1600)
    assert comparison.mean == pytest.approx(result.test.mean, abs=1e-5)  # type: ignore[union-attr]
    gaussian = MultivariateNormal(training.mean(0), training.T.cov()).log_prob(test).mean()
    assert means["Gaussian"] == pytest.approx(float(gaussian), abs=0.01)
    truth = -math.log(2) - 2 * math.log(20 / 5) - math.log(2 * math.pi) - 1
    assert means["mixture of Gaussians"] == pytest.approx(truth, abs=0.1)
    standard = (training - training.mean(0)) / training.std(0)
    bandwidths = [factor * 1600 ** (-1 / 6) for factor in (0.3, 0.45, 0.65)]
    scores = [
        KernelDensity(bandwidth=width).fit(standard).score((test - training.mean(0)) / training.std(0)) / 200
        for width in bandwidths
    ]
    best = max(scores) - float(training.std(0).log().sum())
    assert means["KDE"] == pytest.approx(best, abs=0.02)


def test_a_flow_that_is_behind_is_warned_of() -> None:
    result = fit(maf(), clusters(), **NOTHING)
    comparison, means = compared(result)
    (line,) = comparison.warnings
    assert line.startswith("fit is behind a simpler density, mixture of Gaussians, by ")
    gain = next(each.gain for each in comparison.baselines if each.name == "mixture of Gaussians")
    assert gain == pytest.approx(comparison.mean - means["mixture of Gaussians"], abs=1e-6)
    learnt = fit(clusters()[::8], max_epochs=20, progress=False)  # which starts as a mixture
    assert learnt.comparison.role == "validation"  # type: ignore[union-attr]
    assert learnt.comparison.warnings == []  # type: ignore[union-attr]


def test_a_context_is_regressed_on() -> None:
    generator = torch.Generator().manual_seed(0)
    context = 7 + 3 * torch.randn(1500, 1, generator=generator)
    rows = context * torch.tensor([[2.0, -1.0]]) + torch.randn(1500, 2, generator=generator)
    result = fit(
        seeded(lambda: ConditionalMAF(2, 1, **SMALL)), rows, context=context, weights=[1.0, 2.0] * 750, **NOTHING
    )
    _, means = compared(result)
    truth = -math.log(2 * math.pi) - 1
    assert all(mean == pytest.approx(truth, abs=0.15) for mean in means.values())
    assert set(means) == {"Gaussian", "mixture of Gaussians", "KDE"}


@pytest.mark.filterwarnings("ignore:fit found values on a grid")
def test_counts_and_categories_have_probabilities_in_all_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    count = torch.poisson(4 * torch.ones(1200), generator).numpy()
    kind = pd.Series(["a", "b", "c"]).iloc[torch.randint(3, (1200,), generator=generator).numpy()]
    frame = pd.DataFrame({"n": count, "kind": kind.to_numpy()})
    result = fit(frame, max_epochs=5, progress=False)
    comparison, means = compared(result)
    # The negative entropy bounds the score of any density, up to chance.
    poisson = torch.distributions.Poisson(4.0)
    truth = float(poisson.log_prob(torch.from_numpy(count)).mean()) - math.log(3)
    assert comparison.mean == pytest.approx(truth, abs=0.2)
    assert all(truth - 0.5 < mean < truth + 0.2 for mean in means.values())


def test_many_rows_have_no_kernel_density_and_few_columns_are_enough() -> None:
    rows = torch.randn(45_000, 1, generator=torch.Generator().manual_seed(0))
    result = fit(maf(1), rows, **NOTHING)
    comparison, means = compared(result)
    assert (comparison.rows, list(means)) == (1000, ["Gaussian", "mixture of Gaussians"])
    assert len(result.training_rows.data) == 2**15  # type: ignore[union-attr]


def test_the_end_of_a_bar_and_the_report_show_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="fit is behind a simpler density"):
        result = fit(maf(), clusters(), **{**NOTHING, "progress": "always"})
    line = str(compared(result)[0])
    assert line in capsys.readouterr().err
    write_report(tmp_path / "report.html", result, progress=False)
    page = (tmp_path / "report.html").read_text()
    assert f"Simpler densities on {line}" in page
    assert "fit is behind a simpler density" in page
