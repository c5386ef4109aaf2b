"""Time that `fit` takes to 95 % of its final gain, against the spline flows of zuko and flowjax.

    python benchmarks/fit_times.py [FILE.npz ...] [--rows 10000] [--longest 3]

A file holds arrays train, val and test, (rows, D); a synthetic table of six clusters with heavy tails, eight columns,
is always included. All packages get the same standardised rows and one thread. `fit` has its defaults; the peers have
five layers of splines with eight bins and two hidden layers of 128 units. zuko's flow is trained by a loop as its users
write it: Adam, batches of 256 rows, clipped gradients, the learning rate halved after 7 epochs without a better
validation loss, early stopping after 30. flowjax's is trained by its `fit_to_data` with the same batches, patience and
learning rate. Each peer has `--longest` times the processor seconds of `fit`.

Gains are in validation log-likelihood over independent standard normal columns. zuko's processor seconds are measured
after each epoch; those of `fit` are the total, distributed as in its log; flowjax's are the total after compilation,
distributed evenly.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import flowjax.bijections
import flowjax.distributions
import flowjax.flows
import flowjax.train
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import zuko
from torch import Tensor

import pyro_maf

LAYERS, HIDDEN, BINS, BATCH, RATE, PATIENCE = 5, (128, 128), 8, 256, 2e-3, 30
SHARE = 0.95


class Parts(NamedTuple):
    """Training, validation and test rows."""

    train: Tensor
    validation: Tensor
    test: Tensor


class Curve(NamedTuple):
    """Learning curve of a fit: validation log-likelihood and processor seconds after each epoch, and test score."""

    scores: list[float]
    seconds: list[float]
    test: float

    def until(self, score: float) -> float | None:
        """Processor seconds until a validation log-likelihood was reached; None if it never was."""
        return next((spent for value, spent in zip(self.scores, self.seconds, strict=True) if value >= score), None)


def ours(parts: Parts) -> Curve:
    """Curve of `fit` with its defaults."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = pyro_maf.fit(parts.train, validation=parts.validation, folder=folder, progress=False)
        spent = time.process_time() - began
        with (Path(folder) / "log.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    seconds = [float(row["seconds"]) * spent / result.seconds for row in rows]
    return Curve([-float(row["validation_loss"]) for row in rows], seconds, result.score(parts.test).mean().item())


def of_zuko(parts: Parts, most: float) -> Curve:
    """Curve of zuko's `NSF`, for at most `most` processor seconds, rounded up to an epoch."""
    torch.manual_seed(0)
    began, best, best_epoch, scores, seconds = time.process_time(), float("-inf"), 0, list[float](), list[float]()
    flow = zuko.flows.NSF(parts.train.shape[1], bins=BINS, transforms=LAYERS, hidden_features=HIDDEN)
    optimizer = torch.optim.Adam(flow.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=PATIENCE // 4)
    while len(scores) - best_epoch < PATIENCE and (not seconds or seconds[-1] < most):
        for index in torch.randperm(len(parts.train)).split(BATCH):
            optimizer.zero_grad()
            (-flow().log_prob(parts.train[index]).mean()).backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
            optimizer.step()
        with torch.no_grad():
            scores.append(flow().log_prob(parts.validation).mean().item())
        schedule.step(scores[-1])
        if scores[-1] > best:
            best, best_epoch, weights = scores[-1], len(scores), copy.deepcopy(flow.state_dict())
        seconds.append(time.process_time() - began)
    flow.load_state_dict(weights)
    with torch.no_grad():
        return Curve(scores, seconds, flow().log_prob(parts.test).mean().item())


def of_flowjax(parts: Parts, most: float) -> Curve:
    """Curve of flowjax's masked autoregressive splines, for about `most` processor seconds after compilation."""
    rows = jnp.asarray(torch.cat(parts[:2]).numpy())
    flow = flowjax.flows.masked_autoregressive_flow(
        jax.random.key(0),
        base_dist=flowjax.distributions.Normal(jnp.zeros(rows.shape[1])),
        transformer=flowjax.bijections.RationalQuadraticSpline(knots=BINS, interval=5),
        flow_layers=LAYERS,
        nn_width=HIDDEN[0],
        nn_depth=len(HIDDEN),
    )

    # Shared by all calls, so that the step is compiled once.
    optimizer, loss = optax.adam(RATE), flowjax.train.losses.MaximumLikelihoodLoss()

    def fit(epochs: int) -> tuple[flowjax.distributions.Transformed, list[float], float]:
        began = time.process_time()
        trained, losses = flowjax.train.fit_to_data(
            jax.random.key(1),
            flow,
            rows,
            optimizer=optimizer,
            loss_fn=loss,
            max_epochs=epochs,
            max_patience=PATIENCE,
            batch_size=BATCH,
            val_prop=len(parts.validation) / len(rows),
            show_progress=False,
        )
        return trained, losses["val"], time.process_time() - began

    first = fit(1)[2]
    epoch = fit(3)[2] / 3
    trained, losses, spent = fit(max(1, int(most / epoch)))
    seconds = [first - epoch + spent * number / len(losses) for number in range(1, len(losses) + 1)]
    test = float(trained.log_prob(jnp.asarray(parts.test.numpy())).mean())
    return Curve([-loss for loss in losses], seconds, test)


def synthetic(rows: int) -> Parts:
    """Clusters in eight columns, some heavy-tailed: `rows` training rows, a tenth as many for validation and test."""
    generator = torch.Generator().manual_seed(0)
    dim, clusters, count = 8, 6, rows + 2 * (rows // 10)
    centres = 2 * torch.randn(clusters, dim, generator=generator)
    factors = torch.randn(clusters, dim, dim, generator=generator) / dim**0.5
    which = torch.randint(clusters, (count,), generator=generator)
    noise = torch.randn(count, dim, generator=generator)
    data = centres[which] + torch.einsum("nij,nj->ni", factors[which], noise)
    data[:, ::3] = torch.sinh(data[:, ::3] / 2)
    return Parts(*data.split([rows, rows // 10, rows // 10]))


def stored(path: Path, rows: int) -> Parts:
    """Random rows of a file: at most `rows` for training, a tenth as many for validation and test."""
    with np.load(path) as arrays:
        parts = [torch.from_numpy(arrays[name]).float() for name in ("train", "val", "test")]
    generator = torch.Generator().manual_seed(0)
    sizes = (rows, rows // 10, rows // 10)
    return Parts(
        *(part[torch.randperm(len(part), generator=generator)[:size]] for part, size in zip(parts, sizes, strict=True))
    )


def lines(name: str, parts: Parts, longest: float) -> list[str]:
    """Rows of the results table, one for each package."""
    loc, scale = parts.train.mean(0), parts.train.std(0)
    parts = Parts(*((part - loc) / scale for part in parts))
    curves = {"pyro-maf": ours(parts)}
    most = longest * curves["pyro-maf"].seconds[-1]
    curves |= {"zuko": of_zuko(parts, most), "flowjax": of_flowjax(parts, most)}
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(parts.validation).sum(1).mean().item()
    highest = max(max(curve.scores) for curve in curves.values())
    rows = []
    for package, curve in curves.items():
        goals = [normal + SHARE * (best - normal) for best in (max(curve.scores), highest)]
        spent = [curve.until(goal) for goal in goals]
        times = " | ".join("never" if each is None else f"{each:.1f}" for each in [curve.seconds[-1], *spent])
        size = f"{len(parts.train):,} x {parts.train.shape[1]}"
        rows.append(f"| {name}, {size} | {package} | {len(curve.scores)} | {times} | {curve.test:.3f} |")
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Fit every package to every table; print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--rows", type=int, default=10_000, help="training rows; default: %(default)s")
    parser.add_argument("--longest", type=float, default=3.0, help="peer's time over that of fit; default: %(default)g")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pyro_maf.fit(torch.randn(100, 2), max_epochs=1, progress=False)  # compiles the kernels
    print("| table | | epochs | processor seconds | to 95 % of its gain | to 95 % of the best gain | test, nats |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    tables = {"clusters": synthetic(options.rows)}
    tables |= {path.stem: stored(path, options.rows) for path in options.files}
    for name, parts in tables.items():
        print(*lines(name, parts, options.longest), sep="\n", flush=True)


if __name__ == "__main__":
    main()
