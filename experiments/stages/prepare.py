"""Stage ``prepare``: the data is there and readable; simulated data is written."""

from __future__ import annotations

import logging

from experiments.run import parts
from experiments.run.directory import Run
from experiments.stages import Facts, stage

log = logging.getLogger("run")


@stage()
def prepare(run: Run) -> Facts:
    """Build the datamodule, which writes simulated data where the recipe asks for it, and report each split's size."""
    splits = {name: len(dataset) for name, dataset in parts.datamodule(run).splits.items()}
    log.info("prepare: %s", ", ".join(f"{size} {name}" for name, size in splits.items()))
    return {"splits": splits}
