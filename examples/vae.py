"""A variational autoencoder of digits: flows for its prior and its posterior against normals for both.

What it shows: with the same encoder and decoder, the same data and as many steps, a MAF that is trained as the prior
and an IAF on the encoder's output as the posterior give a tighter bound on the log-likelihood of images that neither
saw than a standard normal prior and a diagonal normal posterior: by 3.5 nats an image in the ELBO, 3.8 in the
importance-weighted bound, two standard errors of these being 1.3 and 1.1. The gain depends on how long
both are trained: on the validation images it was larger after fewer steps and, when the last weights were kept rather
than the best, within the noise after 6,000.

The images are scikit-learn's digits, 8 x 8 pixels that count 0 to 16: the likelihood is Binomial(16, p), its p the
decoder's. Settings were chosen on the validation images; the test images are used once, at the end.

Run with `python examples/vae.py --out demo`. Takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pyro_maf import MAF, ConditionalIAF, FlowPrior, plotting
from pyro_maf.experiments import estimate

CONSOLE = Console()
LEVELS = 16  # pixels count 0 .. 16
PIXELS = 64
FEATURES = 32  # of an image that the IAF sees
CHECK_PARTICLES = 10


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths, the same for both autoencoders."""

    latent_dim: int = 8
    hidden_dim: int = 128
    steps: int = 5000
    check_every: int = 250
    batch_size: int = 100
    learning_rate: float = 2e-3
    particles: int = 200


@dataclass(frozen=True)
class Digits:
    """Counts (rows, 64) of the images for training, for the choice of settings, and for the final score."""

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True)
class Scores:
    """ELBO and importance-weighted bound of each image, (rows,), in nats."""

    elbo: Tensor
    bound: Tensor


class VAE(nn.Module):
    """p(z) p(x | z) and q(z | x), each with a flow if one is passed, or else normal."""

    def __init__(self, settings: Settings, prior: FlowPrior | None = None, flow: ConditionalIAF | None = None) -> None:
        super().__init__()
        self.settings = settings
        latent, hidden = settings.latent_dim, settings.hidden_dim
        self.encoder = nn.Sequential(
            nn.Linear(PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, PIXELS)
        )
        self.features = nn.Linear(PIXELS, FEATURES) if flow is not None else None
        self.learned_prior = prior
        self.flow = flow

    def prior(self) -> Any:
        """p(z)."""
        if self.learned_prior is not None:
            return self.learned_prior
        return dist.Normal(torch.zeros(self.settings.latent_dim), 1.0).to_event(1)

    def posterior(self, x: Tensor) -> Any:
        """q(z | x)."""
        x = x / LEVELS
        loc, log_scale = self.encoder(x).chunk(2, -1)
        normal = dist.Normal(loc, log_scale.clamp(-7, 3).exp()).to_event(1)
        if self.flow is None or self.features is None:
            return normal
        context = torch.tanh(self.features(x))
        return dist.TransformedDistribution(normal, [self.flow.condition(context)])

    def likelihood(self, z: Tensor) -> Any:
        """p(x | z)."""
        return dist.Binomial(LEVELS, logits=self.decoder(z)).to_event(1)

    def model(self, x: Tensor, size: int | None = None) -> None:
        pyro.module("decoder", self.decoder)
        if self.learned_prior is not None:
            pyro.module("prior", self.learned_prior)
        with pyro.plate("images", len(x), subsample_size=size) as rows, poutine.scale(scale=1 / len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x[rows])

    def guide(self, x: Tensor, size: int | None = None) -> None:
        pyro.module("encoder", self.encoder)
        if self.flow is not None:
            pyro.module("flow", self.flow)
            pyro.module("features", self.features)
        with pyro.plate("images", len(x), subsample_size=size) as rows, poutine.scale(scale=1 / len(x)):
            pyro.sample("z", self.posterior(x[rows]))


def digits(train: int = 1197, validation: int = 200, test: int = 400) -> Digits:
    """The shuffled images in three parts."""
    counts = torch.from_numpy(load_digits().data).float()
    shuffled = counts[torch.randperm(len(counts), generator=torch.Generator().manual_seed(0))]
    held_out = shuffled[len(counts) - test - validation :]
    return Digits(shuffled[:train], held_out[:validation], held_out[validation:])


def make(name: str, settings: Settings) -> VAE:
    """An autoencoder by name; encoder and decoder start from the same weights in both."""
    prior = flow = None
    if name == "flows":
        prior = FlowPrior(MAF(settings.latent_dim, num_layers=3))
        flow = ConditionalIAF(settings.latent_dim, FEATURES, num_layers=2)
    torch.manual_seed(0)
    return VAE(settings, prior, flow)


def train(vae: VAE, data: Digits) -> float:
    """Maximise the ELBO of the training images, restore the weights of best validation score; return the seconds."""
    started = time.monotonic()
    settings = vae.settings
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    # The learning rate decays exponentially to a twentieth.
    options = {"lr": settings.learning_rate, "lrd": 0.05 ** (1 / settings.steps)}
    svi = SVI(vae.model, vae.guide, ClippedAdam(options), Trace_ELBO())
    best, best_state = -math.inf, copy.deepcopy(vae.state_dict())
    for step in range(1, settings.steps + 1):
        svi.step(data.train, settings.batch_size)
        if step % settings.check_every == 0 or step == settings.steps:
            elbo = score(vae, data.validation, CHECK_PARTICLES).elbo.mean().item()
            if elbo > best:
                best, best_state = elbo, copy.deepcopy(vae.state_dict())
    vae.load_state_dict(best_state)
    return time.monotonic() - started


@torch.no_grad()
def score(vae: VAE, x: Tensor, particles: int) -> Scores:
    """Bounds on log p(x) of each image from draws of its posterior.

    With w_k = p(x, z_k) / q(z_k | x), the ELBO is the mean of log w_k, and the tighter bound log of the mean of w_k.
    """
    log_weights = []
    for _ in range(particles):
        posterior = vae.posterior(x)
        z = posterior.rsample()
        log_joint = vae.prior().log_prob(z) + vae.likelihood(z).log_prob(x)
        log_weights.append(log_joint - posterior.log_prob(z))
    log_w = torch.stack(log_weights)
    return Scores(log_w.mean(0), log_w.logsumexp(0) - math.log(len(log_w)))


def table(scores: dict[str, Scores], seconds: dict[str, float]) -> Table:
    """Scores of both autoencoders, and the paired gain of the flows."""
    shown = Table(title="Held-out images: nats per image, with two standard errors")
    for heading in ("", "ELBO", "importance-weighted", "training, s"):
        shown.add_column(heading, justify="right" if heading else "left")
    for name, its in scores.items():
        shown.add_row(name, str(estimate(its.elbo)), str(estimate(its.bound)), f"{seconds[name]:.0f}")
    shown.add_section()
    gain = gains(scores)
    shown.add_row("gain of the flows, paired", str(estimate(gain.elbo)), str(estimate(gain.bound)), "")
    return shown


def gains(scores: dict[str, Scores]) -> Scores:
    """Gain of the flows on each image."""
    flows, normals = scores["flows"], scores["normals"]
    return Scores(flows.elbo - normals.elbo, flows.bound - normals.bound)


@torch.no_grad()
def draw(out: Path, vaes: dict[str, VAE], x: Tensor) -> None:
    """Reconstructions of images, and images from the prior: the mean of each pixel."""
    pyro.set_rng_seed(0)
    reconstructions = {name: vae.likelihood(vae.posterior(x).sample()).mean for name, vae in vaes.items()}
    samples = {name: vae.likelihood(vae.prior().sample((64,))).mean for name, vae in vaes.items()}
    for stem, images, title in (
        ("reconstructions", reconstructions, "Held-out images and their reconstructions"),
        ("samples", samples, "Held-out images and draws from each autoencoder"),
    ):
        path = out / f"vae-{stem}.png"
        plotting.image_grid({"held-out images": x[:64], **images}, title=title).savefig(path)
        CONSOLE.print(f"wrote {path}", soft_wrap=True)


def run(
    settings: Settings, data: Digits, held_out: Tensor
) -> tuple[dict[str, VAE], dict[str, Scores], dict[str, float]]:
    """Train both autoencoders and score them on the held-out images."""
    vaes, scores, seconds = {}, {}, {}
    for name in ("normals", "flows"):
        CONSOLE.print(f"training with {name}: {settings.steps:,} steps")
        vaes[name] = make(name, settings)
        seconds[name] = train(vaes[name], data)
        pyro.set_rng_seed(0)
        scores[name] = score(vaes[name].eval(), held_out, settings.particles)
    return vaes, scores, seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, score, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures (default: demo)")
    parser.add_argument(
        "--steps", type=int, default=Settings.steps, help="training steps of each (default: %(default)s)"
    )
    parser.add_argument("--validation", action="store_true", help="score the validation images, to choose settings by")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    data = digits()
    held_out = data.validation if options.validation else data.test
    vaes, scores, seconds = run(Settings(steps=options.steps), data, held_out)
    draw(options.out, vaes, held_out)
    CONSOLE.print(table(scores, seconds))
    CONSOLE.print(f"pictures in {options.out}")


if __name__ == "__main__":
    main()
