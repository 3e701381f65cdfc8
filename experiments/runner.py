"""Runs the stages of one run in order, then hands the number that ``optimize`` names back to the sweeper."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
import warnings
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.config.imported import check_imported
from experiments.config.validation import nearest
from experiments.run import interruption, loggers
from experiments.run.directory import Run, open_run
from experiments.run.ranks import is_main_process
from experiments.sweeps.pruning import Pruned
from models.errors import UserError

log = logging.getLogger("run")
# Of Lightning and torch, about themselves: nothing in them is for the user of a recipe.
CHATTER = (
    ".*LeafSpec.*", "Total length of .* across ranks is zero.*", "The number of training batches .* smaller than the logging.*",
    "The '.*_dataloader' does not have many workers.*", "`isinstance.*",
    "Found .* in eval mode at the start of training.*",
)  # fmt: skip


def run(cfg: DictConfig) -> float | None:
    """One run, front to back. Returns the metric named by ``optimize`` (None without one)."""
    _quieten()
    check_imported(cfg)
    log.handlers.clear()
    _log_to(logging.StreamHandler(sys.stderr))
    _check_objective(cfg)
    current = open_run(cfg)
    if is_main_process():
        _log_to(logging.FileHandler(current.dir / "run.log"))
    log.info("%s in %s", current.record["experiment"], current.dir)
    with interruption.listening():
        try:
            if not run_stages(current):
                return None  # the main process goes on alone
        except interruption.Interrupted as interrupted:
            current.set_status("interrupted")
            loggers.finish_wandb(succeeded=False)
            interruption.requeue(interrupted.signum)
            raise
        except BaseException as error:
            current.set_status("pruned" if isinstance(error, Pruned) else "failed")
            (current.dir / "error.log").write_text("".join(traceback.format_exception(error)))
            loggers.finish_wandb(succeeded=False)
            if isinstance(error, UserError):
                raise
            log.error("failed; the traceback is in %s", current.dir / "error.log")
            raise
    current.set_status("finished")
    loggers.finish_wandb(succeeded=True)
    return _objective(current)


def run_stages(run: Run) -> bool:
    """Run the configured stages that the run's record does not show as done.

    Returns:
        False for a process of a distributed run whose share of the work is done: the main process goes on alone.
    """
    import pytorch_lightning as pl
    import torch

    from experiments.config.instantiation import build
    from experiments.run import distributed
    from experiments.run.origin import check_configuration

    pl.seed_everything(run.cfg.seed, workers=True, verbose=False)
    if run.cfg.threads:
        torch.set_num_threads(run.cfg.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.cfg.tf32
    functions = {name: build(run.cfg.pipeline[name]) for name in run.cfg.stages}
    check_configuration(run)
    repeats = any(not run.is_done(name) for name in functions) or all(each.func.repeat for each in functions.values())
    for position, (name, function) in enumerate(functions.items()):
        later = list(functions.values())[position:]
        if not is_main_process() and not any(each.func.every_rank for each in later):
            return False
        if run.is_done(name) and not (function.func.repeat and repeats):
            log.info("%s: done before", name)
            continue
        interruption.check()
        run.stage = name
        began = time.monotonic()
        if function.func.every_rank:
            distributed.children_repeat(run)
        facts = function(run)
        if function.func.every_rank:
            distributed.leave_group()
        run.finish_stage(name, time.monotonic() - began, facts)
    return is_main_process()


def _check_objective(cfg: DictConfig) -> None:
    """Refuse a metric that cannot be, or that no finished job of the sweep has, before anything is computed."""
    name, hydra = cfg.optimize, HydraConfig.get()
    if name is None or "evaluate" not in cfg.stages:
        return
    if not name.startswith(("val/", "test/")):
        raise UserError(f"optimize: '{name}' is no metric of an evaluation; those are named test/<task>/<metric>.")
    if hydra.mode == RunMode.MULTIRUN:
        files = [file for file in Path(hydra.sweep.dir).glob("*/result.json") if file.is_file()]
        metrics = {metric for file in files for metric in json.loads(file.read_text())["metrics"]}
        if metrics and name not in metrics:
            raise UserError(f"optimize: no job of this sweep has the metric '{name}'.{nearest(name, metrics)}")


def _objective(current: Run) -> float | None:
    name, result = current.cfg.optimize, current.dir / "result.json"
    if name is None or not result.is_file():
        return None
    metrics = json.loads(result.read_text())["metrics"]
    if name not in metrics:
        raise UserError(f"optimize: the run has no metric '{name}'.{nearest(name, metrics)}")
    return metrics[name]


def _log_to(handler: logging.Handler) -> None:
    """Plain lines of our own; Lightning's and the libraries' chatter stays out of sight."""
    root = logging.getLogger("run")
    root.propagate = False
    root.setLevel(logging.INFO if is_main_process() else logging.ERROR)  # the other ranks would say everything again
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    root.addHandler(handler)


def _quieten() -> None:
    """Keep the remarks of libraries about themselves off the screen."""
    for message in CHATTER:
        warnings.filterwarnings("ignore", message=message)
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "httpx", "huggingface_hub", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
