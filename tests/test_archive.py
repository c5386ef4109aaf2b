"""The paper's data sets: their preparation, against independent implementations of the paper's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from pyro_maf.datasets import ARCHIVE, Dataset, bsds300, cifar10, gas, hepmass, miniboone, mnist, power
from tests import archives
from tests.archives import BATCHES, WRITERS

DIMENSIONS = {"power": 6, "gas": 8, "hepmass": 21, "miniboone": 43, "bsds300": 63, "mnist": 784, "cifar10": 3072}


def close(actual: Tensor, expected: Any) -> None:
    """Whether two arrays are equal up to rounding in float32."""
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), torch.from_numpy(np.array(expected, dtype=float)), rtol=1e-6, atol=1e-6)


def parts(data: Dataset) -> list[int]:
    return [len(data.train), len(data.validation), len(data.test)]


def whole(data: Dataset) -> Tensor:
    return torch.cat([data.train, data.validation, data.test])


# -- preparation -------------------------------------------------------------------------------------------------------


def test_power_is_shuffled_thinned_out_untied_and_standardised_in_the_published_order(tmp_path: Path) -> None:
    table = archives.write_power(tmp_path)
    random = np.random.RandomState(42)
    random.shuffle(table)  # in place, while the loader uses a permutation
    voltage, active, metering = random.rand(200, 1) * 0.01, random.rand(200, 1) * 0.001, random.rand(200, 3)
    frame = pd.DataFrame(table).drop(columns=[1, 3])
    frame = frame + np.hstack([active, voltage, metering, np.zeros((200, 1))])
    frame = (frame - frame[:180].mean()) / frame[:180].std(ddof=0)
    data = power(tmp_path)
    close(data.train, frame[:162])
    close(data.validation, frame[162:180])
    close(data.test, frame[180:])


def test_powers_noise_breaks_ties_but_not_those_of_the_time(tmp_path: Path) -> None:
    table = archives.write_power(tmp_path, rows=400)
    rows = whole(power(tmp_path))
    given = [len(np.unique(table[:, column])) for column in (0, 2, 4, 5, 6, 7)]
    assert max(given) < 400
    assert [len(column.unique()) for column in rows.T][:5] == [400] * 5
    assert len(rows[:, 5].unique()) == given[5]


def test_miniboone_is_standardised_by_all_but_its_test_rows(tmp_path: Path) -> None:
    table = archives.write_miniboone(tmp_path, rows=157)
    data = miniboone(tmp_path)
    assert parts(data) == [128, 14, 15]
    mean, deviation = table[:142].mean(0), np.sqrt(((table[:142] - table[:142].mean(0)) ** 2).sum(0) / 142)
    close(whole(data), (table - mean) / deviation)


@pytest.mark.parametrize("columns", [28, 29])
def test_hepmass_keeps_the_signal_and_the_continuous_features(tmp_path: Path, columns: int) -> None:
    train, test = (pd.DataFrame(table[:, :28]) for table in archives.write_hepmass(tmp_path, columns=columns))
    train, test = (frame[frame[0] == 1].drop(columns=0) for frame in (train, test))
    repeats = {feature: int(train[feature].value_counts()[train[feature].min()]) for feature in train}
    assert repeats[3] == 5
    assert sorted(feature for feature, count in repeats.items() if count > 5) == [1 + one for one in archives.DISCRETE]
    kept = [feature for feature, count in repeats.items() if count <= 5]
    train, test = ((frame[kept] - train[kept].mean()) / train[kept].std() for frame in (train, test))
    validation = len(train) // 10
    data = hepmass(tmp_path)
    close(data.train, train[:-validation])
    close(data.validation, train[-validation:])
    close(data.test, test)


def test_bsds300_is_taken_as_it_is(tmp_path: Path) -> None:
    tables = archives.write_bsds300(tmp_path)
    data = bsds300(tmp_path)
    for part, rows in tables.items():
        assert torch.equal(getattr(data, part), torch.from_numpy(rows.astype(np.float32)))


def uncorrelated(sensors: pd.DataFrame) -> pd.DataFrame:
    """The frame after repeatedly dropping the first column with a correlation above 0.98."""
    for name in sensors:
        others = [sensors[name].corr(sensors[other]) for other in sensors if other != name]
        if max(others) > 0.98:
            return uncorrelated(sensors.drop(columns=name))
    return sensors


def expected_gas(frame: pd.DataFrame) -> np.ndarray:
    sensors = uncorrelated(frame.drop(columns=["Time", "Meth", "Eth"]))
    assert sensors.shape[1] == 8
    return ((sensors - sensors.mean()) / sensors.std()).to_numpy()


def test_gas_of_the_archives_frame_drops_sensors_that_go_together(tmp_path: Path) -> None:
    frame = archives.write_gas_parquet(tmp_path)
    data = gas(tmp_path)
    tenth, rest = len(frame) // 10, len(frame) - len(frame) // 10
    assert parts(data) == [rest - rest // 10, rest // 10, tenth]
    close(whole(data), expected_gas(frame))


def test_gas_of_ucis_text_is_a_quarter_of_its_rows_at_random(tmp_path: Path) -> None:
    frame = archives.write_gas_text(tmp_path, rows=401)
    drawn = np.random.RandomState(42).permutation(401)[:100]
    data = gas(tmp_path)
    assert parts(data) == [81, 9, 10]
    close(whole(data), expected_gas(frame.iloc[drawn]))


def test_a_sensor_that_mirrors_another_is_kept(tmp_path: Path) -> None:
    frame = archives.sensor_frame(groups=7)
    frame["R15"] = -frame["R0"]
    archives.write_gas_parquet(tmp_path, frame)
    close(whole(gas(tmp_path)), expected_gas(frame))


def test_gas_prefers_the_frame_to_the_text(tmp_path: Path) -> None:
    archives.write_gas_text(tmp_path)
    assert parts(gas(tmp_path)) == [81, 9, 10]
    converted = archives.write_gas_parquet(tmp_path, archives.sensor_frame(seed=11))
    close(whole(gas(tmp_path)), expected_gas(converted))


def logits(levels: np.ndarray, noise: np.ndarray, margin: float) -> np.ndarray:
    squeezed = margin + (1 - 2 * margin) * (levels / 256 + noise / 256)
    return np.log(squeezed) - np.log1p(-squeezed)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_is_dequantised_by_the_published_noise(tmp_path: Path, suffix: str) -> None:
    images = archives.write_mnist(tmp_path, suffix)
    levels = np.concatenate([images[part][0].reshape(-1, 784) for part in ("train", "t10k")])
    labels = np.concatenate([images[part][1] for part in ("train", "t10k")])
    data = mnist(tmp_path)
    assert parts(data) == [55, 11, 13]
    close(whole(data), logits(levels, np.random.RandomState(42).rand(79, 784), 1e-6))
    contexts = [data.train_context, data.validation_context, data.test_context]
    close(torch.cat([one for one in contexts if one is not None]), np.eye(10)[labels])


def test_cifar10_is_dequantised_and_its_training_images_mirrored(tmp_path: Path) -> None:
    images = archives.write_cifar10(tmp_path)
    levels, labels = (np.concatenate([images[name][i] for name in BATCHES]) for i in (0, 1))
    expected = logits(levels, np.random.RandomState(42).rand(72, 3072), 0.05)
    mirrored = np.empty((54, 3, 32, 32))
    for column in range(32):
        mirrored[..., column] = expected[:54].reshape(54, 3, 32, 32)[..., 31 - column]
    data = cifar10(tmp_path)
    close(data.train, np.concatenate([expected[:54], mirrored.reshape(54, 3072)]))
    close(data.validation, expected[54:60])
    close(data.test, expected[60:])
    for context, given in (
        (data.train_context, np.tile(labels[:54], 2)),
        (data.validation_context, labels[54:60]),
        (data.test_context, labels[60:]),
    ):
        assert context is not None
        close(context, np.eye(10)[given])


def test_more_images_than_are_prepared_at_a_time_get_one_stream_of_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives.write_mnist(tmp_path)
    at_once = mnist(tmp_path)
    monkeypatch.setattr("pyro_maf.datasets.archive.mnist_cifar10.ROWS_AT_A_TIME", 7)
    assert torch.equal(whole(mnist(tmp_path)), whole(at_once))


@pytest.mark.parametrize(("name", "margin"), [("mnist", 1e-6), ("cifar10", 0.05)])
def test_pixels_carry_densities_back_with_the_jacobian_of_autograd(tmp_path: Path, name: str, margin: float) -> None:
    WRITERS[name](tmp_path)
    data = ARCHIVE[name](tmp_path)
    assert data.pixels is not None
    assert (data.pixels.levels, data.pixels.margin) == (256, margin)
    y = data.test[:, 500:700].double()[:3]
    jacobians = [torch.autograd.functional.jacobian(data.pixels.to_logits, data.pixels.to_pixels(row)) for row in y]
    expected = torch.linalg.slogdet(torch.stack(jacobians)).logabsdet
    torch.testing.assert_close(data.pixels.log_jacobian(y), expected)
    log_prob = torch.tensor([-3.0, 0.0, 250.0], dtype=torch.float64)
    bits = 8 - (log_prob + expected) / 200 / np.log(2)
    torch.testing.assert_close(data.pixels.bits_per_pixel(log_prob, y), bits)


# -- the registry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHIVE)
def test_every_set_is_loaded_by_name_and_leaves_global_generators_alone(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    data, again = ARCHIVE[name](str(tmp_path)), ARCHIVE[name](tmp_path)
    assert np.random.get_state()[1].tolist() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert data.name.lower().replace("-", "") == name
    assert (data.input_dim, data.context_dim) == (DIMENSIONS[name], 10 if name in ("mnist", "cifar10") else 0)
    for part in ("train", "validation", "test"):
        rows = getattr(data, part)
        assert rows.dtype == torch.float32
        assert rows.isfinite().all()
        assert torch.equal(rows, getattr(again, part))
