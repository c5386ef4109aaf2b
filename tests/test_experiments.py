"""The paper's models by name, its settings, and the comparison of models on a data set."""

from __future__ import annotations

import dataclasses
import io
import json

import pandas as pd
import pytest
import torch
from rich.console import Console
from torch.distributions import MultivariateNormal

from pyro_maf import ConditionalMAF, MAFMoG, RealNVP, load
from pyro_maf.datasets import Dataset, FigureOne, LogitPixels, read_table
from pyro_maf.distributions import ConditionalFlowPrior, FlowPrior
from pyro_maf.experiments import (
    FLOWS,
    ROWS,
    SETTINGS,
    Candidate,
    Comparison,
    Score,
    build,
    candidates,
    compare,
    comparison,
    divide,
    fit_gaussian,
    results,
)
from pyro_maf.transforms import ConditionalFlow

QUICK = {"max_epochs": 2, "progress": False}
SMALL = candidates(["Gaussian", "MADE", "MAF (5)"], hidden_dims=[[8]])


@pytest.fixture(scope="module")
def toy():
    return FigureOne().dataset(train=1000, validation=200, test=400)


def in_units(model):
    conditional = hasattr(model, "condition")
    return (ConditionalFlowPrior if conditional else FlowPrior)(model)


@pytest.mark.parametrize("flow", FLOWS)
def test_every_name_builds_a_model_that_scores_draws_and_is_saved(flow, tmp_path):
    density = in_units(build(flow, 3, num_layers=2, hidden_dims=[8]))
    y = density.sample((5,))
    assert density.log_prob(y).isfinite().all()
    density.save(tmp_path / "model.safetensors")
    torch.testing.assert_close(load(tmp_path / "model.safetensors").log_prob(y), density.log_prob(y))


@pytest.mark.parametrize("flow", FLOWS)
def test_every_name_has_a_conditional_form(flow, tmp_path):
    density = in_units(build(flow, 3, context_dim=2, num_layers=2, hidden_dims=[8]))
    context = torch.randn(5, 2)
    y = density.condition(context).sample()
    assert density.condition(context).log_prob(y).shape == (5,)
    density.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors").condition(context)
    torch.testing.assert_close(again.log_prob(y), density.condition(context).log_prob(y))


def test_options_reach_the_model():
    flow = build("realnvp", 4, num_layers=3, hidden_dims=[7], activation="tanh", batch_norm=True, networks="separate")
    assert isinstance(flow, RealNVP)
    assert len(flow) == 6
    assert len(flow[1].networks) == 2
    assert flow[1].networks[0].hidden_dims == (7,)
    assert flow[1].networks[0].activation == "tanh"
    made = build("made", 4, context_dim=2, num_layers=9, degrees="random", seed=5)
    assert isinstance(made, ConditionalMAF)
    assert len(made.flow) == 1
    assert made.flow[0].order.tolist() == [0, 1, 2, 3]
    assert not torch.equal(made.flow[0].made.degrees_0, build("made", 4, context_dim=2).flow[0].made.degrees_0)
    assert isinstance(build("maf-mog", 4), MAFMoG)


def test_weights_follow_the_seed_and_the_global_state_is_left_alone():
    before = torch.random.get_rng_state()
    first, again, other = (build("maf", 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    weight = "layers.0.made.layers.0.weight"
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_the_conditional_gaussian_moves_with_the_context():
    model = build("gaussian", 2, context_dim=1)
    assert isinstance(model, ConditionalFlow)
    with torch.no_grad():
        model.flow[1].networks[0].context_layers[0].weight.copy_(torch.tensor([[3.0], [-1.0], [0.0], [0.0]]))
    assert model.condition(torch.tensor([2.0]))(torch.zeros(2)).tolist() == [6.0, -2.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flow": "glow"}, "build expected flow to be one of maf, nsf, iaf"),
        ({"input_dim": 0}, "build expected input_dim of at least 1, got 0"),
        ({"context_dim": -1}, "build expected context_dim of at least 0, got -1"),
        ({"seed": -1}, "build expected seed of at least 0, got -1"),
    ],
)
def test_models_that_cannot_be_built_raise(options, message):
    with pytest.raises(ValueError, match=message):
        build(**{"flow": "maf", "input_dim": 2} | options)


def test_the_gaussian_has_the_mean_and_covariance_of_the_rows():
    rows = torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64) + 5
    density = fit_gaussian(rows)
    exact = MultivariateNormal(rows.mean(0), torch.cov(rows.T, correction=0))
    torch.testing.assert_close(density.log_prob(rows), exact.log_prob(rows))


def test_the_gaussian_given_a_class_has_its_mean_and_the_covariance_within_classes():
    label = torch.arange(60) % 3
    rows = torch.randn(60, 2, dtype=torch.float64) + torch.tensor([[0.0, 9.0], [4.0, 4.0], [-7.0, 1.0]])[label]
    context = torch.nn.functional.one_hot(label).double()
    means = torch.stack([rows[label == index].mean(0) for index in range(3)])
    exact = MultivariateNormal(means[label], torch.cov((rows - means[label]).T, correction=0))
    density = fit_gaussian(rows, context).condition(context)
    torch.testing.assert_close(density.log_prob(rows), exact.log_prob(rows))


def test_a_gaussian_without_a_density_is_refused():
    rows = torch.randn(50, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="got 50 rows in which column 1 follows from those before it"):
        fit_gaussian(rows[:, [0, 0, 1]])


def test_the_papers_settings_are_its_tables_and_appendix():
    assert {name: one.widths for name, one in SETTINGS.items()} == {
        "POWER": ((100,), (100, 100)),
        "GAS": ((100,), (100, 100)),
        "HEPMASS": ((512,), (512, 512)),
        "MINIBOONE": ((512,), (512, 512)),
        "BSDS300": ((512,), (512, 512), (1024,), (1024, 1024)),
        "MNIST": ((1024,), (1024, 1024)),
        "CIFAR-10": ((1024,), (1024, 1024), (2048,), (2048, 2048)),
    }
    gas = {one.name: one for one in SETTINGS["GAS"].candidates()}
    assert list(gas) == list(ROWS)
    assert (gas["MAF (10)"].activation, gas["RealNVP (5)"].activation) == ("tanh", "relu")
    assert (gas["MADE MoG"].learning_rate, gas["MAF MoG (5)"].learning_rate) == (1e-3, 1e-4)
    assert (gas["RealNVP (5)"].networks, gas["MAF (5)"].batch_norm) == ("separate", True)
    assert SETTINGS["CIFAR-10"].candidates(["MAF (5)"])[0].degrees == "random"
    assert SETTINGS["BSDS300"].published["MAF MoG (5)"] == 156.36
    assert SETTINGS["MNIST"].published == {}


def test_names_that_the_table_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"among Gaussian, MADE, .*, got MAF \(7\), NAF"):
        candidates(["MADE", "MAF (7)", "NAF"])
    with pytest.raises(ValueError, match="got none"):
        candidates([])


def test_models_are_scored_on_the_test_rows_and_set_against_the_best(toy):
    found = compare(toy, SMALL, **QUICK)
    gaussian, made, maf = found.scores
    torch.testing.assert_close(gaussian.log_prob, fit_gaussian(toy.train).log_prob(toy.test).double())
    assert (gaussian.epochs, gaussian.parameters, made.epochs) == (0, 5, 2)
    difference = found.best.log_prob - gaussian.log_prob
    ahead = found.best.ahead_of(gaussian)
    assert ahead.mean == pytest.approx(difference.mean().item())
    assert ahead.error == pytest.approx(2 * difference.std().item() / 20)
    assert found.best.test.mean == max(gaussian.test.mean, made.test.mean, maf.test.mean)
    assert found.missing == ()


def test_the_widths_with_the_best_validation_score_count():
    narrow, wide = candidates(["MADE"], hidden_dims=[[8], [16]])
    log_prob = torch.zeros(3, dtype=torch.float64)
    tried = (Score(narrow, log_prob, None, -1.0, 1, 1, 1.0, ""), Score(wide, log_prob - 9, None, -0.5, 1, 1, 1.0, ""))
    found = Comparison("any", 2, 0, (1, 1, 3), tried, {}, ())
    assert [score.candidate for score in found.scores] == [wide]


def test_stored_fits_are_read_back_bit_for_bit(toy, tmp_path, monkeypatch):
    first = compare(toy, SMALL, folder=tmp_path, **QUICK)
    monkeypatch.setattr(comparison, "fit", None)
    monkeypatch.setattr(comparison, "fit_gaussian", None)
    again = compare(toy, SMALL, folder=tmp_path, **QUICK)
    assert results.as_json(again) == results.as_json(first)
    density = load(tmp_path / "maf-5-8" / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(density.log_prob(toy.test).double(), first.scores[2].log_prob)


def test_fits_with_other_settings_are_neither_used_nor_overwritten(toy, tmp_path):
    compare(toy, SMALL[:2], folder=tmp_path, **QUICK)
    before = (tmp_path / "made-8" / "score.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"MADE in .*made-8 fitted with other options"):
        compare(toy, SMALL[1:2], folder=tmp_path, seed=1, **QUICK)
    moved = dataclasses.replace(toy, train=toy.train + 1)
    with pytest.raises(ValueError, match=r"Gaussian in .*gaussian fitted with other data"):
        compare(moved, SMALL[:1], folder=tmp_path, **QUICK)
    assert (tmp_path / "made-8" / "score.safetensors").read_bytes() == before


def test_damaged_scores_are_never_compared(toy, tmp_path):
    compare(toy, SMALL[:1], folder=tmp_path, **QUICK)
    file = tmp_path / "gaussian" / "score.safetensors"
    content = file.read_bytes()
    flipped = [
        content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        for place in range(0, len(content), len(content) // 40)
    ]
    for damaged in (b"", b"{}", content[:40], *flipped):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"compare found .*gaussian/score.safetensors"):
            compare(toy, SMALL[:1], folder=tmp_path, **QUICK)


def test_an_interrupted_comparison_keeps_its_fits_and_resumes(toy, tmp_path, monkeypatch):
    fit = comparison.fit

    def interrupted(*args, **options):
        return dataclasses.replace(fit(*args, **options), stop_reason="interrupted", interrupted=True)

    with monkeypatch.context() as patched:
        patched.setattr(comparison, "fit", interrupted)
        found = compare(toy, SMALL, folder=tmp_path, **QUICK)
    assert [score.candidate.name for score in found.scores] == ["Gaussian"]
    assert found.missing == ("MADE", "MAF (5)")
    assert compare(toy, SMALL, folder=tmp_path, **QUICK).missing == ()


def test_models_of_data_with_a_context_are_conditional_and_images_have_bits_per_pixel():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(2, (300,), generator=generator)
    context = torch.nn.functional.one_hot(label).float()
    pixels = LogitPixels(levels=4)
    levels = torch.randint(2, (300, 3), generator=generator) + 2 * label[:, None]
    rows = pixels.to_logits(pixels.dequantise(levels)).float()
    parts = [slice(0, 200), slice(200, 250), slice(250, 300)]
    given = Dataset("squares", *(rows[part] for part in parts), *(context[part] for part in parts), pixels=pixels)
    blind = Dataset("squares", given.train, given.validation, given.test, pixels=pixels)
    names = ["Gaussian", "MADE"]
    informed, uninformed = (compare(data, candidates(names, hidden_dims=[[8]]), **QUICK) for data in (given, blind))
    assert informed.context_dim == 2
    for one, other in zip(informed.scores, uninformed.scores, strict=True):
        assert one.bits.mean < other.bits.mean
    assert "bits per pixel" in results.as_markdown(informed)


def test_a_model_that_cannot_be_fitted_is_left_out_and_reported(toy):
    twice = dataclasses.replace(
        toy, train=toy.train[:, [0, 0]], validation=toy.validation[:, [0, 0]], test=toy.test[:, [0, 0]]
    )
    with pytest.warns(UserWarning, match="fit found that column 1 repeats column 0"):
        found = compare(twice, SMALL[:2], **QUICK)
    assert [score.candidate.name for score in found.scores] == ["MADE"]
    assert "column 1 follows from those before it" in found.failed["Gaussian"]


def test_columns_are_called_by_their_names(toy):
    frame = pd.DataFrame(toy.train.numpy()[:, [0, 0]], columns=["height", "width"])
    with pytest.warns(UserWarning, match="fit found that column 'width' repeats column 'height'"):
        compare(divide("twice", frame), SMALL[1:2], **QUICK)
    places = ["here", "there"] * (len(frame) // 2)
    table = read_table(io.BytesIO(frame.assign(place=places).to_csv(index=False).encode()), context=["place"])
    parts = divide("table", table)
    assert (parts.layout, parts.context_layout) == (table.layout, table.context_layout)
    assert parts.context_layout.encoded_labels == ["place=here", "place=there"]
    assert torch.equal(parts.train, divide("table", table.data, table.context).train)


def test_every_form_of_the_table_has_the_same_figures(toy):
    found = compare(toy, SMALL, **QUICK)
    published = {"MADE": -3.08}
    (first, second, _) = json.loads(results.as_json(found, published))["models"]
    assert (first["model"], first["published"], second["published"]) == ("Gaussian", None, -3.08)
    assert [first["test"], second["test"]] == [score.test.mean for score in found.scores[:2]]
    markdown = results.as_markdown(found, published).splitlines()
    assert len(markdown) == 2 + 3
    assert str(found).splitlines() == results.as_markdown(found).splitlines()
    assert "tensor" not in repr(found)
    assert f"**{found.best.candidate.name}**" in "".join(markdown)
    console = Console(width=200, file=io.StringIO())
    console.print(results.as_table(found, published))
    for score in found.scores:
        assert str(score.test) in console.file.getvalue()
        assert any(str(score.test) in line for line in markdown)
    assert "-3.08" in console.file.getvalue()
    assert Candidate("any", "maf").widths == ""


def test_a_table_is_cut_into_three_parts_that_share_no_row_and_keep_their_context():
    data = torch.arange(100).double()[:, None].expand(100, 2)
    parts = divide("rows", data.numpy(), data[:, :1].numpy(), test=0.2, validation=0.25, seed=3)
    sizes = [len(part) for part in (parts.train, parts.validation, parts.test)]
    assert sizes == [60, 20, 20]
    together = torch.cat([parts.train, parts.validation, parts.test])
    assert together[:, 0].sort().values.tolist() == list(range(100))
    assert torch.equal(parts.test[:, :1], parts.test_context)
    assert not torch.equal(together, divide("rows", data).train)


def test_copies_of_a_row_are_in_one_part_of_three():
    data = torch.arange(300.0)[:, None].expand(300, 2) // 3
    parts = divide("rows", data, data[:, :1], test=0.2, validation=0.25, seed=3)
    rows = [part[:, 0] for part in (parts.train, parts.validation, parts.test)]
    assert [len(part) for part in rows] == [3 * len(part.unique()) for part in rows] == [180, 60, 60]
    assert torch.equal(parts.validation[:, :1], parts.validation_context)


def test_data_frames_are_divided_as_arrays_are():
    frame = pd.DataFrame(torch.randn(100, 3).numpy(), columns=["a", "b", "c"])
    parts = divide("rows", frame[["a", "b"]], frame["c"])
    same = divide("rows", frame[["a", "b"]].to_numpy("float64"), frame[["c"]].to_numpy("float64"))
    assert torch.equal(parts.test, same.test)
    assert torch.equal(parts.test_context, same.test_context)
    with pytest.raises(ValueError, match="divide expected context in the order of the data, got an index with"):
        divide("rows", frame[["a", "b"]], frame["c"][::-1])


def test_a_column_far_from_zero_is_compared_as_one_that_is_not():
    rows = 0.1 * torch.randn(400, 2, dtype=torch.float64)
    near, far = (
        compare(divide("rows", rows + offset), candidates(["Gaussian", "MADE"]), max_epochs=2, progress=False)
        for offset in (0.0, 5.4e6)
    )
    for one, other in zip(near.scores, far.scores, strict=True):
        assert other.test.mean == pytest.approx(one.test.mean, abs=1e-3)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (100, {"test": 1.0}, "divide expected test as a fraction between 0 and 1, got 1.0"),
        (100, {"validation": 0}, "divide expected validation as a fraction between 0 and 1, got 0"),
        (12, {}, "got 12 rows, which make 10, 1 and 1"),
    ],
)
def test_data_that_cannot_be_divided_are_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        divide("rows", torch.randn(rows, 2), **options)
