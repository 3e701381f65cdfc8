"""Stage ``fit``: train the method."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from experiments.config.instantiation import build
from experiments.run import interruption, loggers, parts
from experiments.run.checkpoint_io import META, DirectoryCheckpointIO
from experiments.run.directory import Run
from experiments.stages import Facts, stage

log = logging.getLogger("run")


@stage(every_rank=True)
def fit(run: Run, data: Callable[[Run], pl.LightningDataModule] = parts.datamodule) -> Facts:
    """Train from scratch, from ``checkpoint`` (fine-tuning), or from this run's own last checkpoint (resume).

    Args:
        run: the run.
        data: ``(run) -> datamodule`` that is trained on.
    """
    data = data(run)
    for note in getattr(data, "notes", []):
        run.note(note)
    torch.manual_seed(run.cfg.seed)  # the weights start alike, whether the features were encoded now or before
    module = parts.module(run, data.facts())
    last = run.dir / "checkpoints" / "last"
    resume = last if last.is_dir() else None
    if run.cfg.checkpoint and not resume:
        parts.load_weights(module, Path(run.cfg.checkpoint), fine_tune=True)
    resume_step = json.loads((resume / META).read_text())["global_step"] if resume else None
    trainer = build(
        run.cfg.trainer,
        default_root_dir=str(run.dir),
        logger=_loggers(run, resume_step),
        callbacks=[build(node) for node in (run.cfg.callbacks or {}).values() if node],
        plugins=[DirectoryCheckpointIO()],
        enable_checkpointing=False,  # experiments.run.callbacks.Checkpoints does it
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    log.info("fit: %.2f M trainable parameters, %s", count / 1e6, f"from step {resume_step}" if resume else "from step 0")
    with interruption.deferred():
        trainer.fit(module, datamodule=data, ckpt_path=str(resume) if resume else None, weights_only=True)
    parts.note_skipped(run)
    data.trainer = None  # later stages see whole splits, not one rank's share
    return {"steps": trainer.global_step, "epochs": trainer.current_epoch, "trainable_parameters": count}


def _loggers(run: Run, resume_step: int | None) -> list:
    active: list = [loggers.MetricsFile(run.dir, resume_step)]
    for node in (run.cfg.logger or {}).values():
        if node:
            name = f"{run.record['experiment']}/{run.dir.name}"
            config = OmegaConf.to_container(run.cfg, resolve=True)
            active.append(build(node)(folder=run.dir, name=name, config=config))
    return [logger for logger in active if logger is not None]
