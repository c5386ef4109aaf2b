"""Lightning's loop around a fit: devices, output and ending."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from pyro_maf.training.log import Log
from pyro_maf.training.module import MaximumLikelihood
from pyro_maf.training.processes import Processes
from pyro_maf.training.progress import ProgressBar

__all__ = ["MaximumLikelihood", "maximise"]

ACCELERATORS = {"cpu": "cpu", "cuda": "gpu", "mps": "mps"}


def maximise(module: MaximumLikelihood, *, max_epochs: int, device: torch.device, progress: bool | str) -> None:
    """Train `module`; leave it on `device` with its best weights, in eval mode.

    Args:
        module: The module to train, perhaps from a checkpoint.
        max_epochs: Maximum number of epochs, those before the checkpoint included.
        device: The device; with several processes on GPUs, each takes a different one.
        progress: As in `fit`.

    Raises:
        Abandoned: At a second Ctrl-C.
    """
    remaining = max_epochs - len(module.history)
    try:
        module.train()
        if remaining > 0 and not (module.stop_reason or module.schedule.reason):
            with _quiet():
                trainer = _trainer(device, module.processes, remaining, _callbacks(module, progress))
                trainer.fit(module, train_dataloaders=module.batches, val_dataloaders=module.held_out)
    finally:
        module.interruption.settle()
        # Lightning leaves the trained weights on the CPU.
        module.density.to(device)
        module.restore_best()
        module.density.eval()


def _trainer(device: torch.device, processes: Processes, max_epochs: int, callbacks: list[Callback]) -> Trainer:
    several = processes.are_several
    return Trainer(
        accelerator=ACCELERATORS[device.type],
        devices=[device.index or 0] if device.type == "cuda" and not several else processes.here,
        num_nodes=processes.machines,
        # `BatchNorm` synchronises its statistics; all other state is the same in all processes.
        strategy=DDPStrategy(broadcast_buffers=False) if several else "auto",
        plugins=[TorchElasticEnvironment() if processes.by_torchrun else LightningEnvironment()],
        use_distributed_sampler=False,
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


def _callbacks(module: MaximumLikelihood, progress: bool | str) -> list[Callback]:
    if not module.processes.is_first:
        return []
    bar: list[Callback] = [ProgressBar(progress, module)]
    return bar if module.keeper is None else [Log(module.keeper.folder, module.history), *bar]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's messages about its internals, while entered."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # From Lightning's use of torch.
            warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated", category=FutureWarning)
            # Versions of torch before 2.13 lack its successor.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            # The device was the caller's choice.
            warnings.filterwarnings("ignore", message="(GPU|TPU|MPS) available but not used")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
