"""Results of fits: scoring and sampling rows in the form of the data."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

import pyro_maf
from pyro_maf import MAF, ConditionalFlowPrior, ConditionalMAF, FlowPrior, MADEMoG, fit, fit_prior
from pyro_maf.report import write_report
from pyro_maf.tables.layout import Layout, numbers
from tests.fits import SHARED

FRAME = pd.DataFrame(np.random.default_rng(0).normal(size=(200, 3)), columns=["a", "b", "c"])
ROWS = torch.tensor(FRAME[["a", "b"]].to_numpy())
QUICK: dict[str, Any] = {"max_epochs": 1, "progress": False}
FORMS: dict[str, Callable[[pd.DataFrame], Any]] = {
    "frame": lambda frame: frame,
    "wider frame in another order": lambda frame: FRAME[["c", "b", "a"]],
    "array": pd.DataFrame.to_numpy,
    "array of float32": lambda frame: frame.to_numpy(np.float32),
    "lists": lambda frame: frame.to_numpy().tolist(),
    "float64 tensor": lambda frame: torch.tensor(frame.to_numpy()),
    "float32 tensor": lambda frame: torch.tensor(frame.to_numpy(np.float32)),
    "dictionary": lambda frame: {"b": torch.tensor(frame["b"].to_numpy(copy=True)), "a": frame["a"].to_numpy()},
}


def flow(**options: Any) -> MAF:
    torch.manual_seed(0)
    return MAF(2, **{"num_layers": 1, "hidden_dims": [8], **options})


@pytest.fixture(scope="module")
def result() -> Any:
    return fit(flow(), FRAME[["a", "b"]], **QUICK)


@pytest.fixture(scope="module")
def given() -> Any:
    """The result of a conditional fit."""
    torch.manual_seed(0)
    return fit(ConditionalMAF(1, 2, num_layers=1), FRAME[["a"]], context=FRAME[["b", "c"]], **QUICK)


@pytest.mark.filterwarnings(SHARED)
def test_a_context_may_be_among_the_columns_of_data(given: Any, tmp_path: Path) -> None:
    model = ConditionalMAF(1, 2, num_layers=1)
    again = fit(model, FRAME[["a"]], context=FRAME[["b", "c"]], validation=FRAME[["c", "b", "a"]], **QUICK)
    assert np.allclose(again.validation_rows.context, FRAME[["b", "c"]])
    assert torch.equal(given.score(FRAME), given.score(FRAME, FRAME))
    write_report(tmp_path / "report.html", given, FRAME, progress=False)
    with pytest.raises(ValueError, match="write_report expected context in the order of the data"):
        write_report(tmp_path / "report.html", given, FRAME, context=FRAME[::-1], progress=False)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_score_and_log_prob_take_what_fit_took(result: Any, form: Callable[[Any], Any]) -> None:
    rows = form(FRAME[["a", "b"]])
    with torch.no_grad():
        expected = result.density.log_prob(ROWS.float())
    score = result.score(rows)
    assert score.numpy().shape == (200,)
    assert torch.allclose(score, expected, rtol=1e-6)
    assert torch.allclose(result.density.log_prob(rows).detach(), expected, rtol=1e-6)


@pytest.mark.filterwarnings(SHARED)
def test_score_is_in_the_units_of_the_table_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = 1000 + 0.5 * FRAME[["a", "b"]]
    result = fit(flow(), frame, validation=frame, **QUICK)
    whole = result.score(frame)
    assert whole.mean().item() == pytest.approx(result.validation_log_likelihood, abs=1e-4)
    monkeypatch.setattr("pyro_maf.training.scores.VALUES_AT_ONCE", 100)
    assert torch.allclose(result.score(frame), whole, atol=1e-5)
    assert result.score(frame[:0]).shape == (0,)


def test_score_of_a_context_finds_its_columns_by_name_or_takes_them_apart(given: Any) -> None:
    rows, context = FRAME[["a"]], FRAME[["c", "b"]]
    expected = given.score(FRAME)
    assert torch.equal(given.score(rows, context), expected)
    assert torch.equal(given.score(rows["a"].tolist(), FRAME[["b", "c"]].to_numpy()), expected)
    at = given.density.condition(context)
    assert torch.allclose(at.log_prob(FRAME[["b", "a"]]).detach(), expected)
    positive = fit(flow(), FRAME[["a", "b"]].abs(), support={"a": "positive"}, **QUICK)
    assert torch.isneginf(positive.score(pd.DataFrame({"b": [1.0], "a": [-1.0]}))).all()


def test_one_row_is_scored_and_given_by_name() -> None:
    result = fit(flow(), FRAME[["a", "b"]], **QUICK)
    expected = result.score(FRAME[3:4])
    mixed = FRAME[["b", "a"]].assign(name="x").iloc[3]
    assert torch.equal(result.score(mixed), expected)
    assert torch.equal(result.score({"b": FRAME["b"][3], "a": torch.tensor(FRAME["a"][3])}), expected)
    given = fit(ConditionalMAF(1, 2, num_layers=1), FRAME[["a"]], context=FRAME[["b", "c"]], **QUICK)
    assert torch.equal(given.score(FRAME.iloc[3]), given.score(FRAME[3:4]))
    drawn = []
    for one in (FRAME.iloc[3], {"c": FRAME["c"][3], "b": FRAME["b"][3]}, FRAME[["b", "c"]].to_numpy()[3]):
        torch.manual_seed(0)
        drawn.append(given.sample(2, one))
    assert drawn[0].equals(drawn[1])
    assert drawn[0].equals(drawn[2])


def test_a_missing_number_of_one_row_scores_nan(result: Any) -> None:
    row = {"a": 0.0, "b": 0.0}
    assert not result.score(row).isnan().any()
    for missing in (None, np.nan):
        assert result.score({**row, "b": missing}).isnan().all()
    # Infinite values, also after conversion to the density's dtype, have density zero.
    for infinite in (np.inf, -np.inf, 1e300):
        assert torch.isneginf(result.score({**row, "b": infinite})).all()
        assert result.score({"a": np.nan, "b": infinite}).isnan().all()


def test_frames_that_were_shuffled_apart_are_refused() -> None:
    shuffled, context = FRAME[["a"]][::-1], FRAME[["b", "c"]]
    refusal = "in the order of the {}, got an index with the same labels in another order: sort one as the other"
    given = fit(ConditionalMAF(1, 2, num_layers=1), FRAME[["a"]], context=context, **QUICK)
    with pytest.raises(ValueError, match="fit expected context " + refusal.format("data")):
        fit(ConditionalMAF(1, 2), shuffled, context=context)
    with pytest.raises(ValueError, match="fit expected validation context " + refusal.format("validation data")):
        fit(ConditionalMAF(1, 2), FRAME[["a"]], context=context, validation=(shuffled, context))
    with pytest.raises(ValueError, match="fit expected weights " + refusal.format("data")):
        fit(flow(), FRAME[["a", "b"]], weights=FRAME["c"].abs()[::-1])
    with pytest.raises(ValueError, match="score expected context " + refusal.format("rows")):
        given.score(shuffled, context)
    assert torch.equal(given.score(shuffled, context[::-1]), given.score(FRAME).flip(0))
    assert torch.equal(given.score(shuffled, context.to_numpy()[::-1]), given.score(FRAME).flip(0))


BAD = {
    "a column that is missing": (lambda r, g: r.score(FRAME[["a", "c"]]), "score expected rows with column 'b', as in"),
    "one of the context": (
        lambda r, g: g.score(FRAME[["a"]], FRAME[["b"]]),
        "score expected context with column 'c', as in the fit, got 'b'.",
    ),
    "another width": (lambda r, g: r.score(np.zeros((3, 3))), "score expected rows of shape (rows, 2), as in the fit"),
    "no context": (lambda r, g: g.score(FRAME[["a"]]), "score expected context with 2 columns, with the columns b, c"),
    "too much context": (lambda r, g: r.score(FRAME, FRAME), "score got context for a density that takes none"),
    "another length": (lambda r, g: g.score(FRAME, FRAME[:3]), "as many rows of context as of rows, got 3 and 200."),
    "contexts of samples": (
        lambda r, g: g.sample(3, FRAME[:2]),
        "sample expected context of 1 row, for all draws, or of 3, one for each, got 2.",
    ),
    "a context of another width": (
        lambda r, g: g.sample(3, np.zeros((1, 3))),
        "sample expected context of shape (1, 2) or (3, 2), got (1, 3).",
    ),
    "a context that is missing": (
        lambda r, g: g.sample(3, {"b": 1.0, "c": None}),
        "sample expected finite context, got a missing or infinite value in row 0, column 'c'.",
    ),
    "names for a context": (
        lambda r, g: fit(FRAME, context=["a", "b"]),
        "fit expected context to be a tensor, array or data frame of numbers, got list of <U1: pass the columns, as "
        "frame[['a', 'b']].",
    ),
    "a column twice": (
        lambda r, g: fit(FRAME, context=FRAME[["b"]]),
        "fit expected other columns of data than of context, got 'b' in both: leave it out of the data, as by "
        "frame.drop(columns=['b']).",
    ),
    "text": (lambda r, g: r.score(FRAME.assign(a="x")), "score expected rows of numeric columns, got column 'a'"),
    "log_prob": (lambda r, g: r.density.log_prob(FRAME[["a"]]), "FlowPrior expected value with column 'b', as in"),
    "unpack": (lambda r, g: FlowPrior(flow()).unpack(torch.zeros(2)), "FlowPrior has no names for the columns"),
    "a class": (lambda r, g: fit(MAF, FRAME), "MAF is a class: build one of it, with a size, as fit(MAF(2), data)."),
    "swapped": (lambda r, g: fit(FRAME, MAF(2)), "got DataFrame. The model comes first: fit(model, data)."),
    "a support of none": (
        lambda r, g: fit_prior(FRAME, support={"d": "positive"}),
        "fit expected support of columns 'a', 'b', 'c', got one of 'd'.",
    ),
    "support of nothing": (
        lambda r, g: fit(flow(), FRAME[["a", "b"]], support={"a": "round"}),
        "fit expected support to be one of real, positive, unit_interval, ordered, angle, simplex",
    ),
    "validation": (
        lambda r, g: fit(flow(), FRAME[["a", "b"]], validation=FRAME[["a", "c"]]),
        "fit expected validation data with column 'b', as in the fit, got 'a', 'c'.",
    ),
    "draws of unequal number": (
        lambda r, g: fit_prior({"mu": torch.zeros(20), "b": torch.zeros(19, 2)}),
        "fit expected data as a dictionary of (rows, ...), as many rows each, got 'mu' of shape (20,), 'b' of shape",
    ),
    "large counts": (
        lambda r, g: g.density.condition(torch.tensor([2**24 + 1, 0])),
        "has float32 parameters, got context of int64",
    ),
}


@pytest.mark.parametrize(("ask", "message"), BAD.values(), ids=BAD.keys())
def test_inconsistent_rows_are_refused(result: Any, given: Any, ask: Callable[..., Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        ask(result, given)


def test_samples_have_the_form_and_the_names_of_the_data(result: Any, given: Any) -> None:
    drawn = result.sample(5)
    assert isinstance(drawn, pd.DataFrame)
    assert (list(drawn.columns), len(drawn)) == (["a", "b"], 5)
    assert isinstance(fit(flow(), ROWS, **QUICK).sample(4), Tensor)
    assert given.sample(6, context=FRAME[["b", "c"]][:1]).shape == (6, 1)
    assert given.sample(200, context=FRAME).shape == (200, 1)
    assert given.sample(3, context=[0.5, -0.5]).columns.tolist() == ["a"]
    series = fit(MAF(1, num_layers=1), FRAME["a"], **QUICK)
    assert series.sample(2).columns.tolist() == ["a"]
    assert torch.equal(series.score(FRAME), series.score(FRAME["a"]))
    numbered = fit(flow(), pd.DataFrame(ROWS.numpy()), **QUICK)
    assert numbered.sample(2).columns.tolist() == [0, 1]
    draws = fit(MAF(3, num_layers=1), {"mu": FRAME["c"], "b": ROWS}, **QUICK).sample(7)
    assert {name: tuple(values.shape) for name, values in draws.items()} == {"mu": (7,), "b": (7, 2)}


@pytest.mark.filterwarnings(SHARED)
def test_validation_rows_are_found_by_name(result: Any) -> None:
    again = fit(flow(), FRAME[["a", "b"]], validation=FRAME[["c", "b", "a"]][:50], **QUICK)
    expected = fit(flow(), ROWS, validation=ROWS[:50], **QUICK)
    assert again.validation_loss == expected.validation_loss
    torch.manual_seed(0)
    shuffled = FRAME[["c", "a", "b"]][:50]
    given = fit(
        ConditionalMAF(1, 2, num_layers=1),
        FRAME[["a"]],
        context=FRAME[["b", "c"]],
        validation=(shuffled, shuffled),
        **QUICK,
    )
    assert given.score(shuffled).mean().item() == pytest.approx(given.validation_log_likelihood, abs=1e-5)


# -- priors from draws -------------------------------------------------------------------------------------------------


def model() -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    slopes = pyro.sample("slopes", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(slopes.sum(), scale), obs=torch.tensor(1.0))


@pytest.mark.filterwarnings("ignore:fit found .* rows to repeat:UserWarning")
def test_a_prior_from_the_draws_of_a_posterior_gives_its_sites_back(tmp_path: Path) -> None:
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=60, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    prior = fit_prior(draws, support={"scale": "positive"}, **QUICK)
    assert prior.units.support.name == ("positive", "real", "real")
    values = prior.unpack(prior.sample((4,)))
    assert {name: tuple(value.shape) for name, value in values.items()} == {"scale": (4,), "slopes": (4, 2)}
    assert (values["scale"] > 0).all()
    packed = torch.cat([draws["scale"][:, None], draws["slopes"]], 1)
    assert torch.equal(prior.log_prob(draws), prior.log_prob(packed))
    assert torch.equal(prior.log_prob(dict(reversed(draws.items()))), prior.log_prob(packed))
    prior.save(tmp_path / "prior.safetensors")
    for twin in (pyro_maf.load(tmp_path / "prior.safetensors"), copy.deepcopy(prior), prior.expand([3])):
        assert twin.unpack(packed)["slopes"].shape == (60, 2)
        assert torch.equal(twin.log_prob(packed[0]), prior.expand(twin.batch_shape).log_prob(packed[0]))

    def later() -> Any:
        values = prior.unpack(pyro.sample("prior", prior))
        return pyro.sample("y", dist.Normal(values["slopes"].sum(), values["scale"]))

    assert later().shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_prior_of_draws_has_their_dtype(dtype: torch.dtype) -> None:
    draws = {"mu": torch.tensor(FRAME["c"]).to(dtype), "b": ROWS.abs().to(dtype)}
    prior = fit_prior(draws, support={"b": "positive"}, **QUICK)
    assert (prior.loc.dtype, prior.units.support.name) == (dtype, ("real", "positive", "positive"))


def test_a_support_may_be_given_by_the_name_or_number_of_a_column(tmp_path: Path) -> None:
    frame = FRAME.abs()
    for data, support in ((frame, {"b": "positive"}), (torch.tensor(frame.to_numpy()), {1: "positive"})):
        prior = fit_prior(data, support=support, **QUICK)
        assert prior.units.support.name == ("real", "positive", "real")
    built = FlowPrior(flow(), support={"b": "positive"}, columns=[("a", ()), ("b", ())])
    assert built.units.support.name == ("real", "positive")
    built.save(tmp_path / "built.safetensors")
    assert pyro_maf.load(tmp_path / "built.safetensors").units.support.name == ("real", "positive")
    everywhere = fit_prior(frame, support=dict.fromkeys("abc", "positive"), **QUICK)
    assert everywhere.units.support.name == "positive"
    shares = pd.DataFrame(np.random.default_rng(0).dirichlet([2.0] * 3, 50), columns=list("abc"))
    assert fit_prior(shares, support=dict.fromkeys("abc", "simplex"), **QUICK).input_dim == 2


def test_a_conditional_prior_is_saved_with_the_names_of_its_columns(given: Any, tmp_path: Path) -> None:
    given.density.save(tmp_path / "given.safetensors")
    loaded = pyro_maf.load(tmp_path / "given.safetensors")
    assert isinstance(loaded, ConditionalFlowPrior)
    at = loaded.condition(FRAME[["c", "b"]][:5])
    assert torch.equal(at.log_prob(FRAME[:5]), given.density.condition(FRAME[:5]).log_prob(FRAME[:5]))
    assert list(loaded.unpack(at.sample())) == ["a"]


@pytest.mark.parametrize("context", [torch.tensor([1, 2]), [1, 2], (1.0, 2.0), torch.tensor([1.0, 2.0]).double()])
def test_a_context_may_be_whole_numbers(given: Any, context: Any) -> None:
    expected = given.density.condition(torch.tensor([1.0, 2.0])).log_prob(torch.zeros(1))
    assert torch.equal(given.density.condition(context).log_prob(torch.zeros(1)), expected)
    single = fit_prior(FRAME[["a"]], context=FRAME[["b"]], **QUICK)
    assert torch.equal(single.condition(1).log_prob([0.5]), single.condition(torch.tensor([1.0])).log_prob([0.5]))


def test_the_advice_of_other_densities_and_flows_works() -> None:
    density = MADEMoG(2)
    for value in (FRAME[["a", "b"]], ROWS.numpy(), ROWS, ROWS.int()):
        with pytest.raises(TypeError) as error:
            density.log_prob(value)
        advice = str(error.value)
        converted = re.search(r"convert it with (.*)\.$", advice) or re.search(
            r"convert (value) with (\.to\(\S+\))", advice
        )
        assert converted is not None
        assert "int32" not in advice.partition("convert")[2]
        density.log_prob(eval("".join(converted.groups()), {"torch": torch, "value": value}))


def test_a_layout_names_numbered_columns() -> None:
    table = {"m": torch.arange(12.0).reshape(2, 2, 3), "n": np.arange(2)}
    layout = Layout.of(table)
    assert layout.labels == [*(f"m[{i},{j}]" for i in range(2) for j in range(3)), "n"]
    assert numbers("fit", "data", table)[1].tolist() == [6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 1.0]
    assert torch.equal(layout.entries(numbers("fit", "data", table))["m"], table["m"].double())
    with pytest.raises(ValueError, match=r"score expected rows 'n' of shape \(rows,\), got \(rows, 4\)"):
        layout.pick("score", "rows", {"m": table["m"], "n": np.zeros((2, 4))})


def test_a_report_finds_columns_by_name_and_takes_draws_apart(result: Any, tmp_path: Path) -> None:
    draws = {"b": torch.tensor(FRAME["b"]), "a": torch.tensor(FRAME["a"])}
    pages = []
    for rows in (FRAME[["a", "b"]], FRAME, draws):
        write_report(tmp_path / "page.html", result, rows, progress=False)
        pages.append((tmp_path / "page.html").read_bytes())
    assert pages[0] == pages[1] == pages[2]


def test_frames_of_other_libraries_have_their_names() -> None:
    """For pyarrow; polars has the same methods."""
    generator = np.random.default_rng(0)
    columns = {"low": generator.normal(0, 1, 60), "high": generator.normal(50, 1, 60)}
    table = pyarrow.table(columns)
    result = fit(table, max_epochs=1, progress=False)
    assert list(result.sample(2).columns) == ["low", "high"]
    torch.testing.assert_close(result.score(table.select(["high", "low"])), result.score(columns))
    other_order = table.select(["high", "low"])
    torch.testing.assert_close(result.density.log_prob(other_order), result.score(columns))
    given = fit(columns["low"][:, None] ** 2, context=table, max_epochs=1, progress=False)
    noise = given.density.condition(columns).noise(torch.zeros(60, 1))
    torch.testing.assert_close(given.density.condition(other_order).noise(torch.zeros(60, 1)), noise)


def test_series_of_other_libraries_may_be_texts() -> None:
    """For pyarrow; polars has the same method."""
    data, texts = np.random.default_rng(0).normal(size=(60, 1)), 30 * ["left", "right"]
    expected = fit(data, context=pd.Series(texts), max_epochs=1, progress=False)
    result = fit(data, context=pyarrow.array(texts), max_epochs=1, progress=False)
    scores = [each.score(data[:2], pyarrow.array(["right", "left"])) for each in (expected, result)]
    torch.testing.assert_close(*scores)
    assert result.sample(3, pyarrow.array(["left"])).shape == (3, 1)
