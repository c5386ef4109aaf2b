"""Plots: their axes, their contents, and saving them."""

from __future__ import annotations

import math

import matplotlib as mpl
import pandas as pd
import pytest
import torch
from IPython.core.formatters import PNGFormatter
from matplotlib.figure import Figure

from pyro_maf import MAF, ConditionalMAF, plotting
from pyro_maf.datasets import FigureOne
from pyro_maf.distributions import ConditionalFlowPrior, FlowPrior, MADEMoG, MAFMoG
from pyro_maf.training import FitResult

WINDOW = ((-4.0, 12.0), (-7.0, 7.0))


@pytest.fixture
def rows():
    return torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


def randomised(module):
    """A model with random weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.double()


def result(losses):
    best = min(losses)
    return FitResult(None, tuple(losses), tuple(losses), losses.index(best) + 1, -best, 1.0, "reached max_epochs")


def offsets(axes):
    return torch.from_numpy(axes.collections[0].get_offsets().data).float()


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


PICTURES = {
    "scatter": lambda: plotting.scatter(FigureOne().sample(60), {"MAF": FigureOne().sample(60, 1)}, title="Toy"),
    "noise": lambda: plotting.noise({"MAF": MAF(2)}, FigureOne().sample(60), title="Toy"),
    "contours": lambda: plotting.contours({"Exact": FigureOne(), "MADE": FlowPrior(MAF(2))}, WINDOW, title="Toy"),
    "losses": lambda: plotting.losses({"MAF": result([3.0, 2.0, 2.5])}, marks={"best": 1.9}, title="Toy"),
    "image_grid": lambda: plotting.image_grid({"Data": torch.rand(9, 64)}, columns=3, title="Toy"),
    "marginals": lambda: plotting.marginals(FigureOne().sample(60), FigureOne().sample(60, 1), title="Toy"),
    "pit": lambda: plotting.pit(torch.zeros(60, 2), title="Toy"),
    "qq": lambda: plotting.qq(torch.zeros(60, 2), title="Toy"),
    "log_densities": lambda: plotting.log_densities({"data": torch.zeros(60)}, title="Toy"),
    "pairs": lambda: plotting.pairs(FigureOne().sample(60), FigureOne().sample(60, 1), title="Toy"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_figure_is_displayed_in_a_notebook_without_pyplot(name):
    formatter = PNGFormatter()
    picture = formatter(PICTURES[name]())
    assert picture.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", PICTURES)
def test_every_figure_can_be_saved_and_has_its_title(name, tmp_path):
    figure = PICTURES[name]()
    assert isinstance(figure, Figure)
    assert figure.get_suptitle() == "Toy"
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", PICTURES)
def test_drawing_leaves_matplotlibs_settings_alone(name):
    before = dict(mpl.rcParams)
    PICTURES[name]()
    assert dict(mpl.rcParams) == before


def test_scatter_has_a_panel_for_the_data_and_for_each_model_on_the_same_axes(rows):
    figure = plotting.scatter(rows, {"MADE": rows + 100, "MAF": rows[:5]}, dims=(0, 2))
    assert titles(figure) == ["Data", "MADE", "MAF"]
    assert {(axes.get_xlim(), axes.get_ylim()) for axes in figure.axes} == {
        (figure.axes[0].get_xlim(), figure.axes[0].get_ylim())
    }
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("$x_{1}$", "$x_{3}$")
    drawn = torch.from_numpy(figure.axes[0].collections[0].get_offsets().data)
    assert torch.equal(drawn.float(), rows[:, [0, 2]])


def test_panels_go_on_in_a_second_row_without_empty_ones(rows):
    figure = plotting.scatter(rows, {f"model {i}": rows for i in range(4)})
    assert len(figure.axes) == 5
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == (2, 3)


def test_noise_plots_the_standardised_datas_noise(rows):
    flow = randomised(MAF(3, num_layers=2, hidden_dims=[8]))
    loc, scale = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0])
    prior = FlowPrior(flow, loc=loc.double(), scale=scale.double())
    figure = plotting.noise({"MAF": prior}, rows.double(), dims=(1, 2))
    drawn = torch.from_numpy(figure.axes[0].collections[0].get_offsets().data)
    expected = flow.inv((rows.double() - loc) / scale)[:, 1:].detach()
    assert torch.allclose(drawn, expected)
    assert [circle.radius for circle in figure.axes[0].patches] == [1, 2, 3]
    assert figure.axes[0].get_ylabel() == "$u_{3}$"


@pytest.mark.parametrize(
    "model",
    [MADEMoG(3, hidden_dims=[8], num_components=3), MAFMoG(3, num_layers=2, hidden_dims=[8], num_components=3)],
    ids=["MADEMoG", "MAFMoG"],
)
def test_the_noise_of_a_mixture_agrees_with_its_jacobian(model):
    # log p(y) = log N(u; 0, I) + log |det du/dy| holds only for the noise u of y.
    model = randomised(model)
    y = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)
    u = FlowPrior(model).noise(y[None])[0]
    jacobian = torch.autograd.functional.jacobian(lambda y: model.noise(y[None])[0], y)
    log_prob = torch.distributions.Normal(0.0, 1.0).log_prob(u).sum() + torch.linalg.slogdet(jacobian)[1]
    assert log_prob.item() == pytest.approx(model.log_prob(y).item())


def test_the_noise_of_a_mixtures_samples_is_standard_normal():
    torch.manual_seed(0)
    model = randomised(MADEMoG(2, hidden_dims=[8], num_components=3))
    u = model.noise(model.sample((4000,))).detach()
    assert u.mean(0).abs().max() < 4 / math.sqrt(4000)
    assert (torch.cov(u.T) - torch.eye(2)).abs().max() < 0.1


def test_the_noise_of_a_mixture_is_finite_far_out():
    model = MADEMoG(2, hidden_dims=[8]).double()
    u = model.noise(torch.tensor([[12.0, -12.0]], dtype=torch.float64))
    assert u[0, 0] > 8
    assert u[0, 1] < -8
    assert u.isfinite().all()


def test_noise_takes_a_conditional_density_at_a_context(rows):
    flow = randomised(ConditionalMAF(3, 2, num_layers=1, hidden_dims=[8]))
    context = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    density = ConditionalFlowPrior(flow).condition(context)
    figure = plotting.noise({"MAF": density}, rows.double())
    drawn = torch.from_numpy(figure.axes[0].collections[0].get_offsets().data)
    assert torch.allclose(drawn, flow.condition(context).inv(rows.double())[:, :2].detach())


def test_contours_of_a_density_in_float64():
    figure = plotting.contours({"Model": FlowPrior(MAF(2).double())}, WINDOW)
    assert figure.axes[0].get_title() == "Model"


def test_contours_share_the_levels_of_the_first_density():
    figure = plotting.contours({"Exact": FigureOne(), "Model": FlowPrior(MAF(2))}, WINDOW)
    exact, model = (axes.collections[0] for axes in figure.axes[:2])
    assert titles(figure) == ["Exact", "Model"]
    assert list(exact.levels) == list(model.levels)
    assert exact.levels[-1] == pytest.approx(math.exp(FigureOne().log_prob(torch.zeros(2)).item()), rel=0.01)
    assert figure.axes[-1].get_ylabel() == "density"
    assert figure.axes[0].get_xlim() == WINDOW[0]


def test_losses_draw_both_curves_of_each_fit_and_the_marks():
    figure = plotting.losses({"MADE": result([3.0, 2.0, 2.5]), "MAF": result([2.8, 1.0])}, marks={"true": 0.9})
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["MADE", "MAF", "true", "in training"]
    assert list(axes.lines[0].get_ydata()) == [3.0, 2.0, 2.5]
    assert list(axes.lines[3].get_xdata()) == [1, 2]
    assert axes.get_ylabel() == "negative log-likelihood in nats"


def test_the_axis_of_losses_leaves_the_first_tenth_of_the_epochs_out():
    first, others = [1000.0, 1000.0], [2.0 - 0.01 * epoch for epoch in range(18)]
    low, high = plotting.losses({"MAF": result([*first, *others])}).axes[0].get_ylim()
    assert (low, high) == pytest.approx((1.83 - 0.0085, 2.0 + 0.0085))


def test_image_grid_lays_images_out_row_by_row():
    images = torch.arange(4.0).repeat_interleave(4).reshape(4, 4)
    sheet = plotting.image_grid({"Data": images}, columns=2).axes[0].images[0].get_array()
    assert sheet.shape == (5, 5)
    assert [sheet[0, 0], sheet[0, 3], sheet[3, 0], sheet[3, 3]] == [0, 1, 2, 3]
    assert math.isnan(sheet.filled(math.nan)[2, 0])


def test_image_grid_leaves_places_without_an_image_blank():
    sheet = plotting.image_grid({"Data": torch.ones(1, 4)}, columns=2).axes[0].images[0].get_array()
    assert (~torch.from_numpy(sheet.filled(math.nan)).isnan()).sum() == 4


def test_pairs_have_a_lower_triangle_of_panels_with_names(rows):
    figure = plotting.pairs(rows, rows, names=["a", "b", "c"])
    assert len(figure.axes) == 6
    assert [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()] == ["a", "b", "c"]
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["b", "c"]


def test_a_histogram_of_positive_numbers_does_not_begin_below_0(rows):
    positive = rows.exp()
    for figure in (plotting.marginals(positive, positive + 1), plotting.pairs(positive, positive.square())):
        histograms = [patch.get_xy()[:, 0] for axes in figure.axes for patch in axes.patches]
        assert len(histograms) == 6
        assert min(map(min, histograms)) > 0
    same = torch.full((30, 1), 2.0)
    assert plotting.marginals(same, same).axes[0].patches[0].get_xy()[:, 1].max() == pytest.approx(1)


def test_data_are_drawn_over_samples_and_the_larger_the_fewer_they_are(rows):
    figure = plotting.pairs(rows[:40], rows.repeat(50, 1))
    samples, data = figure.axes[1].collections
    assert len(data.get_offsets()) == 40
    assert len(samples.get_offsets()) > 40
    assert data.get_sizes()[0] > 2 * samples.get_sizes()[0]
    assert tuple(data.get_facecolor()[0][:3]) != tuple(samples.get_facecolor()[0][:3])


def test_the_number_of_panels_per_row_can_be_set(rows):
    for draw in (plotting.pit, plotting.qq, lambda u, **options: plotting.marginals(u, u, **options)):
        assert draw(rows, columns=1).get_figwidth() < draw(rows, columns=2).get_figwidth() < draw(rows).get_figwidth()
    with pytest.raises(ValueError, match="columns of at least 1, got 0"):
        plotting.pit(rows, columns=0)


def test_pairs_of_samples_far_from_the_data_are_drawn_on_the_axes_of_the_data(rows):
    near, far = plotting.pairs(rows, rows), plotting.pairs(rows, rows + 100)
    assert [axes.get_xlim() for axes in near.axes] == [axes.get_xlim() for axes in far.axes]


def test_marginals_count_all_rows_of_data_and_samples_in_the_bins_of_the_data(rows):
    figure = plotting.marginals(rows, torch.cat([rows, rows + 100]), names=["a", "b", "c"])
    assert titles(figure) == ["a", "b", "c"]
    for axes in figure.axes:
        data, samples = (patch.get_xy() for patch in axes.patches)
        # The outline of a step histogram passes each bin's edges and each height twice.
        assert set(samples[:, 0]) <= set(data[:, 0])
        assert 2 * samples[:, 1].max() == pytest.approx(data[:, 1].max())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["data", "samples"]


def band_of(figure):
    """Bounding box of the band behind the bars, a rectangle or, before matplotlib 3.9, a polygon."""
    axes = figure.axes[0]
    return axes.patches[-1].get_extents().transformed(axes.transData.inverted())


def test_pit_bars_are_uniform_for_standard_normal_noise_and_the_band_is_binomial():
    u = torch.special.ndtri((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)[:, None]
    figure = plotting.pit(torch.cat([u, u / 2], 1))
    even, narrow = ([bar.get_height() for bar in axes.patches[:-1]] for axes in figure.axes)
    assert even == pytest.approx([1.0] * 20)
    assert sum(narrow) == pytest.approx(20)
    assert narrow[0] < 0.1 < 1.5 < narrow[9]
    band = band_of(figure)
    assert (band.y1 - band.y0) / 2 == pytest.approx(2 * math.sqrt(1000 * 0.05 * 0.95) / 50)


def test_the_band_of_pit_has_its_nominal_coverage():
    u = torch.randn(2000, 20, generator=torch.Generator().manual_seed(0))
    figure = plotting.pit(u)
    band = band_of(figure)
    bars = [bar.get_height() for axes in figure.axes for bar in axes.patches[:-1]]
    assert sum(band.y0 <= height <= band.y1 for height in bars) / len(bars) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("rows", [1, 2, 50, 5000])
def test_qq_draws_sorted_noise_against_the_quantiles_that_belong_there(rows):
    u = torch.special.ndtri((torch.arange(rows, dtype=torch.float64) + 0.5) / rows)
    u = u[torch.randperm(rows, generator=torch.Generator().manual_seed(0))][:, None]
    figure = plotting.qq(torch.cat([u, 2 * u + 1], 1), names=["a", "b"])
    for axes, scale, shift in zip(figure.axes, (1, 2), (0, 1), strict=True):
        normal, found = axes.lines[-1].get_data()
        assert list(found) == pytest.approx([scale * z + shift for z in normal])
        assert normal[-1] == pytest.approx(u.max().item())
        assert len(normal) <= 200


def test_the_band_of_qq_has_its_nominal_coverage():
    u = torch.randn(2000, 20, generator=torch.Generator().manual_seed(0))
    inside = total = 0
    for axes in plotting.qq(u).axes:
        normal, found = axes.lines[-1].get_data()
        edges = axes.collections[0].get_paths()[0]
        middle = abs(normal) < 2
        inside += edges.contains_points(list(zip(normal[middle], found[middle], strict=True))).sum()
        total += middle.sum()
    assert inside / total == pytest.approx(0.95, abs=0.03)


def test_log_densities_share_their_bins_and_leave_out_what_is_not_finite():
    heights = torch.linspace(-5.0, -1.0, 200)
    figure = plotting.log_densities({"data": heights, "samples": torch.cat([heights, torch.tensor([-math.inf])])})
    data, samples = (patch.get_xy() for patch in figure.axes[0].patches)
    assert set(data[:, 0]) == set(samples[:, 0])
    assert data[:, 1].max() == samples[:, 1].max()
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["data", "samples"]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: plotting.scatter(torch.zeros(5), {}),
            ValueError,
            r"scatter expected Data .*shape \(5,\)",
        ),
        (
            lambda: plotting.scatter(torch.zeros(5, 2), {"MAF": torch.zeros(5, 1)}),
            ValueError,
            r"MAF of shape",
        ),
        (lambda: plotting.noise({}, torch.zeros(5, 2)), ValueError, r"at least one model, got none"),
        (lambda: plotting.noise({"f": FigureOne()}, torch.zeros(5, 2)), TypeError, r"noise expected .*got FigureOne"),
        (lambda: plotting.noise({"f": MAF(2)}, torch.zeros(5, 2), dims=(0, 2)), ValueError, r"\(rows, 3 or more\)"),
        (lambda: plotting.contours({}, WINDOW), ValueError, r"at least one density, got none"),
        (lambda: plotting.contours({"f": FigureOne()}, ((0, 0), (0, 1))), ValueError, r"low < high .*got \(0, 0\)"),
        (lambda: plotting.losses({}), ValueError, r"at least one result, got none"),
        (lambda: plotting.losses(result([3.0, 2.0])), TypeError, r"losses expected results by name, .*got FitResult"),
        (lambda: plotting.contours(FigureOne(), WINDOW), TypeError, r"contours expected densities by name.*FigureOne"),
        (lambda: plotting.noise(MAF(2), torch.zeros(5, 2)), TypeError, r"noise expected densities by name.*got MAF"),
        (lambda: plotting.scatter(*torch.zeros(2, 5, 2)), TypeError, r"scatter expected samples by name.*got Tensor"),
        (lambda: plotting.image_grid(torch.zeros(5, 64)), TypeError, r"image_grid expected images by name.*got Tensor"),
        (
            lambda: plotting.log_densities(torch.zeros(5)),
            TypeError,
            r"log_densities expected heights by name",
        ),
        (
            lambda: plotting.image_grid({"Data": torch.zeros(5, 63)}),
            ValueError,
            r"square number.*\(5, 63\)",
        ),
        (lambda: plotting.image_grid({"Data": torch.zeros(5, 64)}, columns=0), ValueError, r"columns of at least 1"),
        (lambda: plotting.marginals(torch.zeros(5, 2), torch.zeros(5, 1)), ValueError, r"samples of shape"),
        (lambda: plotting.marginals(torch.zeros(5, 0), torch.zeros(5, 0)), ValueError, r"shape"),
        (lambda: plotting.pit(torch.zeros(5)), ValueError, r"pit expected u of shape"),
        (lambda: plotting.qq(torch.zeros(5, 2), names=["a"]), ValueError, r"qq expected 2 names.*got 1"),
        (lambda: plotting.log_densities({}), ValueError, r"at least one row of each, got none"),
        (lambda: plotting.log_densities({"f": torch.full((3,), -math.inf)}), ValueError, r"finite log-densities"),
        (lambda: plotting.pairs(torch.zeros(5, 2), torch.zeros(5, 2), names=["a"]), ValueError, r"2 names.*got 1"),
    ],
)
def test_bad_arguments_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_figures_take_frames_and_name_their_columns(rows):
    frame = pd.DataFrame(rows.numpy(), columns=["length", "width", "age"])
    other = frame.iloc[:, [2, 0, 1]] + 100  # in another order
    drawn = plotting.pairs(frame, other)
    assert [axes.get_xlabel() for axes in drawn.axes][-3:] == ["length", "width", "age"]
    assert torch.equal(offsets(drawn.axes[1]), rows[:, :2] + 100)
    assert titles(plotting.marginals(frame, other)) == titles(plotting.qq(frame)) == ["length", "width", "age"]
    assert titles(plotting.scatter(frame, {"MAF": rows.tolist()})) == ["Data", "MAF"]
    assert titles(plotting.noise({"MAF": FlowPrior(MAF(3))}, frame)) == ["MAF"]
    assert plotting.log_densities({"data": frame["age"]}).axes[0].get_legend_handles_labels()[1] == ["data"]
    with pytest.raises(TypeError, match="column 'age' of"):
        plotting.pairs(frame.assign(age="old"), frame)
    assert torch.equal(offsets(plotting.scatter(frame, {"other": other}).axes[1]), rows[:, :2] + 100)
    assert titles(plotting.noise({"MADE": MADEMoG(3)}, frame)) == ["MADE"]
    with pytest.raises(ValueError, match="expected samples with column 'age'"):
        plotting.pairs(frame, frame[["length", "width"]])
