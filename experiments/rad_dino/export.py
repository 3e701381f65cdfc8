"""Stage ``export``: the trained encoder as a folder that transformers, timm's users and the alignment family load."""

from __future__ import annotations

import logging

from experiments.run import parts
from experiments.run.directory import Run
from experiments.stages import Facts, stage
from models.rad_dino.checkpoint import export_transformers

log = logging.getLogger("run")


@stage(repeat=True, needs_weights=True)
def export(run: Run) -> Facts:
    """Write the teacher's backbone and the preprocessing of evaluation to ``<run>/export``; an older one is replaced whole.

    Another recipe reads it with ``encoder/vision=<a Hugging Face option> encoder.vision.weights=<run>/export``.
    """
    data = parts.datamodule(run)
    module = parts.trained_module(run, data.facts())
    folder = export_transformers(module.encoder, run.dir / "export", data.preprocess)
    log.info("export: %s", folder)
    return {"folder": str(folder)}
