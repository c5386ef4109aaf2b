"""The report of a fit: contents of the page, which is self-contained, and errors if it cannot be written."""

from __future__ import annotations

import base64
import math
import re
import xml.etree.ElementTree as ElementTree
from datetime import date
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from pyro_maf import IAF, MAF, ConditionalMAF, RealNVP, plotting
from pyro_maf._core.checks import InputError
from pyro_maf.datasets import Table
from pyro_maf.distributions import ConditionalFlowPrior, FlowPrior, MADEMoG, MAFMoG
from pyro_maf.report import examination, kolmogorov, page, write_report
from pyro_maf.tables import MappedRows, Rows
from pyro_maf.tables.layout import Layout
from pyro_maf.tables.named_rows import named_rows
from pyro_maf.training import FitResult

SMALL = {"num_layers": 1, "hidden_dims": [8]}


class Page(HTMLParser):
    """Parser that collects the parts of a page."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags, self.rows, self.words = [], [], []
        self._in_style = self._in_cell = False
        self.feed(self.html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("td", "th") or (self._in_cell and tag == "span")
        self._in_style = tag == "style"

    def handle_data(self, data):
        if not self._in_style:
            self.words.append(data)
        if self._in_cell and data.strip():
            self.rows[-1].append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def figure(self, name):
        return re.search(rf"<dt>{name}</dt><dd><b>(.*?)</b>", self.html).group(1)

    def pictures(self):
        prefix = "data:image/svg+xml;base64,"
        return [base64.b64decode(image["src"].removeprefix(prefix)).decode() for image in self.all("img")]


def normal(rows, columns=2, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def result_of(density, **changes):
    given = {
        "density": density.eval(),
        "train_loss": (2.0, 1.5, 1.3),
        "validation_loss": (1.9, 1.4, 1.5),
        "best_epoch": 2,
        "validation_log_likelihood": -1.4,
        "seconds": 75.2,
        "stop_reason": "reached max_epochs (3)",
        "skipped_steps": 4,
    }
    return FitResult(**{**given, **changes})


def by_name(rows, names):
    """Columns of rows, by name."""
    return dict(zip(names, rows.unbind(1), strict=True))


def standard(columns=2, **options):
    """An untrained density in these units, a normal."""
    torch.manual_seed(0)
    return FlowPrior(MAF(columns, **SMALL), **options)


@pytest.fixture
def drawn(tmp_path):
    """A function that writes a report and parses its page."""

    def written(density, data, **options):
        path = tmp_path / "report.html"
        write_report(path, result_of(density), data, **options)
        return Page(path)

    return written


@pytest.fixture
def report(drawn, monkeypatch):
    """The same without plots, which take seconds, for tests of the text."""
    undrawn = {name: lambda *_, **__: None for name in plotting.__all__}
    monkeypatch.setattr(page, "plotting", SimpleNamespace(**undrawn))
    monkeypatch.setattr(page, "_embedded", lambda _, alt, note="": page.Picture("data:,", alt, note))
    return drawn


def test_the_page_is_self_contained_and_figures_have_alternative_texts(drawn):
    page = drawn(standard(), normal(300))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe"})
    assert "url(" not in page.html
    assert all(image["src"].startswith("data:") and image["alt"] for image in page.all("img"))
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link["href"] for link in page.all("a")} == {f"#{name}" for name in ids}


def test_the_headline_has_the_figures_of_the_fit_and_of_the_rows(report):
    density, data = standard(), normal(300)
    page = report(density, data)
    log_prob = density.log_prob(data).detach().double()
    error = 2 * float(log_prob.std()) / math.sqrt(300)
    assert page.figure("Log-likelihood of these rows") == f"{log_prob.mean():.3f} ± {error:.3f}"
    assert page.figure("Validation in the fit") == "-1.400"
    assert (page.figure("Epochs"), page.figure("Time")) == ("3", "1 min 15 s")
    assert page.figure("Stopped") == "reached max_epochs (3)"
    assert "4 steps skipped" in page.text
    parameters = sum(parameter.numel() for parameter in density.parameters())
    assert (page.figure("Rows"), page.figure("Parameters")) == ("300", f"{parameters:,}")
    assert "best: 2" in page.text
    assert "float32" in page.text


def test_a_correct_density_is_not_criticised(report):
    page = report(standard(3), normal(2000, 3))
    assert "Nothing in these rows speaks against the model" in page.text


@pytest.mark.parametrize(
    ("scale", "shift", "words"),
    [
        (2.0, 0.0, "too wide"),
        (0.5, 0.0, "too narrow"),
        (1.0, -0.5, "lie above where"),
        (1.0, 0.5, "lie below where"),
    ],
)
def test_the_kind_of_error_of_a_wrong_density_is_reported(report, scale, shift, words):
    density = standard(1, scale=torch.tensor([scale]), loc=torch.tensor([shift]))
    page = report(density, by_name(normal(2000, 1), ["height"]))
    assert "Chance does not account" in page.text
    assert re.search(rf"that of height, where .*{words}", page.text)


def test_dependence_between_dimensions_is_detected_by_the_radius(report):
    first = normal(2000, 1)
    page = report(standard(2), torch.cat([first, first], 1))
    assert "that of |u|²" in page.text


def test_the_rows_of_least_density_come_first_with_their_numbers(report):
    data = normal(400)
    data[123] = torch.tensor([0.5, -9.0])
    data[7] = torch.tensor([7.0, 0.25])
    density = standard()
    header, *rows = report(density, by_name(data, ["height", "weight"])).rows
    assert header == ["row", "log-density", "furthest", "noise", "height", "weight"]
    log_prob = density.log_prob(data).detach()
    assert [int(row[0]) for row in rows] == (log_prob.argsort()[:10] + 1).tolist()
    assert rows[0] == ["124", f"{log_prob[123]:.2f}", "weight", "-9.0", "0.5", "-9"]
    assert rows[1][2:] == ["height", "+7.0", "7", "0.25"]


def test_numbers_are_shown_with_as_many_digits_as_tell_them_apart(report):
    units = {"loc": torch.tensor([5.4e6, 1.7e9]).double(), "scale": torch.tensor([0.1, 10.0]).double()}
    data = normal(400).double() * units["scale"] + units["loc"]
    data[123] = units["loc"] + torch.tensor([0.9, 3.0])
    _, *rows = report(FlowPrior(RealNVP(2, **SMALL), **units), by_name(data, ["northing", "time"])).rows
    assert rows[0][4:] == ["5400000.9", "1700000003"]


@pytest.mark.parametrize(
    ("make", "columns"),
    [
        (lambda: FlowPrior(IAF(3, **SMALL)), 3),
        (lambda: FlowPrior(RealNVP(3, **SMALL), support=["positive", "real", "unit_interval"]), 3),
        (lambda: FlowPrior(RealNVP(2, **SMALL), support="simplex"), 3),
        (lambda: FlowPrior(MADEMoG(2, hidden_dims=[8], num_components=3)), 2),
        (lambda: FlowPrior(MAFMoG(2, num_components=3, **SMALL)), 2),
        (lambda: FlowPrior(MAF(1, **SMALL).double(), support="positive"), 1),
    ],
    ids=["IAF", "columns' own supports", "simplex", "MADEMoG", "MAFMoG", "one column, float64"],
)
def test_every_kind_of_density_is_right_about_its_own_draws(report, make, columns, monkeypatch):
    """Draws differ between versions of torch, so at most one of a million seeds may fail.

    At that level 1,600 rows have the power of 400 at the usual one.
    """
    monkeypatch.setattr(kolmogorov, "LEVEL", 1e-6)
    torch.manual_seed(0)
    density = make()
    page = report(density, density.sample((1600,)))
    assert page.figure("Columns") == str(columns)
    assert "Nothing in these rows speaks against the model" in page.text
    assert ("pairs" in {attributes.get("id") for attributes in page.all("h2")}) == (columns > 1)


def test_samples_of_a_conditional_density_are_drawn_at_the_contexts_of_the_data():
    torch.manual_seed(0)
    flow = ConditionalMAF(2, 1, num_layers=1, hidden_dims=[], activation="tanh")
    density = ConditionalFlowPrior(flow)
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.fill_(0.5)
    context = torch.linspace(-3, 3, 3000)[:, None]
    data = density.condition(context).sample()
    looked = examination.examine(density, named_rows("write_report", data, context))
    of_data, of_samples = (
        torch.corrcoef(torch.cat([rows.double(), context.double()], 1).T)[:2, 2] for rows in (data, looked.samples)
    )
    assert torch.allclose(of_samples, of_data, atol=0.05)
    assert of_data.abs().min() > 0.3
    assert not kolmogorov.calibration_of(looked.noise, ["u1", "u2"]).departs


def named_table(rows=200):
    """A table with a category, a number and a positive column, some of whose rows were left out."""
    colours = ["blue", "red"]
    label = torch.arange(rows) % 2
    context = torch.stack([1 - label, label, label * 0.5 + normal(rows, 1, 1)[:, 0]], 1).float()
    return Table(
        data=normal(rows).exp().numpy(),
        context=context.numpy(),
        layout=Layout.named([("length", ()), ("width", ())]),
        context_layout=Layout.named([("colour", ()), ("age", ())], [colours, None])._replace(one_hot=True),
        label="wine.csv",
        rows=np.arange(rows) * 2 + 1,
    )


def conditional():
    torch.manual_seed(0)
    return ConditionalFlowPrior(ConditionalMAF(2, 3, **SMALL), support="positive")


def test_a_named_table_gives_its_name_its_categories_and_its_rows(report):
    rows = named_table()
    density = conditional()
    page = report(density, rows)
    assert f"<h1>wine.csv: MAF of 2 columns given 2 context columns, {date.today()}</h1>" in page.html
    assert f"<title>wine.csv: MAF of 2 columns given 2 context columns, {date.today()}</title>" in page.html
    header, *lowest = page.rows
    assert header[-4:] == ["length", "width", "colour", "age"]
    with torch.no_grad():
        log_prob = density.condition(torch.tensor(rows.context)).log_prob(torch.tensor(rows.data))
    for row, place in zip(lowest, log_prob.argsort().tolist(), strict=False):
        assert int(row[0]) == 2 * place + 1
        assert row[-2:] == [["blue", "red"][place % 2], f"{rows.context[place, 2]:.4g}"]
    with pytest.raises(ValueError, match="got a context with a Table"):
        report(density, rows, context=normal(200, 3))
    rows.data[3, 1] = math.nan
    with pytest.raises(InputError, match=r"got nan in data row 7 \(counted from 1\), column width") as refused:
        report(density, rows)
    assert (refused.value.row, refused.value.column) == (3, 1)


@pytest.mark.parametrize(
    ("places", "value", "note"),
    [(torch.arange(80), "80 of 800", "also chose the epoch"), (None, "80", "also chose the epoch")],
)
def test_the_rows_that_were_held_out_are_called_so_and_scored_once(tmp_path, places, value, note):
    held_out = normal(80)
    result = result_of(standard(), validation_rows=Rows(held_out, None), validation_places=places, rows=800)
    write_report(tmp_path / "report.html", result, held_out)
    page = Page(tmp_path / "report.html")
    assert page.figure("Rows") == value
    assert note in page.text
    assert page.figure("Log-likelihood of validation rows")
    assert "Validation in the fit" not in page.text
    write_report(tmp_path / "report.html", result, held_out + 1)
    assert "Validation in the fit" in Page(tmp_path / "report.html").text


def test_panels_per_row_are_limited_for_small_screens(drawn):
    page = drawn(standard(4), normal(300, 4))
    assert "min-width" not in page.html.replace("@media", "")
    assert not re.search(r"img[^}]*max-width: \d+rem", page.html)
    marginals = next(picture for picture in page.pictures() if ">samples<" in picture)
    width = float(re.search(r'width="([\d.]+)pt"', marginals).group(1))
    assert width < 420


def test_a_conditional_report_has_the_context_of_the_lowest_rows(report):
    torch.manual_seed(0)
    density = ConditionalFlowPrior(ConditionalMAF(2, 2, **SMALL))
    page = report(density, normal(50), context=by_name(normal(50, 2, 1), ["dose", "age"]))
    assert page.rows[0][-4:] == ["x1", "x2", "dose", "age"]
    assert "given 2 context columns" in page.text
    row = page.rows[1]
    assert row[-1] == f"{normal(50, 2, 1)[int(row[0]) - 1, 1]:.4g}"


def test_names_are_escaped(drawn):
    bad = ["<script>alert(1)</script>", '"><img onerror=x> $a^{$ \x00']
    page = drawn(standard(), by_name(normal(60), bad), command="fit </code><script>x</script> && echo $HOME")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script"})
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert "fit </code><script>x</script> && echo $HOME" in page.text
    for picture in page.pictures():
        assert all(not element.tag.endswith("script") for element in ElementTree.fromstring(picture).iter())


def test_names_with_glyphs_missing_in_the_font_are_rendered_by_the_browser(drawn):
    page = drawn(standard(), by_name(normal(60), ["身長", "体重 $kg$"]))
    assert sum("身長" in picture and "体重 $kg$" in picture for picture in page.pictures()) == 4


def test_a_wide_table_says_what_it_leaves_out(report):
    data = normal(300, 30)
    data[:, 29] = data[:, 4] + 0.1 * normal(300, 1, 1)[:, 0]
    page = report(standard(30), data)
    assert "24 of 30 columns, those whose data and samples differ most" in page.text
    assert "12 of 31 panels, those that are furthest from uniform" in page.text
    assert re.search(r"6 of 30 columns, the most correlated: .*x5, .*x30\.", page.text)
    assert "18 more columns are left out" in page.text


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_handful_of_rows_is_enough_for_a_page(report, rows):
    page = report(standard(7), normal(rows, 7))
    assert page.figure("Rows") == str(rows)
    assert ("±" in page.figure("Log-likelihood of these rows")) == (rows > 1)
    assert "2,000 samples" in page.text or "2,002 samples" in page.text


def test_a_single_row_is_enough_for_pictures(drawn):
    assert len(drawn(standard(), normal(1)).pictures()) == 6


def test_a_column_that_does_not_vary_is_drawn(drawn):
    data = normal(50)
    data[:, 1] = 1e8
    assert len(drawn(standard(scale=torch.tensor([1.0, 1e8])), data).all("img")) == 6


def test_more_rows_than_are_scored_are_drawn_from_at_random_and_read_in_blocks(report, tmp_path, monkeypatch):
    monkeypatch.setattr(examination, "MOST_VALUES", 800)
    monkeypatch.setattr(examination, "PICTURED_ROWS", 150)
    monkeypatch.setattr(examination, "ROWS_AT_ONCE", 64)
    monkeypatch.setattr("pyro_maf.tables.disk.IN_MEMORY", 0)
    taken = []
    take = MappedRows.take

    def recorded(self, index):
        if isinstance(index, torch.Tensor):
            taken.append(index)
        return take(self, index)

    monkeypatch.setattr(MappedRows, "take", recorded)
    data = np.lib.format.open_memmap(tmp_path / "data.npy", "w+", np.float32, (5000, 2))
    data[:] = normal(5000)
    page = report(standard(), data)
    assert page.figure("Rows") == "5,000"
    assert "400 of them, drawn at random, were scored" in page.text
    assert "Pictures are of 150 rows" in page.text
    assert max(map(len, taken)) <= 64
    assert len(np.unique(np.concatenate(taken))) == 400
    assert np.concatenate(taken).max() > 4500


def test_the_same_fit_and_rows_make_the_same_page_and_leave_the_random_state_alone(drawn):
    density = standard()
    state = torch.get_rng_state()
    first = drawn(density, normal(200)).html
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert drawn(density, normal(200)).html == first


def test_tables_of_every_kind_make_the_same_page(report):
    rows = normal(40).double()
    frame = pd.DataFrame(rows.numpy(), columns=["x1", "x2"])
    pages = {report(standard(), given).html for given in (rows, rows.float().double().numpy(), rows.tolist(), frame)}
    assert len(pages) == 1


def test_columns_of_a_data_frame_keep_their_names(report):
    page = report(standard(), pd.DataFrame({"height": normal(40)[:, 0], "weight": normal(40)[:, 1]}))
    assert page.rows[0][-2:] == ["height", "weight"]


def test_pairs_of_many_rows_leave_room_for_the_rest_under_two_megabytes():
    looked = examination.examine(standard(6), named_rows("write_report", normal(4000, 6), None))
    assert len(page._pairs(looked).source) < 1_300_000


def test_distances_are_those_of_kolmogorov():
    one, other = normal(200, 3).double(), 0.5 + normal(150, 3, 1).double()
    uniform = torch.special.ndtr(one)
    assert kolmogorov.distance_to_uniform(uniform).tolist() == pytest.approx(
        [stats.kstest(column.numpy(), "uniform").statistic for column in uniform.T]
    )
    assert kolmogorov.distance_between(one, other).tolist() == pytest.approx(
        [stats.ks_2samp(*both).statistic for both in zip(one.T.numpy(), other.T.numpy(), strict=True)]
    )


def test_chance_passes_the_limit_in_at_most_one_of_twenty_data_sets():
    names = [f"u{i}" for i in range(5)]
    found = [kolmogorov.calibration_of(normal(100, 5, seed), names) for seed in range(400)]
    assert 0 < sum(each.departs for each in found) <= 20
    single = [kolmogorov.calibration_of(normal(100, 1, seed), ["u"]) for seed in range(400)]
    assert sum(each.distance for each in single) / 400 == pytest.approx(single[0].expected, rel=0.05)


def test_the_radius_is_the_normal_score_of_chi_squared_far_out_too():
    u = torch.tensor([[0.1, 0.2, -0.1], [1.0, -1.0, 1.0], [5.0, 5.0, -5.0]], dtype=torch.float64)
    squared = u.square().sum(-1).numpy()
    expected = -stats.norm.ppf(stats.chi2.sf(squared, 3))
    assert kolmogorov.radius_of(u).numpy() == pytest.approx(expected)


def with_nan(rows):
    rows[3, 1] = math.nan
    return rows


CONDITIONAL = ConditionalFlowPrior(ConditionalMAF(2, 1, **SMALL))


@pytest.mark.parametrize(
    ("density", "data", "options", "error", "words"),
    [
        (standard(), normal(5, 3), {}, ValueError, r"data of shape \(rows, 2\).*got \(5, 3\)"),
        (standard(), normal(0), {}, ValueError, r"1 row or more, got \(0, 2\)"),
        (
            standard(),
            with_nan(normal(5)),
            {},
            ValueError,
            r"finite data, got nan in data row 4 \(counted from 1\), column x2",
        ),
        (standard(), [["a", "b"]], {}, TypeError, r"data frame of numbers, got list"),
        (standard(), [[1.0, 2.0], [3.0]], {}, ValueError, r"rows of different lengths"),
        (standard(), normal(5).to(torch.complex64), {}, TypeError, r"real numbers, got torch.complex64"),
        (standard(), normal(5), {"context": normal(5)}, ValueError, r"takes none: leave it out"),
        (standard(support="positive"), normal(5), {}, ValueError, r"inside the support, positive.*got data row 1 "),
        (CONDITIONAL, normal(5), {}, ValueError, r"context with 1 column, got none"),
        (CONDITIONAL, normal(5), {"context": normal(4, 1)}, ValueError, r"got 4 and 5"),
        (MAF(2, **SMALL), normal(5), {}, TypeError, r"what fit returned"),
    ],
)
def test_errors_leave_an_existing_report_in_place(tmp_path, density, data, options, error, words):
    path = tmp_path / "report.html"
    path.write_text("the last report")
    with pytest.raises(error, match=words):
        write_report(path, result_of(density), data, **options)
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "the last report"


def test_a_bar_is_shown_on_request(report, capfd):
    report(standard(), normal(40))
    assert capfd.readouterr().err == ""
    report(standard(), normal(40), progress="always")
    assert "100 %" in capfd.readouterr().err


def test_autocast_does_not_round_the_noise():
    density, data = standard(), normal(40)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = examination.examine(density, named_rows("write_report", data, None))
    exact = examination.examine(density, named_rows("write_report", data, None))
    assert torch.equal(rounded.noise, exact.noise)
    assert rounded.lowest == exact.lowest


def test_a_folder_that_is_not_there_is_named_before_any_work(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"write_report expected an existing folder for report\.html"):
        write_report(tmp_path / "none" / "report.html", result_of(standard()), normal(5))
