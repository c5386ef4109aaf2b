"""Lightning's loop around a fit: where it runs, what it says, and how it ends."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from rich.console import Console

from pyro_maf.showing import shows
from pyro_maf.training.module import MaximumLikelihood
from pyro_maf.training.progress import ProgressBar

__all__ = ["MaximumLikelihood", "maximise"]

ACCELERATORS = {"cpu": "cpu", "cuda": "gpu", "mps": "mps"}


def maximise(module: MaximumLikelihood, *, max_epochs: int, progress: bool | str) -> None:
    """Train `module` where it is, and leave it there with its best weights, in eval mode.

    Raises:
        Abandoned: At a second Ctrl-C.
    """
    device = module.batches.rows.data.device
    try:
        module.train()
        with _quiet():
            trainer = _trainer(device, max_epochs, _callbacks(progress))
            trainer.fit(module, train_dataloaders=module.batches, val_dataloaders=module.held_out)
    finally:
        module.interruption.settle()
        # Lightning leaves what it trained on the CPU.
        module.density.to(device)
        module.restore_best()
        module.density.eval()


def _trainer(device: torch.device, max_epochs: int, callbacks: list[Callback]) -> Trainer:
    return Trainer(
        accelerator=ACCELERATORS[device.type],
        devices=[device.index or 0] if device.type == "cuda" else 1,
        plugins=[LightningEnvironment()],
        max_epochs=max_epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        # Statistics are set during validation: tensors made in inference mode could not be trained on.
        inference_mode=False,
    )


def _callbacks(progress: bool | str) -> list[Callback]:
    console = Console(stderr=True)
    return [ProgressBar(console)] if shows(progress, console) else []


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks on its own working from the user, for as long as this lasts."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Of Lightning's own use of torch.
            warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated", category=FutureWarning)
            # The device was the caller's choice.
            warnings.filterwarnings("ignore", message="(GPU|TPU|MPS) available but not used")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
