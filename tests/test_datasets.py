"""Toys against their densities, and images against their documented preparation."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_maf.datasets import TOYS, Dataset, FigureOne, Funnel, LogitPixels, complete_patches, digits, patches
from pyro_maf.datasets import images as images_module

toys = pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)

# Windows with all but a millionth of each toy's probability; the funnel's is for (x1, x2 exp(-x1 / 2)).
WINDOWS = {
    "Figure 1": ((-6.0, 40.0), (-13.0, 13.0)),
    "Funnel": ((-16.0, 16.0), (-6.0, 6.0)),
    "Ring": ((-4.0, 4.0), (-4.0, 4.0)),
    "Moons": ((-2.0, 3.0), (-1.5, 2.0)),
    "Pinwheel": ((-5.5, 5.5), (-5.5, 5.5)),
}
CELLS, COARSE = 500, 20


def cell_probabilities(toy):
    """Probability of each of COARSE x COARSE cells of a toy's window, by integration on a fine grid."""
    middles = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS
    axes = [low + (high - low) * middles for low, high in WINDOWS[toy.name]]
    area = math.prod((high - low) / CELLS for low, high in WINDOWS[toy.name])
    points = torch.cartesian_prod(*axes)
    log_width = points[:, 0] / 2 if isinstance(toy, Funnel) else torch.zeros(len(points), dtype=torch.float64)
    points[:, 1] *= log_width.exp()
    density = (toy.log_prob(points) + log_width).exp().reshape(COARSE, CELLS // COARSE, COARSE, CELLS // COARSE)
    return density.sum((1, 3)) * area


def cell_counts(toy, y):
    """Number of points of `y` in each cell."""
    if isinstance(toy, Funnel):
        y = torch.stack([y[:, 0], y[:, 1] * (-y[:, 0] / 2).exp()], -1)
    low, high = torch.tensor(WINDOWS[toy.name], dtype=y.dtype).T
    cell = ((y - low) / (high - low) * COARSE).long()
    inside = ((cell >= 0) & (cell < COARSE)).all(-1)
    return torch.bincount(cell[inside] @ torch.tensor([COARSE, 1]), minlength=COARSE**2).reshape(COARSE, COARSE)


@pytest.fixture(scope="module")
def small_patches() -> Dataset:
    return patches(train=500, validation=60, test=70)


@pytest.fixture(scope="module")
def all_digits() -> Dataset:
    return digits()


@toys
def test_a_toy_integrates_to_one(toy):
    assert cell_probabilities(toy).sum().item() == pytest.approx(1, abs=2e-5)


@toys
def test_samples_follow_the_density(toy):
    n = 100_000
    expected = n * cell_probabilities(toy)
    filled = expected > 20
    deviation = (cell_counts(toy, toy.sample(n, seed=1).double()) - expected)[filled] / expected[filled].sqrt()
    assert filled.sum() > 25
    assert deviation.abs().max() < 5
    assert deviation.square().mean() < 1.5


@pytest.mark.parametrize("toy", [toy for toy in TOYS if toy.entropy is not None], ids=lambda toy: toy.name)
def test_samples_have_the_stated_entropy(toy):
    log_prob = toy.log_prob(toy.sample(100_000, seed=2).double())
    standard_error = log_prob.std().item() / math.sqrt(len(log_prob))
    assert abs(log_prob.mean().item() + toy.entropy) < 4 * standard_error


def test_the_entropy_of_figure_one_is_that_of_its_two_gaussians():
    gaussians = [0.5 * math.log(2 * math.pi * math.e * variance) for variance in (4, 1)]
    assert FigureOne().entropy == pytest.approx(sum(gaussians), abs=1e-12)


@toys
def test_a_toy_is_drawn_from_its_seed_alone(toy):
    state = torch.get_rng_state()
    first = toy.sample(50, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(7)
    assert torch.equal(toy.sample(50, seed=3), first)
    assert not torch.equal(toy.sample(50, seed=4), first)
    assert (first.dtype, first.shape) == (torch.float32, (50, 2))


@toys
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (0,), (5,), (2, 3)])
def test_a_toys_density_takes_any_batch_in_its_dtype(toy, dtype, batch):
    y = torch.randn(*batch, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    log_prob = toy.log_prob(y)
    assert (log_prob.shape, log_prob.dtype) == (batch, dtype)
    assert log_prob.isfinite().all()


def test_a_toy_makes_a_dataset_of_three_parts():
    data = FigureOne().dataset(30, 20, 10, seed=5)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [30, 20, 10]
    assert torch.equal(torch.cat([data.train, data.validation, data.test]), FigureOne().sample(60, seed=5))
    assert (data.name, data.input_dim, data.context_dim, data.pixels) == ("Figure 1", 2, 0, None)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: FigureOne().sample(0), ValueError, r"FigureOne.sample expected n of at least 1, got 0"),
        (lambda: FigureOne().sample(1.5), TypeError, r"FigureOne.sample expected n to be an int"),
        (lambda: FigureOne().log_prob(torch.zeros(4, 3)), ValueError, r"last dimension 2 .*got shape \(4, 3\)"),
        (lambda: FigureOne().log_prob([0.0, 1.0]), TypeError, r"to be a torch.Tensor, got list"),
        (lambda: FigureOne().log_prob(torch.tensor([0, 1])), TypeError, r"floating-point, got torch.int64"),
        (lambda: FigureOne().dataset(test=0), ValueError, r"the size of every part of at least 1, got 0"),
        (lambda: patches(train=10, validation=0, test=1), ValueError, r"validation of at least 1, got 0"),
        (lambda: patches(train=10, validation=1, test=10**6), ValueError, r"patches expected test of at most \d+"),
        (lambda: complete_patches(torch.zeros(3, 64)), ValueError, r"last dimension 63 .*got shape \(3, 64\)"),
        (lambda: LogitPixels(levels=1), ValueError, r"levels of at least 2, got 1"),
        (lambda: LogitPixels(margin=0.5), ValueError, r"margin between 0 and 0.5, got 0.5"),
        (lambda: LogitPixels(17).dequantise(torch.tensor([3.0, 17.0])), ValueError, r"0 .. 16, got .* 3 to 17"),
        (lambda: LogitPixels(17).dequantise(torch.tensor([3.5])), ValueError, r"whole values of 0 .. 16"),
    ],
)
def test_bad_arguments_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32])
def test_levels_of_every_dtype_are_dequantised(dtype):
    values = torch.arange(256).reshape(16, 16)
    assert torch.equal(LogitPixels().dequantise(values.to(dtype)), LogitPixels().dequantise(values))
    assert torch.equal((LogitPixels().dequantise(values.to(dtype)) * 256).floor().long(), values)


def test_dequantised_levels_are_uniform_within_their_level():
    values = torch.arange(17).repeat_interleave(4000)
    x = LogitPixels(levels=17).dequantise(values, seed=1)
    assert torch.equal((x * 17).floor().long(), values)
    within = (x * 17 - values).sort().values
    uniform = torch.linspace(0, 1, len(within), dtype=torch.float64)
    assert (within - uniform).abs().max() < 0.01


@pytest.mark.parametrize("margin", [1e-6, 0.05])
def test_logits_are_inverted(margin):
    pixels = LogitPixels(levels=17, margin=margin)
    x = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(pixels.to_pixels(pixels.to_logits(x)), x, atol=1e-12)
    assert pixels.to_logits(x).diff().min() > 0


def test_the_jacobian_of_the_logits_is_autograds():
    pixels = LogitPixels(levels=17, margin=1e-3)
    x = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = torch.autograd.functional.jacobian(pixels.to_logits, x)
    assert pixels.log_jacobian(pixels.to_logits(x)).item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item())


@pytest.mark.parametrize("levels", [17, 256])
def test_a_uniform_density_over_pixels_costs_log2_of_the_levels(levels):
    pixels = LogitPixels(levels=levels)
    y = pixels.to_logits(torch.rand(9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    log_prob_of_uniform = -pixels.log_jacobian(y)
    bits = pixels.bits_per_pixel(log_prob_of_uniform, y)
    assert bits.shape == (9,)
    assert torch.allclose(bits, torch.full((9,), math.log2(levels), dtype=torch.float64))


def test_a_density_within_the_right_level_costs_no_bits():
    # A model that is certain of the level has density `levels` within it, and 0 elsewhere.
    pixels = LogitPixels(levels=17)
    y = pixels.to_logits(torch.full((64,), 0.3, dtype=torch.float64))
    log_prob = 64 * math.log(17) - pixels.log_jacobian(y)
    assert pixels.bits_per_pixel(log_prob, y).item() == pytest.approx(0, abs=1e-12)


def test_digits_hold_every_image_once_with_its_label(all_digits):
    from sklearn.datasets import load_digits

    rows = torch.cat([all_digits.train, all_digits.validation, all_digits.test])
    context = torch.cat([all_digits.train_context, all_digits.validation_context, all_digits.test_context])
    levels = (all_digits.pixels.to_pixels(rows.double()) * 17).floor().long()
    found = torch.cat([levels, context.argmax(-1, keepdim=True)], -1).tolist()
    values, labels = load_digits(return_X_y=True)
    given = [[*row, label] for row, label in zip(values.astype(int).tolist(), labels.tolist(), strict=True)]
    assert sorted(found) == sorted(given)
    assert (context.sum(-1) == 1).all()


def test_digits_have_three_parts_and_a_context(all_digits):
    assert [len(part) for part in (all_digits.train, all_digits.validation, all_digits.test)] == [1455, 162, 180]
    assert (all_digits.input_dim, all_digits.context_dim) == (64, 10)
    assert {all_digits.train.dtype, all_digits.test_context.dtype} == {torch.float32}
    assert all_digits.train.isfinite().all()


@pytest.mark.parametrize(
    "make", [lambda seed: patches(train=40, validation=9, test=9, seed=seed), lambda seed: digits(seed=seed)]
)
def test_images_are_drawn_from_the_seed_alone(make):
    state = torch.get_rng_state()
    first = make(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(7)
    assert torch.equal(make(0).train, first.train)
    assert torch.equal(make(0).test, first.test)
    assert not torch.equal(make(1).train, first.train)


def test_patches_have_63_dimensions_in_float32(small_patches):
    assert [tuple(part.shape) for part in (small_patches.train, small_patches.validation, small_patches.test)] == [
        (500, 63),
        (60, 63),
        (70, 63),
    ]
    assert {part.dtype for part in (small_patches.train, small_patches.test)} == {torch.float32}
    assert small_patches.train.abs().max() < 1
    assert small_patches.pixels is None


def test_a_completed_patch_is_the_photograph_less_its_mean():
    photographs = images_module._grey_photographs()
    places = torch.tensor([[0, 10, 20], [1, 400, 600]])
    rows = images_module._centred(images_module._cut(photographs, places), torch.Generator().manual_seed(0))
    whole = complete_patches(rows)
    for (photograph, row, column), patch in zip(places.tolist(), whole, strict=True):
        levels = photographs[photograph, row : row + 8, column : column + 8].flatten() / 256
        assert ((patch - (levels - levels.mean())).abs() < 1 / 256).all()
    assert whole.sum(-1).abs().max() < 1e-5


def test_the_parts_of_the_photographs_share_no_pixel():
    generator = torch.Generator().manual_seed(0)
    sizes = {"train": 60_000, "validation": 8_000, "test": 8_000}
    parts = images_module._patch_places((2, 427, 640), sizes, generator)
    covered = torch.zeros(3, 2, 427, 640, dtype=torch.bool)
    offsets = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), torch.arange(8), torch.arange(8))
    for part, places in enumerate(parts):
        pixels = (places[:, None] + offsets).reshape(-1, 3)
        covered[part, pixels[:, 0], pixels[:, 1], pixels[:, 2]] = True
        assert len(places.unique(dim=0)) == sizes[list(sizes)[part]]
    assert covered.sum(0).max() == 1
    assert (covered.flatten(2).any(-1)).all()
