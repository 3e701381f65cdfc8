"""Stage ``fit``: train the method."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra import compose

from experiments.config.conflicts import batch_key_conflicts
from experiments.config.instantiation import build
from experiments.config.overrides import key_of
from experiments.run import interruption, loggers, parts
from experiments.run.checkpoint_io import DirectoryCheckpointIO, newest_sound, read_meta
from experiments.run.directory import Run
from experiments.stages import Facts, stage
from models.errors import UserError

log = logging.getLogger("run")


@stage(every_rank=True)
def fit(run: Run, data: Callable[[Run], Any] = parts.datamodule) -> Facts:
    """Train from scratch, from ``checkpoint`` (fine-tuning), or from this run's own last checkpoint (resume).

    Args:
        run: the run.
        data: ``(run) -> datamodule`` that is trained on.
    """
    datamodule = data(run)
    for note in getattr(datamodule, "notes", []):
        run.note(note)
    torch.manual_seed(run.cfg.seed)  # the weights start alike, whether the features were encoded now or before
    module = parts.module(run, datamodule.facts())
    conflicts = batch_key_conflicts(module, datamodule)
    if conflicts:
        raise UserError("\n".join(conflicts))
    resume = _resume_point(run)
    if run.cfg.checkpoint and not resume:
        parts.load_weights(module, Path(run.cfg.checkpoint), fine_tune=True)
    if not run.cfg.checkpoint and _recipe_asks_for_weights(run):
        run.note("RANDOM WEIGHTS: the recipe starts from a checkpoint; with checkpoint=null the model starts from nothing.")
    callbacks = [build(node) for node in (run.cfg.callbacks or {}).values() if node]
    if "val" not in datamodule.splits:
        run.note("NO VAL SPLIT: no checkpoint is chosen and nothing stops early; the last checkpoint counts.")
        callbacks = [c for c in callbacks if not (isinstance(c, pl.callbacks.EarlyStopping) and c.monitor.startswith("val/"))]
    meta = read_meta(resume) if resume else {"global_step": 0, "metrics_bytes": 0}
    trainer = build(
        run.cfg.trainer,
        default_root_dir=str(run.dir),
        logger=[loggers.MetricsFile(run.dir, meta["metrics_bytes"]), *loggers.configured(run)],
        callbacks=callbacks,
        plugins=[DirectoryCheckpointIO()],
        enable_checkpointing=False,  # experiments.run.callbacks.Checkpoints does it
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    log.info("fit: %.2f M trainable parameters, from step %d", count / 1e6, meta["global_step"])
    with interruption.deferred(), interruption.handled_here(trainer):
        trainer.fit(module, datamodule=datamodule, ckpt_path=str(resume) if resume else None, weights_only=True)
    parts.note_skipped(run)
    datamodule.trainer = None  # later stages see whole splits, not one rank's share
    return {
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "trainable_parameters": count,
        "label_names": list(parts.datamodule(run).label_names),
        "trained_on": parts.description_of_data(run),
    }


def _recipe_asks_for_weights(run: Run) -> bool:
    """Whether ``checkpoint=null`` on the command line takes the place of weights that the recipe starts from."""
    others = [override for override in run.overrides if key_of(override) != "checkpoint"]
    if len(others) == len(run.overrides):
        return False
    return compose("config", overrides=others).checkpoint is not None


def _resume_point(run: Run) -> Path | None:
    """The checkpoint that this run goes on from; None to begin."""
    folder = run.dir / "checkpoints"
    checkpoint, problems = newest_sound(folder)
    for problem in problems:
        instead = f"goes on from '{checkpoint.name}'" if checkpoint else "begins anew"
        run.note(f"DAMAGED CHECKPOINT, training {instead}: {problem}")
    return checkpoint
