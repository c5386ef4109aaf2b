"""The benchmarks run at a tiny size, their arithmetic is right, and documented figures are those of stored results."""

from __future__ import annotations

import json
import math
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

from pyro_maf.infer.fitting import fit_guide as guide_fitting

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from parts import report, timing

    return report, timing


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a benchmark's command in this process and return its output."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name, *arguments):
        threads = torch.get_num_threads()
        with warnings.catch_warnings(), pyro.validation_enabled(True):
            warnings.simplefilter("ignore")  # peers may warn
            try:
                import_module(name).main([str(argument) for argument in arguments])
            finally:
                torch.set_num_threads(threads)
        return capsys.readouterr().out

    return run


@pytest.fixture
def posteriors(tmp_path):
    """A folder with two posteriors, one of them without a model of its name."""
    rng = np.random.default_rng(0)
    names = [*(f"theta[{school}]" for school in range(1, 9)), "mu", "tau"]
    draws = rng.normal(4, 5, (400, 10))
    draws[:, -1] = np.abs(draws[:, -1]) + 0.1
    data = {"data_J": 8, "data_y": rng.integers(-5, 25, 8), "data_sigma": rng.integers(9, 18, 8)}
    folder = tmp_path / "posteriors"
    folder.mkdir()
    for name in ("eight_schools_centered", "another"):
        np.savez(folder / f"{name}.npz", names=np.array(names), draws=draws, **data)
    return folder


@pytest.mark.slow
def test_a_quick_run_measures_every_task_and_writes_results_table_and_plot(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the measuring processes
    run("directions", "--quick", "--peers", "zuko", "--out", tmp_path)
    results = json.loads((tmp_path / "directions.json").read_text())
    splines = {"spline_log_prob", "spline_train", "spline_sample"}
    tasks = {"log_prob", "train", "fit", "sample", "sample_backward", "coupling_log_prob", "coupling_sample"}
    assert {cell["task"] for cell in results["cells"]} == tasks | splines | {"guide"}
    for cell in results["cells"]:
        affine = {"affine"} if cell["task"] in splines else set()
        peers = set() if cell["task"] == "guide" else {"zuko"}  # zuko has no IAF
        assert cell["times"].keys() == {"pyro-maf", "dense pass"} | peers | affine
        assert all(0 < times["minimum"] <= times["median"] < math.inf for times in cell["times"].values())
    assert results["updates"][0]["ratio"] > 0
    assert results["memory"]["bytes"].keys() == {"pyro-maf", "D passes", "zuko"}
    assert "zuko" in (tmp_path / "directions.md").read_text()
    assert (tmp_path / "directions.png").stat().st_size > 0


def test_a_whole_run_has_one_deep_stack_for_more_threads(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import directions

    of_two = [plan for plan in directions.plans(directions.parse([])) if plan.threads == 2]
    assert [(plan.sizes, plan.layers, plan.batches) for plan in of_two[1:]] == [(((63, 512),), (5,), (1000,))]
    assert of_two[0].layers == (1,)
    assert [plan.sizes for plan in directions.plans(directions.parse(["--sizes", "6,32"]))] == [((6, 32),)] * 2


def test_posteriors_of_simulators_are_estimated_and_compared(run, tmp_path):
    options = ["--simulations", "200", "--epochs", "2", "--tasks", "two moons", "--out", tmp_path]
    run("simulators", *options, "--estimators", "pyro-maf maf", "sbi nsf")
    (cell,) = json.loads((tmp_path / "simulators.json").read_text())["cells"]
    figures = cell["estimators"]
    assert (cell["task"], cell["simulations"], cell["seed"]) == ("two moons", 200, 0)
    assert figures.keys() == {"pyro-maf maf", "sbi nsf"}
    assert figures["sbi nsf"]["gain"] == 0
    assert all(0.4 < value <= 1 for estimator in figures.values() for value in estimator["c2st"])
    assert "**two moons** (2 parameters, 200 simulations, seed 0)" in (tmp_path / "simulators.md").read_text()
    assert (tmp_path / "simulators.png").stat().st_size > 0


def test_the_default_of_fit_is_compared_on_small_tables(run, tmp_path):
    run("fitting", "--tables", "normal", "--splits", "2", "--least-seconds", "0.1", "--out", tmp_path)
    cell = json.loads((tmp_path / "fitting.json").read_text())["cells"]["normal"]
    assert cell.keys() == {"Gaussian", "mixture of Gaussians", "KDE", "MAF", "zuko", "nats", "seconds"}
    assert all(len(values) == 2 and np.isfinite(values).all() for values in cell.values())
    assert "| normal, 30 x 3 |" in (tmp_path / "fitting.md").read_text()


def test_figures_in_the_readme_are_those_of_the_stored_results():
    page = " ".join((ROOT / "README.md").read_text().split())
    results = BENCHMARKS / "results"
    expected = {"task": "sample", "threads": 1, "D": 63, "layers": 1, "batch": 1000}
    cells = json.loads((results / "directions.json").read_text())["cells"]
    (times,) = (cell["times"] for cell in cells if expected.items() <= cell.items())
    peers = [times[name] for name in ("flowjax", "pyro", "zuko", "nflows", "normflows")]
    jax, *torch = (peer["over_ours"] for peer in peers)
    assert f"| {times['pyro-maf']['minimum'] * 1e3:.1f} ms | {jax:.0f} times as long, compiled JAX;" in page
    assert f"; {min(torch):.0f} times and more, PyTorch |" in page
    passes = [peer["over_dense"] for peer in peers]
    assert f"| {times['pyro-maf']['over_dense']:.2f} | {min(passes):.0f} to {max(passes):.0f} |" in page
    schools = (results / "guides.md").read_text().partition("**eight_schools_centered**")[2].partition("\n**")[0]
    c2st = {line.split(" | ")[0]: line.split(" | ")[1] for line in schools.splitlines() if line.startswith("| Auto")}
    pyros = [c2st[f"| Auto{name}"] for name in ("Normal", "MultivariateNormal", "IAFNormal", "NormalizingFlow")]
    assert f"| {c2st['| AutoIAF, fit_guide']} | {min(pyros)} to {max(pyros)}, Pyro's guides |" in page


def test_the_page_on_measurements_has_the_table_of_the_stored_results():
    *_, table = (BENCHMARKS / "results" / "fitting.md").read_text().strip().split("\n\n")
    assert table in (ROOT / "docs" / "measurements.md").read_text()


def test_exact_posterior_of_two_moons_is_that_of_its_simulator(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import torch
    from parts.tasks import TASKS

    torch.manual_seed(0)
    task = TASKS[0]
    theta, x = task.simulations(400_000, seed=0)
    at = torch.tensor([[0.0, 0.0]])
    near = theta[(x - at).norm(dim=1) < 0.02]
    exact = task.reference(at, 4_000)
    assert len(near) > 100
    error = near.std(0) / len(near) ** 0.5
    assert ((near.mean(0) - exact.mean(0)).abs() < 4 * error + 0.01).all()
    torch.testing.assert_close(near.abs().mean(0), exact.abs().mean(0), rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["SLCP", "Lotka-Volterra"])
def test_exact_posteriors_rank_the_truth_uniformly(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import torch
    from parts import tasks
    from scipy.stats import kstest

    monkeypatch.setattr(tasks, "PROPOSALS", 2**13)
    task = next(task for task in tasks.TASKS if task.name == name)
    theta, x = task.simulations(8, seed=5)
    torch.manual_seed(1)
    pairs = zip(theta, x.split(1), strict=True)
    ranks = torch.stack([(task.reference(at, 20) < truth).float().mean(0) for truth, at in pairs])
    # By chance, one of the nine tests fails in a thousand seeds.
    assert all(kstest(rank, "uniform").pvalue > 1e-4 for rank in ranks.T.numpy())


@pytest.mark.slow
def test_guides_are_fitted_measured_and_plotted_for_posteriors_with_a_model(run, posteriors, monkeypatch, tmp_path):
    for place, size in (("parts.accuracy.COMPARED", 100), ("parts.guides.DIAGNOSED", 1_000)):
        monkeypatch.setattr(place, size)
    monkeypatch.setattr(guide_fitting, "DIAGNOSED", 1_000)
    out = tmp_path / "results"
    names = ["AutoIAF", "AutoIAF, fit_guide", "AutoIAFNormal", "ZukoToPyro NSF", "NUTS"]
    options = ["--costs", "--steps", "3", "--out", out, "--targets", "eight_schools_centered"]
    printed = run("guides", posteriors, "--guides", *names, *options)
    assert "another.npz is skipped" in printed
    assert "AutoIAFNormal" in printed
    section = json.loads((out / "guides.json").read_text())["posteriors"]["eight_schools_centered"]
    assert list(section["guides"]) == names
    for name, fits in section["guides"].items():
        fit = fits["0"]
        assert fit["steps"] == (3 * 16 if name == "NUTS" else 3)
        assert 0.4 < fit["c2st"] <= 1
        if name != "NUTS":
            assert all(math.isfinite(fit[figure]) for figure in ("err", "elbo", "elbo_se", "quantile_error"))
    for objectives in section["gradients"].values():
        assert all(figures["variance"] > 0 and figures["ms"] > 0 for figures in objectives.values())
    assert section["step_ms"].keys() == {"AutoIAF", "AutoIAFNormal"}
    assert (out / "guides.png").stat().st_size > 0


def test_tables_of_guides_report_when_a_chain_reaches_the_accuracy_of_a_fit(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from parts.standings_of_guides import CHAIN, FITTED, as_accurate

    fits = {str(seed): {"err": err, "start": 1.0, "seconds": 2.0} for seed, err in enumerate((0.05, 0.01))}
    chain = {"seconds": 9.0, "errors_in_time": [[1.0, 0.5], [4.0, 0.04], [9.0, 0.02]]}
    lines = as_accurate({FITTED: fits, CHAIN: {"0": chain, "1": chain, "2": chain}})
    assert lines[1:] == [
        "NUTS, seed 0: err 0.050 first after 4.0 CPU s; fit_guide takes 3.0.",
        "NUTS, seed 1: err 0.010 not within 9.0 CPU s; fit_guide takes 3.0.",
    ]
    assert as_accurate({FITTED: fits}) == []


def test_results_of_guides_are_merged_and_fits_are_not_repeated(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import guides
    from parts import accuracy

    monkeypatch.setattr(accuracy, "COMPARED", 50)
    options = ["--guides", "AutoNormal", "--steps", "3", "--out", str(tmp_path)]
    guides.main(["--targets", "counts", *options])
    first = json.loads((tmp_path / "guides.json").read_text())["posteriors"]["counts"]
    guides.main(["--targets", "counts", "uniform", "--seeds", "0", "1", *options])
    merged = json.loads((tmp_path / "guides.json").read_text())["posteriors"]
    assert merged["counts"]["guides"]["AutoNormal"]["0"] == first["guides"]["AutoNormal"]["0"]
    assert [list(each["guides"]["AutoNormal"]) for each in merged.values()] == [["0", "1"], ["0", "1"]]


def test_a_population_of_chains_samples_two_modes_in_proportion(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from parts import dynamics

    monkeypatch.setattr(dynamics, "CHAINS", 2000)
    ends = torch.tensor([-2.0, 2.0], dtype=torch.float64)

    def log_likelihood(logs):
        return (-((logs[:, :1] - ends) ** 2) / 0.02 + torch.tensor([0.25, 0.75]).log()).logsumexp(1)

    logs = np.log(dynamics.sampled(torch.zeros(2).double(), torch.ones(2).double(), log_likelihood))
    assert abs((logs[:, 0] > 0).mean() - 0.75) < 0.06
    assert abs(logs[:, 1].mean()) < 0.1
    assert abs(logs[:, 1].std() - 1) < 0.1


def test_draws_of_tabulated_and_other_toys_follow_their_density(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from parts.toys import TOYS

    gamma = TOYS["counts"]()  # counts 0, 2, 1, 0 and a Gamma(2, 1) prior have the posterior Gamma(5, 5)
    assert gamma.draws.mean() == pytest.approx(1, abs=0.02)
    assert gamma.draws.var() == pytest.approx(0.2, rel=0.05)
    modes = TOYS["four_modes"]().draws
    assert (modes > 0).mean(0) == pytest.approx([0.3, 0.4], abs=0.02)
    groups = TOYS["hierarchy_50"]()
    assert groups.draws[:, groups.columns.index("tau")].min() > 0


@pytest.fixture
def sets_of_data(tmp_path):
    """A folder with a table in three parts, and a data set of images with labels."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(240, 3)).astype(np.float32)
    rows[:, 1] += rows[:, 0] ** 2
    labels = rng.integers(2, size=200, dtype=np.uint8)
    images = (rng.integers(0, 120, (200, 16)) + 100 * labels[:, None]).astype(np.uint8)
    folder = tmp_path / "sets"
    folder.mkdir()
    np.savez(folder / "bent.npz", train=rows[:200], val=rows[200:220], test=rows[220:])
    np.savez(folder / "squares.npz", images=images, labels=labels)
    return folder


def test_the_papers_models_are_compared_with_peers_and_conditioned_on_a_class(run, sets_of_data, tmp_path):
    options = ["--quick", "--steps", "2", "--depths", "1", "--peers", "zuko", "--figure-one", "--speed"]
    options += ["--models", "Gaussian", "MADE", "MAF (5)", "--fits", tmp_path / "fits", "--out", tmp_path / "results"]
    printed = run("paper", sets_of_data, *options)
    results = json.loads((tmp_path / "results" / "paper.json").read_text())
    assert list(results["sets"]) == ["bent", "squares", "squares, given the class"]
    for name, section in results["sets"].items():
        assert [line["model"] for line in section["models"]] == ["Gaussian", "MADE", "MAF (5)"]
        assert all(("bits" in line) == ("squares" in name) for line in section["models"])
        (against,) = section["against_peers"]
        assert (against["model"], against["best_peer"]) == ("MAF (5)", "zuko")
        means = [against["test"][who]["mean"] for who in ("pyro-maf", "zuko")]
        assert against["difference"] == pytest.approx(means[0] - means[1], abs=1e-6)
        assert against["difference_error"] > 0
        assert [(line["first"], line["second"]) for line in section["order"]] == [("MADE", "Gaussian")]
    given = results["sets"]["squares, given the class"]["given_context"]
    assert [line["model"] for line in given] == ["Gaussian", "MADE", "MAF (5)"]
    gained = [
        given["mean"] - blind["mean"]
        for given, blind in zip(
            results["sets"]["squares, given the class"]["models"], results["sets"]["squares"]["models"], strict=True
        )
    ]
    assert [line["difference"] for line in given] == pytest.approx(gained, abs=1e-6)
    assert results["figure_one"]["MAF (5)"]["short_of_exact"]["mean"] > 0
    (cell,) = results["speed"]
    assert cell["rows_per_second"].keys() >= {"pyro-maf", "zuko"}
    assert cell["ratio"]["zuko"] > 0
    assert cell["fit_rows_per_second"] > 0
    for picture in ("paper-digits.png", "paper-figure1-density.png", "paper-figure1-noise.png"):
        assert (tmp_path / "results" / picture).stat().st_size > 0
    assert (tmp_path / "results" / "paper.md").read_text() in printed


def test_fits_of_the_papers_models_are_stored_and_read_back(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from parts import contest

    from pyro_maf.datasets import FigureOne
    from pyro_maf.experiments import candidates

    data = FigureOne().dataset(train=200, validation=50, test=50)
    models = candidates(["Gaussian", "RealNVP (5)", "NSF (5)"], hidden_dims=[[8]])
    plan = contest.Plan(models, ("zuko", "nflows"), epochs=1, rate=1e-3, folder=tmp_path)
    *_, first = contest.run(data, plan)
    assert [line["who"] for line in first["tried"]] == ["pyro-maf", *2 * ["pyro-maf", "zuko", "nflows"]]
    monkeypatch.setattr(contest, "_fitted", None)
    *_, again = contest.run(data, plan)
    assert again == first


def test_the_default_is_compared_with_recipes_for_the_same_time_and_with_simple_densities(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from parts import contest, standings

    from pyro_maf.datasets import FigureOne

    data = FigureOne().dataset(train=200, validation=50, test=50)
    recipes = ("zuko",)
    plan = contest.Plan((contest.DEFAULT,), (), epochs=1, rate=1e-3, folder=tmp_path, recipes=recipes, seeds=2)
    *_, section = contest.run(data, plan)
    (line,) = section["against_peers"]
    assert list(line["ahead"]) == ["mixture of Gaussians", "kernel density", *recipes]
    assert all(line["seconds"][who] >= line["seconds"]["pyro-maf"] for who in recipes)
    tried = [each for each in section["tried"] if each["who"] == "zuko"]
    assert [each["seed"] for each in tried] == [0, 1]
    assert line["test"]["zuko"]["mean"] == pytest.approx(sum(each["mean"] for each in tried) / 2, abs=1e-6)
    # The sign depends on the machine, since zuko's recipe has the seconds that our fit took.
    means = [line["test"][who]["mean"] for who in ("pyro-maf", "zuko")]
    assert line["ahead"]["zuko"]["difference"] == pytest.approx(means[0] - means[1], abs=1e-6)
    assert line["ahead"]["kernel density"]["difference"] > 0
    table = standings.everything({"about": None, "sets": {"any": section}, "speed": [], "figure_one": None})
    assert "over kernel density" in table


def test_peers_can_be_found_repeatedly(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from parts import peers

    first, again = (peers.find(["pyro", "zuko"])[0] for _ in range(2))
    assert list(first) == list(again) == ["pyro-maf", "pyro", "zuko"]


def test_the_training_loop_of_the_peers_restores_the_best_weights(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import torch
    from parts import rivals

    from pyro_maf.datasets import Dataset
    from pyro_maf.experiments import candidates

    rows = torch.randn(300, 2)
    data = Dataset("any", rows[:200], rows[200:250], rows[250:])
    (candidate,) = candidates(["MAF (5)"], hidden_dims=[[8, 8]])
    for name, make in rivals.RIVALS.items():
        torch.manual_seed(0)
        module = make(candidate, 2, 0)
        start = rivals.scores(module, data.validation, None).mean()
        epochs = rivals.train(module, data, epochs=4, patience=9, batch=50, rate=1e-2, seed=0)
        assert epochs == 4, name
        assert rivals.scores(module, data.validation, None).mean() > start, name


def test_columns_are_taken_from_the_sites_by_name(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import torch
    from parts.posteriors import Posterior

    posterior = Posterior("any", print, (), ("theta[2]", "tau", "beta[1]"), np.ones((3, 3)))
    sites = {"theta": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "tau": torch.tensor([5.0, 6.0])}
    sites["beta"] = torch.tensor([[[7.0, 8.0]], [[9.0, 10.0]]])
    assert posterior.table(sites).tolist() == [[2.0, 5.0, 7.0], [4.0, 6.0, 9.0]]


def test_errors_of_the_reference_draws_are_zero_and_grow_with_a_shift(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from parts import accuracy
    from parts.posteriors import Posterior

    rng = np.random.default_rng(0)
    posterior = Posterior("any", print, (), ("a", "b"), rng.normal(5, [1.0, 10.0], (800, 2)))
    shifted = posterior.draws + posterior.scales * [1.0, 0.0]
    assert accuracy.mean_error(posterior, posterior.draws) == 0
    assert accuracy.mean_error(posterior, shifted) == pytest.approx(0.5**0.5)
    assert accuracy.c2st(posterior, rng.normal(5, [1.0, 10.0], (800, 2))) < 0.56
    assert accuracy.c2st(posterior, shifted + 4 * posterior.scales) > 0.95


def test_ratios_are_taken_within_a_round(parts):
    _, timing = parts
    busy_at_first = timing.Times({0: [10.0], 1: [1.0], 2: [1.0]})
    slower = timing.Times({0: [20.0], 1: [2.0]})
    assert timing.paired_ratio(slower, busy_at_first) == 2.0


def test_a_contender_that_is_too_slow_or_too_large_is_extrapolated(parts):
    _, timing = parts
    calls = []
    contenders = [
        timing.Contender("slow", lambda: calls.append("slow"), predicted=100.0),
        timing.Contender("large", lambda: calls.append("large"), predicted=1.0, needs=2**40),
        timing.Contender("fine", lambda: calls.append("fine")),
    ]
    times = timing.take_turns(contenders, seconds=0.01, longest_call=10.0, memory=2**30, rounds=1)
    assert set(calls) == {"fine"}
    assert (times["slow"].minimum, times["slow"].measured) == (100.0, False)
    assert "100 s" in times["slow"].note
    assert "1024 GiB" in times["large"].note
    assert times["fine"].measured


def test_only_the_text_between_the_markers_is_replaced(parts, tmp_path):
    report, _ = parts
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.put_between_markers(path, "new")
    assert path.read_text() == f"before\n{report.BEGIN}\n\nnew\n{report.END}\nafter\n"
    path.write_text("no markers")
    with pytest.raises(ValueError, match="put the table between"):
        report.put_between_markers(path, "new")
