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
from experiments.run import compilation, interruption, loggers, parts
from experiments.run.activations import recompute_blocks
from experiments.run.callbacks import DataWait
from experiments.run.checkpoint_io import DirectoryCheckpointIO, newest_sound, read_meta
from experiments.run.directory import Run
from experiments.run.micro_batches import MicroBatches
from experiments.run.origin import check_hashes, check_held_out
from experiments.stages import Facts, stage
from models.errors import UserError

log = logging.getLogger("run")
MUCH_WAITING = 0.1  # share of the training time that is worth a note
ENOUGH_STEPS = 20  # with fewer the first batch, whose readers have yet to start, would decide


@stage(every_rank=True, gives_weights=True)
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
        check_held_out(run)
        check_hashes(run, getattr(datamodule, "hashes", {}))
        parts.load_weights(module, Path(run.cfg.checkpoint), fine_tune=True)
    if not run.cfg.checkpoint and module.initial_weights() is None and _recipe_asks_for_weights(run):
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
    blocks = recompute_blocks(module) if run.cfg.get("activation_checkpointing") else None
    micro_batches = MicroBatches(run.cfg.micro_batch_size) if run.cfg.get("micro_batch_size") else None
    if micro_batches is not None:
        micro_batches.install(module)
    if run.cfg.get("compile"):
        compilation.compile_networks(module)
    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    log.info("fit: %.2f M trainable parameters, from step %d", count / 1e6, meta["global_step"])
    with interruption.deferred(), interruption.handled_here(trainer):
        trainer.fit(module, datamodule=datamodule, ckpt_path=str(resume) if resume else None, weights_only=True)
    if blocks is not None and not any(block.recomputed for block in blocks):
        run.note("NOTHING RECOMPUTED: activation_checkpointing=true finds no blocks in this network and saves no memory.")
    if micro_batches is not None and not micro_batches.cut:
        run.note(f"NOTHING CUT: no batch of this network had more than micro_batch_size={micro_batches.size} rows.")
    if getattr(trainer.strategy, "blocks", None) == []:
        run.note("NOTHING SHARDED: trainer=fsdp finds no repeated layers in this network; trainer=ddp does the same, faster.")
    parts.note_skipped(run)
    results = {**_data_wait(run, trainer, datamodule), **_compilation(run)}
    datamodule.trainer = None  # later stages see whole splits, not one rank's share
    return {
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "trainable_parameters": count,
        "label_names": list(parts.datamodule(run).label_names),
        "hashes": dict(getattr(datamodule, "hashes", {})),
        "trained_on": parts.description_of_data(run),
        "result": results,
    }


def _data_wait(run: Run, trainer: pl.Trainer, datamodule: Any) -> dict[str, float]:
    """Which share of the training went by waiting for data; a large one becomes a note that names the knob."""
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it by setattr
    measured = next((callback for callback in callbacks if isinstance(callback, DataWait)), None)
    if measured is None or not measured.steps:
        return {}
    share = measured.share
    if share > MUCH_WAITING and measured.steps >= ENOUGH_STEPS:
        run.note(
            f"WAITING FOR DATA: {share:.0%} of the training time. {datamodule.workers_key} is {datamodule.workers()} for each "
            "device; more processes read faster where cores are free."
        )
    return {"data_wait_share": share}


def _compilation(run: Run) -> dict[str, Any]:
    """How often networks were compiled; many times over becomes a note."""
    if not run.cfg.get("compile"):
        return {}
    counts = compilation.counted()
    log.info("compile: %d compilations, %d of them again", counts["compilations"], counts["recompilations"])
    if counts["recompilations"] > counts["compilations"] // 2:
        run.note(
            f"COMPILED AGAIN: {counts['recompilations']} of {counts['compilations']} compilations, because shapes or settings "
            "changed between steps. TORCH_LOGS=recompiles names the reasons; compile=false may be faster."
        )
    return {"compile": counts}


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
