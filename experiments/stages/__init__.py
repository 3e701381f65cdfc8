"""The stages of a run: one module and one plain function each, named after the stage."""

from __future__ import annotations

import importlib
import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.run.directory import Run

log = logging.getLogger("run")
FOLDER = dict.fromkeys(("encode", "assess", "export"), "alignment")


def run_stages(run: Run) -> None:
    """Run the configured stages that the run's record does not show as done."""
    import pytorch_lightning as pl
    import torch

    pl.seed_everything(run.cfg.seed, workers=True, verbose=False)
    if run.cfg.threads:
        torch.set_num_threads(run.cfg.threads)
    for stage in run.cfg.stages:
        if run.is_done(stage):
            log.info("%s: done before", stage)
            continue
        function = getattr(importlib.import_module(f"experiments.{FOLDER.get(stage, 'stages')}.{stage}"), stage)
        began = time.monotonic()
        facts = function(run)
        run.finish_stage(stage, time.monotonic() - began, facts)
