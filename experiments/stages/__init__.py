"""The stages of a run: plain functions ``(run) -> facts``, named in ``conf/pipeline/*.yaml`` with their settings."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.run.directory import Run

log = logging.getLogger("run")
Facts = dict[str, Any]


def stage(
    every_rank: bool = False, repeat: bool = False, needs_weights: bool = False, gives_weights: bool = False
) -> Callable[[Callable], Callable]:
    """Marks a stage function.

    Args:
        every_rank: all processes of a distributed run take part; without it the main process works alone.
        repeat: runs again after a stage that was not done, and where it is asked for alone.
        needs_weights: works with trained weights, from an earlier stage or from ``checkpoint``.
        gives_weights: leaves trained weights in the run directory.
    """

    def mark(function: Any) -> Callable:
        function.every_rank, function.repeat = every_rank, repeat
        function.needs_weights, function.gives_weights = needs_weights, gives_weights
        return function

    return mark


def run_stages(run: Run) -> bool:
    """Run the configured stages that the run's record does not show as done.

    Returns:
        False for a process of a distributed run whose share of the work is done: the main process goes on alone.
    """
    import pytorch_lightning as pl
    import torch

    from experiments.config.instantiation import build
    from experiments.run import distributed, interruption
    from experiments.run.origin import check_configuration
    from experiments.run.ranks import is_main_process

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
